"""Vocabularies cut over two and four processes, and training on several: the numbers of one process."""

import pydoc_data.topics
import re

import distributed_cases as cases
import pytest
import torch
import training_cases
from process_pool import PATIENCE, Pool

from repdeg_fast.distributed import VocabularyShard

if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)


def pool_of(ranks):
    @pytest.fixture(scope="module")
    def pool():
        pool = Pool(ranks)
        yield pool
        pool.close()

    return pool


one, two, four = map(pool_of, (1, 2, 4))


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue("two" if request.param == 2 else "four")


FORMS = ["dtensor", "shard"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_cosreg(ranks, form, weighted):
    for dtype, whole, backend in [
        (torch.float32, 17, "auto"),
        (torch.float32, 5, "reference"),
        (torch.bfloat16, 33, "auto"),
    ]:
        ranks.run(cases.cosreg, form, weighted, dtype, whole, backend)


def test_cosreg_of_parameters_over_two_dimensions(four):
    four.run(cases.cosreg_of_two_dimensions)


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy(ranks, form):
    for heads, options, dtype, whole, backend in [
        (3, {}, torch.float32, 21, "auto"),
        (2, {"reduction": "none", "label_smoothing": 0.1}, torch.float32, 5, "auto"),
        (1, {"return_lse": True, "label_smoothing": 0.2, "reduction": "sum"}, torch.float64, 21, "auto"),
        (1, {"softcap": 4.0, "padding_idx": 2, "bias": False}, torch.float32, 5, "reference"),
        (2, {}, torch.bfloat16, 40, "auto"),
        (2, {"smallest": 64, "label_smoothing": 0.1}, torch.bfloat16, 40, "auto"),
        (3, {"smallest": 64, "label_smoothing": 0.1}, torch.float32, 40, "auto"),
    ]:
        ranks.run(cases.cross_entropy, form, heads, options, dtype, whole, backend)


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_with_options(ranks, form):
    for heads, options, dtype, whole, backend in [
        (2, {"weighted": True}, torch.float32, 21, "auto"),
        (2, {"weighted": True, "label_smoothing": 0.2, "reduction": "none"}, torch.float32, 5, "auto"),
        (1, {"weighted": True, "label_smoothing": 0.2, "softcap": 3.0, "shift": 2}, torch.float64, 21, "auto"),
        (1, {"label_smoothing": 0.3, "softcap": 3.0, "reduction": "sum"}, torch.float32, 21, "reference"),
        (2, {"lse_square_scale": 0.1, "weighted": True}, torch.float32, 21, "reference"),
        (1, {"lse_square_scale": 0.1, "reduction": "none", "shift": True}, torch.float32, 40, "auto"),
        (2, {"gradient_filter": 0.02, "label_smoothing": 0.1, "plain": True}, torch.float32, 21, "reference"),
        (2, {"gradient_filter": 0.02, "softcap": 5.0, "plain": True}, torch.float32, 40, "auto"),
        (3, {"weighted": True, "label_smoothing": 0.1, "lse_square_scale": 0.01}, torch.bfloat16, 40, "auto"),
    ]:
        ranks.run(cases.cross_entropy_options, form, heads, options, dtype, whole, backend)


@pytest.mark.parametrize(
    ("ranges", "whole", "expected"),
    [
        ([(0, 5), (4, 8)], 8, r"ranges that follow .*\[0, 5\), \[4, 8\): that of rank 1 overlaps"),
        ([(0, 3), (4, 8)], 8, "that of rank 1 leaves a gap"),
        ([(0, 4), (4, 7)], 8, r"ranges that end at 8, got \[0, 4\), \[4, 7\)"),
        ([(0, 4), (4, 8)], [8, 9], r"whole: expected the same vocabulary on all ranks, got \[8, 9\]"),
    ],
)
def test_ranges_that_do_not_fit(two, ranges, whole, expected):
    for kind, text in two.run(cases.bad_ranges, ranges, whole):
        assert kind == "ValueError"
        assert re.search(expected, text)


def test_bad_input_is_an_error_on_every_rank(two):
    expected = {
        "columns": r"weight: expected rows over ranks, Shard\(0\), .* got a DTensor \[Shard\(1\)\]",
        "columns of cosreg": r"weight: expected rows over ranks, Shard\(0\)",
        "no such dimension": r"dimension: expected one of the mesh's \('tp'\), got 'pp'",
        "other group": "group: expected one that rank . is in",
        "other group's losses": "group: expected one that rank . is in",
        "group by name": "group: expected a process group of torch.distributed, got str",
        "other rows": r"weight: expected 4 rows, those of shard \[., .\), got shape \(3, 12\)",
        "no shard": "shard: expected a VocabularyShard, got tuple",
        "shard and dtensor": "shard: expected None beside a weight that is a DTensor",
        "plain bias": "bias: expected a DTensor like weight, got a plain tensor",
        "replicated bias": r"bias: expected a DTensor \[Shard\(0\)\].* like weight, got a DTensor \[Replicate",
        "hidden states cut": r"hidden_states: expected the same on all ranks, Replicate\(\)",
        "target": "target: expected values from 0 to 7, .* got 8",
        "chunked": "strategy: expected auto or streaming over shards",
        "class weights of the rows here": r"class_weight: expected shape \(8,\), one value a class, got \(4,\)",
        "class weights cut": r"class_weight: expected the same on all ranks, Replicate\(\)",
        "shift": "shift: expected a number of positions",
        "padding": "padding_idx: expected a row of weight, from 0 to 7, got 8",
        "row weights": "row_weight: expected no negative value on any rank",
    }
    for found in two.run(cases.bad_input):
        assert found.keys() == expected.keys()
        for name, error in found.items():
            assert error, name
            assert re.search(expected[name], error[1]), (name, error)


def test_what_ranks_disagree_on_is_named(two):
    for found in two.run(cases.disagree):
        for name, error in found.items():
            assert error, name
            assert re.search(rf"expected the same arguments on all ranks, got, in their order, {name}", error[1]), error
        assert found["temperature"][1].startswith("mlm_losses_and_sample: ")


def test_no_process_group():
    with pytest.raises(RuntimeError, match="expected an initialized process group, got none; start with torchrun"):
        VocabularyShard(0, 8, 8)


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_those_of_one_process(ranks, form):
    for options, dtype, whole, backend in [
        ({}, torch.float32, 37, "auto"),
        ({"tied": True, "padding_idx": 3, "gradient_scale": 0.5}, torch.float32, 5, "reference"),
        ({"hard": False, "temperature": 0.7}, torch.float32, 37, "auto"),
        ({"hard": False, "first_position": 9}, torch.float64, 21, "auto"),
        ({}, torch.bfloat16, 37, "auto"),
    ]:
        ranks.run(cases.sample, form, options, dtype, whole, backend)


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_sample_in_one_sweep(ranks, form):
    for strategy, whole, heads in [("auto", 23, 3), ("streaming", 23, 3), ("auto", 6, 1), ("auto", 9000, 2)]:
        ranks.run(cases.joint, form, strategy, whole, heads)


def test_dtensors_in_dtensors_out(two):
    two.run(cases.dtensors)


def test_no_rows(two):
    two.run(cases.nothing_to_do)


def test_ranks_agree_on_a_seed(two):
    assert all(different > 10 for different in two.run(cases.seeds))


@pytest.mark.interpreter
def test_in_triton(two):
    two.run(cases.cosreg, "shard", True, torch.float32, 17, "triton")
    two.run(cases.cross_entropy, "shard", 2, {"softcap": 5.0}, torch.float32, 21, "triton")
    options = {"weighted": True, "label_smoothing": 0.2, "softcap": 3.0, "gradient_filter": 0.02}
    two.run(cases.cross_entropy_options, "dtensor", 2, options, torch.float32, 21, "triton")
    two.run(cases.sample, "dtensor", {}, torch.float32, 37, "triton")
    two.run(cases.sample, "shard", {"hard": False}, torch.float16, 21, "triton")
    two.run(cases.joint, "shard", "auto", 23)


def test_contrastive_loss_of_a_shared_batch(ranks):
    both = {"directions": ("query_to_doc", "doc_to_query", "query_to_query")}
    for options, dtype in [
        ({"exchange": "ring"}, torch.float32),
        ({"exchange": "ring", "similarity": "dot", "scale": 0.5, "reduction": "sum"}, torch.float32),
        ({"exchange": "ring", "reduction": "none"}, torch.bfloat16),
        ({"ids": True}, torch.float32),
        ({"hardness_mode": "hard_negatives", "hardness_strength": 2.0, "reduction": "sum", **both}, torch.float32),
        ({"reduction": "none"}, torch.float32),
    ]:
        ranks.run(cases.contrastive, options, dtype)


def test_bad_contrastive_input(two):
    for found in two.run(cases.bad_contrastive):
        for name, error in found.items():
            assert error, name
            assert error[1].startswith(f"{name}: "), error


@pytest.fixture(scope="module")
def alone(one):
    """What one process makes of a training: once each."""
    found = {}

    def train(kind):
        if kind not in found:
            (found[kind],) = one.run(training_cases.train, kind, None)
        return found[kind]

    return train


@pytest.mark.parametrize("kind", ["Amos", "Condenser", "HuggingFace", "Admin", "LanguageModel", "Contrastive"])
def test_twenty_steps_are_those_of_one_process(alone, two, four, kind):
    check_trained(two.run(training_cases.train, kind, "fsdp-layers"), alone(kind))
    check_trained(four.run(training_cases.train, kind, "ddp"), alone(kind))


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("LanguageModel", "fsdp"),
        ("TiedApart", "fsdp-layers"),
        ("Ring", "ddp"),
        ("SentenceTransformers", "ddp"),
        ("Amos", "vocabulary"),
        ("HuggingFace", "vocabulary"),
        ("Causal", "vocabulary"),
        ("LanguageModel", "vocabulary"),
    ],
)
def test_twenty_steps_in_another_way(alone, two, kind, wrap):
    if kind == "SentenceTransformers":
        pytest.importorskip("sentence_transformers")
    check_trained(two.run(training_cases.train, kind, wrap), alone(kind))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp-layers"])
