"""What tensors of every kind are made of: their memory, their bits and their numbers."""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage, nn
from torch.distributed._local_tensor import LocalTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ConfigurationError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is of no subclass, or of one without a dispatch of its own, as those of `nn.Parameter` are."""
    return type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def as_tensor(x: Tensor) -> Tensor:
    """A plain tensor without its class, unless that is one of torch's own; any other tensor as it is."""
    if type(x) in (Tensor, nn.Parameter, nn.Buffer) or not is_plain(x):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def has_storage(x: Tensor) -> bool:
    """Whether a tensor is a view of a storage, and no more."""
    return is_plain(x) and x.layout == torch.strided and not x.is_nested and torch._C._has_storage(x)


def held_in(x: Tensor) -> list[Tensor]:
    """The plain tensors in whose storages the numbers of a tensor are."""
    if is_traceable_wrapper_subclass(x):
        return [each for name in x.__tensor_flatten__()[0] for each in held_in(getattr(x, name))]
    if has_storage(x):
        return [x]
    if x.layout == torch.sparse_coo:
        return held_in(x.detach()._values())
    return held_in(x.detach().values()) if x.layout in _COMPRESSED else []


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def has_data(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be read: not those of the meta device, nor of a storage that was freed."""
    if not is_plain(x) or x.is_meta:
        return False
    if not has_storage(x) or x.numel() == 0:
        return True
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    packed = x.dtype in (torch.quint4x2, torch.quint2x4)
    return packed or x.untyped_storage().nbytes() >= (last + 1) * x.element_size()


def on_storage(x: Tensor, storage: UntypedStorage) -> Tensor:
    """What a plain tensor is on its storage, on another one."""
    made = torch.empty(0, dtype=x.dtype, device=x.device)
    made.set_(storage, x.storage_offset(), x.size(), x.stride())
    made = made.conj() if x.is_conj() else made
    return torch._neg_view(made) if x.is_neg() else made


def dense_parts(x: Tensor) -> list[Tensor]:
    """The plain, dense and real tensors that a tensor's numbers are in, and its indices where only a part is stored.

    None of a tensor on the meta device. Raises `ConfigurationError` for a subclass that does not tell of what it is
    made.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if x.layout == torch.jagged:
            own = [each for each in (x.values(), x.offsets(), x.lengths()) if each is not None]  # type: ignore[attr-defined]
            return [part for each in own for part in dense_parts(each)]
        simulated = isinstance(x, LocalTensor)  # an op with it runs on each rank
        if is_traceable_wrapper_subclass(x) and not simulated:
            return [part for name in x.__tensor_flatten__()[0] for part in dense_parts(getattr(x, name))]
        if not is_plain(x) and not simulated:
            raise ConfigurationError(
                f"a tensor of type {type(x).__name__} cannot be compared: its class does not tell of what it is made "
                "(__tensor_flatten__)"
            )
        if x.is_meta:
            return []
        if x.is_nested:
            return [part for each in x.unbind() for part in dense_parts(each)]
        if x.is_quantized:
            return [x.int_repr(), *_quantizer(x)]
        x = as_tensor(x).detach()
        x = x if x.layout == torch.strided else x.to_dense()
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        return [x.resolve_neg()]


def _quantizer(x: Tensor) -> list[Tensor]:
    """What numbers the integers of a quantised tensor stand for."""
    if x.qscheme() == torch.per_tensor_affine:
        return [torch.tensor([x.q_scale(), float(x.q_zero_point())], dtype=torch.float64, device=x.device)]
    axis = torch.tensor([x.q_per_channel_axis()], device=x.device)
    return [x.q_per_channel_scales(), x.q_per_channel_zero_points(), axis]


def bits(part: Tensor) -> Tensor:
    """The bits of a dense part, as integers of its shape."""
    return part.view(_INTEGERS[part.element_size()])


def numbers(part: Tensor) -> Tensor | None:
    """The values of a dense part in float64; None for a dtype that is but a name for bits."""
    if part.dtype in _OPAQUE:
        return None
    return part.to(torch.float64)


_OPAQUE = frozenset(
    getattr(torch, name)
    for name in (
        *(f"{sign}int{count}" for sign in ("", "u") for count in range(1, 8)),
        *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
)
"""Dtypes for which torch has no arithmetic."""
