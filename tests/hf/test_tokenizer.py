"""Tokenizers of GGUF files: what each key of a header means, and headers that mean nothing."""

from __future__ import annotations

import random
from itertools import pairwise

import gguf
import pytest

from saccade.core import BadInput
from saccade.hf.gguf_tokenizer import gguf_tokenizer
from tests.hf.byte_level import BYTE, CONTROL, NORMAL, USER_DEFINED, byte_level


class TestHeaders:
    MERGES = (("1", "2"), ("3", "4"), ("12", "34"), ("a", "b"), ("b", "c"), ("ab", "c"))

    @pytest.mark.parametrize(
        ("pre", "expected"),
        [("llama-bpe", ["12", "3", "4"]), ("qwen2", list("1234")), ("smollm", list("1234")),
         ("deepseek-llm", list("1234")), ("gpt-2", ["1234"])],
    )  # fmt: skip
    def test_the_named_pre_tokenizer_is_used(self, pre, expected):
        tokenizer, _, notes = gguf_tokenizer(byte_level(pre, self.MERGES))
        assert (tokenizer.tokenize("1234"), notes) == (expected, [])

    def test_an_unknown_name_is_said(self):
        tokenizer, _, (note,) = gguf_tokenizer(byte_level("new-thing", self.MERGES))
        assert tokenizer.tokenize("1234") == ["1234"]
        assert "'new-thing' that the GGUF file names is not known" in note

    def test_a_missing_name_is_said_or_known_from_the_architecture(self):
        _, _, (note,) = gguf_tokenizer(byte_level(None, self.MERGES))
        assert "does not name its pre-tokenizer" in note
        header = byte_level(None, self.MERGES) | {"general.architecture": "qwen2"}
        tokenizer, _, notes = gguf_tokenizer(header)
        assert (tokenizer.tokenize("1234"), notes) == (list("1234"), [])

    def test_llama_3_takes_a_word_that_is_a_token_whatever_the_merges_make(self):
        merges = (("a", "b"), ("b", "c"), ("a", "bc"))
        for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])):
            assert gguf_tokenizer(byte_level(pre, merges))[0].tokenize("abc") == expected

    def test_composed_characters_where_the_model_had_them(self):
        for pre, expected in (("qwen2", "é"), ("llama-bpe", "e\u0301")):
            tokenizer = gguf_tokenizer(byte_level(pre))[0]
            assert tokenizer.decode(tokenizer("e\u0301", add_special_tokens=False).input_ids) == (
                expected
            )

    @pytest.mark.parametrize(
        ("pre", "given", "expected"),
        [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False),
         ("qwen2", True, True), ("tekken", None, True)],
    )  # fmt: skip
    def test_the_first_token(self, pre, given, expected):
        header = byte_level(pre, extra=[("<s>", CONTROL)], **{"tokenizer.ggml.bos_token_id": 256})
        if given is not None:
            header["tokenizer.ggml.add_bos_token"] = given
        assert gguf_tokenizer(header)[0]("a").input_ids == [256] * expected + [64]

    def test_the_last_token(self):
        header = byte_level(extra=[("</s>", CONTROL)], **{"tokenizer.ggml.eos_token_id": 256})
        header["tokenizer.ggml.add_eos_token"] = True
        tokenizer = gguf_tokenizer(header)[0]
        assert tokenizer("a").input_ids == [64, 256] and tokenizer.eos_token_id == 256
        assert tokenizer("a", "b").input_ids == [64, 256, 65, 256]

    def test_special_and_user_defined_tokens_are_whole_and_only_one_kind_is_shown(self):
        extra = [("<｜end▁of▁sentence｜>", CONTROL), ("<think>", USER_DEFINED), ("[PAD]", 5)]
        tokenizer = gguf_tokenizer(byte_level("deepseek-llm", extra=extra))[0]
        ids = tokenizer("a<think><｜end▁of▁sentence｜>[PAD]").input_ids
        assert ids[:3] == [64, 257, 256] and len(ids) == 3 + len("[PAD]")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>[PAD]"
        assert len(tokenizer) == 259

    def test_a_padding_token_that_is_text_stays_text(self):
        """Llama 3 files with padding_token_id 0: the exclamation mark is shown."""
        tokenizer = gguf_tokenizer(byte_level(**{"tokenizer.ggml.padding_token_id": 0}))[0]
        assert tokenizer.decode([0, 0], skip_special_tokens=True) == "!!"

    def test_phi_3_takes_the_spaces_behind_its_signs(self):
        extra = [("<|user|>", CONTROL), ("<|endoftext|>", CONTROL)]
        header = byte_level(extra=extra, **{"general.name": "Phi-3 mini"})
        tokenizer = gguf_tokenizer(header)[0]
        assert tokenizer("<|user|>\n a").input_ids == [256, 64]
        assert tokenizer("<|endoftext|> a").input_ids == [257, 220, 64]

    def test_the_chat_template(self):
        header = byte_level(**{"tokenizer.chat_template": "{{ messages[0].content }}!"})
        message = [{"role": "user", "content": "hi"}]
        tokenizer = gguf_tokenizer(header)[0]
        assert tokenizer.apply_chat_template(message, tokenize=False) == "hi!"


