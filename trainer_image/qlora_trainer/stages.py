"""The stages of a run: each takes values of the contract and returns values."""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from qlora_api.names import Reason
from qlora_api.prepared import PinnedTasks
from qlora_api.report import (
    AdapterRecord,
    HeldOutRecord,
    Piece,
    StepRecord,
)
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Metrics
from qlora_trainer.data import shards
from qlora_trainer.data.preview import preview, shown_rows
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation import evaluator
from qlora_trainer.evaluation.evaluator import Examiner
from qlora_trainer.evaluation.lm_eval_tasks import Battery, load_benchmarks
from qlora_trainer.model.base_model import (
    Tuned,
    computing_in,
    joins_rows_exactly,
    load_base,
    load_text_config,
    tune,
    tune_whole,
)
from qlora_trainer.model.hardware import observe_hardware, peak_memory_bytes, release_cached_memory
from qlora_trainer.model.runtime_settings import Choices, decide
from qlora_trainer.observability.progress_tracker import Pace
from qlora_trainer.observability.trackers import Trackers
from qlora_trainer.publishing.gate import check_gate, describe_rejected, judge
from qlora_trainer.publishing.load_check import CHECKED_ROWS, LoadingTask, load_in_fresh_process, rows_of_task
from qlora_trainer.publishing.publish import WEIGHTS, keep_rejected, write_weights
from qlora_trainer.runtime.liveness import PULSE
from qlora_trainer.runtime.metrics import METER
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.snapshots import Places, text_files, weight_files
from qlora_trainer.storage.store import MODEL, Store
from qlora_trainer.training.async_checkpointer import Keeper
from qlora_trainer.training.checkpoint_store import Checkpoints, Course
from qlora_trainer.training.loop import Loop, Schedule, Watcher, make_loop
from qlora_trainer.training.state import History, TrainingState


@dataclass(frozen=True)
class Data:
    """The token rows that prepare left."""

    training: Sequence[TokenRow]
    held_out: Sequence[TokenRow]


def load_data(output: Store, config: RunConfig, work: Path) -> Data:
    """Bring the token rows onto this computer."""
    return Data(
        training=load_rows(output, config, shards.TRAINING, work),
        held_out=load_rows(output, config, shards.EVALUATION, work),
    )


def load_rows(output: Store, config: RunConfig, name: str, work: Path) -> Sequence[TokenRow]:
    """Bring one file of token rows onto this computer; they are read by number, not held in memory."""
    digest = config.prepared.digest
    path = work / "rows" / digest / name
    output.download(f"{digest}/{name}", path)
    return shards.open_shard(path)


def make_preview(data: Data, tokenizer: Any) -> tuple[tuple[Piece, ...], ...]:
    """Return some training rows, each in pieces that are learned and pieces that are not."""
    return tuple(preview(data.training[number], tokenizer) for number in shown_rows(len(data.training)))


def fetch_model(places: Places, config: RunConfig, work: Path) -> Path:
    """Return the folder with the model's files, at the commit that was checked and no other."""
    model = config.prepared.model
    revision = model.commit if model.uri.startswith("hf://") else config.spec.model.revision
    snapshot = places.resolve(model.uri, revision, MODEL)
    if snapshot.commit != model.commit:
        raise RunError(
            Reason.MODEL_NOT_FOUND,
            f"{MODEL.field}: the files at {model.uri} changed since they were checked; create the QLoRAJob anew",
        )
    return snapshot.fetch([*text_files(snapshot.files), *weight_files(snapshot.files, MODEL)], work)


def load_model(config: RunConfig, folder: Path) -> tuple[Tuned, Choices]:
    """Load the base, make what is trained of it, and say what was chosen and why."""
    spec, plan = config.spec, config.plan
    hardware = observe_hardware(plan.device)
    choices = decide(config, hardware, load_text_config(folder))
    whole = spec.method == "full"
    dtype = torch.float32 if whole else choices.dtype
    with PULSE.resting():  # transformers gives no sign while it reads weights
        base = load_base(folder, spec.quantization, dtype, choices.attention, plan.device)
    base.get_input_embeddings().register_forward_hook(lambda *_: PULSE.beat())  # every pass starts there
    with computing_in(choices.dtype, base.device):
        exact = joins_rows_exactly(base)
    if choices.packing and not exact:
        choices = choices.with_packing_off("this architecture carries state from one joined row into the next")
    if whole:
        return tune_whole(base, choices), choices
    return tune(base, spec.lora, spec.training.seed, choices), choices


def measure(tuned: Tuned, rows: Sequence[TokenRow], config: RunConfig, choices: Choices) -> Metrics:
    """Evaluate what was trained on held-out rows."""
    with tuned.evaluating():
        return evaluator.evaluate(tuned, rows, config.plan.micro_batch_size, packing=choices.packing)


def make_training(tuned: Tuned, data: Data, config: RunConfig, choices: Choices, world: World) -> Loop:
    """Return the training loop that the plan describes."""
    schedule = Schedule(config.spec.training, config.plan.micro_batch_size, config.plan.total_steps)
    loop = make_loop(tuned, data.training, schedule, choices, world)
    return replace(loop, held_out=data.held_out)


def make_course(config: RunConfig, data: Data, choices: Choices, world: World) -> Course:
    """Return what a checkpoint must agree with."""
    return Course(
        digest=config.prepared.digest,
        total_steps=config.plan.total_steps,
        rows=len(data.training),
        optimizer=choices.optimizer,
        division=f"{world.strategy} x {world.size}" if world.learns_in_step else "",
    )


