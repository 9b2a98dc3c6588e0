"""The ramp-up is pinned: a wrong divisor keeps the students from teaching for most of a run."""

import math

import pytest

from mfef_ext.distill import ramp_up


def test_pinned_values():
    assert ramp_up(0) == pytest.approx(0.006737947, abs=1e-9)
    assert ramp_up(40) == pytest.approx(math.exp(-1.25), abs=1e-12)
    assert ramp_up(79.999) == pytest.approx(1, abs=1e-6)
    assert ramp_up(80) == ramp_up(300) == 1


def test_length_scales():
    assert ramp_up(2, 4) == ramp_up(40, 80)
    assert ramp_up(0, 0) == 1
