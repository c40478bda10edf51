# ruff: noqa: E501 (a manifest in each line)
"""What people write who know another tool, or YAML only a little: the first line has the field and the fix."""

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from qlora_cli.manifests.loader import JobManifest
from qlora_cli.manifests.synonyms import FIELDS, VALUES
from qlora_cli.manifests.validation_messages import field_at, read_location
from tests.unit.cli.make import JOB


def validate(text: str | bytes) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["validate", "-"], input=text)
    assert result.stderr == ""
    assert "Traceback" not in result.output
    return result.exit_code, [line.removeprefix("standard input") for line in result.stdout.splitlines()]


def training(line: str) -> str:
    return f"{JOB}  training:\n    {line}\n"


def lora(line: str) -> str:
    return JOB.replace("    rank: 16\n", f"    {line}\n")


def top(line: str) -> str:
    return f"{JOB}  {line}\n"


def block(name: str, text: str) -> str:
    """The manifest with a block of two lines replaced."""
    lines = JOB.splitlines()
    start = lines.index(f"  {name}:")
    return "\n".join([*lines[:start], text, *lines[start + 2 :]]) + "\n"


WRONG = [
    # shorthand
    (block("model", "  model: meta-llama/Llama-3.1-8B"), "spec.model", "write model: {uri: hf://meta-llama/Llama-3.1-8B}"),
    (block("model", "  model: {uri: meta-llama/Llama-3.1-8B}"), "spec.model.uri", "write hf://meta-llama/Llama-3.1-8B, or"),
    (block("model", "  model: {uri: 'https://huggingface.co/a/b/tree/main'}"), "spec.model.uri", "write hf://a/b, got"),
    (block("model", "  model: {uri: 'hf:/a/b'}"), "spec.model.uri", "write hf://a/b, got"),
    (block("model", "  model: {uri: 'hf://a/b@main'}"), "spec.model.uri", "the revision goes into spec.model.revision"),
    (block("model", "  model: {uri: 'gs://bucket/model'}"), "spec.model.uri", "copy it to s3://"),
    (block("model", "  model: {name: a/b}"), "spec.model.uri", "is required; write uri: hf://"),
    (block("model", "  model:\n  uri: hf://a/b"), "spec.model", "has no value; write model: {uri: hf://"),
    (block("model", "  model: [{uri: hf://a/b}]"), "spec.model", "write model: {uri: hf://a/b}, without the '-'"),
    (block("dataset", "  dataset: {uri: pvc://Rows/x.csv}"), "spec.dataset.uri", "write pvc://claim/path"),
    (block("dataset", "  dataset: {uri: 's3://'}"), "spec.dataset.uri", "write s3://bucket/train.jsonl, or"),
    (block("dataset", "  dataset: my.jsonl"), "spec.dataset", "write dataset: {uri: my.jsonl}"),
    (block("dataset", "  dataset: [a.jsonl, b.jsonl]"), "spec.dataset", "write dataset: {sources: [{uri: a.jsonl}, {uri: b.js"),
    (block("dataset", "  dataset: {uri: [s3://bkt/a, s3://bkt/b]}"), "spec.dataset.uri", "write sources: [{uri: s3://bkt/a}, {"),
    (block("dataset", "  dataset: {uri: tatsu-lab/alpaca}"), "spec.dataset.uri", "write hf://datasets/tatsu-lab/alpaca/FILE"),
    (block("dataset", "  dataset: tatsu-lab/alpaca"), "spec.dataset", "write dataset: {uri: hf://datasets/tatsu-lab/alpaca/FILE}"),
    (block("dataset", "  dataset: {uri: s3://bkt/a, type: alpaca}"), "spec.dataset.type", "spec.dataset.format"),
    (block("dataset", "  dataset: {uri: s3://bkt/a, format: sharegpt}"), "spec.dataset.format", "did you mean chat?"),
    (block("dataset", "  dataset: {uri: s3://bkt/a, split: train}"), "spec.dataset.split", "name the file of the split"),
    (block("dataset", "  dataset: {uri: s3://bkt/a, evaluation: 0.1}"), "spec.dataset.evaluation", "{fraction: 0.1}"),
    (block("output", "  output: s3://bkt/out"), "spec.output", "write output: {uri: s3://bkt/out}"),
    (block("output", "  output: {uri: s3://bkt/out, secretRef: keys}"), "spec.output.secretRef", "secretRef: {name: keys}"),
    (block("output", "  output: {uri: s3://my_bucket/out}"), "spec.output.uri", "a bucket has 3 to 63 lower-case letters"),
    (lora("targets: all-linear").replace("    targets: [q_proj, v_proj]\n", ""), "spec.lora.targets", "targets: [all-linear]"),
    (lora("target_modules: [q_proj]"), "spec.lora.target_modules", "write spec.lora.targets: [q_proj]"),
    (lora("r: 8"), "spec.lora.r", "write spec.lora.rank: 8"),
    (lora("lora_alpha: 16"), "spec.lora.lora_alpha", "write spec.lora.alpha: 16"),
    (top("quantization: 4bit"), "spec.quantization", "write quantization: {bits: 4}"),
    (top('quantization: {bits: "4"}'), "spec.quantization.bits", "did you mean 4?"),
    (top("load_in_4bit: true"), "spec.load_in_4bit", "spec.quantization.bits"),
    (top("adapter: qlora"), "spec.adapter", "spec.method"),
    (top("gpus: 1"), "spec.gpus", "write spec.resources.gpusPerNode: 1"),
    (top("nodeSelector: {zone: a}"), "spec.nodeSelector", "did you mean spec.resources.nodeSelector?"),
    (top("env: [{name: A, value: b}]"), "spec.env", "a manifest has no pod settings"),
    (top("image: trainer:1"), "spec.image", "chart value trainerImage"),
    (top("push_to_hub: true"), "spec.push_to_hub", "results go to spec.output.uri"),
    (top("report_to: wandb"), "spec.report_to", "spec.tracking"),
    (top("tracking: wandb"), "spec.tracking", "{wandb: {project: NAME"),
    (top("chat_template: llama3"), "spec.chat_template", "spec.dataset.chatTemplate"),
    (top("system_prompt: Be kind."), "spec.system_prompt", "a system message belongs into the rows"),
    (top("val_set_size: 0.1"), "spec.val_set_size", "write spec.dataset.evaluation.fraction: 0.1, share of the rows"),
    (top("queue: team-a"), "spec.queue", "write queue: {name: team-a}"),
    (top("ttl: 3600"), "spec.ttl", "a number and a unit"),
    (top("lora.rank: 8"), "spec.lora.rank", "write lora: {rank: 8}"),
    (training("lr: 1e-4"), "spec.training.lr", "write spec.training.learningRate: 0.0001"),
    (training("learning_rate: 1e-4"), "spec.training.learning_rate", "did you mean learningRate?"),
    (training('learningRate: "1e-4"'), "spec.training.learningRate", "write 1e-4, without quotes"),
    (training("per_device_train_batch_size: 4"), "per_device_train_batch_size", "write spec.training.microBatchSize: 4"),
    (training("gradient_accumulation_steps: 4"), "gradient_accumulation_steps", "spec.training.globalBatchSize"),
    (training("batch_size: 8"), "spec.training.batch_size", "write spec.training.globalBatchSize: 8"),
    (training("num_train_epochs: 3"), "num_train_epochs", "write spec.training.epochs: 3"),
    (training("bf16: true"), "spec.training.bf16", "the dtype is chosen"),
    (training("sequence_len: 4096"), "sequence_len", "write spec.training.maxLength: 4096, tokens"),
    (training("max_seq_length: 4096"), "max_seq_length", "write spec.training.maxLength: 4096"),
    (training("optim: paged_adamw_8bit"), "spec.training.optim", "spec.training.optimizer"),
    (training("optimizer: paged_adamw_8bit"), "spec.training.optimizer", "did you mean pagedAdamw8bit?"),
    (training("optimizer: adamw_torch"), "spec.training.optimizer", "did you mean adamw?"),
    (training("warmup_steps: 10"), "spec.training.warmup_steps", "spec.training.warmupRatio: a share of all steps"),
    (training("scheduler: constant_with_warmup"), "spec.training.scheduler", "did you mean constant?"),
    (training("flash_attention: true"), "flash_attention", "the attention kernel is chosen"),
    (training("sample_packing: true"), "sample_packing", "write spec.training.packing: true"),
    (training('packing: "true"'), "spec.training.packing", "write true, without quotes"),
    (training("eval_steps: 50"), "eval_steps", "write spec.training.evaluateEvery: 50, steps"),
    (training("save_steps: 50"), "save_steps", "write spec.checkpoint.steps: 50"),
    (training("epochs: ${EPOCHS}"), "spec.training.epochs", "envsubst"),
    (JOB.replace("gpusPerNode: 0", "memory: 16"), "spec.resources.memory", "write 16Gi"),
    (JOB.replace("gpusPerNode: 0", "cpu: 4"), "spec.resources.cpu", 'write "4"'),
    (JOB.replace("gpusPerNode: 0", "limits: {nvidia.com/gpu: 1}"), "spec.resources.limits", "gpusPerNode: 1"),
    (JOB.replace("gpusPerNode: 0", "tolerations: {key: gpu}"), "tolerations", "write tolerations: [{key: gpu}]"),
    # YAML
    (JOB.replace("name: support-bot", "name: Support_Bot"), "metadata.name", "must look like support-bot"),
    (JOB.replace("  name: support-bot", "  name: 2024"), "metadata.name", 'write "2024"'),
    (JOB.replace("name: support-bot", "name: '{{ .Release.Name }}'"), "metadata.name", "render it first"),
    (JOB.replace("name: support-bot", "name: {{ .Release.Name }}"), "", "render it first"),
    ("{{- if .Values.train }}\n" + JOB + "{{- end }}\n", "", "render it first"),
    (JOB.replace("    rank: 16", "\trank: 16"), ":11: ", "a tab indents this line; replace it by spaces"),
    (JOB.replace("rank: 16", "rank:16"), ":11: ", "write 'rank: …'"),
    (JOB.replace("uri: hf://organization/name", "uri: “hf://organization/name”"), "spec.model.uri", "typographic quotes"),
    (JOB.replace("rank: 16", "rank: 16\n    rank: 8"), "spec.lora.rank", "keep one of them"),
    (JOB.replace("apiVersion: qlora.dev/v1alpha1\n", ""), "apiVersion", "is required; write apiVersion: qlora.dev/v1alpha1"),
    (JOB.replace("kind: QLoRAJob\n", ""), "kind", "is required; write kind: QLoRAJob"),
    (JOB.replace("apiVersion: qlora.dev/v1alpha1\nkind: QLoRAJob\n", ""), "", "write apiVersion: qlora.dev/v1alpha1 and kind"),
    # other files
    ("base_model: a/b\ndatasets: [{path: my.jsonl, type: alpaca}]\nadapter: qlora\n", "", "axolotl, not a QLoRAJob; begin "
     "with qlora init --model hf://a/b --data my.jsonl"),
    ("model_name_or_path: a/b\nstage: sft\ndataset: my\n", "", "LLaMA-Factory, not a QLoRAJob; begin with qlora init --model"),
    ("model_name_or_path: a/b\ndataset_name: x/y\nlearning_rate: 1e-4\n", "", "TRL, not a QLoRAJob; begin with qlora init"),
    ("model: {uri: hf://a/b}\ndataset: {uri: s3://bkt/a}\n", "", "indent them below spec:"),
    ('{"instruction": "a", "output": "b"}\n', "", "a row of data, not a QLoRAJob; begin with qlora init"),
    ("- apiVersion: qlora.dev/v1alpha1\n  kind: QLoRAJob\n", "", "is a list without a kind; write kind: List"),
    (b"\x89PNG\x00\x01", "", "not UTF-8; save it as UTF-8, or give the manifest"),
    (b"PK\x03\x04\x00\x00", "", "is a binary file; give the manifest"),
    (JOB.encode("utf-16"), "", "is UTF-16, as PowerShell writes it; save it as UTF-8"),
    (b"#" * (5 << 20), "", "has more than 4 MiB"),
    ("", "", "contains no QLoRAJob; write a manifest with qlora init"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "field", "fix"), WRONG, ids=range(len(WRONG)))
