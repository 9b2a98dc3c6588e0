"""Pictures are drawn; the numbers in them are those that numpy gives."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mfef_ext import cli
from mfef_ext.distill import OnlineDistiller
from mfef_ext.train import data, evaluate, plot, report
from mfef_ext.train.__main__ import main


def pictures(path):
    found = {}
    for file in path.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000, file
        found[file.name] = file.stat().st_mtime_ns
    return found


def test_all_pictures_of_a_run(trained, capsys):
    before = pictures(trained)
    assert cli.main(["plot", str(trained)]) == 0
    out, after = capsys.readouterr().out, pictures(trained)
    names = {"curves.png", "gates.png", "confusion.png", "diversity.png", "tsne.png"}
    assert set(after) == names and all(name in out for name in names)
    assert all(after[name] > before[name] for name in before)
    run = evaluate.restore(trained, "last")
    with torch.no_grad():
        logits = run.distiller(run.dataset.test.x).logits
    a, b = (logits[f"student{i}"].argmax(1) for i in (0, 1))
    assert (a != b).sum() > 0 and f"for {100 * (a != b).double().mean():.2f} % of 359" in out


def test_pictures_of_the_best_epoch_have_names_of_their_own(tmp_path, capsys):
    options = ["--method", "ce", "--dataset", "fake", "--epochs", "1", "--threads", "1"]
    path = tmp_path / "run"
    assert main([*options, "--students", "resnet8", "--out", str(path)]) == 0
    before = pictures(path)
    assert cli.main(["plot", str(path), "--checkpoint", "best"]) == 0
    after = pictures(path)
    # One student alone has no other to differ from, and ce no gates.
    assert set(after) == {"curves.png", "confusion-best.png", "tsne-best.png"}
    assert after["curves.png"] == before["curves.png"]
    assert "mean distance" not in capsys.readouterr().out


def test_one_picture_that_fails_leaves_the_others(trained, capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no\nroom for points")

    before = pictures(trained)
    monkeypatch.setattr(plot, "draw_tsne", fail)
    assert cli.main(["plot", str(trained)]) == 2
    said, after = capsys.readouterr(), pictures(trained)
    why = "could not be drawn (RuntimeError: no room for points)"
    assert f"mfef: {trained}/tsne.png {why}; mend that" in said.err
    assert len(said.err.splitlines()) == 1
    assert f"{trained}: confusion.png, diversity.png, gates.png, curves.png\n" in said.out
    assert "different answers" in said.out
    assert {name for name in after if after[name] > before.get(name, 0)} >= {*before} - {"tsne.png"}


def test_without_matplotlib_there_are_numbers_and_one_sentence(trained, capsys, monkeypatch):
    """It may be found and not be importable, as with an unknown MPLBACKEND."""
    monkeypatch.setattr("mfef_ext.train.plot", plot)  # to be put back
    monkeypatch.delitem(sys.modules, "mfef_ext.train.plot")
    for name in ("", ".figure", ".colors", ".cm"):
        monkeypatch.setitem(sys.modules, f"matplotlib{name}", None)
    monkeypatch.setattr("mfef_ext.train.__main__.missing_extras", list)
    importlib.import_module("mfef_ext.train.plot")
    assert cli.main(["plot", str(trained)]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and said.err.count("tsne.png") == 1
    assert "could not be drawn (ModuleNotFoundError: import of matplotlib" in said.err
    assert "different answers" in said.out and f"{trained}: no pictures\n" in said.out


def test_pictures_that_there_are_not_do_not_fail(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    net = small_net(4)
    distiller = OnlineDistiller([net], "ce", num_classes=5, tap="0", input_shape=(3, 16, 16))
    labels = torch.arange(5)
    images = data.Images(torch.randn(5, 3, 16, 16), labels, data.Normalisation((0.0,), (1.0,)))
    dataset = SimpleNamespace(test=images, classes="abcde")
    run = SimpleNamespace(dataset=dataset, distiller=distiller)
    figures = {
        "gates.png": partial(report.draw_gates, run),
        "diversity.png": partial(plot.draw_diversity, np.zeros((1, 1)), np.zeros((1, 1))),
    }
    assert report.draw_all(figures, tmp_path) == ([], "") and not list(tmp_path.iterdir())


def test_diversity_by_hand():
    logits = np.random.default_rng(0).standard_normal((3, 7, 4)) * 2
    distance, disagreement = plot.diversity(torch.from_numpy(logits))
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    for i in range(3):
        for j in range(3):
            far = np.mean([np.sqrt(((p[i, n] - p[j, n]) ** 2).sum()) for n in range(7)])
            differ = sum(logits[i, n].argmax() != logits[j, n].argmax() for n in range(7))
            assert distance[i, j] == pytest.approx(far, abs=1e-12)
            assert disagreement[i, j] == pytest.approx(100 * differ / 7)
    assert disagreement.max() > 0


def test_diversity_is_zero_and_largest_where_it_should_be():
    z = torch.eye(5) * 1e4
    distance, disagreement = plot.diversity(torch.stack([z, z, z.roll(1, 0)]))
    assert distance[0, 1] == disagreement[0, 1] == 0
    assert distance[0, 2] == pytest.approx(2**0.5) and disagreement[0, 2] == 100


def test_a_hundred_classes(tmp_path):
    labels, classes = torch.arange(300) % 100, tuple(f"class {c}" for c in range(100))
    logits = {"student0": torch.eye(100)[labels], "fused": torch.eye(100)[labels.roll(1)]}
    plot.draw_confusion(logits, labels, classes, tmp_path / "confusion.png")
    plot.draw_tsne({"fused": torch.randn(300, 8)}, labels, classes, 0, tmp_path / "tsne.png")
    assert set(pictures(tmp_path)) == {"confusion.png", "tsne.png"}


def test_names_of_classes_are_no_formulas(trained, tmp_path):
    run = evaluate.restore(trained, "last")
    classes = ("$x_$", *run.dataset.classes[1:])
    run.dataset = replace(run.dataset, classes=classes)
    assert report.draw_gates(run, tmp_path / "gates.png")
    labels, logits = torch.arange(30) % 10, {"student0": torch.eye(10).repeat(3, 1)}
    plot.draw_confusion(logits, labels, classes, tmp_path / "confusion.png")
    plot.draw_tsne({"fused": torch.randn(30, 8)}, labels, classes, 0, tmp_path / "tsne.png")
    assert set(pictures(tmp_path)) == {"gates.png", "confusion.png", "tsne.png"}


def small_net(channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(channels, 5),
    )


@pytest.mark.parametrize("method", ["ffl", "mfef"])
def test_fused_features_are_what_the_fused_classifier_sees(method):
    students = [small_net(16), small_net(20)]
    distiller = OnlineDistiller(students, method, num_classes=5, tap="0", input_shape=(3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        features, logits = distiller.eval().features(x), distiller(x).logits
        assert torch.equal(distiller.method.head.classifier(features["fused"]), logits["fused"])
        for i, student in enumerate(students):
            last = student[3](features[f"student{i}"])
            torch.testing.assert_close(last, logits[f"student{i}"])


@pytest.mark.parametrize(("method", "options"), [("ce", {}), ("mfef", {"fusion": False})])
def test_nothing_is_called_fused_where_nothing_is(method, options):
    students = [small_net(16), small_net(16)]
    distiller = OnlineDistiller(
        students, method, num_classes=5, tap="0", input_shape=(3, 8, 8), **options
    )
    assert set(distiller.features(torch.randn(2, 3, 8, 8))) == {"student0", "student1"}
