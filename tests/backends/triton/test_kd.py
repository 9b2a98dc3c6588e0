"""kd_loss in Triton, against the specification in float64; tests/accuracy.py has the rule.

Interpreted on CPU tensors where there is no GPU; on a GPU where there is one.
"""

import importlib
import statistics
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import functional, reference
from tests.accuracy import FEW, factor, largest, unit_in_the_last_place
from tests.drawing import DRAWN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUDA = torch.cuda.is_available()

# Where a tile has no class, the interpreter subtracts infinities, whose difference is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def kd():
    """The module; imported late, when it is settled whether Triton interprets."""
    return importlib.import_module("mfef_ext.backends.triton.kd")


def draw_logits(images, classes, dtype, device, seed, spread=3.0):
    torch.manual_seed(seed)
    return [(spread * torch.randn(images, classes)).to(dtype).to(device) for _ in range(2)]


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(f, student, target, temperature, **options):
    """[loss, gradient of the student, gradient of the target if it has one]."""
    pair = leaves(student, target)
    loss = f(*pair, temperature, detach_target=False, **options)
    return [loss.detach(), *torch.autograd.grad(loss, pair, torch.full_like(loss, 0.7))]


def eager_errors(student, target, temperature, wanted):
    """The largest over orders of images and classes, which are the same operation."""
    runs = []
    for dims in ((), (0,), (1,), (0, 1)):
        loss, *grads = run(reference.kd_loss, student.flip(dims), target.flip(dims), temperature)
        runs.append([loss, *(g.flip(dims) for g in grads)])
    return [
        max(largest(got.double() - w) for got in column)
        for *column, w in zip(*runs, wanted, strict=True)
    ]


def check(dtype, device, images, classes, temperature=3.0, spread=3.0, seed=0, draws=4):
    """Asserts that loss and gradients obey the rule of tests/accuracy.py."""
    errors = {}
    for draw in range(draws):
        pair = draw_logits(images, classes, dtype, device, 1000 * seed + draw, spread)
        wanted = run(reference.kd_loss, *[t.double() for t in pair], temperature)
        got = run(functional.kd_loss, *pair, temperature, backend="triton")
        eager = eager_errors(*pair, temperature, wanted)
        few = []
        for name, g, w, e in zip(("loss", "student", "target"), got, wanted, eager, strict=True):
            # The loss of narrow logits is float32.
            assert g.dtype == (torch.float32 if name == "loss" else dtype) and g.shape == w.shape
            ulp = unit_in_the_last_place(w, g.dtype)
            found = (largest(g.double() - w) / ulp, e / ulp)
            if w.numel() < FEW:
                few.append(found)
            else:
                errors.setdefault(name, []).append(found)
        together = tuple(max(column) for column in zip(*few, strict=True))
        errors.setdefault("few elements", []).append(together)
    for name, found in errors.items():
        middle = statistics.median if name == "few elements" else max
        error, eager_error = (middle(column) for column in zip(*found, strict=True))
        bound = factor(dtype) * eager_error + 1
        assert error <= bound, f"{name}: error of {error:.3g} units is above {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(DRAWN, max_examples=3)
@given(
    images=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 10, 16, 17, 100, 128, 129, 1000, 1024, 1025, 2100]),
    temperature=st.sampled_from([0.5, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 100),
)
def test_random_logits(dtype, device, images, classes, temperature, seed):
    check(dtype, device, images, classes, temperature, seed=seed, draws=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1030])
def test_logits_of_ten_thousand(dtype, classes, device):
    check(dtype, device, 3, classes, spread=1e4, draws=3)
    student, target = draw_logits(5, classes, dtype, device, 0)
    far = run(functional.kd_loss, student - 1e4, target + 1e4, 3.0, backend="triton")
    assert all(bool(t.isfinite().all()) for t in far)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_tiles(dtype, device):
    check(dtype, device, 3, 2100)


@pytest.mark.parametrize(("images", "classes"), [(130, 3), (1100, 5), (20, 100), (20, 300)])
def test_many_tiles(images, classes, device, kd):
    """More rows than a tile; then more tiles than one program takes."""
    tile = kd.configuration(classes).images
    assert images > tile and (kd.slices(images, tile)[0] > 1) == (images > kd.MAX_TILES * tile)
    check(torch.float32, device, images, classes, draws=2)


def test_slices_cover_every_image(kd):
    for tile in (1, 8, 64):
        for images in (*range(1, 300), 10_000, 99_999, 2**31 - 1):
            count, of_slice = kd.slices(images, tile)
            assert of_slice % tile == 0 and count <= kd.MAX_SLICES
            assert (count - 1) * of_slice < images <= count * of_slice


def test_configurations_are_ordered(kd):
    assert all(c.whole for c in kd.CONFIGURATIONS[:-1]) and not kd.CONFIGURATIONS[-1].whole
    for narrow, wide in pairwise(kd.CONFIGURATIONS):
        assert narrow.classes <= wide.classes
    assert [kd.configuration(n).classes for n in (1, 16, 17, 128, 129, 9999)] == [
        16, 16, 128, 128, 1024, 1024,
    ]  # fmt: skip
    assert not kd.configuration(129).whole


@pytest.mark.parametrize("classes", [7, 1030])
def test_nan_stays_in_its_row(classes, device):
    student, target = draw_logits(5, classes, torch.float32, device, 0)
    student[1, 2] = target[3, -1] = float("nan")
    loss, *grads = run(functional.kd_loss, student, target, 3.0, backend="triton")
    _, *wanted = run(reference.kd_loss, student, target, 3.0)
    assert loss.isnan()
    for g, w in zip(grads, wanted, strict=True):
        assert torch.equal(g.isnan(), w.isnan())


INF = float("inf")


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 7), (torch.bfloat16, 20), (torch.float16, 7), (torch.float32, 1030)],
    ids=str,
)
@pytest.mark.parametrize("sides", ["both", "target", "smallest"])
def test_masked_classes_as_in_the_specification(sides, classes, dtype, device):
    """Some classes, all but one, and of long rows the whole first tile."""
    student, target = draw_logits(5, classes, dtype, device, 0)
    for z in (student, target) if sides == "both" else (target,):
        value = torch.finfo(dtype).min if sides == "smallest" else -INF
        z[:, 1] = z[1, 2:5] = z[2, :-1] = value
        if classes > 1024:
            z[3, :1024] = value
    loss, *grads = run(functional.kd_loss, student, target, 0.5, backend="triton")
    exact, *wanted = run(reference.kd_loss, student.double(), target.double(), 0.5)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    for g, w in zip(grads, wanted, strict=True):
        assert g.isfinite().all() and torch.equal(g[w == 0], torch.zeros_like(g[w == 0]))
        torch.testing.assert_close(g.double(), w, rtol=0.02, atol=1e-5)
    assert (grads[1][:, 1] == 0).all()


@pytest.mark.parametrize("classes", [7, 1030])
def test_a_student_that_masks_what_its_target_allows(classes, device):
    """Is infinitely wrong; the gradients of other rows know nothing of it."""
    student, target = draw_logits(4, classes, torch.float32, device, 0)
    student[1, 2] = student[2, :-1] = -INF
    target[1, 3] = -INF
    loss, *grads = run(functional.kd_loss, student, target, 3.0, backend="triton")
    exact, *wanted = run(reference.kd_loss, student, target, 3.0)
    assert loss == exact == INF and grads[0].isfinite().all()
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)


