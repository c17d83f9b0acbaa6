"""ADMIN's initialization rules, the profile of a batch, and what the residual branches explain."""

import csv
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.analysis import plot_table, save_table
from repdeg_fast.nn import AdminEncoder, AdminEncoderLayer, AdminNorm, AdminTransformer
from repdeg_fast.nn.admin.init import deepnorm_constants
from repdeg_fast.nn.admin.profile import stack_of

D, N, M = 24, 3, 2
SIZES = {"d_model": D, "nhead": 4, "dim_feedforward": 40, "batch_first": True}


def build(dropout=0.0, **options):
    return AdminTransformer(num_encoder_layers=N, num_decoder_layers=M, dropout=dropout, **SIZES, **options)


def batch(rows=4):
    return 1.5 * torch.randn(rows, 6, D) + 0.3, torch.randn(rows, 5, D)


def omegas(model):
    return {name: module.omega for name, module in model.named_modules() if isinstance(module, AdminNorm)}


def by_hand(model, source, target):
    """Var(ω ⊙ x), Var f and ω by sub-layer, with the recursion written out (no dropout)."""
    expected = {}

    def block(stack, layer, number, x, branch):
        name = f"{stack}.{layer}.norm{number}"
        omega = math.sqrt(block.following.get(stack, 1.0))
        stream, own = (omega * x).double().var(correction=0).item(), branch.double().var(correction=0).item()
        expected[name] = stream, own, omega
        block.following[stack] = stream + own
        return F.layer_norm(omega * x + branch, (D,))

    block.following = {}
    x = source
    for place, layer in enumerate(model.encoder.layers):
        x = block("encoder.layers", place, 1, x, layer.self_attn(x, x, x, need_weights=False)[0])
        x = block("encoder.layers", place, 2, x, layer.linear2(layer.linear1(x).relu()))
    memory, x = model.encoder.norm(x), target
    for place, layer in enumerate(model.decoder.layers):
        x = block("decoder.layers", place, 1, x, layer.self_attn(x, x, x, need_weights=False)[0])
        x = block("decoder.layers", place, 2, x, layer.multihead_attn(x, memory, memory, need_weights=False)[0])
        x = block("decoder.layers", place, 3, x, layer.linear2(layer.linear1(x).relu()))
    return expected


@pytest.mark.parametrize("form", ["tuple", "list", "mapping"])
def test_profile_is_the_recursion(form):
    model, (source, target) = build(), batch()
    given = {"tuple": (source, target), "list": [source, target], "mapping": {"src": source, "tgt": target}}[form]
    table = repdeg_fast.initialize_admin_(model, given)
    with torch.no_grad():
        expected = by_hand(model, source, target)
    assert [row.name for row in table.records] == list(expected), "in the order of execution"
    for row in table.records:
        assert [row.stream_variance, row.branch_variance, row.omega] == pytest.approx(expected[row.name], rel=1e-5)
        assert torch.equal(omegas(model)[row.name], torch.full((D,), row.omega))
    firsts = [row for row in table.records if row.name.endswith(".0.norm1")]
    assert [row.omega for row in firsts] == [1.0, 1.0], "encoder and decoder each begin anew"


def test_profile_does_not_depend_on_the_omega_before():
    model, data = build(), batch()
    first = repdeg_fast.initialize_admin_(model, data)
    for omega in omegas(model).values():
        nn.init.uniform_(omega, 0.1, 9.0)
    assert repdeg_fast.initialize_admin_(model, data) == first


def test_profile_counts_dropout_and_bias_as_part_of_the_branch():
    """Against the variance over a million values of one mask."""
    torch.manual_seed(2)
    norm = AdminNorm(50, dropout=0.3, branch_bias=True)
    nn.init.normal_(norm.branch_bias)
    x, branch = torch.randn(20_000, 50), torch.randn(20_000, 50) + 0.5
    (row,) = repdeg_fast.initialize_admin_(norm, (x, branch)).records
    masked = F.dropout(branch + norm.branch_bias, 0.3)
    assert row.branch_variance == pytest.approx(masked.var().item(), rel=0.02)
    assert row.stream_variance == pytest.approx(x.var().item(), rel=1e-4)


def test_profile_of_a_compiled_model():
    """Also of one that has run: its compiled code knows no hooks."""
    model, data = build(), batch()
    compiled = torch.compile(model, backend="eager")
    compiled(*data)
    got = repdeg_fast.initialize_admin_(compiled, data)
    expected = repdeg_fast.initialize_admin_(model, data)
    assert [row.omega for row in got.records] == [row.omega for row in expected.records]


