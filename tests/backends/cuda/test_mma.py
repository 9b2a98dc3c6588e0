"""Products of matrices by tensor cores (csrc/cuda/mma.cuh), their PTX executed, against numpy."""

import numpy as np
import pytest
import torch

from tests.backends.cuda.tf32 import tf32
from tests.ptx.cuda import ALIGNED, NEAREST, TRUNCATED

WORDS, MATRICES, TRANSPOSED = range(3)  # how operands are read, as in products.cu
KINDS = [("tf32", 4), ("tf32", 8)]
KINDS += [("bfloat16", 8), ("bfloat16", 16), ("float16", 8), ("float16", 16)]


def rounded(operand: str, values: np.ndarray) -> np.ndarray:
    if operand == "tf32":
        return tf32(values)
    return torch.from_numpy(values).to(getattr(torch, operand)).float().numpy()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("operand", "depth", "reading"),
    [(*kind, reading) for kind in KINDS for reading in (WORDS, MATRICES)]
    + [("bfloat16", 16, TRANSPOSED), ("float16", 16, TRANSPOSED)],
)
def test_products(ptx_device, operand, depth, reading, backwards):
    """Every element where it belongs: integers, whose sums are exact in every type."""
    random = np.random.default_rng(depth)
    a, b, c = (
        random.integers(-8, 9, shape).astype(np.float32)
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    ptx_device.set(backwards=backwards)
    got = ptx_device.multiply(operand, reading, a, b, c)
    ptx_device.set()
    np.testing.assert_array_equal(got, c + a @ b)


@pytest.mark.parametrize(("operand", "depth"), KINDS)
def test_operands_are_rounded_and_sums_are_not(ptx_device, operand, depth):
    random = np.random.default_rng(1)
    a = random.standard_normal((16, depth)).astype(np.float32)
    b = random.standard_normal((depth, 8)).astype(np.float32)
    c = random.standard_normal((16, 8)).astype(np.float32)
    got = ptx_device.multiply(operand, MATRICES, a, b, c)
    low_a, low_b = rounded(operand, a), rounded(operand, b)
    wanted = c + low_a.astype(np.float64) @ low_b
    bound = np.abs(c) + np.abs(low_a.astype(np.float64)) @ np.abs(low_b)
    assert (np.abs(got - wanted) <= (depth + 1) * 2.0**-24 * bound).all()
    assert not np.allclose(wanted, c + a.astype(np.float64) @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("operand", "depth"), KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_how_products_are_added(ptx_device, operand, depth, sign):
    """To 1 three quarters of its last place, again and again: all of it is rounded up, each part of
    it is cut to half a place but their sum is not, or all of it is lost."""
    a = np.full((16, depth), 1.5 * 2.0**-12, np.float32)
    b, c = np.full((depth, 8), sign * 2.0**-12, np.float32), np.full((16, 8), sign, np.float32)
    found = {}
    for adding in (NEAREST, ALIGNED, TRUNCATED):
        ptx_device.set(adding=adding)
        found[adding] = ptx_device.multiply(operand, WORDS, a, b, c)
    ptx_device.set()
    assert (found[NEAREST] == sign * (1 + depth * 2.0**-23)).all()
    assert (found[ALIGNED] == sign * (1 + depth * 2.0**-24)).all()
    assert (found[TRUNCATED] == sign).all()


@pytest.mark.parametrize("adding", [ALIGNED, TRUNCATED])
def test_what_is_not_finite_is_not_cut(ptx_device, adding):
    a, b = np.zeros((16, 8), np.float32), np.ones((8, 8), np.float32)
    a[:3, 5] = np.inf, -np.inf, np.nan
    ptx_device.set(adding=adding)
    got = ptx_device.multiply("tf32", WORDS, a, b, np.ones((16, 8), np.float32))
    ptx_device.set()
    np.testing.assert_array_equal(got[:4, 0], np.float32([np.inf, -np.inf, np.nan, 1]))


def test_tf32_rounds_ties_away_from_zero_and_keeps_what_is_not_finite(ptx_device):
    """The identity times values that differ in the bits that TF32 drops."""
    tie, below = 1 + 2.0**-11, np.nextafter(np.float32(1 + 2.0**-11), np.float32(0))
    b = np.zeros((8, 8), np.float32)
    b[0] = [tie, -tie, below, -below, np.inf, -np.inf, np.nan, 0.0]
    a = np.zeros((16, 8), np.float32)
    a[3, 0] = 1.0
    got = ptx_device.multiply("tf32", MATRICES, a, b, np.zeros((16, 8), np.float32))[3]
    up = 1 + 2.0**-10
    np.testing.assert_array_equal(got, np.float32([up, -up, 1, -1, np.inf, -np.inf, np.nan, 0]))
