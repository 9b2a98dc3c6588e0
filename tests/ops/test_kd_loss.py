"""kd_loss where logits are masked, and what may stand for its temperature."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from mfef_ext import functional

INF = float("inf")
KEPT = torch.tensor([0, 2, 3, 5])  # of six classes
backends = pytest.mark.parametrize("backend", ["reference", None])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)


def draw(images=5, classes=6, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(images, classes, dtype=torch.float64).to(dtype) for _ in range(2)]


def masked(z, *classes):
    """With these classes at -inf."""
    return z.index_fill(1, torch.tensor(classes), -INF)


def run(student, target, temperature=3.0, **options):
    """[loss, gradient of the student, gradient of the target]."""
    pair = [z.detach().clone().requires_grad_() for z in (student, target)]
    loss = functional.kd_loss(*pair, temperature, detach_target=False, **options)
    return [loss.detach(), *torch.autograd.grad(loss, pair)]


@dtypes
@backends
def test_classes_masked_on_both_sides_drop_out(backend, dtype):
    student, target = draw(dtype=dtype)
    loss, *grads = run(masked(student, 1, 4), masked(target, 1, 4), backend=backend)
    wanted, *of_kept = run(student[:, KEPT], target[:, KEPT], backend=backend)
    torch.testing.assert_close(loss, wanted)
    for grad, of in zip(grads, of_kept, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad).index_copy(1, KEPT, of))


@dtypes
@backends
def test_classes_masked_in_the_target_add_nothing(backend, dtype):
    student, target = draw(dtype=dtype)
    loss, of_student, of_target = run(student, masked(target, 1, 4), backend=backend)
    p = (target.double()[:, KEPT] / 3).softmax(1)
    q = (student.double() / 3).softmax(1)
    wanted = 9 * (p * (p / q[:, KEPT]).log()).sum() / 5
    torch.testing.assert_close(loss, wanted.to(loss.dtype))
    exact = q.index_add(1, KEPT, p, alpha=-1) * (3 / 5)
    torch.testing.assert_close(of_student, exact.to(dtype))
    assert of_target.isfinite().all() and (of_target[:, [1, 4]] == 0).all()


@backends
def test_probabilities_that_round_to_zero_add_nothing(backend):
    """As masks of the least number of a dtype make them."""
    least = torch.finfo(torch.float32).min
    student, target = draw(dtype=torch.float32)
    student[:, 1], target[:, 1] = -INF, least
    loss, *grads = run(student, target, 0.5, backend=backend)
    wanted, *_ = run(masked(student, 1), masked(target, 1), 0.5, backend=backend)
    assert torch.equal(loss, wanted) and all(g.isfinite().all() for g in grads)


@backends
def test_a_student_that_masks_what_its_target_allows_is_infinitely_wrong(backend):
    student, target = draw()
    wanted = run(student, target, backend=backend)
    student[1, 2] = -INF
    loss, of_student, of_target = run(student, target, backend=backend)
    assert loss == INF and of_student.isfinite().all()
    others = [0, 2, 3, 4]
    for got, of in zip((of_student, of_target), wanted[1:], strict=True):
        torch.testing.assert_close(got[others], of[others])


@backends
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", ["all", INF, float("nan")])
def test_rows_without_a_softmax_are_nan_and_stay_in_their_row(backend, side, value):
    pair = draw()
    wanted = run(*pair, backend=backend)
    pair[side][1, slice(None) if value == "all" else 2] = -INF if value == "all" else value
    loss, *grads = run(*pair, backend=backend)
    assert loss.isnan()
    for got, of in zip(grads, wanted[1:], strict=True):
        assert got[1].isnan().any()
        torch.testing.assert_close(got[[0, 2, 3, 4]], of[[0, 2, 3, 4]])


@backends
def test_masked_logits_differentiate_twice(backend):
    def loss(free):
        wide = [torch.full((5, 6), -INF, dtype=free.dtype).index_copy(1, KEPT, z) for z in free]
        return functional.kd_loss(*wide, 2.0, detach_target=False, backend=backend)

    free = torch.stack(draw(classes=4)).requires_grad_()
    assert torch.autograd.gradcheck(loss, free) and torch.autograd.gradgradcheck(loss, free)


@backends
def test_masked_logits_under_transforms_and_compilation(backend):
    student, target = draw(dtype=torch.float32)
    target = masked(target, 1, 4)

    def loss(student):
        return functional.kd_loss(student, target, 2.0, backend=backend)

    pair = torch.stack([student, masked(student, 1, 4)])
    each = torch.vmap(torch.func.grad(loss))(pair)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, z in zip(each, pair, strict=True):
        z = z.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(z), z)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], wanted)
        torch.testing.assert_close(loss(z.t().contiguous().t()), loss(z))


# --- numbers ----------------------------------------------------------------------------------

THREES = [
    3,
    np.float32(3),
    np.float64(3),
    np.float16(3),
    np.int64(3),
    np.uint8(3),
    np.array(3.0),
    np.array([3]),
    torch.tensor(3.0),
    torch.tensor([3]),
    torch.nn.Parameter(torch.tensor(3.0), requires_grad=False),
    Fraction(3),
    Decimal(3),
]
NOT_NUMBERS = [
    (True, TypeError, "must be a number, got bool True"),
    (np.bool_(True), TypeError, "must be a number, got bool"),
    (torch.tensor(True), TypeError, "must be a number, got bool"),
    ("3", TypeError, "must be a number, got str '3'"),
    (None, TypeError, "must be a number, got NoneType"),
    (3j, TypeError, "must be a number, got complex"),
    ([3.0], TypeError, "must be a number, got list"),
    (torch.ones(2), TypeError, "must be a number, got Tensor"),
    (np.ones(2), TypeError, "must be a number, got ndarray"),
    (torch.tensor(3.0, requires_grad=True), TypeError, "requires a gradient, but it is a constant"),
    (torch.tensor(3.0, device="meta"), TypeError, "is a tensor on meta, which every call"),
    (torch.tensor([3.0]).to_sparse(), TypeError, "layout torch.sparse_coo is not dense; give"),
    (float("nan"), ValueError, "=nan must be"),
    (INF, ValueError, "=inf must be"),
    (np.float32(-1), ValueError, "=-1.0 must be"),
    (torch.tensor(-1.0), ValueError, "=-1.0 must be"),
    (10**400, ValueError, "0 must be"),
    (Fraction(10**400), ValueError, "=inf must be"),
]
kinds = pytest.mark.parametrize("three", THREES, ids=lambda v: type(v).__name__)


@kinds
def test_every_kind_of_number_is_a_temperature(three):
    pair = draw(dtype=torch.float32)
    wanted = functional.kd_loss(*pair, 3.0)
    assert torch.equal(functional.kd_loss(*pair, three), wanted)
    assert torch.equal(functional.kd_losses(pair, pair[::-1], three)[0], wanted)


@pytest.mark.parametrize("three", [3, 3.0, np.int64(3)])
def test_compiled_whole_with_another_temperature_each_time(three):
    pair = draw(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(functional.kd_loss, fullgraph=True, backend="eager")
    for temperature in (three, three + 1, three + 2):
        wanted = functional.kd_loss(*pair, temperature)
        torch.testing.assert_close(compiled(*pair, temperature), wanted)


@pytest.mark.parametrize(("value", "error", "words"), NOT_NUMBERS)
def test_what_is_no_temperature(value, error, words):
    for f in (functional.kd_loss, lambda s, t, v: functional.kd_losses([s], [t], v)):
        with pytest.raises(error, match=re.escape(words)) as caught:
            f(*draw(), value)
        assert "temperature" in str(caught.value)
