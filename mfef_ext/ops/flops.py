"""FLOPs of the operators for torch.utils.flop_counter, as PyTorch counts the same on plain tensors.

Convolutions and matrix products count, each by PyTorch's own formula: taps outside of the map are
products too, sums for a bias, pooling and gates are none. So a fused block has the same count as
its specification, whatever its kernels do.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]

# stride, padding, dilation, transposed, output_padding and groups of a convolution, as its formulas
# want them: they look at the shapes and at whether it is transposed.
_OPTIONS = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)


class _Formulas:
    """A formula for each operator, named as it is; the arguments are those of its schema, tensors
    being given by their shapes."""

    def __init__(self, registry: Mapping[Any, Callable[..., int]]) -> None:
        aten = torch.ops.aten
        self._conv_flop, self._mm_flop = registry[aten.convolution], registry[aten.mm]
        self._conv_backward_flop = registry[aten.convolution_backward]

    def multi_scale_conv2d(self, x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        n, _c, h, w = x
        return sum(self._conv(x, weight, (n, weight[0], h, w)) for weight in weights)

    def multi_scale_conv2d_backward(
        self, grad: Shape, x: Shape, weights: Sequence[Shape], groups: Sequence[int], split: bool,
        bias: Any, need_x: bool, need_parameters: bool, *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        n, _c, h, w = x
        return sum(
            self._conv_backward(
                (n, weight[1] * g, h, w), weight, (n, weight[0], h, w), need_x, need_parameters
            )
            for weight, g in zip(weights, groups, strict=True)
        )

    def dual_attention(
        self, y: Shape, fc1: Shape, b1: Any, fc2: Shape, b2: Any, spatial: Shape, *_: Any, **__: Any
    ) -> int:
        n, _c, h, w = y
        # The MLP sees the mean and the maximum.
        products = 2 * (self._linear(n, fc1) + self._linear(n, fc2))
        return products + self._conv((n, 2, h, w), spatial, (n, 1, h, w))

    def dual_attention_backward(
        self, grad: Shape, y: Shape, fc1: Shape, b1: Any, fc2: Shape, b2: Any, spatial: Shape,
        mean: Any, max: Any, max_index: Any, spatial_gate: Any, channel_index: Any, need_x: bool,
        need_parameters: bool, **_: Any,
    ) -> int:  # fmt: skip
        n, _c, h, w = y
        # A product for the gradient of a layer's input, one for that of its weight.
        products = (need_x + need_parameters) * self._linear(n, fc1)
        products += (1 + need_parameters) * self._linear(n, fc2)
        pooled, gate = (n, 2, h, w), (n, 1, h, w)
        return 2 * products + self._conv_backward(pooled, spatial, gate, True, need_parameters)

    def mfef_block(
        self, x: Shape, weights: Sequence[Shape], groups: Any, split: Any, *rest: Any, **_: Any
    ) -> int:
        return self.multi_scale_conv2d(x, weights) + self.dual_attention(x, *rest)

    def mfef_block_backward(
        self, grad: Shape, x: Shape, weights: Sequence[Shape], groups: Sequence[int], split: bool,
        fc1: Shape, b1: Any, fc2: Shape, b2: Any, spatial: Shape, y: Any, mean: Any, max: Any,
        max_index: Any, spatial_gate: Any, channel_index: Any, need_x: bool, need_parameters: bool,
        *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        return self.multi_scale_conv2d_backward(
            grad, x, weights, groups, split, None, need_x, need_parameters
        ) + self.dual_attention_backward(
            grad, x, fc1, b1, fc2, b2, spatial, mean, max, max_index, spatial_gate, channel_index,
            True, need_parameters,  # the convolution's result has a gradient in any case
        )  # fmt: skip

    def _linear(self, n: int, weight: Shape) -> int:
        return self._mm_flop((n, weight[1]), (weight[1], weight[0]))

    def _conv(self, x: Shape, weight: Shape, out: Shape) -> int:
        return self._conv_flop(x, weight, None, *_OPTIONS, out_val=out)

    def _conv_backward(
        self, x: Shape, weight: Shape, out: Shape, need_x: bool, need_weight: bool
    ) -> int:
        mask, results = (need_x, need_weight, False), (x, weight, None)
        return self._conv_backward_flop(out, x, weight, None, *_OPTIONS, mask, out_val=results)


_NAMESPACES: list[str] = []  # those that were registered before there was a counter


def _register(counter: ModuleType, namespace: str) -> None:
    formulas = _Formulas(counter.flop_registry)
    for op in ("multi_scale_conv2d", "dual_attention", "mfef_block"):
        for name in (op, f"{op}_backward"):
            target = getattr(getattr(torch.ops, namespace), name)
            counter.register_flop_formula(target)(getattr(formulas, name))


class _OnImport(MetaPathFinder):
    """Registers the formulas as soon as the counter is imported.

    It copies what is registered when a FlopCounterMode is made, and importing it imports Triton,
    which takes as long as all of this package.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                for namespace in _NAMESPACES:
                    _register(module, namespace)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register(namespace: str) -> None:
    """Makes the operators of a namespace count, now or once there is something that counts."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], namespace)
        return
    if not _NAMESPACES:
        sys.meta_path.insert(0, _OnImport())
    _NAMESPACES.append(namespace)
