"""The distillation loss from logits: all students and targets of a step in one launch each way.

Loss i is ``T^2 mean_n sum_j p_j (log p_j - log q_j)`` with ``p = softmax(target_i / T)`` and
``q = softmax(student_i / T)`` over the classes j of image n, in float32.

Forward: a program owns one loss and a slice of its images, and walks through it in tiles of
[images, classes]. Up to ``MAX_TILES`` tiles are one slice, and its sum is the loss; beyond that
the slices' sums are added by one more launch. Backward: a program owns one loss and one tile, and
writes ``g T / N (q - p)`` for the student and ``g T / N p (log p - log q - loss_n)`` for a target
that is not detached; it computes the logarithms again, so that nothing is saved but the logits.

Bytes, for S losses of N images and C classes: 2 S N C logits read each way, S N C written backward
(2 S N C with targets). Rows of more than 128 classes are read twice, backward with targets three
times; after the first time they are in a cache. Operations: about 20 S N C each way, two
exponentials per logit among them. Both are little beside the launch itself.

Reductions have a fixed order: along a row, over the rows of a tile at the end, tile after tile,
slice after slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import problem
from ...ops import dispatch
from ...ops.autograd import Operator
from ...ops.transforms import register_vmap
from . import DTYPES, device_of

# --- configurations ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A tile: this many images by this many classes; ``whole`` if a row fits into one tile."""

    images: int
    classes: int
    whole: bool
    num_warps: int = 4
    num_stages: int = 1  # no loop here is worth a pipeline


# Sizes of the usual data sets: 10 classes, 100, and more. A thread holds 8 or 16 logits of each
# network. Chosen by counting registers; nothing has been measured on hardware yet.
CONFIGURATIONS = (
    Configuration(images=64, classes=16, whole=True),
    Configuration(images=8, classes=128, whole=True),
    Configuration(images=1, classes=1024, whole=False),
)
# A tile is one trip to memory and back, a second launch about as long as several of them.
MAX_TILES = 16
MAX_SLICES = 128


def configuration(classes: int) -> Configuration:
    """The first configuration whose tile holds a row, else the one that loops over classes."""
    return next(c for c in CONFIGURATIONS if classes <= c.classes or not c.whole)


def slices(images: int, tile: int) -> tuple[int, int]:
    """(slices of one loss, images in each but the last), for tiles of ``tile`` images."""
    tiles = triton.cdiv(images, tile)
    per_slice = tiles if tiles <= MAX_TILES else triton.cdiv(tiles, MAX_SLICES)
    return triton.cdiv(tiles, per_slice), per_slice * tile


# --- kernels ----------------------------------------------------------------------------------
#
# Logits are a tuple of TENSORS pointers, one per loss, or one pointer to all of them, `step`
# elements apart. `rows` are the strides of their images; those of classes are 1.


@triton.jit
def _pick(tensors, step, which, TENSORS: tl.constexpr):
    """The pointer to the logits of loss ``which``."""
    pointer = tensors[0]
    if TENSORS == 1:
        pointer += which.to(tl.int64) * step
    for i in tl.static_range(1, TENSORS):
        pointer = tl.where(which == i, tensors[i], pointer)
    return pointer


@triton.jit
def _pick_stride(rows, which, TENSORS: tl.constexpr):
    stride = rows[0]
    for i in tl.static_range(1, TENSORS):
        stride = tl.where(which == i, rows[i], stride)
    return stride


@triton.jit
def _load(row, start, classes, CLASSES: tl.constexpr):
    """Logits of the classes from ``start`` on, float32; -inf where there is no class.

    row: [images] pointers to the images' first logits.
    """
    columns = start + tl.arange(0, CLASSES)
    pointers = row[:, None] + columns[None, :]
    return tl.load(pointers, mask=(columns < classes)[None, :], other=-float("inf")).to(tl.float32)


