"""Facts about the machine: complete, and nothing private."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

from saccade.report.environment import machine_facts


def test_facts_name_no_host_user_or_path():
    text = json.dumps(machine_facts())
    node = platform.node()
    assert node == "" or node not in text
    for private in (str(Path.home()), str(Path(__file__).parent), f'"{getpass.getuser()}"'):
        assert private not in text


def test_facts_are_there():
    facts = machine_facts()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["threads"] >= 1
    assert facts["torch"] and facts["python"].startswith("3.")
