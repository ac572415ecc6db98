"""Views, and ops that need some dimension whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .brute_force import Case, aten, case, f


def cases() -> Iterator[Case]:
    for source, target_shape in [
        ((2, 5, 21), [2, 5, 3, 7]),
        ((2, 5, 3, 7), [2, 5, 21]),
        ((2, 5, 7), [10, 7]),
        ((10, 7), [2, 5, -1]),
        ((1, 5, 7), [5, 1, 7]),
        ((6, 4), [2, 12]),
        ((6, 4, 5), [4, 6, 5]),
        ((4, 6, 5), [6, 20]),
        ((7,), [1, 7, 1]),
    ]:
        for target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
            yield case(target, f(*source), target_shape)
    yield case(aten.unsqueeze.default, f(5, 7), -1)
    yield case(aten.unsqueeze.default, f(5, 7), 1)
    yield case(aten.squeeze.default, f(1, 3, 1, 2))
    yield case(aten.squeeze.dim, f(3, 1, 2), 1)
    yield case(aten.squeeze.dim, f(3, 1, 2), -1)
    yield case(aten.squeeze.dims, f(3, 1, 2), [0, 1])
    yield case(aten.squeeze.dims, f(3, 1, 2), [])
    yield case(aten.permute.default, f(2, 5, 7), [2, 0, -2])
    yield case(aten.transpose.int, f(2, 5, 7), -1, 0)
    yield case(aten.t.default, f(5, 7))
    yield case(aten.t.default, f(7))
    yield case(aten.view_as_complex.default, f(5, 7, 2))
    yield case(aten.view_as_real.default, torch.complex(f(5, 7), f(5, 7)))
    yield case(aten.expand.default, f(5, 1, 7), [3, 5, 2, 7])
    yield case(aten.expand.default, f(5, 1, 7), [-1, 3, -1])
    yield case(aten.repeat.default, f(5, 1, 7), [3, 2, 3, 1])
    yield case(aten.repeat_interleave.self_int, f(5, 3, 7), 2, 1)
    yield case(aten.repeat_interleave.self_int, f(5, 3, 7), 2, -2, output_size=6)
    yield case(aten.repeat_interleave.self_int, f(5), 3)
    yield case(aten.cat.default, [f(2, 5, 7), f(2, 3, 7), f(2, 1, 7)], 1)
    yield case(aten.cat.default, [f(5, 7), f(5, 7)], -1)
    yield case(aten.cat.default, [f(5, 7)])
    yield case(aten.cat.default, [f(5, 7), f(5, 0), f(5, 3)], -1)
    yield case(aten.cat.default, [f(0, 7), f(5, 7)])
    yield case(aten.stack.default, [f(5, 7), f(5, 7), f(5, 7)], -1)
    yield case(aten.split.Tensor, f(2, 7, 3), 5, 1)
    yield case(aten.split.Tensor, f(2, 7, 3), 7, 1)
    yield case(aten.unsafe_split.Tensor, f(2, 6, 3), 2, -2)
    yield case(aten.split_with_sizes.default, f(2, 9, 3), [1, 5, 3], 1)
    yield case(aten.split_with_sizes.default, f(2, 9, 3), [0, 6, 3], 1)
    yield case(aten.split_with_sizes.default, f(2, 5, 3), [5, 0], 1)
    yield case(aten.unbind.int, f(3, 5, 7), 0)
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [0, 0, 2, 3], 1.5)
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [1, 0])
    yield case(aten.constant_pad_nd.default, f(2, 5, 7), [0, 0, -1, 2])
    for target in (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default):
        yield case(target, f(5, 7), -2)
    yield case(aten.sort.default, f(5, 7), 0)
    yield case(aten.sort.stable, f(5, 7), stable=True, dim=0)
    yield case(aten.topk.default, f(5, 7), 3, 1)
    yield case(aten.glu.default, f(5, 14), -1)
    yield case(aten.flip.default, f(3, 5, 7), [0, -1])
    yield case(aten.roll.default, f(3, 5, 7), [2], [1])
    yield case(aten.roll.default, f(5, 7), [2])
    yield case(aten.unfold.default, f(3, 7, 5), 1, 3, 2)
    yield case(aten.slice_scatter.default, f(3, 7, 5), f(3, 2, 5), 1, 2, 4)
    yield case(aten.select_scatter.default, f(3, 7, 5), f(3, 5), 1, 2)
    yield case(aten._fft_r2c.default, f(3, 5, 7), [1], 0, True)
    yield case(aten._fft_c2c.default, torch.complex(f(3, 5, 7), f(3, 5, 7)), [2], 0, True)
    yield case(aten._fft_c2r.default, torch.complex(f(3, 5, 4), f(3, 5, 4)), [2], 0, 7)

    yield case(aten.unfold.default, f(3, 6, 5), 1, 2, 2)
    yield case(aten.unfold.default, f(3, 7, 5), 1, 2, 2)
    yield case(aten.unfold.default, f(3, 7, 5), -2, 7, 7)
    yield case(aten.rot90.default, f(3, 5, 7), 1, [0, 2])
    for target in (aten.cummax.default, aten.cummin.default):
        yield case(target, f(5, 7), -2)
    for offset in (0, 1, -2):
        yield case(aten.diagonal.default, f(3, 5, 2, 7), offset, 1, -1)
        yield case(aten.diag_embed.default, f(3, 5, 2), offset, 0, -2)
    yield case(aten.diagonal.default, f(5, 5))
