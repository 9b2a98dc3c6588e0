"""Private names of PyTorch: the only file of this package that uses them.

Each is looked up once, under a comment that says what it is for. Where a version of PyTorch lacks
one, a public way is taken, which is slower and has the same results. docs/torch_versions.md says
with which versions the tests of the operators ran.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..names import a

F = TypeVar("F", bound=Callable)

PLAIN = frozenset((Tensor, nn.Parameter, type(None)))  # types without behaviour of their own

NAMES: list[str] = []  # all that are looked up below


def _private(name: str) -> Any:
    """The object that ``name`` (module:attribute) stands for; None where there is no such name."""
    NAMES.append(name)
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return None


# --- calls of operators -----------------------------------------------------------------------

# A guard: operators that are called inside skip autograd and go on to the kernel.
below_autograd: Any = _private("torch._C:_AutoDispatchBelowAutograd")

# Whether a transform of torch.func is active; and what `torch.autograd.Function` consists of there:
# Function.apply is for calls from outside of the dispatcher and takes care of all levels, but a
# kernel on the Autograd key is called for one level, and the dispatcher takes care of the others.
_transforms_active: Any = _private("torch._C:_are_functorch_transforms_active")
_single_level_enabled: Any = _private(
    "torch._functorch.utils:enable_single_level_autograd_function"
)
_SingleLevelFunction: Any = _private("torch.autograd.function:_SingleLevelFunction")
_forward_mode_enabled: Any = _private("torch.autograd.forward_ad:_set_fwd_grad_enabled")

# Whether kernels of our own can be put on the Autograd key. Else torch.library.register_autograd
# is used, and every call goes through the dispatcher, but for those that it would not derive: they
# are the specification's.
OWN_AUTOGRAD = None not in (
    below_autograd,
    _transforms_active,
    _single_level_enabled,
    _SingleLevelFunction,
    _forward_mode_enabled,
)

# What the dispatcher would do with a call: the keys of a tensor, those that this thread adds and
# takes away, and whether somebody profiles. Without them no call can skip the dispatcher.
_keys_of: Any = _private("torch._C:_dispatch_keys")
_included_keys: Any = _private("torch._C:_dispatch_tls_local_include_set")
_excluded_keys: Any = _private("torch._C:_dispatch_tls_local_exclude_set")
_DispatchKey: Any = _private("torch._C:DispatchKey")
_DispatchKeySet: Any = _private("torch._C:DispatchKeySet")
_profiled: Any = _private("torch.autograd:_profiler_enabled")

CAN_SKIP = OWN_AUTOGRAD and None not in (
    _keys_of,
    _included_keys,
    _excluded_keys,
    _DispatchKey,
    _DispatchKeySet,
    _profiled,
)

# The bits of the keys that lead to a kernel, or to autograd and then to a kernel.
_SKIPPED = 0
if CAN_SKIP:
    for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "BackendSelect"):
        _SKIPPED |= _DispatchKeySet(getattr(_DispatchKey, _key)).raw_repr()

# The level of forward-mode differentiation, -1 outside of it; a global that changes.
_HAS_LEVEL = _private("torch.autograd.forward_ad:_current_level") is not None


def has_tangents(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of the tensors is being differentiated in forward mode."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def records(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd may record a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    if _HAS_LEVEL:  # whether there are tangents, a Function finds out by itself
        return forward_ad._current_level >= 0
    return has_tangents(tensors)


def needs_specification(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.library.register_autograd would not derive a call with these tensors.

    It leaves out derivatives in forward mode, and those of torch.func.
    """
    if OWN_AUTOGRAD or torch.compiler.is_compiling():
        return False
    return has_tangents(tensors) or any(
        t is not None and torch.func.debug_unwrap(t) is not t for t in tensors
    )


def is_transformed() -> bool:
    """Whether torch.compile or torch.func has to see calls as they are made."""
    return not OWN_AUTOGRAD or torch.compiler.is_dynamo_compiling() or _transforms_active()


def is_direct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher would only record a call with these tensors and find its kernel.

    It does more under autocast, transforms, modes, tracing and profiling, and for subclasses and
    lazily negated tensors.
    """
    if not CAN_SKIP or torch.compiler.is_dynamo_compiling():
        return False
    for t in tensors:
        if type(t) not in PLAIN or (t is not None and t.is_neg()):
            return False
    keys = _keys_of(tensors[0]).raw_repr() | _included_keys().raw_repr()
    return keys & ~_excluded_keys().raw_repr() & ~_SKIPPED == 0 and not _profiled()


@cache
def _for_one_level(function: type[torch.autograd.Function]) -> Any:
    """``function`` for one level of the transforms of torch.func."""

    def forward(ctx: Any, *args: Any) -> Any:
        # `apply` switches both off, which is meant for this level and not for those below.
        with torch.enable_grad(), _forward_mode_enabled(True):
            return function.forward(ctx, *args)

    methods = {"forward": forward, "backward": function.backward, "jvp": function.jvp}
    statics = {name: staticmethod(method) for name, method in methods.items()}
    return type(function.__name__, (_SingleLevelFunction,), statics)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` in a kernel on the Autograd key."""
    if not _transforms_active():
        return function.apply(*args)
    with _single_level_enabled():
        return _for_one_level(function).apply(*args)


