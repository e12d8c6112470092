"""The reference of all public names as pages, from their docstrings; any fault in them is an error.

python -m scripts.api_reference out/api

A fault is a public name without a docstring, an argument that is described and does not exist, or
anything that pdoc warns about.  Public are the names in `__all__` of the packages below, with their
public methods.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pdoc
from pdoc.doc import Class, Doc, Function, Module, Variable

PUBLIC = (
    "saccade",
    "saccade.hf",
    "saccade.cache",
    "saccade.sparse",
    "saccade.flash_attn_interface",
    "saccade.flash_attn_interface.bert_padding",
    "saccade.compress",
    "saccade.core",
    "saccade.ops",
    "saccade.rope",
    "saccade.runtime",
    "saccade.runtime.importance",
)
# pdoc walks into packages: this leaves their modules out.
INNER = (
    r"!saccade\.(?!runtime\.importance$|flash_attn_interface\.bert_padding$)"
    r"(\w+\.|cli|bench|evals|report|units|version|__)"
)
ARGS = re.compile(r"^Args:\n((?:[ ]{4,}.*\n?|\n)+)", re.MULTILINE)
NAMES = re.compile(r"^    ([\w*]+(?:, [\w*]+)*):", re.MULTILINE)


def main() -> int:
    """Build the pages; 1 if there are faults, which are printed."""
    prepare()
    found = faults()
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.render.configure(docformat="google", search=False)
        pdoc.pdoc(*PUBLIC, INNER, output_directory=Path(sys.argv[1]))
    print(f"{sys.argv[1]}/index.html")
    return 0


def prepare() -> None:
    """Let every public name be there, and resolve types of named tuples, which pdoc cannot."""
    for name in PUBLIC:
        module: Any = import_module(name)
        for each in getattr(module, "__all__", ()):
            value = getattr(module, each)
            setattr(module, each, value)
            if isinstance(value, type) and issubclass(value, tuple):
                value.__new__.__annotations__ = typing.get_type_hints(value)


def faults() -> list[str]:
    """What is wrong with the docstrings of public names, a line each."""
    return [fault for name in PUBLIC for fault in _faults_in(Module(import_module(name)))]


def _faults_in(module: Module) -> Iterator[str]:
    names = getattr(module.obj, "__all__", None) or list(module.members)
    for name in names:
        if not name.startswith("_"):
            member: Any = module.members[name]
            yield from faults_of(member)
            if isinstance(member, Class):
                for each in _own(member):
                    yield from faults_of(each)


def _own(member: Class) -> list[Doc[Any]]:
    """Public methods and properties that the class itself defines."""
    defined = vars(member.obj)
    found = [m for m in member.own_members if m.name in defined and not m.name.startswith("_")]
    return [m for m in found if isinstance(m, Function) or isinstance(defined[m.name], property)]


def faults_of(member: Doc[Any]) -> Iterator[str]:
    """No docstring, or arguments described that are not there."""
    if not member.docstring and not _is_from_elsewhere(member):
        yield f"{member.fullname} has no docstring"
    if not isinstance(member, Class | Function):
        return
    try:
        known = {*inspect.signature(member.obj).parameters}
    except (TypeError, ValueError):  # built-in classes have none
        return
    described = ARGS.search(inspect.cleandoc(member.docstring))
    for names in NAMES.findall(described[1] if described else ""):
        for name in names.replace("*", "").split(", "):
            if name not in known:
                yield f"{member.fullname} describes {name!r}, which is no argument"


def _is_from_elsewhere(member: Doc[Any]) -> bool:
    """A constant or alias that the package takes from a module: its docstring stays there."""
    source = inspect.getsource(import_module(member.modulename))
    return isinstance(member, Variable) and not re.search(rf"^{member.name}\b", source, re.M)


if __name__ == "__main__":
    sys.exit(main())
