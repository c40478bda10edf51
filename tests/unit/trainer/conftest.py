"""Warnings of the libraries themselves, about their own code; everything else stays an error."""

from pathlib import Path
from typing import Final

import pytest

FOREIGN: Final = (
    # peft 0.21 reads transformers' old name of is_activation_checkpointing.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in FOREIGN:
                item.add_marker(pytest.mark.filterwarnings(warning))
