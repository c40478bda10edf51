"""The story of a run, from checked facts to a published adapter."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_api.names import Phase
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.architecture import load_tokenizer
from qlora_trainer.benchmarks import score_tasks
from qlora_trainer.card import write_card
from qlora_trainer.checkpoint import Checkpoints
from qlora_trainer.choices import Choices
from qlora_trainer.evaluate import Examination, Examiner, compare
from qlora_trainer.history import History
from qlora_trainer.interrupt import StopFlag
from qlora_trainer.merging import add_merged
from qlora_trainer.model import Tuned
from qlora_trainer.output import find_manifest, open_output, point_latest
from qlora_trainer.pace import Pace
from qlora_trainer.progress import ProgressSink
from qlora_trainer.publish import publish, write_report, write_weights
from qlora_trainer.secrets import Secrets, load_secrets
from qlora_trainer.serving import check_serving
from qlora_trainer.snapshot import Places
from qlora_trainer.store import Store
from qlora_trainer.tracking import copy_board, open_trackers
from qlora_trainer.work import default_work


@dataclass(frozen=True)
class Site:
    """Where a run works, and with which keys."""

    config: RunConfig
    secrets: Secrets
    places: Places
    output: Store
    work: Path


@dataclass(frozen=True)
class Subject:
    """The model that is examined, tuned and published."""

    folder: Path
    """The base's files."""
    tuned: Tuned
    choices: Choices
    tokenizer: Any


@dataclass(frozen=True)
class Findings:
    """What training and evaluations brought."""

    history: History
    base: Examination
    adapter: Examination
    started: datetime
    """Of the first attempt."""
    earlier_peak_bytes: int


def run(
    config: RunConfig,
    sink: ProgressSink,
    *,
    secrets: Secrets | None = None,
    work: Path | None = None,
    stop: StopFlag | None = None,
) -> Result:
    """Fine-tune one adapter, compare it with its base, and publish it."""
    started, stop = datetime.now(UTC), stop or StopFlag()
    site = open_site(config, secrets, work or default_work())
    if (published := find_published(site)) is not None:
        return finish(site, published)
    pace = Pace(sink, config.plan.total_steps)
    pace.enter(Phase.TRAINING)
    data = stages.load_data(site.output, config, site.work)
    subject = load_subject(site)
    examiner = make_examiner(site, subject, data)
    pace.enter(Phase.EVALUATING)
    base = examiner.examine(subject.tuned, adapter=False)
    pace.enter(Phase.TRAINING)
    course = stages.make_course(config, data, subject.choices)
    checkpoints = Checkpoints(site.output, course, config.spec.checkpoint, started, sink.note)
    news = stages.News(pace, open_trackers(config, site.secrets, site.work, sink.note))
    loop = stages.make_training(subject.tuned, data, config, subject.choices)
    history = stages.train(loop, checkpoints, news, stop)
    pace.enter(Phase.EVALUATING)
    adapter = examiner.examine(subject.tuned)
    findings = Findings(history, base, adapter, checkpoints.started_at, checkpoints.peak_memory_bytes)
    check = stages.make_loading_check(subject.tuned, data.held_out, config, subject.choices, subject.folder)
    pace.enter(Phase.PUBLISHING)
    files, result = write_result(site, subject, data, findings)
    del subject, loop
    stages.prove_loadable(check, files)
    stages.pass_gate(site.output, config, result, files, checkpoints)
    result = publish(site.output, config, result, files, datetime.now(UTC))
    checkpoints.clear()
    return finish(site, result)


def open_site(config: RunConfig, secrets: Secrets | None, work: Path) -> Site:
    """Return the places of a run."""
    secrets = secrets or load_secrets(config.spec, config.namespace)
    places = Places(config.platform, secrets)
    return Site(config, secrets, places, open_output(places, config.spec, config.job), work)


def find_published(site: Site) -> Result | None:
    """Return the result if it is complete already, as the newest one of its job."""
    prepared = site.config.prepared
    published = find_manifest(site.output, prepared.digest)
    if published is None:
        return None
    point_latest(site.output, prepared.digest, prepared.prefix)
    return published.result


def load_subject(site: Site) -> Subject:
    """Return the base with what is trained of it, and its tokenizer."""
    folder = stages.fetch_model(site.places, site.config, site.work)
    tuned, choices = stages.load_model(site.config, folder)
    return Subject(folder, tuned, choices, load_tokenizer(folder, site.config.spec.dataset.chat_template))


def make_examiner(site: Site, subject: Subject, data: stages.Data) -> Examiner:
    """Return what examines base and adapter alike, public benchmarks included."""
    battery = stages.load_battery(site.places, site.output, subject.tokenizer, site.config, site.work)
    return stages.make_examiner(data, subject.tokenizer, site.config, subject.choices, battery)


def write_result(site: Site, subject: Subject, data: stages.Data, findings: Findings) -> tuple[Path, Result]:
    """Write all that is published into a folder, and return that with the result in short."""
    config, choices, tokenizer = site.config, subject.choices, subject.tokenizer
    files = stages.empty_folder(site.work / "results" / config.prepared.digest)
    written = write_weights(subject.tuned, tokenizer, stages.build_record(config, choices), files)
    outcome = stages.Outcome(
        history=findings.history,
        rows=compare(data.held_out, findings.base, findings.adapter),
        tasks=score_tasks(findings.base.figures, findings.adapter.figures),
        serving=check_serving(written),
        preview=stages.make_preview(data, tokenizer),
        earlier_peak_bytes=findings.earlier_peak_bytes,
    )
    report = stages.build_report(config, choices, outcome, findings.started)
    write_report(report, outcome.rows, files)
    write_card(report, written)
    copy_board(site.work, config, files)
    return files, stages.build_result(config, report)


def finish(site: Site, result: Result) -> Result:
    """Add the merged model, where one is asked for."""
    return add_merged(site.places, site.output, site.config, result, site.work)
