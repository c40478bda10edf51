"""A training run from prepared facts to a published adapter."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_api.names import Phase
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.distributed.world import World, join_planned_world
from qlora_trainer.evaluation.base_evaluation import BaseEvaluationStore
from qlora_trainer.evaluation.evaluator import EvaluationResult, compare_rows
from qlora_trainer.evaluation.lm_eval_tasks import compare_task_metrics
from qlora_trainer.inference.vllm_limits import check_vllm_limits
from qlora_trainer.merge_job import add_merged
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.observability.progress import ProgressSink, Sinks
from qlora_trainer.observability.progress_tracker import ProgressTracker
from qlora_trainer.observability.trackers import copy_event_file, open_trackers
from qlora_trainer.publishing.model_card import write_card
from qlora_trainer.publishing.publish import WEIGHTS_FOLDER, publish, write_report
from qlora_trainer.publishing.report_builder import ReportInputs, build_report, build_result
from qlora_trainer.runtime.rank import default_work
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.credentials import Secrets, load_secrets
from qlora_trainer.storage.results import MANIFEST, check_own_uris, find_reusable, open_output, update_latest
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import Store
from qlora_trainer.training.async_checkpointer import AsyncCheckpointer
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore
from qlora_trainer.training.health import describe_skipped
from qlora_trainer.training.state import History


@dataclass(frozen=True)
class RunContext:
    """Dependencies shared by all parts of a run."""

    config: RunConfig
    world: World
    resolver: SourceResolver
    output: Store
    progress: ProgressTracker
    sink: ProgressSink
    work: Path
    stop: StopFlag
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class TrainingOutput:
    """Result of training and evaluation by all processes."""

    data: stages.Data
    tokenizer: Any
    settings: RuntimeSettings
    history: History
    base: EvaluationResult
    adapter: EvaluationResult
    load_check: stages.LoadingCheck
    checkpoints: CheckpointStore
    result_folder: Path
    """Folder with the trained weights, to be published."""


def run(
    config: RunConfig,
    sink: ProgressSink,
    *,
    secrets: Secrets | None = None,
    work: Path | None = None,
    stop: StopFlag | None = None,
) -> Result | None:
    """Fine-tune one adapter, compare it with its base, and publish it; None in all processes but the main one."""
    world, work, stop = join_planned_world(config.plan), work or default_work(), stop or StopFlag()
    secrets = secrets or load_secrets(config.spec, config.namespace)
    resolver, sink = SourceResolver(config.platform, secrets), sink if world.is_main_process else Sinks(())
    output = open_output(resolver, config.spec, config.job)
    context = RunContext(
        config, world, resolver, output, ProgressTracker(sink, config.plan.total_steps), sink, work, stop
    )
    result = _find_published(context)
    if result is None:
        training_output = _train_and_evaluate(context, secrets)
        if world.is_main_process:
            result = _publish(context, training_output)
    return add_merged(resolver, output, config, result, work) if world.is_main_process and result else None


def _find_published(context: RunContext) -> Result | None:
    """Return the result if another run published it since prepare; the main process checks and broadcasts."""
    digest, prefix = context.config.prepared.digest, context.config.prepared.prefix
    if_exists = context.config.spec.output.if_exists
    found = (
        find_reusable(context.output, digest, if_exists, context.config.uid, context.config.prepared.full_digest)
        if context.world.is_main_process
        else None
    )
    published = context.world.broadcast(found)
    if published is not None and context.world.is_main_process:
        update_latest(context.output, digest, prefix)
    return published.result if published else None


def _train_and_evaluate(context: RunContext, secrets: Secrets) -> TrainingOutput:
    """Train, and evaluate base and adapter; called in every process."""
    config, world, progress, work = context.config, context.world, context.progress, context.work
    progress.enter_phase(Phase.TRAINING)
    with world.local_main_process_first():
        data = stages.load_data(context.output, config, work)
        folder = stages.fetch_model(context.resolver, config, work)
        tokenizer = load_tokenizer(folder, config.spec.dataset.chat_template)
        benchmark_suite = stages.load_benchmark_suite(context.resolver, context.output, tokenizer, config, work)
    trainable, settings = stages.load_model(config, folder, world)
    evaluator = stages.make_evaluator(data, tokenizer, config, settings, benchmark_suite, world)
    loop = stages.make_training_loop(trainable, data, config, settings, world)
    fingerprint = stages.make_fingerprint(config, data, settings, world)
    checkpoints = CheckpointStore(
        context.output,
        fingerprint,
        config.attempt,
        context.started,
        CheckpointCallbacks(context.sink.note, progress.on_checkpoint),
    )
    base_store = BaseEvaluationStore(
        context.output, stages.make_evaluation_fingerprint(config, settings, benchmark_suite), context.sink.note
    )
    start = stages.find_resume_state(checkpoints, world, config.checkpoint)
    checkpointer = AsyncCheckpointer(checkpoints, config.spec.checkpoint, context.sink.note, start.step if start else 0)
    if world.forward_is_collective:
        loop.engine.initialize(start)  # shards the base as early as possible, before the first evaluation
    progress.enter_phase(Phase.EVALUATING)
    base = stages.evaluate_base(evaluator, trainable, base_store, checkpoints)
    progress.enter_phase(Phase.TRAINING)
    trackers = open_trackers(config, secrets, work, context.sink.note) if world.is_main_process else stages.NO_TRACKERS
    history = stages.train(loop, checkpointer, start, stages.TrainingReporter(progress, trackers), context.stop)
    for sentence in describe_skipped(history):
        context.sink.note(sentence)
    progress.enter_phase(Phase.EVALUATING)
    adapter = evaluator.evaluate(trainable)
    check = stages.make_loading_check(trainable, data.held_out, config, settings, folder)
    files = stages.write_trained_weights(loop, tokenizer, config, work)
    return TrainingOutput(data, tokenizer, settings, history, base, adapter, check, checkpoints, files)


def _publish(context: RunContext, output: TrainingOutput) -> Result:
    """Write, verify and upload the result; called in the main process only, the others may exit."""
    config, files = context.config, output.result_folder
    context.progress.enter_phase(Phase.PUBLISHING)
    written = files / WEIGHTS_FOLDER[config.spec.method]
    rows = compare_rows(output.data.held_out, output.base, output.adapter)
    tasks = compare_task_metrics(output.base.task_metrics, output.adapter.task_metrics)
    preview = stages.make_preview(output.data, output.tokenizer)
    earlier = output.checkpoints.peak_memory_bytes
    inputs = ReportInputs(output.history, rows, tasks, check_vllm_limits(written), preview, earlier)
    report = build_report(config, output.settings, inputs, output.checkpoints.started_at)
    write_report(report, inputs.rows, files)
    write_card(report, written)
    copy_event_file(context.work, config, files)
    stages.check_loadable(output.load_check, files)
    result = build_result(config, report)
    stages.enforce_gate(context.output, config, result, files, output.checkpoints)
    result = publish(context.output, config, result, files, datetime.now(UTC))
    check_own_uris(context.output, result, f"{config.prepared.digest}/{MANIFEST}")  # if another one was there first
    output.checkpoints.delete_all()
    return result
