"""What the tests of all backends share."""

import pytest
import torch


@pytest.fixture
def untuned(monkeypatch):
    """Batches and maps of any size get the same code; deterministic mode fills memory with NaN,
    which takes too much of it here."""
    monkeypatch.setenv("MFEF_TRITON_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(False)
