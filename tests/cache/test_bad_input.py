"""Wrong inputs and interrupts: one sentence, and the cache is as it was."""

import sys

import pytest
import torch

from saccade.core import Mask
from saccade.ops import attend, make_call
from tests.cache.test_contract import EXACT, qkv
from tests.cache.test_every_kind import KINDS

FRESH = [name for name in KINDS if "compressed" not in name and "checkpoints" not in name]


def started(kind, length=30):
    cache, (_, k, v) = KINDS[kind](), qkv()
    for at in range(0, length, 5):
        cache.append(k[:, :, at : at + 5], v[:, :, at : at + 5])
    return cache


WRONG = {
    "another batch": lambda k, v: (k[:1], v[:1]),
    "another number of heads": lambda k, v: (k[:, :1], v[:, :1]),
    "another head_dim": lambda k, v: (k[..., :8], v),
    "another value_dim": lambda k, v: (k, v[..., :8]),
    "values of another length": lambda k, v: (k, v[:, :, :2]),
    "values of another dtype": lambda k, v: (k, v.half()),
    "integers": lambda k, v: (k.long(), v.long()),
    "three dimensions": lambda k, v: (k[0], v[0]),
    "no tensor": lambda k, v: (None, v),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", FRESH)
def test_appends_that_do_not_fit_are_refused(kind, wrong):
    cache, (_, k, v) = started(kind), qkv(3)
    with pytest.raises((TypeError, ValueError), match=r"must (be|share|have) .* got"):
        cache.append(*WRONG[wrong](k, v))
    assert cache.seen == 30


@pytest.mark.parametrize("kind", FRESH)
def test_other_calls_with_wrong_numbers_are_refused(kind):
    cache = started(kind)
    for rows in ([2], [-1], []):
        with pytest.raises(ValueError, match="rows must name at least one of the 2 rows"):
            cache.reorder(torch.tensor(rows, dtype=torch.int64))
    for length in (-1, 2.5, None):
        with pytest.raises(ValueError, match="truncated to a position of 0 or more, got"):
            cache.truncate(length)
    for start, stop in ((5, 5), (9, 31), (9, 5)):
        with pytest.raises(ValueError, match="context_shift needs 0 <= start < stop <= 30"):
            cache.context_shift(start, stop, lambda k, d: k)
    assert cache.seen == 30


@pytest.mark.parametrize("kind", FRESH)
def test_another_batch_after_a_reset(kind):
    if kind == "offloaded":
        pytest.skip("keeps its buffers")
    cache, (q, k, v) = started(kind), qkv(30, batch=3, dim=32)
    cache.reset()
    if "paged" in kind:
        with pytest.raises(ValueError, match="must have the 2 heads and the head_dim 16 of this"):
            cache.append(k, v)
        q, k, v = qkv(30, batch=3)
    _, mask = EXACT.get(kind, (None, Mask()))
    ours = attend(make_call(q, cache.append(k, v), mask=mask)).out
    fresh = attend(make_call(q, KINDS[kind]().append(k, v), mask=mask)).out
    assert torch.equal(ours, fresh)


class Interrupted(KeyboardInterrupt):
    pass


def interrupt_at(line, call):
    """Run `call`; raise at the n-th line executed in the caches. Whether that many were run."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if "saccade/cache/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise Interrupted
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("size", [1, 3, 25])
@pytest.mark.parametrize("kind", FRESH)
def test_an_interrupted_append_leaves_the_old_length_and_the_old_keys(kind, size):
    """At every seventh line; afterwards the append is made again as if nothing had been."""
    _, mask = EXACT.get(kind, (None, Mask()))
    q, k, v = (x[:, :, :size] for x in qkv(60))
    for line in range(1, 400, 7):
        torch.manual_seed(1)
        plain, cache = started(kind), None
        torch.manual_seed(1)
        cache = started(kind)
        if not interrupt_at(line, lambda cache=cache: cache.append(k, v)):
            break
        assert cache.seen in (30, 30 + size)
        if cache.seen != 30:  # behind the last write
            continue
        expected = attend(make_call(q, plain.append(k, v), mask=mask)).out
        ours = attend(make_call(q, cache.append(k, v), mask=mask)).out
        assert (ours - expected).abs().max() < 1e-5, line
