"""Figures on the pages are those of the committed rows."""

import csv
import json
from itertools import product

import pytest
import tables

TABLES = tables.tables()


@pytest.mark.parametrize("path", TABLES)
def test_pages_say_what_the_rows_say(path):
    page = (tables.ROOT / path).read_text()
    assert tables.filled(page, TABLES[path]) == page, "run: python benchmarks/tables.py"


def test_every_run_is_in_the_rows_once():
    folder = tables.ROOT / "benchmarks/results/accuracy"
    result = json.loads((folder / "results.json").read_text())
    options = result["options"]
    assert len(options["seeds"]) >= 5 and not options["quick"]
    found = [(row["labels_per_class"], row["method"], row["seed"]) for row in result["rows"]]
    assert found == list(product(options["labels"], options["methods"], options["seeds"]))
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, result["rows"], strict=True):
        assert line == {k: "" if v is None else str(v) for k, v in row.items()}


def test_a_page_without_its_markers_is_refused():
    start, end = "<!-- speed table: start -->", "<!-- speed table: end -->"
    assert tables.filled(f"a\n{start}\nold\n{end}\nb", {"speed": "new"}) == (
        f"a\n{start}\nnew\n{end}\nb"
    )
    for page in ("", start, f"{start}{end}{end}"):
        with pytest.raises(ValueError, match="lacks"):
            tables.filled(page, {"speed": "new"})
