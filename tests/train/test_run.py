"""A short run from the command's own entry, and what it leaves behind."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mfef_ext.train import checkpoint, data, loop
from mfef_ext.train.__main__ import look, main
from mfef_ext.train.config import TrainConfig
from mfef_ext.train.display import Display
from mfef_ext.train.processes import join

QUICK = ("--dataset", "fake", "--epochs", "2", "--threads", "1", "--batch-size", "48")


def train(path, *options):
    assert main([*QUICK, "--out", str(path), *options]) == 0
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "one")


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_is_complete(run_folder):
    assert sorted(os.listdir(run_folder)) == [
        "best.ckpt",
        "config.json",
        "curves.png",
        "gates.png",
        "last.ckpt",
        "metrics.csv",
        "metrics.jsonl",
        "previous.ckpt",
        "student0.json",
        "student0.safetensors",
        "student1.json",
        "student1.safetensors",
        "summary.json",
        "timings.jsonl",
    ]
    for name in ("curves.png", "gates.png"):
        content = (run_folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_configuration_is_resolved(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert config["ramp_epochs"] == pytest.approx(2 * 80 / 300)
    assert config["threads"] == 1 and config["method"] == "mfef" and config["backend"] is None


def test_csv_says_what_jsonl_says(run_folder):
    rows = metrics(run_folder)
    with open(run_folder / "metrics.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in read] == rows
    terms = [k for k in rows[0] if k.startswith(("ce/", "kd/"))]
    assert len(terms) == 6
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[k] for k in terms))
        pair = (row["test/student0"] + row["test/student1"]) / 2
        assert row["test/students"] == pytest.approx(pair)


def test_same_seed_same_bytes_other_seed_other_bytes(run_folder, tmp_path):
    again, other = train(tmp_path / "a"), train(tmp_path / "b", "--seed", "1")
    for name in ("metrics.jsonl", "metrics.csv", "student0.safetensors", "student1.safetensors"):
        content = (run_folder / name).read_bytes()
        assert content == (again / name).read_bytes(), name
        assert content != (other / name).read_bytes(), name


def test_summary_is_the_rows(run_folder):
    rows, summary = metrics(run_folder), json.loads((run_folder / "summary.json").read_text())
    best = max(row["validation/students"] for row in rows)
    chosen = rows[summary["best_epoch"] - 1]
    assert summary["best_chosen_on"] == "validation" and chosen["validation/students"] == best
    for role, value in summary["best_test_accuracy"].items():
        assert chosen[f"test/{role}"] == value
    assert summary["last_test_accuracy"]["fused"] == rows[-1]["test/fused"]
    assert 0.05 < summary["method_share_of_step"] < 0.95
    assert summary["images_per_second"] > 0
    assert checkpoint.load(run_folder / "best.ckpt")["epoch"] == summary["best_epoch"]


def test_last_checkpoint_holds_everything_and_student_files_nothing_of_the_method(run_folder):
    state = checkpoint.load(run_folder / "last.ckpt")
    assert state["epoch"] == 2 and state["metrics"] == metrics(run_folder)
    assert [g["name"] for g in state["optimizer"]["param_groups"]] == [
        "student0",
        "student1",
        "method",
    ]
    assert any(k.startswith("method.head.fusion") for k in state["distiller"])
    for i in (0, 1):
        weights = load_file(run_folder / f"student{i}.safetensors")
        prefix = f"students.{i}."
        own = {k.removeprefix(prefix): v for k, v in state["distiller"].items() if prefix in k}
        assert set(weights) == set(own)
        assert all(torch.equal(weights[k], own[k]) for k in own)


def test_student_alone_gives_the_same_logits_in_another_process(run_folder, tmp_path):
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from mfef_ext.train import checkpoint, data\n"
        "torch.set_num_threads(1)\n"
        "net, about = checkpoint.load_student(Path(sys.argv[1]))\n"
        "x = data.load(about['dataset'], 0.1).test.x[:32]\n"
        "torch.save(net(x).detach(), sys.argv[2])\n"
    )
    student, result = run_folder / "student1.safetensors", tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", code, str(student), str(result)], check=True)
    config = TrainConfig(dataset="fake", seed=5, out=tmp_path / "unused")
    distiller = loop.prepare(config, join(config.device)).distiller
    distiller.load_state_dict(checkpoint.load(run_folder / "last.ckpt")["distiller"])
    with torch.no_grad():
        expected = distiller.eval()(data.load("fake", 0.1).test.x[:32]).logits["student1"]
    torch.testing.assert_close(torch.load(result, weights_only=True), expected)


def test_ce_trains_the_same_students_without_a_head(run_folder, tmp_path, capsys):
    path = train(tmp_path / "ce", "--method", "ce")
    assert "fused" not in capsys.readouterr().out
    assert not (path / "gates.png").exists()
    state = checkpoint.load(path / "last.ckpt")["distiller"]
    mfef = checkpoint.load(run_folder / "last.ckpt")["distiller"]
    assert set(state) == {k for k in mfef if k.startswith("students.")}


def test_plain_lines_and_table(tmp_path, capsys):
    train(tmp_path / "run", "--validation", "0", "--epochs", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/1  loss ") and "test %: student0 " in lines[0]
    text = " ".join(lines)
    for word in ("student 0 (resnet8)", "mean of the students", "ensemble", "fused", "last epoch"):
        assert word in text
    assert "ON THE TEST SET" in text and "images per second" in text and "% of a step" in text


def test_the_learning_rate_reaches_every_group(tmp_path):
    config = TrainConfig(dataset="fake", epochs=2, lr_drops=(0.5,), out=tmp_path / "run")
    from rich.console import Console

    run = loop.train(config, Display(Console(quiet=True), 2), join(config.device))
    assert [g["name"] for g in run.optimizer.param_groups] == ["student0", "student1", "method"]
    assert [g["lr"] for g in run.optimizer.param_groups] == pytest.approx([0.01] * 3)


def test_numbered_folders_are_never_reused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ce-fake-001").mkdir(parents=True)
    assert main([*QUICK, "--epochs", "1", "--method", "ce"]) == 0
    assert sorted(os.listdir("runs")) == ["ce-fake-001", "ce-fake-002"]
    assert os.listdir("runs/ce-fake-001") == []
    assert "runs/ce-fake-002: " in capsys.readouterr().out


def test_not_finite_names_epoch_step_and_term_and_keeps_the_last_good(tmp_path, capsys):
    path = tmp_path / "run"
    assert main([*QUICK, "--out", str(path), "--lr", "1e30"]) == 5
    error = capsys.readouterr().err
    assert "epoch 1, step " in error and "loss term " in error and f"mfef show {path}" in error
    state = checkpoint.load(path / "last.ckpt")
    assert state["epoch"] == 0
    assert all(t.isfinite().all() for t in state["distiller"].values())


def test_not_finite_in_the_last_update_of_an_epoch_is_seen_before_saving(tmp_path, capsys):
    path = tmp_path / "run"
    # One step per epoch: the loss is still fine when the weights no longer are.
    options = ("--out", str(path), "--lr", "1e38", "--weight-decay", "1e38")
    assert main([*QUICK, *options, "--batch-size", "230", "--method", "ce"]) == 5
    assert "after the last step: students.0." in capsys.readouterr().err
    assert checkpoint.load(path / "last.ckpt")["epoch"] == 0


def test_show(run_folder, tmp_path, capsys):
    assert look("show", path=run_folder) == 0
    out = capsys.readouterr().out
    assert "after 2 of 2 epochs, mfef on fake" in out and "test %: student0 " in out
    damaged = bytearray((run_folder / "last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "last.ckpt").write_bytes(bytes(damaged))
    assert look("show", path=tmp_path) == 4
    assert "is damaged" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    written = []

    def replace(source, target, os_replace=os.replace):
        written.append(target)
        if len(written) == 2:  # the first is the checkpoint before training
            raise OSError(28, "No space left on device")
        os_replace(source, target)

    monkeypatch.setattr("os.replace", replace)
    path = tmp_path / "run"
    assert main([*QUICK, "--out", str(path), "--method", "ce"]) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert checkpoint.load(path / "last.ckpt")["epoch"] == 0
    assert not list(path.glob("*.writing"))


def test_ctrl_c_outside_the_steps_is_not_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "prepare", interrupted)
    assert main([*QUICK, "--out", str(tmp_path / "run")]) == 75
    assert "stopped at once" in capsys.readouterr().err


@pytest.mark.slow
def test_mfef_students_recognise_97_percent_of_held_out_digits(tmp_path):
    assert main(["--epochs", "8", "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["last_test_accuracy"]
    assert min(last["student0"], last["student1"]) >= 97
