"""Online distillation: several students learn together, from the labels and from one another.

``OnlineDistiller`` wraps any list of networks into one ``nn.Module`` that returns losses by name
and logits by role. Nothing here knows a file, a data set or a device.
"""

from . import ab, ce, dml, ffl, kd, kdcl, mfef, mimic, okddip, one
from .distiller import Distilled, OnlineDistiller
from .method import METHODS, Batch, Method, register
from .ramp import ramp_up

__all__ = ["METHODS", "Batch", "Distilled", "Method", "OnlineDistiller", "ramp_up", "register"]

# Importing a method's file registers it; this is the list of the built-in ones.
_BUILT_IN = (ab, ce, dml, ffl, kd, kdcl, mfef, mimic, okddip, one)
