"""Multi-scale convolution in Triton: forward, data gradient, weight gradient.

What is computed. Branch i is a grouped convolution with stride 1, odd k_i and zero padding
k_i // 2 (mfef_ext/reference.py). All branches run in one launch, whatever their number:

- ``_convolve``: the forward, and the data gradient, which is the same convolution with the roles
  of its channels swapped and its taps in reverse order (negative weight strides from the last tap
  on). With split=False the data gradient is a sum over branches: there every program walks all
  branches in their order and keeps the sum in registers.
- ``_weight_partials`` and ``_weight_sums``: the weight gradient, as sums over slices of the images
  in float32, and then the sum of the slices in their order.

Which program owns what.
- ``_convolve``: a tile of [pixels, destination channels] with all its products. Its pixels are
  PIXELS consecutive ones of each of IMAGES images, so that maps of 2 x 2 fill a tile too. Programs
  with consecutive numbers share their pixels. Wide groups (WIDE channels and more): a tile lies in
  one group, its products are ``tl.dot`` of [pixels, source channels] with [source channels,
  destination channels], tap by tap; where the source channels of a group do not fill such blocks,
  taps and channels together make one axis that is cut into blocks. Narrow groups: a tile spans
  groups, with one multiply-add per tap and source channel in registers (direct taps).
- ``_weight_partials``: one slice of the images, and a tile of [output channels, taps x input
  channels] of one group (``tl.dot`` over pixels), or for narrow groups without tensor cores TAPS
  taps of one input channel for output channels of any groups.
- ``_weight_sums``: SUMS weights of one branch.

Bytes (N images, C and D channels in and out, P pixels, b bytes per element, K weights, S slices):
- forward: reads N C P b (split) and the weights, writes N D P b, and with statistics 12 bytes per
  image, channel and tile of pixels. A program reads its source pixels once per tap, from L1, and
  all programs of its pixels read them again, from L2. Data gradient: reads N D P b, writes N C P b.
- weight gradient: reads N (C + D) P b, from L2 once per tile of a group; writes and reads 4 S K,
  writes b K.
Operations: 2 N P K for each of the three, less the taps that are farther than max(H, W) - 1 from
the centre: they lie outside of every map and are not looped over.

The order of every sum depends on the shapes of the weights, on H and on W, for the weight gradient
also on N, and on which tile and warps tuning.py has found fastest, which is settled once for a
process and not at all in deterministic mode. There are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Layout, dense, like, usual
from .tuning import Tile, about, of_tiles

WIDE = 8  # channels per group from which tl.dot pays: below, most of its block is padding
WIDE_GRADIENT = 2  # the same for the weight gradient on tensor cores: its columns are always full
LARGE_MAP = 1024  # pixels from which a tile has 128 of them: fewer partial statistics, more reuse
TAPS = 4  # accumulators of _weight_partials's direct form; written out there
SUMS = 128  # weights per program of _weight_sums
PROGRAMS = 1024  # of _weight_partials, about; slices are made until there are as many


class Configuration(NamedTuple):
    """Tiles of a launch.

    Nothing has been measured on hardware: sizes follow from registers (an accumulator of at most
    64 x 64 floats in four warps) and shared memory, not from timings.
    """

    name: str
    pixels: int  # of a tile
    depth: int  # of a tl.dot (weight gradient: columns of a tile, taps x input channels, at most)
    stages: int
    # Of which tuning.py takes one; their channels are the destination channels (weight gradient:
    # output channels) of a tile at most.
    tiles: tuple[Tile, ...]


# "half" is 16-bit floats, "tf32" float32 on tensor cores, "ieee" float32 on the ordinary units:
# there tl.dot keeps its operands in registers, so blocks are small.
# Twice the warps halve the registers of a thread and the work between two of its loads. Half the
# channels do so too, with more programs and with pixels that are read once more; they are left out
# where no group is as wide. In "ieee" there is one choice, since it is rarely asked for and every
# candidate is compiled at first calls.
CONVOLUTION = {
    ("half", False): Configuration("half", 64, 32, 3, (Tile(64, 4), Tile(64, 8), Tile(32, 4))),
    ("half", True): Configuration("half, large maps", 128, 32, 3, (Tile(32, 4, True), Tile(32, 8))),
    ("tf32", False): Configuration("tf32", 64, 32, 3, (Tile(32, 4), Tile(32, 8), Tile(64, 8))),
    ("tf32", True): Configuration("tf32, large maps", 128, 32, 3, (Tile(32, 4), Tile(32, 8))),
    ("ieee", False): Configuration("ieee", 64, 16, 2, (Tile(32, 4, True),)),
    ("ieee", True): Configuration("ieee, large maps", 128, 16, 2, (Tile(32, 8),)),
}
WEIGHT_GRADIENT = {
    "half": Configuration("half", 64, 64, 3, (Tile(64, 4), Tile(64, 8))),
    "tf32": Configuration("tf32", 32, 64, 3, (Tile(64, 4, True), Tile(64, 8))),
    "ieee": Configuration("ieee", 32, 32, 2, (Tile(32, 4),)),
}


# --- kernels ----------------------------------------------------------------------------------
#
# BRANCHES is a tuple with one tuple of integers per branch, all known at compile time: see
# _Branch, _Gradient and _Sum, whose fields are taken here by position. Offsets to the first image
# of a tile are 64-bit; those from there on are of the type INDEX, 64-bit only if they have to be.


@triton.jit
def _pixels_of(block, N, H, W, IMAGES: tl.constexpr, PIXELS: tl.constexpr):
    """First image of a tile, and of each of its pixels: image after the first, pixel in (h, w)
    order, row, column, and whether it exists."""
    tiles = tl.cdiv(H * W, PIXELS)
    first_image = (block // tiles) * IMAGES
    first = (block % tiles) * PIXELS
    rows = tl.arange(0, IMAGES * PIXELS)
    if IMAGES == 1:  # said so that the compiler sees that the pixels are consecutive
        image = rows * 0
        local = rows
    else:
        image = rows // PIXELS
        local = rows % PIXELS
    inside = (image < N - first_image) & (local < H * W - first)
    pixel = first + local
    return first_image, image, pixel, pixel // W, pixel % W, inside


@triton.jit
def _offsets(
    image, pixel, h, w, stride_n, stride_h, stride_w,
    FLAT: tl.constexpr, IMAGES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of pixels in the map of the tile's first image, without the channel.

    FLAT: the pixels of a channel are consecutive.
    """
    offsets = pixel.to(INDEX) if FLAT else h.to(INDEX) * stride_h + w.to(INDEX) * stride_w
    if IMAGES > 1:
        offsets += image.to(INDEX) * stride_n
    return offsets


