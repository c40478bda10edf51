"""Made-up training states and their fingerprint."""

from typing import Final

import torch

from qlora_api.report import StepRecord
from qlora_trainer.training.checkpoint_store import RunFingerprint
from qlora_trainer.training.state import History, TrainingState

STEPS: Final = 5
FINGERPRINT: Final = RunFingerprint(digest="0123456789abcdef", total_steps=STEPS, rows=12, optimizer="AdamW")


def make_state(steps: int) -> TrainingState:
    """The state after a number of steps."""
    record = StepRecord(step=1, loss=1.0, learning_rate=0.1, grad_norm=1.0, tokens=1, seconds=1.0)
    history = tuple(record.model_copy(update={"step": step + 1}) for step in range(steps))
    return TrainingState(History(history), {"a": torch.ones(2)}, {"0/step": torch.tensor(1.0), "0/note": 3}, {}, {})
