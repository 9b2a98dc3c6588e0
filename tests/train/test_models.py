"""The networks of the papers, by their parameter counts and maps; those of other libraries."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from mfef_ext.distill.tap import find_tap, probe
from mfef_ext.train import UsageError, checkpoint
from mfef_ext.train.models import (
    STUDENTS,
    StudentSpec,
    build_students,
    check_known,
    strides_for,
)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet110", 1.73)],
)
def test_parameter_counts_of_table_6(name, millions):
    net = StudentSpec(name, 3, 10, (1, 2, 2)).build()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


def test_parameters_of_the_default_student():
    """As docs/recipes.md counts them: for digits."""
    net = StudentSpec("resnet8", 1, 10, (1, 1, 1)).build()
    assert sum(p.numel() for p in net.parameters()) == 75_002


# For 100 classes: millions of parameters as the papers print them (None: not printed), exactly,
# and the last map of 32x32 images.
NETWORKS = {
    "resnet8": (None, 81_140, (64, 8, 8)),
    "resnet14": (None, 178_356, (64, 8, 8)),
    "resnet20": (None, 275_572, (64, 8, 8)),
    "resnet32": (0.47, 470_004, (64, 8, 8)),
    "resnet56": (None, 858_868, (64, 8, 8)),
    "resnet110": (1.73, 1_733_812, (64, 8, 8)),
    "resnet110-bottleneck": (1.17, 1_170_868, (256, 8, 8)),
    "wrn-16-2": (0.70, 703_284, (128, 8, 8)),
    "wrn-40-2": (None, 2_255_156, (128, 8, 8)),
    "wrn20-8-bottleneck": (6.87, 6_871_220, (256, 8, 8)),
    "vgg16": (15.30, 15_299_748, (512, 2, 2)),
    "densenet40-12": (0.19, 188_092, (132, 8, 8)),
    "densenet40-12-plain": (None, 1_100_428, (456, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_papers(name):
    assert set(STUDENTS) <= set(NETWORKS)
    millions, exactly, last_map = NETWORKS[name]
    [net], [spec] = build_students([name], (3, 32, 32), 100)
    count = sum(p.numel() for p in net.parameters())
    assert count == exactly and (millions is None or round(count / 1e6, 2) == millions)
    shape = probe(net, spec.tap, (3, 32, 32), 100, name)
    assert (shape.channels, shape.height, shape.width) == last_map
    # The map is what the classifier sees, averaged: for VGG-16 behind one more pooling.
    if name != "vgg16":
        x = torch.randn(2, 3, 32, 32)
        seen = []
        net.get_submodule(spec.tap).register_forward_hook(lambda m, i, o: seen.append(o))
        logits = net.eval()(x)
        expected = net.get_submodule("classifier")(seen[0].mean((2, 3)))
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", STUDENTS)
def test_depth_is_in_the_name(name):
    net = StudentSpec(name, 1, 10, (1, 1, 1)).build()
    named = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    assert len([n for n in named if "shortcut" not in n]) == int(digits[0])


@pytest.mark.parametrize(("size", "last"), [(8, 8), (16, 8), (32, 8), (64, 16)])
@pytest.mark.parametrize(("name", "channels"), [("resnet8", 64), ("wrn-10-1", 64)])
def test_the_last_map_is_never_small(size, last, name, channels):
    [net], [spec] = build_students([name], (3, size, size), 7)
    assert spec.strides == strides_for(size)
    shape = probe(net, spec.tap, (3, size, size), 7, name)
    assert (shape.channels, shape.height, shape.width) == (channels, last, last)


@pytest.mark.parametrize(
    ("name", "size", "tap", "last_map"),
    [
        ("resnet18", 64, "layer4", (512, 2, 2)),
        ("resnet18", 32, "layer4", (512, 1, 1)),
        # pooled by a function; squeeze-and-excitation; pooled before more layers
        ("shufflenet_v2_x0_5", 64, "conv5", (1024, 2, 2)),
        ("densenet121", 32, "features", (1024, 1, 1)),
        ("mobilenet_v3_small", 64, "features", (576, 2, 2)),
        ("regnet_y_400mf", 64, "trunk_output", (440, 2, 2)),
        ("squeezenet1_1", 64, "classifier.2", (5, 3, 3)),
        ("vgg11", 64, "features", (512, 2, 2)),
        ("googlenet", 64, "inception5b", (1024, 2, 2)),
    ],
)
def test_torchvision_and_where_its_last_map_is(name, size, tap, last_map):
    [net], [spec] = build_students([f"torchvision:{name}"], (3, size, size), 5)
    shape = probe(net, spec.tap, (3, size, size), 5, name)
    assert spec.tap == tap and (shape.channels, shape.height, shape.width) == last_map
    assert net.training and not any(m._forward_hooks for m in net.modules())
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)  # in training too


@pytest.mark.parametrize("name", ["vgg16", "torchvision:alexnet", "torchvision:vit_b_16"])
def test_images_that_are_too_small_are_refused(name):
    with pytest.raises(UsageError, match=f"--students={name} cannot take images of shape"):
        build_students([name], (3, 16, 16), 10)


def test_a_network_that_says_nothing_when_it_refuses():
    class Silent(nn.Conv2d):
        def forward(self, x):
            raise AssertionError

    class Spec(StudentSpec):
        def build(self):
            return Silent(3, 3, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfef_ext.train.models.StudentSpec", Spec)
        with pytest.raises(UsageError, match=r"of shape .* \(AssertionError\)"):
            build_students(["timm:silent"], (3, 16, 16), 10)


def test_grey_images_and_a_network_for_colours():
    with pytest.raises(UsageError, match=r"cannot take images of shape.*3 channels"):
        build_students(["torchvision:resnet18"], (1, 64, 64), 10)


class Tokens(nn.Module):
    """A transformer's shape: a map of patches first, then tokens."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.mix(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class ChannelsLast(Tokens):
    """As in some Swin implementations."""

    def forward(self, x):
        return self.head(self.mix(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("network", [Tokens, ChannelsLast, lambda: nn.Linear(4, 5)])
def test_no_map_is_found_where_there_is_none(network):
    net = network()
    with pytest.raises(ValueError, match="name one with tap"):
        find_tap(net, (3, 32, 32) if hasattr(net, "head") else (1, 1, 4))


def test_taps_override():
    names = ("resnet8", "torchvision:resnet18")
    _, specs = build_students(names, (3, 64, 64), 5, ("stage2", "layer3"))
    assert [s.tap for s in specs] == ["stage2", "layer3"]
    with pytest.raises(UsageError, match="tap='layer3' is no layer of --students=resnet8"):
        build_students(names, (3, 64, 64), 5, ("layer3",))


class AdaptivePool(nn.Sequential):
    """As timm's: a pooling that consists of layers, the last of which gives a 1x1 map."""


@pytest.fixture
def fake_timm(monkeypatch):
    """A module with the part of timm's interface that is used."""
    timm = types.ModuleType("timm")

    class Net(nn.Sequential):
        def __init__(self, num_classes, in_chans):
            conv = nn.Conv2d(in_chans, 6, 3, 2, 1)
            pool = AdaptivePool(nn.AdaptiveAvgPool2d(1), nn.Identity())
            super().__init__(
                conv, pool, nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(6, num_classes)
            )

    def create_model(name, pretrained, num_classes, in_chans):
        assert name == "tinynet" and pretrained is False
        return Net(num_classes, in_chans)

    timm.is_model = lambda name: name.partition(".")[0] in ("tinynet", "resnet50")
    timm.list_models = lambda: ["tinynet", "resnet50"]
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_timm_by_name(fake_timm):
    check_known("timm:tinynet")
    check_known("timm:resnet50.a1_in1k")
    with pytest.raises(UsageError, match="did you mean timm:tinynet"):
        check_known("timm:tinynets")
    with pytest.raises(UsageError, match="--students=timm:hf-hub:a/b is unknown"):
        check_known("timm:hf-hub:a/b")  # would go to the network
    [net], [spec] = build_students(["timm:tinynet"], (1, 8, 8), 3)
    assert spec == StudentSpec("timm:tinynet", 1, 3, (), "0")
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_without_timm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for use in (check_known, lambda name: StudentSpec(name, 3, 10).build()):
        with pytest.raises(UsageError, match=r"timm cannot be imported .*pip install timm"):
            use("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet31", "did you mean resnet32"),
        ("wrn-17-2", "use one of resnet8"),  # depth is not 6 n + 4
        ("wrn-16-0", "use one of resnet8"),
        ("torchvision:resnet19", "did you mean torchvision:resnet18"),
        ("torchvision:fcn_resnet50", "torchvision:resnet50"),  # segments
        ("hub:resnet18", "torchvision:NAME or timm:NAME"),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(UsageError) as error:
        check_known(name)
    assert f"--students={name} is unknown; " in str(error.value) and hint in str(error.value)


def about_images(channels, classes):
    """What a student's file says of the data that it was trained on."""
    return {
        "dataset": "folder",
        "classes": [str(c) for c in range(classes)],
        "input_shape": (channels, 32, 32),
        "mean": (0.5,),
        "std": (0.25,),
        "epoch": 1,
        "test_accuracy": 50.0,
    }


@pytest.mark.parametrize(
    "name",
    ["resnet110-bottleneck", "wrn-10-1", "densenet40-12", "torchvision:resnet18", "timm:tinynet"],
)
def test_every_kind_is_rebuilt_from_its_file(name, tmp_path, fake_timm):
    [net], [spec] = build_students([name], (3, 32, 32), 5)
    path = tmp_path / "student0.safetensors"
    checkpoint.save_student(path, net, spec, about_images(3, 5))
    loaded, about = checkpoint.load_student(path)
    assert about["build"] == json.loads(json.dumps(about["build"])) and about["build"]["tap"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), net.eval()(x))


def test_a_student_of_an_unknown_network_is_refused(tmp_path):
    path = tmp_path / "student0.safetensors"
    spec = StudentSpec("resnet9", 1, 10, tap="stage3")
    checkpoint.save_student(path, nn.Linear(1, 1), spec, about_images(1, 10))
    with pytest.raises(checkpoint.CheckpointError, match="names a network that there is not"):
        checkpoint.load_student(path)
