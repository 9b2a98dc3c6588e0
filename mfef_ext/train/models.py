"""The students: networks for small images built by name, and those of torchvision and timm.

A student's file holds its weights alone; :class:`StudentSpec` is the small JSON beside it that
says how to build the network they belong to.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distill.tap import find_tap, probe
from ..names import unknown
from . import UsageError, library


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity shortcut (He 2016).

    Where the shape changes, the shortcut subsamples and pads with zero channels ("option A", the
    one He 2016 uses for CIFAR): no parameters. (N, Cin, H, W) -> (N, Cout, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            before = self.added_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.added_channels - before))
        return torch.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm around a shortcut (He 2016, figure 5).

    Where the shape changes, the shortcut is a 1x1 convolution ("option B"). The 3x3 convolution has
    ``width * out_channels / 4`` channels. (N, Cin, H, W) -> (N, Cout, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, width: int) -> None:
        super().__init__()
        inner = width * out_channels // 4
        self.residual = nn.Sequential(
            *(nn.Conv2d(in_channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
            nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False),
            *(nn.BatchNorm2d(inner), nn.ReLU()),
            *(nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU (Zagoruyko 2016, figure 1).

    Where the shape changes, the shortcut is a 1x1 convolution of the normalised input.
    (N, Cin, H, W) -> (N, Cout, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        y = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to its input (Huang 2017): (N, C, H, W) -> (N, C + growth, H, W).

    A bottleneck layer brings the input to ``4 * growth`` channels first.
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        inner = 4 * growth if bottleneck else in_channels
        squeeze = (nn.Conv2d(in_channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(in_channels), nn.ReLU()),
            *(squeeze if bottleneck else ()),
            nn.Conv2d(inner, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], dim=1)


def _stage(
    block: Callable[[int, int, int], nn.Module], cin: int, cout: int, stride: int, blocks: int
) -> nn.Sequential:
    return nn.Sequential(
        block(cin, cout, stride), *(block(cout, cout, 1) for _ in range(blocks - 1))
    )


def _kaiming(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """He 2016's residual network for small images: three stages of 16, 32 and 64 channels, or four
    times as many where ``bottleneck_width`` asks for :class:`Bottleneck` blocks.

    x: (N, in_channels, H, W) -> logits (N, num_classes). ``stage3`` gives the last map,
    (N, 64, H', W') or (N, 256, H', W') with H' = H divided by the product of ``strides``.
    """

    def __init__(
        self,
        blocks: int,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int] = (1, 2, 2),
        *,
        bottleneck_width: int | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        block: Callable[[int, int, int], nn.Module] = BasicBlock
        widths = (16, 32, 64)
        if bottleneck_width is not None:
            block, widths = partial(Bottleneck, width=bottleneck_width), (64, 128, 256)
        self.stage1 = _stage(block, 16, widths[0], strides[0], blocks)
        self.stage2 = _stage(block, widths[0], widths[1], strides[1], blocks)
        self.stage3 = _stage(block, widths[1], widths[2], strides[2], blocks)
        self.classifier = nn.Linear(widths[2], num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean((2, 3)))


def _classifying(layers: dict[str, nn.Module], classifier: nn.Module) -> nn.Module:
    last = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": classifier}
    network = nn.Sequential(OrderedDict(layers | last))
    _kaiming(network)
    return network


def wide_resnet(
    blocks: int, widen: int, in_channels: int, num_classes: int, strides: Sequence[int]
) -> nn.Module:
    """Zagoruyko 2016's WRN-d-k: ``blocks`` = (d - 4) / 6 in each of three stages, ``widen`` = k.

    ``final`` gives the last map, (N, 64 k, H', W').
    """
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)}
    for i in range(3):
        layers[f"stage{i + 1}"] = _stage(WideBlock, widths[i], widths[i + 1], strides[i], blocks)
    layers["final"] = nn.Sequential(nn.BatchNorm2d(widths[3]), nn.ReLU())
    return _classifying(layers, nn.Linear(widths[3], num_classes))


def densenet40(
    growth: int, bottleneck: bool, in_channels: int, num_classes: int, strides: Sequence[int]
) -> nn.Module:
    """Huang 2017's DenseNet of 40 layers in three blocks, from ``2 * growth`` channels on.

    With ``bottleneck`` it is DenseNet-BC: bottleneck layers, and transitions that halve the
    channels. ``final`` gives the last map: (N, 132, H', W') or, plain, (N, 456, H', W') at 12.
    """
    channels = 2 * growth
    stem = nn.Conv2d(in_channels, channels, 3, strides[0], padding=1, bias=False)
    layers: dict[str, nn.Module] = {"stem": stem}
    for i in range(3):
        if i > 0:
            fewer = channels // 2 if bottleneck else channels
            layers[f"transition{i}"] = nn.Sequential(
                *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, fewer, 1, bias=False)),
                *((nn.AvgPool2d(strides[i]),) if strides[i] > 1 else ()),
            )
            channels = fewer
        dense = nn.Sequential()
        for _ in range(6 if bottleneck else 12):
            dense.append(DenseLayer(channels, growth, bottleneck))
            channels += growth
        layers[f"block{i + 1}"] = dense
    layers["final"] = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    return _classifying(layers, nn.Linear(channels, num_classes))


def vgg16(in_channels: int, num_classes: int, strides: Sequence[int]) -> nn.Module:
    """VGG-16 with batch norm (Simonyan 2015) and three linear layers of 512 for small images.

    ``features`` gives the map before the last pooling, (N, 512, H/16, W/16) whatever ``strides``:
    for images of 32 or more pixels.
    """
    features = nn.Sequential()
    channels = in_channels
    for i, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if i > 0:
            features.append(nn.MaxPool2d(2))
        for _ in range(depth):
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            features.append(nn.BatchNorm2d(width)).append(nn.ReLU())
            channels = width
    classifier = nn.Sequential(
        *(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, num_classes),
    )
    return _classifying({"features": features, "last_pool": nn.MaxPool2d(2)}, classifier)


# What builds each network from (input channels, classes, strides). ResNet-d of basic blocks has
# (d - 2) / 6 of them per stage (He 2016, section 4.2). "resnet110-bottleneck" and
# "wrn20-8-bottleneck" are what OKDDip (Chen 2020) and later papers call ResNet-110 and WRN-20-8.
_OWN: dict[str, Callable[[int, int, Sequence[int]], nn.Module]] = {
    **{f"resnet{d}": partial(ResNet, (d - 2) // 6) for d in (8, 14, 20, 32, 56, 110)},
    "resnet110-bottleneck": partial(ResNet, 12, bottleneck_width=1),
    "wrn20-8-bottleneck": partial(ResNet, 2, bottleneck_width=8),
    "vgg16": vgg16,
    "densenet40-12": partial(densenet40, 12, True),
    "densenet40-12-plain": partial(densenet40, 12, False),
}
STUDENTS = tuple(_OWN)


def _own(name: str) -> Callable[[int, int, Sequence[int]], nn.Module] | None:
    wide = re.fullmatch(r"wrn-(\d{2,3})-([1-9]\d?)", name)
    if wide and (int(wide[1]) - 4) % 6 == 0:
        return partial(wide_resnet, (int(wide[1]) - 4) // 6, int(wide[2]))
    return _OWN.get(name)


def _source(name: str) -> tuple[str, str]:
    """("torchvision" or "timm" or "" for our own, the name there)."""
    for source in ("torchvision", "timm"):
        if name.startswith(source + ":"):
            return source, name.removeprefix(source + ":")
    return "", name


def _known(name: str) -> tuple[str, list[str]]:
    """The name within its library, and those that there are; UsageError without the library."""
    source, wanted = _source(name)
    if source == "torchvision":
        models = library("torchvision").models
        return wanted, models.list_models(module=models)
    if source == "timm":
        timm = library("timm")
        return wanted, [wanted] if timm.is_model(wanted) else timm.list_models()
    return name, [name] if _own(name) else list(STUDENTS)


def is_known(name: str) -> bool:
    """Whether a network has this name. Raises UsageError if its library is not there."""
    wanted, known = _known(name)
    return wanted in known


def check_known(name: str) -> None:
    """Raises UsageError if no network has this name, or its library is not there."""
    wanted, known = _known(name)
    if wanted not in known:
        choice = (
            f"{', '.join(STUDENTS)}, wrn-DEPTH-WIDTH such as wrn-16-2, torchvision:NAME or "
            "timm:NAME"
        )
        prefix = name.removesuffix(wanted)
        raise UsageError(unknown(f"--students={name}", wanted, known, prefix, choice))


@dataclass(frozen=True)
class StudentSpec:
    """What it takes to build a student again, and the layer to tap: all of it plain JSON.

    ``strides`` are those of the three stages of our own networks; others have none.
    """

    model: str
    in_channels: int
    num_classes: int
    strides: tuple[int, ...] = ()
    tap: str = ""

    def build(self) -> nn.Module:
        """The network with fresh weights, drawn from torch's global generator.

        Raises KeyError for an unknown name, UsageError if its library is not there.
        """
        source, name = _source(self.model)
        if source == "timm":
            return library("timm").create_model(
                name, pretrained=False, num_classes=self.num_classes, in_chans=self.in_channels
            )
        if source == "torchvision":
            # These two would give auxiliary logits in training.
            plain = {"aux_logits": False, "init_weights": True}
            options = plain if name in ("googlenet", "inception_v3") else {}
            get_model = library("torchvision").models.get_model
            return get_model(name, weights=None, num_classes=self.num_classes, **options)
        own = _own(self.model)
        if own is None:
            raise KeyError(self.model)
        return own(self.in_channels, self.num_classes, self.strides)


def build_students(
    names: Sequence[str],
    shape: tuple[int, int, int],
    num_classes: int,
    taps: Sequence[str] = (),
) -> tuple[list[nn.Module], list[StudentSpec]]:
    """The networks for images of ``shape`` (C, H, W), and what it takes to build them again.

    ``taps``: none to find each layer to tap, one for all or one each. Raises UsageError if a
    network cannot take such images or has no such layer.
    """
    networks, specs = [], []
    for i, name in enumerate(names):
        strides = strides_for(shape[1]) if _own(name) else ()
        spec = StudentSpec(name, shape[0], num_classes, strides)
        network = spec.build()
        try:
            tap = taps[i % len(taps)] if taps else find_tap(network, shape)
            probe(network, tap, shape, num_classes, f"--students={name}")
        except ValueError as error:
            raise UsageError(str(error)) from error
        except (RuntimeError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"--students={name} cannot take images of shape {shape} ({reason}); "
                "use another network or larger images"
            ) from error
        networks.append(network)
        specs.append(replace(spec, tap=tap))
    return networks, specs


def strides_for(image_size: int) -> tuple[int, int, int]:
    """The strides of the three stages for square images of ``image_size`` pixels.

    Spatial attention and kernels up to 9x9 are void on a 1x1 or 2x2 map, so a stage halves the map
    only while it stays at 8x8 or more: 32 -> (1, 2, 2) as in He 2016, 16 -> (1, 1, 2), and the 8x8
    digits are kept at 8x8. Enlarging them to 32x32 gives the same last map at 2.3 times the work.
    """
    if image_size >= 32:
        return (1, 2, 2)
    return (1, 1, 2) if image_size >= 16 else (1, 1, 1)
