"""Files and rows that broke other trainers, by their public reports: each is read right, or refused with its cause."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_trainer.data import shards
from qlora_trainer.data.dataset import describe_invalid, describe_lengths, describe_sources, open_dataset, scan_rows
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import describe_prompts, tokenize_rows
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from tests.unit.trainer.tiny import make_spec, make_tokenizer

CHATML = (
    "{%- if tools %}<s>tools {{ tools | tojson }}</s>{% endif %}"
    "{%- for m in messages %}<s>{{ m.role }} {{ m.content or '' }}"
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}</s>"
    "{%- endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
NO_TOOLS = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content or '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def lines(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def alpaca(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"q{number}", "output": f"a{number}"} | changes


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


def parquet(*rows: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": messages, "tools": [TOOL]}


class TokenizedRows:
    """What a dataset becomes: the texts of its labels, whole rows, and the log lines."""

    def __init__(self, folder: Path, files: dict[str, bytes], template: str = CHATML, **blocks: Any) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        uri = f"file://{folder}/{next(iter(files)) if len(files) == 1 else ''}"
        spec = make_spec("file:///model", uri, "file:///output", **{"training": {"maxLength": 512}} | blocks)
        self.notes: list[str] = []
        dataset = open_dataset(spec, SourceResolver(Platform(), environment_secrets()), folder / "work")
        self.notes += describe_sources(dataset)
        scan = scan_rows(dataset, spec.dataset.evaluation.fraction)
        self.notes += (*scan.sentences, *describe_invalid(scan.invalid))
        with tokenize_rows(spec, dataset, scan, tokenizer, folder / "work", self.notes.append) as made:
            self.status = made.status
            rows = [*shards.read_token_rows(made.training_file), *shards.read_token_rows(made.held_out_file)]
            self.held_out = made.status.evaluation_rows
            lengths = describe_lengths(made.status, spec.training)
            self.notes += (*describe_invalid(made.rejected), *lengths, *describe_prompts(made))
        self.labels = sorted(
            tokenizer.decode(row.input_ids[start:end]).replace("</s>", "⏎")
            for row in rows
            for start, end in row.label_spans
        )
        self.text = "\n".join(tokenizer.decode(row.input_ids) for row in rows)


def in_parts(number: int) -> dict[str, Any]:
    question = [{"type": "text", "text": "q"}, {"type": "text", "text": str(number)}]
    answer = [{"type": "text", "text": f"a{number}"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prompt_and_completion(number: int) -> dict[str, Any]:
    return {"prompt": chat(f"q{number}")["messages"], "completion": [{"role": "assistant", "content": f"a{number}"}]}


def csv_cell(row: dict[str, Any]) -> str:
    return '"' + json.dumps(row["messages"]).replace('"', '""') + '"\n'


ANSWERS = ["a1⏎", "a2⏎", "a3⏎", "a4⏎"]
FOUR = tuple(alpaca(number) for number in range(1, 5))
SHAREGPT = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        pytest.param({"x.jsonl": b"\xef\xbb\xbf" + lines(*FOUR).rstrip()}, ANSWERS, id="bom-and-no-last-newline"),
        pytest.param({"x.jsonl": lines(*FOUR).replace(b"\n", b"\r\n\r\n")}, ANSWERS, id="crlf-and-blank-lines"),
        pytest.param({"x.jsonl": lines(*FOUR).replace(b"}\n", b"},\n")}, ANSWERS, id="jsonl-trailing-comma"),
        pytest.param({"x.json": lines(*FOUR)}, ANSWERS, id="json-holds-jsonl"),
        pytest.param(
            {"x.jsonl": lines({"conversations": SHAREGPT, "system": "Rome"}, chat("q2", "a2"))},
            ["a1⏎", "a2⏎"],
            id="sharegpt-system",
        ),
        pytest.param(
            {"x.jsonl": lines({"conversations": SHAREGPT, "tools": json.dumps([TOOL])}, chat("q2", "a2"))},
            ["a1⏎", "a2⏎"],
            id="sharegpt-tools-as-text",
        ),
        pytest.param({"my data.jsonl": lines(*FOUR)}, ANSWERS, id="space-in-the-name"),
        pytest.param({"x.csv": b",instruction,output\n0,q1,a1\n1,q2,a2\n"}, ["a1⏎", "a2⏎"], id="csv-pandas-index"),
        pytest.param({"x.csv": b"instruction,output\rq1,a1\rq2,a2\r"}, ["a1⏎", "a2⏎"], id="csv-cr-only"),
        pytest.param({"x.jsonl": gzip.compress(lines(*FOUR))}, ANSWERS, id="gzip-named-jsonl"),
        pytest.param(
            {"x.parquet": parquet(alpaca(1, input="i", context=None), alpaca(2, input=None, context="c"))},
            ["a1⏎", "a2⏎"],
            id="parquet-of-two-forms",
        ),
        pytest.param(
            {"x.csv": f"messages\n{csv_cell(chat('q1', 'a1'))}{csv_cell(chat('q2', 'a2'))}".encode()},
            ["a1⏎", "a2⏎"],
            id="csv-messages-as-text",
        ),
        pytest.param(
            {f"{split}-0.parquet": parquet(*rows) for split, rows in (("train", FOUR), ("test", FOUR[:1]))},
            ANSWERS,
            id="hub-splits",
        ),
        pytest.param(
            {"x.jsonl": lines(prompt_and_completion(1), prompt_and_completion(2))},
            ["a1⏎", "a2⏎"],
            id="prompt-completion-messages",
        ),
        pytest.param(
            {"x.jsonl": lines(alpaca(1, output="a\u20281\x85\0"), alpaca(2))},
            ["a\u20281\x85\0⏎", "a2⏎"],
            id="unicode-line-separators",
        ),
        pytest.param({"x.jsonl": lines(in_parts(1), in_parts(2))}, ["a1⏎", "a2⏎"], id="content-parts"),
        pytest.param({"x.csv": b"instruction, output\nq1,a1\nq2,a2\n"}, ["a1⏎", "a2⏎"], id="csv-blank-in-the-header"),
        pytest.param(
            {"x.jsonl": lines(*FOUR), ".ipynb_checkpoints/x-checkpoint.jsonl": lines(alpaca(5))},
            ANSWERS,
            id="copies-of-a-notebook",
        ),
        pytest.param({"x.jsonl": lines(*FOUR), "__MACOSX/x.jsonl": lines(alpaca(5))}, ANSWERS, id="archive-of-macos"),
    ],
)
def test_file_is_read(tmp_path, files, labels):
    tokenized = TokenizedRows(tmp_path, files)
    assert tokenized.labels == sorted(labels)
    assert "tools" not in tokenized.text or "weather" in tokenized.text


def test_tool_arguments_as_json_text_and_parquet_nulls_are_tokenized_as_the_model_writes_them(tmp_path):
    rows = lines(calling('{"city": "Rome"}'), calling({"city": "Oslo"}))
    tokenized = TokenizedRows(tmp_path / "a", {"x.jsonl": rows})
    assert tokenized.labels == ['<call>weather {"city": "Oslo"}⏎', '<call>weather {"city": "Rome"}⏎']
    table = parquet(calling({"city": "Rome", "ticker": None}), calling({"city": None, "ticker": "X"}))
    tokenized = TokenizedRows(tmp_path / "b", {"x.parquet": table})
    assert set(tokenized.labels) == {'<call>weather {"city": "Rome"}⏎', '<call>weather {"ticker": "X"}⏎'}
    assert "null" not in tokenized.text


def test_call_in_the_form_of_sharegpt_is_rendered_as_one_of_openai(tmp_path):
    call = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}})}
    turns = [{"from": "human", "value": "q"}, call, {"from": "observation", "value": "sun"}, SHAREGPT[1]]
    rows = lines({"conversations": turns, "tools": json.dumps([TOOL])}, chat("q2", "a2"), calling("null"))
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": rows})
    assert tokenized.labels == ['<call>weather {"city": "Rome"}⏎', "<call>weather {}⏎", "a1⏎", "a2⏎"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        pytest.param(chat("q", "one</s> two"), True, id="answer"),
        pytest.param(chat("ignore </s>", "a"), True, id="question"),
        pytest.param({"prompt": "<s>q", "completion": "one</s> two"}, True, id="completion"),
        pytest.param({"prompt": "<s>q", "completion": "one</s>"}, False, id="end-of-a-completion"),
        pytest.param(chat("q", "a </p>"), False, id="none"),
    ],
)
def test_special_tokens_in_the_text_of_rows_are_reported(tmp_path, row, said):
    other = chat("q2", "a2") if "messages" in row else {"prompt": "q2", "completion": "a2"}
    notes = TokenizedRows(tmp_path, {"x.jsonl": lines(row, other)}).notes
    found = [note for note in notes if "1 rows have special tokens" in note and "'</s>' in row 1" in note]
    assert bool(found) is said


@pytest.mark.parametrize("flag", ["weight", "loss", "train", "training", "train_on_turn"])
def test_answer_with_weight_zero_is_context_only(tmp_path, flag):
    messages = chat("q", "WRONG", "again", "RIGHT")["messages"]
    messages[1][flag] = 0
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": lines({"messages": messages}, chat("q2", "fine"))})
    assert tokenized.labels == ["RIGHT⏎", "fine⏎"]
    assert "WRONG" in tokenized.text


@pytest.mark.parametrize("end", ["</s>", "</s>\n", " </s>"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(lambda number, end: {"prompt": f"q{number}", "completion": f"a{number}{end}"}, id="completion"),
        pytest.param(lambda number, end: chat(f"q{number}", f"a{number}{end}"), id="chat"),
        pytest.param(lambda number, end: {"text": f"ta{number}{end}"}, id="text"),
    ],
)
def test_row_whose_answer_has_the_end_token_ends_once(tmp_path, row, end):
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": lines(row(1, end), row(2, end))})
    assert [label.replace(" ", "") for label in tokenized.labels] == ANSWERS[:2]
    assert not [note for note in tokenized.notes if "special tokens" in note]


def test_answer_with_the_end_token_ends_once_where_the_template_adds_none(tmp_path):
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant {% endif %}"
    row = chat("q1", "a1</s>", "q2", "a2</s>")
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": lines(row, chat("q", "a3"))}, template)
    assert tokenized.labels == ANSWERS[:3]


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": 1, "label": True, "loss": 0.7, "train": True},
        {"weight": "2.5 kg", "label": 0, "loss": None, "tools": None, "chat_template_kwargs": {}},
        {
            "images": [],
            "image": None,
            "tools": [],
            "functions": "[]",
            "chat_template_kwargs": {"enable_thinking": None},
        },
    ],
)
def test_fields_that_change_nothing_are_ignored(tmp_path, fields):
    rows = [alpaca(number, **fields) for number in (1, 2)]
    assert TokenizedRows(tmp_path, {"x.jsonl": lines(*rows)}).labels == ANSWERS[:2]


def test_labeled_text_is_read(tmp_path):
    rows = [{"text": f"ta{number}", "label": False} for number in (1, 2)]
    assert TokenizedRows(tmp_path, {"x.jsonl": lines(*rows)}).labels == ANSWERS[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(lines(alpaca(1), alpaca(2, output="")), "row 2: field 'output' is empty", id="empty-output"),
        pytest.param(lines({"chosen": "a", "rejected": "b"}), "has the preference fields chosen, rejected", id="dpo"),
        pytest.param(lines({"prompt": "q", "chosen": "a", "rejected": "b"}), "the preference fields", id="dpo-prompt"),
        pytest.param(lines(prompt_and_completion(1) | {"label": False}), "field 'label' is false", id="kto-messages"),
        pytest.param(lines({"prompt": "q", "completion": "a", "label": False}), "field 'label' is false", id="kto"),
        pytest.param(lines(chat("q", "a") | {"label": False}), "field 'label' is false", id="kto-chat"),
        pytest.param(lines(alpaca(1, label=False)), "field 'label' is false", id="kto-instruction"),
        pytest.param(lines(alpaca(1, kto_tag=False)), "field 'kto_tag' is false", id="kto-tag"),
        pytest.param(lines(alpaca(1, weight=0)), "field 'weight' is 0, and rows have no weights", id="row-weight-0"),
        pytest.param(lines(chat("q", "a") | {"weight": 0.5}), "field 'weight' is 0.5", id="row-weight-half"),
        pytest.param(lines(alpaca(1, weight="0.0")), "field 'weight' is 0.0", id="row-weight-text"),
        pytest.param(lines(chat("q", "a") | {"train": False}), "field 'train' is False", id="row-flag"),
        pytest.param(lines(alpaca(1, images=["x.png"])), "field 'images' has media", id="images-of-instruction"),
        pytest.param(
            lines({"prompt": "q", "completion": "a", "image": "x"}), "'image' has media", id="image-of-completion"
        ),
        pytest.param(lines({"text": "t", "videos": ["x.mp4"]}), "field 'videos' has media", id="videos-of-text"),
        pytest.param(
            lines({"prompt": "q", "completion": "a", "system": "s"}),
            "field 'system' has no place in completion rows",
            id="system-of-completion",
        ),
        pytest.param(
            lines({"prompt": "q", "completion": "a", "history": [["q0", "a0"]]}),
            "field 'history' has no place in completion rows",
            id="history-of-completion",
        ),
        pytest.param(
            lines(alpaca(1, tools=[TOOL])), "field 'tools' has no place in instruction rows", id="tools-of-instruction"
        ),
        pytest.param(
            lines(chat("q", "a") | {"chat_template_kwargs": {"enable_thinking": False}}),
            "field 'chat_template_kwargs' is not passed to the chat template",
            id="template-arguments",
        ),
        pytest.param(lines(alpaca(1, output="\u200b\ufeff")), "field 'output' is empty", id="invisible-output"),
        pytest.param(lines(calling({})).replace(b'"weather"', b'"w\\ud83d"'), "half a character", id="half-emoji-tool"),
        pytest.param(lines(chat("q\ud83d", "a"), chat("q", "a")), "half a character", id="half-emoji"),
        pytest.param(lines(alpaca(1), alpaca(2, output=42)), "field 'output' is a number", id="number"),
        pytest.param(lines({"Instruction": "q", "Output": "a"}), "the fields Instruction, Output", id="capitals"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs", id="lfs-pointer"),
        pytest.param(json.dumps({"data": FOUR}).encode(), "row 1 has the fields data", id="rows-in-an-object"),
    ],
)
def test_rows_are_refused_with_their_cause(tmp_path, content, message):
    with pytest.raises(RunError, match=r"spec\.dataset\.uri") as caught:
        TokenizedRows(tmp_path, {"x.jsonl": content})
    assert message in caught.value.message
    assert caught.value.reason == Reason.DATASET_INVALID


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({"x.csv": b"instruction;output\nq1;a1\n"}, "by commas, not by ';'", id="csv-semicolon"),
        pytest.param({"x.csv": b"instruction,output\nq1,caf\xe9\n"}, "UTF-8", id="csv-latin-1"),
        pytest.param({"x.csv": b"instruction,output\nq1,\n"}, "field 'output' is empty", id="csv-empty-cell"),
        pytest.param({"x.jsonl.gz": lines(*FOUR)}, "gzip", id="plain-named-gz"),
        pytest.param({"x.jsonl": lines(*FOUR), "y.jsonl": lines({"text": "t"})}, "y.jsonl row 1", id="two-forms"),
    ],
)
def test_file_is_refused_with_its_cause(tmp_path, files, message):
    with pytest.raises(RunError, match=r"spec\.dataset\.uri") as caught:
        TokenizedRows(tmp_path, files)
    assert message in caught.value.message
    assert caught.value.reason == Reason.DATASET_INVALID


def test_tools_that_the_template_drops_are_refused(tmp_path):
    with pytest.raises(RunError, match="field 'tools' is dropped by the model's chat template"):
        TokenizedRows(tmp_path, {"x.jsonl": lines(calling({"city": "Rome"}), chat("q", "a"))}, NO_TOOLS)


def test_rows_are_the_same_on_every_day(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert (
        TokenizedRows(tmp_path, {"x.jsonl": lines(chat("q", "a"), chat("r", "b"))}, dated).text.count("26 Jul 2024")
        == 2
    )


def long_prompt(number: int) -> dict[str, Any]:
    return alpaca(number, instruction=f"{number} " + "word " * 600)


@pytest.mark.parametrize("short", range(2, 6))
def test_held_out_row_that_is_too_long_is_replaced_by_another(tmp_path, short):
    """Whichever rows are too long, the run has a validation row as long as two rows fit."""
    rows = lines(*(alpaca(number) if number < short else long_prompt(number) for number in range(6)))
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": rows}, dataset={"evaluation": {"fraction": 0.1}})
    assert (tokenized.held_out, tokenized.status.training_rows) == (1, short - 1)
    assert tokenized.labels == [f"a{number}⏎" for number in range(short)]


def test_rows_that_are_all_too_long_are_refused(tmp_path):
    rows = lines(alpaca(0), *map(long_prompt, range(1, 6)))
    with pytest.raises(
        RunError, match=r"spec\.training\.maxLength: every (training|held-out) row has a prompt"
    ) as caught:
        TokenizedRows(tmp_path, {"x.jsonl": rows}, dataset={"evaluation": {"fraction": 0.1}})
    assert caught.value.reason == Reason.DATASET_EMPTY


STRICT = "{%- if 'bad' in messages[0].content %}{{ raise_exception('no bad words') }}{% endif %}" + CHATML


@pytest.mark.parametrize("bad", range(3))
def test_held_out_row_that_the_template_rejects_is_replaced_by_another(tmp_path, bad):
    rows = lines(*(chat("bad" if number == bad else f"q{number}", f"a{number}") for number in range(3)))
    blocks = {"onInvalidRow": "drop", "evaluation": {"fraction": 0.1}}
    tokenized = TokenizedRows(tmp_path, {"x.jsonl": rows}, STRICT, dataset=blocks)
    assert (tokenized.held_out, len(tokenized.labels)) == (1, 2)
    assert any("no bad words" in note for note in tokenized.notes)


def test_validation_set_that_the_template_rejects_is_refused_with_that_cause(tmp_path):
    held_out = tmp_path / "validation" / "x.jsonl"
    held_out.parent.mkdir()
    held_out.write_bytes(lines(*(chat(f"bad {number}", "a") for number in range(2))))
    blocks = {"onInvalidRow": "drop", "evaluation": {"uri": f"file://{held_out}"}}
    with pytest.raises(RunError) as caught:
        TokenizedRows(tmp_path / "rows", {"x.jsonl": lines(chat("q", "a"))}, STRICT, dataset=blocks)
    assert "no bad words" in caught.value.message
    assert "maxLength" not in caught.value.message


R1 = (
    "{%- for m in messages %}{% if m.role == 'assistant' %}<bot>{{ m.content.split('</think>')[-1] }}</s>"
    "{%- else %}<user>{{ m.content }}{% endif %}{% endfor %}{%- if add_generation_prompt %}<bot><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "said"),
    [
        pytest.param(R1, "a", True, id="no-thoughts-where-the-prompt-begins-one"),
        pytest.param(R1, "<think>\nhm\n</think>\n\na", False, id="thoughts"),
        pytest.param(CHATML, "a", False, id="prompt-without-thoughts"),
    ],
)
def test_answers_that_do_not_follow_the_prompt_of_a_server_are_reported(tmp_path, template, answer, said):
    tokenized = TokenizedRows(
        tmp_path, {"x.jsonl": lines(*(chat(f"q{number}", answer) for number in range(10)))}, template
    )
    found = [note for note in tokenized.notes if "do not begin with the prompt that a server renders" in note]
    assert bool(found) is said
    assert not said or found[0].startswith("2 of 2 held-out rows")
