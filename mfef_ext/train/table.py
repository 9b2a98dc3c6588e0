"""``mfef table``: runs side by side in Markdown, mean and standard deviation over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import UsageError
from .checkpoint import CheckpointError
from .config import METHOD_OPTIONS
from .structure import check_finished

# Runs that differ in nothing else are one experiment, repeated. Threads change rounding alone, and
# data that lie elsewhere are the same; which test images they hold is compared.
_NOT_COMPARED = (
    *("seed", "seeds", "out", "resume", "tensorboard", "data_dir", "download"),
    *("threads", "instruction_set", "forced_backend"),
)
_ALWAYS_SHOWN = ("method", "dataset", "students")


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder's config.json and summary.json say."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def experiment(self) -> dict[str, str]:
        """Everything that makes a difference, by name, as JSON."""
        compared = {k: v for k, v in self.config.items() if k not in _NOT_COMPARED}
        if data := compared.pop("data", None):
            compared["test images"] = data["sha256"]["test"][:12]
        return {k: json.dumps(v) for k, v in compared.items()}


def table(paths: Sequence[Path]) -> str:
    """A row per configuration and role. ``paths``: run folders, or folders that hold some.

    Raises UsageError if there is no finished run, or a seed twice; CheckpointError for damaged
    files. Runs without an end are named below the table.
    """
    folders = {run: None for path in paths for run in _run_folders(path)}
    unfinished = [str(path) for path in folders if not (path / "summary.json").exists()]
    runs = [_read(path) for path in folders if str(path) not in unfinished]
    if not runs:
        raise UsageError(f"{' '.join(unfinished)} has not come to its end; train it first")
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        same = groups.setdefault(tuple(sorted(run.experiment.items())), [])
        for other in same:
            if other.config["seed"] == run.config["seed"]:
                raise UsageError(
                    f"{other.path} and {run.path} are the same configuration with the same seed, "
                    "which would count twice; leave one out"
                )
        same.append(run)
    names = dict.fromkeys(name for run in runs for name in run.experiment)
    differ = [name for name in names if name not in _ALWAYS_SHOWN and _differs(name, runs)]
    head = [*_ALWAYS_SHOWN, *differ, "seeds", "role", "last epoch, %", "best epoch, %", "best on"]
    lines = [head, ["---"] * (len(head) - 3) + ["---:", "---:", "---"]]
    for same in groups.values():
        options = same[0].experiment
        shown = [_text(json.loads(options.get(n, "null"))) for n in (*_ALWAYS_SHOWN, *differ)]
        seeds = " ".join(str(run.config["seed"]) for run in same)
        for role in same[0].summary["last_test_accuracy"]:
            last, best = (
                _spread([run.summary[f"{epoch}_test_accuracy"][role] for run in same])
                for epoch in ("last", "best")
            )
            name = "mean of the students" if role == "students" else role
            lines.append([*shown, seeds, name, last, best, same[0].summary["best_chosen_on"]])
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    text += ["", "Accuracy on the test images; mean ± standard deviation over the seeds (n - 1)."]
    if any(run.summary["best_chosen_on"] == "test" for run in runs):
        text.append(
            "Best on test: the test images chose the epoch, so that column flatters; quote the "
            "last epoch."
        )
    if unfinished:
        text.append(f"Left out, as they have not come to their end: {', '.join(unfinished)}.")
    return "\n".join(text)


def _differs(name: str, runs: list[FinishedRun]) -> bool:
    """Whether runs have different values of an option; of one that is a method's own, runs with the
    same method."""
    values: dict[str, set[str]] = {}
    for run in runs:
        comparable = run.config["method"] if name in METHOD_OPTIONS else ""
        values.setdefault(comparable, set()).add(run.experiment.get(name, "null"))
    return any(len(found) > 1 for found in values.values())


def _run_folders(path: Path) -> list[Path]:
    if (path / "config.json").exists():
        return [path]
    found = sorted(file.parent for file in path.glob("*/config.json"))
    if not found:
        raise UsageError(f"{path} is no run folder and holds none; give folders of mfef train")
    return found


def _read(path: Path) -> FinishedRun:
    """The run in ``path``; CheckpointError if one of its two files is not what was written."""
    files = [path / "config.json", path / "summary.json"]
    wanted = [
        {"seed", *_ALWAYS_SHOWN},
        {"last_test_accuracy", "best_test_accuracy", "best_chosen_on"},
    ]
    read = []
    for file, keys in zip(files, wanted, strict=True):
        try:
            content = json.loads(file.read_text())
            missing = keys - set(content)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); leave {path} out") from error
        if missing:
            raise CheckpointError(f"{file} says nothing of {min(missing)}; leave {path} out")
        read.append(content)
    try:
        check_finished(*read)
    except ValueError as error:
        raise CheckpointError(f"{path} is no run of mfef train ({error}); leave it out") from error
    return FinishedRun(path, *read)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return " ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
