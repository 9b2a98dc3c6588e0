"""The tables of bench_accuracy.py, made from what results.json holds."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from report import measured, row_of
from scipy.stats import t as student_t

ROLES = ("students", "ensemble", "fused")


def spread(values: list[float | None]) -> str:
    """``mean ± standard deviation``, or a dash where there is nothing."""
    found = [v for v in values if v is not None]
    return f"{mean(found):.2f} ± {stdev(found):.2f}" if len(found) > 1 else "-"


def difference(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """``mean difference ± standard error`` over the seeds, of the students at the last epoch; a
    star where 95 % of Student's t leave zero out."""
    pairs = zip(rows, baseline, strict=True)
    differences = [a["last_students"] - b["last_students"] for a, b in pairs]
    error = stdev(differences) / len(differences) ** 0.5
    surely = abs(mean(differences)) > student_t.ppf(0.975, len(differences) - 1) * error
    return f"{mean(differences):+.2f} ± {error:.2f}{' *' if surely else ''}"


def select(result: dict[str, Any], labels: int, method: str) -> list[dict[str, Any]]:
    """The rows of one configuration, seed by seed."""
    wanted = (labels, method)
    return [r for r in result["rows"] if (r["labels_per_class"], r["method"]) == wanted]


def markdown(result: dict[str, Any]) -> str:
    """Every table of a result, with what it takes to read them."""
    options, images = result["options"], result["rows"][0]["test_images"]
    lines = [
        f"{measured(result['environment'])}. Percent of {images} test images, mean ± standard "
        f"deviation over {len(options['seeds'])} seeds; differences are taken seed by seed, mean ± "
        "standard error, with a star where 95 % of Student's t leave zero out (of comparisons "
        "without a true difference, one in twenty gets a star by chance). The validation images "
        "chose the best epoch; nothing chose the last."
    ]
    for labels in options["labels"]:
        lines += ["", f"**{labels} labels per class**, {options['epochs'][str(labels)]} epochs", ""]
        head = ["method", "students, last epoch", "against `ce`", "against `mfef`"]
        head += ["students, best epoch", "ensemble, last", "fused, last", "moved since 7/8"]
        lines += [row_of(head), row_of(["---"] + ["---:"] * 7)]
        for method in options["methods"]:
            rows = select(result, labels, method)
            keys = ("last_students", "best_students", "last_ensemble", "last_fused")
            last, best, ensemble, fused = (spread([r[key] for r in rows]) for key in keys)
            moved = mean(r["last_students"] - r["earlier_students"] for r in rows)
            paired = ["", ""]
            if method != "ce":
                paired[0] = difference(rows, select(result, labels, "ce"))
            if method.startswith("mfef --"):
                paired[1] = difference(rows, select(result, labels, "mfef"))
            cells = [f"`{method}`", last, *paired, best, ensemble, fused, f"{moved:+.2f}"]
            lines.append(row_of(cells))
    return "\n".join(lines)
