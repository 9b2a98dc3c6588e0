"""The torch.library side of the operators: fakes, autograd, vmap, autocast.

The schemas are in csrc/schemas.cpp, the kernels behind them. Fakes repeat what the kernels
allocate; autograd formulas only pass tensors on; vmap calls once per element of its batch; autocast converts
to the autocast dtype, float64 excepted.
``register`` does all that for a namespace: "mfef" is the native one, and a backend whose kernels
are written in Python registers the same operators under a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from . import _C as _C  # registers the operators' schemas and CPU kernels
from . import flops, problem

# The CUDA library needs a torch with CUDA; in another one it could not be loaded.
_cuda_library = Path(__file__).with_name("_C_cuda.so")
CUDA_LOADED = torch.version.cuda is not None and _cuda_library.exists()
if CUDA_LOADED:
    torch.ops.load_library(str(_cuda_library))

OPERATORS = ("multi_scale_conv2d", "dual_attention", "mfef_block")


def _map_like(x: Tensor, channels: int) -> Tensor:
    """(N, channels, H, W) in the layout of x: contiguous or channels_last, else contiguous."""
    n, _, h, w = x.shape
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.new_empty((n, channels, h, w)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def _saved(x: Tensor, channels: int, save: bool) -> tuple[Tensor, ...]:
    n, h, w = (x.shape[0] if save else 0), x.shape[2], x.shape[3]
    real = _compute_dtype(x)
    return (
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=real),
        x.new_empty((n, channels), dtype=torch.int32),
        x.new_empty((n, h, w), dtype=real),
        x.new_empty((n, h, w), dtype=torch.int32),
    )


def _like(t: Tensor | None, x: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t) if need and t is not None else _nothing(x)


def _same_device(x: Tensor, *others: Tensor) -> None:
    for t in others:
        if t.device != x.device:
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} is on {t.device}, x on {x.device}"
            )


# --- fakes ------------------------------------------------------------------------------------
#
# The dispatcher leaves out arguments at the end that have their default value: `allow_tf32`.


# The fakes refuse what the kernels refuse: a call with one meta tensor among CPU tensors ends here.


def _fake_multi_scale_conv2d(x, weights, groups, split, bias, allow_tf32=False):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    return _map_like(x, sum(w.shape[0] for w in weights))


def _fake_multi_scale_conv2d_backward(
    grad, x, weights, groups, split, bias, need_x, need_parameters, allow_tf32=False
):
    problem.describe_multi_scale_conv2d(x, weights, groups, split, bias)
    _same_device(x, grad)
    return (
        _map_like(x, x.shape[1]) if need_x else _nothing(x),
        [torch.empty_like(w) for w in weights] if need_parameters else [],
        _like(bias, x, need_parameters),
    )


def _fake_dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight, save):
    problem.describe_dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    return (_map_like(y, y.shape[1]), *_saved(y, y.shape[1], save))


def _attention_grads(x, parameters, need):
    return tuple(_like(p, x, need) for p in parameters)


def _fake_dual_attention_backward(
    grad, y, w1, b1, w2, b2, ws, mean, max, max_index, s, c_index, need_x, need_parameters
):
    problem.describe_dual_attention(y, w1, b1, w2, b2, ws)
    _same_device(y, grad, mean, max, max_index, s, c_index)
    grad_y = _map_like(y, y.shape[1]) if need_x else _nothing(y)
    return (grad_y, *_attention_grads(y, (w1, b1, w2, b2, ws), need_parameters))


def _fake_mfef_block(x, conv_weights, groups, split, w1, b1, w2, b2, ws, save, allow_tf32=False):
    problem.describe_mfef_block(x, conv_weights, groups, w1, b1, w2, b2, ws, split)
    channels = sum(w.shape[0] for w in conv_weights)
    y = _map_like(x, channels) if save else _nothing(x)
    return (_map_like(x, channels), y, *_saved(x, channels, save))


def _fake_mfef_block_backward(
    grad, x, conv_weights, groups, split, w1, b1, w2, b2, ws,
    y, mean, max, max_index, s, c_index, need_x, need_parameters, allow_tf32=False,
):  # fmt: skip
    problem.describe_mfef_block(x, conv_weights, groups, w1, b1, w2, b2, ws, split)
    _same_device(x, grad, y, mean, max, max_index, s, c_index)
    return (
        _map_like(x, x.shape[1]) if need_x else _nothing(x),
        [torch.empty_like(w) for w in conv_weights] if need_parameters else [],
        *_attention_grads(x, (w1, b1, w2, b2, ws), need_parameters),
    )


_FAKES: dict[str, Callable] = {
    "multi_scale_conv2d": _fake_multi_scale_conv2d,
    "multi_scale_conv2d_backward": _fake_multi_scale_conv2d_backward,
    "dual_attention": _fake_dual_attention,
    "dual_attention_backward": _fake_dual_attention_backward,
    "mfef_block": _fake_mfef_block,
    "mfef_block_backward": _fake_mfef_block_backward,
}


# --- autograd ---------------------------------------------------------------------------------
#
# Kernels for the Autograd key, as torch.library.register_autograd would make them, but with all
# tensors of an operator in one row. Where an argument is a Tensor[], register_autograd walks every
# argument and result as a tree, which takes longer than the forward of one small image.
#
# Only the first result has a gradient. The others leave a Function's forward by way of the list
# `saved`, so that autograd need not wrap each of them to say that it has none.
#
# Only these kernels ask for tensors to be saved. So nobody who calls an operator need know whether
# the call will be recorded, nor need a program that torch.export made of it.


def _below_autograd(overload, keyset, *args):
    """Passes on a call that arrived at the Autograd key with ``keyset``."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


