"""Fused kernels and layers for MFEF: multi-scale feature extraction and fusion.

``MFEFBlock`` is the layer; ``mfef_ext.functional`` has the operators, ``mfef_ext.reference`` their
specification in plain PyTorch; ``explain`` says which backend and algorithm a call would use.
"""

from . import functional, reference
from .backends import use_backend
from .inspection import build_info, explain
from .modules import DualAttention, FeatureFusion, MFEFBlock, MultiScaleConv2d
from .version import __version__

__all__ = [
    "DualAttention",
    "FeatureFusion",
    "MFEFBlock",
    "MultiScaleConv2d",
    "__version__",
    "build_info",
    "explain",
    "functional",
    "reference",
    "use_backend",
]
