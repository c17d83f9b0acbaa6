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
    Fault(
        "over ranks, a target's class weighs 1",
        DISTRIBUTED + "linear_cross_entropy.py",
        "(1 - smoothing) * class_weight.each.index_select(0, target.where(known, 0))",
        "(1 - smoothing) * torch.ones_like(class_weight.each.index_select(0, target.where(known, 0)))",
        "tests/test_distributed.py -k cross_entropy_with_options",
    ),
    Fault(
        "over ranks, each one's largest logit is taken for the largest of all",
        DISTRIBUTED + "linear_cross_entropy.py",
        "torch.where(looks.most == most, looks.classes",
        "torch.where(looks.most <= most, looks.classes",
        "tests/test_distributed.py -k cross_entropy_with_options",
    ),
    Fault(
        "over ranks, of equal logits the last class is predicted",
        DISTRIBUTED + "linear_cross_entropy.py",
        "distributed.all_reduce(classes, distributed.ReduceOp.MIN, group=rule.shard.group)",
        "classes = -classes.where(classes < rule.shard.whole, -1); "
        "distributed.all_reduce(classes, distributed.ReduceOp.MIN, group=rule.shard.group); classes = -classes",
        "tests/test_distributed.py -k cross_entropy_with_options",
    ),
    Fault(
        "over ranks, gradients are those of the first columns",
        DISTRIBUTED + "linear_cross_entropy.py",
        "return Columns(self.shard.first, self.shard.whole)",
        "return Columns(0, self.shard.whole)",
        "tests/test_distributed.py -k cross_entropy",
    ),
    Fault(
        "over ranks, the noise of heads' logits is that of the first columns",
        DISTRIBUTED + "gumbel_mix.py",
        "rows, columns = slice(first, first + logits.shape[1]), self.call.shard.first",
        "rows, columns = slice(first, first + logits.shape[1]), self.call.shard.first % QUAD",
        "tests/test_distributed.py -k one_sweep",
    ),
    Fault(
        "over ranks, chunks are weighed by what each rank counts",
        "repdeg_fast/training/gradient_cache.py",
        "distributed.all_reduce(sums, group=group)",
        "sums = sums * ranks",
        "tests/test_distributed.py -k caching",
    ),
    Fault(
        "over ranks, an example's losses are means of means",
        "examples/ranks.py",
        "return count.item() * number() / max(whole.item(), 1)",
        "return 1.0",
        "tests/test_examples_over_ranks.py -k condenser",
    ),
]
