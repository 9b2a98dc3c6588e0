"""A run that was stopped anywhere and resumed ends, bit for bit, as one that was not."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch

from mfef_ext.distill import METHODS
from mfef_ext.train import checkpoint, data, run_folder
from mfef_ext.train.__main__ import main
from mfef_ext.train.display import Display
from tests.children import Child

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


# Averages, and a scale that counts its steps; float16 is slow here, hence the smallest images.
MIXED = ("--amp", "fp16", "--ema", "0.9", "--labels-per-class", "2", "--batch-size", "4")
MIXED += ("--dataset", "digits")


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
    process = Child("-m", "mfef_ext.train", *options)
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists():
        assert process.returncode is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() / 2)
    process.send_signal(number)
    _, error = process.wait(timeout=30)
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


@pytest.mark.parametrize("name", ["last.ckpt", "previous.ckpt", "best.ckpt"])
def test_a_folder_in_the_place_of_a_checkpoint(stopped, capsys, name):
    """It is said before an epoch is trained that could not be saved."""
    (stopped / name).unlink()
    (stopped / name).mkdir()
    capsys.readouterr()
    assert resume(stopped) == 4
    said = capsys.readouterr()
    assert f"{stopped / name} is a folder" in said.err and len(said.err.splitlines()) == 1
    assert "epoch" not in said.out


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


@pytest.mark.parametrize("unfinished", ["last.ckpt", "config.json"])
def test_killed_before_the_first_checkpoint(tmp_path, unfinished, monkeypatch):
    """The same command begins, or goes on, whatever of the beginning there is."""
    out = tmp_path / "run"
    whole = os.replace

    def replace(source, target):
        if target.name == unfinished:
            raise KilledError
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(KilledError):
            resume(out, "--epochs", "1")
    assert list(out.glob(".*.writing"))
    (out / ".mfef-lock").write_text(
        "process 1 on nowhere"
    )  # as a process that was killed leaves it
    assert resume(out, "--epochs", "1") == 0
    assert not list(out.glob(".*"))
    assert json.loads((out / "config.json").read_text())["method"] == "ce"


def test_seeds_leave_a_single_run_alone(stopped, capsys):
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert resume(stopped, "--seeds", "0", "1") == 2
    assert "holds a run that was begun without --seeds" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def held(folder):
    """A process that holds the folder, and what it says of itself."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mfef_ext.train.run_folder import Place\n"
        "place = Place(Path(sys.argv[1]), '')\n"
        "place.hold() if Path(sys.argv[1]).exists() else place.create()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = Child("-c", code, str(folder))
    assert process.stdout.readline() == "held\n"
    return process, f"is in use by process {process.pid} on "


@pytest.mark.parametrize("options", [(), ("--resume", "auto"), ("--seeds", "0", "1")])
def test_a_folder_is_one_process_s_alone(tmp_path, capsys, options):
    """Whoever comes second is told who was first, until that is dead, whatever it died of."""
    out = tmp_path / "run"
    command = [*QUICK, "--method", "ce", "--epochs", "1", "--out", str(out), *options]
    process, words = held(out)
    try:
        before = sorted(os.listdir(out))
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and " since " in error and len(error.splitlines()) == 1
        assert sorted(os.listdir(out)) == before
    finally:
        process.kill()
    assert main(command) == 0
    assert not (out / ".mfef-lock").exists()


def test_a_folder_that_another_process_made_meanwhile_is_its_own(tmp_path, capsys, monkeypatch):
    """A run that begins while this one reads its data has the folder, and this one has no lock."""
    command = [*QUICK, "--method", "ce", "--epochs", "1", "--out", str(tmp_path / "run")]
    load = data.load

    def load_while_another_runs(*arguments, **options):
        monkeypatch.setattr(data, "load", load)
        assert main(command) == 0
        return load(*arguments, **options)

    monkeypatch.setattr(data, "load", load_while_another_runs)
    assert main([*command, "--resume", "auto"]) == 2
    assert "was made by another process while this one started" in capsys.readouterr().err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_run_of_a_seed_is_one_process_s_alone(tmp_path, capsys):
    out = tmp_path / "runs"
    process, words = held(out / "seed1")
    try:
        command = [*QUICK, "--method", "ce", "--epochs", "1", "--out", str(out)]
        assert main([*command, "--seeds", "0", "1", "--resume", "auto"]) == 2
        assert f"seed1 {words}" in capsys.readouterr().err
    finally:
        process.kill()