def test_first_line_names_field_and_fix(text: str | bytes, field: str, fix: str) -> None:
    code, lines = validate(text)
    assert (code, field in lines[0], fix in lines[0]) == (1, True, True), lines


@pytest.mark.parametrize("text", ["\ufeff" + JOB, JOB.replace("\n", "\r\n"), JOB + "---\n" + JOB, f"---\n{JOB}...\n"])
def test_byte_order_mark_line_ends_and_several_documents_are_read(text: str) -> None:
    code, lines = validate(text.encode())
    assert (code, {line.partition(": ")[2] for line in lines}) == (0, {"QLoRAJob support-bot is valid"})


def test_anchors_are_read() -> None:
    text = JOB.replace("targets: [q_proj, v_proj]", "targets: &names [q_proj, v_proj]\n    modulesToSave: *names")
    assert validate(text)[0] == 0


@pytest.mark.parametrize("name", FIELDS)
def test_synonym_names_an_existing_field_or_says_why_there_is_none(name: str) -> None:
    synonym = FIELDS[name]
    assert name == name.lower().replace("_", "").replace("-", "")
    if synonym.field is None:
        assert synonym.note
    elif synonym.field != "metadata.labels":
        assert field_at(read_location(synonym.field), JobManifest) is not None, synonym.field


