"""The students and what a method adds to them, as one ``nn.Module``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..names import shown, unknown
from ..ops.dispatch import allow_recompilations
from ..problem import check_bool, check_dense, check_int, check_number
from .method import METHODS, Batch, Method
from .stem import computing_once
from .stem import share_stem as share_stem_of
from .tap import forward_with_map, probe


@dataclass(frozen=True)
class Distilled:
    """What one forward pass gives.

    logits: (N, num_classes) by role: ``student0``, ``student1``, ..., ``ensemble`` (the mean of the
    students' logits) and what the method adds, such as ``fused``. What a student masks with -inf is
    masked in these too. losses: scalars by name, weights included, so that their sum is
    :attr:`loss`; empty without labels.
    """

    logits: dict[str, Tensor]
    losses: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The scalar to call ``backward()`` on; ValueError if no labels were given."""
        if not self.losses:
            raise ValueError(
                "no labels were given, so there is no loss; call distiller(x, labels, epoch)"
            )
        return torch.stack(list(self.losses.values())).sum()


def method_options(method: str) -> tuple[str, ...]:
    """The names of the options that ``method`` takes; ValueError if there is no such method."""
    if not isinstance(method, str) or method not in METHODS:
        name = method if isinstance(method, str) else shown(method)
        raise ValueError(unknown(f"method={shown(method)}", name, sorted(METHODS)))
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "input_shape")


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    """TypeError or ValueError unless labels are (N,) int64 or class probabilities (N, num_classes)
    for ``count`` images, and of values that can be where looking does not make a GPU wait."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a torch.Tensor, got {type(labels).__name__}; give "
            "torch.as_tensor(labels)"
        )
    check_dense("labels", labels)
    shares = labels.is_floating_point() and labels.dim() == 2
    if labels.dtype != torch.int64 and not shares:
        raise TypeError(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}; give class numbers "
            f"(N,), labels.long(), or class probabilities (N, {num_classes}), labels.float()"
        )
    if labels.shape != ((count, num_classes) if shares else (count,)):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {count} images; give one class number "
            f"for each, ({count},), or class probabilities ({count}, {num_classes}), floating"
        )
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    if shares:
        p = labels.detach().double()
        sums = p.sum(1)
        # What rounding to few bits makes of a sum.
        close = (sums - 1).abs() <= max(1e-3, torch.finfo(labels.dtype).eps)
        odd_rows = (~close | (p < 0).any(1)).nonzero()
        if len(odd_rows):
            row = int(odd_rows[0])
            raise ValueError(
                f"labels[{row}] are no class probabilities: from {float(p[row].min()):g} to "
                f"{float(p[row].max()):g}, with a sum of {float(sums[row]):g}; none may be "
                "below 0, and they must add up to 1"
            )
    else:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            odd = low if low < 0 else high
            raise ValueError(
                f"label {odd} is not from 0 to {num_classes - 1}; num_classes={num_classes} must "
                "be as many as there are classes, counted from 0"
            )


class OnlineDistiller(nn.Module):
    """Several students, a method and the method's own layers: one forward, one backward.

    Args:
        students: networks that map images to logits (N, num_classes); they may differ.
        method: a key of ``METHODS``: "mfef", "dml", "one", "okddip", "kdcl", "ffl" among students;
            "kd", "mimic", "ab" from a teacher; "ce" for each student alone.
        num_classes: width of the students' logits.
        tap: name of the layer (as in ``named_modules()``) whose output is the last map before
            global pooling, (N, C_i, H_i, W_i): one for all students or one each.
        input_shape: (C, H, W) of the images; one zero image is shown to the students, in eval
            mode, to learn the shapes of their maps. The method's layers get the first student's
            dtype and device.
        share_stem: gives all students, which must be of one architecture, the first one's layers
            before the last stage; what these make of a batch is computed once for all of them.
        options: the method's own, such as temperature, ramp_epochs or teacher;
            ``method_options(method)`` lists them, ``METHODS[method]`` documents them.

    Raises ValueError or TypeError naming the argument, its value and what would do.

    Example::

        distiller = OnlineDistiller([net_a, net_b], method="mfef", num_classes=10, tap="layer4")
        out = distiller(images, labels, epoch)
        out.loss.backward()
        torch.save(distiller.students[0].state_dict(), "student.pt")  # no part of MFEF in it
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        method: str = "mfef",
        *,
        num_classes: int,
        tap: str | Sequence[str] = "layer4",
        input_shape: tuple[int, int, int] = (3, 32, 32),
        share_stem: bool = False,
        **options: object,
    ) -> None:
        super().__init__()
        accepted = method_options(method)
        refused = sorted(set(options) - set(accepted))
        if refused:
            raise TypeError(
                f"{refused[0]}={shown(options[refused[0]])} is no option of method={method!r}; "
                + (f"it takes {', '.join(accepted)}" if accepted else "it takes none")
            )
        networks = isinstance(students, (list, tuple, nn.ModuleList))
        if not networks or not all(isinstance(student, nn.Module) for student in students):
            kinds = shown([type(s).__name__ for s in students]) if networks else ""
            what = kinds or type(students).__name__
            raise TypeError(f"students must be a list of networks, nn.Module, got {what}")
        if len(students) == 0:
            raise ValueError("students=[] is empty; give at least one network")
        if len({id(student) for student in students}) < len(students):
            raise ValueError(
                "students holds the same network twice, so it would learn from itself; "
                "build each student on its own (copy.deepcopy makes a second one)"
            )
        if not isinstance(tap, (str, list, tuple)):
            raise TypeError(
                f"tap={shown(tap)} must be the name of a layer, as in named_modules(), or a list "
                "of one for each student"
            )
        given = input_shape if isinstance(input_shape, (list, tuple)) else ()
        sizes = [check_int(f"input_shape[{i}]", size) for i, size in enumerate(given)]
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(
                f"input_shape={shown(input_shape)} must be (channels, height, width) of one image"
            )
        taps = (tap,) * len(students) if isinstance(tap, str) else tuple(tap)
        if len(taps) != len(students):
            raise ValueError(
                f"tap={shown(taps)} names {len(taps)} layers for {len(students)} students: "
                "give one name for all or one each"
            )
        teacher = options.get("teacher")
        if isinstance(teacher, nn.Module):
            frozen = set(map(id, teacher.parameters()))
            for i, student in enumerate(students):
                if not frozen.isdisjoint(map(id, student.parameters())):
                    raise ValueError(
                        f"teacher shares parameters with student {i}, which could not learn, since "
                        "a teacher is frozen; give copy.deepcopy(teacher)"
                    )
        self._stem = share_stem_of(students, taps) if check_bool("share_stem", share_stem) else []
        self._forward_with_map = forward_with_map
        self.students = nn.ModuleList(students)
        self.taps = taps
        self.num_classes = num_classes = check_int("num_classes", num_classes)
        shapes = [
            probe(student, taps[i], input_shape, num_classes, f"student {i}")
            for i, student in enumerate(students)
        ]
        if "input_shape" in inspect.signature(METHODS[method]).parameters:
            options["input_shape"] = input_shape
        self.method: Method = METHODS[method](shapes, num_classes, **options)
        of_first = (p for p in self.students[0].parameters() if p.is_floating_point())
        like = next(of_first, torch.empty(0))
        for name, layers in self.method.named_children():
            if name != "teacher":
                layers.to(like.device, like.dtype)

    def _images(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """What each student is to see."""
        images = [x] * len(self.students) if isinstance(x, Tensor) else x
        if not isinstance(images, (list, tuple)) or not all(isinstance(v, Tensor) for v in images):
            raise TypeError(
                "x must be a torch.Tensor (N, C, H, W), or a list of one such tensor for each "
                f"student, got {type(x).__name__}"
            )
        if len(images) != len(self.students):
            raise ValueError(
                f"x holds {len(images)} batches of images for {len(self.students)} students: "
                "give one tensor for all or one each"
            )
        for v in images:
            check_dense("x", v)
        shapes = [tuple(v.shape) for v in images]
        if any(len(s) != 4 or s[0] != shapes[0][0] for s in shapes):
            raise ValueError(
                f"x has shape {shapes if len(set(shapes)) > 1 else shapes[0]}; give (N, C, H, W), "
                "with the same images for every student"
            )
        return list(images)

    def _students(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The logits and the last map of each student."""
        with computing_once(self._stem):
            pairs = [
                self._forward_with_map(s, tap, x)
                for s, tap, x in zip(self.students, self.taps, images, strict=True)
            ]
        logits, maps = map(list, zip(*pairs, strict=True))
        for i, z in enumerate(logits):
            wanted = (len(images[i]), self.num_classes)
            if not isinstance(z, Tensor) or z.shape != wanted:
                what = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(
                    f"student {i} gives {what} and not logits {wanted}; wrap it in a module that "
                    "returns its logits alone"
                )
            check_dense(f"the logits of student {i}", z)
            if z.device != logits[0].device:
                raise ValueError(
                    f"student {i} gives logits on {z.device} and student 0 on {logits[0].device}; "
                    "move all to one device, since they learn from one another"
                )
        return logits, maps

    def compile_students(self) -> None:
        """From now on torch.compile makes the students' forward and backward passes."""
        # Students share this function's code: each is compiled for training and for evaluation, and
        # again for the last batch's size.
        allow_recompilations(4 * len(self.students))
        self._forward_with_map = torch.compile(forward_with_map)

    def forward(
        self, x: Tensor | Sequence[Tensor], labels: Tensor | None = None, epoch: float = 0.0
    ) -> Distilled:
        """x: (N, C, H, W), or one such tensor per student where each sees the images in an
        augmentation of its own. labels: class numbers (N,) int64, or class probabilities
        (N, num_classes) of any floating dtype, as mixup, CutMix and label smoothing make them, or
        None. epoch: epochs trained so far, with which the weight of the distillation grows: without
        it that stays at its beginning.

        Labels are constants. TypeError or ValueError for labels of another dtype, shape or device;
        on the CPU also for class numbers out of range, and for rows that are not 0 or more and add
        up to 1."""
        images, epoch = self._images(x), check_number("epoch", epoch)
        if labels is not None:
            check_labels(labels, len(images[0]), self.num_classes)
            labels = labels.detach()
        logits, maps = self._students(images)
        if labels is not None and labels.device != logits[0].device:
            device = str(logits[0].device)
            raise ValueError(
                f"labels are on {labels.device} but the students' logits on {device}; give "
                f"labels.to({device!r})"
            )
        added, losses = self.method(Batch(images, logits, maps, labels, epoch))
        roles = {f"student{i}": z for i, z in enumerate(logits)}
        roles["ensemble"] = torch.stack(logits).mean(0)
        return Distilled(roles | added, losses)

    def spatial_gates(self, x: Tensor) -> list[Tensor]:
        """One spatial gate (N, H_i, W_i) per student for the images x, or [] without gates."""
        return self.method.spatial_gates(self._students(self._images(x))[1])

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Pooled last maps by role, (N, C_i): ``student<i>``, and ``fused`` where there is one."""
        maps = self._students(self._images(x))[1]
        pooled = {f"student{i}": last_map.mean((2, 3)) for i, last_map in enumerate(maps)}
        fused = self.method.fused_features(maps)
        return pooled if fused is None else pooled | {"fused": fused}

    def parameter_groups(self) -> list[dict]:
        """Groups for one optimiser, named ``student0``, ..., and ``method`` for its own layers."""
        known: set[int] = set()  # a stem that is shared is the first student's
        groups = []
        for i, student in enumerate(self.students):
            params = [p for p in student.parameters() if id(p) not in known]
            known.update(map(id, params))
            groups.append({"name": f"student{i}", "params": params})
        own = [p for p in self.method.parameters() if p.requires_grad]  # not a frozen teacher's
        return groups + ([{"name": "method", "params": own}] if own else [])
