"""Our trainer with the recipe's settings: the stages of a run, without evaluation and publishing."""

import tempfile
from pathlib import Path

from qlora_trainer.__main__ import configure_libraries
from qlora_trainer.runtime.rank import default_work

configure_libraries(default_work())  # as a pod does, before the libraries are imported

from benchmarks.trainer import task  # noqa: E402
from benchmarks.trainer.contenders.command import ContenderOptions, parse_options  # noqa: E402
from benchmarks.trainer.exam import make_evaluation  # noqa: E402
from benchmarks.trainer.measurement import Stopwatch  # noqa: E402
from benchmarks.trainer.ready import prepare_run  # noqa: E402
from qlora_api.report import StepRecord  # noqa: E402
from qlora_api.v1alpha1 import QLoRAJobSpec  # noqa: E402
from qlora_trainer.data.batching import sample_step  # noqa: E402
from qlora_trainer.model.architecture import load_tokenizer  # noqa: E402
from qlora_trainer.runtime.shutdown import StopFlag  # noqa: E402
from qlora_trainer.training.loop import TrainingCallbacks  # noqa: E402


def main(options: ContenderOptions, work: Path) -> None:
    """Train and measure."""
    ready = prepare_run(write_spec(options, work), work)
    stopwatch = Stopwatch("ours", options.task.device, options.every)
    stopwatch.evaluate = make_evaluation(options.task, ready.trainable.wrapped, load_tokenizer(ready.folder, None))

    def on_step(record: StepRecord) -> None:
        indices = sample_step(record.step - 1, len(ready.data.training), task.GLOBAL_BATCH, task.SEED)
        rows = [ready.data.training[index] for index in indices]
        stopwatch.end_step([(len(row.input_ids), row.label_count) for row in rows])

    ready.trainable.wrapped.train()
    stopwatch.start()
    ready.loop.run(
        StopFlag(), TrainingCallbacks(on_step, lambda _: None, lambda: None, lambda *_: False, lambda *_: None)
    )
    stopwatch.measurement.write(options.output)


def write_spec(options: ContenderOptions, work: Path) -> QLoRAJobSpec:
    """Return the recipe's settings as a manifest's spec, with the rows as files."""
    rows, held_out = work / "train.jsonl", work / "heldout.jsonl"
    task.write_pairs(task.training_pairs(options.task), rows)
    task.write_pairs(task.held_out_pairs(options.task) or task.training_pairs(options.task)[:1], held_out)
    return QLoRAJobSpec.model_validate(
        {
            "model": {"uri": Path(options.task.model).as_uri()},
            "dataset": {"uri": rows.as_uri(), "evaluation": {"uri": held_out.as_uri()}},
            "lora": {"rank": task.RANK, "alpha": task.ALPHA, "dropout": task.DROPOUT, "targets": task.TARGETS},
            "training": {
                "maxSteps": options.steps,
                "epochs": 1000,
                "globalBatchSize": task.GLOBAL_BATCH,
                "learningRate": task.LEARNING_RATE,
                "scheduler": "constant",
                "warmupRatio": 0,
                "maxLength": options.task.max_length,
                "seed": task.SEED,
            },
            "resources": {"gpusPerNode": int(options.task.device == "cuda")},
            "output": {"uri": (work / "output").as_uri()},
        }
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        main(parse_options(), Path(folder))
