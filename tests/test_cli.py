"""The command dispatches, helps, and imports nothing that it does not need."""

import os
import subprocess
import sys

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


def mfef(*argv, **environment):
    """The command in a process of its own, its output sent to a full device."""
    with open("/dev/full", "w") as full:
        return subprocess.run(
            [sys.executable, "-m", "mfef_ext.cli", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )


@pytest.mark.parametrize("argv", [["doctor"], ["train", "--help"]])
def test_a_full_output_is_one_sentence(argv):
    run = mfef(*argv)
    assert run.returncode == 1
    assert run.stderr.startswith("mfef: the output could not be written (")
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1


def test_an_unknown_instruction_set_is_one_sentence(tmp_path):
    run = mfef("train", "--out", str(tmp_path / "run"), MFEF_USE_ISA="sse9")
    assert run.returncode == 2
    assert "MFEF_USE_ISA" in run.stderr and "this processor runs" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "run").exists()
