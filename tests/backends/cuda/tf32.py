"""What tensor cores take float32 for."""

import dataclasses

import numpy as np
import torch
from torch import Tensor


def tf32(values: np.ndarray) -> np.ndarray:
    """To the nearest float32 with 10 bits of mantissa, ties away from zero."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    scaled = np.ldexp(mantissa, 11)
    return np.ldexp(np.trunc(scaled + np.copysign(0.5, scaled)), exponent - 11).astype(np.float32)


def rounded(t: Tensor) -> Tensor:
    """The same of a tensor, in its dtype, contiguous."""
    return torch.from_numpy(tf32(t.detach().float().numpy())).to(t.dtype).contiguous()


def on_tf32_operands(case, branches):
    """The case with what tensor cores multiply, of the branches that they compute, rounded. In
    pyramid mode all branches see the same channels."""
    x, grad = case.x.detach().clone(), case.grad.clone()
    weights = [w.detach().clone() for w in case.weights]
    first_in = first_out = 0
    for b, (w, groups) in enumerate(zip(weights, case.groups, strict=True)):
        ins = slice(first_in, first_in + w.shape[1] * groups) if case.split else slice(None)
        outs = slice(first_out, first_out + w.shape[0])
        first_in, first_out = first_in + w.shape[1] * groups, first_out + w.shape[0]
        if b in branches:
            for t, part in ((x, ins), (grad, outs)):
                t[:, part] = rounded(t[:, part])
            weights[b] = rounded(w)
    return dataclasses.replace(case, x=x, weights=weights, grad=grad)
