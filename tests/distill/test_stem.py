"""Students that share their first layers: what is shared, and that it computes once."""

import copy

import pytest
import torch
from torch import nn

from mfef_ext.distill import OnlineDistiller
from mfef_ext.distill.stem import share_stem
from mfef_ext.train.models import build_students

X, Y = torch.randn(4, 3, 32, 32), torch.arange(4)


def distiller_of(*names, **options):
    torch.manual_seed(0)
    students, specs = build_students(names, (3, 32, 32), 10)
    taps = [spec.tap for spec in specs]
    return OnlineDistiller(students, num_classes=10, tap=taps, share_stem=True, **options)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("resnet8", {"stage3", "classifier"}),
        ("wrn-16-2", {"stage3", "final", "classifier"}),
        ("densenet40-12", {"block3", "final", "classifier"}),
        ("vgg16", {"features.40", "features.41", "classifier"}),
        ("torchvision:resnet18", {"layer4", "fc"}),
    ],
)
def test_all_before_the_last_stage_is_shared(name, own):
    d = distiller_of(name, name)
    first, second = (dict(s.named_parameters()) for s in d.students)
    apart = {k for k in first if first[k] is not second[k]}
    assert apart == {k for k in first if k.startswith(tuple(o + "." for o in own))}
    assert set(d.students[0].state_dict()) == set(d.students[1].state_dict())


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-2", "vgg16", "torchvision:resnet18"])
def test_the_stem_computes_once_per_batch(name, monkeypatch):
    d = distiller_of(name, name, name)
    first, second = ({id(m) for m in student.modules()} for student in d.students[:2])
    ran, convolve = [], nn.Conv2d._conv_forward

    def counted(layer, *arguments):
        if id(layer) in first & second:
            ran.append(layer)
        return convolve(layer, *arguments)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    d(X, Y, 0.0)
    assert ran and len(ran) == len(set(ran))
    d(X, Y, 0.0)  # the same tensor: nothing is remembered from the batch before
    assert len(ran) == 2 * len(set(ran))


def test_gradients_of_all_students_reach_the_stem_and_the_optimiser_has_it_once():
    d = distiller_of("resnet8", "resnet8", method="ce")
    d(X, Y, 0.0).loss.backward()
    together = d.students[0].stem.weight.grad
    alone = []
    for i in range(2):
        d.zero_grad()
        d(X, Y).losses[f"ce/student{i}"].backward()
        alone.append(d.students[0].stem.weight.grad)
    torch.testing.assert_close(together, alone[0] + alone[1])
    parameters = [p for group in d.parameter_groups() for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(d.parameters()))


def test_a_student_alone_computes_every_time():
    student = distiller_of("resnet8", "resnet8").students[0].eval()
    with torch.no_grad():
        before = student(X)
    student(X).sum().backward()
    assert student.stem.weight.grad is not None
    with torch.no_grad():
        student.stem.weight.zero_()
        assert not torch.equal(student(X), before)


def test_a_copy_stands_alone():
    d = distiller_of("resnet8", "resnet8", method="ce").eval()
    other = copy.deepcopy(d)
    expected = d(X).logits["student1"]
    with torch.no_grad():
        for p in d.parameters():
            p.zero_()
    torch.testing.assert_close(other(X).logits["student1"], expected)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="share_stem=True needs students of one architecture"):
        distiller_of("resnet8", "resnet14")
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(2)]
    with pytest.raises(ValueError, match="finds nothing in front of the last stage of Sequential"):
        share_stem(nets, ["0", "0"])
