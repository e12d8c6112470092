"""What a command says besides its result: on stderr unless --quiet, and kept for --json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BUILD_KERNELS = "Install a C++ compiler (g++) and run in the clone: pip install ."
"""What to do where the package was built without its C++ kernels."""


@dataclass
class Notes:
    """Sentences for the user.

    Attributes:
        quiet: nothing is shown.
        typed: values of the options of a context, in whose words notes are said.
        said: the notes so far, without what only concerns the moment.
    """

    quiet: bool = False
    typed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    said: list[str] = field(default_factory=list[str])

    def note(self, text: str) -> None:
        """Something to know about the result."""
        self.said.append(text)
        self.say(f"Note: {text}")

    def say(self, text: str) -> None:
        """Something that only concerns the moment."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
