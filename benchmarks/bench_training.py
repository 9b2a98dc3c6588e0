"""Images per second of a whole training step, backend against backend, and the MFEF head's share.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --device cuda --dtype bfloat16 --batch-size 128
    python benchmarks/bench_training.py --out benchmarks/results/training

A step is forward, all losses, backward and the update of two students with their MFEF head, on
images that are already on the device. The same networks with the same weights train once per
backend, in turns, round by round: ratios are taken within a round. "head" is what the method adds
to the students, forward and backward (mfef_ext/train/timing.py says how it is told apart); on a
GPU these readings wait for the device, so they are taken in rounds of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import report
import torch
from timing import interleave, ratios, summarise

from mfef_ext.backends import BACKEND_NAMES
from mfef_ext.distill import OnlineDistiller
from mfef_ext.train.models import STUDENTS, build_students
from mfef_ext.train.timing import HeadClock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """Two students and their head on one backend; a call is one step."""

    def __init__(self, backend: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        side, classes = options.image_size, 100
        shape = (3, side, side)
        students, specs = build_students(options.students, shape, classes)
        self.distiller = OnlineDistiller(
            students,
            num_classes=classes,
            tap=[spec.tap for spec in specs],
            input_shape=shape,
            backend=backend,
        ).to(options.device)
        self.images = torch.randn(options.batch_size, 3, side, side, device=options.device)
        self.labels = torch.arange(options.batch_size, device=options.device) % classes
        groups = self.distiller.parameter_groups()
        self.optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True)
        self.dtype = DTYPES[options.dtype]
        self.device = torch.device(options.device)

    def __call__(self, clock: HeadClock | None = None) -> None:
        amp = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with amp:
            loss = self.distiller(self.images, self.labels, 100.0).loss
        self.optimizer.zero_grad()
        if clock is not None:
            clock.backward_starts()
        loss.backward()
        self.optimizer.step()

    def head_shares(self, rounds: int) -> list[float]:
        """The head's share of the step, 0 to 1, in each of so many steps."""
        clock = HeadClock(self.distiller.method, self.device)
        shares = []
        for _ in range(rounds):
            clock.seconds, begin = 0.0, clock.now()
            self(clock)
            shares.append(clock.seconds / (clock.now() - begin))
        return shares


def run(options: argparse.Namespace) -> dict:
    """Every backend's figures, as plain values."""
    trainers = {name: Trainer(name, options) for name in options.backends}
    steps: dict[str, Callable] = dict(trainers)
    series = interleave(steps, torch.device(options.device).type, options.seconds)
    rows = []
    for name, times in series.items():
        seconds, share = summarise(times), median(trainers[name].head_shares(5))
        ratio = ratios(series[options.backends[-1]], times)
        rows.append(
            {
                "backend": name,
                "rounds": len(times),
                "seconds_per_step": vars(seconds),
                "images_per_second": options.batch_size / seconds.median,
                "head_share": share,
                f"speedup_over_{options.backends[-1]}": vars(ratio),
            }
        )
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {"environment": report.environment(options.device), "options": asked, "rows": rows}


def heading(result: dict) -> str:
    """What was measured, and where, in a sentence."""
    options = result["options"]
    side = options["image_size"]
    return (
        f"{report.measured(result['environment'])}: students {' '.join(options['students'])}, "
        f"images {side}x{side}, batch {options['batch_size']}, {options['dtype']}."
    )


def markdown(result: dict) -> str:
    """The table of a result."""
    last = result["options"]["backends"][-1]
    lines = [
        f"| backend | images per second | head's share of a step | against {last} |",
        "|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratio = row[f"speedup_over_{last}"]
        cells = (
            row["backend"],
            f"{row['images_per_second']:.1f}",
            f"{100 * row['head_share']:.1f} %",
            f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=["resnet32"] * 2)
    parser.add_argument("--image-size", type=int, default=32, help="pixels along a side")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="autocast, if bfloat16")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKEND_NAMES,
        help="of the head; the last one is what the others are compared with",
    )
    parser.add_argument("--seconds", type=float, default=60, help="for all measurements, about")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="a folder for training.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.backends is None:
        native = "cpu" if torch.device(options.device).type == "cpu" else "triton"
        options.backends = [native, "reference"]
    result = run(options)
    print(markdown(result))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
