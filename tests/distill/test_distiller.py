"""Any list of networks becomes one module; what cannot work is refused in a sentence."""

import copy
import re

import pytest
import torch
from torch import nn

from mfef_ext.distill import METHODS, OnlineDistiller, register


class Net(nn.Module):
    def __init__(self, classes=4, channels=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Answers(Net):
    """Gives its logits ``how``: "in a tuple", or "in a tuple, training", as some networks do."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        z = super().forward(x)
        return (z, z) if self.training or "training" not in self.how else z


def make(students=None, method="mfef", **changes):
    arguments = {"num_classes": 4, "tap": "body", "input_shape": (1, 6, 6)} | changes
    return OnlineDistiller([Net(), Net()] if students is None else students, method, **arguments)


def test_ce_is_the_students_alone():
    nets = [Net(), Net()]
    d = make(nets, "ce")
    assert len(list(d.parameters())) == 2 * len(list(nets[0].parameters()))
    x, y = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    out = d(x, y, 0)
    assert set(out.logits) == {"student0", "student1", "ensemble"}
    expected = [nn.functional.cross_entropy(net(x), y) for net in nets]
    torch.testing.assert_close(out.loss, sum(expected))
    assert d.spatial_gates(x) == []


def test_without_labels_there_are_logits_only():
    out = make().eval()(torch.randn(2, 1, 6, 6))
    assert set(out.logits) == {"student0", "student1", "ensemble", "fused"}
    assert out.losses == {}
    with pytest.raises(ValueError, match="no labels"):
        _ = out.loss


def test_every_parameter_is_in_exactly_one_named_group():
    d = make()
    groups = d.parameter_groups()
    assert [g["name"] for g in groups] == ["student0", "student1", "method"]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in d.parameters()}


def test_students_are_left_as_they_were():
    net = Net().train()
    net.fc.eval()  # a mode of its own must survive the probe
    before = copy.deepcopy(net.state_dict())
    d = make([net, Net()])
    assert net.training and not net.fc.training
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    d(torch.randn(2, 1, 6, 6))
    assert not net.body._forward_hooks
    copy.deepcopy(d)


def test_students_may_differ_in_width_and_map_size():
    small = nn.Sequential()
    small.add_module("down", nn.Conv2d(1, 12, 3, stride=2, padding=1))
    small.add_module("pool", nn.AdaptiveAvgPool2d(1))
    small.add_module("flat", nn.Flatten())
    small.add_module("fc", nn.Linear(12, 4))
    d = make([Net(), small], tap=["body", "down"])
    d(torch.randn(3, 1, 6, 6), torch.tensor([0, 1, 2]), 0.0).loss.backward()
    assert small.down.weight.grad.abs().sum() > 0


def test_torch_compile_traces_through_the_tap():
    d = make().eval()
    x = torch.randn(2, 1, 6, 6)
    compiled = torch.compile(d, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits["fused"], d(x).logits["fused"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": "mfeff"}, ValueError, ["method='mfeff'", "did you mean mfef?"]),
        ({"tap": None}, TypeError, ["tap=None", "name of a layer"]),
        ({"input_shape": (6, 6)}, ValueError, ["input_shape=(6, 6)", "(channels, height, width)"]),
        ({"input_shape": (3, 6, 6)}, ValueError, ["student 0", "input_shape=(3, 6, 6)"]),
        ({"students": []}, ValueError, ["students=[]", "at least one"]),
        ({"students": Net()}, TypeError, ["students must be a list of networks", "got Net"]),
        ({"students": iter([Net()])}, TypeError, ["students must be a list of networks"]),
        ({"students": ["resnet18"]}, TypeError, ["got ['str']"]),
        (
            {"students": [Answers("in a tuple")]},
            ValueError,
            ["gives tuple for an image", "wrap it"],
        ),
        ({"method": ["mfef"]}, ValueError, ["method=['mfef'] is unknown"]),
        ({"num_classes": 4.0}, TypeError, ["num_classes must be an int, got float 4.0"]),
        ({"input_shape": 6}, ValueError, ["input_shape=6 must be (channels, height, width)"]),
        ({"input_shape": (1, 6.0, 6)}, TypeError, ["input_shape[1] must be an int, got float 6.0"]),
        ({"share_stem": "no"}, TypeError, ["share_stem must be True or False, got str 'no'"]),
        ({"detach_features": "no"}, TypeError, ["detach_features must be True or False"]),
        ({"fusion": 0}, TypeError, ["fusion must be True or False, got int 0"]),
        ({"tap": "layer9"}, ValueError, ["tap='layer9'", "body, fc"]),
        ({"tap": ["body"]}, ValueError, ["1 layers for 2 students"]),
        ({"tap": "fc"}, ValueError, ["tap='fc'", "not a map"]),
        ({"num_classes": 7}, ValueError, ["num_classes=7", "(1, 4)"]),
        ({"temprature": 1.0}, TypeError, ["temprature=1.0", "temperature"]),
        ({"method": "ce", "temperature": 1.0}, TypeError, ["it takes none"]),
    ],
)
def test_bad_input(changes, error, words):
    with pytest.raises(error) as caught:
        make(**changes)
    for word in words:
        assert word in str(caught.value)


X, Y = torch.randn(3, 1, 6, 6), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X.numpy(), TypeError, "x must be a torch.Tensor (N, C, H, W), or a list"),
        ([X.numpy()] * 2, TypeError, "one such tensor for each student, got list"),
        (None, TypeError, "x must be a torch.Tensor"),
        (X[0], ValueError, "x has shape (1, 6, 6); give (N, C, H, W)"),
        ([X, X[:2]], ValueError, "with the same images for every student"),
    ],
)
def test_bad_images(x, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()(x, Y, 0)


def test_students_of_other_answers():
    d = make([Net(), Answers("in a tuple, training")], "dml")
    with pytest.raises(ValueError, match=r"student 1 gives tuple and not logits \(3, 4\); wrap it"):
        d(X, Y)
    assert d.eval()(X, Y).loss.isfinite()


def test_students_on_several_devices():
    class Elsewhere(Net):
        def forward(self, x):
            return super().forward(x).to("meta" if len(x) > 1 else x.device)

    with pytest.raises(ValueError, match="student 1 gives logits on meta and student 0 on cpu"):
        make([Net(), Elsewhere()], "dml")(X, Y)


def test_a_teacher_is_no_student():
    net = Net()
    with pytest.raises(ValueError, match=r"teacher shares parameters with student 1.*deepcopy"):
        make([Net(), net], "kd", teacher=net)
    assert all(p.requires_grad for p in net.parameters())


def test_a_student_without_parameters():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x):
            return self.body(x).mean((2, 3)).expand(-1, 4)

    assert make([Nothing(), Nothing()], "dml")(X, Y).loss.isfinite()


@pytest.mark.parametrize("method", ["ffl", "mfef", "one", "okddip", "ab"])
def test_the_methods_layers_follow_the_students(method):
    """Students of float64 need not be told twice; the teacher stays as it is."""
    options = {"teacher": Net().double(), "teacher_tap": "body"} if method == "ab" else {}
    d = make([Net().double() for _ in range(3)], method, **options)
    losses = d(X.double(), Y, 0.0).losses
    sum(losses.values()).backward()
    assert {term.dtype for term in losses.values()} == {torch.float64}
    teacher = Net()
    make([Net().double()], "kd", teacher=teacher)
    assert teacher.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("labels", [Y, torch.eye(4)[Y]])
def test_compiled_with_labels(labels):
    d = make(method="dml")
    torch._dynamo.reset()
    compiled = torch.compile(d, backend="eager")
    torch.testing.assert_close(compiled(X, labels, 1.0).loss, d(X, labels, 1.0).loss)


def test_one_network_twice_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="same network twice"):
        make([net, net])


def test_a_layer_that_runs_twice_is_refused():
    class Twice(Net):
        def forward(self, x):
            self.body(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="ran 2 times"):
        make([Twice()])


def test_a_method_is_registered_once():
    with pytest.raises(ValueError, match="already"):
        register("mfef")(METHODS["ce"])
