"""Host time of Triton's block per call: what Python and PyTorch take before a kernel can start.

    python benchmarks/bench_host.py

On a GPU it is the real thing: the time until a call returns, with a queue that is never full.
Without one, tensors are on the CPU and a driver stands in for CUDA's: kernels are compiled for
sm_90, bound and looked up as on a GPU, but launched nowhere. What is left out then is what happens
in C: to take the pointers out of the arguments, cuLaunchKernel (together about 2 to 4 us per
launch), and the difference between torch's allocators for the CPU and for CUDA. It is then the
thread's processor time, which a neighbour's load changes less. Medians and the 20th and 80th
percentiles over rounds; the cases take turns in every round. ``torch.empty`` alone is there for
comparison: about 1 us on a current server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from timing import summarise
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from mfef_ext import MFEFBlock

SHAPES = ((2, 64, 8, 8), (2, 256, 8, 8), (2, 64, 56, 56))  # the image plan twice, the tiles plan
CALLS = 50  # of a sample; with six launches each they do not fill a GPU's queue of 1024
ROUNDS = 60


class _Driver:
    """CUDA's driver as Triton asks for it, for a device on which nothing is ever launched."""

    launcher_cls = nvidia.CudaLauncher
    utils = SimpleNamespace(
        launch=lambda *what: None,
        build_signature_metadata=lambda signature: b"",
        load_binary=lambda *what: (1, 1, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        unload_module=lambda module: None,
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _pretend() -> None:
    """Makes the Triton backend take CPU tensors with kernels that are compiled, not interpreted."""
    from mfef_ext.backends import triton as backend
    from mfef_ext.backends.triton import ops  # noqa: F401 (now, while kernels are compiled)

    backend.interpreted = lambda: True
    nvidia.PyKernelArg = lambda **what: None
    triton.runtime.driver.set_active(_Driver())


def _cases(device: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes a step, by name; making one is not timed."""
    cases: dict[str, Callable[[], Callable[[], Any]]] = {}
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        block = MFEFBlock(shape[1], groups="auto", backend="triton").to(device)
        x = torch.randn(shape, device=device).requires_grad_()
        grad = torch.randn(shape, device=device)
        leaves = [x, *block.parameters()]

        def inference(block=block, x=x):
            def step():
                with torch.inference_mode():
                    return block(x)

            return step

        def forward(block=block, x=x):
            return lambda: block(x)

        def backward(block=block, x=x, grad=grad, leaves=leaves):
            outs = [block(x) for _ in range(CALLS)]
            return lambda: torch.autograd.grad(outs.pop(), leaves, grad)

        cases[f"{name} inference"] = inference
        cases[f"{name} forward"] = forward
        cases[f"{name} backward"] = backward
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="the medians alone, in microseconds")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _pretend()
    torch.set_num_threads(1)
    torch.zeros(7 * 2**20)  # from here on glibc keeps what is freed, as CUDA's allocator does
    clock = time.perf_counter if device == "cuda" else time.thread_time
    cases = _cases(device)
    cases["one torch.empty"] = lambda: lambda: torch.empty((2, 64), device=device)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(-1, options.rounds):  # the first compiles and is not counted
        for name, case in cases.items():
            step = case()
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            for _ in range(CALLS):
                step()
            if round_ >= 0:
                times[name].append((clock() - start) / CALLS * 1e6)
    if options.json:
        print(json.dumps({name: summarise(t).median for name, t in times.items()}))
        return
    what = torch.cuda.get_device_name() if device == "cuda" else "no GPU: launches left out"
    print(f"{what}; torch {torch.__version__}, Triton {triton.__version__}; microseconds per call")
    print("| case | median | p20 | p80 |")
    print("| --- | ---: | ---: | ---: |")
    for name, samples in times.items():
        s = summarise(samples)
        print(f"| {name} | {s.median:.1f} | {s.p20:.1f} | {s.p80:.1f} |")


if __name__ == "__main__":
    main()
