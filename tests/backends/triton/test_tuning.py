"""Which launch of a list runs: timed by a fake clock, and what is chosen obeys the rule."""

import pytest
import torch

import mfef_ext
from mfef_ext.modules import MFEFBlock
from tests.accuracy import check_block

pytest.importorskip("triton")

CUDA = torch.device("cuda", 0)


def forget():
    """Whatever was chosen, and the calls that know it."""
    from mfef_ext.backends.triton import attention, conv, ops, tuning

    tuning._choices.clear()
    for calls in (
        ops._block_call,
        conv._convolution,
        conv._weight_gradient,
        attention._forward_call,
        attention._backward_call,
    ):
        calls.cache_clear()


@pytest.fixture
def tuning(monkeypatch):
    """The module, without what was chosen before, and without traces afterwards."""
    from mfef_ext.backends.triton import tuning

    monkeypatch.delenv(tuning.SWITCH, raising=False)
    forget()
    yield tuning
    forget()


@pytest.fixture
def nothing_runs(monkeypatch):
    """No kernel: what is launched is what counts."""
    from mfef_ext.backends.triton.launch import Launch

    monkeypatch.setattr(Launch, "_bind", lambda self, tensors: None)


@pytest.fixture
def timed(monkeypatch, tuning):
    """A dictionary of microseconds by warps: as if a GPU took so long. Whoever was timed is in
    ``timed.launches``. Memory stays filled with NaN, but deterministic mode is not seen."""

    class Times(dict):
        launches = ()

    times = Times()

    def milliseconds(launch, tensors):
        launch(*tensors)
        times.launches += (launch,)
        return times.get(launch.options["num_warps"], 1000.0) / 1000

    monkeypatch.setattr(tuning, "pinned", lambda device: None)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    return times


class Kernel:
    """In place of one of Triton's; ``launched`` has the warps of every launch, ``bound`` of those
    for which Triton was asked."""

    __name__ = "_some_kernel"
    arg_names = ("x",)

    def __init__(self):
        self.launched, self.bound = [], []

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **options):
            self.bound.append(num_warps)
            self.launched.append(num_warps)
            return Code(self, num_warps)

        return launch


class Code:
    """In place of compiled code."""

    def __init__(self, kernel, warps):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append(self.warps)


@pytest.fixture
def launch_of(monkeypatch, tuning):
    """Makes a launch with 4, 8 or 2 warps for a class of problems."""
    from mfef_ext.backends.triton import launch

    monkeypatch.setattr(launch, "CompiledKernel", Code)

    def make(kernel, problem=("a class",), device=CUDA, deterministic=False, programs=1):
        def one(tile):
            return launch.Launch(kernel, programs, (), {}, tile.warps, 1, True, tile.registers)

        tiles = [tuning.Tile(32, warps) for warps in (4, 8, 2)]
        return tuning.fastest_tile(tiles, one, problem, device, deterministic)

    return make


def test_fastest_is_kept(timed, launch_of):
    """Once for a class: in the order of the list, the result being that of the chosen one, and each
    code is asked for once."""
    timed.update({4: 30.0, 8: 20.0, 2: 25.0})
    kernel = Kernel()
    launch = launch_of(kernel)
    launch("x")
    assert kernel.launched == [4, 8, 2, 8] and kernel.bound == [4, 8, 2]
    timed.update({4: 1.0})
    launch("x")
    assert kernel.launched[4:] == [8] and kernel.bound == [4, 8, 2]
    other = launch_of(kernel)  # of the same class, for another size of batch
    other("x")
    other("x")
    assert kernel.launched[5:] == [8, 8] and kernel.bound == [4, 8, 2, 8]
    launch_of(kernel, ("another class",))("x")
    assert kernel.launched[7:] == [4, 8, 2, 4]
    launch_of(kernel, device=torch.device("cuda", 1))("x")
    assert kernel.launched[11:] == [4, 8, 2, 4]
    assert len(timed.launches) == 9


def test_chosen_launch_is_as_short_as_any(launch_of):
    """Nothing stands before the code that is remembered."""
    from mfef_ext.backends.triton.launch import Launch

    assert type(launch_of(Kernel())).__call__ is Launch.__call__


