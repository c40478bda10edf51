"""Sections of the report: training settings, lineage, and predicted and measured memory."""

from dataclasses import dataclass

from qlora_api.report import RunReport
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import DatasetSpec, LoraSpec, Plan


def make_recipe(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return the settings that determine the adapter, besides model and data."""
    spec, training = report.spec, report.spec.training
    adapter = () if spec.method == "full" else (("Adapter", describe_adapter(spec.lora)),)
    return (
        ("Method", f"{spec.method}, {spec.quantization.bits}-bit base"),
        *adapter,
        ("Learning rate", f"{training.learning_rate:g}, {training.scheduler}, {training.warmup_ratio:.0%} warm-up"),
        ("Global batch", f"{training.global_batch_size} rows, in micro-batches of {report.plan.micro_batch_size}"),
        ("Seed", str(training.seed)),
    )


def describe_adapter(lora: LoraSpec) -> str:
    """Return an adapter's settings in one line."""
    kinds = [kind for kind, chosen in (("DoRA", lora.dora), ("rsLoRA", lora.rslora)) if chosen]
    start = [] if lora.init == "default" else [f"initialized with {lora.init}"]
    full = [f"fully training {', '.join(lora.modules_to_save)}"] if lora.modules_to_save else []
    settings = f"{' '.join([*kinds, 'rank'])} {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}"
    return " ".join([settings, "on", ", ".join(lora.targets), *full, *start])


def make_lineage(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return the lineage of a result, from its base to its output."""
    model, data, prepared = report.prepared.model, report.prepared.dataset, report.prepared
    return (
        ("Base model", model.uri),
        ("Model commit", model.commit),
        ("Architecture", f"{model.architecture}, {model.parameters:,} weights"),
        ("Rows", report.spec.dataset.source_uris),
        ("Held-out rows", describe_split(report.spec.dataset)),
        ("SHA-256 of all rows", data.digest),
        ("Prepared by", f"qlora-operator {prepared.trainer_version}"),
        ("Trained by", f"qlora-operator {report.versions['qlora-operator']}, on {report.choices['device']}"),
        ("Run", describe_run(report)),
        (
            "Started and finished",
            f"{report.started_at:%Y-%m-%d %H:%M:%S} to {report.finished_at:%Y-%m-%d %H:%M:%S} UTC",
        ),
        ("Result", f"{report.digest}, a digest of everything that determines the result; an identical run reuses it"),
        ("Output", f"{prepared.prefix}; its manifest.json has size and SHA-256 of every file"),
    )


def describe_split(dataset: DatasetSpec) -> str:
    """Return where the held-out rows come from."""
    split = dataset.evaluation
    return split.uri or f"{split.fraction:.0%} of them, chosen by a hash of each row"


def describe_run(report: RunReport) -> str:
    """Return the QLoRAJob and the attempt."""
    uid = f", uid {report.run}" if report.run else ""
    return f"{report.namespace}/{report.job}{uid}, attempt {report.attempt}"


@dataclass(frozen=True)
class Amount:
    """Memory of one device, as one bar."""

    label: str
    value: str
    fraction: float
    """Length of the bar, relative to the largest amount, from 0 to 1."""


@dataclass(frozen=True)
class Footprint:
    """Predicted and measured memory, or the measured one alone."""

    amounts: tuple[Amount, ...]
    note: str


def make_footprint(plan: Plan, limit: str, measured: int) -> Footprint:
    """Return predicted and measured memory; `limit` is the memory limit of the pod."""
    predicted = plan.peak_bytes
    largest = max(predicted or 0, measured)
    labeled = [("measured", measured)] if predicted is None else [("predicted", predicted), ("measured", measured)]
    amounts = tuple(Amount(label, format_gib(size, 2), size / largest) for label, size in labeled)
    return Footprint(amounts, f"{_describe_difference(predicted, measured)} {_describe_measure(plan, limit)}")


def _describe_difference(predicted: int | None, measured: int) -> str:
    if predicted is None:
        return "The plan has no prediction: it sizes runs on GPUs, for models whose shape it knows."
    if measured == predicted:
        return "Usage was as predicted."
    side = "lower" if measured < predicted else "higher"
    return f"Usage was {abs(measured - predicted) / predicted:.1%} {side} than predicted."


def _describe_measure(plan: Plan, limit: str) -> str:
    """Say what was measured: the two amounts do not cover quite the same memory."""
    if plan.device == "cpu":
        return (
            f"Measured: peak resident set size of the process, libraries included. The pod's memory limit is {limit}."
        )
    return (
        "Measured: peak memory reserved by torch's allocator on the first GPU. The prediction also includes the CUDA "
        "context and allocator fragmentation; the reasons of the plan list its parts."
    )
