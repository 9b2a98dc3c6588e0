"""Puts the tables of committed results between their markers in README.md and docs/.

    python benchmarks/tables.py

A test fails where a page says something else than the rows under benchmarks/results/.
"""

from __future__ import annotations

import json
from pathlib import Path

import accuracy_tables
import bench_training
import report

ROOT = Path(__file__).parents[1]


def read(name: str) -> dict:
    """A committed result."""
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def tables() -> dict[str, dict[str, str]]:
    """What stands between the markers, by page and marker."""
    accuracy, training = read("accuracy/results.json"), read("training/training.json")
    cpu, zen4 = read("cpu/results.json"), read("cpu-zen4/results.json")
    step = f"{bench_training.heading(training)}\n\n{bench_training.markdown(training)}"
    return {
        "README.md": {"benchmark": report.markdown(cpu, cases=False)},
        "docs/benchmarks.md": {
            "cpu": report.markdown(cpu),
            "cpu-zen4": report.markdown(zen4, cases=False),
        },
        "docs/results.md": {"accuracy": accuracy_tables.markdown(accuracy), "training": step},
    }


def filled(page: str, contents: dict[str, str]) -> str:
    """The page with each text between its markers; ValueError if a pair of these is missing."""
    for name, content in contents.items():
        start, end = (f"<!-- {name} table: {edge} -->" for edge in ("start", "end"))
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(f"the page lacks {start} and {end}, or has them twice")
        before, rest = page.split(start)
        page = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    for path, contents in tables().items():
        (ROOT / path).write_text(filled((ROOT / path).read_text(), contents))
