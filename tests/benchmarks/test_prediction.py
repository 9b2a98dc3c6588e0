"""Bytes and operations of launches, against counting them by hand."""

import pytest
import suites

pytest.importorskip("triton")
prediction = pytest.importorskip("prediction")

N, C, HIDDEN, PIXELS = 128, 64, 4, 64
MAP = 4 * N * C * PIXELS


def counted(direction, side=8):
    case = suites.Case("paper", N, C, side, (1, 4, 8, 16), "float32", direction)
    return {one.kernel: one for one in prediction.count(case)}


def test_forward_of_small_maps_by_hand():
    found = counted(suites.FORWARD)
    assert list(found) == ["convolve", "image_forward"]
    convolve, attention = found.values()
    weights = 4 * (16 * 16 * 9 + 16 * 4 * 25 + 16 * 2 * 49 + 16 * 81)
    statistics = N * C * 12
    assert (convolve.read, convolve.written) == (MAP + weights, MAP + statistics)
    mlp = 4 * (2 * HIDDEN * C + HIDDEN + C)
    assert attention.read == MAP + statistics + mlp + 4 * 2 * 49
    # Gate, mean, max, both pooled maps and the hidden layer, in wholes of 16 floats.
    assert attention.written == MAP + 4 * N * (3 * C + 2 * PIXELS + 16)


def test_forward_of_large_maps_by_hand():
    """Nothing is saved, and what stands in for it is not written."""
    output = counted(suites.FORWARD, side=56)["output"]
    pixels = 56 * 56
    scratch = 4 * N * (3 * C + 2 * pixels + 16)
    assert output.written == 4 * N * C * pixels
    assert output.read == 4 * N * C * pixels + scratch + 4 * 2 * 49


def test_operations_are_those_of_the_suites_less_the_attention():
    forward = counted(suites.FORWARD)["convolve"]
    by_dot, by_taps = 16 * 16 * 9, 16 * 4 * 25 + 16 * 2 * 49 + 16 * 81
    assert (forward.dot, forward.direct) == (2 * N * PIXELS * by_dot, 2 * N * PIXELS * by_taps)
    assert forward.seconds > prediction.LAUNCH + (forward.read + forward.written) / prediction.COPY


@pytest.mark.parametrize(("side", "launches"), [(8, 7), (56, 12)])
def test_launches_of_a_step_read_and_write_at_least_the_floor(side, launches):
    case = suites.Case("paper", N, C, side, (1, 4, 8, 16), "float32", suites.BOTH)
    found = prediction.count(case)
    assert len(found) == launches
    moved = sum(one.read + one.written for one in found)
    assert moved > suites.count_work(case).bytes_floor
