"""The CUDA kernels on a GPU, and without one on the machine of tests/ptx.

Every test of this folder that asks for ``device`` runs twice: on "cuda" where there is a GPU, and
on "cpu" with the kernels' PTX executed and watched in the place of the CUDA backend.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def ieee(monkeypatch):
    """float32 is float32: neither the kernels nor eager PyTorch on a GPU round to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tf32(ieee, monkeypatch):
    """Convolutions of float32 may round to TF32, by PyTorch's switch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture
def kind(request):
    """The dtype of a kind, which is one or "tf32"; TF32 switched on for it."""
    if request.param != "tf32":
        return request.param
    request.getfixturevalue("tf32")
    return torch.float32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the tensors are for which ``backend="cuda"`` runs."""
    if request.param == "cpu":
        request.getfixturevalue("machine")
    return request.param
