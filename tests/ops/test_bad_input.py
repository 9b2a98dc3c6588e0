"""Bad input gets a sentence that names the argument, the value and the remedy; never a crash."""

import re
import weakref

import numpy as np
import pytest
import torch

import mfef_ext
from mfef_ext import functional
from mfef_ext.modules import DualAttention, FeatureFusion, MFEFBlock, MultiScaleConv2d

OPS = torch.ops.mfef


def conv(x=None, weights=None, groups=(1,), **kw):
    x = torch.randn(2, 4, 5, 5) if x is None else x
    weights = [torch.randn(4, 4, 3, 3)] if weights is None else weights
    return functional.multi_scale_conv2d(x, weights, groups, **kw)


CONV = [
    ({"x": torch.randn(4, 5, 5)}, ValueError, "x must be 4-D.*3-D.*unsqueeze"),
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64.*float"),
    ({"x": torch.randn(2, 4, 0, 5)}, ValueError, r"x has shape \(2, 4, 0, 5\).*at least 1"),
    ({"x": torch.randn(2, 0, 5, 5)}, ValueError, "at least 1"),
    ({"x": torch.randn(2, 6, 5, 5)}, ValueError, "C=6.*must add up to C"),
    ({"x": torch.randn(2, 4, 5, 5, dtype=torch.float64)}, TypeError, "weights.0. has dtype"),
    ({"weights": [], "groups": ()}, ValueError, "weights is empty"),
    ({"weights": torch.randn(4, 4, 3, 3)}, TypeError, "weights must be a list"),
    ({"weights": [torch.randn(4, 4, 2, 2)]}, ValueError, "kernel size of weights.0.=2.*odd"),
    ({"weights": [torch.randn(4, 4, 3, 5)]}, ValueError, "kernel of 3 x 5.*square"),
    ({"weights": [torch.randn(4, 4, 3)]}, ValueError, r"weights.0. must be 4-D"),
    ({"weights": [torch.randn(0, 4, 3, 3)]}, ValueError, "no channels"),
    ({"groups": (1, 1)}, ValueError, "weights has 1 branches but groups has 2"),
    ({"groups": (0,)}, ValueError, "groups.0.=0 must be a positive int"),
    ({"groups": (1.0,)}, TypeError, "groups.0. must be an int, got float 1.0"),
    ({"groups": (True,)}, TypeError, "groups.0. must be an int, got bool True"),
    ({"groups": 1}, TypeError, "groups must be a list"),
    (
        {"weights": [torch.randn(4, 4, 3, 3)], "groups": (3,)},
        ValueError,
        r'groups\[0\]=3 must divide Cin=12 and Cout=4; use groups="auto" or one of 1, 2, 4',
    ),
    ({"split": False, "weights": [torch.randn(4, 2, 3, 3)]}, ValueError, "split=False shows all"),
    ({"split": torch.zeros(4)}, TypeError, "split must be True or False.*bias=..."),
    ({"split": 1}, TypeError, "split must be True or False"),
    ({"bias": torch.randn(3)}, ValueError, r"bias has shape \(3,\), expected \(4,\)"),
    ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown; use one of 'reference'"),
    ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot run.*must be on a CUDA device"),
    ({"backend": "triton"}, RuntimeError, "backend='triton' cannot run"),
    ({"x": torch.randn(2, 4, 5, 5, device="meta")}, ValueError, "weights.0. is on cpu.*meta"),
]


def test_what_is_not_dense_is_refused_after_what_is():
    """What is known of dense tensors of these sizes says nothing about others."""
    x = torch.randn(2, 4, 5, 5)
    layers = [MFEFBlock(4, groups="auto"), MultiScaleConv2d(4, groups="auto"), DualAttention(4)]
    layers += [MFEFBlock(4, groups="auto", mode="hierarchical"), MFEFBlock(4, groups="auto")]
    layers[-1].conv.branches[0].register_forward_hook(lambda *arguments: None)
    fusion = FeatureFusion((4, 4), 2)
    with pytest.raises(TypeError, match=r"maps\[1\]: layout torch\.sparse_coo is not dense"):
        fusion([x, x.to_sparse()])
    for layer in layers:
        layer(x)
        with pytest.raises(TypeError, match=r"[xy]: layout torch\.sparse_coo is not dense"):
            layer(x.to_sparse())


