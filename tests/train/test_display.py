"""A terminal gets a moving bar, everything else one plain line per epoch."""

import io

import pytest
from rich.console import Console

from mfef_ext.train.display import Display

ROW = {"epoch": 3, "loss": 1.25, "validation/student0": 97.5, "test/student0": 96.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_display(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, _environ={})
    with Display(console, 12) as display:
        for step in range(1, 6):
            display.step(3, step, 5, 1.5)
        display.epoch(ROW, 812.4)
    line = "epoch  3/12  loss 1.250  validation %: student0 97.50  (812 images/s)\n"
    if terminal:
        assert line in out.getvalue() and "\x1b[" in out.getvalue() and "epoch 3 " in out.getvalue()
    else:
        assert out.getvalue() == line


def test_names_are_no_markup():
    out = io.StringIO()
    with Display(Console(file=out), 1) as display:
        display.say("runs/[b]x[/c]:cat: going on")
    assert out.getvalue() == "runs/[b]x[/c]:cat: going on\n"


def test_tensorboard_gets_every_number_of_every_epoch(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Display(Console(quiet=True), 2) as display:
        display.record(tmp_path, 1)
        display.epoch(ROW | {"epoch": 1}, 500.0)
        display.epoch(ROW | {"epoch": 2, "loss": 0.75}, 600.0)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {*ROW, "images_per_second"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.25), (2, 0.75)]
    assert [e.value for e in events.Scalars("test/student0")] == [96, 96]
