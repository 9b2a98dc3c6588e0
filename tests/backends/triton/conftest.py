"""Kernels interpreted on CPU tensors; tests/conftest.py has loaded Triton for it."""

import pytest


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
