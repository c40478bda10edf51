"""Where a result comes from: enough to find every part of it again."""

from qlora_api.report import RunReport
from qlora_api.v1alpha1 import DatasetSpec


def make_lineage(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return the parts of a result, from the base to its name."""
    model, data, prepared = report.prepared.model, report.prepared.dataset, report.prepared
    return (
        ("Base model", model.uri),
        ("Its commit", model.commit),
        ("Its kind", f"{model.architecture}, {model.parameters:,} weights"),
        ("Rows", report.spec.dataset.origin),
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
