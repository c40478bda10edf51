"""What lies in the working folder configures no library: it may be a folder of data that somebody else made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
