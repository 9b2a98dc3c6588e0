"""Classes masked with -inf: what all exclude is as if it were not there, in every method."""

import pytest
import torch
from torch import nn

from mfef_ext.distill.method import METHODS, Batch, StudentShape, weighted_sum
from tests.distill.by_hand import CLASSES, N, distiller, kd

INF = float("inf")
KEPT = torch.tensor([0, 2, 3, 5, 6])  # of seven classes
CASES = [(m, {}) for m in sorted(METHODS) if m != "kdcl"] + [
    ("kdcl", {"variant": v}) for v in ("naive", "linear", "minlogit", "general")
]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda c: str(c))


class Says(nn.Module):
    """A teacher that gives the same logits whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1)
        self.register_buffer("logits", logits)

    def forward(self, x):
        self.features(x)
        return self.logits[: len(x)]


def widened(z):
    """Logits of five classes among seven, of which the others are masked."""
    return torch.full((len(z), 7), -INF).index_copy(1, KEPT, z)


def draw(count):
    torch.manual_seed(count)
    return [torch.randn(N, CLASSES) for _ in range(count)]


def build(name, options, classes, taught, students=3):
    """A method for students with maps (N, 4, 2, 2), its teacher giving the logits ``taught``."""
    torch.manual_seed(0)
    options = dict(options)
    if name in ("kd", "mimic", "ab"):
        options["teacher"] = Says(taught)
    if name == "ab":
        options |= {"teacher_tap": "features", "boundary_epochs": 0, "input_shape": (3, 2, 2)}
    return METHODS[name]([StudentShape(4, 2, 2)] * students, classes, **options)


def give(method, logits, labels):
    """(further logits, terms, gradients of logits, gradients of parameters by name) of a batch."""
    torch.manual_seed(5)
    leaves = [z.clone().requires_grad_() for z in logits]
    maps = [torch.randn(len(z), 4, 2, 2) for z in logits]
    images = [torch.randn(len(logits[0]), 3, 2, 2)] * len(logits)
    added, terms = method(Batch(images, leaves, maps, labels, 1e9))
    loss = sum(term for term in terms.values() if term.requires_grad and term.isfinite())
    own = {n: p for n, p in method.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [*leaves, *own.values()], allow_unused=True)
    return added, terms, grads[: len(leaves)], dict(zip(own, grads[len(leaves) :], strict=True))


@cases
def test_what_all_mask_is_as_if_it_were_not_there(name, options):
    labels, logits, taught = torch.tensor([0, 1, 2, 3, 4, 0]), draw(3), draw(4)[-1]
    narrow = build(name, options, CLASSES, taught)
    wide = build(name, options, 7, widened(taught))
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        p.data.copy_(q.data if p.shape == q.shape else q.data[KEPT])
    added, terms, of_logits, of_own = give(narrow, logits, labels)
    masked = give(wide, [widened(z) for z in logits], KEPT[labels])
    assert terms.keys() == masked[1].keys()
    for term in terms:
        torch.testing.assert_close(masked[1][term], terms[term], rtol=1e-5, atol=1e-6)
    for role in added:
        torch.testing.assert_close(masked[0][role], widened(added[role]), rtol=1e-5, atol=1e-6)
    for got, wanted in zip(masked[2], of_logits, strict=True):
        expected = torch.zeros_like(got).index_copy(1, KEPT, wanted)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert (got[:, [1, 4]] == 0).all()
    for own, wanted in of_own.items():
        got = masked[3][own]
        if wanted is not None:
            got = got if got.shape == wanted.shape else got[KEPT]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@cases
def test_what_one_masks(name, options):
    """Is masked in whatever is combined, so all terms are finite but for a student that masks what
    a target of its own allows: a peer, or the best student of the image. Nothing is NaN."""
    logits, taught = draw(3), draw(4)[-1]
    logits[1][:, 3] = -INF
    labels = torch.tensor([0, 1, 2, 4, 4, 0])
    taught[:, 3] = -INF  # the teacher knows what the second student knows
    added, terms, of_logits, of_own = give(build(name, options, CLASSES, taught), logits, labels)
    infinite = {term for term, value in terms.items() if value == INF}
    impossible = {"dml": {"kd/student1"}, "mimic": {"mse/student0", "mse/student2"}}
    if options.get("variant") != "naive":
        assert infinite == impossible.get(name, set())
    assert not any(value.isnan() for value in terms.values())
    assert all(z[:, 3].eq(-INF).all() and z[:, :3].isfinite().all() for z in added.values())
    for grad in (*of_logits, *of_own.values()):
        assert grad is None or grad.isfinite().all()


def test_masked_in_the_target_alone_by_hand():
    """The student learns that the class is none."""
    (student, target), keep = draw(2), [0, 1, 2, 4]
    target[:, 3] = -INF
    d = build("kd", {"temperature": 2.0, "alpha": 1.0}, CLASSES, target, students=1)
    _, terms, (grad,), _ = give(d, [student], torch.zeros(N, dtype=torch.long))
    p = (target.double()[:, keep] / 2).softmax(1)
    q = (student.double() / 2).softmax(1)[:, keep]
    assert terms["kd/student0"].item() == pytest.approx(
        4 * (p * (p / q).log()).sum().item() / N, rel=1e-5
    )
    assert (grad[:, 3] > 0).all()  # its logit goes down


def test_weights_of_zero_mask_nothing():
    logits = torch.tensor([[[-INF, 1.0, 2.0]], [[3.0, 4.0, -INF]]], requires_grad=True)
    weights = torch.tensor([[0.0], [1.0]], requires_grad=True)
    got = weighted_sum(weights, logits)
    assert got.tolist() == [[3.0, 4.0, -INF]]
    got.softmax(1).square().sum().backward()
    assert weights.grad.isfinite().all() and logits.grad.isfinite().all()
    assert weighted_sum(torch.tensor([[2.0], [-1.0]]), logits.detach())[0, 0] == -INF


def test_a_gate_that_closes_entirely():
    """Softmax underflows to 0, and the gated ensemble is the other student's alone."""
    method = build("one", {}, CLASSES, None, students=2).eval()
    with torch.no_grad():
        method.gate[0].weight.zero_()
        method.gate[0].bias.copy_(torch.tensor([0.0, 1e4]))
    first, second = draw(2)
    first[:, 2] = -INF
    added, terms, of_logits, _ = give(method, [first, second], torch.zeros(N, dtype=torch.long))
    assert torch.equal(added["gated"], second)
    assert terms["kd/student0"] == INF
    assert all(grad.isfinite().all() for grad in of_logits)


