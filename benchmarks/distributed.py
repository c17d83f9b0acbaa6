"""What operations over shards send, and how long they take: a row an operation, from the first of the ranks.

for N in 1 2 4; do python -m torch.distributed.run --nproc-per-node $N benchmarks/distributed.py; done

An argument is another width than 256. ``mlm_losses_and_sample`` is there twice: in one sweep, and in two.

Bytes are what one rank hands to all-reduces in a step, forward and backward; "hidden states" is their gradient's part.
On a CPU of few cores ranks share them: times tell what is lost between them, not what is gained.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from repdeg_fast import cosine_regularization, gumbel_mix, mlm_losses_and_sample, multi_layer_mlm_loss
from repdeg_fast.distributed import VocabularyShard

HEADS, POSITIONS, VOCABULARY = 3, 256, 32_768
REPEATS = 7


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    shard = VocabularyShard.even(VOCABULARY)
    torch.manual_seed(0)
    hidden_states = torch.randn(HEADS, POSITIONS, width, device=device, requires_grad=True)
    mixture = torch.randn(POSITIONS, HEADS, device=device, requires_grad=True)
    target = torch.randint(VOCABULARY, (POSITIONS,), device=device)
    weight = torch.randn(shard.rows, width, device=device, requires_grad=True)
    steps: dict[str, Callable[[], Tensor]] = {
        "cosine_regularization": lambda: cosine_regularization(weight, shard=shard),
        "multi_layer_mlm_loss": lambda: multi_layer_mlm_loss(hidden_states, weight, target, shard=shard).sum(),
        "gumbel_mix": lambda: gumbel_mix(hidden_states, mixture, weight, seed=1, shard=shard)[1].sum(),
        "mlm_losses_and_sample": lambda: joint("auto"),
        "mlm_losses_and_sample, two sweeps": lambda: joint("streaming"),
    }

    def joint(strategy: str) -> Tensor:
        options: Any = {"seed": 1, "strategy": strategy, "shard": shard}
        losses, _, values = mlm_losses_and_sample(hidden_states, mixture, weight, target, **options)
        return losses.sum() + values.sum()

    if ranks == 1:
        print("| operation | ranks | bytes, all-reduced | of them hidden states | ms, median |\n|---|---|---|---|---|")
    for name, step in steps.items():
        sent, seconds = _measured(step)
        of_hidden = hidden_states.nbytes if name.startswith(("multi_layer", "mlm_losses")) else 0
        if rank == 0:
            print(f"| {name} | {ranks} | {sent:,} | {of_hidden:,} | {1e3 * seconds:.1f} |", flush=True)
    distributed.destroy_process_group()


def _measured(step: Callable[[], Tensor]) -> tuple[int, float]:
    original, sent = distributed.all_reduce, 0

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return original(tensor, *arguments, **options)

    step().backward()
    distributed.all_reduce = counted
    step().backward()
    distributed.all_reduce = original
    times = []
    for _ in range(REPEATS):
        distributed.barrier()
        start = time.perf_counter()
        step().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sent, statistics.median(times)


if __name__ == "__main__":
    main()
