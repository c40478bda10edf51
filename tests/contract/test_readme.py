"""The README is true: what it shows is what the commands print."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nothing_is_left_to_be_filled_in():
    assert re.findall(r"@[A-Z]+@", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_validate_prints_what_the_readme_shows():
    command = [sys.executable, "-m", "qlora_cli", "validate", "examples/broken.yaml"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert printed.returncode == 1
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = (printed.stdout + printed.stderr).splitlines()
    assert [line for line in lines if line not in shown] == []
    assert len(lines) == 2
