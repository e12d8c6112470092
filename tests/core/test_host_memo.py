"""HostMemo reads a tensor once, and again after it was written to."""

import gc

import pytest
import torch

from saccade.core.host_memo import HostMemo


@pytest.fixture
def counted():
    """A HostMemo of sums, and the list of what it has read."""
    seen = []

    def read(tensor):
        seen.append(tensor.tolist())
        return tensor.sum()

    return HostMemo(read), seen


def test_the_same_tensor_is_read_memo(counted):
    memo, seen = counted
    x = torch.tensor([1, 2])
    assert memo(x) is memo(x) and memo.is_current(x)
    assert not memo.is_current(x.clone()) and memo(x.clone()) == 3
    assert len(seen) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_written_tensor_is_read_again(counted, mode):
    memo, _ = counted
    x = torch.tensor([1, 2])
    memo(x)
    with mode():
        x[0] = 5
        assert not memo.is_current(x)
        assert memo(x) == 7
    y = x[:1]
    y.zero_()
    assert memo(x) == 2


def test_inference_tensors_have_no_version_and_are_read_every_time(counted):
    memo, seen = counted
    with torch.inference_mode():
        x = torch.tensor([1, 2])
        memo(x), memo(x)
    assert len(seen) == 2 and not memo.is_current(x)


def test_values_remembered_in_inference_mode_work_with_autograd(counted):
    memo, _ = counted
    x = torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        memo(x)
    (memo(x) * torch.ones((), requires_grad=True)).backward()


def test_the_entry_is_freed_with_the_tensor(counted):
    memo, _ = counted
    x = torch.tensor([1, 2])
    memo(x)
    del x
    gc.collect()
    assert len(memo._memo) == 0
