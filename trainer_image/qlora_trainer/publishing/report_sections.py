"""The memory of a run, as it was predicted and as it was measured."""

from dataclasses import dataclass

from qlora_api.report import RunReport
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import DatasetSpec, LoraSpec, Plan


def make_recipe(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return what decided the adapter beside model and data."""
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
    """Return an adapter's settings in a line."""
    kinds = [kind for kind, chosen in (("DoRA", lora.dora), ("rsLoRA", lora.rslora)) if chosen]
    start = [] if lora.init == "default" else [f"started by {lora.init}"]
    whole = [f"with all of {', '.join(lora.modules_to_save)}"] if lora.modules_to_save else []
    settings = f"{' '.join([*kinds, 'rank'])} {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}"
    return " ".join([settings, "on", ", ".join(lora.targets), *whole, *start])


def make_lineage(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return the parts of a result, from the base to its name."""
    model, data, prepared = report.prepared.model, report.prepared.dataset, report.prepared
    return (
        ("Base model", model.uri),
        ("Its commit", model.commit),
        ("Its kind", f"{model.architecture}, {model.parameters:,} weights"),
        ("Rows", report.spec.dataset.source_uris),
        ("Held-out rows", describe_split(report.spec.dataset)),
        ("SHA-256 of all rows", data.digest),
        ("Prepared by", f"qlora-operator {prepared.trainer_version}"),
        ("Trained by", f"qlora-operator {report.versions['qlora-operator']}, on {report.choices['device']}"),
        ("Run", describe_run(report)),
        ("Began and ended", f"{report.started_at:%Y-%m-%d %H:%M:%S} to {report.finished_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("Result", f"{report.digest}, a name made from all that decides it: the same again is found, not made"),
        ("Its place", f"{prepared.prefix}; manifest.json there has size and SHA-256 of every file"),
    )


def describe_split(dataset: DatasetSpec) -> str:
    """Return where the held-out rows are from."""
    split = dataset.evaluation
    return split.uri or f"{split.fraction:.0%} of them, chosen by a hash of each row"


def describe_run(report: RunReport) -> str:
    """Return which QLoRAJob it was, and which of its attempts."""
    uid = f", uid {report.run}" if report.run else ""
    return f"{report.namespace}/{report.job}{uid}, attempt {report.attempt}"


@dataclass(frozen=True)
class Amount:
    """Memory of one device."""

    label: str
    value: str
    share: float
    """Of the larger one, from 0 to 1: the length of its bar."""


@dataclass(frozen=True)
class Footprint:
    """Both amounts, or the one that is known."""

    amounts: tuple[Amount, ...]
    note: str


def make_footprint(plan: Plan, limit: str, measured: int) -> Footprint:
    """Return what the plan said and what the device had to give; `limit` is a pod's memory."""
    predicted = plan.peak_bytes
    largest = max(predicted or 0, measured)
    named = [("measured", measured)] if predicted is None else [("predicted", predicted), ("measured", measured)]
    amounts = tuple(Amount(label, format_gib(size, 2), size / largest) for label, size in named)
    return Footprint(amounts, f"{_describe_difference(predicted, measured)} {_describe_measure(plan, limit)}")


def _describe_difference(predicted: int | None, measured: int) -> str:
    if predicted is None:
        return "The plan predicts none: it computes sizes for GPUs, and for models whose shape it knows."
    if measured == predicted:
        return "It took what was predicted."
    side = "less" if measured < predicted else "more"
    return f"It took {abs(measured - predicted) / predicted:.1%} {side} than predicted."


def _describe_measure(plan: Plan, limit: str) -> str:
    """Say what was measured: the two amounts are not of quite the same things."""
    if plan.device == "cpu":
        return f"Measured is the most of the process's resident set, libraries included; the pod's memory is {limit}."
    return (
        "Measured is the most that torch's allocator held of the first GPU. The prediction has CUDA's context and a "
        "slack of the allocator as well; its parts are among the plan's reasons."
    )
