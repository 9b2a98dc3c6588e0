"""Which GPUs, drivers and problems the CUDA backend takes, without a GPU; and that each choice is
made for the call at hand, while torch.compile traces too."""

import dataclasses
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mfef_ext import backends, functional, ops, reference
from mfef_ext.backends import cuda
from mfef_ext.inspection import _explain_problem
from mfef_ext.problem import Branch, Problem
from tests.ptx.cuda import A100, H200, SMALLEST

from .test_plan import PAPER, problem

DEFAULT = "80 90a-real 100-real"  # what setup.py has compiled for


@pytest.fixture
def gpu(monkeypatch):
    """Pretends: gpu(capability, built, driver, ...), with the defaults below."""
    monkeypatch.setattr(ops, "CUDA_LOADED", True)

    def pretend(
        capability=(9, 0), built=DEFAULT, driver="13.0", runtime="13.0", nvcc="", limit=H200, gpus=1
    ):  # fmt: skip
        said = {"architectures": built, "nvcc": nvcc or f"{runtime}.88"}
        said |= {"runtime": runtime, "driver": driver}
        monkeypatch.setattr(cuda, "library", lambda: said)
        monkeypatch.setattr(cuda, "shared_limit", lambda device: limit)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    pretend()
    pretend.monkeypatch = monkeypatch
    return pretend


@pytest.mark.parametrize(
    ("built", "capability", "served"),
    [
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 6), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),
        (DEFAULT, (10, 3), True),
        (DEFAULT, (8, 7), True),  # by the PTX of 8.0
        (DEFAULT, (12, 0), True),
        ("80-real", (8, 6), True),
        ("80-real", (8, 7), False),  # Jetson's machine code is its own
        ("87-real", (8, 7), True),
        ("80-real", (9, 0), False),
        ("89-real", (8, 6), False),
        ("86-real", (8, 0), False),
        ("86", (8, 0), False),
        ("90", (8, 9), False),
        ("90-real", (10, 0), False),
        ("90", (10, 0), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a", (12, 0), False),
        ("100a-real", (10, 3), False),
        ("100a", (10, 3), False),
        ("100-real", (10, 3), True),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("100f", (12, 0), False),
        ("103f-real", (10, 0), False),
        ("100-real", (10, 1), False),
        ("120f-real", (12, 1), True),
        ("121-real", (12, 0), False),
        ("80-virtual", (8, 0), True),
        ("80-virtual", (12, 0), True),
        ("86-real 90a-real", (8, 9), True),
        ("", (9, 0), False),
        ("native", (9, 0), False),
    ],
)
def test_which_gpus_what_was_built_serves(gpu, built, capability, served):
    gpu(capability, built)
    ok, reason = cuda.BACKEND.supports(problem(128, 64, 8))
    assert ok == served
    wanted = ".".join(map(str, capability))
    assert ok or reason == (
        f"it was built for the architectures {built}, of which compute capability {wanted} runs "
        f'none; build it with TORCH_CUDA_ARCH_LIST="{wanted}"'
    )


@pytest.mark.parametrize(
    ("runtime", "driver", "reason"),
    [
        ("13.0", "13.0", ""),
        ("13.0", "13.2", ""),
        ("13.2", "13.0", ""),  # any driver of the same major version
        ("12.8", "12.0", ""),
        ("12.8", "13.0", ""),
        ("12.4", "14.1", ""),
        ("13.0", "12.9", "update the driver to one of CUDA 13.0 or later, or build with CUDA 12"),
        ("12.4", "11.8", "it was built with CUDA 12.4 and the driver is of CUDA 11.8; update"),
        ("13.0", "none", "its CUDA runtime finds no driver (none)"),
        ("13.0", "unknown error", "its CUDA runtime finds no driver (unknown error)"),
    ],
)
def test_which_drivers_the_runtime_takes(gpu, runtime, driver, reason):
    gpu((9, 0), DEFAULT, driver, runtime)
    ok, found = cuda.BACKEND.supports(problem(128, 64, 8))
    assert ok == (reason == "") and reason in found


