"""A checkpoint is scored again: the numbers are those that were recorded, or it says so."""

import json

import pytest

from mfef_ext import cli
from mfef_ext.train import checkpoint
from mfef_ext.train.__main__ import main
from mfef_ext.train.models import StudentSpec


def evaluated(capsys, *argv):
    """The rows that ``mfef eval`` prints, as {role: (now, recorded)}, and everything printed."""
    capsys.readouterr()
    assert cli.main(["eval", *map(str, argv)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[2:] if not line.startswith("Not")]
    return {role: (float(now), float(recorded)) for role, now, recorded in rows}, out


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("which", ["last", "best"])
def test_every_role_is_scored_as_recorded(trained, capsys, which):
    found, out = evaluated(capsys, trained, "--checkpoint", which)
    summary = json.loads((trained / "summary.json").read_text())
    expected = summary[f"{which}_test_accuracy"]
    assert set(found) == {"student0", "student1", "students", "ensemble", "fused"}
    assert found == {role: (round(v, 2), round(v, 2)) for role, v in expected.items()}
    assert f"{which}.ckpt: % of 359 test images of digits" in out and "Not as" not in out


def test_a_student_file_is_scored_alone(trained, capsys):
    found, _ = evaluated(capsys, trained, "--student", trained / "student1.safetensors")
    value = round(metrics(trained)[-1]["test/student1"], 2)
    assert found == {"student": (value, value)}


def test_the_numbers_are_computed_and_a_difference_is_said(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "last.ckpt")
    for part in ("weight", "bias"):
        state["distiller"][f"students.0.classifier.{part}"] *= -1
    checkpoint.save(tmp_path / "last.ckpt", state)
    found, out = evaluated(capsys, tmp_path)
    now, recorded = found["student0"]
    assert now < 10 < 50 < recorded and found["student1"][0] == found["student1"][1]
    assert "Not as recorded" in out


@pytest.mark.parametrize(
    "options", [["--method", "kdcl", "--variant", "general"], ["--method", "ab", "--teacher", ...]]
)
def test_methods_with_something_of_their_own_are_restored(trained, tmp_path, capsys, options):
    options = [str(trained / "student0.safetensors") if o is ... else o for o in options]
    short = ["--dataset", "digits", "--epochs", "1", "--threads", "1", "--out"]
    assert main([*short, str(tmp_path / "run"), *options]) == 0
    found, out = evaluated(capsys, tmp_path / "run")
    assert "Not as" not in out and {"student0", "student1", "ensemble"} <= set(found)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["{tmp}"], 4, ["last.ckpt cannot be read (No such file"]),
        (["{run}", "--device", "cuda:77"], 2, ["--device=cuda:77 cannot be used"]),
        (["{run}", "--student", "{tmp}/none.safetensors"], 4, ["none.safetensors cannot be read"]),
        (["{run}", "--student", "{run}/last.ckpt"], 4, ["does not describe|last.json cannot be"]),
    ],
)
def test_refused_in_one_sentence(trained, tmp_path, capsys, argv, status, words):
    assert cli.main(["eval", *(a.format(tmp=tmp_path, run=trained) for a in argv)]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert all(any(w in captured.err for w in word.split("|")) for word in words)


def test_another_device_chooses_its_own_backend(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "last.ckpt")
    state["config"] |= {"device": "cpu", "backend": "cuda"}
    checkpoint.save(tmp_path / "last.ckpt", state)
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "--backend=cuda does not work here" in capsys.readouterr().err
    _, out = evaluated(capsys, tmp_path, "--device", "cpu")
    assert "Not as" not in out


NOTHING_YET = {"metrics": [], "timings": [], "epoch": 0, "best_epoch": 0}


def test_before_the_first_epoch_there_is_nothing_to_score(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "last.ckpt")
    checkpoint.save(tmp_path / "last.ckpt", state | NOTHING_YET)
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "before the end of the first epoch" in capsys.readouterr().err


def test_a_run_stopped_within_an_epoch_is_to_be_ended_first(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "last.ckpt")
    config = state["config"] | {"epochs": 4}
    checkpoint.save(tmp_path / "last.ckpt", state | {"step": 7, "config": config})
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "from the middle of epoch 4; end the run with --resume auto" in capsys.readouterr().err


def test_a_student_of_other_images_is_refused(trained, tmp_path, capsys):
    network, about = checkpoint.load_student(trained / "student0.safetensors")
    build = about.pop("build")
    spec = StudentSpec(**build | {"strides": tuple(build["strides"])})
    file = tmp_path / "student0.safetensors"
    checkpoint.save_student(file, network, spec, about | {"input_shape": [1, 16, 16]})
    assert cli.main(["eval", str(trained), "--student", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--student={file} was trained for other images or classes" in error
    assert "images are 1x8x8 here and 1x16x16 there" in error


def test_tensorboard_has_what_the_metrics_have(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained / "tensorboard")).Reload()
    rows = metrics(trained)
    assert set(events.Tags()["scalars"]) == {*rows[0], "images_per_second"}
    for name in rows[0]:
        values = [e.value for e in events.Scalars(name)]
        assert values == pytest.approx([row[name] for row in rows])
