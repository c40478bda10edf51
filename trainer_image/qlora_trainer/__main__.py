"""Entry point of the trainer's pods: `python -m qlora_trainer prepare|train|launch --config FILE`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from qlora_api.logs.files import PREPARE_ATTEMPT, LogFile
from qlora_api.logs.formatters import (
    bind_process_fields,
    configure_logs,
    format_from_environment,
    handler_for,
    log_fields,
)
from qlora_api.names import CONFIG_MOUNT, PREPARE_CONFIG_FILE, RUN_CONFIG_FILE, TERMINATION_MESSAGE_PATH, WORK_MOUNT
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.tolerant_reader import ignore_unknown
from qlora_trainer.errors import RunError, interrupted_error
from qlora_trainer.observability.log_upload import LogUploader, TeeHandler
from qlora_trainer.runtime.rank import DONE_SUFFIX, default_work, is_local_main_process, per_rank_path, rank_of_process
from qlora_trainer.runtime.shutdown import SIGTERM_EXIT_CODE, StopFlag, as_exit_error
from qlora_trainer.runtime.termination_message import TerminationMessageWriter

log = logging.getLogger("qlora_trainer")
Config = TypeVar("Config", PrepareConfig, RunConfig)
_OVERDUE_UPLOAD_SECONDS: Final = 3.0
"""Longest wait for the last log upload near the end of the grace period: the object store may cause the delay."""


@dataclass(frozen=True)
class ProcessContext:
    """Termination message, stop flag and log upload of this process."""

    termination_message: TerminationMessageWriter
    stop: StopFlag = field(default_factory=StopFlag)
    log_uploader: LogUploader = field(default_factory=LogUploader)

    def on_stop_timeout(self) -> None:
        """Record the interruption when the current work did not stop in time after SIGTERM."""
        self.termination_message.write_failure(interrupted_error())
        self.log_uploader.finish(_OVERDUE_UPLOAD_SECONDS)

    def start_log_upload(self, config: PrepareConfig | RunConfig, file: LogFile) -> None:
        """Start uploading the log to the output."""
        from qlora_trainer.observability.log_object import LogObject  # noqa: PLC0415 (after configure_libraries)

        self.log_uploader.start(LogObject(config, file))


def main(arguments: list[str] | None = None) -> int:
    """Run the command, write the termination message, and return the exit code."""
    options = parse(arguments)
    process = ProcessContext(TerminationMessageWriter(per_rank_path(options.termination_message)))
    configure_log(process)
    configure_libraries(options.work)
    process.stop.install_signal_handlers(process.on_stop_timeout)
    try:
        message = COMMANDS[options.command](options, process)
    except BaseException as error:
        with process.stop.deferred():
            return exit_with_error(as_exit_error(error, stopped=process.stop.requested), process)
    with process.stop.deferred():
        return exit_with_message(message, process, options.termination_message)


def exit_with_error(run_error: RunError, process: ProcessContext) -> int:
    """Report the error that ended the run, and return the exit code; stop requests are deferred."""
    log.exception("the run failed", extra=log_fields(reason=run_error.reason, step=run_error.step))
    process.termination_message.write_failure(run_error)
    if not is_about_output(run_error):
        process.log_uploader.finish()
    return EXIT_CODES.get(run_error.reason, 1)


def is_about_output(error: RunError) -> bool:
    """Return whether the run failed because its output is unusable: uploading the log there would fail as well."""
    from qlora_trainer.storage.store import OUTPUT_FIELD  # noqa: PLC0415 (after configure_libraries)

    return error.message.startswith(OUTPUT_FIELD.field)


def exit_with_message(message: TerminationMessage | None, process: ProcessContext, message_path: Path) -> int:
    """Write the termination message, if this process has one, and return the exit code; stop requests are deferred.

    The log is uploaded first: the launcher terminates the processes of a pod once all of them have reported success.
    """
    if message is None:
        log.info("done; the main process writes the termination message")
        process.log_uploader.finish()
        if rank_of_process() is not None:
            per_rank_path(message_path).with_suffix(DONE_SUFFIX).touch()  # the launcher waits for this file
        return 0
    log.info("done", extra=log_fields(reason=message.reason))
    process.log_uploader.finish()
    process.termination_message.write(message)
    return EXIT_CODES.get(message.reason, 1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="qlora_trainer", description="Prepare or train one QLoRAJob.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, file in (("prepare", PREPARE_CONFIG_FILE), ("train", RUN_CONFIG_FILE), ("launch", RUN_CONFIG_FILE)):
        command = commands.add_parser(name)
        command.add_argument(
            "--config", type=Path, default=Path(CONFIG_MOUNT, file), help="configuration of the run, as JSON"
        )
        command.add_argument("--work", type=Path, default=pod_work(), help="folder for downloads and results")
        command.add_argument("--termination-message", type=Path, default=Path(TERMINATION_MESSAGE_PATH))
    return parser.parse_args(arguments)


def pod_work() -> Path:
    """Return the pod's writable mount, or a cache folder outside a pod."""
    mount = Path(WORK_MOUNT)
    return mount if mount.is_dir() and os.access(mount, os.W_OK) else default_work()


