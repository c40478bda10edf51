"""The model card: README.md in the adapter's folder, in the format of the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qlora_api.escapes import escape_line, escape_text, shell_command
from qlora_api.report import RunReport
from qlora_api.significance import describe_small_validation
from qlora_trainer.publishing.html_report import make_comparison
from qlora_trainer.publishing.report_sections import make_recipe

CARD_FILE: Final = "README.md"
TAGS: Final = {"qlora": ("lora", "qlora"), "lora": ("lora",), "full": ()}
"""Tags on the hub, by method."""
LOADABLE: Final = ("hf://", "file://")
"""Bases that peft and vLLM find by the name that is left without the scheme; others have to be downloaded."""
BASE_FOLDER: Final = "path/of/the/base"
_MARKDOWN: Final = re.compile(r"[\\`*\[\]<>|&@:~$]|(?<=www)\.", re.IGNORECASE)
"""What starts a link, an image, HTML, a table cell or a style in GitHub's Markdown; bare addresses are links too."""


def write_card(report: RunReport, adapter: Path) -> None:
    """Write the card in place of PEFT's empty template."""
    (adapter / CARD_FILE).write_text(render_card(report), encoding="utf-8")


def render_card(report: RunReport) -> str:
    """Return the card; it has no text from the dataset's rows, and other text of others is shown as it is."""
    environment = Environment(  # noqa: S701 (Markdown, which `finalize` escapes)
        loader=PackageLoader("qlora_trainer"),
        finalize=to_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": to_code, "code_block": to_code_block}
    uri, serving = report.spec.model.uri, report.serving
    base = uri.removeprefix("hf://")
    loadable = base.removeprefix("file://") if uri.startswith(LOADABLE) else BASE_FOLDER
    return environment.get_template("card.md.j2").render(
        front_matter=Markup(front_matter(report).to_yaml()),  # noqa: S704 (YAML, dumped by the hub's library)
        report=report,
        is_full=report.spec.method == "full",
        result_name="fine-tuned model" if report.spec.method == "full" else "adapter",
        base=base,
        is_base_loadable=loadable != BASE_FOLDER,
        base_folder=BASE_FOLDER,
        vllm_command=shell_command(
            *("vllm", "serve", loadable, "--enable-lora", "--max-lora-rank", str(serving.max_lora_rank)),
            *("--lora-modules", f"{report.job}=path/of/this/folder", "--generation-config", "path/of/this/folder"),
        ),
        comparison=make_comparison(report),
        small_validation=describe_small_validation(report.evaluation.rows, report.evaluation.tokens),
        recipe=make_recipe(report),
    )


def to_markdown(value: Any) -> Any:
    """Return a string as Markdown that shows it on one line; Markdown of our own is returned unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(_MARKDOWN.sub(r"\\\g<0>", escape_line(value)))  # noqa: S704 (just escaped)


def to_code(text: str, *, cell: bool = False) -> Markup:
    """Return a text as code inside a line or a table's cell: between more backticks than it has in a row."""
    line = escape_line(text).replace("|", r"\|") if cell else escape_line(text)
    ticks = _longest_run(line) * "`"
    blank = " " if "`" in line else ""
    return Markup(f"{ticks}{blank}{line}{blank}{ticks}")  # noqa: S704 (as above)


def to_code_block(text: str, language: str) -> Markup:
    """Return a text of several lines as a block of code."""
    fence = max(_longest_run(text), 3) * "`"
    return Markup(f"{fence}{language}\n{escape_text(text)}\n{fence}")  # noqa: S704 (as above)


def _longest_run(text: str) -> int:
    """Return one more than the longest run of backticks."""
    return 1 + max(map(len, re.findall("`+", text)), default=0)


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
