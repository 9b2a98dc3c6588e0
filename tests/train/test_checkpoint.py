"""A checkpoint is whole or refused; a student's files are checked too."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfef_ext.train import checkpoint, writing
from mfef_ext.train.models import StudentSpec
from tests.children import Child


def state(epoch):
    """What a run saves after so many epochs."""
    rows = [{"epoch": i + 1, "loss": 0.5, "test/students": 90.0} for i in range(epoch)]
    timings = [{"epoch": i + 1, "train_seconds": 1.0, "method_seconds": 0.1} for i in range(epoch)]
    return {
        "epoch": epoch,
        "step": 0,
        "sums": {},
        "best_epoch": epoch,
        "metrics": rows,
        "timings": timings,
        "config": {"epochs": 9},
        "distiller": {"a": torch.arange(5.0)},
        "optimizer": {},
        "scaler": {},
        "average": {},
    }


STATE = state(3)
SPLITS = ("train", "validation", "test")
DATA = {
    "dataset": "folder",
    "classes": ["cat", "dog", "owl"],
    "input_shape": [3, 8, 8],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25],
    "scale": 255.0,
    "images": dict.fromkeys(SPLITS, 7),
    "sha256": dict.fromkeys(SPLITS, "0123456789abcdef" * 4),
}


def odd(name, value):
    return {"data": DATA | {name: value}}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    return path


def test_round_trip(saved):
    loaded = checkpoint.load(saved)
    assert loaded["epoch"] == 3 and loaded["metrics"] == STATE["metrics"]
    assert torch.equal(loaded["distiller"]["a"], STATE["distiller"]["a"])
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
        checkpoint.save(saved, state(4))
    assert checkpoint.load(saved)["epoch"] == 3
    assert os.listdir(saved.parent) == ["last.ckpt"]  # nothing half written takes up the disk


# A folder with two checkpoints, of which one may be damaged before it is read.
DAMAGE = {
    "none": lambda folder: None,
    "flipped last": lambda folder: flip(folder / "last.ckpt"),
    "emptied last": lambda folder: (folder / "last.ckpt").write_bytes(b""),
    "another last": lambda folder: rewrite(folder / "last.ckpt", step=-7),
    "no last": lambda folder: (folder / "last.ckpt").unlink(),
    "linked last": lambda folder: link(folder / "last.ckpt"),
    "flipped previous": lambda folder: flip(folder / "previous.ckpt"),
    "no previous": lambda folder: (folder / "previous.ckpt").unlink(),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rewrite(path, **changes):
    """A checkpoint whose hash is right and whose content is not."""
    checkpoint.save(path, checkpoint.load(path) | changes)


def link(path):
    path.unlink()
    path.symlink_to("nowhere")


def two_checkpoints(folder):
    folder.mkdir()
    for epoch in (1, 2):
        checkpoint.save(folder / "last.ckpt", state(epoch), folder / "previous.ckpt")
    return folder


class KilledError(BaseException):
    """In place of the process: nothing catches it, nothing is written after it."""


SYSTEM_CALLS = ("open", "fsync", "fstat", "stat", "replace", "close", "unlink")


@contextlib.contextmanager
def killed_at(call):
    """Ends the process, as it were, before its ``call``-th call of the system while it saves; a
    write that was cut short is one of them. Yields what was called."""
    called = []

    def counting(name, real):
        def act(*arguments, **options):
            called.append(name)
            if len(called) == call:
                if name == "fsync" and call % 2:  # not all had been written
                    os.truncate(arguments[0], 100)
                raise KilledError
            return real(*arguments, **options)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        with contextlib.suppress(KilledError):
            yield called


@pytest.mark.parametrize("damage", DAMAGE)
def test_killed_while_saving_after_any_damage(damage, tmp_path):
    """There is one intact checkpoint where resuming looks, whichever of two was damaged before and
    whenever the process is killed while it saves the next one."""
    for call in itertools.count(1):
        folder = two_checkpoints(tmp_path / str(call))
        DAMAGE[damage](folder)
        _, found, _ = checkpoint.newest(folder)
        with killed_at(call) as called:
            checkpoint.save(
                folder / "last.ckpt", state(found["epoch"] + 1), folder / "previous.ckpt"
            )
        _, after, _ = checkpoint.newest(folder)
        assert after["epoch"] >= found["epoch"]
        # Nor is any of that lost when the next one is saved, or the one that was begun damaged.
        checkpoint.save(folder / "last.ckpt", state(after["epoch"] + 1), folder / "previous.ckpt")
        flip(folder / "last.ckpt")
        assert checkpoint.newest(folder)[1]["epoch"] >= found["epoch"]
        if len(called) < call:  # it came to its end
            break
    assert call > 8


def test_what_changes_while_a_run_goes_on_is_not_kept_as_the_previous_one(tmp_path):
    folder = two_checkpoints(tmp_path / "run")
    time.sleep(0.02)  # the clock of a file system may be as coarse
    flip(folder / "last.ckpt")
    checkpoint.save(folder / "last.ckpt", state(3), folder / "previous.ckpt")
    assert checkpoint.load(folder / "previous.ckpt")["epoch"] == 1
    assert checkpoint.load(folder / "last.ckpt")["epoch"] == 3


def state_of(pid):
    """R for running, S for sleeping, T for stopped: see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_killed_for_real_while_saving(tmp_path):
    """As above, by a signal that nothing can catch, at a moment that nobody chose."""
    folder = two_checkpoints(tmp_path / "run")
    flip(folder / "last.ckpt")
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from mfef_ext.train import checkpoint\n"
        "folder = Path(sys.argv[1])\n"
        "_, state, _ = checkpoint.newest(folder)\n"
        "state['distiller']['a'] = torch.zeros(2**17)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    checkpoint.save(folder / 'last.ckpt', state, folder / 'previous.ckpt')\n"
    )
    process = Child("-c", code, str(folder))
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # it stands still while it is looked at, as if it were dead
        time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        while state_of(process.pid) != "T":
            time.sleep(0.001)
        assert checkpoint.newest(folder)[1]["epoch"] == 1
        process.send_signal(signal.SIGCONT)
    process.kill()
    assert checkpoint.newest(folder)[1]["epoch"] == 1


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.ckpt", "last.ckpt.writing", "metrics.jsonl"):
        (folder / name).symlink_to(victim)
    checkpoint.save(folder / "last.ckpt", STATE)
    with pytest.raises(OSError, match="symbolic links"):
        writing.append(folder / "metrics.jsonl", "row")
    writing.remove_stale(folder)
    assert victim.read_text() == "mine" and not (folder / "last.ckpt").is_symlink()
    assert sorted(os.listdir(folder)) == ["last.ckpt", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": None}, "epoch is no number"),
        ({"epoch": 2, "best_epoch": 2}, "metrics are not those of 2 epochs"),
        ({"epoch": True}, "epoch is no number"),
        ({"step": -7}, "step is no number of steps"),
        ({"step": 2.0}, "step is no number of steps"),
        ({"sums": {"ce": 1.0}}, "sums of no steps"),
        ({"sums": [1]}, "sums is no dictionary"),
        ({"best_epoch": 4}, "best_epoch is none of its epochs"),
        ({"best_epoch": 0}, "best_epoch is none of its epochs"),
        ({"metrics": STATE["metrics"][:2]}, "metrics are not those of 3 epochs"),
        ({"metrics": [*STATE["metrics"][:2], {"epoch": 3}]}, "metrics differ in their columns"),
        ({"metrics": [{"epoch": i} for i in (1, 2, 3)]}, "metrics lack loss"),
        ({"config": STATE["config"] | {"students": ["a"] * 9}}, "metrics lack loss"),
        ({"config": STATE["config"] | {"students": "a"}}, "config has no list of students"),
        *(
            ({"data": {k: v for k, v in DATA.items() if k != name}}, f"say {name}|{name} is not by")
            for name in DATA
        ),
        (odd("classes", []), "classes are no list of names"),
        (odd("classes", ["cat", "a\ud800"]), "classes are no list of names"),
        (odd("classes", "cat"), "classes are no list of names"),
        (odd("classes", ["cat", "owl", "cat"]), "two classes have the same name"),
        (odd("mean", [1e300]), "mean is beyond float32"),
        (odd("mean", [0.5, 0.4]), "mean has 2 numbers for 3 channels"),
        (odd("std", []), "std has 0 numbers for 3 channels"),
        (odd("images", {"train": 3}), "data: images is not by split"),
        *(
            (odd("images", dict.fromkeys(SPLITS, n)), "images are no numbers")
            for n in ("7", -1, 7.0)
        ),
        *(
            (odd("sha256", dict.fromkeys(SPLITS, v)), "sha256 are no hashes")
            for v in (1, "", "x" * 64, "a" * 63)
        ),
        ({"metrics": [dict(row, loss="x") for row in STATE["metrics"]]}, "hold no numbers"),
        ({"metrics": [dict(row, loss=float("nan")) for row in STATE["metrics"]]}, "no numbers"),
        ({"metrics": STATE["metrics"][::-1]}, "not one row for every epoch"),
        ({"timings": []}, "timings are not those of 3"),
        ({"timings": [{"epoch": i} for i in (1, 2, 3)]}, "timings lack seconds"),
        ({"config": {"epochs": 2}}, "config says of fewer epochs"),
        ({"config": {"epochs": "9"}}, "config says of fewer epochs"),
        ({"config": {}}, "config says of fewer epochs"),
        ({"distiller": {"a": 1}}, "'a' of distiller is no tensor of real numbers"),
        ({"distiller": {1: torch.zeros(1)}}, "distiller is no dictionary"),
        *(
            ({part: {"a": tensor}}, f"'a' of {part} is {words}")
            for part in ("distiller", "average")
            for tensor, words in (
                (torch.tensor([1j]), "no tensor of real numbers"),
                (torch.zeros(2, device="meta"), "no tensor of real numbers"),
                (torch.eye(2).to_sparse(), "no tensor of real numbers"),
                (torch.tensor([1.0, float("nan")]), "not finite"),
                (torch.tensor([1.0, float("inf")]), "not finite"),
            )
        ),
        ({"average": {"a": torch.zeros(1)}}, "there is an average, and config has no ema"),
        ({"teacher": {"sha256": "x"}}, "teacher has no sha256"),
    ],
)
def test_content_that_no_run_saves_is_refused_though_its_hash_is_right(saved, changes, words):
    checkpoint.save(saved, STATE | changes)
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(saved)


