"""The documents' examples of the trainer, run as they stand there."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mfef_ext.distill import OnlineDistiller
from mfef_ext.distill.method import METHODS
from mfef_ext.train.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def example(document, word):
    """The first Python block of the document that holds ``word``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    return next(block for block in blocks if word in block)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images, ten of each of two classes, in the working directory."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = draw.integers(100 * label, 100 * label + 90, (70, 64, 3))
            Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)


def test_the_layer_in_five_lines():
    names: dict = {}
    exec(example("README.md", "MFEFBlock(64)"), names)
    assert names["out"].shape == names["x"].grad.shape == (128, 64, 8, 8)


@pytest.mark.slow
def test_own_networks_and_images(photos):
    code = example("docs/recipes.md", "OnlineDistiller")
    assert code.count("range(10)") == code.count("batch_size=64") == 1
    exec(code.replace("range(10)", "range(2)").replace("batch_size=64", "batch_size=10"), {})
    weights = torch.load("student.pt", weights_only=True)
    assert weights["fc.weight"].shape == (2, 512)


def test_mixed_labels():
    layers = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    net = nn.Sequential(*layers)
    students = [net, copy.deepcopy(net)]
    distiller = OnlineDistiller(students, num_classes=10, tap="0", input_shape=(3, 8, 8))
    optimizer = torch.optim.SGD(distiller.parameter_groups(), lr=0.1)
    before = copy.deepcopy(students[0].state_dict())
    given = {"distiller": distiller, "optimizer": optimizer, "epoch": 1}
    given["loader"] = [(torch.randn(6, 3, 8, 8), torch.arange(6)) for _ in range(4)]
    exec(example("docs/recipes.md", "v2.MixUp"), given)
    assert given["out"].loss.isfinite()
    assert not any(torch.equal(before[n], p) for n, p in students[0].named_parameters())


def test_own_method(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "mean-of-peers", None)  # goes away after the test
    del METHODS["mean-of-peers"]
    exec(example("docs/recipes.md", "mean-of-peers"), {})
    options = ["--method", "mean-of-peers", "--temperature", "2", "--dataset", "fake"]
    assert main([*options, "--epochs", "1", "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    assert "kd/student1" in (tmp_path / "run" / "metrics.csv").read_text()
