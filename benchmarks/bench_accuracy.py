"""What distillation is worth where labels are few: methods against the same students without it.

    python benchmarks/bench_accuracy.py --out benchmarks/results/accuracy
    python benchmarks/bench_accuracy.py --labels 10 --seeds 0 1     a part of the runs
    python benchmarks/bench_accuracy.py --quick                     one epoch, to see that it works

Two resnet8 learn handwritten digits from a few images of every class with the trainer itself, one
run folder per configuration and seed under --runs: a run that is there is not run again, one that
was stopped goes on. A seed draws the same images for every method, so differences are taken seed
by seed. Options of the trainer are the same for all methods; none was tuned for one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import report
import torch
from accuracy_tables import ROLES, markdown
from rich.console import Console

from mfef_ext.train import run_folder
from mfef_ext.train.config import TrainConfig
from mfef_ext.train.display import Display
from mfef_ext.train.loop import train
from mfef_ext.train.processes import join
from mfef_ext.train.report import summary

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("ce", "dml", "ffl", "mfef")},
    **{
        f"mfef --no-{part.replace('_', '-')}": {"method": "mfef", part: False}
        for part in ("multi_scale", "channel_attention", "spatial_attention")
    },
}
BATCH = 50
# Labels per class -> epochs. The validation curves of ce and mfef lay flat at the end, for a seed
# that is not in the tables.
EPOCHS = {10: 60, 20: 40, 50: 20}


def run(method: str, labels: int, seed: int, epochs: int, runs: Path) -> dict[str, Any]:
    """Trains, or finds what was trained before; accuracies in % of the test images, as a row."""
    name = f"{labels}-{method.replace(' --', '-')}-seed{seed}"
    config = TrainConfig(
        **METHODS[method],
        labels_per_class=labels,
        seed=seed,
        epochs=epochs,
        batch_size=BATCH,
        threads=torch.get_num_threads(),
        out=runs / name,
        resume="auto",
    )
    with Display(Console(quiet=True), epochs) as display:
        done = train(config, display, join(config.device))
    result = summary(done)
    row = {"labels_per_class": labels, "method": method, "seed": seed, "epochs": epochs}
    for when in ("last", "best"):
        row[f"{when}_epoch"] = result[f"{when}_epoch"]
        row |= {f"{when}_{role}": result[f"{when}_test_accuracy"].get(role) for role in ROLES}
    # How far the curve still moved: the same at seven eighths of the training.
    row["earlier_students"] = done.rows[max(epochs * 7 // 8, 1) - 1]["test/students"]
    return row | {"test_images": len(done.dataset.test)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="run folders")
    parser.add_argument("--quick", action="store_true", help="one epoch, 10 labels, two seeds")
    parser.add_argument("--out", type=Path, help="a folder for results.json and results.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    epochs = dict(EPOCHS)
    if options.quick:
        options.labels, options.seeds, epochs[10] = [10], [0, 1], 1
    rows = []
    for labels in options.labels:
        for method in options.methods:
            for seed in options.seeds:
                rows.append(run(method, labels, seed, epochs[labels], options.runs))
                print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    asked = {k: getattr(options, k) for k in ("labels", "methods", "seeds", "quick")}
    asked |= {"epochs": {str(n): epochs[n] for n in options.labels}, "batch_size": BATCH}
    result = {"environment": report.environment("cpu"), "options": asked, "rows": rows}
    if len(options.seeds) > 1 and {"ce", "mfef"} <= {*options.methods}:
        print(markdown(result))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(options.out / "results.json", result)
        run_folder.write_rows(options.out / "results.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
