"""A run knows what it was trained on: other data are refused with what differs, moved data are not
other data, and what is asked of the networks alone needs no data."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mfef_ext import cli
from mfef_ext.train import checkpoint
from mfef_ext.train.__main__ import main

OPTIONS = ("--dataset", "folder", "--image-size", "16", "--method", "ce", "--students", "resnet8")
OPTIONS += ("--epochs", "1", "--threads", "1", "--batch-size", "8", "--validation", "0.2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a data set ``photos`` and a ``run`` that was trained on it."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "photos" / "train" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "train" / name / f"{i:02}.png")
    argv = [*OPTIONS, "--data-dir", str(root / "photos"), "--out", str(root / "run")]
    assert main(argv) == 0
    return root


@pytest.fixture
def photos(made):
    """The data set, to be changed; as it was afterwards."""
    kept = made / "kept"
    shutil.copytree(made / "photos", kept)
    yield made / "photos"
    shutil.rmtree(made / "photos", ignore_errors=True)
    kept.rename(made / "photos")


def rename(photos):
    (photos / "train" / "cat").rename(photos / "train" / "zebra")


def add_class(photos):
    shutil.copytree(photos / "train" / "dog", photos / "train" / "emu")


def swap_labels(photos):
    rename(photos)
    (photos / "train" / "dog").rename(photos / "train" / "cat")
    (photos / "train" / "zebra").rename(photos / "train" / "dog")


def change_a_pixel(photos):
    path = photos / "train" / "dog" / "03.png"
    pixels = np.array(Image.open(path))
    pixels[5, 7, 0] ^= 1
    Image.fromarray(pixels).save(path)


def remove_an_image(photos):
    (photos / "train" / "dog" / "03.png").unlink()


CHANGES = {
    rename: "classes differ: zebra is only here and cat is only there",
    add_class: "classes differ: emu is only here",
    swap_labels: "images, their labels or their order are others here",
    change_a_pixel: "images, their labels or their order are others here",
    remove_an_image: "training images here and 16 there",
}


def commands(made):
    """What reads the data of a run again, with the arguments that the command needs."""
    run = made / "run"
    resume = [*OPTIONS, "--out", str(run), "--resume", "auto"]
    return {
        "eval": ["eval", str(run)],
        "plot": ["plot", str(run)],
        "resume": ["train", *resume, "--data-dir", str(made / "photos")],
    }


@pytest.mark.parametrize("command", ["eval", "plot", "resume"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_data_are_refused_with_what_differs(made, photos, capsys, command, change):
    change(photos)
    before = {p.name: p.read_bytes() for p in (made / "run").iterdir() if p.is_file()}
    capsys.readouterr()
    assert cli.main(commands(made)[command]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "last.ckpt was trained on other data than" in error
    assert CHANGES[change] in error and str(photos) in error and "--data-dir" in error
    assert "mfef_ext 0.1.0" not in error and "device" not in error
    assert {p.name: p.read_bytes() for p in (made / "run").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_export_tells_the_classes_that_were_learnt(made, photos, tmp_path, capsys, change):
    recorded = json.loads((made / "run" / "student0.json").read_text())
    change(photos)
    out = tmp_path / "net.safetensors"
    assert cli.main(["export", str(made / "run"), "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text()) == recorded
    said = capsys.readouterr().out
    assert "256 random images (those of the run cannot be had: " in said and CHANGES[change] in said
    assert out.read_bytes() == (made / "run" / "student0.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["safetensors", "torch-export"])
def test_export_needs_no_images(made, photos, tmp_path, capsys, format):
    argv = ["export", str(made / "run"), "--format", format, "--out"]
    suffix = {"safetensors": ".safetensors", "torch-export": ".pt2"}[format]
    assert cli.main([*argv, str(tmp_path / f"a{suffix}")]) == 0
    assert "logits of 4 test images" in capsys.readouterr().out
    shutil.rmtree(photos)
    assert cli.main([*argv, str(tmp_path / f"b{suffix}")]) == 0
    said = capsys.readouterr().out
    assert "logits of 256 random images" in said and f"{photos} is no folder" in said
    assert "bit for bit" in said
    if format == "safetensors":
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        assert json.loads((tmp_path / "b.json").read_text())["classes"] == ["cat", "dog"]


def test_moved_data_are_named_by_data_dir(made, photos, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.move(photos, moved)
    out = tmp_path / "net.safetensors"
    argv = commands(made) | {"export": ["export", str(made / "run"), "--out", str(out)]}
    for command in ("eval", "plot", "resume"):
        capsys.readouterr()
        assert cli.main(argv[command]) == 3
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(photos) in error
        assert "If the images of this run have moved" in error and "--data-dir DIR" in error
    for command in ("eval", "plot", "resume", "export"):
        capsys.readouterr()
        assert cli.main([*argv[command], "--data-dir", str(moved)]) == 0, command
        out = capsys.readouterr().out
        assert "Not as recorded" not in out and "random" not in out
    shutil.rmtree(moved)  # where these were asked for, there are to be no others
    again = ["export", str(made / "run"), "--out", str(tmp_path / "again.safetensors")]
    assert cli.main([*again, "--data-dir", str(moved)]) == 3
    assert f"{moved} is no folder" in capsys.readouterr().err


def test_where_the_data_lie_means_nothing_to_data_that_lie_nowhere(trained, capsys):
    for command in ("eval", "plot", "export"):
        assert cli.main([command, str(trained), "--data-dir", "x"]) == 2
        assert "--data-dir means nothing to --dataset digits" in capsys.readouterr().err


def test_the_data_are_in_all_that_a_run_leaves(made):
    run = made / "run"
    state = checkpoint.load(run / "last.ckpt")
    known = state["data"]
    assert known["classes"] == ["cat", "dog"] and known["input_shape"] == [3, 16, 16]
    assert known["images"] == {"train": 16, "validation": 4, "test": 4}
    for name in ("config.json", "summary.json"):
        assert json.loads((run / name).read_text())["data"] == known
    about = json.loads((run / "student0.json").read_text())
    assert all(about[k] == known[k] for k in ("dataset", "classes", "mean", "std", "scale"))


def test_checkpoints_that_do_not_know_their_data_are_taken_at_their_word(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    for file in run.glob("*.ckpt"):
        state = checkpoint.load(file)
        del state["data"], state["teacher"]
        checkpoint.save(file, state)
    out = tmp_path / "net.safetensors"
    argv = ["train", *OPTIONS, "--data-dir", str(made / "photos"), "--out", str(run)]
    for command in (
        ["eval", str(run)],
        ["plot", str(run)],
        ["export", str(run), "--out", str(out)],
        [*argv, "--resume", "auto"],
    ):
        capsys.readouterr()
        assert cli.main(command) == 0
        said = capsys.readouterr().out.replace("\n", " ")
        assert "did not note which data a run is trained on" in said, command


@pytest.mark.parametrize("split", [["--validation", "0.3"], ["--labels-per-class", "4"]])
def test_resuming_with_another_split_is_refused(made, capsys, split):
    assert cli.main([*commands(made)["resume"], *split]) == 2
    error = capsys.readouterr().err
    assert f"{split[0]}={split[1]} is not what the run in" in error


def test_a_split_that_is_drawn_otherwise_is_noticed(made, capsys, monkeypatch):
    def other(labels, share, seed):
        held = [np.flatnonzero(labels == c)[: round(share * (labels == c).sum())] for c in (0, 1)]
        return np.setdiff1d(np.arange(len(labels)), held), np.sort(np.concatenate(held))

    for module in ("mfef_ext.train.data.folder", "mfef_ext.train.data"):
        monkeypatch.setattr(f"{module}.stratified_split", other)
    assert cli.main(commands(made)["eval"]) == 3
    assert "images, their labels or their order are others here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "plot", "resume"])
def test_another_normalisation_of_the_same_images_is_refused(made, capsys, monkeypatch, command):
    numbers = ((0.25, 0.5, 0.5), (0.25, 0.25, 0.25))
    monkeypatch.setattr("mfef_ext.train.data.folder.pixel_statistics", lambda pixels: numbers)
    assert cli.main(commands(made)[command]) == 3
    error = capsys.readouterr().err
    assert "images are normalised with mean=0.25 0.5 0.5 here and" in error


def test_a_network_that_does_not_fit_blames_no_version_that_is_here(made, tmp_path, capsys):
    state = checkpoint.load(made / "run" / "last.ckpt")
    state["distiller"].popitem()
    checkpoint.save(tmp_path / "last.ckpt", state)
    assert cli.main(["eval", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "does not fit the networks" in error
    assert "Missing key" in error or "Error(s) in loading" in error
    assert "0.1.0" not in error
    state["config"]["versions"]["torch"] = "1.0"
    checkpoint.save(tmp_path / "last.ckpt", state)
    assert cli.main(["eval", str(tmp_path)]) == 4
    assert "and was 1.0" in capsys.readouterr().err


def test_other_libraries_are_said_when_a_run_goes_on(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    state = checkpoint.load(run / "last.ckpt")
    assert {"mfef_ext", "torch", "numpy", "pillow"} <= set(state["config"]["versions"])
    state["config"]["versions"]["pillow"] = "1.7"
    state["config"]["threads"] = 64
    checkpoint.save(run / "last.ckpt", state)
    argv = ["train", *OPTIONS, "--data-dir", str(made / "photos"), "--out", str(run)]
    capsys.readouterr()
    assert cli.main([*argv, "--resume", "auto"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "and was 1.7" in said and "threads is 1 here and was 64" in said


def test_eval_says_what_has_changed_where_numbers_have(made, tmp_path, capsys):
    state = checkpoint.load(made / "run" / "last.ckpt")
    state["metrics"][-1]["test/student0"] += 1.0
    checkpoint.save(tmp_path / "last.ckpt", state)
    assert cli.main(["eval", str(tmp_path)]) == 0
    assert "Not as recorded: nothing that a checkpoint notes" in capsys.readouterr().out
    state["config"] |= {"instruction_set": "other", "forced_backend": "triton"}
    checkpoint.save(tmp_path / "last.ckpt", state)
    assert cli.main(["eval", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "and was other" in said and "forced_backend is None here and was triton" in said


@pytest.mark.parametrize("name", ["mean", "std", "scale", "classes", "input_shape"])
def test_a_teacher_of_other_data_is_refused(made, photos, tmp_path, capsys, name):
    network, about = checkpoint.load_student(made / "run" / "student0.safetensors")
    from mfef_ext.train.models import StudentSpec

    build = about.pop("build")
    spec = StudentSpec(**{**build, "strides": tuple(build["strides"])})
    other = {
        "mean": [0.4, 0.4, 0.4],
        "std": [0.25, 0.25, 0.25],
        "scale": 1.0,
        "classes": ["dog", "cat"],
        "input_shape": [3, 32, 32],
    }
    teacher = tmp_path / "teacher.safetensors"
    about.pop("sha256")
    argv = ["train", *OPTIONS, "--method", "kd", "--data-dir", str(photos), "--teacher"]
    checkpoint.save_student(teacher, network, spec, about | {name: other[name]})
    out = tmp_path / "run"
    assert cli.main([*argv, str(teacher), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"--teacher={teacher} was trained for other images or classes" in error
    assert len(error.splitlines()) == 1 and not out.exists()
    assert cli.main(["eval", str(made / "run"), "--student", str(teacher)]) == 2
    assert f"--student={teacher} was trained for other" in capsys.readouterr().err


def test_a_run_with_a_teacher_needs_its_file_no_more(made, photos, tmp_path, capsys):
    """But it goes on with the same one alone."""
    teacher, other, out = tmp_path / "teacher.safetensors", tmp_path / "run", tmp_path / "taught"
    for suffix in (".safetensors", ".json"):
        shutil.copy(made / "run" / f"student0{suffix}", teacher.with_suffix(suffix))
    argv = ["train", *OPTIONS, "--method", "kd", "--data-dir", str(photos)]
    assert cli.main([*argv, "--teacher", str(teacher), "--out", str(out)]) == 0
    options = [*OPTIONS, "--data-dir", str(photos), "--seed", "1", "--out", str(other)]
    assert main(options) == 0
    capsys.readouterr()
    resume = [*argv, "--out", str(out), "--resume", "auto", "--teacher"]
    assert cli.main([*resume, str(other / "student0.safetensors")]) == 2
    assert "is not the network that the run in" in capsys.readouterr().err
    assert cli.main([*resume, str(teacher)]) == 0
    teacher.unlink()
    capsys.readouterr()
    assert cli.main(["eval", str(out)]) == 0
    assert "Not as recorded" not in capsys.readouterr().out
    assert cli.main(["export", str(out)]) == 0
