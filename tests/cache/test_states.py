"""States of recurrent layers: copied for checkpoints, refused where no copy is."""

from __future__ import annotations

import pytest
import torch

from saccade.cache import DenseCache, StateCache, snapshot
from saccade.core import BadInput, Unsupported
from saccade.runtime.rollback import checkpoint


class Holder:
    """A state that every token adds itself to."""

    def __init__(self):
        self.states, self.seen = {}, 0

    def read(self):
        return self.states

    def write(self, states):
        self.states = dict(states)

    def token(self, value):
        before = self.states.get("sum", torch.zeros(1, 3))
        self.states = {"sum": before + value}
        self.seen += 1


def made(checkpoints=0):
    holder = Holder()
    return holder, StateCache(holder, lambda: holder.seen, checkpoints=checkpoints)


def read(holder, cache, values):
    for value in values:
        holder.token(value)
        checkpoint([cache])


def test_truncate_goes_back_to_a_copy():
    holder, cache = made(checkpoints=2)
    read(holder, cache, [1, 10, 100])
    assert cache.max_rollback(2) == 2 and cache.max_rollback(1) == 0  # one copy was freed
    cache.truncate(2)
    assert holder.states["sum"].tolist() == [[11, 11, 11]]
    holder.seen = 2
    holder.token(5)
    cache.truncate(2)
    assert holder.states["sum"].tolist() == [[11, 11, 11]]  # the copy was not changed


def test_the_newest_copy_is_never_freed():
    holder, cache = made(checkpoints=3)
    read(holder, cache, range(9))
    assert cache.max_rollback(9) == 9 and cache.max_rollback(8) in range(1, 9)
    assert cache.nbytes == 4 * 3 * 4


def test_no_copy_is_no_way_back():
    holder, cache = made()
    read(holder, cache, [1, 2])
    assert cache.max_rollback(1) == 0 and cache.max_rollback(2) == 2
    with pytest.raises(Unsupported, match="cannot go back to position 1 of 2"):
        cache.truncate(1)
    cache.truncate(2)
    assert holder.states["sum"].tolist() == [[3, 3, 3]]
    cache.truncate(0)
    assert holder.states == {}


def test_no_token_can_be_taken_out_of_the_middle():
    _, cache = made()
    with pytest.raises(Unsupported, match="cannot be taken out of the state"):
        cache.context_shift(0, 1, lambda k, delta: k)
    with pytest.raises(Unsupported, match="no keys can be appended"):
        cache.append(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_rows_of_copies_move_too():
    holder, cache = made(checkpoints=1)
    holder.states, holder.seen = {"sum": torch.tensor([[1.0], [2.0]])}, 1
    cache.checkpoint()
    cache.reorder(torch.tensor([1, 0]))
    assert holder.states["sum"].tolist() == [[2.0], [1.0]]
    cache.truncate(1)
    assert holder.states["sum"].tolist() == [[2.0], [1.0]]


def test_snapshot_restores_a_copy():
    holder, cache = made()
    read(holder, cache, [4])
    state = cache.state()
    assert snapshot.kind_of(cache) == "states"
    other, restored = made()
    other.seen = 1
    snapshot.restore(restored, "states", state, torch.device("cpu"))
    assert torch.equal(other.states["sum"], holder.states["sum"])
    assert other.states["sum"] is not holder.states["sum"]
    with pytest.raises(BadInput, match="contradict themselves"):
        snapshot.restore(restored, "states", state._replace(tensors={}), torch.device("cpu"))
    with pytest.raises(BadInput, match="a states cache where this context has a dense one"):
        snapshot.check(DenseCache(), "states", state)
