"""How far a prompt is read, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from saccade.cli.reading import reading, while_reading


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(stream, states, step, **options):
    clock = Clock()
    with reading(stream=stream, now=clock, **options) as show:
        for state in states:
            show(*state)
            clock.now += step
    return stream.getvalue()


STATES = [(0, 4000), (1000, 4000), (2000, 4000), (3000, 4000), (4000, 4000)]


def test_a_bar_is_drawn_again_and_removed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = shown(Terminal(), STATES, 10)
    assert "[######......] 2,000 of 4,000 tokens, 100 tokens/s, 20 s left" in said
    assert said.count("\r\x1b[K") == 6 and said.endswith("\r\x1b[K") and "\n" not in said


def test_a_line_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = shown(Terminal(), STATES, 10).split("\r\x1b[K")
    assert max(map(len, lines)) == 29


def test_lines_in_a_file_are_few():
    said = shown(io.StringIO(), STATES, 10)
    assert said.splitlines() == [
        "Read 1,000 of 4,000 tokens, 100 tokens/s, 30 s left.",
        "Read 2,000 of 4,000 tokens, 100 tokens/s, 20 s left.",
        "Read 3,000 of 4,000 tokens, 100 tokens/s, 10 s left.",
    ]
    assert shown(io.StringIO(), STATES, 0.5) == ""
    many = [(n, 10**6) for n in range(0, 10**6, 1000)]
    assert len(shown(io.StringIO(), many, 1).splitlines()) < 60


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_short_prompt_shows_nothing(kind):
    assert shown(kind(), STATES, 10, least=4000) == ""


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in shown(Terminal(), STATES, 10)


def test_what_comes_behind_the_prompt_passes_through():
    chunks = []

    def start(on_progress):
        on_progress(0, 4)
        on_progress(4, 4)
        yield from "abc"

    found = while_reading(start, shown=False, least=0, on_chunk=lambda *state: chunks.append(state))
    assert "".join(found) == "abc" and chunks == [(4, 4)]
