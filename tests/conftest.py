"""What every test runs under: NaN in memory that nobody wrote, and nothing forced afterwards."""

import contextlib
import fcntl
import functools
import importlib.util
import os
import tempfile

import pytest
import torch

import mfef_ext
from mfef_ext import _C

# Triton's own library is interpreted or compiled for good when it is imported, which much of torch
# does in passing; without a GPU there is nothing to compile for. Tests that do not ask for Triton
# see no sign of it.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    for kernels in ("conv", "attention", "kd"):  # ours too, whatever test comes first
        importlib.import_module(f"mfef_ext.backends.triton.{kernels}")
    del os.environ["TRITON_INTERPRET"]

# All that this processor runs, unless one is asked for.
ISAS = os.environ.get("MFEF_USE_ISA", "").split() or _C.build_info()["cpu_isas_usable"]
PLANS = ("images", "pixels")
# Every path through the CPU kernels: (plan, convolution of the images plan).
PATHS = {
    "images": ("images", "direct"),
    "fft": ("images", "fft"),
    "pixels": ("pixels", "direct"),
}


def pytest_configure(config):
    """torch.compile starts from nothing. What it keeps in /tmp for the next process may be for
    other instructions, and then does not compile: ATEN_CPU_CAPABILITY is no part of the key."""
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist inherit the folder
        cache = tempfile.TemporaryDirectory(prefix="mfef-inductor-")
        config.add_cleanup(cache.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty and the kernels' own buffers are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _C.poison_buffers(True)
    yield
    _C.poison_buffers(False)
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _forced(isa, plan, convolution):
    before = _C.cpu_isa()
    _C.force_cpu_isa(isa)
    _C.force_cpu_plan(plan)
    _C.force_cpu_convolution(convolution)
    try:
        yield
    finally:
        _C.force_cpu_isa(before)
        _C.force_cpu_plan("")
        _C.force_cpu_convolution("")


@pytest.fixture(params=[(isa, path) for isa in ISAS for path in PATHS], ids="-".join)
def engine(request):
    """Every instruction set that this processor has, with every path, one after another."""
    isa, path = request.param
    with _forced(isa, *PATHS[path]):
        yield request.param


@pytest.fixture
def engines():
    """The same, by name, as contexts: for tests in which something else takes the time."""
    return {
        f"{isa}-{path}": functools.partial(_forced, isa, *PATHS[path])
        for isa in ISAS
        for path in PATHS
    }


@pytest.fixture(params=ISAS)
def fft(request):
    """Every instruction set, by FFT where there are transforms for the map."""
    with _forced(request.param, *PATHS["fft"]):
        yield request.param


@pytest.fixture
def fft_of_each_isa():
    """The same, by name, as contexts."""
    return {isa: functools.partial(_forced, isa, *PATHS["fft"]) for isa in ISAS}


@pytest.fixture
def on_each_isa(fft_of_each_isa):
    """Calls a function on every instruction set, by FFT: its results by name."""

    def call(f):
        results = {}
        for isa, forced in fft_of_each_isa.items():
            with forced():
                results[isa] = f()
        return results

    return call


@pytest.fixture(params=PLANS)
def plan(request):
    """Every plan, with the instruction set that is chosen by itself."""
    _C.force_cpu_plan(request.param)
    yield request.param
    _C.force_cpu_plan("")


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_forced():
    yield
    assert mfef_ext.backends.forced_name() == (os.environ.get("MFEF_BACKEND") or None)
    assert _C.forced_cpu_plan() == _C.forced_cpu_convolution() == ""


@pytest.fixture
def much_memory(tmp_path_factory):
    """For tests that take several GB: one at a time, whatever the number of test processes."""
    # All processes of a run share the parent of their base folders.
    with open(tmp_path_factory.getbasetemp().parent / "much_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
