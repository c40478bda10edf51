"""How the operator's process ends: with an exit code, and with a line that says why."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.cluster.host.addresses import free_ports

OPERATOR: Final = ("-m", "qlora_operator")
LEFT_OPEN: Final = """
import sys
from unittest.mock import patch
from qlora_operator import __main__ as operator

async def watch():
    try:
        yield
    finally:
        raise RuntimeError("generator didn't stop after athrow()")

async def run_kopf(*_):
    global left
    left = watch()
    await anext(left)

async def do_nothing(*_):
    pass

with patch.object(operator, "run_kopf", run_kopf), patch.object(operator, "compare_clocks", do_nothing):
    sys.exit(operator.main())
"""
"""An operator whose kopf leaves a watch open when it ends, and the watch raises when it is closed."""
KUBECONFIG: Final = {
    "current-context": "test",
    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    "clusters": [{"name": "test", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "test", "user": {}}],
}


def start(
    kubeconfig: Path, arguments: Sequence[str] = OPERATOR, **environment: str
) -> subprocess.CompletedProcess[str]:
    progress, health = free_ports(2)
    settings = {
        "KUBECONFIG": str(kubeconfig),
        "PATH": os.environ["PATH"],
        "QLORA_TRAINER_IMAGE": "trainer:test",
        "QLORA_PROGRESS_URL": f"http://127.0.0.1:{progress}",
        "QLORA_PROGRESS_PORT": str(progress),
        "QLORA_HEALTH_PORT": str(health),
    }
    command = [sys.executable, *arguments]
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


def test_watch_that_kopf_left_open_is_no_error_of_a_normal_end(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps(KUBECONFIG))
    ended = start(kubeconfig, ("-c", LEFT_OPEN))
    assert (ended.returncode, ended.stderr) == (0, "")
