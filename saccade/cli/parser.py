"""Argument parsing that answers with one sentence and the nearest word that exists."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """A command line that cannot be understood; the text is the sentence to show."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and never guesses at abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )
        self.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; unknown options are looked for first, so that a typo is what gets reported."""
        chosen = self._subcommand(argv)
        if chosen is not None:
            name, parser = chosen
            args = parser.parse(argv[1:])
            setattr(args, self._commands().dest, name)
            return args
        for word in argv:
            if word == "--":
                break
            if self._is_unknown_option(word):
                raise UsageError(f"{self.prog} has no option {word}.{self._hint(word)}")
        args, rest = self.parse_known_args(list(argv))
        if rest:
            raise UsageError(f"{self.prog} takes no argument {rest[0]!r}.{self._hint('')}")
        return args

    def add_command(self, name: str, **options: Any) -> Parser:
        """The parser of a subcommand, named by the first word: `saccade bench cpu`."""
        commands = self._commands()
        if commands is None:
            commands = self.add_subparsers(dest="command", metavar="WHAT", required=True)
        return commands.add_parser(name, **options)

    def _commands(self) -> Any:
        kind = argparse._SubParsersAction
        return next((action for action in self._actions if isinstance(action, kind)), None)

    def _subcommand(self, argv: Sequence[str]) -> tuple[str, Parser] | None:
        """Name and parser of the subcommand that the first word names.

        Raises:
            UsageError: the parser has subcommands and the first word is none of them.
        """
        commands = self._commands()
        word = argv[0] if argv else ""
        if commands is None or word in ("-h", "--help", "--traceback"):
            return None
        if word not in commands.choices:
            hint = nearest(word, commands.choices) or f" There are {', '.join(commands.choices)}."
            said = f"has no command {word!r}" if word else "needs to know what"
            raise UsageError(f"{self.prog} {said}.{hint}")
        return word, commands.choices[word]

    def error(self, message: str) -> NoReturn:
        """What argparse found, as a sentence."""
        sentence = message.removeprefix("argument ")
        end = "" if sentence.endswith((".", ")")) else "."
        raise UsageError(f"{self.prog}: {sentence}{end}{self._hint('')}")

    def _is_unknown_option(self, word: str) -> bool:
        if not word.startswith("-") or word == "-" or " " in word or _is_number(word):
            return False
        known = self._option_string_actions
        name = word.split("=", 1)[0]
        return name not in known and (word.startswith("--") or word[:2] not in known)

    def _hint(self, word: str) -> str:
        shown = [
            option
            for action in self._actions
            for option in action.option_strings
            if action.help != argparse.SUPPRESS
        ]
        return nearest(word.split("=", 1)[0], shown) or f" Run {self.prog} --help for the options."


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing where no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return value

    return parse


def number(text: str) -> float:
    """The type of an option that takes a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value - value != 0:  # neither NaN nor infinite
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
