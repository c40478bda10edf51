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
from qlora_trainer.evaluation.evaluator import Examination, compare
from qlora_trainer.evaluation.lm_eval_tasks import score_tasks
from qlora_trainer.inference.vllm_limits import check_serving
from qlora_trainer.merge_job import add_merged
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.model.runtime_settings import Choices
from qlora_trainer.observability.progress import ProgressSink, Sinks
from qlora_trainer.observability.progress_tracker import Pace
from qlora_trainer.observability.trackers import copy_board, open_trackers
from qlora_trainer.publishing.model_card import write_card
from qlora_trainer.publishing.publish import WEIGHTS, publish, write_report
from qlora_trainer.publishing.report_builder import Outcome, build_report, build_result
from qlora_trainer.runtime.rank import default_work
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.credentials import Secrets, load_secrets
from qlora_trainer.storage.results import find_final, open_output, point_latest
from qlora_trainer.storage.snapshots import Places
from qlora_trainer.storage.store import Store
from qlora_trainer.training.async_checkpointer import Keeper
from qlora_trainer.training.checkpoint_store import Checkpoints, Witness
from qlora_trainer.training.state import History


@dataclass(frozen=True)
class Desk:
    """What every part of a run works with."""

    config: RunConfig
    world: World
    places: Places
    output: Store
    pace: Pace
    sink: ProgressSink
    work: Path
    stop: StopFlag
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Learned:
    """What the processes found out together."""

    data: stages.Data
    tokenizer: Any
    choices: Choices
    history: History
    base: Examination
    adapter: Examination
    check: stages.LoadingCheck
    checkpoints: Checkpoints
    files: Path
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
    places, sink = Places(config.platform, secrets), sink if world.leads else Sinks(())
    output = open_output(places, config.spec, config.job)
    desk = Desk(config, world, places, output, Pace(sink, config.plan.total_steps), sink, work, stop)
    result = _find_published(desk)
    if result is None:
        learned = _learn(desk, secrets)
        if world.leads:
            result = _publish(desk, learned)
    return add_merged(places, output, config, result, work) if world.leads and result else None


def _find_published(desk: Desk) -> Result | None:
    """Return the result, where somebody published it since it was prepared; one process looks for all of them."""
    digest, prefix = desk.config.prepared.digest, desk.config.prepared.prefix
    if_exists = desk.config.spec.output.if_exists
    found = find_final(desk.output, digest, if_exists, desk.config.uid) if desk.world.leads else None
    published = desk.world.told(found)
    if published is not None and desk.world.leads:
        point_latest(desk.output, digest, prefix)
    return published.result if published else None


def _learn(desk: Desk, secrets: Secrets) -> Learned:
    """Train, and examine base and adapter: the part of a run in which every process takes part."""
    config, world, pace, work = desk.config, desk.world, desk.pace, desk.work
    pace.enter(Phase.TRAINING)
    with world.one_per_node_first():
        data = stages.load_data(desk.output, config, work)
        folder = stages.fetch_model(desk.places, config, work)
        tokenizer = load_tokenizer(folder, config.spec.dataset.chat_template)
        battery = stages.load_battery(desk.places, desk.output, tokenizer, config, work)
    tuned, choices = stages.load_model(config, folder)
    examiner = stages.make_examiner(data, tokenizer, config, choices, battery, world)
    loop = stages.make_training(tuned, data, config, choices, world)
    course = stages.make_course(config, data, choices, world)
    checkpoints = Checkpoints(
        desk.output, course, config.attempt, desk.started, Witness(desk.sink.note, pace.completed)
    )
    start = stages.find_start(checkpoints, world)
    keeper = Keeper(checkpoints, config.spec.checkpoint, desk.sink.note, start.step if start else 0)
    if world.moves_in_step:
        loop.engine.start(start)  # the base is divided as early as can be, before it is examined
    pace.enter(Phase.EVALUATING)
    base = examiner.examine(tuned, adapter=False)
    pace.enter(Phase.TRAINING)
    trackers = open_trackers(config, secrets, work, desk.sink.note) if world.leads else stages.NO_TRACKERS
    history = stages.train(loop, keeper, start, stages.News(pace, trackers), desk.stop)
    pace.enter(Phase.EVALUATING)
    adapter = examiner.examine(tuned)
    check = stages.make_loading_check(tuned, data.held_out, config, choices, folder)
    files = stages.write_trained(loop, tokenizer, config, work)
    return Learned(data, tokenizer, choices, history, base, adapter, check, checkpoints, files)


def _publish(desk: Desk, learned: Learned) -> Result:
    """Write and prove the result and upload it: one process does it, and the others are free to go."""
    config, files = desk.config, learned.files
    desk.pace.enter(Phase.PUBLISHING)
    written = files / WEIGHTS[config.spec.method]
    rows = compare(learned.data.held_out, learned.base, learned.adapter)
    tasks = score_tasks(learned.base.figures, learned.adapter.figures)
    preview = stages.make_preview(learned.data, learned.tokenizer)
    earlier = learned.checkpoints.peak_memory_bytes
    outcome = Outcome(learned.history, rows, tasks, check_serving(written), preview, earlier)
    report = build_report(config, learned.choices, outcome, learned.checkpoints.started_at)
    write_report(report, outcome.rows, files)
    write_card(report, written)
    copy_board(desk.work, config, files)
    stages.prove_loadable(learned.check, files)
    result = build_result(config, report)
    stages.pass_gate(desk.output, config, result, files, learned.checkpoints)
    result = publish(desk.output, config, result, files, datetime.now(UTC))
    learned.checkpoints.clear()
    return result
