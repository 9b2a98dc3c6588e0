"""Without a GPU, kernels interpreted on CPU tensors; tests/conftest.py has loaded Triton for it."""

import importlib

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
def _interpreted(request):
    if not CUDA:
        request.getfixturevalue("interpreted")


@pytest.fixture
def sums_in_order(monkeypatch):
    """``tl.dot`` adds each element's products one after another, wherever it is in its block, as a
    GPU does. Triton's interpreter leaves them to numpy's BLAS, which adds the last rows of a block
    in another order on some processors."""
    if CUDA:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        dtype = d.data.dtype
        rows, columns = a.data.astype(dtype), b.data.astype(dtype)
        total = d.data.copy()
        for k in range(rows.shape[1]):
            total += rows[:, k, None] * columns[k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
