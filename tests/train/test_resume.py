"""A run that was stopped anywhere and resumed ends, bit for bit, as one that was not."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from mfef_ext.distill import METHODS
from mfef_ext.train import checkpoint
from mfef_ext.train.__main__ import main
from mfef_ext.train.display import Display

# 120 images: five steps an epoch.
QUICK = ("--dataset", "fake", "--epochs", "3", "--threads", "1", "--batch-size", "24")
QUICK += ("--labels-per-class", "12")
RESULTS = ("metrics.jsonl", "metrics.csv", "student0.safetensors", "student1.safetensors")
STEPS = 15  # of all three epochs


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Half of the time of so short a run goes into them, and nobody looks at them here."""
    monkeypatch.setattr("mfef_ext.train.report.draw_curves", lambda run, path: None)
    monkeypatch.setattr("mfef_ext.train.report.draw_gates", lambda run, path: False)


class KilledError(BaseException):
    """In place of the process: nothing catches it, nothing is written after it."""


def contents(path):
    return {name: (path / name).read_bytes() for name in RESULTS}


def interrupt(monkeypatch, at_step, act):
    """Calls ``act`` once, after the ``at_step``-th training step from now."""
    seen = []

    def step(self, epoch, step, steps, loss):
        seen.append(step)
        if len(seen) == at_step:
            act()

    monkeypatch.setattr(Display, "step", step)


def kill():
    raise KilledError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "run"
    options = ("--method", "ce", "--students", "resnet8", "--epochs", "1", "--out", str(path))
    assert main([*QUICK, *options]) == 0
    return path / "student0.safetensors"


def options_of(method, teacher):
    options = ["--method", method]
    if method in ("kd", "mimic", "ab"):
        options += ["--teacher", str(teacher)]
    if method == "okddip":
        options += ["--students", "resnet8", "resnet8", "resnet8"]
    if method == "kdcl":
        options += ["--variant", "general"]
    return options


# Averages, and a scale that counts its steps; float16 is slow here.
MIXED = ("--amp", "fp16", "--ema", "0.9", "--labels-per-class", "2", "--batch-size", "4")


@pytest.mark.parametrize(
    ("method", "options"), [*((m, ()) for m in sorted(METHODS)), ("ce", MIXED)]
)
def test_killed_and_asked_to_stop(method, options, teacher, tmp_path, monkeypatch):
    command = [*QUICK, *options_of(method, teacher), *options]
    assert main([*command, "--out", str(tmp_path / "straight")]) == 0
    out = ["--out", str(tmp_path / "broken"), "--resume", "auto"]
    draw = random.Random(method)
    with monkeypatch.context() as patch:
        interrupt(patch, draw.randint(1, STEPS - 1), kill)
        with pytest.raises(KilledError):
            main([*command, *out])
    with monkeypatch.context() as patch:
        interrupt(patch, draw.randint(1, 4), lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*command, *out]) == 75
    assert main([*command, *out]) == 0
    assert contents(tmp_path / "straight") == contents(tmp_path / "broken")
    a, b = (checkpoint.load(tmp_path / n / "best.ckpt") for n in ("straight", "broken"))
    assert a["epoch"] == b["epoch"] and a["metrics"] == b["metrics"]
    a, b = (checkpoint.load(tmp_path / n / "last.ckpt") for n in ("straight", "broken"))
    assert a["scaler"] == b["scaler"] and bool(a["scaler"]) == bool(options)
    for tensors in ("distiller", "average"):
        torch.testing.assert_close(a[tensors], b[tensors], rtol=0, atol=0)
    momentum, theirs = a["optimizer"]["state"], b["optimizer"]["state"]
    torch.testing.assert_close(momentum, theirs, rtol=0, atol=0)


