"""How the operator's process ends: with an exit code, and with a line that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.host.addresses import free_ports


def start(kubeconfig: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    progress, health = free_ports(2)
    settings = {
        "KUBECONFIG": str(kubeconfig),
        "PATH": os.environ["PATH"],
        "QLORA_TRAINER_IMAGE": "trainer:test",
        "QLORA_PROGRESS_URL": f"http://127.0.0.1:{progress}",
        "QLORA_PROGRESS_PORT": str(progress),
        "QLORA_HEALTH_PORT": str(health),
    }
    command = [sys.executable, "-m", "qlora_operator"]
    return subprocess.run(command, env=settings | environment, capture_output=True, text=True, check=False, timeout=60)


def test_invalid_setting_is_named(tmp_path: Path) -> None:
    ended = start(tmp_path / "absent", QLORA_HEALTH_PORT="high")
    assert ended.returncode == 2
    assert ended.stderr == "QLORA_HEALTH_PORT is 'high': write a number from 1 to 65535\n"


def test_fatal_error_is_last_log_line(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text("current-context: nowhere\n")
    ended = start(kubeconfig)
    assert ended.returncode == 1
    last = [json.loads(line) for line in ended.stderr.splitlines()][-1]
    assert (last["level"], last["logger"]) == ("error", "qlora_operator")
    assert last["message"].startswith("fatal error, exiting: ")
    assert "Traceback" in last["exception"]
