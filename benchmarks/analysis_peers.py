"""The measures of repdeg_fast.analysis beside the arithmetic and the packages that people use: time, memory, values.

    pip install --no-deps faiss-cpu IsoScore pytorch-cka repsim
    python benchmarks/analysis_peers.py [--quick] [--only WORDS] [--json FILE]

A package that is not installed is listed as such. Repeats are interleaved, times are of the processor (all threads),
and ratios are medians, for machines that are not quiet. Memory is measured in a process of its own: the largest
resident set beyond that before the call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repdeg_fast import analysis
from repdeg_fast.analysis.metrics import representation_metrics
from repdeg_fast.bench.peers import Peer

Provider = Callable[..., Any]

PEERS = {
    "faiss-cpu, exact": Peer("faiss", "faiss-cpu", "faiss"),
    "IsoScore": Peer("IsoScore", "IsoScore", "IsoScore"),
    "pytorch-cka": Peer("pytorch-cka", "pytorch-cka", "cka"),
    "repsim": Peer("repsim", "repsim", "repsim"),
    "a training step": Peer("transformers", "transformers", "transformers"),
}


def published_pwcca(x: Tensor, y: Tensor) -> float:
    """PWCCA over the points: numpy.linalg.svd of both sides and of the product of their bases, projections of x."""
    a, b = (z.double().numpy() - z.double().numpy().mean(0) for z in (x, y))
    u, p = (np.linalg.svd(z, full_matrices=False)[0] for z in (a, b))
    turn, correlations, _ = np.linalg.svd(u.T @ p, full_matrices=False)
    weights = np.abs((u @ turn).T @ a).sum(1)
    return float(weights @ correlations / weights.sum())


def gram_cka(*layers: Tensor) -> float:
    """Unbiased linear CKA of all pairs from N×N Gram matrices, as pytorch-cka has it; the mean over the pairs."""
    grams = []
    for layer in layers:
        gram = layer @ layer.T
        grams.append(gram.fill_diagonal_(0))
    n = len(grams[0])
    sums = [gram.sum(1) for gram in grams]

    def hsic(i: int, j: int) -> Tensor:
        total = sums[i].sum() * sums[j].sum() / ((n - 1) * (n - 2))
        return (grams[i] * grams[j]).sum() + total - 2 / (n - 2) * (sums[i] @ sums[j])

    count = range(len(layers))
    own = [hsic(i, i) for i in count]
    return float(torch.stack([hsic(i, j) / (own[i] * own[j]).sqrt() for i in count for j in count]).mean())


def our_cka(*layers: Tensor) -> float:
    return float(analysis.cka_matrix(analysis.Covariances().update(*layers), unbiased=True).mean())


def pytorch_cka(*layers: Tensor) -> float:
    from cka import cka_from_features

    return float(cka_from_features(list(layers), list(layers)).mean())


def repsim_pwcca(x: Tensor, y: Tensor) -> float:
    """Another definition: its value is not ours."""
    import repsim

    return float(repsim.pwcca([x.double().numpy(), y.double().numpy()])[0, 1])


def chunked_identity(points: Tensor, tokens: Tensor, k: int = 50) -> float:
    """torch.topk over rows of the cosine matrix, 1,000 rows at a time."""
    unit, total = torch.nn.functional.normalize(points), 0
    for start in range(0, len(points), 1000):
        cosines = unit[start : start + 1000] @ unit.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2
        nearest = cosines.topk(k).indices
        total += int((tokens[nearest] == tokens[start : start + len(cosines), None]).sum())
    return total / (len(points) * k)


def faiss_identity(points: Tensor, tokens: Tensor, k: int = 50) -> float:
    """faiss-cpu's exact index."""
    import faiss

    unit = torch.nn.functional.normalize(points).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    total = 0
    for start in range(0, len(unit), 10000):
        found = torch.from_numpy(index.search(unit[start : start + 10000], k + 1)[1])
        own = found == torch.arange(start, start + len(found))[:, None]
        same = (tokens[found] == tokens[start : start + len(found), None]) & ~own
        total += int(same.sum())
    return total / (len(points) * k)


def isoscore_package(points: Tensor) -> float:
    from IsoScore.IsoScore import IsoScore

    return float(IsoScore(points))


class Case(NamedTuple):
    inputs: Callable[[], tuple[Any, ...]]
    providers: dict[str, Provider]  # ours first; those named in PEERS need a package


