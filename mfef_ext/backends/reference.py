"""The reference backend: plain PyTorch on any device, exportable, differentiable twice."""

from .. import reference
from . import Backend

BACKEND = Backend(
    "reference",
    (),
    {
        "multi_scale_conv2d": reference.multi_scale_conv2d,
        "dual_attention": reference.dual_attention,
        "mfef_block": reference.mfef_block,
        "kd_loss": reference.kd_loss,
    },
)
