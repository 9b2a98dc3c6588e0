"""The losses of the other methods against numpy, and which parameters each term moves."""

import numpy as np
import pytest
import torch

from mfef_ext.distill import METHODS, OnlineDistiller
from mfef_ext.distill.kdcl import simplex_weights
from tests.distill.by_hand import (
    CLASSES,
    N,
    Net,
    arrays,
    cross_entropy,
    distiller,
    kd,
    named,
    reached,
    softmax,
)

STUDENTS = ("student0", "student1", "student2")


def check(out, expected):
    assert set(out.losses) == set(expected)
    for name, value in expected.items():
        assert out.losses[name].item() == pytest.approx(value, rel=2e-5, abs=1e-6), name


def labels_alone(z, y, count):
    return {f"ce/{s}": cross_entropy(z[s], y.numpy()) for s in STUDENTS[:count]}


def teacher(width=20):
    torch.manual_seed(7)
    return Net(width)


def test_dml(batch):
    d = distiller("dml", (16, 24, 8), temperature=1.5)
    out = d(*batch)
    z = arrays(out.logits)
    expected = labels_alone(z, batch[1], 3)
    for s in STUDENTS:
        peers = [kd(z[s], z[o], 1.5) for o in STUDENTS if o != s]
        expected[f"kd/{s}"] = sum(peers) / 2
    check(out, expected)
    for i, s in enumerate(STUDENTS):  # peers are constants
        assert reached(d, out.losses[f"kd/{s}"]) == named(d, f"students.{i}")


def test_ffl(batch):
    d = distiller("ffl", temperature=2.0, ramp_epochs=10)
    out = d(*batch, 4.0)
    z, w = arrays(out.logits), np.exp(-5 * 0.6**2)
    check(
        out,
        labels_alone(z, batch[1], 2)
        | {
            "ce/fused": cross_entropy(z["fused"], batch[1].numpy()),
            "kd/student0": w * kd(z["student0"], z["fused"], 2.0),
            "kd/student1": w * kd(z["student1"], z["fused"], 2.0),
            "kd/fused": w * kd(z["fused"], (z["student0"] + z["student1"]) / 2, 2.0),
        },
    )
    assert reached(d, out.losses["kd/student0"]) == named(d, "students.0")
    through = named(d, "students.0.features", "students.1.features")
    assert reached(d, out.losses["kd/fused"]) == named(d, "method") | through


def test_one(batch):
    d = distiller("one", temperature=2.0, ramp_epochs=10)
    out = d(*batch, 4.0)
    z, w = arrays(out.logits), np.exp(-5 * 0.6**2)
    with torch.no_grad():
        pooled = torch.cat([s.features(batch[0]).mean((2, 3)) for s in d.students], 1)
        g = softmax(d.method.gate(pooled).double().numpy())
    gated = g[:, :1] * z["student0"] + g[:, 1:] * z["student1"]
    np.testing.assert_allclose(z["gated"], gated, rtol=1e-5, atol=1e-6)
    check(
        out,
        labels_alone(z, batch[1], 2)
        | {"ce/gated": cross_entropy(gated, batch[1].numpy())}
        | {f"kd/{s}": w * kd(z[s], gated, 2.0) for s in STUDENTS[:2]},
    )
    assert reached(d, out.losses["kd/student1"]) == named(d, "students.1")
    assert reached(d, out.losses["ce/gated"]) == named(d, "students", "method")


