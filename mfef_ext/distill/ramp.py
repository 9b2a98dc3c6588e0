"""How the weight of the distillation terms grows while the students are still bad teachers."""

from __future__ import annotations

import math

from ..problem import check_number


def ramp_up(epoch: float, length: float = 80.0) -> float:
    """``exp(-5 (1 - epoch / length)^2)`` below ``length``, then 1 (Laine & Aila 2017, section 3).

    epoch: epochs trained so far, fractions allowed. length: epochs until the full weight; 0 means
    the full weight from the start. Returns 0.0067 at epoch 0 and 1 from ``length`` on. TypeError or
    ValueError for what is no number, or below 0.
    """
    epoch, length = check_number("epoch", epoch), check_number("length", length)
    if epoch >= length:
        return 1.0
    return math.exp(-5.0 * (1.0 - epoch / length) ** 2)
