"""The text in a model's caches: the listed tokens and the caches agree, whatever was interrupted.

`_held` is the record of what the caches hold.  It is replaced by one assignment when an operation
has come to its end, so an interrupt at any moment leaves either the old record or the new one.  The
caches themselves change layer by layer.  After an interrupt they are brought back to the record:
layers that read too much are rolled back, and where that is impossible (keys of a ring were
overwritten, a layer was in the middle of a change) the listed tokens are read again into new
caches at the next use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from saccade.cache import ShiftKeys, SlidingCache
from saccade.compress import in_keys
from saccade.core import Unsupported
from saccade.runtime.compression import compress_cache, most_above, room_behind
from saccade.runtime.held import Caches, Held, NextToken, Observed
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.observing import ObservationWindow, Sources, observing, without
from saccade.runtime.params import ContextParams
from saccade.runtime.rereading import reader_of
from saccade.runtime.rollback import checkpoint, queries_alike, reachable, roll_back, undo_read
from saccade.runtime.stats import OnProgress
from saccade.runtime.step import DecodeStep
from saccade.runtime.tables import must_read_again
from saccade.sparse import followed_by


class CachedText:
    """Tokens, the caches that hold them, and what comes after them.

    Args:
        model: from `Model.attached`.
        params: those it is attached under.
        reserve: tokens to allocate caches for at once.
    """

    def __init__(self, model: Model, params: ContextParams, *, reserve: int = 0) -> None:
        self._model, self._params, self._reserve = model, params, reserve
        self._caches = Caches.AGREE
        self._closed = False
        self._held = Held([])
        self._start()

    def _start(self) -> None:
        """New, empty caches."""
        self._decode_step: DecodeStep | None = None
        self._window: ObservationWindow | None = None
        self._unlisted = 0  # tokens that other code has read into the caches
        self._cache = self._model.new_cache(self._params, reserve=self._reserve)

    def close(self) -> None:
        """The model cannot read any more."""
        self._closed = True

    @property
    def cache(self) -> ModelCache:
        """The caches of all layers."""
        self.settle()
        return self._cache

    @property
    def _is_ahead(self) -> bool:
        return self._caches is Caches.AHEAD

    @property
    def held(self) -> Held:
        """What the caches hold; of caches that are ahead, without what may still be taken in."""
        if not self._is_ahead:
            self.settle()
        return self._held

    @property
    def seen(self) -> int:
        """Tokens read, those of other code counted."""
        return self.held.length + self._unlisted if self._is_ahead else self.cache.seen

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return self._cache.nbytes if self._is_ahead else self.cache.nbytes

    @property
    def tokens(self) -> list[int]:
        """The tokens in the caches."""
        held = self.held
        return held.tokens[: held.length]

    @property
    def length(self) -> int:
        """How many tokens the record lists; nothing is read again for it, even after an error."""
        return self._held.length

    @property
    def window(self) -> ObservationWindow | None:
        """The newest queries of each layer, while a kv_policy observes them."""
        self.settle()
        return self._window

    @property
    def waiting(self) -> list[int]:
        """The token that was shown and is still to be read, if there is one."""
        following = self.held.next_token
        return [following.token] if following is not None and following.shown else []

    def settle(self) -> None:
        """Bring the caches back to the record after an operation that did not come to its end."""
        if self._caches is Caches.AGREE or self._undone():
            return
        if self._closed:  # it cannot be read again
            self._held = Held([])
        self._read_again()

    def _undone(self) -> bool:
        """Whether the layers could be rolled back to the record, without reading anything."""
        if self._caches is Caches.CHANGING or self._cache.writing:
            return False
        self._cache.cursor = None
        stepped = self._caches is Caches.STEPPING
        length = self._held.length + self._unlisted
        with torch.inference_mode():
            self._cache.writing = True  # layers are in the middle of a change until this ends
            if not undo_read(self._cache.stores, length, stepped=stepped):
                return False
        self._cache.writing = False
        self._decode_step = None
        self._observe(self._held.observed)
        self._caches = Caches.AGREE
        return True

    def _read_again(self, length: int | None = None) -> None:
        """Read the listed tokens into new caches, which are compressed where the old ones were.

        Args:
            length: of the text whose rotary tables the keys get; None: as they were.
        """
        self._caches, held = Caches.CHANGING, self._held
        length = length or self._cache.reaches
        self._start()
        self._cache.reaches = length
        tokens = torch.tensor(held.tokens[: held.length], dtype=torch.int64)
        with torch.inference_mode():
            if held.compressed_at:
                self._start_observing()
                self._run_chunks(tokens[: held.compressed_at])
                self._compress()
            if held.observed is not None:
                self._start_observing()
            self._run_chunks(tokens[held.compressed_at :])
        self._held = held._replace(observed=self._observed())
        self._caches = Caches.AGREE

    @contextmanager
    def _operation(self, caches: Caches, after: Caches = Caches.AGREE) -> Iterator[Held]:
        """What runs inside may leave the caches so; where it fails they are brought back."""
        self.settle()
        self._unlisted = self._cache.seen - self._held.length
        self._caches = caches
        try:
            yield self._held
        except BaseException:
            if self._caches is not Caches.AGREE:
                self._undone()
            raise
        self._caches = after

    def read(
        self,
        tokens: Tensor,
        *,
        wanted: int,
        on_progress: OnProgress | None = None,
        generated: bool = False,
    ) -> Tensor:
        """Read int64 `[n]`, at most `n_batch` at a time; `on_progress` follows every chunk.

        Args:
            generated: tokens of the answer, which a kv_policy observes under kv_every alone.

        Returns:
            The last `wanted` hidden states `[wanted, hidden]`.
        """
        self._fit(self.held.length + len(tokens))
        states: list[Tensor] = []
        with torch.inference_mode():
            for chunk, behind in self._chunks(tokens):
                if not generated or self._params.kv_every is not None:
                    self._start_observing()
                states.append(self._read_chunk(chunk, behind))
                if self._is_due():
                    self._compress_now(behind)
                while len(states) > 1 and sum(map(len, states[1:])) >= wanted:
                    states.pop(0)
                if on_progress is not None:
                    on_progress(len(tokens) - behind, len(tokens))
        return torch.cat(states)[-wanted:]

    def _fit(self, length: int) -> None:
        """Read all tokens again where a text of that length has other rotary tables."""
        if must_read_again(self._model, self._cache, length):
            self._read_again(length)
        elif not self._cache.seen:
            self._cache.reaches = length

    def _read_chunk(self, chunk: Tensor, behind: int) -> Tensor:
        with self._operation(Caches.READING) as held:
            hidden = self._run(chunk, behind)
            self._hold(held, chunk.tolist(), hidden=hidden[-1].clone())
        return hidden

    def _run_chunks(self, tokens: Tensor) -> None:
        for chunk, behind in self._chunks(tokens):
            self._run(chunk, behind)
            if self._is_due():
                self._compress(behind)

    def _chunks(self, tokens: Tensor) -> Iterator[tuple[Tensor, int]]:
        """At most `n_batch` tokens, read before the next are cut off, and how many follow them."""
        while len(tokens):
            size = queries_alike(self._cache.stores, self._params.n_batch)
            chunk, tokens = tokens[:size], tokens[size:]
            yield chunk, len(tokens)

    def _run(self, chunk: Tensor, behind: int) -> Tensor:
        """Hidden states `[n, hidden]` of new tokens, which are in the caches afterwards."""
        hidden = followed_by(behind, self._model.hidden, chunk[None], self._cache)[0]
        if len(chunk) > 1:
            checkpoint(self._cache.stores)
        return hidden

    def step(self, token: int) -> Tensor:
        """Read one token by a DecodeStep -> logits `[vocab]` float32, valid until the next one.

        Raises:
            Unsupported: the model cannot be stepped; nothing was read.
        """
        with self._operation(Caches.STEPPING) as held:
            self._decode_step = self._decode_step or DecodeStep(self._model, self._cache)
            logits = self._decode_step(token)[0]
            self._hold(held, [token], logits=logits)
        return logits

    def _hold(
        self,
        held: Held,
        tokens: list[int],
        *,
        hidden: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Record that the caches hold these tokens too."""
        known = held.tokens
        del known[held.length :]
        known.extend(tokens)
        at, observed = held.compressed_at, self._observed()
        self._held = Held(known, len(known), None, hidden, logits, at, observed)

    def choose(self, token: int, *, shown: bool) -> None:
        """Record which token comes next."""
        self._held = self.held._replace(next_token=NextToken(token, shown))

    def next_logits(self) -> Tensor | None:
        """Logits `[vocab]` float32 behind the last token; None where they are not known."""
        held = self.held
        if held.hidden is None:
            return held.logits
        with torch.inference_mode():
            return self._model.logits(held.hidden).float()

    def roll_back(self, length: int) -> int:
        """Remove all tokens from `length` on, or from the last position before that can be reached.

        Returns:
            The position that was reached.
        """
        with self._operation(Caches.CHANGING) as held, torch.inference_mode():
            kept = reachable(self._cache.stores, length)
            tokens, at = held.tokens[:kept], min(kept, held.compressed_at)
            self._held = Held(tokens, len(tokens), compressed_at=at)
            self._observe(None)
            roll_back(self._cache.stores, kept)
        return kept

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Remove `n_discard` tokens after the first `n_keep` and re-rotate the keys after them.

        Raises:
            Unsupported: a cache that cannot shift.
        """
        with self._operation(Caches.CHANGING) as held, torch.inference_mode():
            stop, before = n_keep + n_discard, self._cache.seen
            tokens = held.tokens[: held.length]
            del tokens[n_keep:stop]
            if must_read_again(self._model, self._cache, len(tokens)):
                self._held = held._replace(tokens=tokens, length=len(tokens))
                self._read_again(len(tokens))
                return
            try:
                self._shift_layers(n_keep, stop)
            except Unsupported:
                if all(layer.seen == before for layer in self._cache.stores):
                    self._caches = Caches.AGREE  # refused before anything was changed
                raise
            at = held.compressed_at
            at = max(min(n_keep, at), at - n_discard)
            observed = self._shifted(held.observed, n_keep, stop)
            self._observe(observed)
            self._held = held._replace(
                tokens=tokens, length=len(tokens), compressed_at=at, observed=observed
            )

    def _shift_layers(self, start: int, stop: int) -> None:
        shifts = self._shifts()
        layers = [(each, shifts(i)) for i, each in enumerate(self._cache.stores)]
        # Rings last, which can always shift: if another layer refuses, nothing has changed yet.
        layers.sort(key=lambda item: isinstance(item[0], SlidingCache))
        for layer, shift in layers:
            layer.context_shift(start, stop, shift)

    def _shifted(self, observed: Observed | None, start: int, stop: int) -> Observed | None:
        """Observed queries, which move with the keys, of which start .. stop-1 are gone."""
        if observed is None:
            return None
        shifts = self._shifts()
        return {
            i: without(queries, start, stop)._replace(q=shifts(i)(queries.q, start - stop))
            for i, queries in observed.items()
        }  # blocks of keys are others after a shift

    def _shifts(self) -> Callable[[int], ShiftKeys]:
        """From a layer to the function that moves its keys, under the tables that they have."""
        return partial(self._model.shift_keys, length=self._cache.reaches)

    def compress(self) -> None:
        """Apply `kv_policy` to the caches; without observed queries nothing happens."""
        if self.held.observed:
            self._compress_now(None)

    def _compress_now(self, rest: int | None) -> None:
        with self._operation(Caches.CHANGING) as held, torch.inference_mode():
            self._compress(rest)
            self._held = held._replace(compressed_at=self._cache.seen, observed=self._observed())

    def _is_due(self) -> bool:
        """Whether the caches hold `kv_every` keys more than the budget."""
        window, every = self._window, self._params.kv_every
        if window is None or every is None or self._params.kv_budget is None:
            return False
        return most_above(self._cache, window, in_keys(self._params.kv_budget)) >= every

    def _compress(self, rest: int | None = None) -> None:
        """Compress the caches; `rest` tokens follow, None: the prompt ends, and observing too."""
        window, params = self._window, self._params
        if window is None or params.kv_budget is None:
            return
        budget, room = in_keys(params.kv_budget), room_behind(params, rest or 0)
        compress_cache(self._cache, window, budget, room=room)
        self._observe(None if rest is None else window.after_compression())

    def reset(self) -> None:
        """Remove everything; memory of caches stays allocated."""
        agreed, self._caches = self._caches is Caches.AGREE, Caches.CHANGING
        self._held = Held([])
        if agreed:
            for layer in self._cache.stores:
                layer.reset()
        else:
            self._start()
        self._observe(None)
        self._caches = Caches.AGREE

    def restore(self, held: Held) -> None:
        """Record what the caches hold, which was restored into them."""
        self._observe(held.observed)
        self._held = held

    def _observe(self, observed: Observed | None) -> None:
        """Go on observing from a state, or with None stop."""
        self._cache.observer = self._window = None
        if observed is not None:
            self._start_observing()
            assert self._window is not None, "only a kv_policy observes"
            self._window.restore(observed)

    def _observed(self) -> Observed | None:
        return None if self._window is None else self._window.state()

    def _start_observing(self) -> None:
        """Under a kv_policy: observe each layer from here on."""
        if self._params.kv_policy is not None and self._window is None:
            reader = reader_of(self._model, self._params, lambda: [self._held.tokens])
            sources = Sources(self._shifts(), self._model.output_weights, reader)
            self._window = observing(self._params.kv_policy, self._cache, sources)
