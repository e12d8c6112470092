"""Keys in host memory: the same attention, through two buffers on the device for all layers.

Without a GPU the copies run in the earliest and in the latest order that the schedule allows.
"""

import warnings
from functools import partial

import pytest
import torch

from saccade.cache import Cursor, DenseCache, OffloadedCache, StagingBuffers, host_rows, staging
from saccade.core import Mask, Unsupported
from saccade.ops import attend, make_call
from tests.support.side_streams import EarlySide, LateSide

TAIL = 8
ORDERS = ["early", "late", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Texts of some tokens lie in several pieces."""
    monkeypatch.setattr(host_rows, "SMALLEST", 1 << 12)
    monkeypatch.setattr(host_rows, "LARGEST", 1 << 13)


class Model:
    """Layers over host memory beside dense ones, in an order of copies."""

    def __init__(self, order, layers, side=None):
        if order == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        self.device = "cuda" if order == "cuda" else "cpu"
        self.side = side or {"early": EarlySide, "late": LateSide}.get(order, lambda: None)()
        side_of = staging.side_stream if order == "cuda" else lambda _: self.side
        self.staging = StagingBuffers(tail=TAIL, side_of=side_of)
        self.ours = [OffloadedCache(self.staging) for _ in range(layers)]
        self.plain = [DenseCache() for _ in range(layers)]
        self.pairs = []

    def _compare(self, q, view, expected, **options):
        def run():
            ours = attend(make_call(q, view, mask=Mask(), **options)).out
            self.pairs.append((ours, expected))

        run() if not isinstance(self.side, EarlySide) else self.side.later(run)

    def read(self, count, batch=2):
        """One pass through all layers; every layer has keys of its own."""
        for ours, plain in zip(self.ours, self.plain, strict=True):
            q, k, v = (torch.randn(batch, h, count, 16, device=self.device) for h in (4, 2, 2))
            expected = attend(make_call(q, plain.append(k, v), mask=Mask())).out
            self._compare(q, ours.append(k, v), expected)

    def step(self, batch=2):
        """A token through all layers, as a DecodeStep stores it."""
        at = torch.full((batch,), self.ours[0].seen, device=self.device)
        cursor = Cursor(at, at + 1)
        for cache in self.ours:
            cache.reserve(1)
        for ours, plain in zip(self.ours, self.plain, strict=True):
            q, k, v = (torch.randn(batch, h, 1, 16, device=self.device) for h in (4, 2, 2))
            expected = attend(make_call(q, plain.append(k, v), mask=Mask())).out
            view, where, _ = ours.write(k, v, cursor, None)
            self._compare(q, view, expected, q_offset=where.start, kv_lens=where.stop)
        for cache in self.ours:
            cache.commit(1)

    def change(self, change):
        if isinstance(self.side, EarlySide):
            self.side.follow()
        for cache in (*self.ours, *self.plain):
            change(cache)

    def check(self):
        if isinstance(self.side, EarlySide):
            self.side.follow()
        assert all(torch.allclose(*pair, atol=1e-5) for pair in self.pairs)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("order", ORDERS)
def test_no_buffer_is_written_before_it_was_read(order, layers):
    model = Model(order, layers)
    for count in (50, 1, 1, 30, 1, 1, TAIL, 1, 40):
        model.read(count)
    for _ in range(2 * TAIL + 2):
        model.step()
    for count in (1, 30, 1):
        model.read(count)
    model.step()
    model.check()
    rows = model.ours[0].rows
    assert len(rows.pieces) > 2 and rows.pieces[0].k.is_pinned() == (order == "cuda")
    assert model.ours[0].on_host + TAIL >= model.ours[0].seen


@pytest.mark.parametrize("lost", ["follow", "wait"])
def test_either_order_shows_what_a_missing_event_would_do(lost):
    side = (EarlySide if lost == "follow" else LateSide)()
    model = Model("", 4, side)
    model.read(50)
    held, real = [], getattr(side, lost)
    setattr(side, lost, lambda *_: held.append(1))
    model.read(1)
    model.read(1)
    setattr(side, lost, real)
    with pytest.raises(AssertionError):
        model.check()
    assert held


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("moved", [0, 3])
def test_reorder_truncate_shift_and_reset(order, moved):
    """With tokens on the host alone, and with some on the device."""
    model = Model(order, 3)
    model.read(40)
    for _ in range(moved):
        model.step()
    model.change(lambda cache: cache.reorder(torch.tensor([1, 0, 1], device=model.device)))
    model.read(4, batch=3)
    model.change(lambda cache: cache.reorder(torch.tensor([2, 1, 0], device=model.device)))
    model.step(batch=3)
    model.change(lambda cache: cache.truncate(cache.max_rollback(cache.seen - 3)))
    model.step(batch=3)
    model.change(lambda cache: cache.truncate(cache.max_rollback(30)))
    model.read(2, batch=3)
    model.change(lambda cache: cache.context_shift(5, 20, lambda keys, delta: keys + delta))
    model.step(batch=3)
    model.read(4, batch=3)
    assert {cache.seen for cache in model.ours} == {22}
    model.change(lambda cache: cache.reset())
    model.read(9, batch=1)  # another batch
    model.step(batch=1)
    model.check()


@pytest.mark.parametrize("order", ORDERS)
def test_states_move_between_host_and_device(order):
    model = Model(order, 2)
    model.read(30)
    model.step()
    model.check()
    for ours, plain in zip(model.ours, model.plain, strict=True):
        state, other = ours.state(), OffloadedCache(StagingBuffers())
        assert torch.equal(state.tensors["k"], plain.state().tensors["k"].cpu())
        other.restore(state, torch.device("cpu"))  # of a processor
        assert torch.equal(other.view().v, state.tensors["v"])
        ours.restore(other.state(), torch.device(model.device))
    model.read(3)
    model.step()
    model.check()


def test_a_step_copies_every_older_token_once():
    model = Model("late", 4)
    model.read(50)
    model.step()
    model.side.synchronize()
    before = model.side.copied
    model.step()
    assert model.side.copied - before == 4 * 50 * 2 * 2 * 16 * 2


def test_memory_that_cannot_be_locked_is_named_once_and_works(monkeypatch):
    """As on a machine with a low limit; here PyTorch has no GPU to lock it for."""
    if torch.cuda.is_available():
        monkeypatch.setattr(host_rows.torch, "empty", partial(_refusing, torch.empty))
    model = Model("late", 2)
    model.read(3)
    for cache in model.ours:
        cache.rows._pinned = True
    with pytest.warns(UserWarning, match="could not be page-locked .*ulimit -l"):
        model.read(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read(200)
    with pytest.raises(Unsupported, match="page-locked"):
        model.step()
    model.read(1)
    model.check()


def _refusing(original, *args, **kwargs):
    if kwargs.get("pin_memory"):
        raise RuntimeError("CUDA error: out of memory")
    return original(*args, **kwargs)


def test_on_a_cpu_nothing_is_staged():
    staged = StagingBuffers()
    cache = OffloadedCache(staged)
    k = torch.randn(1, 1, 5, 8)
    view = cache.append(k, k)
    assert view.k.data_ptr() == cache.view().k.data_ptr()
    assert staged.nbytes == 0 and cache.rows is None