class TestEnds:
    def ends(self, *extra, **ids):
        keys = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
        tokenizer, ends, _ = gguf_tokenizer(byte_level(extra=[(t, CONTROL) for t in extra], **keys))
        return tokenizer.convert_ids_to_tokens(ends)

    def test_what_the_file_says(self):
        assert self.ends("<x>", "<y>", "<z>", eos=256, eot=258, eom=257) == ["<x>", "<z>", "<y>"]

    def test_what_its_name_says(self):
        assert self.ends("<s>", "<|im_end|>", "<|eot_id|>", eos=256) == [
            "<s>", "<|im_end|>", "<|eot_id|>"
        ]  # fmt: skip

    def test_the_end_of_a_part_of_an_answer_is_none(self):
        assert self.ends("<|end|>") == ["<|end|>"]
        assert self.ends("<|end|>", "<|return|>", "<|call|>") == ["<|return|>", "<|call|>"]

    def test_generation_config_and_command_line_have_them(self, tmp_path, monkeypatch):
        from saccade.cli.tokens import end_tokens
        from saccade.hf import load_model
        from tests.hf.gguf_files import write_gguf
        from tests.tiny_models import tiny_config, tiny_model

        write = gguf.GGUFWriter.write_header_to_file

        def with_eot(self, *path):
            self.add_eot_token_id(5)
            write(self, *path)

        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_eot)
        path = tmp_path / "eot.gguf"
        write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")
        loaded = load_model(path)
        assert loaded.model.generation_config.eos_token_id == [2, 5]
        assert end_tokens(loaded) == {2, 5}


def spm(words, scores, prefix=True, **more):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(scores),
        "tokenizer.ggml.token_type": [2, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words),
        "tokenizer.ggml.add_space_prefix": prefix,
    } | more


def sentence_piece(text, index, scores):
    """llama.cpp's SPM: merge the adjacent pair that makes the best-scored token, leftmost first."""
    parts = list(text)
    while True:
        made = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not made:
            break
        _, i = min(made)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[index[p]] if p in index else [index[f"<0x{b:02X}>"] for b in p.encode()]
             for p in parts]  # fmt: skip
    return [i for found in known for i in found]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces_are_merged_by_score(prefix):
    rng = random.Random(1)
    words = ["▁", *"abcdefgh", "é", ".", "\n"]
    while len(words) < 300:
        made = rng.choice(words) + rng.choice(words)
        if made not in words and len(made) < 12:
            words.append(made)
    scores = [-float(i) for i in range(len(words))]
    rng.shuffle(scores)
    header = spm(words, scores, prefix)
    tokenizer, ends, notes = gguf_tokenizer(header)
    assert (ends, notes) == ([2], [])
    index = {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])}
    by_word = dict(zip(words, scores, strict=True))
    for _ in range(300):
        text = "".join(rng.choice("abcdefgh  é.\n🙂1") for _ in range(rng.randint(1, 40)))
        inner = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert tokenizer(text).input_ids == [1, *sentence_piece(inner, index, by_word)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_prefix_space_follows_every_special_token():
    """As in SentencePiece and llama.cpp, which read each stretch of text by itself."""
    tokenizer = gguf_tokenizer(spm(["▁", "a", "▁a"], [-1, -2, 0]))[0]
    assert tokenizer.tokenize("a</s>a  a") == ["▁a", "</s>", "▁a", "▁", "▁a"]
    assert tokenizer.tokenize(" a") == ["▁", "▁a"]


def test_gemma_4_merges_raw_text():
    header = spm(["▁", "a", "b", "ab", "▁ab", "\n"], [0.0] * 6) | {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": ["a b", "▁ ab"]
    }  # fmt: skip
    tokenizer = gguf_tokenizer(header)[0]
    assert tokenizer.tokenize("ab ab\n中") == ["ab", "▁ab", "\n", "<0xE4>", "<0xB8>", "<0xAD>"]
    assert tokenizer.decode(tokenizer("ab ab\n中").input_ids) == "ab ab\n中"


def test_unigram_takes_the_likeliest_cut():
    header = {
        "general.architecture": "t5",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁a", "▁ab"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -3.0, -2.0, -2.0, -3.5, -2.5, -9.0],
        "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    tokenizer, ends, _ = gguf_tokenizer(header)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab  a").input_ids) == [
        "▁a", "b", "▁a", "</s>"
    ]  # fmt: skip
    assert (tokenizer.decode(tokenizer("ab a").input_ids, skip_special_tokens=True), ends) == (
        "ab a", [1]
    )  # fmt: skip


BAD = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
    "another kind": ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv' cannot be read"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "holds no tokens"),
    "numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokens of the GGUF file is not a list"),
    "twins": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "'a' is in the GGUF file twice"),
    "few kinds": ({"tokenizer.ggml.token_type": [1]}, "has 1 values for 256 tokens"),
    "no merges": ({"tokenizer.ggml.merges": None}, "holds no merges"),
    "a word for a switch": ({"tokenizer.ggml.add_bos_token": "yes"}, "expected to be true or"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_vocabulary_is_refused_in_a_sentence(case):
    change, message = BAD[case]
    header = {k: v for k, v in (byte_level() | change).items() if v is not None}
    with pytest.raises(BadInput, match=message):
        gguf_tokenizer(header)


def test_what_is_odd_but_can_be_left_out_is_said():
    header = byte_level(merges=[("a", "b")], **{"tokenizer.ggml.eos_token_id": 9999})
    header["tokenizer.ggml.merges"] += ["a zz", "nothing"]
    header["tokenizer.ggml.bos_token_id"] = 2**32 - 1  # none
    tokenizer, ends, notes = gguf_tokenizer(header)
    assert tokenizer.tokenize("ab") == ["ab"] and ends == []
    assert "2 of 3 merges" in notes[0] and "eos_token_id is 9999" in notes[1] and len(notes) == 2


def test_an_empty_token_gets_a_name():
    header = byte_level(extra=[("", NORMAL)])
    assert gguf_tokenizer(header)[0].convert_ids_to_tokens(256) == "[EMPTY_256]"