@pytest.mark.parametrize("name", VALUES)
def test_synonyms_of_values_are_values(name: str) -> None:
    values = [*VALUES[name].values()]
    blocks = ("spec", "spec.training", "spec.dataset", "spec.output", "spec.quantization", "spec.lora")
    fields = [field_at(read_location(f"{block}.{name}"), JobManifest) for block in blocks]
    found = [field for field in fields if field is not None]
    assert found
    assert all(any(value in str(field.annotation) for field in found) for value in values)


def test_types_unknown_fields_and_rules_are_found_in_one_pass() -> None:
    text = (
        JOB.replace("rank: 16", "rank: 0\n    colour: red") + "  training: {microBatchSize: 3}\n  distribution: ddp\n"
    )
    assert validate(text) == (
        1,
        [
            ":11: spec.lora.rank: must be ≥ 1, got 0",
            ":12: spec.lora.colour: unknown field; known are rank, alpha, rankPattern, alphaPattern, dropout, targets, dora, "
            "rslora, init, modulesToSave",
            ":18: spec.training.microBatchSize 3 does not divide globalBatchSize 16; leave it out to let the plan choose",
            ":19: spec.distribution is ddp, but spec.resources requests only one process; leave it out, or raise nodes or "
            "gpusPerNode",
        ],
    )


@pytest.mark.parametrize(
    "line", ["training: {microBatchSize: 3, globalBatchSize: 0}", "training: {microBatchSize: 3, batch_size: 6}"]
)
def test_rule_does_not_judge_a_field_that_is_wrong(line: str) -> None:
    code, lines = validate(top(line))
    assert (code, len(lines)) == (1, 1), lines
