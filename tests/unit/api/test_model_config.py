"""The part of a config.json that travels from prepare to the plan."""

import json

import pytest

from qlora_api.model_config import MAX_CONFIG, SIZE_KEYS, reduce_config
from qlora_planner.models.families import FAMILIES, read_shape
from tests.unit.planner.public import NAMES, load_config


@pytest.mark.parametrize("name", NAMES)
def test_reduced_config_has_same_shape_and_is_short(name: str) -> None:
    config = load_config(name) | {"quantization_config": {"bits": 4}, "_name_or_path": "x" * 9000}
    reduced = reduce_config(config)
    assert read_shape(json.loads(reduced)) == read_shape(config)
    assert len(reduced) < 600


def test_reduced_config_has_every_key_that_families_read() -> None:
    read = {key for family in FAMILIES.values() for key in family.model_fields}
    assert read - SIZE_KEYS == {"layer_types"}


def test_config_that_is_too_long_is_left_out() -> None:
    assert reduce_config({"model_type": "x" * MAX_CONFIG}) == ""
