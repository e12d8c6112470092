"""Short training of converted attention layers against the layers that they replace.

The text runs through the model in two streams at once, as the original computes it and as the
converted model does.  Each attention layer in turn learns to give, for what the converted model
hands to it, what the original's layer gives in the other stream; then both go on.  So a layer sees
the errors of those ahead of it, only one layer is trained at a time, and the loss is a regression,
which is far cheaper than gradients through the whole model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.hf.changes import override
from saccade.hf.heads import Swap
from saccade.hf.runs import Undo
from saccade.hf.split_forward import hidden_states

RATE: Final = 0.01
"""Largest step of a weight, relative to the root mean square of its layer's weights."""
TURNS: Final = 2
"""How often a row of the text is used."""


@dataclass(slots=True)
class Distilled:
    """What a distillation did.

    Attributes:
        steps: optimizer steps of each layer; layers: how many were trained.
        before, after: relative error of their outputs on a row that is not trained on, mean of
            layers; complete: whether it went to its end.
    """

    steps: int
    layers: int = 0
    before: float = 0.0
    after: float = 0.0
    complete: bool = True


def rows_needed(steps: int) -> int:
    """Rows of text for that many steps: one is kept to judge by."""
    return max(2, math.ceil(steps / TURNS) + 1)


def distill(
    model: PreTrainedModel,
    swaps: list[Swap],
    rows: Tensor,
    *,
    steps: int,
    seed: int = 0,
    rate: float = RATE,
    on_progress: Callable[[int, int, float], None] = lambda *_: None,
) -> Distilled:
    """Train what `converted_heads` gave to the model, `steps` optimizer steps in each layer.

    Ctrl-C ends it; layers that are done keep what they learned.

    Args:
        swaps: of the Conversion whose `with` is open.
        rows: token ids `[rows, n]`; the last one is kept to judge by.
        rate: largest learning rate, relative to the size of the weights; it falls to 0 as a cosine.
        on_progress: called with (layers done, layers, relative error of the last one).
    """
    done = Distilled(steps)
    random = torch.Generator().manual_seed(seed)
    twice = torch.cat((rows, rows)).to(model.device)
    undo = Undo()
    with ExitStack() as stack, torch.no_grad():
        stack.callback(undo.run)
        for swap in swaps:

            def learn(layer: _Layer) -> None:
                before, after = layer.train(steps, rate, random)
                done.before += before / len(swaps)
                done.after += after / len(swaps)
                done.layers += 1
                on_progress(done.layers, len(swaps), after)

            override(undo, swap.module, "forward", _two_streams(swap, len(rows), learn))
        try:
            hidden_states(model, input_ids=twice, use_cache=False)
        except KeyboardInterrupt:
            done.complete = False
        finally:
            for swap in swaps:
                swap.put(swap.after)
    return done


def _two_streams(swap: Swap, rows: int, learn: Callable[[_Layer], None]) -> Callable[..., Any]:
    """The forward of a layer on `2 * rows` rows: the first half original, the second converted."""
    original: Callable[..., Any] = swap.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        def call(row: int) -> Any:
            part = _rows(args, row, 2 * rows), _rows(kwargs, row, 2 * rows)
            return original(*part[0], **part[1])

        swap.put(swap.before)
        targets = [_output(call(row)) for row in range(rows)]
        swap.put(swap.after)
        learn(_Layer(swap, lambda row: _output(call(rows + row)), targets))
        last = [call(rows + row) for row in range(rows)]
        joined = torch.cat((*targets, *map(_output, last)))
        return (joined, *last[-1][1:]) if isinstance(last[-1], tuple) else joined

    return forward


def _rows(value: Any, row: int, count: int) -> Any:
    """One row of everything that has `count` of them."""
    if isinstance(value, Tensor):
        batched = value.dim() > 0 and value.shape[0] == count
        return value[row : row + 1] if batched else value
    if isinstance(value, tuple | list):
        return tuple(_rows(part, row, count) for part in value)
    if isinstance(value, dict):
        return {name: _rows(part, row, count) for name, part in value.items()}
    return value


def _size(layer: nn.Linear) -> float:
    return layer.weight.detach().float().square().mean().sqrt().item()


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True, slots=True)
class _Layer:
    """A converted layer, how to run it on a row, and what it should give for each."""

    swap: Swap
    run: Callable[[int], Tensor]
    targets: list[Tensor]

    def train(self, steps: int, rate: float, random: torch.Generator) -> tuple[float, float]:
        """Relative error on the last row before and after; what is worse is not kept."""
        layers = [part for part in self.swap.after.values() if isinstance(part, nn.Linear)]
        parameters = [p for layer in layers for p in layer.parameters()]
        old = [p.detach().clone() for p in parameters]
        before = self.error()
        with contextlib.ExitStack() as undo:
            for p in parameters:
                undo.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(True)
            with torch.enable_grad():
                self._steps(layers, steps, rate, random)
        after = self.error()
        if not after < before:
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)
            after = before
        return before, after

    def _steps(
        self, layers: list[nn.Linear], steps: int, rate: float, random: torch.Generator
    ) -> None:
        groups = [
            {"params": list(layer.parameters()), "lr": rate * _size(layer)} for layer in layers
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        largest = [group["lr"] for group in optimizer.param_groups]
        rows = len(self.targets) - 1
        order = torch.cat(
            [torch.randperm(rows, generator=random) for _ in range(steps // rows + 1)]
        )
        for step, row in enumerate(order[:steps].tolist()):
            for group, most in zip(optimizer.param_groups, largest, strict=True):
                group["lr"] = most * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            self._loss(row).backward()
            optimizer.step()

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error on the last row, each token relative to the size of its target."""
        return self._loss(len(self.targets) - 1).item()

    def _loss(self, row: int) -> Tensor:
        target = self.targets[row].float()
        size = target.square().sum(-1, keepdim=True)
        gap = (self.run(row).float() - target).square().sum(-1, keepdim=True)
        # A first token can be a thousand times as large as the others: it alone would count.
        return (gap / (size + size.median())).mean() * 2
