"""Several processes train as one does, stop together, and only the first one writes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mfef_ext.train import UsageError, checkpoint
from mfef_ext.train.__main__ import main
from mfef_ext.train.processes import Processes, synchronise_batch_norm
from tests.children import Child

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
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")

# Runs main() in every process, once per list of options, and leaves each one's exit statuses in a
# file. PLANT changes something in the process of rank 1 before its third step; there is no resnet14
# in that process.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from mfef_ext.train import UsageError, __main__ as entry, data, loop, processes, run
from mfef_ext.train.__main__ import main
leave, processes.leave = processes.leave, lambda: None  # they meet once
rank = os.environ["RANK"]
folder = Path(sys.argv[1])
build = run.build_students
def built(names, *arguments):
    if rank == "1" and "resnet14" in names:
        raise UsageError("only here")
    return build(names, *arguments)
run.build_students = built
parsed = entry._parsed
def another_version(argv, alone):
    config = parsed(argv, alone)
    torch.__version__ = "0.1" if rank == "1" and config.accumulate == 3 else version
    return config
version, entry._parsed = torch.__version__, another_version
batches, seen = data.training_batches, []
def planted(*arguments, **options):
    for x, y in batches(*arguments, **options):
        seen.append(y)
        if rank == "1" and len(seen) == 3:
            PLANT
        yield x, y
loop.data.training_batches = planted
mine = int(rank)  # "a|b" is a in the first process and b in the second
status = [
    main([option.split("|")[mine if "|" in option else 0] for option in options])
    for options in json.loads(sys.argv[2])
]
(folder / f"status{rank}").write_text(json.dumps(status))
leave()
os._exit(0)  # torch sometimes aborts when an interpreter that trained many times ends
"""


