"""What the compiled kernels take, read from the library without a GPU."""

import importlib.util
from pathlib import Path

import pytest

import mfef_ext

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("cuda_usage", ROOT / "scripts" / "cuda_usage.py")
cuda_usage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_usage)


@pytest.fixture(scope="module")
def usage():
    if cuda_usage.library() is None:
        pytest.skip(f"no _C_cuda: {mfef_ext.build_info()['cuda']}")
    if cuda_usage.cuobjdump() is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and Triton have it)")
    return cuda_usage.read(cuda_usage.library(), cuda_usage.cuobjdump())


def test_no_kernel_spills(usage):
    assert cuda_usage.spills(usage) == []


def test_every_kernel_is_compiled(usage):
    rows = (2, 4, 8, 16)
    names = [f"{name}<{r}>" for name in ("Forward", "Backward", "WeightGradient") for r in rows]
    names += [f"Matrix{name}" for name in ("Forward", "Backward", "WeightGradient")]
    names += ["LargeConvolution", "LargeMatrixConvolution"]
    names += ["LargeWeightGradient", "LargeMatrixWeightGradient"]
    names += ["ChannelGates", "PoolChannels", "GateMap"]
    names += ["PixelGradient", "ChannelGradient", "MlpBackward", "MapGradient", "Sums"]
    assert set(usage) == set(names)


OUTPUT = """
arch = sm_80
 Function _ZN4mfef4cuda6kernelINS0_7ForwardILi16EEELi384ELi1EEEvNS0_9BlockArgsE:
  REG:127 STACK:8 SHARED:0 LOCAL:4 CONSTANT[2]:56 CONSTANT[0]:3048 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _ZN4mfef4cuda6kernelINS0_7ForwardILi16EEELi384ELi1EEEvNS0_9BlockArgsE:
  REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[2]:56 CONSTANT[0]:3224 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN4mfef4cuda6kernelINS0_4SumsELi256ELi1EEEvNS0_9BlockArgsE:
  REG:64 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:3224 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_is_read_and_complained_about():
    usage = cuda_usage.parse(OUTPUT)
    assert usage["Forward<16>"] == {"sm_80": (127, 12, 0), "sm_90a": (128, 0, 1024)}
    assert usage["Sums"] == {"sm_90a": (64, 0, 1024)}
    assert cuda_usage.spills(usage) == ["Forward<16> spills 12 bytes per thread on sm_80."]
    with pytest.raises(RuntimeError, match="unknown form"):
        cuda_usage.parse(" Function _Z5otherv:")
