"""What a policy observes of every layer while a prompt is read: its queries, what keys receive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.cache import ShiftKeys, SlidingCache
from saccade.compress import (
    POLICIES,
    ExpectedQueries,
    LayerObservation,
    ObservedQueries,
    Policy,
)
from saccade.compress.query_statistics import expected_queries, with_statistics
from saccade.core import AttentionOutput, Unsupported
from saccade.ops import AttentionCall, attend, attend_received
from saccade.runtime.model import ModelCache
from saccade.runtime.rereading import Reader, Weights, reread


class Sources(NamedTuple):
    """What a policy may ask of the model beside what its attention computes.

    Attributes:
        shift_keys: layer -> what moves its keys by positions; see `runtime.model.Model`.
        output_weights: layer -> its output projection `[H, Dv, hidden]`.
        reader: reads the context a second time.
    """

    shift_keys: Callable[[int], ShiftKeys]
    output_weights: Callable[[int], Tensor]
    reader: Reader


class ObservationWindow:
    """What a policy has to see of every layer, kept while a prompt is read.

    Args:
        policy: it says how many of the newest queries (SnapKV, arXiv 2404.14469), and what else.
        cache: the caches that are observed.
        sources: of the model.
        padding: tokens before the text of each row of a batch; None: none.
    """

    def __init__(
        self,
        policy: Policy,
        cache: ModelCache,
        sources: Sources,
        padding: Sequence[int] | None = None,
    ) -> None:
        self.policy, self.padding = policy, padding
        self._cache, self._sources = cache, sources
        self._observed: dict[int, ObservedQueries] = {}
        self._reread: Weights = {}
        check_rotation(policy, sources.shift_keys)

    def observe(self, layer: int, call: AttentionCall, backend: str) -> AttentionOutput:
        """Run one call of one layer and note what it shows; see `runtime.model.Observer`.

        Raises:
            Unsupported: attention that depends on distances, which a compressed cache changes.
        """
        if call.alibi_slopes is not None:
            raise Unsupported(
                "kv_policy removes keys, and ALiBi weighs keys by how many lie between. Leave out "
                "kv_policy for this model."
            )
        ring, received = isinstance(self._cache.stores[layer], SlidingCache), None
        if self.policy.observes.received and not ring:
            result, received = attend_received(call, backend=backend)
        else:
            result = attend(call, backend=backend)
        self._note(layer, call.transformed(), received)
        return result

    def _note(self, layer: int, call: AttentionCall, received: Tensor | None) -> None:
        """Add the queries of a call and what keys received from them."""
        width = max(1, self.policy.observes.queries)
        newest, older = _newest_queries(call, width), self._observed.get(layer)
        if older is not None and newest.q.shape[2] < width:
            newest = _joined(older, newest, width)
        if self.policy.observes.future:
            rotate = self._sources.shift_keys(layer)
            newest = with_statistics(older, newest, call.q, self._positions(layer, call), rotate)
        if received is not None:
            if older is not None and older.received is not None:
                received[..., : older.received.shape[2]] += older.received
            newest = newest._replace(received=received)
        self._observed[layer] = newest

    def read_again(self) -> None:
        """Read the context a second time, where the policy observes that."""
        rereading = self.policy.observes.rereading
        if rereading is not None:
            self._reread = reread(self._cache, self._sources.reader, rereading, self.padding)

    def keep(self, layer: int, index: Tensor) -> None:
        """Forget what removed keys received.

        Args:
            index: slots that stay, int64 `[B, Hkv, n]`.
        """
        received = self._observed[layer].received
        if received is not None:
            kept = received.gather(-1, index)
            self._observed[layer] = self._observed[layer]._replace(received=kept)

    def _positions(self, layer: int, call: AttentionCall) -> Tensor:
        """Positions of the queries of a call, which were stored last: `[1 | B, t]`."""
        seen, count = self._cache.stores[layer].seen, call.q.shape[2]
        at = torch.arange(seen - count, seen, device=call.q.device)[None]
        return at if self.padding is None else at - at.new_tensor(self.padding)[:, None]

    def state(self) -> dict[int, ObservedQueries]:
        """What was observed of each layer so far."""
        return dict(self._observed)

    def after_compression(self) -> dict[int, ObservedQueries] | None:
        """What goes on being observed when keys were removed; None: nothing.

        Of the window the newest query alone: keys of the others may be gone, so that nothing says
        any more which of the keys they see.  Blocks that it has read are counted in keys, of which
        there are others now.
        """
        if any(each.blocks is not None for each in self._observed.values()):
            return None
        return {i: each._replace(q=each.q[:, :, -1:]) for i, each in self._observed.items()}

    def restore(self, state: dict[int, ObservedQueries]) -> None:
        """Replace everything observed by a `state`."""
        self._observed = dict(state)

    def of(
        self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> LayerObservation:
        """What was observed of a layer that holds these keys; see LayerObservation."""
        found, observes = self._observed[layer], self.policy.observes
        received = self._reread.get(layer, found.received)
        if observes.received and received is not None and positions is not None:
            received = received.gather(-1, positions.clamp_min(0))
        observation = LayerObservation(
            queries=found, k=k, v=v, positions=positions, received=received
        )
        if observes.output:
            output = self._sources.output_weights(layer)
            observation = replace(observation, output=output)
        if observes.future:
            observation = replace(observation, expected=self._expected(layer))
        return observation

    def _expected(self, layer: int) -> ExpectedQueries:
        """Queries to come of a layer, behind the text of each row."""
        found, seen = self._observed[layer], self._cache.stores[layer].seen
        rotate, future = self._sources.shift_keys(layer), self.policy.observes.future
        if self.padding is None:
            return expected_queries(found, rotate, seen, future)
        rows = [expected_queries(found, rotate, seen - n, future) for n in self.padding]
        parts = zip(*(tuple(x[b : b + 1] for x in row) for b, row in enumerate(rows)), strict=True)
        return ExpectedQueries(*(torch.cat(part) for part in parts))


def without(queries: ObservedQueries, start: int, stop: int) -> ObservedQueries:
    """What was observed where the keys start .. stop-1 are removed; which blocks were read is not
    known any more."""
    received = queries.received
    if received is not None:
        received = torch.cat((received[..., :start], received[..., stop:]), dim=-1)
    return queries._replace(received=received, blocks=None, k_block=0)


def observing(
    policy: str, cache: ModelCache, sources: Sources, padding: Sequence[int] | None = None
) -> ObservationWindow:
    """A window of the policy of that name, which observes a cache from here on."""
    window = ObservationWindow(POLICIES[policy](), cache, sources, padding)
    cache.observer = window.observe
    return window


def check_rotation(policy: Policy, shift_keys: Callable[[int], ShiftKeys]) -> None:
    """Find how keys rotate, before the model runs: observing happens inside of it.

    Raises:
        Unsupported: it is not known, and the policy needs it.
    """
    if not policy.observes.future:
        return
    try:
        shift_keys(0)
    except Unsupported as error:
        raise Unsupported(
            f"ExpectedAttention has to undo RoPE, which is not known here ({error}) Choose another "
            "kv_policy, such as 'snapkv'."
        ) from error


def _newest_queries(call: AttentionCall, width: int) -> ObservedQueries:
    """The last `width` queries of a call, copied, and the blocks of keys that each of them read."""
    length = call.q.shape[2]
    blocks = None
    if call.blocks is not None:
        index = torch.arange(max(0, length - width), length, device=call.q.device)
        blocks = call.blocks.allowed[:, :, index // call.blocks.q_block]
    return ObservedQueries(
        q=call.q[:, :, -width:].detach().clone(),
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=None if call.sink_logits is None else call.sink_logits.detach(),
        blocks=blocks,
        k_block=0 if call.blocks is None else call.blocks.k_block,
    )


def _joined(older: ObservedQueries, newer: ObservedQueries, width: int) -> ObservedQueries:
    """The newest `width` of the queries of two calls; earlier queries read no later block."""
    blocks = None
    if older.blocks is not None and newer.blocks is not None:
        missing = newer.blocks.shape[3] - older.blocks.shape[3]
        padded = F.pad(older.blocks, (0, missing))
        blocks = torch.cat((padded, newer.blocks), dim=2)[:, :, -width:]
    q = torch.cat((older.q, newer.q), dim=2)[:, :, -width:]
    return newer._replace(q=q, blocks=blocks)
