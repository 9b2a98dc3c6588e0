"""The weight gradient in the backward's launch: where plans choose it, and what it computes. Maps
of a few channels, as most tests of this folder have them, go this way too; here the other way is
taken for them as well."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfef_ext import functional, reference
from mfef_ext.backends import cuda
from mfef_ext.problem import describe_multi_scale_conv2d
from tests.accuracy import Errors, check_block, largest, make_case, run_block
from tests.backends.cuda.test_plan import problem
from tests.backends.cuda.test_small_maps import DTYPES, EACH, LAYOUTS, MATRICES
from tests.drawing import DRAWN, blocks
from tests.ptx.cuda import A100, H200, SMALLEST

OPS = torch.ops.mfef_ptx


def plan_of(shape, dtype=torch.float32, split=True, limit=H200, **options) -> dict[str, object]:
    mode = "split" if split else "pyramid"
    return cuda.plan(problem(*shape, dtype=dtype, mode=mode, **options), limit)


# --- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [H200, A100, SMALLEST])
@pytest.mark.parametrize(
    "shape",
    [(128, 64, 8), (8, 64, 8), (1, 64, 8), (128, 32, 8), (64, 64, 7), (1024, 64, 2), (0, 64, 8)],
    ids=str,
)
def test_few_weights_need_two_launches(shape, limit, dtype):
    plan = plan_of(shape, dtype, limit=limit)
    assert plan["weights_in_backward"]
    kind, others = plan["backward_launches"]
    by_matrices = bool(plan["backward_tensor_core_branches"])
    assert kind == "Matrix" * by_matrices + "Backward" and others == "Sums"
    assert plan["weight_gradient_tensor_core_branches"] == []
    assert plan["weight_gradient_tiles"] == 0
    assert plan["weight_gradient_slices"] == max(plan["blocks"], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *((128, 128, 8), (128, 256, 8), (128, 132, 8), (128, 512, 2)),  # a copy of many weights
        *((1, 128, 8), (8, 256, 8)),  # one thread block for the products of a whole image
        (1024, 64, 8),  # many copies
        (128, 64, 12),  # rows of 16
    ],
    ids=str,
)
def test_many_weights_have_a_launch_of_their_own(shape, dtype):
    plan = plan_of(shape, dtype)
    assert plan["plan"] == "small-map" and not plan["weights_in_backward"]
    assert len(plan["backward_launches"]) == 3
    assert plan["backward_launches"][1].endswith("WeightGradient")
    assert plan["weight_gradient_tensor_core_branches"] == plan["backward_tensor_core_branches"]


def test_copies_of_weights_take_4_mib_at_most():
    weights = 4 * 16 * (16 * 9 + 4 * 25 + 2 * 49 + 81)
    largest_batch = (4 << 20) // weights
    chosen = [
        plan_of((n, 64, 8))["weights_in_backward"] for n in (largest_batch, largest_batch + 1)
    ]
    assert chosen == [True, False]


def test_a_convolution_alone_needs_two_launches_too():
    x = torch.empty(128, 64, 8, 8, device="meta")
    weights = [torch.empty(64, 8, 3, 3, device="meta")]
    plan = cuda.plan(describe_multi_scale_conv2d(x, weights, [8], True, None), H200)
    assert plan["weights_in_backward"] and plan["backward_launches"] == ["Backward", "Sums"]


def test_the_gradient_of_y_is_no_scratch_there():
    plan = plan_of((128, 64, 8))
    left = 128 * 4 * 16 * (16 * 9 + 4 * 25 + 2 * 49 + 81)
    assert left < plan["backward_scratch_bytes"] < left + 4 * 128 * 64 * 64
    assert plan_of((256, 64, 8))["backward_scratch_bytes"] > 4 * 256 * 64 * 64


# --- numbers ----------------------------------------------------------------------------------

# All kernel sizes, compiled and others, taps that never meet a pixel; every width of a row that
# has it; branches on tensor cores beside others; branches that add to the same channels; more items
# than threads and fewer.
SHAPES = [
    ((3, 64, 8, 8), {}),
    ((2, 24, 8, 8), {"groups": (1, 1, 1, 1)}),
    ((2, 36, 7, 5), {"kernel_sizes": (3, 9), "groups": (1, 18)}),
    ((2, 20, 6, 8), {"kernel_sizes": (5, 7), "split": False}),
    ((2, 8, 8, 7), {"kernel_sizes": (21, 3, 1, 11)}),
    ((3, 12, 9, 4), {"kernel_sizes": (9, 5, 13)}),
    ((2, 6, 40, 3), {"kernel_sizes": (3, 9)}),
    ((2, 8, 21, 7), {"kernel_sizes": (9, 3)}),  # chains that end within a map
    ((5, 12, 1, 1), {"kernel_sizes": (3, 1)}),
]


@pytest.mark.parametrize(("dtype", "layout"), EACH, ids=str)
@pytest.mark.parametrize(("shape", "options"), SHAPES, ids=str)
def test_gradients(device, dtype, layout, shape, options):
    assert plan_of(shape, dtype, **options)["weights_in_backward"]
    check_block(dtype, layout, backend="cuda", device=device, shape=shape, **options)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, LAYOUTS[0]), (torch.bfloat16, LAYOUTS[1])], ids=str
)
def test_gradients_of_several_images_in_a_thread_block(device, dtype, layout):
    """And of a last one that has fewer."""
    shape, options = (515, 4, 2, 3), {"kernel_sizes": (3, 5)}
    assert plan_of(shape, dtype, **options)["weights_in_backward"]
    check_block(dtype, layout, backend="cuda", device=device, shape=shape, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "sizes", "split"),
    [((5, 24, 6, 7), (3, 5, 7, 9), True), ((513, 4, 2, 2), (3, 5), False)],
    ids=str,
)
def test_gradients_of_a_convolution_alone(device, dtype, shape, sizes, split):
    """Where the backward has no attention: with a bias, and with all its gradients."""
    errors = Errors(dtype)
    for seed in range(3):
        case = make_case(shape, sizes, split=split, dtype=dtype, seed=seed)
        bias = torch.randn(sum(w.shape[0] for w in case.weights)).to(dtype)

        def run(f, d, where="cpu", case=case, bias=bias, **kw):
            b, at = bias.to(where, d).requires_grad_(), case.cast(d, where)
            out = f(at.x, at.weights, at.groups, at.split, b, **kw)
            return [g.cpu() for g in torch.autograd.grad(out, [at.x, *at.weights, b], at.grad)]

        wanted = run(reference.multi_scale_conv2d, torch.float64)
        got = run(functional.multi_scale_conv2d, dtype, device, backend="cuda")
        plain = run(reference.multi_scale_conv2d, dtype)
        names = ["x", *(f"weights[{i}]" for i in range(len(sizes))), "bias"]
        eager = [largest(p.double() - w) for p, w in zip(plain, wanted, strict=True)]
        errors.add(names, got, wanted, eager)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(DRAWN, max_examples=10)
@given(
    arguments=blocks([1, 2, 3, 5], 24, st.integers(1, 12), st.sampled_from([1, 2, 4, 5, 8])),
    layout=st.sampled_from(LAYOUTS),
)
def test_random_blocks_with_a_launch_of_their_own(machine, dtype, arguments, layout):
    """What has few weights is otherwise not computed that way."""
    machine.set(apart=True)
    check_block(dtype, layout, backend="cuda", **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "options"), MATRICES, ids=str)
def test_tensor_cores_with_a_launch_of_their_own(machine, dtype, shape, options):
    machine.set(apart=True)
    check_block(dtype, backend="cuda", shape=shape, **options)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", [(3, 24, 8, 8), (513, 8, 2, 2), (2, 9, 3, 7)], ids=str)
def test_both_ways_agree(machine, shape, split):
    """All but the weights' gradients to the last bit, those up to the order of their sums."""
    dtype = torch.float32
    case = make_case(shape, kernel_sizes=(3, 9, 11), split=split, dtype=dtype).cast(dtype)
    one = run_block(case, functional.mfef_block, backend="cuda")
    machine.set(apart=True)
    other = run_block(case, functional.mfef_block, backend="cuda")
    sums = range(2, 2 + len(case.weights))
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if i in sums:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shape", [(3, 24, 8, 8), (513, 8, 2, 2), (2, 9, 3, 7)], ids=str)
def test_threads_do_not_depend_on_one_another(machine, shape, split, dtype):
    """The same bits with the threads of every phase in descending order: no race; with and without
    an attention, and without the gradient of x."""
    options = {"kernel_sizes": (3, 9, 11), "split": split}
    assert plan_of(shape, dtype, **options)["weights_in_backward"]
    case = make_case(shape, dtype=dtype, **options).cast(dtype)
    weights = [w.detach() for w in case.weights]
    bias = torch.randn(sum(w.shape[0] for w in weights)).to(dtype)
    arguments = (case.grad, case.x.detach(), weights, case.groups, split, bias)

    def run():
        found = run_block(case, functional.mfef_block, backend="cuda")
        for need_x in (True, False):
            grad_x, grads, grad_bias = OPS.multi_scale_conv2d_backward(*arguments, need_x, True)
            found += [grad_x, *grads, grad_bias]
        return found

    ascending = run()
    machine.set(backwards=True)
    for a, b in zip(ascending, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3, 24, 8, 8), (513, 8, 2, 2)], ids=str)
