"""`saccade chat`: a dialogue of any length in constant memory."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from saccade.cli import shared_options
from saccade.cli.context_length import as_saved, note_greedy, note_without_effect, reaching
from saccade.cli.dialogue import Dialogue, check_dialogue, endless, opening
from saccade.cli.failure import UsageError, check_streams, need
from saccade.cli.loading import check_model, load, say_check
from saccade.cli.notes import Notes
from saccade.cli.outcome import as_record
from saccade.cli.outputs import file_option
from saccade.cli.reading import while_reading
from saccade.cli.refusals import check_before_loading
from saccade.cli.sessions import Session
from saccade.cli.stopping import DeferredStop, Stopped
from saccade.cli.streaming import TextStream
from saccade.cli.tokens import encode_messages, end_tokens, tokenizer_of
from saccade.cli.values import utf8_text
from saccade.units import as_bytes, significant

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel
    from saccade.runtime import Context, ContextParams

EXAMPLES = """examples:
  saccade chat --model smollm2
  saccade chat -m model.gguf --swa 4096 --sinks 4 --temperature 0.7
  saccade chat -m model.gguf -c 8192 -ctk int8 -ctv int8 --session talk.chat
  printf 'Hello!\\nAnd who are you?\\n' | saccade chat -m smollm2

Without options that bound the memory: a window of the last 2,048 tokens and 4
sinks. Ctrl-C ends an answer; SIGTERM ends the dialogue and saves the --session.
"""
HELP = "/reset forgets the dialogue, /memory shows what is in use, /exit ends (so does Ctrl-D)."


@shared_options.takes(sampling=shared_options.SAMPLING, context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    weights: shared_options.Weights = "file",
    system: Annotated[str | None, typer.Option(
        "--system", metavar="TEXT", parser=utf8_text,
        help="what the model reads before the dialogue",
    )] = None,
    session: Annotated[str | None, file_option(
        "--session", "go on with this dialogue where the file exists; saved after every answer"
    )] = None,
    n_predict: shared_options.NPredict = 256,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only the answers")] = False,
    as_json: Annotated[bool, typer.Option(
        "--json", help="a line of JSON for every answer: text, why it ended, speeds, memory",
    )] = False,
    *,
    sampling: shared_options.Values,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """A dialogue of any length in constant memory."""
    check_model(model)
    check_streams("stdin")
    notes = Notes(quiet=quiet, typed=context)
    saved = None if session is None else Session(session, notes)
    params = shared_options.context_params(context)
    later = saved is not None and saved.exists
    shared_options.sampler_of(sampling, later=later)  # refused before a model is loaded
    need("transformers", purpose="saccade chat")
    need("rich", purpose="saccade chat")

    longest = None if later else 0  # a dialogue has the trained length where none is given
    check_before_loading((model, device, dtype, weights), params, context, longest=longest)
    loaded = load(model, device, dtype, weights, notes=notes)
    params = shared_options.for_device(params, context, loaded.model.device.type)
    tokenizer = tokenizer_of(loaded)
    talked = _Talk(loaded, saved, notes, system, n_predict, as_json)
    with shared_options.in_words_of_options(context):
        encode_messages(
            tokenizer, [*opening(system), {"role": "user", "content": "hi"}]
        )  # a template that fails, before a word
        return _chat(talked, params, sampling)


class _Talk(NamedTuple):
    """A dialogue to hold, apart from options."""

    loaded: LoadedModel
    session: Session | None
    notes: Notes
    system: str | None
    n_predict: int
    as_json: bool


def _chat(asked: _Talk, params: ContextParams, sampling: dict[str, Any]) -> int:
    from saccade.hf.context import Context, as_model

    loaded, session, notes = asked.loaded, asked.session, asked.notes
    model = as_model(loaded)
    facts = model.facts
    saved = session.peek() if session is not None and session.exists else None
    if saved is None or saved.params.get("n_swa") is not None:  # else it is bounded otherwise
        params = endless(params, loaded.n_ctx_train)
    if session is not None and saved is not None:
        check_dialogue(saved.extra, session.path)
        length = saved.params.get("n_ctx") or facts.n_ctx_train
        params = as_saved(params, saved.params, length, notes)
    note_without_effect(facts, params, notes, loaded.model.device)
    params = reaching(params, facts, params.n_ctx or facts.n_ctx_train, notes)
    # A ring has its size; any other cache is allocated at once, so that it does not grow either.
    bounded = params.n_swa is not None or params.kv_policy is not None
    reserve = 0 if bounded else params.n_ctx or facts.n_ctx_train
    say_check(model, params, notes, reserve=reserve)
    with Context(loaded, params, reserve=reserve) as ctx:
        going_on = session.load(ctx) if session is not None and saved is not None else None
        if session is not None and saved is None:
            session.check(ctx)
        sampler = shared_options.sampler_of(sampling, going_on)
        note_greedy(sampling, sampler, notes)
        dialogue = Dialogue(
            ctx=ctx, tokenizer=loaded.tokenizer, sampler=sampler, stop=end_tokens(loaded),
            n_predict=asked.n_predict, system=asked.system,
        )  # fmt: skip
        if session is not None and saved is not None:
            dialogue.restore(saved.extra)
        kept(session, dialogue, Answers(dialogue, notes, asked))
    return 0


def kept(session: Session | None, dialogue: Dialogue, answers: Answers) -> None:
    """Talk, and keep the dialogue in the session however the talk ends.

    It is kept behind every answer too, so that a killed process loses none that was finished.
    """
    try:
        answers.talk(lines(quiet=answers.notes.quiet))
    except BaseException as error:
        if session is not None and not getattr(error, "at_once", False):
            answers.keep()
            session.say_saved(dialogue.ctx)
        raise
    if session is not None:
        answers.keep().check()
        session.say_saved(dialogue.ctx)


def lines(*, quiet: bool = False) -> Iterator[str]:
    """What the user says, line by line: asked for on a terminal, else read from stdin."""
    try:
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        if not quiet:
            print(HELP, file=sys.stderr)
        while True:
            yield input("> ")
    except EOFError:
        print(file=sys.stderr)
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (at byte {error.start}).") from None


class Answers:
    """Answers of a dialogue, shown as they come."""

    def __init__(self, dialogue: Dialogue, notes: Notes, asked: _Talk) -> None:
        self.dialogue, self.notes, self._asked = dialogue, notes, asked
        self._kept = False

    def keep(self) -> DeferredStop:
        """Put the dialogue into the session, unless it is there; a signal waits for that."""
        session, dialogue, deferred = self._asked.session, self.dialogue, DeferredStop("Saving")
        with deferred:
            if session is not None and not self._kept:
                session.keep(dialogue.ctx, dialogue.sampler, dialogue.state)
                self._kept = True
        return deferred

    def talk(self, said: Iterable[str]) -> None:
        """Answer every line, until there are no more or one is /exit."""
        for line in said:
            text = line.strip()
            if text == "/exit":
                return
            if text == "/reset":
                self._kept = False
                self.dialogue.reset()
                self.notes.say("Forgotten.")
            elif text == "/memory":
                print(memory_line(self.dialogue), file=sys.stderr)
            elif text.startswith("/"):
                print(f"There is no command {text.split()[0]}. {HELP}", file=sys.stderr)
            elif text:
                self.answer(text)

    def answer(self, text: str) -> None:
        """Show one answer as it comes; Ctrl-C ends the answer, another signal the dialogue too.

        Raises:
            Stopped: another signal than Ctrl-C, or a second one.
        """
        from saccade.core import BadInput
        from saccade.runtime import Stats

        parts: list[str] = []
        deferred, dialogue = DeferredStop("Ending the answer", "Ending the dialogue"), self.dialogue
        dialogue.ctx.stats, self._kept = Stats(), False
        try:
            with deferred:
                self._show(parts, self._texts(text, deferred))
        except Stopped as stop:
            self._cut(stop, parts)
        except BadInput as error:  # a message that is longer than the context
            dialogue.withdraw()
            print(shared_options.with_flags(str(error), self.notes.typed), file=sys.stderr)
            return
        else:
            dialogue.answered("".join(parts))
            self.keep().check()
        if deferred.asked not in (None, signal.SIGINT):
            deferred.check()

    def _cut(self, stop: Stopped, parts: list[str]) -> None:
        """A signal came while the message was being read, or a second one."""
        self.dialogue.spoiled()
        if parts:
            self.dialogue.answered("".join(parts))
            print("(interrupted)", file=sys.stderr)
        else:
            self.dialogue.withdraw()
            print("(interrupted: your message was not read to its end, say it again)",
                  file=sys.stderr)  # fmt: skip
        if stop.at_once and stop.number != signal.SIGINT:
            raise stop

    def _texts(self, text: str, deferred: DeferredStop) -> Iterator[str]:
        """Text of the answer as it becomes certain."""
        dialogue = self.dialogue
        tokens = while_reading(
            lambda on_progress: dialogue.ask(text, on_progress), shown=not self.notes.quiet,
            least=dialogue.ctx.params.n_batch, on_chunk=deferred.on_chunk,
        )  # fmt: skip
        return decoded(deferred.until_stopped(tokens), dialogue.tokenizer)

    def _show(self, parts: list[str], texts: Iterator[str]) -> None:
        """The answer on stdout, and what it took: live on a terminal, else behind it on stderr."""
        if self._asked.as_json:
            parts.extend(texts)
            print(json.dumps(self._record("".join(parts)), ensure_ascii=False), flush=True)
        elif sys.stdout.isatty() and not self.notes.quiet:
            show_live(parts, texts, self.dialogue)
            return
        else:
            for text in texts:
                parts.append(text)
                print(text, end="", flush=True)
            print(flush=True)
        self.notes.say(memory_line(self.dialogue))

    def _record(self, text: str) -> dict[str, Any]:
        dialogue = self.dialogue
        return as_record(
            dialogue.ctx, dialogue.sampler, name=self._asked.loaded.name, text=text,
            tokens=dialogue.written, notes=self.notes.said,
        )  # fmt: skip


def decoded(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Text of the tokens as it becomes certain."""
    stream = TextStream(tokenizer)
    for token in tokens:
        yield stream.push(token)
    yield stream.flush()


