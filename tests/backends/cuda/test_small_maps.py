"""The kernels for maps that fit on the chip, block by block, against the float64 reference; and
what holds for maps that do not (those with 17 columns and more) as well."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import functional, reference
from mfef_ext.backends import cuda
from mfef_ext.modules import MFEFBlock
from tests.accuracy import (
    Errors,
    check_block,
    factor,
    largest,
    make_case,
    run_block,
    unit_in_the_last_place,
)
from tests.backends.cuda.test_plan import problem
from tests.backends.cuda.tf32 import on_tf32_operands
from tests.drawing import DRAWN, blocks
from tests.ops.test_accuracy import strided
from tests.ops.test_contracts import tied_case
from tests.ptx.cuda import A100, ALIGNED, H200, NEAREST, SMALLEST

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [*DTYPES, "tf32"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Every dtype and every layout, but not every pair: they meet in nothing but the copies.
HALVES = [(torch.bfloat16, LAYOUTS[1]), (torch.float16, LAYOUTS[0])]
EACH = [*((torch.float32, layout) for layout in LAYOUTS), *HALVES]
EXAMPLES = settings(DRAWN, max_examples=12)


# Every width of a row, compiled and other kernel sizes, whole and partial blocks of images.
BLOCKS = blocks(
    [1, 2, 3, 5], 24, st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 14, 16])
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EXAMPLES
@given(arguments=BLOCKS, layout=st.sampled_from(LAYOUTS))
def test_random_blocks(device, dtype, arguments, layout):
    check_block(dtype, layout, backend="cuda", device=device, **arguments)


# The paper's and DenseNets' maps, dense groups, all branches on all channels, kernels of any size.
SHAPES = [
    ((3, 64, 8, 8), {}),
    ((2, 128, 8, 8), {}),
    ((1, 256, 8, 8), {}),  # one branch at a time
    ((2, 132, 8, 8), {}),
    ((5, 512, 2, 2), {}),
    ((2, 64, 7, 7), {}),
    ((1, 48, 14, 14), {}),
    ((2, 96, 8, 8), {"groups": (1, 1, 1, 1)}),
    ((2, 32, 8, 8), {"split": False}),
    ((2, 8, 9, 9), {"kernel_sizes": (21, 3), "spatial_kernel_size": 15}),
    ((2, 6, 1, 1), {"kernel_sizes": (3,)}),
    ((1, 4, 40, 3), {"kernel_sizes": (3, 9)}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), SHAPES, ids=str)
def test_shapes_that_users_have(device, dtype, shape, options):
    check_block(dtype, shape=shape, backend="cuda", device=device, **options)


# Branches that tensor cores compute: every kernel size, beside branches that they do not; groups
# that fill their matrices and groups that do not; narrower and lower maps; branches that add to the
# same channels; several tiles of the weight gradient.
MATRICES = [
    ((2, 64, 8, 8), {"groups": (1, 1, 1, 1)}),
    ((2, 64, 8, 8), {"groups": (2, 1, 2, 8)}),
    ((3, 33, 8, 8), {"kernel_sizes": (7,), "groups": (1,)}),
    ((1, 72, 7, 5), {"kernel_sizes": (3, 9), "groups": (3, 2)}),
    ((2, 18, 3, 6), {"kernel_sizes": (5, 3), "groups": (1, 1)}),
    ((2, 24, 6, 8), {"kernel_sizes": (3, 5, 7), "groups": (1, 1, 8), "split": False}),
    ((2, 22, 5, 5), {"kernel_sizes": (3, 5), "groups": (1, 1)}),
    ((2, 72, 8, 8), {"kernel_sizes": (3,), "groups": (1,)}),
]


def by_tensor_cores(shape, dtype, of="forward", split=True, **options) -> object:
    mode = "split" if split else "pyramid"
    plan = cuda.plan(problem(shape[0], *shape[1:], dtype=dtype, mode=mode, **options), H200)
    return plan[f"{of}_tensor_core_branches"]


@pytest.mark.parametrize(("dtype", "layout"), HALVES, ids=str)
@pytest.mark.parametrize(("shape", "options"), MATRICES, ids=str)
def test_branches_by_tensor_cores(device, dtype, layout, shape, options):
    assert by_tensor_cores(shape, dtype, **options)
    assert not by_tensor_cores(shape, torch.float32, **options)
    check_block(dtype, layout, backend="cuda", device=device, shape=shape, **options)


# In pyramid mode all branches; the one of the list above has one that they do not compute.
TF32_MATRICES = [entry for entry in MATRICES if entry[1].get("split", True)]
TF32_MATRICES += [((2, 24, 6, 8), {"kernel_sizes": (3, 5), "groups": (1, 1), "split": False})]


@pytest.mark.parametrize("adding", [NEAREST, ALIGNED])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "options"), TF32_MATRICES, ids=str)
def test_branches_by_tensor_cores_in_tf32(device, request, tf32, layout, adding, shape, options):
    """The convolution and its gradients: what float64 makes of operands rounded to TF32, as near as
    float32 comes to it, also where tensor cores cut their sums as an A100 does."""
    branches = by_tensor_cores(shape, torch.float32, **options)
    of_weights = branches
    if device == "cpu":  # there the weight gradient is a launch of its own
        request.getfixturevalue("machine").set(adding=adding, apart=True)
    elif adding != NEAREST:
        pytest.skip("a GPU adds as it does")
    else:
        of_weights = by_tensor_cores(shape, torch.float32, "weight_gradient", **options)
    errors = Errors(torch.float32)
    for seed in range(3):
        case = make_case(shape, dtype=torch.float32, seed=seed, **options)
        rounded = on_tf32_operands(case, branches)
        summed = on_tf32_operands(case, of_weights)

        def run(f, of, d, where="cpu", layout=torch.contiguous_format, **kw):
            at = of.cast(d, where)
            out = f(at.x.contiguous(memory_format=layout), at.weights, at.groups, at.split, **kw)
            grads = torch.autograd.grad(out, [at.x, *at.weights], at.grad)
            return [t.detach().cpu() for t in (out, *grads)]

        def expected(d, layout, rounded=rounded, summed=summed):
            f = reference.multi_scale_conv2d
            return run(f, rounded, d, layout=layout)[:2] + run(f, summed, d, layout=layout)[2:]

        wanted = expected(torch.float64, torch.contiguous_format)
        ours = functional.multi_scale_conv2d
        got = run(ours, case, torch.float32, device, layout, backend="cuda")
        eager = [expected(torch.float32, one) for one in LAYOUTS]
        worst = [
            max(largest(e.double() - w) for e in column)
            for *column, w in zip(*eager, wanted, strict=True)
        ]
        names = ["out", "x", *(f"weights[{i}]" for i in range(len(case.weights)))]
        errors.add(names, got, wanted, worst)
    errors.check()


def test_direct_branches_see_what_tensor_cores_see_of_the_same_channels(device, tf32):
    """Forward in pyramid mode, where x is rounded for all; weights are for the latter only."""
    shape, options = (2, 24, 6, 8), {"kernel_sizes": (3, 5, 7), "groups": (1, 1, 8)}
    assert by_tensor_cores(shape, torch.float32, split=False, **options) == [0, 1]
    case = make_case(shape, split=False, dtype=torch.float32, **options)
    low = case.cast(torch.float32, device)
    both = on_tf32_operands(case, [0, 1]).cast(torch.float32, device)
    first, second = (
        functional.multi_scale_conv2d(c.x, c.weights, c.groups, False, backend="cuda")
        for c in (low, both)
    )
    assert not torch.equal(low.x, both.x) and torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str, indirect=True)
@pytest.mark.parametrize("split", [True, False])
def test_layouts_of_weights_give_the_same_bits_on_tensor_cores(device, kind, split):
    """Taps as neighbours in memory, source channels, destination channels, and none."""
    options = {"kernel_sizes": (3, 7), "groups": (1, 2)}
    case = make_case((2, 44, 7, 8), split=split, dtype=kind, **options).cast(kind, device)
    found = []
    for change in (
        lambda w: w,
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        lambda w: w.repeat_interleave(2, 3)[..., ::2],
    ):
        weights = [change(w.detach()).requires_grad_() for w in case.weights]
        out = functional.multi_scale_conv2d(case.x, weights, case.groups, split, backend="cuda")
        found.append([out, *torch.autograd.grad(out, [case.x, *weights], case.grad)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [A100, SMALLEST])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "tf32"], ids=str, indirect=True)
def test_stages_of_weights_do_not_change_a_bit(machine, limit, kind):
    """A device with less shared memory has the weights of a convolution in more stages."""
    case = make_case((2, 128, 8, 8), dtype=kind).cast(kind)
    wanted = run_block(case, functional.mfef_block, backend="cuda")
    machine.set(shared_limit=limit)
    for a, b in zip(wanted, run_block(case, functional.mfef_block, backend="cuda"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *(((3, 24, 8, 8), torch.float32), ((513, 8, 2, 2), torch.float32)),
        *(((2, 9, 3, 14), torch.float32), ((2, 68, 6, 4), torch.float32)),
        *(((2, 70, 9, 20), torch.float32), ((1, 9, 35, 18), torch.float32)),
        *(((2, 44, 7, 8), torch.bfloat16), ((1, 72, 9, 18), torch.bfloat16)),  # tensor cores
        ((2, 44, 7, 8), "tf32"),
    ],
    ids=str,
    indirect=["kind"],
)
def test_blocks_and_warps_do_not_depend_on_their_order(machine, shape, kind, split):
    """The same bits with the last thread block and the last warp first."""
    case = make_case(shape, split=split, dtype=kind).cast(kind)
    bias = torch.randn(shape[1], dtype=kind)
    tf32 = torch.backends.cudnn.allow_tf32
    weights = [w.detach() for w in case.weights]

    def run():
        out = run_block(case, functional.mfef_block, backend="cuda")
        arguments = (case.x.detach(), weights, case.groups, split, bias)
        out.append(functional.multi_scale_conv2d(*arguments, backend="cuda"))
        backward = torch.ops.mfef_ptx.multi_scale_conv2d_backward
        grad_x, grads, grad_bias = backward(case.grad, *arguments, True, True, tf32)
        return [*out, grad_x, *grads, grad_bias]

    ascending = run()
    machine.set(backwards=True)
    for a, b in zip(ascending, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(5, 24, 6, 8), (2, 24, 9, 37)], ids=str)
def test_thread_blocks_take_turns(machine, shape):
    """Beyond the largest grid, here of two: the same bits."""
    case = make_case(shape, dtype=torch.float32).cast(torch.float32)
    wanted = run_block(case, functional.mfef_block, backend="cuda")
    machine.set(max_blocks=2)
    machine.launches()  # forget those before
    for a, b in zip(wanted, run_block(case, functional.mfef_block, backend="cuda"), strict=True):
        assert torch.equal(a, b)
    assert max(launch.blocks for launch in machine.launches()) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multi_scale_conv2d_with_bias(device, dtype):
    """The bias, which the block does not have: output and gradient, by the same rule."""
    ours, eager = [0.0, 0.0], [0.0, 0.0]
    for seed in range(5):
        case = make_case((5, 24, 6, 7), dtype=dtype, seed=seed)
        bias = torch.randn(24, dtype=torch.float64).to(dtype).double()

        def run(f, d, where="cpu", case=case, bias=bias, **kw):
            b = bias.to(where, d).requires_grad_()
            at = case.cast(d, where)
            out = f(at.x, at.weights, at.groups, True, b, **kw)
            (grad,) = torch.autograd.grad(out, b, at.grad)
            return out.detach().cpu().double(), grad.cpu().double()

        wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, dtype, device, backend="cuda")
        plain = run(reference.multi_scale_conv2d, dtype)
        for i in range(2):
            ulp = unit_in_the_last_place(wanted[i], dtype)
            ours[i] = max(ours[i], largest(got[i] - wanted[i]) / ulp)
            eager[i] = max(eager[i], largest(plain[i] - wanted[i]) / ulp)
    for o, e in zip(ours, eager, strict=True):
        assert o <= factor(dtype) * e + 1


@pytest.mark.parametrize("kind", [torch.float32, "tf32"], ids=str, indirect=True)
@pytest.mark.parametrize("shape", [(5, 32, 8, 8), (2, 44, 7, 8), (2, 70, 9, 37)])
def test_dual_attention_alone_is_the_blocks_second_half(device, shape, kind):
    """The two halves share the block's inner code: the same numbers, to the last bit."""
    case = make_case(shape, dtype=torch.float32).cast(torch.float32, device)
    y = functional.multi_scale_conv2d(case.x, case.weights, case.groups, backend="cuda")
    halves = functional.dual_attention(y, *case.attention, backend="cuda")
    arguments = (case.x, case.weights, case.groups, *case.attention)
    block = functional.mfef_block(*arguments, backend="cuda")
    assert torch.equal(halves, block)
    one = torch.autograd.grad(halves, case.leaves(), case.grad)
    other = torch.autograd.grad(block, case.leaves(), case.grad)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "tf32"], ids=str, indirect=True)