def test_what_is_not_wanted_changes_nothing_else(machine, shape):
    case = make_case(shape, kernel_sizes=(3, 11), dtype=torch.float32).cast(torch.float32)
    x, weights = case.x.detach(), [w.detach() for w in case.weights]
    attention = [p.detach() for p in case.attention]
    _, *saved = OPS.mfef_block(x, weights, case.groups, True, *attention, True)

    def block(*needs):
        grad_x, grads, *others = OPS.mfef_block_backward(
            case.grad, x, weights, case.groups, True, *attention, *saved, *needs
        )
        return grad_x, [*grads, *others]

    def convolution(*needs):
        grad_x, grads, _ = OPS.multi_scale_conv2d_backward(
            case.grad, x, weights, case.groups, True, None, *needs
        )
        return grad_x, grads

    for backward in (block, convolution):
        grad_x, grads = backward(True, True)
        assert torch.equal(backward(True, False)[0], grad_x)
        for a, b in zip(backward(False, True)[1], grads, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("full", [3, 21])
def test_gradients_have_the_strides_of_the_weights(machine, full):
    """Though their elements are written in another order; taps that meet no pixel get zeros."""
    x, grad = torch.randn(2, 3, 8, 5, 5)
    weight = torch.randn(8, 4, full, full)
    results = []
    for layout in LAYOUTS:
        w = weight.contiguous(memory_format=layout)
        arguments = (grad, x, [w], [2], True, None, False, True)
        (found,) = OPS.multi_scale_conv2d_backward(*arguments)[1]
        assert found.stride() == w.stride()
        results.append(found)
    assert torch.equal(*results)
    if full == 21:
        assert not results[0][:, :, :6].any() and not results[0][..., -6:].any()
        assert results[0][:, :, 6:-6, 6:-6].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch_has_gradients_of_zero(device, dtype):
    assert plan_of((0, 8, 5, 4), dtype, kernel_sizes=(3, 5))["weights_in_backward"]
    case = make_case((0, 8, 5, 4), kernel_sizes=(3, 5), dtype=dtype).cast(dtype, device)
    for g in run_block(case, functional.mfef_block, backend="cuda")[2:]:
        assert not g.any()


def test_stages_of_weights_change_no_bit(machine):
    """x is in the place of the gradient of x while the first stage's weights are there already."""
    shape, options = (2, 112, 8, 8), {"kernel_sizes": (9, 9), "groups": (56, 56)}
    plans = [plan_of(shape, limit=limit, **options) for limit in (H200, SMALLEST)]
    assert [p["backward_stages"] for p in plans] == [1, 2]
    assert all(p["weights_in_backward"] for p in plans)
    case = make_case(shape, dtype=torch.float32, **options).cast(torch.float32)
    wanted = run_block(case, functional.mfef_block, backend="cuda")
    machine.set(shared_limit=SMALLEST)
    for a, b in zip(wanted, run_block(case, functional.mfef_block, backend="cuda"), strict=True):
        assert torch.equal(a, b)


def test_an_image_that_does_not_fit_goes_as_large_maps_do(machine):
    """It takes no shared memory of its own: where the backward's launch has room for an image it
    has room for x, else there is no such launch."""
    shape, options = (2, 176, 8, 8), {"kernel_sizes": (3,), "groups": (176,)}
    assert plan_of(shape, **options)["weights_in_backward"]
    plan = plan_of(shape, limit=SMALLEST, **options)
    assert plan["plan"] == "large-map" and not plan["weights_in_backward"]
    assert plan["backward_launches"][-2:] == ["LargeWeightGradient", "Sums"]
    machine.set(shared_limit=SMALLEST)
    check_block(torch.float32, backend="cuda", shape=shape, **options)
