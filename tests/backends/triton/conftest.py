"""Without a GPU, kernels interpreted on CPU tensors; tests/conftest.py has loaded Triton for it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
