"""The vocabulary of a GGUF file: tokens, what kind each is, and the ids with a meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from saccade.core import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_ENDS: Final = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ "
    "<|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <|repo_name|> <fim-repo> <|file_sep|>".split()
)
"""Tokens that end an answer by their name: llama.cpp's list."""

_NOT_ENDS: Final = (  # (where all of these are tokens, this one only ends a part of an answer)
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
}
"""Ids that llama.cpp assumes for a kind of tokenizer where the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says.

    Attributes:
        model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE), "t5" (unigram), ...
        tokens: text of each id; kinds, scores: one for each token.
        merges: pairs, the most important first; None where the file has none.
        ids: "bos", "eos", "eot", "eom", "unknown", "padding", ... -> id, those that exist.
        header: the keys of the file, for the flags that only one kind of tokenizer reads.
    """

    model: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]] | None
    ids: Mapping[str, int]
    header: Mapping[str, Any]

    def flag(self, name: str, default: bool) -> bool:
        """A switch of the file, such as `add_bos_token`."""
        value = self.header.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, (bool, int)):
            raise BadInput(f"tokenizer.ggml.{name} is expected to be true or false, got {value!r}.")
        return bool(value)

    def ends(self) -> list[int]:
        """Ids that end an answer: eos, eot, eom, and those that llama.cpp knows by name."""
        named = {token: i for i, token in enumerate(self.tokens) if token in _ENDS}
        for together, spared in _NOT_ENDS:
            if together <= named.keys():
                named.pop(spared, None)
        given = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        return list(dict.fromkeys([*given, *sorted(named.values())]))

    def is_special(self, index: int) -> bool:
        """Whether a token is a sign to the model, not text: it is never shown."""
        kind, token = self.kinds[index], self.tokens[index]
        unsaid = kind == NORMAL and "tokenizer.ggml.token_type" not in self.header
        bracketed = unsaid and token[:1] in "<[" and token[-1:] in ">]" and len(token) > 2
        known = bracketed and index in self.ids.values()
        return kind in (UNKNOWN, CONTROL) or (token in _ENDS and kind != USER_DEFINED) or known


def read_vocabulary(header: Mapping[str, Any]) -> tuple[Vocabulary, list[str]]:
    """The vocabulary that the keys of a header describe, and sentences about what is odd in it.

    Raises:
        BadInput: no tokens, of another type, twice the same, or lists of other lengths.
    """
    model = header.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        raise BadInput("the GGUF file holds no tokenizer (tokenizer.ggml.model is missing).")
    tokens = _list(header, "tokens", str)
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens or ())]
    if not tokens:
        raise BadInput("the GGUF file holds no tokens (tokenizer.ggml.tokens is missing or empty).")
    _refuse_twins(tokens)
    notes: list[str] = []
    return Vocabulary(
        model=model,
        tokens=tokens,
        kinds=_as_long(header, "token_type", int, tokens) or [NORMAL] * len(tokens),
        scores=_as_long(header, "scores", (int, float), tokens) or [0.0] * len(tokens),
        merges=_merges(header, set(tokens), notes),
        ids=_ids(header, model, len(tokens), notes),
        header=header,
    ), notes


def _list(header: Mapping[str, Any], name: str, kind: Any) -> list[Any] | None:
    values = header.get(f"tokenizer.ggml.{name}")
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise BadInput(f"tokenizer.ggml.{name} of the GGUF file is not a list of the right type.")
    return values


def _as_long(
    header: Mapping[str, Any], name: str, kind: Any, tokens: Sequence[str]
) -> list[Any] | None:
    values = _list(header, name, kind)
    if values is not None and len(values) < len(tokens):
        raise BadInput(
            f"tokenizer.ggml.{name} of the GGUF file has {len(values)} values for "
            f"{len(tokens)} tokens."
        )
    return values and values[: len(tokens)]


def _refuse_twins(tokens: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if first.setdefault(token, index) != index:
            raise BadInput(
                f"the token {token!r} is in the GGUF file twice, as {first[token]} and {index}: "
                "expected different tokens. Convert the model again."
            )


def _merges(
    header: Mapping[str, Any], known: set[str], notes: list[str]
) -> list[tuple[str, str]] | None:
    """The pairs; a token may begin with a space, so the first one behind it is the separator."""
    given = _list(header, "merges", str)
    if given is None:
        return None
    pairs = [(text[:at], text[at + 1 :]) for text in given if (at := text.find(" ", 1)) > 0]
    usable = [(a, b) for a, b in pairs if a in known and b in known and a + b in known]
    if len(usable) < len(given):
        notes.append(
            f"{len(given) - len(usable):,} of {len(given):,} merges of the GGUF file are no pairs "
            "of tokens that make a token, and are left out: text may become other tokens."
        )
    return usable


def _ids(header: Mapping[str, Any], model: str, count: int, notes: list[str]) -> dict[str, int]:
    ids = {name: i for name, i in _DEFAULTS.get(model, {}).items() if i < count}
    for key, value in header.items():
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
            continue
        name = key.removeprefix("tokenizer.ggml.").removesuffix("_token_id")
        if isinstance(value, int) and 0 <= value < count:
            ids[name] = value
        elif value not in (-1, 2**32 - 1):  # how writers say "none"
            notes.append(f"{key} is {value!r} in a GGUF file with {count:,} tokens: not used.")
    return ids
