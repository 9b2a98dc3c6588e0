"""The loss of MFEF against numpy, and which parameters each of its terms moves."""

import numpy as np
import pytest
import torch

from mfef_ext.distill.method import StudentShape
from mfef_ext.distill.mfef import MFEF
from tests.distill import by_hand
from tests.distill.by_hand import CLASSES, N, arrays, cross_entropy, named, reached

T = 2.5


def distiller(**options):
    return by_hand.distiller("mfef", temperature=T, **options)


def test_terms_by_hand(batch):
    """In float64: a small divergence is what is left of terms that cancel."""
    x, y = batch
    out = distiller(ramp_epochs=10).double()(x.double(), y, 4.0)
    z = arrays(out.logits)
    w = np.exp(-5 * (1 - 0.4) ** 2)
    ensemble = (z["student0"] + z["student1"]) / 2
    np.testing.assert_allclose(z["ensemble"], ensemble, rtol=1e-6)
    expected = {
        "ce/student0": cross_entropy(z["student0"], y.numpy()),
        "ce/student1": cross_entropy(z["student1"], y.numpy()),
        "ce/fused": cross_entropy(z["fused"], y.numpy()),
        "kd/student0": w * by_hand.kd(z["student0"], z["fused"], T),
        "kd/student1": w * by_hand.kd(z["student1"], z["fused"], T),
        "kd/fused": w * by_hand.kd(z["fused"], ensemble, T),
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
        u = m.head.fusion([m.blocks[0](maps[0]), m.blocks[1](maps[1])])
        expected = m.head.classifier(u.flatten(2).mean(2))
        torch.testing.assert_close(d(batch[0]).logits["fused"], expected)


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


@pytest.mark.parametrize(
    ("option", "gone", "added"),
    [
        ("multi_scale", (), ()),
        ("channel_attention", ("attention.fc1_weight", "0.mlp"), ("1.conv",)),
        ("spatial_attention", ("attention.spatial_weight",), ("1.mlp",)),
        ("fusion", ("head.fusion",), ("head.classifiers.1",)),
    ],
)
def test_ablations(batch, option, gone, added):
    """Each leaves out what it names, and all that is left learns."""
    d = distiller(**{option: False})
    out = d(*batch, 100.0)
    names = named(d, "method")
    assert not [n for n in names for part in gone if part in n]
    assert all(any(part in n for n in names) for part in added)
    assert reached(d, out.losses["ce/fused"]) >= names
    assert set(out.losses) == set(distiller()(*batch, 100.0).losses)


def test_without_multi_scale_all_kernels_are_3x3():
    d = distiller(multi_scale=False)
    assert {w.shape[-1] for w in d.method.blocks[0].conv.weights} == {3}
    assert d.method.blocks[0].conv.groups == distiller().method.blocks[0].conv.groups


def test_gates_alone_are_those_of_the_block(batch):
    """With the other gate at 1, which a sigmoid is from 40 on, the block does the same."""
    block = distiller().method.blocks[0]
    attention = block.attention
    y = block.conv(torch.randn(3, 16, 4, 4)).detach()
    for option, silent in (("spatial", "channel"), ("channel", "spatial")):
        d = distiller(**{f"{silent}_attention": False})
        part = d.method.blocks[0][1]
        with torch.no_grad():
            if option == "spatial":
                part.conv.weight.copy_(attention.spatial_weight)
            else:
                for layer, name in ((part.mlp[0], "fc1"), (part.mlp[2], "fc2")):
                    layer.weight.copy_(getattr(attention, f"{name}_weight"))
                    layer.bias.copy_(getattr(attention, f"{name}_bias"))
            got = part(y)
            saved = {n: p.clone() for n, p in attention.named_parameters()}
            if option == "spatial":
                attention.fc2_weight.zero_()
                attention.fc2_bias.fill_(40.0)
                wanted = attention(y)
            else:
                channel_gate, _ = attention.gates(y)
                wanted = y * channel_gate[:, :, None, None]
            for n, p in attention.named_parameters():
                p.copy_(saved[n])
        torch.testing.assert_close(got, wanted)