def test_data_that_can_be_are_loaded(saved):
    checkpoint.save(saved, STATE | {"data": DATA})
    assert checkpoint.load(saved)["data"] == DATA


@pytest.mark.parametrize("name", [*STATE, None])
def test_a_missing_key_is_refused_though_the_hash_is_right(saved, name):
    checkpoint.save(saved, {k: v for k, v in STATE.items() if k != name} if name else [STATE])
    with pytest.raises(checkpoint.CheckpointError, match=f"it has no {name}" if name else "it is"):
        checkpoint.load(saved)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(checkpoint.CheckpointError, match=r"no regular file|cannot be read"):
            checkpoint.load(path)
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 2**42)
    with pytest.raises(checkpoint.CheckpointError, match="is no mfef checkpoint"):
        checkpoint.load(huge)


ABOUT = {
    "dataset": "folder",
    "classes": ["cat", "dog", "owl"],
    "input_shape": (1, 8, 8),
    "mean": (0.5,),
    "std": (0.25,),
    "scale": 255.0,
    "epoch": 3,
    "test_accuracy": 97.5,
}


@pytest.fixture(scope="module")
def one_student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student0.safetensors"
    spec = StudentSpec("resnet8", 1, 3, (1, 1, 1), "stage3")
    checkpoint.save_student(path, spec.build(), spec, ABOUT)
    return path


