"""From a text to what every row reads: context, continuation, questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.evals.measure import Trial
from saccade.evals.needle import hide, make_needles, questions
from saccade.hf.convert import converted_heads
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel

CALIBRATION = 512  # tokens, from the end of the text


def token_tensor(tokens: Sequence[int]) -> Tensor:
    """int64 `[n]`."""
    return torch.tensor(tokens, dtype=torch.int64)


def make_trial(
    model: LoadedModel,
    runner: HFModel,
    tokens: Sequence[int],
    *,
    context: int,
    scored: int,
    needles: int,
    steps: int,
) -> Trial:
    """The start of a text with needles in it, and what follows.

    Raises:
        BadInput: a text too short.
    """
    needed = context + scored
    if len(tokens) < needed:
        raise BadInput(
            f"the text has {len(tokens)} tokens, but a context of {context} and {scored} scored "
            f"tokens need {needed}. Give a longer text or a smaller context."
        )
    tokenizer: Any = model.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    hidden = make_needles(needles)
    rest = context - sum(len(encode(n.sentence)) for n in hidden)
    return Trial(
        model=runner,
        context=token_tensor(hide(tokens, hidden, encode, context)),
        continuation=token_tensor(tokens[rest : rest + scored]),
        questions=questions(hidden, encode),
        heads=_converter(model, token_tensor(tokens[-CALIBRATION:])),
        steps=steps,
    )


def _converter(model: LoadedModel, calibration: Tensor) -> Any:
    """What opens the model with another number of KV heads."""

    facts = HFModel(model.model, name=model.name, n_ctx_train=model.n_ctx_train).facts

    @contextmanager
    def heads(kind: str) -> Iterator[HFModel]:
        if kind == "mha":
            converted = converted_heads(model.model, facts.num_heads)
        else:
            converted = converted_heads(model.model, 1, method="aligned", calibration=calibration)
        with converted:
            yield HFModel(model.model, name=model.name, n_ctx_train=model.n_ctx_train)

    return heads
