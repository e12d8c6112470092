"""One text of `saccade generate`: the prompt is read, tokens come, a signal may end it anywhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saccade.cli.notes import Notes
from saccade.cli.outcome import as_record, stats_line, where, why
from saccade.cli.reading import OnProgress, while_reading
from saccade.cli.sessions import Session
from saccade.cli.stopping import DeferredStop
from saccade.cli.streaming import TextStream

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Context, GeneratedToken, Sampler


@dataclass(kw_only=True)
class Writing:
    """A text on an open context, shown as it comes.

    Attributes:
        tokens: of the prompt, those that are still to be read.
        before: how many of the prompt a session holds already.
        as_json: collect the text for one line of JSON instead of showing it.
    """

    ctx: Context
    loaded: LoadedModel
    sampler: Sampler
    tokens: list[int]
    n_predict: int
    stop: set[int]
    session: Session | None
    notes: Notes
    before: int = 0
    as_json: bool = False
    written: int = field(default=0, init=False)
    _parts: list[str] = field(default_factory=list[str], init=False)

    def run(self) -> int:
        """Write; with a session a signal ends the text where it can be saved.

        Raises:
            KeyboardInterrupt: a signal came; what could be kept was.
        """
        deferred = DeferredStop()
        with deferred if self.session is not None else contextlib.nullcontext():
            stopped = self._written(deferred)
            if not getattr(stopped, "at_once", False):
                self._save()
        self._tell(stopped)
        if stopped is not None:
            raise stopped
        deferred.check()
        return 0

    def _written(self, deferred: DeferredStop) -> KeyboardInterrupt | None:
        """Show the text -> the signal that cut it off, None where it came to its end."""
        try:
            self._show(deferred.until_stopped(self._stream(deferred)))
        except KeyboardInterrupt as stop:
            return stop
        except Exception:  # nobody reads the output any more, say
            if self.session is not None and self.written:
                with contextlib.suppress(Exception):  # what stopped the text is what to say
                    self.session.save(self.ctx, self.sampler)
            raise
        return None

    def _stream(self, deferred: DeferredStop) -> Iterator[int]:
        """The tokens, counted."""

        def start(on_progress: OnProgress) -> Iterator[GeneratedToken]:
            on_progress(0, len(self.tokens))
            return self.ctx.stream(
                self.tokens, n_predict=self.n_predict, sampler=self.sampler, stop=self.stop,
                on_progress=on_progress,
            )  # fmt: skip

        found = while_reading(
            start, shown=not self.notes.quiet, least=self.ctx.params.n_batch,
            on_chunk=deferred.on_chunk,
        )  # fmt: skip
        for each in found:
            self.written += 1
            yield each.token

    def _show(self, tokens: Iterator[int]) -> None:
        stream = TextStream(self.loaded.tokenizer)
        try:
            for token in tokens:
                self._out(stream.push(token))
        finally:
            if self.written:
                self._out(stream.flush() + ("" if self.as_json else "\n"))

    def _out(self, text: str) -> None:
        if self.as_json:
            self._parts.append(text)
        else:
            print(text, end="", flush=True)

    def _save(self) -> None:
        if self.session is None:
            return
        self.session.save(self.ctx, self.sampler)
        if not self.written and self.ctx.finish_reason is None:  # the prompt was cut off
            read, path = self.before + self.ctx.stats.prompt_tokens, self.session.path
            self.notes.note(
                f"{read:,} of the {self.before + len(self.tokens):,} tokens of the prompt are in "
                f"{path}. Give the same prompt with --session {path} to read the rest, or none to "
                "write on from there."
            )

    def _tell(self, stopped: KeyboardInterrupt | None) -> None:
        """What it took and why it ended."""
        stats, reason = self.ctx.stats, self.ctx.finish_reason
        if getattr(stopped, "at_once", False) and self.session is not None:
            state = "is as it was" if self.session.exists else "was not written"
            self.notes.note(f"stopped at once: {self.session.path} {state}.")
        if stats.prompt_tokens or self.written:
            self.notes.say(stats_line(stats, where(self.ctx), self.written))
        if self.session is None and not self.written and reason is None and self.tokens:
            self.notes.note(
                f"{stats.prompt_tokens:,} of {len(self.tokens):,} tokens of the prompt were read, "
                "and none is kept: --session FILE would keep them."
            )
        said = why(reason, self.ctx, written=self.written, n_predict=self.n_predict)
        if said is not None:
            self.notes.say(said)
        if self.as_json:
            print(json.dumps(self._record(), ensure_ascii=False), flush=True)

    def _record(self) -> dict[str, Any]:
        text = "".join(self._parts)
        session = None if self.session is None else str(self.session.path)
        record = as_record(
            self.ctx, self.sampler, name=self.loaded.name, text=text, tokens=self.written,
            notes=self.notes.said,
        )  # fmt: skip
        return {**record, "session": session}
