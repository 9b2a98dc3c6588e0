"""Without a GPU, kernels interpreted on CPU tensors; tests/conftest.py has loaded Triton for it."""

import pytest
import torch

CUDA = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(CUDA, reason="Triton is not interpreted beside a GPU")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