@pytest.mark.parametrize(("arguments", "error", "match"), CONV, ids=[m for _, _, m in CONV])
def test_multi_scale_conv2d(arguments, error, match):
    with pytest.raises(error, match=match):
        conv(**arguments)


ATTENTION = [
    ({"fc1_weight": torch.randn(2, 5)}, ValueError, r"fc1_weight has shape \(2, 5\).*\(2, 4\)"),
    ({"fc1_weight": torch.randn(4)}, ValueError, "fc1_weight must be 2-D"),
    ({"fc1_bias": torch.randn(3)}, ValueError, r"fc1_bias has shape \(3,\)"),
    ({"fc2_weight": torch.randn(2, 4)}, ValueError, r"fc2_weight has shape"),
    ({"fc2_bias": torch.randn(2)}, ValueError, r"fc2_bias has shape"),
    ({"spatial_weight": torch.randn(1, 2, 4, 4)}, ValueError, "spatial_weight=4 must be odd"),
    ({"spatial_weight": torch.randn(2, 2, 3, 3)}, ValueError, r"must have shape \(1, 2, k, k\)"),
    ({"spatial_weight": torch.randn(1, 2, 3, 5)}, ValueError, "a square kernel"),
    ({"y": torch.randn(4)}, ValueError, "y must be 4-D"),
    ({"fc1_weight": None}, TypeError, "fc1_weight must be a torch.Tensor"),
    ({"fc2_bias": torch.randn(4).double()}, TypeError, "fc2_bias has dtype torch.float64"),
]


@pytest.mark.parametrize(("change", "error", "match"), ATTENTION, ids=[m for _, _, m in ATTENTION])
def test_dual_attention(change, error, match):
    arguments = {
        "y": torch.randn(2, 4, 5, 5),
        "fc1_weight": torch.randn(2, 4),
        "fc1_bias": torch.randn(2),
        "fc2_weight": torch.randn(4, 2),
        "fc2_bias": torch.randn(4),
        "spatial_weight": torch.randn(1, 2, 3, 3),
    }
    with pytest.raises(error, match=match):
        functional.dual_attention(**{**arguments, **change})