@pytest.mark.parametrize("classes", [7, 1030])
@pytest.mark.parametrize("value", [-INF, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_without_a_softmax_are_nan(side, value, classes, device):
    pair = draw_logits(4, classes, torch.float32, device, 0)
    pair[side][1, slice(None) if value < 0 else -1] = value
    loss, *grads = run(functional.kd_loss, *pair, 3.0, backend="triton")
    exact, *wanted = run(reference.kd_loss, *pair, 3.0)
    assert loss.isnan() and exact.isnan()
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)
        assert g[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype, device, kd):
    student, target = leaves(*draw_logits(0, 7, dtype, device, 0))
    loss = functional.kd_loss(student, target, detach_target=False, backend="triton")
    assert loss.item() == 0 and loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    for t in (student, target):
        assert t.grad is not None and t.grad.shape == (0, 7) and t.grad.dtype == dtype
    assert kd.kd_losses(torch.empty(3, 0, 7), torch.empty(3, 0, 7)).tolist() == [0, 0, 0]


def test_target_is_detached_unless_asked(device):
    student, target = leaves(*draw_logits(3, 7, torch.float32, device, 0))
    functional.kd_loss(student, target, backend="triton").backward()
    assert target.grad is None and student.grad is not None
    loss = functional.kd_loss(student.detach(), target, backend="triton")
    assert not loss.requires_grad
    loss = functional.kd_loss(student.detach(), target, detach_target=False, backend="triton")
    loss.backward()
    assert target.grad is not None
    # The gradient is along the classes, and softmax does not see their sum.
    assert target.grad.sum(1).abs().max() < 1e-6


def strided(t):
    """The same logits as a slice, transposed, and as every second row of a larger tensor."""
    n, c = t.shape
    wide = torch.full((n, c + 5), float("nan"), dtype=t.dtype, device=t.device)
    wide[:, 2 : c + 2] = t
    tall = torch.full((2 * n, c), float("nan"), dtype=t.dtype, device=t.device)
    tall[::2] = t
    return [wide[:, 2 : c + 2], t.t().contiguous().t(), tall[::2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, device):
    pair = draw_logits(5, 11, dtype, device, 0)
    expected = run(functional.kd_loss, *pair, 3.0, backend="triton")
    for student, target in zip(*map(strided, pair), strict=True):
        views = [student.requires_grad_(), target.requires_grad_()]
        loss = functional.kd_loss(*views, 3.0, detach_target=False, backend="triton")
        got = [loss, *torch.autograd.grad(loss, views, torch.full_like(loss, 0.7))]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_target_row_for_all_images(device):
    student, target = draw_logits(5, 11, torch.float32, device, 0)
    expanded = target[:1].expand(5, 11)
    assert expanded.stride(0) == 0
    got = run(functional.kd_loss, student, expanded.contiguous(), 3.0, backend="triton")
    loss = functional.kd_loss(student, expanded, 3.0, backend="triton")
    assert torch.equal(loss, got[0])


@pytest.mark.parametrize(
    ("student_dtype", "target_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.double),
    ],
    ids=str,
)
def test_two_dtypes(student_dtype, target_dtype, device):
    """Each side is read in its own dtype, and gets its gradient in it."""
    student, target = draw_logits(5, 11, torch.float32, device, 0)
    pair = student.to(student_dtype), target.to(target_dtype)
    got = run(functional.kd_loss, *pair, 3.0, backend="triton")
    wanted = run(functional.kd_loss, *(t.float() for t in pair), 3.0, backend="triton")
    for g, w, dtype in zip(got, wanted, (torch.float32, *(t.dtype for t in pair)), strict=True):
        assert g.dtype == dtype
        # The interpreter cuts bfloat16 off where a GPU rounds.
        assert bool(((g - w).abs() <= torch.finfo(dtype).eps * w.abs()).all())


# --- several losses at once -------------------------------------------------------------------


def step(device, dtype=torch.float32):
    """The losses of a step: the students learn from the fused logits, these from the ensemble."""
    logits = [draw_logits(5, 11, dtype, device, seed)[0] for seed in range(3)]
    fused, ensemble = draw_logits(5, 11, dtype, device, 9)
    return leaves(*logits, fused), leaves(fused, fused, fused, ensemble)


def one_by_one(students, targets, weights, detach_target):
    """[losses, gradients of students and targets] by one call for each loss."""
    losses, grads = [], []
    for student, target, weight in zip(students, targets, weights, strict=True):
        pair = leaves(student, target)
        loss = functional.kd_loss(*pair, 3.0, detach_target=detach_target, backend="triton")
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, pair, weight, allow_unused=True))
    return losses, [g for g, _ in grads], [g for _, g in grads]


