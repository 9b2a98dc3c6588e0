"""The clock's boundary lies between the method's backward and the students'."""

import torch

from mfef_ext.distill import OnlineDistiller
from mfef_ext.train.models import StudentSpec
from mfef_ext.train.timing import HeadClock


def test_backward_boundary():
    spec = StudentSpec("resnet8", 1, 10, (1, 1, 1))
    for detach in (False, True):
        d = OnlineDistiller(
            [spec.build(), spec.build()],
            num_classes=10,
            tap="stage3",
            input_shape=(1, 8, 8),
            detach_features=detach,
        )
        clock = HeadClock(d.method, torch.device("cpu"))
        events = []
        clock._students_begin = lambda gradients, events=events: events.append("boundary")
        for name, parameter in d.named_parameters():
            who = "method" if name.startswith("method") else "student"
            parameter.register_hook(lambda g, who=who, events=events: events.append(who))
        d(torch.randn(4, 1, 8, 8), torch.arange(4)).loss.backward()
        first, last = events.index("boundary"), len(events) - events[::-1].index("boundary") - 1
        assert set(events[:first]) == {"method"} and set(events[first:]) == {"boundary", "student"}
        assert first < last  # one boundary per student; the clock stops at the first


def test_seconds_are_part_of_the_step(monkeypatch):
    spec = StudentSpec("resnet8", 1, 10, (1, 1, 1))
    d = OnlineDistiller(
        [spec.build()], num_classes=10, tap="stage3", input_shape=(1, 8, 8), method="mfef"
    )
    clock = HeadClock(d.method, torch.device("cpu"))
    started = clock.now()
    out = d(torch.randn(4, 1, 8, 8), torch.arange(4))
    forward = clock.seconds
    clock.backward_starts()
    out.loss.backward()
    assert 0 < forward < clock.seconds < clock.now() - started
    d.eval()
    before = clock.seconds
    d(torch.randn(4, 1, 8, 8))
    assert clock.seconds == before  # evaluation is not training
