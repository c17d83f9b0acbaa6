"""The mixture of heads that AMOS samples from, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from repdeg_fast import functional
from repdeg_fast._checks import check_finite, check_flag, check_floating, check_input, check_positive, check_size


class GumbelMixture(nn.Module):
    """Mixture weights α = softmax_k(v·f^(k)) and a token sampled from the mixed logits (AMOS, arXiv 2204.03243, section
    3).

    Holds v. Its gradient, and that of the features, is multiplied by ``gradient_scale``: with −1 the mixture learns
    whatever makes the following model's loss larger.

    Example::

        mixture = GumbelMixture(hidden_size=768)
        token_ids, embeddings = mixture(features, hidden_states, decoder.weight, decoder.bias)

    Args:
        hidden_size: length of v.
        temperature, hard, gradient_scale: as in :func:`repdeg_fast.gumbel_mix`.
        detach_features: no gradient flows on from the mixture logits into the features (it does in the published
            code).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        temperature: float = 0.3,
        hard: bool = True,
        gradient_scale: float = -1.0,
        detach_features: bool = False,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_positive("temperature", temperature)
        check_finite("gradient_scale", gradient_scale)
        check_flag("hard", hard)
        check_flag("detach_features", detach_features)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.temperature = temperature
        self.hard = hard
        self.gradient_scale = gradient_scale
        self.detach_features = detach_features
        nn.init.normal_(self.score.weight, std=0.02)

    def mixture_logits(self, features: Tensor) -> Tensor:
        """(M, K): v·f^(k) of features (K, M, hidden_size)."""
        check_floating("features", features)
        if features.dim() != 3 or features.shape[2] != self.score.in_features:
            expected = f"(K, M, {self.score.in_features})"
            raise ValueError(f"features: expected shape {expected}, got {tuple(features.shape)}")
        check_input("features", features, self.score.weight)
        return self.score(features.detach() if self.detach_features else features).squeeze(2).t()

    def forward(
        self,
        features: Tensor,  # (K, M, hidden_size), what v scores
        hidden_states: Tensor,  # (K, M, d), the inputs of the heads' projection
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
        embedding: Tensor | None = None,  # (V, d_f)
        *,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Token ids (M,) and embeddings (M, d_f): see :func:`repdeg_fast.gumbel_mix`."""
        return functional.gumbel_mix(
            hidden_states, self.mixture_logits(features), weight, bias, embedding,
            temperature=self.temperature, hard=self.hard, gradient_scale=self.gradient_scale, seed=seed,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, hard={self.hard}, gradient_scale={self.gradient_scale}"
