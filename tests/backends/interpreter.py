"""Triton's interpreter as the tests use it: sums in a GPU's order, and a quarter less time."""

import importlib
from types import ModuleType, SimpleNamespace

import numpy as np


def interpret(monkeypatch):
    """Kernels run on CPU tensors from here on.

    ``tl.sum`` adds halves to halves, as the lanes of a GPU do. The interpreter leaves it to numpy,
    which adds along all axes but the last one element after another: its rounding errors are twice
    as large as those of any GPU, or of eager PyTorch, which the tests compare with.
    """
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
    monkeypatch.setattr(interpreter, "_get_np_dtype", _numpy_dtype(interpreter._get_np_dtype))
    monkeypatch.setattr(interpreter, "_patch_lang", _Patches(interpreter._patch_lang))


_numpy_dtypes: dict[str, np.dtype] = {}


def _numpy_dtype(original):
    """``original`` makes a table of all types at every call."""

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in _numpy_dtypes:
            _numpy_dtypes[name] = original(dtype)
        return _numpy_dtypes[name]

    return remembered


class _Patches:
    """Modules of Triton's language whose functions are interpreted: each is patched once, and not
    anew by every device function that a kernel calls, which takes a fifth of the time."""

    def __init__(self, original):
        self.original = original
        self.modules: list[ModuleType] = []

    def __call__(self, fn):
        language = importlib.import_module("triton.language")
        names = [m for m in fn.__globals__.values() if m is language or m is language.core]
        new = [module for module in names if module not in self.modules]
        self.modules += new
        scope = self.original(fn) if new else None

        def restore():
            if scope is not None:
                scope.restore()
            self.modules = [module for module in self.modules if module not in new]

        return SimpleNamespace(restore=restore)
