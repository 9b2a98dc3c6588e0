"""The layers: drop-in ``nn.Module`` versions of the operators in :mod:`mfef_ext.functional`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from . import functional as F
from . import reference
from .backends import check_backend_name
from .names import a, shown
from .ops import dispatch
from .ops.dispatch import keep_as_defined, why_called
from .problem import FLOAT_DTYPES, check_dense, check_groups, check_int, check_kernel_size

Mode = Literal["split", "pyramid", "hierarchical"]
MODES = ("split", "pyramid", "hierarchical")


def _check_positive(name: str, value: object, hint: str) -> int:
    value = check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}={shown(value)} must be at least 1; {hint}")
    if value >= 2**31:
        raise ValueError(f"{name}={shown(value)} must be below 2^31; {hint}")
    return value


def _check_list(name: str, value: object, hint: str) -> tuple:
    # A set has no order, and a generator can be read once: neither says which branch is which.
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple, got {type(value).__name__} {shown(value)}; {hint}"
        )
    return tuple(value)


def _check_float_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype={dtype} must be one of float32, bfloat16, float16, float64")


def _divide(channels: int, parts: int) -> list[int]:
    """Equal parts; the remainder goes to the first ones, one channel each (132 -> 33 x 4)."""
    if channels < parts:
        raise ValueError(
            f"channels={shown(channels)} cannot be divided among {parts} branches; "
            f"use at most {channels} kernel sizes"
        )
    return [channels // parts + (i < channels % parts) for i in range(parts)]


# A fused operator computes with the parameters of layers that it does not call. It may stand in for
# them only where nobody can tell, so before every call it is asked what calling them would do.
# Whatever is not known to be harmless means that they are called. That is asked of six layers for
# one block, and may not cost what the forward of one small image does.


def _leaf(x: Any, *layers: nn.Module) -> bool:
    """Whether ``x`` comes from a tracer of torch.fx that wants to see one of ``layers`` called."""
    tracer = getattr(x, "tracer", None)
    return tracer is not None and any(
        tracer.is_leaf_module(layer, tracer.path_of_module(layer)) for layer in layers
    )


def _reset_children(layer: nn.Module) -> None:
    """``reset_parameters`` of every layer inside that has one, the outermost first."""
    for child in layer.children():
        reset = getattr(child, "reset_parameters", None)
        if reset is None:
            _reset_children(child)
        else:
            reset()


def _branch_inputs(x: Tensor, channels: int, parts: Sequence[int]) -> Sequence[Tensor]:
    """What each branch is shown of ``x``: ``parts`` channels of it, or all where each takes all.

    One function, so that a tracer of torch.fx records one call instead of its checks.
    """
    if has_torch_function((x,)):
        return handle_torch_function(_branch_inputs, (x,), x, channels, parts)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    check_dense("x", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (N, {channels}, H, W), got shape {tuple(x.shape)}")
    return x.split(list(parts), dim=1) if sum(parts) == channels else [x] * len(parts)


@keep_as_defined
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
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.

    ``branches`` holds one ``nn.Conv2d`` per branch. One operator computes all of them, unless that
    could be told from calling them, as where one has hooks (pruning, old weight norm), was replaced
    or changed; then they are called. States with the keys ``weights.<i>`` and ``bias`` load too.

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
            raise ValueError(
                f"mode={shown(mode)} is unknown; use one of {', '.join(map(repr, MODES))}"
            )
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
            raise ValueError(f'groups={shown(groups)} must be "auto" or one number per kernel size')
        if not isinstance(groups, str):
            groups = _check_list("groups", groups, 'one number per kernel size, or "auto"')
        if not isinstance(groups, str) and len(groups) != branches:
            raise ValueError(
                f"groups={shown(groups)} has {len(groups)} entries but kernel_sizes="
                f'{shown(kernel_sizes)} has {branches}: give one per branch or "auto"'
            )
        out_parts = _divide(out_channels, branches)
        in_parts = [channels] * branches if mode == "pyramid" else _divide(channels, branches)
        if mode == "hierarchical" and (out_channels != channels or channels % branches):
            raise ValueError(
                f"mode='hierarchical' adds each branch's result to the next branch's input: "
                f"channels={shown(channels)} and out_channels={shown(out_channels)} must be equal "
                f"and divisible by the {branches} branches"
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
        self.branch_channels = tuple(in_parts)
        self.branches = nn.ModuleList(
            nn.Conv2d(cin, cout, k, padding=k // 2, groups=g, bias=bias, device=device, dtype=dtype)
            for cin, cout, k, g in zip(in_parts, out_parts, kernel_sizes, groups, strict=True)
        )
        self._as_made = tuple(
            (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
            for conv in self.branches
        )

    def reset_parameters(self) -> None:
        """Draws all parameters anew, each branch's as ``nn.Conv2d`` does."""
        _reset_children(self)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The branches' weights, (Cout_i, Cin_i / groups_i, k_i, k_i) each."""
        branches: Any = self.branches
        return tuple(branch.weight for branch in branches)

    def _branch_parameters(self) -> tuple[str, list[Tensor], list[Tensor]]:
        """Why the branches have to be called, "" if not; else their weights, and biases if any."""
        if not dispatch.CAN_TELL:
            return "this torch does not tell what calling them would do", [], []
        if any(dispatch.HOOKS_OF_ALL_MODULES):
            return "hooks of all modules are registered", [], []
        if cls := dispatch.redefined():
            return f"{cls} is called in another way", [], []
        modules: Any = self._modules
        branches, made = modules["branches"]._modules.values(), self._as_made
        if len(branches) != len(made):
            raise ValueError(
                f"branches holds {len(branches)} modules but kernel_sizes={self.kernel_sizes} has "
                f"{len(made)}: keep one per branch"
            )
        weights, biases = [], []
        for branch, options in zip(branches, made, strict=True):
            if why := why_called(branch, nn.Conv2d):
                return f"a branch {why}", [], []
            own = branch.__dict__
            now = own["stride"], own["padding"], own["dilation"], own["groups"], own["padding_mode"]
            if now != options:
                return "a branch has other options than it was made with", [], []
            parameters = own["_parameters"]
            try:
                weights.append(parameters["weight"])
                if (bias := parameters["bias"]) is not None:
                    biases.append(bias)
            except KeyError:
                return "a branch computes its parameters", [], []
        if biases and len(biases) < len(weights):
            return "not every branch has a bias", [], []
        return "", weights, biases

    def forward(self, x: Tensor) -> Tensor:
        why, weights, biases = self._branch_parameters()
        if not why and self.mode != "hierarchical":
            if biases and not isinstance(x, Tensor):
                # A tracer of torch.fx records what is done with parameters that it hands out.
                biases = [branch.bias for branch in self.branches]
            return F.multi_scale_conv2d(
                x,
                weights,
                self.groups,
                split=self.mode == "split",
                bias=torch.cat(biases) if biases else None,
                backend=self.backend,
            )
        inputs = _branch_inputs(x, self.channels, self.branch_channels)
        outputs: list[Tensor] = []
        for i, branch in enumerate(self.branches):
            x_i = inputs[i]
            if self.mode == "hierarchical" and outputs:
                x_i = x_i + outputs[-1]
            if why:
                outputs.append(branch(x_i))
                continue
            bias = biases[i] if biases else None
            outputs.append(
                F.multi_scale_conv2d(
                    x_i, [weights[i]], [self.groups[i]], bias=bias, backend=self.backend
                )
            )
        return torch.cat(outputs, dim=1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before the branches were modules, they had their weights in a list and one bias together.
        for key in [key for key in state_dict if key.startswith(f"{prefix}weights.")]:
            name = re.sub(r"^weights\.(\d+)$", r"branches.\1.weight", key.removeprefix(prefix))
            state_dict[prefix + name] = state_dict.pop(key)
        bias = state_dict.get(f"{prefix}bias")
        widths = [getattr(branch, "out_channels", 0) for branch in self.branches]
        if bias is not None and bias.shape == (sum(widths),):
            del state_dict[f"{prefix}bias"]
            for i, part in enumerate(bias.split(widths)):
                state_dict[f"{prefix}branches.{i}.bias"] = part.clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.out_channels}, kernel_sizes={self.kernel_sizes}, "
            f"groups={self.groups}, mode={self.mode!r}"
            + (f", backend={self.backend!r}" if self.backend else "")
        )


