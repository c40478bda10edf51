"""The story of a run, from checked facts to a published adapter."""

from datetime import UTC, datetime
from pathlib import Path

from qlora_api.names import Phase
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.architecture import load_tokenizer
from qlora_trainer.benchmarks import score_tasks
from qlora_trainer.card import write_card
from qlora_trainer.checkpoint import Checkpoints
from qlora_trainer.evaluate import compare
from qlora_trainer.interrupt import StopFlag
from qlora_trainer.merging import add_merged
from qlora_trainer.output import find_manifest, open_output, point_latest
from qlora_trainer.pace import Pace
from qlora_trainer.progress import ProgressSink
from qlora_trainer.publish import publish, write_report, write_weights
from qlora_trainer.secrets import Secrets, load_secrets
from qlora_trainer.serving import check_serving
from qlora_trainer.snapshot import Places
from qlora_trainer.tracking import copy_board, open_trackers
from qlora_trainer.work import default_work


def run(
    config: RunConfig,
    sink: ProgressSink,
    *,
    secrets: Secrets | None = None,
    work: Path | None = None,
    stop: StopFlag | None = None,
) -> Result:
    """Fine-tune one adapter, compare it with its base, and publish it."""
    started, work, stop = datetime.now(UTC), work or default_work(), stop or StopFlag()
    secrets = secrets or load_secrets(config.spec, config.namespace)
    places = Places(config.platform, secrets)
    output = open_output(places, config.spec, config.job)
    if (published := find_manifest(output, config.prepared.digest)) is not None:
        point_latest(output, config.prepared.digest, config.prepared.prefix)
        return add_merged(places, output, config, published.result, work)
    pace = Pace(sink, config.plan.total_steps)
    pace.enter(Phase.TRAINING)
    data = stages.load_data(output, config, work)
    folder = stages.fetch_model(places, config, work)
    tuned, choices = stages.load_model(config, folder)
    tokenizer = load_tokenizer(folder, config.spec.dataset.chat_template)
    battery = stages.load_battery(places, output, tokenizer, config, work)
    examiner = stages.make_examiner(data, tokenizer, config, choices, battery)
    pace.enter(Phase.EVALUATING)
    base = examiner.examine(tuned, adapter=False)
    pace.enter(Phase.TRAINING)
    course = stages.make_course(config, data, choices)
    checkpoints = Checkpoints(output, course, config.spec.checkpoint, started, sink.note)
    news = stages.News(pace, open_trackers(config, secrets, work, sink.note))
    history = stages.train(stages.make_training(tuned, data, config, choices), checkpoints, news, stop)
    pace.enter(Phase.EVALUATING)
    adapter = examiner.examine(tuned)
    check = stages.make_loading_check(tuned, data.held_out, config, choices, folder)
    pace.enter(Phase.PUBLISHING)
    files = stages.empty_folder(work / "results" / config.prepared.digest)
    written = write_weights(tuned, tokenizer, stages.build_record(config, choices), files)
    rows, tasks = compare(data.held_out, base, adapter), score_tasks(base.figures, adapter.figures)
    outcome = stages.Outcome(history, rows, tasks, check_serving(written), stages.make_preview(data, tokenizer))
    report = stages.build_report(config, choices, outcome, checkpoints.started_at)
    write_report(report, outcome.rows, files)
    write_card(report, written)
    copy_board(work, config, files)
    del tuned
    stages.prove_loadable(check, files)
    result = stages.build_result(config, report)
    stages.pass_gate(output, config, result, files, checkpoints)
    result = publish(output, config, result, files, datetime.now(UTC))
    checkpoints.clear()
    return add_merged(places, output, config, result, work)
