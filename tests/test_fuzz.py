"""Every operation on shapes, strides, dtypes and options that nobody thought of, against its definition in float64.

A few examples, always the same, in the usual run; ``make fuzz EXAMPLES=2000`` draws as many new ones for each operation
and backend, and says how many there were."""

import os
from collections import Counter

import pytest
import torch
from fuzz_cases import OPERATIONS, doubles
from helpers import TOLERANCE
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import repdeg_fast
from repdeg_fast.ops import buffers, chunked_logits, native_linear_cross_entropy, pairwise_blocks

EXAMPLES = int(os.environ.get("REPDEG_FAST_FUZZ", "0"))
CUT = [
    (buffers, "LIMIT", {"cpu": 0, "cuda": 0}),
    (chunked_logits, "TILE", 48),
    (native_linear_cross_entropy, "SMALL", 0),
    (pairwise_blocks, "ROWS", 9),
    (pairwise_blocks, "PIECES", 100),
    (pairwise_blocks, "TILE", 11),
]
drawn = Counter()
budget = settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def _count(request):
    """What ran, by operation, where it was asked for."""
    yield
    if EXAMPLES:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            counts = ", ".join(f"{name} on {backend} {n}" for (name, backend), n in sorted(drawn.items()))
            print(f"\n{sum(drawn.values())} examples: {counts}")


BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.cpp),
    "cuda-emulated",
    *[pytest.param("triton", marks=pytest.mark.interpreter)] * bool(EXAMPLES),  # some seconds an example
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("one_thread")
def test_against_float64(name, backend, request):
    if backend == "cuda-emulated":
        if name not in ("admin_norm", "cosine_regularization"):
            pytest.skip("no CUDA kernels")
        request.getfixturevalue("emulated_cuda")

    @budget
    @given(OPERATIONS[name](), st.booleans())
    def run(problem, cut):
        if backend == "triton":  # whose interpreter multiplies the raw bits of bfloat16
            assume(torch.bfloat16 not in [problem.precision, *[leaf.dtype for leaf in problem.leaves]])
        with pytest.MonkeyPatch.context() as patch, repdeg_fast.use_backend(backend):
            for setting in CUT if cut else ():  # several chunks, tiles and blocks also at these sizes
                patch.setattr(*setting)
            try:
                check(problem)
            except RuntimeError as error:  # doubles, layouts
                assume(backend in ("reference", "cpu") or f"'{backend}' cannot serve" not in str(error))
                raise
        drawn[name, backend] += 1

    run()


def check(problem):
    dtype = problem.precision or min((leaf.dtype for leaf in problem.leaves), key=lambda dtype: dtype.itemsize)
    # what cancels leaves a rest of the terms' rounding; in 16 bits that is what plain PyTorch has, too
    rest = torch.finfo(dtype).eps * problem.steep * (16 if dtype.itemsize > 2 else 0.5)
    plainly = [leaf.detach().to(problem.precision or leaf.dtype) for leaf in problem.leaves]
    found = outputs_and_gradients(problem.call, problem.leaves, problem)
    true = outputs_and_gradients(problem.definition, doubles(problem.leaves), problem)
    eager = outputs_and_gradients(problem.definition, plainly, problem)
    for i, (ours, exact, plain) in enumerate(zip(found, true, eager, strict=True)):
        assert ours.isfinite().all(), f"{i}: not finite"
        assert ours.shape == exact.shape, f"{i}: {tuple(ours.shape)} where {tuple(exact.shape)} is expected"
        scale = exact.norm().item()
        allowed = TOLERANCE[dtype] * scale + 4 * (plain.double() - exact).norm().item() + rest * exact.numel() ** 0.5
        error = (ours.double() - exact).norm().item()
        assert error <= allowed, f"{i} of {len(found)}: {error:.3g} where {allowed:.3g} of {scale:.3g} is allowed"


def outputs_and_gradients(function, leaves, problem):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    if not problem.gradients:
        return [output.detach() for output in outputs]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    with_graph = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in with_graph], leaves, [u for _, u in with_graph], materialize_grads=True
    )
    return [*(output.detach() for output in outputs), *gradients]
