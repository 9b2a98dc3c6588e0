"""What the planner says, and who is told: without a GPU, for any amount of shared memory."""

import dataclasses

import pytest
import torch

from mfef_ext import backends, ops
from mfef_ext.backends import cuda
from mfef_ext.inspection import _explain_problem, doctor
from mfef_ext.modules import MFEFBlock
from mfef_ext.problem import Problem, describe_mfef_block
from tests.ptx.cuda import A100, H200, SMALLEST


def problem(batch, channels, height, width=None, dtype=torch.float32, groups="auto", **options):
    """A whole block's problem as it is posed on a CUDA device."""
    block = MFEFBlock(channels, groups=groups, device="meta", dtype=dtype, **options)
    a = block.attention
    described = describe_mfef_block(
        torch.empty(batch, channels, height, width or height, device="meta", dtype=dtype),
        list(block.conv.weights),
        block.conv.groups,
        a.fc1_weight, a.fc1_bias, a.fc2_weight, a.fc2_bias, a.spatial_weight,
        block.conv.mode == "split",
    )  # fmt: skip
    return dataclasses.replace(described, device=torch.device("cuda"))


@pytest.fixture
def gpu(monkeypatch):
    """A device that looks like an H200, under a library that is loaded."""
    monkeypatch.setattr(ops, "CUDA_LOADED", True)
    said = {"architectures": "90-real", "nvcc": "13.0.88", "runtime": "13.0", "driver": "13.0"}
    monkeypatch.setattr(cuda, "library", lambda: said)
    monkeypatch.setattr(cuda, "shared_limit", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


PAPER = [(128, 64, 8), (128, 128, 8), (128, 256, 8), (128, 132, 8), (128, 512, 2)]


@pytest.mark.parametrize("shape", PAPER, ids=str)
def test_the_papers_maps_fit(shape):
    plan = cuda.plan(problem(*shape), H200)
    assert plan["fits"] and plan["reason"] == "" and plan["plan"] == "small-map"
    for name in ("forward", "backward", "weight_gradient"):
        assert 0 < plan[f"{name}_shared_bytes"] <= H200
    assert plan["blocks"] * plan["images"] >= shape[0]


@pytest.mark.parametrize(
    ("shape", "branches"),
    list(zip(PAPER, ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], []), strict=True)),
    ids=str,
)
def test_which_branches_tensor_cores_compute(shape, branches):
    """Groups of 8 and more, of maps as large as their matrices, in 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        plan = cuda.plan(problem(*shape, dtype=dtype), H200)
        assert plan["forward_tensor_core_branches"] == branches
        assert plan["backward_tensor_core_branches"] == branches
        for name in ("forward", "backward", "weight_gradient"):
            assert 0 < plan[f"{name}_shared_bytes"] <= H200
    assert cuda.plan(problem(*shape), H200)["forward_tensor_core_branches"] == []


def test_64_channels_need_one_stage_on_every_gpu():
    for limit in (H200, A100, SMALLEST):
        plan = cuda.plan(problem(128, 64, 8), limit)
        assert plan["forward_stages"] == plan["backward_stages"] == 1
    # twice as many blocks on a multiprocessor of 228 KiB
    assert 2 * (cuda.plan(problem(128, 64, 8), H200)["forward_shared_bytes"] + 1024) <= 228 * 1024


def test_less_shared_memory_means_more_stages_until_nothing_fits():
    found = [cuda.plan(problem(128, 128, 8), limit) for limit in (H200, A100, SMALLEST)]
    stages = [p["backward_stages"] for p in found if p["plan"] == "small-map"]
    assert stages == sorted(stages) and len(stages) == 3 and stages[0] < stages[-1]
    large = cuda.plan(problem(128, 256, 8), SMALLEST)
    assert large["plan"] == "large-map"
    assert "256 x 8 x 8 takes" in large["reason"] and "has 99" in large["reason"]


@pytest.mark.parametrize("limit", [H200, A100, SMALLEST])
@pytest.mark.parametrize("shape", [(32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7)])
def test_imagenets_maps_are_large(shape, limit):
    plan = cuda.plan(problem(*shape), limit)
    if limit == H200:
        assert plan["fits"] and plan["plan"] == "large-map"
        assert len(plan["forward_launches"]) == 4
    for name in ("forward", "backward", "weight_gradient"):
        assert 0 < plan[f"{name}_shared_bytes"] <= 74 * 1024
    (rows, columns), tiles = plan["tile"], plan["tiles"]
    assert tiles * rows * columns >= shape[2] ** 2 > (tiles - 1) * rows * columns / 2
    # nearly two thread blocks for each of 132 multiprocessors
    assert min(plan["forward_units"], plan["backward_units"]) * tiles * shape[0] >= 2 * 128
    assert plan | {"reason": ""} == cuda.plan(problem(*shape), H200) | {"reason": ""}


@pytest.mark.parametrize(
    ("shape", "branches"),
    [
        ((32, 64, 56), [0]),
        ((32, 128, 28), [0, 1]),
        ((32, 256, 14), [0, 1, 2]),
        ((32, 512, 7), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_tensor_cores_take_groups_of_8_channels_in_16_bits(shape, branches):
    for dtype in (torch.bfloat16, torch.float16):
        plan = cuda.plan(problem(*shape, dtype=dtype), H200)
        for name in ("forward", "backward", "weight_gradient"):
            assert plan[f"{name}_tensor_core_branches"] == branches
            assert 0 < plan[f"{name}_shared_bytes"] <= 74 * 1024
    plan = cuda.plan(problem(*shape), H200)
    for name in ("forward", "backward", "weight_gradient"):
        assert plan[f"{name}_tensor_core_branches"] == []


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 64, 2**20, 4), {"kernel_sizes": (201,)}, "not one channel of a convolution of a tile"),
        ((1, 2**21, 1), {}, "2^20 channels are the most"),
        ((1, 2**15, 17), {}, "a weight has over 2^28 taps"),
        ((1, 2**16, 1), {"kernel_sizes": (1,), "groups": (2**16,)}, "the MLP takes"),
        ((1, 4, 200), {"spatial_kernel_size": 257}, "255 x 255 is the largest"),
        ((1, 4, 200), {"spatial_kernel_size": 255}, "the spatial convolution takes"),
    ],
)
def test_what_does_not_fit(shape, options, reason):
    plan = cuda.plan(problem(*shape, **{"spatial_kernel_size": 3, **options}), H200)
    assert not plan["fits"] and reason in plan["reason"]


@pytest.mark.parametrize("batch", [2**28, 2**29, 2**56, 2**62, 2**63 - 1])
@pytest.mark.parametrize("shape", [(64, 8), (64, 56)], ids=str)
def test_products_with_the_batch_do_not_wrap_around(batch, shape):
    """Every count of bytes is right, or the problem is refused as the operators refuse it."""
    channels, side = shape
    plan = cuda.plan(dataclasses.replace(problem(1, channels, side), batch=batch), H200)
    if batch * channels * side**2 > 2**40:
        assert not plan["fits"] and "2^40" in plan["reason"]
    else:
        assert plan["fits"] and plan["forward_scratch_bytes"] >= 0
        assert plan["backward_scratch_bytes"] >= 4 * batch * channels


def test_tiny_images_share_a_thread_block_once_there_are_enough():
    images = [cuda.plan(problem(n, 64, 2), H200)["images"] for n in (1, 128, 1024, 100_000)]
    assert images == [1, 1, 4, 16]


def test_sums_do_not_depend_on_the_amount_of_shared_memory():
    one, other = (cuda.plan(problem(128, 128, 8), limit) for limit in (H200, SMALLEST))
    for key in ("images", "weight_gradient_tiles", "weight_gradient_slices"):
        assert one[key] == other[key]


def test_reasons(gpu):
    supports = cuda.BACKEND.supports
    assert supports(problem(128, 64, 8)) == (True, "")
    assert supports(problem(1, 64, 8, dtype=torch.float64))[1].startswith("dtype torch.float64")
    assert supports(problem(1, 64, 56)) == (True, "")
    assert (
        "does not fit into a thread block, and by the large-map kernels not one channel"
        in supports(problem(1, 64, 2**20, 4, kernel_sizes=(201,)))[1]
    )
    many = problem(1, 17, 4, kernel_sizes=(3,) * 17)
    assert supports(many)[1] == "17 branches are more than 16"
    kd = Problem("kd_loss", 2, 10, 1, 1, torch.float32, torch.device("cuda"))
    assert supports(kd)[1] == "it has no kernel for kd_loss"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5), below 8.0" in supports(problem(128, 64, 8))[1]
    gpu.setattr(ops, "CUDA_LOADED", False)
    assert supports(problem(128, 64, 8))[1].startswith("its library is not loaded (")


def test_not_chosen_by_itself_before_hardware_has_run_it(gpu):
    one = problem(128, 64, 8)
    assert not cuda.BACKEND.verified
    assert backends.choose(one).name == "reference"
    assert backends.choose(one, "cuda").name == "cuda"
    text = "\n".join(_explain_problem(one, "cuda", False))
    assert "runs on: cuda (forced)" in text and "small-map plan: 128 thread block(s)" in text
    assert "forward: Forward; scratch 0 bytes" in text
    assert "gradient of the weights in the backward's launch, 128 sum(s) to add up" in text
    assert "backward: Backward, Sums; scratch" in text and "tensor cores" not in text
    text = "\n".join(_explain_problem(problem(128, 64, 8, dtype=torch.bfloat16), "cuda", False))
    assert "branches on tensor cores: [0], backward [0], weights' gradient []" in text
    text = "\n".join(_explain_problem(problem(128, 128, 8, dtype=torch.bfloat16), "cuda", False))
    assert "branches on tensor cores: [0, 1], backward [0, 1]" in text
    assert "forward: MatrixForward; scratch 0 bytes" in text
    assert "backward: MatrixBackward, MatrixWeightGradient, Sums; scratch" in text
    text = "\n".join(_explain_problem(problem(32, 64, 56), "cuda", False))
    assert "large-map plan: per image 8 tile(s) of 14 x 32 pixels" in text
    assert "forward: LargeConvolution, ChannelGates, PoolChannels, GateMap; scratch" in text
    text = "\n".join(_explain_problem(problem(32, 64, 56, dtype=torch.bfloat16), "cuda", False))
    assert "branches on tensor cores: [0], backward [0], weights' gradient [0]" in text
    assert "cuda: could, but has not run on hardware yet" in "\n".join(
        _explain_problem(one, None, False)
    )
    (line,) = (line for line in doctor().splitlines() if line.startswith("  cuda: "))
    assert line.endswith("; not run on hardware yet, runs only if forced")