def test_profile_of_a_single_tensor_and_no_gradient():
    model = AdminEncoder(AdminEncoderLayer(dropout=0.1, **SIZES), 2)
    repdeg_fast.initialize_admin_(model, torch.randn(2, 5, D))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(omega.requires_grad for omega in omegas(model).values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def _profile_rank(rank, world, address, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.manual_seed(0)
    model, (source, target) = build(), batch(5)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)  # batches of different sizes
    table = repdeg_fast.initialize_admin_(model, (source[mine], target[mine]))
    save_table(table, f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


def test_profile_is_exact_under_data_parallel(tmp_path):
    address = f"file://{tmp_path}/store"
    torch.multiprocessing.spawn(_profile_rank, (2, address, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    torch.manual_seed(0)
    expected = repdeg_fast.initialize_admin_(build(), batch(5))
    for got, row in zip(ranks[0], expected.records, strict=True):
        assert got["name"] == row.name
        assert got["omega"] == pytest.approx(row.omega, rel=1e-6)
        assert got["branch_variance"] == pytest.approx(row.branch_variance, rel=1e-6)


@pytest.mark.parametrize("rule", ["O(logn)", "O(1)", "O(n)"])
def test_formula_rules_equal_admin_torch(rule):
    admin_torch = pytest.importorskip("admin_torch")
    model = build()
    table = repdeg_fast.initialize_admin_(model, rule=rule)
    assert len(table.records) == 2 * N + 3 * M
    for row in table.records:
        layers = 2 * N if row.stack == "encoder.layers" else 3 * M
        assert row.omega == admin_torch.calculate_init(layers, rule)
        assert torch.equal(omegas(model)[row.name], torch.full((D,), row.omega))
        assert row.branch_variance is None


def test_constant_omega_is_that_of_admin_torch():
    """Its default: ω is no parameter. Values, the other gradients and what is saved."""
    admin_torch = pytest.importorskip("admin_torch")
    model, (source, target) = build(), batch()
    table = repdeg_fast.initialize_admin_(model, rule="default", trainable=False)
    assert table.rule == "O(logn)"
    assert not any("omega" in name for name, _ in model.named_parameters())
    x, f = torch.randn(3, D), torch.randn(3, D)
    for name, norm in admin_norms(model).items():
        theirs = admin_torch.as_module(2 * N if name.startswith("encoder") else 3 * M)
        assert torch.equal(norm.omega, theirs.omega)  # (1,)
        torch.testing.assert_close(norm(x, f), norm_of(theirs(x, f), norm), rtol=1e-5, atol=1e-6)
    trained = build()
    trained.load_state_dict(model.state_dict() | {name: value.expand(D) for name, value in named_omegas(model).items()})
    results = [m(source, target).square().mean() for m in (model, trained)]
    assert torch.equal(*results)
    for result in results:
        result.backward()
    right = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name].grad, rtol=1e-5, atol=1e-7)
    again = build()
    repdeg_fast.initialize_admin_(again, rule="O(n)", trainable=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(source, target).square().mean(), results[0])
    plain = repdeg_fast.fold_admin(model.eval())
    torch.testing.assert_close(plain(source, target), model(source, target), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"trainable: .*since ω of encoder.layers.0.norm1 is a constant"):
        repdeg_fast.initialize_admin_(model, rule="O(1)", trainable=True)


def admin_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdminNorm)}


def named_omegas(model):
    return {f"{name}.omega": norm.omega for name, norm in admin_norms(model).items()}


def norm_of(stream, norm):
    return F.layer_norm(stream, (D,), norm.weight, norm.bias, norm.eps)


def test_a_constant_of_ones_own():
    norm = AdminNorm(8, omega=1.5, trainable_omega=False, dtype=torch.float64)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    assert norm.state_dict()["omega"].tolist() == [1.5]
    assert "trainable_omega=False" in repr(norm)
    x = torch.randn(2, 8).double().requires_grad_()
    norm(x, torch.zeros_like(x)).square().sum().backward()
    assert x.grad.isfinite().all()
    assert norm.omega.grad is None
    norm.fix_omega(2.0)
    assert norm.omega.tolist() == [2.0]
    norm.reset_parameters()
    assert norm.omega.tolist() == [1.5]


