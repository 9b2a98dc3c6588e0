"""gradcheck, opcheck, torch.compile, autocast, double backward, torch.func."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from mfef_ext import _C, functional, use_backend
from mfef_ext.modules import MFEFBlock
from mfef_ext.ops import OPERATORS
from tests.accuracy import make_case

OPS = torch.ops.mfef


def block_arguments(
    dtype, layout=torch.contiguous_format, shape=(3, 8, 4, 5), save=True, grad=True
):
    case = make_case(shape, kernel_sizes=(3, 5), dtype=dtype).cast(dtype)
    if not grad:
        for leaf in case.leaves():
            leaf.requires_grad_(False)
    x = case.x.detach().contiguous(memory_format=layout).requires_grad_(grad)
    return x, case.weights, case.groups, case.attention, save


@pytest.mark.parametrize("split", [True, False])
def test_gradcheck_multi_scale_conv2d(engine, split):
    case = make_case((2, 4, 3, 4), kernel_sizes=(3, 5), split=split).cast(torch.float64)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x, b, *weights):
        return functional.multi_scale_conv2d(x, list(weights), case.groups, split, b, backend="cpu")

    assert torch.autograd.gradcheck(f, (case.x, bias, *case.weights))


def test_gradcheck_dual_attention(engine):
    case = make_case((2, 4, 3, 4), kernel_sizes=(3,), spatial_kernel_size=3, reduction=2)
    case = case.cast(torch.float64)

    def f(y, *parameters):
        return functional.dual_attention(y, *parameters, backend="cpu")

    assert torch.autograd.gradcheck(f, (case.x, *case.attention))


def test_gradcheck_block(engine):
    case = make_case((2, 4, 3, 4), kernel_sizes=(3, 5), spatial_kernel_size=3, reduction=2)
    case = case.cast(torch.float64)

    def f(x, w0, w1, *parameters):
        return functional.mfef_block(x, [w0, w1], case.groups, *parameters, backend="cpu")

    assert torch.autograd.gradcheck(f, (case.x, *case.weights, *case.attention))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, layout, grad):
    x, weights, groups, attention, _ = block_arguments(dtype, layout, grad=grad)
    bias = torch.randn(8).to(dtype).requires_grad_(grad)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.float32:
        tests += ("test_aot_dispatch_dynamic",)
    for name, arguments in (
        ("multi_scale_conv2d", (x, weights, groups, True, bias)),
        ("multi_scale_conv2d", (x, weights, groups, True, None)),
        ("dual_attention", (x, *attention, True)),
        ("mfef_block", (x, weights, groups, True, *attention, True)),
        ("mfef_block", (x.detach(), weights, groups, True, *attention, grad)),
    ):
        torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_parameters", [False, True])
def test_opcheck_of_the_backwards(layout, need_x, need_parameters):
    x, weights, groups, attention, _ = block_arguments(torch.float32, layout, grad=False)
    grad = torch.randn_like(x)
    tests = ("test_schema", "test_faketensor")
    needs = (need_x, need_parameters)
    torch.library.opcheck(
        OPS.multi_scale_conv2d_backward.default,
        (grad, x, weights, groups, True, torch.randn(8), *needs),
        test_utils=tests,
    )
    _, *saved = OPS.dual_attention(x, *attention, True)
    torch.library.opcheck(
        OPS.dual_attention_backward.default,
        (grad, x, *attention, *saved, *needs),
        test_utils=tests,
    )
    _, *saved = OPS.mfef_block(x, weights, groups, True, *attention, True)
    torch.library.opcheck(
        OPS.mfef_block_backward.default,
        (grad, x, weights, groups, True, *attention, *saved, *needs),
        test_utils=tests,
    )


@pytest.mark.parametrize("mode", ["split", "pyramid", "hierarchical"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compile_without_graph_breaks(mode, layout):
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = MFEFBlock(16, kernel_sizes=(3, 5), groups="auto", mode=mode)
    x = torch.randn(3, 16, 6, 6).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(3, 16, 6, 6)
    leaves = [x, *block.parameters()]
    eager = block(x)
    compiled = torch.compile(block, fullgraph=True)(x)
    assert compiled.stride() == eager.stride()
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(compiled, leaves, grad),
        torch.autograd.grad(eager, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compile_with_dynamic_batch():
    torch._dynamo.reset()
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto")
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for n in (2, 5, 17):
        x = torch.randn(n, 8, 6, 6)
        assert torch.equal(compiled(x), block(x))


def test_compile_sees_a_forced_backend():
    torch._dynamo.reset()
    block = MFEFBlock(8, kernel_sizes=(3, 5), groups="auto").double()
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    native = compiled(x)
    with use_backend("reference"):
        plain = compiled(x)
    torch.testing.assert_close(native, plain)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_compile_under_autocast(inside):
    torch._dynamo.reset()
    block = MFEFBlock(16, kernel_sizes=(3, 5), groups="auto")
    x = torch.randn(4, 16, 6, 6, requires_grad=True)

    def cast(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    if inside:
        out = torch.compile(cast, fullgraph=True, backend="aot_eager")(block)
    else:
        out = cast(torch.compile(block, fullgraph=True, backend="aot_eager"))
    eager = cast(block)
    assert out.dtype == torch.bfloat16 and torch.equal(out, eager)
    grads = (torch.autograd.grad(y.float().sum(), [x, *block.parameters()]) for y in (out, eager))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """bfloat16 runs natively; float16 has no CPU kernel, and the automatic choice falls through."""
    block = MFEFBlock(16, kernel_sizes=(3, 5), groups="auto")
    x = torch.randn(4, 16, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
    assert (out.float() - block(x)).abs().max() < 0.05
    if dtype == torch.bfloat16:
        assert out.dtype == dtype
        low = MFEFBlock(16, kernel_sizes=(3, 5), groups="auto", dtype=dtype)
        low.load_state_dict(block.state_dict())
        assert torch.equal(low(x.to(dtype)), out)


def test_autocast_of_the_operators():
    x, weights, groups, attention, _ = block_arguments(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OPS.multi_scale_conv2d(x, weights, groups, True, None).dtype == torch.bfloat16
        assert OPS.dual_attention(x, *attention, False)[0].dtype == torch.bfloat16
        assert (
            OPS.mfef_block(x, weights, groups, True, *attention, False)[0].dtype == torch.bfloat16
        )
        double = [[w.detach().double() for w in weights], [a.detach().double() for a in attention]]
        out = OPS.mfef_block(x.double(), double[0], groups, True, *double[1], False)[0]
        assert out.dtype == torch.float64


def test_double_backward_is_refused_with_the_remedy(plan):
    x, weights, groups, attention, _ = block_arguments(torch.float64)
    for out in (
        functional.multi_scale_conv2d(x, weights, groups, backend="cpu"),
        functional.dual_attention(x, *attention, backend="cpu"),
        functional.mfef_block(x, weights, groups, *attention, backend="cpu"),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            grad.square().sum().backward()


def test_reference_differentiates_twice():
    x, weights, groups, attention, _ = block_arguments(torch.float64, shape=(1, 2, 3, 3))

    def f(x):
        return functional.mfef_block(x, weights, groups, *attention, backend="reference")

    assert torch.autograd.gradgradcheck(f, (x,))


def test_a_recorded_call_saves_whether_asked_to_or_not():
    x, weights, groups, attention, _ = block_arguments(torch.float32)
    for call in (
        lambda save: OPS.mfef_block(x, weights, groups, True, *attention, save)[0],
        lambda save: OPS.dual_attention(x, *attention, save)[0],
    ):
        asked, not_asked = (torch.autograd.grad(call(s).square().sum(), x) for s in (True, False))
        assert torch.equal(*asked, *not_asked)


def test_what_is_saved_for_backward():
    """x, the convolution's output, and nothing larger than (N, C) or (N, H, W)."""
    n, c, h, w = 4, 16, 6, 5
    block = MFEFBlock(c, kernel_sizes=(3, 5), groups="auto")
    x = torch.randn(n, c, h, w, requires_grad=True)
    sizes = []

    def pack(t):
        if not any(t is p for p in block.parameters()):
            sizes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    assert sorted(sizes).count((n, c, h, w)) == 2
    assert set(sizes) == {(n, c, h, w), (n, c), (n, h, w)}


