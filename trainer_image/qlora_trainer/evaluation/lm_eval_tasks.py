"""Public benchmarks by lm-evaluation-harness; datasets are pinned and downloaded like models."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from qlora_api.names import SecretRole
from qlora_api.object_names import ObjectName
from qlora_api.prepared import PinnedTask, PinnedTasks
from qlora_api.reasons import Reason
from qlora_api.report import TaskScore
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver
from qlora_trainer.storage.store import FieldRef, sha256_of

TASKS_FIELD: Final = FieldRef(SecretRole.MODEL, "spec.evaluation.tasks", Reason.INVALID_SPEC)
"""The field that requests the data; the model's token is used, since both come from the hub."""
_DATA: Final = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow", ".jsonl.gz", ".json.gz", ".zst", ".txt")
_DATASET_CARD: Final = "README.md"
"""Maps the configurations of a dataset to its files."""
MAX_TASKS: Final = 128
"""Maximum number of leaf tasks per run; the largest public group, MMLU, has 57."""
SHOWN_TASKS: Final = 4
"""Tasks of one dataset that a log line names; the others are counted."""


def pin_benchmarks(names: Sequence[str], resolver: SourceResolver) -> PinnedTasks:
    """Expand tasks, groups and tags to leaf tasks, each with the commit of its dataset."""
    leaves = tuple(dict.fromkeys(leaf for name in names for leaf in _leaves(name, _index())))
    if len(leaves) > MAX_TASKS:
        raise _refused(f"{len(leaves)} tasks are more than {MAX_TASKS}", "name smaller groups")
    commit_of = cache(lambda dataset: _resolve(resolver, dataset, "main").commit)
    return PinnedTasks(tasks=tuple(_pin(name, _index()[name], commit_of) for name in leaves))


@lru_cache(maxsize=1)
def _index() -> Mapping[str, Any]:
    """Return the harness's task index; it reads 14,000 files, which takes seconds."""
    with _quiet():
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 (most runs have no tasks)

        index: Mapping[str, Any] = TaskManager().task_index
    return index


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield the leaf tasks of a task, group or tag."""
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
        name=name, file=ObjectName(file), dataset=dataset, commit=commit_of(dataset), part=entry.cfg.get("dataset_name")
    )


def _folder() -> Path:
    """Return the folder with the harness's task configurations."""
    with _quiet():
        from lm_eval import tasks  # noqa: PLC0415 (most runs have no tasks)

    return Path(tasks.__file__).parent


def _resolve(resolver: SourceResolver, dataset: str, revision: str) -> Snapshot:
    return resolver.resolve(f"hf://{dataset}", revision, TASKS_FIELD, repo_type="dataset")


def describe_benchmarks(pinned: PinnedTasks) -> Iterator[str]:
    """Yield a log line per dataset."""
    names: dict[tuple[str, str], list[str]] = {}
    for task in pinned.tasks:
        names.setdefault((task.dataset, task.commit), []).append(task.name)
    for (dataset, commit), tasks in names.items():
        more = f" and {len(tasks) - SHOWN_TASKS} more" if len(tasks) > SHOWN_TASKS else ""
        yield f"{', '.join(tasks[:SHOWN_TASKS])}{more}: {dataset} is at {commit}"


def _refused(cause: str, fix: str) -> RunError:
    return RunError(Reason.INVALID_SPEC, f"{TASKS_FIELD.field}: {cause}; {fix}")


def fetch_benchmark(task: PinnedTask, snapshot: Snapshot, work: Path) -> dict[str, Any]:
    """Download a task's data, and return a task configuration that reads it from disk."""
    folder = snapshot.fetch(_files_of(task, snapshot), work)
    if task.data is not None and _digest_data(task, snapshot, folder) != task.data:
        raise _refused(
            f"the data of task '{task.name}' in {task.dataset} changed since preparation", "create the QLoRAJob again"
        )
    with _quiet():
        from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415 (the only reader of the files' !function)

        config = load_yaml(task.file.below(_folder()))
    if config.get("unsafe_code"):  # prepare refuses it, but others can write the list of tasks
        raise _refused(f"task '{task.name}' runs code that the model writes", "choose another task")
    reading = {**(config.get("dataset_kwargs") or {}), "cache_dir": str(work / "benchmarks")}
    return {**config, "dataset_path": str(folder), "dataset_kwargs": reading}


def record_data(pinned: PinnedTasks, resolver: SourceResolver, work: Path) -> PinnedTasks:
    """Return the tasks with the digests of their data, which has been downloaded."""

    @cache
    def digest_of(dataset: str, part: str | None) -> str:
        task = next(task for task in pinned.tasks if (task.dataset, task.part) == (dataset, part))
        snapshot = _resolve(resolver, dataset, task.commit)
        return _digest_data(task, snapshot, snapshot.fetch(_files_of(task, snapshot), work))

    return PinnedTasks(
        tasks=tuple(task.model_copy(update={"data": digest_of(task.dataset, task.part)}) for task in pinned.tasks)
    )


def _digest_data(task: PinnedTask, snapshot: Snapshot, folder: Path) -> str:
    listing = "\n".join(
        f"{name} {sha256_of(ObjectName(name).below(folder))}" for name in sorted(_files_of(task, snapshot))
    )
    return sha256_of(listing.encode())


def _files_of(task: PinnedTask, snapshot: Snapshot) -> Sequence[str]:
    """Return the dataset card and the data files of the task's configuration; all data files if none match it."""
    data = [name for name in snapshot.files if name.endswith(_DATA)]
    own = [name for name in data if task.part and task.part in Path(name).parts]
    return [name for name in snapshot.files if name == _DATASET_CARD] + (own or data)


def load_benchmarks(pinned: PinnedTasks, resolver: SourceResolver, work: Path) -> Any:
    """Load the tasks with their data; raises RunError if a task cannot be run.

    Only these tasks' files are read, not the harness's full index, for which a GPU would wait.
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
    """A metric's value, and its standard error if the harness computes one."""

    value: float
    stderr: float | None


TaskMetrics: TypeAlias = Mapping[tuple[str, str], TaskMetric]
"""Keyed by task and metric."""


@dataclass(frozen=True)
class BenchmarkSuite:
    """Runs the same benchmarks for base and adapter."""

    tasks: Any
    """Task objects of the harness, with their data."""
    tokenizer: Any
    batch_size: int
    """Sequences per forward pass."""
    examples_per_task: int | None
    """Number of examples per task, taken from the start; None for all."""
    digest: str = ""
    """SHA-256 of the pinned tasks."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return tuple(self.tasks["tasks"])

    def run(self, trainable: TrainableModel, name: str) -> TaskMetrics:
        """Run a task with the model as the caller set it up: in eval mode, with the adapter enabled or disabled."""
        with _quiet():
            from lm_eval import evaluate  # noqa: PLC0415
            from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

            model = HFLM(
                pretrained=trainable.model,
                tokenizer=self.tokenizer,
                backend="causal",
                batch_size=self.batch_size,
                trust_remote_code=False,
            )
            with trainable.autocast():
                tasks = {"tasks": {name: self.tasks["tasks"][name]}}
                results = evaluate(model, tasks, limit=self.examples_per_task, log_samples=False)["results"]
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
    """Return the metrics of base and adapter per task."""
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
    """Suppress the harness's deprecation warnings; errors still propagate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
