"""Processes of torch.distributed for tests: made once, from one that has imported all they need, and sent functions."""

import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from datetime import timedelta

PRELOADED = (
    "torch",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "repdeg_fast",
    "repdeg_fast.distributed",
    "training_cases",
)
PATIENCE = 15  # seconds: a rank that waits for another longer than this has lost it


class Pool:
    """``run(function, *arguments)``: ``function(rank, *arguments)`` on every rank, which must be importable; what each
    returned, or the first error."""

    def __init__(self, ranks):
        import torch

        import repdeg_fast

        repdeg_fast.cosine_regularization(torch.ones(2, 2))  # kernels are compiled before anyone waits for another
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.folder = tempfile.TemporaryDirectory()
        self.ranks, pipes = ranks, [context.Pipe() for _ in range(ranks)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, ranks, self.folder.name, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        with _python_path([os.path.dirname(__file__), *sys.path]):
            for process in self.processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return self.results()

    def results(self):
        found = [pipe.recv() if pipe.poll(PATIENCE) else (None, "no answer in time") for pipe in self.pipes]
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for result, _ in found]

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def run_script(path, arguments, ranks, without=(), patience=120):
    """A script as ``torchrun --nproc-per-node`` starts it, in processes that have imported most of what it needs: what
    each rank printed, and exit codes. ``without``: packages that are not there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        printed = [os.path.join(folder, str(rank)) for rank in range(ranks)]
        jobs = [(str(path), arguments, rank, ranks, port, printed[rank], without) for rank in range(ranks)]
        processes = [context.Process(target=_as_script, args=job, daemon=True) for job in jobs]
        with _python_path([os.path.dirname(__file__), *sys.path]):
            for process in processes:
                process.start()
        for process in processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
        texts = [open(name, encoding="utf-8").read() for name in printed]  # noqa: SIM115 - the folder goes at once
    return [process.exitcode for process in processes], texts


def _as_script(path, arguments, rank, ranks, port, printed, without):
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(printed, "w", encoding="utf-8")  # noqa: SIM115 - to the end of the process
    sys.modules.update(dict.fromkeys(without))
    sys.argv, sys.path[:0] = [path, *arguments], [os.path.dirname(path)]
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception:
        traceback.print_exc(file=sys.stdout)
        raise
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def _python_path(folders):
    """The server that has imported all that does not look into this process's sys.path; tests after it must not see
    what it was told."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(rank, ranks, folder, pipe):
    import torch
    from torch import distributed

    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    store = distributed.FileStore(os.path.join(folder, "store"), ranks)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE)
    )
    while (job := pipe.recv()) is not None:
        function, arguments = job
        torch.manual_seed(0)
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    distributed.destroy_process_group()


class Traffic:
    """Bytes that this rank hands to collectives, inside a ``with`` block."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "broadcast",
        "batch_isend_irecv",
    )

    def __enter__(self):
        from torch import distributed

        self.calls, self.originals = [], {name: getattr(distributed, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(distributed, name, self._counting(name, original))
        return self

    def __exit__(self, *_):
        from torch import distributed

        for name, original in self.originals.items():
            setattr(distributed, name, original)

    def _counting(self, name, original):
        import torch

        def counted(*arguments, **options):
            tensors = [a for a in arguments[-2:] if isinstance(a, torch.Tensor)]
            self.calls.append((name, tensors[-1].nbytes if tensors else 0))
            return original(*arguments, **options)

        return counted

    def bytes(self, name="all_reduce"):
        return sum(size for called, size in self.calls if called == name)
