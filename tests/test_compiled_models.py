"""Pretraining models as one compiled graph: the loss and the gradients of the plain ones."""

import pytest
import torch
from helpers import relative_error

transformers = pytest.importorskip("transformers")
from amos_cases import NO_DROPOUT, SIZES, amos, batch, gradients  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from repdeg_fast.models import CondenserForPreTraining  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def amos_model():
    return amos(), {"seed": torch.tensor([3])}


def condenser():
    sizes = {name: size for name, size in SIZES.items() if name != "mlm_layers"}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes | NO_DROPOUT)
    return CondenserForPreTraining(transformers.BertForMaskedLM(config)), {}


@pytest.mark.parametrize("make", [amos_model, condenser])
def test_a_compiled_model_is_one_graph_with_the_same_gradients(make):
    model, options = make()
    inputs = batch() | options
    loss = model(**inputs).loss  # and transformers installs what collects hidden states, which no graph can
    expected = gradients(model, loss)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)(**inputs)
    assert relative_error(compiled.loss, loss) <= 1e-6
    for name, gradient in gradients(model, compiled.loss).items():
        assert relative_error(gradient, expected[name]) <= 1e-5, name
    assert graphs.frame_count == 1