# The bits of dispatch keys that lead to a kernel, or to autograd and then to a kernel.
_DIRECT = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "BackendSelect"):
    _DIRECT |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()


def _is_direct(tensors) -> bool:
    """Whether the dispatcher would do nothing with a call but to record it and to find its kernel.

    ``tensors`` are the call's, None being one that is not given. The answer is no under autocast,
    transforms, modes, tracing and profiling, and for subclasses and lazily negated tensors.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and (type(t) not in problem.PLAIN or t.is_neg()):
            return False
    keys = torch._C._dispatch_keys(tensors[0]).raw_repr()
    keys |= torch._C._dispatch_tls_local_include_set().raw_repr()
    keys &= ~torch._C._dispatch_tls_local_exclude_set().raw_repr()
    return keys & ~_DIRECT == 0 and not torch.autograd._profiler_enabled()


def _records(tensors) -> bool:
    """Whether autograd may record a call with these tensors, None being one that is not given."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    # Whether there are tangents, a Function finds out by itself.
    return forward_ad._current_level >= 0


_REMEDY = 'use backend="reference" (or mfef_ext.use_backend("reference")), which can'


class Function(torch.autograd.Function):
    """An operator, named by ``ctx.op``, without a forward-mode derivative."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"{ctx.op} cannot be differentiated in forward mode (torch.func.jvp, jacfwd, hessian, "
            f"torch.autograd.forward_ad) by its kernels, where that is not implemented; {_REMEDY}"
        )


@cache
def _single_level(function: type[Function]) -> Any:
    """``function`` for one level of the transforms of torch.func."""

    def forward(ctx, *args):
        # `apply` switches both off, which is meant for this level and not for those below.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function.forward(ctx, *args)

    methods = {"forward": forward, "backward": function.backward, "jvp": function.jvp}
    statics = {name: staticmethod(method) for name, method in methods.items()}
    return type(function.__name__, (_SingleLevelFunction,), statics)


def _apply(function: type[Function], *args):
    """``function.apply`` on the Autograd key."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # Under transforms of torch.func, `apply` is for calls from outside of the dispatcher and takes
    # care of all levels. Here the dispatcher has come to one of them, and takes care of the others.
    with enable_single_level_autograd_function():
        return _single_level(function).apply(*args)