def test_inference_saves_nothing():
    block = MFEFBlock(16, kernel_sizes=(3, 5), groups="auto")
    x = torch.randn(4, 16, 6, 5)
    with torch.no_grad():
        a = block.attention
        outputs = OPS.mfef_block(
            x,
            list(block.conv.weights),
            list(block.conv.groups),
            True,
            a.fc1_weight,
            a.fc1_bias,
            a.fc2_weight,
            a.fc2_bias,
            a.spatial_weight,
            False,
        )
    assert all(t.numel() == 0 for t in outputs[1:])


def test_only_the_first_result_has_a_gradient():
    x, weights, groups, attention, _ = block_arguments(torch.float32)
    for out, *others in (
        OPS.mfef_block(x, weights, groups, True, *attention, True),
        OPS.dual_attention(x, *attention, True),
    ):
        assert out.requires_grad
        assert not any(t.requires_grad for t in others)


def test_no_tree_is_walked(monkeypatch):
    """As torch.library.register_autograd would, for longer than the kernels take."""
    x, weights, groups, attention, _ = block_arguments(torch.float32)

    def refuse(*args, **kw):
        raise AssertionError("a tree of arguments is walked")

    monkeypatch.setattr("torch.utils._pytree.tree_flatten", refuse)
    monkeypatch.setattr("torch.utils._pytree.tree_unflatten", refuse)
    functional.multi_scale_conv2d(x, weights, groups, backend="cpu").sum().backward()
    functional.dual_attention(x, *attention, backend="cpu").sum().backward()
    functional.mfef_block(x, weights, groups, *attention, backend="cpu").sum().backward()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradients_of_the_raw_operators_for_one_input_only(wanted):
    """What needs a gradient is found wherever it stands, also inside the list of weights."""
    x, weights, groups, attention, _ = block_arguments(torch.float32, grad=False)
    bias = torch.randn(8)
    conv_leaf = {"x": x, "weight": weights[1], "bias": bias}[wanted]
    block_leaf = {"x": x, "weight": weights[1], "bias": attention[1]}[wanted]
    for leaf, call in (
        (conv_leaf, lambda: OPS.multi_scale_conv2d(x, weights, groups, True, bias)),
        (block_leaf, lambda: OPS.mfef_block(x, weights, groups, True, *attention, True)[0]),
    ):
        assert not call().requires_grad
        leaf.requires_grad_()
        (alone,) = torch.autograd.grad(call().square().sum(), leaf)
        everything = [x, *weights, bias, *attention]
        for t in everything:
            t.requires_grad_()
        (among_others,) = torch.autograd.grad(call().square().sum(), leaf)
        assert torch.equal(alone, among_others)
        for t in everything:
            t.requires_grad_(False)