@triton.jit
def _log_softmax(logits, largest, log_sum, inverse_temperature):
    """Scaled after the subtraction, which is exact for logits that are close to each other."""
    return (logits - largest[:, None]) * inverse_temperature - log_sum[:, None]


@triton.jit
def _log_sum_of(logits, inverse_temperature):
    """(largest logit, logarithm of the sum of exponentials relative to it) of rows in a tile."""
    largest = tl.max(logits, 1)
    total = tl.sum(tl.exp((logits - largest[:, None]) * inverse_temperature), 1)
    return largest, tl.log(total)


@triton.jit
def _log_sum_along(row, classes, inverse_temperature, IMAGES: tl.constexpr, CLASSES: tl.constexpr):
    """The same for rows of several tiles, in one pass: the sum is rescaled as the largest grows."""
    largest = tl.full([IMAGES], -float("inf"), tl.float32)
    total = tl.zeros([IMAGES], tl.float32)
    for start in range(0, classes, CLASSES):
        logits = _load(row, start, classes, CLASSES)
        larger = tl.maximum(largest, tl.max(logits, 1))
        # As long as all logits are -inf there is nothing to be relative to.
        origin = tl.where(larger == -float("inf"), 0.0, larger)
        total *= tl.exp((largest - origin) * inverse_temperature)
        total += tl.sum(tl.exp((logits - origin[:, None]) * inverse_temperature), 1)
        largest = larger
    return largest, tl.log(total)


@triton.jit
def _log_ratio(p, log_p, log_q):
    """``log p_j - log q_j``, and 0 where p_j is 0: at masked classes, and where there is none."""
    return tl.where(p == 0, 0.0, log_p - log_q)


@triton.jit
def _divergence(log_p, log_q):
    """``sum_j p_j (log p_j - log q_j)`` along the rows of a tile."""
    p = tl.exp(log_p)
    return tl.sum(p * _log_ratio(p, log_p, log_q), 1)


