"""The layers: drop-in ``nn.Module`` versions of the operators in :mod:`mfef_ext.functional`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from . import functional as F
from . import reference
from .backends import check_backend_name
from .problem import FLOAT_DTYPES, check_groups, check_int, check_kernel_size

Mode = Literal["split", "pyramid", "hierarchical"]
MODES = ("split", "pyramid", "hierarchical")


def _check_positive(name: str, value: object, hint: str) -> int:
    value = check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1; {hint}")
    return value


def _check_list(name: str, value: object, hint: str) -> tuple:
    # A set has no order, and a generator can be read once: neither says which branch is which.
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple, got {type(value).__name__} {value!r}; {hint}"
        )
    return tuple(value)


def _check_float_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype={dtype} must be one of float32, bfloat16, float16, float64")


def _divide(channels: int, parts: int) -> list[int]:
    """Equal parts; the remainder goes to the first ones, one channel each (132 -> 33 x 4)."""
    if channels < parts:
        raise ValueError(
            f"channels={channels} cannot be divided among {parts} branches; "
            f"use at most {channels} kernel sizes"
        )
    return [channels // parts + (i < channels % parts) for i in range(parts)]


def _attributes(layer: nn.Module, own: dict, *names: str) -> list:
    """Parameters or children of ``layer`` by name, ``own`` being its dictionary of them.

    nn.Module takes ten times as long to look one up, and a block has twelve.
    """
    # What is computed, as under torch.nn.utils.parametrize, is in no dictionary.
    return [own[name] if name in own else getattr(layer, name) for name in names]


class MultiScaleConv2d(nn.Module):
    """Convolutions with several kernel sizes side by side, their results concatenated.

    (N, C, H, W) -> (N, out_channels, H, W); stride 1, zero padding ``k // 2``.

    Args:
        channels: C, the channels of the input.
        out_channels: channels of the output; C when None.
        kernel_sizes: one odd kernel size per branch.
        groups: one number of groups per branch, or ``"auto"``: gcd(wanted, Cin_i, Cout_i) with
            wanted = 1 for k <= 3, else ``2 ** ((k - 1) // 2)`` (4, 8, 16 for 5, 7, 9).
        mode: ``"split"`` divides the input channels among the branches (MFEF, Zou 2022);
            ``"pyramid"`` shows every branch all of them (PyConv, Duta 2020);
            ``"hierarchical"`` is split with ``y_i = conv_i(x_i + y_{i-1})`` (Res2Net, Gao 2021),
            which needs ``out_channels == channels`` and equal parts.
        bias: adds a bias per output channel.
        backend: None to choose automatically, or "reference", "cpu", "triton", "cuda".

    Raises ValueError or TypeError naming the argument, its value and what would do.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        kernel_sizes: Sequence[int] = (3, 5, 7, 9),
        groups: Sequence[int] | Literal["auto"] = (1, 4, 8, 16),
        mode: Mode = "split",
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _check_positive(
            "channels", channels, "it is the number of channels of the input"
        )
        out_channels = _check_positive(
            "out_channels",
            channels if out_channels is None else out_channels,
            "leave it out to keep the number of channels",
        )
        _check_float_dtype(dtype)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; use one of {', '.join(map(repr, MODES))}")
        kernel_sizes = _check_list("kernel_sizes", kernel_sizes, "for example (3, 5, 7, 9)")
        if len(kernel_sizes) == 0:
            raise ValueError(
                "kernel_sizes=() must list at least one kernel size, for example (3, 5, 7, 9)"
            )
        kernel_sizes = tuple(
            check_kernel_size(f"kernel_sizes[{i}]", k) for i, k in enumerate(kernel_sizes)
        )
        branches = len(kernel_sizes)
        if isinstance(groups, str) and groups != "auto":
            raise ValueError(f'groups={groups!r} must be "auto" or one number per kernel size')
        if not isinstance(groups, str):
            groups = _check_list("groups", groups, 'one number per kernel size, or "auto"')
        if not isinstance(groups, str) and len(groups) != branches:
            raise ValueError(
                f"groups={tuple(groups)} has {len(groups)} entries but kernel_sizes="
                f'{tuple(kernel_sizes)} has {branches}: give one per branch or "auto"'
            )
        out_parts = _divide(out_channels, branches)
        in_parts = [channels] * branches if mode == "pyramid" else _divide(channels, branches)
        if mode == "hierarchical" and (out_channels != channels or channels % branches):
            raise ValueError(
                f"mode='hierarchical' adds each branch's result to the next branch's input: "
                f"channels={channels} and out_channels={out_channels} must be equal and "
                f"divisible by the {branches} branches"
            )
        if isinstance(groups, str):
            wanted = [1 if k <= 3 else 2 ** ((k - 1) // 2) for k in kernel_sizes]
            groups = [gcd(*t) for t in zip(wanted, in_parts, out_parts, strict=True)]
        groups = tuple(
            check_groups(f"groups[{i}]", g, in_parts[i], out_parts[i]) for i, g in enumerate(groups)
        )
        if backend is not None:
            check_backend_name(backend)
        self.channels = channels
        self.out_channels = out_channels
        self.kernel_sizes = kernel_sizes
        self.groups = groups
        self.mode = mode
        self.backend = backend
        self.weights = nn.ParameterList(
            torch.empty(cout, cin // g, k, k, device=device, dtype=dtype)
            for cin, cout, k, g in zip(in_parts, out_parts, kernel_sizes, groups, strict=True)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform weights and uniform biases, each branch as ``nn.Conv2d`` has them."""
        bounds = []
        for weight in self.weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bounds.append(1 / math.sqrt(weight[0].numel()))
        if self.bias is not None:
            parts = self.bias.split([w.shape[0] for w in self.weights])
            for part, bound in zip(parts, bounds, strict=True):
                nn.init.uniform_(part, -bound, bound)

    def _weights(self) -> list[Tensor]:
        (weights,) = _attributes(self, self._modules, "weights")
        if type(weights) is not nn.ParameterList:
            return list(weights)
        return _attributes(weights, weights._parameters, *map(str, range(len(weights))))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode != "hierarchical":
            return F.multi_scale_conv2d(
                x,
                self._weights(),
                self.groups,
                split=self.mode == "split",
                bias=self.bias,
                backend=self.backend,
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (N, {self.channels}, H, W), got shape {tuple(x.shape)}")
        part = self.channels // len(self.groups)
        outputs: list[Tensor] = []
        for i, (weight, g) in enumerate(zip(self.weights, self.groups, strict=True)):
            x_i = x[:, i * part : (i + 1) * part]
            if outputs:
                x_i = x_i + outputs[-1]
            bias = None if self.bias is None else self.bias[i * part : (i + 1) * part]
            outputs.append(
                F.multi_scale_conv2d(x_i, [weight], [g], bias=bias, backend=self.backend)
            )
        return torch.cat(outputs, dim=1)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.out_channels}, kernel_sizes={self.kernel_sizes}, "
            f"groups={self.groups}, mode={self.mode!r}, bias={self.bias is not None}"
            + (f", backend={self.backend!r}" if self.backend else "")
        )


class DualAttention(nn.Module):
    """Channel attention followed by spatial attention (CBAM, Woo 2018). Keeps the shape.

    Args:
        channels: C of the (N, C, H, W) input.
        reduction: the MLP's hidden width is ``max(C // reduction, 1)``.
        spatial_kernel_size: odd kernel size of the spatial gate's convolution.
        bias: whether the two layers of the MLP have biases.
        backend: None to choose automatically, or "reference", "cpu", "triton", "cuda".
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        spatial_kernel_size: int = 7,
        bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = _check_positive(
            "channels", channels, "it is the number of channels of the input"
        )
        reduction = _check_positive("reduction", reduction, "16 is usual")
        _check_float_dtype(dtype)
        spatial_kernel_size = check_kernel_size("spatial_kernel_size", spatial_kernel_size)
        if backend is not None:
            check_backend_name(backend)
        self.channels = channels
        self.hidden = max(channels // reduction, 1)
        self.spatial_kernel_size = spatial_kernel_size
        self.backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.fc1_weight = parameter(self.hidden, channels)
        self.fc1_bias = parameter(self.hidden) if bias else None
        self.fc2_weight = parameter(channels, self.hidden)
        self.fc2_bias = parameter(channels) if bias else None
        self.spatial_weight = parameter(1, 2, spatial_kernel_size, spatial_kernel_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as ``nn.Linear`` and ``nn.Conv2d`` do."""
        for weight, bias in (
            (self.fc1_weight, self.fc1_bias),
            (self.fc2_weight, self.fc2_bias),
            (self.spatial_weight, None),
        ):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if bias is not None:
                bound = 1 / math.sqrt(weight[0].numel())
                nn.init.uniform_(bias, -bound, bound)

    def _arguments(self) -> list[Tensor]:
        """The parameters in the order of :func:`mfef_ext.functional.dual_attention`."""
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "spatial_weight")
        return _attributes(self, self._parameters, *names)

    def forward(self, y: Tensor) -> Tensor:
        return F.dual_attention(y, *self._arguments(), backend=self.backend)

    def gates(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The channel gate (N, C) and the spatial gate (N, H, W), for pictures and analysis."""
        channel_gate, _, spatial_gate = reference.attention_gates(y, *self._arguments())
        return channel_gate, spatial_gate[:, 0]

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, hidden={self.hidden}, "
            f"spatial_kernel_size={self.spatial_kernel_size}, bias={self.fc1_bias is not None}"
            + (f", backend={self.backend!r}" if self.backend else "")
        )


class MFEFBlock(nn.Module):
    """Multi-scale convolution, then channel + spatial attention, as one fused operator.

    (N, C, H, W) -> (N, C, H, W). In the modes ``"split"`` and ``"pyramid"`` forward and backward
    are one kernel call each; ``"hierarchical"`` runs branch after branch, then the attention.

    Args:
        channels: C. For C that the default groups do not divide (132, 342, 456), use
            ``groups="auto"``.
        kernel_sizes, groups, mode: see :class:`MultiScaleConv2d`.
        reduction, spatial_kernel_size: see :class:`DualAttention`.
        backend: None to choose automatically, or "reference", "cpu", "triton", "cuda".

    Source: Zou, Teng, Niu, "Multi-scale Feature Extraction and Fusion for Online Knowledge
    Distillation", ICANN 2022; sizes and order of the parts are this project's reconstruction.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_sizes: Sequence[int] = (3, 5, 7, 9),
        groups: Sequence[int] | Literal["auto"] = (1, 4, 8, 16),
        mode: Mode = "split",
        reduction: int = 16,
        spatial_kernel_size: int = 7,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = MultiScaleConv2d(
            channels,
            kernel_sizes=kernel_sizes,
            groups=groups,
            mode=mode,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.attention = DualAttention(
            channels,
            reduction=reduction,
            spatial_kernel_size=spatial_kernel_size,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.channels = self.conv.channels
        self.backend = backend

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self.conv.reset_parameters()
        self.attention.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        conv: MultiScaleConv2d
        attention: DualAttention
        conv, attention = _attributes(self, self._modules, "conv", "attention")
        if conv.mode == "hierarchical":
            return attention(conv(x))
        return F.mfef_block(
            x,
            conv._weights(),
            conv.groups,
            *attention._arguments(),
            split=conv.mode == "split",
            backend=self.backend,
        )

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel gate (N, C) and the spatial gate (N, H, W) that ``x`` gives rise to."""
        return self.attention.gates(self.conv(x))

    def extra_repr(self) -> str:
        return f"{self.channels}" + (f", backend={self.backend!r}" if self.backend else "")


class FeatureFusion(nn.Module):
    """Fuses the students' feature maps into one (FFL, Kim 2021).

    Concatenation over channels -> depthwise 3x3 -> BN -> ReLU -> 1x1 -> BN -> ReLU.
    Maps whose size differs from the first one's are brought to it by adaptive average pooling.

    Args:
        in_channels: channels of each student's map, in order.
        out_channels: channels of the fused map.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels = _check_list("in_channels", in_channels, "for example (64, 64)")
        if len(in_channels) == 0:
            raise ValueError(
                "in_channels=() must list the channels of at least one map, for example (64, 64)"
            )
        in_channels = tuple(
            _check_positive(f"in_channels[{i}]", c, "it is the number of channels of a map")
            for i, c in enumerate(in_channels)
        )
        out_channels = _check_positive(
            "out_channels", out_channels, "it is the number of channels of the result"
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        total = sum(in_channels)
        self.depthwise = nn.Conv2d(
            total, total, 3, padding=1, groups=total, bias=False, device=device, dtype=dtype
        )
        self.norm1 = nn.BatchNorm2d(total, device=device, dtype=dtype)
        self.pointwise = nn.Conv2d(total, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.norm2 = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws all parameters anew and clears the running statistics."""
        self.depthwise.reset_parameters()
        self.norm1.reset_parameters()
        self.pointwise.reset_parameters()
        self.norm2.reset_parameters()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) != len(self.in_channels):
            raise ValueError(
                f"maps has {len(maps)} entries but in_channels={self.in_channels} "
                f"was built for {len(self.in_channels)}"
            )
        for i, (m, c) in enumerate(zip(maps, self.in_channels, strict=True)):
            if not isinstance(m, Tensor):
                raise TypeError(f"maps[{i}] must be a torch.Tensor, got {type(m).__name__}")
            if m.dim() != 4 or m.shape[1] != c:
                raise ValueError(f"maps[{i}] must be (N, {c}, H, W), got shape {tuple(m.shape)}")
            if m.shape[0] != maps[0].shape[0]:
                raise ValueError(
                    f"maps[{i}] has batch {m.shape[0]} but maps[0] has {maps[0].shape[0]}"
                )
        size = (maps[0].shape[2], maps[0].shape[3])
        aligned = [
            m if m.shape[2:] == size else nn.functional.adaptive_avg_pool2d(m, size) for m in maps
        ]
        z = torch.relu(self.norm1(self.depthwise(torch.cat(aligned, dim=1))))
        return torch.relu(self.norm2(self.pointwise(z)))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"
