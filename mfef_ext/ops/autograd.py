"""Derivatives: how operators are called, recorded and differentiated.

An :class:`Operator` puts a kernel on the Autograd key, as torch.library.register_autograd would,
but with all tensors of a call in one row: where an argument is a Tensor[], register_autograd walks
every argument and result as a tree, which takes longer than the forward of one small image.

Only the first result has a gradient. The others leave a Function's forward by way of a list, so
that autograd need not wrap each of them to say that it has none.

Only these kernels ask for tensors to be saved. So nobody who calls an operator need know whether
the call will be recorded, nor need a program that torch.export made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch

Row = Sequence[Tensor | None]  # the tensors of a call, None being one that is not given

_REMEDY = 'use backend="reference" (or mfef_ext.use_backend("reference")), which can'


class Function(torch.autograd.Function):
    """An operator, named by ``ctx.op``, without a forward-mode derivative."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"{ctx.op} cannot be differentiated in forward mode (torch.func.jvp, jacfwd, hessian, "
            f"torch.autograd.forward_ad) by its kernels, where that is not implemented; {_REMEDY}"
        )


def _refuse_twice(op: str) -> None:
    raise RuntimeError(f"{op} cannot be differentiated twice by its kernels; {_REMEDY}")


class _Recorded(Function):
    """A recorded call. Of ``call``, ``run`` is the operator's kernel, or leads to it through the
    dispatcher, and ``saved`` takes the results after the first."""

    @staticmethod
    def forward(ctx, call, *row):
        operator, run, options, saved = call
        with dispatch.below_autograd():
            out = run(*operator.arguments(row, options, *operator.save))
        if operator.saves:
            out, *others = out
            saved.extend(others)
        ctx.operator, ctx.op, ctx.options = operator, operator.name, options
        ctx.save_for_backward(*row, *saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad):
        _, *needs = ctx.needs_input_grad
        if grad is None:
            return (None, *(None for _ in needs))
        return (None, *ctx.operator.gradients(grad, ctx.saved_tensors, ctx.options, needs))


class _RecordedBackward(Function):
    """An operator's backward, which has no backward of its own."""

    @staticmethod
    def forward(ctx, operator, results, args, *tensors):
        ctx.op = operator.name
        with dispatch.below_autograd():
            results.extend(operator.backward(*args))
        return tuple(tensors_in(results))

    @staticmethod
    def backward(ctx, *grads):
        _refuse_twice(ctx.op)


def tensors_in(values: Sequence) -> list[Tensor]:
    """The tensors among arguments or results, and in the lists among them."""
    found: list[Tensor] = []
    for value in values:
        inside = value if isinstance(value, (list, tuple)) else (value,)
        found += [t for t in inside if isinstance(t, Tensor)]
    return found


