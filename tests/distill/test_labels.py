"""Labels: class numbers or class probabilities; others are refused in a sentence."""

import re

import numpy as np
import pytest
import torch

from mfef_ext.distill.kdcl import simplex_weights
from mfef_ext.distill.method import label_losses
from mfef_ext.functional import kd_loss
from tests.distill.by_hand import CLASSES, N, Net, arrays, distiller, softmax
from tests.distill.test_distiller import make
from tests.distill.test_masked_classes import cases

ONE_HOT = torch.eye(CLASSES)


def build(name, options):
    options = dict(options)
    if name in ("kd", "mimic", "ab"):
        torch.manual_seed(7)
        options["teacher"] = Net(20)
    if name == "ab":
        options |= {"teacher_tap": "features", "boundary_epochs": 0}
    return distiller(name, (16, 24, 8), **options)


def mixed(labels):
    """Class probabilities as mixup makes them, and the two class numbers that are in them."""
    other = labels.flip(0)
    return 0.7 * ONE_HOT[labels] + 0.3 * ONE_HOT[other], other


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_what_is_not_dense_is_refused_in_our_words(kind, batch):
    def sparse(t):
        return getattr(t, kind)()

    def refused(call, name):
        with pytest.raises(TypeError, match=rf"^{name}: layout torch\.\w+ is not dense; give what"):
            call()

    (x, y), d = batch, build("ce", {})
    refused(lambda: d(x, sparse(ONE_HOT[y])), "labels")
    if kind == "to_sparse":
        refused(lambda: d(x, y.to_sparse()), "labels")
        refused(lambda: d(x.to_sparse(), y), "x")
    d.students[1].register_forward_hook(lambda *a: sparse(a[2].detach()))
    refused(lambda: d(x, y), "the logits of student 1")
    z = torch.randn(2, 3)
    refused(lambda: kd_loss(sparse(z), z), "student")
    refused(lambda: kd_loss(z, sparse(z)), "target")


@cases
def test_class_probabilities_of_every_method(name, options, batch):
    x, y = batch
    d = build(name, options)
    if options.get("variant") == "minlogit":
        with pytest.raises(ValueError, match=r"variant='minlogit'.*\(6, 5\); give class numbers"):
            d(x, ONE_HOT[y], 0.0)
        return
    hard, certain = d(x, y, 50.0).losses, d(x, ONE_HOT[y], 50.0).losses
    assert list(hard) == list(certain)
    for term, value in hard.items():
        torch.testing.assert_close(certain[term], value)
    soft, other = mixed(y)
    losses, of_other = d(x, soft, 50.0).losses, d(x, other, 50.0).losses
    for term in losses:
        if term.startswith("ce/"):  # linear in the probabilities
            torch.testing.assert_close(losses[term], 0.7 * hard[term] + 0.3 * of_other[term])
        elif name != "kdcl":  # whose target depends on the labels
            torch.testing.assert_close(losses[term], hard[term])


def test_kdcl_targets_of_class_probabilities(batch):
    x, y = batch
    soft, _ = mixed(y)
    for variant in ("naive", "linear"):
        d = build("kdcl", {"variant": variant})
        z = arrays(d(x).logits)
        students = torch.from_numpy(np.stack([z[f"student{i}"] for i in range(3)]))
        got = d.method.target(students, soft)
        losses = -(soft.double() * students.log_softmax(2)).sum(2)
        if variant == "naive":
            wanted = torch.stack([students[i, n] for n, i in enumerate(losses.argmin(0))])
            assert torch.equal(got, wanted)
            continue
        best = -(soft.double() * got.log_softmax(1)).sum(1)
        for a in torch.linspace(0, 1, 21):
            for b in torch.linspace(0, float(1 - a), 21):
                combined = a * students[0] + b * students[1] + (1 - a - b) * students[2]
                assert (best <= -(soft.double() * combined.log_softmax(1)).sum(1) + 1e-6).all()
        w = simplex_weights(students, soft)
        torch.testing.assert_close(w.sum(0), torch.ones(N, dtype=torch.float64))


