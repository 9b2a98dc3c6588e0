"""How examples are drawn at random, and the blocks that all kernels are tried with."""

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# The same examples every time, and not shrunk, which takes minutes.
DRAWN = settings(
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def blocks(draw, batches, channels, heights, widths, reductions=(1, 4, 16)):
    """Arguments of tests.accuracy.check_block: kernel sizes, modes, shapes.

    channels: the most; heights, widths: strategies.
    """
    sizes = draw(st.lists(st.sampled_from([1, 3, 5, 7, 9, 11]), min_size=1, max_size=4))
    split = draw(st.booleans())
    c = draw(st.integers(len(sizes), channels))
    height, width = draw(heights), draw(widths)
    return {
        "shape": (draw(st.sampled_from(batches)), c, height, width),
        "kernel_sizes": sizes,
        "split": split,
        "reduction": draw(st.sampled_from(reductions)),
        "spatial_kernel_size": draw(st.sampled_from([1, 3, 7])),
        "biases": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }
