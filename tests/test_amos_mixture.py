"""Who is chosen from AMOS's layers, and where the mixture's gradient goes."""

import pytest
import torch

pytest.importorskip("transformers")
from amos_cases import FIRST, MASK, NO_DROPOUT, SIZES, amos, batch, gradients

from repdeg_fast.models import AmosConfig, AmosForPreTraining

pytestmark = pytest.mark.usefixtures("one_thread")


def reversed_gradient(**options):
    """Of the discriminator's loss alone."""
    model = amos(**options)
    grads = gradients(model, model(**batch(), seed=0).rtd_loss)
    return grads.get("mixture.score.weight"), grads.get("generator.encoder.layer.0.output.dense.weight")


def test_the_mixture_gets_the_scaled_gradient_and_passes_it_on_unless_detached():
    v, generator = reversed_gradient()
    for scale in (1.0, 0.5):
        other_v, other_generator = reversed_gradient(gradient_scale=scale)
        torch.testing.assert_close(other_v, -scale * v)
        torch.testing.assert_close(other_generator, -scale * generator)
    assert v.any()
    assert generator.any()
    detached_v, detached_generator = reversed_gradient(detach_mixture=True)
    assert torch.equal(detached_v, v)
    assert detached_generator is None
    assert reversed_gradient(gradient_scale=0.0) == (None, None)


def topics(rows=32):
    """Each row has words of one of four topics: what is from another topic is easy to tell, all else is not."""
    words = FIRST + 5 * torch.randint(4, (rows, 1)) + torch.randint(5, (rows, 12))
    masked = torch.rand(rows, 12) < 0.25
    return {"input_ids": words.masked_fill(masked, MASK), "labels": words.masked_fill(~masked, -100)}


def fit(model, steps, learning_rate):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**topics()).loss.backward()
        optimizer.step()


def grown(model, **options):
    """A model with the same weights under other options."""
    other = AmosForPreTraining(AmosConfig(**{**model.config.to_dict(), **options}))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.requires_grad_(False)


def test_frozen_mixture_moves_against_the_discriminator_or_with_it():
    """A generator whose second layer has learned what its first has not, and a discriminator that has seen both."""
    sizes = {**SIZES, "vocab_size": 25, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    teacher = AmosForPreTraining(AmosConfig(**sizes | NO_DROPOUT | {"mlm_layers": (2,), "rtd_weight": 5.0}))
    fit(teacher, 100, 3e-3)
    both = grown(teacher, mlm_layers=(1, 2), mixture="equal")
    both.discriminator.encoder.requires_grad_(True)
    both.rtd_head.requires_grad_(True)
    fit(both, 100, 3e-3)

    held_out = topics(256)
    for scale in (-1.0, 1.0):
        model = grown(both, mixture="learned", gradient_scale=scale)
        model.mixture.requires_grad_(True)

        def measure(model=model):
            with torch.no_grad():
                outputs = [model(**held_out, seed=seed) for seed in range(4)]
            return sum(output.rtd_loss for output in outputs) / 4, outputs[0].mixture_weights[1]

        loss_before, good_before = measure()
        fit(model, 40, 0.03)
        loss, good = measure()
        assert -scale * (good - good_before) > 0.1  # −1: to the layer whose samples are hard to tell
        assert -scale * (loss - loss_before) > 0.003


def test_equal_weights_and_a_single_layer():
    assert amos(mixture="equal").mixture is None
    torch.testing.assert_close(amos(mixture="equal")(**batch()).mixture_weights, torch.full((3,), 1 / 3))
    single = amos(mlm_layers=(2,))
    output = single(**batch())
    assert output.mlm_losses.shape == (1,)
    assert torch.equal(output.mixture_weights, torch.ones(1))
    assert len(single.generator.encoder.layer) == 2
    assert single.mixture is None


def test_a_random_layer_for_each_position():
    model = amos(mixture="random")
    logits = model._mixture_logits(torch.zeros(3, 6000, 32))
    assert torch.equal(logits.softmax(dim=1).sort(dim=1).values, torch.tensor([0.0, 0.0, 1.0]).expand(6000, 3))
    frequency = logits.softmax(dim=1).mean(dim=0)
    assert (frequency - 1 / 3).abs().max() < 5 * (2 / 9 / 6000) ** 0.5
    output = model(**batch())
    assert torch.isfinite(output.loss)
    assert len(gradients(model, output.loss)) == len(list(model.parameters()))


def test_layers_switch_as_training_goes_on():
    """… and the sample is that of a model with that layer alone."""
    model = amos(mixture="switch")
    for progress, index in ((0.0, 0), (0.32, 0), (0.34, 1), (0.67, 2), (1.0, 2)):
        model.progress = progress
        output = model(**batch(), seed=5)
        assert output.mixture_weights.argmax() == index
        assert output.mixture_weights[index] == 1
        layer = SIZES["mlm_layers"][index]
        single = grown(model, mlm_layers=(layer,), mixture="learned")
        assert torch.equal(single(**batch(), seed=5).sampled_ids, output.sampled_ids)
    model.progress = 1.5
    with pytest.raises(ValueError, match=r"progress: expected a number from 0 to 1, got 1\.5"):
        model(**batch())