@pytest.mark.parametrize("layers", [1, 2, 12, 36, 120])
def test_formula_rules_at_many_depths(layers):
    admin_torch = pytest.importorskip("admin_torch")
    model = nn.ModuleList([AdminNorm(1) for _ in range(layers)])
    for rule in ("O(logn)", "O(1)", "O(n)"):
        row = repdeg_fast.initialize_admin_(model, rule=rule).records[-1]
        assert row.omega == admin_torch.calculate_init(layers, rule)


def test_deepnorm_constants():
    """Values worked out by hand from figure 2 of arXiv 2203.00555."""
    ((alpha, beta),) = deepnorm_constants(8, 0).values()  # 16^¼ and 64^−¼
    assert (alpha, beta) == pytest.approx((2.0, 0.35355339059))
    encoder, decoder = deepnorm_constants(2, 16).values()  # (2⁴·2⁴)^(1/16) = √2, 48^¼, 192^−¼
    assert encoder == pytest.approx((0.81 * 2**0.5, 0.87 / 2**0.5))
    assert decoder == pytest.approx((2.63214803, 0.26864248))


def test_deepnorm_rescales_the_weights_it_should():
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    repdeg_fast.initialize_admin_(model, rule="deepnorm")
    constants = dict(zip(("encoder", "decoder"), deepnorm_constants(N, M).values(), strict=True))
    for name, value in model.state_dict().items():
        alpha, beta = constants[name.split(".")[0]]
        if name.endswith("omega"):
            assert value == pytest.approx(alpha)
        elif name.endswith("in_proj_weight"):
            assert torch.equal(value[: 2 * D], before[name][: 2 * D]), "query and key"
            assert torch.equal(value[2 * D :], before[name][2 * D :] * beta)
        elif name.endswith(("linear1.weight", "linear2.weight", "out_proj.weight")):
            assert torch.equal(value, before[name] * beta)
        else:
            assert torch.equal(value, before[name])


def test_stacks():
    assert stack_of("encoder.layers.3.norm1") == "encoder.layers"
    assert stack_of("bert.encoder.layer.10.attention.output.LayerNorm") == "bert.encoder.layer"
    assert stack_of("0.norm1") == stack_of("1.norm2") == ""
    assert stack_of("norm1") == stack_of("") == ""
    assert stack_of("block.norm1") == "block"


def test_dependency_is_the_share_of_independent_branches():
    """A chain of branches that are independent noise: shares of the last output, measured by correlation."""

    class Chain(nn.Module):
        def __init__(self, scales):
            super().__init__()
            self.norms = nn.ModuleList([AdminNorm(64, omega=1.5) for _ in scales])
            self.scales = scales

        def forward(self, x):
            self.branches = [x]
            for norm, scale in zip(self.norms, self.scales, strict=True):
                self.branches.append(scale * torch.randn_like(x))
                x = norm(x, self.branches[-1])
            self.output = x
            return x

    model = Chain([0.5, 2.0, 1.0])
    table = repdeg_fast.residual_dependency(model, torch.randn(2_000, 64))
    shares = [share.share for share in table.output("norms")]
    assert sum(shares) == pytest.approx(1.0)
    correlations = [
        torch.corrcoef(torch.stack([branch.flatten(), model.output.flatten()]))[0, 1].item() ** 2
        for branch in model.branches
    ]
    assert shares == pytest.approx(correlations, abs=0.02)  # the measured rows are normalized each by itself
    assert [share.source for share in table.output("norms")] == ["input", "norms.0", "norms.1", "norms.2"]
    assert [len(row) for row in table.matrix("norms")] == [2, 3, 4]


@pytest.mark.parametrize("training", [True, False])
def test_dependency_counts_dropout_while_training_only(training):
    """In eval mode a branch is what it is; while training, dropout with p = ½ makes its variance larger (here, where
    its mean is 0, twice as large)."""
    norm, x, branch = AdminNorm(64, dropout=0.5).train(training), torch.randn(2_000, 64), torch.randn(2_000, 64)
    _, share = repdeg_fast.residual_dependency(norm, (x, branch)).output("")
    assert share.share == pytest.approx(2 / 3 if training else 1 / 2, rel=0.02)


