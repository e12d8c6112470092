"""Side streams without a GPU: the earliest and the latest order of copies that events allow.

Copies between host and buffers run beside the computation.  What orders the two are `follow` and
`wait` alone, so a schedule is right if results are right at both ends of what these leave open.
"""

import torch


class LateSide:
    """Copies run when something waits for them, the computation at once."""

    def __init__(self, device=None):
        self.queue = []
        self.copied = 0  # numbers

    def follow(self):
        pass

    def copy(self, pairs):
        for to, source in pairs:
            assert to.is_contiguous() and source.is_contiguous() and to.dtype == source.dtype
            self.queue.append((to, source))

    def mark(self):
        return len(self.queue)

    def wait(self, mark):
        with torch.inference_mode():
            for at, pair in enumerate(self.queue[:mark]):
                if pair is not None:
                    to, source = pair
                    to.copy_(source)
                    self.copied += to.numel()
                    self.queue[at] = None

    def keep(self, buffer):
        pass

    def synchronize(self):
        self.wait(len(self.queue))


class EarlySide(LateSide):
    """Copies run at once, the computation (`later`) when a copy has to come behind it."""

    def __init__(self, device=None):
        super().__init__()
        self.pending = []

    def later(self, work):
        self.pending.append(work)

    def follow(self):
        for work in self.pending:
            work()
        self.pending.clear()

    def copy(self, pairs):
        super().copy(pairs)
        self.wait(len(self.queue))