@keep_as_defined
class DualAttention(nn.Module):
    """Channel attention followed by spatial attention (CBAM, Woo 2018). Keeps the shape.

    Args:
        channels: C of the (N, C, H, W) input.
        reduction: the MLP's hidden width is ``max(C // reduction, 1)``.
        spatial_kernel_size: odd kernel size of the spatial gate's convolution.
        bias: whether the two layers of the MLP have biases.
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.
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

    def _arguments(self) -> list[Any]:
        """The parameters in the order of :func:`mfef_ext.functional.dual_attention`."""
        own: dict[str, Any] = self.__dict__.get("_parameters", {})
        try:
            return [
                own["fc1_weight"],
                own["fc1_bias"],
                own["fc2_weight"],
                own["fc2_bias"],
                own["spatial_weight"],
            ]
        except KeyError:  # what is computed, as under torch.nn.utils.parametrize, is not in there
            return [
                self.fc1_weight,
                self.fc1_bias,
                self.fc2_weight,
                self.fc2_bias,
                self.spatial_weight,
            ]

    def forward(self, y: Tensor) -> Tensor:
        return F.dual_attention(y, *self._arguments(), backend=self.backend)

    def gates(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The channel gate (N, C) and the spatial gate (N, H, W), for pictures and analysis."""
        return self._gates_of(self, y)

    def _gates_of(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gates that arise in ``network(x)``, of which this layer is a part or all."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # Here hooks have made the input and the parameters what they are in a forward.
            gates = reference.attention_gates(inputs[0], *self._arguments())
            seen.append((gates[0], gates[2][:, 0]))

        handle = self.register_forward_hook(look)
        try:
            network(x)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise RuntimeError(
                f"the attention ran {len(seen)} times in one forward of {type(network).__name__}; "
                "its gates can be seen where it runs once and is not compiled"
            )
        return seen[0]

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
        backend: one of :data:`mfef_ext.backends.BACKEND_NAMES`; None chooses automatically.

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

    @property
    def backend(self) -> str | None:
        """The backend of the parts; setting it sets both."""
        return getattr(self.conv, "backend", None)

    @backend.setter
    def backend(self, name: str | None) -> None:
        for part in (self.conv, self.attention):
            if isinstance(part, (MultiScaleConv2d, DualAttention)):
                part.backend = name

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        _reset_children(self)

    def _fused(self) -> tuple[str, list[Tensor]]:
        """Why the parts have to be called, "" if not; else the weights of the convolution."""
        if not dispatch.CAN_TELL:
            return "this torch does not tell what calling them would do", []
        parts: Any = self._modules
        conv, attention = parts["conv"], parts["attention"]
        if why := why_called(conv, MultiScaleConv2d):
            return f"conv {why}", []
        if why := why_called(attention, DualAttention):
            return f"attention {why}", []
        if conv.mode == "hierarchical":
            return "mode='hierarchical' is not fused", []
        if conv.backend != attention.backend:
            return f"conv has backend={conv.backend!r}, attention {attention.backend!r}", []
        why, weights, biases = conv._branch_parameters()
        return ("conv has a bias", []) if biases else (why, weights)

    def forward(self, x: Tensor) -> Tensor:
        why, weights = self._fused()
        if why:
            return self.attention(self.conv(x))
        parts: Any = self._modules
        conv, attention = parts["conv"], parts["attention"]
        if not isinstance(x, Tensor) and _leaf(x, conv, attention):
            return attention(conv(x))
        return F.mfef_block(
            x,
            weights,
            conv.groups,
            *attention._arguments(),
            split=conv.mode == "split",
            backend=conv.backend,
        )

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channel gate (N, C) and the spatial gate (N, H, W) that ``x`` gives rise to.

        TypeError if the attention was replaced by something without a :class:`DualAttention`.
        """
        for layer in self.attention.modules():
            if isinstance(layer, DualAttention):
                return layer._gates_of(self, x)
        raise TypeError(
            f"attention is {a(type(self.attention).__name__)}, which has no gates; "
            "use a DualAttention"
        )

    def extra_repr(self) -> str:
        return f"{self.channels}" + (f", backend={self.backend!r}" if self.backend else "")


def _concatenated(maps: Sequence[Tensor], in_channels: Sequence[int]) -> Tensor:
    """The maps, brought to the first one's size, in one: (N, sum of in_channels, H, W).

    One function, so that a tracer of torch.fx records one call instead of its checks.
    """
    several = maps if isinstance(maps, (list, tuple)) else (maps,)
    if has_torch_function(several):
        return handle_torch_function(_concatenated, several, maps, in_channels)
    if len(maps) != len(in_channels):
        raise ValueError(
            f"maps has {len(maps)} entries but in_channels={in_channels} "
            f"was built for {len(in_channels)}"
        )
    for i, (m, c) in enumerate(zip(maps, in_channels, strict=True)):
        if not isinstance(m, Tensor):
            raise TypeError(f"maps[{i}] must be a torch.Tensor, got {type(m).__name__}")
        check_dense(f"maps[{i}]", m)
        if m.dim() != 4 or m.shape[1] != c:
            raise ValueError(f"maps[{i}] must be (N, {c}, H, W), got shape {tuple(m.shape)}")
        if m.shape[0] != maps[0].shape[0]:
            raise ValueError(f"maps[{i}] has batch {m.shape[0]} but maps[0] has {maps[0].shape[0]}")
    size = (maps[0].shape[2], maps[0].shape[3])
    aligned = [
        m if m.shape[2:] == size else nn.functional.adaptive_avg_pool2d(m, size) for m in maps
    ]
    return torch.cat(aligned, dim=1)


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
        _reset_children(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        z = torch.relu(self.norm1(self.depthwise(_concatenated(maps, self.in_channels))))
        return torch.relu(self.norm2(self.pointwise(z)))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"
