"""How results look: JSON, CSV, a table for the terminal, one in Markdown, and a plot.

Everything here is made from what results.json holds, so an old file gives the same table again.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timing
import torch

import mfef_ext

Json = dict[str, Any]
SCHEMA = 1
# Other processes may take this share of the cores while a run still counts as undisturbed.
QUIET = 0.05
# One block of a table: the rows that share these.
BLOCK = ("suite", "dtype", "direction")


# --- where it ran -----------------------------------------------------------------------------


def environment(device: str) -> Json:
    """Machine, versions, commit. No host name and no folders."""
    info: Json = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(timing.memory_bytes() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mfef_ext": mfef_ext.__version__,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
    try:
        built = mfef_ext.build_info()
    except (NotImplementedError, ImportError):
        built = {}
    info["build"] = {k: v for k, v in built.items() if os.sep not in str(v)}
    return info | {
        "isa": next((built[k] for k in ("isa_used", "isa", "cpu_isa") if k in built), None)
    }


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def git(*arguments: str) -> str:
    """What git says about this checkout, or "" outside of one."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# --- the result as a whole --------------------------------------------------------------------


def assemble(env: Json, figures: Json, options: Json, rows: list[Json]) -> Json:
    """The content of results.json. Contestants, ratios and checks are in ``cases``."""
    shown = ("suite", "dtype", "direction", "backend", "quick", "seconds", "no_compile")
    return {
        "benchmark": "bench_fusion",
        "schema": SCHEMA,
        "environment": env,
        "options": {k: options[k] for k in shown},
        "figures": figures,
        "summary": summarise(rows),
        "cases": rows,
    }


def busy(env: Json) -> str:
    """A warning when other processes took part of the cores while cases were timed, or "".

    It matters more than a longer time: an implementation with many parallel regions, as eager
    PyTorch, waits for its slowest thread in each, so a busy machine flatters the fused one.
    """
    share = env["share_of_others"]
    if share is None or share <= QUIET:
        return ""
    return (
        f"other processes took {percent(share)} of the cores while this was timed: threads waited "
        "for them, times are too long and the ratios are not to be relied on"
    )


def blocks(rows: list[Json]) -> Iterator[tuple[tuple[str, ...], list[Json]]]:
    """The rows suite by suite, dtype by dtype, direction by direction, in order."""
    found: dict[tuple[str, ...], list[Json]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in BLOCK), []).append(row)
    yield from found.items()


def summarise(rows: list[Json]) -> list[Json]:
    """Geometric means of the ratios per block and candidate, and the smallest ratio."""
    summary = []
    for key, block in blocks(rows):
        names = dict.fromkeys(n for row in block for n in row.get("ratios", {}))
        for name in names:
            timed = [row for row in block if name in row.get("ratios", {})]
            entry: Json = dict(zip(BLOCK, key, strict=True))
            entry |= {"candidate": name, "cases": len(timed), "of": len(block)}
            for short, against in (("eager", "eager contiguous"), ("fastest", "fastest")):
                medians = [row["ratios"][name][against]["median"] for row in timed]
                entry[f"against_{short}"] = timing.geometric_mean(medians)
                entry[f"smallest_against_{short}"] = min(medians)
            entry["all_baselines_ran"] = all(row["all_baselines_ran"] for row in timed)
            summary.append(entry)
    return summary


def read_json(path: Path) -> Json:
    """A results.json; ValueError in a sentence if it is something else."""
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(result, dict) or result.get("benchmark") != "bench_fusion":
        raise ValueError("not a result of bench_fusion.py")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"written with schema {result.get('schema')}, this reads {SCHEMA}")
    return result


def write(result: Json, folder: Path) -> str:
    """Writes results.json, results.csv and plot.png; says so in a line."""
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    write_csv(result, folder / "results.csv")
    files = "results.json, results.csv"
    try:
        import matplotlib
    except ImportError:
        return f"{files} written to {folder}; plot left out: matplotlib is not installed"
    matplotlib.use("Agg")
    if not plot(result, folder / "plot.png"):
        return f"{files} written to {folder}; plot left out: no candidate was timed"
    return f"{files}, plot.png written to {folder}"


