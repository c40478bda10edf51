"""The tables of the contract: each name that a field may have is a row, and no module knows a name by heart."""

import re
from pathlib import Path
from typing import Final, get_args

import pytest

from qlora_api.accelerators import ACCELERATORS, NVIDIA, DeviceName, accelerator_of
from qlora_api.optimizers import OPTIMIZERS, OptimizerName
from qlora_api.strategies import STRATEGIES, StrategyName
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import RowFormat
from qlora_trainer.data.row_formats import _FORMAT_FIELDS, _PARSERS

ROOT: Final = Path(__file__).parents[2]
TABLES: Final = {"strategies.py", "optimizers.py", "accelerators.py", "synonyms.py"}
"""The tables, and the names that other tools have for their rows."""
SPELLED: Final = re.compile(rf"['\"](?:{'|'.join([*STRATEGIES, NVIDIA.resource])})['\"]")


def test_every_name_is_a_row():
    assert set(get_args(StrategyName)) == set(STRATEGIES)
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    assert set(get_args(RowFormat)) == set(_PARSERS) == {row_format for _, row_format in _FORMAT_FIELDS}
    assert set(get_args(DeviceName)) == {"cpu", *(accelerator.device for accelerator in ACCELERATORS)}


def test_no_row_of_accelerators_hides_another():
    """Plans name a device and pods a resource: of two rows with the same one the later would win in silence."""
    assert len({accelerator.device for accelerator in ACCELERATORS}) == len(ACCELERATORS)
    assert len({accelerator.resource for accelerator in ACCELERATORS}) == len(ACCELERATORS)


def test_no_other_module_spells_a_strategy_or_a_gpu_resource():
    modules = [path for folder in ("operator", "trainer_image") for path in (ROOT / folder).rglob("*.py")]
    assert not [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in modules
        if path.name not in TABLES and (found := SPELLED.search(path.read_text()))
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_gpus_of_nvidia_are_asked_for(device):
    assert accelerator_of(device) is NVIDIA


@pytest.mark.parametrize(
    ("optimizer", "tensor", "weight"), [("adamw", 8, 8), ("adamw8bit", 2 + 8 / 256, 2), ("pagedAdamw", 0, 0)]
)
def test_state_of_a_large_tensor_and_of_each_weight(optimizer, tensor, weight):
    size = 2**20
    assert OPTIMIZERS[optimizer].state_bytes(size) == size * tensor
    assert OPTIMIZERS[optimizer].state_bytes_per_weight == weight


def test_sizes_are_written_with_as_many_digits_as_asked():
    assert (format_gib(3 << 29), format_gib(3 << 29, 2)) == ("1.5 GiB", "1.50 GiB")
