"""docs/data.md is true: its rows are what it says they are."""

import json
import re
from pathlib import Path

from qlora_trainer.data.row_formats import detect_format, instruction_prompt, parse_row

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_rows_are_what_the_page_calls_them():
    told = [detect_format(row)[0] for block in blocks("json") for row in map(json.loads, block.splitlines())]
    assert told == ["instruction", "chat", "chat", "completion", "text"]
    for block in blocks("json"):
        for row in map(json.loads, block.splitlines()):
            parse_row(row, detect_format(row)[0])


def test_the_prompt_of_instruction_rows_is_the_page_s():
    row = json.loads(blocks("json")[0])
    prompt = instruction_prompt(row)
    assert f"```text\n{prompt}```" in PAGE
    assert instruction_prompt({**row, "input": ""}) == prompt.replace(f"### Input:\n{row['input']}\n\n", "")
