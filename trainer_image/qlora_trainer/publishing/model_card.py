"""The model card: README.md beside the adapter, in the hub's format."""

from pathlib import Path
from typing import Final

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api.report import RunReport
from qlora_trainer.publishing.html_report import make_comparison
from qlora_trainer.publishing.report_sections import make_recipe

CARD_FILE: Final = "README.md"
TAGS: Final = {"qlora": ("lora", "qlora"), "lora": ("lora",), "full": ()}
"""What the hub is told about a method."""


def write_card(report: RunReport, adapter: Path) -> None:
    """Write the card; PEFT's own says nothing."""
    (adapter / CARD_FILE).write_text(render_card(report), encoding="utf-8")


def render_card(report: RunReport) -> str:
    """Return the card; nothing in it comes from the rows themselves."""
    environment = Environment(  # noqa: S701 (Markdown, and no text of a dataset)
        loader=PackageLoader("qlora_trainer"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(report).to_yaml(),
        report=report,
        whole=report.spec.method == "full",
        tuned="tuned model" if report.spec.method == "full" else "adapter",
        base=report.spec.model.uri.removeprefix("hf://"),
        comparison=make_comparison(report),
        recipe=make_recipe(report),
    )


def front_matter(report: RunReport) -> ModelCardData:
    """Return what the hub indexes; it knows models and datasets by their names on the hub only."""
    model, sources = report.spec.model.uri, [source.uri for _, source in report.spec.dataset.sources_by_field]
    names = [uri.removeprefix("hf://datasets/") for uri in sources if uri.startswith("hf://datasets/")]
    return ModelCardData(
        base_model=model.removeprefix("hf://") if model.startswith("hf://") else None,
        library_name="transformers" if report.spec.method == "full" else "peft",
        pipeline_tag="text-generation",
        tags=[*TAGS[report.spec.method], "qlora-operator"],
        datasets=list(dict.fromkeys("/".join(name.split("@")[0].split("/")[:2]) for name in names)) or None,
    )
