"""Without a GPU, kernels interpreted on CPU tensors; tests/conftest.py has loaded Triton for it."""

import importlib

import numpy as np
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
    """``tl.sum`` adds halves to halves, as the lanes of a GPU do. Triton's interpreter leaves it to
    numpy, which adds along all axes but the last one element after another: its rounding errors
    are twice as large as those of any GPU, or of eager PyTorch, which the tests compare with."""
    if CUDA:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def tree_sum(self, input):
        data = input.handle.data
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        total = np.moveaxis(data, axis, 0)  # a power of two of elements, as in all blocks
        while len(total) > 1:
            half = len(total) // 2
            total = total[:half] + total[half:]
        if self.keep_dims:
            shape = [1 if self.axis in (None, i) else s for i, s in enumerate(input.shape)]
            return self.to_tensor(total.reshape(shape), input.dtype)
        return self.to_tensor(total[0], input.dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "sum", tree_sum)


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
