"""Losses in numpy, students to train, and what a loss reaches: for the tests of all methods."""

import numpy as np
import torch
from torch import nn

from mfef_ext.distill import OnlineDistiller

N, CLASSES = 6, 5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def kd(student, target, temperature):
    p, q = softmax(target / temperature), softmax(student / temperature)
    # Summed over the classes, averaged over the batch alone.
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)


class Net(nn.Module):
    """A student whose last map is (N, width, 4, 4)."""

    def __init__(self, width=16):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def distiller(method, widths=(16, 24), **options):
    torch.manual_seed(0)
    return OnlineDistiller(
        [Net(width) for width in widths],
        method,
        num_classes=CLASSES,
        tap="features",
        input_shape=(3, 8, 8),
        **options,
    )


def arrays(logits):
    """Logits by role as float64 arrays."""
    return {role: z.detach().double().numpy() for role, z in logits.items()}


def reached(d, term):
    """The parameters that ``term`` has a gradient for, by name."""
    names, parameters = zip(*(p for p in d.named_parameters() if p[1].requires_grad), strict=True)
    gradients = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None}


def named(d, *prefixes):
    return {n for n, _ in d.named_parameters() if n.startswith(prefixes)}
