"""The command dispatches, helps, and imports nothing that it does not need."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mfef_ext import cli, inspection
from mfef_ext.version import __version__


def exit_status(argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return caught.value.code


def test_version(capsys):
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out == f"mfef {__version__}\n"


def test_help_names_every_command(capsys):
    assert exit_status(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        command in out for command in ("train", "show", "eval", "export", "plot", "table", "doctor")
    )


def test_help_of_train_explains_the_options(capsys):
    assert exit_status(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--backend", "--seed", "--method", "resnet56"))


@pytest.mark.parametrize(
    "argv", [[], ["tarin"], ["show"], ["table"], ["export", "RUN", "--format", "tf"], ["--bogus"]]
)
def test_wrong_usage(argv, capsys):
    assert exit_status(argv) == 2
    assert "usage: mfef" in capsys.readouterr().err


def test_doctor_prints_what_inspection_says(monkeypatch, capsys):
    monkeypatch.setattr(inspection, "doctor", lambda: "all is well", raising=False)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "all is well\n"


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "MFEF_BACKEND",
            "foo",
            "MFEF_BACKEND='foo' is unknown; use one of 'reference', 'cpu', 'triton', 'cuda', or "
            "unset it to choose automatically",
        ),
        pytest.param(
            "MFEF_BACKEND",
            "cuda",
            "MFEF_BACKEND='cuda' can run nothing here: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        ("MFEF_USE_ISA", "sse9", "MFEF_USE_ISA: CPU instruction set 'sse9' cannot be used; built:"),
    ],
)
def test_doctor_says_what_is_set_wrong(variable, value, sentence):
    run = subprocess.run(
        [sys.executable, "-m", "mfef_ext.cli", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, variable: value},
    )
    assert run.returncode == 2
    assert sentence in run.stdout and run.stderr == ""


def test_show_of_nothing(tmp_path, capsys):
    assert cli.main(["show", str(tmp_path)]) == 4
    assert "last.ckpt cannot be read" in capsys.readouterr().err


def test_extras_are_imported_by_train_alone():
    code = (
        "import sys, mfef_ext.cli, mfef_ext.train, mfef_ext.distill\n"
        "extras = {'tyro', 'rich', 'sklearn', 'safetensors', 'matplotlib', 'torchvision'}\n"
        "sys.exit(sorted(extras & set(sys.modules)) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def mfef(*argv, to="/dev/full", **environment):
    """The command in a process of its own, its output sent to a full device, or closed."""
    command = [sys.executable, "-m", "mfef_ext.cli", *argv]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" >{to}', "sh", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("to", ["/dev/full", "&-"])
@pytest.mark.parametrize("argv", [["doctor"], ["train", "--help"], ["--version"]])
def test_a_full_or_closed_output_is_one_sentence(argv, to):
    run = mfef(*argv, to=to)
    assert run.returncode == 1
    assert run.stderr.startswith("mfef: the output could not be written (")
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("to", ["/dev/full", "&-"])
def test_a_training_outlives_its_output(tmp_path, to):
    out = tmp_path / "run"
    options = ("--dataset", "fake", "--method", "ce", "--epochs", "1", "--threads", "1")
    run = mfef("train", *options, "--out", str(out), to=to)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("mfef: the output could not be written (")
    assert (out / "summary.json").exists()
    for command in (["show", str(out)], ["table", str(out)], ["eval", str(out)]):
        assert subcommand(command, to) == 1, command


def subcommand(argv, to):
    """The exit status of a command in this process, with an output that takes nothing."""
    before = sys.stdout
    with open("/dev/full", "w") as full:
        sys.stdout = full if to == "/dev/full" else None
        try:
            return cli.main(argv)
        finally:
            sys.stdout = before


def test_everything_closed(tmp_path):
    """No file gets the number of a standard stream, into which something else would be printed."""
    command = [sys.executable, "-m", "mfef_ext.cli", "show", str(tmp_path)]
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    assert closed.returncode == 4


def test_what_nobody_thought_of_has_a_status_of_its_own(monkeypatch, capsys):
    def doctor():
        raise KeyError("something")

    monkeypatch.setattr(inspection, "doctor", doctor)
    assert cli.main(["doctor"]) == 70
    error = capsys.readouterr().err
    assert "KeyError: 'something'" in error and "report it with the lines above" in error


@pytest.mark.parametrize("command", ["show", "eval", "export", "plot", "table"])
def test_sigterm_in_other_commands(command, monkeypatch, capsys, tmp_path):
    def killed(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("the signal was not heeded")

    name = {"show": "report.describe"}.get(command, f"{command}.{command}")
    name = {"eval": "evaluate.evaluate"}.get(command, name)
    monkeypatch.setattr(f"mfef_ext.train.{name}", killed)
    assert cli.main([command, str(tmp_path)]) == 75
    error = capsys.readouterr().err
    assert error == "mfef: stopped by SIGTERM; files already written are whole\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_help_of_train_breaks_lines_only_for_want_of_room(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    exit_status(["train", "--help"])
    text = capsys.readouterr().out
    lines = [line.strip("│ ") for line in text[text.index("--method ") :].splitlines()]
    for line, after in itertools.pairwise(lines):
        if after and line and not after.startswith(("--", "╰")) and not line.startswith("--"):
            assert len(line) + 1 + len(after.split()[0]) > 70, line


def test_an_unknown_instruction_set_is_one_sentence(tmp_path):
    run = mfef("train", "--out", str(tmp_path / "run"), MFEF_USE_ISA="sse9")
    assert run.returncode == 2
    assert "MFEF_USE_ISA" in run.stderr and "this processor runs" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "run").exists()
