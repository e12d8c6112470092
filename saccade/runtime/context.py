"""Context: a model with its options and its caches; it reads tokens and generates tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache import RingCache
from saccade.compress import ObservedQueries
from saccade.core import BadInput, Unsupported
from saccade.core.hardware import available_memory
from saccade.runtime.compression import ObservationWindow, compress_cache
from saccade.runtime.memory import cache_bytes
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.params import ContextParams
from saccade.runtime.rollback import checkpoint, roll_back
from saccade.runtime.sampling import Sampler
from saccade.runtime.step import DecodeStep, refusal


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of `Context.stream`, as its id."""

    token: int


@dataclass(slots=True, kw_only=True)
class Stats:
    """What a context has done so far.

    Attributes:
        prompt_tokens, decode_tokens: tokens read in prompts, and tokens generated.
        prefill_seconds, decode_seconds: wall time they took.
        cache_bytes: bytes of all caches at the last generated token.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token that was chosen but not yet read by the model.

    Attributes:
        shown: whether `stream` has yielded it.
    """

    token: int
    shown: bool


class Context:
    """A running model under ContextParams; the model is restored when the context closes.

    Args:
        model: a `runtime.Model`.
        params: options; default ContextParams().
        reserve: tokens to allocate caches for at once, when the length is known beforehand.

    Raises:
        BadInput: n_ctx needs more memory for caches than the machine has.
        Unsupported: options that this model cannot run with.
    """

    def __init__(
        self, model: Model, params: ContextParams | None = None, *, reserve: int = 0
    ) -> None:
        self.model = model
        self.params = params or ContextParams()
        self.n_ctx = self.params.n_ctx or model.facts.n_ctx_train
        self.stats = Stats()
        self._check_memory(max(reserve, self.params.n_ctx or 0))
        self._stack = ExitStack()
        self.model = self._stack.enter_context(model.attached(self.params))
        self._cache = self.model.new_cache(self.params, reserve=reserve)
        self._observation_window: ObservationWindow | None = None
        self._tokens: list[int] = []
        self._next: NextToken | None = None
        self._decode_step: DecodeStep | None = None
        self._use_step: bool | None = None  # whether DecodeStep can run here; None: not known yet

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model; the context cannot be used afterwards."""
        self._stack.close()

    @property
    def cache(self) -> ModelCache:
        """The caches of all layers."""
        return self._cache

    @property
    def seen(self) -> int:
        """Tokens read so far."""
        return self._cache.seen

    @property
    def tokens(self) -> list[int]:
        """The tokens in the caches: read so far, without those that a context shift removed."""
        return list(self._tokens)

    @property
    def next_token(self) -> NextToken | None:
        """The token that was chosen but not yet read by the model, after a stream."""
        return self._next

    @property
    def observation_window(self) -> ObservationWindow | None:
        """The newest queries of each layer, while a kv_policy observes them."""
        return self._observation_window

    def resume(
        self,
        tokens: Sequence[int],
        next_token: NextToken | None,
        observed: dict[int, ObservedQueries] | None,
    ) -> None:
        """Set what the caches hold, after they were restored or rolled back; see `runtime.session`.

        Args:
            next_token: chosen but not yet read.
            observed: state of the observation window, where a kv_policy was observing.
        """
        self._tokens, self._next = list(tokens), next_token
        self._cache.observer = self._observation_window = None
        if observed is not None:
            self._start_observing()
            assert self._observation_window is not None, "params were compared before"
            self._observation_window.restore(observed)

    def reset(self) -> None:
        """Remove everything that was read; memory of caches stays allocated."""
        for layer in self._cache.stores:
            layer.reset()
        self.resume([], None, None)

    @property
    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._cache.nbytes

    def append(self, tokens: Sequence[int] | Tensor, *, wanted: int = 1) -> Tensor:
        """Read tokens after those already seen, at most `n_batch` at a time.

        Args:
            tokens: ids `[n]`.
            wanted: how many of the last hidden states to return.

        Returns:
            Hidden states `[min(wanted, n), hidden]` of the last tokens.

        Raises:
            BadInput: no tokens, or more than fit into n_ctx.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        if ids.numel() == 0:
            raise BadInput("the prompt is empty: give at least one token to read.")
        self._check_room(len(ids))
        self._start_observing()
        states: list[Tensor] = []
        with torch.inference_mode():
            for chunk in ids.split(self.params.n_batch):
                hidden = self.model.hidden(chunk[None], self._cache)[0]
                self._tokens += chunk.tolist()
                if len(chunk) > 1:
                    checkpoint(self._cache.stores)
                states.append(hidden)
                while len(states) > 1 and sum(map(len, states[1:])) >= wanted:
                    states.pop(0)
        return torch.cat(states)[-wanted:]

    def reuse(self, tokens: Sequence[int] | Tensor) -> int:
        """Roll back to the common prefix of `tokens` and what was read, or earlier.

        Sliding layers can roll back within their ring or to a checkpoint (`ctx_checkpoints`), a
        compressed cache not before its compression.  At least the last token is left to read.

        Returns:
            How many of `tokens` need not be read again; `append` or `stream` those after.
        """
        wanted = torch.as_tensor(tokens, dtype=torch.int64).tolist()
        common = 0
        for ours, theirs in zip(self._tokens, wanted[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        with torch.inference_mode():
            kept = roll_back(self._cache.stores, common)
        self.resume(self._tokens[:kept], None, None)
        return kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` float32 of hidden states `[..., hidden]`."""
        with torch.inference_mode():
            return self.model.logits(hidden).float()

    def compress(self) -> None:
        """Apply `kv_policy` to the caches; without a policy nothing happens."""
        window = self._observation_window
        if window is None:
            return
        assert self.params.kv_policy is not None and self.params.kv_budget is not None
        with torch.inference_mode():
            compress_cache(self._cache, window, self.params.kv_policy, self.params.kv_budget)
        self._cache.observer = self._observation_window = None

    def stream(
        self,
        prompt: Sequence[int] | Tensor = (),
        *,
        n_predict: int = 128,
        sampler: Sampler | None = None,
        stop: Iterable[int] = (),
    ) -> Iterator[GeneratedToken]:
        """Read the prompt, apply kv_policy, then generate up to `n_predict` tokens.

        Generation ends early at a `stop` token (not yielded), or when n_ctx is full and n_keep is
        None; with n_keep tokens in the middle of the context are removed instead (context shift).

        Args:
            prompt: token ids `[n]`; without any, generation continues where the last stream (or a
                restored session) stopped.
            sampler: chooses tokens; default greedy.

        Raises:
            BadInput: neither prompt nor a token to continue from, or a prompt longer than n_ctx.
        """
        sampler, ends = sampler or Sampler(), set(stop)
        if len(prompt) or self._next is None:
            self._read(prompt, sampler)
        for _ in range(n_predict):
            self.stats.cache_bytes = self.cache_bytes
            token = self._unshown_token(sampler)
            if token is None or token in ends:
                return
            self._next = NextToken(token, shown=True)
            yield GeneratedToken(token)
        self._unshown_token(sampler)

    def _unshown_token(self, sampler: Sampler) -> int | None:
        """The next token to yield, chosen by a step where none is left; None: no room for it."""
        assert self._next is not None
        if self._next.shown and not self._step(sampler):
            return None
        return self._next.token

    def _read(self, prompt: Sequence[int] | Tensor, sampler: Sampler) -> None:
        """Read a prompt, after the last token of the stream before it if that is still unread."""
        start = time.perf_counter()
        tokens = torch.as_tensor(prompt, dtype=torch.int64)
        if self._next is not None and self._next.shown:
            tokens = torch.cat((torch.tensor([self._next.token]), tokens))
        hidden = self.append(tokens)
        self.compress()
        self._next = NextToken(sampler.pick(self.logits(hidden[-1])), shown=False)
        self.stats.prompt_tokens += len(prompt)
        self.stats.prefill_seconds += time.perf_counter() - start

    def _step(self, sampler: Sampler) -> bool:
        """Read the token just yielded and choose the next one; False where no room is left."""
        assert self._next is not None
        if not self._room_for_one():
            return False
        start = time.perf_counter()
        logits = self._read_one(self._next.token)
        self._next = NextToken(sampler.pick(logits), shown=False)
        self.stats.decode_tokens += 1
        self.stats.decode_seconds += time.perf_counter() - start
        return True

    def _read_one(self, token: int) -> Tensor:
        """Logits `[vocab]` after one more token; on a GPU by a CUDA graph (DecodeStep)."""
        self._start_observing()
        if self._use_step is None:
            self._use_step = self._can_step() and refusal(self._cache) is None
        if self._use_step and self._cache.observer is None:
            try:
                self._decode_step = self._decode_step or DecodeStep(self.model, self._cache)
                logits = self._decode_step(token)[0]
            except Unsupported:  # some models synchronize with the host, which cannot be captured
                self._use_step = False
            else:
                self._tokens.append(token)
                return logits
        return self.logits(self.append([token])[-1])

    def _can_step(self) -> bool:
        """Whether DecodeStep may run here: a GPU, and options that its kernels support."""
        params = self.params
        plain = params.sparse is None and params.flash_attn != "disabled"
        stored = params.type_k in (None, "int8", "int4", "fp8")
        served = stored and params.backend in (None, "triton")
        return self.model.device.type == "cuda" and plain and served

    def _start_observing(self) -> None:
        """Under a kv_policy: keep the newest queries of each layer from here on."""
        if self.params.kv_policy is not None and self._observation_window is None:
            self._observation_window = ObservationWindow.for_policy(self.params.kv_policy)
            self._cache.observer = self._observation_window.observe

    def shift(self, n_keep: int) -> None:
        """Context shift: remove half of the tokens after the first `n_keep`, re-rotate later keys.

        Exact for the first layer; later layers keep keys computed from the removed tokens.

        Raises:
            Unsupported: a cache that cannot shift.
        """
        n_discard = (self.seen - n_keep) // 2
        if n_discard < 1:
            raise Unsupported(
                f"nothing to remove after n_keep={n_keep} of {self.seen} tokens. Lower n_keep."
            )
        layers = list(enumerate(self._cache.stores))
        # Rings last, which can always shift: if another layer refuses, nothing has changed yet.
        layers.sort(key=lambda item: isinstance(item[1], RingCache))
        with torch.inference_mode():
            for i, layer in layers:
                layer.context_shift(n_keep, n_keep + n_discard, self.model.shift_keys(i))
        del self._tokens[n_keep : n_keep + n_discard]

    @property
    def _bounded(self) -> bool:
        """Whether n_ctx limits the tokens; under n_swa memory is constant, so there is no limit."""
        return self.params.n_swa is None

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
                f"{self.seen + count} tokens do not fit into n_ctx={self.n_ctx}. Raise n_ctx "
                "(with rope_scaling_type='yarn' beyond the trained length), set a window (n_swa), "
                "or give a shorter prompt."
            )

    def _check_memory(self, tokens: int) -> None:
        free = available_memory()
        needed = cache_bytes(self.model.facts, self.params, [(tokens, 1)], reserve=tokens)
        if needed > free:
            raise BadInput(
                f"caches for {tokens} tokens need {needed / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB of memory are free. Lower n_ctx, set a window (n_swa) or "
                "quantize the cache (type_k=type_v='int8')."
            )
