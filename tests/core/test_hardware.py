"""Memory facts are plausible byte counts of this machine and this process."""

from mmap import mmap

from saccade.core.hardware import available_memory, resident_memory


def test_memory_is_in_bytes():
    assert resident_memory() > 10 << 20  # Python and PyTorch alone take more
    assert available_memory() > resident_memory() // 100


def test_resident_memory_follows_allocations():
    before = resident_memory()
    with mmap(-1, 64 << 20) as pages:  # new pages for sure, which a freed heap may not give
        pages.write(b"1" * (64 << 20))
        assert resident_memory() - before > 48 << 20