@pytest.mark.parametrize("how", ["slice", "transposed", "every second", "channels_last slice"])
@pytest.mark.parametrize("shape", [(3, 20, 5, 6), (2, 44, 5, 6), (2, 20, 5, 20)])
def test_any_strides_give_the_same_bits(device, kind, how, shape):
    """Inputs, weights and incoming gradients that are views of larger tensors full of NaN."""
    case = make_case(shape, dtype=kind).cast(kind, device)

    def run(x, weights, grad):
        x = x.detach().requires_grad_()
        weights = [w.detach().requires_grad_() for w in weights]
        out = functional.mfef_block(x, weights, case.groups, *case.attention, backend="cuda")
        return [out, *torch.autograd.grad(out, [x, *weights], grad)]

    plain = run(case.x, case.weights, case.grad)
    weights = [strided(w, "slice") for w in case.weights]
    odd = run(strided(case.x, how), weights, strided(case.grad, how))
    for a, b in zip(plain, odd, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3, 20, 5, 6), (3, 20, 5, 8), (2, 20, 9, 36), (2, 32, 9, 17)])
def test_layouts_are_kept_and_agree(device, shape):
    case = make_case(shape, dtype=torch.float32).cast(torch.float32, device)
    results = []
    for layout in LAYOUTS:
        x = case.x.detach().contiguous(memory_format=layout).requires_grad_()
        grad = case.grad.contiguous(memory_format=layout)
        out = functional.mfef_block(x, case.weights, case.groups, *case.attention, backend="cuda")
        grads = torch.autograd.grad(out, [x, *case.leaves()[1:]], grad)
        assert out.is_contiguous(memory_format=layout)
        assert grads[0].is_contiguous(memory_format=layout)
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [4, 24])
def test_expanded_gradient(device, width):
    """sum().backward() sends a gradient with strides of 0."""
    case = make_case((3, 8, 4, width), kernel_sizes=(3, 5), dtype=torch.float32)
    case.grad = torch.ones_like(case.grad)
    low = case.cast(torch.float32, device)
    arguments = (low.x, low.weights, low.groups, *low.attention)
    expected = run_block(low, functional.mfef_block, backend="cuda")
    functional.mfef_block(*arguments, backend="cuda").sum().backward()
    assert torch.equal(low.x.grad, expected[1])


