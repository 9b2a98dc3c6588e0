"""Runs side by side: who is grouped with whom, and the numbers by hand."""

import json

import pytest

from mfef_ext import cli

CONFIG = {
    "method": "mfef",
    "dataset": "digits",
    "students": ["resnet8", "resnet8"],
    "fusion": True,
    "temperature": 3.0,
    "lr": 0.1,
    "threads": 1,
    "versions": {"mfef_ext": "0.1.0", "torch": "2.15.0"},
}


def run(path, seed, last, best=None, chosen_on="validation", **config):
    """A finished run's two files. last, best: test accuracies by role."""
    path.mkdir(parents=True)
    content = CONFIG | {"seed": seed, "out": str(path)} | config
    (path / "config.json").write_text(json.dumps(content))
    summary = {"last_test_accuracy": last, "best_test_accuracy": best or last}
    summary |= {"best_chosen_on": chosen_on, "last_epoch": 3, "best_epoch": 2}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def table(capsys, *paths):
    assert cli.main(["table", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in rows], out


def test_seeds_are_one_row_per_role(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0, "fused": 98.0}, {"students": 97.5, "fused": 98.0})
    run(tmp_path / "b", 1, {"students": 98.0, "fused": 98.0}, {"students": 97.5, "fused": 99.0})
    run(tmp_path / "c", 7, {"students": 99.0, "fused": 98.0}, {"students": 99.0, "fused": 98.0})
    rows, out = table(capsys, *(tmp_path / name for name in "abc"))
    assert rows[0] == (
        [
            "method",
            "dataset",
            "students",
            "seeds",
            "role",
            "last epoch, %",
            "best epoch, %",
            "best on",
        ]
    )
    assert rows[1] == ["---"] * 5 + ["---:"] * 2 + ["---"]
    same = ["mfef", "digits", "resnet8 resnet8", "0 1 7"]
    assert rows[2:] == [
        [*same, "mean of the students", "98.00 ± 1.00", "98.00 ± 0.87", "validation"],
        [*same, "fused", "98.00 ± 0.00", "98.33 ± 0.58", "validation"],
    ]
    assert "n - 1" in out and "flatters" not in out


def test_other_configurations_are_told_apart_by_what_differs(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0})
    run(tmp_path / "b", 1, {"students": 98.0}, threads=2, tensorboard=True)
    run(tmp_path / "c", 0, {"students": 96.0}, fusion=False)
    # Another temperature goes with another method; another learning rate is to be seen.
    ce = {"method": "ce", "chosen_on": "test", "temperature": None}
    run(tmp_path / "d", 0, {"students": 95.0}, **ce)
    rows, out = table(capsys, tmp_path)  # a folder of runs
    assert rows[0][3:5] == ["fusion", "seeds"]
    assert [[*row[:1], *row[3:5], row[6]] for row in rows[2:]] == [
        ["mfef", "True", "0 1", "97.50 ± 0.71"],
        ["mfef", "False", "0", "96.00"],
        ["ce", "True", "0", "95.00"],
    ]
    assert [row[-1] for row in rows[2:]] == ["validation", "validation", "test"]
    assert "that column flatters" in out


def test_what_methods_share_is_shown_where_it_differs(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0})
    run(tmp_path / "b", 0, {"students": 98.0}, method="ce", temperature=None, lr=0.05)
    rows, _ = table(capsys, tmp_path)
    assert rows[0][:5] == ["method", "dataset", "students", "lr", "seeds"]
    assert [row[3] for row in rows[2:]] == ["0.1", "0.05"]


def test_an_option_that_only_one_knows_is_a_difference(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0})
    run(tmp_path / "b", 1, {"students": 98.0}, ema="a|b")
    rows, _ = table(capsys, tmp_path / "a", tmp_path / "b")
    assert rows[0][3] == "ema" and [row[3] for row in rows[2:]] == ["", "a\\|b"]


