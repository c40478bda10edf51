"""The story of a run, from checked facts to a published adapter."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_api.names import Phase
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.distributed.world import World, join_planned_world
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
from qlora_trainer.storage.results import find_reusable, open_output, update_latest
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import Store
from qlora_trainer.training.async_checkpointer import AsyncCheckpointer
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore
from qlora_trainer.training.state import History


@dataclass(frozen=True)
class RunContext:
    """What every part of a run works with."""

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
    """What the processes found out together."""

    data: stages.Data
    tokenizer: Any
    settings: RuntimeSettings
    history: History
    base: EvaluationResult
    adapter: EvaluationResult
    load_check: stages.LoadingCheck
    checkpoints: CheckpointStore
    result_folder: Path
    """The trained weights, as they will be published."""


def run(
    config: RunConfig,
    sink: ProgressSink,
    *,
    secrets: Secrets | None = None,
    work: Path | None = None,
    stop: StopFlag | None = None,
) -> Result | None:
    """Fine-tune one adapter, compare it with its base, and publish it; None in a process that only helps another."""
    world, work, stop = join_planned_world(config.plan), work or default_work(), stop or StopFlag()
    secrets = secrets or load_secrets(config.spec, config.namespace)
    places, sink = SourceResolver(config.platform, secrets), sink if world.is_main_process else Sinks(())
    output = open_output(places, config.spec, config.job)
    desk = RunContext(config, world, places, output, ProgressTracker(sink, config.plan.total_steps), sink, work, stop)
    result = _find_published(desk)
    if result is None:
        learned = _train_and_evaluate(desk, secrets)
        if world.is_main_process:
            result = _publish(desk, learned)
    return add_merged(places, output, config, result, work) if world.is_main_process and result else None


def _find_published(context: RunContext) -> Result | None:
    """Return the result, where somebody published it since it was prepared; one process looks for all of them."""
    digest, prefix = context.config.prepared.digest, context.config.prepared.prefix
    if_exists = context.config.spec.output.if_exists
    found = (
        find_reusable(context.output, digest, if_exists, context.config.uid) if context.world.is_main_process else None
    )
    published = context.world.broadcast(found)
    if published is not None and context.world.is_main_process:
        update_latest(context.output, digest, prefix)
    return published.result if published else None


def _train_and_evaluate(context: RunContext, secrets: Secrets) -> TrainingOutput:
    """Train, and examine base and adapter: the part of a run in which every process takes part."""
    config, world, pace, work = context.config, context.world, context.progress, context.work
    pace.enter_phase(Phase.TRAINING)
    with world.local_main_process_first():
        data = stages.load_data(context.output, config, work)
        folder = stages.fetch_model(context.resolver, config, work)
        tokenizer = load_tokenizer(folder, config.spec.dataset.chat_template)
        battery = stages.load_benchmark_suite(context.resolver, context.output, tokenizer, config, work)
    tuned, choices = stages.load_model(config, folder)
    examiner = stages.make_evaluator(data, tokenizer, config, choices, battery, world)
    loop = stages.make_training_loop(tuned, data, config, choices, world)
    course = stages.make_fingerprint(config, data, choices, world)
    checkpoints = CheckpointStore(
        context.output,
        course,
        config.attempt,
        context.started,
        CheckpointCallbacks(context.sink.note, pace.on_checkpoint),
    )
    start = stages.find_resume_state(checkpoints, world)
    keeper = AsyncCheckpointer(checkpoints, config.spec.checkpoint, context.sink.note, start.step if start else 0)
    if world.forward_is_collective:
        loop.engine.initialize(start)  # the base is divided as early as can be, before it is examined
    pace.enter_phase(Phase.EVALUATING)
    base = examiner.evaluate(tuned, adapter=False)
    pace.enter_phase(Phase.TRAINING)
    trackers = open_trackers(config, secrets, work, context.sink.note) if world.is_main_process else stages.NO_TRACKERS
    history = stages.train(loop, keeper, start, stages.TrainingReporter(pace, trackers), context.stop)
    pace.enter_phase(Phase.EVALUATING)
    adapter = examiner.evaluate(tuned)
    check = stages.make_loading_check(tuned, data.held_out, config, choices, folder)
    files = stages.write_trained_weights(loop, tokenizer, config, work)
    return TrainingOutput(data, tokenizer, choices, history, base, adapter, check, checkpoints, files)


def _publish(context: RunContext, output: TrainingOutput) -> Result:
    """Write and prove the result and upload it: one process does it, and the others are free to go."""
    config, files = context.config, output.result_folder
    context.progress.enter_phase(Phase.PUBLISHING)
    written = files / WEIGHTS_FOLDER[config.spec.method]
    rows = compare_rows(output.data.held_out, output.base, output.adapter)
    tasks = compare_task_metrics(output.base.task_metrics, output.adapter.task_metrics)
    preview = stages.make_preview(output.data, output.tokenizer)
    earlier = output.checkpoints.peak_memory_bytes
    outcome = ReportInputs(output.history, rows, tasks, check_vllm_limits(written), preview, earlier)
    report = build_report(config, output.settings, outcome, output.checkpoints.started_at)
    write_report(report, outcome.rows, files)
    write_card(report, written)
    copy_event_file(context.work, config, files)
    stages.check_loadable(output.load_check, files)
    result = build_result(config, report)
    stages.enforce_gate(context.output, config, result, files, output.checkpoints)
    result = publish(context.output, config, result, files, datetime.now(UTC))
    output.checkpoints.delete_all()
    return result
