"""A checkpoint is whole or refused; a student's file is checked too."""

import json
import os

import pytest
import torch

from mfef_ext.train import checkpoint
from mfef_ext.train.models import StudentSpec

STATE = {"epoch": 3, "weights": {"a": torch.arange(5.0)}, "names": ["x", "y"]}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    return path


def test_round_trip(saved):
    state = checkpoint.load(saved)
    assert state["epoch"] == 3 and state["names"] == ["x", "y"]
    assert torch.equal(state["weights"]["a"], STATE["weights"]["a"])
    assert os.listdir(saved.parent) == ["last.ckpt"]


def test_any_flipped_byte_is_refused(saved):
    whole = saved.read_bytes()
    for position in (0, 20, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        saved.write_bytes(bytes(damaged))
        with pytest.raises(checkpoint.CheckpointError, match=r"last\.ckpt is"):
            checkpoint.load(saved)


@pytest.mark.parametrize("content", [b"", b"mfef-checkpoint 1 ", b"PK\x03\x04 something"])
def test_what_is_no_checkpoint_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="is"):
        checkpoint.load(saved)


def test_truncated_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(saved)


def test_missing_is_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "last.ckpt")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch, failing):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, {"epoch": 4})
    assert checkpoint.load(saved)["epoch"] == 3
    assert os.listdir(saved.parent) == ["last.ckpt"]  # nothing half written takes up the disk


def test_student_file_is_checked(tmp_path):
    path = tmp_path / "student0.safetensors"
    spec = StudentSpec("resnet8", 1, 10, (1, 1, 1))
    net = spec.build()
    checkpoint.save_student(path, net, spec, {"classes": ["a"]})
    loaded, about = checkpoint.load_student(path)
    assert about["classes"] == ["a"] and not loaded.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(checkpoint.CheckpointError, match=r"student0\.safetensors is damaged"):
        checkpoint.load_student(path)
    path.with_suffix(".json").write_text(json.dumps({"build": {}}))
    with pytest.raises(checkpoint.CheckpointError, match="does not describe a student"):
        checkpoint.load_student(path)
