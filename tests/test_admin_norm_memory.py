"""What ADMIN's residual block keeps for its backward pass, and how it chooses."""

import warnings

import pytest
import torch
from admin_norm_cases import PARAMETERS, assert_matches, expected, inputs
from helpers import TOLERANCE, relative_error, saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from repdeg_fast import _recoverable, admin_norm, backends
from repdeg_fast.functional.admin_norm import _save_input
from repdeg_fast.ops.admin_norm import admin_norm as operator


class Record(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


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
        with torch.no_grad():
            tensors["weight"][7] *= 0.99
        with pytest.raises(ValueError, match=r"save: weight has an entry near zero: .*save=\"input\""):
            admin_norm(**tensors, save="output")
        with torch.no_grad():
            tensors["bias"][3] = float("nan")
        with pytest.raises(ValueError, match=r"save: weight or bias has a NaN entry.*save=\"input\""):
            admin_norm(**tensors, save="output")

    def test_auto_switches_and_says_so_once(self):
        tensors = inputs(50, 96)
        backends._warn_once.cache_clear()
        column = tensors["weight"].detach()[5]  # shares the version counter
        for entry in (0.0, 1e-9, float("nan")):
            column.fill_(1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                admin_norm(**tensors)
            column.fill_(entry)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                total = saved_bytes(lambda: admin_norm(**tensors), *tensors.values())
            said = {0.0: ["weight has an entry near zero"], 1e-9: []}.get(entry, ["weight or bias has a NaN entry"])
            assert [str(w.message).split(": ")[2].split(",")[0] for w in caught] == said
            assert total == 8 * 50  # x and the branch are the caller's
        column.fill_(0)
        assert_matches(tensors)

    def test_looks_at_the_weight_when_it_has_changed_and_only_then(self):
        tensors = inputs(5, 8)
        weight = tensors["weight"]
        admin_norm(**tensors)
        with Record() as record:
            admin_norm(**tensors)
        assert record.names <= {"repdeg_fast::admin_norm", "aten::view", "aten::detach"}
        for change in (
            lambda: weight.detach().zero_(),
            lambda: setattr(weight, "data", torch.ones(8)),
            lambda: tensors.update(bias=torch.full((8,), 1e4)),
        ):
            before = _recoverable.smallest_ratio(weight, tensors["bias"])
            change()
            assert _recoverable.smallest_ratio(weight, tensors["bias"]) != before

    @pytest.mark.parametrize(("save", "kept"), [("auto", True), ("output", False), ("input", True)])
    def test_no_look_while_a_graph_is_captured(self, monkeypatch, save, kept):
        """The first one would wait for the stream, which ends the capture: what is not known is taken to be bad."""

        class OnCuda(torch.nn.Parameter):
            is_cuda = True

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(_recoverable, "_ratio", lambda *_: pytest.fail("looked"))
        weight = OnCuda(torch.ones(8))
        assert _save_input(save, weight, None, torch.float32) is kept
        assert not any(look.measured() is weight for look in _recoverable._looks.values())

    def test_no_look_without_gradients(self):
        tensors = inputs(5, 8)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            tensors["weight"][0] = 0
            admin_norm(**tensors, save="output")
            with torch.enable_grad():
                admin_norm(**{name: tensor.detach() for name, tensor in tensors.items()}, save="output")

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


@pytest.mark.gpu
def test_auto_sees_a_weight_near_zero_without_waiting():
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
