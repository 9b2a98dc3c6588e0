"""What was built, what would run where, and why."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import _C, backends, ops
from .backends import cuda, triton
from .modules import DualAttention, MFEFBlock, MultiScaleConv2d
from .names import a
from .problem import (
    Problem,
    describe_dual_attention,
    describe_mfef_block,
    describe_multi_scale_conv2d,
)
from .train import missing_extras
from .version import __version__


def build_info() -> dict[str, object]:
    """What this installation was built from and for, and what it uses here.

    Keys: version, compiler, torch_built_against, torch (the one running), cuda (compiled by what
    and for which architectures, or why not), cuda_loaded, cpu_isas_built, cpu_isas_usable (on this
    processor), isa_used, backend_forced (by MFEF_BACKEND or use_backend).
    """
    info: dict[str, object] = dict(_C.build_info())
    info["torch"] = torch.__version__
    info["cuda_loaded"] = ops.CUDA_LOADED
    info["isa_used"] = _C.cpu_isa()
    info["backend_forced"] = backends.forced_name()
    return info


class Explanation(str):
    """A text that shows itself line by line at a prompt too."""

    def __repr__(self) -> str:
        return str(self)


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """A tensor like ``x`` but for its number of channels; nothing is computed or copied."""
    return x[:, :1].expand(-1, channels, -1, -1)


def _describe(x: Tensor, block: nn.Module) -> Iterator[tuple[Problem, str | None] | str]:
    """What one forward of ``block`` does: operators, each with the backend that it asks for, and
    sentences about parts that are called."""
    if isinstance(block, DualAttention):
        yield describe_dual_attention(x, *block._arguments()), block.backend
    elif isinstance(block, MultiScaleConv2d):
        why, weights, biases = block._branch_parameters()
        if why:
            kinds = (type(branch).__name__ for branch in block.branches)
            yield f"the branches are called one by one ({', '.join(kinds)}): {why}"
        elif block.mode != "hierarchical":
            bias = torch.cat(biases) if biases else None
            split = block.mode == "split"
            described = describe_multi_scale_conv2d(x, weights, block.groups, split, bias)
            yield described, block.backend
        else:
            for w, g, c in zip(weights, block.groups, block.branch_channels, strict=True):
                yield describe_multi_scale_conv2d(x[:, :c], [w], [g], True, None), block.backend
    elif isinstance(block, MFEFBlock):
        conv, attention = block.conv, block.attention
        why, weights = block._fused()
        if not why:
            split = conv.mode == "split"
            arguments: list = [weights, conv.groups, *attention._arguments(), split]
            yield describe_mfef_block(x, *arguments), conv.backend
            return
        yield f"conv and attention are called one after the other: {why}"
        for name, part in (("conv", conv), ("attention", attention)):
            if isinstance(part, (MultiScaleConv2d, DualAttention)):
                yield from _describe(_with_channels(x, part.channels), part)
            else:
                yield f"{name} is {a(type(part).__name__)}, which is called"
    else:
        raise TypeError(
            "block must be an MFEFBlock, MultiScaleConv2d or DualAttention, got "
            f"{type(block).__name__}"
        )


def cpu_plan(problem: Problem) -> dict[str, object]:
    """How the CPU kernels would run a problem.

    Keys: isa, lanes, plan, units (of work); for both directions ``forward_`` and ``backward_``:
    fft_sizes (for each branch the side of its FFT, or 0 where it is convolved directly) and
    scratch_bytes (per thread).
    """
    return _C.cpu_plan(problem.sizes())


_PLAN_TEXT = {
    "images": "images plan: {lanes} images in the lanes of a vector, {units} block(s) of images",
    "pixels": "pixels plan: {lanes} neighbouring pixels in the lanes, {units} image(s)",
}


def _explain_convolutions(problem: Problem, plan: dict[str, object]) -> list[str]:
    """Which branches are convolved by FFT, forward and for the gradient of x, if any."""
    lines = []
    for direction, name in (("forward", "forward"), ("backward", "gradient of x")):
        sizes = plan[f"{direction}_fft_sizes"]
        assert isinstance(sizes, list)
        if any(sizes):
            branches = (
                f"k={b.kernel_size} {f'fft of {n}x{n}' if n else 'direct'}"
                for b, n in zip(problem.branches, sizes, strict=True)
            )
            lines.append(f"    convolutions, {name}: {', '.join(branches)}")
    return lines


def _explain_launches(problem: Problem, channels_last: bool) -> list[str]:
    """Triton's kernels for a problem, in both directions."""
    from .backends.triton import plans  # imports Triton

    how = "interpreted on the CPU" if triton.interpreted() else f"compiled for {problem.device}"
    hardware = "" if triton.BACKEND.verified else "; not yet run on hardware"
    lines = [f"    {how}{hardware}"]
    if problem.branches:
        lines.append(f"    convolutions, forward: {plans.convolutions(problem)}")
    for direction, launches in plans.launches(problem, channels_last).items():
        lines.append(f"    {direction}: {len(launches)} launch(es)")
        for launch in launches:
            lines.append(f"      {launch}")
            if launch.choices():
                lines.append(f"        {launch.choices()}")
    return lines


