"""A run that was stopped anywhere and resumed ends, bit for bit, as one that was not."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from mfef_ext.distill import METHODS
from mfef_ext.train import checkpoint
from mfef_ext.train.__main__ import main
from mfef_ext.train.display import Display

QUICK = ("--dataset", "fake", "--epochs", "3", "--threads", "1", "--batch-size", "48")
RESULTS = ("metrics.jsonl", "metrics.csv", "student0.safetensors", "student1.safetensors")
STEPS = 15  # of all three epochs: 230 images each


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_killed_and_asked_to_stop(method, teacher, tmp_path, monkeypatch):
    command = [*QUICK, *options_of(method, teacher)]
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_from_outside(tmp_path, number):
    """The same with a process of its own, ten times as long, hit at a random moment."""
    command = [sys.executable, "-m", "mfef_ext.train", *QUICK, "--epochs", "12", "--method", "ce"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run([*command, "--out", straight], check=True, **quiet)
    command += ["--out", broken, "--resume", "auto"]
    process = subprocess.Popen(command, **quiet)
    try:
        deadline = time.monotonic() + 90
        while not (broken / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        process.send_signal(number)
        process.wait(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (75, -signal.SIGKILL)
    subprocess.run(command, check=True, **quiet)
    assert contents(straight) == contents(broken)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that was killed in its third epoch."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 12, kill)
        with pytest.raises(KilledError):
            main([*QUICK, "--method", "ce", "--out", str(out)])
    return out


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


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_no_checkpoint_is_intact(stopped, capsys, content):
    for name in ("last.ckpt", "previous.ckpt"):
        whole = (stopped / name).read_bytes()
        (stopped / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
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
            resume(out)
    assert (out / left).exists()
    assert resume(out) == 0
    assert json.loads((out / "config.json").read_text())["method"] == "ce"


def test_seeds_leave_a_single_run_alone(stopped, capsys):
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert resume(stopped, "--seeds", "0", "1") == 2
    assert "holds a run that was begun without --seeds" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before
