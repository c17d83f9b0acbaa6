"""One test for each cell of the tables in docs/compilers.md (tests/support.py has rows, columns and promises)."""

import copy
import pickle
from contextlib import contextmanager, nullcontext

import pytest
import support
import torch
from helpers import relative_error
from subjects import NUMBER, SEED, M, Subject, as_tuple, assert_alike, compiled, in_the_same_graph, total
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint as checkpointed

import repdeg_fast

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def promised(cell):
    """An error that names the operation and what to do, where that is what the table says."""
    if support.promise(*cell) != support.ERROR:
        yield
        return
    with pytest.raises(RuntimeError, match=r"^\w+ has no (forward-mode|second) derivative"):
        yield


class Tests:
    """Of the columns, by name; a name that Python does not have is in ``COLUMNS``."""

    @staticmethod
    def compile(subject):
        tensors = subject.make(M)
        expected, graphs = subject.results(subject.function, tensors), CompileCounterWithBackend("aot_eager")
        assert_alike(subject.results(compiled(subject, False, graphs), tensors), expected)
        assert graphs.frame_count == 1

    @staticmethod
    def rows(subject):
        function = compiled(subject, True, whole=False)  # a large module as one graph takes its time
        subject.results(function, subject.make(M))
        with in_the_same_graph():
            tensors = subject.make(M + 4)
            expected = subject.results(subject.function, tensors)
            assert_alike(subject.results(function, tensors), expected)

    @staticmethod
    def coefficient(subject, backend="aot_eager"):
        """A constant in the first graph; the second is for all others, its backward pass too."""
        graphs = CompileCounterWithBackend(backend)
        function = compiled(subject, None, graphs)
        for number in (NUMBER, 0.5, 0.75):
            tensors, step = subject.make(M), subject.with_number(number)
            torch.manual_seed(SEED)
            expected = subject.results(step(subject.function), tensors)
            torch.manual_seed(SEED)
            assert_alike(subject.results(step(function), tensors), expected)
        assert graphs.frame_count == 2

    @staticmethod
    def seed(subject):
        tensors, function = [t.detach() for t in subject.make(M)], compiled(subject, True)
        function(*tensors)
        with in_the_same_graph():
            found, expected = (as_tuple(f(*tensors, seed=SEED + 1)) for f in (function, subject.function))
            assert_alike(found, expected)

    @staticmethod
    def autocast(subject):
        tensors = subject.make(M)
        expected = subject.results(subject.function, tensors)
        with torch.autocast("cpu", torch.bfloat16):
            found = subject.results(subject.function, tensors)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 0.1
        assert {leaf.grad.dtype for leaf in tensors if leaf.grad is not None} <= {torch.float32}

    @staticmethod
    def checkpoint(subject, reentrant=False):
        tensors, results = subject.make(M), []
        options = {"seed": None} if subject.seeded else {}  # drawn from torch's generator
        for run in (lambda f, *t: f(*t), lambda f, *t: checkpointed(f, *t, use_reentrant=reentrant)):
            torch.manual_seed(11)
            results.append(subject.results(lambda *t: run(lambda *u: subject.function(*u, **options), *t), tensors))  # noqa: B023
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    @staticmethod
    def reentrant(subject):
        Tests.checkpoint(subject, reentrant=True)

    @staticmethod
    def export(subject):
        tensors = tuple(t.detach() for t in subject.make(M))
        exported = torch.export.export(subject.module or Wrapped(subject.function), tensors).module()
        found, expected = as_tuple(exported(*tensors)), as_tuple(subject.function(*tensors))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @staticmethod
    def cuda_graph(subject):
        device = torch.device("cuda")
        if subject.module:
            subject.module.to(device)
        tensors, others = ([t.detach().to(device) for t in subject.make(M)] for _ in range(2))
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
        seed = torch.tensor([SEED], device=device)
        options = {"seed": seed} if subject.seeded else {}
        step = lambda: subject.results(lambda *t: subject.function(*t, **options), tensors)  # noqa: E731
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for tensor, other in zip(tensors, others, strict=True):
                tensor.copy_(other)
        seed.fill_(SEED + 1)
        graph.replay()
        torch.cuda.synchronize()
        assert_alike(captured, step())

    @staticmethod
    def meta(subject):
        if subject.module:
            return meta_construction(subject)
        shapes = []
        for device in ("cpu", "meta"):
            tensors = [t.detach().to(device).requires_grad_() for t in subject.make(M)]
            results = subject.results(subject.function, tensors)
            assert {t.device.type for t in results} == {device}
            shapes.append([(t.shape, t.dtype) for t in results])
        assert shapes[0] == shapes[1]

    @staticmethod
    def vmap(subject):
        """Inside, a tensor does not tell that what it wraps wants a gradient."""
        stacked = [torch.stack([t.detach(), 2 * t.detach()]).requires_grad_() for t in subject.make(M)]
        mapped = torch.func.vmap(subject.function, randomness="different")(*stacked)
        plain = [torch.stack(o) for o in zip(*(as_tuple(subject.function(*t)) for t in zip(*stacked)), strict=True)]  # noqa: B905
        assert_alike([o.detach() for o in as_tuple(mapped)], [o.detach() for o in plain])
        found, expected = (
            torch.autograd.grad(total(tuple(outputs)), stacked, materialize_grads=True)
            for outputs in (as_tuple(mapped), plain)
        )
        assert_alike(found, expected)

    @staticmethod
    def func_grad(subject):
        """By all tensors and parameters at once, and of each of a batch."""
        tensors, others, call = subject.make(M), subject.make(M), subject.pure
        parameters = dict(subject.module.named_parameters()) if subject.module else {}
        wanted = tuple(i for i, tensor in enumerate(tensors, 1) if tensor.requires_grad)
        value_of = lambda *arguments: total(call(*arguments))  # noqa: E731
        both = torch.func.grad_and_value(value_of, argnums=(0, *wanted))

        def plain(tensors):
            leaves, value = [*parameters.values(), *(tensors[i - 1] for i in wanted)], value_of(parameters, *tensors)
            return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]

        def functional(function, tensors):
            (of_parameters, *of_tensors), value = function(parameters, *(t.detach() for t in tensors))
            return [value, *of_parameters.values(), *of_tensors]

        assert_alike(functional(both, tensors), plain(tensors))
        if not subject.module:
            mapped = torch.func.vmap(both, (None, *(0 for _ in tensors)), randomness="different")
            each = zip(plain(tensors), plain(others), strict=True)
            stacked = [torch.stack(two) for two in zip(tensors, others, strict=True)]
            assert_alike(functional(mapped, stacked), [torch.stack(two) for two in each], 1e-5)

    @staticmethod
    def forward_mode(subject):
        primals = tuple(t.detach() for t in subject.make(M))
        with promised((subject.row, "forward mode")), forward_ad.dual_level():
            subject.function(*(forward_ad.make_dual(p, torch.ones_like(p)) for p in primals))
        with promised((subject.row, "forward mode")):
            torch.func.jvp(subject.function, primals, tuple(map(torch.ones_like, primals)))

    @staticmethod
    def double_backward(subject):
        """Of a plain gradient, and of torch.func's."""
        tensors = subject.make(M)
        value = total(subject.function(*tensors))
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        with promised((subject.row, "double backward")):
            torch.autograd.grad(sum(g.square().sum() for g in gradients if g is not None), tensors, allow_unused=True)
        argnums = tuple(range(len(tensors)))
        first = torch.func.grad(lambda *t: total(subject.function(*t)), argnums)
        with promised((subject.row, "double backward")):
            torch.func.grad(lambda *t: sum(g.square().sum() for g in first(*t)), argnums)(
                *(t.detach() for t in tensors)
            )

    @staticmethod
    def functional_call(subject):
        inputs, other = subject.make(M), changed(subject)
        called = torch.func.functional_call(subject.module, dict(other.named_parameters()), tuple(inputs))
        assert_alike(as_tuple(called), as_tuple(other(*inputs)), 0)

    @staticmethod
    def deepcopy(subject):
        same(subject, copy.deepcopy(subject.module))

    @staticmethod
    def pickle(subject):
        same(subject, pickle.loads(pickle.dumps(subject.module)))

    @staticmethod
    def state_dict(subject):
        other = changed(subject)
        other.load_state_dict(subject.module.state_dict())
        same(subject, other)


