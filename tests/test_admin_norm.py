"""ADMIN's residual block: every backend against the definition in float64."""

import warnings

import pytest
import torch
from helpers import TOLERANCE, relative_error, saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import repdeg_fast
from repdeg_fast import AdminNorm, _recoverable, admin_norm, backends
from repdeg_fast.ops.admin_norm import admin_norm as operator
from repdeg_fast.ops.admin_norm import operation
from repdeg_fast.reference import admin_norm as definition
from repdeg_fast.reference import philox

PARAMETERS = ("omega", "weight", "bias", "branch_bias")
SHAPES = [(1, 1), (4, 2), (5, 7), (13, 96), (2, 3, 768)]
LONG_ROWS = [2056, 4360, 8712]  # each takes another way on some backend: more values a thread, or rows read twice
MODES = [  # norm, dropout, save
    ("layer", 0.0, "output"),
    ("layer", 0.3, "input"),
    ("rms", 0.3, "output"),
    ("rms", 0.0, "input"),
]
SEED = 0x1234567890


def inputs(*shape, dtype=torch.float32, device="cpu", absent=()):
    """x, branch and the four parameters, away from zero where save="output" divides by them; all want gradients."""
    d = shape[-1]
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "x": torch.randn(shape, dtype=torch.float64) + 0.5,
        "branch": torch.randn(shape, dtype=torch.float64),
        "omega": torch.rand(d, dtype=torch.float64) + 0.5,
        "weight": (torch.rand(d, dtype=torch.float64) + 0.5) * (torch.rand(d) - 0.3).sign(),
        "bias": torch.randn(d, dtype=torch.float64) / 2,
        "branch_bias": torch.randn(d, dtype=torch.float64),
    }
    dtypes = dict.fromkeys(PARAMETERS, parameter_dtype)
    return {
        name: value.to(device, dtypes.get(name, dtype)).requires_grad_()
        for name, value in made.items()
        if name not in absent
    }


def keep_of(shape, dropout, seed=SEED):
    """What dropout multiplies the branch by, in float64."""
    if dropout == 0:
        return None
    rows, d = torch.Size(shape[:-1]).numel(), shape[-1]
    mask = philox.dropout_mask(torch.tensor([seed]), range(rows), range(d), dropout)
    return mask.double().reshape(shape) / (1 - dropout)


def expected(tensors, upstream, norm="layer", dropout=0.0, seed=SEED, eps=1e-5):
    """y and the gradients from the definition, in float64 on the CPU."""
    leaves = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}
    keep = keep_of(leaves["x"].shape, dropout, seed)
    y = definition.admin_norm(**leaves, keep=keep, norm=norm, eps=eps)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.cpu().double())
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def actual(tensors, upstream, **options):
    y = admin_norm(**tensors, **options)
    return y, dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), upstream), strict=True))


def assert_matches(tensors, norm="layer", dropout=0.0, **options):
    x = tensors["x"]
    upstream = torch.randn(x.shape, dtype=torch.float64).to(x)
    true_y, true_gradients = expected(tensors, upstream, norm, dropout)
    y, gradients = actual(tensors, upstream, norm=norm, dropout=dropout, seed=SEED, **options)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert relative_error(y, true_y) <= TOLERANCE[x.dtype]
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype, name
        error = relative_error(gradient, true_gradients[name])
        if x.shape[-1] <= 2:  # n is ±1 or 0 whatever z is: gradients cancel to about eps, and rounding is what is left
            error = min(error, (gradient.cpu() - true_gradients[name]).norm().item() / 1e-5**-0.5)  # 1/σ, at most
        assert error <= TOLERANCE[x.dtype], (name, x.dtype, error)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(place, shape, mode):
    norm, dropout, save = mode
    for dtype in place.dtypes():
        tensors = inputs(*shape, dtype=dtype, device=place.device)
        place.skip_unless_served(operation, tensors["x"].detach().reshape(-1, shape[-1]))
        assert_matches(tensors, norm, dropout, save=save)


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
@pytest.mark.parametrize("d", LONG_ROWS)
def test_long_rows(place, d, mode):
    norm, dropout, save = mode
    for dtype in place.dtypes()[: 1 if place.backend == "triton" else None]:  # the interpreter is slow
        assert_matches(inputs(2, d, dtype=dtype, device=place.device), norm, dropout, save=save)


