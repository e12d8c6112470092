"""The building: each folder may import only folders on lower floors.  Lazy imports count too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "saccade"
FLOORS = [
    ["core"],
    ["ops"],
    ["rope", "cache", "sparse"],
    ["compress", "parallel"],
    ["runtime"],
    ["hf", "report"],
    ["evals", "bench"],
    ["cli"],
]
FLOOR = {name: level for level, row in enumerate(FLOORS) for name in row}
KERNELS = {"sdpa", "triton", "gluon", "cpu"}
DRAWERS = {"utils", "util", "common", "misc", "helpers", "base_utils"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1:
            yield path, parts


def imports(path):
    """Modules of the package that a file names, in import statements or in import tables."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saccade":
            for alias in node.names:
                yield tuple(f"{node.module}.{alias.name}".split(".")[1:]), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("saccade."):
                    yield tuple(alias.name.split(".")[1:]), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("saccade.") and node.value.replace(".", "").isidentifier():
                parts = tuple(node.value.split(".")[1:])
                if parts[0] in FLOOR:
                    yield parts, node.lineno


def climbs(here, target):
    return here != target and FLOOR[target] >= FLOOR[here]


def test_imports_go_down():
    wrong = [
        f"{path}:{line} {parts[0]} imports {target[0]}"
        for path, parts in modules()
        for target, line in imports(path)
        if target[0] in FLOOR and climbs(parts[0], target[0])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_has_a_floor():
    folders = {parts[0] for _, parts in modules()}
    assert folders <= set(FLOOR), folders - set(FLOOR)


def test_kernels_never_import_the_reference():
    wrong = [
        f"{path}:{line}"
        for path, parts in modules()
        for target, line in imports(path)
        if KERNELS & set(parts) and "reference" in target
    ]
    assert not wrong, "\n".join(wrong)


def test_no_drawer_modules():
    wrong = [str(path) for path, parts in modules() if DRAWERS & set(parts)]
    assert not wrong, "\n".join(wrong)


def test_files_fit_on_a_few_screens():
    sizes = {path: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    wrong = [f"{path}: {size} lines" for path, size in sizes.items() if size > 400]
    assert not wrong, "\n".join(wrong)


def is_kernel(node):
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_functions_fit_on_a_screen():
    """40 lines of code, 120 for a kernel; docstrings and signatures do not count."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                limit = 120 if is_kernel(node) else 40
                if body and body[-1].end_lineno - body[0].lineno + 1 > limit:
                    wrong.append(f"{path}:{node.lineno} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_the_floor_test_can_fail():
    assert climbs("core", "ops") and climbs("cache", "sparse") and not climbs("cli", "core")
