"""Channel attention, then spatial attention, in Triton: forward and backward.

What is computed (reference.dual_attention): mean and maximum of every channel, the MLP and its
sigmoid (channel gate c), z = y * c, maximum and mean of z over channels, their k x k convolution
and its sigmoid (spatial gate g), out = y * c * g; and all gradients.

There are two plans, chosen by the shape of one image, never by their number, so that an image's
result does not depend on its neighbours:

- **image**: one program does everything for one image; what its threads tell each other goes
  through a scratch row in global memory, with barriers in between. Small images, where launches
  would cost more than the work. Forward 1 launch, backward 1 launch.
- **tiles**: one program per image and tile of pixels, which walks all channels of its pixels.
  Forward: statistics (unless the convolution has them), gate, pool, output. Backward: gate, pool,
  spatial (and, in the program of an image that comes last, the MLP's backward), input.

Gradients of parameters are one launch more in both: fixed-order sums over the images.

Bytes, counting maps of N * C * H * W elements: the forward reads y twice (with the convolution's
statistics; else three times) and writes out once; the backward of the tiles plan reads y twice and
grad three times and writes grad_y once. In the image plan all readings but the first come from
L1 or L2. Everything else is (N, H, W) or (N, C). Operations per element: 6 forward and 14
backward, and per pixel 4 k^2 forward, 8 k^2 backward for the convolution of the pooled maps.

Order of every sum: element by element along the loop of a program, then a tree across the tile;
partial results in the order of their tiles. The only atomic counts finished tiles, in integers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import REGISTERS, Launch, Layout, dense, like, usual
from .tuning import Tile, about, of_tiles

# --- maxima -----------------------------------------------------------------------------------
#
# A maximum and its place travel as one int64 that orders as torch.max does: NaN above everything,
# among equal values the lowest place first. So one integer maximum settles ties and NaN, in any
# order of comparison.


@triton.jit
def _rank(value, place):
    """int64 of a float32 value and its place >= 0; 0.0 and -0.0 are equal."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, 0x7FFFFFFF, key)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def _value_of(rank):
    key = (rank >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _place_of(rank):
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF).to(tl.int32)


# --- places in memory -------------------------------------------------------------------------


@triton.jit
def _pixel_offsets(p, stride_h, stride_w, W, FLAT: tl.constexpr):
    """Of pixels p = h * W + w within a channel; FLAT: they are stride_w apart."""
    if FLAT:
        offsets = p.to(tl.int64) * stride_w
    else:
        row = p // W
        offsets = row.to(tl.int64) * stride_h + (p - row * W).to(tl.int64) * stride_w
    return offsets


# --- parts of the forward ---------------------------------------------------------------------


@triton.jit
def _pool_pixels(
    y, c, begin, end, stride_c, stride_h, stride_w, C, W,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum and rank of the channels c (BLOCK_C,) of one image over its pixels begin .. end - 1."""
    lane = tl.arange(0, BLOCK_P)
    rows = y + c.to(tl.int64)[:, None] * stride_c
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    top = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_C, BLOCK_P), tl.int32) + (begin + lane)[None, :]
    for p0 in range(begin, end, BLOCK_P):
        p = p0 + lane
        inside = (c < C)[:, None] & (p < end)[None, :]
        at = rows + _pixel_offsets(p, stride_h, stride_w, W, FLAT)[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += value
        value = tl.where(inside, value, float("-inf"))
        better = (value > top) | ((value != value) & (top == top))
        top = tl.where(better, value, top)
        place = tl.where(better, p[None, :], place)
    return tl.sum(total, 1), tl.max(_rank(top, place), 1)


@triton.jit
def _gather_statistics(
    sums, mean, max, max_index, tiles, C, HW,
    SAVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mean, max and (SAVE) max_index of an image's channels from those of its tiles.

    sums (C, tiles), then as many maxima, then their places: see conv.py.
    """
    maxima = sums + tl.cast(tiles, tl.int64) * C
    places = (maxima + tl.cast(tiles, tl.int64) * C).to(tl.pointer_type(tl.int32), bitcast=True)
    lane = tl.arange(0, BLOCK_C)
    tile = tl.arange(0, BLOCK_T)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        total = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
        rank = tl.full((BLOCK_C, BLOCK_T), -0x7FFFFFFFFFFFFFFF, tl.int64)
        for t0 in range(0, tiles, BLOCK_T):
            t = t0 + tile
            inside = (c < C)[:, None] & (t < tiles)[None, :]
            at = c[:, None] * tiles + t[None, :]
            total += tl.load(sums + at, mask=inside, other=0.0)
            value = tl.load(maxima + at, mask=inside, other=float("-inf"))
            place = tl.load(places + at, mask=inside, other=0x7FFFFFFF)
            rank = tl.maximum(rank, _rank(value, place))
        best = tl.max(rank, 1)
        tl.store(mean + c, tl.sum(total, 1) / HW, mask=c < C)
        tl.store(max + c, _value_of(best), mask=c < C)
        if SAVE:
            tl.store(max_index + c, _place_of(best), mask=c < C)


@triton.jit
def _channel_gate(
    mean, max, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate, hidden, C, HIDDEN,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, KEEP_HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The MLP of one image: gate (C,) from mean (C,) and max (C,).

    hidden (HIDDEN,) becomes relu(from the mean) + relu(from the max), which is all that the second
    layer sees; with KEEP_HIDDEN two more rows become the values before the relu. gate can be read
    by other threads after the next barrier.
    """
    unit = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_M)
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + unit
        from_mean = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        from_max = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
            at = fc1_weight + j[:, None] * C + c[None, :]
            weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            from_mean += weight * tl.load(mean + c, mask=c < C, other=0.0)[None, :]
            from_max += weight * tl.load(max + c, mask=c < C, other=0.0)[None, :]
        h_mean = tl.sum(from_mean, 1)
        h_max = tl.sum(from_max, 1)
        if HAS_FC1_BIAS:
            bias = tl.load(fc1_bias + j, mask=j < HIDDEN, other=0.0).to(tl.float32)
            h_mean += bias
            h_max += bias
        # NaN goes through these relus, as through torch's.
        both = tl.where(h_mean <= 0.0, 0.0, h_mean) + tl.where(h_max <= 0.0, 0.0, h_max)
        tl.store(hidden + j, both, mask=j < HIDDEN)
        if KEEP_HIDDEN:
            tl.store(hidden + HIDDEN + j, h_mean, mask=j < HIDDEN)
            tl.store(hidden + 2 * HIDDEN + j, h_max, mask=j < HIDDEN)
    tl.debug_barrier()
    for c0 in range(0, C, BLOCK_M):
        c = c0 + channel
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for j0 in range(0, HIDDEN, BLOCK_H):
            j = j0 + unit
            inside = (c < C)[:, None] & (j < HIDDEN)[None, :]
            at = fc2_weight + c[:, None] * HIDDEN + j[None, :]
            weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            total += weight * tl.load(hidden + j, mask=j < HIDDEN, other=0.0)[None, :]
        logit = tl.sum(total, 1)
        if HAS_FC2_BIAS:
            logit += 2.0 * tl.load(fc2_bias + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(gate + c, tl.sigmoid(logit), mask=c < C)


@triton.jit
def _pool_channels(
    y, gate, offsets, p, pooled_max, pooled_mean, channel_index, stride_c, C, HW,
    SAVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Max (its lowest channel with SAVE) and mean of z = y * gate over channels, at pixels p."""
    lane = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    top = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_C, BLOCK_P), tl.int32) + lane[:, None]
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = (c < C)[:, None] & (p < HW)[None, :]
        at = y + c.to(tl.int64)[:, None] * stride_c + offsets[None, :]
        g = tl.load(gate + c, mask=c < C, other=0.0)
        z = tl.load(at, mask=inside, other=0.0).to(tl.float32) * g[:, None]
        total += z
        z = tl.where(inside, z, float("-inf"))
        better = (z > top) | ((z != z) & (top == top))
        top = tl.where(better, z, top)
        place = tl.where(better, c[:, None], place)
    best = tl.max(_rank(top, place), 0)
    tl.store(pooled_max + p, _value_of(best), mask=p < HW)
    tl.store(pooled_mean + p, tl.sum(total, 0) / C, mask=p < HW)
    if SAVE:
        tl.store(channel_index + p, _place_of(best), mask=p < HW)