def test_of_two_that_begin_together_one_is_refused(tmp_path):
    """Fifty times, each at the same moment."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mfef_ext.train import UsageError\n"
        "from mfef_ext.train.run_folder import Place\n"
        "print('ready', flush=True)\n"
        "began, kept = float(sys.stdin.readline()), []\n"
        "for i in range(50):\n"
        "    time.sleep(max(0, began + i / 100 - time.time()))\n"
        "    place = Place(Path(sys.argv[1]) / str(i), '')\n"
        "    try:\n"
        "        place.create()\n"
        "        kept.append(place)\n"
        "    except UsageError as error:\n"
        "        assert 'is in use by' in str(error)\n"
        "print(*(place.path.name for place in kept), flush=True)\n"
        "sys.stdin.read()\n"
    )
    both = [Child("-c", code, str(tmp_path)) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write(f"{time.time() + 0.2}\n")
        process.stdin.flush()
    won = [process.stdout.readline().split() for process in both]
    for process in both:
        process.wait()
        assert process.returncode == 0
    assert sorted(won[0] + won[1], key=int) == [str(i) for i in range(50)]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, capsys, monkeypatch, number):
    def flock(*arguments):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "run"
    assert resume(out, "--epochs", "1") == 0
    assert f"{out} cannot be locked (No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("victim")])
def test_a_lock_that_is_something_else_is_one_sentence(tmp_path, capsys, plant):
    plant(tmp_path / ".mfef-lock")
    assert resume(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"--out={tmp_path} cannot be written (" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "victim").exists()


PATHS = {"folder": "", "last checkpoint": "last.ckpt"}


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
def test_resume_takes_the_path_of_a_run_or_a_checkpoint(stopped, tmp_path, name):
    """With the run's own options, which need not be given again, but can be."""
    assert main([*QUICK, "--method", "ce", "--out", str(tmp_path / "straight")]) == 0
    options = ["--epochs", "3"] if name else ["--out", str(stopped)]
    assert main(["--resume", str(stopped / name), *options]) == 0
    assert contents(tmp_path / "straight") == contents(stopped)
    assert not list(stopped.glob(".*"))


def test_a_checkpoint_can_be_gone_on_from_in_a_new_folder(stopped, tmp_path, capsys):
    assert main([*QUICK, "--method", "ce", "--out", str(tmp_path / "straight")]) == 0
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    out = tmp_path / "branch"
    assert main(["--resume", str(stopped / "previous.ckpt"), "--out", str(out)]) == 0
    assert "going on after epoch 1, step 0" in capsys.readouterr().out
    assert contents(tmp_path / "straight") == contents(out)
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before
    assert json.loads((out / "config.json").read_text())["out"] == str(out)


def test_a_checkpoint_that_nothing_else_is_left_of(stopped, tmp_path):
    for name in ("last.ckpt", "previous.ckpt"):
        flip(stopped / name)
    assert resume(stopped) == 4
    assert main(["--resume", str(stopped / "best.ckpt")]) == 0
    assert checkpoint.load(stopped / "last.ckpt")["epoch"] == 3


@pytest.mark.parametrize(
    ("path", "options", "status", "words"),
    [
        ("previous.ckpt", (), 2, "has gone on since .*previous.ckpt, and nothing is ever overwr"),
        ("", ("--out", "elsewhere"), 2, "--out=elsewhere is not the folder that --resume="),
        ("", ("--lr", "0.2"), 2, "--lr=0.2 is not what the run in"),
        (
            "previous.ckpt",
            ("--out", "{folder}.new", "--lr", "0.2"),
            2,
            "--lr=0.2 is not what the run in {folder} was begun with .* or leave --resume away",
        ),
        ("", ("--seeds", "0", "1"), 2, "is one run; with --seeds use --resume auto"),
        ("last.ckpt", ("--out", "{folder}/export"), 2, "is not empty and nothing is ever"),
        ("nothing", (), 4, "nothing cannot be read"),
        ("export", (), 4, "export holds no last.ckpt; name a run folder, or a .ckpt file"),
        ("config.json", (), 4, "config.json is no mfef checkpoint"),
    ],
)
def test_a_path_that_cannot_be_gone_on_from(stopped, capsys, path, options, status, words):
    (stopped / "export").mkdir()
    (stopped / "export" / "file").touch()
    before = sorted(p.name for p in stopped.iterdir())
    given = [option.format(folder=stopped) for option in options]
    assert main(["--resume", str(stopped / path), *given]) == status
    error = capsys.readouterr().err
    assert re.search(words.format(folder=stopped), error) and len(error.splitlines()) == 1
    assert sorted(p.name for p in stopped.iterdir()) == before


