"""The evaluation of the base in the output: written after each of its parts, so that a resumed run repeats none."""

from collections.abc import Callable, Sequence
from typing import Final

from qlora_api.base import ApiModel, ReportedModel
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import KIB, MIB
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.evaluation.evaluator import EvaluationResult, RowStatistics
from qlora_trainer.evaluation.lm_eval_tasks import TaskMetric
from qlora_trainer.storage.store import MissingObjectError, Store, is_unavailable, sha256_of

BASE_EVALUATION: Final = "base-evaluation"
"""Name of the folder, which is among the checkpoints and deleted with them."""
_MAX_BYTES: Final = 64 * MIB
"""Upper bound of the answers and of the metrics of benchmarks."""
_MAX_ROW_BYTES: Final = KIB
"""Upper bound of the sums of a row, which take about 60 bytes."""


class EvaluationFingerprint(ApiModel):
    """What must be equal for the results of an earlier attempt to be those that this attempt would compute."""

    digest: str
    """Digest of the result: model and validation set."""
    generations: int
    max_answer_tokens: int
    task_examples: int | None
    benchmarks: str
    """SHA-256 of the pinned benchmark tasks; empty if there are none."""
    bits: int
    device: str
    dtype: str
    attention: str
    packing: bool
    micro_batch_size: int
    """0 unless results depend on it: LLM.int8 chooses its outlier columns over a whole batch."""


class RowRecord(ReportedModel):
    """Sums over one row of the validation set."""

    tokens: int
    loss: float
    correct: int


class TaskRecord(ReportedModel):
    """A metric of a benchmark task."""

    task: str
    metric: str
    value: float
    stderr: float | None


class EvaluationRecord(ApiModel):
    """evaluation.json."""

    fingerprint: EvaluationFingerprint
    rows: tuple[RowRecord, ...]
    answers: tuple[str | None, ...]
    tasks: tuple[TaskRecord, ...]


class BaseEvaluationStore:
    """Reads and writes the evaluation of the base that belongs to one result."""

    def __init__(self, output: Store, fingerprint: EvaluationFingerprint, note: Callable[[str], None]) -> None:
        self.digest = ""
        """SHA-256 of the file, once it is read or written."""
        self._output = output
        self._fingerprint = fingerprint
        self._note = note
        self._path = f"{fingerprint.digest}/checkpoints/{BASE_EVALUATION}/evaluation.json"

    def load(self, rows: Sequence[TokenRow], trusted: str | None) -> EvaluationResult | None:
        """Return what an earlier attempt evaluated, or None.

        Args:
            rows: The validation set.
            trusted: SHA-256 that the file must have; None if none is known, so that any is accepted.

        Raises:
            RunError: The store failed; nothing that may be there is evaluated again.

        """
        try:
            content = self._output.read(self._path, _MAX_BYTES + _MAX_ROW_BYTES * len(rows))
            found = self._parse(content, rows, trusted)
        except MissingObjectError:
            return None
        except Exception as error:  # others write here too, and pydantic raises many types
            if is_unavailable(error):
                raise
            self._note(f"the base is evaluated again, {self._output.root}/{self._path} is not used: {error}")
            return None
        self.digest = sha256_of(content)
        self._note("the base was evaluated by an earlier attempt")
        return found

    def save(self, result: EvaluationResult) -> None:
        """Write what has been evaluated so far; a failure is only logged."""
        rows = (RowRecord(tokens=row.tokens, loss=row.loss, correct=row.correct) for row in result.row_statistics)
        tasks = (
            TaskRecord(task=task, metric=metric, value=found.value, stderr=found.stderr)
            for (task, metric), found in result.task_metrics.items()
        )
        try:
            record = EvaluationRecord(
                fingerprint=self._fingerprint, rows=tuple(rows), answers=result.answers, tasks=tuple(tasks)
            )
            content = record.model_dump_json(by_alias=True).encode()
            self._output.put(self._path, content)
        except Exception as error:
            # It only saves time if the run is interrupted, as a checkpoint does.
            self._note(f"the evaluation of the base was not stored, a further attempt repeats it: {error}")
        else:
            self.digest = sha256_of(content)

    def _parse(self, content: bytes, rows: Sequence[TokenRow], trusted: str | None) -> EvaluationResult:
        if trusted is not None and sha256_of(content) != trusted:
            raise ValueError("the checkpoint that the run resumes from does not name it")
        record = ignore_unknown(EvaluationRecord, content, self._path)
        was, now = record.fingerprint.model_dump(by_alias=True), self._fingerprint.model_dump(by_alias=True)
        if differing := [f"{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]:
            raise ValueError(f"it was computed otherwise: {', '.join(differing)}")
        if [row.tokens for row in record.rows] != [row.label_count for row in rows] or len(record.answers) != len(rows):
            raise ValueError("its rows are not those of the validation set")
        return EvaluationResult(
            tuple(RowStatistics(row.tokens, row.loss, row.correct) for row in record.rows),
            record.answers,
            {(found.task, found.metric): TaskMetric(found.value, found.stderr) for found in record.tasks},
        )
