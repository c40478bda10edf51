"""The model card: README.md in the adapter's folder, in the format of the Hugging Face Hub."""

from pathlib import Path
from typing import Final

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api.report import RunReport
from qlora_trainer.publishing.html_report import make_comparison
from qlora_trainer.publishing.report_sections import make_recipe

CARD_FILE: Final = "README.md"
TAGS: Final = {"qlora": ("lora", "qlora"), "lora": ("lora",), "full": ()}
"""Tags on the hub, by method."""


def write_card(report: RunReport, adapter: Path) -> None:
    """Write the card in place of PEFT's empty template."""
    (adapter / CARD_FILE).write_text(render_card(report), encoding="utf-8")


def render_card(report: RunReport) -> str:
    """Return the card; it has no text from the dataset's rows."""
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
        is_full=report.spec.method == "full",
        result_name="fine-tuned model" if report.spec.method == "full" else "adapter",
        base=report.spec.model.uri.removeprefix("hf://"),
        comparison=make_comparison(report),
        recipe=make_recipe(report),
    )


def front_matter(report: RunReport) -> ModelCardData:
    """Return the metadata that the hub indexes; models and datasets that are not on the hub are left out."""
    model, sources = report.spec.model.uri, [source.uri for _, source in report.spec.dataset.sources_by_field]
    names = [uri.removeprefix("hf://datasets/") for uri in sources if uri.startswith("hf://datasets/")]
    return ModelCardData(
        base_model=model.removeprefix("hf://") if model.startswith("hf://") else None,
        library_name="transformers" if report.spec.method == "full" else "peft",
        pipeline_tag="text-generation",
        tags=[*TAGS[report.spec.method], "qlora-operator"],
        datasets=list(dict.fromkeys("/".join(name.split("@")[0].split("/")[:2]) for name in names)) or None,
    )
