"""Every method from the command line: trained, recorded, and its teacher looked at first."""

import json

import pytest
import torch

from mfef_ext.distill import METHODS
from mfef_ext.train import checkpoint
from mfef_ext.train.__main__ import main

QUICK = ("--dataset", "fake", "--epochs", "2", "--threads", "1", "--batch-size", "64")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "run"
    options = ("--method", "ce", "--students", "resnet14", "--epochs", "1")
    assert main([*QUICK, *options, "--out", str(path)]) == 0
    return path / "student0.safetensors"


CASES = {
    "ce": {},
    "dml": {"temperature": 1.0},
    "ffl": {"temperature": 3.0, "ramp_epochs": 2 * 80 / 300},
    "one": {"temperature": 3.0, "ramp_epochs": 2 * 80 / 300},
    "okddip": {"temperature": 3.0},
    "kdcl": {"temperature": 2.0, "alpha": 0.5, "variant": "general"},
    "mfef": {"multi_scale": True, "fusion": True},
    "kd": {"alpha": 0.9},
    "mimic": {"alpha": 0.9},
    "ab": {"alpha": 0.9, "boundary_epochs": 2 / 3},
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_trains_and_says_with_what(method, teacher, tmp_path):
    assert set(CASES) == set(METHODS)
    options = ["--method", method, "--students", "resnet8", "resnet8", "resnet8"]
    if method == "kdcl":
        options += ["--variant", "general"]
    if method in ("kd", "mimic", "ab"):
        options += ["--teacher", str(teacher)]
    out = tmp_path / "run"
    assert main([*QUICK, *options, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    for name, value in CASES[method].items():
        assert config[name] == pytest.approx(value), name
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["loss"] > 0
    if method == "kdcl":
        weights = checkpoint.load(out / "last.ckpt")["distiller"]["method.weights"]
        assert float(weights.sum()) == pytest.approx(1)
        assert not torch.allclose(weights, torch.full((3,), 1 / 3))


def test_phases_of_ab_are_recorded_apart(teacher, tmp_path):
    options = ("--method", "ab", "--teacher", str(teacher), "--boundary-epochs", "1")
    assert main([*QUICK, *options, "--out", str(tmp_path / "run")]) == 0
    first, second = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first["ab/student0"] > 0 == first["kd/student0"]
    assert second["kd/student0"] > 0 == second["ab/student0"]


def test_a_teacher_of_something_else(teacher, tmp_path, capsys):
    options = ["--method", "kd", "--teacher", str(teacher), "--out", str(tmp_path / "run")]
    assert main(options) == 2  # on digits
    assert f"--teacher={teacher} was trained for" in capsys.readouterr().err
    missing = ["--method", "kd", "--teacher", str(tmp_path / "no.safetensors")]
    assert main(missing) == 4
    assert "no.safetensors cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
