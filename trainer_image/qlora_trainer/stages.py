"""The stages of a run, as functions of its configuration and of the results of earlier stages."""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from qlora_api.object_names import ObjectName
from qlora_api.prepared import PinnedTasks
from qlora_api.reasons import Reason
from qlora_api.report import (
    AdapterRecord,
    StepRecord,
    TextSpan,
    ValidationRecord,
)
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.v1alpha1 import Checkpoint
from qlora_trainer.data import shards
from qlora_trainer.data.preview import preview, shown_rows
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.base_evaluation import BaseEvaluationStore, EvaluationFingerprint
from qlora_trainer.evaluation.evaluator import EvaluationResult, Evaluator
from qlora_trainer.evaluation.lm_eval_tasks import BenchmarkSuite, load_benchmarks
from qlora_trainer.model.base_model import (
    TrainableModel,
    attach_lora,
    autocast_to,
    load_base,
    load_text_config,
    packing_is_exact,
    prepare_full_finetune,
)
from qlora_trainer.model.hardware import observe_hardware, peak_memory_bytes, release_cached_memory
from qlora_trainer.model.runtime_settings import RuntimeSettings, check_memory_beside_base, resolve_runtime_settings
from qlora_trainer.observability.progress_tracker import ProgressTracker
from qlora_trainer.observability.trackers import Trackers
from qlora_trainer.publishing.gate import check_gate, describe_rejected, find_violations
from qlora_trainer.publishing.load_check import (
    CHECKED_ROWS,
    LoadingTask,
    load_in_fresh_process,
    mean_loss,
    rows_of_task,
)
from qlora_trainer.publishing.publish import WEIGHTS_FOLDER, AnnounceFn, upload_rejected, write_weights
from qlora_trainer.publishing.stop_tokens import save_stop_tokens
from qlora_trainer.runtime.liveness import LIVENESS
from qlora_trainer.runtime.metrics import METER
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.prepared_inputs import (
    MAX_PREPARED_BYTES,
    check_model,
    check_prepared_file,
    find_inputs,
    find_prepared_file,
)
from qlora_trainer.storage.results import open_output
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver, text_files, weight_files
from qlora_trainer.storage.store import MODEL_FIELD, Store, sha256_of
from qlora_trainer.training.agreement import agree_on_settings, check_same_start
from qlora_trainer.training.async_checkpointer import AsyncCheckpointer
from qlora_trainer.training.checkpoint_store import CheckpointStore, RunFingerprint
from qlora_trainer.training.loop import Schedule, TrainingCallbacks, TrainingLoop, make_loop
from qlora_trainer.training.state import History, TrainingState


@dataclass(frozen=True)
class Data:
    """The token rows that prepare wrote."""

    training: Sequence[TokenRow]
    held_out: Sequence[TokenRow]


def load_data(output: Store, config: RunConfig, work: Path) -> Data:
    """Download the token rows."""
    return Data(
        training=load_rows(output, config, shards.TRAINING, work),
        held_out=load_rows(output, config, shards.EVALUATION, work),
    )


def load_rows(output: Store, config: RunConfig, name: str, work: Path) -> Sequence[TokenRow]:
    """Download one file of token rows; rows are read by index, not held in memory."""
    digest = config.prepared.digest
    inputs = find_inputs(output, config.prepared)
    name = find_prepared_file(inputs, name)
    path = ObjectName(f"{digest}/{name}").below(work / "rows")
    output.download(f"{digest}/{name}", path)
    check_prepared_file(inputs, name, path, config.prepared)
    return shards.open_shard(path)


def make_preview(data: Data, tokenizer: Any) -> tuple[tuple[TextSpan, ...], ...]:
    """Return some training rows, each as spans of labels and spans of other text."""
    return tuple(preview(data.training[index], tokenizer) for index in shown_rows(len(data.training)))


