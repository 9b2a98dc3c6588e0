"""vmap and autocast: calls that become other calls of the same operator."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .autograd import Operator

# --- torch.func.vmap: one call per element of the batch, results stacked ----------------------


def _element(value: Any, dim: Any, i: int) -> Any:
    """Element ``i`` of an argument that is batched in ``dim``; of a list, lists of both."""
    if dim is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_element(v, d, i) for v, d in zip(value, dim, strict=True)]
    # Of an empty batch, one element of the right shape.
    rest = (*value.shape[:dim], *value.shape[dim + 1 :])
    return value.select(dim, i) if value.shape[dim] else value.new_zeros(rest)


def _stack(results: tuple, n: int) -> tuple[Any, Any]:
    """The first ``n`` results of one operator, stacked, and the dimension of the batch in each."""
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:n], 0
    parts = [_stack(part, n) for part in zip(*results, strict=True)]
    kind = type(results[0])
    return kind([part for part, _ in parts]), kind([dim for _, dim in parts])


def _one_by_one(overload: Any, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    n = info.batch_size
    calls = range(max(n, 1))
    return _stack(tuple(overload(*_element(args, in_dims, i)) for i in calls), n)


def register_vmap(lib: torch.library.Library, operator: Operator) -> None:
    """Registers vmap for an operator of ``lib`` and for its backward."""
    for name, overload in (
        (operator.name, operator.forward),
        (f"{operator.name}_backward", operator.backward),
    ):
        rule = partial(_one_by_one, overload)
        torch.library.register_vmap(f"{lib.ns}::{name}", rule, lib=lib)


# --- autocast: everything in the autocast dtype, float64 excepted -----------------------------


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        castable = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if castable else value
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    return value


def _call_cast(overload: Any, device_type: str, *args: Any) -> Any:
    cast = [_cast(a, torch.get_autocast_dtype(device_type)) for a in args]
    torch.set_autocast_enabled(device_type, False)
    try:
        return overload(*cast)
    finally:
        torch.set_autocast_enabled(device_type, True)


def register_autocast(lib: torch.library.Library, operator: Operator) -> None:
    """Registers autocast on CPUs and GPUs for an operator of ``lib``."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        lib.impl(operator.name, partial(_call_cast, operator.forward, device_type), key)