def cases(quick: bool) -> dict[str, Case]:
    n, d, wide = (2000, 96, 4000) if quick else (20000, 768, 100000)

    def two() -> tuple[Tensor, ...]:
        causes = torch.randn(n, d // 2)
        return tuple(causes @ torch.randn(d // 2, d) / d**0.5 + torch.randn(n, d) for _ in range(2))

    def four() -> tuple[Tensor, ...]:
        return tuple(torch.randn(4096 if not quick else 512, d) + 0.5 for _ in range(4))

    def vectors() -> tuple[Tensor, ...]:
        tokens = torch.randint(1000, (wide,))
        return torch.randn(1000, 384)[tokens] + 1.5 * torch.randn(wide, 384), tokens

    def embedding() -> tuple[Tensor, ...]:
        return (torch.randn(3000 if quick else 30522, d) + 0.1,)

    return {
        f"pwcca {n} × {d}": Case(
            two,
            {
                "ours": lambda x, y: analysis.pwcca(x, y).similarity,
                "numpy.linalg.svd": published_pwcca,
                "repsim": repsim_pwcca,
            },
        ),
        "unbiased CKA, 4 layers": Case(four, {"ours": our_cka, "Gram matrices": gram_cka, "pytorch-cka": pytorch_cka}),
        f"token_identity {wide} × 384": Case(
            vectors,
            {
                "ours": analysis.token_identity,
                "chunked torch.topk": chunked_identity,
                "faiss-cpu, exact": faiss_identity,
            },
        ),
        "isoscore of an embedding": Case(embedding, {"ours": analysis.isoscore, "IsoScore": isoscore_package}),
        CALLBACK: Case(
            lambda: bert_step(quick),
            {
                "ours": lambda model, batch: representation_metrics(_embedding(model))["average_cosine"],
                "a training step": training_step,
            },
        ),
    }


CALLBACK = "the callback's metrics beside a step of BERT-base"
EVERY = 100  # steps, the callback's default


def bert_step(quick: bool) -> tuple[Any, ...]:
    """A masked language model and 8 × 32 tokens."""
    import transformers

    config = transformers.BertConfig()
    if quick:
        config.num_hidden_layers, config.vocab_size = 1, 3000
    model = transformers.BertForMaskedLM(config)
    ids = torch.randint(5, model.config.vocab_size, (8, 32))
    return model, {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)}


def _embedding(model: Any) -> Tensor:
    return model.get_input_embeddings().weight


def training_step(model: Any, batch: dict[str, Tensor]) -> float:
    """Forward, backward and Adam's step."""
    if not hasattr(model, "optimizer"):
        model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loss = model(**batch).loss
    loss.backward()
    model.optimizer.step()
    model.optimizer.zero_grad()
    return loss.item()


def alone(name: str, provider: str, quick: bool, queue: Any) -> None:
    """Seconds of a first call, MiB beyond the inputs, and the value."""
    case = cases(quick)[name]
    torch.manual_seed(0)
    inputs = case.inputs()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, start = _status("VmRSS"), time.process_time()
    value = case.providers[provider](*inputs)
    queue.put((time.process_time() - start, (_status("VmHWM") - before) / 1024, value))


def _status(key: str) -> int:
    """KiB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(name: str, case: Case, quick: bool, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    inputs = case.inputs()
    providers = dict(case.providers)
    rows: list[dict[str, Any]] = []
    for provider in case.providers:
        if provider in PEERS and (reason := PEERS[provider].unavailable({})):
            rows.append({"case": name, "provider": provider, "missing": reason})
            print(_line(rows[-1]))
            del providers[provider]
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    for repeat in range(repeats if repeats > 1 else 0):
        for provider, run in providers.items():
            start = time.process_time()
            run(*inputs)
            if repeat:  # the first is for what is made once
                times[provider].append(time.process_time() - start)
    del inputs
    context = multiprocessing.get_context("spawn")
    for provider in providers:
        queue = context.Queue()
        process = context.Process(target=alone, args=(name, provider, quick, queue))
        process.start()
        seconds, peak, value = queue.get()
        process.join()
        own = times[provider] = times[provider] or [seconds]
        rows.append(
            {
                "case": name,
                "provider": provider,
                "seconds": statistics.median(own),
                "times ours": statistics.median(t / ours for t, ours in zip(own, times["ours"], strict=True)),
                "peak MiB beyond inputs": peak,
                "value": value,
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options.add_argument(
        "--repeats", type=int, default=4, help="the first is not counted; 1: a first call in its own process"
    )
    options.add_argument("--only", default="", help="cases whose name contains this")
    options.add_argument("--json", help="write the figures there")
    given = options.parse_args()
    rows = []
    for name, case in cases(given.quick).items():
        if given.only not in name:
            continue
        rows += measure(name, case, given.quick, given.repeats)
        if name == CALLBACK and "times ours" in rows[-1]:
            print(f"{name}: {100 / (rows[-1]['times ours'] * EVERY):.3f} % of the steps' time at one in {EVERY} steps")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