def configure_log(process: ProcessContext) -> None:
    """Log to standard output and to the upload, one JSON object per line: own messages, and warnings of libraries."""
    configure_logs(
        TeeHandler(handler_for(format_from_environment(), sys.stdout), process.log_uploader, process.stop), "warning"
    )
    log.setLevel(logging.INFO)
    if (rank := rank_of_process()) is not None:
        bind_process_fields(rank=rank)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read the configuration, and add the run's name to every later log line."""
    config = ignore_unknown(kind, path.read_text(), path.name)
    bind_process_fields(namespace=config.namespace, job=config.job)
    if isinstance(config, RunConfig):
        bind_process_fields(attempt=config.attempt)
    return config


def configure_libraries(work: Path) -> None:
    """Set the libraries' cache folders and make them deterministic; must run before they are imported."""
    defaults = {
        "HF_HOME": str(work / "huggingface"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # cuBLAS is deterministic only with a workspace of fixed size (torch.use_deterministic_algorithms).
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # Spin count of libgomp's threads before they sleep. On two idle cores 1,000 gives 622 tokens/s, 0 gives 505 and
        # the default of 300,000 (3 ms) gives 700; next to one busy process, which spinning threads starve, 311, 421 and
        # 100 (SmolLM2-135M, NF4, micro-batch of 16 rows).
        "GOMP_SPINCOUNT": "1000",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # A model names kernels, which are programs; where the package `kernels` is installed, transformers downloads them.
    os.environ["USE_HUB_KERNELS"] = "NO"
    home = Path(os.environ.get("HOME", "/"))
    if home.is_relative_to(work):  # a pod's starts empty
        home.mkdir(exist_ok=True)


def run_prepare(options: argparse.Namespace, process: ProcessContext) -> TerminationMessage:
    """Prepare the run, and return its facts as the termination message."""
    from qlora_trainer.prepare import prepare  # noqa: PLC0415 (after configure_libraries)

    config = read_config(options.config, PrepareConfig)
    process.start_log_upload(config, LogFile(PREPARE_ATTEMPT))
    prepared = prepare(config, log.info, work=options.work)
    reason = Reason.ALREADY_PUBLISHED if prepared.published else Reason.PREPARED
    return TerminationMessage(reason=reason, message="", prepared=prepared)


def run_train(options: argparse.Namespace, process: ProcessContext) -> TerminationMessage | None:
    """Train, and return the result as the termination message; None in all processes but the main one."""
    config = read_config(options.config, RunConfig)
    rank = rank_of_process() or 0
    process.start_log_upload(config, LogFile(config.attempt, rank // config.plan.processes_per_node, rank))
    from qlora_trainer.distributed.world import leave_world  # noqa: PLC0415 (as above)
    from qlora_trainer.observability.progress import Heartbeat, HttpSink, LogSink, ProgressSink, Sinks  # noqa: PLC0415 (as above)
    from qlora_trainer.run import run  # noqa: PLC0415 (as above)
    from qlora_trainer.watchdog import run_watchdog  # noqa: PLC0415 (as above)

    sinks: list[ProgressSink] = [LogSink(), process.termination_message, process.log_uploader]
    http = HttpSink.from_environment()
    if http is not None:
        sinks.append(http)
    try:
        watch = run_watchdog(config, process.termination_message, process.log_uploader)
        with metrics_server(), watch, Heartbeat(Sinks(sinks)) as sink:
            result = run(config, sink, work=options.work, stop=process.stop)
    finally:
        if http is not None:
            http.close()
    leave_world()
    if result is None:
        return None
    return TerminationMessage(reason=Reason.PUBLISHED, message="", step=result.steps, result=result)


def metrics_server() -> contextlib.AbstractContextManager[None]:
    """Serve metrics from the local main process: a pod has one metrics port."""
    from qlora_trainer.runtime.metrics import serve_metrics  # noqa: PLC0415 (as above)

    return serve_metrics(log.info) if is_local_main_process() else contextlib.nullcontext()


def run_launch(options: argparse.Namespace, process: ProcessContext) -> TerminationMessage | None:
    """Start this pod's worker processes, and return the termination message that explains how they ended."""
    from qlora_trainer.distributed.launcher import launch_workers, observe_node  # noqa: PLC0415 (as above)

    config = read_config(options.config, RunConfig)
    node = observe_node(config.plan, options.config, options.work)
    process.start_log_upload(config, LogFile(config.attempt, node.index))
    return launch_workers(config, node, process.stop)


COMMANDS: Final[dict[str, Callable[[argparse.Namespace, ProcessContext], TerminationMessage | None]]] = {
    "prepare": run_prepare,
    "train": run_train,
    "launch": run_launch,
}
EXIT_CODES: Final = {
    Reason.INTERRUPTED: SIGTERM_EXIT_CODE,
    **dict.fromkeys((Reason.PREPARED, Reason.ALREADY_PUBLISHED, Reason.PUBLISHED), 0),
}
"""Exit codes by the reason of the termination message; 1 for all others."""


if __name__ == "__main__":
    sys.exit(main())
