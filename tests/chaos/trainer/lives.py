"""Training processes that tests stop and kill, forked from a server that has imported everything."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import torch

from qlora_api.names import Phase
from qlora_api.report import ResultManifest, TerminationMessage
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.__main__ import main
from qlora_trainer.prepare import prepare
from qlora_trainer.runtime import shutdown
from tests.cluster.services.s3 import S3
from tests.unit.trainer.tiny import prepare_config, run_config, write_job

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STEPS: Final = 8
INTERVAL: Final = 2
"""Steps between two checkpoints."""
JOB: Final = "colours"
ADAPTER: Final = "adapter/adapter_model.safetensors"
PATIENCE: Final = 300
"""Timeout in seconds of a process that is not stopped."""


def run_process(config: RunConfig, folder: Path, environment: Mapping[str, str], stop_timeout: float) -> None:
    """Run the process of a training pod."""
    with Path(folder, "log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    # The load check starts a fresh process each time; tests/unit/trainer/test_run.py covers it.
    patch.object(stages, "load_in_fresh_process", lambda *_: None).start()
    patch.object(shutdown, "_STOP_TIMEOUT_SECONDS", stop_timeout).start()
    (folder / "run.json").write_text(config.model_dump_json(by_alias=True))
    paths = {"config": folder / "run.json", "work": folder / "work", "termination-message": folder / "message.json"}
    sys.exit(main(["train", *(f"--{name}={path}" for name, path in paths.items())]))


CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class TrainerProcess:
    """The process of one attempt."""

    process: Any
    folder: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log lines."""
        log = self.folder / "log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    @property
    def progress(self) -> list[dict[str, Any]]:
        """Its progress reports."""
        return [line for line in self.lines if line["message"] == "progress"]

    @property
    def step(self) -> int:
        """The last finished step, of this or an earlier attempt."""
        return max((line["step"] for line in self.progress), default=0)

    @property
    def resumed(self) -> int:
        """The step of the checkpoint that it resumed from."""
        messages = [line["message"] for line in self.lines if line["message"].startswith("resumed from step")]
        return int(messages[0].split()[3].rstrip(",")) if messages else 0

    @property
    def phase(self) -> str:
        """The last reported phase; Pending before the first report."""
        return str(self.progress[-1]["phase"]) if self.progress else Phase.PENDING

    @property
    def termination_message(self) -> TerminationMessage | None:
        """Its termination message; None if it wrote none."""
        path = self.folder / "message.json"
        return TerminationMessage.model_validate_json(path.read_text()) if path.exists() else None

    def wait_until(self, condition: Callable[["TrainerProcess"], bool]) -> None:
        """Wait until a condition holds, or the process has exited."""
        deadline = time.monotonic() + PATIENCE
        while self.process.is_alive() and not condition(self):
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.02)

    def wait_for_exit(self, seconds: float = PATIENCE) -> int:
        """Wait for the process, and return its exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, (self.folder / "log").read_text()[-3000:]
        return int(self.process.exitcode)


class TrainerRun:
    """A run with its own output, and its attempts."""

    def __init__(self, config: RunConfig, s3: S3, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.attempts = 0
        self._s3 = s3

    def start(self, stop_timeout: float = 50.0, endpoint: str | None = None) -> TrainerProcess:
        """Start the next attempt."""
        self.attempts += 1
        folder = self.folder / f"attempt-{self.attempts}"
        folder.mkdir(parents=True)
        environment = self._s3.environment() | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})
        config = self.config.model_copy(update={"attempt": self.attempts})
        process = CONTEXT.Process(target=run_process, args=(config, folder, environment, stop_timeout))
        process.start()
        return TrainerProcess(process, folder)

    @property
    def prefix(self) -> tuple[str, str]:
        """Bucket and key of the result's folder."""
        bucket, _, key = self.config.prepared.prefix.removeprefix("s3://").partition("/")
        return bucket, key

    @cached_property
    def _client(self) -> "S3Client":
        return self._s3.client()

    def read(self, path: str) -> bytes:
        """Read an object of the result with a plain S3 client."""
        bucket, key = self.prefix
        return self._client.get_object(Bucket=bucket, Key=f"{key}/{path}")["Body"].read()

    def paths(self) -> list[str]:
        """List the objects of the result."""
        bucket, key = self.prefix
        found = self._client.list_objects_v2(Bucket=bucket, Prefix=f"{key}/").get("Contents", [])
        return [entry["Key"].removeprefix(f"{key}/") for entry in found]

    def uploaded_log(self, attempt: int, rank: int = 0) -> list[dict[str, Any]]:
        """Return the uploaded log lines of a process; each rank is on its own node."""
        bucket, key = self.prefix
        folder = f"{key.rpartition('/')[0]}/logs/"
        name = f"{folder}attempt-{attempt}-node-{rank}-rank-{rank}.jsonl"
        listed = self._client.list_objects_v2(Bucket=bucket, Prefix=folder).get("Contents", [])
        if name not in [entry["Key"] for entry in listed]:
            return []
        return [
            json.loads(line) for line in self._client.get_object(Bucket=bucket, Key=name)["Body"].read().splitlines()
        ]

    def verified_adapter(self) -> str:
        """Compare every file with the manifest, and return the SHA-256 of the adapter."""
        manifest = ResultManifest.model_validate_json(self.read("manifest.json"))
        for file in manifest.files:
            assert hashlib.sha256(self.read(file.path)).hexdigest() == file.sha256, file.path
        return next(file.sha256 for file in manifest.files if file.path.endswith(ADAPTER))


class TrainerRuns:
    """Makes runs of one prepared job, each with its own output."""

    def __init__(self, s3: S3, folder: Path) -> None:
        self._s3, self._folder = s3, folder
        self._number = 0
        self.bucket = s3.make_bucket("adapters")
        spec = write_job(
            folder,
            training={"epochs": STEPS, "globalBatchSize": 32},
            evaluation={"generations": 0},
            checkpoint={"steps": INTERVAL},
            deadlines={"heartbeat": "5m"},
            tracking={"tensorboard": False},
        )
        spec = spec.model_copy(
            update={"output": spec.output.model_copy(update={"uri": f"s3://{self.bucket}/prepared"})}
        )
        prepared = prepare(prepare_config(spec), work=folder / "work")
        self._config = run_config(spec, prepared, total_steps=STEPS, micro_batch_size=4, gradient_accumulation=8)

    def make(self) -> TrainerRun:
        """Return a new run."""
        self._number += 1
        output = self._config.spec.output.model_copy(update={"uri": f"s3://{self.bucket}/run-{self._number}"})
        prefix = f"{output.uri}/{JOB}/{self._config.prepared.digest}"
        config = self._config.model_copy(
            update={
                "spec": self._config.spec.model_copy(update={"output": output}),
                "prepared": self._config.prepared.model_copy(update={"prefix": prefix}),
            }
        )
        run = TrainerRun(config, self._s3, self._folder / f"run-{self._number}")
        self._copy_prepared(run)
        return run

    def _copy_prepared(self, run: TrainerRun) -> None:
        client, source = self._s3.client(), self._config.prepared.prefix.removeprefix(f"s3://{self.bucket}/")
        for entry in client.list_objects_v2(Bucket=self.bucket, Prefix=f"{source}/")["Contents"]:
            target = entry["Key"].replace(source, run.prefix[1])
            client.copy_object(Bucket=self.bucket, Key=target, CopySource={"Bucket": self.bucket, "Key": entry["Key"]})
