"""One token through the whole model, captured once as a CUDA graph and replayed for every token.

Run eagerly, a step of decoding is a thousand launches and the host is slower than the GPU: a
Llama-3.1-8B then takes 20 ms a token whatever its length, where reading its weights takes 4 ms.
A captured step cannot depend on the host: the token, the position and the number of stored keys are
tensors, and storage stays where it is (`cache.step`).  Without a GPU the same code runs eagerly.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from saccade.cache import Cursor, SteppingCache
from saccade.core import Unsupported
from saccade.core.held_values import holding
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.params import QUANTIZED, ContextParams
from saccade.sparse import RulePattern
from saccade.sparse.pattern import StepPattern, decodes_densely

_stepping: ContextVar[bool] = ContextVar("saccade_stepping", default=False)


def in_step() -> bool:
    """Whether what runs now is a step; on a GPU it is captured, so that launches cost no time."""
    return _stepping.get()


def refusal(cache: ModelCache) -> str | None:
    """Why a cache cannot be stepped, or None."""
    for index, layer in enumerate(cache.stores):
        if not isinstance(layer, SteppingCache):
            return (
                f"layer {index} has a {type(layer).__name__}, which needs the host for each token"
            )
    return None if cache.seen else "the cache is empty"


def captures(params: ContextParams) -> bool:
    """Whether the kernels under these options, of a Context, need nothing from the host."""
    plain, stored = params.flash_attn != "disabled", params.type_k is None
    if decodes_densely(params.attends_by):
        stored = stored or params.type_k in QUANTIZED
    elif not isinstance(params.attends_by, RulePattern | StepPattern):
        return False
    return plain and stored and params.backend in (None, "triton")


class DecodeStep:
    """Reads one token in every row and returns the logits of the next one.

    The cache may be used in other ways between two steps: the step notices, and captures anew
    where storage has moved.  With one row on Hopper, models of transformers run by `ops.gemv`.

    Args:
        model: from `Model.attached`, under the options of all steps.
        cache: of that model, not empty.
        batch: rows.
        inference: compute in PyTorch's inference mode, as a Context does, not in the mode that the
            caller is in: a cache that grows in it can only be written to in it.

    Attributes:
        steps, captures: how many there were.

    Raises:
        Unsupported: a cache that cannot be stepped.
    """

    def __init__(
        self, model: Model, cache: ModelCache, *, batch: int = 1, inference: bool = True
    ) -> None:
        reason = refusal(cache)
        if reason is not None:
            raise Unsupported(f"these caches cannot be stepped: {reason}. Use Context.append.")
        self._model, self._cache, self.batch = model, cache, batch
        self._inference, self.steps, self.captures = inference, 0, 0
        self._layers = [layer for layer in cache.stores if isinstance(layer, SteppingCache)]
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        start = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self._cursor = Cursor(start, start + 1)
        self._reached = -1  # the position that the cursor holds
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_keys: list[tuple[int, ...]] = []
        self._logits: Tensor | None = None

    def __call__(self, tokens: int | Tensor) -> Tensor:
        """Read a token, or int64 `[B]` of them.

        Returns:
            Logits `[B, vocab]` float32, valid until the next step.

        Raises:
            Unsupported: a model that needs the host in the middle of a step; nothing was read.
        """
        with torch.inference_mode() if self._inference else torch.no_grad():
            return self._taken(tokens)

    def _taken(self, tokens: int | Tensor) -> Tensor:
        self._cache.writing = True  # full groups of a quantized cache are quantized here
        for layer in self._layers:
            layer.reserve(1)
        self._cache.writing = False
        if isinstance(tokens, Tensor):
            self._tokens.copy_(tokens.view(-1, 1))
        else:
            self._tokens.fill_(tokens)
        seen = self._cache.seen
        if self._reached != seen:
            self._move_cursor(seen)
        self._reached = -1  # unknown, should this step be interrupted
        logits = self._replayed(seen) if self._tokens.is_cuda else self._run()
        for layer in self._layers:
            layer.commit(1)
        self._reached = seen + 1
        self.steps += 1
        return logits

    def _move_cursor(self, seen: int) -> None:
        self._cursor.start.fill_(seen)
        self._cursor.stop.fill_(seen + 1)

    def _run(self) -> Tensor:
        """The step itself: work for the device alone; the cursor ends one position further on."""
        self._cache.cursor = self._cursor
        try:
            logits = holding(_stepping, True, self._computed)
        finally:
            self._cache.cursor = None
        for position in self._cursor:
            position.add_(1)
        return logits

    def _computed(self) -> Tensor:
        """Logits `[B, vocab]` float32 of the tokens at the cursor."""
        hidden = self._model.hidden(self._tokens, self._cache)
        return self._model.logits(hidden[:, -1]).float()

    def _replayed(self, seen: int) -> Tensor:
        keys = [layer.graph_key() for layer in self._layers]
        if self._graph is None or keys != self._graph_keys:
            self._capture(seen)
            self._graph_keys = keys
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    def _capture(self, seen: int) -> None:
        """Run once, so that kernels are compiled and libraries are set up; then record."""
        self._graph = self._logits = None
        self.captures += 1
        stream = torch.cuda.Stream(self._tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
            self._move_cursor(seen)  # the recorded step writes the same slots again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Where a capture fails, PyTorch leaves its stream current: the outer `with` does not.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._logits = self._run()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise Unsupported(
                f"this model cannot be captured as a CUDA graph: {reason}. Use Context.append."
            ) from error
        self._graph = graph
