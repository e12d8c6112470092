"""Messages to tokens, in the model's chat template where it has one."""

from __future__ import annotations

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
        raise UsageError(
            f"{loaded.name} has no tokenizer that can be read. Give a model that brings one."
        )
    return loaded.tokenizer


def encode_text(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text as it is; `special` puts the model's first token in front."""
    return list(tokenizer(text, add_special_tokens=special).input_ids)


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
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Tokens that end an answer, from the generation config and the tokenizer."""
    config = getattr(loaded.model, "generation_config", None)
    ends: set[int | None] = set()
    for found in (getattr(config, "eos_token_id", None), tokenizer_of(loaded).eos_token_id):
        ends.update(found if isinstance(found, (list, tuple)) else [found])
    return {token for token in ends if token is not None}
