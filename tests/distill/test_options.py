"""Whatever stands for a number is one, in every method; what does not is refused in a sentence."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from mfef_ext.distill import METHODS, ramp_up
from mfef_ext.distill.distiller import method_options
from mfef_ext.distill.method import StudentShape
from tests.distill.by_hand import Net
from tests.distill.test_distiller import make
from tests.ops.test_kd_loss import NOT_NUMBERS, kinds


def options_of_methods():
    """(method, option) for every option that is a number."""
    numbers = ("temperature", "alpha", "ramp_epochs", "boundary_epochs")
    return [(name, o) for name in sorted(METHODS) for o in numbers if o in method_options(name)]


def build(name, **options):
    shapes = [StudentShape(4, 2, 2)] * 3
    if name in ("kd", "mimic", "ab"):
        options["teacher"] = Net()
    if name == "ab":
        options |= {"teacher_tap": "features", "input_shape": (3, 8, 8)}
    return METHODS[name](shapes, 5, **options)


@pytest.mark.parametrize(("name", "option"), options_of_methods())
def test_numbers_as_options(name, option):
    for one in (np.float32(1), np.int64(1), torch.tensor(1.0), Fraction(1), 1):
        value = getattr(build(name, **{option: one}), option)
        assert type(value) is float and value == 1
    for value, error, words in NOT_NUMBERS:
        with pytest.raises(error, match=re.escape(words)) as caught:
            build(name, **{option: value})
        assert option in str(caught.value)


@kinds
def test_every_kind_of_number_is_an_epoch(three):
    d = make(method="mfef", ramp_epochs=10).eval()
    x, y = torch.randn(2, 1, 6, 6), torch.tensor([0, 1])
    got, wanted = (d(x, y, e).losses["kd/student0"] for e in (three, 3.0))
    assert torch.equal(got, wanted) and ramp_up(three, 10) == ramp_up(3.0, 10)


@pytest.mark.parametrize(("value", "error", "words"), NOT_NUMBERS)
def test_what_is_no_epoch(value, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make(method="ce")(torch.randn(2, 1, 6, 6), torch.tensor([0, 1]), value)
