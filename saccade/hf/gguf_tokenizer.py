"""The tokenizer of a GGUF file, built from its header.

transformers builds one too, but cuts text as its own class for the kind of vocabulary does,
whatever pre-tokenizer the file names.  Where a file leaves something open, llama.cpp's choice is
taken.  Text that is spelled like a special token (`<|im_end|>`) is read as that token, as in
llama.cpp and transformers: text of strangers can end the message it stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from saccade.core import BadInput
from saccade.hf.gguf_pretokenizers import pre_tokenizer_of
from saccade.hf.gguf_vocabulary import (
    BYTE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)

_ROLES: Final = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token",
                 "padding": "pad_token"}  # fmt: skip
_NOT_STRIPPED: Final = ("<unk>", "<s>", "<|endoftext|>")


def gguf_tokenizer(keys: Mapping[str, Any]) -> tuple[Any, list[int], list[str]]:
    """(tokenizer of transformers, ids that end an answer, sentences about what was guessed).

    Args:
        keys: of the file with their values; lists of text may be lists of bytes.

    Raises:
        BadInput: no tokenizer, a damaged one, or a kind that cannot be built.
    """
    header = {key: _as_text(value) for key, value in keys.items()}
    vocabulary, notes = read_vocabulary(header)
    build = _KINDS.get(vocabulary.model)
    if build is None:
        raise BadInput(
            f"tokenizers of the kind {vocabulary.model!r} cannot be read from GGUF; "
            f"expected one of {', '.join(_KINDS)}."
        )
    backend, add_bos, add_eos = build(vocabulary, notes)
    special = _add_tokens(backend, vocabulary)
    _add_ends(backend, vocabulary, add_bos, add_eos)
    named: dict[str, Any] = {role: special[i] for name, role in _ROLES.items()
                             if (i := vocabulary.ids.get(name)) in special}  # fmt: skip
    template = header.get("tokenizer.chat_template")
    if isinstance(template, str):
        named["chat_template"] = template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )
    return tokenizer, vocabulary.ends(), notes


def _as_text(value: Any) -> Any:
    """Lists of text as text; the reader of files leaves them as bytes."""
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [each.decode() for each in cast(list[bytes], value)]
    return value


def _byte_level(vocabulary: Vocabulary, notes: list[str]) -> tuple[Tokenizer, bool, bool]:
    """BPE over bytes that are spelled as letters, cut by a named pre-tokenizer first."""
    header = vocabulary.header
    name, architecture = header.get("tokenizer.ggml.pre"), header.get("general.architecture")
    rule, guess = pre_tokenizer_of(name, str(architecture))
    notes += [guess] if guess else []
    if rule.raw:
        return _raw_bpe(vocabulary, notes)
    backend = Tokenizer(models.BPE(
        vocab=_indices(vocabulary), merges=_given_merges(vocabulary),
        ignore_merges=rule.ignore_merges,
    ))  # fmt: skip
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.build(add_prefix_space=vocabulary.flag("add_space_prefix", False))
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos, False


def _raw_bpe(vocabulary: Vocabulary, notes: list[str]) -> tuple[Tokenizer, bool, bool]:
    """Gemma 4: merges from the file over UTF-8, ▁ for a space, bytes for what is no token."""
    backend = _sentence_piece_model(vocabulary, _given_merges(vocabulary))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = _piece_decoder(strip=False)
    return backend, False, False


def _sentence_pieces(vocabulary: Vocabulary, notes: list[str]) -> tuple[Tokenizer, bool, bool]:
    """SentencePiece BPE: the adjacent pair that makes the best-scored token is merged first."""
    backend = _sentence_piece_model(vocabulary, _merges_by_score(vocabulary))
    prefix = vocabulary.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = _piece_decoder(strip=prefix)
    return backend, True, False


def _unigram(vocabulary: Vocabulary, notes: list[str]) -> tuple[Tokenizer, bool, bool]:
    """SentencePiece unigram: the most likely cut of the whole text."""
    pairs = list(zip(vocabulary.tokens, map(float, vocabulary.scores), strict=True))
    backend = Tokenizer(models.Unigram(
        pairs, unk_id=vocabulary.ids.get("unknown"), byte_fallback=BYTE in vocabulary.kinds
    ))  # fmt: skip
    steps: list[Any] = []
    charsmap = vocabulary.header.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(value % 256 for value in charsmap)))
    if vocabulary.flag("remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if vocabulary.flag("add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return backend, False, True


_KINDS: Final[Mapping[str, Callable[[Vocabulary, list[str]], tuple[Tokenizer, bool, bool]]]] = {
    "gpt2": _byte_level,
    "llama": _sentence_pieces,
    "t5": _unigram,
    "gemma4": _raw_bpe,
}
"""Kind -> (its backend, whether bos goes in front and eos behind where the file does not say)."""


def _indices(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary.tokens)}


def _given_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    if vocabulary.merges is None:
        raise BadInput(
            "the GGUF file holds no merges (tokenizer.ggml.merges), without which text cannot be "
            "cut into its tokens. Convert the model again."
        )
    return list(vocabulary.merges)


def _sentence_piece_model(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> Tokenizer:
    unknown = vocabulary.ids.get("unknown")
    return Tokenizer(models.BPE(
        vocab=_indices(vocabulary), merges=merges, fuse_unk=True, byte_fallback=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    ))  # fmt: skip


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best-scored and then the earliest first.

    Tokens that are no text (`<s>`, bytes, what users defined) neither merge nor are merged to.
    """
    normal = {t for t, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
              if kind == NORMAL}  # fmt: skip
    order = sorted(range(len(vocabulary.tokens)), key=lambda i: (-vocabulary.scores[i], i))
    return [
        (token[:cut], token[cut:])
        for token in (vocabulary.tokens[i] for i in order)
        if token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]


def _piece_decoder(*, strip: bool) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


def _add_tokens(backend: Tokenizer, vocabulary: Vocabulary) -> dict[int, AddedToken]:
    """Tokens that are matched as a whole in text, by id those of them that are never shown."""
    strips = any(name in str(vocabulary.header.get("general.name", "")).lower()
                 for name in ("phi-3", "phi3"))  # fmt: skip
    special: dict[int, AddedToken] = {}
    plain: list[AddedToken] = []
    for index, token in enumerate(vocabulary.tokens):
        if vocabulary.is_special(index):
            special[index] = AddedToken(
                token, normalized=False, special=True, rstrip=strips and token not in _NOT_STRIPPED
            )
        elif vocabulary.kinds[index] in (UNKNOWN, USER_DEFINED):
            plain.append(AddedToken(token, normalized=False, rstrip=strips))
    backend.add_special_tokens(list(special.values()))
    backend.add_tokens(plain)
    return special


def _add_ends(backend: Tokenizer, vocabulary: Vocabulary, bos: bool, eos: bool) -> None:
    """Put the model's first and last token around a text, as the file or its kind says."""
    wanted = {"bos": vocabulary.flag("add_bos_token", bos),
              "eos": vocabulary.flag("add_eos_token", eos)}  # fmt: skip
    ids = {name: vocabulary.ids[name] for name in wanted if wanted[name] and name in vocabulary.ids}
    if not ids:
        return
    text = {name: vocabulary.tokens[index] for name, index in ids.items()}
    first, last = ([text[name]] if name in text else [] for name in ("bos", "eos"))
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(text[name], index) for name, index in ids.items()],
    )