@triton.jit
def _spatial_gate(
    pooled_max, pooled_mean, weight, weight_c, weight_h, weight_w, p, H, W, HW,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sigmoid of the K x K convolution of an image's pooled maps, at pixels p (BLOCK_P,).

    A row of taps is the second axis of the tile. Taps that no pixel of the map can reach are left
    out, so that a kernel may be much larger than the map.
    """
    R: tl.constexpr = K // 2
    row = p // W
    col = p - row * W
    lane = tl.arange(0, BLOCK_K)
    j_end = tl.minimum(R + W, K)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for i in range(tl.maximum(R - H + 1, 0), tl.minimum(R + H, K)):
        r = row + (i - R)
        row_inside = (p < HW) & (r >= 0) & (r < H)
        for j0 in range(tl.maximum(R - W + 1, 0), j_end, BLOCK_K):
            j = j0 + lane
            q = col[:, None] + (j - R)[None, :]
            inside = row_inside[:, None] & (j < j_end)[None, :] & (q >= 0) & (q < W)
            at = (r * W)[:, None] + q
            tap = weight + i * weight_h + j * weight_w
            w_max = tl.load(tap, mask=j < j_end, other=0.0).to(tl.float32)
            w_mean = tl.load(tap + weight_c, mask=j < j_end, other=0.0).to(tl.float32)
            total += tl.load(pooled_max + at, mask=inside, other=0.0) * w_max[None, :]
            total += tl.load(pooled_mean + at, mask=inside, other=0.0) * w_mean[None, :]
    return tl.sigmoid(tl.sum(total, 1))


@triton.jit
def _write_output(
    y, out, gate, spatial, y_offsets, out_offsets, p, y_stride_c, out_stride_c, C, HW,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = y * gate * spatial for all channels at pixels p."""
    lane = tl.arange(0, BLOCK_C)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = (c < C)[:, None] & (p < HW)[None, :]
        rows = c.to(tl.int64)[:, None]
        g = tl.load(gate + c, mask=c < C, other=0.0)
        value = tl.load(y + rows * y_stride_c + y_offsets[None, :], mask=inside, other=0.0)
        z = value.to(tl.float32) * g[:, None]
        tl.store(
            out + rows * out_stride_c + out_offsets[None, :], z * spatial[None, :], mask=inside
        )


# --- kernels of the forward -------------------------------------------------------------------
#
# Threads of a program tell each other things by way of its row in global memory. Every section is
# stored by all of them and then, one debug_barrier() later, read by any: bar.sync is all the order
# that threads of one block need, and they share one L1. No section is stored twice between two
# barriers, and nothing is read by a non-coherent load (ld.global.nc), of which Triton emits none.
#
# Scratch row of an image, float32, every section rounded up by _whole() to a multiple of 64 bytes:
# gate (C) | mean (C) | max (C) | pooled max (HW) | pooled mean (HW) | hidden (HIDDEN).


@triton.jit(do_not_specialize=["tiles", "H", "W"])
def statistics_kernel(
    y, statistics, C, H, W, HW, tiles, y_n, y_c, y_h, y_w,
    FLAT: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum, max and place of the max per channel and chunk of PIXELS pixels, (N, 3, C, tiles).

    One program per image, tile of channels and chunk. Reads y once.
    """
    program = tl.program_id(0)
    t = program % tiles
    rest = program // tiles
    blocks = tl.cdiv(C, BLOCK_C)
    image = (rest // blocks).to(tl.int64)
    c = rest % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = t * PIXELS
    end = tl.minimum(begin + PIXELS, HW)
    total, rank = _pool_pixels(
        y + image * y_n, c, begin, end, y_c, y_h, y_w, C, W, FLAT, BLOCK_C, BLOCK_P
    )
    third = tl.cast(tiles, tl.int64) * C
    sums = statistics + image * 3 * third + t
    maxima = sums + third
    places = (maxima + third).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(sums + c * tiles, total, mask=c < C)
    tl.store(maxima + c * tiles, _value_of(rank), mask=c < C)
    tl.store(places + c * tiles, _place_of(rank), mask=c < C)


@triton.jit(do_not_specialize=["tiles"])
def gate_kernel(
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, statistics, mean, max, max_index,
    work, work_n, C, HW, HIDDEN, tiles,
    BACKWARD: tl.constexpr, SAVE: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The channel gate of one image per program, into the image's scratch row.

    Forward: from the partial statistics (N, 3, C, tiles), whose totals go to mean, max and
    max_index with SAVE. BACKWARD: again from mean and max; it leaves the hidden layer as well.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    image = tl.program_id(0).to(tl.int64)
    row = work + image * work_n
    if BACKWARD:
        mean_at = mean + image * C
        max_at = max + image * C
        hidden = row + 4 * whole_c + 5 * whole_hw
    else:
        hidden = row + 3 * whole_c + 2 * whole_hw
        if SAVE:
            mean_at = mean + image * C
            max_at = max + image * C
        else:
            mean_at = row + whole_c
            max_at = row + 2 * whole_c
        _gather_statistics(
            statistics + image * 3 * C * tiles, mean_at, max_at, max_index + image * C,
            tiles, C, HW, SAVE, BLOCK_S, BLOCK_T,
        )  # fmt: skip
        tl.debug_barrier()
    _channel_gate(
        mean_at, max_at, fc1_weight, fc1_bias, fc2_weight, fc2_bias, row, hidden, C, HIDDEN,
        HAS_FC1_BIAS, HAS_FC2_BIAS, BACKWARD, BLOCK_H, BLOCK_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "W"])
def pool_kernel(
    y, channel_index, work, work_n, C, H, W, HW, y_n, y_c, y_h, y_w,
    FLAT: tl.constexpr, SAVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The pooled maps of z, one program per image and tile of pixels. Reads y once."""
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    program = tl.program_id(0)
    tiles = tl.cdiv(HW, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    row = work + image * work_n
    pooled = row + 3 * whole_c
    p = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    _pool_channels(
        y + image * y_n, row, _pixel_offsets(p, y_h, y_w, W, FLAT), p, pooled, pooled + whole_hw,
        channel_index + image * HW, y_c, C, HW, SAVE, BLOCK_C, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "W"])
def output_kernel(
    y, out, spatial_weight, spatial_gate, work, work_n, C, H, W, HW,
    weight_c, weight_h, weight_w, y_n, y_c, y_h, y_w, out_n, out_c, out_h, out_w,
    FLAT: tl.constexpr, SAVE: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Spatial gate and output, one program per image and tile of pixels, all its channels.

    Reads y once, writes out once.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    program = tl.program_id(0)
    tiles = tl.cdiv(HW, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    row = work + image * work_n
    pooled = row + 3 * whole_c
    p = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    spatial = _spatial_gate(
        pooled, pooled + whole_hw, spatial_weight, weight_c, weight_h, weight_w, p, H, W, HW,
        K, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    if SAVE:
        tl.store(spatial_gate + image * HW + p, spatial, mask=p < HW)
    _write_output(
        y + image * y_n, out + image * out_n, row, spatial,
        _pixel_offsets(p, y_h, y_w, W, FLAT), _pixel_offsets(p, out_h, out_w, W, FLAT), p,
        y_c, out_c, C, HW, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "H", "W"])
def image_forward_kernel(
    y, out, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, statistics,
    mean, max, max_index, spatial_gate, channel_index, work, work_n, C, H, W, HW, HIDDEN, tiles,
    weight_c, weight_h, weight_w, y_n, y_c, y_h, y_w, out_n, out_c, out_h, out_w,
    FLAT: tl.constexpr, SAVE: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The whole forward of one image per program. y is read twice (once more without statistics),
    after the first time from the caches; out is written once."""
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    image = tl.program_id(0).to(tl.int64)
    row = work + image * work_n
    pooled_max = row + 3 * whole_c
    pooled_mean = pooled_max + whole_hw
    y_at = y + image * y_n
    if SAVE:
        mean_at = mean + image * C
        max_at = max + image * C
    else:
        mean_at = row + whole_c
        max_at = row + 2 * whole_c
    if HAS_STATISTICS:
        _gather_statistics(
            statistics + image * 3 * C * tiles, mean_at, max_at, max_index + image * C,
            tiles, C, HW, SAVE, BLOCK_S, BLOCK_T,
        )  # fmt: skip
    else:
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            total, rank = _pool_pixels(y_at, c, 0, HW, y_c, y_h, y_w, C, W, FLAT, BLOCK_C, BLOCK_P)
            tl.store(mean_at + c, total / HW, mask=c < C)
            tl.store(max_at + c, _value_of(rank), mask=c < C)
            if SAVE:
                tl.store(max_index + image * C + c, _place_of(rank), mask=c < C)
    tl.debug_barrier()
    _channel_gate(
        mean_at, max_at, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        row, pooled_mean + whole_hw, C, HIDDEN,
        HAS_FC1_BIAS, HAS_FC2_BIAS, False, BLOCK_H, BLOCK_M,
    )  # fmt: skip
    tl.debug_barrier()
    for p0 in range(0, HW, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        _pool_channels(
            y_at, row, _pixel_offsets(p, y_h, y_w, W, FLAT), p, pooled_max, pooled_mean,
            channel_index + image * HW, y_c, C, HW, SAVE, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    tl.debug_barrier()
    for p0 in range(0, HW, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        spatial = _spatial_gate(
            pooled_max, pooled_mean, spatial_weight, weight_c, weight_h, weight_w, p, H, W, HW,
            K, BLOCK_P, BLOCK_K,
        )  # fmt: skip
        if SAVE:
            tl.store(spatial_gate + image * HW + p, spatial, mask=p < HW)
        _write_output(
            y_at, out + image * out_n, row, spatial,
            _pixel_offsets(p, y_h, y_w, W, FLAT), _pixel_offsets(p, out_h, out_w, W, FLAT), p,
            y_c, out_c, C, HW, BLOCK_C,
        )  # fmt: skip


# --- parts of the backward --------------------------------------------------------------------


@triton.jit
def _pool_backward(
    grad, y, gate, spatial_gate, channel_index, grad_offsets, y_offsets, p,
    grad_logit, pooled_max, pooled_mean, grad_stride_c, y_stride_c, C, HW,
    PARAMETERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the spatial gate's logit at pixels p; with PARAMETERS the pooled maps again."""
    lane = tl.arange(0, BLOCK_C)
    index = tl.load(channel_index + p, mask=p < HW, other=-1)
    product = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    top = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = (c < C)[:, None] & (p < HW)[None, :]
        rows = c.to(tl.int64)[:, None]
        y_at = y + rows * y_stride_c + y_offsets[None, :]
        grad_at = grad + rows * grad_stride_c + grad_offsets[None, :]
        g = tl.load(gate + c, mask=c < C, other=0.0)
        z = tl.load(y_at, mask=inside, other=0.0).to(tl.float32) * g[:, None]
        product += tl.load(grad_at, mask=inside, other=0.0).to(tl.float32) * z
        if PARAMETERS:
            total += z
            top = tl.where(c[:, None] == index[None, :], z, top)
    s = tl.load(spatial_gate + p, mask=p < HW, other=0.0)
    tl.store(grad_logit + p, tl.sum(product, 0) * (s * (1.0 - s)), mask=p < HW)
    if PARAMETERS:
        # Of a pixel's elements of top only that of the maximum is not zero.
        tl.store(pooled_max + p, tl.sum(top, 0), mask=p < HW)
        tl.store(pooled_mean + p, tl.sum(total, 0) / C, mask=p < HW)


@triton.jit
def _spatial_backward(
    grad_logit, pooled_max, pooled_mean, weight, weight_c, weight_h, weight_w, partial,
    p, H, W, HW, PARAMETERS: tl.constexpr, K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the pooled maps (max, mean) at pixels p: the transposed convolution.

    With PARAMETERS also these pixels' part of the weight's gradient, for the taps that can be
    reached: partial (2, rows, columns). The element of grad_logit that a tap brings to a pixel is
    what its weight's gradient needs there, so both come from one reading.
    """
    R: tl.constexpr = K // 2
    row = p // W
    col = p - row * W
    lane = tl.arange(0, BLOCK_K)
    i_begin = tl.maximum(R - H + 1, 0)
    i_end = tl.minimum(R + H, K)
    j_begin = tl.maximum(R - W + 1, 0)
    j_end = tl.minimum(R + W, K)
    columns = j_end - j_begin
    from_max = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    from_mean = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    if PARAMETERS:
        here_max = tl.load(pooled_max + p, mask=p < HW, other=0.0)
        here_mean = tl.load(pooled_mean + p, mask=p < HW, other=0.0)
    for i in range(i_begin, i_end):
        r = row - (i - R)
        row_inside = (p < HW) & (r >= 0) & (r < H)
        for j0 in range(j_begin, j_end, BLOCK_K):
            j = j0 + lane
            q = col[:, None] - (j - R)[None, :]
            inside = row_inside[:, None] & (j < j_end)[None, :] & (q >= 0) & (q < W)
            d = tl.load(grad_logit + (r * W)[:, None] + q, mask=inside, other=0.0)
            tap = weight + i * weight_h + j * weight_w
            w_max = tl.load(tap, mask=j < j_end, other=0.0).to(tl.float32)
            w_mean = tl.load(tap + weight_c, mask=j < j_end, other=0.0).to(tl.float32)
            from_max += d * w_max[None, :]
            from_mean += d * w_mean[None, :]
            if PARAMETERS:
                at = partial + (i - i_begin) * columns + (j - j_begin)
                tl.store(at, tl.sum(d * here_max[:, None], 0), mask=j < j_end)
                at += (i_end - i_begin) * columns
                tl.store(at, tl.sum(d * here_mean[:, None], 0), mask=j < j_end)
    return tl.sum(from_max, 1), tl.sum(from_mean, 1)


@triton.jit
def _mlp_backward(
    grad_gate_logit, fc1_weight, fc2_weight, hidden, grad_mean, grad_max, C, HIDDEN,
    NEED_Y: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of the hidden layer, behind hidden's three rows, and (NEED_Y) of mean and max."""
    unit = tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_M)
    grad_hidden = hidden + 3 * HIDDEN
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + unit
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            inside = (c < C)[:, None] & (j < HIDDEN)[None, :]
            at = fc2_weight + c[:, None] * HIDDEN + j[None, :]
            weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            total += weight * tl.load(grad_gate_logit + c, mask=c < C, other=0.0)[:, None]
        grad_j = tl.sum(total, 0)
        h_mean = tl.load(hidden + HIDDEN + j, mask=j < HIDDEN, other=0.0)
        h_max = tl.load(hidden + 2 * HIDDEN + j, mask=j < HIDDEN, other=0.0)
        tl.store(grad_hidden + j, tl.where(h_mean <= 0.0, 0.0, grad_j), mask=j < HIDDEN)
        tl.store(grad_hidden + HIDDEN + j, tl.where(h_max <= 0.0, 0.0, grad_j), mask=j < HIDDEN)
    if NEED_Y:
        tl.debug_barrier()
        for c0 in range(0, C, BLOCK_M):
            c = c0 + channel
            from_mean = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
            from_max = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
            for j0 in range(0, HIDDEN, BLOCK_H):
                j = j0 + unit
                inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
                at = fc1_weight + j[:, None] * C + c[None, :]
                weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                d_mean = tl.load(grad_hidden + j, mask=j < HIDDEN, other=0.0)
                d_max = tl.load(grad_hidden + HIDDEN + j, mask=j < HIDDEN, other=0.0)
                from_mean += weight * d_mean[:, None]
                from_max += weight * d_max[:, None]
            tl.store(grad_mean + c, tl.sum(from_mean, 0), mask=c < C)
            tl.store(grad_max + c, tl.sum(from_max, 0), mask=c < C)


@triton.jit
def _grad_z(grad, inside, spatial, from_max, from_mean, index, c):
    """Gradient of z at channels c and pixels of a tile, from pointers into the result's."""
    d = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * spatial[None, :]
    d += tl.where(c[:, None] == index[None, :], from_max[None, :], 0.0)
    return d + from_mean[None, :]


# --- kernels of the backward ------------------------------------------------------------------
#
# Scratch row of an image, float32, the sections of (C,) and (HW,) rounded up by _whole():
# gate, gradient of its logit, of mean, of max (C each) | gradient of the spatial gate's logit,
# pooled max, pooled mean, gradients of both (HW each) | hidden sum, before the relu from mean and
# from max, gradients of both (HIDDEN each, the five together rounded up) | per tile of pixels: the
# spatial weight's part (2, rows, columns), rounded up | in the tiles plan, per tile: the part of
# the gate's gradient (C).


@triton.jit(do_not_specialize=["H", "W"])
def pool_backward_kernel(
    grad, y, spatial_gate, channel_index, work, finished, work_n, C, H, W, HW,
    grad_n, grad_c, grad_h, grad_w, y_n, y_c, y_h, y_w,
    FLAT: tl.constexpr, PARAMETERS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the spatial gate's logit and the pooled maps, per image and tile of pixels.

    Reads grad and y once. Also sets the count of finished tiles of the next kernel to zero.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    program = tl.program_id(0)
    tiles = tl.cdiv(HW, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    t = program % tiles
    row = work + image * work_n
    maps = row + 4 * whole_c
    p = t * BLOCK_P + tl.arange(0, BLOCK_P)
    if t == 0:
        tl.store(finished + image, 0)
    _pool_backward(
        grad + image * grad_n, y + image * y_n, row,
        spatial_gate + image * HW, channel_index + image * HW,
        _pixel_offsets(p, grad_h, grad_w, W, FLAT), _pixel_offsets(p, y_h, y_w, W, FLAT), p,
        maps, maps + whole_hw, maps + 2 * whole_hw, grad_c, y_c, C, HW,
        PARAMETERS, BLOCK_C, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "W"])
def spatial_backward_kernel(
    grad, y, fc1_weight, fc2_weight, spatial_weight, spatial_gate, channel_index,
    work, finished, work_n, C, H, W, HW, HIDDEN, taps,
    weight_c, weight_h, weight_w, grad_n, grad_c, grad_h, grad_w, y_n, y_c, y_h, y_w,
    FLAT: tl.constexpr, NEED_Y: tl.constexpr, PARAMETERS: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """From the spatial gate's logit to the gradients of mean and max, per image and tile of pixels.

    Each program: gradients of the pooled maps at its pixels, its part of the spatial weight's
    gradient, then over all channels its part of the channel gate's gradient. Reads grad and y
    once. The program that finishes an image adds up the parts, in the order of the tiles, and goes
    back through the MLP; which program that is does not change what it computes.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    whole_taps = (taps + 15) // 16 * 16
    whole_hidden = (5 * HIDDEN + 15) // 16 * 16
    program = tl.program_id(0)
    tiles = tl.cdiv(HW, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    t = program % tiles
    row = work + image * work_n
    maps = row + 4 * whole_c
    hidden = maps + 5 * whole_hw
    spatial_parts = hidden + whole_hidden
    gate_parts = spatial_parts + tiles * whole_taps
    p = t * BLOCK_P + tl.arange(0, BLOCK_P)
    from_max, from_mean = _spatial_backward(
        maps, maps + whole_hw, maps + 2 * whole_hw,
        spatial_weight, weight_c, weight_h, weight_w, spatial_parts + t * whole_taps,
        p, H, W, HW, PARAMETERS, K, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    from_mean = from_mean / C
    if NEED_Y:
        tl.store(maps + 3 * whole_hw + p, from_max, mask=p < HW)
        tl.store(maps + 4 * whole_hw + p, from_mean, mask=p < HW)
    spatial = tl.load(spatial_gate + image * HW + p, mask=p < HW, other=0.0)
    index = tl.load(channel_index + image * HW + p, mask=p < HW, other=-1)
    y_offsets = _pixel_offsets(p, y_h, y_w, W, FLAT)
    grad_offsets = _pixel_offsets(p, grad_h, grad_w, W, FLAT)
    lane = tl.arange(0, BLOCK_C)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = (c < C)[:, None] & (p < HW)[None, :]
        rows = c.to(tl.int64)[:, None]
        grad_at = grad + image * grad_n + rows * grad_c + grad_offsets[None, :]
        d = _grad_z(grad_at, inside, spatial, from_max, from_mean, index, c)
        y_at = y + image * y_n + rows * y_c + y_offsets[None, :]
        d *= tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gate_parts + t * whole_c + c, tl.sum(d, 1), mask=c < C)

    # Who counts last sees what all have stored, by the memory model of PTX:
    # - The barrier orders the stores of all threads before the atomic of the one thread that
    #   counts, whose release is cumulative: it covers them, for the whole GPU.
    # - Counting is a chain of read-modify-writes, each acquiring what the one before released.
    # - The barrier behind orders the loads of all threads after it. Triton has one there to hand
    #   the count to all threads; ours does not depend on how it does that. The acquire empties
    #   this multiprocessor's L1 (on sm_80 MEMBAR.ALL.GPU, ATOMG.STRONG.GPU, CCTL.IVALL), and .cg
    #   reads past it.
    # - finished is set to zero by the launch before, in every replay of a CUDA graph too.
    # Barrier and atomic have effects on memory, so no pass of the compiler moves loads past them.
    tl.debug_barrier()
    before = tl.atomic_add(finished + image, 1, sem="acq_rel", scope="gpu")
    if before == tiles - 1:
        tl.debug_barrier()
        channel = tl.arange(0, BLOCK_S)
        for c0 in range(0, C, BLOCK_S):
            c = c0 + channel
            total = tl.zeros((BLOCK_S,), tl.float32)
            for u in range(0, tiles):
                at = gate_parts + u * whole_c + c
                total += tl.load(at, mask=c < C, other=0.0, cache_modifier=".cg")
            g = tl.load(row + c, mask=c < C, other=0.0)
            tl.store(row + whole_c + c, total * (g * (1.0 - g)), mask=c < C)
        tl.debug_barrier()
        _mlp_backward(
            row + whole_c, fc1_weight, fc2_weight, hidden, row + 2 * whole_c,
            row + 3 * whole_c, C, HIDDEN, NEED_Y, BLOCK_H, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _write_grad_y(
    grad, grad_y, row, max_index, spatial, from_max, from_mean, index, grad_offsets, y_offsets, p,
    grad_stride_c, y_stride_c, C, HW, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_y of all channels at pixels p, from an image's scratch row."""
    whole_c = (C + 15) // 16 * 16
    lane = tl.arange(0, BLOCK_C)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + lane
        inside = (c < C)[:, None] & (p < HW)[None, :]
        rows = c.to(tl.int64)[:, None]
        grad_at = grad + rows * grad_stride_c + grad_offsets[None, :]
        d = _grad_z(grad_at, inside, spatial, from_max, from_mean, index, c)
        g = tl.load(row + c, mask=c < C, other=0.0)
        d_mean = tl.load(row + 2 * whole_c + c, mask=c < C, other=0.0) / HW
        d_max = tl.load(row + 3 * whole_c + c, mask=c < C, other=0.0)
        first = tl.load(max_index + c, mask=c < C, other=-1)
        d = d * g[:, None] + d_mean[:, None]
        d += tl.where(first[:, None] == p[None, :], d_max[:, None], 0.0)
        tl.store(grad_y + rows * y_stride_c + y_offsets[None, :], d, mask=inside)


@triton.jit(do_not_specialize=["H", "W"])
def input_gradient_kernel(
    grad, grad_y, max_index, spatial_gate, channel_index, work, work_n, C, H, W, HW,
    grad_n, grad_c, grad_h, grad_w, y_n, y_c, y_h, y_w,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """grad_y per image and tile of pixels. Reads grad once, writes grad_y once."""
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    program = tl.program_id(0)
    tiles = tl.cdiv(HW, BLOCK_P)
    image = (program // tiles).to(tl.int64)
    row = work + image * work_n
    from_pooled = row + 4 * whole_c + 3 * whole_hw
    p = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    spatial = tl.load(spatial_gate + image * HW + p, mask=p < HW, other=0.0)
    index = tl.load(channel_index + image * HW + p, mask=p < HW, other=-1)
    from_max = tl.load(from_pooled + p, mask=p < HW, other=0.0)
    from_mean = tl.load(from_pooled + whole_hw + p, mask=p < HW, other=0.0)
    _write_grad_y(
        grad + image * grad_n, grad_y + image * y_n, row, max_index + image * C,
        spatial, from_max, from_mean, index,
        _pixel_offsets(p, grad_h, grad_w, W, FLAT), _pixel_offsets(p, y_h, y_w, W, FLAT), p,
        grad_c, y_c, C, HW, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["H", "W"])
def image_backward_kernel(
    grad, y, grad_y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
    mean, max, max_index, spatial_gate, channel_index, work, work_n, C, H, W, HW, HIDDEN, taps,
    weight_c, weight_h, weight_w, grad_n, grad_c, grad_h, grad_w, y_n, y_c, y_h, y_w,
    out_n, out_c, out_h, out_w,
    FLAT: tl.constexpr, NEED_Y: tl.constexpr, PARAMETERS: tl.constexpr,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The whole backward of one image per program, but for the sums over images.

    y is read twice, grad three times, after the first time from the caches; grad_y is written once.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    whole_taps = (taps + 15) // 16 * 16
    whole_hidden = (5 * HIDDEN + 15) // 16 * 16
    image = tl.program_id(0).to(tl.int64)
    row = work + image * work_n
    maps = row + 4 * whole_c
    hidden = maps + 5 * whole_hw
    spatial_parts = hidden + whole_hidden
    grad_at = grad + image * grad_n
    y_at = y + image * y_n
    gates = spatial_gate + image * HW
    indices = channel_index + image * HW
    _channel_gate(
        mean + image * C, max + image * C, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        row, hidden, C, HIDDEN, HAS_FC1_BIAS, HAS_FC2_BIAS, True, BLOCK_H, BLOCK_M,
    )  # fmt: skip
    tl.debug_barrier()
    for p0 in range(0, HW, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        _pool_backward(
            grad_at, y_at, row, gates, indices,
            _pixel_offsets(p, grad_h, grad_w, W, FLAT), _pixel_offsets(p, y_h, y_w, W, FLAT), p,
            maps, maps + whole_hw, maps + 2 * whole_hw, grad_c, y_c, C, HW,
            PARAMETERS, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    tl.debug_barrier()
    for p0 in range(0, HW, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        from_max, from_mean = _spatial_backward(
            maps, maps + whole_hw, maps + 2 * whole_hw,
            spatial_weight, weight_c, weight_h, weight_w,
            spatial_parts + p0 // BLOCK_P * whole_taps,
            p, H, W, HW, PARAMETERS, K, BLOCK_P, BLOCK_K,
        )  # fmt: skip
        tl.store(maps + 3 * whole_hw + p, from_max, mask=p < HW)
        tl.store(maps + 4 * whole_hw + p, from_mean / C, mask=p < HW)
    tl.debug_barrier()
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        rows = c.to(tl.int64)[:, None]
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for p0 in range(0, HW, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            inside = (c < C)[:, None] & (p < HW)[None, :]
            spatial = tl.load(gates + p, mask=p < HW, other=0.0)
            index = tl.load(indices + p, mask=p < HW, other=-1)
            from_max = tl.load(maps + 3 * whole_hw + p, mask=p < HW, other=0.0)
            from_mean = tl.load(maps + 4 * whole_hw + p, mask=p < HW, other=0.0)
            offsets = _pixel_offsets(p, grad_h, grad_w, W, FLAT)[None, :]
            d = _grad_z(
                grad_at + rows * grad_c + offsets, inside, spatial, from_max, from_mean, index, c
            )
            offsets = _pixel_offsets(p, y_h, y_w, W, FLAT)[None, :]
            total += d * tl.load(y_at + rows * y_c + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(row + c, mask=c < C, other=0.0)
        tl.store(row + whole_c + c, tl.sum(total, 1) * (g * (1.0 - g)), mask=c < C)
    tl.debug_barrier()
    _mlp_backward(
        row + whole_c, fc1_weight, fc2_weight, hidden, row + 2 * whole_c, row + 3 * whole_c,
        C, HIDDEN, NEED_Y, BLOCK_H, BLOCK_M,
    )  # fmt: skip
    if NEED_Y:
        tl.debug_barrier()
        for p0 in range(0, HW, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            _write_grad_y(
                grad_at, grad_y + image * out_n, row, max_index + image * C,
                tl.load(gates + p, mask=p < HW, other=0.0),
                tl.load(maps + 3 * whole_hw + p, mask=p < HW, other=0.0),
                tl.load(maps + 4 * whole_hw + p, mask=p < HW, other=0.0),
                tl.load(indices + p, mask=p < HW, other=-1),
                _pixel_offsets(p, grad_h, grad_w, W, FLAT),
                _pixel_offsets(p, out_h, out_w, W, FLAT), p,
                grad_c, out_c, C, HW, BLOCK_C,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "tiles", "H", "W"])
def parameter_gradient_kernel(
    work, mean, max, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
    work_n, N, C, H, W, HW, HIDDEN, taps, tiles, weight_c, weight_h, weight_w,
    HAS_FC1_BIAS: tl.constexpr, HAS_FC2_BIAS: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters, sums over images in their order; zeros for no images.

    The first programs own a tile (BLOCK_H, BLOCK_C) of both layers of the MLP, the others BLOCK_K
    taps of the spatial weight. The five parameters are those of the gradients, which they write.
    """
    whole_c = (C + 15) // 16 * 16
    whole_hw = (HW + 15) // 16 * 16
    whole_taps = (taps + 15) // 16 * 16
    whole_hidden = (5 * HIDDEN + 15) // 16 * 16
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    dense = blocks * tl.cdiv(HIDDEN, BLOCK_H)
    hidden_offset = 4 * whole_c + 5 * whole_hw
    if program < dense:
        c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        j = program // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        first_layer = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        second_layer = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
        first_bias = tl.zeros((BLOCK_H,), tl.float32)
        second_bias = tl.zeros((BLOCK_C,), tl.float32)
        for n0 in range(0, N, UNROLL):
            # Several images per step, so that their readings are under way together.
            for u in tl.static_range(UNROLL):
                n = tl.cast(n0 + u, tl.int64)
                row = work + n * work_n
                hidden = row + hidden_offset + j
                c_inside = c < tl.where(n < N, C, 0)
                j_inside = j < tl.where(n < N, HIDDEN, 0)
                both = tl.load(hidden, mask=j_inside, other=0.0)
                d_mean = tl.load(hidden + 3 * HIDDEN, mask=j_inside, other=0.0)
                d_max = tl.load(hidden + 4 * HIDDEN, mask=j_inside, other=0.0)
                d_logit = tl.load(row + whole_c + c, mask=c_inside, other=0.0)
                v_mean = tl.load(mean + n * C + c, mask=c_inside, other=0.0)
                v_max = tl.load(max + n * C + c, mask=c_inside, other=0.0)
                first_layer += d_mean[:, None] * v_mean[None, :] + d_max[:, None] * v_max[None, :]
                second_layer += both[:, None] * d_logit[None, :]
                first_bias += d_mean + d_max
                second_bias += d_logit
        inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
        tl.store(fc1_weight + j[:, None] * C + c[None, :], first_layer, mask=inside)
        tl.store(fc2_weight + c[None, :] * HIDDEN + j[:, None], second_layer, mask=inside)
        if HAS_FC1_BIAS:  # noqa: SIM102 (one is known when it is compiled, one when it runs)
            if program % blocks == 0:
                tl.store(fc1_bias + j, first_bias, mask=j < HIDDEN)
        if HAS_FC2_BIAS:  # noqa: SIM102
            if program // blocks == 0:
                # Once for the mean's way through the MLP and once for the max's.
                tl.store(fc2_bias + c, 2.0 * second_bias, mask=c < C)
    else:
        R: tl.constexpr = K // 2
        at = (program - dense) * BLOCK_K + tl.arange(0, BLOCK_K)
        pool = at // (K * K)
        tap_h = at // K % K
        tap_w = at % K
        i_begin = tl.maximum(R - H + 1, 0)
        j_begin = tl.maximum(R - W + 1, 0)
        rows = tl.minimum(R + H, K) - i_begin
        columns = tl.minimum(R + W, K) - j_begin
        part = (pool * rows + tap_h - i_begin) * columns + tap_w - j_begin
        # The other taps see nothing but padding.
        reached = (at < 2 * K * K) & (tap_h >= i_begin) & (tap_h < i_begin + rows)
        reached = reached & (tap_w >= j_begin) & (tap_w < j_begin + columns)
        parts = work + hidden_offset + whole_hidden + part
        total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for r0 in range(0, N * tiles, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            n = (r // tiles).to(tl.int64)
            offsets = n * work_n + r % tiles * whole_taps
            inside = (r < N * tiles)[:, None] & reached[None, :]
            total += tl.load(parts[None, :] + offsets[:, None], mask=inside, other=0.0)
        to = spatial_weight + pool * weight_c + tap_h * weight_h + tap_w * weight_w
        tl.store(to, tl.sum(total, 0), mask=at < 2 * K * K)


# --- choices ----------------------------------------------------------------------------------


STAGES = 1  # no loop of this file has a tl.dot to feed, which is what Triton pipelines for


class Tiles(NamedTuple):
    """Tiles of a map, with as many pixels each."""

    pixels: int
    choices: tuple[Tile, ...]  # of which tuning.py takes one


# Nothing was measured on hardware yet: the shape decides, by reasoning. At most 16 elements per
# thread keep the accumulators of the widest loop (three each) in registers; the fastest axis of a
# tile is a whole number of sectors of 32 bytes in memory. Of a small image, a chain of short steps
# with barriers in between, no reasoning says how many warps do it fastest, and whether in half as
# many steps. Only their channels are a choice: how many pixels a tile has is how many partial
# gradients of the spatial weight there are.
IMAGE_TILES = {
    "tiny": Tiles(16, (Tile(64, 8),)),  # maps of up to 4 x 4
    "small": Tiles(64, (Tile(32, 4), Tile(32, 8))),  # up to 8192 elements per image
    "large": Tiles(64, (Tile(64, 8), Tile(64, 16), Tile(32, 8))),
}
# The kernels of the passes over large maps have one choice: their grids and the scratch between
# them depend on it together.
PIXEL_TILES = {
    "rows": Tiles(128, (Tile(16, 4),)),  # pixels are neighbours in memory, large maps
    "short rows": Tiles(64, (Tile(32, 4),)),  # the same, fewer pixels: more programs
    "channels": Tiles(16, (Tile(128, 4),)),  # channels are neighbours in memory
    "few channels": Tiles(32, (Tile(32, 4),)),
}
# (hidden units, channels) per tile of the MLP, for up to 4, up to 16 and more hidden units.
MLP_TILES = {4: (4, 256), 16: (16, 128), 32: (32, 64)}
GATE_WARPS = 4
# Kernels and tiles (channels, pixels, warps) for which ptxas must not choose: see tuning.Tile.
BOUNDED = {("image_forward_kernel", 64, 64, 16), ("spatial_backward_kernel", 32, 64, 4)}
# Channels per step where the statistics of an image are added up, and tiles per step, which is 1
# where the convolution's tile is the whole map.
GATHER_CHANNELS = 128
GATHER_TILES = (1, 16)
CHUNK_TILES = 8  # tiles of pixels per program of statistics_kernel
PARAMETER_BLOCKS = {"BLOCK_H": 16, "BLOCK_C": 64, "BLOCK_R": 32, "BLOCK_K": 64, "UNROLL": 4}
PARAMETER_WARPS = 4

IMAGE_PIXELS = 256  # the most pixels of the image plan: four tiles
IMAGE_ELEMENTS = 1 << 17  # and the most elements, of which one multiprocessor does all


class Plan(NamedTuple):
    """What the shape of an image decides."""

    image: bool
    tile: Tiles
    tiles: int  # of pixels, per image
    chunk: int  # pixels per program of statistics_kernel
    work: int  # floats of scratch per image, forward
    work_backward: int
    taps: int  # elements of the spatial weight that can be reached
    mlp: dict[str, int]
    block_k: int


def _whole(count: int) -> int:
    return (count + 15) // 16 * 16


def choose(c: int, hw: int, channels_last: bool) -> tuple[bool, Tiles]:
    """Whether one program does a whole image (c, hw), and the tiles."""
    if hw <= IMAGE_PIXELS and c * hw <= IMAGE_ELEMENTS:
        if hw <= 16:
            return True, IMAGE_TILES["tiny"]
        return True, IMAGE_TILES["small" if c * hw <= 8192 else "large"]
    if channels_last:
        return False, PIXEL_TILES["channels" if c >= 96 else "few channels"]
    return False, PIXEL_TILES["rows" if hw >= 2048 else "short rows"]


def plan_for(c: int, h: int, w: int, hidden: int, k: int, channels_last: bool) -> Plan:
    """The plan for images (c, h, w), ``hidden`` units and a k x k spatial weight."""
    hw = h * w
    image, tile = choose(c, hw, channels_last)
    tiles = triton.cdiv(hw, tile.pixels)
    block_h, block_m = next(t for most, t in MLP_TILES.items() if hidden <= most or most == 32)
    taps = 2 * min(k, 2 * h - 1) * min(k, 2 * w - 1)
    work_backward = 4 * _whole(c) + 5 * _whole(hw) + _whole(5 * hidden) + tiles * _whole(taps)
    return Plan(
        image=image,
        tile=tile,
        tiles=tiles,
        chunk=CHUNK_TILES * tile.pixels,
        work=3 * _whole(c) + 2 * _whole(hw) + _whole(hidden),
        work_backward=work_backward + (0 if image else tiles * _whole(c)),
        taps=taps,
        mlp={"BLOCK_H": block_h, "BLOCK_M": block_m},
        block_k=min(triton.next_power_of_2(k), 16),
    )


def _is_channels_last(y: Tensor) -> bool:
    """Whether channels are neighbours in memory, which decides the tile."""
    return y.shape[1] > 1 and y.stride(1) == 1 and y.shape[2] * y.shape[3] > 1


def _flat_strides(t: Tensor) -> tuple[int, int, int, int] | None:
    """(n, c, 0, pixel): the strides of a map whose pixels are one distance apart, else None."""
    _, _, h, w = t.shape
    n_stride, c_stride, h_stride, w_stride = t.stride()
    if h == 1 or h_stride == w * w_stride:
        return n_stride, c_stride, 0, w_stride
    if w == 1:
        return n_stride, c_stride, 0, h_stride
    return None


def _strides(*maps: Tensor) -> tuple[bool, tuple[int, ...]]:
    """Whether the pixels of all maps are one distance apart each, and four strides per map."""
    flat = [_flat_strides(t) for t in maps]
    if None in flat:
        return False, tuple(s for t in maps for s in t.stride())
    return True, tuple(s for four in flat if four is not None for s in four)


def _map_like(y: Tensor) -> Tensor:
    """What mfef_ext.ops.fakes.map_like describes: contiguous or channels_last as y is."""
    channels_last = not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format)


def _dense(parameter: Tensor | None) -> Tensor | None:
    """Rows one after another: the kernels take no strides for the MLP's small parameters."""
    if parameter is None or parameter.is_contiguous():
        return parameter
    return parameter.contiguous()


def _key(
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
) -> _Parameters:
    return _Parameters(
        fc1_weight.shape[0],
        fc1_bias is not None,
        fc2_bias is not None,
        spatial_weight.shape[2],
        spatial_weight.stride(),
    )


def _mlp(
    fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernels take them. A pointer that a flag rules out is never read: the flag's place
    holder is another tensor."""
    return (
        _dense(fc1_weight),
        fc1_weight if fc1_bias is None else _dense(fc1_bias),
        _dense(fc2_weight),
        fc1_weight if fc2_bias is None else _dense(fc2_bias),
    )


# --- calls ------------------------------------------------------------------------------------
#
# A call is a plan for given maps: whatever is known before there are pointers, kept by all that
# compiled code depends on. `reuse` says that all tensors are usual().


class _Parameters(NamedTuple):
    """What a call depends on of the parameters."""

    hidden: int
    has_fc1_bias: bool
    has_fc2_bias: bool
    k: int
    spatial_strides: tuple[int, ...]

    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "HAS_FC1_BIAS": self.has_fc1_bias,
            "HAS_FC2_BIAS": self.has_fc2_bias,
            "K": self.k,
        }


class _Call(NamedTuple):
    """Launches of one direction, in their order."""

    image: bool  # the plan
    result: Layout  # of out, or of grad_y
    work: Layout
    statistics: Layout | None  # of those that are computed here
    saved: tuple[Layout, Layout]  # of what is per channel, and per pixel
    launches: tuple[Launch, ...]


def _gate(images: int, numbers: tuple[int, ...], constants: dict[str, Any], reuse: bool) -> Launch:
    # Left alone, ptxas makes it spill on sm_100.
    return Launch(
        gate_kernel, images, numbers, constants, GATE_WARPS, STAGES, reuse, registers=REGISTERS
    )


def _tuned(
    kernel: Any,
    programs: int,
    numbers: tuple[int, ...],
    constants: dict[str, Any],
    tiles: Tiles,
    problem: tuple,
    device: torch.device,
    deterministic: bool,
    reuse: bool,
) -> Launch:
    """A kernel in the tile of ``tiles`` that is the fastest for a class of problems."""
    choices = [
        tile._replace(bounded=(kernel.__name__, tile.channels, tiles.pixels, tile.warps) in BOUNDED)
        for tile in tiles.choices
    ]

    def launch(tile: Tile) -> Launch:
        own = {"BLOCK_C": tile.channels, "BLOCK_P": tiles.pixels}
        return Launch(
            kernel, programs, numbers, {**constants, **own}, tile.warps, STAGES, reuse,
            tile.registers,
        )  # fmt: skip

    return of_tiles(choices, launch, problem, device, deterministic)


@lru_cache(maxsize=1024)
def _forward_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    parameters: _Parameters,
    given_tiles: int,
    save: bool,
    deterministic: bool,
    reuse: bool,
) -> _Call:
    """``given_tiles`` are those of the convolution's statistics, 0 if there are none."""
    n, c, h, w = shape
    hw, (hidden, _, _, k, spatial_strides) = h * w, parameters
    y = like(shape, strides)
    out = _map_like(y)
    plan = plan_for(c, h, w, hidden, k, _is_channels_last(y))
    tile, tiles = plan.tile, given_tiles or triton.cdiv(hw, plan.chunk)
    flat, (*from_y, out_n, out_c, out_h, out_w) = _strides(y, out)
    to_out = out_n, out_c, out_h, out_w
    sizes, taps = (c, h, w, hw), spatial_strides[1:]
    constants = {
        **parameters.constants(),
        **plan.mlp,
        "FLAT": flat,
        "SAVE": save,
        "BACKWARD": False,
        "HAS_STATISTICS": given_tiles > 0,
        "PIXELS": plan.chunk,
        "BLOCK_K": plan.block_k,
        "BLOCK_S": GATHER_CHANNELS,
        "BLOCK_T": GATHER_TILES[tiles > 2],
    }

    def launch(kernel: Any, programs: int, *numbers: int) -> Launch:
        # Not what is saved: with and without it the bits are the same.
        problem = dtype, c, hidden, k, flat, _is_channels_last(y), given_tiles > 0, *about(n, hw)
        return _tuned(
            kernel, programs, numbers, constants, tile, problem, device, deterministic, reuse
        )

    if plan.image:
        tiles = given_tiles or 1
        constants["BLOCK_T"] = GATHER_TILES[tiles > 2]
        launches = [
            launch(
                image_forward_kernel, n, plan.work, *sizes, hidden, tiles, *taps, *from_y, *to_out
            )
        ]
    else:
        programs = n * plan.tiles
        launches = [
            _gate(n, (plan.work, c, hw, hidden, tiles), constants, reuse),
            launch(pool_kernel, programs, plan.work, *sizes, *from_y),
            launch(output_kernel, programs, plan.work, *sizes, *taps, *from_y, *to_out),
        ]
        if given_tiles == 0:
            (only,) = tile.choices
            programs = n * triton.cdiv(c, only.channels) * tiles
            launches.insert(0, launch(statistics_kernel, programs, *sizes, tiles, *from_y))
    return _Call(
        plan.image,
        (out.shape, out.stride()),
        dense(n, plan.work),
        None if plan.image or given_tiles else dense(n, 3, c, tiles),
        (dense(n, c), dense(n, h, w)),
        tuple(launches),
    )


@lru_cache(maxsize=1024)
def _backward_call(
    grad_strides: tuple[int, ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    parameters: _Parameters,
    need_x: bool,
    need_parameters: bool,
    deterministic: bool,
    reuse: bool,
) -> _Call:
    """The last launch is that of the parameters' gradients, if they are needed."""
    n, c, h, w = shape
    hw, (hidden, _, _, k, spatial_strides) = h * w, parameters
    y = like(shape, strides)
    grad_y = _map_like(y)
    plan = plan_for(c, h, w, hidden, k, _is_channels_last(y))
    tile = plan.tile
    maps = (like(shape, grad_strides), y, grad_y)
    flat, of_maps = _strides(*maps) if need_x else _strides(*maps[:2])
    sizes, taps = (c, h, w, hw), spatial_strides[1:]
    constants = {
        **parameters.constants(),
        **plan.mlp,
        "FLAT": flat,
        "NEED_Y": need_x,
        "PARAMETERS": need_parameters,
        "SAVE": False,
        "BACKWARD": True,
        "BLOCK_K": plan.block_k,
        "BLOCK_S": GATHER_CHANNELS,
        "BLOCK_T": 1,
    }
    work, programs = plan.work_backward, n * plan.tiles

    def launch(kernel: Any, programs: int, *numbers: int) -> Launch:
        # Not which gradients are needed: each has the same bits whatever the others.
        problem = dtype, c, hidden, k, flat, _is_channels_last(y), *about(n, hw)
        return _tuned(
            kernel, programs, numbers, constants, tile, problem, device, deterministic, reuse
        )

    if plan.image:
        numbers = work, *sizes, hidden, plan.taps, *taps, *of_maps, *(() if need_x else (0,) * 4)
        launches = [launch(image_backward_kernel, n, *numbers)]
    else:
        numbers = work, *sizes, hidden, plan.taps, *taps, *of_maps[:8]
        launches = [
            _gate(n, (work, c, hw, hidden, 1), constants, reuse),
            launch(pool_backward_kernel, programs, work, *sizes, *of_maps[:8]),
            launch(spatial_backward_kernel, programs, *numbers),
        ]
        if need_x:
            numbers = work, *sizes, *of_maps[:4], *of_maps[8:]
            launches.append(launch(input_gradient_kernel, programs, *numbers))
    if need_parameters:
        blocks = PARAMETER_BLOCKS
        programs = triton.cdiv(c, blocks["BLOCK_C"]) * triton.cdiv(hidden, blocks["BLOCK_H"])
        programs += triton.cdiv(2 * k * k, blocks["BLOCK_K"])
        of_gradient = torch.empty_like(like((1, 2, k, k), spatial_strides)).stride()[1:]
        numbers = work, n, *sizes, hidden, plan.taps, plan.tiles, *of_gradient
        launches.append(
            Launch(
                parameter_gradient_kernel,
                programs,
                numbers,
                {**parameters.constants(), **blocks},
                PARAMETER_WARPS,
                STAGES,
                reuse,
            )
        )
    return _Call(
        plan.image,
        (grad_y.shape, grad_y.stride()),
        dense(n, work),
        None,
        (dense(n, c), dense(n, h, w)),
        tuple(launches),
    )


# --- forward ----------------------------------------------------------------------------------


def forward(
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    statistics: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    """out of reference.dual_attention; with ``save`` also mean, max, max_index, spatial_gate and
    channel_index.

    y: (N, C, H, W), any strides. statistics: (N, 3, C, T) from the convolution, contiguous (see
    conv.forward); None: computed here. out is like y; mean and max (N, C) and spatial_gate
    (N, H, W) are float32, max_index (N, C) and channel_index (N, H, W) int32.
    """
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    call = _forward_call(
        y.shape, y.stride(), y.device, y.dtype, _key(*parameters),
        0 if statistics is None else statistics.shape[3], save,
        torch.are_deterministic_algorithms_enabled(),
        usual(y.dtype, y, *parameters) and usual(torch.float32, statistics),
    )  # fmt: skip
    return run(call, y, *parameters, statistics, save)


def run(
    call: _Call,
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    statistics: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    """:func:`forward` of a call that is made for its arguments."""
    real = torch.float32
    out = y.new_empty_strided(*call.result)
    work = y.new_empty_strided(*call.work, dtype=real)
    # Pointers that SAVE rules out are never used.
    mean = max = max_index = spatial_gate = channel_index = work
    results: tuple[Tensor, ...] = (out,)
    if save:
        per_channel, per_pixel = call.saved
        mean = y.new_empty_strided(*per_channel, dtype=real)
        max = y.new_empty_strided(*per_channel, dtype=real)
        max_index = y.new_empty_strided(*per_channel, dtype=torch.int32)
        spatial_gate = y.new_empty_strided(*per_pixel, dtype=real)
        channel_index = y.new_empty_strided(*per_pixel, dtype=torch.int32)
        results = out, mean, max, max_index, spatial_gate, channel_index
    if y.shape[0] == 0:
        return results
    mlp = _mlp(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if call.image:
        call.launches[0](
            y, out, *mlp, spatial_weight, work if statistics is None else statistics,
            mean, max, max_index, spatial_gate, channel_index, work,
        )  # fmt: skip
        return results
    if statistics is None:
        assert call.statistics is not None
        statistics = y.new_empty_strided(*call.statistics, dtype=real)
        call.launches[0](y, statistics)
    gate, pool, output = call.launches[-3:]
    gate(*mlp, statistics, mean, max, max_index, work)
    pool(y, channel_index, work)
    output(y, out, spatial_weight, spatial_gate, work)
    return results


# --- backward ---------------------------------------------------------------------------------


def backward(
    grad: Tensor,
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    mean: Tensor,
    max: Tensor,
    max_index: Tensor,
    spatial_gate: Tensor,
    channel_index: Tensor,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of y (like y), fc1_weight, fc1_bias, fc2_weight, fc2_bias and spatial_weight.

    grad: (N, C, H, W), any strides; then the arguments and results of :func:`forward` with
    ``save``. A gradient that is not needed, or of a bias that is None, is a tensor of shape (0,).
    Those of the parameters have the parameters' own strides.
    """
    parameters = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    grads = [
        torch.empty_like(p) if need_parameters and p is not None else y.new_empty((0,))
        for p in parameters
    ]
    if not need_x and not need_parameters:
        return (y.new_empty((0,)), *grads)
    call = _backward_call(
        grad.stride(), y.shape, y.stride(), y.device, y.dtype, _key(*parameters),
        need_x, need_parameters, torch.are_deterministic_algorithms_enabled(),
        usual(y.dtype, grad, y, *parameters)
        and usual(torch.float32, mean, max, spatial_gate)
        and usual(torch.int32, max_index, channel_index),
    )  # fmt: skip
    grad_y = y.new_empty_strided(*call.result) if need_x else y.new_empty((0,))
    work = y.new_empty_strided(*call.work, dtype=torch.float32)
    if y.shape[0] > 0:
        mlp = _mlp(*parameters[:4])
        gates = spatial_gate, channel_index
        if call.image:
            call.launches[0](
                grad, y, grad_y, *mlp, spatial_weight, mean, max, max_index, *gates, work
            )
        else:
            finished = y.new_empty((y.shape[0],), dtype=torch.int32)
            gate, pool, spatial, *last = call.launches
            gate(*mlp, work, mean, max, max_index, work)
            pool(grad, y, *gates, work, finished)
            spatial(grad, y, mlp[0], mlp[2], spatial_weight, *gates, work, finished)
            if need_x:
                last[0](grad, grad_y, max_index, *gates, work)
    if need_parameters:
        # As _dense(): a gradient with other strides than its kernel writes is copied afterwards.
        written = [
            g if i == 4 or g.is_contiguous() else g.new_empty(g.shape) for i, g in enumerate(grads)
        ]
        call.launches[-1](work, mean, max, *written)
        for g, own in zip(grads, written, strict=True):
            if g is not own:
                g.copy_(own)
    return (grad_y, *grads)
