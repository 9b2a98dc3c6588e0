"""What a step may be asked for: parts of a batch, less precision, averaged weights, torch.compile,
several seeds."""

import json

import pytest
import torch
from torch import nn

from mfef_ext import cli
from mfef_ext.train import checkpoint, data, loop
from mfef_ext.train.__main__ import main
from mfef_ext.train.config import TrainConfig
from mfef_ext.train.processes import join
from mfef_ext.train.run import prepare
from mfef_ext.train.timing import HeadClock

QUICK = ("--dataset", "fake", "--epochs", "2", "--threads", "1", "--batch-size", "48")


def train(path, *options):
    assert main([*QUICK, "--out", str(path), *options]) == 0
    return path


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def prepared(tmp_path, **options):
    config = TrainConfig(dataset="fake", threads=1, out=tmp_path / "run", **options)
    return prepare(config, join(config.device))


def gradients(run, size):
    run.distiller.train()
    ((x, y), *_) = data.training_batches(run.dataset, size, 0, 0)
    x = [views.to(next(run.distiller.parameters()).dtype) for views in x]
    clock = HeadClock(nn.Module(), y.device)
    terms = loop.Training(run, run.distiller, clock, None, []).gradients(x, y, size, 1.0)
    parameters = run.distiller.named_parameters()
    return terms, {n: p.grad.clone() for n, p in parameters if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 7, 100])
