"""Collators of spans: whole words, 80/10/10, cut before masking, pairs side by side."""

import json
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import BertTokenizer, RobertaTokenizer  # noqa: E402

from repdeg_fast.data import MaskingCollator, SpanCollator, SpanPairCollator  # noqa: E402

WORDS = [f"{letter}{other}" for letter in "abcdefgh" for other in "klmnop"]


@pytest.fixture(scope="module")
def bert():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *WORDS, *(f"##{word}" for word in WORDS)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def roberta():
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(["the lower the newer, a wider window"] * 9, vocab_size=290, special_tokens=special)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return RobertaTokenizer(vocab=bpe.get_vocab(), merges=merges)


def spans(number, length=20):
    return [torch.randint(6, 6 + 2 * len(WORDS), (length,)) for _ in range(number)]


def original(batch):
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_counts_and_fates(bert):
    collator = SpanCollator(bert, max_length=64, generator=torch.Generator().manual_seed(1))
    rows = spans(300)
    batch = collator(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (300, 22)
    chosen = batch["labels"] != -100
    assert torch.equal(original(batch)[:, 1:-1], torch.stack(rows))
    assert (chosen.sum(1) <= 3).all()  # round(0.15 · 20)
    assert chosen.sum() > 2.6 * 300  # words that would exceed the number are passed over
    assert not chosen[:, [0, -1]].any()
    fates = batch["input_ids"][chosen]
    masked, kept = fates == bert.mask_token_id, fates == batch["labels"][chosen]
    assert 0.76 < masked.double().mean() < 0.84
    assert 0.07 < kept.double().mean() < 0.14  # a random token may be the same


def test_words_are_chosen_whole(bert):
    collator = SpanCollator(bert, probability=0.4)
    for _ in range(20):
        (row,) = spans(1)
        chosen = (collator([row])["labels"][0] != -100)[1:-1]
        continues = row >= 6 + len(WORDS)
        continues[0] = False
        assert torch.equal(chosen[1:][continues[1:]], chosen[:-1][continues[1:]])


def test_the_words_of_roberta(roberta):
    collator = SpanCollator(roberta, probability=0.5)
    ids = roberta("the lowing wider winter", add_special_tokens=False).input_ids
    words, starts = roberta.convert_ids_to_tokens(ids), [0]
    starts += [i for i, token in enumerate(words) if token.startswith("Ġ")]
    assert len(starts) == 4 < len(words)  # some word has more than one token
    seen = set()
    for _ in range(30):
        batch = collator([{"text": ids}])
        assert batch["input_ids"][0, 0] == roberta.bos_token_id
        assert batch["input_ids"][0, -1] == roberta.eos_token_id
        chosen = (batch["labels"][0] != -100)[1:-1].tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert len({*chosen[start:stop]}) == 1
        seen.add(tuple(chosen))
    assert len(seen) > 2
    assert len(MaskingCollator.from_tokenizer(roberta, whole_words=True).continuation_token_ids)


def test_a_span_is_cut_before_its_words_are_chosen(bert):
    collator = SpanCollator(bert, max_length=12)
    row = torch.arange(6, 56)
    starts = set()
    for _ in range(40):
        batch = collator([row, row[:3]])
        assert batch["input_ids"].shape == (2, 12)
        cut = original(batch)[0, 1:-1]
        assert torch.equal(cut, torch.arange(cut[0], cut[0] + 10))
        assert 1 <= (batch["labels"][0] != -100).sum() <= 2
        starts.add(int(cut[0]))
        assert batch["attention_mask"].sum(1).tolist() == [12, 5]
        assert (batch["input_ids"][1, 5:] == bert.pad_token_id).all()
        assert (batch["labels"][1] != -100).sum() == 1  # max(1, round(0.45))
    assert len(starts) > 10


def test_pairs_are_two_spans_of_one_document_side_by_side(bert):
    documents = [[[6 + 10 * i + j] * 4 for j in range(2 + i)] for i in range(4)]
    collator, pairs = SpanPairCollator(bert, probability=0.3), set()
    for _ in range(20):
        rows = original(collator([{"spans": spans_} for spans_ in documents]))[:, 1]
        assert len(rows) == 8
        assert torch.equal((rows[::2] - 6) // 10, torch.arange(4))
        assert torch.equal((rows[1::2] - 6) // 10, torch.arange(4))
        assert not (rows[::2] == rows[1::2]).any()
        pairs.add(tuple(rows.tolist()))
    assert len(pairs) > 5


def test_the_generator_decides(bert):
    documents = [spans(3), spans(2)]
    batches = [SpanPairCollator(bert, generator=torch.Generator().manual_seed(4))(documents) for _ in range(2)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def first_label(batches):
    return [batch["labels"].max().item() for batch in batches]


@pytest.mark.parametrize("kind", [MaskingCollator, SpanCollator])
def test_workers_draw_numbers_of_their_own(bert, kind):
    """Two forked workers, two epochs: with the generator's copies all four lists would be the same."""
    generator, make = torch.Generator().manual_seed(1), getattr(kind, "from_tokenizer", kind)
    loader = torch.utils.data.DataLoader(
        [list(range(6, 100))] * 8, collate_fn=make(bert, generator=generator, probability=0.01), num_workers=2
    )
    state = generator.get_state()
    epochs = [first_label(loader) for _ in range(2)]
    assert epochs[0][::2] != epochs[0][1::2]
    assert epochs[0] != epochs[1]
    assert torch.equal(generator.get_state(), state)


def test_a_collator_is_sent_to_a_new_process_without_its_generator(bert, monkeypatch):
    collator = SpanCollator(bert, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("repdeg_fast.data._random.get_spawning_popen", lambda: "a process")
    assert pickle.loads(pickle.dumps(collator)).generator is None
    monkeypatch.undo()
    assert collator.generator is not None


def test_bad_input(bert):
    collator = SpanPairCollator(bert)
    for examples, error, message in (
        ([[[7, 8]]], ValueError, r"examples\[0\]: expected a document of at least two spans, got 1; leave such out"),
        ([], ValueError, "examples: expected at least one, got none"),
        ({"spans": []}, TypeError, "examples: expected a sequence of examples, got dict"),
        ([[[7], ["a"]]], TypeError, r"examples\[0\], span \d: expected token ids"),
        ([[[7], []]], ValueError, r"examples\[0\], span 1: expected at least one token, got none"),
        ([{"text": [7]}], ValueError, r"examples\[0\]: expected a mapping with 'spans', got one with text"),
        ([[[2, 7, 3], [8]]], ValueError, r"examples: expected spans without special tokens, got one that begins with"),
    ):
        with pytest.raises(error, match=message):
            collator(examples)
    for options, error, message in (
        ({"max_length": 2}, ValueError, "max_length: expected room for a token beside the special ones, got 2"),
        ({"max_length": 1.5}, TypeError, "max_length"),
        ({"probability": 0}, ValueError, "probability: expected a number above 0 and at most 1, got 0"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ):
        with pytest.raises(error, match=message):
            SpanCollator(bert, **options)
    plain = BertTokenizer(vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])})
    with pytest.raises(ValueError, match="whole_words: expected a tokenizer that marks where words begin"):
        SpanCollator(plain)
