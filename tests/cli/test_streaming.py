"""Text that arrives token by token is the text of all tokens, and characters arrive whole."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models

from saccade.cli.streaming import TextStream
from tests.cli.byte_tokenizer import Bytes

TEXTS = [
    "plain", "  leading spaces", "\n\n line\n", "a🌍b",
    "👩\u200d👩\u200d👧\u200d👦 family", "čeština 🌍🌍",
    "你好，世界。", "日本語 と 한국어", "it 's , a test ! n't", "",
]  # fmt: skip


def streamed(tokenizer, tokens):
    """The parts of the text, the last one from `flush`."""
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokens] + [stream.flush()]
    assert stream.flush() == ""
    return parts


@pytest.mark.parametrize("text", TEXTS)
def test_characters_arrive_whole(text):
    parts = streamed(Bytes(), text.encode())
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_a_character_that_never_ends_is_shown_at_the_end():
    assert streamed(Bytes(), "a🌍".encode()[:3]) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_left_out():
    assert streamed(Bytes(), [0, 97, 0, 98, 0]) == ["", "a", "", "b", "", ""]


def test_spaces_of_sentencepiece():
    """Llama's decoder removes the space in front of the first word and none of the others."""
    words = ["▁a", "▁b", "c", "▁", "<0xF0>", "<0x9F>", "<0x8C>", "<0x8D>", "<unk>"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokens = [0, 1, 2, 3, 4, 5, 6, 7, 1, 4]
    parts = streamed(SimpleNamespace(backend_tokenizer=made), tokens)
    assert "".join(parts) == made.decode(tokens) == "a bc 🌍 b\ufffd"
    assert parts[0] == "a" and parts[-1] == "\ufffd"


def test_without_a_fast_tokenizer_the_text_comes_at_the_end():
    slow = SimpleNamespace(decode=lambda tokens, skip_special_tokens: bytes(tokens).decode())
    assert streamed(slow, b"abc") == ["", "", "", "abc"]


@pytest.mark.real_model
def test_the_real_tokenizer():
    from saccade.hf.load import load_model

    tokenizer, rng = load_model("smollm2").tokenizer, random.Random(0)
    cases = [tokenizer(text).input_ids for text in TEXTS]
    cases += [[rng.randrange(len(tokenizer)) for _ in range(40)] for _ in range(50)]
    for tokens in cases:
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(streamed(tokenizer, tokens)) == expected
