"""Text that arrives token by token is the text of all tokens, and characters arrive whole."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from saccade.cli.streaming import TextStream
from tests.cli.byte_tokenizer import Bytes, backend

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
    parts = streamed(SimpleNamespace(backend_tokenizer=made, decode=made.decode), tokens)
    assert "".join(parts) == made.decode(tokens) == "a bc 🌍 b\ufffd"
    assert parts[0] == "a" and parts[-1] == "\ufffd"


def test_without_a_fast_tokenizer_the_text_comes_at_the_end():
    slow = SimpleNamespace(decode=lambda tokens, skip_special_tokens: bytes(tokens).decode())
    assert streamed(slow, b"abc") == ["", "", "", "abc"]


PIECES = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "pieces": decoders.Sequence([*PIECES]),
    "pieces, stripped": decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)]),
    "pieces, stripped on both sides": decoders.Sequence([*PIECES, decoders.Strip(" ", 2, 2)]),
    "replaced at the end": decoders.Sequence([*PIECES[1:], decoders.Replace("▁", " ")]),
    "metaspace": decoders.Metaspace(),
    "metaspace, first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "bytes and metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "word piece": decoders.WordPiece(),
    "word piece, not tidied": decoders.WordPiece(cleanup=False),
    "end of word": decoders.BPEDecoder(),
    "strip each": decoders.Strip("n", 1, 0),
    "ctc": decoders.CTC(pad_token="n", word_delimiter_token="▁"),
    "a pattern across tokens": decoders.Sequence([*PIECES, decoders.Replace("o w", "_")]),
    "none": None,
}
WORDS = (
    "▁ ▁Hello ▁world Hello ##s ! ▁, , . ▁n n't 't ▁do </w> in</w> ▁▁▁▁ Ġ ĠHello Ċ ĠĠ Ġ. ' Ġ' 's "
    "é ▁é 中 \ufffd n o w <0xFF> <0xC3> <0xA9> <0xE4> <0xB8> <0xAD> <0x0a> <0xF0> Ã © ä ¸ Ń ðŁ ĻĤ"
).split()


@pytest.mark.parametrize("tidied", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_parts_joined_are_the_text_of_all_tokens(name, tidied):
    """Every decoder of the library, with special and added tokens anywhere among the others."""
    model = models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="o")
    made = Tokenizer(model)
    if DECODERS[name] is not None:
        made.decoder = DECODERS[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=tidied
    )
    tokenizer.add_tokens([AddedToken("<think>", lstrip=True), AddedToken(" é ", rstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    rng = random.Random(name)
    for _ in range(150):
        tokens = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))]
        parts = streamed(tokenizer, tokens)
        assert "".join(parts) == tokenizer.decode(tokens, skip_special_tokens=True), parts


def test_a_tokenizer_that_decodes_in_its_own_way_gives_its_text_at_the_end():
    class Own(PreTrainedTokenizerFast):
        def _decode(self, token_ids, **options):
            return super()._decode(token_ids, **options).upper()

    tokenizer = Own(tokenizer_object=backend())
    assert streamed(tokenizer, b"abc") == ["", "", "", "ABC"]


def test_every_token_takes_as_long_however_many_were_held_back():
    """Counted, not timed: invalid bytes in a row are never decoded again."""
    counted = SimpleNamespace(calls=0)

    class Counting(Bytes):
        def decode(self, tokens, skip_special_tokens):
            counted.calls += 1
            return super().decode(tokens, skip_special_tokens)

    stream = TextStream(Counting())
    assert "".join(map(stream.push, [255] * 3000)) + stream.flush() == "\ufffd" * 3000
    assert counted.calls == 0


@pytest.mark.real_model
def test_the_real_tokenizer():
    from saccade.hf.load import load_model

    tokenizer, rng = load_model("smollm2").tokenizer, random.Random(0)
    cases = [tokenizer(text).input_ids for text in TEXTS]
    cases += [[rng.randrange(len(tokenizer)) for _ in range(40)] for _ in range(50)]
    for tokens in cases:
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(streamed(tokenizer, tokens)) == expected
