"""The law of imports: arrows go down, no circles.  Lazy and relative imports count too."""

import pytest

from tests.architecture.source import ROOT, Import, components, imports, modules

# Lowest first.  A file belongs to the entry with the longest matching name; it may import its own
# entry and those of earlier rows.
FLOORS = [
    ["version", "units"],
    ["core"],
    ["rope"],
    ["ops.gpu"],
    ["ops.tuning"],
    ["ops.kv_write", "ops.gemv"],
    ["ops.planning"],
    ["ops.attention.checks", "ops.attention.known"],
    ["ops.attention.call"],
    [
        "ops.attention.first_key",
        "ops.attention.watch",
        "ops.attention.first_order",
        "ops.attention.masks",
        "ops.attention.varlen",
        "ops.attention.combine",
        "ops.attention.rules",
    ],
    ["ops.attention.reference", "ops.attention.tiled", "ops.attention.cpu"],
    ["ops.attention.sdpa", "ops.attention.nvidia.problem", "ops.attention.nvidia.chunked"],
    ["ops.attention.nvidia.block_lists", "ops.attention.peers"],
    ["ops.attention.nvidia.triton"],
    ["ops.attention.nvidia.gluon"],
    ["ops.attention.nvidia"],
    ["ops.attention.dispatch"],
    ["ops.attention.operator"],
    ["ops.attention"],
    ["ops"],
    ["cache", "sparse", "flash_attn_interface"],
    ["compress"],
    ["runtime"],
    ["hf", "report"],
    ["evals", "bench", "advice"],
    ["cli"],
    [""],
]
FLOOR = {entry: level for level, row in enumerate(FLOORS) for entry in row}
KERNELS = tuple(f"ops.attention.{name}" for name in ("sdpa", "cpu", "nvidia", "peers"))


def entry_of(module):
    """The entry of FLOORS that a module belongs to."""
    name = module.partition(".")[2]
    while name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


def climbs(edge):
    here, target = entry_of(edge.here), entry_of(edge.target)
    return here != target and FLOOR[target] >= FLOOR[here]


def test_imports_go_down():
    wrong = [str(edge) for edge in imports() if climbs(edge)]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles():
    found = components(imports())
    assert not found, "\n".join(", ".join(part) for part in found)


def test_every_entry_exists_and_every_folder_has_one():
    prefixes = {name.partition(".")[2] for name in modules()}
    assert set(FLOOR) <= prefixes, set(FLOOR) - prefixes
    folders = {name.split(".")[1] for name in modules() if "." in name}
    assert {name for name in folders if (ROOT / "saccade" / name).is_dir()} <= set(FLOOR)


def test_kernels_never_import_the_reference():
    wrong = [
        str(edge)
        for edge in imports()
        if entry_of(edge.here).startswith(KERNELS) and edge.target.endswith(".reference")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from saccade import attention", "saccade"),
        ("def f():\n    import saccade", "saccade"),
        ("def f():\n    from saccade.b import x", "saccade.b"),
        ("from .b import x", "saccade.b"),
        ("from . import b", "saccade.b"),
        ("from saccade import b", "saccade.b"),
        ("TABLE = {'x': 'saccade.b'}", "saccade.b"),
        ("if TYPE_CHECKING:\n    import saccade.b as other", "saccade.b"),
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, text, target):
    package = tmp_path / "saccade"
    package.mkdir()
    (package / "__init__.py").write_text("from saccade.a import y\n")
    (package / "a.py").write_text(text + "\n")
    (package / "b.py").write_text("from saccade import a\n")
    found = imports(package)
    assert ("saccade.a", target) in {(each.here, each.target) for each in found}
    assert components(found) == [
        sorted({"saccade.a", target, *(["saccade"] * (target == "saccade"))})
    ]


def test_the_law_can_fail():
    def up(here, target):
        return climbs(Import(f"saccade.{here}", f"saccade.{target}".rstrip("."), 1))

    assert up("core.kv", "ops") and up("cache.dense", "sparse.strided") and up("core.kv", "")
    assert up("ops.gpu.support", "ops.attention.api") and not up("cli.main", "core")
