"""The masking collator."""

import pytest
import torch

from repdeg_fast.data import MaskingCollator

WORDS = list(range(10, 50))  # of these, odd ones continue the word before


def collator(**options):
    return MaskingCollator(mask_token_id=3, pad_token_id=0, special_token_ids=[1, 2], **options)


def sentences(number=400, length=64):
    generator = torch.Generator().manual_seed(0)
    inner = [torch.randint(10, 50, (n,), generator=generator) for n in range(length - number % length, length)]
    inner += [torch.randint(10, 50, (length,), generator=generator) for _ in range(number)]
    return [torch.cat([torch.tensor([1]), words, torch.tensor([2])]) for words in inner]


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_masked_share(whole_words, probability):
    continuations = WORDS[1::2] if whole_words else None
    generator = torch.Generator().manual_seed(1)
    examples = sentences()
    result = collator(probability=probability, continuation_token_ids=continuations, generator=generator)(examples)
    original = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    masked = result["labels"] != -100
    ordinary = original >= 10
    assert not (masked & ~ordinary).any()
    assert torch.equal(result["attention_mask"].bool(), original != 0)
    assert torch.equal(result["labels"][masked], original[masked])
    assert torch.equal(result["input_ids"], original.masked_fill(masked, 3))
    share = masked.sum() / ordinary.sum()
    tokens_a_word = 3 if whole_words else 1  # E n²/E n of a geometric n with mean 2
    error = (probability * (1 - probability) * tokens_a_word / ordinary.sum()) ** 0.5
    assert abs(share - probability) < 4 * error
    if whole_words:
        continues = (original % 2 == 1) & ordinary
        continues[:, :2] = False  # the first word may begin within
        assert torch.equal(masked[:, 1:][continues[:, 1:]], masked[:, :-1][continues[:, 1:]])
        assert (masked[:, 2:] != masked[:, 1:-1]).any()


def test_the_generator_decides():
    draw = [collator(generator=torch.Generator().manual_seed(seed))(sentences())["labels"] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_examples_as_mappings():
    mappings = [{"input_ids": [1, 10, 11, 2], "token_type_ids": [0, 0, 1, 1]}, {"input_ids": [1, 10, 2]}]
    mappings[1] |= {"token_type_ids": [0, 0, 0], "attention_mask": [1, 0, 1]}
    result = collator(probability=1.0)(mappings)
    assert result["input_ids"].tolist() == [[1, 3, 3, 2], [1, 10, 2, 0]]
    assert result["labels"].tolist() == [[-100, 10, 11, -100], [-100] * 4]
    assert result["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_collator_bad_input():
    with pytest.raises(ValueError, match=r"probability: expected a number from 0 to 1, got 1\.5"):
        collator(probability=1.5)
    with pytest.raises(TypeError, match="probability: expected a number, got str"):
        collator(probability="x")


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "examples: expected at least one"),
        ({"input_ids": [[1, 2]]}, TypeError, "examples: expected a sequence of examples, got one mapping"),
        ([1, 10, 2], TypeError, r"examples\[0\]: input_ids: expected a sequence of integers, got 1"),
        (["some", "text"], TypeError, r"examples\[0\]: input_ids: .* got 'some'"),
        ([[1, 2], [[1, 2]]], TypeError, r"examples\[1\]: input_ids: .* got \[\[1, 2\]\]"),
        ([[1.5]], TypeError, r"examples\[0\]: input_ids: .* got \[1\.5\]"),
        ([{"ids": [1]}], ValueError, r"examples\[0\]: expected input_ids, .* got ids"),
        (
            [[1, 2], {"input_ids": [1], "token_type_ids": [0]}],
            ValueError,
            r"examples\[0\]: expected .* token_type_ids in all examples or in none, got input_ids",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            ValueError,
            r"examples\[0\]: attention_mask: expected 2 values like input_ids, got 1",
        ),
    ],
)
def test_bad_examples(examples, error, message):
    with pytest.raises(error, match=message):
        collator()(examples)