def test_ptx_needs_a_driver_as_new_as_the_compiler(gpu):
    """Minor versions are excused for machine code alone."""
    for driver, nvcc, served in (
        ("13.0", "13.0.88", True),
        ("13.2", "13.0.88", True),
        ("14.0", "13.2.10", True),
        ("13.0", "13.2.10", False),
    ):
        gpu((12, 0), "80 90a-real", driver, nvcc[:4], nvcc)
        ok, reason = cuda.BACKEND.supports(problem(128, 64, 8))
        assert ok == served
        assert ok or reason == (
            "for compute capability 12.0 it has only PTX of nvcc 13.2.10, and the driver is of "
            'CUDA 13.0; update the driver, or build with TORCH_CUDA_ARCH_LIST="12.0"'
        )
        gpu((9, 0), "80 90a-real", driver, nvcc[:4], nvcc)
        assert cuda.BACKEND.supports(problem(128, 64, 8)) == (True, "")


def test_who_is_not_served_is_told_and_the_next_backend_runs(gpu, replace):
    proven = dataclasses.replace(cuda.BACKEND, verified=True)
    replace(proven)
    one = problem(128, 64, 8)
    gpu.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.choose(one).name == "cuda"
    assert proven.absent() == ""
    for facts, reason in (
        ({"driver": "12.8"}, "the driver is of CUDA 12.8"),
        ({"capability": (12, 0), "built": "90a-real"}, "compute capability 12.0 runs none"),
        ({"capability": (7, 5)}, "compute capability (7, 5), below 8.0"),
    ):
        gpu(**facts)
        assert backends.choose(one).name == "reference"
        with pytest.raises(RuntimeError, match="backend='cuda' cannot run mfef_block: ") as error:
            backends.choose(one, "cuda")
        assert reason in str(error.value)
        assert reason in "\n".join(_explain_problem(one, None, False))
        assert reason in proven.absent()


def test_one_gpu_that_is_served_is_enough_to_be_there(gpu):
    gpu(gpus=2)
    gpu.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {0: (7, 5), 1: (9, 0)}
    gpu.monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    assert cuda.BACKEND.absent() == ""
    capabilities[1] = (8, 9)
    gpu.monkeypatch.setattr(
        cuda, "library", lambda: {**dict.fromkeys(("nvcc", "runtime", "driver"), "13.0"),
                                  "architectures": "90a-real"},
    )  # fmt: skip
    assert "below 8.0" in cuda.BACKEND.absent()


@pytest.mark.skipif(not ops.CUDA_LOADED, reason="_C_cuda is not loaded")
def test_the_library_tells_what_is_asked_of_it():
    built = cuda.library()
    assert {"architectures", "nvcc", "runtime", "driver"} <= set(built)
    assert cuda._version(built["runtime"]) and cuda._version(built["nvcc"])
    for entry in built["architectures"].split():
        major, minor = divmod(int(re.match(r"\d+", entry)[0]), 10)
        assert any(cuda._serves(entry, (major, minor)))
    if not torch.cuda.is_available():
        assert "finds no driver" in cuda._runs_on((9, 0), **built)


# --- while torch.compile traces ---------------------------------------------------------------


