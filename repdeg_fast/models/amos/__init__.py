"""AMOS (arXiv 2204.03243): a discriminator trained on what a mixture of masked language models puts in place of masked
tokens, the mixture trained against the discriminator. On encoders of transformers 5: BERT, BERT as the authors changed
it, ModernBERT.

Generator: one stack of layers with a language-model head, the same one, after layers such as 4, 6 and 8; no gradient
flows from one block of layers into the block below. Losses ℓ_k, k = 1 … K, one a head.
Mixture: α = softmax_k(v·f^(k)), f^(k) the output of block k; a token is sampled from the α-weighted sum of the K
logits.
Discriminator: sees the sampled tokens where masks were, and says of each position whether its token was replaced.

    loss = Σ_k ℓ_k + λ·RTD, λ = 50; v gets the reversed gradient of RTD, through the straight-through Gumbel-softmax
"""

try:
    from repdeg_fast.models.amos.config import MIXTURES, AmosConfig
    from repdeg_fast.models.amos.encoders import BACKBONES, AmosBertConfig, AmosBertModel, Backbone
    from repdeg_fast.models.amos.model import AmosForPreTraining, AmosOutput
    from repdeg_fast.models.amos.published import from_published
except ImportError as error:
    raise ImportError(
        f"repdeg_fast.models.amos needs transformers 5 ({error}): pip install 'repdeg-fast[hf]'"
    ) from error

__all__ = [
    "BACKBONES",
    "MIXTURES",
    "AmosBertConfig",
    "AmosBertModel",
    "AmosConfig",
    "AmosForPreTraining",
    "AmosOutput",
    "Backbone",
    "from_published",
]