_CUDA_TEXT = {
    "small-map": "small-map plan: {blocks} thread block(s) of {threads} threads, {images} image(s) "
    "each; shared memory {forward_shared_bytes:,} bytes, backward {backward_shared_bytes:,}",
    "large-map": "large-map plan: per image {tiles} tile(s) of {tile[0]} x {tile[1]} pixels by "
    "{forward_units} unit(s) of channels, backward {backward_units}, and {pieces} piece(s) of "
    "{piece[0]} x {piece[1]} pixels; {threads} threads, shared memory {forward_shared_bytes:,} "
    "bytes, backward {backward_shared_bytes:,}",
}
_CUDA_STAGES_TEXT = "weights in {forward_stages} stage(s), backward {backward_stages}"
_CUDA_TENSOR_CORES_TEXT = (
    "branches on tensor cores: {forward_tensor_core_branches}, backward "
    "{backward_tensor_core_branches}, weights' gradient {weight_gradient_tensor_core_branches}"
)
_CUDA_IN_BACKWARD_TEXT = (
    "gradient of the weights in the backward's launch, {weight_gradient_slices} sum(s) to add up"
)
_CUDA_GRADIENT_TEXT = (
    "gradient of the weights in {weight_gradient_tiles} tile(s) by {weight_gradient_slices} "
    "slice(s) of the batch"
)


def _explain_cuda(plan: dict[str, object]) -> list[str]:
    small = plan["plan"] == "small-map"
    texts = [_CUDA_TEXT[str(plan["plan"])]]
    in_backward = plan["weights_in_backward"]
    if in_backward or plan["weight_gradient_tiles"]:
        texts += [_CUDA_STAGES_TEXT] * small
        texts.append(_CUDA_IN_BACKWARD_TEXT if in_backward else _CUDA_GRADIENT_TEXT)
    directions = ("forward", "backward", "weight_gradient")
    if any(plan[f"{name}_tensor_core_branches"] for name in directions):
        texts.append(_CUDA_TENSOR_CORES_TEXT)
    lines = [f"    {text.format(**plan)}" for text in texts]
    for direction in ("forward", "backward"):
        launches, scratch = plan[f"{direction}_launches"], plan[f"{direction}_scratch_bytes"]
        assert isinstance(launches, list)
        lines.append(f"    {direction}: {', '.join(launches)}; scratch {scratch:,} bytes")
    return lines


def _check_counts(problem: Problem) -> None:
    """RuntimeError, in the words of the native operators, for sizes that they refuse."""
    n, pixels, out = problem.batch, problem.height * problem.width, problem.out_channels
    x = "y" if problem.op == "dual_attention" else "x"
    counts = {f"an image of {x}": problem.channels * pixels, x: n * problem.channels * pixels}
    for b in problem.branches:
        weight = b.out_channels * b.in_channels // b.groups * b.kernel_size**2
        counts["a weight"] = max(weight, counts.get("a weight", 0))
    counts |= {"an image of the result": out * pixels, "the result": n * out * pixels}
    counts |= {"fc1_weight": problem.hidden * out}
    counts |= {"the layer of hidden units": n * problem.hidden}
    for what, count in counts.items():
        if count > _C.MAX_ELEMENTS:
            raise RuntimeError(
                f"mfef: {what} has about {float(count):g} elements, at most 2^40 are supported"
            )


