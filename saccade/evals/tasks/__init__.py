"""Tasks with known answers, made from a seed without any download.

A new task is one file, or one line where a file has its kind, and is found through `TASKS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from saccade.core import BadInput
from saccade.evals.tasks.chains import Chain
from saccade.evals.tasks.documents import DOCUMENTS
from saccade.evals.tasks.fit import TooShort, samples_of
from saccade.evals.tasks.frequent import CommonWords, FrequentWords
from saccade.evals.tasks.haystack import essay_of
from saccade.evals.tasks.journal import JOURNALS
from saccade.evals.tasks.niah import MULTITURN, NIAH
from saccade.evals.tasks.sample import Room, Sample, Task, Turn, score, settled

RULER: tuple[Task, ...] = (*NIAH, Chain(), CommonWords(), FrequentWords())
"""Eleven of RULER's thirteen; its two question-answering tasks need downloads."""
TASKS: dict[str, Task] = {task.name: task for task in (*RULER, *JOURNALS, *DOCUMENTS, MULTITURN)}
"""Name of a task -> the task."""
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(task.name for task in RULER),
    "niah": tuple(task.name for task in NIAH),
    "aggregate": tuple(task.name for task in JOURNALS),
    "qa": tuple(task.name for task in DOCUMENTS),
    "all": tuple(TASKS),
}
"""Names for several tasks."""

__all__ = [
    "GROUPS",
    "TASKS",
    "Room",
    "Sample",
    "Task",
    "TooShort",
    "Turn",
    "chosen",
    "essay_of",
    "samples_of",
    "score",
    "settled",
]


def chosen(names: Sequence[str]) -> list[str]:
    """Names of tasks and groups as names of tasks, each once, in the order asked for.

    Raises:
        BadInput: a name that none has.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            known = ", ".join((*GROUPS, *TASKS))
            raise BadInput(f"no task is called {name!r}: expected one of {known}.")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)
