"""A sample as tokens: context, questions and beginnings of answers in the model's chat template.

Context and question are separate runs of tokens, as in kvpress: a cache can be compressed between
them, and both orders of compressing and asking read the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saccade.core import BadInput
from saccade.evals.tasks import Sample

_CONTEXT, _ANSWER, _NEXT = "\u2060context\u2060", "\u2060answer\u2060", "\u2060next\u2060"


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the texts of a conversation.

    Attributes:
        before: in front of the context; asked: between a question and the beginning of its answer;
            again: between an answer and the next question.
        special: whether the tokenizer puts its own first token in front.
    """

    before: str
    asked: str
    again: str
    special: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """The tokens of one turn: the question, then what leads into its answer."""

    question: list[int]
    prefix: list[int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a sample; the questions of later turns begin with the end of an answer."""

    context: list[int]
    turns: list[Asked]


PLAIN = Frame(before="", asked=" ", again="\n", special=True)
"""Without a chat template: the answer begins behind its question, as in RULER."""


def frame_of(tokenizer: Any, *, raw: bool = False) -> Frame:
    """The frame of a tokenizer's chat template; `raw`, or where there is none: of plain text.

    Raises:
        BadInput: a template that fails, or that does not show what it is given.
    """
    if raw or not getattr(tokenizer, "chat_template", None):
        return PLAIN
    messages = [
        {"role": "user", "content": _CONTEXT},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    first, both = _templated(tokenizer, messages[:1]), _templated(tokenizer, messages)
    between = both.partition(_ANSWER)[2].partition(_NEXT)[0]
    if _CONTEXT not in first or not both.partition(_ANSWER)[2].partition(_NEXT)[1]:
        raise BadInput(
            "the model's chat template leaves out or changes what it is given. Use --raw, which "
            "asks without a template."
        )
    before, _, asked = first.partition(_CONTEXT)
    return Frame(before=before, asked=asked, again=between, special=False)


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the model's files
        raise BadInput(
            f"the model's chat template fails: {type(error).__name__}: {error}. Use --raw, which "
            "asks without a template."
        ) from error


def prompt_of(sample: Sample, frame: Frame, tokenizer: Any) -> Prompt:
    """The tokens of a sample."""

    def encode(text: str, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special).input_ids)

    turns: list[Asked] = []
    for at, turn in enumerate(sample.turns):
        again = frame.again if at else ""
        turns.append(Asked(encode(again + turn.question), encode(frame.asked + turn.prefix)))
    return Prompt(encode(frame.before + sample.context, frame.special), turns)


def length_of(prompt: Prompt, sample: Sample) -> int:
    """Tokens of the prompt and of all that may be written."""
    asked = sum(len(turn.question) + len(turn.prefix) for turn in prompt.turns)
    return len(prompt.context) + asked + sum(turn.n_predict for turn in sample.turns)


def end_tokens(frame: Frame, tokenizer: Any, generation_config: Any) -> set[int]:
    """Tokens that end an answer: the model's own, and the special one behind it in the template."""
    ends: set[int] = set()
    for found in (getattr(generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        ends |= {each for each in (found if isinstance(found, list) else [found])
                 if each is not None}  # fmt: skip
    behind = tokenizer(frame.again, add_special_tokens=False).input_ids
    added = getattr(tokenizer, "added_tokens_decoder", {})
    first = added.get(behind[0]) if behind and not frame.special else None
    return ends | ({behind[0]} if first is not None and first.special else set())
