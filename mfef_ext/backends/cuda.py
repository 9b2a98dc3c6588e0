"""The CUDA C++ backend. No operator of it exists yet: it says so and the next one is asked."""

from . import Backend, Condition

BACKEND = Backend(
    "cuda",
    (
        Condition(
            lambda p: p.device.type == "cuda",
            lambda p: f"its tensors must be on a CUDA device, not on {p.device}",
        ),
    ),
    {},
)
