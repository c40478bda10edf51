"""Proves, in a process of its own, that an adapter loads the way its users load it and answers as it was trained to.

`python -m qlora_trainer.publishing.load_check ADAPTER < TASK` reads a LoadingTask and prints the loss.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from qlora_api.accelerators import DeviceName
from qlora_api.base import ApiModel
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.tokenization import Span, TokenRow
from qlora_trainer.errors import RunError

CHECKED_ROWS: Final = 4
"""Held-out rows whose loss is compared: enough to tell a trained adapter from an empty one."""
_TOLERANCE: Final = 0.02
"""Nats per token; loading anew changes rounding only."""
_TIMEOUT_SECONDS: Final = 1800.0
_WITHHELD: Final = ("AWS_", "HF_TOKEN", "KUBEFLOW_")
"""Variables that a process without business on the network does not get."""


TaskRows: TypeAlias = tuple[tuple[tuple[int, ...], tuple[Span, ...]], ...]


class LoadingTask(ApiModel):
    """What to load, and on which rows."""

    method: str
    base: str
    quantization: QuantizationSpec
    device: DeviceName
    dtype: str
    attention: str
    rows: TaskRows
    """Tokens of each row, and which are learned."""


def rows_of_task(rows: Sequence[TokenRow]) -> TaskRows:
    """Return rows as the task carries them."""
    return tuple((row.input_ids, row.label_spans) for row in rows)


def load_in_fresh_process(task: LoadingTask, adapter: Path, expected_loss: float) -> None:
    """Load the adapter as a stranger would, or raise TrainerError: what does not load is never published."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_WITHHELD)}
    done = subprocess.run(  # noqa: S603 (our own interpreter and module)
        [sys.executable, "-m", "qlora_trainer.publishing.load_check", str(adapter)],
        input=task.model_dump_json(by_alias=True),
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RunError(
            Reason.TRAINER_ERROR,
            f"the adapter does not load in a fresh process, which ended {describe_exit(done.returncode)}: "
            f"{done.stderr[-1000:]}",
        )
    found = float(done.stdout.split()[-1])
    if not math.isfinite(found) or abs(found - expected_loss) > _TOLERANCE * max(expected_loss, 1.0):
        raise RunError(
            Reason.TRAINER_ERROR,
            f"the adapter, loaded in a fresh process, has a loss of {found:.4f} where training had {expected_loss:.4f}",
        )


def describe_exit(code: int) -> str:
    """Return how a process ended; a killed one leaves no words of its own."""
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}, as where memory runs out" if name == "SIGKILL" else f"by {name}"


def compute_loss(task: LoadingTask, adapter: Path) -> float:
    """Load what was published with the public call for it, and return the mean loss on the rows."""
    import torch  # noqa: PLC0415 (the parent imports this module as well)
    from peft import PeftModel  # noqa: PLC0415

    from qlora_trainer.evaluation.evaluator import compute_metrics  # noqa: PLC0415
    from qlora_trainer.model.base_model import TrainableModel, head_is_plain, load_base  # noqa: PLC0415

    dtype, whole = getattr(torch, task.dtype), task.method == "full"
    folder = adapter if whole else Path(task.base)
    base = load_base(folder, task.quantization, dtype, task.attention, task.device)
    plain = head_is_plain(base)
    peft = base if whole else PeftModel.from_pretrained(base, adapter)
    causal = base if whole else peft.get_base_model()
    tuned = TrainableModel(peft, causal, base.device, dtype, plain)
    rows = [TokenRow(ids, learned) for ids, learned in task.rows]
    with tuned.evaluating():
        return compute_metrics(tuned, rows, micro_batch_size=1, packing=False).loss


if __name__ == "__main__":
    sys.stdout.write(f"{compute_loss(LoadingTask.model_validate_json(sys.stdin.read()), Path(sys.argv[1]))}\n")
