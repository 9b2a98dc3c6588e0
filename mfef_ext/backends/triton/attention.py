"""Channel attention, then spatial attention, in Triton: forward and backward.

What is computed (reference.dual_attention): mean and maximum of every channel, the MLP and its
sigmoid (channel gate c), z = y * c, maximum and mean of z over channels, their k x k convolution
and its sigmoid (spatial gate g), out = y * c * g; and all gradients.

There are two plans. The shape of one image chooses, never the number of images, so that an image's
result does not depend on its neighbours:

- **image**: one program does everything for one image. Its threads exchange data through a scratch
  row in global memory, with barriers in between. For small images, where launches would cost more
  than the work. Forward 1 launch, backward 1 launch.
- **tiles**: one program per image and tile of pixels, which walks all channels of its pixels.
  Forward: statistics (unless the convolution has them), gate, pool, output. Backward: gate, pool,
  spatial (and, in the program that finishes an image, the MLP's backward), input.

Gradients of parameters are one more launch in both: sums over the images in a fixed order.

Bytes: the forward reads y twice (with the convolution's statistics; else three times) and writes
out once; the backward of the tiles plan reads y twice and grad three times and writes grad_y once.
In the image plan all reads but the first come from caches. All else is (N, H, W) or (N, C).

Order of every sum: element by element along the loop of a program, then a tree across the tile;
partial results in the order of their tiles. The only atomic counts finished tiles, in integers.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv import partial_statistics
from .launch import REGISTERS, Launch, Layout, Strides, aligned, contiguous, map_like, meta_like
from .tuning import Tile, fastest_tile, powers_of_two

# --- what kernels are given -------------------------------------------------------------------


class Size(NamedTuple):
    """Of one image."""

    channels: int
    pixels: int
    hidden: int  # units of the MLP


class Saved(NamedTuple):
    """What the forward computes for the backward, per channel (N, C) or pixel (N, H, W).

    In a kernel all are None if nothing is saved.
    """

    mean: Tensor | None = None  # float32
    max: Tensor | None = None  # float32
    max_index: Tensor | None = None  # int32, h * W + w
    spatial_gate: Tensor | None = None  # float32
    channel_index: Tensor | None = None  # int32, of the channel with the maximum of z


NOTHING_SAVED = Saved()


class Parameters(NamedTuple):
    """Of the attention; biases may be None."""

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    spatial_weight: Tensor


class Workspace(NamedTuple):
    """The scratch row of an image, float32: where its sections begin, counted in elements.

    The threads of a program exchange data through it. Every section is stored by all of them and
    read by any of them one debug_barrier() later: bar.sync is all the order that the threads of one
    block need, and they share one L1. No section is stored twice between two barriers, and nothing
    is read by a non-coherent load (ld.global.nc), of which Triton emits none.
    """

    channel_gate: int  # (C,)
    mean: int  # (C,) forward, where it is not saved
    max: int  # (C,) forward, where it is not saved
    grad_gate_logit: int  # (C,)
    grad_mean: int  # (C,)
    grad_max: int  # (C,)
    grad_spatial_logit: int  # (H, W)
    pooled_max: int  # (H, W)
    pooled_mean: int  # (H, W)
    grad_pooled_max: int  # (H, W)
    grad_pooled_mean: int  # (H, W)
    # Rows of (hidden,): the sum of both after the ReLU, from the mean and from the max before it,
    # gradients of these two. The forward has the first row only.
    hidden: int
    spatial_parts: int  # per tile of pixels the part of the spatial weight's gradient
    gate_parts: int  # per tile of pixels the part of the channel gate's gradient (C,); tiles plan
    row: int  # elements of the whole row
    spatial_part: int  # elements from one tile's part to the next
    gate_part: int


def _round_up(count: int) -> int:
    """To whole blocks of 64 bytes."""
    return (count + 15) // 16 * 16


def workspace(size: Size, taps: int, tiles: int, image_plan: bool, backward: bool) -> Workspace:
    """For one direction; ``taps``: elements of the spatial weight that can be reached."""
    channels, pixels, hidden = size
    forward = not backward
    spatial_part, gate_part = _round_up(taps), _round_up(channels)
    sections = (
        channels, channels * forward, channels * forward,
        channels * backward, channels * backward, channels * backward,
        pixels * backward, pixels, pixels, pixels * backward, pixels * backward,
        5 * hidden if backward else hidden,
        tiles * spatial_part * backward, 0 if image_plan else tiles * gate_part * backward,
    )  # fmt: skip
    begins = accumulate(map(_round_up, sections), initial=0)
    return Workspace._make([*begins, spatial_part, gate_part])


class _Image(NamedTuple):
    """The image of a program. Made in kernels."""

    index: Any  # int64
    row: Any  # pointer to its scratch row
    at: Workspace
    size: Size
    saved: Saved


class _Map(NamedTuple):
    """Pixels of an image's map. Made in kernels."""

    start: Any  # pointer to its first pixel
    offsets: Any  # of the pixels, within a channel
    channel: Any  # stride


class _Gradients(NamedTuple):
    """Of a tile of pixels, what the gradient of z depends on. Made in kernels."""

    p: Any
    spatial_gate: Any
    channel_index: Any
    pooled_max: Any  # gradient
    pooled_mean: Any  # gradient per channel


# --- maxima -----------------------------------------------------------------------------------
#
# A maximum and its index are compared as one int64 key that orders as torch.max does: NaN above
# everything, among equal values the lowest index first. So one integer maximum settles ties and
# NaN, in any order of comparison.


@triton.jit
def _encode(value, index):
    """int64 of a float32 value and its index >= 0; 0.0 and -0.0 are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _decode_value(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _decode_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _update_max(maximum, argmax, value, inside, index):
    """The running maximum and its index after one more value per element."""
    value = tl.where(inside, value, float("-inf"))
    better = (value > maximum) | ((value != value) & (maximum == maximum))
    return tl.where(better, value, maximum), tl.where(better, index, argmax)


# --- reading and writing ----------------------------------------------------------------------


@triton.jit
def _load(vector, i, count, OTHER: tl.constexpr = 0.0):
    return tl.load(vector + i, mask=i < count, other=OTHER)


@triton.jit
def _load_matrix(matrix, i, j, rows, columns):
    """matrix[i, j] of a contiguous (rows, columns), in float32; 0 outside."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    at = matrix + i[:, None] * columns + j[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pixel_offsets(p, strides, W, FLAT: tl.constexpr):
    """Of pixels p = h * W + w within a channel; FLAT: they are one distance apart."""
    if FLAT:
        offsets = p.to(tl.int64) * strides.w
    else:
        row = p // W
        offsets = row.to(tl.int64) * strides.h + (p - row * W).to(tl.int64) * strides.w
    return offsets


