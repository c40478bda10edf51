"""Public benchmarks for base and adapter, by lm-evaluation-harness; their data comes the way models do."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from qlora_api.names import SecretRole
from qlora_api.prepared import PinnedTask, PinnedTasks
from qlora_api.reasons import Reason
from qlora_api.report import TaskScore
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver
from qlora_trainer.storage.store import FieldRef

TASKS_FIELD: Final = FieldRef(SecretRole.MODEL, "spec.evaluation.tasks", Reason.INVALID_SPEC)
"""Who asks for the data; its token is the model's, since both come from the hub."""
_DATA: Final = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow", ".jsonl.gz", ".json.gz", ".zst", ".txt")
_DATASET_CARD: Final = "README.md"
"""Says which files belong to which part of a dataset."""
MAX_TASKS: Final = 128
"""Leaf tasks of one run: the largest public group, MMLU, has 57."""
SHOWN_TASKS: Final = 4
"""Tasks of one dataset that the log names; the others are counted."""


def pin_benchmarks(names: Sequence[str], resolver: SourceResolver) -> PinnedTasks:
    """Return the leaf tasks of tasks, groups and tags that the harness knows, each with the commit of its data."""
    leaves = tuple(dict.fromkeys(leaf for name in names for leaf in _leaves(name, _index())))
    if len(leaves) > MAX_TASKS:
        raise _refused(f"{len(leaves)} tasks are more than {MAX_TASKS}", "name smaller groups")
    commit_of = cache(lambda dataset: _resolve(resolver, dataset, "main").commit)
    return PinnedTasks(tasks=tuple(_pin(name, _index()[name], commit_of) for name in leaves))


