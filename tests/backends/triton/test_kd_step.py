"""The losses of a step of MFEF: one launch each way where Triton is chosen, else kd_loss's sums."""

import pytest
import torch

import mfef_ext
from mfef_ext import functional
from mfef_ext.distill.method import Batch, StudentShape
from mfef_ext.distill.mfef import MFEF

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels of kd.py, in the order in which they are launched."""
    from mfef_ext.backends.triton import kd

    found = []
    for name in ("forward_kernel", "backward_kernel"):
        kernel = getattr(kd, name)
        run = kernel.run

        def noted(*arguments, _name=name, _run=run, **options):
            found.append(_name)
            return _run(*arguments, **options)

        monkeypatch.setattr(kernel, "run", noted)
    return found


def step(backend):
    """Losses and the gradients of the students' logits and maps, of one step of MFEF."""
    torch.manual_seed(0)
    shapes = [StudentShape(4, 2, 2), StudentShape(4, 2, 2)]
    method = MFEF(shapes, 5, temperature=2.5, ramp_epochs=1.0).to(DEVICE)
    logits = [torch.randn(6, 5, device=DEVICE, requires_grad=True) for _ in shapes]
    maps = [torch.randn(6, 4, 2, 2, device=DEVICE, requires_grad=True) for _ in shapes]
    labels = torch.randint(0, 5, (6,), device=DEVICE)
    method.blocks.requires_grad_(False)
    with mfef_ext.use_backend(backend):
        _, terms = method(Batch([], logits, maps, labels, 1.0))
    loss = sum(terms[name] for name in terms if name.startswith("kd/"))
    return terms, torch.autograd.grad(loss, [*logits, method.head.classifier.weight])


def test_a_step_is_one_launch_each_way(launches):
    plain, plain_grads = step("reference")
    assert launches == []
    terms, grads = step("triton")
    assert launches == ["forward_kernel", "backward_kernel"]
    assert list(terms) == list(plain)
    for name in terms:
        torch.testing.assert_close(terms[name], plain[name])
    for grad, wanted in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_elsewhere_they_are_the_same_bits_as_kd_loss(launches, backend):
    if backend == "cpu" and DEVICE == "cuda":
        pytest.skip("the CPU backend takes CPU tensors")
    students = [torch.randn(6, 5, device=DEVICE, requires_grad=True) for _ in range(3)]
    targets = [torch.randn(6, 5, device=DEVICE) for _ in range(3)]
    losses = functional.kd_losses(students, targets, 2.0, backend=backend)
    alone = [
        functional.kd_loss(s, t, 2.0, backend=backend)
        for s, t in zip(students, targets, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(losses, alone, strict=True))
    grads = [torch.autograd.grad(sum(each), students) for each in (losses, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert launches == []


def test_losses_of_several_shapes_are_launched_one_by_one(launches):
    students = [torch.randn(n, 5, device=DEVICE) for n in (6, 4)]
    targets = [torch.randn(n, 5, device=DEVICE) for n in (6, 4)]
    losses = functional.kd_losses(students, targets, backend="triton")
    assert launches == ["forward_kernel"] * 2
    for loss, s, t in zip(losses, students, targets, strict=True):
        torch.testing.assert_close(loss, functional.kd_loss(s, t, backend="reference"))


def test_empty_and_wrong_arguments():
    assert functional.kd_losses([], []) == []
    x = torch.randn(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        functional.kd_losses([x], [x, x])
    with pytest.raises(ValueError, match="both are logits"):
        functional.kd_losses([x, x], [x, x[:1]])
