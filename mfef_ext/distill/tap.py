"""A network's last map before global pooling: how to get at it without changing the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..names import shown
from .method import StudentShape


def forward_with_map(network: nn.Module, tap: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The network's logits, and the output of its layer ``tap``.

    The hook lives for one call: the network is left as it was, can be copied, saved and deployed.
    """
    seen: list[Tensor] = []
    hook = network.get_submodule(tap).register_forward_hook(lambda *a: seen.append(a[2]))
    try:
        logits = network(x)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise ValueError(
            f"tap={shown(tap)} ran {len(seen)} times in one forward of {type(network).__name__}; "
            "name a layer that runs once"
        )
    return logits, seen[0]


@contextmanager
def _shown_zeros(network: nn.Module, input_shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """One zero image to show to the network, which is in eval mode meanwhile: running statistics
    stay as they are. No gradients."""
    like = next(network.parameters(), torch.empty(0))
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    finally:
        for module, training in was_training.items():
            module.training = training


def find_tap(network: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The name of the layer whose output is the last map (N, C, H, W) before global pooling.

    Watches every layer while the network sees one zero image of ``input_shape`` (C, H, W). Raises
    ValueError if there is no such layer, as in transformers on tokens.
    """
    outputs: list[tuple[str, str, tuple[int, ...]]] = []  # in order: name, class, shape

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def seen(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, type(module).__name__.lower(), tuple(output.shape)))

        return module.register_forward_hook(seen)

    hooks = [watch(name, module) for name, module in network.named_modules() if name]
    try:
        with _shown_zeros(network, input_shape) as image:
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    # The global pooling is the last adaptive one, unless maps with an extent come after it, as
    # after the pooling inside squeeze-and-excitation: then it is a function, and no layer.
    extended = [i for i, (_, _, s) in enumerate(outputs) if len(s) == 4 and max(s[2:]) > 1]
    after = extended[-1] if extended else -1
    pools = [i for i, (_, kind, _) in enumerate(outputs) if "adaptive" in kind and i > after]
    end = pools[-1] if pools else len(outputs)
    within = outputs[end][0] + "." if pools else None  # a pooling can consist of layers
    runs = Counter(name for name, _, _ in outputs)
    maps = [
        i
        for i, (name, kind, shape) in enumerate(outputs[:end])
        if len(shape) == 4 and "pool" not in kind and runs[name] == 1
        if not (within and name.startswith(within))
    ]
    name, shape = (outputs[maps[-1]][0], outputs[maps[-1]][2]) if maps else ("", ())
    tokens = maps and any(len(s) == 3 for _, _, s in outputs[maps[-1] : end])
    # A map of a square image that is not square has its channels last.
    if not maps or tokens or (input_shape[1] == input_shape[2] and shape[2] != shape[3]):
        raise ValueError(
            f"no layer of {type(network).__name__} gives a map (N, C, H, W) before global pooling "
            "that could be found; name one with tap (--tap), or use another network"
        )
    return name


def probe(
    network: nn.Module,
    tap: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    who: str,
) -> StudentShape:
    """The shape of the last map of ``network`` for images of ``input_shape`` (C, H, W).

    Shows it one zero image and leaves it as it was. ``who`` names the network in errors.
    Raises ValueError if ``tap`` gives no map or the logits are not (1, num_classes).
    """
    if not tap or tap not in dict(network.named_modules()):
        raise ValueError(
            f"tap={shown(tap)} is no layer of {who} ({type(network).__name__}); its layers are "
            f"{', '.join(name for name, _ in network.named_children())}"
        )
    with _shown_zeros(network, input_shape) as image:
        try:
            logits, last_map = forward_with_map(network, tap, image)
        except RuntimeError as error:
            raise ValueError(
                f"{who} ({type(network).__name__}) cannot take an image of input_shape="
                f"{tuple(input_shape)} ({str(error).splitlines()[0]}); give channels, height and "
                "width of your images"
            ) from error
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{who} ({type(network).__name__}) gives {type(logits).__name__} for an image, not "
            f"logits (1, {num_classes}); wrap it in a module that returns its logits alone"
        )
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"{who} gives {tuple(logits.shape)} for one image, but num_classes="
            f"{num_classes} asks for (1, {num_classes}); change its last layer or num_classes"
        )
    if not isinstance(last_map, Tensor) or last_map.dim() != 4:
        what = tuple(last_map.shape) if isinstance(last_map, Tensor) else type(last_map)
        raise ValueError(
            f"tap={shown(tap)} of {who} gives {what}, not a map (N, C, H, W); "
            "name the last layer before global pooling"
        )
    return StudentShape(*last_map.shape[1:])