def test_gradient_caching_over_ranks(alone, two, wrap):
    """Masked words are not equally many: the numbers of one process without chunks."""
    check_trained(two.run(training_cases.train, "CachedCondenser", wrap), alone("Condenser"))


def test_training_goes_on_with_another_number_of_processes(alone, two, four, tmp_path):
    kind, wrap = "LanguageModel", "fsdp-layers"
    two.run(training_cases.train, kind, wrap, range(10), str(tmp_path))
    expected = alone(kind)
    found = four.run(training_cases.train, kind, wrap, range(10, 20), str(tmp_path))
    check_trained(found, expected | {"losses": expected["losses"][10:]})


def test_an_example_goes_on_with_another_number_of_ranks(one, two, four, tmp_path):
    """Ranks share its batches; one process has the same losses."""
    text = tmp_path / "text.txt"
    text.write_text("\n# ".join(pydoc_data.topics.topics.values())[:30_000], encoding="utf-8")
    small = "--vocabulary-size 300 --hidden-size 16 --layers 1 --heads 2 --sequence-length 16 --batch-size 8 --steps 8"
    arguments = lambda name: ["--text", str(text), *small.split(), "--output", str(tmp_path / name)]  # noqa: E731
    (alone,) = one.run(training_cases.example, arguments("alone"), 8)
    two.run(training_cases.example, arguments("ranks"), 4)
    for history in four.run(training_cases.example, arguments("ranks"), 4):
        assert len(history) == 8
        for line, right in zip(history, alone, strict=True):
            assert line == pytest.approx(right, rel=1e-4)


