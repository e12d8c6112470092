"""Tensors are read once, and again when somebody wrote to them."""

import gc

import pytest
import torch

from saccade.core.host_memo import HostMemo


@pytest.fixture
def counted():
    """A ReadOnce over sums, and the list of what it has read."""
    seen = []

    def read(tensor):
        seen.append(tensor.tolist())
        return tensor.sum()

    return HostMemo(read), seen


def test_the_same_tensor_is_read_once(counted):
    once, seen = counted
    x = torch.tensor([1, 2])
    assert once(x) is once(x) and once.knows(x)
    assert not once.knows(x.clone()) and once(x.clone()) == 3
    assert len(seen) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_written_is_read_again(counted, mode):
    once, _ = counted
    x = torch.tensor([1, 2])
    once(x)
    with mode():
        x[0] = 5
        assert not once.knows(x)
        assert once(x) == 7
    y = x[:1]
    y.zero_()
    assert once(x) == 2


def test_tensors_of_inference_mode_count_no_writes_and_are_read_every_time(counted):
    once, seen = counted
    with torch.inference_mode():
        x = torch.tensor([1, 2])
        once(x), once(x)
    assert len(seen) == 2 and not once.knows(x)


def test_what_is_remembered_under_inference_mode_may_be_used_in_training(counted):
    once, _ = counted
    x = torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        once(x)
    (once(x) * torch.ones((), requires_grad=True)).backward()


def test_memory_ends_with_the_tensor(counted):
    once, _ = counted
    x = torch.tensor([1, 2])
    once(x)
    del x
    gc.collect()
    assert len(once._known) == 0
