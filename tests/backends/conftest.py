"""What the tests of all backends share."""

import dataclasses

import pytest
import torch

from mfef_ext import backends
from mfef_ext.backends import cuda
from tests.backends.interpreter import interpret
from tests.ptx.cuda import Device, build, nvcc


@pytest.fixture
def untuned(monkeypatch):
    """Batches and maps of any size get the same code; deterministic mode fills memory with NaN,
    which takes too much of it here."""
    monkeypatch.setenv("MFEF_TRITON_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(monkeypatch):
    interpret(monkeypatch)


@pytest.fixture(scope="session")
def ptx_device() -> Device:
    if nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    return Device(build())


@pytest.fixture
def replace(monkeypatch):
    """Puts a backend in the place of the one of its name."""

    def in_its_place(backend: backends.Backend) -> None:
        monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
        monkeypatch.setattr(backends, "_orders", {})
        backends.register(backend)

    return in_its_place


@pytest.fixture
def machine(ptx_device, replace):
    """The CUDA kernels on the PTX machine in the place of the CUDA backend."""
    conditions = [
        backends.Condition(lambda p: p.dtype in cuda.DTYPES, lambda p: f"dtype {p.dtype}"),
    ]
    replace(
        dataclasses.replace(
            cuda.BACKEND, conditions=tuple(conditions), operators=ptx_device.operators
        )
    )
    ptx_device.set()
    yield ptx_device
    ptx_device.set()
