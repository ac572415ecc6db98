"""States and modes; symbolic lengths."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sp_compile import sp_backend

from .table import WIDE, Parts, X, ids, program, single

# States and modes


@program(X)
def views_written(m: Parts, x: Tensor) -> Any:
    y = m.block(x).clone()
    v = y.view(2, 13, 3, 4)
    v[:, :, 1] *= 2
    v.transpose(1, 2)[:, 0].add_(m.bias[0])
    y[:, 2:11].mul_(m.w)
    return (y, v.sum(1))


@program(X)
def copy_into(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    out = torch.empty(2, 20, 12, dtype=x.dtype).fill_(1.0)
    out[:, :13] = y
    out[:, 13:].copy_(y[:, :7])
    return (out, m.block(out))


@program(X)
def zeros_scatter(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    out = y.new_zeros(2, 13, 24)
    out[..., :12] = y
    out[..., 12:] = y.flip(-1)
    return out @ m.mod.weight[:24]


@program(X)
def input_inplace(m: Parts, x: Tensor) -> Any:
    y = x * 1
    y.add_(m.w)
    z = m.block(y)
    z[:, 1:].add_(y[:, :-1])
    return (z, y)


@program(X, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1})
def buffer(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    m.count.add_(y.detach().mean())
    return y * m.count


@program(X, moves={"all_to_all": 8, "all_reduce": 2, "gather_output": 1})
def no_grad_region(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    with torch.no_grad():
        s = y.std(1, keepdim=True) * m.w
        z = m.block(x)
    return y / s * m.w + z


@program(X)
def grad_modes(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        p = m.mat.softmax(0)
    y = m.block(x @ p)
    with torch.no_grad():
        e = y.mean(1)
    with torch.no_grad():
        with torch.enable_grad():
            z = y * m.w
        f = z.sum(1)
    return (z, y - e[:, None], f * m.w)


@program(X, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1})
def detach_mix(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.detach() * m.w + y, (y - y.detach()).sum())


@program(X, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 1})
def returns(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return {"a": y, "b": y, "c": None, "x": x, "n": (y.mean(), 3)}


@program(X)
def alias_out(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y, y.view(-1), y[:, :5], y.transpose(1, 2), y.detach())


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def checkpointed(m: Parts, x: Tensor) -> Any:
    return checkpoint(m.block, checkpoint(m.block, x, use_reentrant=False), use_reentrant=False)


@program(X)
def checkpoint_nograd(m: Parts, x: Tensor) -> Any:
    y = checkpoint(m.block, x, use_reentrant=False)
    with torch.no_grad():
        s = checkpoint(m.block, y, use_reentrant=False).amax(1, keepdim=True)
    return y / s + s * m.w


@program(X, moves={"all_to_all": 8, "gather_output": 1, "all_reduce": 1})
def graph_break(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    torch._dynamo.graph_break()
    return m.block(y).mean(1)


@program(X, moves={"all_to_all": 8, "all_reduce": 1, "gather_output": 2})
def item_branch(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    if y.mean().item() > 1000000000.0:
        return y
    return m.block(y) * 2


@program(X)
def numbers(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    S = y.shape[1]
    return (
        y * torch.arange(S, dtype=x.dtype)[:, None] / S + S,
        y.new_zeros(2, S),
        torch.full_like(y, S),
        y.new_ones(y.shape) * y,
        y.numel(),
    )


@program(X)
def int_out(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (
        (y * 10).long(),
        (y > 0).sum(1),
        (y > 0).any(1),
        (y > 0).all(-1),
        y.argmax(-1),
        (y > 0).float().mean(),
        y.amax((0, 1, 2)),
        (y * 10).long().amax(1),
        (y * 3).int().sum(),
    )


@program(X)
def complexes(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = torch.complex(y[..., :6], y[..., 6:])
    z = z * torch.polar(m.w[:6].abs(), m.w[6:])
    return (z.abs(), z.real.sum(1), torch.view_as_real(z).mean(1), z.mean(1).angle())


@program(X)
def asserts(m: Parts, x: Tensor) -> Any:
    torch._assert_async((x > -1e9).all())
    return m.block(x)


# Symbolic lengths


@program(X, dynamic=True, moves={"all_to_all": 4, "gather_output": 1})
def d_plain(m: Parts, x: Tensor) -> Any:
    return m.block(x, is_causal=True)


@program((1, 11, 12), dynamic=True, moves={"all_to_all": 4, "all_reduce": 1, "gather_output": 2})
def d_mean(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.sum(1) / x.shape[1], y * x.shape[1], torch.arange(x.shape[1]) * y[..., 0])


@program((13, 13, 12), dynamic=True)
def d_batch_is_length(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (y.transpose(0, 1) + m.w, y.view(-1, 12).mean(0), y.view(x.shape[0] * x.shape[1], 12)[:, :4])


@program(X, X, dynamic=True)
def d_joint(m: Parts, x: Tensor, t: Tensor) -> Any:
    y = m.block(torch.cat([t, x], 1))
    t, x = y.split([t.shape[1], x.shape[1]], 1)
    return (x, t, y[:, : t.shape[1]].mean(1))


@program(X, dynamic=True)
def d_cls(m: Parts, x: Tensor) -> Any:
    y = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1)
    y = m.block(y)
    return (y[:, 0], y[:, 1:], y[:, -1])


@program(X, ids(2, 13, high=17), dynamic=True)
def d_ce_flat(m: Parts, x: Tensor, t: Tensor) -> Any:
    lg = m.head(m.block(x))
    return F.cross_entropy(lg.view(-1, 17), F.pad(t[:, 1:], (0, 1), value=-100).view(-1))


@program((13, 2, 12), dynamic=True, moves={"all_to_all": 4, "gather_output": 1})
def d_sbc(m: Parts, x: Tensor) -> Any:
    S, B, _ = x.shape
    y = m.o(x.reshape(S * B, -1)).view(S, B, -1)
    return m.block(y.transpose(0, 1)).transpose(0, 1).reshape(S * B, 12)


@program(X, dynamic=True)
def d_shift(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return (torch.cat([y[:, -1:], y[:, :-1]], 1) * m.w, y.roll(1, 1), y.flip(1), y[:, ::2], y[:, 2:-2])


@program(WIDE, kv=2, heads=6, parts=4, dynamic=True, moves={"all_to_all": 4, "gather_output": 1})
def d_gqa(m: Parts, x: Tensor) -> Any:
    q, k, v = (m.split(m.q(x)), m.repeated(m.split(m.k(x), 2)), m.repeated(m.split(m.v(x), 2)))
    return m.o(m.join(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


@program(X, dynamic=True)
def d_buf(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    m.count.add_(y.detach().sum())
    return (y / m.count, y.new_zeros(x.shape[0], x.shape[1]))


@program((2, 5, 12))
def view_of_a_written_value_without_grad(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    z = y.clone()
    z[:, 1:3] = 0.3
    with torch.no_grad():
        w = z.squeeze()
    return y, z * 2, w


@program(X)
def views_that_change_nothing_without_grad(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    with torch.no_grad():
        a, b, c, d = y[0:2], y.view(2, 13, 12), y.expand_as(y), F.dropout(y, 0.3, False)
    return y * 1, a * m.w, b * m.w, c + y, d * 3


@program(X)
def constant_in_the_model(m: Parts, x: Tensor) -> Any:
    return m.block(x) * torch.tensor([1.0, 0.1] * 6, dtype=x.dtype)


# Modes, opaque parts, nested compilation


class Tripled(torch.autograd.Function):
    """Two results, of which one is a view; and a gradient that no tracing of the forward would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Any:
        ctx.save_for_backward(x, w)
        return x.view_as(x), (x * w).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] * 3 + gradients[1][:, None] * w, (gradients[0] * x * 5).sum((0, 1))


