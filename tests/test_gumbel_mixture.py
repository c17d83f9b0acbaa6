"""The mixture of heads as a module."""

import pytest
import torch
from gumbel_mix_cases import SEED
from helpers import relative_error
from torch import nn

from repdeg_fast import GumbelMixture, gumbel_mix


class TestModule:
    features, hidden = torch.randn(3, 10, 12), torch.randn(3, 10, 16)
    decoder = nn.Linear(16, 80)

    def loss(self, mixture, features):
        torch.manual_seed(0)
        _, embeddings = mixture(features, self.hidden, self.decoder.weight, self.decoder.bias, seed=SEED)
        return embeddings.square().sum()

    def test_equals_the_function(self):
        mixture = GumbelMixture(12)
        logits = torch.stack([mixture.score(f).squeeze(1) for f in self.features], dim=1)
        assert torch.allclose(mixture.mixture_logits(self.features), logits)
        token_ids, embeddings = mixture(self.features, self.hidden, self.decoder.weight, self.decoder.bias, seed=SEED)
        same_ids, same = gumbel_mix(self.hidden, logits, self.decoder.weight, self.decoder.bias, seed=SEED)
        assert torch.equal(token_ids, same_ids)
        assert torch.equal(embeddings, same)
        assert "temperature=0.3" in repr(mixture)

    def test_gradient_is_reversed_and_flows_on(self):
        features = self.features.clone().requires_grad_()
        against, along = GumbelMixture(12), GumbelMixture(12, gradient_scale=1.0)
        along.load_state_dict(against.state_dict())
        gradients = [
            torch.autograd.grad(self.loss(mixture, features), (mixture.score.weight, features))
            for mixture in (against, along)
        ]
        assert all(relative_error(a, -b) <= 1e-6 and a.any() for a, b in zip(*gradients, strict=True))

    def test_features_can_be_detached(self):
        features = self.features.clone().requires_grad_()
        mixture = GumbelMixture(12, detach_features=True)
        self.loss(mixture, features).backward()
        assert features.grad is None
        assert mixture.score.weight.grad.any()

    def test_features_of_a_wrong_shape(self):
        with pytest.raises(ValueError, match=r"features: expected shape \(K, M, 12\), got \(3, 10, 16\)"):
            GumbelMixture(12).mixture_logits(self.hidden)
