"""The package's source as data: its files, imports, functions and lines of code."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "saccade"


@dataclass(frozen=True)
class Import:
    """One file naming another: in a statement, anywhere in the file, or in a table of names."""

    here: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.here}:{self.line} imports {self.target}"


@cache
def modules(root: Path = ROOT / PACKAGE) -> dict[str, Path]:
    """Every file of a package by its dotted name; `__init__` stands for the package itself."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path = ROOT / PACKAGE) -> list[Import]:
    """All imports of files of a package by files of it: lazy, relative, for types, in tables."""
    files = modules(root)
    found = []
    for here, path in files.items():
        for target, line in _named(path, here, files):
            resolved = _resolve(target, files)
            if resolved is not None and resolved != here:
                found.append(Import(here, resolved, line))
    return found


def _named(path: Path, here: str, files: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports or writes in a string, with their lines."""
    package = here if path.stem == "__init__" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in files and "." in node.value:
                yield node.value, node.lineno


def _resolve(name: str, files: dict[str, Path]) -> str | None:
    """The file behind a dotted name: a module, or the module that holds the last part."""
    if name in files:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in files else None


def components(edges: list[Import]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan, 1972)."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        graph.setdefault(edge.here, set()).add(edge.target)
        graph.setdefault(edge.target, set())
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@dataclass(frozen=True)
class Function:
    """A function or method of the package."""

    where: str
    name: str
    length: int
    is_kernel: bool


def functions(root: Path = ROOT / PACKAGE) -> list[Function]:
    """All functions, their length without signature and docstring; kernels are jit-compiled."""
    found = []
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                where = f"{path.relative_to(root.parent)}:{node.lineno}"
                found.append(Function(where, node.name, length, jit))
    return found


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    text = path.read_text()
    documented: set[int] = set()
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, holders) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = (
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
        tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    )  # fmt: skip
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def public_definitions(root: Path = ROOT / PACKAGE) -> Iterator[tuple[str, ast.AST]]:
    """(where, definition) of every class and function that a package's `__all__` offers."""
    files = modules(root)
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        offered = _offered(tree)
        if path.stem != "__init__" or not offered:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in files:
                continue
            for alias in node.names:
                if alias.name in offered:
                    yield from _definition(files[node.module], alias.name, f"{name}.{alias.name}")


def _offered(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)}
    return set()


def _definition(path: Path, name: str, where: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            yield where, node
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and _is_public(method):
                        yield f"{where}.{method.name}", method


def _is_public(method: ast.FunctionDef) -> bool:
    """Whether a method needs a docstring; that of a property's getter serves its setter too."""
    setter = any(ast.unparse(d).endswith(".setter") for d in method.decorator_list)
    return method.name[0] != "_" and not setter