@pytest.mark.parametrize("absent", [PARAMETERS, ("omega",), ("weight",), ("bias",), ("branch_bias",)], ids=str)
@pytest.mark.parametrize("save", ["output", "input"])
def test_absent_parameters(place, absent, save):
    tensors = inputs(9, 64, device=place.device, absent=absent)
    assert_matches(tensors, save=save)
    assert_matches(tensors, "rms", 0.2, save=save)


@pytest.mark.parametrize("kind", ["number", "0-d", "1-d"])
def test_one_omega_for_all_columns(place, kind):
    tensors = inputs(9, 64, device=place.device, absent=("omega",))
    shape = (1,) if kind == "1-d" else ()
    spread = dict(tensors, omega=torch.full((64,), 0.75, device=place.device, requires_grad=True))
    upstream = torch.randn(9, 64, device=place.device)
    true_y, true_gradients = expected(spread, upstream)
    if kind == "number":
        assert relative_error(admin_norm(**tensors, omega=0.75), true_y) <= 1e-5
        return
    tensors["omega"] = torch.full(shape, 0.75, device=place.device, requires_grad=True)
    y, gradients = actual(tensors, upstream)
    assert relative_error(y, true_y) <= 1e-5
    assert relative_error(gradients["omega"], true_gradients["omega"].sum().reshape(shape)) <= 1e-5


@pytest.mark.parametrize("view", ["rows apart", "values apart", "batch last", "expanded upstream"])
def test_strides(place, view):
    base = torch.randn(2, 8, 12, 192, device=place.device)
    x, branch = {
        "rows apart": (base[0, ..., :96], base[1, ..., 96:]),
        "values apart": (base[0, ..., ::2], base[1].transpose(0, 2)[:96].permute(2, 1, 0)),
        "batch last": (base[0].transpose(0, 1), base[1].transpose(0, 1)),
        "expanded upstream": (base[0], base[1]),
    }[view]
    tensors = inputs(*x.shape, device=place.device) | {"x": x.requires_grad_(), "branch": branch.requires_grad_()}
    upstream = torch.randn(x.shape, device=place.device)
    upstream = upstream[..., :1].expand(x.shape) if view == "expanded upstream" else upstream
    true_y, true_gradients = expected(tensors, upstream)
    y, gradients = actual(tensors, upstream)
    assert relative_error(y, true_y) <= 1e-5
    assert max(relative_error(gradients[name], true_gradients[name]) for name in tensors) <= 1e-5


def test_parameters_that_are_views_into_a_flat_buffer(place):
    tensors = inputs(6, 64, device=place.device)
    flat = torch.rand(4 * 64 + 1, device=place.device) + 0.5
    views = flat[1:].view(4, 64)
    assert_matches(
        tensors | {name: view.detach().requires_grad_() for name, view in zip(PARAMETERS, views, strict=True)}
    )


def test_the_mask_is_philox(place):
    """The branch's gradient is zero exactly where the reference's mask drops, beyond the first rows and columns too."""
    tensors = inputs(70, 104, device=place.device)
    for seed in (SEED, -SEED, torch.tensor([SEED], device=place.device)):
        number = seed.item() if isinstance(seed, torch.Tensor) else seed
        _, gradients = actual(tensors, torch.randn(70, 104, device=place.device), dropout=0.4, seed=seed)
        dropped = keep_of((70, 104), 0.4, number) == 0
        assert torch.equal(gradients["branch"].cpu() == 0, dropped)


def test_dropout_off(place):
    tensors = inputs(6, 32, device=place.device)
    y = admin_norm(**tensors)
    assert torch.equal(admin_norm(**tensors, dropout=0.5, training=False, seed=1), y)
    assert not torch.equal(admin_norm(**tensors, dropout=0.5, seed=1), y)


