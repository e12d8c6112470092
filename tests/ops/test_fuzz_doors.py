"""Every door that takes tensors: the float64 reference's result, or one sentence; never a crash.

`SACCADE_FUZZ=5000 pytest tests/ops/test_fuzz_doors.py` draws that many new examples a test.
"""

import pytest
import torch
from hypothesis import given

from saccade.core import PerHeadFP8, Unsupported
from saccade.ops import attend, make_call
from tests.support.cases import HERE
from tests.support.doors import doors
from tests.support.fuzzing import assert_sentence, fuzz
from tests.support.view_doors import view_doors

BACKENDS = ("auto", *HERE)
ERROR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


def solved(door, backend, **changes):
    """(output, lse, gradients of q, k and v) of a door, or the error that it raised."""
    if not door.grad or door.wrong:
        return tuple(door.run(backend, **changes))
    leaves = [(changes.get(n, door.given[n])).detach().requires_grad_() for n in "qkv"]
    result = door.run(backend, **dict(zip("qkv", leaves, strict=True)))
    # A result of no queries or no keys does not depend on all of them.
    loss = result.out.double().sin().sum() + sum(x[..., :0].sum() for x in leaves)
    return *result, *torch.autograd.grad(loss, leaves)


def truth(door):
    wide = {name: door.given[name].double().contiguous() for name in "qkv"}
    if door.poisoned is not None:
        for name in "kv":
            wide[name] = wide[name].masked_fill(door.poisoned[:, None, :, None], 0)
    return solved(door, "reference", **wide)


def assert_equal(ours, exact, allowed):
    """The same -inf, no NaN, and numbers that differ by rounding, relative to 1 and more."""
    for found, true in zip(ours, exact, strict=True):
        assert found.shape == true.shape
        assert torch.equal(found.isneginf(), true.isneginf())
        assert not found.isnan().any()
        x, y = (part.detach().double().nan_to_num(neginf=0) for part in (found, true))
        error = float(((x - y).abs() / (1 + y.abs())).max()) if x.numel() else 0.0
        assert error <= allowed, f"off by {error:.3g}"


@fuzz(80)
@given(doors())
def test_right_or_one_sentence(door):
    if door.wrong:
        for backend in BACKENDS:
            with pytest.raises((TypeError, ValueError)) as caught:
                door.run(backend)
            assert_sentence(caught.value)
        return
    exact = truth(door)
    allowed = max(ERROR[door.given[name].dtype] for name in "qkv")
    for backend in BACKENDS:
        try:
            ours = solved(door, backend)
        except Unsupported as error:
            assert backend not in ("auto", "tiled", "reference"), str(error)
            assert_sentence(error)
            continue
        assert_equal(ours, exact, allowed)


@fuzz(80)
@given(view_doors())
def test_views_are_right_or_one_sentence(door):
    if door.wrong is not None:
        with pytest.raises((TypeError, ValueError)) as caught:
            attend(make_call(door.q, door.wrong(), **door.options))
        assert_sentence(caught.value)
        return
    wide = door.q if isinstance(door.q, PerHeadFP8) else door.q.double()
    exact = attend(make_call(wide, door.plain, **door.options), backend="reference")
    dtype = torch.bfloat16 if isinstance(door.q, PerHeadFP8) else door.q.dtype
    for backend in BACKENDS:
        try:
            ours = attend(make_call(door.q, door.strange, **door.options), backend=backend)
        except Unsupported as error:
            assert backend not in ("auto", "tiled", "reference"), str(error)
            assert_sentence(error)
            continue
        assert_equal(ours, exact, ERROR[dtype])