class Operator:
    """An operator of a namespace, and its backward.

    A call consists of a row of tensors, in the order of the schema, and of options, which are its
    other arguments but for ``save``. Subclasses say what those are.

    ``kernels`` are the implementations by name, if they are in Python. Then the way through
    PyTorch's dispatcher leads from Python to Python, and takes as long as all that a kernel's
    launch does on the host: so calls go without it where they can.
    """

    name: str
    saves = False  # whether there are results for the backward, and an argument ``save``

    def __init__(self, namespace: str, kernels: Mapping[str, Callable] | None = None) -> None:
        defined, backward = getattr(torch.ops, namespace), f"{self.name}_backward"
        self.forward = getattr(defined, self.name).default
        self.backward = getattr(defined, backward).default
        # ``save`` as it is given, if it is an argument.
        self.save: tuple[bool, ...] = (True,) if self.saves else ()
        self.save_nothing: tuple[bool, ...] = (False,) if self.saves else ()
        self.in_python = kernels is not None
        self.kernel = self.forward if kernels is None else kernels[self.name]
        self.backward_kernel = self.backward if kernels is None else kernels[backward]

    # --- what a call consists of ---

    def row(self, *args: Any) -> tuple[Row, tuple, tuple]:
        """The row, the options and the flags of arguments that are in the schema's order."""
        raise NotImplementedError

    def arguments(self, row: Row, options: tuple, *flags: bool) -> tuple:
        """The arguments in the schema's order; ``flags`` is ``save`` where there is one."""
        raise NotImplementedError

    def gradients(
        self, grad: Tensor, saved: Row, options: tuple, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of a row; ``saved`` is the row and the results after the first."""
        raise NotImplementedError

    def has_gradient(self, row: Row, options: tuple) -> bool:
        """Whether a row with tensors that require a gradient has one for them."""
        return True

    # --- calls ---

    def __call__(self, row: Row, options: tuple = ()) -> Any:
        """The operator's first result."""
        records = dispatch.records(row) and self.has_gradient(row, options)
        # What is below autograd, the dispatcher does for a native kernel in any case.
        if records or self.in_python:
            direct = dispatch.is_direct(row)
        else:
            direct = not dispatch.is_transformed()
        if direct and records:
            return _Recorded.apply((self, self.kernel, options, []), *row)
        arguments = self.arguments(row, options, *self.save_nothing)
        if direct:
            with dispatch.below_autograd():
                results = self.kernel(*arguments)
        else:
            results = self.forward(*arguments)
        return results[0] if self.saves else results

    def call_backward(self, tensors: Row, *args: Any) -> Any:
        """The results of the backward; ``tensors`` are all of those in ``args``."""
        if dispatch.records(tensors):
            direct = False  # it is refused, should the results be differentiated
        elif self.in_python:
            direct = dispatch.is_direct(tensors)
        else:
            direct = not dispatch.is_transformed()
        if not direct:
            return self.backward(*args)
        with dispatch.below_autograd():
            return self.backward_kernel(*args)

    # --- the dispatcher's Autograd key ---

    def register_autograd(self, lib: torch.library.Library) -> None:
        if dispatch.OWN_AUTOGRAD:
            lib.impl(self.name, self._on_autograd, "Autograd")
            lib.impl(f"{self.name}_backward", self._backward_on_autograd, "Autograd")
        else:
            _register_publicly(self, lib)

    def _on_autograd(self, *args: Any) -> Any:
        row, options, save = self.row(*args)
        if dispatch.records(row) and self.has_gradient(row, options):
            saved: list[Tensor] = []
            call = self, self.forward, options, saved
            out = dispatch.apply(_Recorded, call, *row)
            return (out, *saved) if self.saves else out
        with dispatch.below_autograd():
            return self.forward(*self.arguments(row, options, *save))

    def _backward_on_autograd(self, *args: Any) -> Any:
        tensors = tensors_in(args)
        if not dispatch.records(tensors):
            with dispatch.below_autograd():
                return self.backward(*args)
        results: list = []
        recorded = iter(dispatch.apply(_RecordedBackward, self, results, args, *tensors))
        return tuple(
            [next(recorded) for _ in r] if isinstance(r, (list, tuple)) else next(recorded)
            for r in results
        )


def _register_publicly(operator: Operator, lib: torch.library.Library) -> None:
    """Derivatives by torch.library.register_autograd, for a torch without the private names.

    There a call cannot be told to save what its backward needs, which is computed once more.
    """

    def setup_context(ctx, inputs, output):
        row, ctx.options, _ = operator.row(*inputs)
        ctx.save_for_backward(*row)

    def backward(ctx, grad, *_):
        row, options = ctx.saved_tensors, ctx.options
        saved = []
        if operator.saves:
            with torch.no_grad():
                _, *saved = operator.forward(*operator.arguments(row, options, *operator.save))
        needs = [t is not None for t in row]
        grads = operator.gradients(grad, (*row, *saved), options, needs)
        return tuple(
            value if tensors_in([value]) else None
            for value in operator.arguments(grads, options, *operator.save)
        )

    def refuse(ctx, *grads):
        _refuse_twice(operator.name)

    name = f"{lib.ns}::{operator.name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=lib)
    torch.library.register_autograd(f"{name}_backward", refuse, lib=lib)


# --- the block and its halves -----------------------------------------------------------------


class _Fused(Operator):
    """The options are the convolution's: groups, ``split`` and ``allow_tf32``; () without one."""

    def arguments(self, row: Row, options: tuple, *flags: bool) -> tuple:
        # The backward's too: what is saved follows on the row, other flags on that.
        if not options:
            return (*row, *flags)
        groups, split, allow_tf32 = options
        end = 1 + len(groups)
        return (row[0], row[1:end], groups, split, *row[end:], *flags, allow_tf32)

    def gradients(
        self, grad: Tensor, saved: Row, options: tuple, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        need_x, *others = needs
        need_parameters = any(others)
        grad_x, *rest = self.call_backward(
            (grad, *saved), grad, *self.arguments(saved, options, need_x, need_parameters)
        )
        if not need_parameters:
            rest = others  # as many, and none is needed
        elif options:
            weights, *rest = rest
            rest = [*weights, *rest]
        return [g if need else None for g, need in zip((grad_x, *rest), needs, strict=True)]


class MultiScaleConv2d(_Fused):
    name = "multi_scale_conv2d"

    def row(self, x, weights, groups, split, bias, allow_tf32=False):
        return (x, *weights, bias), (groups, split, allow_tf32), ()


class DualAttention(_Fused):
    name = "dual_attention"
    saves = True

    def row(self, *row_and_save):
        *row, save = row_and_save
        return row, (), (save,)


class MfefBlock(_Fused):
    name = "mfef_block"
    saves = True

    def row(
        self, x, conv_weights, groups, split, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        spatial_weight, save, allow_tf32=False,
    ):  # fmt: skip
        attention = fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
        return (x, *conv_weights, *attention), (groups, split, allow_tf32), (save,)
