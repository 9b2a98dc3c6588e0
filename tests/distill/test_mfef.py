"""The loss of MFEF against numpy, and which parameters each of its terms moves."""

import numpy as np
import pytest
import torch
from torch import nn

from mfef_ext.distill import OnlineDistiller
from mfef_ext.distill.method import StudentShape
from mfef_ext.distill.mfef import MFEF

N, CLASSES, T = 6, 5, 2.5


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def kd(student, target):
    p, q = softmax(target / T), softmax(student / T)
    # Summed over the classes, averaged over the batch alone.
    return T**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)


class Net(nn.Module):
    """A student whose last map is (N, width, 4, 4)."""

    def __init__(self, width=16):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def distiller(**options):
    torch.manual_seed(0)
    return OnlineDistiller(
        [Net(), Net(24)],
        "mfef",
        num_classes=CLASSES,
        tap="features",
        input_shape=(3, 8, 8),
        temperature=T,
        **options,
    )


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 8, 8, generator=draw), torch.tensor([0, 1, 2, 3, 4, 0])


def test_terms_by_hand(batch):
    x, y = batch
    out = distiller(ramp_epochs=10)(x, y, 4.0)
    z = {role: t.detach().double().numpy() for role, t in out.logits.items()}
    w = np.exp(-5 * (1 - 0.4) ** 2)
    ensemble = (z["student0"] + z["student1"]) / 2
    np.testing.assert_allclose(z["ensemble"], ensemble, rtol=1e-6)
    expected = {
        "ce/student0": cross_entropy(z["student0"], y.numpy()),
        "ce/student1": cross_entropy(z["student1"], y.numpy()),
        "ce/fused": cross_entropy(z["fused"], y.numpy()),
        "kd/student0": w * kd(z["student0"], z["fused"]),
        "kd/student1": w * kd(z["student1"], z["fused"]),
        "kd/fused": w * kd(z["fused"], ensemble),
    }
    assert set(out.losses) == set(expected)
    for name, value in expected.items():
        assert out.losses[name].item() == pytest.approx(value, rel=1e-5), name
    assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-5)


def test_fused_logits_are_classifier_of_pooled_fusion(batch):
    d = distiller().eval()
    with torch.no_grad():
        maps = [s.features(batch[0]) for s in d.students]
        m = d.method
        u = m.fusion([m.blocks[0](maps[0]), m.blocks[1](maps[1])])
        expected = m.classifier(u.flatten(2).mean(2))
        torch.testing.assert_close(d(batch[0]).logits["fused"], expected)


def reached(d, term):
    """The parameters that ``term`` has a gradient for, by name."""
    names, parameters = zip(*d.named_parameters(), strict=True)
    gradients = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
    return {n for n, g in zip(names, gradients, strict=True) if g is not None}


def named(d, *prefixes):
    return {n for n, _ in d.named_parameters() if n.startswith(prefixes)}


@pytest.mark.parametrize("detach", [False, True])
def test_each_term_reaches_what_it_should_and_nothing_else(batch, detach):
    d = distiller(detach_features=detach)
    losses = d(*batch, 100.0).losses
    for i in (0, 1):
        student = named(d, f"students.{i}")
        assert reached(d, losses[f"ce/student{i}"]) == student
        # The fused target is a constant: neither the head nor the other student moves.
        assert reached(d, losses[f"kd/student{i}"]) == student
    # The ensemble target is a constant: the students' classifiers get nothing, and their
    # features only what comes through the maps, where these are not detached.
    through = set() if detach else named(d, "students.0.features", "students.1.features")
    for name in ("ce/fused", "kd/fused"):
        assert reached(d, losses[name]) == named(d, "method") | through


def test_one_by_one_map_is_warned_of():
    with pytest.warns(UserWarning, match="student 1 is 1x1.*tap an earlier layer"):
        MFEF([StudentShape(8, 4, 4), StudentShape(8, 1, 1)], CLASSES)


def test_gates_are_the_blocks(batch):
    d = distiller().eval()
    with torch.no_grad():
        gates = d.spatial_gates(batch[0])
    assert [g.shape for g in gates] == [(N, 4, 4), (N, 4, 4)]
    assert all(g.min() > 0 and g.max() < 1 for g in gates)
