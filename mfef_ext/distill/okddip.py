"""``okddip``: peers who weigh one another, and a leader who learns from all (Chen 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import kd_loss
from ..problem import check_number, check_temperature
from .method import Batch, Method, StudentShape, label_losses, register, weighted_sum
from .ramp import ramp_up


@register("okddip")
class DiversePeers(Method):
    """The last student is the leader, the others are its peers.

    With pooled last maps h_i, ``A = softmax_j((W_q h_i) . (W_k h_j))`` over the peers, and the
    target of peer i is ``t_i = sum_j A_ij z_j``::

        L = sum_i CE(z_i) + w(t) [sum_peers kd(z_i <- t_i) + kd(z_leader <- mean of the peers)]

    Chen 2020, equations 3 to 8. The peers' targets are not detached: W_q and W_k learn through
    them alone.

    Args:
        temperature: T of the kd terms.
        ramp_epochs: length of the ramp-up w(t), in epochs; 80 goes with the papers' 300.
    """

    def __init__(
        self,
        shapes: Sequence[StudentShape],
        num_classes: int,
        *,
        temperature: float = 3.0,
        ramp_epochs: float = 80.0,
    ) -> None:
        super().__init__()
        if len(shapes) < 3:
            raise ValueError(
                "method='okddip' needs at least three students, the last of which is the leader "
                f"of the others; got {len(shapes)}"
            )
        width = max(shapes[0].channels // 8, 1)
        peers = [shape.channels for shape in shapes[:-1]]
        self.queries = nn.ModuleList(nn.Linear(c, width, bias=False) for c in peers)
        self.keys = nn.ModuleList(nn.Linear(c, width, bias=False) for c in peers)
        self.temperature = check_temperature(temperature)
        self.ramp_epochs = check_number("ramp_epochs", ramp_epochs)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.labels is None:
            return {}, {}
        pooled = [x.mean((2, 3)) for x in batch.maps[:-1]]
        queries, keys = (
            torch.stack([layer(h) for layer, h in zip(layers, pooled, strict=True)], dim=1)
            for layers in (self.queries, self.keys)
        )
        attention = torch.softmax(queries @ keys.transpose(1, 2), dim=2)  # (N, peers, peers)
        peers = torch.stack(list(batch.logits[:-1]))
        weight = self.kd_weight(batch.epoch)
        terms = label_losses(batch.logits, batch.labels)
        for i, z in enumerate(batch.logits[:-1]):
            target = weighted_sum(attention[:, i].T, peers)
            loss = kd_loss(z, target, self.temperature, detach_target=False)
            terms[f"kd/student{i}"] = weight * loss
        leader = kd_loss(batch.logits[-1], peers.mean(0), self.temperature)
        terms[f"kd/student{len(pooled)}"] = weight * leader
        return {}, terms

    def kd_weight(self, epoch: float) -> float:
        return ramp_up(epoch, self.ramp_epochs)
