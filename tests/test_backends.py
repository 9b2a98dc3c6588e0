"""Who runs what, what is forced, and what is said about it."""

import os
import subprocess
import sys

import pytest
import torch

import mfef_ext
from mfef_ext import backends, functional
from mfef_ext.inspection import _explain_problem, cpu_plan, doctor
from mfef_ext.modules import DualAttention, MFEFBlock, MultiScaleConv2d
from mfef_ext.problem import describe_multi_scale_conv2d


def problem(dtype=torch.float32):
    x, w = torch.randn(2, 4, 5, 5, dtype=dtype), torch.randn(4, 4, 3, 3, dtype=dtype)
    return describe_multi_scale_conv2d(x, [w], [1], True, None)


def test_automatic_choice_on_the_cpu():
    assert backends.choose(problem()).name == "cpu"
    assert backends.choose(problem(torch.bfloat16)).name == "cpu"
    # no CPU kernel for float16: the next one that can
    assert backends.choose(problem(torch.float16)).name == "reference"


def test_order_of_the_backends():
    assert [b.name for b in backends.order("cpu")] == ["cpu", "reference"]
    assert [b.name for b in backends.order("cuda")] == ["cuda", "triton", "reference"]


def test_use_backend_nests_and_yields_to_the_argument():
    with mfef_ext.use_backend("reference"):
        assert backends.choose(problem()).name == "reference"
        with mfef_ext.use_backend("cpu"):
            assert backends.choose(problem()).name == "cpu"
        assert backends.choose(problem()).name == "reference"
        assert backends.choose(problem(), "cpu").name == "cpu"
        with mfef_ext.use_backend(None):
            assert backends.choose(problem()).name == "cpu"
    with pytest.raises(ZeroDivisionError), mfef_ext.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.choose(problem()).name == "cpu"


def test_refusal_names_the_reason():
    with pytest.raises(RuntimeError, match=r"cannot run multi_scale_conv2d: dtype torch.float16"):
        backends.choose(problem(torch.float16), "cpu")


@pytest.mark.parametrize(
    ("value", "prints"),
    [("reference", "reference"), ("cpu", "cpu"), ("", "cpu"), ("gpu", "unknown")],
)
def test_environment_variable(value, prints):
    code = (
        "import torch, mfef_ext\n"
        "try: print(mfef_ext.explain(torch.randn(1, 8, 4, 4), mfef_ext.DualAttention(8)))\n"
        "except ValueError as e: print(e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MFEF_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert prints in out


def test_environment_variable_for_the_instruction_set():
    code = "from mfef_ext import build_info; print(build_info()['isa_used'])"
    env = {**os.environ, "MFEF_USE_ISA": "baseline"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "baseline"
    env["MFEF_USE_ISA"] = "sse9"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode != 0 and "this processor runs" in run.stderr


def test_explain_says_what_runs_and_why_the_others_do_not():
    text = mfef_ext.explain(torch.randn(32, 64, 8, 8), MFEFBlock(64))
    assert "runs on: cpu" in text and "images plan" in text
    assert "triton: no, its tensors must be on a CUDA device" in text
    assert "cuda: no, " in text
    plan = cpu_plan(problem())
    kept = [plan[f"{direction}_scratch_bytes"] / 1024 for direction in ("forward", "backward")]
    wanted = "scratch per thread: forward {:,.0f} KiB, backward {:,.0f} KiB".format(*kept)
    assert wanted in _explain_problem(problem(), None, False)[3]
    assert repr(text) == str(text)
    assert "pixels plan" in mfef_ext.explain(torch.randn(1, 64, 56, 56), MFEFBlock(64))
    with mfef_ext.use_backend("reference"):
        assert "runs on: reference (forced)" in mfef_ext.explain(
            torch.randn(1, 8, 4, 4), DualAttention(8)
        )
    refused = mfef_ext.explain(torch.randn(1, 8, 4, 4), DualAttention(8, backend="cuda"))
    assert "refused: backend='cuda' cannot run" in refused
    half = mfef_ext.explain(torch.randn(1, 8, 4, 4).half(), DualAttention(8).half())
    assert "runs on: reference" in half and "cpu: no, dtype torch.float16" in half


def test_explain_covers_every_layer_and_mode():
    x = torch.randn(2, 16, 6, 6)
    for mode in ("split", "pyramid", "hierarchical"):
        block = MFEFBlock(16, groups="auto", mode=mode)
        assert str(mfef_ext.explain(x, block)).count("runs on: cpu") == (
            5 if mode == "hierarchical" else 1
        )
        mfef_ext.explain(x, block.conv)
    mfef_ext.explain(x, MultiScaleConv2d(16, 8, groups="auto", bias=True))


@pytest.mark.parametrize("images", [2**58, 2**40 + 1])
def test_explain_refuses_the_sizes_that_the_call_refuses(images):
    """In the same words, also where the parts are called one after the other."""
    hooked = MFEFBlock(16, groups="auto")
    hooked.conv.register_forward_hook(lambda *arguments: None)
    layers = [
        *(MFEFBlock(16, groups="auto", mode=m) for m in ("split", "pyramid", "hierarchical")),
        hooked,
        MultiScaleConv2d(16, 32, groups="auto", bias=True),
        DualAttention(16, reduction=1),
    ]
    x = torch.zeros(1).expand(images, 16, 1, 1)
    for layer in layers:
        with pytest.raises(RuntimeError, match=r"mfef: .* at most 2\^40") as called:
            layer(x)
        with pytest.raises(RuntimeError) as explained:
            mfef_ext.explain(x, layer)
        assert str(called.value).endswith(str(explained.value))
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15)
    weight = torch.zeros(1, 1, 1, 1).expand(2**11, 1, 1, 1)
    layer = MultiScaleConv2d(1, 2**11, kernel_sizes=(1,), groups=(1,), device="meta")
    layer.branches[0].weight = torch.nn.Parameter(weight)
    for refuse in (layer, lambda x: mfef_ext.explain(x, layer)):
        with pytest.raises(RuntimeError, match=r"mfef: an image of the result has about 2\.199"):
            refuse(wide)


def test_explain_tells_the_plan_that_runs(plan):
    assert f"{plan} plan" in mfef_ext.explain(torch.randn(20, 64, 8, 8), MFEFBlock(64))


def test_build_info_and_doctor():
    info = mfef_ext.build_info()
    assert info["version"] == mfef_ext.__version__
    assert info["isa_used"] in info["cpu_isas_usable"]
    assert set(info["cpu_isas_usable"]) <= set(info["cpu_isas_built"])
    text = doctor()
    for part in (
        "CPU: kernels for",
        "CUDA library:",
        "in use:",
        "training extras:",
        "cpu -> reference",
    ):
        assert part in text


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_kd_loss(backend):
    torch.manual_seed(0)
    student = torch.randn(5, 7, requires_grad=True)
    target = torch.randn(5, 7, requires_grad=True)
    loss = functional.kd_loss(student, target, 3.0, backend=backend)
    p, q = (target / 3).softmax(1), (student / 3).softmax(1)
    wanted = 9 * (p * (p.log() - q.log())).sum() / 5
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert target.grad is None and student.grad is not None
    functional.kd_loss(student, target, 3.0, detach_target=False).backward()
    assert target.grad is not None
    empty = functional.kd_loss(student[:0], target[:0])
    assert empty.item() == 0
    low = functional.kd_loss(student.bfloat16(), target.bfloat16())
    assert low.dtype == torch.float32
