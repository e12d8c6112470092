"""Messages to tokens, in the model's chat template where it has one.

Text that is spelled like a special token (`<|im_end|>`) is read as that token, as in transformers
and llama.cpp: a text of strangers can end the message it stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saccade.cli.failure import UsageError

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel

Messages = list[dict[str, str]]


def tokenizer_of(loaded: LoadedModel) -> Any:
    """The tokenizer of a model.

    Raises:
        UsageError: there is none.
    """
    if loaded.tokenizer is None:
        reason = " ".join(note for note in loaded.notes if "tokenizer" in note)
        raise UsageError(
            f"{loaded.name} has no tokenizer that can be read. Give a model that brings one."
            + (f" ({reason})" if reason else "")
        )
    return loaded.tokenizer


def encode_text(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text as it is; `special` puts the model's first token in front."""
    if len(text) <= _SHORT:
        return list(tokenizer(text, add_special_tokens=special).input_ids)
    from saccade.hf.text_tokens import all_tokens  # in pieces, with bounded memory

    return all_tokens(tokenizer, text, special=special)


_SHORT = 1 << 16


def encode_messages(tokenizer: Any, messages: Messages) -> list[int]:
    """Tokens of messages that wait for an answer; without a template, a line each."""
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(tokenizer, "\n".join(m["content"] for m in messages) + "\n")
    return encode_text(tokenizer, _templated(tokenizer, messages), special=False)


def encode_next_message(tokenizer: Any, text: str) -> list[int]:
    """Tokens of one more message of the user, behind an answer; without a template, a line."""
    has_template = getattr(tokenizer, "chat_template", None)
    more = next_message(tokenizer, text) if has_template else f"\n{text}\n"
    return encode_text(tokenizer, more, special=False)


def next_message(tokenizer: Any, text: str) -> str:
    """What the chat template puts behind an answer: its end, the new message, the next start."""
    answer = "\u2060answer\u2060"
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": text},
    ]
    chat = _templated(tokenizer, messages)
    return chat[chat.rindex(answer) + len(answer) :] if answer in chat else text


def _templated(tokenizer: Any, messages: Messages) -> str:
    """The messages in the model's chat template, a program in the model's files.

    Raises:
        UsageError: it does not parse, raises, or refuses these messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        system = "Leave --system out, or use" if messages[0]["role"] == "system" else "Use"
        raise UsageError(
            f"the model's chat template fails: {type(error).__name__}: {error}. {system} "
            "saccade generate --raw, which continues a text without a template."
        ) from error


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer.

    From the generation config and the tokenizer, and the special token that the chat template
    itself puts behind an answer: configs of models that were trained further often lack it.
    """
    tokenizer = tokenizer_of(loaded)
    config = getattr(loaded.model, "generation_config", None)
    ends: set[int | None] = {_end_in_template(tokenizer)}
    for found in (getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        ends.update(found if isinstance(found, (list, tuple)) else [found])
    return {token for token in ends if token is not None}


def _end_in_template(tokenizer: Any) -> int | None:
    """The special token right behind an answer, None where there is no such template or token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        behind = encode_text(tokenizer, next_message(tokenizer, "next"), special=False)
    except UsageError:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = added.get(behind[0]) if behind else None
    # Harmony ends every part of an answer with <|end|>, and the answer with <|return|>.
    part = found is not None and found.content == "<|end|>"
    if found is None or not found.special or (part and _has(added, "<|return|>")):
        return None
    return behind[0]


def _has(added: Mapping[int, Any], text: str) -> bool:
    return any(token.content == text for token in added.values())