@triton.jit
def _map_at(tensor, strides, image, p, W, FLAT: tl.constexpr):
    """The image's map in a tensor (N, C, H, W), at pixels p."""
    start = tensor + image.index * strides.n
    return _Map(start, _pixel_offsets(p, strides, W, FLAT), strides.c)


@triton.jit
def _pointers(map, c):
    """[channels, pixels]."""
    return map.start + c.to(tl.int64)[:, None] * map.channel + map.offsets[None, :]


@triton.jit
def _load_map(map, c, inside):
    return tl.load(_pointers(map, c), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _inside(c, p, size):
    return (c < size.channels)[:, None] & (p < size.pixels)[None, :]


@triton.jit
def _image_of(index, work, at, size, saved):
    index = index.to(tl.int64)
    return _Image(index, work + index * at.row, at, size, saved)


@triton.jit
def _tile(work, at, size, saved, BLOCK_P: tl.constexpr):
    """Of a program per image and tile of pixels: the image, the tile's number and its pixels."""
    program = tl.program_id(0)
    tiles = tl.cdiv(size.pixels, BLOCK_P)
    tile = program % tiles
    image = _image_of(program // tiles, work, at, size, saved)
    return image, tile, tile * BLOCK_P + tl.arange(0, BLOCK_P)


# --- forward: parts ---------------------------------------------------------------------------


@triton.jit
def _pool_pixels(
    y, strides, c, begin, end, C, W,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum and key of the maximum of an image's channels c over its pixels begin .. end - 1."""
    lane = tl.arange(0, BLOCK_P)
    rows = y + c.to(tl.int64)[:, None] * strides.c
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    maximum = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_C, BLOCK_P), tl.int32) + (begin + lane)[None, :]
    for p0 in range(begin, end, BLOCK_P):
        p = p0 + lane
        inside = (c < C)[:, None] & (p < end)[None, :]
        at = rows + _pixel_offsets(p, strides, W, FLAT)[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += value
        maximum, argmax = _update_max(maximum, argmax, value, inside, p[None, :])
    return tl.sum(total, 1), tl.max(_encode(maximum, argmax), 1)


@triton.jit
def _pooled_pixels(image):
    """Pointers to the mean and the maximum of every channel."""
    if image.saved.mean is not None:
        mean = image.saved.mean + image.index * image.size.channels
        maximum = image.saved.max + image.index * image.size.channels
    else:
        mean = image.row + image.at.mean
        maximum = image.row + image.at.max
    return mean, maximum


@triton.jit
def _store_statistics(image, c, total, key):
    mean, maximum = _pooled_pixels(image)
    inside = c < image.size.channels
    tl.store(mean + c, total / image.size.pixels, mask=inside)
    tl.store(maximum + c, _decode_value(key), mask=inside)
    if image.saved.max_index is not None:
        to = image.saved.max_index + image.index * image.size.channels + c
        tl.store(to, _decode_index(key), mask=inside)


@triton.jit
def _reduce_statistics(
    image, statistics, tiles, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Mean and maximum of the image's channels from those of its tiles: see conv.py."""
    C = image.size.channels
    sums, maxima, indices = partial_statistics(statistics, image.index, tiles, C)
    tile = tl.arange(0, BLOCK_T)
    for c0 in range(0, C, BLOCK_S):
        c = c0 + tl.arange(0, BLOCK_S)
        total = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        key = tl.full((BLOCK_S, BLOCK_T), -0x7FFFFFFFFFFFFFFF, tl.int64)
        for t0 in range(0, tiles, BLOCK_T):
            t = t0 + tile
            inside = (c < C)[:, None] & (t < tiles)[None, :]
            at = c[:, None] * tiles + t[None, :]
            total += tl.load(sums + at, mask=inside, other=0.0)
            value = tl.load(maxima + at, mask=inside, other=float("-inf"))
            index = tl.load(indices + at, mask=inside, other=0x7FFFFFFF)
            key = tl.maximum(key, _encode(value, index))
        _store_statistics(image, c, tl.sum(total, 1), tl.max(key, 1))


@triton.jit
def _channel_gate(
    image, parameters, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The MLP of one image, from the mean and the maximum of its channels to their gate.

    The second layer needs only relu(from the mean) + relu(from the maximum). BACKWARD also keeps
    the values before the ReLU.
    """
    C = image.size.channels
    HIDDEN = image.size.hidden
    mean, maximum = _pooled_pixels(image)
    hidden = image.row + image.at.hidden
    unit = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_M)
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + unit
        from_mean = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        from_max = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            weight = _load_matrix(parameters.fc1_weight, j, c, HIDDEN, C)
            from_mean += weight * _load(mean, c, C)[None, :]
            from_max += weight * _load(maximum, c, C)[None, :]
        h_mean = tl.sum(from_mean, 1)
        h_max = tl.sum(from_max, 1)
        if parameters.fc1_bias is not None:
            bias = _load(parameters.fc1_bias, j, HIDDEN).to(tl.float32)
            h_mean += bias
            h_max += bias
        # NaN passes through these ReLUs, as through torch's.
        both = tl.where(h_mean <= 0.0, 0.0, h_mean) + tl.where(h_max <= 0.0, 0.0, h_max)
        tl.store(hidden + j, both, mask=j < HIDDEN)
        if BACKWARD:
            tl.store(hidden + HIDDEN + j, h_mean, mask=j < HIDDEN)
            tl.store(hidden + 2 * HIDDEN + j, h_max, mask=j < HIDDEN)
    tl.debug_barrier()
    for c0 in range(0, C, BLOCK_M):
        c = c0 + channel
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for j0 in range(0, HIDDEN, BLOCK_H):
            j = j0 + unit
            total += (
                _load_matrix(parameters.fc2_weight, c, j, C, HIDDEN)
                * _load(hidden, j, HIDDEN)[None, :]
            )
        logit = tl.sum(total, 1)
        if parameters.fc2_bias is not None:
            logit += 2.0 * _load(parameters.fc2_bias, c, C).to(tl.float32)
        tl.store(image.row + image.at.channel_gate + c, tl.sigmoid(logit), mask=c < C)


@triton.jit
def _pool_channels(image, y, p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Maximum and mean of z = y * gate over channels, at pixels p; saves the maximum's channel."""
    C = image.size.channels
    HW = image.size.pixels
    gate = image.row + image.at.channel_gate
    lane = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    maximum = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_C, BLOCK_P), tl.int32) + lane[:, None]
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = _inside(c, p, image.size)
        z = _load_map(y, c, inside) * _load(gate, c, C)[:, None]
        total += z
        maximum, argmax = _update_max(maximum, argmax, z, inside, c[:, None])
    key = tl.max(_encode(maximum, argmax), 0)
    tl.store(image.row + image.at.pooled_max + p, _decode_value(key), mask=p < HW)
    tl.store(image.row + image.at.pooled_mean + p, tl.sum(total, 0) / C, mask=p < HW)
    if image.saved.channel_index is not None:
        to = image.saved.channel_index + image.index * HW + p
        tl.store(to, _decode_index(key), mask=p < HW)


@triton.jit
def _reachable_taps(extent, K: tl.constexpr):
    """The first tap along an axis that any pixel of the map can reach, and the one after the last.

    The others see nothing but padding. A kernel may be much larger than the map.
    """
    return tl.maximum(K // 2 - extent + 1, 0), tl.minimum(K // 2 + extent, K)


@triton.jit
def _load_tap(weight, taps, i, j, end):
    """Weights of the maximum's and of the mean's map, [1, columns j], for row i."""
    tap = weight + i * taps.h + j * taps.w
    of_max = tl.load(tap, mask=j < end, other=0.0).to(tl.float32)
    of_mean = tl.load(tap + taps.c, mask=j < end, other=0.0).to(tl.float32)
    return of_max[None, :], of_mean[None, :]


@triton.jit
def _spatial_gate(
    image, weight, taps, p, H, W, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """sigmoid of the K x K convolution of the pooled maps, at pixels p; saves it.

    A row of taps is the second axis of the tile.
    """
    HW = image.size.pixels
    pooled_max = image.row + image.at.pooled_max
    pooled_mean = image.row + image.at.pooled_mean
    row = p // W
    col = p - row * W
    i_begin, i_end = _reachable_taps(H, K)
    j_begin, j_end = _reachable_taps(W, K)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for i in range(i_begin, i_end):
        r = row + (i - K // 2)
        row_inside = (p < HW) & (r >= 0) & (r < H)
        for j0 in range(j_begin, j_end, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            q = col[:, None] + (j - K // 2)[None, :]
            inside = row_inside[:, None] & (j < j_end)[None, :] & (q >= 0) & (q < W)
            at = (r * W)[:, None] + q
            of_max, of_mean = _load_tap(weight, taps, i, j, j_end)
            total += tl.load(pooled_max + at, mask=inside, other=0.0) * of_max
            total += tl.load(pooled_mean + at, mask=inside, other=0.0) * of_mean
    gate = tl.sigmoid(tl.sum(total, 1))
    if image.saved.spatial_gate is not None:
        tl.store(image.saved.spatial_gate + image.index * HW + p, gate, mask=p < HW)
    return gate


@triton.jit
def _write_output(image, y, out, spatial, p, BLOCK_C: tl.constexpr):
    """out = y * channel gate * spatial gate for all channels at pixels p."""
    C = image.size.channels
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = _inside(c, p, image.size)
        g = _load(image.row + image.at.channel_gate, c, C)
        z = _load_map(y, c, inside) * g[:, None]
        tl.store(_pointers(out, c), z * spatial[None, :], mask=inside)


# --- forward: kernels -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles", "W"])
def statistics_kernel(
    y, statistics, size, W, tiles, strides,
    FLAT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum, maximum and its index per channel and chunk of PIXELS pixels, (N, 3, C, tiles).

    One program per image, tile of channels and chunk. Reads y once.
    """
    program = tl.program_id(0)
    t = program % tiles
    blocks = tl.cdiv(size.channels, BLOCK_C)
    image = (program // tiles // blocks).to(tl.int64)
    c = program // tiles % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = t * PIXELS
    end = tl.minimum(begin + PIXELS, size.pixels)
    total, key = _pool_pixels(
        y + image * strides.n, strides, c, begin, end, size.channels, W, FLAT, BLOCK_C, BLOCK_P
    )
    sums, maxima, indices = partial_statistics(statistics, image, tiles, size.channels)
    at = c * tiles + t
    tl.store(sums + at, total, mask=c < size.channels)
    tl.store(maxima + at, _decode_value(key), mask=c < size.channels)
    tl.store(indices + at, _decode_index(key), mask=c < size.channels)


@triton.jit(do_not_specialize=["tiles"])
def gate_kernel(
    parameters, statistics, saved, work, at, size, tiles, BACKWARD: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The channel gate, one program per image.

    Forward: from the partial statistics (N, 3, C, tiles). BACKWARD: again, from the saved mean and
    maximum; it leaves the hidden layer as well.
    """
    image = _image_of(tl.program_id(0), work, at, size, saved)
    if not BACKWARD:
        _reduce_statistics(image, statistics, tiles, BLOCK_S, BLOCK_T)
        tl.debug_barrier()
    _channel_gate(image, parameters, BACKWARD, BLOCK_H, BLOCK_M)


@triton.jit(do_not_specialize=["W"])
def pool_kernel(
    y, saved, work, at, size, W, strides,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The pooled maps of z, one program per image and tile of pixels. Reads y once."""
    image, _, p = _tile(work, at, size, saved, BLOCK_P)
    _pool_channels(image, _map_at(y, strides, image, p, W, FLAT), p, BLOCK_C, BLOCK_P)


@triton.jit(do_not_specialize=["H", "W"])
def output_kernel(
    y, out, parameters, saved, work, at, size, H, W, taps, y_strides, out_strides,
    FLAT: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Spatial gate and output, one program per image and tile of pixels, all its channels.

    Reads y once, writes out once.
    """
    image, _, p = _tile(work, at, size, saved, BLOCK_P)
    spatial = _spatial_gate(image, parameters.spatial_weight, taps, p, H, W, K, BLOCK_P, BLOCK_K)
    y_map = _map_at(y, y_strides, image, p, W, FLAT)
    _write_output(image, y_map, _map_at(out, out_strides, image, p, W, FLAT), spatial, p, BLOCK_C)


@triton.jit(do_not_specialize=["tiles", "H", "W"])
def image_forward_kernel(
    y, out, parameters, statistics, saved, work,
    at, size, H, W, tiles, taps, y_strides, out_strides,
    FLAT: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The whole forward of one image per program. y is read twice (once more without statistics),
    after the first time from the caches; out is written once."""
    image = _image_of(tl.program_id(0), work, at, size, saved)
    if statistics is not None:
        _reduce_statistics(image, statistics, tiles, BLOCK_S, BLOCK_T)
    else:
        for c0 in range(0, size.channels, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            total, key = _pool_pixels(
                y + image.index * y_strides.n, y_strides, c, 0, size.pixels, size.channels, W,
                FLAT, BLOCK_C, BLOCK_P,
            )  # fmt: skip
            _store_statistics(image, c, total, key)
    tl.debug_barrier()
    _channel_gate(image, parameters, False, BLOCK_H, BLOCK_M)
    tl.debug_barrier()
    for p0 in range(0, size.pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        _pool_channels(image, _map_at(y, y_strides, image, p, W, FLAT), p, BLOCK_C, BLOCK_P)
    tl.debug_barrier()
    for p0 in range(0, size.pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        spatial = _spatial_gate(
            image, parameters.spatial_weight, taps, p, H, W, K, BLOCK_P, BLOCK_K
        )
        y_map = _map_at(y, y_strides, image, p, W, FLAT)
        out_map = _map_at(out, out_strides, image, p, W, FLAT)
        _write_output(image, y_map, out_map, spatial, p, BLOCK_C)


# --- backward: parts --------------------------------------------------------------------------


@triton.jit
def _pool_backward(
    image, grad, y, p, PARAMETERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Gradient of the spatial gate's logit at pixels p; with PARAMETERS the pooled maps again."""
    C = image.size.channels
    HW = image.size.pixels
    index = _load(image.saved.channel_index + image.index * HW, p, HW, -1)
    product = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    maximum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = _inside(c, p, image.size)
        g = _load(image.row + image.at.channel_gate, c, C)
        z = _load_map(y, c, inside) * g[:, None]
        product += _load_map(grad, c, inside) * z
        if PARAMETERS:
            total += z
            maximum = tl.where(c[:, None] == index[None, :], z, maximum)
    s = _load(image.saved.spatial_gate + image.index * HW, p, HW)
    to = image.row + p
    tl.store(to + image.at.grad_spatial_logit, tl.sum(product, 0) * (s * (1.0 - s)), mask=p < HW)
    if PARAMETERS:
        # Of a pixel's elements only that of the maximum is not zero.
        tl.store(to + image.at.pooled_max, tl.sum(maximum, 0), mask=p < HW)
        tl.store(to + image.at.pooled_mean, tl.sum(total, 0) / C, mask=p < HW)


@triton.jit
def _spatial_backward(
    image, weight, taps, tile, p, H, W, PARAMETERS: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the pooled maps (maximum, mean per channel) at a tile's pixels p: the transposed
    convolution.

    With PARAMETERS also these pixels' part of the weight's gradient, for the taps that can be
    reached: (2, rows, columns). The element of the logit's gradient that a tap brings to a pixel is
    what its weight's gradient needs there, so both come from one read.
    """
    HW = image.size.pixels
    row = p // W
    col = p - row * W
    i_begin, i_end = _reachable_taps(H, K)
    j_begin, j_end = _reachable_taps(W, K)
    columns = j_end - j_begin
    part = image.row + image.at.spatial_parts + tile * image.at.spatial_part
    from_max = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    from_mean = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    if PARAMETERS:
        here_max = _load(image.row + image.at.pooled_max, p, HW)
        here_mean = _load(image.row + image.at.pooled_mean, p, HW)
    for i in range(i_begin, i_end):
        r = row - (i - K // 2)
        row_inside = (p < HW) & (r >= 0) & (r < H)
        for j0 in range(j_begin, j_end, BLOCK_K):
            j = j0 + tl.arange(0, BLOCK_K)
            q = col[:, None] - (j - K // 2)[None, :]
            inside = row_inside[:, None] & (j < j_end)[None, :] & (q >= 0) & (q < W)
            at = image.row + image.at.grad_spatial_logit + ((r * W)[:, None] + q)
            d = tl.load(at, mask=inside, other=0.0)
            of_max, of_mean = _load_tap(weight, taps, i, j, j_end)
            from_max += d * of_max
            from_mean += d * of_mean
            if PARAMETERS:
                to = part + (i - i_begin) * columns + (j - j_begin)
                tl.store(to, tl.sum(d * here_max[:, None], 0), mask=j < j_end)
                to += (i_end - i_begin) * columns
                tl.store(to, tl.sum(d * here_mean[:, None], 0), mask=j < j_end)
    return tl.sum(from_max, 1), tl.sum(from_mean, 1) / image.size.channels


@triton.jit
def _store_pooled_gradients(image, p, from_max, from_mean):
    inside = p < image.size.pixels
    tl.store(image.row + image.at.grad_pooled_max + p, from_max, mask=inside)
    tl.store(image.row + image.at.grad_pooled_mean + p, from_mean, mask=inside)


@triton.jit
def _with_gates(image, p, from_max, from_mean):
    HW = image.size.pixels
    spatial_gate = _load(image.saved.spatial_gate + image.index * HW, p, HW)
    channel_index = _load(image.saved.channel_index + image.index * HW, p, HW, -1)
    return _Gradients(p, spatial_gate, channel_index, from_max, from_mean)


@triton.jit
def _load_gradients(image, p):
    from_max = _load(image.row + image.at.grad_pooled_max, p, image.size.pixels)
    from_mean = _load(image.row + image.at.grad_pooled_mean, p, image.size.pixels)
    return _with_gates(image, p, from_max, from_mean)


@triton.jit
def _grad_z(grad, of, c, inside):
    """Gradient of z at channels c and pixels of a tile."""
    d = _load_map(grad, c, inside) * of.spatial_gate[None, :]
    d += tl.where(c[:, None] == of.channel_index[None, :], of.pooled_max[None, :], 0.0)
    return d + of.pooled_mean[None, :]


@triton.jit
def _store_gate_gradient(image, c, total):
    """Gradient of the channel gate's logit, from that of the gate."""
    g = _load(image.row + image.at.channel_gate, c, image.size.channels)
    to = image.row + image.at.grad_gate_logit + c
    tl.store(to, total * (g * (1.0 - g)), mask=c < image.size.channels)


@triton.jit
def _mlp_backward(
    image, parameters, NEED_Y: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Gradients of the hidden layer and (NEED_Y) of the mean and maximum of every channel."""
    C = image.size.channels
    HIDDEN = image.size.hidden
    hidden = image.row + image.at.hidden
    unit = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_M)
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + unit
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            d = _load(image.row + image.at.grad_gate_logit, c, C)
            total += _load_matrix(parameters.fc2_weight, c, j, C, HIDDEN) * d[:, None]
        grad_j = tl.sum(total, 0)
        h_mean = _load(hidden + HIDDEN, j, HIDDEN)
        h_max = _load(hidden + 2 * HIDDEN, j, HIDDEN)
        to = hidden + 3 * HIDDEN + j
        tl.store(to, tl.where(h_mean <= 0.0, 0.0, grad_j), mask=j < HIDDEN)
        tl.store(to + HIDDEN, tl.where(h_max <= 0.0, 0.0, grad_j), mask=j < HIDDEN)
    if NEED_Y:
        tl.debug_barrier()
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            from_mean = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
            from_max = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
            for j0 in range(0, HIDDEN, BLOCK_H):
                j = j0 + unit
                weight = _load_matrix(parameters.fc1_weight, j, c, HIDDEN, C)
                from_mean += weight * _load(hidden + 3 * HIDDEN, j, HIDDEN)[:, None]
                from_max += weight * _load(hidden + 4 * HIDDEN, j, HIDDEN)[:, None]
            tl.store(image.row + image.at.grad_mean + c, tl.sum(from_mean, 0), mask=c < C)
            tl.store(image.row + image.at.grad_max + c, tl.sum(from_max, 0), mask=c < C)


@triton.jit
def _write_grad_y(image, grad, grad_y, of, BLOCK_C: tl.constexpr):
    """grad_y of all channels at the pixels of a tile."""
    C = image.size.channels
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = _inside(c, of.p, image.size)
        d = _grad_z(grad, of, c, inside)
        g = _load(image.row + image.at.channel_gate, c, C)
        d_mean = _load(image.row + image.at.grad_mean, c, C) / image.size.pixels
        d_max = _load(image.row + image.at.grad_max, c, C)
        max_index = _load(image.saved.max_index + image.index * C, c, C, -1)
        d = d * g[:, None] + d_mean[:, None]
        d += tl.where(max_index[:, None] == of.p[None, :], d_max[:, None], 0.0)
        tl.store(_pointers(grad_y, c), d, mask=inside)


# --- backward: kernels ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["W"])
def pool_backward_kernel(
    grad, y, saved, work, finished, at, size, W, grad_strides, y_strides,
    FLAT: tl.constexpr, PARAMETERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the spatial gate's logit and the pooled maps, per image and tile of pixels.

    Reads grad and y once. Also sets the next kernel's count of finished tiles to zero.
    """
    image, tile, p = _tile(work, at, size, saved, BLOCK_P)
    if tile == 0:
        tl.store(finished + image.index, 0)
    grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
    y_map = _map_at(y, y_strides, image, p, W, FLAT)
    _pool_backward(image, grad_map, y_map, p, PARAMETERS, BLOCK_C, BLOCK_P)


@triton.jit(do_not_specialize=["H", "W"])
def spatial_backward_kernel(
    grad, y, parameters, saved, work, finished,
    at, size, H, W, taps, grad_strides, y_strides,
    FLAT: tl.constexpr, NEED_Y: tl.constexpr, PARAMETERS: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """From the spatial gate's logit to the gradients of mean and maximum, per image and tile.

    Each program: gradients of the pooled maps at its pixels, its part of the spatial weight's
    gradient, then over all channels its part of the channel gate's gradient. Reads grad and y
    once. The program that finishes an image adds up the parts, in the order of the tiles, and goes
    back through the MLP; which program that is does not change what it computes.
    """
    image, tile, p = _tile(work, at, size, saved, BLOCK_P)
    tiles = tl.cdiv(size.pixels, BLOCK_P)
    from_max, from_mean = _spatial_backward(
        image, parameters.spatial_weight, taps, tile, p, H, W, PARAMETERS, K, BLOCK_P, BLOCK_K
    )
    if NEED_Y:
        _store_pooled_gradients(image, p, from_max, from_mean)
    of = _with_gates(image, p, from_max, from_mean)
    grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
    y_map = _map_at(y, y_strides, image, p, W, FLAT)
    parts = image.row + at.gate_parts
    for c0 in range(0, size.channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = _inside(c, p, size)
        d = _grad_z(grad_map, of, c, inside) * _load_map(y_map, c, inside)
        tl.store(parts + tile * at.gate_part + c, tl.sum(d, 1), mask=c < size.channels)

    # The program that counts last sees what all others have stored, by the memory model of PTX:
    # - The barrier orders the stores of all threads before the atomic of the one thread that
    #   counts, whose release is cumulative: it covers them, for the whole GPU.
    # - Counting is a chain of read-modify-writes, each acquiring what the one before released.
    # - The barrier after it orders the loads of all threads. Triton has one there to hand the count
    #   to all threads; ours does not depend on how it does that. The acquire empties this
    #   multiprocessor's L1 (on sm_80 MEMBAR.ALL.GPU, ATOMG.STRONG.GPU, CCTL.IVALL), and .cg reads
    #   past it.
    # - finished is set to zero by the launch before, in every replay of a CUDA graph too.
    # Barrier and atomic have effects on memory, so no pass of the compiler moves loads past them.
    tl.debug_barrier()
    before = tl.atomic_add(finished + image.index, 1, sem="acq_rel", scope="gpu")
    if before == tiles - 1:
        tl.debug_barrier()
        for c0 in range(0, size.channels, BLOCK_S):
            c = c0 + tl.arange(0, BLOCK_S)
            total = tl.zeros((BLOCK_S,), tl.float32)
            for u in range(0, tiles):
                part = parts + u * at.gate_part + c
                total += tl.load(part, mask=c < size.channels, other=0.0, cache_modifier=".cg")
            _store_gate_gradient(image, c, total)
        tl.debug_barrier()
        _mlp_backward(image, parameters, NEED_Y, BLOCK_H, BLOCK_M)


@triton.jit(do_not_specialize=["W"])
def input_gradient_kernel(
    grad, grad_y, saved, work, at, size, W, grad_strides, y_strides,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_y per image and tile of pixels. Reads grad once, writes grad_y once."""
    image, _, p = _tile(work, at, size, saved, BLOCK_P)
    grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
    to = _map_at(grad_y, y_strides, image, p, W, FLAT)
    _write_grad_y(image, grad_map, to, _load_gradients(image, p), BLOCK_C)


@triton.jit(do_not_specialize=["H", "W"])
def image_backward_kernel(
    grad, y, grad_y, parameters, saved, work,
    at, size, H, W, taps, grad_strides, y_strides, out_strides,
    FLAT: tl.constexpr, NEED_Y: tl.constexpr, PARAMETERS: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The whole backward of one image per program, but for the sums over images.

    y is read twice, grad three times, after the first time from the caches; grad_y is written once.
    """
    image = _image_of(tl.program_id(0), work, at, size, saved)
    _channel_gate(image, parameters, True, BLOCK_H, BLOCK_M)
    tl.debug_barrier()
    for p0 in range(0, size.pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
        y_map = _map_at(y, y_strides, image, p, W, FLAT)
        _pool_backward(image, grad_map, y_map, p, PARAMETERS, BLOCK_C, BLOCK_P)
    tl.debug_barrier()
    for p0 in range(0, size.pixels, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        from_max, from_mean = _spatial_backward(
            image,
            parameters.spatial_weight,
            taps,
            p0 // BLOCK_P,
            p,
            H,
            W,
            PARAMETERS,
            K,
            BLOCK_P,
            BLOCK_K,
        )
        _store_pooled_gradients(image, p, from_max, from_mean)
    tl.debug_barrier()
    for c0 in range(0, size.channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for p0 in range(0, size.pixels, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            inside = _inside(c, p, size)
            grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
            d = _grad_z(grad_map, _load_gradients(image, p), c, inside)
            total += d * _load_map(_map_at(y, y_strides, image, p, W, FLAT), c, inside)
        _store_gate_gradient(image, c, tl.sum(total, 1))
    tl.debug_barrier()
    _mlp_backward(image, parameters, NEED_Y, BLOCK_H, BLOCK_M)
    if NEED_Y:
        tl.debug_barrier()
        for p0 in range(0, size.pixels, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            grad_map = _map_at(grad, grad_strides, image, p, W, FLAT)
            to = _map_at(grad_y, out_strides, image, p, W, FLAT)
            _write_grad_y(image, grad_map, to, _load_gradients(image, p), BLOCK_C)


@triton.jit
def _mlp_gradients(
    work, saved, grads, at, size, program, N,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_H, BLOCK_C) of the gradients of both layers of the MLP."""
    C = size.channels
    HIDDEN = size.hidden
    blocks = tl.cdiv(C, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    j = program // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    first_layer = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    second_layer = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    first_bias = tl.zeros((BLOCK_H,), tl.float32)
    second_bias = tl.zeros((BLOCK_C,), tl.float32)
    for n0 in range(0, N, UNROLL):
        # Several images per step, so that their loads are in flight together.
        for u in tl.static_range(UNROLL):
            n = tl.cast(n0 + u, tl.int64)
            row = work + n * at.row
            channels = tl.where(n < N, C, 0)
            units = tl.where(n < N, HIDDEN, 0)
            both = _load(row + at.hidden, j, units)
            d_mean = _load(row + at.hidden + 3 * HIDDEN, j, units)
            d_max = _load(row + at.hidden + 4 * HIDDEN, j, units)
            d_logit = _load(row + at.grad_gate_logit, c, channels)
            v_mean = _load(saved.mean + n * C, c, channels)
            v_max = _load(saved.max + n * C, c, channels)
            first_layer += d_mean[:, None] * v_mean[None, :] + d_max[:, None] * v_max[None, :]
            second_layer += both[:, None] * d_logit[None, :]
            first_bias += d_mean + d_max
            second_bias += d_logit
    inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
    tl.store(grads.fc1_weight + j[:, None] * C + c[None, :], first_layer, mask=inside)
    tl.store(grads.fc2_weight + c[None, :] * HIDDEN + j[:, None], second_layer, mask=inside)
    if grads.fc1_bias is not None:  # noqa: SIM102 (known at compile time, then at run time)
        if program % blocks == 0:
            tl.store(grads.fc1_bias + j, first_bias, mask=j < HIDDEN)
    if grads.fc2_bias is not None:  # noqa: SIM102
        if program // blocks == 0:
            # The mean and the maximum each pass through the second layer.
            tl.store(grads.fc2_bias + c, 2.0 * second_bias, mask=c < C)


@triton.jit(do_not_specialize=["N", "tiles", "H", "W"])
def parameter_gradient_kernel(
    work, saved, grads, at, size, H, W, N, tiles, taps, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters, sums over images in their order; zeros for no images.

    The first programs own a tile of the MLP's, the others BLOCK_K taps of the spatial weight.
    """
    program = tl.program_id(0)
    mlp_programs = tl.cdiv(size.channels, BLOCK_C) * tl.cdiv(size.hidden, BLOCK_H)
    if program < mlp_programs:
        _mlp_gradients(work, saved, grads, at, size, program, N, BLOCK_H, BLOCK_C, UNROLL)
    else:
        tap = (program - mlp_programs) * BLOCK_K + tl.arange(0, BLOCK_K)
        pool = tap // (K * K)
        tap_h = tap // K % K
        tap_w = tap % K
        i_begin, i_end = _reachable_taps(H, K)
        j_begin, j_end = _reachable_taps(W, K)
        at_part = (pool * (i_end - i_begin) + tap_h - i_begin) * (j_end - j_begin) + tap_w - j_begin
        reached = (tap < 2 * K * K) & (tap_h >= i_begin) & (tap_h < i_end)
        reached = reached & (tap_w >= j_begin) & (tap_w < j_end)
        parts = work + at.spatial_parts + at_part
        total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for r0 in range(0, N * tiles, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            offsets = (r // tiles).to(tl.int64) * at.row + r % tiles * at.spatial_part
            inside = (r < N * tiles)[:, None] & reached[None, :]
            total += tl.load(parts[None, :] + offsets[:, None], mask=inside, other=0.0)
        to = grads.spatial_weight + pool * taps.c + tap_h * taps.h + tap_w * taps.w
        tl.store(to, tl.sum(total, 0), mask=tap < 2 * K * K)


# --- plans ------------------------------------------------------------------------------------


STAGES = 1  # no loop of this file has a tl.dot to feed, which is what Triton pipelines for


class Tiles(NamedTuple):
    """Tiles of a map with as many pixels each."""

    pixels: int
    choices: tuple[Tile, ...]  # of which tuning.py takes one


# Nothing was measured on hardware yet: the shape decides, by reasoning. At most 16 elements per
# thread keep the accumulators of the widest loop (three each) in registers; the fastest axis of a
# tile is a whole number of sectors of 32 bytes in memory. Only channels and warps are a choice: the
# pixels of a tile decide how many partial gradients of the spatial weight there are.
IMAGE_TILES = {
    "tiny": Tiles(16, (Tile(64, 8),)),  # maps of up to 4 x 4
    "small": Tiles(64, (Tile(32, 4), Tile(32, 8))),  # up to 8192 elements per image
    "large": Tiles(64, (Tile(64, 8), Tile(64, 16), Tile(32, 8))),
}
# The kernels of the tiles plan have one choice: their grids and the scratch between them depend on
# it together.
PIXEL_TILES = {
    "rows": Tiles(128, (Tile(16, 4),)),  # pixels are neighbours in memory, large maps
    "short rows": Tiles(64, (Tile(32, 4),)),  # the same, fewer pixels: more programs
    "channels": Tiles(16, (Tile(128, 4),)),  # channels are neighbours in memory
    "few channels": Tiles(32, (Tile(32, 4),)),
}
# (hidden units, channels) per tile of the MLP, for up to 4, up to 16 and more hidden units.
MLP_TILES = {4: (4, 256), 16: (16, 128), 32: (32, 64)}
GATE_WARPS = 4
# Kernels and tiles (channels, pixels, warps) that spill if ptxas chooses: see tuning.Tile.
BOUNDED = {
    ("image_forward_kernel", 64, 64, 8),
    ("image_forward_kernel", 64, 64, 16),
    ("spatial_backward_kernel", 32, 64, 4),
}
# Channels per step where the statistics of an image are added up, and tiles per step, which is 1
# where the convolution's tile is the whole map.
STATISTICS_CHANNELS = 128
STATISTICS_TILES = (1, 16)
CHUNK_TILES = 8  # tiles of pixels per program of statistics_kernel
PARAMETER_BLOCKS = {"BLOCK_H": 16, "BLOCK_C": 64, "BLOCK_R": 32, "BLOCK_K": 64, "UNROLL": 4}
PARAMETER_WARPS = 4

IMAGE_PIXELS = 256  # of the image plan at most: four tiles
IMAGE_ELEMENTS = 1 << 17  # at most, since one multiprocessor computes them all


def choose(c: int, hw: int, channels_last: bool) -> tuple[bool, Tiles]:
    """Whether one program computes a whole image (c, hw), and the tiles."""
    if hw <= IMAGE_PIXELS and c * hw <= IMAGE_ELEMENTS:
        if hw <= 16:
            return True, IMAGE_TILES["tiny"]
        return True, IMAGE_TILES["small" if c * hw <= 8192 else "large"]
    if channels_last:
        return False, PIXEL_TILES["channels" if c >= 96 else "few channels"]
    return False, PIXEL_TILES["rows" if hw >= 2048 else "short rows"]


def _flat_strides(map: Layout) -> Strides | None:
    """The strides of a map whose pixels are one distance apart, that distance in w; else None."""
    (_, _, h, w), strides = map[0], Strides(*map[1])
    if h == 1 or strides.h == w * strides.w:
        return strides._replace(h=0)
    return strides._replace(h=0, w=strides.h) if w == 1 else None


class _Key(NamedTuple):
    """What launches depend on of the parameters."""

    hidden: int
    has_fc1_bias: bool
    has_fc2_bias: bool
    k: int
    spatial_strides: tuple[int, ...]


def key_of(parameters: Parameters) -> _Key:
    fc1_weight, fc1_bias, _, fc2_bias, spatial = parameters
    has_biases = fc1_bias is not None, fc2_bias is not None
    return _Key(fc1_weight.shape[0], *has_biases, spatial.shape[2], spatial.stride())


class _Launches:
    """Makes launches for maps like y, which share plan, sizes and constants."""

    def __init__(
        self, y: Layout, device: torch.device, dtype: torch.dtype, key: _Key,
        deterministic: bool, reuse: bool, backward: bool,
    ) -> None:  # fmt: skip
        """``reuse``: whether all tensors are aligned()."""
        self.y, self.device, self.deterministic, self.reuse = y, device, deterministic, reuse
        self.n, c, self.h, self.w = y[0]
        self.size = Size(c, self.h * self.w, key.hidden)
        self.taps = Strides(0, *key.spatial_strides[1:])
        # Whether channels are neighbours in memory.
        channels_last = c > 1 and y[1][1] == 1 and self.size.pixels > 1
        self.image_plan, self.tile = choose(c, self.size.pixels, channels_last)
        self.tiles = triton.cdiv(self.size.pixels, self.tile.pixels)
        reachable = 2 * min(key.k, 2 * self.h - 1) * min(key.k, 2 * self.w - 1)
        self.at = workspace(self.size, reachable, self.tiles, self.image_plan, backward)
        block_h, block_m = next(t for n, t in MLP_TILES.items() if key.hidden <= n or n == 32)
        self.constants: dict[str, Any] = {
            "K": key.k,
            "BACKWARD": backward,
            "BLOCK_H": block_h,
            "BLOCK_M": block_m,
            "BLOCK_K": min(triton.next_power_of_2(key.k), 16),
            "BLOCK_S": STATISTICS_CHANNELS,
        }
        about = powers_of_two(self.n, self.size.pixels)
        self.problem = dtype, c, key.hidden, key.k, channels_last, *about

    def strides(self, *maps: Layout) -> list[Strides]:
        """Of maps that the same kernels address."""
        flat = [strides for map in maps if (strides := _flat_strides(map)) is not None]
        self.constants["FLAT"] = len(flat) == len(maps)
        return flat if self.constants["FLAT"] else [Strides(*strides) for _, strides in maps]

    def plain(
        self, kernel: Any, programs: int, numbers: tuple, warps: int,
        registers: int | None = None, **constants: int,
    ) -> Launch:  # fmt: skip
        constants = {**self.constants, **constants}
        return Launch(kernel, programs, numbers, constants, warps, STAGES, self.reuse, registers)

    def gate(self, tiles: int) -> Launch:
        # Left alone, ptxas makes it spill on sm_100.
        return self.plain(gate_kernel, self.n, (self.at, self.size, tiles), GATE_WARPS, REGISTERS)

    def tuned(self, kernel: Any, programs: int, *numbers: Any) -> Launch:
        """In the tile that is the fastest for a class of problems."""

        def launch(tile: Tile) -> Launch:
            return self.plain(
                kernel, programs, numbers, tile.warps, tile.registers,
                BLOCK_C=tile.channels, BLOCK_P=self.tile.pixels,
            )  # fmt: skip

        pixels, problem = self.tile.pixels, (*self.problem, self.constants["FLAT"])
        choices = [
            tile._replace(bounded=(kernel.__name__, tile.channels, pixels, tile.warps) in BOUNDED)
            for tile in self.tile.choices
        ]
        return fastest_tile(choices, launch, problem, self.device, self.deterministic)


class _Call(NamedTuple):
    """All that is known before there are pointers: launches of one direction, in their order."""

    image_plan: bool
    result: Layout  # of out, or of grad_y
    work: Layout
    statistics: Layout | None  # of those that are computed here
    saved: tuple[Layout, Layout]  # per channel, per pixel
    launches: tuple[Launch, ...]


@lru_cache(maxsize=1024)
def _forward_call(
    y: Layout, device: torch.device, dtype: torch.dtype, key: _Key, given_tiles: int, save: bool,
    deterministic: bool, reuse: bool,
) -> _Call:  # fmt: skip
    """``given_tiles``: those of the convolution's statistics, 0 if there are none.

    ``save`` is here since the code depends on it: tensors that are not saved are None.
    """
    make = _Launches(y, device, dtype, key, deterministic, reuse, backward=False)
    n, h, w, size = make.n, make.h, make.w, make.size
    out = map_like(y, size.channels)
    of_y, of_out = make.strides(y, out)
    make.problem += (given_tiles > 0,)
    chunk = CHUNK_TILES * make.tile.pixels
    tiles = given_tiles or (1 if make.image_plan else triton.cdiv(size.pixels, chunk))
    make.constants |= {"PIXELS": chunk, "BLOCK_T": STATISTICS_TILES[tiles > 2]}
    both = make.at, size, h, w
    if make.image_plan:
        launches = [make.tuned(image_forward_kernel, n, *both, tiles, make.taps, of_y, of_out)]
    else:
        programs = n * make.tiles
        launches = [
            make.gate(tiles),
            make.tuned(pool_kernel, programs, make.at, size, w, of_y),
            make.tuned(output_kernel, programs, *both, make.taps, of_y, of_out),
        ]
        if not given_tiles:
            (only,) = make.tile.choices
            programs = n * triton.cdiv(size.channels, only.channels) * tiles
            launches.insert(0, make.tuned(statistics_kernel, programs, size, w, tiles, of_y))
    return _Call(
        make.image_plan,
        out,
        contiguous(n, make.at.row),
        None if make.image_plan or given_tiles else contiguous(n, 3, size.channels, tiles),
        (contiguous(n, size.channels), contiguous(n, h, w)),
        tuple(launches),
    )


@lru_cache(maxsize=1024)
def _backward_call(
    grad_strides: tuple[int, ...], y: Layout, device: torch.device, dtype: torch.dtype, key: _Key,
    need_x: bool, need_parameters: bool, deterministic: bool, reuse: bool,
) -> _Call:  # fmt: skip
    """The last launch is that of the parameters' gradients, if they are needed."""
    make = _Launches(y, device, dtype, key, deterministic, reuse, backward=True)
    n, h, w, size = make.n, make.h, make.w, make.size
    result = map_like(y, size.channels)
    of_grad, of_y, of_result = make.strides((y[0], grad_strides), y, result if need_x else y)
    make.constants |= {"NEED_Y": need_x, "PARAMETERS": need_parameters, "BLOCK_T": 1}
    both, taps, programs = (make.at, size, h, w), make.taps, n * make.tiles
    if make.image_plan:
        launches = [make.tuned(image_backward_kernel, n, *both, taps, of_grad, of_y, of_result)]
    else:
        launches = [
            make.gate(1),
            make.tuned(pool_backward_kernel, programs, make.at, size, w, of_grad, of_y),
            make.tuned(spatial_backward_kernel, programs, *both, taps, of_grad, of_y),
        ]
        if need_x:
            strides = of_grad, of_result
            launches.append(make.tuned(input_gradient_kernel, programs, make.at, size, w, *strides))
    if need_parameters:
        blocks, k = PARAMETER_BLOCKS, key.k
        programs = triton.cdiv(size.channels, blocks["BLOCK_C"])
        programs *= triton.cdiv(size.hidden, blocks["BLOCK_H"])
        programs += triton.cdiv(2 * k * k, blocks["BLOCK_K"])
        gradient = torch.empty_like(meta_like(((1, 2, k, k), key.spatial_strides)))
        numbers = *both, n, make.tiles, Strides(0, *gradient.stride()[1:])
        launches.append(
            make.plain(parameter_gradient_kernel, programs, numbers, PARAMETER_WARPS, **blocks)
        )
    saved = contiguous(n, size.channels), contiguous(n, h, w)
    work = contiguous(n, make.at.row)
    return _Call(make.image_plan, result, work, None, saved, tuple(launches))


# --- what operators call ----------------------------------------------------------------------


def _with_contiguous_mlp(parameters: Parameters) -> Parameters:
    """The kernels take no strides for the MLP's small parameters."""
    *mlp, spatial_weight = parameters
    if all([p is None or p.is_contiguous() for p in mlp]):
        return parameters
    mlp = [None if p is None else p.contiguous() for p in mlp]
    return Parameters._make([*mlp, spatial_weight])


def forward(
    y: Tensor, parameters: Parameters, statistics: Tensor | None, save: bool
) -> tuple[Tensor, ...]:
    """out of reference.dual_attention; with ``save`` also the fields of :class:`Saved`.

    y: (N, C, H, W), any strides. statistics: (N, 3, C, T) from the convolution, contiguous (see
    conv.forward); None: computed here. out is like y.
    """
    call = _forward_call(
        (y.shape, y.stride()), y.device, y.dtype, key_of(parameters),
        0 if statistics is None else statistics.shape[3], save,
        torch.are_deterministic_algorithms_enabled(),
        aligned(y.dtype, y, *parameters) and aligned(torch.float32, statistics),
    )  # fmt: skip
    return run(call, y, parameters, statistics, save)


def run(
    call: _Call, y: Tensor, parameters: Parameters, statistics: Tensor | None, save: bool
) -> tuple[Tensor, ...]:
    """:func:`forward` with the call that is made for its arguments."""
    real, integer = torch.float32, torch.int32
    out = y.new_empty_strided(*call.result)
    work = y.new_empty_strided(*call.work, dtype=real)
    saved = NOTHING_SAVED
    if save:
        per_channel, per_pixel = call.saved
        saved = Saved(
            y.new_empty_strided(*per_channel, dtype=real),
            y.new_empty_strided(*per_channel, dtype=real),
            y.new_empty_strided(*per_channel, dtype=integer),
            y.new_empty_strided(*per_pixel, dtype=real),
            y.new_empty_strided(*per_pixel, dtype=integer),
        )
    results: tuple = (out, *saved) if save else (out,)
    if y.shape[0] == 0:
        return results
    given = _with_contiguous_mlp(parameters)
    if call.image_plan:
        call.launches[0](y, out, given, statistics, saved, work)
        return results
    if statistics is None:
        assert call.statistics is not None
        statistics = y.new_empty_strided(*call.statistics, dtype=real)
        call.launches[0](y, statistics)
    gate, pool, output = call.launches[-3:]
    gate(given, statistics, saved, work)
    pool(y, saved, work)
    output(y, out, given, saved, work)
    return results


def backward(
    grad: Tensor, y: Tensor, parameters: Parameters, saved: Saved,
    need_x: bool, need_parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of y (like y), fc1_weight, fc1_bias, fc2_weight, fc2_bias and spatial_weight.

    grad: (N, C, H, W), any strides; then the arguments and results of :func:`forward` with
    ``save``. A gradient that is not needed, or of a bias that is None, is a tensor of shape (0,).
    Those of the parameters have the parameters' own strides.
    """
    grads = [
        torch.empty_like(p) if need_parameters and p is not None else y.new_empty((0,))
        for p in parameters
    ]
    if not need_x and not need_parameters:
        return (y.new_empty((0,)), *grads)
    call = _backward_call(
        grad.stride(), (y.shape, y.stride()), y.device, y.dtype, key_of(parameters),
        need_x, need_parameters, torch.are_deterministic_algorithms_enabled(),
        aligned(y.dtype, grad, y, *parameters)
        and aligned(torch.float32, saved.mean, saved.max, saved.spatial_gate)
        and aligned(torch.int32, saved.max_index, saved.channel_index),
    )  # fmt: skip
    grad_y = y.new_empty_strided(*call.result) if need_x else y.new_empty((0,))
    work = y.new_empty_strided(*call.work, dtype=torch.float32)
    if y.shape[0] > 0:
        given = _with_contiguous_mlp(parameters)
        if call.image_plan:
            call.launches[0](grad, y, grad_y, given, saved, work)
        else:
            finished = y.new_empty((y.shape[0],), dtype=torch.int32)
            gate, pool, spatial, *last = call.launches
            gate(given, None, saved, work)
            pool(grad, y, saved, work, finished)
            spatial(grad, y, given, saved, work, finished)
            if need_x:
                last[0](grad, grad_y, saved, work)
    if need_parameters:
        # A gradient with other strides than its kernel writes is copied afterwards.
        written = [
            g if i == 4 or g.is_contiguous() else g.new_empty(g.shape) for i, g in enumerate(grads)
        ]
        present = [None if p is None else g for p, g in zip(parameters, written, strict=True)]
        call.launches[-1](work, saved, Parameters._make(present))
        for g, own in zip(grads, written, strict=True):
            if g is not own:
                g.copy_(own)
    return (grad_y, *grads)