def write_csv(result: Json, path: Path) -> None:
    """One line per case and contestant; each line says where it ran."""
    env = result["environment"]
    machine = ("date", "cpu", "cores", "memory_gib", "gpu", "device", "threads", "isa")
    versions = ("share_of_others", "torch", "python", "mfef_ext", "commit", "dirty")
    shape = ("suite", "shape", "groups", "dtype", "direction")
    timed = ("kind", "status", "reason", "rounds", "median", "p20", "p80")
    fractions = ("naive_of_peak", "real_of_peak", "bytes_of_copy")
    work = ("naive_ops", "real_ops", "bytes_floor")
    ratio = [f"{a}_{p}" for a in ("eager", "fastest") for p in ("median", "p20", "p80")]
    extra = [*ratio, "fastest_baseline", "all_baselines_ran", "saved_bytes", "fma_peak", "copy"]
    columns = [*shape, "contestant", *timed, *work, *fractions, *extra, *machine, *versions]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in result["cases"]:
            shared = {k: env[k] for k in (*machine, *versions)}
            shared |= {k: row[k] for k in (*shape, *work)}
            shared["groups"] = "-".join(map(str, row["groups"]))
            shared["all_baselines_ran"] = row.get("all_baselines_ran")
            shared["fma_peak"] = result["figures"]["fma_peak"][row["dtype"]]["per_second"]
            shared["copy"] = result["figures"]["copy_bandwidth"]["per_second"]
            # A case that did not run has no contestants, but it has a line.
            contestants = row["contestants"] or {"": {"status": row["status"]}}
            for name, entry in contestants.items():
                line = shared | {"contestant": name, "reason": row["reason"]} | entry
                ratios = row.get("ratios", {}).get(name, {})
                for label, against in (("eager", "eager contiguous"), ("fastest", "fastest")):
                    for p, value in ratios.get(against, {}).items():
                        line[f"{label}_{p}"] = value  # "fastest" has the baseline's name too
                kept = row.get("saved", {}).get(name.removesuffix(" contiguous"))
                line["saved_bytes"] = kept["saved"] if kept else None
                writer.writerow(line)


# --- for people -------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; "-" for nothing."""
    if value is None:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def threads(env: Json) -> str:
    return f"{env['threads']} thread{'' if env['threads'] == 1 else 's'}"


def measured(env: Json) -> str:
    """When, where and with what, the beginning of a sentence."""
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    dirty = " with uncommitted changes" if env["dirty"] else ""
    return (
        f"Measured on {env['date'][:10]} on {where}, {threads(env)}, torch {env['torch']}, "
        f"mfef_ext {env['mfef_ext']}, commit {env['commit'][:12]}{dirty}"
    )


def heading(env: Json, figures: Json) -> str:
    """Where this runs, in a few lines."""
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores, {env['memory_gib']} GiB"
    lines = [
        f"{where}; {threads(env)}; ISA used: {env['isa'] or 'not known'}",
        f"torch {env['torch']}, mfef_ext {env['mfef_ext']}, commit {env['commit'][:12]}"
        + (" with uncommitted changes" if env["dirty"] else "")
        + f", {env['date']}",
    ]
    for dtype, peak in figures["fma_peak"].items():
        if peak["per_second"] is None:
            lines.append(f"FMA peak: {peak['how']}")
            break
        lines.append(
            f"FMA peak for {dtype}: {peak['per_second'] / 1e9:.0f} GFLOP/s ({peak['how']})"
        )
    copy = figures["copy_bandwidth"]
    lines.append(f"copy bandwidth: {copy['per_second'] / 1e9:.1f} GB/s ({copy['how']})")
    return "\n".join(lines)


def milliseconds(row: Json, name: str) -> str:
    entry = row["contestants"].get(name, {})
    if entry.get("status") == "timed":
        return number(1e3 * entry["median"])
    return "failed" if entry.get("status") == "failed" else "-"


def case_candidates(row: Json) -> list[str]:
    """Backends that took part in a case, wrong ones included."""
    names = [
        entry.get("backend", name)
        for name, entry in row["contestants"].items()
        if entry["kind"] == "candidate"
    ]
    return list(dict.fromkeys(names))


