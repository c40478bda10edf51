"""`make bench-short-answers`: runs on tiny datasets with answers of 1 to 3 words, in bf16; each must be published.

With so few labels the check that a published adapter loads averages over a dozen tokens: whatever differs between the
process that trained and the one that loads shows there.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from qlora_trainer.__main__ import configure_libraries
from qlora_trainer.runtime.rank import default_work

configure_libraries(default_work())  # as a pod does, before the libraries are imported

from qlora_trainer import stages  # noqa: E402
from qlora_trainer.errors import RunError  # noqa: E402
from qlora_trainer.model.hardware import Hardware, observe_hardware  # noqa: E402
from qlora_trainer.prepare import prepare  # noqa: E402
from qlora_trainer.publishing import load_check  # noqa: E402
from qlora_trainer.run import run  # noqa: E402
from tests.unit.trainer.tiny import (  # noqa: E402
    COLORS,
    RecordingSink,
    make_spec,
    prepare_config,
    run_config,
    write_model,
    write_rows,
)

DATASETS: Final = 40
SEEDS: Final = 8
ROWS: Final = 20
BITS: Final = (4, 8, 16)


def main() -> int:
    """Print how many runs were published, and why the others were not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--datasets", type=int, default=DATASETS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    stages.observe_hardware = with_bf16
    stages.load_in_fresh_process = load_in_this_process
    failures, runs = [], options.datasets * options.seeds
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model")
        for dataset in range(options.datasets):
            for seed in range(options.seeds):
                failures += publish(Path(name), dataset, seed)
                print(f"{dataset * options.seeds + seed + 1} of {runs} runs, {len(failures)} not published", flush=True)
    print("\n".join(failures))
    return bool(failures)


def publish(folder: Path, dataset: int, seed: int) -> Iterator[str]:
    """Run a job to the end, and yield why it was not published."""
    work = folder / f"{dataset}-{seed}"
    bits = BITS[dataset % len(BITS)]
    spec = make_spec(
        f"file://{folder / 'model'}",
        write_rows(folder / f"{dataset}.jsonl", make_rows(dataset)),
        f"file://{work / 'output'}",
        method="lora" if bits == 16 else "qlora",
        quantization={"bits": bits},
        training={"seed": seed},
        evaluation={"generations": 0},
    )
    try:
        run(run_config(spec, prepare(prepare_config(spec), work=work), total_steps=2), RecordingSink(), work=work)
    except RunError as error:
        yield f"dataset {dataset}, seed {seed}, {bits} bits: {error.reason}: {error.message}"


def make_rows(dataset: int) -> list[dict[str, str]]:
    """Return rows whose answers have one to three words."""
    chosen = random.Random(dataset)  # noqa: S311 (no secret)
    return [
        {
            "instruction": f"What colors has number {number} of {dataset}?",
            "output": " ".join(chosen.choices(COLORS, k=1 + (number + dataset) % 3)),
        }
        for number in range(ROWS)
    ]


def with_bf16(_device: str) -> Hardware:
    """Return this machine's hardware as if its CPU had bf16: slower without it, and the same numbers."""
    return replace(observe_hardware("cpu"), native_bf16=True)


def load_in_this_process(task: load_check.LoadingTask, adapter: Path, expected_loss: float) -> None:
    """Load and compare as the fresh process does, without the seconds in which that imports torch."""
    load_check.compare_losses(load_check.compute_loss(task, adapter), expected_loss)


if __name__ == "__main__":
    os._exit(main())