# --- torch.func -------------------------------------------------------------------------------


def functions(backend):
    """Each operator of (x, weights, attention), and arguments of float64."""
    x, weights, groups, attention, _ = block_arguments(torch.float64, grad=False)
    bias = torch.randn(8, dtype=torch.float64)
    options = {"backend": backend}
    return {
        "multi_scale_conv2d": lambda x, w, a: functional.multi_scale_conv2d(
            x, w, groups, True, bias + 0 * a[1].sum(), **options
        ),
        "dual_attention": lambda x, w, a: functional.dual_attention(x, *a, **options),
        "mfef_block": lambda x, w, a: functional.mfef_block(x, w, groups, *a, **options),
    }, (x, weights, attention)


def twice(arguments):
    """A batch of two of all arguments, for vmap."""
    return tree_map(lambda t: torch.stack([t, t.flip(-1)]), arguments)


def total(f):
    return lambda *arguments: f(*arguments).square().sum()


TRANSFORMS = {
    "grad": lambda f, args: torch.func.grad(total(f), (0, 1, 2))(*args),
    "grad of x": lambda f, args: torch.func.grad(total(f))(*args),
    "grad under no_grad": lambda f, args: torch.no_grad()(torch.func.grad(total(f)))(*args),
    "vjp": lambda f, args: torch.func.vjp(f, *args)[1](args[0]),
    "grad of another level": lambda f, args: torch.func.grad(
        lambda x: torch.func.grad(lambda y: (f(x * 1, *args[1:]) * y).square().sum())(x.sum())
    )(args[0]),
    "vmap": lambda f, args: torch.vmap(f)(*twice(args)),
    "vmap of x": lambda f, args: torch.vmap(f, (0, None, None))(twice(args[0]), *args[1:]),
    "vmap of channels": lambda f, args: torch.vmap(lambda x: f(x, *args[1:]), 2, 1)(
        twice(args[0]).movedim(0, 2)
    ),
    "vmap of vmap": lambda f, args: torch.vmap(torch.vmap(f))(*twice(twice(args))),
    "vmap of another": lambda f, args: torch.vmap(lambda x: f(*args) * x)(twice(args[0])),
    "grad by example": lambda f, args: torch.vmap(torch.func.grad(total(f), (0, 1, 2)))(
        *twice(args)
    ),
    "grad of vmap": lambda f, args: torch.func.grad(total(torch.vmap(f)), (0, 1, 2))(*twice(args)),
    "jacrev": lambda f, args: torch.func.jacrev(lambda *a: f(*a).sum((1, 2, 3)), (0, 1))(*args),
    "jvp of another": lambda f, args: torch.func.jvp(
        lambda x: f(*args) * x, (args[0],), (args[0],)
    ),
    "functional_call": lambda f, args: torch.func.grad(
        lambda p, x: torch.func.functional_call(Wrapper(f, args), p, (x,)).square().sum()
    )({"spatial": args[2][4]}, args[0]),
}