def _call(overload, records: bool, *args):
    """Calls an operator; ``records`` says whether autograd records the call."""
    # If it does not, the kernel on the Autograd key would only pass the call on, which takes a way
    # from C++ to Python and back. But Dynamo cannot trace the guard, and under a transform of
    # torch.func `records` is the answer of one level, with other levels around it.
    if records or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return overload(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


@dataclass(frozen=True)
class _Pair:
    """An operator and its backward, of one namespace, and their kernels if those are in Python.

    Then the way through PyTorch's dispatcher leads from Python to Python. It takes as long as all
    that a kernel's launch does on the host, so :meth:`call` and :meth:`call_backward` go without it
    where they can.
    """

    op: str
    autograd: Callable  # of _AUTOGRAD
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload
    forward_kernel: Callable | None = None
    backward_kernel: Callable | None = None

    def call(self, tensors, *args):
        """Calls the operator; ``tensors`` are all of args'."""
        records = _records(tensors)
        if self.forward_kernel is not None and _is_direct(tensors):
            call = self.autograd if records else _Pair.below_autograd
            return call(self, None, *args)
        return _call(self.forward, records, *args)

    def below_autograd(self, keyset, *args):
        """The operator for a call at the Autograd key; ``keyset`` is None if it came directly."""
        if keyset is not None:
            return _below_autograd(self.forward, keyset, *args)
        assert self.forward_kernel is not None
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward_kernel(*args)

    def call_backward(self, tensors, *args):
        records = _records(tensors)
        if self.backward_kernel is not None and not records and _is_direct(tensors):
            with torch._C._AutoDispatchBelowAutograd():
                return self.backward_kernel(*args)
        return _call(self.backward, records, *args)


class _MultiScaleConv2d(Function):
    @staticmethod
    def forward(ctx, pair, keyset, groups, split, allow_tf32, x, bias, *weights):
        ctx.pair, ctx.op = pair, pair.op
        ctx.options, ctx.allow_tf32 = (groups, split), allow_tf32
        ctx.save_for_backward(x, bias, *weights)
        return pair.below_autograd(keyset, x, weights, groups, split, bias, allow_tf32)

    @staticmethod
    def backward(ctx, grad):
        x, bias, *weights = ctx.saved_tensors
        need_x, need_parameters = ctx.needs_input_grad[5], any(ctx.needs_input_grad[6:])
        grad_x, grad_weights, grad_bias = ctx.pair.call_backward(
            (grad, x, bias, *weights),
            grad, x, weights, *ctx.options, bias, need_x, need_parameters, ctx.allow_tf32,
        )  # fmt: skip
        return (
            None,
            None,
            None,
            None,
            None,
            grad_x if need_x else None,
            grad_bias if need_parameters and bias is not None else None,
            *(grad_weights if need_parameters else [None] * len(weights)),
        )


def _multi_scale_conv2d(pair, keyset, x, weights, groups, split, bias, allow_tf32=False):
    if _records((x, *weights, bias)):
        options = groups, split, allow_tf32
        return _apply(_MultiScaleConv2d, pair, keyset, *options, x, bias, *weights)
    return pair.below_autograd(keyset, x, weights, groups, split, bias, allow_tf32)


def _parameter_grads(grads, parameters, need):
    if not need:
        return [None] * len(parameters)
    return [g if p is not None else None for g, p in zip(grads, parameters, strict=True)]


class _DualAttention(Function):
    @staticmethod
    def forward(ctx, pair, keyset, saved, y, *parameters):
        ctx.pair, ctx.op = pair, pair.op
        out, *others = pair.below_autograd(keyset, y, *parameters, True)
        saved.extend(others)
        ctx.save_for_backward(y, *parameters, *saved)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        y, *rest = ctx.saved_tensors
        parameters, saved = rest[:5], rest[5:]
        need_x, need_parameters = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:])
        grad_y, *grads = ctx.pair.call_backward(
            (grad, y, *rest),
            grad, y, *parameters, *saved, need_x, need_parameters,
        )  # fmt: skip
        return (
            None,
            None,
            None,
            grad_y if need_x else None,
            *_parameter_grads(grads, parameters, need_parameters),
        )


