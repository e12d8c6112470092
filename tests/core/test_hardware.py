"""Memory facts are plausible byte counts of this machine and this process."""

import torch

from saccade.core.hardware import available_memory, resident_memory


def test_memory_is_in_bytes():
    assert resident_memory() > 10 << 20  # Python and PyTorch alone take more
    assert available_memory() > resident_memory() // 100


def test_resident_memory_follows_allocations():
    before = resident_memory()
    held = torch.ones(16 << 20)  # 64 MiB, written to
    assert resident_memory() - before > 48 << 20
    del held
