"""A network's last map before global pooling: how to get at it without changing the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
            f"tap={tap!r} ran {len(seen)} times in one forward of {type(network).__name__}; "
            "name a layer that runs once"
        )
    return logits, seen[0]


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
            f"tap={tap!r} is no layer of {who} ({type(network).__name__}); its layers are "
            f"{', '.join(name for name, _ in network.named_children())}"
        )
    like = next(network.parameters())
    image = torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype)
    was_training = {module: module.training for module in network.modules()}
    network.eval()  # running statistics stay as they are
    try:
        with torch.no_grad():
            logits, last_map = forward_with_map(network, tap, image)
    finally:
        for module, training in was_training.items():
            module.training = training
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"{who} gives {tuple(logits.shape)} for one image, but num_classes="
            f"{num_classes} asks for (1, {num_classes}); change its last layer or num_classes"
        )
    if not isinstance(last_map, Tensor) or last_map.dim() != 4:
        what = tuple(last_map.shape) if isinstance(last_map, Tensor) else type(last_map)
        raise ValueError(
            f"tap={tap!r} of {who} gives {what}, not a map (N, C, H, W); "
            "name the last layer before global pooling"
        )
    return StudentShape(*last_map.shape[1:])