# An operator's schema, to define the same operator in another namespace. Without the attribute, the
# schema is read from the error about a call with too many arguments, which quotes it.
_HAS_SCHEMA = _private("torch:ops.aten.add.Tensor._schema") is not None


def schema(overload: Any) -> str:
    """An operator's schema without its namespace."""
    if _HAS_SCHEMA:
        text = str(overload._schema)
    else:
        try:
            overload(*[None] * 64)
            text = ""
        except (RuntimeError, TypeError) as error:
            text = str(error)
    found = re.search(r".*\w::(\w+\(.*\) -> .*)", text)
    if found is None:
        raise RuntimeError(f"this torch does not tell the schema of {overload}: {text}")
    return found[1]


# --- what is switched on ----------------------------------------------------------------------

# Whether autocast may be enabled for some device: of all devices at once, since mostly it is not.
is_any_autocast_enabled: Callable[[], bool] = _private("torch._C:_is_any_autocast_enabled") or (
    lambda: True
)

_fp32_precision: Any = _private("torch._C:_get_fp32_precision_getter")


def constant_when_compiled(function: F) -> F:
    """Marks a function that torch.compile is to call once, and not to trace.

    So does torch.compiler.assume_constant_result, which imports Dynamo: that takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def allow_tf32() -> bool:
    """Whether convolutions of float32 on a GPU may round what they multiply to TF32 (10 bits).

    That is PyTorch's switch for cuDNN's convolutions: ``torch.backends.cudnn.conv.fp32_precision``,
    and by its older name ``torch.backends.cudnn.allow_tf32``, which cannot be asked after the new
    one was set. A compiled program keeps what it said when it was compiled.
    """
    if _fp32_precision is not None:  # a tenth of the time
        return _fp32_precision("cuda", "conv") == "tf32"
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def allow_recompilations(count: int) -> None:
    """Has torch.compile compile one function ``count`` times before it leaves it as it is."""
    try:
        config = pkgutil.resolve_name("torch._dynamo:config")
        config.recompile_limit = max(config.recompile_limit, count)
    except (AttributeError, ImportError):
        pass  # what is beyond the limit is not compiled


# --- calls of layers --------------------------------------------------------------------------

# nn.Module takes ten times as long as a dictionary to look up an attribute.
_IN_MODULES = (
    "_modules",
    "_parameters",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
HOOKS_OF_ALL_MODULES = [
    _private(f"torch.nn.modules.module:_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]

# Whether it can be told what calling a layer would do. Else every layer is called.
CAN_TELL = None not in HOOKS_OF_ALL_MODULES and set(_IN_MODULES) <= nn.Module().__dict__.keys()

_CALL = nn.Module.__call__
_CALL_IMPL: Any = _private("torch.nn:Module._call_impl")
_CONV_FORWARD: Any = _private("torch.nn:Conv2d._conv_forward")
_FORWARDS: dict[type[nn.Module], Callable] = {nn.Conv2d: nn.Conv2d.forward}


def keep_as_defined(cls: type[nn.Module]) -> type[nn.Module]:
    """Has :func:`redefined` look at a class, as it is now."""
    _FORWARDS[cls] = cls.forward
    return cls


def redefined() -> str:
    """The class of which calling a layer is no longer what it was; "" if there is none."""
    for cls, forward in _FORWARDS.items():
        call = cls.__call__
        if call is not _CALL:
            # Tracers of torch.fx replace it too, and are to see the operator.
            owner = getattr(call, "__globals__", {}).get("__name__", "")
            if not owner.startswith("torch."):
                return cls.__name__
        if cls.forward is not forward:
            return cls.__name__
    conv: Any = nn.Conv2d
    if _CALL_IMPL and conv._call_impl is not _CALL_IMPL:
        return "nn.Module"
    if _CONV_FORWARD and conv._conv_forward is not _CONV_FORWARD:
        return "nn.Conv2d"
    return ""


def why_called(layer: nn.Module, cls: type[nn.Module]) -> str:
    """Why calling ``layer`` is more than the ``forward`` of ``cls``; "" where it is that."""
    if type(layer) is not cls:
        return f"is {a(type(layer).__name__)}"
    own = layer.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has hooks"
    if "forward" in own or "_conv_forward" in own or "_call_impl" in own:
        return "has a forward of its own"
    return "" if own.get("_compiled_call_impl") is None else "was compiled by itself"


# The base class of all batch normalisations.
BatchNorm: Any = _private("torch.nn.modules.batchnorm:_BatchNorm") or nn.BatchNorm2d