def _dual_attention(pair, keyset, y, *rest):
    *parameters, _ = rest
    if _records((y, *parameters)):
        saved: list[Tensor] = []
        return (_apply(_DualAttention, pair, keyset, saved, y, *parameters), *saved)
    return pair.below_autograd(keyset, y, *rest)


class _MfefBlock(Function):
    @staticmethod
    def forward(
        ctx, pair, keyset, groups, split, allow_tf32, saved, x, w1, b1, w2, b2, ws, *weights
    ):
        ctx.pair, ctx.op = pair, pair.op
        out, *others = pair.below_autograd(
            keyset, x, weights, groups, split, w1, b1, w2, b2, ws, True, allow_tf32
        )
        saved.extend(others)
        ctx.options, ctx.allow_tf32 = (groups, split), allow_tf32
        ctx.save_for_backward(x, w1, b1, w2, b2, ws, *saved, *weights)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *rest = ctx.saved_tensors
        parameters, saved, weights = rest[:5], rest[5:11], rest[11:]
        need_x, need_parameters = ctx.needs_input_grad[6], any(ctx.needs_input_grad[7:])
        grad_x, grad_weights, *grads = ctx.pair.call_backward(
            (grad, x, *rest),
            grad, x, weights, *ctx.options, *parameters, *saved, need_x, need_parameters,
            ctx.allow_tf32,
        )  # fmt: skip
        return (
            None,
            None,
            None,
            None,
            None,
            None,
            grad_x if need_x else None,
            *_parameter_grads(grads, parameters, need_parameters),
            *(grad_weights if need_parameters else [None] * len(weights)),
        )


def _mfef_block(
    pair, keyset, x, weights, groups, split, w1, b1, w2, b2, ws, save, allow_tf32=False
):
    parameters = w1, b1, w2, b2, ws
    options = groups, split
    if _records((x, *parameters, *weights)):
        saved: list[Tensor] = []
        arguments = *options, allow_tf32, saved, x, *parameters, *weights
        return (_apply(_MfefBlock, pair, keyset, *arguments), *saved)
    return pair.below_autograd(keyset, x, weights, *options, *parameters, save, allow_tf32)


_AUTOGRAD: dict[str, Callable] = {
    "multi_scale_conv2d": _multi_scale_conv2d,
    "dual_attention": _dual_attention,
    "mfef_block": _mfef_block,
}


class _Once(Function):
    """An operator's backward, which has no backward of its own."""

    @staticmethod
    def forward(ctx, op, call, structure, *tensors):
        ctx.op = op
        results, tree = tree_flatten(call())
        structure.append(tree)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op} cannot be differentiated twice by its kernels; {_REMEDY}")


def _once(op, overload, keyset, *args):
    call = partial(_below_autograd, overload, keyset, *args)
    tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
    if not _records(tensors):
        return call()
    structure: list = []
    results = _apply(_Once, op, call, structure, *tensors)
    return tree_unflatten(results, structure[0])


# --- torch.func -------------------------------------------------------------------------------


def _element(a, dim: int | None, i: int):
    if dim is None:
        return a
    # Of an empty batch, one element of the right shape.
    return a.select(dim, i) if a.shape[dim] else a.new_zeros((*a.shape[:dim], *a.shape[dim + 1 :]))


