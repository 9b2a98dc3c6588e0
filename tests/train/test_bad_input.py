"""What cannot be done is refused: one sentence, exit status 2, nothing written."""

import os
import subprocess
import sys

import pytest

from mfef_ext import inspection
from mfef_ext.train.__main__ import main


def refused(options, capsys, *words):
    """Runs the command; it must refuse with a single line on stderr that contains ``words``."""
    try:
        status = main(options)
    except SystemExit as exit:  # how the option parser leaves
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    for word in words:
        assert word in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "mfeg"], ["--method=mfeg", "did you mean mfef?", "ab, ce, dml"]),
        (["--method", "kd"], ["--method kd needs a --teacher"]),
        (["--method", "dml", "--students", "resnet8"], ["at least two students", "got 1"]),
        (["--method", "okddip"], ["at least three students", "leader"]),
        (["--variant", "naive"], ["--variant=naive means nothing to --method mfef", "kdcl"]),
        (["--method", "ce", "--no-fusion"], ["--no-fusion means nothing to --method ce", "mfef"]),
        (["--method", "kdcl", "--variant", "lin"], ["variant='lin' is unknown", "'linear'"]),
        (["--method", "kdcl", "--alpha", "2"], ["alpha=2.0 must be from 0 to 1"]),
        (
            ["--method", "kdcl", "--variant", "general", "--validation", "0"],
            ["held-out images", "--validation"],
        ),
        (["--dataset", "digit"], ["--dataset=digit", "did you mean digits?"]),
        (["--students", "a\nb\0c\ud800"], ["--students=a\\nb\\x00c\\ud800 is unknown"]),
        (["--students", "resnet8", "resnet9"], ["--students=resnet9", "resnet8"]),
        (["--students", "timm:resnet8t"], ["--students=timm:resnet8t", "did you mean timm:resnet"]),
        (["--students", "vgg16"], ["--students=vgg16 cannot take images of shape (1, 8, 8)"]),
        (["--tap", "stage9"], ["tap='stage9' is no layer of --students=resnet8", "stage3"]),
        (["--tap", "a", "b", "c"], ["--tap=a b c names 3 layers for 2 students"]),
        (["--dataset", "cifar10"], ["--dataset cifar10 needs --data-dir", "--download"]),
        (["--dataset", "folder"], ["--dataset folder needs --data-dir"]),
        (["--data-dir", "x"], ["--data-dir means nothing to --dataset digits", "cifar100"]),
        (["--download"], ["--download means nothing to --dataset digits"]),
        (["--image-size", "32"], ["--image-size means nothing to --dataset digits", "folder"]),
        (
            ["--dataset", "folder", "--data-dir", ".", "--image-size", "7"],
            ["--image-size=7 must be from 8 to 1024"],
        ),
        (["--students"], ["--students= must name at least one"]),
        (["--backend", "gpu"], ["--backend=gpu", "reference, cpu, triton, cuda"]),
        (["--backend", "cuda"], ["--backend=cuda does not work here: ", "choose automatically"]),
        (["--device", "cuda:77"], ["--device=cuda:77 cannot be used", "--device cpu"]),
        (["--device", "nonsense"], ["--device=nonsense must be cpu, cuda or cuda:N"]),
        (["--epochs", "0"], ["--epochs=0 must be from 1 to 1000000; the default is 15"]),
        (["--epochs", "-3"], ["--epochs=-3 must be from 1"]),
        (["--batch-size", "0"], ["--batch-size=0 must be at least 1"]),
        (["--batch-size", "9999"], ["--batch-size=9999 is more than the 1295 training images"]),
        (["--lr", "0"], ["--lr=0.0 must be positive and at most 1e38; the default is 0.1"]),
        (["--lr", "nan"], ["--lr=nan must be positive and at most 1e38"]),
        (["--lr", "inf"], ["--lr=inf must be positive"]),
        (["--lr-drops", "0.5", "1.5"], ["--lr-drops=1.5 must be above 0"]),
        (["--momentum", "1"], ["--momentum=1.0 must be"]),
        (["--weight-decay", "-1"], ["--weight-decay=-1.0 must be 0 or more"]),
        (["--temperature", "0"], ["--temperature=0.0 must be positive"]),
        (["--ramp-epochs", "-1"], ["--ramp-epochs=-1.0 must be 0 or more"]),
        (["--validation", "1"], ["--validation=1.0 must be"]),
        (["--validation", "0.001"], ["--validation=0.001 leaves a class", "or 0 for none"]),
        (["--labels-per-class", "0"], ["--labels-per-class=0 must be at least 1"]),
        (
            ["--labels-per-class", "126"],
            ["--labels-per-class=126 is too many for digits", "125 images are all that a class"],
        ),
        (
            ["--labels-per-class", "6"],
            ["--batch-size=64 is more than the 60 training images of digits"],
        ),
        (["--seed", "-1"], ["--seed=-1 must be"]),
        (["--seeds"], ["--seeds names no seed"]),
        (["--seeds", "-1"], ["--seeds=-1 must be from 0 to 2147483647; the default is none"]),
        (["--seed", "5", "--seeds", "1", "2"], ["--seed=5 means nothing beside --seeds=1 2"]),
        (["--threads", "0"], ["--threads=0 must be"]),
        (["--threads", "100000"], ["--threads=100000 must be from 1 to 1024"]),
        (["--device", "meta"], ["--device=meta must be cpu, cuda or cuda:N"]),
        (["--lr", "1e300"], ["--lr=1e+300 must be positive and at most 1e38"]),
        (["--temperature", "1e200"], ["--temperature=1e+200 must be positive"]),
        (["--epochs", "1" + "0" * 30], ["must be from 1 to 1000000"]),
    ],
)
def test_refused_in_one_sentence(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(options, capsys, *words)
    assert len(error.splitlines()) == 1 and error.startswith("mfef: ")
    assert list(tmp_path.iterdir()) == []


def test_a_single_image_is_refused_where_its_last_map_is_a_pixel(capsys, tmp_path):
    options = ["--dataset", "fake32", "--method", "ce", "--students", "torchvision:resnet18"]
    words = "--batch-size=579 with --accumulate=1 makes parts of 1 image(s) out of 580"
    refused([*options, "--batch-size", "579", "--out", str(tmp_path / "run")], capsys, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "word"), [(["--epochs", "x"], "--epochs"), (["--epoks", "1"], "--epoks")]
)
def test_refused_by_the_option_parser(options, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(options, capsys, word, "mfef train --help")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    error = refused(["--out", str(tmp_path)], capsys, f"--out={tmp_path} is not empty")
    assert len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no font for this")

    monkeypatch.setattr("mfef_ext.train.report.draw_curves", fail)
    out = tmp_path / "run"
    options = ["--dataset", "fake", "--method", "ce", "--epochs", "1", "--out", str(out)]
    assert main(options) == 0
    said = capsys.readouterr()
    assert f"warning: {out}/curves.png could not be drawn (RuntimeError: no font" in said.err
    assert "checkpoints, metrics\n" in said.out and (out / "summary.json").exists()


def test_a_run_is_whole_without_matplotlib(tmp_path, capsys, monkeypatch):
    """It may not be importable when a run has come to its end, as with an unknown MPLBACKEND."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "run"
    options = ["--dataset", "fake", "--method", "ce", "--epochs", "1", "--out", str(out)]
    assert main(options) == 0
    said = capsys.readouterr()
    assert f"warning: {out}/curves.png could not be drawn (" in said.err
    assert "gates.png" not in said.err and (out / "summary.json").exists()  # ce has none
    assert "mean of the students" in said.out


def test_a_file_in_the_way_is_left_alone(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        refused(["--out", str(out)], capsys, f"--out={out} cannot be written", "name a folder")
    assert file.read_text() == "mine"


def test_an_unwritable_folder_is_refused(tmp_path, capsys, monkeypatch):
    def opened(path, flags):
        raise PermissionError(13, "Permission denied")

    # Permissions mean nothing to root, which tests often run as: refuse the first file instead.
    monkeypatch.setattr("mfef_ext.train.run_folder._open_lock", opened)
    refused(["--out", str(tmp_path)], capsys, f"--out={tmp_path} cannot be written (Permission")


def test_runs_that_is_a_file_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("mine")
    refused(["--dataset", "fake"], capsys, "--out=runs cannot be written")


def test_a_backend_forced_by_the_environment_is_named(tmp_path):
    # Read when the package is imported, so in a process of its own.
    command = [sys.executable, "-m", "mfef_ext.train", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "MFEF_BACKEND": "cuda"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "MFEF_BACKEND=cuda does not work here: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_asked_for_only_where_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "run"
    refused(["--tensorboard", "--out", str(out)], capsys, "run: pip install tensorboard")
    assert not out.exists()


def test_missing_extras_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    refused([], capsys, "training needs rich, tyro; run: pip install 'mfef_ext[train]'")


def test_doctor_names_them_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    wanted = "training extras: missing yaml, torchvision: pip install 'mfef_ext[train]'"
    assert wanted in inspection.doctor().splitlines()