def meta_construction(subject):
    with torch.device("meta"):
        other = support.MODULES[subject.row].make()
    assert all(p.is_meta for p in other.parameters())
    other = other.to_empty(device="cpu")
    other.load_state_dict(subject.module.state_dict())
    same(subject, other)


def same(subject, other):
    """``other`` computes what the subject's module does, and shares no memory with it."""
    inputs = subject.make(M)
    assert repr(other) == repr(subject.module)
    assert_alike(as_tuple(other(*inputs)), as_tuple(subject.module(*inputs)), 0)
    mine, others = ({p.data_ptr() for p in module.parameters()} for module in (subject.module, other))
    assert not mine & others


def changed(subject):
    """Another module of the kind, with other parameters."""
    other = support.MODULES[subject.row].make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25 * torch.rand_like(parameter))
    return other


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


COLUMNS = {"M": Tests.rows, "CUDA graph": Tests.cuda_graph}


def _marks(cell):
    return [pytest.mark.gpu] if support.promise(*cell) == support.GPU else []


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id="-".join(cell), marks=_marks(cell)) for cell in support.cells()]
)
def test_cell(cell):
    row, column = cell
    test = COLUMNS.get(column) or getattr(Tests, column.replace(".", "_").replace(" ", "_"))
    test(Subject(row))


def test_a_coefficient_through_inductor():
    Tests.coefficient(Subject("gumbel_mix"), "inductor")


def test_a_dropout_between_training_and_evaluation():
    """A graph each, whatever the dropout is by then."""
    subject = Subject("AdminNorm")
    function = compiled(subject, True)
    for number, graphs in ((0.1, nullcontext), (0.2, in_the_same_graph)):
        subject.with_number(number)
        for training in (True, False):
            subject.module.train(training)
            tensors = subject.make(M)
            torch.manual_seed(SEED)
            expected = subject.results(subject.function, tensors)
            torch.manual_seed(SEED)
            with graphs():
                assert_alike(subject.results(function, tensors), expected)


def test_every_public_name_is_a_row():
    from repdeg_fast import functional

    classes = {n: thing for n in repdeg_fast.__all__ if isinstance(thing := getattr(repdeg_fast, n), type)}
    modules = {name for name, thing in classes.items() if issubclass(thing, torch.nn.Module)}
    assert set(support.OPERATIONS) == set(functional.__all__) - set(classes)
    assert set(support.MODULES) == modules


def test_the_page_is_current():
    text = support.PAGE.read_text(encoding="utf-8")
    assert text == support.page(text), "python tests/support.py"
