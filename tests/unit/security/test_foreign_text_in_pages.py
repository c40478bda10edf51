"""Text of others in the report page and in the model card: no markup, no link, no reordered or hidden text."""

from html.parser import HTMLParser
from typing import Any, Final

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from qlora_api.escapes import escape_text
from qlora_api.report import RunReport, Sample, ServingCheck, TextSpan
from qlora_trainer.publishing.html_report import render_html
from qlora_trainer.publishing.model_card import render_card
from tests.unit.security.test_foreign_text import ATTACKS
from tests.unit.trainer.publishing.test_model_card import make_report

MARKDOWN: Final = {
    "link": "[click](https://evil.example)",
    "reference": "[x]: https://evil.example\n[x]",
    "image": "![x](https://evil.example/pixel.png)",
    "autolink": "<https://evil.example>",
    "bare-address": "https://evil.example www.evil.example a@evil.example",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "html-block": "\n\n<details open ontoggle=alert(1)>\n\n",
    "comment": "<!--",
    "entity": "&lt;b&gt; &#60;b&#62;",
    "heading": "x\n# Owned\n\nx\n===\n",
    "front-matter": "\n---\nlicense: mit\nbase_model: evil/model\n---\n",
    "fence": "```\n# Owned\n[click](https://evil.example)\n```python\n",
    "long-fence": "`````\n[click](https://evil.example)\n`````",
    "tilde-fence": "~~~\n[click](https://evil.example)",
    "backticks": "` [click](https://evil.example) `",
    "more-backticks": "`` ``` [click](https://evil.example)",
    "escaped-bracket": "\\[click](https://evil.example)",
    "table-cell": "x | [click](https://evil.example) |\n| y | z |",
    "hard-break": "x  \n> quote\n- item\n1. item",
}
TEXTS: Final = {name: text for name, text in (ATTACKS | MARKDOWN).items() if name != "lone-surrogate"}


def hostile_report(text: str) -> RunReport:
    """A report with the text wherever another component or person wrote text, past every check."""
    report = make_report(dataset={"template": {"prompt": "{a}", "answer": "{b}"}})
    spec, prepared = report.spec, report.prepared
    template = spec.dataset.template.model_copy(update={"prompt": text})
    return report.model_copy(
        update={
            "job": text,
            "digest": text,
            "spec": spec.model_copy(
                update={
                    "model": spec.model.model_copy(update={"uri": f"s3://{text}"}),
                    "dataset": spec.dataset.model_copy(update={"template": template}),
                    "lora": spec.lora.model_copy(update={"targets": (text,), "modules_to_save": (text,)}),
                }
            ),
            "prepared": prepared.model_copy(
                update={
                    "model": prepared.model.model_copy(update={"commit": text, "architecture": text}),
                    "dataset": prepared.dataset.model_copy(update={"format": text, "digest": text}),
                }
            ),
            "plan": report.plan.model_copy(update={"reasons": (text,)}),
            "choices": {"device": text, text: text},
            "versions": {"qlora-operator": text, text: text},
            "samples": (Sample(prompt=text, reference=text, base=text, adapter=text),),
            "preview": ((TextSpan(text=text, learned=True), TextSpan(text=text, learned=False)),),
            "serving": ServingCheck(vllm=False, problems=(text,), max_lora_rank=None),
        }
    )


def tokens(card: str) -> list[Token]:
    """Every token of a card, with those inside lines."""
    body = card.removeprefix("---\n").partition("---\n")[2]
    found = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(body)
    return [token for block in found for token in (block, *(block.children or ()))]


def structure(card: str) -> list[tuple[str, str]]:
    """Return the tokens of a card but for its text."""
    return [
        (token.type, token.tag) for token in tokens(card) if token.type not in {"text", "softbreak", "text_special"}
    ]


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, attrs))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_page_has_only_its_own_tags_and_no_hidden_text(text: str):
    page, plain = render_html(hostile_report(text)), render_html(hostile_report("plain"))
    assert Tags(page).found == Tags(plain).found
    assert escape_text(page) == page


@pytest.mark.parametrize("vllm", [True, False])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_card_has_only_its_own_structure(text: str, vllm: bool):
    serving = {"serving": ServingCheck(vllm=True, max_lora_rank=16)} if vllm else {}
    card = render_card(hostile_report(text).model_copy(update=serving))
    plain = render_card(hostile_report("plain").model_copy(update=serving))
    assert structure(card) == structure(plain)
    assert yaml.safe_load(card.split("---\n")[1]) == yaml.safe_load(plain.split("---\n")[1])
    assert escape_text(card) == card


@pytest.mark.parametrize("text", MARKDOWN.values(), ids=MARKDOWN)
def test_address_outside_code_is_no_link(text: str):
    shown = [token for token in tokens(render_card(hostile_report(text))) if token.type == "inline"]
    outside_code = "".join(
        part for token in shown for part in ("`".join(token.content.split("``")[::2])).split("`")[::2]
    )
    assert "https://" not in outside_code
    assert "www.evil" not in outside_code
    assert "a@evil" not in outside_code