def test_okddip(batch):
    d = distiller("okddip", (16, 16, 24), temperature=2.0, ramp_epochs=10)
    out = d(*batch, 4.0)
    z, w = arrays(out.logits), np.exp(-5 * 0.6**2)
    with torch.no_grad():
        h = [s.features(batch[0]).mean((2, 3)) for s in d.students[:2]]
        q = [layer(v).double().numpy() for layer, v in zip(d.method.queries, h, strict=True)]
        k = [layer(v).double().numpy() for layer, v in zip(d.method.keys, h, strict=True)]
    assert q[0].shape == (N, 2)  # an eighth of the first peer's width
    peers = np.stack([z["student0"], z["student1"]], 1)
    expected = labels_alone(z, batch[1], 3)
    for i in (0, 1):
        a = softmax(np.stack([(q[i] * k[j]).sum(1) for j in (0, 1)], 1))
        target = a[:, :1] * peers[:, 0] + a[:, 1:] * peers[:, 1]
        expected[f"kd/student{i}"] = w * kd(peers[:, i], target, 2.0)
    expected["kd/student2"] = w * kd(z["student2"], peers.mean(1), 2.0)
    check(out, expected)
    # W_q and W_k learn through the targets; the leader's target is a constant.
    assert {"method.queries.0.weight", "method.keys.1.weight"} <= reached(
        d, out.losses["kd/student0"]
    )
    assert reached(d, out.losses["kd/student2"]) == named(d, "students.2")


def test_kd(batch):
    d = distiller("kd", teacher=teacher(), temperature=2.0, alpha=0.3)
    out = d(*batch)
    z = arrays(out.logits)
    t = d.method.teacher(batch[0]).double().numpy()
    labels = labels_alone(z, batch[1], 2)
    check(
        out,
        {name: 0.7 * value for name, value in labels.items()}
        | {f"kd/{s}": 0.3 * kd(z[s], t, 2.0) for s in STUDENTS[:2]},
    )
    assert reached(d, out.loss) == named(d, "students")


def test_mimic(batch):
    d = distiller("mimic", teacher=teacher(), alpha=0.3)
    out = d(*batch)
    z = arrays(out.logits)
    t = d.method.teacher(batch[0]).double().numpy()
    check(
        out,
        labels_alone(z, batch[1], 2)
        | {f"mse/{s}": 0.3 * ((z[s] - t) ** 2).mean() for s in STUDENTS[:2]},
    )


def test_ab(batch):
    d = distiller("ab", teacher=teacher(), teacher_tap="features", boundary_epochs=2)
    out = d(*batch, 1.9)
    with torch.no_grad():
        active = d.method.teacher.features(batch[0]).numpy() > 0
        maps = [s.features(batch[0]) for s in d.students]
        s = [c(x).numpy() for c, x in zip(d.method.connectors, maps, strict=True)]
    loss = [
        np.where(active, np.maximum(1 - v, 0) ** 2, np.maximum(1 + v, 0) ** 2).mean() for v in s
    ]
    nothing = {f"{kind}/student{i}": 0.0 for kind in ("ce", "kd") for i in (0, 1)}
    check(out, nothing | {"ab/student0": loss[0], "ab/student1": loss[1]})
    assert reached(d, out.losses["ab/student0"]) == named(
        d, "students.0.features", "method.connectors.0"
    )
    second = d(*batch, 2.0).losses
    assert {name for name, term in second.items() if term != 0} == set(nothing)
    assert [d.method.kd_weight(e) for e in (1.9, 2.0)] == [0.0, 0.9]