@pytest.mark.parametrize(
    ("dtype", "stacked"),
    [
        *[(torch.float32, stacked) for stacked in ("neither", "students", "targets", "both")],
        *[(dtype, "neither") for dtype in DTYPES[1:]],
    ],
    ids=str,
)
@pytest.mark.parametrize("detach_target", [True, False])
def test_several_losses_are_those_of_one_by_one(dtype, stacked, detach_target, device, kd):
    students, targets = step(device, dtype)
    weights = torch.tensor([0.7, 1.0, -2.0, 0.0], device=device)
    wanted, student_grads, target_grads = one_by_one(students, targets, weights, detach_target)

    def side(tensors, name):
        together = stacked in (name, "both")
        return torch.stack([t.detach() for t in tensors]).requires_grad_() if together else tensors

    given = side(students, "students"), side(targets, "targets")
    losses = kd.kd_losses(*given, 3.0, detach_target=detach_target)
    assert losses.dtype == torch.float32 and losses.tolist() == [loss.item() for loss in wanted]
    losses.backward(weights)
    for tensors, expected in zip(given, (student_grads, target_grads), strict=True):
        grads = tensors.grad if isinstance(tensors, torch.Tensor) else [t.grad for t in tensors]
        if expected[0] is None:
            assert grads is None or all(g is None for g in grads)
        else:
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_a_sum_gives_every_loss_the_same_gradient(device, kd):
    """The gradient of a sum is one element, expanded."""
    students, targets = step(device)
    _, expected, _ = one_by_one(students, targets, torch.ones(4, device=device), True)
    kd.kd_losses(students, targets, 3.0).sum().backward()
    assert all(torch.equal(s.grad, g) for s, g in zip(students, expected, strict=True))


def test_one_tensor_in_several_losses(device, kd):
    """As a student of one loss and the target of others, its gradients add up."""
    first, second, ensemble = leaves(
        *(draw_logits(5, 11, torch.float32, device, s)[0] for s in (0, 1, 2))
    )
    losses = kd.kd_losses([first, second], [second, ensemble], 3.0, detach_target=False)
    losses.sum().backward()
    ones = torch.ones(2, device=device)
    _, students, targets = one_by_one([first, second], [second, ensemble], ones, False)
    assert torch.equal(second.grad, students[1] + targets[0])


def test_only_what_needs_a_gradient_gets_one(device, kd):
    students, targets = step(device)
    students[1] = students[1].detach()
    kd.kd_losses(students, targets).sum().backward()
    assert students[1].grad is None and students[0].grad is not None
    assert all(t.grad is None for t in targets)


def test_students_of_several_dtypes(device, kd):
    """Are read in float32, which holds them all."""
    students, targets = step(device)
    low = students[0].detach().bfloat16().requires_grad_()
    losses = kd.kd_losses([low, *students[1:]], targets)
    wanted = kd.kd_losses([low.detach().float(), *students[1:]], targets)
    assert torch.equal(losses, wanted)
    losses.sum().backward()
    assert low.grad.dtype == torch.bfloat16


class Launches:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("classes", [10, 100])
def test_one_launch_each_way(classes, device, kd, monkeypatch):
    """For a step of CIFAR: 128 images, two students, the fused classifier."""
    forward, backward = Launches(kd.forward_kernel), Launches(kd.backward_kernel)
    monkeypatch.setattr(kd, "forward_kernel", forward)
    monkeypatch.setattr(kd, "backward_kernel", backward)
    students = torch.randn(3, 128, classes, device=device, requires_grad=True)
    kd.kd_losses(students, torch.randn(3, 128, classes, device=device)).sum().backward()
    assert forward.grids == [(1, 3)] and len(backward.grids) == 1


# --- contracts --------------------------------------------------------------------------------


