"""Exported students answer as the trained ones where nothing of this package can be imported."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from mfef_ext import cli
from mfef_ext.train import checkpoint, evaluate, export

# Without this package: import fails, and so would anything in a file that asks for it.
ELSEWHERE = """
import sys
sys.modules["mfef_ext"] = None
try:
    import mfef_ext
    raise SystemExit("mfef_ext can be imported")
except ImportError:
    pass
import torch
torch.set_num_threads(1)
file, expected = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
"""
RELOAD = {
    "safetensors": """
from safetensors.torch import load_file
weights = load_file(file)
assert set(weights) == set(expected["weights"])
assert all(torch.equal(weights[k], expected["weights"][k]) for k in weights)
""",
    "torch-export": """
about = {"about.json": ""}
network = torch.export.load(file, extra_files=about).module()
assert expected["about"] in about["about.json"]
for n in (1, 2, 5, 64):
    assert torch.equal(network(expected["x"][:n]), expected[f"logits{n}"]), n
""",
    "onnx": """
import onnx
from onnx.reference import ReferenceEvaluator
model = onnx.load(file)
assert expected["about"] in {p.key: p.value for p in model.metadata_props}["about"]
assert {o.domain for o in model.opset_import} == {""}
for value in (*model.graph.input, *model.graph.output):
    assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
evaluator = ReferenceEvaluator(model)
for n in (1, 2, 5):
    (logits,) = evaluator.run(None, {"images": expected["x"][:n].numpy()})
    wanted = expected[f"logits{n}"]
    assert (torch.from_numpy(logits) - wanted).abs().max() <= 3e-5 * wanted.abs().max(), n
""",
}


@pytest.mark.parametrize("format", export.SUFFIXES)
def test_reloads_without_this_package(trained, tmp_path, capsys, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    run = evaluate.restore(trained, "best")
    student, x = run.distiller.students[1], run.dataset.test.x[:64]
    with torch.no_grad():
        expected = {f"logits{n}": student(x[:n]) for n in (1, 2, 5, 64)}
    expected |= {"x": x, "weights": student.state_dict(), "about": '"classes": ["0", "1"'}
    torch.save(expected, tmp_path / "expected.pt")

    file = tmp_path / f"out{export.SUFFIXES[format]}"
    argv = ["--student", "1", "--checkpoint", "best", "--format", format, "--out", str(file)]
    assert cli.main(["export", str(trained), *argv]) == 0
    assert f"{file}: student 1 of {trained}; logits of" in capsys.readouterr().out
    beside = {"out.json"} if format == "safetensors" else set()
    assert {p.name for p in tmp_path.iterdir()} == {"expected.pt", file.name} | beside
    assert b"mfef" not in file.read_bytes()
    weights = sum(t.nbytes for t in student.state_dict().values())
    assert file.stat().st_size < 1.5 * weights  # no images of the data set
    code = ELSEWHERE + RELOAD[format]
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "expected.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.mark.slow
def test_networks_of_timm_and_torchvision(tmp_path):
    """Both train together for an epoch and answer as trained where this package is not."""
    pytest.importorskip("timm")
    run = tmp_path / "run"
    students = ("timm:test_resnet", "torchvision:resnet18")
    options = ["--dataset", "fake32", "--epochs", "1", "--batch-size", "50", "--threads", "1"]
    options += ["--labels-per-class", "10"]
    argv = [*options, "--students", *students, "--tap", "layer3", "--out", str(run)]
    assert cli.main(["train", *argv]) == 0
    trained = evaluate.restore(run, "last")
    x = trained.dataset.test.x[:64]
    for i, student in enumerate(trained.distiller.students):
        with torch.no_grad():
            expected = {f"logits{n}": student(x[:n]) for n in (1, 2, 5, 64)}
        torch.save({"x": x, "about": '"classes": ["class 0"'} | expected, tmp_path / "expected.pt")
        file = tmp_path / f"{i}.pt2"
        argv = ["--student", str(i), "--format", "torch-export", "--out", str(file)]
        assert cli.main(["export", str(run), *argv]) == 0
        code = ELSEWHERE + RELOAD["torch-export"]
        command = [sys.executable, "-c", code, str(file), str(tmp_path / "expected.pt")]
        subprocess.run(command, check=True, cwd=tmp_path)


def test_safetensors_are_those_of_the_run_folder(trained, tmp_path):
    out = tmp_path / "deployed" / "net.safetensors"
    assert cli.main(["export", str(trained), "--out", str(out)]) == 0
    for suffix in (".safetensors", ".json"):
        original = trained / f"student0{suffix}"
        assert out.with_suffix(suffix).read_bytes() == original.read_bytes()


def test_best_says_of_which_epoch_it_is(trained, tmp_path):
    out = tmp_path / "best.safetensors"
    assert cli.main(["export", str(trained), "--checkpoint", "best", "--out", str(out)]) == 0
    about, summary = (
        json.loads(file.read_text())
        for file in (out.with_suffix(".json"), trained / "summary.json")
    )
    assert about["epoch"] == summary["best_epoch"]
    assert about["test_accuracy"] == summary["best_test_accuracy"]["student0"]


@pytest.mark.parametrize("format", export.SUFFIXES)
def test_a_student_that_answers_otherwise_is_not_left(
    trained, tmp_path, capsys, monkeypatch, format
):
    if format == "onnx":
        pytest.importorskip("onnxscript")

    def other(network):
        changed = copy.deepcopy(network)
        changed.classifier.bias.data[3] += 1e-3
        return changed

    save, program = checkpoint.save_student, export._program
    monkeypatch.setattr(export, "save_student", lambda f, net, *a: save(f, other(net), *a))
    monkeypatch.setattr(export, "_program", lambda net, x: program(other(net), x))
    out = tmp_path / f"out{export.SUFFIXES[format]}"
    assert cli.main(["export", str(trained), "--format", format, "--out", str(out)]) == 4
    error = capsys.readouterr().err
    assert f"{out} was not written: its logits differ" in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["{run}", "--student", "2"], 2, "--student=2 must be from 0 to 1"),
        (["{run}", "--ema"], 2, "--ema means nothing to {run}, which was trained without"),
        (["{run}", "--student", "-1"], 2, "--student=-1 must be from 0 to 1"),
        (["{run}", "--format", "onnx", "--out", "{tmp}/a.pt2"], 2, "must end in .onnx"),
        (["{run}", "--out", "{tmp}/a.safetensors"], 2, "a.json exists and nothing is ever overwri"),
        (["{tmp}"], 4, "last.ckpt is damaged"),
        (["{run}", "--out", "{tmp}/a.json/b.safetensors"], 4, "a file cannot be read or written"),
    ],
)
def test_refused_in_one_sentence(trained, tmp_path, capsys, argv, status, words):
    (tmp_path / "a.json").write_text("mine")
    damaged = bytearray((trained / "last.ckpt").read_bytes())
    damaged[-1000] ^= 4
    (tmp_path / "last.ckpt").write_bytes(bytes(damaged))
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", *(a.format(tmp=tmp_path, run=trained) for a in argv)]) == status
    error = capsys.readouterr().err
    assert words.format(run=trained) in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "a.json").read_text() == "mine"


def test_onnx_without_its_packages_is_one_sentence(trained, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert cli.main(["export", str(trained), "--format", "onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err
