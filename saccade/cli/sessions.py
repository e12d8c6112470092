"""`--session FILE`: continue from it and save to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from saccade.cli.failure import UsageError, need
from saccade.cli.notes import Notes
from saccade.cli.outputs import check_outputs

if TYPE_CHECKING:
    from saccade.runtime import Context, Sampler


class Session:
    """The file of `--session`; one that could not be saved later is refused right away.

    Attributes:
        path: where it is or will be.
        exists: whether there is one to go on from.
    """

    def __init__(self, name: str, notes: Notes | None = None) -> None:
        check_outputs({"--session": name})
        need("safetensors", purpose="--session")
        self.path = Path(name).expanduser()
        self.exists = self.path.exists()
        self._notes = notes or Notes()

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

    def peek(self) -> Saved:
        """What it holds, before a context is opened for it.

        Raises:
            BadInput: no session, or a damaged one.
        """
        from saccade.runtime.session_file import SessionFile

        file = SessionFile(self.path)
        parts = [file.record.get(name) for name in ("params", "extra")]
        params, extra = (part if isinstance(part, dict) else {} for part in parts)
        tokens = file.tensor("tokens").tolist() if "tokens" in file.names else []
        return Saved(tokens, file.record.get("next") is None, params, extra)

    def load(self, ctx: Context) -> Sampler:
        """Put it into a context; the sampler it was saved with."""
        from saccade.runtime import load_session

        sampler = load_session(self.path, ctx)
        self._notes.say(f"Going on from {self.path}: {ctx.seen:,} tokens.")
        return sampler

    def save(self, ctx: Context, sampler: Sampler, extra: Mapping[str, Any] | None = None) -> None:
        """Replace it by what the context holds now, and say so."""
        self.keep(ctx, sampler, extra)
        self.say_saved(ctx)

    def keep(self, ctx: Context, sampler: Sampler, extra: Mapping[str, Any] | None = None) -> None:
        """Replace it, in one step, without a word."""
        from saccade.runtime import save_session

        save_session(self.path, ctx, sampler, extra=extra)
        self.exists = True

    def say_saved(self, ctx: Context) -> None:
        """Where it is, and how much it holds."""
        self._notes.say(f"Saved {self.path}: {ctx.seen:,} tokens.")


class Saved(NamedTuple):
    """What a session holds, without its caches.

    Attributes:
        tokens: in its caches.
        cut: whether a stop came while a prompt was being read, so that no token was chosen.
        params: options it was saved with, by field.
        extra: what else was saved with it.
    """

    tokens: list[int]
    cut: bool
    params: dict[str, Any]
    extra: dict[str, Any]

    def unread(self, first: list[int], following: list[int]) -> tuple[list[int], list[int]]:
        """(the tokens of a prompt, those not in the session that was cut off while reading it).

        Args:
            first, following: the prompt as the beginning of a text, and behind an answer.
        """
        held = len(self.tokens)
        if first[:held] == self.tokens:
            return first, first[held:]
        return following, following[self._begun(following) :]

    def _begun(self, prompt: list[int]) -> int:
        """How many tokens of the prompt the text ends with."""
        for count in range(min(len(prompt), len(self.tokens)), 0, -1):
            if self.tokens[-count:] == prompt[:count]:
                return count
        return 0
