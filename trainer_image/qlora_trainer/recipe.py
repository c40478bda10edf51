"""What decided an adapter beside model and data, in words: for the page and for the model card."""

from qlora_api.report import RunReport
from qlora_api.v1alpha1 import LoraSpec


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