def test_seeds_drawn_from_torchs_generator():
    tensors = inputs(6, 32)
    torch.manual_seed(3)
    first, second = (admin_norm(**tensors, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(admin_norm(**tensors, dropout=0.5), first)
    assert not torch.equal(first, second)


def test_same_bits_twice(place):
    tensors = inputs(130, 96, device=place.device)
    upstream = torch.randn(130, 96, device=place.device)
    for save in ("output", "input"):
        (y, gradients), (again, gradients_again) = (
            actual(tensors, upstream, dropout=0.1, seed=5, save=save) for _ in range(2)
        )
        assert torch.equal(y, again)
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in tensors)


def test_bits_do_not_depend_on_threads():
    tensors, upstream = inputs(3000, 65), torch.randn(3000, 65)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with repdeg_fast.use_backend("cpu"):
            y, gradients = actual(tensors, upstream, dropout=0.1, seed=5)
        results.append([y, *gradients.values()])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_not_masked(place, bad):
    for name in ("x", "branch"):
        tensors = inputs(6, 64, device=place.device)
        tensors[name].data[2, 5] = bad
        y, gradients = actual(tensors, torch.randn(6, 64, device=place.device))
        assert y[2].isnan().any()
        assert gradients["x"][2].isnan().any()
        assert y[[0, 1, 3, 4, 5]].isfinite().all()
        assert gradients["x"][[0, 1, 3, 4, 5]].isfinite().all()


def test_a_row_far_from_zero_keeps_its_variance(place):
    """Σz² − (Σz)²/d would lose all digits here. Also in rows that are merged from chunks."""
    for d in (768, 8712):
        tensors = inputs(3, d, device=place.device, absent=PARAMETERS)
        with torch.no_grad():
            tensors["x"] += 1000
        true_y, _ = expected(tensors, torch.zeros(3, d))
        assert relative_error(admin_norm(**tensors), true_y) <= 1e-4  # fp32 holds z itself to 6e-5


def test_no_rows(place):
    tensors = inputs(0, 64, device=place.device)
    y, gradients = actual(tensors, torch.zeros(0, 64, device=place.device), dropout=0.1)
    assert y.shape == (0, 64)
    assert gradients["x"].shape == (0, 64)
    assert not any(gradients[name].any() for name in PARAMETERS)


@settings(max_examples=25, deadline=None)
@given(
    leading=st.lists(st.integers(1, 6), max_size=3),
    d=st.integers(3, 70),
    mode=st.sampled_from(MODES),
    absent=st.sets(st.sampled_from(PARAMETERS)),
    seed=st.integers(0, 2**16),
)
def test_any_shape(leading, d, mode, absent, seed):
    torch.manual_seed(seed)
    norm, dropout, save = mode
    with repdeg_fast.use_backend("cpu"):
        assert_matches(inputs(*leading, d, dtype=torch.float64, absent=absent), norm, dropout, save=save)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, mode):
    norm, dropout, save = mode
    tensors = inputs(3, 5, dtype=torch.float64)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return admin_norm(**named, norm=norm, dropout=dropout, save=save, seed=SEED)

    with repdeg_fast.use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("save_input", [False, True])
def test_opcheck(save_input):
    tensors = inputs(4, 6)
    seed = torch.tensor([3])
    torch.library.opcheck(operator, (*tensors.values(), seed, 0.2, 1e-5, True, save_input, "auto"))
    none = (None,) * 5
    torch.library.opcheck(operator, (tensors["x"], tensors["branch"], *none, 0.0, 1e-5, False, save_input, "auto"))


@pytest.mark.parametrize("save", ["auto", "input"])
def test_compiles_as_one_graph(save):
    module = AdminNorm(24, dropout=0.2, save=save)
    x, branch, seed = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 24), torch.tensor([7])
    step = lambda x, seed: module(x.tanh(), branch, seed=seed).sin()  # noqa: E731
    step(x, seed).square().sum().backward()
    eager, x.grad = x.grad, None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, seed).square().sum().backward()
    assert relative_error(x.grad, eager) <= 1e-6


