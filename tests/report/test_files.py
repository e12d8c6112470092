"""Files are complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.core import BadInput
from saccade.report.comparison import read
from saccade.report.files import write_whole


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def full_disk(self, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(OSError):
        write_whole(tmp_path / "no" / "x.json", "{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/1"}', '{"schema": "saccade'])
def test_what_is_not_a_record_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is not a saccade"):
        read(path)