def check_trained(found, expected):
    assert expected["losses"][0] != expected["losses"][-1]
    for rank in found:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
        assert len(rank["ids"]) == len(expected["ids"])
        assert all(torch.equal(mine, right) for mine, right in zip(rank["ids"], expected["ids"], strict=True))
        for name, right in expected["parameters"].items():
            torch.testing.assert_close(rank["parameters"][name], right, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_is_put_on_a_mesh_in_one_line(ranks):
    for found in ranks.run(cases.style):
        for text, error in found.items():
            assert error, text
            assert text in error[1]


@pytest.mark.parametrize("empty", [False, True])
def test_moments_of_all_ranks(two, empty):
    for kind, text in two.run(cases.moments, empty):
        assert kind == "ValueError"
        assert "sides: expected the same columns on all ranks, got [[2], [3]]" in text


def test_ranks_that_are_late_or_dead_end_the_others():
    pool = Pool(2)
    late, _ = pool.run(cases.late, 0.5)
    assert late[0] == "RuntimeError"
    assert "imed out" in late[1]
    for pipe in pool.pipes:
        pipe.send((cases.die, (7,)))
    assert pool.pipes[0].poll(PATIENCE + 5)
    _, error = pool.pipes[0].recv()
    assert "in linear_cross_entropy" in error
    assert "RuntimeError" in error
    pool.close()
