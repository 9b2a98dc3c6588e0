"""Schedules that a wrong divisor would spoil."""

import pytest

from mfef_ext.train.config import TrainConfig


def test_learning_rate_drops_where_the_papers_drop_it():
    config = TrainConfig(epochs=300, lr=0.1)
    rates = [config.lr_at(e) for e in (0, 149, 150, 224, 225, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_ramp_is_scaled_with_the_run():
    assert TrainConfig(epochs=300).ramp_length == 80
    assert TrainConfig(epochs=15).ramp_length == 4
    assert TrainConfig(epochs=15, ramp_epochs=7.5).ramp_length == 7.5
    assert TrainConfig(ramp_epochs=0).ramp_length == 0


def test_threads_leave_a_core_free_unless_told(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert TrainConfig().thread_count == 3
    assert TrainConfig(threads=4).thread_count == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert TrainConfig().thread_count == 4