def test_runs_without_an_end_are_named(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0})
    (run(tmp_path / "b", 1, {"students": 98.0}) / "summary.json").unlink()
    rows, out = table(capsys, tmp_path)
    assert len(rows) == 3 and rows[2][3] == "0"
    assert f"Left out, as they have not come to their end: {tmp_path / 'b'}." in out


def test_a_run_given_twice_counts_once(tmp_path, capsys):
    a = run(tmp_path / "a", 0, {"students": 97.0})
    assert table(capsys, a, a, tmp_path)[0][2][3] == "0"


def test_a_table_of_a_real_run(trained, capsys):
    rows, _ = table(capsys, trained)
    roles = ["student0", "student1", "mean of the students", "ensemble", "fused"]
    assert [row[4] for row in rows[2:]] == roles
    last = json.loads((trained / "summary.json").read_text())["last_test_accuracy"]
    assert [row[5] for row in rows[2:]] == [f"{value:.2f}" for value in last.values()]


def refused(capsys, status, words, *paths):
    assert cli.main(["table", *map(str, paths)]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and len(captured.err.splitlines()) == 1


def test_refused_in_one_sentence(tmp_path, capsys):
    a = run(tmp_path / "a", 0, {"students": 97.0})
    b = run(tmp_path / "b", 0, {"students": 97.0})
    refused(capsys, 2, f"{a} and {b} are the same configuration with the same seed", a, b)
    refused(capsys, 2, f"{tmp_path / 'none'} is no run folder", tmp_path / "none")
    (b / "summary.json").write_text('{"last_test_accuracy": {"stu')
    refused(capsys, 4, f"{b / 'summary.json'} cannot be read", a, b)
    (b / "summary.json").write_text("[]")
    refused(capsys, 4, f"{b / 'summary.json'} says nothing of best_chosen_on", b)
    (b / "summary.json").unlink()
    refused(capsys, 2, f"{b} has not come to its end", b)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config", {"seed": "x"}),
        ("config", {"seed": -1}),
        ("config", {"students": 3}),
        ("config", {"method": ["mfef"]}),
        ("config", {"data": 3}),
        ("config", {"data": {"sha256": {"test": "x"}}}),
        ("summary", {"last_test_accuracy": [97.0]}),
        ("summary", {"last_test_accuracy": {"students": "97"}}),
        ("summary", {"best_test_accuracy": {"ensemble": 97.0}}),
        ("summary", {"best_test_accuracy": {"students": float("nan")}}),
        ("summary", {"best_chosen_on": None}),
    ],
)
def test_files_whose_content_cannot_be_are_refused(tmp_path, capsys, file, changes):
    a = run(tmp_path / "a", 0, {"students": 97.0})
    content = json.loads((a / f"{file}.json").read_text())
    (a / f"{file}.json").write_text(json.dumps(content | changes))
    refused(capsys, 4, f"{a} is no run of mfef train (", a)


@pytest.mark.parametrize("content", ["3", "null", "[" * 10**5])
def test_json_of_something_else_is_refused(tmp_path, capsys, content):
    a = run(tmp_path / "a", 0, {"students": 97.0})
    (a / "config.json").write_text(content)
    refused(capsys, 4, "cannot be read", a)


def test_numbers_have_sensible_digits_and_are_compared_in_full(tmp_path, capsys):
    run(tmp_path / "a", 0, {"students": 97.0}, ramp_epochs=4 / 15, lr_drops=[0.5, 0.75])
    run(tmp_path / "b", 0, {"students": 98.0}, ramp_epochs=4 / 15 + 1e-9, lr_drops=[2 / 3])
    run(tmp_path / "c", 1, {"students": 99.0}, ramp_epochs=4 / 15, lr_drops=[0.5, 0.75])
    rows, _ = table(capsys, tmp_path)
    assert rows[0][3:6] == ["ramp_epochs", "lr_drops", "seeds"]
    assert [row[3:6] for row in rows[2:]] == [
        ["0.266667", "0.5 0.75", "0 1"],
        ["0.266667", "0.666667", "0"],
    ]
