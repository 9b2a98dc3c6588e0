"""A path that nothing can have is one sentence with the option that gave it; nothing is written."""

import pytest

from mfef_ext import cli
from mfef_ext.train import checkpoint, paths

PATHS = {
    "NUL": ("a\0b", "a\\x00b is no path of a file or folder: it holds a character"),
    "half a character": (
        "a\ud800",
        "a\\ud800 is no path of a file or folder: it holds a character",
    ),
    "a long name": ("a" * 300, "longer than the system takes"),
    "long": ("/".join(["a" * 200] * 30), "longer than the system takes"),
    "deep": ("a/" * 1500, f"more than {paths.DEEPEST} folders inside one another"),
}
GIVEN = [
    ["train", "--dataset", "fake", "--out"],
    ["train", "--dataset", "cifar10", "--data-dir"],
    ["train", "--method", "kd", "--teacher"],
    ["train", "--out", "x", "--resume"],
    ["train", "--config"],
    ["data", "verify", "--dataset", "folder", "--data-dir"],
    ["show"],
    ["eval"],
    ["export"],
    ["plot"],
    ["table", "x"],
    ["eval", "x", "--student"],
    ["eval", "x", "--data-dir"],
    ["export", "x", "--out"],
    ["export", "x", "--data-dir"],
    ["plot", "x", "--data-dir"],
]


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("given", GIVEN, ids=" ".join)
def test_a_path_that_nothing_can_have(given, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, words = PATHS[kind]
    assert cli.main([*given, path]) == 2
    captured = capsys.readouterr()
    option = given[-1] if given[-1].startswith("--") else "RUN"
    assert captured.err.startswith(f"mfef: {option}=a") and words in captured.err
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and len(captured.err) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["resume", "out", "data_dir", "teacher"])
def test_a_path_in_a_file_that_nothing_can_have(option, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    for kind in ("\\0", "\\ud800", "a" * 300):
        file.write_text(f'{option}: "a{kind}"\ndataset: cifar10\nmethod: kd\n')
        assert cli.main(["train", "--config", str(file), "--epochs", "1"]) == 2
        error = capsys.readouterr().err
        flag = option.replace("_", "-")
        assert f"--{flag}=a" in error and "is no path of a file or folder" in error


@pytest.mark.parametrize("kind", PATHS)
def test_a_file_to_load_that_nothing_can_be(kind):
    for load in (checkpoint.load, checkpoint.load_student):
        with pytest.raises(checkpoint.CheckpointError, match="cannot be read: ") as error:
            load(PATHS[kind][0])
        assert len(str(error.value)) < 300