@lru_cache(maxsize=1)
def _index() -> Mapping[str, Any]:
    """Return what the harness has, by name; it reads 14,000 files for it, which takes seconds."""
    with _quiet():
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 (most runs have no tasks)

        index: Mapping[str, Any] = TaskManager().task_index
    return index


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield the leaf tasks below a name."""
    entry = index.get(name)
    if entry is None:
        raise _refused(f"lm-evaluation-harness has no task '{name}'", "see its list of tasks for the spelling")
    if entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        for member in entry.cfg["task"]:
            if not isinstance(member, str):
                raise _refused(f"group '{name}' changes its tasks' settings", "name the tasks themselves")
            yield from _leaves(member, index)
    else:
        yield name


def _pin(name: str, entry: Any, commit_of: Callable[[str], str]) -> PinnedTask:
    dataset = str(entry.cfg.get("dataset_path", ""))
    if entry.kind.name != "TASK":
        raise _refused(f"task '{name}' is a program, not a configuration", "choose another task")
    if "/" not in dataset or "custom_dataset" in entry.cfg:
        raise _refused(f"the data of task '{name}' is not a repository of the hub ({dataset})", "choose another task")
    if entry.cfg.get("unsafe_code"):
        raise _refused(f"task '{name}' runs code that the model writes", "choose another task")
    file = Path(entry.yaml_path).relative_to(_folder()).as_posix()
    return PinnedTask(
        name=name, file=file, dataset=dataset, commit=commit_of(dataset), part=entry.cfg.get("dataset_name")
    )


def _folder() -> Path:
    """Return where the harness keeps the configurations of its tasks."""
    with _quiet():
        from lm_eval import tasks  # noqa: PLC0415 (most runs have no tasks)

    return Path(tasks.__file__).parent


def _resolve(resolver: SourceResolver, dataset: str, revision: str) -> Snapshot:
    return resolver.resolve(f"hf://{dataset}", revision, TASKS_FIELD, repo_type="dataset")


def describe_benchmarks(pinned: PinnedTasks) -> Iterator[str]:
    """Yield a sentence for each dataset."""
    names: dict[tuple[str, str], list[str]] = {}
    for task in pinned.tasks:
        names.setdefault((task.dataset, task.commit), []).append(task.name)
    for (dataset, commit), tasks in names.items():
        more = f" and {len(tasks) - SHOWN_TASKS} more" if len(tasks) > SHOWN_TASKS else ""
        yield f"{', '.join(tasks[:SHOWN_TASKS])}{more}: {dataset} is at {commit}"


def _refused(what: str, remedy: str) -> RunError:
    return RunError(Reason.INVALID_SPEC, f"{TASKS_FIELD.field}: {what}; {remedy}")


def fetch_benchmark(task: PinnedTask, snapshot: Snapshot, work: Path) -> dict[str, Any]:
    """Bring a task's data here, and return the configuration that reads it."""
    folder = snapshot.fetch(_files_of(task, snapshot), work)
    with _quiet():
        from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415 (the only reader of the files' !function)

        config = load_yaml(_folder() / task.file)
    reading = {**(config.get("dataset_kwargs") or {}), "cache_dir": str(work / "benchmarks")}
    return {**config, "dataset_path": str(folder), "dataset_kwargs": reading}


def _files_of(task: PinnedTask, snapshot: Snapshot) -> list[str]:
    """Return the card, and the data of the part where files are kept by part, else all data."""
    data = [name for name in snapshot.files if name.endswith(_DATA)]
    own = [name for name in data if task.part and task.part in Path(name).parts]
    return [name for name in snapshot.files if name == _DATASET_CARD] + (own or data)


def load_benchmarks(pinned: PinnedTasks, resolver: SourceResolver, work: Path) -> Any:
    """Return the harness's tasks with their data, or raise RunError; it is the proof that they can be run.

    Only these tasks' files are read, and not the harness's index of all, for which a GPU would wait.
    """
    snapshot_of = cache(lambda dataset, commit: _resolve(resolver, dataset, commit))
    configs = [fetch_benchmark(task, snapshot_of(task.dataset, task.commit), work) for task in pinned.tasks]
    with _quiet():
        from lm_eval.tasks import TaskManager  # noqa: PLC0415

        manager = TaskManager(include_defaults=False)
        try:
            return manager.load(configs)
        except Exception as error:  # the harness and datasets raise whatever their readers raise
            raise _refused(
                f"the data does not load: {type(error).__name__}: {str(error)[:300]}", "choose another task"
            ) from error


class TaskMetric(NamedTuple):
    """A task's figure, and its standard error where the harness knows it."""

    value: float
    stderr: float | None


TaskMetrics: TypeAlias = Mapping[tuple[str, str], TaskMetric]
"""By task and metric."""


@dataclass(frozen=True)
class BenchmarkSuite:
    """The same benchmarks for every model."""

    tasks: Any
    """The harness's own, with their data."""
    tokenizer: Any
    batch_size: int
    """Sequences per forward pass."""
    examples_per_task: int | None
    """Of each task, the first; None is all."""

    def run(self, trainable: TrainableModel) -> TaskMetrics:
        """Let a model as it is, in evaluation and with or without its adapter, take every task."""
        with _quiet():
            from lm_eval import evaluate  # noqa: PLC0415
            from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

            model = HFLM(
                pretrained=trainable.model, tokenizer=self.tokenizer, backend="causal", batch_size=self.batch_size
            )
            with trainable.autocast():
                results = evaluate(model, self.tasks, limit=self.examples_per_task, log_samples=False)["results"]
        return {
            (task, key.removesuffix(",none")): TaskMetric(float(value), _stderr_of(key, figures))
            for task, figures in results.items()
            for key, value in figures.items()
            if isinstance(value, int | float) and "," in key and "_stderr," not in key
        }


def _stderr_of(key: str, figures: Mapping[str, Any]) -> float | None:
    metric, _, how = key.partition(",")
    error = figures.get(f"{metric}_stderr,{how}")
    return float(error) if isinstance(error, int | float) else None


def compare_task_metrics(base: TaskMetrics, adapter: TaskMetrics) -> tuple[TaskScore, ...]:
    """Return both side by side."""
    return tuple(
        TaskScore(
            task=task,
            metric=metric,
            base=before.value,
            base_error=before.stderr,
            adapter=adapter[task, metric].value,
            adapter_error=adapter[task, metric].stderr,
        )
        for (task, metric), before in base.items()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's deprecation warnings out of the log; its errors stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
