"""Convolutions, pooling, upsampling, padding and patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from .brute_force import Case, aten, case, f


def cases() -> Iterator[Case]:
    yield case(aten.conv1d.default, f(2, 3, 11), f(5, 3, 4), f(5))
    yield case(aten.conv1d.default, f(2, 6, 11), f(10, 3, 4), f(10), [1], [3], [1], 2)
    yield case(aten.conv1d.default, f(2, 5, 11), f(5, 1, 4), None, [1], [3], [1], 5)
    yield case(aten.conv1d.default, f(5, 11), f(10, 1, 4), f(10), groups=5)
    yield case(aten.conv1d.padding, f(2, 3, 11), f(5, 3, 3), f(5), [1], "same")
    yield case(aten.conv2d.default, f(2, 3, 8, 6), f(5, 3, 2, 2), f(5), [2, 2])
    yield case(aten.conv2d.padding, f(2, 3, 8, 6), f(5, 3, 2, 2))
    yield case(aten.conv3d.default, f(2, 3, 4, 6, 4), f(5, 3, 2, 2, 2))
    yield case(aten.conv3d.padding, f(2, 3, 4, 6, 4), f(5, 3, 2, 2, 2), f(5), [1], "valid")
    yield case(aten.convolution.default, f(2, 3, 11), f(5, 3, 4), f(5), [1], [0], [1], False, [0], 1)
    yield case(aten.avg_pool2d.default, f(2, 3, 6, 8), [2, 2])
    yield case(aten._adaptive_avg_pool2d.default, f(2, 3, 6, 8), [2, 4])
    yield case(aten.max_pool2d_with_indices.default, f(2, 3, 6, 8), [2, 2])
    yield case(aten.upsample_nearest2d.default, f(2, 3, 5, 7), [10, 14])
    yield case(aten.upsample_bilinear2d.default, f(2, 3, 5, 7), [10, 14], False)
    yield case(aten.upsample_bicubic2d.default, f(2, 3, 5, 7), [10, 14], False)

    yield case(aten.conv1d.default, f(2, 3, 12), f(5, 3, 2), f(5), [2])
    yield case(aten.conv1d.default, f(2, 3, 11), f(5, 3, 2), f(5), [2])
    yield case(aten.conv1d.default, f(2, 3, 11), f(5, 3, 1), f(5), dilation=[2])
    yield case(aten.conv1d.default, f(2, 3, 12), f(5, 3, 2), f(5), [2], [0], [2])
    yield case(aten.conv1d.default, f(2, 3, 14), f(5, 3, 2), None, [2], [1])
    # As many windows as if they lay side by side.
    yield case(aten.conv1d.default, f(2, 3, 12), f(5, 3, 3), None, [3], [1])
    yield case(aten.conv1d.default, f(2, 3, 6), f(5, 3, 3), None, [2])
    # Windows that overlap, or leave rows out: stride, padding, dilation, groups.
    for kernel, *rest in (
        (3, [1], [1]),
        (3, [2], [1]),
        (10, [5], [0]),
        (2, [3], [0]),
        (4, [1], [2]),
        (3, [1], [5]),
        (3, [1], [2], [2]),
        (3, [3], [2], [2]),
        (9, [1], [4]),
    ):
        yield case(aten.conv1d.default, f(2, 4, 11), f(6, 2, kernel), f(6), *rest, groups=2)
    yield case(aten.conv1d.default, f(4, 17), f(4, 1, 3), None, [2], [1], groups=4)
    yield case(aten.conv1d.padding, f(2, 3, 11), f(5, 3, 4), f(5), [1], "same")
    yield case(aten.conv1d.padding, f(2, 3, 11), f(5, 3, 4), f(5), [2], "valid")
    yield case(aten.conv2d.default, f(2, 3, 7, 6), f(4, 3, 3, 3), f(4), [1], [1])
    yield case(aten.conv2d.default, f(3, 7, 9), f(4, 3, 3, 2), f(4), [2, 1], [1, 0])
    yield case(aten.conv2d.padding, f(2, 3, 7, 6), f(4, 3, 3, 2), None, [1], "same")
    yield case(aten.conv3d.default, f(2, 3, 5, 4, 6), f(4, 3, 3, 1, 3), None, [1, 1, 2], [1, 0, 1])
    yield case(aten.max_pool2d_with_indices.default, f(2, 3, 8, 6), [2, 1], [2, 1], [0, 0], [2, 1], True)
    yield case(aten.conv2d.default, f(2, 6, 8, 9), f(4, 3, 2, 3), f(4), [2, 3], groups=2)
    yield case(aten.conv2d.default, f(2, 3, 8, 9), f(5, 3, 2, 2), f(5), [2, 1])
    yield case(aten.conv1d.padding, f(2, 3, 11), f(5, 3, 1), f(5), [1], "same")
    for groups, weight in ((1, f(6, 5, 2)), (3, f(6, 5, 2)), (6, f(6, 1, 2))):
        channels = weight.shape[1] * groups
        for stride, padding, extra in (([2], [0], [0]), ([2], [0], [1]), ([1], [0], [0]), ([2], [1], [0])):
            rest = (stride, padding, [1], True, extra, groups)
            yield case(aten.convolution.default, f(2, 6, 7), weight, f(channels), *rest)
    yield case(aten.convolution.default, f(2, 3, 5, 7), f(3, 4, 2, 3), None, [2, 3], [0], [1], True, [0], 1)
    yield case(aten.avg_pool2d.default, f(2, 3, 7, 9), [2, 3], [2, 3])
    yield case(aten.avg_pool2d.default, f(3, 6, 9), [2, 3], [], [1, 0])
    yield case(aten.avg_pool3d.default, f(2, 3, 4, 6, 9), [2, 1, 3])
    for pool in (aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default):
        yield case(pool, f(2, 3, 6, 8), [3, 2])
        yield case(pool, f(3, 7, 9), [2, 3])
    yield case(aten.max_pool2d_with_indices.default, f(2, 3, 6, 8), [2, 2], [1, 2], [1, 0])
    yield case(aten.max_pool3d_with_indices.default, f(2, 3, 4, 6, 9), [2, 2, 3])
    yield case(aten.adaptive_max_pool3d.default, f(2, 3, 4, 6, 9), [2, 4, 3])
    yield case(aten._adaptive_avg_pool2d.default, f(2, 3, 5, 8), [5, 1])
    yield case(aten._adaptive_avg_pool3d.default, f(2, 3, 4, 6, 9), [2, 4, 3])
    for exact in ("upsample_nearest", "_upsample_nearest_exact"):
        one, two, three = (getattr(aten, f"{exact}{ndim}d").default for ndim in (1, 2, 3))
        yield case(one, f(2, 3, 5), [20])
        yield case(one, f(2, 3, 5), [10], 2.0)
        yield case(one, f(2, 3, 10), [20], 2.05)
        yield case(one, f(2, 3, 7), [5])
        yield case(two, f(2, 3, 5, 7), [10, 21])
        yield case(three, f(2, 3, 2, 5, 7), [4, 5, 14], None, None, 2.0)
        one, two, three = (getattr(aten, f"{exact}{ndim}d").vec for ndim in (1, 2, 3))
        yield case(one, f(2, 3, 5), [20], None)
        yield case(one, f(2, 3, 5), None, [4.0])
        yield case(one, f(2, 3, 10), None, [2.05])
        yield case(two, f(2, 3, 5, 7), None, [2.0, 3.0])
        yield case(three, f(2, 3, 2, 5, 7), None, [2.0, 1.0, 2.0])
    yield case(aten.upsample_linear1d.default, f(2, 3, 5), [10], False)
    yield case(aten.upsample_trilinear3d.default, f(2, 3, 2, 5, 3), [4, 10, 6], True)
    for target in (aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default):
        yield case(target, f(2, 3, 5, 7), [3, 4], False)
    yield case(aten.grid_sampler_2d.default, f(2, 3, 5, 7), f(2, 11, 13, 2) / 2, 0, 0, False)
    yield case(aten.grid_sampler_3d.default, f(2, 3, 5, 7, 4), f(2, 3, 11, 13, 3) / 2, 0, 0, False)
    for kind in ("reflection", "replication"):
        one, two, three = (getattr(aten, f"{kind}_pad{ndim}d").default for ndim in (1, 2, 3))
        yield case(one, f(2, 3, 5), [1, 2])
        yield case(two, f(2, 3, 5, 7), [1, 2, 0, 0])
        yield case(three, f(2, 3, 5, 7, 4), [0, 0, 1, 1, 0, 0])
    for stride, padding in (([2, 3], [0, 0]), ([1, 1], [0, 0]), ([2, 3], [0, 3])):
        yield case(aten.im2col.default, f(2, 5, 4, 9), [2, 3], [1, 1], padding, stride)
        columns = F.unfold(f(2, 5, 4, 9), [2, 3], 1, padding, stride)
        yield case(aten.col2im.default, columns, [4, 9], [2, 3], [1, 1], padding, stride)
    yield case(aten.im2col.default, f(5, 4, 9), [2, 3], [1, 1], [0, 0], [2, 3])
    yield case(aten.pixel_shuffle.default, f(2, 12, 5, 7), 2)
    yield case(aten.pixel_unshuffle.default, f(2, 3, 4, 6), 2)
    yield case(aten.channel_shuffle.default, f(2, 15, 7), 3)