@pytest.fixture
def student(one_student, tmp_path):
    """A student's two files, to be changed."""
    for file in (one_student, one_student.with_suffix(".json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / one_student.name


def test_a_student_comes_back_as_it_was(student):
    loaded, about = checkpoint.load_student(student)
    assert about["classes"] == ABOUT["classes"] and about["std"] == [0.25]
    assert not loaded.training
    for name, tensor in load_file(student).items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    flip(student)
    with pytest.raises(checkpoint.CheckpointError, match=r"student0\.safetensors is damaged"):
        checkpoint.load_student(student)


def test_every_flipped_bit_of_a_description_is_refused_or_changes_nothing(student):
    beside = student.with_suffix(".json")
    whole, (_, expected) = beside.read_bytes(), checkpoint.load_student(student)
    accepted = 0
    for bit in range(0, 8 * len(whole), 13):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        beside.write_bytes(bytes(damaged))
        try:
            assert checkpoint.load_student(student)[1] == expected
            accepted += 1
        except checkpoint.CheckpointError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
    assert accepted < len(whole) // 4  # a blank for another


def forge(student, **changes):
    """A description with a right hash, and with changes."""
    beside = student.with_suffix(".json")
    described = json.loads(beside.read_text())
    for name, value in changes.items():
        (described["build"] if name in described["build"] else described)[name] = value
    described = {name: value for name, value in described.items() if value is not ...}
    head = {"description_sha256": checkpoint._hash_of_description(described)}
    save_file(load_file(student), student, head)
    described["sha256"] = hashlib.sha256(student.read_bytes()).hexdigest()
    beside.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 10**12}, "num_classes is not from 1 to"),
        ({"num_classes": -1}, "num_classes is not from 1 to"),
        ({"num_classes": True}, "num_classes is not from 1 to"),
        ({"num_classes": 4}, "classes are 3, not 4"),
        ({"in_channels": 10**9}, "in_channels is not from 1"),
        ({"in_channels": 3}, "input_shape and in_channels differ"),
        ({"strides": [0, 1, 1]}, "strides are not from 1 to 8"),
        ({"strides": 3}, "strides are not three"),
        ({"model": ["resnet8"]}, "model or tap is no name"),
        ({"model": "resnet9"}, "names a network that there is not"),
        ({"model": "x" * 10**6}, "model or tap is no name"),
        ({"model": "resnet14"}, "does not fit the network"),
        ({"tap": None}, "model or tap is no name"),
        ({"tap": ""}, "model or tap is no name"),
        ({"classes": "cat"}, "classes are no list of names"),
        ({"classes": ["cat", 1, "owl"]}, "classes are no list of names"),
        ({"classes": ["cat", "a\ud800", "owl"]}, "classes are no list of names"),
        ({"classes": {"cat": 0}}, "classes are no list of names"),
        ({"input_shape": [1, 8]}, "input_shape is no"),
        ({"input_shape": [1, 10**12, 8]}, "input_shape is no"),
        ({"mean": ["0.5"]}, "mean is no list of numbers"),
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers for 1 channels"),
        ({"std": [0]}, "std is not positive"),
        ({"std": [1e-300]}, "std is not positive"),
        ({"std": [1e300]}, "std is not positive"),
        ({"mean": [1e300]}, "mean is beyond float32"),
        ({"classes": ["cat", "cat", "owl"]}, "two classes have the same name"),
        ({"std": [float("nan")]}, "std is no list of numbers"),
        ({"scale": -1}, "scale is no positive number"),
        ({"epoch": -7}, "epoch is no number"),
        ({"test_accuracy": float("inf")}, "test_accuracy is no percentage"),
    ],
)
def test_a_description_that_cannot_be_is_one_sentence(student, changes, words):
    forge(student, **changes)
    with pytest.raises(checkpoint.CheckpointError, match=words) as error:
        checkpoint.load_student(student)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ABOUT)