@pytest.mark.parametrize("width", [4, 24])
def test_gradients_have_the_strides_of_the_weights(device, width):
    case = make_case((3, 8, 4, width), kernel_sizes=(3, 5), dtype=torch.float32)
    case = case.cast(torch.float32, device)
    expected = run_block(case, functional.mfef_block, backend="cuda")[2:]
    weights = [
        w.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        for w in case.weights
    ]
    out = functional.mfef_block(case.x, weights, case.groups, *case.attention, backend="cuda")
    for w, g, e in zip(
        weights, torch.autograd.grad(out, weights, case.grad), expected, strict=False
    ):
        assert g.stride() == w.stride() and torch.equal(g, e)


@pytest.mark.parametrize("wanted", ["x", "weights", "attention", "fc2_weight"])
@pytest.mark.parametrize("width", [5, 19])
def test_gradients_for_some_inputs_only(device, wanted, width):
    case = make_case((3, 12, 5, width), kernel_sizes=(3, 5), dtype=torch.float32)
    case = case.cast(torch.float32, device)
    arguments = (case.x, case.weights, case.groups, *case.attention)
    full = functional.mfef_block(*arguments, backend="cuda")
    chosen = {
        "x": [case.x],
        "weights": case.weights,
        "attention": case.attention,
        "fc2_weight": [case.attention[2]],
    }[wanted]
    expected = torch.autograd.grad(full, chosen, case.grad)
    kept = {id(t) for t in chosen}
    for leaf in case.leaves():
        leaf.requires_grad_(id(leaf) in kept)
    out = functional.mfef_block(*arguments, backend="cuda")
    assert torch.equal(out, full)
    for a, b in zip(torch.autograd.grad(out, chosen, case.grad), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1100, 8, 2, 2), torch.float32),
        ((7, 12, 6, 6), torch.float32),
        ((5, 12, 6, 18), torch.float32),
        ((521, 22, 5, 5), torch.bfloat16),
        ((521, 22, 5, 5), "tf32"),
    ],
    ids=str,
    indirect=["kind"],
)
def test_an_image_does_not_depend_on_its_neighbours(device, shape, kind):
    """Nor on how many images share a thread block, nor on the last block being a partial one."""
    case = make_case((1, *shape[1:]), kernel_sizes=(3, 5), dtype=kind)
    case = case.cast(kind, device)
    arguments = (case.weights, case.groups, *case.attention)
    x, grad = torch.randn(2, *shape, device=device).to(kind)

    def run(images):
        leaf = x[images].requires_grad_()
        out = functional.mfef_block(leaf, *arguments, backend="cuda")
        return out, torch.autograd.grad(out, leaf, grad[images])[0]

    whole = run(slice(None))
    for image in (0, shape[0] // 2, shape[0] - 1):
        for a, b in zip(run(slice(image, image + 1)), whole, strict=True):
            assert torch.equal(a[0], b[image])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("width", [4, 24])
def test_empty_batch(device, dtype, layout, width):
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", backend="cuda", dtype=dtype)
    block = block.to(device)
    x = torch.randn(0, 8, 5, width, dtype=dtype, device=device)
    x = x.contiguous(memory_format=layout).requires_grad_()
    out = block(x)
    assert out.shape == (0, 8, 5, width)
    out.sum().backward()
    assert x.grad.shape == x.shape
    for p in block.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    weights, bias = [torch.randn(4, 4, 3, 3, device=device)], torch.randn(4, device=device)
    parameters = [t.requires_grad_() for t in (*weights, bias)]
    empty = torch.randn(0, 4, 5, width, device=device)
    out = functional.multi_scale_conv2d(empty, weights, [1], bias=bias, backend="cuda")
    for g in torch.autograd.grad(out.sum(), parameters):
        assert not g.any()


@pytest.mark.parametrize("repeats", [1, 30])
def test_ties_go_to_the_first_element(device, repeats):
    """All gates are 1/2 exactly, so y's ties are z's: the first pixel, the lowest channel."""
    y, parameters = tied_case(torch.float32)
    y = y.repeat(1, 1, 1, repeats)
    grad = torch.randn(y.shape)

    def run(f, where, **kw):
        leaves = [t.detach().to(where).requires_grad_() for t in (y, *parameters)]
        grads = torch.autograd.grad(f(*leaves, **kw), leaves, grad.to(where))
        return [g.cpu() for g in grads]

    ours = run(functional.dual_attention, device, backend="cuda")
    for a, b in zip(ours, run(reference.dual_attention, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repeats", [1, 30])
def test_saved_tensors_are_those_of_the_cpu(device, repeats):
    """Shapes, dtypes and layouts as in csrc/schemas.cpp; indices are the first of their ties."""
    y, parameters = tied_case(torch.float32)
    y, *parameters = (t.detach().to(device) for t in (y.repeat(1, 1, 1, repeats), *parameters))
    namespace = torch.ops.mfef if device == "cuda" else torch.ops.mfef_ptx
    ours = namespace.dual_attention(y, *parameters, True)
    cpu = torch.ops.mfef.dual_attention(y.cpu(), *(p.cpu() for p in parameters), True)
    for a, b in zip(ours, cpu, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        if a.dtype == torch.int32:
            assert torch.equal(a.cpu(), b)
        else:
            torch.testing.assert_close(a.cpu(), b)
    assert all(t.numel() == 0 for t in namespace.dual_attention(y, *parameters, False)[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [6, 8, 22, 24])
def test_nan_and_infinity_pass_through(device, value, width):
    """They appear where PyTorch has them, and in no other image."""
    case = make_case((5, 12, 6, width), kernel_sizes=(3, 5), dtype=torch.float32)
    low = case.cast(torch.float32, device)
    arguments = (low.weights, low.groups, *low.attention)
    clean = functional.mfef_block(low.x, *arguments, backend="cuda")
    with torch.no_grad():
        for c in (case, low):
            c.x[3, 3, 2, 2] = value
    got = functional.mfef_block(low.x, *arguments, backend="cuda")
    plain = case.cast(torch.float32)
    wanted = reference.mfef_block(plain.x, plain.weights, plain.groups, *plain.attention)
    assert torch.equal(got.isnan().cpu(), wanted.isnan())
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.bfloat16, "tf32"], ids=str, indirect=True)
def test_nan_and_infinity_stay_in_their_group(device, kind, value):
    """Also where tensor cores multiply by the zeros that fill up their matrices."""
    case = make_case((2, 36, 6, 8), kernel_sizes=(3, 5), groups=(2, 1), dtype=kind)
    with torch.no_grad():
        case.x[1, 3, 2, 6] = case.x[0, 20, 0, 0] = value
    low, plain = case.cast(kind, device), case.cast(torch.float32)
    got = functional.multi_scale_conv2d(low.x, low.weights, low.groups, backend="cuda")
    wanted = reference.multi_scale_conv2d(plain.x, plain.weights, plain.groups)
    assert 0 < int(wanted.isfinite().sum()) < wanted.numel()
    assert torch.equal(got.isfinite().cpu(), wanted.isfinite())


@pytest.mark.parametrize("width", [3, 30])
def test_extreme_logits_saturate(device, width):
    y = torch.randn(3, 4, 3, width)
    for scale in (1e4, -1e4, 1e30, -1e30):
        parameters = [
            torch.zeros(1, 4),
            torch.ones(1),
            torch.full((4, 1), scale),
            torch.zeros(4),
            torch.zeros(1, 2, 3, 3),
        ]
        moved = [t.to(device) for t in (y, *parameters)]
        got = functional.dual_attention(*moved, backend="cuda")
        torch.testing.assert_close(got.cpu(), reference.dual_attention(y, *parameters))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_opcheck(device, layout):
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto").to(device)
    a = block.attention
    x = torch.randn(2, 8, 4, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    namespace = torch.ops.mfef if device == "cuda" else torch.ops.mfef_ptx
    torch.library.opcheck(
        namespace.mfef_block.default,
        (
            x, list(block.conv.weights), list(block.conv.groups), True,
            a.fc1_weight, a.fc1_bias, a.fc2_weight, a.fc2_bias, a.spatial_weight, True,
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_compiles_without_graph_breaks(device):
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto", backend="cuda").to(device)
    x = torch.randn(2, 8, 4, 5, device=device, requires_grad=True)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(grad, wanted)


def test_more_branches_than_a_launch_can_take_are_refused(machine):
    weights = [torch.randn(1, 1, 1, 1) for _ in range(17)]
    with pytest.raises(RuntimeError, match="17 branches, at most 16"):
        functional.multi_scale_conv2d(torch.randn(1, 17, 2, 2), weights, [1] * 17, backend="cuda")


def test_what_does_not_fit_is_refused_by_the_operator(machine):
    weights = [torch.randn(1, 1, 201, 201)]
    with pytest.raises(RuntimeError, match=r"101 x 101 is wider .* not one channel"):
        functional.multi_scale_conv2d(torch.randn(1, 1, 101, 101), weights, [1], backend="cuda")


@pytest.mark.parametrize("wrong", [-1, 10**6])
@pytest.mark.parametrize("repeats", [1, 30])
def test_wrong_indices_of_a_direct_call_stay_in_the_map(machine, wrong, repeats):
    y, parameters = tied_case(torch.float32)
    y = y.repeat(1, 1, 1, repeats)
    arguments = [y.detach(), *(p.detach() for p in parameters)]
    _, *saved = torch.ops.mfef_ptx.dual_attention(*arguments, True)
    saved[2].fill_(wrong)
    saved[4].fill_(wrong)
    backward = torch.ops.mfef_ptx.dual_attention_backward
    for grad in backward(torch.ones_like(y), *arguments, *saved, True, True):
        assert grad.isfinite().all()
