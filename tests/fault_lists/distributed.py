"""Faults of what ranks do between kernels."""

from .fault import Fault

DISTRIBUTED = "repdeg_fast/distributed/"

FAULTS = [
    Fault(
        "a shard's exponentials count from its own log-sum-exp",
        DISTRIBUTED + "linear_cross_entropy.py",
        "sums = torch.stack([(lse - origin).exp(), target_logit])",
        "sums = torch.stack([torch.ones_like(lse), target_logit])",
        "tests/test_distributed.py -k cross_entropy",
    ),
    Fault(
        "a word of the rank before is drawn here, too",
        DISTRIBUTED + "gumbel_mix.py",
        "torch.where(mine, drawn.token_ids, -1)",
        "torch.where(mine, drawn.token_ids, drawn.token_ids)",
        "tests/test_distributed.py -k samples",
    ),
    Fault(
        "a block that goes round the ring comes home without its gradient",
        DISTRIBUTED + "contrastive.py",
        "grad_block += made.weight",
        "grad_block = made.weight",
        "tests/test_distributed.py -k contrastive",
    ),
    Fault(
        "positions are not numbered over ranks",
        "repdeg_fast/models/amos/model.py",
        "self._generate(features, target, seed, masked.before)",
        "self._generate(features, target, seed, 0)",
        "tests/test_distributed.py -k 'twenty and Amos'",
    ),
]
