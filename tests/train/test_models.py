"""The students' sizes and map shapes are those of He 2016."""

import pytest
import torch

from mfef_ext.train.models import LAST_MAP, STUDENTS, StudentSpec, strides_for


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)]
)
def test_parameter_counts_of_table_6(name, millions):
    net = StudentSpec(name, 3, 10, (1, 2, 2)).build()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", STUDENTS)
def test_depth_is_in_the_name(name):
    net = StudentSpec(name, 1, 10, (1, 1, 1)).build()
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(("size", "last"), [(8, 8), (16, 8), (32, 8), (64, 16)])
def test_the_last_map_is_never_small(size, last):
    net = StudentSpec("resnet8", 3, 7, strides_for(size)).build().eval()
    seen = []
    net.get_submodule(LAST_MAP).register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert seen == [(2, 64, last, last)]
