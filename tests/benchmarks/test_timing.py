"""Percentiles, ratios, rounds and saved bytes, on numbers that are known."""

import numpy as np
import pytest
import timing
import torch


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_percentiles_are_numpys(count):
    values = list(np.random.default_rng(0).normal(size=count))
    summary = timing.summarise(values)
    assert summary.median == pytest.approx(np.median(values))
    assert summary.p20 == pytest.approx(np.percentile(values, 20))
    assert summary.p80 == pytest.approx(np.percentile(values, 80))


def test_ratios_are_taken_round_by_round():
    """A load that slows whole rounds leaves the ratio alone, though both times scatter."""
    load = [1.0, 1.0, 7.0, 3.0, 1.0]
    slow, fast = [6.0 * f for f in load], [2.0 * f for f in load]
    assert timing.ratios(slow, fast) == timing.Summary(3.0, 3.0, 3.0)
    # Not the ratio of the medians: that would be 1 here.
    assert timing.ratios([1.0, 2.0, 9.0], [2.0, 1.0, 2.0]).median == 2.0


def test_geometric_mean():
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert timing.geometric_mean([3.0]) == pytest.approx(3.0)


def test_every_round_has_every_step_and_the_order_rotates():
    calls: list[str] = []

    def step(name: str):
        def run() -> None:
            calls.append(name)
            # Slow enough for one call per sample.
            torch.ones(100).sum()
            timing.time.sleep(timing.SAMPLE_SECONDS)

        return run

    names = ("a", "b", "c")
    series = timing.interleave({n: step(n) for n in names}, "cpu", budget=0, min_rounds=4)
    assert {k: len(v) for k, v in series.items()} == dict.fromkeys(names, 4)
    assert all(t >= timing.SAMPLE_SECONDS for v in series.values() for t in v)
    rounds = "".join(calls[-12:])
    assert rounds == "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize(
    ("seconds", "samples"),
    [([1.0], 1), ([0.05, 0.04, 0.03, 0.031, 0.03, 0.04], 6), ([0.01, 0.01, 0.01, 0.01], 4)],
)
def test_a_step_is_warm_when_its_times_settle(monkeypatch, seconds, samples):
    taken = []
    monkeypatch.setattr(
        timing, "seconds_per_call", lambda *_: taken.append(seconds[len(taken)]) or taken[-1]
    )
    assert timing.warm_up(lambda: None, "cpu") == 1
    assert len(taken) == samples


def test_rounds_fill_the_budget_up_to_a_bound():
    series = timing.interleave({"a": lambda: None}, "cpu", budget=5, max_rounds=7)
    assert len(series["a"]) == 7


def test_saved_bytes_counts_each_storage_once_without_parameters():
    x = torch.randn(10, 10, requires_grad=True)
    weight = torch.randn(10, 10, requires_grad=True)

    def step() -> None:
        out = (x * weight).exp()  # keeps x, weight and its own result
        twice = out.view(-1) * out.view(-1)  # keeps the same result, viewed, twice
        torch.autograd.grad(twice.sum(), [x, weight])

    assert timing.saved_bytes(step, x, [weight]) == {"saved": 400, "input": 400}


def test_a_missing_fma_chain_is_said(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(timing.importlib, "import_module", missing)
    peak = timing.fma_peak("cpu", torch.float32)
    assert peak["per_second"] is None
    assert "not available" in peak["how"]


def test_fma_peak_adds_up_the_threads(monkeypatch):
    class Extension:
        @staticmethod
        def fma_chain(iterations: int) -> int:
            timing.time.sleep(iterations * 1e-7)
            return 1000 * iterations

    monkeypatch.setattr(timing.importlib, "import_module", lambda name: Extension)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 3)
    peak = timing.fma_peak("cpu", torch.float32, seconds=0.02)["per_second"]
    assert 1.5e10 < peak <= 3e10  # three sleepers of 1e10 per second each


def test_the_share_of_others_leaves_out_this_process(monkeypatch):
    monkeypatch.setattr(timing, "processor_seconds", lambda: (130.0, 220.0, 24.0))
    # 30 of 120 seconds were busy, 20 of them our own.
    assert timing.share_of_others((100.0, 100.0, 4.0)) == pytest.approx(10 / 120)
    assert timing.share_of_others(None) is None
