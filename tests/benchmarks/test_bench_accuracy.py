"""The benchmark of accuracies: what it says is what the trainer measured, and no more."""

import csv
import json

import accuracy_tables
import bench_accuracy
import pytest

from mfef_ext.train.config import TrainConfig


def test_rows_are_the_trainers_and_a_finished_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    methods = ["ce", "dml", "mfef", "mfef --no-channel-attention"]
    options = ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    options += ["--methods", *methods]
    assert bench_accuracy.main(options) == 0
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    combinations = [(method, seed) for method in methods for seed in (0, 1)]
    assert [(row["method"], row["seed"]) for row in result["rows"]] == combinations
    assert all(f"| `{method}` |" in table for method in methods)
    for row in result["rows"]:
        folder = tmp_path / "runs" / f"10-{row['method'].replace(' --', '-')}-seed{row['seed']}"
        [epoch] = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        for role in ("students", "ensemble", "fused"):
            assert row[f"last_{role}"] == row[f"best_{role}"] == epoch.get(f"test/{role}")
        config = json.loads((folder / "config.json").read_text())
        assert config["labels_per_class"] == 10 and config["seed"] == row["seed"]
        assert config["validation"] == 0.1 and config["students"] == ["resnet8", "resnet8"]
        assert config["channel_attention"] is ("--no-channel-attention" not in row["method"])
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["last_students"] for line in lines] == [
        str(row["last_students"]) for row in result["rows"]
    ]

    def refuse(*arguments):
        raise AssertionError("an epoch was trained again")

    monkeypatch.setattr("mfef_ext.train.loop.Training.one_epoch", refuse)
    assert bench_accuracy.main(options) == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == result["rows"]


def test_methods_are_what_their_names_say():
    for name, options in bench_accuracy.METHODS.items():
        config = TrainConfig(**options)
        config.check()
        assert config.method == name.split()[0]
        for part in ("multi_scale", "channel_attention", "spatial_attention", "fusion"):
            assert getattr(config, part) is (f"--no-{part.replace('_', '-')}" not in name)


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([91.0, 72.0, 83.0], "+2.00 ± 0.58"),  # 3.46 standard errors; 4.30 would be needed
        ([92.0, 71.0, 83.0], "+2.00 ± 0.58"),  # seed by seed: the order matters
        ([92.0, 72.1, 81.9], "+2.00 ± 0.06 *"),
        ([88.0, 67.9, 78.1], "-2.00 ± 0.06 *"),
    ],
)
def test_differences_are_taken_seed_by_seed(accuracies, said):
    rows, baseline = (
        [{"last_students": value} for value in values]
        for values in (accuracies, [90.0, 70.0, 80.0])
    )
    assert accuracy_tables.difference(rows, baseline) == said


def test_spread_is_the_samples_and_absent_where_nothing_was_measured():
    assert accuracy_tables.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert accuracy_tables.spread([None, None, None]) == "-"
