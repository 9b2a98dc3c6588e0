"""Messages stay short whatever the value, and have the right article."""

import pytest
import torch
from torch import nn

from mfef_ext import DualAttention, FeatureFusion, MFEFBlock, MultiScaleConv2d, names
from mfef_ext.distill import OnlineDistiller
from mfef_ext.functional import kd_loss

LOGITS = torch.zeros(2, 3)
HUGE = [10**400, -(10**5000), "x" * 10**5]
STUDENT = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def distiller(**options):
    options = {"num_classes": 2, "tap": "0", "input_shape": (3, 8, 8), "method": "ce"} | options
    return OnlineDistiller([STUDENT], **options)


TAKEN = {
    "temperature": lambda v: kd_loss(LOGITS, LOGITS, v),
    "channels": lambda v: MFEFBlock(v),
    "out_channels": lambda v: MultiScaleConv2d(8, v, kernel_sizes=(v,)),
    "kernel_sizes": lambda v: MultiScaleConv2d(8, kernel_sizes=(3, v), groups="auto"),
    "groups": lambda v: MultiScaleConv2d(8, groups=v if isinstance(v, str) else (v,) * 4),
    "many groups": lambda v: MultiScaleConv2d(8, groups=(v,) * 10**4),
    "mode": lambda v: MFEFBlock(8, mode=v),
    "reduction": lambda v: DualAttention(8, reduction=-(10**400) if isinstance(v, int) else v),
    "in_channels": lambda v: FeatureFusion((-abs(v),) if isinstance(v, int) else v, 8),
    "tap": lambda v: distiller(tap=v),
    "taps": lambda v: distiller(tap=[str(type(v))] * 10**4),
    "input_shape": lambda v: distiller(input_shape=(v,) * 1000),
    "method": lambda v: distiller(method=v),
    "an unknown option": lambda v: distiller(option=v),
    "share_stem": lambda v: distiller(share_stem=v),
    "alpha": lambda v: distiller(method="kd", teacher=STUDENT, alpha=v),
    "teacher": lambda v: distiller(method="kd", teacher=v),
    "variant": lambda v: OnlineDistiller(
        [STUDENT, nn.Sequential(*STUDENT)], "kdcl", num_classes=2, tap="0", variant=v
    ),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("value", HUGE, ids=["10^400", "-10^5000", "text"])
def test_long_values_are_cut_in_messages(name, value):
    with pytest.raises((TypeError, ValueError)) as error:
        TAKEN[name](value)
    said = str(error.value)
    assert 10 < len(said) < 500 and "Exceeds the limit" not in said and "\n" not in said


@pytest.mark.parametrize("value", [3, -0.5, "a", (1, 4, 8, 16), None, [True], 1e300])
def test_short_values_are_shown_as_they_are(value):
    assert names.shown(value) == repr(value)


def test_the_article():
    for said in (
        *("a Conv2d", "an Identity", "a Linear", "an LSTM", "an RNN", "a ReLU", "a PReLU"),
        *("an MFEFBlock", "an Unflatten", "a GRU", "a list", "an object"),
    ):
        assert names.a(said.split()[1]) == said
