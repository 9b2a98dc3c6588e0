"""What the tests of all backends share."""

import pytest
import torch

from mfef_ext import backends
from mfef_ext.backends import cuda
from tests.backends.cuda.host import Host, build


@pytest.fixture
def untuned(monkeypatch):
    """Batches and maps of any size get the same code; deterministic mode fills memory with NaN,
    which takes too much of it here."""
    monkeypatch.setenv("MFEF_TRITON_AUTOTUNE", "0")
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def host_library() -> Host:
    return Host(build())


@pytest.fixture
def host(host_library, monkeypatch):
    """The host's kernels in the place of the CUDA backend."""
    conditions = [
        backends.Condition(lambda p: p.dtype in cuda.DTYPES, lambda p: f"dtype {p.dtype}"),
    ]
    stand_in = backends.Backend("cuda", tuple(conditions), host_library.operators)
    monkeypatch.setattr(cuda, "BACKEND", stand_in)
    host_library.set()
    yield host_library
    host_library.set()
