"""Verifies in a fresh process that an adapter loads with its library's public API and computes the same loss.

`python -m qlora_trainer.publishing.load_check ADAPTER < TASK` reads a LoadingTask and prints the loss.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from qlora_api.accelerators import DeviceName
from qlora_api.base import ApiModel
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.tokenization import Span, TokenRow
from qlora_trainer.errors import RunError

if TYPE_CHECKING:
    from qlora_trainer.model.base_model import TrainableModel

CHECKED_ROWS: Final = 4
"""Held-out rows whose loss is compared: enough to distinguish a trained adapter from an empty one."""
_TOLERANCE: Final = 0.02
"""Nats per token. Both sides compute the same passes, so that only what was saved can differ."""
_TIMEOUT_SECONDS: Final = 1800.0
_WITHHELD: Final = ("AWS_", "HF_TOKEN", "KUBEFLOW_")
"""Prefixes of environment variables that are not passed to the process: it needs no network access."""


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
    """Tokens of each row, and the spans of its labels."""


def rows_of_task(rows: Sequence[TokenRow]) -> TaskRows:
    """Return rows in the format of the task."""
    return tuple((row.input_ids, row.label_spans) for row in rows)


def load_in_fresh_process(task: LoadingTask, adapter: Path, expected_loss: float) -> None:
    """Load the adapter in a fresh process; raise TrainerError if that fails, so that it is not published."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_WITHHELD)}
    done = subprocess.run(  # noqa: S603 (our own interpreter and module)
        [sys.executable, "-P", "-m", "qlora_trainer.publishing.load_check", str(adapter)],
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
            f"the adapter does not load in a fresh process, which {describe_exit(done.returncode)}: "
            f"{done.stderr[-1000:]}",
        )
    compare_losses(float(done.stdout.split()[-1]), expected_loss)


def compare_losses(loss: float, expected_loss: float) -> None:
    """Raise TrainerError if an adapter that was loaded does not have the loss that it had after training."""
    if not math.isfinite(loss) or abs(loss - expected_loss) > _TOLERANCE * max(expected_loss, 1.0):
        raise RunError(
            Reason.TRAINER_ERROR,
            f"the adapter, loaded in a fresh process, has a loss of {loss:.4f}, but {expected_loss:.4f} after training",
        )


def describe_exit(code: int) -> str:
    """Return how a process ended; one killed by a signal writes nothing to stderr."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}, which usually means out of memory" if name == "SIGKILL" else f"was killed by {name}"


def mean_loss(trainable: "TrainableModel", rows: Sequence[TokenRow]) -> float:
    """Return the mean loss per label in nats, with each row in a pass of its own.

    Training and fresh process both compute it so: 8-bit layers choose the columns that they keep in 16 bits over all
    rows of a pass (bitsandbytes#28), and bf16 kernels round by the shape of a pass.
    """
    from qlora_trainer.evaluation.evaluator import compute_metrics  # noqa: PLC0415 (the fresh process imports late)

    with trainable.evaluating():
        return compute_metrics(trainable, rows, micro_batch_size=1, packing=False).loss


def compute_loss(task: LoadingTask, adapter: Path) -> float:
    """Load the result with the public API of peft or transformers, and return the mean loss on the rows."""
    import torch  # noqa: PLC0415 (the parent imports this module as well)
    from peft import PeftModel  # noqa: PLC0415

    from qlora_trainer.model.base_model import TrainableModel, head_is_plain, load_base  # noqa: PLC0415

    dtype, is_full = getattr(torch, task.dtype), task.method == "full"
    folder = adapter if is_full else Path(task.base)
    base = load_base(folder, task.quantization, dtype, task.attention, task.device)
    plain = head_is_plain(base)
    peft = base if is_full else PeftModel.from_pretrained(base, adapter)
    model = base if is_full else peft.get_base_model()
    trainable = TrainableModel(peft, model, base.device, dtype, plain)
    return mean_loss(trainable, [TokenRow(ids, label_spans) for ids, label_spans in task.rows])


if __name__ == "__main__":
    sys.stdout.write(f"{compute_loss(LoadingTask.model_validate_json(sys.stdin.read()), Path(sys.argv[1]))}\n")