def progress_line(row: Json) -> str:
    """One case in one line, as soon as it is done."""
    name = f"{row['suite']} {row['shape']} {row['dtype']} {row['direction']}"
    if row["status"] != "timed":
        return f"{name}: {row['status']}: {row['reason']}"
    parts = [f"eager {milliseconds(row, 'eager contiguous')} ms"]
    for backend in case_candidates(row):
        key = f"{backend} contiguous"
        if key in row["ratios"]:
            ratio = row["ratios"][key]["eager contiguous"]["median"]
            parts.append(f"{backend} {milliseconds(row, key)} ms, {number(ratio)}x")
    if row["reason"]:
        parts.append(row["reason"])
    return f"{name}: " + "; ".join(parts)


def candidate_cells(row: Json, backend: str) -> list[str]:
    """The cells of one backend in the terminal table, CANDIDATE_HEAD's columns."""
    key = f"{backend} contiguous"
    if key not in row.get("ratios", {}):
        verdict = row["contestants"].get(backend, {}).get("status", row["status"])
        return [backend, verdict] + ["-"] * (len(CANDIDATE_HEAD) - 2)
    entry, ratio = row["contestants"][key], row["ratios"][key]
    other = row["contestants"][f"{backend} channels_last"]
    eager, fastest = ratio["eager contiguous"], ratio["fastest"]
    kept = row.get("saved", {})
    held = kept[backend]["saved"] / kept["eager"]["saved"] if backend in kept else None
    return [
        backend,
        number(1e3 * entry["median"]),
        f"{number(1e3 * entry['p20'])}-{number(1e3 * entry['p80'])}",
        number(1e3 * other["median"]),
        number(eager["median"]),
        f"{number(eager['p20'])}-{number(eager['p80'])}",
        number(fastest["median"]) + ("" if row["all_baselines_ran"] else "*"),
        percent(entry["naive_of_peak"]),
        percent(entry["real_of_peak"]),
        percent(entry["bytes_of_copy"]),
        percent(held),
    ]


CANDIDATE_HEAD = [
    "candidate",
    "ms",
    "p20-p80",
    "cl ms",
    "x eager",
    "p20-p80",
    "x fastest",
    "naive",
    "real",
    "bytes",
    "held",
]
LEGEND = """\
eager, compile: baselines, milliseconds, medians; cl: channels_last. ms, cl ms: the candidate, contiguous and channels_last.
x eager: eager contiguous / candidate. x fastest: fastest baseline that ran / candidate; * not every baseline ran.
naive, real: of the FMA peak, counting all taps or those inside the map. bytes: floor of bytes, of the copy bandwidth.
held: bytes kept for backward besides x and parameters, of eager's."""  # noqa: E501