@pytest.mark.parametrize("method", ["kd", "mimic", "ab"])
def test_teacher_stays_as_it_is(batch, method):
    net = torch.nn.Sequential()
    net.add_module(
        "features", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    )
    net.add_module("head", torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    net.add_module("fc", torch.nn.Linear(4, CLASSES))
    extra = {"teacher_tap": "features"} if method == "ab" else {}
    d = distiller(method, teacher=net, **extra).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    optimizer = torch.optim.SGD(d.parameter_groups(), lr=0.1, weight_decay=0.1)
    d(*batch, 0.0).loss.backward()
    optimizer.step()
    assert not net.training and d.students[0].training
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    in_groups = {id(p) for g in d.parameter_groups() for p in g["params"]}
    assert not in_groups & {id(p) for p in net.parameters()}


def kdcl(batch, **options):
    d = distiller("kdcl", (16, 24, 8), temperature=2.0, alpha=0.4, **options)
    out = d(*batch)
    return d, out, arrays(out.logits)


def check_kdcl(batch, out, z, target):
    labels = labels_alone(z, batch[1], 3)
    check(
        out,
        {name: 0.6 * value for name, value in labels.items()}
        | {f"kd/{s}": 0.4 * kd(z[s], target, 2.0) for s in STUDENTS},
    )


def test_kdcl_naive(batch):
    d, out, z = kdcl(batch, variant="naive")
    y = batch[1].numpy()
    each = np.stack([-np.log(softmax(z[s])[np.arange(N), y]) for s in STUDENTS])
    target = np.stack([z[STUDENTS[i]][n] for n, i in enumerate(each.argmin(0))])
    check_kdcl(batch, out, z, target)
    assert reached(d, out.losses["kd/student0"]) == named(d, "students.0")


def test_kdcl_minlogit(batch):
    _, out, z = kdcl(batch, variant="minlogit")
    y = batch[1].numpy()
    target = np.min([z[s] - z[s][np.arange(N), y][:, None] for s in STUDENTS], axis=0)
    check_kdcl(batch, out, z, target)


def test_kdcl_linear(batch):
    """No weights of a fine grid on the simplex do better."""
    d, out, z = kdcl(batch, variant="linear")
    logits = torch.stack([out.logits[s].detach() * 3 for s in STUDENTS]).double()
    y = batch[1]
    w = simplex_weights(logits, y, sweeps=40, halvings=40)
    assert bool((w >= -1e-9).all())
    torch.testing.assert_close(w.sum(0), torch.ones(N, dtype=torch.float64))

    def loss(weights):
        combined = torch.einsum("in,inc->nc", weights, logits)
        return torch.nn.functional.cross_entropy(combined, y, reduction="none")

    steps = [k / 40 for k in range(41)]
    for a in steps:
        for b in steps:
            if a + b <= 1:
                grid = torch.tensor([a, b, 1 - a - b], dtype=torch.float64)[:, None].expand(3, N)
                assert bool((loss(w) <= loss(grid) + 1e-6).all())
    check_kdcl(
        batch,
        out,
        z,
        d.method.target(torch.stack([out.logits[s] for s in STUDENTS]), y).detach().numpy(),
    )


def test_kdcl_general(batch):
    d, out, z = kdcl(batch, variant="general")
    check_kdcl(batch, out, z, sum(z[s] for s in STUDENTS) / 3)
    assert d.method.held_out
    draw = torch.Generator().manual_seed(3)
    held = [torch.randn(50, CLASSES, generator=draw) for _ in STUDENTS]
    y = torch.arange(50) % CLASSES
    held[1] = held[1] + 3 * torch.nn.functional.one_hot(y, CLASSES)  # the good one
    d.method.calibrate(held, y)
    e = np.stack([(softmax(h.double().numpy()) - np.eye(CLASSES)[y]).ravel() for h in held])
    inverse = np.linalg.inv(e @ e.T / 50)
    expected = inverse.sum(1) / inverse.sum()
    np.testing.assert_allclose(d.method.weights.numpy(), expected, rtol=1e-5)
    assert d.method.weights.argmax() == 1


def test_students_who_agree_share_the_weight():
    d = distiller("kdcl", variant="general")
    same = torch.randn(20, CLASSES)
    d.method.calibrate([same, same], torch.arange(20) % CLASSES)
    torch.testing.assert_close(d.method.weights, torch.tensor([0.5, 0.5]))


def test_students_without_a_softmax_cannot_be_weighed():
    logits = [torch.randn(20, CLASSES) for _ in range(2)]
    logits[1][3, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"student 1 gives logits without a softmax.*learning rate"
    ):
        distiller("kdcl", variant="general").method.calibrate(logits, torch.arange(20) % CLASSES)


def test_each_student_may_see_its_own_images(batch):
    x, y = batch
    d = distiller("kdcl")
    assert METHODS["kdcl"].views
    views = [x, x.flip(3)]
    out = d(views, y)
    for i, (student, view) in enumerate(zip(d.students, views, strict=True)):
        torch.testing.assert_close(out.logits[f"student{i}"], student(view))
    with pytest.raises(ValueError, match="1 batches of images for 2 students"):
        d([x], y)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns(batch, method):
    """Fifty steps on six images lower the loss, and every parameter has been moved by then."""
    extra = {"teacher": teacher()} if method in ("kd", "mimic", "ab") else {}
    if method == "ab":
        extra |= {"teacher_tap": "features", "boundary_epochs": 25}
    d = distiller(method, (16, 16, 24), **extra)
    for name, parameter in d.named_parameters():
        if name.endswith("fc1_bias"):  # no hidden unit of an attention is dead, whatever was drawn
            torch.nn.init.ones_(parameter)
    before = {n: p.detach().clone() for n, p in d.named_parameters()}
    optimizer = torch.optim.SGD(d.parameter_groups(), lr=0.1, momentum=0.9)
    first = None
    for epoch in range(50):
        out = d(*batch, float(epoch))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        first = first or sum(v.item() for k, v in d(*batch, 50.0).losses.items())
    last = sum(v.item() for v in d(*batch, 50.0).losses.values())
    assert last < first
    for n, p in d.named_parameters():
        assert torch.equal(p, before[n]) == (not p.requires_grad), n
    role = {"mfef": "fused", "ffl": "fused", "one": "gated"}.get(method)
    assert set(d(batch[0]).logits) == {*STUDENTS, "ensemble", *([role] if role else [])}


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("dml", {"widths": (16,)}, ValueError, "at least two students.*got 1"),
        ("one", {"widths": (16,)}, ValueError, "at least two students"),
        ("kdcl", {"widths": (16,)}, ValueError, "at least two students"),
        ("okddip", {}, ValueError, "at least three students.*leader"),
        ("kd", {}, TypeError, "teacher=None.*--teacher"),
        ("kd", {"teacher": Net(), "alpha": 2.0}, ValueError, "alpha=2.0 must be from 0 to 1"),
        ("mimic", {"teacher": Net(), "alpha": -1.0}, ValueError, "alpha=-1.0 must be 0 or more"),
        ("kdcl", {"variant": "liner"}, ValueError, "variant='liner' is unknown.*'linear'"),
        (
            "ab",
            {"teacher": Net(), "teacher_tap": "x"},
            ValueError,
            "tap='x' is no layer of teacher",
        ),
    ],
)
def test_bad_options(method, options, error, words):
    with pytest.raises(error, match=words):
        distiller(method, **options)


