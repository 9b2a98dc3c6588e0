"""How results are judged: the rule of the project, in one place.

A result is compared with the reference in float64. Its largest error may be at most twice the error
of eager PyTorch in the same dtype, plus one unit in the last place of the largest magnitude.

The error of eager PyTorch is a random quantity, and for a few elements one evaluation is exact by
luck. It is therefore taken as the largest over evaluations that are the same operation in another
order (contiguous, channels_last, batch reversed, mirrored in H and W), of which all but the first
are made only where the bound without them is missed: more of them can only raise it. Both errors
are the largest, in units in the last place, over several draws of the case; and the tensors of a
case that have fewer than FEW elements other than zero, where one cancellation decides, are judged
together and by the median draw.
For float64, whose reference is float64 itself (but for its convolutions, see exact.py), eager's
error is that of float32 scaled by the ratio of the two units in the last place, and counts once
more for the reference.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mfef_ext
from mfef_ext import reference
from tests.exact import BITS, ExactConvolutions

FEW = 32
MIRRORS = ((2,), (3,), (2, 3))
ATTENTION = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "spatial_weight")


@dataclass
class BlockCase:
    """Arguments of one mfef_block, in float64; ``cast`` gives leaves of another dtype."""

    x: Tensor
    weights: list[Tensor]
    groups: list[int]
    attention: list[Tensor | None]
    split: bool
    grad: Tensor

    def cast(self, dtype: torch.dtype, device: str | None = None) -> BlockCase:
        def leaf(t: Tensor) -> Tensor:
            # clone() keeps strides, so that a slice stays a slice
            return t.detach().to(device, dtype).requires_grad_()

        return BlockCase(
            leaf(self.x),
            [leaf(w) for w in self.weights],
            self.groups,
            [None if p is None else leaf(p) for p in self.attention],
            self.split,
            self.grad.to(device, dtype),
        )

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weights, *(p for p in self.attention if p is not None)]

    def mirrored(self, dims: Sequence[int]) -> BlockCase:
        """The same block seen in a mirror; its output is the mirror image."""
        a = list(self.attention)
        assert a[4] is not None
        a[4] = a[4].flip(dims)
        return BlockCase(
            self.x.flip(dims),
            [w.flip(dims) for w in self.weights],
            self.groups,
            a,
            self.split,
            self.grad.flip(dims),
        )


def make_case(
    shape: Sequence[int],
    kernel_sizes: Sequence[int] = (3, 5, 7, 9),
    groups="auto",
    split: bool = True,
    reduction: int = 4,
    spatial_kernel_size: int = 7,
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> BlockCase:
    """A random block whose maxima are far from ties, so that rounding picks the same elements."""
    n, c, h, w = shape
    for attempt in range(50):
        torch.manual_seed(1000 * seed + attempt)
        block = mfef_ext.MFEFBlock(
            c,
            kernel_sizes=kernel_sizes,
            groups=groups,
            mode="split" if split else "pyramid",
            reduction=reduction,
            spatial_kernel_size=spatial_kernel_size,
            dtype=torch.float64,
        )
        a = block.attention
        attention = [getattr(a, name).detach() for name in ATTENTION]
        # Hidden units that are alive, so that every gradient is exercised.
        attention[0], attention[1] = attention[0] * 2, attention[1].abs()
        if not biases:
            attention[1] = attention[3] = None
        case = BlockCase(
            torch.randn(n, c, h, w, dtype=torch.float64),
            [p.detach() for p in block.conv.weights],
            list(block.conv.groups),
            attention,
            split,
            torch.randn(n, c, h, w, dtype=torch.float64),
        )
        # What the low-precision run gets is also what the reference gets.
        case = case.cast(dtype).cast(torch.float64)
        if far_from_ties(case):
            return case
    raise AssertionError("no draw without near ties")


def far_from_ties(case: BlockCase, gap: float = 3e-5) -> bool:
    """Whether no maximum (over pixels, over channels, or a ReLU's with 0) is nearly a tie."""
    if case.x.shape[0] == 0:
        return True
    with torch.no_grad():
        y = reference.multi_scale_conv2d(case.x, case.weights, case.groups, case.split)
        _, z, _ = reference.attention_gates(y, *case.attention)
        w, b = case.attention[0], case.attention[1]
        flat = y.flatten(2)
        hidden = [torch.nn.functional.linear(v, w, b) for v in (flat.mean(2), flat.max(2).values)]
        ok = all(bool(h.abs().min() > gap) for h in hidden)
        for t, dim in ((flat, 2), (z, 1)):
            if t.shape[dim] > 1:
                top = t.topk(2, dim=dim).values.unbind(dim)
                ok = ok and bool((top[0] - top[1]).min() > gap * t.abs().max())
    return ok


def run_block(case: BlockCase, f: Callable, layout=torch.contiguous_format, **kw) -> list[Tensor]:
    """[output, gradients of all leaves] of ``f`` on a case whose tensors are leaves."""
    for leaf in case.leaves():
        leaf.grad = None
    x = case.x.contiguous(memory_format=layout)
    out = f(x, case.weights, case.groups, *case.attention, split=case.split, **kw)
    grads = torch.autograd.grad(out, case.leaves(), case.grad)
    return [out.detach(), *grads]


class Eager:
    """The errors of eager PyTorch, tensor by tensor: the largest over the evaluations so far."""

    def __init__(self, evaluations: Iterable[list[float]]) -> None:
        self._evaluations = iter(evaluations)
        self.errors = next(self._evaluations)

    def exhaust(self) -> None:
        """Makes the evaluations that are left."""
        for more in self._evaluations:
            self.errors = [max(pair) for pair in zip(self.errors, more, strict=True)]


def eager_errors(case: BlockCase, dtype: torch.dtype, wanted: list[Tensor]) -> Eager:
    """The error of eager PyTorch, as the docstring of this file has it."""
    if dtype == torch.float64:
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        rounded = case.cast(torch.float32).cast(torch.float64)
        exact = run_block(rounded, reference.mfef_block)
        runs = evaluations(rounded.cast(torch.float64), torch.float32)
        return Eager([e * scale for e in errors_of(got, exact)] for got in runs)
    return Eager(errors_of(got, wanted) for got in evaluations(case, dtype))


def errors_of(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """The largest error of each tensor."""
    return [largest(g.double() - w) for g, w in zip(got, wanted, strict=True)]


def evaluations(case: BlockCase, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """The results of eager PyTorch, by one order of the same operation after another."""
    low = case.cast(dtype)
    yield run_block(low, reference.mfef_block)
    yield run_block(low, reference.mfef_block, torch.channels_last)
    back = BlockCase(
        low.x.flip(0), low.weights, low.groups, low.attention, low.split, low.grad.flip(0)
    ).cast(dtype)
    out, grad_x, *rest = run_block(back, reference.mfef_block)
    yield [out.flip(0), grad_x.flip(0), *rest]
    for dims in MIRRORS:
        out, grad_x, *rest = run_block(low.mirrored(dims).cast(dtype), reference.mfef_block)
        kernels = len(low.weights)
        weights = [g.flip(dims) for g in rest[:kernels]]
        others = [*rest[kernels:-1], rest[-1].flip(dims)]
        yield [out.flip(dims), grad_x.flip(dims), *weights, *others]


def largest(t: Tensor) -> float:
    """The largest magnitude; infinite for NaN, 0 for an empty tensor."""
    if t.numel() == 0:
        return 0.0
    return float(t.detach().abs().nan_to_num(nan=float("inf")).max())


# What the last draws should be, and eager's errors: the same draw is tried in several layouts.
_expected: dict[str, tuple[BlockCase, list[Tensor], Eager]] = {}
MAX_EXPECTED = 12


def expected_of(
    dtype: torch.dtype, seed: int, **arguments
) -> tuple[BlockCase, list[Tensor], Eager]:
    """A draw, its results in the reference, and the errors of eager PyTorch."""
    key = f"{dtype} {seed} {sorted(arguments.items())}"
    if key not in _expected:
        case = make_case(**arguments, dtype=dtype, seed=seed)
        with specification(dtype):
            wanted = run_block(case.cast(torch.float64), reference.mfef_block)
        if len(_expected) >= MAX_EXPECTED:
            del _expected[next(iter(_expected))]
        _expected[key] = case, wanted, eager_errors(case, dtype, wanted)
    return _expected[key]


def check_block(
    dtype: torch.dtype,
    layout=torch.contiguous_format,
    backend: str = "cpu",
    device: str = "cpu",
    under: Mapping[str, Callable[[], contextlib.AbstractContextManager]] | None = None,
    **arguments,
) -> None:
    """Asserts that forward and all gradients of a backend obey the rule.

    The backend runs on the device, eager PyTorch and the reference on the CPU; it runs once in each
    of the contexts ``under`` names. Other arguments are those of ``make_case``. Errors are relative
    to the largest magnitude of their tensor, and the largest over the draws counts, on both sides.
    """
    seed = arguments.pop("seed", 0)
    smallest = min(t.numel() for t in make_case(**arguments).leaves())
    # A draw takes twenty times as long where an emulated GPU runs it.
    most = 6 if backend == "cuda" and device == "cpu" else 12
    draws = min(max(48 // smallest, 3), most)
    contexts = under or {"": contextlib.nullcontext}
    errors = {name: Errors(dtype, name) for name in contexts}
    for draw in range(draws):
        case, wanted, eager = expected_of(dtype, seed + 101 * draw, **arguments)
        names = ["out", "x", *(f"weights[{i}]" for i in range(len(case.weights)))]
        names += [n for n, p in zip(ATTENTION, case.attention, strict=True) if p is not None]
        for name, context in contexts.items():
            ours = case.cast(dtype, device)
            with context():
                got = run_block(ours, mfef_ext.functional.mfef_block, layout, backend=backend)
            assert all(g.device == ours.x.device for g in got)
            errors[name].add(names, got, wanted, eager)
    for of_one in errors.values():
        of_one.check()


def specification(dtype: torch.dtype, bits: int = BITS) -> contextlib.AbstractContextManager:
    """In which the reference computes, in float64, what results of a dtype are compared with; of
    float64 itself to so many bits below the largest magnitude."""
    return ExactConvolutions(bits) if dtype == torch.float64 else contextlib.nullcontext()


class Errors:
    """The rule applied to tensors by name over several draws: the largest error of each counts, on
    both sides; of tensors of few elements, the median over the draws of the largest."""

    def __init__(self, dtype: torch.dtype, where: str = "") -> None:
        self.dtype = dtype
        self.where = where  # for the message
        # Of each draw: names, our errors and eager's, the unit of both.
        self.draws: list[tuple[list[str], list[float], Eager, list[float]]] = []

    def add(
        self,
        names: Sequence[str],
        got: Sequence[Tensor],
        wanted: Sequence[Tensor],
        eager: Eager | list[float],
    ) -> None:
        """One draw: our tensors, the float64 ones, and eager's errors."""
        for name, g, w in zip(names, got, wanted, strict=True):
            assert g.dtype == self.dtype and g.shape == w.shape, name
        few = "few elements"
        groups = [
            few if torch.count_nonzero(w) < FEW else n for n, w in zip(names, wanted, strict=True)
        ]
        ours = errors_of([g.to(w.device) for g, w in zip(got, wanted, strict=True)], wanted)
        units = [unit_in_the_last_place(w, self.dtype) for w in wanted]
        self.draws.append(
            (groups, ours, eager if isinstance(eager, Eager) else Eager([eager]), units)
        )

    def check(self) -> None:
        if self._excess():
            for _, _, eager, _ in self.draws:
                eager.exhaust()
        excess = self._excess()
        assert not excess, excess

    def _excess(self) -> str:
        """What misses its bound, by eager's errors so far; "" if nothing does."""
        pairs: dict[str, list[tuple[float, float]]] = {}  # (ours, eager's) of each draw
        for names, ours, eager, units in self.draws:
            of_draw: dict[str, tuple[float, float]] = {}
            for name, error, e, unit in zip(names, ours, eager.errors, units, strict=True):
                before = of_draw.get(name, (0.0, 0.0))
                of_draw[name] = max(before[0], error / unit), max(before[1], e / unit)
            for name, pair in of_draw.items():
                pairs.setdefault(name, []).append(pair)
        for name, of_all in pairs.items():
            middle = statistics.median if name == "few elements" else max
            error, eager_error = (middle(column) for column in zip(*of_all, strict=True))
            bound = factor(self.dtype) * eager_error + 1
            if not error <= bound:
                where = f"{self.where}, {name}" if self.where else name
                return f"{where}: error of {error:.3g} units is above {bound:.3g}"
        return ""


OWN = 128  # roundings of an element's own products


def check_own_products(
    names: Sequence[str], got: Sequence[Tensor], wanted: Sequence[Tensor], own: Sequence[Tensor]
) -> None:
    """Asserts that every element is right to OWN roundings, in the dtype that is computed in, of
    ``own``, the sum of the magnitudes of the products that it is the sum of, and to its own
    rounding."""
    for name, g, w, o in zip(names, got, wanted, own, strict=True):
        compute = torch.finfo(torch.float64 if g.dtype == torch.float64 else torch.float32)
        bound = OWN * compute.eps * o + torch.finfo(g.dtype).eps * w.abs()
        # What is too small for the dtype is 0, or as near as its smallest numbers lie.
        bound += torch.where(o > 0, compute.smallest_normal, 0.0)
        excess = (g.double() - w).abs() - bound
        at = tuple(
            int(i) for i in torch.unravel_index(excess.nan_to_num(nan=1e300).argmax(), w.shape)
        )
        assert excess[at] <= 0, (
            f"{name}{list(at)} is {float(g[at])}, should be {float(w[at])}; "
            f"the magnitudes of its products add up to {float(o[at]):.3g}"
        )


def unit_in_the_last_place(t: Tensor, dtype: torch.dtype) -> float:
    """Of the largest magnitude of ``t``, in ``dtype``."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest(t) or 1.0))


def factor(dtype: torch.dtype) -> float:
    """Twice eager's error; float64 is compared with itself, whose own error comes on top."""
    return 3.0 if dtype == torch.float64 else 2.0
