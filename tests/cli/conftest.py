"""Stand-ins for what takes long: a model that is never loaded and a comparison that never runs."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from saccade.cli import loading
from tests.report import sample


@pytest.fixture(autouse=True)
def _names_of_stand_ins(monkeypatch):
    """Commands look for a model first; "m" and "x" are models that no test loads."""
    monkeypatch.setattr(loading, "NAMES", (*loading.NAMES, "m", "x"))


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in("saccade.hf.load", load_model=...)` puts a module in place of a real one."""

    def put(name, **members):
        _module(monkeypatch, name, **members)

    return put


@pytest.fixture
def fake(monkeypatch):
    """`fake.report` is what compare.run returns; `fake.error` is raised instead where set."""
    state = SimpleNamespace(report=sample.report(), error=None, calls=[])
    state.report.complete = True

    def run(model, text, *, on_progress, **options):
        state.calls.append(SimpleNamespace(text=text, **options))
        for done in range(3):
            on_progress(SimpleNamespace(done=done, total=2, label=f"step {done}", report=None))
        if state.error is not None:
            raise state.error
        return state.report

    loaded = SimpleNamespace(model=None, tokenizer=object(), name="fake", n_ctx_train=8, notes=[])
    _module(monkeypatch, "saccade.evals.compare", run=run)
    _module(monkeypatch, "saccade.hf.load", load_model=lambda *_, **__: loaded)
    return state


def _module(monkeypatch, name, **members):
    """Put a module in place of a real one, also as the attribute of its package."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    package, _, last = name.rpartition(".")
    if package == "saccade.hf":  # importing the real package would import transformers
        parent = sys.modules.get(package) or ModuleType(package)
        if parent.__spec__ is None:  # ours; the real one still has to find its other modules
            parent.__path__ = []
        monkeypatch.setitem(sys.modules, package, parent)
    else:
        parent = __import__(package, fromlist=["_"])
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(parent, last, module, raising=False)
