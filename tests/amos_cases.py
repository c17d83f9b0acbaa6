"""A tiny AMOS and a batch for it."""

import torch

from repdeg_fast.models import AmosConfig, AmosForPreTraining

V, B, T = 61, 3, 11
MASK, FIRST = 4, 5  # the mask token, and the first that is not special
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 20, "mlm_layers": (1, 2, 4)}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def amos(**options):
    """Tiny, and away from where its initialization puts it: with biases, and mixture weights that differ."""
    torch.manual_seed(0)
    model = AmosForPreTraining(AmosConfig(**SIZES | NO_DROPOUT | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch():
    """Masked, with padding at the end of one row."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(FIRST, V, (B, T), generator=generator)
    attention_mask = torch.ones_like(words)
    attention_mask[1, -3:] = 0
    masked = (torch.rand(B, T, generator=generator) < 0.4) & (attention_mask == 1)
    return {
        "input_ids": words.masked_fill(masked, MASK).masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "labels": words.masked_fill(~masked, -100),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
