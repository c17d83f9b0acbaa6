"""Whether there are other processes of a training, and how many."""

from torch import distributed


def are_there() -> bool:
    """A process group was initialized, maybe of one rank."""
    return distributed.is_available() and distributed.is_initialized()


def number() -> int:
    return distributed.get_world_size() if are_there() else 1
