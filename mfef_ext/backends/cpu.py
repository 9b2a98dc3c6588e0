"""The CPU backend: C++ kernels, images in the SIMD lanes."""

from . import Backend

BACKEND = Backend("cpu", (), {})