@triton.jit
def _divergence_along(
    student, target, s_largest, s_log_sum, t_largest, t_log_sum,
    classes, inverse_temperature, IMAGES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The same for rows of several tiles."""
    divergence = tl.zeros([IMAGES], tl.float32)
    for start in range(0, classes, CLASSES):
        logits = _load(student, start, classes, CLASSES)
        log_q = _log_softmax(logits, s_largest, s_log_sum, inverse_temperature)
        logits = _load(target, start, classes, CLASSES)
        log_p = _log_softmax(logits, t_largest, t_log_sum, inverse_temperature)
        divergence += _divergence(log_p, log_q)
    return divergence


@triton.jit(
    do_not_specialize=["student_step", "target_step", "images", "slice_images"],
)
def forward_kernel(
    students, student_rows, student_step,
    targets, target_rows, target_step,
    partial,  # (S, slices), float32
    images, classes, slice_images,
    inverse_temperature,
    scale,  # T^2 / N
    STUDENTS: tl.constexpr, TARGETS: tl.constexpr,
    IMAGES: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    first = tl.program_id(0) * slice_images
    student = _pick(students, student_step, which, STUDENTS)
    target = _pick(targets, target_step, which, TARGETS)
    student_stride = _pick_stride(student_rows, which, STUDENTS)
    target_stride = _pick_stride(target_rows, which, TARGETS)
    total = tl.zeros([IMAGES], tl.float32)
    for tile in range(first, tl.minimum(first + slice_images, images), IMAGES):
        image = tile + tl.arange(0, IMAGES)
        # Beyond the last image its row is read again, and left out of the sum.
        row = tl.minimum(image, images - 1).to(tl.int64)
        s, t = student + row * student_stride, target + row * target_stride
        if WHOLE:
            logits = _load(s, 0, classes, CLASSES)
            largest, log_sum = _log_sum_of(logits, inverse_temperature)
            log_q = _log_softmax(logits, largest, log_sum, inverse_temperature)
            logits = _load(t, 0, classes, CLASSES)
            largest, log_sum = _log_sum_of(logits, inverse_temperature)
            log_p = _log_softmax(logits, largest, log_sum, inverse_temperature)
            divergence = _divergence(log_p, log_q)
        else:
            s_max, s_log = _log_sum_along(s, classes, inverse_temperature, IMAGES, CLASSES)
            t_max, t_log = _log_sum_along(t, classes, inverse_temperature, IMAGES, CLASSES)
            divergence = _divergence_along(
                s, t, s_max, s_log, t_max, t_log, classes, inverse_temperature, IMAGES, CLASSES
            )
        total += tl.where(image < images, divergence, 0.0)
    sums = partial + which * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums, tl.sum(total) * scale)


@triton.jit
def _store(row, inside, gradient, start, classes, CLASSES: tl.constexpr):
    columns = start + tl.arange(0, CLASSES)
    mask = inside[:, None] & (columns < classes)[None, :]
    # Rounds to the logits' dtype.
    tl.store(row[:, None] + columns[None, :], gradient.to(row.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "student_step", "target_step", "grad_step", "images", "need_students", "need_targets",
    ],
)  # fmt: skip
def backward_kernel(
    students, student_rows, student_step,
    targets, target_rows, target_step,
    grad, grad_step,  # of the losses, float32
    student_grads, target_grads,  # contiguous, as many as there are students and targets
    need_students, need_targets,  # else that side's pointers are any others
    images, classes,
    inverse_temperature,
    scale,  # T / N
    STUDENTS: tl.constexpr, TARGETS: tl.constexpr,
    IMAGES: tl.constexpr, CLASSES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    inside = image < images
    row = tl.minimum(image, images - 1).to(tl.int64)
    s = _pick(students, student_step, which, STUDENTS)
    s += row * _pick_stride(student_rows, which, STUDENTS)
    t = _pick(targets, target_step, which, TARGETS)
    t += row * _pick_stride(target_rows, which, TARGETS)
    step = images.to(tl.int64) * classes
    ds = _pick(student_grads, step, which, STUDENTS) + row * classes
    dt = _pick(target_grads, step, which, TARGETS) + row * classes
    g = tl.load(grad + which * grad_step) * scale
    if WHOLE:
        logits = _load(s, 0, classes, CLASSES)
        largest, log_sum = _log_sum_of(logits, inverse_temperature)
        log_q = _log_softmax(logits, largest, log_sum, inverse_temperature)
        logits = _load(t, 0, classes, CLASSES)
        largest, log_sum = _log_sum_of(logits, inverse_temperature)
        log_p = _log_softmax(logits, largest, log_sum, inverse_temperature)
        p = tl.exp(log_p)
        if need_students:
            _store(ds, inside, g * (tl.exp(log_q) - p), 0, classes, CLASSES)
        if need_targets:
            gradient = g * p * (_log_ratio(p, log_p, log_q) - _divergence(log_p, log_q)[:, None])
            _store(dt, inside, gradient, 0, classes, CLASSES)
    else:
        s_max, s_log = _log_sum_along(s, classes, inverse_temperature, IMAGES, CLASSES)
        t_max, t_log = _log_sum_along(t, classes, inverse_temperature, IMAGES, CLASSES)
        divergence = tl.zeros([IMAGES], tl.float32)
        if need_targets:
            divergence += _divergence_along(
                s, t, s_max, s_log, t_max, t_log, classes, inverse_temperature, IMAGES, CLASSES
            )
        for start in range(0, classes, CLASSES):
            logits = _load(s, start, classes, CLASSES)
            log_q = _log_softmax(logits, s_max, s_log, inverse_temperature)
            logits = _load(t, start, classes, CLASSES)
            log_p = _log_softmax(logits, t_max, t_log, inverse_temperature)
            p = tl.exp(log_p)
            if need_students:
                _store(ds, inside, g * (tl.exp(log_q) - p), start, classes, CLASSES)
            if need_targets:
                gradient = g * p * (_log_ratio(p, log_p, log_q) - divergence[:, None])
                _store(dt, inside, gradient, start, classes, CLASSES)


# --- operators --------------------------------------------------------------------------------
#
# `students` and `targets` are S tensors (N, classes), or one tensor (S, N, classes), or for a
# single loss one (N, classes). All on a side have one dtype.

_lib = torch.library.Library("mfef_triton", "FRAGMENT")
_lib.define(
    "kd_loss(Tensor[] students, Tensor[] targets, float temperature, bool detach_target) -> Tensor"
)
_lib.define(
    "kd_loss_backward(Tensor grad, Tensor[] students, Tensor[] targets, float temperature, "
    "bool need_students, bool need_targets) -> (Tensor[], Tensor[])"
)


def _count(tensors: Sequence[Tensor]) -> int:
    """S."""
    return tensors[0].shape[0] if tensors[0].dim() == 3 else len(tensors)


def _side(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """(tensors, strides of their images, elements between losses) as the kernels take them."""
    # A row of logits that is not in one piece is rare, and small.
    rows = tuple([x if x.stride(-1) == 1 else x.contiguous() for x in tensors])
    step = rows[0].stride(0) if rows[0].dim() == 3 else 0
    return rows, tuple([x.stride(-2) for x in rows]), step


def _kd_loss(
    students: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, detach_target: bool
) -> Tensor:
    like, count = students[0], _count(students)
    images, classes = like.shape[-2:]
    if images == 0:
        return like.new_zeros((count,), dtype=torch.float32)
    c = configuration(classes)
    in_slices, slice_images = slices(images, c.images)
    partial = like.new_empty((count, in_slices), dtype=torch.float32)
    with device_of(like):
        forward_kernel[in_slices, count](
            *_side(students), *_side(targets), partial, images, classes, slice_images,
            1.0 / temperature, temperature * temperature / images,
            STUDENTS=len(students), TARGETS=len(targets),
            IMAGES=c.images, CLASSES=c.classes, WHOLE=c.whole,
            num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        return partial.view(count) if in_slices == 1 else partial.sum(1)


def _kd_loss_backward(
    grad: Tensor,
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    temperature: float,
    need_students: bool,
    need_targets: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    like = students[0]
    images, classes = like.shape[-2:]
    student_grads = [x.new_empty(x.shape) for x in students] if need_students else []
    target_grads = [x.new_empty(x.shape) for x in targets] if need_targets else []
    if images == 0 or not (need_students or need_targets):
        return student_grads, target_grads
    c = configuration(classes)
    with device_of(like):
        backward_kernel[triton.cdiv(images, c.images), _count(students)](
            *_side(students), *_side(targets), grad, grad.stride(0),
            # A kernel that does not need them has no use for these pointers.
            tuple(student_grads or students), tuple(target_grads or targets),
            int(need_students), int(need_targets),
            images, classes, 1.0 / temperature, temperature / images,
            STUDENTS=len(students), TARGETS=len(targets),
            IMAGES=c.images, CLASSES=c.classes, WHOLE=c.whole,
            num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return student_grads, target_grads


for _key in ("CUDA", "CPU"):
    _lib.impl("kd_loss", _kd_loss, _key)
    _lib.impl("kd_loss_backward", _kd_loss_backward, _key)


@torch.library.register_fake("mfef_triton::kd_loss")
def _(students, targets, temperature, detach_target):
    return students[0].new_empty((_count(students),), dtype=torch.float32)


@torch.library.register_fake("mfef_triton::kd_loss_backward")
def _(grad, students, targets, temperature, need_students, need_targets):
    return (
        [x.new_empty(x.shape) for x in students] if need_students else [],
        [x.new_empty(x.shape) for x in targets] if need_targets else [],
    )


class _KdLoss(Operator):
    """A row are the students and then the targets; options are (number of students, temperature,
    detach_target)."""

    name = "kd_loss"

    def row(self, students, targets, temperature, detach_target):
        return (*students, *targets), (len(students), temperature, detach_target), ()

    def arguments(self, row, options, *flags):
        count, temperature, detach_target = options
        return row[:count], row[count:], temperature, detach_target

    def gradients(self, grad, saved, options, needs):
        count, temperature, detach_target = options
        students, targets = saved[:count], saved[count:]
        need_students = any(needs[:count])
        need_targets = not detach_target and any(needs[count:])
        student_grads, target_grads = self.call_backward(
            (grad, *saved),
            grad, students, targets, temperature, need_students, need_targets,
        )  # fmt: skip
        grads = [
            *(student_grads if need_students else [None] * len(students)),
            *(target_grads if need_targets else [None] * len(targets)),
        ]
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    def has_gradient(self, row, options):
        count, _, detach_target = options
        return not detach_target or dispatch.records(row[:count])


_operator = _KdLoss("mfef_triton")
_operator.register_autograd(_lib)
register_vmap(_lib, _operator)


# --- what is called ---------------------------------------------------------------------------


def _one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in one dtype that the kernels read: their own, else float32."""
    dtype = tensors[0].dtype
    if dtype in DTYPES and all(x.dtype == dtype for x in tensors):
        return tensors
    return [x.float() for x in tensors]


def _losses(
    students: list[Tensor], targets: list[Tensor], temperature: float, detach_target: bool
) -> Tensor:
    students, targets = _one_dtype(students), _one_dtype(targets)
    return _operator((*students, *targets), (len(students), temperature, detach_target))


def kd_loss(
    student: Tensor, target: Tensor, temperature: float = 3.0, *, detach_target: bool = True
) -> Tensor:
    """:func:`mfef_ext.functional.kd_loss` without checks. student, target: (N, classes)."""
    return _losses([student], [target], temperature, detach_target).view(())


def kd_losses(
    students: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    temperature: float = 3.0,
    *,
    detach_target: bool = True,
) -> Tensor:
    """Several losses in one launch forward and one backward.

    Args:
        students, targets: logits, each side either S tensors (N, classes), of which one may stand
            there several times, or one tensor (S, N, classes). None of them is copied.
        temperature, detach_target: as in :func:`mfef_ext.functional.kd_loss`.

    Returns (S,), float32: the losses, each the mean over its batch; 0 for an empty batch.

    Raises TypeError and ValueError as :func:`mfef_ext.functional.kd_loss` does; ValueError if there
    are not as many targets as students.
    """
    sides: list[list[Tensor]] = []
    for name, side in (("students", students), ("targets", targets)):
        if isinstance(side, Tensor) and side.dim() != 3:
            raise ValueError(
                f"{name} must be 3-D (S, N, classes) or a sequence of 2-D tensors, "
                f"got shape {tuple(side.shape)}"
            )
        if len(side) == 0:
            raise ValueError(f"{name} is empty: at least one loss is needed")
        sides.append([side] if isinstance(side, Tensor) else list(side))
    if len(targets) != len(students):
        raise ValueError(
            f"students has {len(students)} entries but targets has {len(targets)}: give one target "
            "per student, the same one several times if they share it"
        )
    temperature = problem.check_temperature(temperature)
    for student, target in zip(students, targets, strict=True):
        asked = problem.describe_kd_loss(student, target)
        if asked.dtype not in DTYPES:
            raise TypeError(
                f"students has dtype {asked.dtype}; Triton's kernels take float32, bfloat16 and "
                'float16; use functional.kd_loss with backend="reference"'
            )
        if student.shape != students[0].shape or student.device != students[0].device:
            raise ValueError(
                f"students has tensors {tuple(students[0].shape)} on {students[0].device} and "
                f"{tuple(student.shape)} on {student.device}; one launch takes one shape and device"
            )
    return _losses(sides[0], sides[1], temperature, detach_target)
