"""The operators in a few lines of plain PyTorch: the specification.

Every kernel of this package is measured against these functions in float64. They are also a
backend of their own (``backend="reference"``): the one that exports and differentiates twice.

Notation: N images, C channels, H rows, W columns; branch ``i`` has kernel size ``k_i`` (odd).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_scale_conv2d(
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Sequence[int],
    split: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """Convolve with several kernel sizes side by side and concatenate the results.

    ``split=True`` divides the channels of ``x`` among the branches (MFEF's divide-and-concatenate,
    Zou 2022); ``split=False`` shows every branch all of them (PyConv, Duta 2020).

    x: (N, C, H, W). weights[i]: (Cout_i, Cin_i / groups_i, k_i, k_i). bias: (sum Cout_i,) or None.
    Returns (N, sum Cout_i, H, W).
    """
    if split:
        inputs = x.split([w.shape[1] * g for w, g in zip(weights, groups, strict=True)], dim=1)
    else:
        inputs = (x,) * len(weights)
    biases = (
        [None] * len(weights) if bias is None else bias.split([w.shape[0] for w in weights], dim=0)
    )
    return torch.cat(
        [
            F.conv2d(x_i, w, b, padding=w.shape[-1] // 2, groups=g)
            for x_i, w, b, g in zip(inputs, weights, biases, groups, strict=True)
        ],
        dim=1,
    )


def attention_gates(
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of :func:`dual_attention`: channel gate (N, C), gated map (N, C, H, W), and
    spatial gate (N, 1, H, W), from CBAM's equations 2 and 3."""

    def mlp(v: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(v, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)

    flat = y.flatten(2)
    channel_gate = torch.sigmoid(mlp(flat.mean(2)) + mlp(flat.max(2).values))
    z = y * channel_gate[:, :, None, None]
    pooled = torch.stack([z.max(1).values, z.mean(1)], dim=1)
    spatial_gate = torch.sigmoid(
        F.conv2d(pooled, spatial_weight, padding=spatial_weight.shape[-1] // 2)
    )
    return channel_gate, z, spatial_gate


def dual_attention(
    y: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
) -> Tensor:
    """Channel attention, then spatial attention (CBAM, Woo 2018, equations 2 and 3).

    y: (N, C, H, W). fc1_weight: (h, C), fc1_bias: (h,) or None, fc2_weight: (C, h),
    fc2_bias: (C,) or None. spatial_weight: (1, 2, k, k), its channels in the order (max, mean).
    The gradient of a maximum goes to one element: the first one in memory order of (H, W), and the
    lowest channel. Returns (N, C, H, W).
    """
    _, z, spatial_gate = attention_gates(
        y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight
    )
    return z * spatial_gate


def mfef_block(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    groups: Sequence[int],
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    spatial_weight: Tensor,
    *,
    split: bool = True,
) -> Tensor:
    """``dual_attention(multi_scale_conv2d(x))``: the feature extraction of MFEF (Zou 2022)."""
    y = multi_scale_conv2d(x, conv_weights, groups, split)
    return dual_attention(y, fc1_weight, fc1_bias, fc2_weight, fc2_bias, spatial_weight)


def kd_loss(
    student: Tensor, target: Tensor, temperature: float = 3.0, *, detach_target: bool = True
) -> Tensor:
    """``T^2 KL(softmax(target / T) || softmax(student / T))``, mean over the batch (Hinton 2015).

    student, target: logits, (N, classes). Computed in float32 at least. Returns a scalar; 0 for
    an empty batch. The target gets no gradient unless ``detach_target=False``.

    0 log 0 is 0: a class whose target probability is 0 adds nothing, whatever the student makes of
    it, so that classes masked with -inf on both sides drop out. A student that masks a class which
    its target allows is infinitely wrong. A row of which everything is masked has no softmax, and
    gives NaN, as do logits of NaN and +inf.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    if detach_target:
        target = target.detach()
    log_q = F.log_softmax(student.to(dtype) / temperature, dim=1)
    log_p = F.log_softmax(target.to(dtype) / temperature, dim=1)
    p = log_p.exp()
    # Masked before the product, whose gradient would have 0 times infinity in it.
    divergence = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum()
    return divergence * (temperature**2 / max(student.shape[0], 1))
