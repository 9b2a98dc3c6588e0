"""Multi-scale convolution in Triton: forward, data gradient, weight gradient.

What is computed. Branch i is a grouped convolution with stride 1, odd k_i and zero padding
k_i // 2 (mfef_ext/reference.py). All branches run in one launch, whatever their number:

- ``_convolve``: the forward, and the data gradient, which is the same convolution with the roles
  of its channels swapped and its taps in reverse order (negative weight strides from the last tap
  on). With split=False the data gradient is a sum over branches: every program computes all
  branches in their order and keeps the sum in registers.
- ``_weight_partials`` and ``_weight_sums``: the weight gradient, as sums over slices of the images
  in float32, and then the sum of the slices in their order.

Which program owns what.
- ``_convolve``: a tile of [pixels, destination channels] with all its products. Its pixels are
  PIXELS consecutive ones of each of IMAGES images, so that maps of 2 x 2 fill a tile too. Programs
  with consecutive numbers share their pixels. From MIN_DOT_CHANNELS channels per group on a tile
  lies in one group, and its products are ``tl.dot`` of [pixels, source channels] with [source
  channels, destination channels], tap by tap; where the source channels of a group do not fill such
  blocks, taps and channels together make one axis that is cut into blocks. For narrower groups a
  tile spans groups, with one multiply-add per tap and source channel in registers (direct taps).
- ``_weight_partials``: one slice of the images, and a tile of [output channels, taps x input
  channels] of one group (``tl.dot`` over pixels), or for narrow groups without tensor cores TAPS
  taps of one input channel for output channels of any groups.
- ``_weight_sums``: SUMS weights of one branch.

A program of the convolution reads its source pixels once per tap, from L1, and all programs of its
pixels read them again, from L2. Taps that are farther than max(H, W) - 1 from the centre lie
outside of every map and are not looped over.

The order of every sum depends on the shapes of the weights, on H and on W, for the weight gradient
also on N, and on which tile and warps tuning.py has found fastest, which is settled once for a
process and not at all in deterministic mode. There are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from .launch import Launch, Layout, Strides, aligned, contiguous, map_like, meta_like
from .tuning import Tile, fastest_tile, powers_of_two

# Channels per group from which tl.dot pays: below, most of its block is padding. For the weight
# gradient on tensor cores it pays earlier, since all columns of the block are used.
MIN_DOT_CHANNELS = 8
MIN_DOT_CHANNELS_GRADIENT = 2
LARGE_MAP = 1024  # pixels from which a tile has 128 of them: fewer partial statistics, more reuse
TAPS = 4  # accumulators of _weight_partials's direct form; written out there
SUMS = 128  # weights per program of _weight_sums
PROGRAMS = 1024  # of _weight_partials, about; slices are made until there are as many


class Configuration(NamedTuple):
    """Tiles of a launch.

    Nothing has been measured on hardware: sizes follow from registers (an accumulator of at most
    64 x 64 floats in four warps) and shared memory, not from timings.
    """

    pixels: int  # of a tile
    depth: int  # of a tl.dot (weight gradient: columns of a tile, taps x input channels, at most)
    stages: int
    # tuning.py takes one of these. Their channels are the most destination channels (weight
    # gradient: output channels) of a tile.
    tiles: tuple[Tile, ...]


# "half" is 16-bit floats, "tf32" float32 on tensor cores, "ieee" float32 on the ordinary units:
# there tl.dot keeps its operands in registers, so blocks are small. The flag is for large maps.
# Twice the warps halve the registers of a thread and the work between two of its loads. Half the
# channels do so too, with more programs and with pixels that are read once more; they are left out
# where no group is as wide. In "ieee" there is one choice, since it is rarely asked for and every
# candidate is compiled at first calls.
CONVOLUTION = {
    ("half", False): Configuration(64, 32, 3, (Tile(64, 4), Tile(64, 8), Tile(32, 4))),
    ("half", True): Configuration(128, 32, 3, (Tile(32, 4, True), Tile(32, 8))),
    ("tf32", False): Configuration(64, 32, 3, (Tile(32, 4), Tile(32, 8), Tile(64, 8))),
    ("tf32", True): Configuration(128, 32, 3, (Tile(32, 4), Tile(32, 8))),
    ("ieee", False): Configuration(64, 16, 2, (Tile(32, 4, True),)),
    ("ieee", True): Configuration(128, 16, 2, (Tile(32, 8),)),
}
WEIGHT_GRADIENT = {
    "half": Configuration(64, 64, 3, (Tile(64, 4), Tile(64, 8))),
    "tf32": Configuration(32, 64, 3, (Tile(64, 4, True), Tile(64, 8))),
    "ieee": Configuration(32, 32, 2, (Tile(32, 4),)),
}


# --- what kernels are given -------------------------------------------------------------------
#
# BRANCHES is a tuple with one tuple of integers per branch, all known at compile time; _branch and
# _gradient give them their names. (Not every Triton keeps names of such arguments.) Offsets to the
# first image of a tile are 64-bit; those from there on are of the type INDEX, 64-bit only if they
# have to be.


class _Branch(NamedTuple):
    """A branch for _convolve. Source and destination are those of the data that is convolved."""

    side: int  # taps per axis that can meet the map, k at most
    sources: int  # channels per group
    destinations: int  # channels per group
    groups: int
    source: int  # first channel
    destination: int  # first channel
    dot: bool
    channels: int  # destination channels of a tile
    depth: int
    first_tile: int
    tiles: int
    # Offsets of weights, in elements: of the first tap, and from one to the next.
    base: int
    by_group: int
    by_destination: int
    by_source: int
    by_row: int
    by_column: int


class _Gradient(NamedTuple):
    """A branch for the weight gradient."""

    side: int
    inputs: int  # channels per group
    outputs: int  # channels per group
    groups: int
    input: int  # first channel
    output: int  # first channel
    dot: bool
    rows: int
    columns: int
    first_tile: int
    tiles: int
    partial: int  # offset in the partial sums of a slice
    # For _weight_sums.
    size: int  # k
    first_program: int
    programs: int
    by_output: int
    by_input: int
    by_row: int
    by_column: int


@triton.constexpr_function
def _branch(branches, which):
    return _Branch(*branches[which])


@triton.constexpr_function
def _gradient(branches, which):
    return _Gradient(*branches[which])


class _Size(NamedTuple):
    """Of the maps. Made in kernels."""

    N: Any
    H: Any
    W: Any


class _Pixels(NamedTuple):
    """Of a tile. Made in kernels."""

    first_image: Any
    image: Any  # of each pixel, after the first
    index: Any  # h * W + w
    h: Any
    w: Any
    exist: Any


# The interpreter multiplies the bits of bfloat16 as integers: there, operands are widened first,
# which changes nothing, since products of 16-bit floats are exact in float32.
INTERPRETED = tl.constexpr(interpreted())


# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def partial_statistics(statistics, image, tiles, channels):
    """Pointers to the sums, maxima and int32 indices of the maxima (channels, tiles) of an image.

    statistics (N, 3, channels, tiles) is one float32 tensor for all three, because the host takes
    longer to allocate a tensor than to plan a call.
    """
    section = tl.cast(tiles, tl.int64) * channels  # the image's offset may exceed 2^31
    sums = statistics + section * 3 * image
    indices = (sums + section + section).to(tl.pointer_type(tl.int32), bitcast=True)
    return sums, sums + section, indices


@triton.jit
def _pixels_of(block, size, IMAGES: tl.constexpr, PIXELS: tl.constexpr):
    tiles = tl.cdiv(size.H * size.W, PIXELS)
    first_image = (block // tiles) * IMAGES
    first = (block % tiles) * PIXELS
    rows = tl.arange(0, IMAGES * PIXELS)
    if IMAGES == 1:  # said so that the compiler sees that the pixels are consecutive
        image = rows * 0
        local = rows
    else:
        image = rows // PIXELS
        local = rows % PIXELS
    exist = (image < size.N - first_image) & (local < size.H * size.W - first)
    pixel = first + local
    return _Pixels(first_image, image, pixel, pixel // size.W, pixel % size.W, exist)


@triton.jit
def _locate(
    tensor, strides, pixels, FLAT: tl.constexpr, IMAGES: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Pointer to the tile's first image, and offsets of the pixels in there without the channel.

    FLAT: the pixels of a channel are consecutive.
    """
    if FLAT:
        offsets = pixels.index.to(INDEX)
    else:
        offsets = pixels.h.to(INDEX) * strides.h + pixels.w.to(INDEX) * strides.w
    if IMAGES > 1:
        offsets += pixels.image.to(INDEX) * strides.n
    return tensor + tl.cast(pixels.first_image, tl.int64) * strides.n, offsets


