"""`--session FILE`: continue from it, save to it, and stop between two tokens on Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

from saccade.cli.failure import UsageError, need
from saccade.cli.outputs import check_outputs

if TYPE_CHECKING:
    from saccade.runtime import Context, Sampler


class Session:
    """The file of `--session`; one that could not be saved later is refused right away.

    Attributes:
        path: where it is or will be.
        exists: whether there is one to go on from.
    """

    def __init__(self, name: str) -> None:
        check_outputs({"--session": name})
        need("safetensors", purpose="--session")
        self.path = Path(name).expanduser()
        self.exists = self.path.exists()

    def check(self, ctx: Context) -> None:
        """Save the empty context beside the file, so that what cannot be saved is said now.

        Raises:
            UsageError: these options or this model cannot be saved, or the disk cannot be written.
        """
        from saccade.core import BadInput, Unsupported
        from saccade.runtime import save_session

        try:
            with TemporaryDirectory(dir=self.path.parent, prefix=".saccade-") as folder:
                save_session(Path(folder) / self.path.name, ctx)
        except (BadInput, Unsupported, ValueError, TypeError) as error:
            raise UsageError(f"--session cannot be saved later: {error}") from error

    def load(self, ctx: Context) -> Sampler:
        """Put it into a context; the sampler it was saved with."""
        from saccade.runtime import load_session

        sampler = load_session(self.path, ctx)
        print(f"Going on from {self.path}: {ctx.seen:,} tokens.", file=sys.stderr)
        return sampler

    def save(self, ctx: Context, sampler: Sampler) -> None:
        """Replace it by what the context holds now."""
        from saccade.runtime import save_session

        save_session(self.path, ctx, sampler)
        print(f"Saved {self.path}: {ctx.seen:,} tokens.", file=sys.stderr)


class DeferredInterrupt:
    """`with` it, Ctrl-C waits for the next token once tokens come; a second one does not wait.

    A step that is cut off leaves some layers a token ahead of others, which cannot be saved.
    While the prompt is still being read Ctrl-C works at once, and the old session stays.

    Attributes:
        stopped: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._waits = False
        self._before: Any = None

    def __enter__(self) -> DeferredInterrupt:
        self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def until_stopped(self, tokens: Iterable[int]) -> Iterator[int]:
        """The tokens, until Ctrl-C."""
        for token in tokens:
            self._waits = True
            yield token
            if self.stopped:
                return

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.stopped or not self._waits:
            raise KeyboardInterrupt
        self.stopped = True
