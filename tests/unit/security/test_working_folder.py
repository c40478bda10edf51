"""What lies in the working folder configures no library: it may be a folder of data that somebody else made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IN_PODS_ONLY = {"launcher.py"}
"""Starts Python without -P: in the image PYTHONSAFEPATH=1 does the same, for the workers too."""
LATEX = "from qlora_trainer.publishing import plots; print(plots.mpl.rcParams['text.usetex'])"
SERVER = """
import wandb
from pathlib import Path
from qlora_trainer.observability.trackers import set_up_wandb
set_up_wandb(Path("work"))
settings = wandb.setup().settings
print("evil" in settings.base_url, settings.insecure_disable_ssl)
"""


@pytest.mark.parametrize(
    ("file", "text", "code", "printed"),
    [
        ("matplotlibrc", "text.usetex: True\n", LATEX, "False"),
        (
            "wandb/settings",
            "[default]\nbase_url = https://evil.example\ninsecure_disable_ssl = true\n",
            SERVER,
            "False False",
        ),
    ],
    ids=["matplotlib", "wandb"],
)
def test_file_in_the_working_folder_changes_no_setting(
    tmp_path: Path, file: str, text: str, code: str, printed: str
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "WANDB_SILENT": "true",
            "HOME": str(tmp_path / "work"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip().splitlines()[-1] == printed


def test_module_in_the_working_folder_is_not_imported_by_child_processes() -> None:
    found = {
        path.name
        for folder in ("operator", "trainer_image")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r'sys\.executable,\s*"-m"', path.read_text(encoding="utf-8"))
    }
    assert found == IN_PODS_ONLY
    assert (ROOT / "Dockerfile").read_text(encoding="utf-8").count("PYTHONSAFEPATH=1") == 2
