"""Tuning tables: the files of the package, a user's file, and the errors in one."""

import json

import pytest
import torch

from saccade.core import BadInput
from saccade.ops.tuning import files
from saccade.ops.tuning import tables as tuning
from saccade.ops.tuning.files import Launch, LaunchFile

SHARED_MEMORY = {"default": 99 * 1024, "sm_90": 227 * 1024}
ROW = {"dim": 64, "block_m": 64, "block_n": 64, "warps": 4, "stages": 2}


@pytest.fixture(autouse=True)
def reread(monkeypatch):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.clear_cache()
    yield
    monkeypatch.undo()
    tuning.clear_cache()


def written(tmp_path, arch="interpreter", **kernels):
    path = tmp_path / "table.json"
    text = {"schema": files.SCHEMA, "architecture": arch, "kernels": kernels}
    path.write_text(json.dumps(text))
    return path


def test_every_file_of_the_package_can_be_read():
    paths = sorted(tuning.FOLDER.glob("*.json"))
    assert {path.stem for path in paths} >= {"default", "interpreter", "sm_90"}
    for path in paths:
        file = files.read(path, tuning.KERNELS)
        assert file.architecture == path.stem and file.measured
        assert files.to_json(file) == path.read_text()  # one row a line, as the tool writes it


@pytest.mark.parametrize("arch", ["default", "interpreter", "sm_90", "sm_89", "sm_120"])
def test_every_kernel_has_a_row_up_to_512(arch):
    assert set(tuning.tables(arch)) == set(tuning.KERNELS)
    for table in tuning.tables(arch).values():
        assert table[-1][0] == 512


def test_architectures_without_a_file_get_the_default_rows():
    assert tuning.FORWARD["sm_89"] == tuning.FORWARD["default"]
    for name in ("forward", "decode"):
        for dim, launch in tuning.KERNELS[name]["default"]:
            tiles = (launch.block_m + 2 * launch.block_n * max(1, launch.stages)) * dim * 2
            assert tiles <= SHARED_MEMORY["default"]


def test_pick_goes_by_head_dim_and_type():
    x = torch.empty(1)
    assert tuning.pick(tuning.FORWARD, x.bfloat16(), 40) == Launch(32, 16, 4, 1)
    assert tuning._row("forward", "sm_90", False, 65) == Launch(128, 128, 8, 3)
    assert tuning._row("decode", "sm_90", True, 128) == Launch(32, 32, 4, 1)


def test_a_trial_ends_with_its_block():
    x, launch = torch.empty(1), Launch(64, 32, 2, 1)
    with tuning.trial(tuning.BACKWARD_KV, launch):
        assert tuning.pick(tuning.BACKWARD_KV, x, 64) == launch
        assert tuning.pick(tuning.BACKWARD_Q, x, 64) != launch
    assert tuning.pick(tuning.BACKWARD_KV, x, 64) != launch


def test_rows_of_the_user_come_before_those_of_the_package(monkeypatch, tmp_path):
    path = written(tmp_path, forward=[ROW | {"dim": 48, "per_sm": 3}])
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.clear_cache()
    x = torch.empty(1)
    assert tuning.pick(tuning.FORWARD, x, 48) == Launch(64, 64, 4, 2, per_sm=3)
    assert tuning.pick(tuning.FORWARD, x, 49) == Launch(32, 16, 4, 1)
    assert tuning.pick(tuning.BACKWARD_KV, x, 48) == Launch(16, 32, 4, 1)


def test_a_table_of_another_architecture_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(written(tmp_path, "sm_89", forward=[ROW])))
    tuning.clear_cache()
    assert tuning.FORWARD["sm_90"] == tuning.package_file("sm_90").kernels["forward"]
    assert tuning.FORWARD["sm_89"][0] == (64, Launch(64, 64, 4, 2))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"forwrd": [ROW]}, "unknown kernel 'forwrd'; did you mean forward?"),
        ({"forward": []}, "forward needs a list of rows"),
        ({"forward": [ROW | {"block_m": 100}]}, "forward, row 1: block_m must be a power of two"),
        ({"forward": [ROW | {"warps": "4"}]}, "warps must be a whole number from 1 to 32, got '4'"),
        ({"forward": [ROW | {"stage": 2}]}, "unknown field 'stage'; did you mean stages?"),
        ({"forward": [ROW | {"tma": 1}]}, "tma must be true or false, got 1"),
        ({"backward_kv": [ROW, ROW]}, "backward_kv, row 2: dims must increase, but 64 follows 64"),
        ({"backward_kv": [{"dim": 64}]}, "backward_kv, row 1: block_m is missing"),
        ({"backward_kv": [3]}, "backward_kv, row 1: "),
        ({"backward_kv": [{"block_m": 64}]}, "dim must be the largest head dimension of the row"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_rows_are_named(monkeypatch, tmp_path, rows, reason):
    path = written(tmp_path, **rows)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.clear_cache()
    with pytest.raises(BadInput) as caught:
        tuning.pick(tuning.FORWARD, torch.empty(1), 64)
    assert str(caught.value).startswith(f"SACCADE_TUNING: {path} is not a table of launches: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON: "),
        ("[]", "expected an object"),
        ("{}", 'expected "schema": "saccade.tuning/2", got None'),
        ('{"schema": "saccade.tuning/2"}', 'expected "architecture"'),
    ],
)
def test_files_that_are_not_tables(monkeypatch, tmp_path, text, reason):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.raises(BadInput, match=reason):
        tuning.user_file()


def test_a_file_is_read_as_it_was_written(tmp_path):
    kernels = {"decode": ((64, Launch(16, 64, 1, 2, per_sm=6)), (512, Launch(16, 16, 4, 1)))}
    file = LaunchFile(
        architecture="sm_89", kernels=kernels, measured={"gpu": "x"}, trials=[{"seconds": 1.0}]
    )
    path = tmp_path / "t.json"
    path.write_text(files.to_json(file))
    assert files.read(path, tuning.KERNELS) == file
    row = '{"dim": 64, "block_m": 16, "block_n": 64, "warps": 1, "stages": 2, "per_sm": 6}'
    assert f"   {row},\n" in path.read_text()


def test_the_text_of_a_launch():
    assert str(Launch(128, 64, 8, 3)) == "128x64 8w 3s"
    assert str(Launch(16, 64, 1, 2, tma=True, per_sm=6)) == (
        "16x64 1w 2s, TMA, 6 per multiprocessor"
    )