def test_a_description_without_what_every_version_says_is_one_sentence(student, name):
    forge(student, **{name: ...})
    refused = pytest.raises(checkpoint.CheckpointError, match=f"it does not say {name}")
    with contextlib.nullcontext() if name == "scale" else refused:
        checkpoint.load_student(student)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_weights_that_no_run_leaves_are_one_sentence(one_student, tmp_path, value):
    network, about = checkpoint.load_student(one_student)
    name = "classifier.bias"
    weights = network.state_dict()
    weights[name] = torch.full((3,), value)
    file = tmp_path / "student0.safetensors"
    network.state_dict = lambda: weights
    build = about.pop("build")
    spec = StudentSpec(**build | {"strides": tuple(build["strides"])})
    checkpoint.save_student(file, network, spec, ABOUT)
    with pytest.raises(checkpoint.CheckpointError, match=rf"fit .*\('{name}' of it is n"):
        checkpoint.load_student(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "1" * 5000,
        "[" * 10**5,
        '{"build": {}}',
        "\xff",
        '{"build": 1, "sha256": ""}',
    ],
)
def test_what_describes_no_student_is_one_sentence(student, text):
    student.with_suffix(".json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match="does not describe a student"):
        checkpoint.load_student(student)


def test_a_huge_description_is_not_read(student):
    os.truncate(student.with_suffix(".json"), 2**30)
    with pytest.raises(checkpoint.CheckpointError, match="bytes, too many"):
        checkpoint.load_student(student)


def test_files_without_a_hash_of_the_description_load_with_a_warning(student):
    save_file(load_file(student), student)
    beside = student.with_suffix(".json")
    described = json.loads(beside.read_text())
    described["sha256"] = hashlib.sha256(student.read_bytes()).hexdigest()
    beside.write_text(json.dumps(described))
    with pytest.warns(UserWarning, match=r"make a file that can be checked: mfef export"):
        checkpoint.load_student(student)
    beside.write_text(json.dumps(described | {"sha256": "0" * 64}))
    with pytest.raises(checkpoint.CheckpointError), warnings.catch_warnings():
        checkpoint.load_student(student)
