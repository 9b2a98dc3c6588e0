"""Puts the tables of committed results between their markers in README.md and docs/results.md.

    python benchmarks/tables.py

A test fails where a page says something else than the rows under benchmarks/results/.
"""

from __future__ import annotations

import json
from pathlib import Path

import accuracy_tables
import bench_training

ROOT = Path(__file__).parents[1]


def tables() -> dict[str, dict[str, str]]:
    """What stands between the markers, by page and marker."""
    accuracy, training = (
        json.loads((ROOT / "benchmarks/results" / name).read_text())
        for name in ("accuracy/results.json", "training/training.json")
    )
    step = bench_training.markdown(training)
    return {
        "docs/results.md": {
            "accuracy": accuracy_tables.markdown(accuracy),
            "training": bench_training.heading(training) + "\n\n" + step,
        },
        "README.md": {"accuracy": accuracy_tables.smallest(accuracy), "training": step},
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