def test_parts_of_a_batch_add_up_to_it(tmp_path, parts):
    """Without batch normalisation, which sees a part at a time. In float64, in which rounding turns
    no maximum and no ReLU: how convolutions add depends on the batch and on the processor."""
    run = prepared(tmp_path)
    run.distiller.double()
    for module in run.distiller.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = lambda x: x
    terms, whole = gradients(run, 31)
    object.__setattr__(run.config, "accumulate", parts)
    terms_in_parts, in_parts = gradients(run, 31)
    for name, term in terms.items():
        torch.testing.assert_close(terms_in_parts[name], term, rtol=1e-5, atol=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(
            in_parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
        )


def test_accumulation_trains_and_resumes(tmp_path):
    path = train(tmp_path / "run", "--accumulate", "3", "--method", "kdcl")
    assert rows(path)[0]["loss"] > 0
    assert json.loads((path / "config.json").read_text())["accumulate"] == 3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, amp):
    # 60 images: float16 is slow here.
    options = ("--method", "mfef", "--students", "resnet8", "--epochs", "1")
    options += ("--labels-per-class", "6", "--batch-size", "20")
    full = train(tmp_path / "full", *options)
    mixed = train(tmp_path / "mixed", *options, "--amp", amp)
    a, b = rows(full)[0]["loss"], rows(mixed)[0]["loss"]
    assert a != b and a == pytest.approx(b, rel=0.05)
    state = checkpoint.load(mixed / "last.ckpt")
    assert all(t.dtype != torch.bfloat16 for t in state["distiller"].values())
    assert ("scale" in state["scaler"]) == (amp == "fp16")
    again = train(tmp_path / "again", *options, "--amp", amp)
    assert (mixed / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()


def test_float16_steps_that_overflow_are_left_out_until_the_scale_fits(tmp_path, monkeypatch):
    def scaler(device, enabled):
        return torch.amp.GradScaler(device, init_scale=2.0**40, enabled=enabled)

    with monkeypatch.context() as patch:
        patch.setattr("mfef_ext.train.run.GradScaler", scaler)
        options = ("--method", "ce", "--students", "resnet8", "--epochs", "1")
        options += ("--labels-per-class", "8", "--batch-size", "2")  # 40 steps
        path = train(tmp_path / "run", "--amp", "fp16", *options)
    scale = checkpoint.load(path / "last.ckpt")["scaler"]["scale"]
    assert 1 < scale < 2.0**40


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    real = loop.Training.gradients

    def planted(training, *arguments):
        terms = real(training, *arguments)
        training.run.distiller.students[1].stem.weight.grad[0, 0, 0, 0] = torch.inf
        return terms

    monkeypatch.setattr(loop.Training, "gradients", planted)
    assert main([*QUICK, "--out", str(tmp_path / "run")]) == 5
    error = capsys.readouterr().err
    assert "epoch 1, step 1: the gradient of students.1.stem.weight is not finite" in error


def test_averaged_weights(tmp_path, capsys):
    path = train(tmp_path / "run", "--ema", "0.5", "--method", "ce")
    plain = train(tmp_path / "plain", "--method", "ce")
    for averaged, row in zip(rows(path), rows(plain), strict=True):
        assert {k: v for k, v in averaged.items() if "-ema" not in k} == row
        assert "test/student1-ema" in averaged
    student, about = checkpoint.load_student(path / "student0-ema.safetensors")
    images = data.load("fake", 0.1).test
    with torch.no_grad():
        right = (student(images.x).argmax(1) == images.y).sum()
    assert about["test_accuracy"] == rows(path)[-1]["test/student0-ema"]
    assert about["test_accuracy"] == pytest.approx(100 * int(right) / len(images))
    # They are exported where they are asked for, and scored beside the others.
    for options, name in (((), "student1"), (("--ema",), "student1-ema")):
        assert cli.main(["export", str(path), "--student", "1", *options]) == 0
        for suffix in (".safetensors", ".json"):
            exported = (path / "export" / f"{name}{suffix}").read_bytes()
            assert exported == (path / f"{name}{suffix}").read_bytes()
    assert f"student 1, averaged weights, of {path}; logits of" in capsys.readouterr().out
    last, mean = (path / "export" / f"student1{s}.safetensors" for s in ("", "-ema"))
    assert last.read_bytes() != mean.read_bytes()
    assert cli.main(["eval", str(path)]) == 0
    score = f"{about['test_accuracy']:.2f}"
    scored = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["student0-ema", score, score] in scored
    # Decay 0 keeps the newest weights alone.
    newest = train(tmp_path / "newest", "--ema", "0", "--method", "ce", "--epochs", "1")
    ours, theirs = ((newest / f"student0{s}.safetensors").read_bytes() for s in ("", "-ema"))
    assert ours == theirs


@pytest.mark.slow
def test_compiled_students_learn_the_same(tmp_path):
    # 256 images in batches of 64: every size is compiled on its own.
    options = ("--method", "ce", "--students", "resnet8", "--epochs", "1", "--validation", "0")
    options += ("--batch-size", "64")
    plain = train(tmp_path / "plain", *options)
    compiled = train(tmp_path / "compiled", *options, "--compile")
    assert rows(compiled)[0]["loss"] == pytest.approx(rows(plain)[0]["loss"], rel=1e-3)


def test_several_seeds(tmp_path, capsys):
    out = tmp_path / "runs"
    short = ("--method", "ce", "--students", "resnet8", "--epochs", "1")
    options = [*QUICK, *short, "--out", str(out), "--seeds", "4", "5"]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "| ce | fake | resnet8 | 4 5 | mean of the students |" in said and "±" in said
    alone = train(tmp_path / "alone", *short, "--seed", "5")
    for name in ("metrics.jsonl", "student0.safetensors"):
        assert (out / "seed5" / name).read_bytes() == (alone / name).read_bytes()
    assert main(options) == 2
    assert "to go on with its runs: --seeds 4 5 --resume auto" in capsys.readouterr().err
    assert main([*options, "--resume", "auto"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--accumulate", "0"], "--accumulate=0 must be at least 1"),
        (["--ema", "1"], "--ema=1.0 must be in [0, 1), or None"),
        (["--seeds", "1", "1"], "--seeds=1 1 names a seed twice"),
        (["--seeds", "-1"], "--seeds=-1 must be"),
        (["--seeds", "0", "1", "--batch-size", "5000"], "--batch-size=5000"),
        (["--compile", "--share-stem"], "do not go together"),
        (["--share-stem", "--students", "resnet8", "resnet14"], "of one architecture"),
    ],
)
def test_refused(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.glob("runs/*")) == []