LAYERS = [
    (lambda: MFEFBlock(0), ValueError, "channels=0"),
    (lambda: MFEFBlock(64.0), TypeError, "channels must be an int"),
    (lambda: MFEFBlock(3), ValueError, "channels=3 cannot be divided among 4 branches"),
    (lambda: MFEFBlock(64, kernel_sizes=()), ValueError, r"kernel_sizes=\(\)"),
    (lambda: MFEFBlock(64, kernel_sizes=3), TypeError, "kernel_sizes must be a list or tuple.*3"),
    (lambda: MFEFBlock(64, kernel_sizes={3, 5}), TypeError, "kernel_sizes must be a list"),
    (lambda: MFEFBlock(64, groups=4), TypeError, 'groups must be a list or tuple.*"auto"'),
    (lambda: MFEFBlock(64, groups={1, 4, 8, 16}), TypeError, "groups must be a list or tuple"),
    (
        lambda: MFEFBlock(64, kernel_sizes=(3, 2**61 + 1), groups="auto"),
        ValueError,
        r"kernel_sizes\[1\]=\d+ is too large; use at most 4095",
    ),
    (lambda: MFEFBlock(64, dtype=torch.complex64), TypeError, "dtype=torch.complex64"),
    (lambda: FeatureFusion({4, 5}, 4), TypeError, "in_channels must be a list"),
    (lambda: FeatureFusion((4,), 4)([None]), TypeError, r"maps\[0\] must be a torch.Tensor"),
    (lambda: MFEFBlock(64, kernel_sizes=(3, 4), groups="auto"), ValueError, "kernel_sizes.1.=4"),
    (lambda: MFEFBlock(64, kernel_sizes=(3, -1), groups="auto"), ValueError, "kernel_sizes.1.=-1"),
    (lambda: MFEFBlock(64, kernel_sizes=(3, 5)), ValueError, "groups.*4 entries.*has 2"),
    (lambda: MFEFBlock(132), ValueError, r'groups\[1\]=4 must divide Cin=33.*"auto"'),
    (lambda: MFEFBlock(64, groups="best"), ValueError, "groups='best'"),
    (lambda: MFEFBlock(64, mode="both"), ValueError, "mode='both' is unknown; use one of 'split'"),
    (lambda: MFEFBlock(64, reduction=0), ValueError, "reduction=0 must be at least 1"),
    (lambda: MFEFBlock(64, spatial_kernel_size=6), ValueError, "spatial_kernel_size=6 must be odd"),
    (lambda: MFEFBlock(64, backend="fast"), ValueError, "backend='fast' is unknown"),
    (lambda: MFEFBlock(66, mode="hierarchical", groups="auto"), ValueError, "divisible by the 4"),
    (lambda: DualAttention(True), TypeError, "channels must be an int"),
    (lambda: DualAttention(np.bool_(True)), TypeError, "channels must be an int"),
    (lambda: DualAttention(np.float64(8)), TypeError, "channels must be an int"),
    (lambda: DualAttention(np.int64(0)), ValueError, "channels=0 must be at least 1"),
    (lambda: MFEFBlock(64, groups=(1, 4, 8, True)), TypeError, "groups.3. must be an int"),
    (lambda: MFEFBlock(64, kernel_sizes=(True,)), TypeError, "kernel_sizes.0. must be an int"),
    (lambda: MultiScaleConv2d(64, 0), ValueError, "out_channels=0"),
    (lambda: FeatureFusion((), 4), ValueError, r"in_channels=\(\)"),
    (lambda: FeatureFusion((4, 0), 4), ValueError, "in_channels.1.=0"),
    (lambda: FeatureFusion((4,), 4)([]), ValueError, "maps has 0 entries"),
    (
        lambda: FeatureFusion((4, 4), 4)([torch.randn(1, 4, 2, 2), torch.randn(1, 3, 2, 2)]),
        ValueError,
        r"maps\[1\] must be \(N, 4, H, W\)",
    ),
    (lambda: mfef_ext.use_backend("tpu").__enter__(), ValueError, "backend='tpu' is unknown"),
    (lambda: mfef_ext.explain(torch.randn(1), torch.nn.ReLU()), TypeError, "block must be"),
    (
        lambda: MFEFBlock(8, kernel_sizes=(3,), groups="auto", mode="hierarchical")(torch.ones(3)),
        ValueError,
        r"x must be \(N, 8, H, W\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), LAYERS, ids=[m for _, _, m in LAYERS])
def test_layers(call, error, match):
    with pytest.raises(error, match=match):
        call()


KD = [
    ((torch.randn(2, 3), torch.randn(2, 4)), {}, ValueError, "target has shape"),
    ((torch.randn(3), torch.randn(3)), {}, ValueError, "student must be 2-D"),
    ((torch.randn(2, 3), torch.randn(2, 3)), {"temperature": 0.0}, ValueError, "temperature=0.0"),
    ((torch.randn(2, 3), torch.randn(2, 3)), {"temperature": 1e200}, ValueError, "from 1e-6"),
    ((torch.randn(2, 3), torch.randn(2, 3)), {"temperature": "3"}, TypeError, "temperature must"),
    ((torch.ones(2, 3).long(), torch.randn(2, 3)), {}, TypeError, "student has dtype torch.int64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "match"), KD)
def test_kd_loss(arguments, options, error, match):
    with pytest.raises(error, match=match):
        functional.kd_loss(*arguments, **options)


def test_a_message_is_one_sentence_with_the_remedy():
    with pytest.raises(ValueError) as caught:
        conv(weights=[torch.randn(4, 4, 2, 2)])
    assert re.fullmatch(r"[^\n]+use 3", str(caught.value))


# --- after calls that have passed all checks ---------------------------------------------------


def test_what_passed_before_says_nothing_about_other_arguments():
    """functional remembers what has passed; whatever differs in anything checked does not."""
    for arguments, error, match in CONV:
        conv()
        conv(bias=torch.randn(4), backend="reference")
        with pytest.raises(error, match=match):
            conv(**arguments)
    for groups in ((True,), (1.0,), [[1]], ("1",)):
        with pytest.raises(TypeError, match=r"groups\[0\] must be an int"):
            conv(groups=groups)
    changing = torch.tensor(1)
    conv(groups=[changing])
    with pytest.raises(ValueError, match=r"groups\[0\]=0"):
        conv(groups=[changing.zero_()])
    x, weights = torch.randn(2, 4, 5, 5), [torch.randn(4, 4, 3, 3)]
    conv(x=x, weights=weights)
    weights[0].data = weights[0].data.double()
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch\.float64"):
        conv(x=x, weights=weights)
    with pytest.raises(TypeError, match="weights must be a list or tuple"):
        conv(x=x, weights=(w for w in weights))
    with pytest.raises(TypeError, match=r"fc2_weight must be a torch\.Tensor"):
        functional.dual_attention(x, torch.randn(2, 4), None, None, None, torch.randn(1, 2, 3, 3))


def test_what_passed_under_autocast_does_not_pass_without():
    x, weights = torch.randn(2, 4, 5, 5), [torch.randn(4, 4, 3, 3).bfloat16()]
    with torch.autocast("cpu"):
        assert conv(x=x, weights=weights).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype"):
        conv(x=x, weights=weights)


def test_a_forced_backend_is_heeded_by_every_call():
    half = {"x": torch.randn(2, 4, 5, 5).half(), "weights": [torch.randn(4, 4, 3, 3).half()]}
    for _ in range(2):
        conv(**half)  # runs on the reference backend
        with mfef_ext.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot run"):
            conv(**half)
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run"):
            conv(**half, backend="cpu")


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns of every size that is checked
def test_what_is_remembered_is_bounded_and_holds_no_tensor(monkeypatch):
    monkeypatch.setattr(functional, "MAX_DESCRIBED", 4)
    functional._described.clear()
    for n in range(1, 12):
        x = torch.randn(n, 4, 5, 5)
        torch.jit.trace(lambda x: conv(x=x), x, check_trace=False)  # sizes are tensors in there
        alive = weakref.ref(x)
        conv(x=x)
        del x
        assert alive() is None
        assert len(functional._described) <= 4
    sizes = [fact[0] for _, (facts, *_) in functional._described for fact in facts if fact]
    assert sizes and all(type(n) is int for size in sizes for n in size)


# --- direct calls of the operators ------------------------------------------------------------


def raw_block():
    n, c, h, w, k = 2, 4, 3, 3, 3
    x = torch.randn(n, c, h, w)
    weights = [torch.randn(c, c, k, k)]
    attention = [
        torch.randn(2, c),
        torch.randn(2),
        torch.randn(c, 2),
        torch.randn(c),
        torch.randn(1, 2, 3, 3),
    ]
    return x, weights, attention


NONSENSE = [
    torch.randn(0),
    torch.randn(1),
    torch.randn(2, 4, 3),
    torch.randn(1, 1, 1, 1),
    torch.randn(3, 7, 2, 9),
    torch.randn(2, 4, 3, 3, 1),
    torch.ones(2, 4, 3, 3, dtype=torch.int32),
    torch.randn(2, 4, 3, 3, dtype=torch.float64),
    torch.randn(2, 4, 3, 3, dtype=torch.float16),
    torch.empty(2, 4, 0, 3),
]


@pytest.mark.parametrize("junk", NONSENSE, ids=lambda t: f"{tuple(t.shape)}-{t.dtype}")
def test_every_tensor_of_the_raw_operators_is_checked(junk):
    """Each tensor argument in turn is replaced by nonsense; the call raises or, where the nonsense
    happens to be right, returns."""
    x, weights, attention = raw_block()
    grad = torch.randn_like(x)
    _, *saved = OPS.dual_attention(x, *attention, True)
    _, *block_saved = OPS.mfef_block(x, weights, [1], True, *attention, True)
    bias = torch.randn(4)
    calls = [
        (OPS.multi_scale_conv2d, [x, weights, [1], True, bias]),
        (OPS.multi_scale_conv2d_backward, [grad, x, weights, [1], True, bias, True, True]),
        (OPS.dual_attention, [x, *attention, True]),
        (OPS.dual_attention_backward, [grad, x, *attention, *saved, True, True]),
        (OPS.mfef_block, [x, weights, [1], True, *attention, True]),
        (
            OPS.mfef_block_backward,
            [grad, x, weights, [1], True, *attention, *block_saved, True, True],
        ),
    ]
    for op, arguments in calls:
        op(*arguments)  # right as it stands
        for i, a in enumerate(arguments):
            is_list = isinstance(a, list) and torch.is_tensor(a[0])
            if not (torch.is_tensor(a) or is_list):
                continue
            same = a[0] if is_list else a
            if same.shape == junk.shape and same.dtype == junk.dtype:
                continue
            bad = list(arguments)
            bad[i] = [junk] if is_list else junk
            with pytest.raises(RuntimeError, match="mfef"):
                op(*bad)


@pytest.mark.parametrize("groups", [[0], [-1], [3], [1, 1], [], [2**62], [-(2**63)]])
def test_raw_groups(groups):
    x, weights, _ = raw_block()
    with pytest.raises(RuntimeError, match="mfef"):
        OPS.multi_scale_conv2d(x, weights, groups, True, None)


def test_raw_lists():
    x, _, _ = raw_block()
    with pytest.raises(RuntimeError, match="weights is empty"):
        OPS.multi_scale_conv2d(x, [], [], True, None)
    narrow = [torch.randn(1, 1, 1, 1)] * 100
    with pytest.raises(RuntimeError, match="at most 64"):
        OPS.multi_scale_conv2d(torch.randn(1, 100, 2, 2), narrow, [1] * 100, True, None)
    with pytest.raises(RuntimeError, match="at most 4095"):
        OPS.multi_scale_conv2d(
            x, [torch.empty(4, 4, 1, 1).expand(4, 4, 4097, 4097)], [1], True, None
        )


def test_counts_that_overflow_are_refused():
    """Expanded tensors claim sizes that nobody could allocate; byte counts must not wrap."""
    one = torch.zeros(1, 1, 1, 1)
    huge = torch.zeros(1, 1, 1, 1).expand(2**62, 1, 1, 1)
    with pytest.raises(RuntimeError, match="at most 2\\^40"):
        OPS.multi_scale_conv2d(one, [huge], [1], True, None)
    with pytest.raises(RuntimeError, match="at most 2\\^40"):
        OPS.multi_scale_conv2d(one.expand(1, 2**31, 2**20, 1), [one], [2**31], True, None)
    fc1, fc2 = torch.zeros(1, 1).expand(2**62, 1), torch.zeros(1, 1).expand(1, 2**62)
    with pytest.raises(RuntimeError, match="at most 2\\^40"):
        OPS.dual_attention(one, fc1, None, fc2, None, torch.zeros(1, 2, 1, 1), False)


LENGTHS = [2**63 - 1, 2**62, 2**58, 2**40 + 1, 2**36 + 1]


@pytest.mark.parametrize("images", LENGTHS)
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("k", [5, 9])
def test_batches_whose_counts_overflow_are_refused(images, side, k):
    """Counts per image are small; those of the batch, times taps, lanes or bytes, are not."""
    z = torch.ones(1)
    try:
        x = z.expand(images, 16, side, side)
        y = z.expand(images, 4, side, side)
    except RuntimeError:  # PyTorch's own: the number of elements does not fit into 64 bits
        return
    weights, hidden = [torch.ones(4, 16, k, k)], 2
    attention = (
        torch.ones(hidden, 4),
        None,
        torch.ones(4, hidden),
        None,
        torch.ones(1, 2, k, k),
    )
    of_channel, of_pixel = z.expand(images, 4), z.expand(images, side, side)
    places = z.int()
    saved = (
        of_channel,
        of_channel,
        places.expand(of_channel.shape),
        of_pixel,
        places.expand(of_pixel.shape),
    )
    for wants_x in (False, True):
        calls = [
            lambda w=wants_x: OPS.multi_scale_conv2d_backward(
                y, x, weights, [1], True, None, w, True
            ),
            lambda w=wants_x: OPS.dual_attention_backward(y, y, *attention, *saved, w, True),
            lambda w=wants_x: OPS.mfef_block_backward(
                y, x, weights, [1], True, *attention, y, *saved, w, True
            ),
            lambda w=wants_x: OPS.dual_attention(y, *attention, w),
            lambda w=wants_x: OPS.mfef_block(x, weights, [1], True, *attention, w),
            lambda: OPS.multi_scale_conv2d(x, weights, [1], True, None),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match=r"at most 2\^40|not what the forward saved"):
                call()


def test_what_one_tensor_holds_may_overflow_in_another():
    """The result has more channels than x, the MLP more hidden units than both."""
    z, images = torch.ones(1), 2**38
    x = z.expand(images, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"the result has about .* at most 2\^40"):
        OPS.multi_scale_conv2d(x, [torch.ones(8, 1, 1, 1)], [1], True, None)
    mlp = torch.ones(8, 1), None, torch.ones(1, 8), None, torch.ones(1, 2, 1, 1)
    with pytest.raises(RuntimeError, match=r"hidden units has about .* at most 2\^40"):
        OPS.dual_attention(x, *mlp, False)


def test_memory_that_nobody_has_is_an_error():
    """2^40 elements may be asked for; where there is no memory, that is said, in every thread."""
    x = torch.ones(1).expand(2**36, 4, 2, 2)
    with pytest.raises(RuntimeError, match="memory"):
        OPS.multi_scale_conv2d(x, [torch.ones(4, 4, 3, 3)], [1], True, None)
    with pytest.raises(RuntimeError, match="memory"):
        OPS.multi_scale_conv2d_backward(
            x, x, [torch.ones(4, 4, 3, 3)], [1], True, None, False, True
        )


@pytest.mark.parametrize("left", [0, 64])
def test_a_storage_that_was_shrunk_is_refused(left):
    for i in range(3):
        x, weights, _ = raw_block()
        bias = torch.randn(4)
        [x, weights[0], bias][i].untyped_storage().resize_(left if i < 2 else 0)
        with pytest.raises(RuntimeError, match="beyond its storage"):
            OPS.multi_scale_conv2d(x, weights, [1], True, bias)


def test_a_map_just_below_the_limit_of_pixels():
    below = torch.zeros(1, 1, 1, 1).expand(1, 1, 46340, 46341)
    assert below.shape[2] * below.shape[3] < 2**31
    with pytest.raises(RuntimeError, match="weights is empty"):  # the check that comes after
        OPS.multi_scale_conv2d(below, [], [], True, None)
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 46341, 46341)  # 2^31 and some
    with pytest.raises(RuntimeError, match="below 2\\^31"):
        OPS.multi_scale_conv2d(x, [torch.zeros(1, 1, 1, 1)], [1], True, None)


def test_one_meta_tensor_among_others_is_refused():
    """The dispatcher sends such a call to the fake, which must not answer with empty memory."""
    x, weights, attention = raw_block()
    with pytest.raises(ValueError, match="is on meta"):
        OPS.multi_scale_conv2d(x, [weights[0].to("meta")], [1], True, None)
    with pytest.raises(ValueError, match="is on meta"):
        OPS.mfef_block(x, weights, [1], True, attention[0].to("meta"), *attention[1:], False)
    _, *saved = OPS.dual_attention(x, *attention, True)
    saved[2] = saved[2].to("meta")
    with pytest.raises(ValueError, match="on meta"):
        OPS.dual_attention_backward(x, x, *attention, *saved, True, True)
    with pytest.raises(ValueError, match="must be odd"):
        OPS.multi_scale_conv2d(x.to("meta"), [torch.empty(4, 4, 2, 2).to("meta")], [1], True, None)


def test_autocast_does_not_mix_float64():
    with torch.autocast("cpu"), pytest.raises(TypeError, match="leaves float64 alone"):
        conv(x=torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_foreign_indices_stay_inside(engine):
    """Saved indices of another call, or of nobody: a wrong gradient, no wrong write."""
    x, _, attention = raw_block()
    _, mean, top, index, s, c_index = OPS.dual_attention(x, *attention, True)
    for value in (-1, 9, 2**31 - 1, -(2**31)):
        bad = torch.full_like(index, value)
        bad_channels = torch.full_like(c_index, value)
        OPS.dual_attention_backward(
            torch.randn_like(x), x, *attention, mean, top, bad, s, bad_channels, True, True
        )