class Wrapper(torch.nn.Module):
    def __init__(self, f, arguments):
        super().__init__()
        self.f, (_, self.weights, self.attention) = f, arguments
        self.spatial = torch.nn.Parameter(self.attention[4])

    def forward(self, x):
        return self.f(x, self.weights, [*self.attention[:4], self.spatial])


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform, op):
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        calls, arguments = functions(backend)
        results.append(tree_leaves(TRANSFORMS[transform](calls[op], arguments)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_vmap_of_nothing():
    x, weights, groups, attention, _ = block_arguments(torch.float32, grad=False)
    out = torch.vmap(lambda x: functional.mfef_block(x, weights, groups, *attention))(
        x.expand(0, *x.shape)
    )
    assert out.shape == (0, *x.shape)


def nested_grad(f, args):
    return torch.func.grad(lambda x: torch.func.grad(lambda y: total(f)(y, *args[1:]))(x).sum())(
        args[0]
    )


def outer_backward(f, args):
    x = args[0].requires_grad_()
    torch.func.grad(lambda x: total(f)(x, *args[1:]))(x).square().sum().backward()


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("call", [nested_grad, outer_backward])
def test_torch_func_differentiates_once(call, op):
    calls, arguments = functions("cpu")
    with pytest.raises(RuntimeError, match=f"^{op} cannot be differentiated twice.*reference"):
        call(calls[op], arguments)


def dual(f, args, requires_grad=False):
    x = args[0].requires_grad_(requires_grad)
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)), *args[1:])


def dual_of_a_weight(f, args):
    with forward_ad.dual_level():
        f(*tree_map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), args))


def dual_of_the_gradient(f, args):
    """Forward over reverse, where only what comes after the operator has a tangent."""
    x, one = args[0].requires_grad_(), torch.ones((), dtype=torch.float64)
    with forward_ad.dual_level():
        loss = total(f)(*args) * forward_ad.make_dual(one, one)
        torch.autograd.grad(loss, x)


FORWARD_MODE = {
    "jvp": lambda f, args: torch.func.jvp(lambda x: f(x, *args[1:]), (args[0],), (args[0],)),
    "jvp under no_grad": lambda f, args: torch.no_grad()(FORWARD_MODE["jvp"])(f, args),
    "jvp of parameters": lambda f, args: torch.func.jvp(
        lambda *rest: f(args[0], *rest), args[1:], args[1:]
    ),
    "linearize": lambda f, args: torch.func.linearize(lambda x: f(x, *args[1:]), args[0]),
    "jacfwd": lambda f, args: torch.func.jacfwd(f)(*args),
    "hessian": lambda f, args: torch.func.hessian(total(f))(*args),
    "jvp of grad": lambda f, args: torch.func.jvp(
        torch.func.grad(lambda x: total(f)(x, *args[1:])), (args[0],), (args[0],)
    ),
    "dual": dual,
    "dual that requires a gradient": lambda f, args: dual(f, args, True),
    "dual of parameters": dual_of_a_weight,
    "dual of the gradient": dual_of_the_gradient,
}


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_is_refused_with_the_remedy(mode, op):
    calls, arguments = functions("cpu")
    match = f'^{op} cannot be differentiated in forward mode.*use backend="reference"'
    with pytest.raises(RuntimeError, match=match):
        FORWARD_MODE[mode](calls[op], arguments)
    FORWARD_MODE[mode](functions("reference")[0][op], arguments)  # which can


def test_the_raw_operators_refuse_forward_mode_too():
    x, weights, groups, attention, _ = block_arguments(torch.float32, grad=False)
    for call in (
        lambda x: OPS.multi_scale_conv2d(x, weights, groups, True, None),
        lambda x: OPS.dual_attention(x, *attention, False)[0],
        lambda x: OPS.mfef_block(x, weights, groups, True, *attention, False)[0],
    ):
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(call, (x,), (x,))
        with forward_ad.dual_level():
            assert torch.equal(call(x), call(x))  # no tangent, no objection


def test_buffers_are_poisoned_in_these_tests():
    """The fixture works: without it the NaN checks of this suite would check nothing."""
    assert torch.empty(3).isnan().all()
    assert hasattr(_C, "poison_buffers")
