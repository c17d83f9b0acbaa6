"""What makes an example run under ``torchrun --nproc-per-node N``: every rank draws the same batches and takes its rows
of them, gradients are averaged once a step, and the first rank writes the files.

Without torchrun there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor, distributed, nn


def start(options: argparse.Namespace) -> None:
    """Join the other ranks, where torchrun has started some; on GPUs each has one of its own. The first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        options.device = type(options.device)(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(options.device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def number() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rows(batch: Tensor) -> Tensor:
    """This rank's rows of a batch that all have: as many for each, pairs of rows together."""
    if len(batch) % (2 * number()) and number() > 1:
        raise SystemExit(f"batches: expected a multiple of {2 * number()} rows for {number()} ranks, got {len(batch)}")
    return batch.chunk(number())[rank()]


def part(batch: Tensor) -> Tensor:
    """This rank's rows of a batch of any size, for a loss that is weighted by what they count."""
    if len(batch) < number():
        raise SystemExit(f"batches: expected a row or more for each of {number()} ranks, got {len(batch)}")
    return batch.tensor_split(number())[rank()]


def seed(step: int, first: int) -> None:
    """Dropout differs from rank to rank. What is drawn on the first rank goes on as in one process; on the others it
    depends on seed, rank and step alone, so that a checkpoint serves any number of ranks."""
    if rank():
        torch.manual_seed(hash((first, rank(), step)))


def weight(count: Tensor) -> float:
    """Of this rank's mean over ``count`` things, so that the mean over ranks is that over all."""
    if number() == 1:
        return 1.0
    whole = count.clone()
    distributed.all_reduce(whole)
    return count.item() * number() / max(whole.item(), 1)


def average_gradients(model: nn.Module) -> None:
    """Over ranks, in one message."""
    if number() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients) / number()
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def average(line: dict[str, float], device: str) -> dict[str, float]:
    """Of a history, over ranks."""
    if number() == 1:
        return line
    values = torch.tensor([*line.values()], dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(line, (values / number()).tolist(), strict=True))


def leave_to_the_first() -> None:
    """Training is over: the first rank goes on alone."""
    if number() == 1:
        return
    distributed.barrier()
    this = rank()
    distributed.destroy_process_group()
    os.environ["WORLD_SIZE"] = "1"  # what it starts afterwards has no other ranks to join
    if this:
        raise SystemExit(0)
