"""``mfef export``: one student without any part of MFEF, compared with the trained one first."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import DataError, UsageError
from .checkpoint import CheckpointError, load_student, save_student
from .evaluate import add_data, rebuild
from .run import Run
from .writing import write_whole

SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
# Test images on which an exported student must answer as the trained one does. ONNX's own evaluator
# is numpy, for which a few are enough work.
IMAGES, ONNX_IMAGES = 256, 16
# Another implementation adds in another order. The largest difference of two logits, as a share of
# the largest logit: 3e-7 was seen with the networks here, up to 4e-6 with torchvision's.
ONNX_TOLERANCE = 3e-5

# Logits for images (N, C, H, W), by the file that was written.
Answers = Callable[[Tensor], Tensor]


def export(
    path: Path,
    student: int = 0,
    format: str = "safetensors",
    out: Path | None = None,
    checkpoint: str = "last",
    device: str | None = None,
    ema: bool = False,
    data_dir: Path | None = None,
) -> str:
    """Writes one student of the run ``path`` into one file (``safetensors``: and a .json), and says
    where and what it was compared on. ``ema``: with its averaged weights, in place of those of the
    last step. ``out``: RUN/export/student<i> by default.

    The run's images are needed for the comparison alone: where they cannot be had, random ones take
    their place. Raises UsageError if there is no such student, no average or the file is there
    already, CheckpointError if the file's logits are not the trained student's, DataError if
    ``data_dir`` is given and does not hold the run's images. There is no file then.
    """
    if format == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise UsageError("--format onnx needs two packages; run: pip install onnx onnxscript")
    run, known = rebuild(path, checkpoint, device, data_dir)
    if not 0 <= student < len(run.specs):
        raise UsageError(f"--student={student} must be from 0 to {len(run.specs) - 1} in {path}")
    if ema and not run.averaged:
        raise UsageError(
            f"--ema means nothing to {path}, which was trained without: it has no averaged "
            "weights; leave --ema out, or train with --ema 0.999"
        )
    role = f"student{student}{'-ema' * ema}"
    suffix, which = SUFFIXES[format], "" if checkpoint == "last" else f"-{checkpoint}"
    out = out or path / "export" / f"{role}{which}{suffix}"
    if out.suffix != suffix:
        raise UsageError(f"--out={out} must end in {suffix}, as --format {format} writes it")
    for file in (out, out.with_suffix(".json"))[: 1 + (format == "safetensors")]:
        if file.exists():
            raise UsageError(f"--out={file} exists and nothing is ever overwritten; name another")
    network, about = run.students[role].cpu().eval(), run.about(role)
    count = ONNX_IMAGES if format == "onnx" else IMAGES
    x, inputs = _images(run, known, path / f"{checkpoint}.ckpt", data_dir is not None, count)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export") as unchecked:
        file = Path(unchecked) / out.name
        if format == "safetensors":
            save_student(file, network, run.specs[student], about)
            answers: Answers = load_student(file)[0]
        else:
            write = _torch_export if format == "torch-export" else _onnx
            # What it is shown goes into the file, and no image of the data set is to.
            answers = write(file, network, torch.zeros_like(x[:2]), about)
        tolerance = ONNX_TOLERANCE if format == "onnx" else 0.0
        _compare(answers, network, x, tolerance, out)
        for written in file.parent.iterdir():
            os.replace(written, out.parent / written.name)
    same = f"within {tolerance:g} of the largest" if tolerance else "bit for bit"
    what = f"student {student}{', averaged weights,' * ema} of {path}"
    said = f"{out}: {what}; logits of {len(x)} {inputs} are its, {same}"
    return "\n".join([*run.complaints, said])


def _images(
    run: Run, known: dict[str, Any] | None, file: Path, needed: bool, count: int
) -> tuple[Tensor, str]:
    """Up to ``count`` test images of the run, or as many random ones, and which they are."""
    try:
        add_data(run, known, file)
    except (DataError, UsageError) as error:
        if needed:
            raise
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(count, *run.dataset.shape, generator=draw)
        return x, f"random images (those of the run cannot be had: {error})"
    return run.dataset.test[:count][0].cpu(), "test images"


def _program(network: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph of torch's own operators, for any number of images, without a trace of
    the sources that it came from."""
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        for trace in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack"):
            node.meta.pop(trace, None)
    return program


def _torch_export(file: Path, network: nn.Module, x: Tensor, about: dict[str, Any]) -> Answers:
    content = io.BytesIO()
    torch.export.save(_program(network, x), content, extra_files={"about.json": json.dumps(about)})
    write_whole(file, content.getvalue())
    return torch.export.load(file).module()


def _onnx(file: Path, network: nn.Module, x: Tensor, about: dict[str, Any]) -> Answers:
    import onnx
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(
        _program(network, x),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),  # for its name alone: the program is made already
    )
    assert program is not None  # that is for the other exporter
    model = program.model_proto
    onnx.helper.set_model_props(model, {"about": json.dumps(about)})
    write_whole(file, model.SerializeToString())
    onnx.checker.check_model(str(file), full_check=True)
    evaluator = ReferenceEvaluator(str(file))

    def answers(x: Tensor) -> Tensor:
        (logits,) = evaluator.run(["logits"], {"images": x.numpy()})
        return torch.from_numpy(logits)

    return answers


def _compare(answers: Answers, network: nn.Module, x: Tensor, tolerance: float, out: Path) -> None:
    """CheckpointError unless ``answers`` are the network's, for all images and for one alone."""
    for images in (x, x[:1]):
        with torch.no_grad():
            expected, found = network(images), answers(images)
        worst = float((found - expected).abs().max())
        if not worst <= tolerance * float(expected.abs().max()):
            raise CheckpointError(
                f"{out} was not written: its logits differ from the trained student's by up to "
                f"{worst:.2g}; use another --format, and report this as a bug"
            )
