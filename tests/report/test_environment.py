"""Facts about the machine: complete, and nothing private."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

from saccade.report.environment import facts


def test_facts_name_no_host_user_or_path():
    text = json.dumps(facts())
    node = platform.node()
    assert node == "" or node not in text
    for private in (str(Path.home()), str(Path(__file__).parent), f'"{getpass.getuser()}"'):
        assert private not in text


def test_facts_are_there():
    found = facts()
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] >= 1
    assert found["torch"] and found["python"].startswith("3.")