def show_live(parts: list[str], texts: Iterator[str], dialogue: Dialogue) -> None:
    """Text on a terminal, with the memory below it."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    parts.extend(itertools.islice(texts, 1))  # a bar is drawn until the message is read
    line = memory_line(dialogue)

    def frame() -> Group:
        """Called by a thread of its own, so it must not ask the running context for anything."""
        return Group(Text("".join(parts)), Text(line, style="dim"))

    with Live(
        get_renderable=frame, console=Console(), refresh_per_second=8, vertical_overflow="visible"
    ):
        for text in texts:
            parts.append(text)
            line = memory_line(dialogue)
        line = memory_line(dialogue)


def memory_line(dialogue: Dialogue) -> str:
    """What is in use now."""
    from saccade.core.hardware import resident_memory

    ctx = dialogue.ctx
    memory = f"cache {as_bytes(ctx.cache_bytes)}, process {as_bytes(resident_memory())}"
    again = f", read again {dialogue.rereads}x" if dialogue.rereads else ""
    return f"[{memory}; {ctx.seen:,} tokens{again}{speed(ctx)}]"


def speed(ctx: Context) -> str:
    """How fast the last answer came, where there was one."""
    first, tps = ctx.stats.ttft_seconds, ctx.stats.decode_tps
    cut = {"length": "; cut at --n-predict", "context": "; cut, the context is full"}
    after = "" if first is None else f"; first token after {significant(first)} s"
    rate = "" if tps is None else f"; {significant(tps)} tokens/s"
    accepted = ctx.stats.accepted_length
    rate += "" if accepted is None else f", {significant(accepted)} drafted accepted at once"
    return after + rate + cut.get(ctx.finish_reason or "", "")
