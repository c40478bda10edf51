"""`make bench-plan`: time `qlora plan` on the public configurations of the tests, startup included."""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

CONFIGS: Final = Path(__file__).parents[2] / "tests" / "unit" / "planner" / "configs"
MODELS: Final = 20
ROUNDS: Final = 5
ATTENTION_ONLY: Final = ("mixtral",)
"""Families for which adapters on experts are not sized."""
UNQUANTIZED: Final = ("falcon",)
"""Families whose layers bitsandbytes does not quantize."""


class Timing(NamedTuple):
    """One call of the command."""

    wall: float
    cpu: float


def main() -> int:
    """Print the medians of ROUNDS runs."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = write_jobs(Path(folder))
        command = [sys.executable, "-m", "qlora_cli", "plan", str(jobs), "--hub-mirror", folder, "-o", "json"]
        planning = [time_command(command) for _ in range(ROUNDS)]
    startup = [time_command([sys.executable, "-m", "qlora_cli", "--version"]) for _ in range(ROUNDS)]
    for name, timings in ((f"{MODELS} plans in one call", planning), ("of which startup", startup)):
        wall = statistics.median(timing.wall for timing in timings)
        cpu = statistics.median(timing.cpu for timing in timings)
        print(f"{name}: {wall:.2f} s, {cpu:.2f} s of CPU time")
    return 0


def write_jobs(folder: Path) -> Path:
    """Write a manifest for each configuration, and the configurations in the layout of a hub cache."""
    documents = []
    for config in sorted(CONFIGS.glob("*.json"))[:MODELS]:
        snapshot = folder / f"models--public--{config.stem}" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        shutil.copy(config, snapshot / "config.json")
        documents.append(make_manifest(config.stem))
    path = folder / "jobs.json"
    path.write_text("\n---\n".join(documents))
    return path


def make_manifest(model: str) -> str:
    """Return a QLoRAJob; JSON is YAML."""
    targets = ["q_proj", "v_proj"] if model.startswith(ATTENTION_ONLY) else ["all-linear"]
    unquantized = {"method": "lora", "quantization": {"bits": 16}} if model.startswith(UNQUANTIZED) else {}
    spec = {
        "model": {"uri": f"hf://public/{model}"},
        "dataset": {"uri": "s3://data/train.jsonl"},
        "lora": {"targets": targets},
        "output": {"uri": "s3://adapters/team-a"},
    }
    metadata = {"name": "job"}
    return json.dumps(
        {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": metadata, "spec": spec | unquantized}
    )


def time_command(command: Sequence[str]) -> Timing:
    """Run a command, and time it; raise if it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(time.perf_counter() - started, used)


if __name__ == "__main__":
    sys.exit(main())