def launch(tmp_path, *options, plant="pass"):
    """The exit statuses of both processes, in turn for each list of options, and what they printed
    to standard error."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("PLANT", plant))
    command = [str(script), str(tmp_path), json.dumps(options)]
    if plant == "pass":
        both = [subprocess.run([*LAUNCH, *command], capture_output=True, text=True, timeout=600)]
        error = both[0].stderr
    else:  # what torchrun sets
        meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [meet | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        both = [Child(*command, env=os.environ | rank) for rank in ranks]
        error = "".join([child.wait()[1] for child in both])
    assert [child.returncode for child in both] == [0] * len(both), error
    statuses = [json.loads((tmp_path / f"status{rank}").read_text()) for rank in (0, 1)]
    return [list(pair) for pair in zip(*statuses, strict=True)], error


def refuse(*arguments, **options):
    raise RuntimeError("no GPU")


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


AGREE = {
    "mfef": [*QUICK, "--method", "mfef"],
    "kdcl": [*QUICK, "--method", "kdcl", "--variant", "general"],
    "okddip": [*QUICK, "--method", "okddip", "--students", "resnet8", "resnet8", "resnet8"],
    # 230 images: the last batch is one, so that the second process has none of it.
    "ce of one image": [*QUICK, "--batch-size", "229", "--method", "ce"],
    "mfef of one image": [*QUICK, "--batch-size", "229", "--method", "mfef"],
}
STRAIGHT = [*QUICK, "--method", "dml"]
IMAGES = ("--dataset", "folder", "--image-size", "8", "--batch-size", "4", "--validation", "0")
# What is wrong, the exit status, and what is said of it.
WRONG = {
    "a file": (["--out", "{folder}/file"], 2, "--out={folder}/file cannot be written"),
    "epochs": (["--epochs", "0"], 2, "--epochs=0 must be from 1 to 1000000"),
    "parts": (
        ["--batch-size", "229", "--no-sync-batch-norm"],
        2,
        "--batch-size=229 with --accumulate=1 makes parts of 0",
    ),
    "batch": (["--batch-size", "999"], 2, "--batch-size=999 is more than the 230 training images"),
    "backend": (["--backend", "cuda"], 2, "--backend=cuda does not work here: "),
    "peers": (["--method", "dml", "--students", "resnet8"], 2, "needs at least two students"),
    "teacher": (["--method", "kd", "--teacher", "no"], 4, "no cannot be read"),
    "data": (["--dataset", "cifar10", "--data-dir", "no"], 3, "no/cifar-10-batches-py"),
    "damaged": (["--out", "{folder}/damaged", "--resume", "auto"], 4, "is no mfef checkpoint"),
    "alone": (
        ["--method", "ce", "--students", "resnet14", "--out", "{folder}/alone"],
        2,
        "mfef: only here",
    ),
    # What is wrong in the second process alone, or is not the same in both.
    "option here": (["--epochs", "2|x"], 2, "--epochs: invalid"),
    "value here": (["--batch-size", "49|0"], 2, "--batch-size=0 must be at least 1"),
    "device here": (
        ["--device", "cpu|cuda"],
        2,
        "do not agree in --device: cpu in rank 0 and cuda",
    ),
    "file here": (["--config", "{folder}/file|{folder}/no"], 2, "holds no options; write one"),
    "rate": (["--lr", "0.01|0.02"], 2, "do not agree in --lr: 0.01 in rank 0 and 0.02 in rank 1"),
    "seeds": (["--seeds", "0", "1|2"], 2, "do not agree in --seeds: (0, 1) in rank 0 and (0, 2)"),
    "count": (
        [*IMAGES, "--data-dir", "{folder}/images|{folder}/fewer"],
        2,
        "do not agree in the data's number of images for train: 16 in rank 0 and 15 in rank 1",
    ),
    "pixels": (
        [*IMAGES, "--data-dir", "{folder}/images|{folder}/others"],
        2,
        "do not agree in the data's mean: ",
    ),
    "teacher here": (
        [
            "--method",
            "kd",
            "--teacher",
            "{folder}/mfef/student0.safetensors|{folder}/mfef/student1.safetensors",
        ],
        2,
        "do not agree in the --teacher: ",
    ),
    "code": (["--method", "ce", "--accumulate", "3"], 2, "do not agree in the version of torch: "),
    "resumed": (
        ["--method", "mfef", "--no-fusion", "--out", "{folder}/mfef", "--resume", "auto"],
        2,
        "--no-fusion is not what the run in {folder}/mfef was begun with (--fusion)",
    ),
}


def draw_images(path, seed, images):
    """Two classes of pictures, of the second as many as ``images``."""
    rng = np.random.default_rng(seed)
    for name, count in (("cat", 10), ("dog", images)):
        (path / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "train" / name / f"{i}.png")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Everything above in two processes that were started once: the folder that holds the runs,
    both exit statuses by name, and what was printed to standard error."""
    path = tmp_path_factory.mktemp("two")
    (path / "file").touch()
    (path / "damaged").mkdir()
    (path / "damaged" / "last.ckpt").write_bytes(b"something")
    for name, seed, images in (("images", 0, 10), ("fewer", 0, 9), ("others", 1, 10)):
        draw_images(path / name, seed, images)
    runs = AGREE | {"straight": STRAIGHT}
    commands = {name: [*options, "--out", str(path / name)] for name, options in runs.items()}
    for name, (options, _, _) in WRONG.items():
        commands[name] = [*QUICK, *(option.format(folder=path) for option in options)]
    statuses, error = launch(path, *commands.values())
    return path, dict(zip(commands, statuses, strict=True)), error