def test_teacher_of_other_classes(batch):
    net = Net()
    net.fc = torch.nn.Linear(16, CLASSES + 1)
    d = OnlineDistiller(
        [Net()], "kd", num_classes=CLASSES, tap="features", input_shape=(3, 8, 8), teacher=net
    )
    with pytest.raises(ValueError, match=r"teacher gives \(6, 6\).*\(6, 5\)"):
        d(*batch)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_empty_batch_moves_nothing(method, batch):
    options = {"teacher": teacher()} if method in ("kd", "mimic", "ab") else {}
    options |= {"teacher_tap": "features"} if method == "ab" else {}
    d = distiller(method, (16, 24, 8), **options)
    out = d(batch[0][:0], batch[1][:0], 0.0)
    assert all(term == 0 for term in out.losses.values())
    out.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in d.parameters())
    assert all(b.isfinite().all() for b in d.buffers())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_that_leave_parameters_out_are_declared(method, batch):
    """Several processes wait for the gradient of every parameter, unless they are told."""
    options = {"teacher": teacher()} if method in ("kd", "mimic", "ab") else {}
    options |= {"teacher_tap": "features"} if method == "ab" else {}
    d = distiller(method, (16, 24, 8), **options)
    d(*batch, 0.0).loss.backward()
    unused = [n for n, p in d.named_parameters() if p.requires_grad and p.grad is None]
    assert d.method.leaves_unused or not unused, unused
