"""Figures and picture of docs/usage.md are what the command prints for the sample data."""

import json
import re

from docs.usage.__main__ import MONTH, PICTURE, draw, run_qlora
from tests.contract.docs.blocks import blocks


def test_pasted_output_is_that_of_the_commands() -> None:
    shown = [block.text for block in blocks("console") if block.page == "docs/usage.md"]
    printed = []
    for text in shown:
        commands = re.findall(r"^\$ qlora (.*)$", text, re.MULTILINE)
        printed.append("".join(f"$ qlora {line}\n{run_qlora(line.split())}" for line in commands))
    assert printed == shown


def test_picture_has_the_figures_of_the_command() -> None:
    report = json.loads(run_qlora(["usage", "-A", "--by=namespace", f"--month={MONTH}", "-o", "json"]))
    assert PICTURE.read_text(encoding="utf-8") == draw(report)