@pytest.mark.slow
@pytest.mark.parametrize("name", AGREE)
def test_two_processes_agree_with_one(name, two, tmp_path):
    path, status, _ = two
    assert status[name] == [0, 0]
    assert main([*AGREE[name], "--out", str(tmp_path / "one")]) == 0
    pairs = list(zip(rows(tmp_path / "one"), rows(path / name), strict=True))
    for a, b in pairs:
        assert list(a) == list(b)
        for term, value in a.items():
            if "/" not in term or term.startswith(("ce", "kd")):
                # The gradients' roundings differ, and every step makes more of that.
                assert b[term] == pytest.approx(value, rel=1e-3, abs=1e-6), term
    config = json.loads((path / name / "config.json").read_text())
    assert config["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_once(name, two):
    path, status, error = two
    _, expected, words = WRONG[name]
    assert status[name] == [expected] * 2
    assert error.count(words.format(folder=path)) == 1
    assert error.count("mfef: ") == len(WRONG) and "Traceback" not in error


@pytest.mark.slow
def test_what_is_wrong_in_one_process_leaves_nothing(two):
    assert not (two[0] / "alone").exists()


@pytest.mark.slow
def test_a_nan_in_one_process_stops_both(tmp_path):
    out = tmp_path / "run"
    options = [*QUICK, "--method", "ce", "--no-sync-batch-norm", "--out", str(out)]
    statuses, error = launch(tmp_path, options, plant="x[0][0, 0, 0, 0] = float('nan')")
    assert statuses == [[5, 5]]
    assert error.count("mfef: stopped: epoch 1, step 3: the loss term ce/student0 is nan") == 1
    assert checkpoint.load(out / "last.ckpt")["epoch"] == 0


@pytest.mark.slow
def test_a_process_that_dies_stops_the_other(tmp_path):
    out = tmp_path / "run"
    die = "(folder / 'status1').write_text('[9]'); os._exit(0)"
    statuses, error = launch(tmp_path, [*QUICK, "--method", "ce", "--out", str(out)], plant=die)
    assert statuses == [[75, 9]] and "mfef: stopped: another process ended" in error
    assert "Traceback" not in error and checkpoint.load(out / "last.ckpt")["step"] == 0


@pytest.mark.slow
def test_stopped_together_and_resumed(two, tmp_path, capsys):
    straight, broken = two[0] / "straight", tmp_path / "broken"
    options = [*STRAIGHT, "--out", str(broken), "--resume", "auto"]
    stop = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    # The same command twice: stopped, and gone on with.
    statuses, error = launch(tmp_path, options, options, plant=stop)
    assert statuses == [[75, 75], [0, 0]]
    assert error.count("mfef: stopped: another process was stopped in epoch 1, after step 3") == 1
    for name in ("metrics.jsonl", "student0.safetensors", "student1.safetensors"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes(), name
    assert main(options) == 2
    assert "was begun with 2 processes, not 1; resume it with torchrun" in capsys.readouterr().err


def test_one_gpu_for_two_processes_is_refused():
    with pytest.raises(
        UsageError, match="--device=cuda:1 is one GPU for 2 processes; use --device"
    ):
        Processes(0, 2, torch.device("cpu")).on("cuda:1")


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("torch.empty", refuse)
    assert main(["--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error == "mfef: --device=cuda cannot be used (no GPU); use --device cpu\n"


@pytest.fixture
def listener():
    """A port on which somebody else listens, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc in the environment is no number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment is no number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 in the environment is no number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "7"}, "RANK=7 must be below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK=one in the environment is no number"),
        ({"RANK": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK=first in the environment is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 processes do not meet at ?:?"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "do not meet at 127.0.0.1:?"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "127.0.0.1:x"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"}, "do not meet"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free"},
            "says RANK=1",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "busy"}, "on a free port"),
    ],
)
def test_processes_that_do_not_meet(variables, words, monkeypatch, capsys, tmp_path, listener):
    """An environment that cannot be, somebody who never comes, a port that others use."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("busy", listener).replace("free", free_port()))
    began = time.monotonic()
    assert main([*QUICK, "--out", str(tmp_path / "run"), "--timeout", "2"]) == 2
    assert time.monotonic() - began < 20
    error = capsys.readouterr().err
    assert words in error and "torchrun" in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_what_is_wrong_here_is_said_even_if_nobody_else_comes(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", free_port())
    assert main([*QUICK, "--epochs", "x", "--timeout=2"]) == 2
    error = capsys.readouterr().err
    assert "--epochs" in error and len(error.splitlines()) == 1


def started(folder, port, *options, rank):
    """A process that looks for another one."""
    variables = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = os.environ | variables
    return Child("-m", "mfef_ext.train", *QUICK, *options, env=env, cwd=folder)


def test_a_port_on_which_somebody_else_listens(tmp_path, listener):
    process = started(tmp_path, listener, "--timeout", "1", rank="1")
    _, error = process.wait(timeout=60)
    assert process.returncode == 2 and "says RANK=1 (somebody is there, but says nothing)" in error


def test_sigterm_while_waiting_for_another_process(tmp_path):
    port = free_port()
    process = started(tmp_path, port, rank="0")
    while True:  # until it waits
        assert process.returncode is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.wait(timeout=60)
    assert process.returncode == 75
    assert "mfef: stopped at once by SIGTERM" in error and "Traceback" not in error


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_a_batch_norm_of_another_kind_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UsageError, match=r"1 is an Own, which .* --no-sync-batch-norm"):
        synchronise_batch_norm(
            nn.Sequential(nn.Conv2d(1, 2, 3), Own(2)), Processes(0, 2, torch.device("cpu"))
        )