def posed(x, op="mfef_block", k=3):
    """A problem on a GPU of sizes that are those of ``x``, wherever that is."""
    n, c, h, w = x.shape
    branches = (Branch(c // 2, c // 2, k, 1), Branch(c // 2, c // 2, 1, 1))
    device = torch.device("cuda", 0)
    return Problem(op, n, c, h, w, torch.float32, device, branches, True, 4, 3)


def adds(x, forced=None, k=3):
    """x with 1 added if CUDA runs its problem, 2 if something else does."""
    return x + (1 if backends.choose(posed(x, k=k), forced).name == "cuda" else 2)


@pytest.fixture
def compiled(gpu, replace):
    """Compiles without graph breaks and counts the graphs."""
    torch._dynamo.reset()
    proven = dataclasses.replace(cuda.BACKEND, verified=True)
    replace(proven)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def compile(function, **options):
        return torch.compile(function, backend=count, fullgraph=True, **options), graphs

    return compile


# A kernel of 201 needs more memory than a thread block has on maps where that many taps are in use.
FITS, TOO_LARGE = (2, 8, 8, 8), (2, 8, 256, 256)


def test_a_plan_that_does_not_fit_is_refused_when_traced(compiled):
    call, _ = compiled(lambda x: adds(x, k=201))
    assert call(torch.zeros(FITS)).unique().item() == 1
    assert call(torch.zeros(TOO_LARGE)).unique().item() == 2
    forced, _ = compiled(lambda x: adds(x, "cuda", k=201))
    assert forced(torch.zeros(FITS)).unique().item() == 1
    with pytest.raises(Exception, match=r"cannot run mfef_block: .*not one channel of"):
        forced(torch.zeros(TOO_LARGE))


def test_a_choice_is_made_anew_for_each_size_of_symbols(compiled):
    call, graphs = compiled(lambda x: adds(x, k=201), dynamic=True)
    for shape, added in ((FITS, 1), (TOO_LARGE, 2), ((5, *FITS[1:]), 1), ((3, *TOO_LARGE[1:]), 2)):
        assert call(torch.zeros(shape)).unique().item() == added
    assert len(graphs) == 2  # a batch of another size is not compiled for


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns of every size
def test_other_tracers_choose_for_the_sizes_that_they_see(compiled):
    class Adds(torch.nn.Module):
        def forward(self, x):
            return adds(x, k=201)

    for shape, added in ((FITS, 1), (TOO_LARGE, 2)):
        x = torch.zeros(shape)
        any_batch = ({0: torch.export.Dim.DYNAMIC},)
        for strict in (True, False):
            program = torch.export.export(Adds(), (x,), strict=strict, dynamic_shapes=any_batch)
            assert program.module()(torch.zeros(5, *shape[1:])).unique().item() == added
        assert make_fx(Adds(), tracing_mode="symbolic")(x)(x).unique().item() == added
        assert torch.jit.trace(Adds(), x)(x).unique().item() == added


def test_a_gpu_that_is_not_served_is_seen_when_traced(compiled, gpu):
    gpu(driver="12.8")
    call, _ = compiled(adds)
    assert call(torch.zeros(FITS)).unique().item() == 2


@pytest.mark.parametrize("limit", [H200, A100, SMALLEST])
def test_what_fits_alone_and_among_many_fits_in_any_number(limit):
    """What is asked while the size of a batch is a symbol."""
    shapes = [shape[1:] for shape in PAPER] + [(256, 16), (512, 7), (8, 1), (16, 3), (1024, 4)]
    for shape in shapes:
        ends = [cuda.plan(problem(n, *shape), limit)["fits"] for n in cuda.BATCHES]
        between = [cuda.plan(problem(n, *shape), limit)["fits"] for n in (2, 40, 513, 1024, 10**5)]
        assert not all(ends) or all(between)


# --- a choice is not for life -----------------------------------------------------------------


def test_a_choice_follows_what_it_depends_on(gpu):
    """The same call again, after something else has changed."""
    ran = []
    stand_ins = {
        name: dataclasses.replace(
            backends.by_name(name),
            conditions=backends.by_name(name).conditions[1:],  # all but the tensors' device
            operators={
                "multi_scale_conv2d": lambda *a, name=name: (
                    ran.append(name) or reference.multi_scale_conv2d(*a)
                )
            },
            verified=True,
        )
        for name in ("cuda", "cpu", "reference")
    }
    order = tuple(stand_ins.values())
    gpu.monkeypatch.setattr(backends, "order", lambda device_type: order)
    x, weights = torch.randn(2, 4, 5, 5), [torch.randn(4, 4, 3, 3)]

    def runs():
        functional.multi_scale_conv2d(x, weights, [1])
        return ran.pop()

    assert runs() == "cuda"
    gpu(driver="12.0")
    assert runs() == "cpu"
    gpu()
    assert runs() == "cuda"
    gpu(capability=(7, 5))
    assert runs() == "cpu"
    gpu(limit=100)
    assert runs() == "cpu"
    gpu()
    gpu.monkeypatch.setattr(ops, "CUDA_LOADED", False)
    assert runs() == "cpu"
    gpu.monkeypatch.setattr(ops, "CUDA_LOADED", True)
    with backends.use_backend("reference"):
        gpu.monkeypatch.setattr(backends, "by_name", stand_ins.__getitem__)
        assert runs() == "reference"
    order = order[1:]
    assert runs() == "cpu"


def test_the_environment_may_change_between_calls(monkeypatch):
    x, weights = torch.randn(1, 4, 4, 4), [torch.randn(4, 4, 3, 3)]

    def call():
        return functional.multi_scale_conv2d(x, weights, [1], backend="triton")

    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted beside a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    call()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="must be on a CUDA device"):
        call()
