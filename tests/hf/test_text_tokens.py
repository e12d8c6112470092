"""Long texts in pieces: the tokens of the whole text, and no more work than is needed."""

from __future__ import annotations

import random

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from saccade.core import BadInput
from saccade.hf import text_tokens
from saccade.hf.text_tokens import all_tokens, count_tokens, first_tokens, token_pieces

WORDS = ["alpha", "beta", "naïve", "日本", "x" * 40, "🙂", "12345", "the", "of", "\n\n", "  "]


def text(seed, words=4000):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)


def prefixed():
    """As Llama 2: no words, spaces are letters, and one is put in front of every text."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return made, trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, max_token_length=12, show_progress=False
    )


def wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )


@pytest.fixture(scope="module", params=[byte_level, prefixed, wordpiece])
def tokenizer(request):
    made, trainer = request.param()
    made.add_special_tokens(["<s>", "</s>"])
    made.train_from_iterator([text(seed, 300) for seed in range(3)], trainer)
    ends = [("<s>", made.token_to_id("<s>") or 0), ("</s>", made.token_to_id("</s>") or 1)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(text_tokens, "WINDOW", 3000)
    monkeypatch.setattr(text_tokens, "_OVERLAP", 600)
    monkeypatch.setattr(text_tokens, "_WIDEST", 12_000)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("special", [False, True])
def test_pieces_are_the_tokens_of_the_whole_text(tokenizer, seed, special):
    given = text(seed)
    expected = tokenizer(given, add_special_tokens=special).input_ids
    assert len(list(token_pieces(tokenizer, given))) > 4
    assert all_tokens(tokenizer, given, special=special) == list(expected)


def test_the_first_tokens_of_a_text_and_of_a_file(tokenizer, tmp_path):
    given = text(5)
    whole = list(tokenizer(given, add_special_tokens=False).input_ids)
    (tmp_path / "t").write_text(given)
    for count in (0, 1, 100, len(whole) - 1, len(whole), len(whole) + 50):
        assert first_tokens(tokenizer, given, count) == whole[:count]
        assert first_tokens(tokenizer, tmp_path / "t", count) == whole[:count]
        special = list(tokenizer(given).input_ids)[: min(count, len(whole))]
        assert first_tokens(tokenizer, given, len(special), special=True) == special


def test_only_as_much_is_tokenized_as_is_used(tokenizer):
    class Counting:
        is_fast, read = True, 0

        def __call__(self, text, **options):
            Counting.read += len(text)
            return tokenizer(text, **options)

    given = text(6, 60_000)
    assert len(given) > 400_000
    first_tokens(Counting(), given, 200)
    assert Counting.read < 20_000
    Counting.read = 0
    count_tokens(Counting(), given, 200)
    assert Counting.read < 20_000


def test_a_text_is_counted_exactly_where_it_fits_and_estimated_where_not(tokenizer):
    given = text(7)
    exact = len(tokenizer(given, add_special_tokens=False).input_ids)
    assert count_tokens(tokenizer, given, exact + 10) == exact
    assert count_tokens(tokenizer, given, exact * 100) == exact
    assert exact * 0.8 < count_tokens(tokenizer, given, 300) < exact * 1.2


def test_one_endless_word_comes_to_an_end(tokenizer):
    given = "".join(random.Random(1).choice("ab") for _ in range(40_000))
    assert sum(map(len, token_pieces(tokenizer, given))) > 0
    assert tokenizer.decode(all_tokens(tokenizer, "x" * 40_000, special=False))


def test_a_tokenizer_that_does_not_say_where_tokens_begin():
    class Slow:
        def __call__(self, text, add_special_tokens):
            return type("Found", (), {"input_ids": list(text.encode())})

    given = text(8)
    assert all_tokens(Slow(), given, special=False) == list(given.encode())
    assert first_tokens(Slow(), given, 50) == list(given.encode())[:50]


def test_files_that_are_no_text(tokenizer, tmp_path):
    (tmp_path / "t").write_bytes(b"abc\xff" * 10)
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        first_tokens(tokenizer, tmp_path / "t", 5)
    with pytest.raises(BadInput, match="cannot read the text"):
        first_tokens(tokenizer, tmp_path / "none", 5)