@triton.jit
def _on_map(exist, h, w, size):
    return exist & (h >= 0) & (h < size.H) & (w >= 0) & (w < size.W)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(a, b, a_mask, b_mask):
    a = tl.load(a, mask=a_mask, other=0.0).to(tl.float32)
    return a * tl.load(b, mask=b_mask, other=0.0).to(tl.float32)


@triton.jit
def _add_branch(
    acc, src, offsets, weight, first, pixels, size, strides,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """acc [pixels, channels] plus the products of one branch for its channels from ``first`` on."""
    BRANCH: tl.constexpr = _branch(BRANCHES, WHICH)
    SIDE: tl.constexpr = BRANCH.side
    SOURCES: tl.constexpr = BRANCH.sources
    DESTINATIONS: tl.constexpr = BRANCH.destinations
    CHANNELS: tl.constexpr = BRANCH.channels
    DEPTH: tl.constexpr = BRANCH.depth
    zero = tl.full((), 0, INDEX)
    channel = tl.arange(0, CHANNELS)
    if BRANCH.dot:  # the tile lies in one group
        group = first // DESTINATIONS + zero
        channel += first % DESTINATIONS
        exists = (channel < DESTINATIONS)[None, :]
        src += (BRANCH.source + group * SOURCES) * strides.c
        weight += BRANCH.base + group * BRANCH.by_group
        rows = offsets[:, None]
        columns = (channel[None, :] + zero) * BRANCH.by_destination
        depth = tl.arange(0, DEPTH)
        if SOURCES % DEPTH == 0:
            BLOCKS: tl.constexpr = SOURCES // DEPTH
            rows = rows + (depth[None, :] + zero) * strides.c
            columns = columns + (depth[:, None] + zero) * BRANCH.by_source
            for step in range(SIDE * SIDE * BLOCKS):
                tap = step // BLOCKS
                source = (step % BLOCKS) * DEPTH + zero
                dy = tap // SIDE - SIDE // 2
                dx = tap % SIDE - SIDE // 2
                seen = _on_map(pixels.exist, pixels.h + dy, pixels.w + dx, size)[:, None]
                shift = (dy + zero) * strides.h + (dx + zero) * strides.w + source * strides.c
                a = tl.load(src + shift + rows, mask=seen, other=0.0)
                at = (tap // SIDE + zero) * BRANCH.by_row + (tap % SIDE) * BRANCH.by_column
                at += source * BRANCH.by_source
                b = tl.load(weight + at + columns, mask=exists, other=0.0)
                acc = _dot(a, b, acc, PRECISION)
        else:
            h, w, exist = pixels.h[:, None], pixels.w[:, None], pixels.exist[:, None]
            for start in range(0, SIDE * SIDE * SOURCES, DEPTH):
                tap = (start + depth) // SOURCES
                source = (start + depth) % SOURCES + zero
                is_tap = tap < SIDE * SIDE
                dy = (tap // SIDE - SIDE // 2)[None, :]
                dx = (tap % SIDE - SIDE // 2)[None, :]
                seen = _on_map(exist, h + dy, w + dx, size) & is_tap[None, :]
                shift = (dy + zero) * strides.h + (dx + zero) * strides.w
                a = tl.load(
                    src + (rows + (shift + source[None, :] * strides.c)), mask=seen, other=0.0
                )
                at = (tap // SIDE + zero) * BRANCH.by_row + (tap % SIDE) * BRANCH.by_column
                at = columns + (at + source * BRANCH.by_source)[:, None]
                b = tl.load(weight + at, mask=exists & is_tap[:, None], other=0.0)
                acc = _dot(a, b, acc, PRECISION)
    else:
        channel += first
        exists = (channel < BRANCH.groups * DESTINATIONS)[None, :]
        group = (channel // DESTINATIONS)[None, :] + zero
        rows = offsets[:, None] + (BRANCH.source + group * SOURCES) * strides.c
        columns = BRANCH.base + group * BRANCH.by_group
        columns += (channel % DESTINATIONS)[None, :] * BRANCH.by_destination
        for tap in range(SIDE * SIDE):
            dy = tap // SIDE - SIDE // 2
            dx = tap % SIDE - SIDE // 2
            seen = _on_map(pixels.exist, pixels.h + dy, pixels.w + dx, size)[:, None] & exists
            a_tap = src + ((dy + zero) * strides.h + (dx + zero) * strides.w)
            b_tap = weight + (
                (tap // SIDE + zero) * BRANCH.by_row + (tap % SIDE) * BRANCH.by_column
            )
            product = _product(a_tap + rows, b_tap + columns, seen, exists)
            # Each tap's sum by itself: shorter sums round less.
            for source in range(1, SOURCES):
                a = a_tap + (source + zero) * strides.c + rows
                b = b_tap + (source + zero) * BRANCH.by_source + columns
                product += _product(a, b, seen, exists)
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
    acc, dst, to, stride_c, bias, statistics, block, first, end, pixels, size,
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
    at = dst + (to[:, None] + channel.to(INDEX)[None, :] * stride_c)
    tl.store(at, acc.to(dst.dtype.element_ty), mask=pixels.exist[:, None] & exists[None, :])
    if statistics is not None:
        tiles = tl.cdiv(size.H * size.W, PIXELS)
        sums, maxima, indices = partial_statistics(statistics, pixels.first_image, tiles, TOTAL)
        if IMAGES == 1:
            total, largest, index = _pool(acc, pixels.exist[:, None], pixels.index[:, None], 0)
            at = channel * tiles + block % tiles
            mask = exists
        else:
            value = tl.reshape(acc, (IMAGES, PIXELS, CHANNELS))
            valid = tl.reshape(pixels.exist, (IMAGES, PIXELS, 1))
            pixel = tl.reshape(pixels.index, (IMAGES, PIXELS, 1))
            total, largest, index = _pool(value, valid, pixel, 1)
            image = tl.arange(0, IMAGES)[:, None]
            at = (image * (3 * TOTAL) + channel[None, :]) * tiles + block % tiles
            mask = (image < size.N - pixels.first_image) & exists[None, :]
        tl.store(sums + at, total, mask=mask)
        tl.store(maxima + at, largest, mask=mask)
        tl.store(indices + at, index, mask=mask)


@triton.jit(do_not_specialize=["N", "H", "W"])
def _convolve(
    src, dst, weights, bias, statistics, N, H, W, src_strides, dst_strides,
    BRANCHES: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr,
    SUMMED: tl.constexpr, SRC_FLAT: tl.constexpr, DST_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, MAX_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """dst (N, TOTAL, H, W) from src and the weights; SUMMED: every branch adds to all of dst.

    statistics: see partial_statistics; the tiles are those of pixels.
    """
    tile = tl.program_id(0) % TILES
    block = tl.program_id(0) // TILES
    size = _Size(N, H, W)
    pixels = _pixels_of(block, size, IMAGES, PIXELS)
    src, offsets = _locate(src, src_strides, pixels, SRC_FLAT, IMAGES, INDEX)
    dst, to = _locate(dst, dst_strides, pixels, DST_FLAT, IMAGES, INDEX)
    if SUMMED:
        ALL: tl.constexpr = _branch(BRANCHES, 0).channels
        acc = tl.zeros((IMAGES * PIXELS, ALL), tl.float32)
        for i in tl.static_range(len(BRANCHES)):
            # Each branch by itself, as its output would be: shorter sums round less.
            acc += _add_branch(
                tl.zeros((IMAGES * PIXELS, ALL), tl.float32), src, offsets, weights[i],
                tile * ALL, pixels, size, src_strides, BRANCHES, i, PRECISION, INDEX,
            )  # fmt: skip
        _write(
            acc, dst, to, dst_strides.c, None, None, block, tile * ALL, TOTAL, pixels, size,
            TOTAL, 0, ALL, IMAGES, PIXELS, INDEX,
        )  # fmt: skip
    else:
        for i in tl.static_range(len(BRANCHES)):
            own = tile - _branch(BRANCHES, i).first_tile
            if (own >= 0) & (own < _branch(BRANCHES, i).tiles):
                _convolve_branch(
                    src, offsets, dst, to, dst_strides.c, weights[i], bias, statistics, block, own,
                    pixels, size, src_strides,
                    BRANCHES, i, TOTAL, IMAGES, PIXELS, MAX_CHANNELS, PRECISION, INDEX,
                )  # fmt: skip


@triton.jit
def _convolve_branch(
    src, offsets, dst, to, dst_c, weight, bias, statistics, block, tile, pixels, size, src_strides,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, TOTAL: tl.constexpr, IMAGES: tl.constexpr,
    PIXELS: tl.constexpr, MAX_CHANNELS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of the result of one branch."""
    BRANCH: tl.constexpr = _branch(BRANCHES, WHICH)
    DESTINATIONS: tl.constexpr = BRANCH.destinations
    CHANNELS: tl.constexpr = BRANCH.channels
    tl.static_assert(CHANNELS <= MAX_CHANNELS)
    if BRANCH.dot:
        PER_GROUP: tl.constexpr = (DESTINATIONS + CHANNELS - 1) // CHANNELS
        group = tile // PER_GROUP
        first = group * DESTINATIONS + tile % PER_GROUP * CHANNELS
        end = (group + 1) * DESTINATIONS
    else:
        first = tile * CHANNELS
        end = DESTINATIONS * BRANCH.groups
    acc = _add_branch(
        tl.zeros((IMAGES * PIXELS, CHANNELS), tl.float32), src, offsets, weight, first,
        pixels, size, src_strides, BRANCHES, WHICH, PRECISION, INDEX,
    )  # fmt: skip
    _write(
        acc, dst, to, dst_c, bias, statistics, block, first, end, pixels, size,
        TOTAL, BRANCH.destination, CHANNELS, IMAGES, PIXELS, INDEX,
    )  # fmt: skip


@triton.jit
def _tap_products(grad, x, at, tap, pixels, size, strides, SIDE: tl.constexpr):
    """grad [pixels, channels] times x at a tap; ``at`` are offsets in x of the centre tap."""
    zero = tl.full((), 0, tl.int64)
    dy = tap // SIDE - SIDE // 2
    dx = tap % SIDE - SIDE // 2
    rows = tl.where(tap < SIDE * SIDE, size.H, 0)  # none for a tap beyond the last
    seen = _on_map(pixels.exist, pixels.h + dy, pixels.w + dx, _Size(size.N, rows, size.W))
    shift = (dy + zero) * strides.h + (dx + zero) * strides.w
    return grad * tl.load(x + shift + at, mask=seen[:, None], other=0.0).to(tl.float32)


@triton.jit
def _store_tap(
    partial, acc, tap, channel, SIDE: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    """Stores the sums over pixels of acc [pixels, channels]."""
    count = tl.where(tap < SIDE * SIDE, OUTPUTS, 0)
    to = partial + tap * (INPUTS * OUTPUTS) + channel
    tl.store(to, tl.sum(acc, axis=0), mask=channel < count)


@triton.jit
def _weight_tile(
    grad, x, partial, tile, begin, end, size, grad_strides, x_strides,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of one branch's weights, over the blocks of a slice."""
    BRANCH: tl.constexpr = _gradient(BRANCHES, WHICH)
    SIDE: tl.constexpr = BRANCH.side
    INPUTS: tl.constexpr = BRANCH.inputs
    OUTPUTS: tl.constexpr = BRANCH.outputs
    ALL: tl.constexpr = BRANCH.groups * OUTPUTS
    ROWS: tl.constexpr = BRANCH.rows
    COLUMNS: tl.constexpr = BRANCH.columns
    zero = tl.full((), 0, INDEX)
    partial += BRANCH.partial
    if BRANCH.dot:  # [output channels, taps x input channels] of one group
        COLUMN_TILES: tl.constexpr = (SIDE * SIDE * INPUTS + COLUMNS - 1) // COLUMNS
        ROW_TILES: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
        group = tile // (COLUMN_TILES * ROW_TILES) + zero
        output = tile // COLUMN_TILES % ROW_TILES * ROWS + tl.arange(0, ROWS)
        is_output = output < OUTPUTS
        column = tile % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
        is_tap = column < SIDE * SIDE * INPUTS
        dy = column // INPUTS // SIDE - SIDE // 2
        dx = column // INPUTS % SIDE - SIDE // 2
        of_row = (BRANCH.output + group * OUTPUTS + output) * grad_strides.c
        of_column = (BRANCH.input + group * INPUTS + column % INPUTS) * x_strides.c
        of_column += (dy + zero) * x_strides.h + (dx + zero) * x_strides.w
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in range(begin, end):
            pixels = _pixels_of(block, size, IMAGES, PIXELS)
            in_grad, from_grad = _locate(grad, grad_strides, pixels, GRAD_FLAT, IMAGES, INDEX)
            in_x, from_x = _locate(x, x_strides, pixels, X_FLAT, IMAGES, INDEX)
            at = in_grad + (of_row[:, None] + from_grad[None, :])
            a = tl.load(at, mask=is_output[:, None] & pixels.exist[None, :], other=0.0)
            if INPUTS % COLUMNS == 0:  # all columns belong to one tap
                above = tile % COLUMN_TILES * COLUMNS // INPUTS // SIDE - SIDE // 2
                left = tile % COLUMN_TILES * COLUMNS // INPUTS % SIDE - SIDE // 2
                seen = _on_map(pixels.exist, pixels.h + above, pixels.w + left, size)[:, None]
            else:
                at_h = pixels.h[:, None] + dy[None, :]
                at_w = pixels.w[:, None] + dx[None, :]
                seen = _on_map(pixels.exist[:, None], at_h, at_w, size)
            at = in_x + (of_column[None, :] + from_x[:, None])
            b = tl.load(at, mask=seen & is_tap[None, :], other=0.0)
            acc = _dot(a, b, acc, PRECISION)
        to = partial + column[None, :] * ALL + (group * OUTPUTS + output)[:, None]
        tl.store(to, acc, mask=is_output[:, None] & is_tap[None, :])
    else:  # TAPS taps of one input channel per group for output channels of any groups
        CHANNEL_TILES: tl.constexpr = (ALL + ROWS - 1) // ROWS
        channel = tile % CHANNEL_TILES * ROWS + tl.arange(0, ROWS)
        # A channel that does not exist reads the last one: its sums are not stored.
        real = tl.minimum(channel, ALL - 1)
        source = tile // CHANNEL_TILES % INPUTS
        tap = tile // (CHANNEL_TILES * INPUTS) * 4
        of_grad = (BRANCH.output + real + zero) * grad_strides.c
        of_x = (BRANCH.input + real // OUTPUTS * INPUTS + source + zero) * x_strides.c
        acc0 = tl.zeros((IMAGES * PIXELS, ROWS), tl.float32)
        acc1 = tl.zeros((IMAGES * PIXELS, ROWS), tl.float32)
        acc2 = tl.zeros((IMAGES * PIXELS, ROWS), tl.float32)
        acc3 = tl.zeros((IMAGES * PIXELS, ROWS), tl.float32)
        for block in range(begin, end):
            pixels = _pixels_of(block, size, IMAGES, PIXELS)
            in_grad, from_grad = _locate(grad, grad_strides, pixels, GRAD_FLAT, IMAGES, INDEX)
            in_x, from_x = _locate(x, x_strides, pixels, X_FLAT, IMAGES, INDEX)
            at = in_grad + (of_grad[None, :] + from_grad[:, None])
            g = tl.load(at, mask=pixels.exist[:, None], other=0.0).to(tl.float32)
            at = of_x[None, :] + from_x[:, None]
            acc0 += _tap_products(g, in_x, at, tap, pixels, size, x_strides, SIDE)
            acc1 += _tap_products(g, in_x, at, tap + 1, pixels, size, x_strides, SIDE)
            acc2 += _tap_products(g, in_x, at, tap + 2, pixels, size, x_strides, SIDE)
            acc3 += _tap_products(g, in_x, at, tap + 3, pixels, size, x_strides, SIDE)
        to = partial + source * ALL
        _store_tap(to, acc0, tap, channel, SIDE, INPUTS, ALL)
        _store_tap(to, acc1, tap + 1, channel, SIDE, INPUTS, ALL)
        _store_tap(to, acc2, tap + 2, channel, SIDE, INPUTS, ALL)
        _store_tap(to, acc3, tap + 3, channel, SIDE, INPUTS, ALL)


@triton.jit(do_not_specialize=["N", "H", "W", "blocks", "per_slice"])
def _weight_partials(
    grad, x, partial, N, H, W, blocks, per_slice, grad_strides, x_strides,
    BRANCHES: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr,
    GRAD_FLAT: tl.constexpr, X_FLAT: tl.constexpr,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """partial (slices, TOTAL): per branch (tap that can meet the map, input channel, output)."""
    tile = tl.program_id(0) % TILES
    part = tl.program_id(0) // TILES
    begin = part * per_slice
    end = tl.minimum(begin + per_slice, blocks)
    to = partial + part.to(tl.int64) * TOTAL
    size = _Size(N, H, W)
    for i in tl.static_range(len(BRANCHES)):
        own = tile - _gradient(BRANCHES, i).first_tile
        if (own >= 0) & (own < _gradient(BRANCHES, i).tiles):
            _weight_tile(
                grad, x, to, own, begin, end, size, grad_strides, x_strides,
                BRANCHES, i, GRAD_FLAT, X_FLAT, IMAGES, PIXELS, PRECISION, INDEX,
            )  # fmt: skip


@triton.jit
def _sum_branch(
    partial, grad, program, slices,
    BRANCHES: tl.constexpr, WHICH: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the gradient of one branch's weight."""
    BRANCH: tl.constexpr = _gradient(BRANCHES, WHICH)
    SIZE: tl.constexpr = BRANCH.size
    SIDE: tl.constexpr = BRANCH.side
    INPUTS: tl.constexpr = BRANCH.inputs
    OUTPUTS: tl.constexpr = BRANCH.outputs * BRANCH.groups
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
    at = partial + BRANCH.partial + (((y * SIDE + x) * INPUTS + source) * OUTPUTS + output)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(slices):
        total += tl.load(at + tl.cast(part, tl.int64) * TOTAL, mask=meets, other=0.0)
    to = grad + output.to(tl.int64) * BRANCH.by_output + source.to(tl.int64) * BRANCH.by_input
    to += row.to(tl.int64) * BRANCH.by_row + column.to(tl.int64) * BRANCH.by_column
    tl.store(to, total.to(grad.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["slices"])
def _weight_sums(
    partial, grads, slices, BRANCHES: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grads[i] (Cout, Cin / groups, k, k): the slices' sum, 0 for taps that never meet the map."""
    for i in tl.static_range(len(BRANCHES)):
        own = tl.program_id(0) - _gradient(BRANCHES, i).first_program
        if (own >= 0) & (own < _gradient(BRANCHES, i).programs):
            _sum_branch(partial, grads[i], own, slices, BRANCHES, i, TOTAL, BLOCK)


# --- plans ------------------------------------------------------------------------------------
#
# A plan is what a kernel knows at compile time. It depends on the weights, on how products are
# computed, and on H and W only where a kernel exceeds the map or the map does not fill a tile.


class Weights(NamedTuple):
    """Of all branches, as operators take them."""

    tensors: Sequence[Tensor]
    groups: Sequence[int]
    split: bool

    def branches(self) -> Branches:
        layouts = tuple([(w.shape, w.stride()) for w in self.tensors])
        return Branches(layouts, tuple(self.groups), self.split)


class Branches(NamedTuple):
    """What plans depend on of the weights."""

    weights: tuple[Layout, ...]
    groups: tuple[int, ...]
    split: bool

    @property
    def shapes(self) -> tuple:
        """What a class of problems knows of them: the layout hardly matters."""
        return tuple([shape for shape, _ in self.weights]), self.groups, self.split


class _Plan(NamedTuple):
    branches: tuple[tuple, ...]
    tiles: int
    images: int
    pixels: int
    maps: int  # tiles of pixels per image
    configuration: Configuration
    total: int  # channels of the result; elements of a slice of partial sums
    span: int  # largest offset in a weight, or in a slice of partial sums
    programs: int = 0  # of _weight_sums


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The largest offset in a tensor."""
    return sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])


def _power_of_two(n: int, low: int, high: int) -> int:
    return min(max(triton.next_power_of_2(n), low), high)


def _side(k: int, h: int, w: int) -> int:
    """Taps per axis that can meet the map: none is farther than max(H, W) - 1 from the centre."""
    return min(k, 2 * max(h, w) - 1)


def _block_of_pixels(pixels: int, h: int, w: int) -> tuple[int, int, int]:
    """Images and pixels of each in a block, and the number of blocks per image."""
    own = _power_of_two(h * w, 1, pixels)
    return pixels // own, own, -(-h * w // own)


def _taps(k: int, side: int, strides: Sequence[int], transposed: bool) -> tuple[int, int, int]:
    """Offset of the first tap, and from one to the next along a column and a row."""
    by_row, by_column = strides[2:]
    skip = (k - side) // 2
    if transposed:
        return (k - 1 - skip) * (by_row + by_column), -by_row, -by_column
    return skip * (by_row + by_column), by_row, by_column


@lru_cache(maxsize=1024)
def _plan_convolution(
    branches: Branches, transposed: bool, h: int, w: int, products: str, max_channels: int
) -> _Plan:
    """``transposed``: the data gradient. ``max_channels``: those of the configuration's tile."""
    weights, groups, split = branches
    configuration = CONVOLUTION[products, h * w >= LARGE_MAP]
    summed = transposed and not split
    # A tile of the sum over branches has to lie in one group of each branch that uses tl.dot; and
    # it keeps two accumulators.
    narrow = 16
    planned, first_tile, x_channel, y_channel = [], 0, 0, 0
    for (shape, stride), g in zip(weights, groups, strict=True):
        outputs, inputs, k, _ = shape
        outputs //= g
        sources, destinations = (outputs, inputs) if transposed else (inputs, outputs)
        dot = min(sources, destinations) >= MIN_DOT_CHANNELS
        if summed:
            dot = dot and (g == 1 or destinations % narrow == 0)
        if dot and not summed:
            channels = _power_of_two(destinations, 16, max_channels)
            tiles = g * -(-destinations // channels)
        else:
            channels = narrow
            tiles = -(-destinations * g // channels)
        side = _side(k, h, w)
        base, by_row, by_column = _taps(k, side, stride, transposed)
        branch = _Branch(
            side, sources, destinations, g,
            source=y_channel if transposed else x_channel,
            destination=x_channel if transposed else y_channel,
            dot=dot, channels=channels, depth=16 if sources % 32 else configuration.depth,
            first_tile=0 if summed else first_tile, tiles=tiles,
            base=base, by_group=outputs * stride[0],
            by_destination=stride[1] if transposed else stride[0],
            by_source=stride[0] if transposed else stride[1],
            by_row=by_row, by_column=by_column,
        )  # fmt: skip
        planned.append(branch)
        first_tile += tiles
        x_channel += inputs * g if split else 0
        y_channel += outputs * g
    x_channels = x_channel if split else weights[0][0][1] * groups[0]
    return _Plan(
        # Tuples proper: a kernel's compile-time values are compared and printed at every launch.
        tuple(map(tuple, planned)),
        planned[0].tiles if summed else first_tile,
        *_block_of_pixels(configuration.pixels, h, w),
        configuration,
        x_channels if transposed else y_channel,
        max(_span(*weight) for weight in weights),
    )


@lru_cache(maxsize=1024)
def _plan_gradient(
    branches: Branches, results: tuple[tuple[int, ...], ...], h: int, w: int, products: str
) -> _Plan:
    """``results`` are the strides of the gradients."""
    weights, groups, split = branches
    configuration = WEIGHT_GRADIENT[products]
    planned, first_tile, first_program, partial, x_channel, y_channel = [], 0, 0, 0, 0, 0
    for (shape, _), stride, g in zip(weights, results, groups, strict=True):
        outputs, inputs, k, _ = shape
        outputs //= g
        side = _side(k, h, w)
        dot = outputs >= (MIN_DOT_CHANNELS if products == "ieee" else MIN_DOT_CHANNELS_GRADIENT)
        if dot:
            rows = _power_of_two(outputs, 16, configuration.tiles[0].channels)
            columns = _power_of_two(side * side * inputs, 16, configuration.depth)
            tiles = g * -(-outputs // rows) * -(-side * side * inputs // columns)
        else:
            rows, columns = 16, TAPS
            tiles = -(-outputs * g // rows) * inputs * -(-side * side // TAPS)
        programs = -(-shape[0] * inputs * k * k // SUMS)
        branch = _Gradient(
            side, inputs, outputs, g, input=x_channel, output=y_channel,
            dot=dot, rows=rows, columns=columns, first_tile=first_tile, tiles=tiles,
            partial=partial, size=k, first_program=first_program, programs=programs,
            by_output=stride[0], by_input=stride[1], by_row=stride[2], by_column=stride[3],
        )  # fmt: skip
        planned.append(branch)
        first_tile += tiles
        first_program += programs
        partial += side * side * inputs * shape[0]
        x_channel += inputs * g if split else 0
        y_channel += shape[0]
    return _Plan(
        tuple(map(tuple, planned)),
        first_tile,
        *_block_of_pixels(configuration.pixels, h, w),
        configuration,
        partial,
        partial,
        first_program,
    )


def products_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How products are computed: see CONVOLUTION."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if allow_tf32 else "ieee"


def _index(plan: _Plan, *maps: Layout) -> tl.dtype:
    """The type of offsets from the first image of a tile on."""
    spans = [_span((plan.images, *shape[1:]), strides) for shape, strides in maps]
    return tl.int32 if max(plan.span, *spans) < 2**31 else tl.int64


def _is_flat(map: Layout) -> bool:
    """Whether the pixels of a channel are consecutive in memory."""
    (_, _, h, w), strides = map
    return (w == 1 or strides[3] == 1) and (h == 1 or strides[2] == w)


def _constants(plan: _Plan, products: str, *maps: Layout) -> dict[str, Any]:
    """Of both kernels, for the maps that they read or write."""
    return {
        "BRANCHES": plan.branches,
        "TILES": plan.tiles,
        "TOTAL": plan.total,
        "IMAGES": plan.images,
        "PIXELS": plan.pixels,
        "PRECISION": "tf32" if products == "tf32" else "ieee",
        "INDEX": _index(plan, *maps),
    }


# --- calls ------------------------------------------------------------------------------------
#
# A call is a plan for given maps: all that is known before there are pointers, cached by all that
# compiled code depends on. `reuse` is aligned() of the tensors.


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
    src: Layout, x: Layout, device: torch.device, dtype: torch.dtype, branches: Branches,
    transposed: bool, has_bias: bool, has_statistics: bool, products: str,
    deterministic: bool, reuse: bool,
) -> _Convolution:  # fmt: skip
    """``x`` is what the result looks like."""
    n, _, h, w = x[0]
    plans: dict[Tile, _Plan] = {}  # of the tiles that do differ
    seen = set()
    for tile in CONVOLUTION[products, h * w >= LARGE_MAP].tiles:
        plan = _plan_convolution(branches, transposed, h, w, products, tile.channels)
        if (plan.branches, tile.warps) not in seen:
            plans[tile] = plan
        seen.add((plan.branches, tile.warps))
    dst = map_like(x, plan.total)
    flat = {"SRC_FLAT": _is_flat(src), "DST_FLAT": _is_flat(dst)}

    def launch(tile: Tile) -> Launch:
        plan = plans[tile]
        summed = transposed and not branches.split
        own = {"SUMMED": summed, "MAX_CHANNELS": tile.channels, **flat}
        return Launch(
            _convolve,
            -(-n // plan.images) * plan.maps * plan.tiles,
            (n, h, w, Strides(*src[1]), Strides(*dst[1])),
            _constants(plan, products, src, dst) | own,
            tile.warps,
            plan.configuration.stages,
            reuse,
            tile.registers,
        )

    problem = (
        dtype, products, branches.shapes, transposed, has_statistics,
        *flat.values(), *powers_of_two(n, h * w),
    )  # fmt: skip
    fastest = fastest_tile(tuple(plans), launch, problem, device, deterministic)
    return _Convolution(dst, contiguous(n, 3, plan.total, plan.maps), fastest)


def _slices(plan: _Plan, blocks: int) -> tuple[int, int]:
    """Slices of the images, and blocks of pixels in each. Depends on shapes only."""
    wanted = min(-(-PROGRAMS // plan.tiles), max(blocks // 4, 1))
    per_slice = max(-(-blocks // wanted), 1)
    return -(-blocks // per_slice), per_slice


@lru_cache(maxsize=1024)
def _weight_gradient(
    grad_strides: tuple[int, ...], x: Layout, device: torch.device, dtype: torch.dtype,
    branches: Branches, products: str, deterministic: bool, reuse: bool,
) -> _WeightGradient:  # fmt: skip
    n, _, h, w = x[0]
    results = tuple([torch.empty_like(meta_like(weight)).stride() for weight in branches.weights])
    plan = _plan_gradient(branches, results, h, w, products)
    grad = (n, sum(shape[0] for shape, _ in branches.weights), h, w), grad_strides
    blocks = -(-n // plan.images) * plan.maps
    slices, per_slice = _slices(plan, blocks)
    flat = {"GRAD_FLAT": _is_flat(grad), "X_FLAT": _is_flat(x)}
    constants = _constants(plan, products, grad, x) | flat

    def launch(tile: Tile) -> Launch:
        return Launch(
            _weight_partials,
            plan.tiles * slices,
            (n, h, w, blocks, per_slice, Strides(*grad_strides), Strides(*x[1])),
            constants,
            tile.warps,
            plan.configuration.stages,
            reuse,
            tile.registers,
        )

    problem = dtype, products, branches.shapes, *flat.values(), *powers_of_two(n, h * w)
    fastest = fastest_tile(plan.configuration.tiles, launch, problem, device, deterministic)
    sums = Launch(_weight_sums, plan.programs, (slices,), constants | {"BLOCK": SUMS}, 4, 3, reuse)
    return _WeightGradient(contiguous(slices, plan.total), (fastest, sums))


# --- what operators call ----------------------------------------------------------------------


def forward(
    x: Tensor, weights: Weights, bias: Tensor | None, allow_tf32: bool, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and what global pooling needs to know of its result.

    x: (N, C, H, W) with any strides; weights and bias as in mfef_ext.reference. Returns
    y (N, Cout, H, W) in the layout of x and, with ``statistics``, a tensor (N, 3, Cout, T) in
    float32: per image, channel and each of T tiles of pixels the sum, the maximum, and the bits of
    the int32 index h * W + w of the first maximum. They are taken before y is rounded to its dtype.
    """
    source, dtype = (x.shape, x.stride()), x.dtype
    if bias is not None:
        bias = bias.contiguous()
    call = _convolution(
        source, source, x.device, dtype, weights.branches(),
        False, bias is not None, statistics, products_of(dtype, allow_tf32),
        torch.are_deterministic_algorithms_enabled(), aligned(dtype, x, bias, *weights.tensors),
    )  # fmt: skip
    return run(call, x, weights, bias, statistics)


def run(
    call: _Convolution, x: Tensor, weights: Weights, bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`forward` with the call that is made for its arguments, the bias being contiguous."""
    y = x.new_empty_strided(*call.result)
    per_tile = None
    if statistics:
        per_tile = x.new_empty_strided(*call.statistics, dtype=torch.float32)
    call.launch(x, y, tuple(weights.tensors), bias, per_tile)
    return y, per_tile


def data_gradient(grad: Tensor, x: Tensor, weights: Weights, allow_tf32: bool) -> Tensor:
    """The gradient with respect to x (N, C, H, W), in its layout; grad: (N, Cout, H, W)."""
    dtype = x.dtype
    call = _convolution(
        (grad.shape, grad.stride()), (x.shape, x.stride()), x.device, dtype, weights.branches(),
        True, False, False, products_of(dtype, allow_tf32),
        torch.are_deterministic_algorithms_enabled(), aligned(dtype, grad, *weights.tensors),
    )  # fmt: skip
    grad_x = x.new_empty_strided(*call.result)
    call.launch(grad, grad_x, tuple(weights.tensors), None, None)
    return grad_x


def weight_gradient(grad: Tensor, x: Tensor, weights: Weights, allow_tf32: bool) -> list[Tensor]:
    """The gradients of the weights, in their dtype and strides; grad: (N, Cout, H, W)."""
    dtype = x.dtype
    call = _weight_gradient(
        grad.stride(), (x.shape, x.stride()), x.device, dtype, weights.branches(),
        products_of(dtype, allow_tf32), torch.are_deterministic_algorithms_enabled(),
        aligned(dtype, grad, x, *weights.tensors),
    )  # fmt: skip
    results = [torch.empty_like(w) for w in weights.tensors]
    partial = x.new_empty_strided(*call.partial, dtype=torch.float32)
    partials, sums = call.launches
    partials(grad, x, partial)
    sums(partial, tuple(results))
    return results


def bias_gradient(grad: Tensor) -> Tensor:
    """The gradient of the bias (Cout,), summed in float32; grad: (N, Cout, H, W)."""
    return grad.sum((0, 2, 3))  # torch's sums have a fixed order, and accumulate in float32
