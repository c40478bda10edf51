"""docs/data.md is true: its manifests are accepted, and its rows are what it says they are."""

import json
import re
from pathlib import Path

import pytest
import yaml

from qlora_operator.rules import check
from qlora_trainer.formats import parse_row, tell_format
from tests.make import make_spec

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_manifests_are_accepted(block):
    dataset = yaml.safe_load(block)["dataset"]
    assert check(make_spec(dataset={"uri": None, **dataset})) == ()


def test_rows_are_what_the_page_calls_them():
    told = [tell_format(row)[0] for block in blocks("json") for row in map(json.loads, block.splitlines())]
    assert told == ["instruction", "chat", "chat", "completion", "text"]
    for block in blocks("json"):
        for row in map(json.loads, block.splitlines()):
            parse_row(row, tell_format(row)[0])