@triton.jit
def _add_branch(
    acc, src, weight, first, offsets, h, w, inside, H, W, stride_c, stride_h, stride_w,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """acc [pixels, CHANNELS] plus the products of one branch for its channels from ``first`` on."""
    BRANCH: tl.constexpr = BRANCHES[WHICH]
    SIDE: tl.constexpr = BRANCH[0]
    SOURCES: tl.constexpr = BRANCH[1]
    DESTINATIONS: tl.constexpr = BRANCH[2]
    GROUPS: tl.constexpr = BRANCH[3]
    SOURCE: tl.constexpr = BRANCH[4]
    IS_WIDE: tl.constexpr = BRANCH[6]
    DEPTH: tl.constexpr = BRANCH[8]
    BASE: tl.constexpr = BRANCH[11]
    BY_GROUP: tl.constexpr = BRANCH[12]
    BY_DESTINATION: tl.constexpr = BRANCH[13]
    BY_SOURCE: tl.constexpr = BRANCH[14]
    BY_ROW: tl.constexpr = BRANCH[15]
    BY_COLUMN: tl.constexpr = BRANCH[16]
    HALF: tl.constexpr = SIDE // 2
    zero = tl.full((), 0, INDEX)
    channel = tl.arange(0, CHANNELS)
    if IS_WIDE:
        group = first // DESTINATIONS + zero
        channel += first % DESTINATIONS
        exists = (channel < DESTINATIONS)[None, :]
        src += (SOURCE + group * SOURCES) * stride_c
        weight += BASE + group * BY_GROUP
        rows = offsets[:, None]
        columns = (channel[None, :] + zero) * BY_DESTINATION
        depth = tl.arange(0, DEPTH)
        if SOURCES % DEPTH == 0:
            BLOCKS: tl.constexpr = SOURCES // DEPTH
            rows = rows + (depth[None, :] + zero) * stride_c
            columns = columns + (depth[:, None] + zero) * BY_SOURCE
            for step in range(SIDE * SIDE * BLOCKS):
                tap = step // BLOCKS
                source = (step % BLOCKS) * DEPTH + zero
                dy = tap // SIDE - HALF
                dx = tap % SIDE - HALF
                seen = inside & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
                shift = (dy + zero) * stride_h + (dx + zero) * stride_w + source * stride_c
                a = tl.load(src + shift + rows, mask=seen[:, None], other=0.0)
                at = (dy + HALF + zero) * BY_ROW + (dx + HALF) * BY_COLUMN + source * BY_SOURCE
                b = tl.load(weight + at + columns, mask=exists, other=0.0)
                if WIDEN:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
        else:
            for start in range(0, SIDE * SIDE * SOURCES, DEPTH):
                tap = (start + depth) // SOURCES
                source = (start + depth) % SOURCES + zero
                dy = (tap // SIDE - HALF)[None, :]
                dx = (tap % SIDE - HALF)[None, :]
                y = h[:, None] + dy
                x = w[:, None] + dx
                seen = inside[:, None] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
                is_tap = tap < SIDE * SIDE
                shift = (dy + zero) * stride_h + (dx + zero) * stride_w + source[None, :] * stride_c
                a = tl.load(src + (rows + shift), mask=seen & is_tap[None, :], other=0.0)
                at = (tap // SIDE + zero) * BY_ROW + (tap % SIDE) * BY_COLUMN + source * BY_SOURCE
                mask = exists & is_tap[:, None]
                b = tl.load(weight + (columns + at[:, None]), mask=mask, other=0.0)
                if WIDEN:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        channel += first
        exists = (channel < GROUPS * DESTINATIONS)[None, :]
        group = (channel // DESTINATIONS)[None, :] + zero
        rows = offsets[:, None] + (SOURCE + group * SOURCES) * stride_c
        columns = BASE + group * BY_GROUP + (channel % DESTINATIONS)[None, :] * BY_DESTINATION
        for tap in range(SIDE * SIDE):
            dy = tap // SIDE - HALF
            dx = tap % SIDE - HALF
            seen = inside & (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
            mask = seen[:, None] & exists
            a_tap = src + ((dy + zero) * stride_h + (dx + zero) * stride_w)
            b_tap = weight + ((dy + HALF + zero) * BY_ROW + (dx + HALF) * BY_COLUMN)
            a = tl.load(a_tap + rows, mask=mask, other=0.0)
            b = tl.load(b_tap + columns, mask=exists, other=0.0)
            product = a.to(tl.float32) * b.to(tl.float32)
            # Each tap's sum by itself: shorter sums round less.
            for source in range(1, SOURCES):
                a = tl.load(a_tap + (source + zero) * stride_c + rows, mask=mask, other=0.0)
                b = tl.load(b_tap + (source + zero) * BY_SOURCE + columns, mask=exists, other=0.0)
                product += a.to(tl.float32) * b.to(tl.float32)
            acc += product
    return acc


@triton.jit
def _pool(value, valid, pixel, AXIS: tl.constexpr):
    """Sum, maximum and its pixel over one axis: NaN is the largest, and the first one counts."""
    total = tl.sum(tl.where(valid, value, 0.0), axis=AXIS)
    is_nan = valid & (value != value)
    largest = tl.max(tl.where(valid & (value == value), value, float("-inf")), axis=AXIS)
    has_nan = tl.max(is_nan.to(tl.int32), axis=AXIS) > 0
    hit = valid & (value == tl.expand_dims(largest, AXIS))
    hit = tl.where(tl.expand_dims(has_nan, AXIS), is_nan, hit)
    index = tl.min(tl.where(hit, pixel, 2147483647), axis=AXIS)
    return total, tl.where(has_nan, float("nan"), largest), index


@triton.jit
def _write(
    acc, dst, bias, statistics, block, first, end, first_image, pixel, offsets, inside,
    N, H, W, stride_n, stride_c,
    TOTAL: tl.constexpr, OFFSET: tl.constexpr, CHANNELS: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Stores acc [pixels, CHANNELS] and, from it, the statistics of the tile.

    Its channels are those of a branch from ``first`` on that are below ``end``; OFFSET is the
    branch's first channel among all TOTAL.
    """
    channel = first + tl.arange(0, CHANNELS)
    exists = channel < end
    channel += OFFSET
    if bias is not None:
        acc += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    to = dst + tl.cast(first_image, tl.int64) * stride_n
    to += offsets[:, None] + channel.to(INDEX)[None, :] * stride_c
    tl.store(to, acc.to(dst.dtype.element_ty), mask=inside[:, None] & exists[None, :])
    if statistics is not None:
        tiles = tl.cdiv(H * W, PIXELS)
        # Offsets to the first image and to its maxima may exceed 2^31; within a third none does.
        third = tl.cast(tiles, tl.int64) * TOTAL
        sums = statistics + third * 3 * first_image + block % tiles
        maxima = sums + third
        indices = (maxima + third).to(tl.pointer_type(tl.int32), bitcast=True)
        if IMAGES == 1:
            total, largest, index = _pool(acc, inside[:, None], pixel[:, None], 0)
            where = channel * tiles
            mask = exists
        else:
            value = tl.reshape(acc, (IMAGES, PIXELS, CHANNELS))
            valid = tl.reshape(inside, (IMAGES, PIXELS, 1))
            total, largest, index = _pool(value, valid, tl.reshape(pixel, (IMAGES, PIXELS, 1)), 1)
            image = tl.arange(0, IMAGES)[:, None]
            where = (image * (3 * TOTAL) + channel[None, :]) * tiles
            mask = (image < N - first_image) & exists[None, :]
        tl.store(sums + where, total, mask=mask)
        tl.store(maxima + where, largest, mask=mask)
        tl.store(indices + where, index, mask=mask)


@triton.jit
def _convolve_branch(
    src, dst, weight, bias, statistics, block, tile, first_image, pixel, offsets, to,
    h, w, inside, N, H, W, src_c, src_h, src_w, dst_n, dst_c,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, TOTAL: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, MOST: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of the result of one branch."""
    BRANCH: tl.constexpr = BRANCHES[WHICH]
    DESTINATIONS: tl.constexpr = BRANCH[2]
    CHANNELS: tl.constexpr = BRANCH[7]
    tl.static_assert(CHANNELS <= MOST)
    PER_GROUP: tl.constexpr = (BRANCH[2] + BRANCH[7] - 1) // BRANCH[7]
    IS_WIDE: tl.constexpr = BRANCH[6]
    if IS_WIDE:
        group = tile // PER_GROUP
        first = group * DESTINATIONS + tile % PER_GROUP * CHANNELS
        end = (group + 1) * DESTINATIONS
    else:
        first = tile * CHANNELS
        end = BRANCH[2] * BRANCH[3]
    acc = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    acc = _add_branch(
        acc, src, weight, first, offsets, h, w, inside, H, W, src_c, src_h, src_w,
        BRANCHES, WHICH, CHANNELS, PRECISION, WIDEN, INDEX,
    )  # fmt: skip
    _write(
        acc, dst, bias, statistics, block, first, end, first_image, pixel, to, inside,
        N, H, W, dst_n, dst_c, TOTAL, BRANCH[5], CHANNELS, IMAGES, PIXELS, INDEX,
    )  # fmt: skip


@triton.jit
def _convolve_sum(
    src, dst, weights, block, tile, first_image, pixel, offsets, to,
    h, w, inside, N, H, W, src_c, src_h, src_w, dst_n, dst_c,
    BRANCHES: tl.constexpr, CHANNELS: tl.constexpr, COUNT: tl.constexpr, TOTAL: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of the sum over all branches."""
    acc = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    for i in tl.static_range(COUNT):
        # Each branch by itself, as its output would be: shorter sums round less.
        acc += _add_branch(
            tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32), src, weights[i],
            tile * CHANNELS, offsets, h, w, inside, H, W, src_c, src_h, src_w,
            BRANCHES, i, CHANNELS, PRECISION, WIDEN, INDEX,
        )  # fmt: skip
    _write(
        acc, dst, None, None, block, tile * CHANNELS, TOTAL, first_image, pixel, to, inside,
        N, H, W, dst_n, dst_c, TOTAL, 0, CHANNELS, IMAGES, PIXELS, INDEX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "H", "W"])
def _convolve(
    src, dst, weights, bias, statistics, N, H, W,
    src_n, src_c, src_h, src_w, dst_n, dst_c, dst_h, dst_w,
    BRANCHES: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr,
    SUMMED: tl.constexpr, SRC_FLAT: tl.constexpr, DST_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, MOST: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dst (N, TOTAL, H, W) from src and the weights; SUMMED: every branch adds to all of dst.

    statistics (N, 3, TOTAL, tiles of pixels per image): sums, maxima, and the bits of the maxima's
    int32 places. One tensor, because to allocate one takes the host longer than to plan a call.
    """
    tile = tl.program_id(0) % TILES
    block = tl.program_id(0) // TILES
    first_image, image, pixel, h, w, inside = _pixels_of(block, N, H, W, IMAGES, PIXELS)
    src += tl.cast(first_image, tl.int64) * src_n
    offsets = _offsets(image, pixel, h, w, src_n, src_h, src_w, SRC_FLAT, IMAGES, INDEX)
    to = _offsets(image, pixel, h, w, dst_n, dst_h, dst_w, DST_FLAT, IMAGES, INDEX)
    if SUMMED:
        _convolve_sum(
            src, dst, weights, block, tile, first_image, pixel, offsets, to,
            h, w, inside, N, H, W, src_c, src_h, src_w, dst_n, dst_c,
            BRANCHES, BRANCHES[0][7], COUNT, TOTAL, IMAGES, PIXELS, PRECISION, WIDEN, INDEX,
        )  # fmt: skip
    else:
        for i in tl.static_range(COUNT):
            if (tile >= BRANCHES[i][9]) & (tile < BRANCHES[i][9] + BRANCHES[i][10]):
                _convolve_branch(
                    src, dst, weights[i], bias, statistics, block, tile - BRANCHES[i][9],
                    first_image, pixel, offsets, to, h, w, inside, N, H, W,
                    src_c, src_h, src_w, dst_n, dst_c,
                    BRANCHES, i, TOTAL, IMAGES, PIXELS, MOST, PRECISION, WIDEN, INDEX,
                )  # fmt: skip


@triton.jit
def _gradient_by_dot(
    grad, x, partial, tile, begin, end, N, H, W,
    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A tile [output channels, taps x input channels] of one group, over the blocks of a slice."""
    BRANCH: tl.constexpr = BRANCHES[WHICH]
    SIDE: tl.constexpr = BRANCH[0]
    INPUTS: tl.constexpr = BRANCH[1]
    OUTPUTS: tl.constexpr = BRANCH[2]
    GROUPS: tl.constexpr = BRANCH[3]
    INPUT: tl.constexpr = BRANCH[4]
    OUTPUT: tl.constexpr = BRANCH[5]
    ROWS: tl.constexpr = BRANCH[7]
    COLUMNS: tl.constexpr = BRANCH[8]
    PARTIAL: tl.constexpr = BRANCH[11]
    HALF: tl.constexpr = SIDE // 2
    COLUMN_TILES: tl.constexpr = (SIDE * SIDE * INPUTS + COLUMNS - 1) // COLUMNS
    ROW_TILES: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    zero = tl.full((), 0, INDEX)
    group = tile // (COLUMN_TILES * ROW_TILES) + zero
    output = tile // COLUMN_TILES % ROW_TILES * ROWS + tl.arange(0, ROWS)
    is_output = output < OUTPUTS
    column = tile % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    is_tap = column < SIDE * SIDE * INPUTS
    dy = column // INPUTS // SIDE - HALF
    dx = column // INPUTS % SIDE - HALF
    of_row = (OUTPUT + group * OUTPUTS + output) * grad_c
    of_column = (INPUT + group * INPUTS + column % INPUTS) * x_c
    of_column += (dy + zero) * x_h + (dx + zero) * x_w
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(begin, end):
        first_image, image, pixel, h, w, inside = _pixels_of(block, N, H, W, IMAGES, PIXELS)
        from_grad = _offsets(image, pixel, h, w, grad_n, grad_h, grad_w, GRAD_FLAT, IMAGES, INDEX)
        from_x = _offsets(image, pixel, h, w, x_n, x_h, x_w, X_FLAT, IMAGES, INDEX)
        in_grad = grad + tl.cast(first_image, tl.int64) * grad_n
        in_x = x + tl.cast(first_image, tl.int64) * x_n
        a = tl.load(
            in_grad + (of_row[:, None] + from_grad[None, :]),
            mask=is_output[:, None] & inside[None, :],
            other=0.0,
        )
        if INPUTS % COLUMNS == 0:  # all columns belong to one tap
            above = tile % COLUMN_TILES * COLUMNS // INPUTS // SIDE - HALF
            left = tile % COLUMN_TILES * COLUMNS // INPUTS % SIDE - HALF
            seen = inside & (h + above >= 0) & (h + above < H) & (w + left >= 0) & (w + left < W)
            mask = seen[:, None] & is_tap[None, :]
        else:
            at_h = h[:, None] + dy[None, :]
            at_w = w[:, None] + dx[None, :]
            mask = inside[:, None] & is_tap[None, :]
            mask = mask & (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
        b = tl.load(in_x + (of_column[None, :] + from_x[:, None]), mask=mask, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    to = PARTIAL + column[None, :] * (GROUPS * OUTPUTS) + (group * OUTPUTS + output)[:, None]
    tl.store(partial + to, acc, mask=is_output[:, None] & is_tap[None, :])


@triton.jit
def _products(grad, x, at, tap, h, w, inside, H, W, x_h, x_w, SIDE: tl.constexpr):
    """grad [pixels, channels] times x at a tap; ``at`` are offsets in x of the centre tap."""
    zero = tl.full((), 0, tl.int64)
    dy = tap // SIDE - SIDE // 2
    dx = tap % SIDE - SIDE // 2
    rows = tl.where(tap < SIDE * SIDE, H, 0)  # none for a tap beyond the last
    seen = inside & (h + dy >= 0) & (h + dy < rows) & (w + dx >= 0) & (w + dx < W)
    shift = (dy + zero) * x_h + (dx + zero) * x_w
    return grad * tl.load(x + shift + at, mask=seen[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_tap(
    partial, acc, tap, channel,
    SIDE: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Stores the sums over pixels of acc [pixels, channels]."""
    count = tl.where(tap < SIDE * SIDE, OUTPUTS, 0)
    to = partial + tap * (INPUTS * OUTPUTS) + channel
    tl.store(to, tl.sum(acc, axis=0), mask=channel < count)


@triton.jit
def _gradient_directly(
    grad, x, partial, tile, begin, end, N, H, W,
    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Four taps of one input channel per group for a tile of output channels of any groups."""
    BRANCH: tl.constexpr = BRANCHES[WHICH]
    SIDE: tl.constexpr = BRANCH[0]
    INPUTS: tl.constexpr = BRANCH[1]
    OUTPUTS: tl.constexpr = BRANCH[2]
    GROUPS: tl.constexpr = BRANCH[3]
    INPUT: tl.constexpr = BRANCH[4]
    OUTPUT: tl.constexpr = BRANCH[5]
    CHANNELS: tl.constexpr = BRANCH[7]
    PARTIAL: tl.constexpr = BRANCH[11]
    CHANNEL_TILES: tl.constexpr = (GROUPS * OUTPUTS + CHANNELS - 1) // CHANNELS
    zero = tl.full((), 0, INDEX)
    channel = tile % CHANNEL_TILES * CHANNELS + tl.arange(0, CHANNELS)
    # A channel that does not exist reads the last one: its sums are not stored.
    real = tl.minimum(channel, GROUPS * OUTPUTS - 1)
    source = tile // CHANNEL_TILES % INPUTS
    tap = tile // (CHANNEL_TILES * INPUTS) * 4
    of_grad = (OUTPUT + real + zero) * grad_c
    of_x = (INPUT + real // OUTPUTS * INPUTS + source + zero) * x_c
    acc0 = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    acc1 = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    acc2 = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    acc3 = tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32)
    for block in range(begin, end):
        first_image, image, pixel, h, w, inside = _pixels_of(block, N, H, W, IMAGES, PIXELS)
        from_grad = _offsets(image, pixel, h, w, grad_n, grad_h, grad_w, GRAD_FLAT, IMAGES, INDEX)
        from_x = _offsets(image, pixel, h, w, x_n, x_h, x_w, X_FLAT, IMAGES, INDEX)
        in_grad = grad + tl.cast(first_image, tl.int64) * grad_n
        in_x = x + tl.cast(first_image, tl.int64) * x_n
        at = in_grad + (of_grad[None, :] + from_grad[:, None])
        g = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
        at = of_x[None, :] + from_x[:, None]
        acc0 += _products(g, in_x, at, tap, h, w, inside, H, W, x_h, x_w, SIDE)
        acc1 += _products(g, in_x, at, tap + 1, h, w, inside, H, W, x_h, x_w, SIDE)
        acc2 += _products(g, in_x, at, tap + 2, h, w, inside, H, W, x_h, x_w, SIDE)
        acc3 += _products(g, in_x, at, tap + 3, h, w, inside, H, W, x_h, x_w, SIDE)
    to = partial + PARTIAL + source * (GROUPS * OUTPUTS)
    _store_tap(to, acc0, tap, channel, SIDE, INPUTS, GROUPS * OUTPUTS)
    _store_tap(to, acc1, tap + 1, channel, SIDE, INPUTS, GROUPS * OUTPUTS)
    _store_tap(to, acc2, tap + 2, channel, SIDE, INPUTS, GROUPS * OUTPUTS)
    _store_tap(to, acc3, tap + 3, channel, SIDE, INPUTS, GROUPS * OUTPUTS)


@triton.jit(do_not_specialize=["N", "H", "W", "blocks", "per_slice"])
def _weight_partials(
    grad, x, partial, N, H, W, blocks, per_slice,
    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
    BRANCHES: tl.constexpr, COUNT: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr,
    GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """partial (slices, TOTAL): per branch (tap that can meet the map, input channel, output)."""
    tile = tl.program_id(0) % TILES
    part = tl.program_id(0) // TILES
    begin = part * per_slice
    end = tl.minimum(begin + per_slice, blocks)
    to = partial + part.to(tl.int64) * TOTAL
    for i in tl.static_range(COUNT):
        if (tile >= BRANCHES[i][9]) & (tile < BRANCHES[i][9] + BRANCHES[i][10]):
            if BRANCHES[i][6]:
                _gradient_by_dot(
                    grad, x, to, tile - BRANCHES[i][9], begin, end, N, H, W,
                    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
                    BRANCHES, i, GRAD_FLAT, X_FLAT, IMAGES, PIXELS, PRECISION, WIDEN, INDEX,
                )  # fmt: skip
            else:
                _gradient_directly(
                    grad, x, to, tile - BRANCHES[i][9], begin, end, N, H, W,
                    grad_n, grad_c, grad_h, grad_w, x_n, x_c, x_h, x_w,
                    BRANCHES, i, GRAD_FLAT, X_FLAT, IMAGES, PIXELS, INDEX,
                )  # fmt: skip


@triton.jit
def _sum_branch(
    partial, grad, program, slices,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the gradient of one branch's weight."""
    BRANCH: tl.constexpr = BRANCHES[WHICH]
    SIZE: tl.constexpr = BRANCH[2]
    SIDE: tl.constexpr = BRANCH[3]
    INPUTS: tl.constexpr = BRANCH[4]
    OUTPUTS: tl.constexpr = BRANCH[5]
    # Output channels fastest, as they lie in the partial sums.
    index = program * BLOCK + tl.arange(0, BLOCK)
    exists = index < SIZE * SIZE * INPUTS * OUTPUTS
    output = index % OUTPUTS
    source = index // OUTPUTS % INPUTS
    row = index // (OUTPUTS * INPUTS * SIZE)
    column = index // (OUTPUTS * INPUTS) % SIZE
    y = row - (SIZE - SIDE) // 2
    x = column - (SIZE - SIDE) // 2
    meets = exists & (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    at = partial + BRANCH[6] + (((y * SIDE + x) * INPUTS + source) * OUTPUTS + output)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(slices):
        total += tl.load(at + tl.cast(part, tl.int64) * TOTAL, mask=meets, other=0.0)
    to = grad + output.to(tl.int64) * BRANCH[7] + source.to(tl.int64) * BRANCH[8]
    to += row.to(tl.int64) * BRANCH[9] + column.to(tl.int64) * BRANCH[10]
    tl.store(to, total.to(grad.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["slices"])
def _weight_sums(
    partial, grads, slices,
    BRANCHES: tl.constexpr, COUNT: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grads[i] (Cout, Cin / groups, k, k): the slices' sum, 0 for taps that never meet the map."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= BRANCHES[i][0]) & (program < BRANCHES[i][0] + BRANCHES[i][1]):
            first = BRANCHES[i][0]
            _sum_branch(partial, grads[i], program - first, slices, BRANCHES, i, TOTAL, BLOCK)


# --- plans ------------------------------------------------------------------------------------
#
# A plan is what a kernel knows at compile time. It depends on the weights, on how products are
# computed, and on H and W only where a kernel exceeds the map or the map does not fill a tile.


class _Branch(NamedTuple):
    """A branch for _convolve. Source and destination are those of the data that is convolved."""

    side: int  # taps per axis that can meet the map, k at most
    sources: int  # channels per group
    destinations: int  # channels per group
    groups: int
    source: int  # first channel
    destination: int  # first channel
    wide: bool
    channels: int  # destination channels of a tile
    depth: int
    first: int  # tile
    tiles: int
    # Offsets of weights, in elements: of the first tap, and from one to the next.
    base: int
    by_group: int
    by_destination: int
    by_source: int
    by_row: int
    by_column: int


class _Gradient(NamedTuple):
    """A branch for _weight_partials; fields at the places of those of _Branch."""

    side: int
    inputs: int
    outputs: int
    groups: int
    input: int
    output: int
    wide: bool
    rows: int
    columns: int
    first: int
    tiles: int
    partial: int  # offset in the partial sums of a slice


class _Sum(NamedTuple):
    """A branch for _weight_sums."""

    first: int
    programs: int
    size: int  # k
    side: int
    inputs: int
    outputs: int  # channels of all groups
    partial: int
    by_output: int
    by_input: int
    by_row: int
    by_column: int


class _Plan(NamedTuple):
    branches: tuple[tuple, ...]
    tiles: int
    images: int
    pixels: int
    maps: int  # tiles of pixels per image
    configuration: Configuration
    total: int  # channels of the result; elements of a slice of partial sums
    span: int  # largest offset in a weight, or in a slice of partial sums
    sums: tuple[tuple, ...] = ()
    programs: int = 0  # of _weight_sums


# Shapes and strides of the weights, hashable.
_Weights = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The largest offset in a tensor."""
    return sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])


def _power_of_two(n: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(n), least), most)


def _side(k: int, h: int, w: int) -> int:
    """Taps per axis that can meet the map: none is farther than max(H, W) - 1 from the centre."""
    return min(k, 2 * max(h, w) - 1)


def _block_of_pixels(pixels: int, h: int, w: int) -> tuple[int, int, int]:
    """Images and pixels of each in a block, and the number of blocks per image."""
    own = _power_of_two(h * w, 1, pixels)
    return pixels // own, own, -(-h * w // own)


@lru_cache(maxsize=1024)
def _plan_convolution(
    weights: _Weights,
    groups: tuple[int, ...],
    split: bool,
    backwards: bool,
    h: int,
    w: int,
    products: str,
    most: int,
) -> _Plan:
    """``most`` are the channels of a tile at most: those of the configuration's."""
    configuration = CONVOLUTION[products, h * w >= LARGE_MAP]
    images, pixels, maps = _block_of_pixels(configuration.pixels, h, w)
    summed = backwards and not split
    widths = [shape[1] for shape, _ in weights]
    # A tile of the sum over branches has to lie in one group of each branch that uses tl.dot; and
    # it keeps two accumulators.
    all_channels = 16
    branches, tile, x_channel, y_channel = [], 0, 0, 0
    for (shape, stride), g in zip(weights, groups, strict=True):
        outputs, inputs, k, _ = shape
        outputs //= g
        sources, destinations = (outputs, inputs) if backwards else (inputs, outputs)
        wide = min(sources, destinations) >= WIDE
        if summed:
            wide = wide and (g == 1 or destinations % all_channels == 0)
            channels = all_channels
            tiles = -(-destinations * g // channels)
        elif wide:
            channels = _power_of_two(destinations, 16, most)
            tiles = g * -(-destinations // channels)
        else:
            channels = 16
            tiles = -(-destinations * g // channels)
        side = _side(k, h, w)
        skip = (k - side) // 2
        by_row, by_column = stride[2], stride[3]
        base = skip * (by_row + by_column)
        if backwards:
            base = (k - 1 - skip) * (by_row + by_column)
            by_row, by_column = -by_row, -by_column
        branches.append(
            _Branch(
                side=side,
                sources=sources,
                destinations=destinations,
                groups=g,
                source=y_channel if backwards else x_channel,
                destination=x_channel if backwards else y_channel,
                wide=wide,
                channels=channels,
                depth=16 if sources % 32 else configuration.depth,
                first=0 if summed else tile,
                tiles=tiles,
                base=base,
                by_group=outputs * stride[0],
                by_destination=stride[1] if backwards else stride[0],
                by_source=stride[0] if backwards else stride[1],
                by_row=by_row,
                by_column=by_column,
            )
        )
        tile += tiles
        x_channel += inputs * g if split else 0
        y_channel += outputs * g
    total = y_channel
    if backwards:
        total = x_channel if split else widths[0] * groups[0]
    return _Plan(
        # Tuples proper: a kernel's compile-time values are compared and printed at every launch.
        tuple(map(tuple, branches)),
        branches[0].tiles if summed else tile,
        images,
        pixels,
        maps,
        configuration,
        total,
        max(_span(shape, stride) for shape, stride in weights),
    )


@lru_cache(maxsize=1024)
def _plan_gradient(
    weights: _Weights,
    results: tuple[tuple[int, ...], ...],
    groups: tuple[int, ...],
    split: bool,
    h: int,
    w: int,
    products: str,
) -> _Plan:
    """``results`` are the strides of the gradients."""
    configuration = WEIGHT_GRADIENT[products]
    images, pixels, maps = _block_of_pixels(configuration.pixels, h, w)
    branches, sums = [], []
    tile, program, partial, x_channel, y_channel = 0, 0, 0, 0, 0
    for (shape, _), stride, g in zip(weights, results, groups, strict=True):
        outputs, inputs, k, _ = shape
        outputs //= g
        side = _side(k, h, w)
        wide = outputs >= (WIDE if products == "ieee" else WIDE_GRADIENT)
        if wide:
            rows = _power_of_two(outputs, 16, configuration.tiles[0].channels)
            columns = _power_of_two(side * side * inputs, 16, configuration.depth)
            tiles = g * -(-outputs // rows) * -(-side * side * inputs // columns)
        else:
            rows, columns = 16, TAPS
            tiles = -(-outputs * g // rows) * inputs * -(-side * side // TAPS)
        branches.append(
            _Gradient(
                side=side,
                inputs=inputs,
                outputs=outputs,
                groups=g,
                input=x_channel,
                output=y_channel,
                wide=wide,
                rows=rows,
                columns=columns,
                first=tile,
                tiles=tiles,
                partial=partial,
            )
        )
        programs = -(-shape[0] * inputs * k * k // SUMS)
        sums.append(_Sum(program, programs, k, side, inputs, shape[0], partial, *stride))
        tile += tiles
        program += programs
        partial += side * side * inputs * shape[0]
        x_channel += inputs * g if split else 0
        y_channel += shape[0]
    return _Plan(
        tuple(map(tuple, branches)),
        tile,
        images,
        pixels,
        maps,
        configuration,
        partial,
        partial,
        tuple(map(tuple, sums)),
        program,
    )


def _key(weights: Sequence[Tensor]) -> _Weights:
    return tuple([(w.shape, w.stride()) for w in weights])


def _shapes(weights: _Weights) -> tuple[tuple[int, ...], ...]:
    """What a class of problems knows of the weights: their layout hardly matters."""
    return tuple([shape for shape, _ in weights])


def _arithmetic(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How products are computed: see CONVOLUTION."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if allow_tf32 else "ieee"


def _precision(products: str) -> str:
    return "tf32" if products == "tf32" else "ieee"


# The interpreter multiplies the bits of bfloat16 as integers: there, operands are widened first,
# which changes nothing, since products of 16-bit floats are exact in float32.
_WIDEN = not isinstance(_convolve, triton.JITFunction)


def _index(plan: _Plan, one: Tensor, other: Tensor) -> tl.dtype:
    """The type of offsets from the first image of a tile on."""
    spans = [_span((plan.images, *t.shape[1:]), t.stride()) for t in (one, other)]
    return tl.int32 if max(plan.span, *spans) < 2**31 else tl.int64


def _is_flat(t: Tensor, strides: Sequence[int]) -> bool:
    """Whether the pixels of a channel are consecutive in memory."""
    h, w = t.shape[2], t.shape[3]
    return (w == 1 or strides[3] == 1) and (h == 1 or strides[2] == w)


def _map_like(x: Tensor, channels: int) -> Tensor:
    """mfef_ext.ops.fakes.map_like, but allocated at once in its layout."""
    n, _, h, w = x.shape
    # One channel or one pixel is in both layouts, and there torch prefers the contiguous strides.
    if (
        channels > 1
        and h * w > 1
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return x.new_empty((n, h, w, channels)).permute(0, 3, 1, 2)
    return x.new_empty((n, channels, h, w))


# --- calls ------------------------------------------------------------------------------------
#
# A call is a plan for given maps: whatever is known before there are pointers, kept by all that
# compiled code depends on. `reuse` is usual() of the tensors.


class _Convolution(NamedTuple):
    """A call of _convolve."""

    result: Layout
    statistics: Layout
    launch: Launch


class _WeightGradient(NamedTuple):
    """A call of _weight_partials and _weight_sums."""

    partial: Layout
    launches: tuple[Launch, Launch]


@lru_cache(maxsize=1024)
def _convolution(
    src_shape: tuple[int, ...],
    src_strides: tuple[int, ...],
    x_shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: _Weights,
    groups: tuple[int, ...],
    split: bool,
    backwards: bool,
    has_bias: bool,
    has_statistics: bool,
    products: str,
    deterministic: bool,
    reuse: bool,
) -> _Convolution:
    """``x`` is what the result looks like."""
    src, x = like(src_shape, src_strides), like(x_shape, x_strides)
    n, _, h, w = x_shape
    plans: dict[Tile, _Plan] = {}  # of the tiles that do differ
    seen = set()
    for tile in CONVOLUTION[products, h * w >= LARGE_MAP].tiles:
        plan = _plan_convolution(weights, groups, split, backwards, h, w, products, tile.channels)
        if (plan.branches, tile.warps) not in seen:
            plans[tile] = plan
        seen.add((plan.branches, tile.warps))
    dst = _map_like(x, plan.total)
    constants = {
        "COUNT": len(plan.branches),
        "TOTAL": plan.total,
        "SUMMED": backwards and not split,
        "SRC_FLAT": _is_flat(src, src_strides),
        "DST_FLAT": _is_flat(dst, dst.stride()),
        "IMAGES": plan.images,
        "PIXELS": plan.pixels,
        "PRECISION": _precision(products),
        "WIDEN": _WIDEN,
        "INDEX": _index(plan, src, dst),
    }

    def launch(tile: Tile) -> Launch:
        plan = plans[tile]
        own = {"BRANCHES": plan.branches, "TILES": plan.tiles, "MOST": tile.channels}
        return Launch(
            _convolve,
            -(-n // plan.images) * plan.maps * plan.tiles,
            (n, h, w, *src_strides, *dst.stride()),
            {**constants, **own},
            tile.warps,
            plan.configuration.stages,
            reuse,
            tile.registers,
        )

    problem = (
        dtype, products, _shapes(weights), groups, split, backwards, has_statistics,
        constants["SRC_FLAT"], constants["DST_FLAT"], *about(n, h * w),
    )  # fmt: skip
    tuned = of_tiles(tuple(plans), launch, problem, device, deterministic)
    return _Convolution((dst.shape, dst.stride()), dense(n, 3, plan.total, plan.maps), tuned)


def _slices(plan: _Plan, blocks: int) -> tuple[int, int]:
    """Slices of the images, and blocks of pixels in each. Depends on shapes only."""
    wanted = min(-(-PROGRAMS // plan.tiles), max(blocks // 4, 1))
    per_slice = max(-(-blocks // wanted), 1)
    return -(-blocks // per_slice), per_slice


@lru_cache(maxsize=1024)
def _weight_gradient(
    grad_strides: tuple[int, ...],
    x_shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: _Weights,
    groups: tuple[int, ...],
    split: bool,
    products: str,
    deterministic: bool,
    reuse: bool,
) -> _WeightGradient:
    n, _, h, w = x_shape
    results = tuple([torch.empty_like(like(*weight)).stride() for weight in weights])
    plan = _plan_gradient(weights, results, groups, split, h, w, products)
    outputs = sum(shape[0] for shape, _ in weights)
    grad, x = like((n, outputs, h, w), grad_strides), like(x_shape, x_strides)
    blocks = -(-n // plan.images) * plan.maps
    slices, per_slice = _slices(plan, blocks)
    constants = {
        "BRANCHES": plan.branches,
        "COUNT": len(plan.branches),
        "TILES": plan.tiles,
        "TOTAL": plan.total,
        "GRAD_FLAT": _is_flat(grad, grad_strides),
        "X_FLAT": _is_flat(x, x_strides),
        "IMAGES": plan.images,
        "PIXELS": plan.pixels,
        "PRECISION": _precision(products),
        "WIDEN": _WIDEN,
        "INDEX": _index(plan, grad, x),
    }

    def launch(tile: Tile) -> Launch:
        return Launch(
            _weight_partials,
            plan.tiles * slices,
            (n, h, w, blocks, per_slice, *grad_strides, *x_strides),
            constants,
            tile.warps,
            plan.configuration.stages,
            reuse,
            tile.registers,
        )

    problem = (
        dtype, products, _shapes(weights), groups, split,
        constants["GRAD_FLAT"], constants["X_FLAT"], *about(n, h * w),
    )  # fmt: skip
    tuned = of_tiles(plan.configuration.tiles, launch, problem, device, deterministic)
    of_sums = {
        "BRANCHES": plan.sums,
        "COUNT": len(plan.sums),
        "TOTAL": plan.total,
        "BLOCK": SUMS,
    }
    sums = Launch(_weight_sums, plan.programs, (slices,), of_sums, 4, 3, reuse)
    return _WeightGradient(dense(slices, plan.total), (tuned, sums))


# --- what operators call ----------------------------------------------------------------------


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool,
    bias: Tensor | None,
    allow_tf32: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and what global pooling needs to know of its result.

    x: (N, C, H, W) with any strides; weights and bias as in mfef_ext.reference. Returns
    y (N, Cout, H, W) in the layout of x and, with ``statistics``, a tensor (N, 3, Cout, T) in
    float32: per image, channel and each of T tiles of pixels the sum, the maximum, and the bits of
    the int32 index h * W + w of the first maximum. They are taken before y is rounded to its dtype.
    """
    shape, strides, dtype = x.shape, x.stride(), x.dtype
    if bias is not None:
        bias = bias.contiguous()
    call = _convolution(
        shape, strides, shape, strides, x.device, dtype, _key(weights), tuple(groups), split,
        False, bias is not None, statistics, _arithmetic(dtype, allow_tf32),
        torch.are_deterministic_algorithms_enabled(), usual(dtype, x, bias, *weights),
    )  # fmt: skip
    return run(call, x, weights, bias, statistics)


def run(
    call: _Convolution, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` of a call that is made for its arguments, the bias being contiguous."""
    y = x.new_empty_strided(*call.result)
    per_tile = None
    if statistics:
        per_tile = x.new_empty_strided(*call.statistics, dtype=torch.float32)
    call.launch(x, y, tuple(weights), bias, per_tile)
    return y, per_tile


def data_gradient(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool,
    allow_tf32: bool,
) -> Tensor:
    """The gradient with respect to x (N, C, H, W), in its layout; grad: (N, Cout, H, W)."""
    dtype = x.dtype
    call = _convolution(
        grad.shape, grad.stride(), x.shape, x.stride(), x.device, dtype, _key(weights),
        tuple(groups), split, True, False, False, _arithmetic(dtype, allow_tf32),
        torch.are_deterministic_algorithms_enabled(), usual(dtype, grad, *weights),
    )  # fmt: skip
    grad_x = x.new_empty_strided(*call.result)
    call.launch(grad, grad_x, tuple(weights), None, None)
    return grad_x


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool,
    allow_tf32: bool,
) -> list[Tensor]:
    """The gradients of the weights, in their dtype and strides; grad: (N, Cout, H, W)."""
    dtype = x.dtype
    call = _weight_gradient(
        grad.stride(), x.shape, x.stride(), x.device, dtype, _key(weights), tuple(groups), split,
        _arithmetic(dtype, allow_tf32), torch.are_deterministic_algorithms_enabled(),
        usual(dtype, grad, x, *weights),
    )  # fmt: skip
    results = [torch.empty_like(w) for w in weights]
    partial = x.new_empty_strided(*call.partial, dtype=torch.float32)
    partials, sums = call.launches
    partials(grad, x, partial)
    sums(partial, tuple(results))
    return results


def bias_gradient(grad: Tensor) -> Tensor:
    """The gradient of the bias (Cout,), summed in float32; grad: (N, Cout, H, W)."""
    return grad.sum((0, 2, 3))  # torch's sums have a fixed order, and accumulate in float32
