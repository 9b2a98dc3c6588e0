"""The run as a whole: options, checks, files, exit status."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import bench_fusion
import pytest
import report
import suites
import torch

from mfef_ext import reference

SCRIPT = Path(bench_fusion.__file__)
# One small case; one thread, because threads wait for each other on a machine that is busy.
SMALL = ["--quick", "--suite", "edge", "--dtype", "float32", "--threads", "1", "--device", "cpu"]
REFERENCE = [*SMALL, "--backend", "reference", "--no-compile"]
CASE = suites.Case("edge", 1, 64, 8, (1, 4, 8, 16), "float32", suites.BOTH)


@pytest.fixture(autouse=True)
def one_thread_and_torch_left_as_it_was():
    import torch._inductor.config as inductor

    threads, compiler_threads = torch.get_num_threads(), inductor.cpp.threads
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    inductor.cpp.threads = compiler_threads


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    figure = {"per_second": 1e10, "how": "made up"}
    monkeypatch.setattr(bench_fusion.timing, "copy_bandwidth", lambda *a: figure)
    monkeypatch.setattr(bench_fusion.timing, "fma_peak", lambda *a: figure)


def run(arguments: list[str]) -> int:
    """The exit status, whether argparse or the script itself ends the run."""
    try:
        return bench_fusion.main(arguments)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


# --- the files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run of one shape in both directions as a user starts it, and what it printed."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("bench") / "run"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *REFERENCE, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_json_has_all_fields(finished):
    result = report.read_json(finished[0] / "results.json")
    env = result["environment"]
    for key in ("cpu", "cores", "threads", "torch", "mfef_ext", "commit", "dirty", "isa", "date"):
        assert key in env
    assert env["threads"] == 1
    assert result["figures"]["copy_bandwidth"]["per_second"] > 0
    assert len(result["figures"]["copy_bandwidth"]["readings"]) == 2
    assert [row["direction"] for row in result["cases"]] == ["forward", "forward+backward"]
    for row in result["cases"]:
        assert row["status"] == "timed"
        assert row["checks"]["reference"]["status"] == "right"
        assert 0 < row["real_ops"] < row["naive_ops"]
        assert row["bytes_floor"] > 0
        for name in ("reference", "eager"):
            for layout in suites.LAYOUTS:
                entry = row["contestants"][f"{name} {layout}"]
                assert entry["status"] == "timed" and entry["rounds"] >= 3
                assert 0 < entry["p20"] <= entry["median"] <= entry["p80"]
                assert entry["bytes_of_copy"] > 0
        for layout in suites.LAYOUTS:
            left_out = row["contestants"][f"compile {layout}"]
            assert left_out["status"] == "not run" and "--no-compile" in left_out["reason"]
        assert not row["all_baselines_ran"]
        ratios = row["ratios"]["reference contiguous"]
        baselines = {k: v for k, v in ratios.items() if k != "fastest"}
        fastest = ratios["fastest"]
        assert fastest["median"] == min(r["median"] for r in baselines.values()) > 0
        assert fastest == baselines[fastest["baseline"]] | {"baseline": fastest["baseline"]}
    kept = result["cases"][1]["saved"]
    assert kept["reference"] == kept["eager"]
    assert kept["eager"]["saved"] > kept["eager"]["input"] > 0
    assert len(result["summary"]) == 4  # two directions, two layouts


def test_nothing_names_the_machine_or_its_folders(finished):
    import platform

    for name in ("results.json", "results.csv"):
        text = (finished[0] / name).read_text()
        assert str(SCRIPT.parents[1]) not in text
        assert str(finished[0].parent) not in text
        assert len(platform.node()) < 4 or platform.node() not in text


def test_csv_has_a_line_per_case_and_contestant(finished):
    with (finished[0] / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 6
    ours = [line for line in lines if line["contestant"] == "reference contiguous"]
    assert len(ours) == 2
    for line in ours:
        assert line["kind"] == "candidate" and line["status"] == "timed"
        for column in ("median", "p20", "p80", "eager_median", "fastest_p80", "bytes_of_copy"):
            assert float(line[column]) > 0
        assert line["fastest_baseline"].startswith("eager ")
        for column in ("cpu", "torch", "mfef_ext", "threads", "commit", "dirty", "date", "groups"):
            assert line[column]
    assert float(ours[1]["saved_bytes"]) > 0
    assert all(len(line) == len(lines[0]) and None not in line for line in lines)


def test_plot_is_a_picture(finished):
    assert (finished[0] / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_terminal_table_and_markdown_come_from_the_json(finished, capsys):
    folder, printed = finished
    result = report.read_json(folder / "results.json")
    assert report.text(result) in printed
    assert run(["--table", str(folder / "results.json")]) == 0
    table = capsys.readouterr().out
    mean = report.number(result["summary"][0]["against_eager"])
    assert f"| edge | forward | reference | {mean}x |" in table
    assert "| 1x64x8x8 |" in table
    assert "--no-compile" in table  # the asterisk is explained


def test_a_disturbed_run_says_so(finished):
    result = report.read_json(finished[0] / "results.json")
    result["environment"]["share_of_others"] = 0.4
    for shown in (report.text(result), report.markdown(result)):
        assert "other processes took 40% of the cores" in shown
    result["environment"]["share_of_others"] = 0.01
    assert "other processes" not in report.text(result) + report.markdown(result)


def test_a_panel_shows_the_cases_that_ran(finished, tmp_path, monkeypatch):
    result = report.read_json(finished[0] / "results.json")
    forward, both = result["cases"]
    result["cases"] = [forward, both, forward | {"shape": "another"}]
    drawn, draw_panel = [], report.draw_panel
    monkeypatch.setattr(
        report, "draw_panel", lambda axis, *rest: drawn.append(axis) or draw_panel(axis, *rest)
    )
    assert report.plot(result, tmp_path / "plot.png")
    labels = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in drawn]
    assert labels == [["edge  1x64x8x8", "edge  another"], ["edge  1x64x8x8"]]


def test_without_matplotlib_the_plot_is_left_out_and_said(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = report.write(report.read_json(finished[0] / "results.json"), tmp_path)
    assert "plot left out: matplotlib is not installed" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.json"]


# --- wrong numbers ----------------------------------------------------------------------------


def scaled(*arguments):
    return reference.mfef_block(*arguments) * 1.001


def wrong_gradient(x, *rest):
    return reference.mfef_block(x + 0.01 * (x - x.detach()), *rest)


def wrong_weight_gradient(x, weights, *rest):
    last = weights[3] + 0.01 * (weights[3] - weights[3].detach())
    return reference.mfef_block(x, [*weights[:3], last], *rest)


def wrong_bias_gradient(x, weights, groups, fc1_weight, fc1_bias, *rest):
    """Of the few elements whose error is judged by the median draw."""
    fc1_bias = fc1_bias * 1.0
    if fc1_bias.requires_grad:
        fc1_bias.register_hook(lambda grad: grad * (1 + 1e-4))
    return reference.mfef_block(x, weights, groups, fc1_weight, fc1_bias, *rest)


def not_a_number(*arguments):
    out = reference.mfef_block(*arguments)
    return torch.where(torch.arange(out.shape[-1]) == 3, torch.nan, out)


def wrong_in_channels_last(x, *rest):
    factor = 1.0 if x.is_contiguous() else 1.01
    return reference.mfef_block(x, *rest) * factor


def of_another_dtype(*arguments):
    return reference.mfef_block(*arguments).double()


def raises(*arguments):
    raise RuntimeError("the kernel refused")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (scaled, "output"),
        (wrong_gradient, "gradient of x"),
        (wrong_weight_gradient, "gradient of conv_weights[3]"),
        (wrong_bias_gradient, "gradient of fc1_bias"),
        (not_a_number, "output"),
        (wrong_in_channels_last, "channels_last: output"),
        (of_another_dtype, "dtype"),
        (raises, "the kernel refused"),
    ],
)
def test_wrong_candidates_are_found(function, reason, monkeypatch):
    monkeypatch.setattr(bench_fusion, "candidate_function", lambda backend: function)
    verdict = bench_fusion.check(CASE, "cpu", "cpu")
    assert verdict["status"] == "WRONG"
    assert reason in verdict["reason"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 20])
def test_the_reference_is_right(dtype, batch):
    case = suites.Case("edge", batch, 64, 8, (1, 4, 8, 16), dtype, suites.BOTH)
    verdict = bench_fusion.check(case, "reference", "cpu")
    assert verdict["status"] == "right", verdict
    assert verdict["error_of_allowed"] <= 0.5 + 1e-9


def judged(pairs, few):
    draws = [
        bench_fusion.Draw({"t": eager}, {("contiguous", "t"): ours}, {"t": 1.0}, few)
        for ours, eager in pairs
    ]
    return bench_fusion.judge(draws)


def test_a_lucky_draw_of_eager_does_not_decide_about_few_elements():
    lucky, usual = (9.0, 0.5), (4.0, 4.0)
    assert judged([lucky], {"t"}).few_alone
    assert judged([lucky, usual, usual], {"t"}).reason == ""
    assert "4.5 times" in judged([lucky, lucky, usual], {"t"}).reason
    many = judged([lucky], set())
    assert many.reason and not many.few_alone
    assert judged([lucky, usual], set()).worst == 1.0  # the largest of both sides


def test_images_that_float64_does_not_see_must_be_finite(monkeypatch):
    def broken(*arguments):
        out = reference.mfef_block(*arguments).clone()
        out[1] = torch.inf
        return out

    monkeypatch.setattr(bench_fusion, "CHECK_OPS", 1.0)  # float64 sees the first image only
    monkeypatch.setattr(bench_fusion, "candidate_function", lambda backend: broken)
    case = suites.Case("edge", 3, 64, 8, (1, 4, 8, 16), "float32", suites.FORWARD)
    assert bench_fusion.check_images(case).tolist() == [0]
    assert "not finite" in bench_fusion.check(case, "cpu", "cpu")["reason"]


def test_images_with_ties_are_told_apart():
    case = suites.Case("edge", 3, 64, 8, (1, 4, 8, 16), "float32", suites.FORWARD)
    exact = suites.make_operands(case, "cpu").to(torch.float64)
    with torch.no_grad():
        exact.x[1] = 1.0  # inside the map every pixel of a channel has the same value
    assert bench_fusion.images_without_ties(exact).tolist()[1] is False
    assert bench_fusion.images_without_ties(exact).sum() >= 1


def test_a_wrong_case_is_not_timed_and_the_exit_status_is_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_fusion, "candidate_function", lambda backend: scaled)
    status = run([*REFERENCE, "--direction", "forward", "--out", str(tmp_path / "out")])
    assert status == 1
    printed = capsys.readouterr().out
    assert "WRONG: edge 1x64x8x8 float32 forward: reference: contiguous: output is off" in printed
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = result["cases"]
    assert row["status"] == "WRONG"
    assert row["contestants"].keys() == {"reference"}
    assert "median" not in row["contestants"]["reference"]
    assert result["summary"] == []
    assert "WRONG" in (tmp_path / "out" / "results.csv").read_text()


# --- what does not run ------------------------------------------------------------------------


def options(*extra: str):
    parsed = bench_fusion.parser().parse_args([*SMALL, "--backend", "reference", *extra])
    return parsed


def test_a_compile_failure_is_reported():
    compiled = {(CASE, layout): "failed: InductorError: no compiler" for layout in suites.LAYOUTS}
    row = bench_fusion.run_case(CASE, options(), bench_fusion.Budget(2), 1, compiled)
    assert row["contestants"]["compile contiguous"] == {
        "kind": "baseline",
        "layout": "contiguous",
        "status": "failed",
        "reason": "InductorError: no compiler",
    }
    assert row["contestants"]["eager contiguous"]["status"] == "timed"
    assert not row["all_baselines_ran"]


def test_a_compile_failure_while_loading_is_reported(monkeypatch):
    def fails(*arguments):
        raise RuntimeError(f"{Path.cwd()}/kernel.cpp: no such file\nsecond line")

    monkeypatch.setattr(bench_fusion, "compiled_step", lambda *a: fails)
    compiled = dict.fromkeys([(CASE, layout) for layout in suites.LAYOUTS], "")
    row = bench_fusion.run_case(CASE, options(), bench_fusion.Budget(2), 1, compiled)
    entry = row["contestants"]["compile channels_last"]
    assert entry["status"] == "failed"
    assert entry["reason"] == "RuntimeError: kernel.cpp: no such file"


def test_compiling_ahead_reports_instead_of_raising(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no compiler")

    job = (CASE, "contiguous", "cpu", 1)
    assert bench_fusion.compile_ahead((*job, time.time() - 1))[2] == "budget"
    monkeypatch.setattr(bench_fusion, "compiled_step", fails)
    assert bench_fusion.compile_ahead((*job, time.time() + 60))[2] == (
        "failed: RuntimeError: no compiler"
    )


def test_cases_after_the_budget_are_reported():
    row = bench_fusion.run_case(CASE, options(), bench_fusion.Budget(-1), 1, {})
    assert row["status"] == "not run" and "time budget" in row["reason"]
    assert "not run: the time budget" in report.progress_line(row)


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "papers"], "invalid choice: 'papers'"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--direction", "sideways"], "invalid choice: 'sideways'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--backend", "fpga"], "invalid choice: 'fpga'"),
        (["--threads", "two"], "invalid int value: 'two'"),
        (["--shape", "9x9x9x9"], "--shape 9x9x9x9 is no case of what is selected; there are "),
        (
            ["--suite", "edge", "--shape", "128x64x8x8"],
            "there are 1x64x8x8, 1x256x14x14, 1x64x56x56",
        ),
        (["--threads", "0"], "--threads 0 must be from 1 to 1024"),
        (["--seconds", "-3"], "--seconds -3.0 must be at least 1"),
        (["--device", "cpu", "--backend", "cuda"], "--backend cuda cannot run here: "),
        (["--table", "nowhere.json"], "--table nowhere.json: "),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_options_give_a_sentence_and_status_2(arguments, sentence, capsys):
    assert run(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys):
    assert run(["--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_an_out_folder_that_will_not_do(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run([*REFERENCE, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be made" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("precious")
    assert run([*REFERENCE, "--out", str(tmp_path)]) == 2
    assert "holds results.json of another run" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "precious"


@pytest.mark.parametrize("content", ["not json", "{}", '{"benchmark": "bench_fusion"}', "[]"])
def test_a_table_of_something_else(content, tmp_path, capsys):
    (tmp_path / "other.json").write_text(content)
    assert run(["--table", str(tmp_path / "other.json")]) == 2
    assert "other.json: " in capsys.readouterr().err
