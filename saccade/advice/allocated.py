"""Bytes that PyTorch's allocator has given out at once, above what it had at the start."""

from __future__ import annotations

from typing import Any

import torch


class Allocated:
    """`with Allocated(device) as found:`; then `found.peak` are the bytes.

    A GPU's allocator counts by itself; on a CPU the profiler notes every allocation.  What is freed
    inside and was there before counts as less, so the peak is that of everything alive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profile: Any = None
        self._before = 0
        self.peak = 0

    def __enter__(self) -> Allocated:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        memory = [each for each in events if each.name() == "[memory]"]
        now = 0
        for event in sorted(memory, key=lambda each: each.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, now)
