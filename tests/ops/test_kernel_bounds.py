"""The checker of addresses that watches every interpreted kernel (`support.bounds`)."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.ops.test_triton import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def copy_kernel(x, out, length, count, BLOCK: tl.constexpr):
    """Copies the first `count` of BLOCK elements, of which `length` are stored."""
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < length)


@triton.jit
def add_kernel(x, count, BLOCK: tl.constexpr):
    """Adds 1 to the first `count` elements, atomically."""
    at = tl.arange(0, BLOCK)
    tl.atomic_add(x + at, 1.0, mask=at < count)


def test_what_a_mask_leaves_out_may_lie_anywhere():
    x, out = torch.randn(40), torch.zeros(40)
    copy_kernel[(1,)](x, out, 40, 40, BLOCK=64)
    assert torch.equal(x, out)
    add_kernel[(1,)](x, 40, BLOCK=64)
    assert torch.equal(x, out + 1)


@pytest.mark.parametrize(
    ("launch", "access"),
    [
        (lambda x, out: copy_kernel[(1,)](x, out, 40, 41, BLOCK=64), "masked_load of 1 addresses"),
        (lambda x, out: copy_kernel[(1,)](x, out, 43, 40, BLOCK=64), "masked_store of 3 addresses"),
        (lambda x, out: add_kernel[(1,)](x, 41, BLOCK=64), "atomic_rmw of 1 addresses"),
    ],
)
def test_an_address_past_the_end_is_an_error(launch, access):
    x, out = (torch.zeros(80)[:40].clone() for _ in range(2))
    with pytest.raises(Exception, match=f"kernel: {access}.*the first is 0 bytes past the end"):
        launch(x, out)


def test_a_view_may_reach_all_of_its_storage():
    whole = torch.randn(80)
    out = torch.zeros(80)
    copy_kernel[(1,)](whole[20:40], out[10:], 60, 60, BLOCK=64)
    assert torch.equal(out[10:70], whole[20:])
