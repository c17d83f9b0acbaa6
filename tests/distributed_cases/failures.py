"""What is an error on every rank, and ranks that do not come."""

import os
import time
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from repdeg_fast import (
    contrastive_loss,
    cosine_regularization,
    linear_cross_entropy,
    mlm_losses_and_sample,
    multi_layer_mlm_loss,
    span_pair_loss,
)
from repdeg_fast.distributed import VocabularyShard, compare_arguments
from repdeg_fast.training import Encoded, cached_backward

from .support import WIDTH, mesh, raised


def bad_ranges(rank, ranges, whole):
    first, last = ranges[rank]
    return raised(lambda: VocabularyShard(first, last, whole[rank] if isinstance(whole, list) else whole))


def bad_input(rank):
    """Each a mistake that every rank makes; what it raises."""
    weight, hidden, target = torch.randn(8, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    shard = VocabularyShard.even(8)
    mine, placed = weight[shard.first : shard.last], distribute_tensor(weight, mesh(), [Shard(0)])
    columns = distribute_tensor(weight, mesh(), [Shard(1)])
    cross_entropy = lambda w, b=None, t=target, h=hidden, **o: lambda: linear_cross_entropy(h, w, t, b, **o)  # noqa: E731
    layer = nn.Linear(WIDTH, WIDTH)
    encode = lambda rows: Encoded(layer(rows), layer(rows).mean())  # noqa: E731
    cached = lambda group: lambda: cached_backward(encode, span_pair_loss, weight, chunk_size=4, group=group)  # noqa: E731
    calls = {
        "columns": cross_entropy(columns),
        "columns of cosreg": lambda: cosine_regularization(columns),
        "no such dimension": lambda: VocabularyShard.of_mesh(mesh(), "pp", 8),
        "other group": lambda: VocabularyShard(
            0, 8, 8, distributed.new_group([1 - rank]) and distributed.GroupMember.NON_GROUP_MEMBER
        ),
        "other group's losses": cached(distributed.GroupMember.NON_GROUP_MEMBER),  # of new_group, to who is not in it
        "group by name": cached("tp"),
        "other rows": cross_entropy(weight[:3], shard=shard),
        "no shard": cross_entropy(mine, shard=(0, 4)),
        "shard and dtensor": cross_entropy(placed, shard=shard),
        "plain bias": cross_entropy(placed, torch.zeros(8)),
        "replicated bias": cross_entropy(placed, distribute_tensor(torch.zeros(8), mesh(), [Replicate()])),
        "hidden states cut": cross_entropy(placed, h=distribute_tensor(hidden, mesh(), [Shard(0)])),
        "target": cross_entropy(mine, t=target + 6, shard=shard),
        "chunked": cross_entropy(mine, shard=shard, strategy="chunked"),
        "class weights of the rows here": cross_entropy(mine, shard=shard, class_weight=torch.ones(4)),
        "class weights cut": cross_entropy(placed, class_weight=distribute_tensor(torch.ones(8), mesh(), [Shard(0)])),
        "shift": cross_entropy(mine, shard=shard, shift=-1),
        "padding": cross_entropy(mine, shard=shard, padding_idx=8),
        "row weights": lambda: cosine_regularization(mine, row_weight=torch.arange(4.0) - rank, shard=shard),
    }
    return {name: raised(call) for name, call in calls.items()}


def disagree(rank):
    """With the debug mode on: what differs is named on every rank."""
    weight, hidden, target = torch.randn(8, WIDTH), torch.randn(3, WIDTH), torch.arange(3)
    shard = VocabularyShard.even(8)
    mine = weight[shard.first : shard.last]
    with compare_arguments():
        linear_cross_entropy(hidden, mine, target, shard=shard)
        return {
            "hidden_states": raised(lambda: linear_cross_entropy(hidden + rank, mine, target, shard=shard)),
            "return_accuracy": raised(
                lambda: linear_cross_entropy(hidden, mine, target, return_accuracy=rank == 1, shard=shard)
            ),
            "label_smoothing": raised(
                lambda: linear_cross_entropy(hidden, mine, target, label_smoothing=0.1 * rank, shard=shard)
            ),
            "operation": raised(
                lambda: (
                    linear_cross_entropy(hidden, mine, target, shard=shard)
                    if rank
                    else multi_layer_mlm_loss([hidden], mine, target, shard=shard)
                )
            ),
            "temperature": raised(
                lambda: mlm_losses_and_sample([hidden], None, mine, target, temperature=1.0 + rank, shard=shard)
            ),
            "eps": raised(lambda: cosine_regularization(mine, eps=1e-12 * (1 + rank), shard=shard)),
        }


def bad_contrastive(rank):
    queries, documents, group = torch.randn(2, 4), torch.randn(2 + rank, 4), distributed.group.WORLD
    good = torch.randn(2, 4)
    return {
        "documents": raised(lambda: contrastive_loss(queries, documents, group=group)),
        "positive": raised(lambda: contrastive_loss(queries, good, positive=torch.arange(2), group=group)),
        "exchange": raised(lambda: contrastive_loss(queries, good, exchange="star", group=group)),
        "query_ids": raised(
            lambda: contrastive_loss(queries, good, query_ids=torch.arange(2), exchange="ring", group=group)
        ),
    }


def late(rank, seconds):
    """Another rank comes after the timeout."""
    group = distributed.new_group(timeout=timedelta(seconds=seconds))
    shard = VocabularyShard.even(8, group)
    if rank:
        time.sleep(2 * seconds)
        return None
    return raised(lambda: cosine_regularization(torch.randn(shard.rows, 4), shard=shard))


def die(rank, step):
    """Rank 1 is gone in the middle of a training."""
    shard, weight = VocabularyShard.even(8), torch.randn(4, WIDTH).requires_grad_()
    for now in range(20):
        if rank and now == step:
            os._exit(1)
        linear_cross_entropy(torch.ones(3, WIDTH), weight, torch.arange(3), shard=shard).backward()