def test_repeats_are_bit_identical(device):
    pair = draw_logits(20, 130, torch.float32, device, 0)
    first, second = (run(functional.kd_loss, *pair, 3.0, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused(device):
    student, target = leaves(*draw_logits(3, 7, torch.float32, device, 0))
    loss = functional.kd_loss(student, target, backend="triton")
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r'kd_loss cannot be differentiated twice.*"reference"'):
        grad.sum().backward()


def test_torch_func(device):
    def loss(student):
        return functional.kd_loss(student, target, 3.0, backend="triton")

    student, target = draw_logits(3, 5, torch.float32, device, 0)
    pair = torch.stack([student, target])
    for gradient, s in zip(torch.vmap(torch.func.grad(loss))(pair), pair, strict=True):
        (s,) = leaves(s)
        assert torch.equal(gradient, torch.autograd.grad(loss(s), s)[0])
    with pytest.raises(RuntimeError, match="kd_loss cannot be differentiated in forward mode"):
        torch.func.jvp(loss, (student,), (target,))
    with pytest.raises(RuntimeError, match="kd_loss cannot be differentiated twice"):
        torch.func.grad(lambda s: torch.func.grad(loss)(s).square().sum())(student)


@pytest.mark.parametrize(
    ("stacked", "detach_target", "requires_grad"),
    [(False, False, True), (True, False, True), (True, True, True), (False, True, False)],
)
def test_opcheck(stacked, detach_target, requires_grad, device, kd):
    pytest.importorskip("expecttest", reason="opcheck needs it, and a GPU machine may lack it")

    def side(seed):
        tensors = [draw_logits(3, 5, torch.float32, device, seed + i)[0] for i in range(2)]
        tensors = [torch.stack(tensors)] if stacked else tensors
        return [t.requires_grad_(requires_grad) for t in tensors]

    students, targets = side(0), side(10)
    torch.library.opcheck(
        torch.ops.mfef_triton.kd_loss.default, (students, targets, 3.0, detach_target)
    )
    grad = torch.tensor([1.0, 2.0], device=device)
    detached = [t.detach() for t in students], [t.detach() for t in targets]
    torch.library.opcheck(
        torch.ops.mfef_triton.kd_loss_backward.default,
        (grad, *detached, 3.0, True, not detach_target),
    )


def test_compiled_whole(device, kd):
    students, targets = step(device)

    def total(*students):
        alone = functional.kd_loss(students[0], targets[0], 3.0, backend="triton")
        return kd.kd_losses(students, targets, 3.0).sum() + alone

    wanted = torch.autograd.grad(total(*students), students)
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*students), students)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("students", "targets", "error", "match"),
    [
        ([], [], ValueError, "students is empty"),
        (torch.zeros(3, 4), torch.zeros(3, 4), ValueError, r"students must be 3-D .* \(3, 4\)"),
        ([torch.zeros(3, 4)], [torch.zeros(3, 4)] * 2, ValueError, "students has 1 entries"),
        ([torch.zeros(3, 4)], [torch.zeros(3, 5)], ValueError, r"target has shape \(3, 5\)"),
        (
            [torch.zeros(3, 4), torch.zeros(2, 4)],
            [torch.zeros(3, 4), torch.zeros(2, 4)],
            ValueError,
            r"tensors \(3, 4\) .* and \(2, 4\)",
        ),
        ([torch.zeros(3, 4).double()], [torch.zeros(3, 4)], TypeError, "float64; Triton's kernels"),
        ([torch.zeros(3, 4).long()], [torch.zeros(3, 4)], TypeError, "student has dtype"),
        ([None], [torch.zeros(3, 4)], TypeError, "student must be a torch.Tensor"),
    ],
)
def test_bad_input(students, targets, error, match, kd):
    with pytest.raises(error, match=match):
        kd.kd_losses(students, targets)


def test_temperature_must_be_positive(kd):
    with pytest.raises(ValueError, match="temperature=0"):
        kd.kd_losses([torch.zeros(3, 4)], [torch.zeros(3, 4)], 0.0)


def test_cpu_tensors_are_refused_by_compiled_kernels():
    """In a process of its own: this one interprets."""
    code = (
        "import os, torch\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "from mfef_ext.backends.triton import kd\n"
        "x = torch.zeros(2, 3)\n"
        "try: kd.kd_loss(x, x)\n"
        "except RuntimeError as e: print(e)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tensors on cpu; move them to a CUDA device" in ran.stdout, ran.stderr