@pytest.mark.parametrize("name", ["kd", "kdcl"])
def test_a_weight_of_zero_leaves_nothing_of_an_infinite_loss(name):
    """Only soft targets, for students that mask the class that a label names."""
    logits, taught = [widened(z) for z in draw(2)], widened(draw(4)[-1])
    labels = torch.ones(N, dtype=torch.long)
    options = {"alpha": 1.0} | ({"variant": "general"} if name == "kdcl" else {})
    _, terms, of_logits, _ = give(build(name, options, 7, taught, students=2), logits, labels)
    assert terms["ce/student0"] == 0 and terms["kd/student0"].isfinite()
    assert all(grad.isfinite().all() for grad in of_logits)


def test_students_that_mask_train(batch):
    """A whole step, from images on."""
    d = distiller("mfef")
    for student in d.students:
        student.fc.register_forward_hook(lambda m, i, z: z.index_fill(1, torch.tensor([3]), -INF))
    x, y = batch
    y = torch.where(y == 3, 0, y)
    out = d(x, y, 100.0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(z[:, 3].eq(-INF).all() for z in out.logits.values())
    assert all(p.grad.isfinite().all() for p in d.parameters())
    z = {role: v.detach().double().numpy()[:, [0, 1, 2, 4]] for role, v in out.logits.items()}
    wanted = kd(z["fused"], z["ensemble"], 3.0)
    assert out.losses["kd/fused"].item() == pytest.approx(wanted, rel=2e-5)