def test_kdcl_calibrates_on_class_probabilities():
    soft, y = torch.randn(40, CLASSES).softmax(1), torch.arange(40) % CLASSES
    weights = []
    for labels in (y, ONE_HOT[y], soft):
        d = build("kdcl", {"variant": "general"})
        torch.manual_seed(3)
        d.method.calibrate([torch.randn(40, CLASSES) for _ in range(3)], labels)
        weights.append(d.method.weights)
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_class_probabilities_of_every_dtype_are_constants(dtype, batch):
    x, _ = batch
    d = build("ce", {})
    soft = torch.randn(N, CLASSES).softmax(1).to(dtype).requires_grad_()
    out = d(x, soft)
    out.loss.backward()
    assert soft.grad is None and out.loss.dtype == torch.float32
    z = arrays(out.logits)["student0"]
    wanted = -(soft.detach().double().numpy() * np.log(softmax(z))).sum(1).mean()
    assert out.losses["ce/student0"].item() == pytest.approx(wanted, rel=1e-5)


@cases
def test_float64_is_not_rounded(name, options, batch):
    x, y = batch
    d = build(name, options).double()
    losses = d(x.double(), y, 50.0).losses
    assert {value.dtype for value in losses.values()} == {torch.float64}


def test_float64_tells_apart_what_float32_does_not():
    logits = 1e6 + torch.tensor([[0.0, 1e-3, 0.02, 0.0, 0.0]], dtype=torch.double)
    got = label_losses([logits], torch.tensor([2]))["ce/student0"]
    assert got.item() == pytest.approx(-np.log(softmax(logits.numpy() - 1e6))[0, 2], rel=1e-9)


def rows(*changed):
    """Probabilities (3, 4) of which the second row is ``changed``."""
    p = torch.full((3, 4), 0.25)
    p[1] = torch.tensor(changed)
    return p


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        ([0, 1, 2], TypeError, "labels must be a torch.Tensor, got list; give torch.as_tensor"),
        (np.array([0, 1, 2]), TypeError, "labels must be a torch.Tensor, got ndarray"),
        (2, TypeError, "labels must be a torch.Tensor, got int"),
        (torch.zeros(3), TypeError, "labels have dtype torch.float32 and shape (3,); give class"),
        (torch.zeros(3).bool(), TypeError, "labels have dtype torch.bool"),
        (torch.zeros(3, 4).bool(), TypeError, "class probabilities (N, 4), labels.float()"),
        (torch.zeros(3).int(), TypeError, "labels have dtype torch.int32"),
        (torch.zeros(3, 4).long(), ValueError, "labels have shape (3, 4) for 3 images; give one"),
        (torch.zeros(3, 1).long(), ValueError, "labels have shape (3, 1) for 3 images"),
        (torch.tensor(1), ValueError, "labels have shape () for 3 images"),
        (torch.zeros(2).long(), ValueError, "labels have shape (2,) for 3 images"),
        (torch.ones(3, 5) / 5, ValueError, "or class probabilities (3, 4), floating"),
        (torch.ones(2, 4) / 4, ValueError, "labels have shape (2, 4) for 3 images"),
        (torch.tensor([0, 1, 4]), ValueError, "label 4 is not from 0 to 3"),
        (torch.tensor([0, -1, 3]), ValueError, "label -1 is not from 0 to 3"),
        (torch.tensor([0, -100, 3]), ValueError, "label -100 is not from 0 to 3"),
        (rows(0.5, 0.5, 0.5, 0.0), ValueError, "labels[1] are no class probabilities: from 0 to"),
        (rows(1.5, -0.5, 0.0, 0.0), ValueError, "from -0.5 to 1.5, with a sum of 1; none may be"),
        (rows(0.3, 0.3, 0.3, np.nan), ValueError, "labels[1] are no class probabilities"),
        (rows(np.inf, 0.0, 0.0, 0.0), ValueError, "labels[1] are no class probabilities"),
        (rows(1.0, 0.0, 0.0, 0.01), ValueError, "with a sum of 1.01"),
        (torch.zeros(3, 4), ValueError, "labels[0] are no class probabilities"),
        (torch.zeros(3, device="meta").long(), ValueError, "labels.to('cpu')"),
    ],
)
def test_what_are_no_labels(labels, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()(torch.randn(3, 1, 6, 6), labels, 0)
