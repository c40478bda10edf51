"""The trainer as a pod runs it: `python -m qlora_trainer prepare|train|launch --config FILE`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from qlora_api.logs import configure_logs, fields, format_of_process, log_always_with
from qlora_api.names import (
    CONFIG_MOUNT,
    PREPARE_CONFIG_FILE,
    RUN_CONFIG_FILE,
    TERMINATION_MESSAGE_PATH,
    WORK_MOUNT,
    Reason,
)
from qlora_api.report import LastWord
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_trainer.interrupt import EXIT_CODE, StopFlag, explain_end, interrupted
from qlora_trainer.lastword import Farewell
from qlora_trainer.ranks import DONE, is_first_of_pod, path_of_process, rank_of_process
from qlora_trainer.work import default_work

log = logging.getLogger("qlora_trainer")
Config = TypeVar("Config", PrepareConfig, RunConfig)


def main(arguments: list[str] | None = None) -> int:
    """Prepare or train, leave the last word, and return the exit code."""
    options = parse(arguments)
    configure_log()
    configure_libraries(options.work)
    farewell, stop = Farewell(path_of_process(options.termination_message)), StopFlag()
    stop.listen(lambda: farewell.fail(interrupted()))
    try:
        word = COMMANDS[options.command](options, stop, farewell)
    except BaseException as error:
        known = explain_end(error, stopped=stop.requested)
        log.exception("the run failed", extra=fields(reason=known.reason, step=known.step))
        farewell.fail(known)
        return EXIT_CODES.get(known.reason, 1)
    return leave(word, farewell)


def leave(word: LastWord | None, farewell: Farewell) -> int:
    """Leave the last word, where it is not another process's, and return the exit code."""
    if word is None:
        log.info("done: another process has the last word")
        return 0
    farewell.say(word)
    log.info("done", extra=fields(reason=word.reason))
    return EXIT_CODES.get(word.reason, 1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="qlora_trainer", description="Prepare or train one QLoRAJob.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, file in (("prepare", PREPARE_CONFIG_FILE), ("train", RUN_CONFIG_FILE), ("launch", RUN_CONFIG_FILE)):
        command = commands.add_parser(name)
        command.add_argument("--config", type=Path, default=Path(CONFIG_MOUNT, file), help="what to do, as JSON")
        command.add_argument("--work", type=Path, default=pod_work(), help="folder for downloads and results")
        command.add_argument("--termination-message", type=Path, default=Path(TERMINATION_MESSAGE_PATH))
    return parser.parse_args(arguments)


def pod_work() -> Path:
    """Return the pod's writable mount, or a cache folder outside a pod."""
    mount = Path(WORK_MOUNT)
    return mount if mount.is_dir() and os.access(mount, os.W_OK) else default_work()


def configure_log() -> None:
    """Write one JSON object a line to standard output: all that we say, and what libraries warn of."""
    configure_logs(format_of_process(), "warning", sys.stdout)
    log.setLevel(logging.INFO)
    if (rank := rank_of_process()) is not None:
        log_always_with(rank=rank)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read what to do; from now on every line says for which run."""
    config = kind.model_validate_json(path.read_text())
    log_always_with(namespace=config.namespace, job=config.job)
    if isinstance(config, RunConfig):
        log_always_with(attempt=config.attempt)
    return config


def configure_libraries(work: Path) -> None:
    """Keep every library's cache in the writable folder, and its work repeatable; must come before their import."""
    defaults = {
        "HF_HOME": str(work / "huggingface"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # cuBLAS is deterministic only with a workspace of fixed size (torch.use_deterministic_algorithms).
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # How often libgomp's threads look again before they sleep. Alone on two cores 1,000 looks give 622 tokens/s, no
        # look 505 and its own 300,000 (3 ms) 700; beside one busy process, which they starve, 311, 421 and 100
        # (SmolLM2-135M, NF4, 16 rows a pass).
        "GOMP_SPINCOUNT": "1000",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_word(options: argparse.Namespace, _: StopFlag, __: Farewell) -> LastWord:
    """Prepare, and return the facts as the last word."""
    from qlora_trainer.prepare import prepare  # noqa: PLC0415 (after configure_libraries)

    config = read_config(options.config, PrepareConfig)
    prepared = prepare(config, log.info, work=options.work)
    reason = Reason.ALREADY_PUBLISHED if prepared.published else Reason.PREPARED
    return LastWord(reason=reason, message="", prepared=prepared, result=prepared.published)


def train_word(options: argparse.Namespace, stop: StopFlag, farewell: Farewell) -> LastWord | None:
    """Train, and return the result as the last word; another process may have it."""
    config = read_config(options.config, RunConfig)
    from qlora_trainer.distributed import leave_world  # noqa: PLC0415 (as above)
    from qlora_trainer.progress import Heartbeat, HttpSink, LogSink, ProgressSink, Sinks  # noqa: PLC0415 (as above)
    from qlora_trainer.run import run  # noqa: PLC0415 (as above)
    from qlora_trainer.watchdog import watch_run  # noqa: PLC0415 (as above)

    sinks: list[ProgressSink] = [LogSink(), farewell]
    http = HttpSink.from_environment()
    if http is not None:
        sinks.append(http)
    try:
        with served_metrics(), watch_run(config, farewell), Heartbeat(Sinks(sinks)) as sink:
            result = run(config, sink, work=options.work, stop=stop)
    finally:
        if http is not None:
            http.close()
    leave_world()
    if result is None:
        path_of_process(options.termination_message).with_suffix(DONE).touch()  # the launcher looks for it
        return None
    return LastWord(reason=Reason.PUBLISHED, message="", step=result.steps, result=result)


def served_metrics() -> contextlib.AbstractContextManager[None]:
    """Serve metrics from the first process of the pod, which has one port."""
    from qlora_trainer.metrics import serve_metrics  # noqa: PLC0415 (as above)

    return serve_metrics(log.info) if is_first_of_pod() else contextlib.nullcontext()


def launch_word(options: argparse.Namespace, stop: StopFlag, _: Farewell) -> LastWord | None:
    """Let this pod's processes train, and return what explains their end."""
    from qlora_trainer.launch import launch, observe_node  # noqa: PLC0415 (as above)

    config = read_config(options.config, RunConfig)
    return launch(config, observe_node(config.plan, options.config, options.work), stop)


COMMANDS: Final[dict[str, Callable[[argparse.Namespace, StopFlag, Farewell], LastWord | None]]] = {
    "prepare": prepare_word,
    "train": train_word,
    "launch": launch_word,
}
EXIT_CODES: Final = {
    Reason.INTERRUPTED: EXIT_CODE,
    **dict.fromkeys((Reason.PREPARED, Reason.ALREADY_PUBLISHED, Reason.PUBLISHED), 0),
}
"""By the reason of a last word; 1 for all others."""


if __name__ == "__main__":
    sys.exit(main())
