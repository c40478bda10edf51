"""Every cell of docs/reference/distribution.md: allowed ones train like DDP, refused ones give field and fix."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import TrainingSpec
from qlora_codegen.distribution_matrix import MatrixCell, matrix_cells
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.training.engine import make_engine
from tests.unit.trainer.processes import run_two
from tests.unit.trainer.sharing import STEPS, key_of
from tests.unit.trainer.tiny import CPU
from tests.unit.trainer.tuned import SETTINGS, make_trainable

CELLS = tuple(matrix_cells())
ALLOWED = tuple(cell for cell in CELLS if cell.rejection is None)
REFUSED = tuple(cell for cell in CELLS if cell.rejection is not None)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder: Path = tmp_path_factory.mktemp("sharing")
    run_two("tests.unit.trainer.sharing", folder)
    losses: dict[str, list[float]] = json.loads((folder / "found.json").read_text())
    return losses


@pytest.mark.parametrize("cell", ALLOWED, ids=key_of)
def test_allowed_strategy_has_the_losses_of_ddp(found: dict[str, list[float]], cell: MatrixCell) -> None:
    losses = found[key_of(cell)]
    assert losses == pytest.approx(found[key_of(MatrixCell(cell.base, cell.variant, "ddp"))], rel=2e-3)
    assert losses[STEPS - 1] < losses[0], "training has an effect"


@pytest.mark.parametrize("cell", REFUSED, ids=key_of)
def test_refused_strategy_names_field_and_fix(cell: MatrixCell) -> None:
    assert cell.rejection is not None
    assert cell.rejection.startswith("spec.")
    assert any(word in cell.rejection for word in ("set ", "leave "))


def test_matrix_has_allowed_and_refused_cells_for_every_strategy() -> None:
    for strategy in ("ddp", "zero2", "zero3"):
        assert any(cell.strategy == strategy for cell in ALLOWED)
        assert any(cell.strategy == strategy for cell in REFUSED)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_fp16_with_zero_is_refused(strategy: str) -> None:
    trainable, settings = make_trainable(), dataclasses.replace(SETTINGS, dtype=torch.float16)
    with pytest.raises(RunError, match="set it to ddp") as caught:
        make_engine(trainable, TrainingSpec(), settings, World(CPU, size=2, strategy=strategy))
    assert caught.value.reason is Reason.INVALID_SPEC