def test_a_damaged_checkpoint_is_never_kept_as_the_previous_one(stopped, monkeypatch):
    """Killed between the two renames, a run that fell back once still has what it fell back to."""
    flip(stopped / "last.ckpt")
    whole = os.replace

    def replace(source, target):
        whole(source, target)
        if target.name in ("previous.ckpt", "last.ckpt"):
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(KilledError):
            resume(stopped)
    assert checkpoint.load(stopped / "previous.ckpt")["epoch"] == 1
    assert resume(stopped) == 0


# What a checkpoint with a right hash may hold that no run of these options does.
def without_names(state):
    state["optimizer"]["param_groups"] = [{"params": []}]


def other_momentum(state):
    for kept in state["optimizer"]["state"].values():
        kept["momentum_buffer"] = torch.zeros(7)


def infinite_momentum(state):
    for kept in state["optimizer"]["state"].values():
        kept["momentum_buffer"].view(-1)[0] = float("inf")


def other_settings(state):
    state["optimizer"]["param_groups"][0]["momentum"] = "x"


CHANGES = {
    "groups": without_names,
    "momentum": other_momentum,
    "infinite momentum": infinite_momentum,
    "settings": other_settings,
    "optimizer": lambda state: state.update(optimizer={}),
    "step": lambda state: state.update(step=6),  # of 5
    "scaler": lambda state: state.update(scaler={"scale": -1.0}),
    "lr": lambda state: state["config"].update(lr="fast"),
    "tensor": lambda state: state["distiller"].update({"students.0.stem.weight": torch.zeros(1)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_content_that_is_not_of_this_run_is_one_sentence(stopped, capsys, change):
    state = checkpoint.load(stopped / "last.ckpt")
    CHANGES[change](state)
    checkpoint.save(stopped / "last.ckpt", state)
    capsys.readouterr()
    assert main(["--resume", str(stopped)]) == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and len(error) < 700 and "last.ckpt" in error


def quietly(monkeypatch, name, act):
    """Calls ``act`` when the function ``name`` of mfef_ext.train is entered."""

    def instead(*arguments, **options):
        act()
        time.sleep(1)
        raise AssertionError("the signal was not heeded")

    monkeypatch.setattr(f"mfef_ext.train.{name}", instead)


@pytest.mark.parametrize(
    "where",
    [
        "presets.configured",
        "data.load",
        "run.build_students",
        "run.run_folder.write_json",
        "checkpoint.save_student",
        "report.draw_curves",
        "report.table",
    ],
)
def test_sigterm_outside_of_the_steps(tmp_path, monkeypatch, capsys, where):
    """While options are read, data load, networks are built, files are written, pictures drawn."""
    out = tmp_path / "run"
    options = (*QUICK, "--method", "ce", "--epochs", "1", "--out", str(out), "--resume", "auto")
    with monkeypatch.context() as patch:
        quietly(patch, where, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(options) == 75
    error = capsys.readouterr().err
    assert "stopped at once by SIGTERM" in error and "--resume auto goes on" in error
    assert len(error.splitlines()) == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not out.exists() or not list(out.glob(".*"))
    assert main(options) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_after_the_last_step_stop_the_seeds_that_follow(
    tmp_path, monkeypatch, capsys, number
):
    out = tmp_path / "runs"
    options = [*QUICK, "--method", "ce", "--epochs", "1", "--seeds", "0", "1", "--out", str(out)]
    whole = run_folder.append_row

    def append_row(*arguments):
        if not asked:
            asked.append(os.kill(os.getpid(), number))
        whole(*arguments)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("mfef_ext.train.run_folder.append_row", append_row)
        assert main(options) == 75
    error = capsys.readouterr().err
    assert f"stopped: {signal.Signals(number).name} after the last step, of epoch 1." in error
    assert f"--out {out} --resume auto goes on" in error and len(error.splitlines()) == 1
    assert (out / "seed0/last.ckpt").exists() and not (out / "seed1").exists()
    assert main([*options, "--resume", "auto"]) == 0
    assert (out / "seed0/student0.safetensors").exists() and (out / "seed1/last.ckpt").exists()


def test_sigterm_while_a_file_is_written_leaves_nothing_half_done(stopped, monkeypatch, capsys):
    whole = os.fsync

    def fsync(number):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        whole(number)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        assert resume(stopped) == 75
    assert "stopped at once by SIGTERM" in capsys.readouterr().err
    assert not list(stopped.glob(".*"))
    assert resume(stopped) == 0


def test_sigterm_that_who_called_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert resume(tmp_path / "run", "--epochs", "1") == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
