"""Quality of a model whose heads were converted, on text that the conversion did not see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import BadInput
from saccade.evals.quality import perplexity
from saccade.hf.split_forward import hidden_states, logits_of

ROW = 512
SCORED_ROWS = 2
HELD_OUT = 0.1
"""Share of the text, at its end, that is only used to judge."""
_DESCRIBED = ("torch", "transformers", "typer", "huggingface_hub", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """How a model predicts one text: means over its tokens, with standard errors of the means."""

    perplexity: float
    perplexity_se: float
    kl: float
    kl_se: float
    same_top: float
    tokens: int


def other_text() -> str:
    """Prose of another kind than the help topics: what installed packages say of themselves."""
    found: list[str] = []
    for name in _DESCRIBED:
        try:
            said = metadata(name)
        except PackageNotFoundError:
            continue
        found.append(str(said.json.get("description") or ""))
    return "\n\n".join(found)


def parts_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens to learn from, tokens to judge by) of a text `[n]`.

    Raises:
        BadInput: too short for both.
    """
    held = min(SCORED_ROWS * ROW, int(len(tokens) * HELD_OUT))
    if held < 64:
        raise BadInput(
            f"the text has {len(tokens)} tokens, but a conversion learns from nine tenths of it "
            "and is judged by the rest, at least 640 together. Give a longer text."
        )
    return tokens[:-held], tokens[-held:]


def spread_rows(tokens: Tensor, rows: int, length: int) -> Tensor:
    """Up to `rows` rows `[rows, length]` from all over a text `[n]`, without overlap."""
    length = min(length, len(tokens))
    rows = max(1, min(rows, len(tokens) // length))
    starts = torch.linspace(0, len(tokens) - length, rows, dtype=torch.float64).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


class Judge:
    """Compares a model as it is now with the same model as it was when this was made.

    Args:
        texts: token ids `[n]` of each text by its name.
    """

    def __init__(self, model: PreTrainedModel, texts: Mapping[str, Tensor]) -> None:
        self._model = model
        self._rows = {name: list(tokens.split(ROW)) for name, tokens in texts.items()}
        self._exact = {
            name: [self._hidden(row) for row in rows if len(row) > 1]
            for name, rows in self._rows.items()
        }

    def judge(self) -> dict[str, TextQuality]:
        """Quality now on each text."""
        return {name: self._judge(name) for name in self._rows}

    @torch.no_grad()
    def _hidden(self, row: Tensor) -> Tensor:
        ids = row[None].to(self._model.device)
        return hidden_states(self._model, input_ids=ids, use_cache=False)[:, :-1]

    @torch.no_grad()
    def _judge(self, name: str) -> TextQuality:
        rows = [row for row in self._rows[name] if len(row) > 1]
        found = [
            self._compare(row, exact) for row, exact in zip(rows, self._exact[name], strict=True)
        ]
        nll, kl, same = (torch.cat(part).double() for part in zip(*found, strict=True))
        value, error = perplexity(nll)
        return TextQuality(
            perplexity=value,
            perplexity_se=error,
            kl=max(0.0, kl.mean().item()),
            kl_se=math.sqrt(kl.var().item() / len(kl)),
            same_top=same.mean().item(),
            tokens=len(nll),
        )

    def _compare(self, row: Tensor, exact_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(negative log-likelihood, divergence, same most likely token) of each token."""
        exact, ours = (
            logits_of(self._model, hidden)[0].float().log_softmax(-1)
            for hidden in (exact_hidden, self._hidden(row))
        )
        nll = -ours.gather(-1, row[1:, None].to(ours.device))[:, 0]
        kl = (exact.exp() * (exact - ours)).sum(-1)
        return nll.cpu(), kl.cpu(), (exact.argmax(-1) == ours.argmax(-1)).cpu()
