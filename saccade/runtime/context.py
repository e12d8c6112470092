"""Context: a model with its options and its caches; it reads tokens and generates tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from saccade.compress import POLICIES
from saccade.core import BadInput, Unsupported
from saccade.runtime.auto_scaling import notes_on, what_fits
from saccade.runtime.budgets import budget_in_keys
from saccade.runtime.cached_text import CachedText
from saccade.runtime.drafted_text import DraftedText
from saccade.runtime.held import NextToken
from saccade.runtime.layers import without_own_dtype
from saccade.runtime.memory import check_free
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.observing import ObservationWindow, check_rotation
from saccade.runtime.params import ContextParams
from saccade.runtime.sampling import Sampler
from saccade.runtime.stats import FinishReason, GeneratedToken, OnProgress, Stats
from saccade.runtime.step import captures, refusal
from saccade.runtime.tables import outgrown
from saccade.runtime.token_ids import check_types, stop_tokens, token_ids, whole_number


class Context:
    """A running model under ContextParams; the model is restored when the context closes.

    An exception or Ctrl-C at any moment leaves it usable: `tokens` are those in the caches of all
    layers (see `runtime.cached_text`).

    Args:
        model: a `runtime.Model`.
        params: options; default ContextParams().
        reserve: tokens to allocate caches for at once, when the length is known beforehand.

    Attributes:
        params: the options in force; a `kv_budget` in bytes as the number of keys that it is.
        stats: what it has done so far.
        finish_reason: why the last stream ended: "stop", "length" (n_predict tokens) or "context"
            (full); None while one runs, and after an interrupt.

    Raises:
        BadInput: n_ctx or a window needs more memory for caches than the machine has, n_keep
            leaves nothing to remove, or a kv_budget in bytes is too small for its policy.
        TypeError: not a model, or not ContextParams.
        Unsupported: options that this model cannot run with.
    """

    def __init__(
        self, model: Model, params: ContextParams | None = None, *, reserve: int = 0
    ) -> None:
        check_types(model, params)
        self.model, facts = model, model.facts
        self._n_vocab = facts.vocab_size  # asking the config for each token takes a millisecond
        params = without_own_dtype(params or ContextParams(), facts.dtype)
        self.params = budget_in_keys(params, facts)
        self.reserve = whole_number("reserve", reserve, least=0)
        self.n_ctx = self.params.n_ctx or facts.n_ctx_train
        self.stats = Stats()
        self.finish_reason: FinishReason | None = None
        self.notes = notes_on(self.params, facts)
        self._has_table = facts.positions.limit is not None
        self._check_keep()
        check_free(facts, self.params, max(reserve, self.params.n_ctx or 0))
        self._use_step: bool | None = None  # whether DecodeStep can run here; None: not known yet
        self._closed = False
        with ExitStack() as stack:
            self.model = stack.enter_context(model.attached(self.params))
            self._check_shift()
            self._text = self.new_text()
            self._stack = stack.pop_all()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model; the context cannot be used afterwards."""
        self._closed = True
        self._text.close()
        self._stack.close()

    @property
    def cache(self) -> ModelCache:
        """The caches of all layers."""
        return self._text.cache

    @property
    def seen(self) -> int:
        """Tokens read so far."""
        return self._text.seen

    @property
    def tokens(self) -> list[int]:
        """The tokens in the caches: read so far, without those that a context shift removed."""
        return self._text.tokens

    @property
    def next_token(self) -> NextToken | None:
        """The token that was chosen but not yet read by the model, after a stream."""
        return self._text.held.next_token

    @property
    def observation_window(self) -> ObservationWindow | None:
        """The newest queries of each layer, while a kv_policy observes them."""
        return self._text.window

    @property
    def text(self) -> CachedText:
        """What the caches hold; see `runtime.session`."""
        return self._text

    @text.setter
    def text(self, text: CachedText) -> None:
        self._text = text

    def new_text(self) -> CachedText:
        """New, empty caches under the options of this context."""
        kind = CachedText if self.params.n_draft is None else DraftedText
        return kind(self.model, self.params, reserve=self.reserve)

    def reset(self) -> None:
        """Remove everything that was read; memory of caches stays allocated."""
        self._text.reset()

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._text.nbytes

    def append(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        wanted: int = 1,
        on_progress: OnProgress | None = None,
    ) -> Tensor:
        """Read tokens after those already seen, at most `n_batch` at a time.

        A token that `stream` has yielded and not yet read is read before them; one that it has
        chosen and not yielded is dropped.

        Args:
            tokens: ids `[n]`.
            wanted: how many of the last hidden states to return.
            on_progress: called after every chunk with (tokens read, all of them).

        Returns:
            Hidden states `[min(wanted, n), hidden]` of the last tokens.

        Raises:
            BadInput: no token ids of this model, none at all, or more than fit into n_ctx.
        """
        ids = token_ids(tokens, self._n_vocab)
        wanted = min(whole_number("wanted", wanted, least=1), len(ids))
        if not len(ids):
            raise BadInput("the prompt is empty: give at least one token to read.")
        return self._append(ids, wanted, on_progress)

    def _append(self, ids: Tensor, wanted: int, on_progress: OnProgress | None) -> Tensor:
        self._check_open()
        waiting = torch.tensor(self._text.waiting, dtype=torch.int64)
        self._check_room(len(waiting) + len(ids))
        both = torch.cat((waiting, ids))
        return self._text.read(both, wanted=wanted, on_progress=on_progress)

    def reuse(self, tokens: Sequence[int] | Tensor) -> int:
        """Roll back to the common prefix of `tokens` and what was read, or earlier.

        Sliding layers can roll back within their ring or to a checkpoint (`ctx_checkpoints`), a
        compressed cache not before its compression.  At least the last token is left to read.

        Returns:
            How many of `tokens` need not be read again; `append` or `stream` those after.
        """
        wanted = token_ids(tokens, self._n_vocab).tolist()
        self._check_open()
        common = 0
        for ours, theirs in zip(self.tokens, wanted[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        return self._text.roll_back(common)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` float32 of hidden states `[..., hidden]`."""
        with torch.inference_mode():
            return self.model.logits(hidden).float()

    def compress(self) -> None:
        """Apply `kv_policy` to the caches; without a policy nothing happens."""
        self._check_open()
        self._text.compress()

    def stream(
        self,
        prompt: Sequence[int] | Tensor = (),
        *,
        n_predict: int = 128,
        sampler: Sampler | None = None,
        stop: Iterable[int] = (),
        on_progress: OnProgress | None = None,
    ) -> Iterator[GeneratedToken]:
        """Read the prompt, apply kv_policy, then generate up to `n_predict` tokens.

        Generation ends early at a `stop` token (not yielded), or when n_ctx is full and n_keep is
        None; with n_keep tokens in the middle of the context are removed instead (context shift).
        `finish_reason` says which, and `stats` how long it took.  Several streams of one context
        continue one text, each behind what the others have read.

        Args:
            prompt: token ids `[n]`; without any, generation continues behind what was read last, by
                a stream, by `append`, or in a restored session.
            sampler: chooses tokens; default greedy.
            on_progress: called after every chunk of the prompt with (tokens read, all of them).

        Raises:
            BadInput: neither prompt nor a token to continue from, a prompt longer than n_ctx, or
                arguments of another type.
        """
        ids = token_ids(prompt, self._n_vocab)
        count, ends = whole_number("n_predict", n_predict, least=0), stop_tokens(stop)
        return self._stream(ids, count, sampler or Sampler(), ends, on_progress)

    def _stream(
        self,
        ids: Tensor,
        n_predict: int,
        sampler: Sampler,
        ends: set[int],
        on_progress: OnProgress | None,
    ) -> Iterator[GeneratedToken]:
        start, self.finish_reason = time.perf_counter(), None
        if len(ids):
            self._read(ids, sampler, on_progress)
        try:
            for index in range(n_predict):
                self.stats.cache_bytes = self.cache_bytes
                token = self._unshown_token(sampler, n_predict - index, ends)
                if index == 0:
                    self.stats.ttft_seconds = time.perf_counter() - start
                if token is None or token in ends:
                    self.finish_reason = "context" if token is None else "stop"
                    return
                self._text.choose(token, shown=True)
                yield GeneratedToken(token)
            self._unshown_token(sampler, 0, ends)
            self.finish_reason = "length"
        finally:
            self._text.settle()  # without what was drafted beyond the end

    def _unshown_token(self, sampler: Sampler, further: int, ends: set[int]) -> int | None:
        """The next token to yield, chosen by a step where none is left; None: no room for it.

        Args:
            further: how many more will be read, which may be drafted.
        """
        following = self.next_token
        if following is None:
            return self._choose(sampler)
        if not following.shown:
            return following.token
        if not self._step(following.token, sampler, further, ends):
            return None
        return self._choose(sampler)

    def _choose(self, sampler: Sampler) -> int:
        """Choose the token behind the last one that was read."""
        start = time.perf_counter()
        logits = self._text.next_logits()
        if logits is None:
            raise BadInput(
                "there is nothing to continue from: the prompt is empty and no token was read "
                "since the context was opened, reset or rolled back. Give a prompt."
            )
        token = sampler.pick(logits)
        self._text.choose(token, shown=False)
        self.stats.decode_seconds += time.perf_counter() - start
        return token

    def _read(self, ids: Tensor, sampler: Sampler, on_progress: OnProgress | None) -> None:
        """Read a prompt, apply the policy and choose the token behind it."""
        start, before = time.perf_counter(), self.stats.decode_seconds
        waited, read = len(self._text.waiting), self.seen
        try:
            self._append(ids, 1, on_progress)
            self.compress()
            self._choose(sampler)
        finally:  # what was read before an interrupt counts too
            self.stats.decode_seconds = before
            self.stats.prompt_tokens += max(0, self._text.length - read - waited)
            self.stats.prefill_seconds += time.perf_counter() - start

    def _step(self, token: int, sampler: Sampler, further: int, ends: set[int]) -> bool:
        """Read the token just yielded; False where no room is left."""
        self._check_open()
        if not self._room_for_one():
            return False
        start = time.perf_counter()
        if not self._read_ahead(token, sampler, further, ends):
            self._read_one(token)
        self.stats.decode_tokens += 1
        self.stats.decode_seconds += time.perf_counter() - start
        return True

    def _read_ahead(self, token: int, sampler: Sampler, further: int, ends: set[int]) -> bool:
        """Read one more token by exact speculation; False: it has to be read by itself."""
        if not isinstance(self._text, DraftedText):
            return False
        most = min(further, self.n_ctx - self.seen - 1)
        return self._text.read_ahead(token, most, sampler, ends, self.stats)

    def _read_one(self, token: int) -> None:
        """Read one more token; on a GPU by a CUDA graph (DecodeStep)."""
        cache = self._text.cache
        if self._use_step is None:
            self._use_step = self._can_step() and refusal(cache) is None
        steps = self._use_step and cache.observer is None
        if steps and not outgrown(self.model, cache, self.seen + 1):
            try:
                self._text.step(token)
                return
            except Unsupported:  # some models synchronize with the host, which cannot be captured
                self._use_step = False
        self._text.read(torch.tensor([token]), wanted=1, generated=True)

    def _can_step(self) -> bool:
        """Whether DecodeStep may run here: a GPU, and options that its kernels support."""
        return self.model.device.type == "cuda" and captures(self.params)

    def shift(self, n_keep: int) -> None:
        """Context shift: remove half of the tokens after the first `n_keep`, re-rotate later keys.

        Exact for the first layer; later layers keep keys computed from the removed tokens.

        Raises:
            BadInput: n_keep is no whole number of at least 0.
            Unsupported: a cache that cannot shift, or nothing to remove.
        """
        whole_number("n_keep", n_keep, least=0)
        self._check_open()
        n_discard = (self.seen - n_keep) // 2
        if n_discard < 1:
            raise Unsupported(
                f"nothing to remove after n_keep={n_keep} of {self.seen} tokens. Lower n_keep."
            )
        self._text.shift(n_keep, n_discard)

    @property
    def _bounded(self) -> bool:
        """Whether n_ctx limits the tokens; under n_swa memory is constant, so there is no limit.

        A model with a table of positions ends where its table does.
        """
        return self.params.n_swa is None or self._has_table

    def _room_for_one(self) -> bool:
        if not self._bounded or self.seen < self.n_ctx:
            return True
        if self.params.n_keep is None:
            return False
        self.shift(self.params.n_keep)
        return True

    def _check_room(self, count: int) -> None:
        if self._bounded and self.seen + count > self.n_ctx:
            raise BadInput(
                f"{self.seen + count} tokens do not fit into n_ctx={self.n_ctx}. "
                f"{what_fits(self.params, self.model.facts, self.seen + count)}"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise BadInput("this context is closed: open a new Context to go on.")

    def _check_keep(self) -> None:
        n_keep = self.params.n_keep
        if n_keep is not None and self._bounded and n_keep >= self.n_ctx - 1:
            raise BadInput(
                f"n_keep={n_keep} leaves nothing to remove from a full context of n_ctx="
                f"{self.n_ctx} tokens: expected n_keep of at most n_ctx - 2. Lower n_keep."
            )

    def _check_shift(self) -> None:
        """Refuse options for a model whose keys cannot be moved, before any text is generated."""
        if self.params.n_keep is not None and self._bounded:
            self.model.shift_keys(0, self.n_ctx)
        if self.params.kv_policy is not None:
            check_rotation(POLICIES[self.params.kv_policy](), self.model.shift_keys)
