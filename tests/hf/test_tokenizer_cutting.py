"""Where text is cut: as the models' own tokenizer.json says, by another engine for expressions."""

from __future__ import annotations

from functools import cache

import pytest
import regex

from saccade.hf.gguf.file import parse_file
from saccade.hf.gguf_pretokenizers import DEFAULT, PRE_TOKENIZERS
from saccade.hf.gguf_tokenizer import gguf_tokenizer
from tests.hf.byte_level import ENGLISH, bpe, spelled, texts


@pytest.mark.real_model
def test_the_demo_model_reads_text_as_it_was_trained():
    """SmolLM2: every digit by itself, GPT-2's expression between them, then the merges."""
    from saccade.runtime.located import located

    header = parse_file(located("smollm2")).keys
    tokenizer, ends, notes = gguf_tokenizer(header)
    assert (notes, tokenizer.convert_ids_to_tokens(ends)) == ([], ["<|im_end|>", "<|endoftext|>"])
    tokens = [token.decode() for token in header["tokenizer.ggml.tokens"]]
    index = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.decode().split(" ")) for merge in header["tokenizer.ggml.merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    word = cache(lambda piece: [index[p] for p in bpe(spelled(piece), ranks) if p in index])
    cut = regex.compile(ENGLISH)
    total = 0
    for text in texts():
        between = regex.split(r"(\p{N})", text)
        expected = [i for part in between for piece in cut.findall(part) for i in word(piece)]
        assert tokenizer(text).input_ids == expected
        total += len(text.encode())
        # A few control characters were not among the letters that the vocabulary was learned on.
        if all(letter in index for letter in set(spelled(text))):
            assert tokenizer.decode(expected) == text
    assert total >= 100_000
    assert tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {  # the steps of the models' own tokenizer.json; \p{N} first where digits are single
    "llama-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "chatglm-bpe": [LLAMA3],
    "qwen2": [LLAMA3.replace("{1,3}", "")],
    "stablelm2": [LLAMA3.replace("{1,3}", "")],
    "gpt-4o": [GPT4O],
    "llama4": [GPT4O],
    "tekken": [GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")],
    "gpt-2": [ENGLISH],
    "smollm": [r"\p{N}", ENGLISH],
    "starcoder": [r"\p{N}", ENGLISH],
    "command-r": [r"\p{N}", ENGLISH],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "viking": [r" ?[^\s|.,!?…。，、।۔،()\[]+", r"\p{N}"],
    "superbpe": [r"\p{N}+", r"(?=(?:\d{3})+(?!\d))"],
    "afmoe": [r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"],
}


def isolated(pattern, pieces):
    """Every match is a piece, and so is what lies between two matches."""
    found = []
    for piece in pieces:
        at = 0
        for match in regex.finditer(pattern, piece, flags=regex.V0):
            found += [piece[at : match.start()], match.group()]
            at = match.end()
        found.append(piece[at:])
    return [piece for piece in found if piece]


SAMPLE = (
    "Don't SAY it's 1234567 HTTPServers  x\n\n1. été 中文 テスト\t foo(bar)=3.14\r\n½² 1,000,000!"
    "\nclass A:\n    def f(self): return self.x2 ** 10  # ok…\n"
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_is_cut_by_the_published_expressions(name):
    pieces = [SAMPLE]
    for pattern in PUBLISHED[name]:
        pieces = isolated(pattern, pieces)
    cut = [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(SAMPLE)]
    if name == "afmoe":  # only its first step, which llama.cpp does by hand
        cut = [piece for piece in cut if piece.isdigit() and piece.isascii()]
        pieces = [piece for piece in pieces if piece.isdigit() and piece.isascii()]
    assert cut == [spelled(piece) for piece in pieces]


DISTINCT = {id(rule): name for name, rule in (PRE_TOKENIZERS | {"none": DEFAULT}).items()}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_every_named_pre_tokenizer_cuts_and_keeps_all_text(name):
    made = PRE_TOKENIZERS.get(name, DEFAULT).build()
    if made is None:  # raw: the whole text is one piece
        return
    for text in (whole[:3_000] for whole in texts(3_000)):
        assert "".join(piece for piece, _ in made.pre_tokenize_str(text)) == spelled(text)
    assert "Sequence" in str(made)  # printing one with other characters than ASCII would panic


def test_deepseeks_cased_letters_are_letters_with_case():
    from unicodedata import category

    from saccade.hf.gguf_pretokenizers import _CASED

    inside = regex.compile(f"[{_CASED}]")
    found = [chr(code) for code in range(0x1EA00) if inside.match(chr(code))]
    assert {category(letter) for letter in found} <= {"Ll", "Lu", "Lt", "Cn"} and len(found) > 2000


def test_falcon_cuts_triples_of_digits_after_words():
    cut = PRE_TOKENIZERS["falcon"].build().pre_tokenize_str("it's 1234567: x")
    assert [piece for piece, _ in cut] == ["it", "'", "s", "Ġ", "123", "456", "7", ":", "Ġx"]