def test_admin_evens_out_the_dependency():
    """What the rule is for. With branches of the variance of the stream, plain post-LN forgets the input by half at
    each; with ω from the profile each of n branches explains 1/(n+1) of the output."""

    class Chain(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.norms = nn.ModuleList([AdminNorm(64) for _ in range(length)])

        def forward(self, x):
            for norm in self.norms:
                x = norm(x, torch.randn_like(x))

    model, x = Chain(9), torch.randn(2_000, 64)
    shares = [share.share for share in repdeg_fast.residual_dependency(model, x).output("norms")]
    assert shares == pytest.approx([2.0**-9] + [2.0**-k for k in range(9, 0, -1)], rel=0.05)
    repdeg_fast.initialize_admin_(model, x)
    shares = [share.share for share in repdeg_fast.residual_dependency(model, x).output("norms")]
    assert shares == pytest.approx([0.1] * 10, rel=0.05)


def test_tables_are_printed_saved_and_plotted(tmp_path):
    model, data = build(), batch()
    profile = repdeg_fast.initialize_admin_(model, data)
    dependency = repdeg_fast.residual_dependency(model, data)
    for table in (profile, dependency, repdeg_fast.initialize_admin_(model, rule="O(1)")):
        assert "encoder.layers.0.norm1" in str(table)
        assert [table[place] for place in range(len(table))] == list(table) == list(table.records)
        loaded = json.loads(save_table(table, tmp_path / "table.json").read_text())
        with save_table(table, tmp_path / "table.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(loaded) == len(lines) == len(table.records)
        for one, other, record in zip(loaded, lines, table.records, strict=True):
            assert one == vars(record)
            assert other == {name: "" if value is None else str(value) for name, value in vars(record).items()}
        picture = plot_table(table, tmp_path / "table.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5_000
    with pytest.raises(ValueError, match=r"\.json or \.csv"):
        save_table(profile, tmp_path / "table.txt")
    for write in (save_table, plot_table):
        with pytest.raises(TypeError, match=r"table: expected what initialize_admin_ .* got list"):
            write(list(profile), tmp_path / "table.json")
    with pytest.raises(ValueError, match=r"decoder\.layers"):
        dependency.output("layers")


def test_bad_input():
    model, data = build(), batch()
    initialize = repdeg_fast.initialize_admin_
    with pytest.raises(ValueError, match="rule"):
        initialize(model, data, rule="o(n)")
    with pytest.raises(ValueError, match=r"batch.*O\(logn\)"):
        initialize(model)
    with pytest.raises(ValueError, match=r"model\.train\(\)"):
        initialize(build().eval(), data)
    model.decoder.layers[1].norm2.eval()
    with pytest.raises(ValueError, match=r"eval mode at decoder\.layers\.1\.norm2"):
        initialize(model, data)
    with pytest.raises(ValueError, match="pre-LN"):
        initialize(nn.TransformerEncoderLayer(D, 4, norm_first=True), data)
    with pytest.raises(ValueError, match="from_torch"):
        initialize(nn.Linear(3, 3), data)
    with pytest.raises(ValueError, match="AdminEncoderLayer"):
        initialize(nn.Sequential(AdminNorm(4)), rule="deepnorm")


def test_a_batch_that_says_nothing():
    """ω would be 0 from the second sub-layer on, or the variances 0/0."""
    model = AdminEncoder(AdminEncoderLayer(bias=False, **SIZES), 2)
    for look in (repdeg_fast.initialize_admin_, repdeg_fast.residual_dependency):
        with pytest.raises(ValueError, match="batch: expected activations that differ"):
            look(model, torch.zeros(2, 5, D))
        with pytest.raises(ValueError, match=r"batch: .*got an empty batch"):
            look(model, torch.zeros(0, 5, D))
    assert all((omega == 1).all() for omega in omegas(model).values())


def test_a_failed_profile_leaves_omega_as_it_was():
    model, (source, target) = build(), batch()
    for omega in omegas(model).values():
        nn.init.constant_(omega, 7.0)
    target[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        repdeg_fast.initialize_admin_(model, (source, target))
    assert all((omega == 7).all() for omega in omegas(model).values())

    class Twice(nn.Module):
        def __init__(self, used):
            super().__init__()
            self.norms, self.used = nn.ModuleList([AdminNorm(D), AdminNorm(D)]), used

        def forward(self, x):
            for place in self.used:
                x = self.norms[place](x, x)

    with pytest.raises(ValueError, match=r"norms\.1 runs twice"):
        repdeg_fast.initialize_admin_(Twice([0, 1, 1]), source)
    unused = Twice([0])
    with pytest.raises(ValueError, match=r"norms\.1"):
        repdeg_fast.initialize_admin_(unused, source)
    assert (unused.norms[0].omega == 1).all()