class Bent(torch.autograd.Function):
    """Pointwise, with a backward that is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        bent = x * torch.tanh(y * 0.5)
        ctx.save_for_backward(x, bent)
        return bent, x.abs() + 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, bent = ctx.saved_tensors
        masked = torch.where(x > 0, gradients[0], gradients[0] * 0.1)
        return masked * 3 + (1 - bent * bent) * gradients[1], -gradients[0] / (x * x + 1)


@program(X, parts=4, moves={"all_to_all": 8, "gather_output": 2})
def a_pointwise_function(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    bent, far = Bent.apply(y, m.o(y))
    return m.block(bent), far * m.w


class WithPenalty(torch.autograd.Function):
    """A backward that is not 0 where the gradient is: 0.1 is added for each row, and padding is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * (1 - x.tanh() ** 2) + 0.1


@program(X, parts=4, whole=True)
def a_function_that_adds_to_the_gradient(m: Parts, x: Tensor) -> Any:
    return m.o(WithPenalty.apply(m.o(m.block(x))))


@program(X, whole=True, moves={"all_to_all": 8, "all_gather": 1, "gather_output": 1})
def custom_backward(m: Parts, x: Tensor) -> Any:
    y, z = Tripled.apply(m.block(x), m.w)
    return m.block(y), z