NO_TRACKERS: Final = Trackers(None, ())
"""What a process reports to that does not speak for the run."""


@dataclass(frozen=True)
class News:
    """Who is told how a training goes."""

    pace: Pace
    trackers: Trackers

    def resume(self, history: History) -> None:
        """Start from what an earlier attempt did."""
        self.pace.resume(history.steps)
        self.trackers.replay(history.steps, history.held_out)

    def step(self, record: StepRecord) -> None:
        """Tell of a finished step."""
        METER.step(record)
        self.pace.note(record)
        self.trackers.step(record)

    def held_out(self, record: HeldOutRecord) -> None:
        """Tell of a look at the held-out rows."""
        METER.held_out(record)
        self.trackers.held_out(record)


def find_start(checkpoints: Checkpoints, world: World) -> TrainingState | None:
    """Return the state to go on from: one process chooses, so that all of them go on from the same."""
    found = checkpoints.newest() if world.leads else None
    place = world.told(found.place if found else None)
    if found is not None or place is None:
        return found.state if found else None
    return checkpoints.at(place)


def train(loop: Loop, keeper: Keeper, start: TrainingState | None, news: News, stop: StopFlag) -> History:
    """Train the adapter in place, on from a state if there is one, and tell of it."""
    device = loop.tuned.device  # the model itself must be free to go
    METER.start(start.step if start else 0, loop.schedule.total_steps, lambda: peak_memory_bytes(device))
    try:
        if start is not None:
            news.resume(start.history)
        watcher = Watcher(news.step, news.held_out, news.pace.alive, wants=keeper.wants, keep=keeper.keep)
        history = loop.run(stop, watcher, start)
    except Exception:
        keeper.close()
        raise
    finally:
        news.trackers.close()
    news.pace.finish()
    return history


def write_trained(loop: Loop, tokenizer: Any, config: RunConfig, work: Path) -> Path:
    """Return a folder with the trained weights; only one process writes, but all have parts of what is divided."""
    weights = loop.engine.weights() if loop.world.moves_in_step else None
    folder = work / "results" / config.prepared.digest
    if loop.world.leads:
        write_weights(loop.tuned, tokenizer, build_record(config, loop.choices), empty_folder(folder), weights)
    return folder


def make_examiner(  # noqa: PLR0913, PLR0917 (all that decides what a model is asked)
    data: Data, tokenizer: Any, config: RunConfig, choices: Choices, battery: Battery | None, world: World
) -> Examiner:
    """Return what examines base and adapter alike."""
    micro_batch, spec = config.plan.micro_batch_size, config.spec.evaluation
    return Examiner(data.held_out, tokenizer, spec, micro_batch, packing=choices.packing, world=world, battery=battery)


def load_battery(places: Places, output: Store, tokenizer: Any, config: RunConfig, work: Path) -> Battery | None:
    """Return the public benchmarks that the spec asks for, as prepare found them."""
    spec = config.spec.evaluation
    if not spec.tasks:
        return None
    pinned = PinnedTasks.model_validate_json(output.read(f"{config.prepared.digest}/{shards.TASKS}"))
    tasks = load_benchmarks(pinned, places, work)
    return Battery(tasks, tokenizer, config.plan.micro_batch_size, spec.task_examples)


def build_record(config: RunConfig, choices: Choices) -> AdapterRecord:
    """Return what goes with the adapter wherever it goes."""
    prepared = config.prepared
    return AdapterRecord(
        job=config.job,
        digest=prepared.digest,
        base=prepared.model.uri,
        commit=prepared.model.commit,
        method=config.spec.method,
        quantization=config.spec.quantization,
        dtype=choices.dtype_name,
        attention=choices.attention,
        format=prepared.dataset.format,
        template=config.spec.dataset.template,
        init=config.spec.lora.init,
        parameters=prepared.model.parameters,
    )


def pass_gate(output: Store, config: RunConfig, result: Result, files: Path, checkpoints: Checkpoints) -> None:
    """End the run where the gate refuses its result; no finished work is lost, so it is kept."""
    gate = config.spec.evaluation.gate
    if judge(gate, result.evaluation):
        kept = keep_rejected(output, config, result, files, datetime.now(UTC))
        checkpoints.clear()
        check_gate(gate, kept.evaluation, describe_rejected(kept))


@dataclass(frozen=True)
class LoadingCheck:
    """What a fresh process must find."""

    task: LoadingTask
    expected_loss: float


def make_loading_check(
    tuned: Tuned, held_out: Sequence[TokenRow], config: RunConfig, choices: Choices, folder: Path
) -> LoadingCheck:
    """Note what the adapter does now, so that a fresh process can be held to it."""
    rows = held_out[:CHECKED_ROWS]
    task = LoadingTask(
        method=config.spec.method,
        base=str(folder),
        quantization=config.spec.quantization,
        device=config.plan.device,
        dtype=choices.dtype_name,
        attention=choices.attention,
        rows=rows_of_task(rows),
    )
    return LoadingCheck(task, measure(tuned, rows, config, choices).loss)


def prove_loadable(check: LoadingCheck, files: Path) -> None:
    """Load the adapter in a fresh process; the model in this one must be gone, two may not fit."""
    gc.collect()
    release_cached_memory(check.task.device)
    with PULSE.resting():  # it ends the other process itself where that takes too long
        load_in_fresh_process(check.task, files / WEIGHTS[check.task.method], check.expected_loss)


def empty_folder(folder: Path) -> Path:
    """Return a folder with nothing in it, whatever an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