def align(rows: list[list[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def baseline_names(rows: list[Json]) -> list[str]:
    names = (n for r in rows for n, e in r["contestants"].items() if e["kind"] == "baseline")
    return list(dict.fromkeys(names))


def column_title(baseline: str) -> str:
    return baseline.replace(" contiguous", "").replace("channels_last", "cl")


def text(result: Json) -> str:
    """The table for the terminal."""
    lines = ["", heading(result["environment"], result["figures"]), "", LEGEND]
    for key, block in blocks(result["cases"]):
        baselines = baseline_names(block)
        if not baselines:
            continue  # none of its cases ran: the notes below say so
        rows = [["", *map(column_title, baselines), *CANDIDATE_HEAD]]
        for row in block:
            times = [milliseconds(row, name) for name in baselines]
            for backend in case_candidates(row) or ["none"]:
                rows.append([row["shape"], *times, *candidate_cells(row, backend)])
        lines += ["", ", ".join(key), *align(rows)]
        for entry in result["summary"]:
            if tuple(entry[k] for k in BLOCK) == key:
                star = "" if entry["all_baselines_ran"] else "*"
                lines.append(
                    f"  geometric mean, {entry['candidate']}: {number(entry['against_eager'])}x "
                    f"eager contiguous, {number(entry['against_fastest'])}x{star} the fastest "
                    f"baseline (smallest {number(entry['smallest_against_fastest'])}x{star}); "
                    f"{entry['cases']} of {entry['of']} cases"
                )
    lines += ["", *notes(result)]
    return "\n".join(lines)


def notes(result: Json) -> list[str]:
    """What is wrong, what did not run and why, and how much was checked."""
    warning = busy(result["environment"])
    lines = [f"note: {warning}"] if warning else []
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in result["cases"]:
        case = f"{row['suite']} {row['shape']} {row['dtype']} {row['direction']}"
        if row["status"] == "WRONG":
            lines.append(f"WRONG: {case}: {row['reason']}")
        elif row["status"] == "not run":
            left_out.setdefault(("case", row["reason"]), []).append(case)
        for name, entry in row["contestants"].items():
            if entry["status"] == "failed":
                lines.append(f"failed: {name}: {case}: {entry['reason']}")
            elif entry["status"] == "not run":
                left_out.setdefault((name, entry["reason"]), []).append(case)
    for (what, reason), cases in left_out.items():
        some = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        lines.append(f"not run: {what}: {reason} ({len(cases)} of {len(result['cases'])}: {some})")
    checks = [c for row in result["cases"] for c in row["checks"].values()]
    right = [c for c in checks if c["status"] == "right"]
    if right:
        fewest = min(right, key=lambda c: c["images"] / c["of"])
        worst = max(c["error_of_allowed"] for c in right)
        lines.append(
            f"checked: {len(right)} of {len(checks)} candidates right, largest error "
            f"{percent(worst)} of the allowed one; whole batches ran, float64 took some of their "
            f"images, at least {fewest['images']} of {fewest['of']}"
        )
    return lines


def markdown(result: Json, cases: bool = True) -> str:
    """Where a run was made, its geometric means and its cases, for README.md and docs."""
    env, options = result["environment"], result["options"]
    lines = [f"{measured(env)}.", "", *markdown_summary(result["summary"])]
    if cases:
        lines += ["", *markdown_cases(result["cases"])]
    if not all(row.get("all_baselines_ran", True) for row in result["cases"]):
        reasons = "; ".join(dict.fromkeys(missing_reasons(result["cases"])))
        lines += ["", f"\\* Of the baselines that ran; not run: {reasons}."]
    if busy(env):
        lines += ["", f"Note: {busy(env)}."]
    if options["quick"]:
        lines += ["", "A quick run: one shape per suite."]
    return "\n".join(lines)


def times(ratio: float, all_baselines_ran: bool = True) -> str:
    """A ratio; with a star if not every baseline ran."""
    return f"{number(ratio)}x" + ("" if all_baselines_ran else "\\*")


def markdown_summary(summary: list[Json]) -> list[str]:
    """Geometric means of the candidates in contiguous layout, the dtypes side by side."""
    found: dict[tuple, dict[str, Json]] = {}
    for entry in summary:
        backend, layout = entry["candidate"].rsplit(" ", 1)
        if layout == "contiguous":
            block = (entry["suite"], entry["direction"], backend)
            found.setdefault(block, {})[entry["dtype"]] = entry
    dtypes = list(dict.fromkeys(dtype for by_dtype in found.values() for dtype in by_dtype))
    head = ["suite", "direction", "backend"]
    for dtype in dtypes:
        head += [f"{dtype}: against eager", "vs. fastest baseline: geomean (worst case)"]
    lines = [row_of(head), row_of(["---"] * 3 + ["---:"] * 2 * len(dtypes))]
    for block, by_dtype in found.items():
        cells = list(block)
        for dtype in dtypes:
            if dtype in by_dtype:
                entry = by_dtype[dtype]
                fastest = times(entry["against_fastest"], entry["all_baselines_ran"])
                smallest = f"({number(entry['smallest_against_fastest'])}x)"
                cells += [times(entry["against_eager"]), f"{fastest} {smallest}"]
            else:
                cells += ["-", "-"]
        lines.append(row_of(cells))
    return lines


def markdown_cases(rows: list[Json]) -> list[str]:
    """A line per shape, dtype and backend with both directions."""
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    head = ["suite", "shape", "dtype", "backend"]
    for direction in directions:
        head += [f"{direction}, ms", "against eager", "against the fastest"]
    lines = [row_of(head), row_of(["---"] * 4 + ["---:"] * 3 * len(directions))]
    found: dict[tuple, dict[str, Json]] = {}
    for row in rows:
        for backend in case_candidates(row):
            line = (row["suite"], row["shape"], row["dtype"], backend)
            found.setdefault(line, {})[row["direction"]] = row
    for line, by_direction in found.items():
        cells = list(line)
        for direction in directions:
            case = by_direction.get(direction)
            cells += markdown_cells(case, line[-1]) if case else ["-"] * 3
        lines.append(row_of(cells))
    return lines


def missing_reasons(rows: list[Json]) -> Iterator[str]:
    for row in rows:
        for name, entry in row["contestants"].items():
            if entry["kind"] == "baseline" and entry["status"] != "timed":
                yield f"{name}, {entry['reason']}"


def markdown_cells(row: Json, backend: str) -> list[str]:
    """Milliseconds, the ratio to eager, and that to the fastest baseline with its spread."""
    key = f"{backend} contiguous"
    if key not in row.get("ratios", {}):
        status = row["contestants"].get(backend, {}).get("status", row["status"])
        return [status, "-", "-"]
    eager, fastest = (row["ratios"][key][k] for k in ("eager contiguous", "fastest"))
    spread = f"({number(fastest['p20'])}-{number(fastest['p80'])})"
    ratio = times(fastest["median"], row["all_baselines_ran"])
    return [milliseconds(row, key), times(eager["median"]), f"{ratio} {spread}"]


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# --- the plot ---------------------------------------------------------------------------------

AGAINST = (("eager contiguous", "against eager contiguous", "#4477aa"),
           ("fastest", "against the fastest baseline", "#ee8866"))  # fmt: skip


def plot(result: Json, path: Path) -> bool:
    """Bars of the ratios, a panel per dtype, direction and backend; False if there are none."""
    import matplotlib.pyplot as plt

    timed = [row for row in result["cases"] if row.get("ratios")]
    panels: dict[tuple[str, str, str], dict[str, Json]] = {}
    for row in timed:
        label = f"{row['suite']}  {row['shape']}"
        for backend in case_candidates(row):
            if f"{backend} contiguous" in row["ratios"]:
                panel = panels.setdefault((backend, row["dtype"], row["direction"]), {})
                panel[label] = row
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    # A line is as high as the panel with the most cases in it.
    cases = [len(rows) for rows in panels.values()]
    heights = [max(cases[i : i + columns]) for i in range(0, len(cases), columns)]
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3 + 6.5 * columns, 1.6 + 0.9 * lines + 0.36 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((backend, dtype, direction), rows) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(axis, rows, backend)
        axis.set_title(f"{backend}: {dtype}, {direction}", fontsize=10)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("times as fast (log axis); whiskers: 20th to 80th percentile", fontsize=8)
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    env = result["environment"]
    figure.suptitle(
        f"mfef_block: {env['gpu'] or env['cpu']}, {threads(env)}, torch {env['torch']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_panel(axis: Any, rows: dict[str, Json], backend: str) -> None:
    """Two bars per case. They grow from 1, so that slower than the baseline points left."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for offset, (against, label, color) in zip((-0.2, 0.2), AGAINST, strict=True):
        at, middle, low, high = [], [], [], []
        for i, row in enumerate(rows.values()):
            ratio = row["ratios"][f"{backend} contiguous"][against]
            at.append(i + offset)
            middle.append(ratio["median"])
            low.append(ratio["median"] - ratio["p20"])
            high.append(ratio["p80"] - ratio["median"])
        widths = [m - 1 for m in middle]
        axis.barh(at, widths, height=0.38, left=1, color=color, label=label)
        axis.errorbar(
            middle, at, xerr=[low, high], fmt="none", ecolor="#222222", elinewidth=1, capsize=2
        )
        for y, m, h in zip(at, middle, high, strict=True):
            axis.annotate(
                number(m, 2), (max(m + h, 1), y), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=6.5,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.axvline(1, color="black", linewidth=1)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelsize=8)