LONGER = [*QUICK, "--epochs", "12", "--method", "ce"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of twelve epochs that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main([*LONGER, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_from_outside(straight, tmp_path, number):
    """A process of its own is hit at a random moment, and this one goes on with its run."""
    out = tmp_path / "broken"
    options = [*LONGER, "--out", str(out), "--resume", "auto"]
    command = [sys.executable, "-m", "mfef_ext.train", *options]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        deadline = time.monotonic() + 90
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert not list(out.glob("student*"))
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and error == ""
    else:
        assert process.returncode == 75 and len(error.splitlines()) == 1
        assert f"stopped: {signal.Signals(number).name} in epoch" in error
        assert f"--out {out} --resume auto" in error
        state = checkpoint.load(out / "last.ckpt")
        assert state["epoch"] == len((out / "metrics.jsonl").read_text().splitlines()) >= 1
        assert not list(out.glob("*.writing"))
    assert main(options) == 0
    assert contents(straight) == contents(out)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """The folder of a run that was killed in its third epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 12, kill)
        with pytest.raises(KilledError):
            main([*QUICK, "--method", "ce", "--out", str(out)])
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def resume(out, *options):
    return main([*QUICK, "--method", "ce", "--out", str(out), "--resume", "auto", *options])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped, tmp_path, capsys):
    assert main([*QUICK, "--method", "ce", "--out", str(tmp_path / "straight")]) == 0
    flip(stopped / "last.ckpt")
    capsys.readouterr()
    assert resume(stopped) == 0
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said and "Going on from the one before" in said
    assert "going on after epoch 1, step 0" in said
    assert contents(tmp_path / "straight") == contents(stopped)


@pytest.mark.parametrize("damage", ["emptied", "replaced", "cut", "removed"])
def test_no_checkpoint_is_intact(stopped, capsys, damage):
    for name in ("last.ckpt", "previous.ckpt"):
        whole = (stopped / name).read_bytes()
        left = {"emptied": b"", "replaced": b"garbage", "cut": whole[: len(whole) // 2]}
        (stopped / name).unlink()
        if damage in left:
            (stopped / name).write_bytes(left[damage])
    before = sorted(p.name for p in stopped.iterdir())
    capsys.readouterr()
    assert resume(stopped) == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "last.ckpt" in error
    assert sorted(p.name for p in stopped.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "0.2"], "--lr=0.2 is not what the run in .* was begun with .--lr=0.1."),
        (["--epochs", "9"], "--epochs=9 is not"),
        (["--students", "resnet8"], "--students="),
        (["--method", "dml"], "--method=dml is not"),
        (["--seed", "3"], "--seed=3"),
        (["--no-sync-batch-norm"], "--no-sync-batch-norm is not .* .--sync-batch-norm."),
    ],
)
def test_other_options_are_refused(stopped, capsys, options, words):
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    capsys.readouterr()
    assert resume(stopped, *options) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_a_finished_run_has_nothing_left_to_do(tmp_path, capsys):
    out = tmp_path / "run"
    assert resume(out) == 0  # there is nothing yet: it begins
    first = contents(out)
    assert resume(out) == 0
    assert contents(out) == first
    assert json.loads((out / "summary.json").read_text())["images_per_second"] > 0


def test_a_checkpoint_of_something_else(stopped, capsys):
    state = checkpoint.load(stopped / "last.ckpt")
    state["distiller"].popitem()
    checkpoint.save(stopped / "last.ckpt", state)
    capsys.readouterr()
    assert resume(stopped) == 4
    assert "does not fit the run" in capsys.readouterr().err


def test_resume_needs_a_folder(capsys):
    assert main([*QUICK, "--resume", "auto"]) == 2
    assert "--resume auto needs --out" in capsys.readouterr().err


@pytest.mark.parametrize("left", [".writable", "last.ckpt.writing", "config.json.writing"])
def test_killed_before_the_first_checkpoint(tmp_path, left, monkeypatch):
    """The same command begins, or goes on, whatever of the beginning there is."""
    out = tmp_path / "run"
    whole = checkpoint.os.replace

    def replace(source, *target):
        if source.name == left:
            raise KilledError
        whole(source, *target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", replace)
        if left == ".writable":
            patch.setattr(type(out), "unlink", lambda path: kill())
        with pytest.raises(KilledError):
            resume(out, "--epochs", "1")
    assert (out / left).exists()
    assert resume(out, "--epochs", "1") == 0
    assert not (out / left).exists()
    assert json.loads((out / "config.json").read_text())["method"] == "ce"


def test_seeds_leave_a_single_run_alone(stopped, capsys):
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert resume(stopped, "--seeds", "0", "1") == 2
    assert "holds a run that was begun without --seeds" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before
