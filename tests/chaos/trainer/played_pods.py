"""Pods of one QLoRAJob, whose containers are this process: the trainer's code with their configuration and token."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qlora_api import names
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.v1alpha1 import Progress
from qlora_trainer.errors import RunError
from qlora_trainer.observability.progress import HttpSink, Sinks
from qlora_trainer.prepare import prepare
from qlora_trainer.run import run
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.runtime.termination_message import TerminationMessageWriter
from tests.integration.operator_process import JobNamespace, Operator

PATIENCE: Final = 300.0
"""Seconds that a run may take until its next pod."""


class Watcher:
    """Calls back with each report, and remembers the log."""

    def __init__(self, on_report: Callable[[Progress], object]) -> None:
        self._on_report = on_report
        self.notes: list[str] = []

    def report(self, progress: Progress) -> None:
        self._on_report(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class PlayedPods:
    """The kubelet of a QLoRAJob's pods."""

    namespace: JobNamespace
    operator: Operator
    folder: Path
    name: str
    before: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    """What happens before the pod of a Job starts, by the Job's name."""
    reports: Mapping[str, Callable[[Progress, StopFlag], object]] = field(default_factory=dict)
    """What happens with each report of the pod of a Job."""
    lost: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    """Jobs that are deleted with their pod before its termination message is read, and what happens then."""
    notes: list[str] = field(default_factory=list)
    played: list[str] = field(default_factory=list)

    def play(self) -> dict[str, Any]:
        """Run every pod that appears, until the QLoRAJob is over; return its status."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.namespace.status(self.name)).get("phase") not in names.TERMINAL:
            job = self._next_job()
            if job is not None:
                self.played.append(job)
                self._run(job)
                deadline = time.monotonic() + PATIENCE
            assert time.monotonic() < deadline, status
            time.sleep(0.2)
        return status

    def _next_job(self) -> str | None:
        """Return a Job with a pod that has not started."""
        for pod in self.namespace.items("pods"):
            labels = pod["metadata"]["labels"]
            waiting = pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]
            if labels.get(names.JOB_LABEL) == self.name and waiting:
                return str(labels["batch.kubernetes.io/job-name"])
        return None

    def _run(self, job: str) -> None:
        if job in self.before:
            self.before[job]()
        self.namespace.start_pod(job)
        message = TerminationMessageWriter(self.folder / f"{job}.json")
        try:
            message.write(self._train(job, message) if "-prep" not in job else self._prepare())
            code = 0
        except RunError as error:
            message.write_failure(error)
            code = 1
        if job in self.lost:
            pod = self.namespace.pod_name(job)
            self.namespace.kubectl("delete", "job", job, "--cascade=foreground", "--wait=false")
            self.namespace.kubectl("delete", "pod", pod, "--force", "--grace-period=0", "--ignore-not-found")
            self.lost[job]()
        else:
            self.namespace.end_pod(job, code, (self.folder / f"{job}.json").read_text())

    def _prepare(self) -> TerminationMessage:
        prepared = prepare(PrepareConfig.model_validate_json(self._config("prepare")), work=self.folder / "work")
        reason = Reason.ALREADY_PUBLISHED if prepared.published else Reason.PREPARED
        return TerminationMessage(reason=reason, prepared=prepared)

    def _train(self, job: str, message: TerminationMessageWriter) -> TerminationMessage:
        config, stop = RunConfig.model_validate_json(self._config(job)), StopFlag()
        token = self.folder / "token"
        token.write_text(self.namespace.token(self.namespace.pod_of(job)))
        path = names.progress_path(self.namespace.namespace, self.name)
        http = HttpSink(f"http://127.0.0.1:{self.operator.progress_port}{path}", token)
        watcher = Watcher(lambda progress: job in self.reports and self.reports[job](progress, stop))
        try:
            result = run(config, Sinks((message, http, watcher)), work=self.folder / f"work-{job}", stop=stop)
        finally:
            http.close()
            self.notes += watcher.notes
        assert result is not None
        return TerminationMessage(reason=Reason.PUBLISHED, step=result.steps, result=result)

    def _config(self, job: str) -> str:
        """Return the configuration in the ConfigMap of a Job."""
        name = names.prepare_job_name(self.name) if job == "prepare" else job
        data = self.namespace.cluster.admin.get(f"{self.namespace.path('configmaps')}/{name}")["data"]
        (content,) = (text for key, text in data.items() if key in {names.PREPARE_CONFIG_FILE, names.RUN_CONFIG_FILE})
        assert json.loads(content)["job"] == self.name
        return str(content)
