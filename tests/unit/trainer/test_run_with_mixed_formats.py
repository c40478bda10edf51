"""A complete run on chats and plain text together, with a chat template in the manifest."""

import html
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_api.report import RunReport, TextSpan
from qlora_trainer import stages
from qlora_trainer.prepare import prepare
from qlora_trainer.run import run
from tests.unit.trainer.tiny import RecordingSink, make_spec, prepare_config, run_config, write_model, write_rows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sharegpt(number: int) -> dict[str, object]:
    turns = [("human", f"Is {number} even?"), ("gpt", ["no", "yes"][number % 2 == 0]), ("human", "So?"), ("gpt", "So.")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("mixed")
    chats = write_rows(folder / "rows" / "chats.jsonl", [sharegpt(number) for number in range(12)])
    texts = write_rows(
        folder / "rows" / "texts.jsonl", [{"text": f"A colour is number {number}."} for number in range(4)]
    )
    spec = make_spec(
        write_model(folder / "model"),
        "",
        f"file://{folder / 'output'}",
        dataset={
            "uri": None,
            "sources": [{"uri": chats}, {"uri": texts, "weight": 1.5}],
            "chatTemplate": TEMPLATE,
            "evaluation": {"fraction": 0.25},
        },
        lora={"dropout": 0.0},
    )
    notes: list[str] = []
    prepared = prepare(prepare_config(spec), notes.append, work=folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "load_in_fresh_process", lambda *_: None)  # covered by test_run.py
        run(run_config(spec, prepared, total_steps=2), RecordingSink(), work=folder / "work")
    return Path(prepared.prefix.removeprefix("file://")), notes


def test_only_rows_with_an_answer_are_generated_for(result):
    folder, _ = result
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    assert report.prepared.dataset.format == "chat+text"
    assert report.evaluation.rows == 4
    assert {sample.reference for sample in report.samples} == {"So."}
    assert all(sample.prompt.endswith("user: So?</s>assistant: ") for sample in report.samples)


def test_chat_template_of_the_manifest_is_published_with_the_adapter(result):
    folder, _ = result
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template == TEMPLATE


def test_log_and_report_mark_the_labels_of_rows(result):
    folder, notes = result
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    first = report.preview[0]
    assert [piece.learned for piece in first] == [False, True, False, True]
    assert first[-1] == TextSpan(text="So.</s>", learned=True)
    page = (folder / "report/report.html").read_text()
    shown = [note.partition("\n")[2] for note in notes if note.startswith("training row")]
    assert len(shown) == len(report.preview) == 3
    for text, row in zip(shown, report.preview, strict=True):
        assert text == "".join(f"⟦{piece.text}⟧" if piece.learned else piece.text for piece in row)
        escaped = [(html.escape(piece.text), piece.learned) for piece in row]
        assert "".join(f"<mark>{piece}</mark>" if learned else piece for piece, learned in escaped) in page


def test_log_has_the_detected_formats(result):
    _, notes = result
    source_notes = [note for note in notes if note.startswith("spec.dataset.sources")]
    assert [note.split(": ")[-1] for note in source_notes] == [
        "chat rows, detected by the field 'conversations' of row 1",
        "text rows, detected by the field 'text' of row 1, weight 1.5",
    ]
