"""README and the pages under docs/: their code, commands, links and prose."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
RENDERED = re.compile(r"<!-- (?:table|show): .*?<!-- end of (?:table|show) -->", re.DOTALL)
FACT = re.compile(r"<!-- fact: \w+ -->.*?<!-- end of fact -->", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\| )saccade ([^|#>]*)")
SPAN = re.compile(r"`([^`\n]+)`")


def blocks(text, *languages):
    """Fenced code of these languages; "" has none."""
    return [code for name, code in FENCE.findall(text) if name in languages]


def commands(text):
    """Command lines of saccade: those in blocks, and those in sentences that name an option."""
    lines = [line for block in blocks(text, "", "sh") for line in block.splitlines()]
    prose = FENCE.sub("", RENDERED.sub("", text))
    lines += [span for span in SPAN.findall(prose) if " -" in span]
    found = [words for line in lines for words in COMMAND.findall(line)]
    return [shlex.split(words) for words in found]


def links(text):
    """Relative links and pictures, as (path, anchor)."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", text))
    return [(path, anchor) for path, anchor in found if path or anchor]


def anchors(text):
    """The anchors that GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def prose(text):
    """What a person typed: neither code nor what was rendered from a record."""
    return SPAN.sub("", FENCE.sub("", FACT.sub("", RENDERED.sub("", text))))