def _one_by_one(overload, info, in_dims, *args):
    """The results of an operator for each element of a batch of torch.func.vmap, stacked."""
    n = info.batch_size
    results = [overload(*tree_map(partial(_element, i=i), args, in_dims)) for i in range(max(n, 1))]
    stacked = tree_map(lambda *r: torch.stack(r)[:n], *results)
    return stacked, tree_map(lambda _: 0, stacked)


def register_transforms(lib: torch.library.Library, op: str) -> None:
    """Registers vmap for an operator of ``lib`` and its backward, and autograd for the latter."""
    for name in (op, f"{op}_backward"):
        overload = getattr(getattr(torch.ops, lib.ns), name).default
        rule = partial(_one_by_one, overload)
        torch.library.register_vmap(f"{lib.ns}::{name}", rule, lib=lib)
    lib.impl(name, partial(_once, op, overload), "Autograd", with_keyset=True)


# --- autocast ---------------------------------------------------------------------------------


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor):
        castable = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if castable else value
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    return value


def _register_autocast(lib: torch.library.Library, op: str, overload) -> None:
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def run(*args, _device=device_type, _key=key):
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            ):
                return overload(*(_cast(a, torch.get_autocast_dtype(_device)) for a in args))

        lib.impl(op, run, key)


# --- what the backends call -------------------------------------------------------------------

_libraries: list[torch.library.Library] = []  # what is registered goes with its library


def register(namespace: str, kernels: Mapping[str, Callable] | None = None) -> dict[str, Callable]:
    """Registers what is above of a namespace's operators, whose schemas are there.

    ``kernels`` are the implementations by the operators' names, if they are written in Python.
    Returns the functions of :mod:`mfef_ext.functional`, without checks, that call them.
    """
    lib = torch.library.Library(namespace, "IMPL")
    _libraries.append(lib)
    defined = getattr(torch.ops, namespace)
    pairs = {}
    for op in OPERATORS:
        names = op, f"{op}_backward"
        pair = _Pair(
            op,
            _AUTOGRAD[op],
            *(getattr(defined, name).default for name in names),
            *(kernels[name] for name in names if kernels is not None),
        )
        pairs[op] = pair
        lib.impl(op, partial(pair.autograd, pair), "Autograd", with_keyset=True)
        register_transforms(lib, op)
        _register_autocast(lib, op, pair.forward)
        for name in names:
            torch.library.register_fake(f"{namespace}::{name}", _FAKES[name])

    conv = pairs["multi_scale_conv2d"]
    attention = pairs["dual_attention"]
    block = pairs["mfef_block"]

    def multi_scale_conv2d(x, weights, groups, split=True, bias=None) -> Tensor:
        weights = list(weights)
        tensors = (x, *weights, bias)
        return conv.call(tensors, x, weights, list(groups), split, bias, problem.allow_tf32())

    def dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight) -> Tensor:
        tensors = (y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
        return attention.call(tensors, *tensors, False)[0]

    def mfef_block(
        x, conv_weights, groups, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight,
        *, split=True,
    ) -> Tensor:  # fmt: skip
        weights = list(conv_weights)
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
        tensors = (x, *parameters, *weights)
        options = list(groups), split
        allow_tf32 = problem.allow_tf32()
        return block.call(tensors, x, weights, *options, *parameters, False, allow_tf32)[0]

    return {
        "multi_scale_conv2d": multi_scale_conv2d,
        "dual_attention": dual_attention,
        "mfef_block": mfef_block,
    }


NATIVE = register("mfef")

# Where the kernels are, they are implemented and registered; counters of FLOPs look before that.
TRITON = torch.library.Library("mfef_triton", "FRAGMENT")
for _op in OPERATORS:
    for _name in (_op, f"{_op}_backward"):
        TRITON.define(str(getattr(torch.ops.mfef, _name).default._schema).removeprefix("mfef::"))
flops.register(("mfef", "mfef_triton"))
