"""Tiny masked-language models of transformers, and what the tests of their integration share."""

import torch

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 1}


def tiny(cls, config, **changes):
    """Away from where its initialization puts it: with biases, say."""
    model = cls(config(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows=3, columns=11, vocabulary=99):
    words = torch.randint(5, vocabulary, (rows, columns))
    return {"input_ids": words, "labels": words.masked_fill(torch.rand(rows, columns) > 0.3, -100)}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
