"""The command line as a process, against the real API server and the real operator."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from qlora_api import names
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import OutputStatus, QLoRAJobStatus
from qlora_cli.__main__ import app
from qlora_operator.status.derive import to_wire
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.cluster.programs.binaries import binary
from tests.integration.kubelet import serve_logs
from tests.integration.operator_process import NAME, PREPARE, TRAIN, JobNamespace, Operator, open_job_namespace
from tests.make import (
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    make_manifest,
    make_termination_message,
    message_for,
)

QLORA: Final = Path(sys.executable).with_name("qlora")


@dataclass(frozen=True)
class Shell:
    """A user's shell, in a namespace."""

    kubeconfig: Path
    namespace: str

    def qlora(self, *args: str, stdin: str = "") -> Result:
        """Run a command in this process: the client takes long to import."""
        return CliRunner().invoke(app, [*args, *self._place(args)], input=stdin, catch_exceptions=False)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start a command as a process of its own."""
        # Whatever runs in the background of a script ignores Ctrl-C, and so do its children.
        command = ["env", "--default-signal=INT", QLORA, *args, *self._place(args)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _place(self, args: tuple[str, ...]) -> tuple[str, ...]:
        kubeconfig = () if "--kubeconfig" in args else ("--kubeconfig", str(self.kubeconfig))
        return (*kubeconfig, "--namespace", self.namespace)


@pytest.fixture(scope="module")
def job_namespace(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    """One namespace for all."""
    with open_job_namespace(installed, request.node.name) as job_namespace:
        yield job_namespace


@pytest.fixture(scope="module")
def _operator(
    installed: Cluster, job_namespace: JobNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """An operator that serves the namespace."""
    operator = Operator(installed, tmp_path_factory.mktemp("operator"), job_namespace.namespace).start()
    yield
    operator.stop()


@pytest.fixture
def shell(installed: Cluster, job_namespace: JobNamespace) -> Shell:
    """The shell of somebody who may do everything."""
    return Shell(installed.kubeconfig, job_namespace.namespace)


def manifest(name: str = NAME, **change: Any) -> str:
    """A manifest without a namespace, as text."""
    made = make_manifest(name, **change)
    del made["metadata"]["namespace"]
    return yaml.safe_dump(made)


@pytest.mark.usefixtures("_operator")
def test_commands_of_run(shell: Shell, job_namespace: JobNamespace) -> None:
    submitted = shell.qlora("submit", "-", "--set", "lora.rank=8", stdin=manifest())
    assert (submitted.exit_code, submitted.stdout) == (0, f"QLoRAJob {job_namespace.namespace}/{NAME} was submitted\n")
    again = shell.qlora("submit", "-", stdin=manifest())
    assert (again.exit_code, f"qlora rerun {NAME}" in again.stderr) == (1, True)

    waiting = shell.start("wait", NAME)
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.start_pod(TRAIN)
    job_namespace.wait_for("Training")
    status = shell.qlora("status", NAME)
    assert re.search(r"^support-bot in \S+  Training  attempt 1  \d+s$", status.stdout, re.MULTILINE)
    assert re.search(r"^plan +1 x CPU, single, micro-batch", status.stdout, re.MULTILINE)
    whole = json.loads(shell.qlora("status", NAME, "-o", "json").stdout)
    assert (whole["spec"]["lora"]["rank"], "managedFields" in whole["metadata"]) == (8, False)

    assert shell.qlora("suspend", NAME).exit_code == 0
    rests = shell.qlora("suspend", NAME, "--wait", "--timeout", "30s")
    assert rests.stdout == f"QLoRAJob {job_namespace.namespace}/{NAME} is suspended\n"
    assert shell.qlora("resume", NAME).stdout == f"QLoRAJob {job_namespace.namespace}/{NAME} resumes\n"
    job_namespace.start_pod(f"{NAME}-2")
    job_namespace.wait_for("Training")
    assert shell.qlora("rerun", NAME).stderr.startswith(f"error: {NAME} is Training; wait for its end")
    job_namespace.end_pod(f"{NAME}-2", 0, PUBLISHED_MESSAGE)

    said = waiting.communicate(timeout=60)[1].splitlines()
    assert waiting.returncode == 0
    assert said[-1].startswith(f"{NAME} Succeeded (Published): ")

    finished = shell.qlora("suspend", NAME)
    assert (finished.exit_code, "has succeeded; use qlora rerun" in finished.stderr) == (1, True)
    told = shell.qlora("events", NAME).stdout
    for happened in (r"QLoRAJob support-bot +Training", rf"Job {TRAIN} ", "SuspendedByUser", "Published"):
        assert re.search(happened, told), told
    rerun_a_published_run(shell, job_namespace)


def rerun_a_published_run(shell: Shell, job_namespace: JobNamespace) -> None:
    """The same manifest, with another uid and what was changed."""
    job_namespace.kubectl("label", f"qlorajob/{NAME}", "team=support")
    before = job_namespace.metadata("qlorajobs", NAME)
    anew = shell.qlora("rerun", NAME, "--overwrite")
    assert (anew.exit_code, anew.stdout) == (0, f"QLoRAJob {job_namespace.namespace}/{NAME} was submitted again\n")
    after = job_namespace.cluster.get("qlorajob", NAME, f"--namespace={job_namespace.namespace}")
    assert after["metadata"]["uid"] != before["uid"]
    assert after["metadata"]["labels"] == {"team": "support"}
    assert (after["spec"]["output"]["ifExists"], after["spec"]["lora"]["rank"]) == ("Overwrite", 8)
    job_namespace.wait_for("Preparing")
    assert NAME in shell.qlora("list", "-l", "team=support").stdout


@pytest.mark.usefixtures("_operator")
def test_failed_run_sets_exit_code(shell: Shell, job_namespace: JobNamespace) -> None:
    shell.qlora("submit", "-", stdin=manifest("broken"))
    job_namespace.end_pod("broken-prepare", 1, make_termination_message(Reason.DATASET_INVALID, "no answer"))
    ended = shell.qlora("wait", "broken")
    assert (ended.exit_code, "broken Failed (DatasetInvalid): no answer. What to do: " in ended.stderr) == (3, True)
    assert "broken" in shell.qlora("list", "--phase", "Failed").stdout
    gone = shell.qlora("logs", "broken", "--attempt", "3")
    assert "broken is Failed and has no pods" in gone.stderr


@pytest.mark.usefixtures("_operator")
def test_logs_follow_all_pods(shell: Shell, job_namespace: JobNamespace, tmp_path: Path) -> None:
    shell.qlora("submit", "-", "--set", "resources.nodes=2", stdin=manifest("pair"))
    job_namespace.end_pod("pair-prepare", 0, message_for("pair", PREPARED_MESSAGE))
    pods = [job_namespace.pod_of("pair-1", index) for index in range(2)]
    with serve_logs(job_namespace, "nowhere", tmp_path) as kubelet:
        kubelet.lines.update({pods[0]: ["zero", "first"], pods[1]: ["[other]"]})
        for index in range(2):
            job_namespace.bind_pod("pair-1", index)
            job_namespace.start_pod("pair-1", index)
        assert shell.qlora("logs", "pair", "--tail", "1").stdout == "1-0 | first\n1-1 | [other]\n"
        following = shell.start("logs", "pair", "--follow", "--node", "0")
        wait_until("a reader", lambda: len(kubelet.readers) == 3)
        kubelet.lines[pods[0]].append("second")
        kubelet.ended.update(pods)
        for index in range(2):
            job_namespace.end_pod("pair-1", 0, message_for("pair", PUBLISHED_MESSAGE), index)
        assert following.communicate(timeout=60)[0] == "1-0 | zero\n1-0 | first\n1-0 | second\n"


@pytest.mark.usefixtures("_operator")
def test_wait_timeout_and_interrupt_set_exit_code(shell: Shell, job_namespace: JobNamespace) -> None:
    shell.qlora("submit", "-", stdin=manifest("resting", suspend=True))
    job_namespace.wait_for("Suspended", name="resting")
    assert shell.qlora("wait", "resting", "--timeout", "1s").exit_code == 124
    listed = yaml.safe_load(shell.qlora("list", "-o", "yaml").stdout)
    assert "resting" in [item["metadata"]["name"] for item in listed["items"]]
    with shell.start("wait", "resting") as waiting:
        assert waiting.stderr
        assert waiting.stderr.readline() == "resting Suspended\n"
        waiting.send_signal(signal.SIGINT)
        assert waiting.stderr.read().endswith("stopped; what runs in the cluster keeps running\n")
    assert waiting.returncode == 130


def test_dry_run_is_validated_by_api_server(shell: Shell) -> None:
    checked = shell.qlora("submit", "-", "--dry-run", stdin=manifest("only-checked"))
    assert checked.stdout.endswith("only-checked would be accepted\n")
    assert shell.qlora("status", "only-checked").exit_code == 1


def test_rendered_manifests_match_api_server(shell: Shell, job_namespace: JobNamespace) -> None:
    text = manifest("rendered", resources={"nodes": 2})
    printed = CliRunner().invoke(app, ["render", "-"], input=text, catch_exceptions=False).stdout
    rendered, *children = yaml.safe_load_all(printed)
    stored = json.loads(shell.qlora("submit", "-", "--dry-run", "-o", "json", stdin=text).stdout)
    assert rendered["spec"] == stored["spec"]
    made = job_namespace.cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(children))
    assert made.count("created (server dry run)") == len(children) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("status", "absent"), 'error: qlorajobs.qlora.dev "absent" not found', id="no such run"),
        pytest.param(("list", "--context", "absent"), "error: no cluster is configured: ", id="no such context"),
        pytest.param(("list", "--kubeconfig", "/absent"), "error: no cluster is configured: ", id="no kubeconfig"),
        pytest.param(("wait", "a", "--timeout", "soon"), "Usage: ", id="no duration"),
    ],
)
def test_invalid_manifest_is_explained(shell: Shell, args: tuple[str, ...], message: str) -> None:
    ended = shell.qlora(*args)
    assert ended.exit_code in {1, 2}
    assert ended.stderr.startswith(message)
    assert "Traceback" not in ended.stderr


def test_report_is_read_from_object_store(installed: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = installed.s3.make_bucket("cli-report")
    prefix = f"{names.output_root(f's3://{bucket}', NAME)}/a"
    client = installed.s3.client()
    for name in ("report.html", "report.json", "evaluation.jsonl"):
        client.put_object(Bucket=bucket, Key=f"{NAME}/a/report/{name}", Body=b'{"digest": "a"}')
    client.close()
    output = OutputStatus(digest="a", prefix=prefix, adapter=f"{prefix}/adapter", report=f"{prefix}/report/report.json")
    status = to_wire(QLoRAJobStatus(phase="Succeeded", reason="Published", output=output))
    with open_job_namespace(installed, "cli-report") as job_namespace:
        job_namespace.submit(output={"uri": f"s3://{bucket}"})
        patch = json.dumps({"status": status})
        job_namespace.kubectl("patch", "qlorajob", NAME, "--subresource=status", "--type=merge", f"--patch={patch}")
        shell = Shell(installed.kubeconfig, job_namespace.namespace)
        command = ("report", NAME, "--to", str(tmp_path / "here"), "--no-open")
        for name in installed.s3.environment():
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        refused = shell.qlora(*command, "--s3-endpoint", installed.s3.endpoint)
        assert refused.exit_code == 1
        assert "Unable to locate credentials; boto3 uses the credentials of this machine" in refused.stderr
        for name, value in installed.s3.environment().items():
            monkeypatch.setenv(name, value)
        assert shell.qlora(*command).stdout == f"report  {tmp_path}/here/report.html\n"
        assert json.loads(shell.qlora("report", NAME, "-o", "json").stdout) == {"digest": "a"}
    assert len(list((tmp_path / "here").iterdir())) == 3


def test_missing_namespace_is_reported(installed: Cluster) -> None:
    ended = Shell(installed.kubeconfig, "absent").qlora("submit", "-", stdin=manifest())
    assert ended.stderr == ('error: namespaces "absent" not found; create it with kubectl create namespace absent\n')


def test_unreachable_api_server_is_reported(installed: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(installed.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    ended = Shell(tmp_path / "kubeconfig", "default").qlora("list")
    assert ended.exit_code == 1
    assert ended.stderr.startswith("error: the API server at https://127.0.0.1:9 does not respond: ")
    assert "Connection refused; check the network or VPN" in ended.stderr


def test_missing_permission_is_reported(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> None:
    config = yaml.safe_load(installed.kubeconfig.read_text())
    token = job_namespace.kubectl("create", "token", "default").strip()
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    ended = Shell(tmp_path / "kubeconfig", job_namespace.namespace).qlora("list")
    assert ended.exit_code == 1
    assert "cannot list resource" in ended.stderr
    assert "ask the cluster's administrator for this permission" in ended.stderr


def test_kubectl_plugin_is_found(installed: Cluster, job_namespace: JobNamespace) -> None:
    shell = Shell(installed.kubeconfig, job_namespace.namespace)
    path = f"{QLORA.parent}{os.pathsep}{os.environ['PATH']}"
    called = subprocess.run(
        [binary("kubectl"), "qlora", "list", "--namespace", shell.namespace, "-o", "json"],
        env={"PATH": path, "KUBECONFIG": str(shell.kubeconfig)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(called.stdout)["kind"] == "List"
