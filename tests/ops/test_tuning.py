"""Tables of launches: what the package ships, what a user may bring, and what is wrong with it."""

import json

import pytest
import torch

from saccade.core import BadInput
from saccade.ops.tuning import files as launches
from saccade.ops.tuning import tables as tuning
from saccade.ops.tuning.files import Launch, LaunchFile

CARDS = ["default", "sm_90"]
SHARED_MEMORY = {"default": 99 * 1024, "sm_90": 227 * 1024}
ROW = {"dim": 64, "block_m": 64, "block_n": 64, "warps": 4, "stages": 2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


def written(tmp_path, arch="interpreter", **kernels):
    path = tmp_path / "table.json"
    text = {"schema": launches.SCHEMA, "architecture": arch, "kernels": kernels}
    path.write_text(json.dumps(text))
    return path


def test_every_file_of_the_package_can_be_read():
    paths = sorted(tuning.FOLDER.glob("*.json"))
    assert {path.stem for path in paths} >= {"default", "interpreter", "sm_90"}
    for path in paths:
        file = launches.read(path, tuning.KERNELS)
        assert file.architecture == path.stem and file.measured
        assert launches.to_json(file) == path.read_text()  # one row a line, as the tool writes it


@pytest.mark.parametrize("arch", ["default", "interpreter", "sm_90", "sm_89", "sm_120"])
def test_every_kernel_has_a_row_up_to_512(arch):
    assert set(tuning.tables(arch)) == set(tuning.KERNELS)
    for table in tuning.tables(arch).values():
        assert table[-1][0] == 512


def test_cards_without_a_file_get_the_safe_rows():
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
    with tuning.trial(tuning.KEYS, launch):
        assert tuning.pick(tuning.KEYS, x, 64) == launch
        assert tuning.pick(tuning.QUERIES, x, 64) != launch
    assert tuning.pick(tuning.KEYS, x, 64) != launch


def test_rows_of_the_user_stand_before_those_of_the_package(monkeypatch, tmp_path):
    path = written(tmp_path, forward=[ROW | {"dim": 48, "per_sm": 3}])
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.forget()
    x = torch.empty(1)
    assert tuning.pick(tuning.FORWARD, x, 48) == Launch(64, 64, 4, 2, per_sm=3)
    assert tuning.pick(tuning.FORWARD, x, 49) == Launch(32, 16, 4, 1)
    assert tuning.pick(tuning.KEYS, x, 48) == Launch(16, 32, 4, 1)


def test_a_table_of_another_card_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(written(tmp_path, "sm_89", forward=[ROW])))
    tuning.forget()
    assert tuning.FORWARD["sm_90"] == tuning.shipped("sm_90").kernels["forward"]
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
        ({"keys": [ROW, ROW]}, "keys, row 2: rows go upwards, but dim 64 follows 64"),
        ({"keys": [{"dim": 64}]}, "keys, row 1: block_m is missing"),
        ({"keys": [3]}, "keys, row 1: "),
        ({"keys": [{"block_m": 64}]}, "dim must be the largest head dimension it serves"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_rows_are_named(monkeypatch, tmp_path, rows, reason):
    path = written(tmp_path, **rows)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.forget()
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
def test_a_file_that_is_none(monkeypatch, tmp_path, text, reason):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.raises(BadInput, match=reason):
        tuning.of_the_user()


def test_a_file_survives_the_way_to_disk(tmp_path):
    kernels = {"decode": ((64, Launch(16, 64, 1, 2, per_sm=6)), (512, Launch(16, 16, 4, 1)))}
    file = LaunchFile(
        architecture="sm_89", kernels=kernels, measured={"card": "x"}, trials=[{"seconds": 1.0}]
    )
    path = tmp_path / "t.json"
    path.write_text(launches.to_json(file))
    assert launches.read(path, tuning.KERNELS) == file
    row = '{"dim": 64, "block_m": 16, "block_n": 64, "warps": 1, "stages": 2, "per_sm": 6}'
    assert f"   {row},\n" in path.read_text()


def test_a_launch_says_what_is_unusual():
    assert str(Launch(128, 64, 8, 3)) == "128x64 8w 3s"
    assert str(Launch(16, 64, 1, 2, tma=True, per_sm=6)) == ("16x64 1w 2s, TMA, 6 a multiprocessor")