def _explain_problem(problem: Problem, forced: str | None, channels_last: bool) -> list[str]:
    shape = (problem.batch, problem.channels, problem.height, problem.width)
    lines = [f"{problem.op} on {shape}, {problem.dtype_name}, {problem.device}"]
    try:
        chosen = backends.choose(problem, forced)
    except RuntimeError as error:
        return [*lines, f"  refused: {error}"]
    if chosen.name in ("cpu", "cuda"):
        _check_counts(problem)
    why = "forced" if backends.forced_name(forced) else "the first that can"
    lines.append(f"  runs on: {chosen.name} ({why})")
    if chosen.name == "cpu":
        plan = cpu_plan(problem)
        text = _PLAN_TEXT[str(plan["plan"])].format(**plan)
        lines.append(f"    {plan['isa']}, {text}")
        forward, backward = (
            f"{direction} {int(str(plan[f'{direction}_scratch_bytes'])) / 1024:,.0f} KiB"
            for direction in ("forward", "backward")
        )
        lines.append(f"    scratch per thread: {forward}, {backward}")
        lines += _explain_convolutions(problem, plan)
    if chosen.name == "triton":
        lines += _explain_launches(problem, channels_last)
    if chosen.name == "cuda":
        lines += _explain_cuda(cuda.plan(problem))
    for name in backends.BACKEND_NAMES:
        if name == chosen.name:
            continue
        backend = backends.by_name(name)
        ok, reason = backend.supports(problem)
        if not ok:
            lines.append(f"  {name}: no, {reason}")
        elif not backend.verified:
            lines.append(
                f"  {name}: could, but has not run on hardware yet; backend={name!r} forces it"
            )
        else:
            lines.append(f"  {name}: could, but is not asked first")
    return lines


def explain(x: Tensor, block: nn.Module) -> Explanation:
    """Says which backend and algorithm ``block(x)`` would use, and why the others would not.

    Args:
        x: an (N, C, H, W) input of the block.
        block: an ``MFEFBlock``, ``MultiScaleConv2d`` or ``DualAttention``.

    Returns a text of a few lines, which says so where parts are called instead of fused, and why;
    nothing is computed. Raises as the block would for bad input.
    """
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    lines: list[str] = []
    for what in _describe(x, block):
        lines += [what] if isinstance(what, str) else _explain_problem(*what, last)
    return Explanation("\n".join(lines))


def wrong_setting() -> str:
    """The sentence about an environment variable that no call can obey; "" if there is none."""
    try:
        _C.cpu_isa()
    except ValueError as error:
        return f"MFEF_USE_ISA: {error}"
    forced = backends.forced_name()
    try:
        if forced is not None:
            backends.check_backend_name(forced, f"MFEF_BACKEND={forced!r}", "unset it")
    except ValueError as error:
        return str(error)
    absent = backends.by_name(forced).absent() if forced is not None else ""
    return f"MFEF_BACKEND={forced!r} can run nothing here: {absent}; unset it" if absent else ""


def doctor() -> str:
    """A report of what was built, what was found on this machine, and what is missing."""
    wrong = wrong_setting()
    try:
        info = build_info()
    except ValueError:  # MFEF_USE_ISA names what this processor has not
        return f"mfef_ext {__version__}: {wrong}"
    built, usable = list(_C.build_info()["cpu_isas_built"]), _C.build_info()["cpu_isas_usable"]
    lines = [
        f"mfef_ext {__version__}, Python {platform.python_version()}, torch {torch.__version__} "
        f"(built against {info['torch_built_against']}, compiler {info['compiler']})",
        f"CPU: kernels for {', '.join(built)}; this processor runs {', '.join(usable)}; "
        f"in use: {info['isa_used']}; {torch.get_num_threads()} thread(s)",
        f"CUDA library: {info['cuda']}; {'loaded' if info['cuda_loaded'] else 'not loaded'}",
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"GPUs: {', '.join(names)}")
    else:
        lines.append(
            "GPUs: none usable by this torch"
            + ("" if torch.version.cuda else " (it is a build without CUDA)")
        )
    lines.append(f"Triton: {triton.state()}")
    if wrong:
        lines.append(wrong)
    elif info["backend_forced"]:
        lines.append(f"forced for every call (MFEF_BACKEND): {info['backend_forced']}")
    for device_type in ("cpu", "cuda"):
        order = [b for b in backends.order(device_type) if not b.absent()]
        asked = " -> ".join(b.name for b in order if b.verified)
        only = ", ".join(b.name for b in order if not b.verified)
        lines.append(
            f"backends for {device_type} tensors, in order: {asked}"
            + (f" ({only} only if forced)" if only else "")
        )
    for name in backends.BACKEND_NAMES:
        backend = backends.by_name(name)
        absent = backend.absent()
        what = f"cannot run here: {absent}" if absent else ", ".join(sorted(backend.operators))
        unverified = "" if backend.verified else "; not run on hardware yet, runs only if forced"
        lines.append(f"  {name}: {what}{unverified}")
    missing = missing_extras(optional=True)
    lines.append(
        "training extras: "
        + (
            f"missing {', '.join(missing)}: pip install 'mfef_ext[train]'"
            if missing
            else "all there"
        )
    )
    return "\n".join(lines)