def test_first_is_kept_unless_another_is_clearly_faster(timed, launch_of):
    timed.update({4: 100.0, 8: 98.0, 2: 99.0})
    kernel = Kernel()
    launch_of(kernel)("x")
    assert kernel.launched == [4, 8, 2, 4]


def test_none_that_the_gpu_cannot_hold(monkeypatch, tuning):
    from triton.runtime.errors import OutOfResources

    def launch(*tensors):
        raise OutOfResources(2, 1, "shared memory")

    assert tuning.milliseconds(launch, ()) == float("inf")


def test_nothing_is_launched_for_no_images(timed, launch_of):
    kernel = Kernel()
    launch_of(kernel, programs=0)("x")
    assert kernel.launched == [] and timed.launches == ()


REASONS = {
    "MFEF_TRITON_AUTOTUNE=0": CUDA,
    "deterministic mode": CUDA,
    "CUDA graph": CUDA,
    "on cpu": torch.device("cpu"),
    "on meta": torch.device("meta"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_first_of_the_list_where_nothing_is_timed(monkeypatch, tuning, launch_of, reason):
    """And for good: whoever comes later gets the same bits."""
    timed = []
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: timed.append(1) or 1.0 / len(timed))
    for name in ("is_available", "is_current_stream_capturing"):
        found = name == "is_available" or reason == "CUDA graph"
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    deterministic = reason == "deterministic mode"
    torch.use_deterministic_algorithms(deterministic)
    if reason == "MFEF_TRITON_AUTOTUNE=0":
        monkeypatch.setenv("MFEF_TRITON_AUTOTUNE", "0")
    kernel, device = Kernel(), REASONS[reason]
    assert reason in tuning.pinned(device)
    assert device != CUDA or reason in tuning.state()
    launch = launch_of(kernel, device=device, deterministic=deterministic)
    launch("x")
    assert kernel.launched == [4] and not timed
    assert launch.choices().startswith("of 4 warps (chosen), 8 warps, 2 warps: ")
    assert reason in launch.choices()
    monkeypatch.setattr(tuning, "pinned", lambda device: None)
    launch("x")
    assert kernel.launched == [4, 4] and not timed
    # So is the class, but what deterministic mode takes does not outlast it.
    launch_of(kernel, device=device)("x")
    assert kernel.launched[2:] == ([4] if not deterministic else [2])
    assert len(timed) == (3 if deterministic else 0)


def test_tiles_are_named_by_what_they_differ_in(tuning, launch_of):
    from mfef_ext.backends.triton.launch import Launch

    def one(tile):
        return Launch(Kernel(), 1, (), {}, tile.warps, 1, True, tile.registers)

    tiles = [tuning.Tile(64, 4), tuning.Tile(64, 8), tuning.Tile(32, 4, bounded=True)]
    found = tuning.fastest_tile(tiles, one, ("a class",), CUDA, False)
    assert found.names == ("64 channels, 4 warps", "64 channels, 8 warps", "32 channels, 4 warps")
    assert [launch.options.get("maxnreg") for launch in found.candidates] == [None, None, 255]
    assert tuning.Tile(32, 16, bounded=True).registers == 128
    assert type(tuning.fastest_tile(tiles[:1], one, (), CUDA, False)) is Launch


def test_only_wide_groups_have_tiles_of_other_channels(tuning):
    """So a narrow block compiles no kernel twice."""
    from mfef_ext.backends.triton import conv

    def names(channels):
        weight = ((channels, channels, 3, 3), (channels * 9, 9, 3, 1))
        x = ((2, channels, 8, 8), (channels * 64, 64, 8, 1))
        branches = conv.Branches((weight,), (1,), True)
        rest = (branches, False, False, True, "half", False, True)
        return conv._convolution(x, x, CUDA, torch.bfloat16, *rest).launch.names

    assert names(32) == ("4 warps", "8 warps")
    assert names(64) == ("64 channels, 4 warps", "64 channels, 8 warps", "32 channels, 4 warps")


def test_clock(monkeypatch, tuning):
    """The median of samples of several launches; fewer where one takes long."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    launched = []

    def launch(*tensors):
        launched.append(tensors)
        Event.now += 7.0 if len(launched) in (1, 5) else milliseconds

    for milliseconds, calls in ((0.01, 10), (0.25, 4), (3.0, 1)):
        launched.clear()
        assert tuning.milliseconds(launch, ("x", "y")) == pytest.approx(milliseconds)
        assert launched == [("x", "y")] * (2 + calls * tuning.SAMPLES)


# --- the operators ----------------------------------------------------------------------------

MODES = {
    "bfloat16": (torch.bfloat16, False, torch.channels_last),
    "tf32": (torch.float32, True, torch.contiguous_format),
}
# A small image, and on a GPU a large map too, which takes long to interpret.
SHAPES = {"cpu": [(1, 8, 4, 5)], "cuda": [(2, 8, 5, 4), (3, 64, 8, 8), (2, 64, 33, 31)]}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_candidate_obeys_the_rule(monkeypatch, device, tuning, timed, mode):
    """Whatever is the fastest: here the last of each list."""
    dtype, tf32, layout = MODES[mode]
    # Off a CPU eager PyTorch, which the errors are compared with, uses TF32 too.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    times, kernels = iter(range(10**6, 0, -1)), []

    def milliseconds(launch, tensors):
        launch(*tensors)
        kernels.append(launch.kernel.__name__)
        return next(times)

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "MARGIN", float("inf"))
    for shape in SHAPES[device]:
        check_block(
            dtype, layout, backend="triton", device=device,
            shape=shape, kernel_sizes=(3, 1), groups=(1, 4), biases=False, reduction=4,
        )  # fmt: skip
    assert set(kernels) == {
        "_convolve", "_weight_partials", "image_forward_kernel", "image_backward_kernel"
    }  # fmt: skip


def test_one_choice_for_batches_of_about_one_size(device, timed, nothing_runs):
    block = MFEFBlock(8, kernel_sizes=(3,), groups=[1], backend="triton").to(device).bfloat16()
    parameters = list(block.parameters())

    def timed_by(n, gradients=True):
        before = len(timed.launches)
        x = torch.randn(n, 8, 5, 4, device=device, dtype=torch.bfloat16)
        with torch.set_grad_enabled(gradients):
            out = block(x.requires_grad_(gradients))
            if gradients:
                torch.autograd.grad(out.sum(), [x, *parameters])
        return len(timed.launches) - before

    # Both directions of the convolution, the weights' gradient, both directions of the attention.
    assert timed_by(5) == 10
    assert timed_by(8) == timed_by(7) == timed_by(5, gradients=False) == 0
    assert timed_by(9, gradients=False) == 4


def test_what_is_explained(device, timed, nothing_runs):
    """What the list is, what was chosen and why; before the first call, that it will be."""
    block = MFEFBlock(8, kernel_sizes=(3,), groups=[1], backend="triton").to(device).bfloat16()
    x = torch.randn(5, 8, 5, 4, device=device, dtype=torch.bfloat16)
    text = str(mfef_ext.explain(x, block))
    assert text.count("of 4 warps (chosen), 8 warps: the first call will time them") == 5
    timed.update({4: 30.0, 8: 20.0})
    with torch.no_grad():
        block(x)
    text = str(mfef_ext.explain(x[:3].repeat(2, 1, 1, 1), block))
    why = "microseconds at its first call"
    assert text.count(f"of 4 warps, 8 warps (chosen): 30.0, 20.0 {why}") == 2
    assert "convolve: 3 program(s) of 2 images x 32 pixels x 64 channels at most, 8 warps" in text
    assert text.count("the first call will time them") == 3


@pytest.mark.gpu
def test_class_met_while_captured_keeps_the_first(tuning):
    """And so replays have the bits of the calls after."""
    torch.use_deterministic_algorithms(False)
    block = MFEFBlock(8, kernel_sizes=(3,), groups=[1], backend="triton").cuda().bfloat16()
    x = torch.randn(2, 8, 6, 5, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        block(x)  # compiles
        forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(x)
        graph.replay()
        assert torch.equal(captured, block(x))
    assert "while a CUDA graph was captured" in mfef_ext.explain(x, block)


def test_doctor_says_whether_kernels_are_timed():
    from mfef_ext import inspection

    (line,) = [line for line in inspection.doctor().splitlines() if line.startswith("Triton: ")]
    why = "deterministic mode" if torch.cuda.is_available() else "no GPU"
    assert f"autotuning off, the first of each list runs ({why})" in line
