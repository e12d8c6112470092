"""Which GPU kernels a call launches, by name: launches are recorded where Triton makes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

NVIDIA = "saccade.ops.attention.nvidia."


class Launch(NamedTuple):
    """One launch: the kernel's name and the module that defines it."""

    kernel: str
    module: str

    @property
    def place(self) -> str:
        """Where an attention kernel lives: "triton.FILE" or "gluon.FOLDER"; "" for the others.

        The kernel that combines the partials of split keys serves all backends: "combine".
        """
        if not self.module.startswith(NVIDIA):
            return ""
        if "combine" in self.kernel or "merge" in self.kernel:
            return "combine"
        parts = self.module.removeprefix(NVIDIA).split(".")
        return ".".join(parts[:2]) if len(parts) > 1 else ""


def record(monkeypatch: pytest.MonkeyPatch, *, run: bool = False) -> list[Launch]:
    """A list that every launch of a Triton or Gluon kernel is added to from now on.

    Args:
        run: launch the kernels too; without it their outputs keep whatever their memory holds.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.run

    def recorder(kernel: Any, *args: Any, **options: Any) -> Any:
        launches.append(Launch(kernel.fn.__name__, kernel.fn.__module__))
        return original(kernel, *args, **options) if run else None

    monkeypatch.setattr(JITFunction, "run", recorder)
    return launches
