"""Several processes train as one does, stop together, and only the first one writes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mfef_ext.train import UsageError, checkpoint
from mfef_ext.train.__main__ import main
from mfef_ext.train.processes import synchronise_batch_norm

# 230 training images: 49 do not divide by two, nor do the last 34 by four.
QUICK = (
    "--dataset",
    "fake",
    "--epochs",
    "2",
    "--threads",
    "1",
    "--batch-size",
    "49",
    "--lr",
    ".01",
)
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")

# Runs main() in every process, and leaves each one's exit status in a file. PLANT changes something
# in the process of rank 1 first.
SCRIPT = """
import os, sys
from pathlib import Path
import torch
from mfef_ext.train import data, loop
from mfef_ext.train.__main__ import main
rank = os.environ["RANK"]
folder = Path(sys.argv.pop(1))
batches, seen = data.training_batches, []
def planted(*arguments, **options):
    for x, y in batches(*arguments, **options):
        seen.append(y)
        if rank == "1" and len(seen) == 3:
            PLANT
        yield x, y
loop.data.training_batches = planted
status = main(sys.argv[1:])
(folder / f"status{rank}").write_text(str(status))
"""


def launch(tmp_path, options, plant="pass"):
    """The exit statuses of both processes, and what they printed to standard error."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("PLANT", plant))
    command = [*LAUNCH, "--standalone", str(script), str(tmp_path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    return [int((tmp_path / f"status{rank}").read_text()) for rank in (0, 1)], done.stderr


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "mfef"),
        ("--method", "kdcl", "--variant", "general"),
        ("--method", "okddip", "--students", "resnet8", "resnet8", "resnet8"),
    ],
    ids=lambda options: options[1],
)
def test_two_processes_agree_with_one(options, tmp_path):
    assert main([*QUICK, *options, "--out", str(tmp_path / "one")]) == 0
    status, _ = launch(tmp_path, [*QUICK, *options, "--out", str(tmp_path / "two")])
    assert status == [0, 0]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [list(row) for row in one] == [list(row) for row in two]
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            if "/" not in name or name.startswith(("ce", "kd")):
                # The gradients' roundings differ, and every step makes more of that.
                assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ce", "mfef"])
def test_a_process_without_an_image(tmp_path, method):
    # 230 images: the last batch is one, so that the second process has none of it.
    options = [*QUICK, "--batch-size", "229", "--method", method, "--out"]
    assert main([*options, str(tmp_path / "one")]) == 0
    assert launch(tmp_path, [*options, str(tmp_path / "two")])[0] == [0, 0]
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    status, error = launch(tmp_path, [*options, str(tmp_path / "local"), "--no-sync-batch-norm"])
    assert status == [2, 2] and "--batch-size=229 with --accumulate=1 makes parts of 0" in error


@pytest.mark.slow
def test_a_nan_in_one_process_stops_both(tmp_path):
    out = tmp_path / "run"
    options = [*QUICK, "--method", "ce", "--no-sync-batch-norm", "--out", str(out)]
    status, error = launch(tmp_path, options, "x[0][0, 0, 0, 0] = float('nan')")
    assert status == [5, 5]
    assert error.count("mfef: stopped: epoch 1, step 3: the loss term ce/student0 is nan") == 1
    assert checkpoint.load(out / "last.ckpt")["epoch"] == 0


@pytest.mark.slow
def test_a_process_that_dies_stops_the_other(tmp_path):
    out = tmp_path / "run"
    die = "(folder / 'status1').write_text('9'); os._exit(0)"
    status, error = launch(tmp_path, [*QUICK, "--method", "ce", "--out", str(out)], die)
    assert status == [75, 9] and "mfef: stopped: another process ended" in error
    assert "Traceback" not in error and checkpoint.load(out / "last.ckpt")["step"] == 0


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path):
    (tmp_path / "file").touch()
    for options, words in (
        (["--out", str(tmp_path / "file")], "cannot be written"),
        (["--epochs", "0"], "--epochs=0 must be from 1 to 1000000"),
    ):
        status, error = launch(tmp_path, [*QUICK, *options])
        assert status == [2, 2] and error.count("mfef: ") == error.count(words) == 1


@pytest.mark.slow
def test_stopped_together_and_resumed(tmp_path, capsys):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = [*QUICK, "--method", "dml"]
    assert launch(tmp_path, [*options, "--out", str(straight)])[0] == [0, 0]
    options += ["--out", str(broken), "--resume", "auto"]
    stop = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    status, error = launch(tmp_path, options, stop)
    assert status == [75, 75]
    assert error.count("mfef: stopped: another process was stopped in epoch 1, after step 3") == 1
    assert main(options) == 2
    assert "was begun with 2 processes, not 1; resume it with torchrun" in capsys.readouterr().err
    assert launch(tmp_path, options)[0] == [0, 0]
    for name in ("metrics.jsonl", "student0.safetensors", "student1.safetensors"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes(), name


def test_one_gpu_for_two_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--device", "cuda:1"]) == 2
    assert (
        "--device=cuda:1 is one GPU for 2 processes; use --device cuda" in capsys.readouterr().err
    )


def test_processes_that_torchrun_did_not_start(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*QUICK, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE=2 processes do not meet" in error and "torchrun" in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_batch_norm_of_another_kind_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match=r"1 is a Own, which .* --no-sync-batch-norm"):
        synchronise_batch_norm(nn.Sequential(nn.Conv2d(1, 2, 3), Own(2)), torch.device("cpu"))