def fetch_model(resolver: SourceResolver, config: RunConfig, work: Path) -> Path:
    """Download the model's files at the commit that prepare checked, and return their folder."""
    snapshot = _resolve_model(resolver, config)
    folder = snapshot.fetch([*text_files(snapshot.files), *weight_files(snapshot.files, MODEL_FIELD)], work)
    if snapshot.etags:  # of a bucket, which may have changed during the download
        snapshot = _resolve_model(resolver, config)
    check_model(find_inputs(open_output(resolver, config.spec, config.job), config.prepared), snapshot, folder)
    return folder


def _resolve_model(resolver: SourceResolver, config: RunConfig) -> Snapshot:
    model = config.prepared.model
    revision = model.commit if model.uri.startswith("hf://") else config.spec.model.revision
    snapshot = resolver.resolve(model.uri, revision, MODEL_FIELD)
    if snapshot.commit != model.commit:
        raise RunError(
            Reason.MODEL_NOT_FOUND,
            f"{MODEL_FIELD.field}: the files at {model.uri} changed since prepare; create the QLoRAJob again",
        )
    return snapshot


def load_model(config: RunConfig, folder: Path, world: World) -> tuple[TrainableModel, RuntimeSettings]:
    """Load the base, attach the adapter or unfreeze all weights, and return the settings with their reasons."""
    spec, plan = config.spec, config.plan
    hardware = observe_hardware(plan.device)
    model = load_text_config(folder)
    settings = resolve_runtime_settings(config, hardware, model)
    settings = agree_on_settings(world, settings, hardware.name)
    is_full = spec.method == "full"
    dtype = torch.float32 if is_full else settings.dtype
    with LIVENESS.paused():  # transformers calls nothing of ours while it reads weights
        base = load_base(folder, spec.quantization, dtype, settings.attention, plan.device)
    # Families that the plan does not know are not sized, and their base takes most of the memory.
    release_cached_memory(plan.device)
    settings = check_memory_beside_base(settings, config, observe_hardware(plan.device), model)
    settings = agree_on_settings(world, settings, hardware.name)
    base.get_input_embeddings().register_forward_hook(lambda *_: LIVENESS.tick())  # called in every forward pass
    with autocast_to(settings.dtype, base.device):
        exact = packing_is_exact(base)
    if settings.packing and not exact:
        settings = settings.without_packing("this architecture carries state from one packed row into the next")
    if settings.gradient_checkpointing and not base.supports_gradient_checkpointing:
        settings = settings.without_gradient_checkpointing("off: this architecture does not support it")
    if is_full:
        return prepare_full_finetune(base, settings), settings
    trainable = attach_lora(base, spec.lora, spec.training.seed, settings)
    check_same_start(world, trainable)
    return trainable, settings


def make_training_loop(
    trainable: TrainableModel, data: Data, config: RunConfig, settings: RuntimeSettings, world: World
) -> TrainingLoop:
    """Return the training loop that the plan describes."""
    schedule = Schedule(config.spec.training, config.plan.micro_batch_size, config.plan.total_steps)
    loop = make_loop(trainable, data.training, schedule, settings, world)
    return replace(loop, held_out=data.held_out)


def make_fingerprint(config: RunConfig, data: Data, settings: RuntimeSettings, world: World) -> RunFingerprint:
    """Return the settings that a checkpoint must match to be resumed from."""
    return RunFingerprint(
        digest=config.prepared.digest,
        total_steps=config.plan.total_steps,
        rows=len(data.training),
        optimizer=settings.optimizer,
        division=f"{world.strategy} x {world.size}" if world.backward_is_collective else "",
    )


NO_TRACKERS: Final = Trackers(None, ())
"""The trackers of processes other than the main one."""