@program(X, whole=True)
def custom_backward_in_a_checkpoint(m: Parts, x: Tensor) -> Any:
    return checkpoint(lambda t: m.block(Tripled.apply(t, m.w)[0]), m.block(x), use_reentrant=False)


@program(X, dynamic=True, whole=True, moves={"all_to_all": 8, "all_gather": 1, "gather_output": 1})
def under_vmap(m: Parts, x: Tensor) -> Any:
    return m.block(torch.vmap(lambda row: row.cumsum(0) * m.w)(m.block(x)))


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def returned_twice(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return {"first": y, "both": (y, y)}


class SumsItsGradient(torch.autograd.Function):
    """Pointwise forward; each row's gradient is that of all rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].sum(0, keepdim=True).expand_as(gradients[0])


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def pointwise_under_vmap(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.block(torch.vmap(lambda a, b: a.sin() * b + b)(y, y.cos()))


@program(X, whole=True)
def mapped_over_the_sequence(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.block(torch.vmap(lambda a, b: a.sin() * b, in_dims=1, out_dims=1)(y, y.cos()))


@program(X, moves={"all_to_all": 8, "gather_output": 2})
def a_gradient_of_all_rows_under_vmap(m: Parts, x: Tensor) -> Any:
    return m.block(torch.vmap(SumsItsGradient.apply)(m.block(x)))


@program(X, moves={"all_to_all": 8, "gather_output": 2})
def a_gradient_of_all_rows_in_a_mapped_function(m: Parts, x: Tensor) -> Any:
    return m.block(torch.vmap(lambda t: SumsItsGradient.apply(t) * m.w)(m.block(x)))


@program(X, whole=True)
def gradient_inside(m: Parts, x: Tensor) -> Any:
    return m.block(torch.func.grad(lambda t: (t.sin() * m.w).sum())(m.block(x)))


@program(X, moves={"all_to_all": 10, "gather_output": 1})
def scan_by_pairs(m: Parts, x: Tensor) -> Any:
    return m.block(associative_scan(lambda a, b: a * b, m.block(x).tanh(), 1, combine_mode="generic"))


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def chosen_kernel(m: Parts, x: Tensor) -> Any:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        y = m.block(x, is_causal=True)
    return m.block(y)


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def nested_compilation(m: Parts, x: Tensor) -> Any:
    inner = torch.compile(m.block, backend=partial(sp_backend, options={"inner_backend": "eager"}))
    return m.block(inner(x)) * m.w


@program(X, moves={"all_to_all": 8, "gather_output": 1})
def nested_region(m: Parts, x: Tensor) -> Any:
    region = torch.compiler.nested_compile_region(Parts.block)
    return region(m, region(m, x)) * m.w


@program(X, moves={"all_to_all": 8, "gather_output": 2})
def gradients_inside_no_grad(m: Parts, x: Tensor) -> Any:
    with torch.no_grad():
        with torch.enable_grad():
            y = m.block(x)
        z = m.block(y)
    return y * m.w, z


@program(X, moves={"all_to_all": 8, "gather_output": 2})
def gradients_switched_by_hand(m: Parts, x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    y = m.block(x)
    torch.set_grad_enabled(True)
    return m.block(x) * y, y


@program(single(X), double=False, tolerance=1e-2, moves={"all_to_all": 8, "gather_output": 2})
def half_precision_inside(m: Parts, x: Tensor) -> Any:
    """Of single precision: on the CPU, autocast leaves double precision as it is."""
    with torch.autocast("cpu", torch.bfloat16):
        y = m.attend(m.norm(x))
        with torch.autocast("cpu", enabled=False):
            z = m.block(x)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    return y, z * m.w


@program(X, moves={"all_to_all": 8, "gather_output": 2})
def as_many_rows_as_are_positive(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return m.block(y), (y > 0).nonzero()


@program(X, moves={"all_to_all": 4, "gather_output": 1})
def parameters_returned(m: Parts, x: Tensor) -> Any:
    return m.block(x), m.w, m.w[2:4], m.mat.t(), x


@program((2, 0, 12))
def no_rows(m: Parts, x: Tensor) -> Any:
    y = torch.cat([x, m.cls.expand(2, 1, 12).repeat(1, 5, 1)], 1)
    return m.block(y), x.sum(1), m.norm(x)


@program((1, 3, 12), parts=4, shards=False)
def fewer_rows_than_ranks(m: Parts, x: Tensor) -> Any:
    return m.block(m.block(x)), m.block(x).mean(1)


@program(WIDE, kv=2, heads=6, parts=4)
def gqa_output_is_the_next_query(m: Parts, x: Tensor) -> Any:
    k, v = (m.split(f(x), 2).repeat_interleave(3, 1) for f in (m.k, m.v))
    o = F.scaled_dot_product_attention(m.split(m.q(x)), k, v)
    return m.join(F.scaled_dot_product_attention(o, k, v))


@program(X)
def metadata_of_a_shard(m: Parts, x: Tensor) -> Any:
    y = m.block(x)
    return y.new_zeros(2, 13) + y[..., 0], y.new_ones(y.shape) * y


@program((1, 13, 12), parts=4, whole=True)
def rows_by_their_place_in_memory(m: Parts, x: Tensor) -> Any:
    """What is gathered lies as its shape says, and on one device as it was made: transposed."""
    y = m.block(x)
    heads = m.split(m.q(y)).as_strided((13, 12), (12, 1))
    return y.mT.as_strided((12, 13), (1, 12)) * 2, (y + 1).mT.as_strided((5, 7), (2, 3), 4), heads


@program((2, 7, 12), parts=2)
def weights_behind_a_detached_exchange(m: Parts, x: Tensor) -> Any:
    """What is exchanged together with others and has no gradient gives its weights none, and not zeros."""
    y = m.norm(x)
    q, k, v = (m.split(to(y)) for to in (m.q, m.k, m.v))
    attended = m.join((q @ k.mT).softmax(-1).detach() @ v)
    return attended, m.up(y).cumsum(1) * m.down(attended[..., :1].expand(2, 7, 20)).detach().sum()


@program((2, 7, 12), parts=3)
def weights_of_a_detached_sum(m: Parts, x: Tensor) -> Any:
    y = m.norm(x)
    return m.k(y).cumsum(1) * m.q(y).cumsum(1).detach(), torch.where(m.v(y).cumsum(1) > 0, y.cumsum(1), 0.0)


@program((2, 7, 12), parts=2)
def complex_numbers_that_were_exchanged(m: Parts, x: Tensor) -> Any:
    """The two halves of a number lie apart where channels were sent."""
    sums = torch.view_as_complex(x.cumsum(1).unflatten(-1, (6, 2)))
    return torch.view_as_real(sums * 2), torch.view_as_complex(m.q(x).cumsum(1).unflatten(-1, (6, 2))).abs()


@program((2, 13, 12), parts=3, dynamic=True, whole=True)
def padded_by_a_length(m: Parts, x: Tensor) -> Any:
    """Pads that are symbols: as many rows again, to whole windows, and rows cut off."""
    n = x.shape[1]
    doubled = F.pad(x, (0, 0, 0, n)).cumsum(1)[:, :n] * m.w
    windows = F.pad(m.norm(x), (0, 0, 0, -n % 4)).unflatten(1, (-1, 4)).mean(2)
    spectrum = torch.fft.rfft(m.q(x), n=2 * n, dim=1).abs()
    return doubled, windows, spectrum, F.pad(x, (0, 0, -(n // 4), 0)).cumsum(1)
