"""The operators as stateless functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import backends, problem

__all__ = ["dual_attention", "kd_loss", "kd_losses", "mfef_block", "multi_scale_conv2d"]

# The problems of arguments that have passed all checks, by their signature: to check arguments anew
# takes longer than the forward of one small image. The backend is chosen at every call, since the
# choice changes with use_backend, with the environment and with what is installed.
_described: dict[object, problem.Problem] = {}
MAX_DESCRIBED = 1024


def _operator(
    function: Callable,
    backend: str | None,
    describe: Callable[[], problem.Problem],
    tensors: tuple[Tensor | None, ...],
    weights: Sequence[Tensor] = (),
    groups: Sequence[int] = (),
    split: bool = True,
) -> Callable:
    """The callable that runs ``function``: the chosen backend's, after the checks of arguments.

    Raises as ``describe``, or RuntimeError where the forced backend cannot run the problem.
    """
    op, described, key = function.__name__, None, None
    # torch.compile would guard on whatever is looked up; torch.jit.trace has tensors for sizes.
    if not torch.compiler.is_dynamo_compiling() and not torch.jit.is_tracing():
        signature = problem.signature(tensors, weights, groups, split)
        if signature is not None:
            key = (op, signature)
            try:
                described = _described.get(key)
            except TypeError:  # a group has no hash: ``describe`` refuses it
                key = None
        else:
            # Proxies of torch.fx record the call; subclasses of tensors override it.
            several = isinstance(weights, (list, tuple))
            relevant = (*tensors, *weights) if several else (*tensors, weights)
            if has_torch_function(relevant):
                return partial(handle_torch_function, function, relevant, backend=backend)
    if described is None:
        described = describe()
        if key is not None:
            if len(_described) >= MAX_DESCRIBED:
                _described.clear()
            _described[key] = described
    return backends.choose(described, backend).operators[op]


def multi_scale_conv2d(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool = True,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Grouped convolutions with several kernel sizes side by side, results concatenated.

    Args:
        x: (N, C, H, W), any strides; contiguous and channels_last keep their layout.
        weights: branch i has shape (Cout_i, Cin_i / groups_i, k_i, k_i), k_i odd.
        groups: one number of groups per branch.
        split: True divides C among the branches (sum Cin_i = C); False shows all C to each.
        bias: (sum Cout_i,) or None.
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.

    Returns (N, sum Cout_i, H, W); stride 1, zero padding k_i // 2.

    Raises TypeError (dtypes), ValueError (shapes, values), RuntimeError (a forced backend that
    cannot run). Source: :func:`mfef_ext.reference.multi_scale_conv2d` is the specification.
    """
    run = _operator(
        multi_scale_conv2d,
        backend,
        lambda: problem.describe_multi_scale_conv2d(x, weights, groups, split, bias),
        (x, bias),
        weights,
        groups,
        split,
    )
    return run(x, weights, groups, split, bias)


def dual_attention(
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Channel attention, then spatial attention (CBAM, Woo 2018).

    Args:
        y: (N, C, H, W), any strides; contiguous and channels_last keep their layout.
        fc1_weight, fc1_bias: (h, C) and (h,) or None, the first layer of the shared MLP.
        fc2_weight, fc2_bias: (C, h) and (C,) or None, its second layer.
        spatial_weight: (1, 2, k, k), k odd; input channels in the order (max, mean).
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.

    Returns (N, C, H, W). Raises as :func:`multi_scale_conv2d` does.
    Source: :func:`mfef_ext.reference.dual_attention` is the specification.
    """
    arguments = (y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    run = _operator(
        dual_attention,
        backend,
        lambda: problem.describe_dual_attention(*arguments),
        arguments,
    )
    return run(*arguments)


def mfef_block(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    groups: Sequence[int],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    *,
    split: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``dual_attention(multi_scale_conv2d(x))`` as one operator forward and one backward.

    Arguments and errors as in :func:`multi_scale_conv2d` and :func:`dual_attention`.
    Returns (N, sum Cout_i, H, W).
    """
    attention = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)
    run = _operator(
        mfef_block,
        backend,
        lambda: problem.describe_mfef_block(x, conv_weights, groups, *attention, split),
        (x, *attention),
        conv_weights,
        groups,
        split,
    )
    return run(x, conv_weights, groups, *attention, split=split)


def kd_loss(
    student: Tensor,
    target: Tensor,
    temperature: float = 3.0,
    *,
    detach_target: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``T^2 KL(softmax(target / T) || softmax(student / T))``, mean over the batch (Hinton 2015).

    Args:
        student, target: logits, (N, classes), any floating dtype; computed in float32 at least.
            Those of classes that are masked may be -inf.
        temperature: T, from 1e-6 to 1e6: a number, NumPy's too, or a tensor with one element on the
            CPU, without a gradient.
        detach_target: whether the target is a constant (the default) or gets a gradient too.
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.

    Returns a scalar, 0 for an empty batch. A class whose target probability is 0 adds nothing, also
    where the student has -inf; a student with -inf where the target allows the class makes the loss
    infinite, and a row of -inf alone NaN. Raises TypeError, ValueError, RuntimeError.
    """
    if has_torch_function((student, target)):
        return handle_torch_function(
            kd_loss, (student, target), student, target, temperature,
            detach_target=detach_target, backend=backend,
        )  # fmt: skip
    temperature = problem.check_temperature(temperature)
    described = problem.describe_kd_loss(student, target)
    run = backends.choose(described, backend).operators["kd_loss"]
    return run(student, target, temperature, detach_target=detach_target)


def kd_losses(
    students: Sequence[Tensor],
    targets: Sequence[Tensor],
    temperature: float = 3.0,
    *,
    detach_target: bool = True,
    backend: str | None = None,
) -> list[Tensor]:
    """``[kd_loss(s, t) for s, t in zip(students, targets)]``, for all of a step.

    In one launch each way where the backend that runs them has such a kernel and they are of one
    shape; else they are exactly those calls. Arguments and errors as in :func:`kd_loss`.
    """
    if has_torch_function((*students, *targets)):
        return [
            kd_loss(s, t, temperature, detach_target=detach_target, backend=backend)
            for s, t in zip(students, targets, strict=True)
        ]
    temperature = problem.check_temperature(temperature)
    described = [
        problem.describe_kd_loss(student, target)
        for student, target in zip(students, targets, strict=True)
    ]
    if not described:
        return []
    chosen = [backends.choose(one, backend).operators for one in described]
    alike = all(one == described[0] for one in described)
    if alike and len(described) > 1 and "kd_losses" in chosen[0]:
        run = chosen[0]["kd_losses"]
        return list(run(students, targets, temperature, detach_target=detach_target).unbind())
    return [
        operators["kd_loss"](student, target, temperature, detach_target=detach_target)
        for operators, student, target in zip(chosen, students, targets, strict=True)
    ]