@dataclass(frozen=True)
class TrainingReporter:
    """Reports training progress to metrics, status and trackers."""

    progress: ProgressTracker
    trackers: Trackers

    def resume(self, history: History) -> None:
        """Replay the records of earlier attempts."""
        self.progress.resume(history.steps)
        self.trackers.replay(history.steps, history.validations)

    def on_step(self, record: StepRecord) -> None:
        """Report a finished optimizer step."""
        METER.step(record)
        self.progress.on_step(record)
        self.trackers.log_step(record)

    def on_validation(self, record: ValidationRecord) -> None:
        """Report a validation."""
        METER.validation(record)
        self.trackers.log_validation(record)


def find_resume_state(
    checkpoints: CheckpointStore, world: World, reported: Checkpoint | None = None
) -> TrainingState | None:
    """Return the state to resume from; the main process chooses the checkpoint, and all processes load the same one."""
    latest = checkpoints.load_latest(reported) if world.is_main_process else None
    chosen = world.broadcast((latest.checkpoint_id, latest.digest) if latest else None)
    if latest is not None or chosen is None:
        return latest.state if latest else None
    return checkpoints.load(*chosen)


def train(
    loop: TrainingLoop,
    checkpointer: AsyncCheckpointer,
    start: TrainingState | None,
    reporter: TrainingReporter,
    stop: StopFlag,
) -> History:
    """Train in place, from a checkpoint's state if there is one, and report progress."""
    device = loop.trainable.device  # the closure must not keep the model alive
    METER.start(start.step if start else 0, loop.schedule.total_steps, lambda: peak_memory_bytes(device))
    try:
        if start is not None:
            reporter.resume(start.history)
        callbacks = TrainingCallbacks(
            reporter.on_step,
            reporter.on_validation,
            reporter.progress.on_heartbeat,
            should_checkpoint=checkpointer.should_checkpoint,
            checkpoint=checkpointer.checkpoint,
        )
        history = loop.run(stop, callbacks, start)
    except Exception:
        checkpointer.close()
        raise
    finally:
        reporter.trackers.close()
    reporter.progress.skip_remaining_steps()
    return history


def write_trained_weights(loop: TrainingLoop, tokenizer: Any, config: RunConfig, work: Path) -> Path:
    """Write the trained weights and return their folder; collective if sharded, written by the main process."""
    weights = loop.engine.weights() if loop.world.forward_is_collective else None
    folder = ObjectName(config.prepared.digest).below(work / "results")
    if loop.world.is_main_process:
        record = build_record(config, loop.settings)
        target = write_weights(loop.trainable, tokenizer, record, empty_folder(folder), weights)
        save_stop_tokens(loop.trainable.model, tokenizer, loop.rows, target)
    return folder


def make_evaluator(  # noqa: PLR0913, PLR0917 (all that decides how a model is evaluated)
    data: Data, tokenizer: Any, config: RunConfig, settings: RuntimeSettings, suite: BenchmarkSuite | None, world: World
) -> Evaluator:
    """Return the evaluator, which is the same for base and adapter."""
    micro_batch, spec = config.plan.micro_batch_size, config.spec.evaluation
    return Evaluator(
        data.held_out, tokenizer, spec, micro_batch, packing=settings.packing, world=world, benchmark_suite=suite
    )


def load_benchmark_suite(
    resolver: SourceResolver, output: Store, tokenizer: Any, config: RunConfig, work: Path
) -> BenchmarkSuite | None:
    """Return the public benchmarks of the spec, at the revisions that prepare pinned."""
    spec = config.spec.evaluation
    if not spec.tasks:
        return None
    inputs = find_inputs(output, config.prepared)
    name = find_prepared_file(inputs, shards.TASKS)
    content = output.read(f"{config.prepared.digest}/{name}", MAX_PREPARED_BYTES)
    check_prepared_file(inputs, name, content, config.prepared)
    pinned = ignore_unknown(PinnedTasks, content, name)
    tasks = load_benchmarks(pinned, resolver, work)
    digest = sha256_of(content)
    return BenchmarkSuite(tasks, tokenizer, config.plan.micro_batch_size, spec.task_examples, digest)