def test_compiles_with_parameters_made_in_the_graph():
    x, branch, weight = torch.randn(4, 24), torch.randn(4, 24), torch.randn(24, requires_grad=True)
    step = lambda weight: admin_norm(x, branch, weight=2 + weight.tanh())  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(weight).square().sum(), weight)
    (eager,) = torch.autograd.grad(step(weight).square().sum(), weight)
    assert relative_error(gradient, eager) <= 1e-6


def test_exports():
    module, x, branch = AdminNorm(24), torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    exported = torch.export.export(module, (x, branch)).module()
    assert torch.equal(exported(x, branch), module(x, branch))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [None, SEED, torch.tensor([SEED])], ids=["drawn", "int", "tensor"])
def test_checkpointing_replays_the_mask(reentrant, given):
    tensors = inputs(8, 48)

    def block(x, branch):
        return admin_norm(x, branch, tensors["omega"], dropout=0.5, seed=given)

    results = []
    for run in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=reentrant)):
        x, branch = (tensors[name].detach().requires_grad_() for name in ("x", "branch"))
        torch.manual_seed(11)
        y = run(x, branch)
        y.square().sum().backward()
        results.append((y, x.grad, branch.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    """Activations go to autocast's dtype, parameters stay; the arithmetic inside is fp32."""
    tensors = inputs(8, 64)
    halved = {**tensors, "branch": tensors["branch"].detach().bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = admin_norm(**halved)
        double = admin_norm(**inputs(2, 8, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    y.float().square().sum().backward()
    assert tensors["x"].grad.dtype == torch.float32
    assert relative_error(y, expected(tensors, torch.zeros(8, 64))[0]) <= 1e-2


def test_parameters_in_the_dtype_of_the_activations():
    tensors = inputs(8, 64, dtype=torch.bfloat16)
    tensors |= {name: tensors[name].detach().bfloat16().requires_grad_() for name in PARAMETERS}
    assert_matches(tensors)


def test_second_derivative_is_a_clear_error():
    tensors = inputs(4, 8)
    (grad,) = torch.autograd.grad(admin_norm(**tensors).sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="admin_norm has no second derivative"):
        grad.sum().backward()


def test_follows_the_backend_of_its_forward_pass():
    tensors = inputs(4, 8, dtype=torch.float64)
    with repdeg_fast.use_backend("reference"):
        y = admin_norm(**tensors)
    with repdeg_fast.use_backend("triton"):  # cannot take float64, and must not be asked
        y.sum().backward()
    assert tensors["x"].grad is not None


class TestWhatIsKept:
    n, d = 200, 96

    def saved(self, absent=(), **options):
        """Bytes kept for backward beside x, the parameters, the output and a given seed."""
        tensors = inputs(self.n, self.d, dtype=torch.bfloat16, absent=absent)
        seed = torch.tensor([1])
        known = [tensor for name, tensor in tensors.items() if name != "branch"]
        outputs = []
        total = saved_bytes(lambda: outputs.append(admin_norm(**tensors, seed=seed, **options)), *known, seed)
        kept_output = options.get("save") != "input"
        return total - (outputs[0].nbytes if kept_output else 0)

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    @pytest.mark.parametrize("absent", [(), PARAMETERS], ids=["parameters", "none"])
    def test_output(self, dropout, absent):
        assert self.saved(absent, dropout=dropout, save="output") == 4 * self.n

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_input(self, dropout):
        branch = 2 * self.n * self.d
        assert self.saved(dropout=dropout, save="input") == branch + 8 * self.n

    def test_auto_is_output_unless_a_weight_is_near_zero(self):
        assert self.saved() == 4 * self.n

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_limit_of_what_is_taken_back_from_the_output(self, dtype):
        """Every column as bad as is allowed still meets the tolerance; that of the smallest ratio is sharp."""
        ratio = _recoverable.SMALLEST_RATIO[dtype]
        tensors = inputs(400, 96, dtype=dtype)
        with torch.no_grad():
            tensors["weight"].copy_(ratio * tensors["bias"].abs().clamp_min(2.0**-8))
        assert _recoverable.smallest_ratio(tensors["weight"], tensors["bias"]) == pytest.approx(ratio)
        assert_matches(tensors, save="output")
        tensors["weight"].data[7] *= 0.99
        with pytest.raises(ValueError, match=r"save: weight has an entry near zero: .*save=\"input\""):
            admin_norm(**tensors, save="output")

    def test_auto_switches_and_says_so_once(self):
        tensors = inputs(50, 96)
        backends.announce.cache_clear()
        for entry in (0.0, 1e-9, float("nan")):
            tensors["weight"].data[5] = 1.0
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                admin_norm(**tensors)
            tensors["weight"].data[5] = entry
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                total = saved_bytes(lambda: admin_norm(**tensors), *tensors.values())
            assert [str(w.message).split(":")[0] for w in caught] == ["repdeg_fast"] * (entry == 0)
            assert total == 8 * 50  # x and the branch are the caller's
        tensors["weight"].data[5] = 0
        assert_matches(tensors)

    def test_no_look_without_gradients(self):
        tensors = inputs(5, 8)
        tensors["weight"].data[0] = 0
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            admin_norm(**tensors, save="output")

    def test_a_zero_weight_met_by_a_traced_graph_is_survived(self):
        """A compiled graph keeps save="output"; a weight that becomes 0 then spoils its own gradient alone."""
        tensors = inputs(20, 16)
        tensors["weight"].data[3] = 0
        upstream = torch.randn(20, 16)
        _, true_gradients = expected(tensors, upstream)
        for backend in ("reference", "cpu"):
            y, *_ = operator(*tensors.values(), None, 0.0, 1e-5, True, False, backend)
            gradients = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), upstream), strict=True))
            assert all(gradient.isfinite().all() for gradient in gradients.values())
            others = [column for column in range(16) if column != 3]
            assert relative_error(gradients["weight"][others], true_gradients["weight"][others]) <= 1e-5
            assert relative_error(gradients["x"][:, others], true_gradients["x"][:, others]) <= 1e-5


class TestModule:
    def test_is_the_function(self, place):
        module = AdminNorm(64, omega=1.5, dropout=0.2, eps=1e-3, branch_bias=True, device=place.device)
        x, branch = torch.randn(2, 3, 64, device=place.device), torch.randn(2, 3, 64, device=place.device)
        parameters = dict(module.named_parameters())
        assert set(parameters) == set(PARAMETERS)
        assert (module.omega == 1.5).all()
        y = admin_norm(x, branch, **parameters, dropout=0.2, eps=1e-3, seed=4)
        assert torch.equal(module(x, branch, seed=4), y)
        module.eval()
        assert torch.equal(module(x, branch), admin_norm(x, branch, **parameters, eps=1e-3))

    def test_is_layer_norm_at_the_start(self):
        x, branch = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
        torch.testing.assert_close(AdminNorm(64)(x, branch), torch.nn.LayerNorm(64)(x + branch))
        torch.testing.assert_close(AdminNorm(64, norm="rms")(x, branch), torch.nn.RMSNorm(64, eps=1e-5)(x + branch))

    def test_options(self):
        names = lambda **options: {name for name, _ in AdminNorm(8, **options).named_parameters()}  # noqa: E731
        assert names() == {"omega", "weight", "bias"}
        assert names(bias=False) == names(norm="rms") == {"omega", "weight"}
        assert names(elementwise_affine=False) == {"omega"}
        assert "dropout=0.1" in repr(AdminNorm(8, dropout=0.1))
        assert AdminNorm(8, dtype=torch.bfloat16).omega.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"normalized_shape": 0}, "normalized_shape: .*got 0"),
            ({"normalized_shape": (8,)}, r"normalized_shape: .*got \(8,\)"),
            ({"dropout": 1.0}, "dropout: .*got 1.0"),
            ({"norm": "batch"}, "norm: expected one of 'layer', 'rms', got 'batch'"),
            ({"save": "none"}, "save: expected one of 'auto', 'output', 'input', got 'none'"),
            ({"eps": -1.0}, "eps: .*got -1.0"),
            ({"omega": float("nan")}, "omega: .*got nan"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            AdminNorm(**{"normalized_shape": 8, **options})
        with pytest.raises(TypeError, match="omega: expected a number, got Tensor"):
            AdminNorm(8, torch.ones(8))


def ones(*shape, **options):
    return torch.ones(shape, **options)


def nested():
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": ones(4, 3, dtype=torch.int64)}, TypeError, "x: .*torch.int64"),
        ({"x": ones()}, ValueError, r"x: expected shape \(..., d\)"),
        ({"x": ones(4, 0)}, ValueError, r"x: expected shape \(..., d\)"),
        ({"branch": ones(3, 4)}, ValueError, r"branch: expected shape \(4, 3\) like x, got \(3, 4\)"),
        ({"branch": ones(4, 3).bfloat16()}, TypeError, r"branch: expected torch.float32 like x, got torch.bfloat16"),
        ({"branch": ones(4, 3, device="meta")}, ValueError, "branch: expected device cpu like x, got meta"),
        ({"omega": ones(4)}, ValueError, r"omega: expected shape \(3,\).*got \(4,\)"),
        ({"omega": "1"}, TypeError, "omega: .*got '1'"),
        ({"omega": float("nan")}, TypeError, "omega: .*got nan"),
        ({"omega": ones(3).double()}, TypeError, "omega: expected torch.float32 for x of torch.float32"),
        ({"weight": ones(3, 1)}, ValueError, r"weight: expected shape \(3,\)"),
        ({"weight": ones(3).bfloat16()}, TypeError, "weight: expected torch.float32"),
        ({"bias": ones(2)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"bias": ones(3, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"branch_bias": ones(1)}, ValueError, r"branch_bias: expected shape \(3,\)"),
        ({"dropout": 1.0}, ValueError, r"dropout: .*\[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: .*got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout: .*got nan"),
        ({"dropout": None}, TypeError, "dropout: expected a number, got NoneType"),
        ({"x": nested()}, ValueError, r"x: expected a dense tensor, got a nested one; call .to_padded_tensor"),
        ({"eps": 0.0}, ValueError, "eps: .*got 0"),
        ({"norm": "Layer"}, ValueError, "norm: expected one of 'layer', 'rms', got 'Layer'"),
        ({"save": "both"}, ValueError, "save: expected one of 'auto', 'output', 'input', got 'both'"),
        ({"dropout": 0.1, "seed": 1.5}, TypeError, "seed: expected an int"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, ValueError, "seed: expected one element"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        admin_norm(**{"x": ones(4, 3), "branch": ones(4, 3), **arguments})


@pytest.mark.gpu
def test_cuda_graph_replays_with_another_seed(place):
    tensors = inputs(300, 256, dtype=torch.bfloat16, device=place.device)
    seed, upstream = torch.tensor([1], device="cuda"), torch.randn(300, 256, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual(tensors, upstream, dropout=0.1, seed=seed)  # compiles and looks at the parameters
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = actual(tensors, upstream, dropout=0.1, seed=seed)
    seed.fill_(SEED)
    graph.replay()
    true_y, true_gradients = expected(tensors, upstream, dropout=0.1)
    assert relative_error(y, true_y) <= 1e-2
    assert all(relative_error(gradients[name], true_gradients[name]) <= 1e-2 for name in tensors)


@pytest.mark.gpu
def test_auto_sees_a_weight_near_zero_without_waiting():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    tensors = inputs(40, 64, device="cuda")
    assert _recoverable.smallest_ratio(tensors["weight"], tensors["bias"]) > 0
    with torch.no_grad():
        tensors["weight"][5] = 0
    for _ in range(40):
        with torch.no_grad():
            tensors["weight"].add_(0)  # an update
        admin_norm(**tensors)
        torch.cuda.synchronize()
    assert saved_bytes(lambda: admin_norm(**tensors), *tensors.values()) == 8 * 40


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(place):
    if place.device == "cpu":
        pytest.skip("the CPU's rows use the same 64-bit offsets; this needs 30 GB")
    n, d = 2**19 + 3, 4096
    x = torch.zeros(n, d, device="cuda", dtype=torch.bfloat16)
    x[-1, 0] = 1
    y = admin_norm(x, x)
    true_y = definition.admin_norm(x[-1:].double(), x[-1:].double())
    assert relative_error(y[-1:], true_y) <= 1e-2
    assert not y[:-1].any()