def evaluate_base(
    evaluator: Evaluator, trainable: TrainableModel, store: BaseEvaluationStore, checkpoints: CheckpointStore
) -> EvaluationResult:
    """Evaluate the base, as far as no earlier attempt did; the main process reads and writes the results."""
    world = evaluator.world
    trusted = checkpoints.trusted_base_evaluation
    earlier = world.broadcast(store.load(evaluator.rows, trusted) if world.is_main_process else None)
    result = evaluator.evaluate(
        trainable, adapter=False, earlier=earlier, on_part=store.save if world.is_main_process else lambda _: None
    )
    checkpoints.base_evaluation = store.digest
    return result


def make_evaluation_fingerprint(
    config: RunConfig, settings: RuntimeSettings, suite: BenchmarkSuite | None
) -> EvaluationFingerprint:
    """Return what the results of an evaluation depend on."""
    spec, plan, bits = config.spec.evaluation, config.plan, config.spec.quantization.bits
    return EvaluationFingerprint(
        digest=config.prepared.digest,
        generations=spec.generations,
        max_answer_tokens=spec.max_answer_tokens,
        task_examples=spec.task_examples,
        benchmarks=suite.digest if suite else "",
        bits=bits,
        device=plan.device,
        dtype=settings.dtype_name,
        attention=settings.attention,
        packing=settings.packing,
        micro_batch_size=plan.micro_batch_size if bits == 8 else 0,
    )


def build_record(config: RunConfig, settings: RuntimeSettings) -> AdapterRecord:
    """Return the record stored in the adapter's folder."""
    prepared = config.prepared
    return AdapterRecord(
        job=config.job,
        digest=prepared.digest,
        base=prepared.model.uri,
        commit=prepared.model.commit,
        method=config.spec.method,
        quantization=config.spec.quantization,
        dtype=settings.dtype_name,
        attention=settings.attention,
        format=prepared.dataset.format,
        template=config.spec.dataset.template,
        init=config.spec.lora.init,
        parameters=prepared.model.parameters,
    )


def enforce_gate(  # noqa: PLR0913, PLR0917 (what is judged and uploaded, and who is told)
    output: Store,
    config: RunConfig,
    result: Result,
    files: Path,
    checkpoints: CheckpointStore,
    announce: AnnounceFn,
) -> None:
    """Raise GateFailed if the gate rejects the result, after uploading it so that the training is not lost."""
    gate = config.spec.evaluation.gate
    if find_violations(gate, result.evaluation):
        rejected = upload_rejected(output, config, result, files, datetime.now(UTC), announce)
        checkpoints.delete_all()
        check_gate(gate, rejected.evaluation, describe_rejected(rejected))


@dataclass(frozen=True)
class LoadingCheck:
    """What to load in a fresh process, and the loss that it must compute."""

    task: LoadingTask
    expected_loss: float


def make_loading_check(
    trainable: TrainableModel, held_out: Sequence[TokenRow], config: RunConfig, settings: RuntimeSettings, folder: Path
) -> LoadingCheck:
    """Compute the loss on some held-out rows, to compare it with that of the reloaded adapter."""
    rows = held_out[:CHECKED_ROWS]
    task = LoadingTask(
        method=config.spec.method,
        base=str(folder),
        quantization=config.spec.quantization,
        device=config.plan.device,
        dtype=settings.dtype_name,
        attention=settings.attention,
        rows=rows_of_task(rows),
    )
    return LoadingCheck(task, mean_loss(trainable, rows))


def check_loadable(check: LoadingCheck, files: Path) -> None:
    """Load the adapter in a fresh process; the model in this one must be freed first, two may not fit."""
    gc.collect()
    release_cached_memory(check.task.device)
    with LIVENESS.paused():  # the subprocess has a timeout of its own
        load_in_fresh_process(check.task, files / WEIGHTS_FOLDER[check.task.method], check.expected_loss)


def empty_folder(folder: Path) -> Path:
    """Create an empty folder, deleting what an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
