"""Everything about a run that can be checked without a GPU, the cheapest check first."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qlora_api import __version__
from qlora_api.model_config import reduce_config
from qlora_api.prepared import PinnedTasks, Prepared
from qlora_api.reasons import Reason
from qlora_api.report import ResultManifest
from qlora_api.runconfig import PrepareConfig
from qlora_api.v1alpha1 import ModelStatus, QLoRAJobSpec
from qlora_trainer.data.dataset import (
    Dataset,
    DatasetScan,
    check_loss,
    describe_lengths,
    describe_sources,
    open_dataset,
    scan_rows,
)
from qlora_trainer.errors import RunError
from qlora_trainer.observability.progress import LogFn, no_log
from qlora_trainer.publishing.gate import check_gate, describe_rejected, has_required_metrics
from qlora_trainer.result_digest import ResolvedSpec, result_digest
from qlora_trainer.runtime.rank import default_work
from qlora_trainer.storage.credentials import Secrets, load_secrets
from qlora_trainer.storage.results import (
    find_rejected,
    find_reusable,
    is_reusable,
    open_output,
    put_manifest,
    update_latest,
    with_merged,
)
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver, text_files, weight_files
from qlora_trainer.storage.store import MODEL_FIELD, Store

if TYPE_CHECKING:
    from qlora_trainer.data.tokenized_dataset import TokenizedDataset


def prepare(
    config: PrepareConfig, note: LogFn = no_log, *, secrets: Secrets | None = None, work: Path | None = None
) -> Prepared:
    """Check a run, leave its token rows in the output, and return the facts; RunError says what is wrong."""
    spec, work = config.spec, work or default_work()
    places = SourceResolver(config.platform, secrets or load_secrets(spec, config.namespace))
    output = open_output(places, spec, config.job)
    check_writable(output)
    note(f"{output.root} can be written")
    dataset = open_dataset(spec, places, work)
    for sentence in describe_sources(dataset):
        note(sentence)
    check_loss(spec.training.loss, dataset)
    rows = scan_rows(dataset, spec.dataset.evaluation.fraction)
    note(f"{rows.training_rows:,} rows to train on, {rows.held_out_rows:,} held out")
    snapshot = places.resolve(spec.model.uri, spec.model.revision, MODEL_FIELD)
    note(f"{spec.model.uri} is at {snapshot.commit}")
    model = inspect_model(spec, snapshot, work)
    for sentence in model.sentences:
        note(sentence)
    tasks = check_benchmarks(spec, places, work, note)
    with tokenize_rows(spec, dataset, rows, model.tokenizer, work) as tokenised:
        for sentence in describe_lengths(tokenised.status, spec.training):
            note(sentence)
        for sentence in preview_rows(tokenised, model.tokenizer):
            note(sentence)
        prepared = _name_result(output, config, resolve_spec(spec, model, tokenised))
        if prepared.published is None:
            store_prepared(output, prepared, tokenised, tasks)
        else:
            update_latest(output, prepared.digest, prepared.prefix)
    note(f"prepared {prepared.prefix}")
    return prepared


def check_writable(output: Store) -> None:
    """Write and remove an object, so that a missing permission shows now and not after the training."""
    probe = f".probe-{uuid4().hex}"
    output.put(probe, b"Written to prove that the output can be written.\n")
    output.delete(probe)


def check_benchmarks(spec: QLoRAJobSpec, resolver: SourceResolver, work: Path, note: LogFn) -> PinnedTasks:
    """Load the public benchmarks that the spec asks for, so that a missing one shows now, and return what they are."""
    if not spec.evaluation.tasks:
        return PinnedTasks()
    from qlora_trainer.evaluation.lm_eval_tasks import (  # noqa: PLC0415 (imports torch)
        describe_benchmarks,
        load_benchmarks,
        pin_benchmarks,
    )

    tasks = pin_benchmarks(spec.evaluation.tasks, resolver)
    for sentence in describe_benchmarks(tasks):
        note(sentence)
    load_benchmarks(tasks, resolver, work)
    return tasks


@dataclass(frozen=True)
class InspectedModel:
    """A model as its small files tell of it."""

    status: ModelStatus
    tokenizer: Any
    adapter: Mapping[str, Any]
    """What spec.lora comes to for it; nothing with method full."""
    sentences: tuple[str, ...]
    """What there is to say about it."""


def inspect_model(spec: QLoRAJobSpec, snapshot: Snapshot, work: Path) -> InspectedModel:
    """Return the model's facts, from its small files alone."""
    weight_files(snapshot.files, MODEL_FIELD)
    if "config.json" not in snapshot.files:
        raise RunError(
            Reason.MODEL_UNSUPPORTED, "spec.model.uri: there is no config.json; give a model in the Hugging Face format"
        )
    folder = snapshot.fetch(text_files(snapshot.files), work)
    # torch and transformers take seconds to import; what fails before this line fails at once.
    from qlora_trainer.model.adapter import resolve_adapter  # noqa: PLC0415
    from qlora_trainer.model.architecture import build_empty, describe, load_tokenizer  # noqa: PLC0415
    from qlora_trainer.model.full_finetune import check_parameter_limit  # noqa: PLC0415
    from qlora_trainer.model.quantization import check_quantizable, describe_quantizable  # noqa: PLC0415
    from qlora_trainer.model.target_modules import check_modules  # noqa: PLC0415

    empty, bits = build_empty(folder), spec.quantization.bits
    architecture = describe(empty)
    check_quantizable(architecture.name, architecture.quantizable, bits)
    if spec.method == "full":
        check_parameter_limit(architecture.name, architecture.parameters)
    else:
        check_modules(architecture, spec)
    adapter = {} if spec.method == "full" else resolve_adapter(empty, spec.lora)
    status = ModelStatus(
        uri=spec.model.uri,
        commit=snapshot.commit,
        architecture=architecture.name,
        parameters=architecture.parameters,
        config=reduce_config(json.loads((folder / "config.json").read_text())),
    )
    size = f"{architecture.name} with {architecture.parameters:,} weights"
    sentences = (size, *describe_quantizable(architecture.quantizable, bits))
    return InspectedModel(status, load_tokenizer(folder), adapter, sentences)


def tokenize_rows(
    spec: QLoRAJobSpec, dataset: Dataset, rows: DatasetScan, tokenizer: Any, work: Path
) -> "TokenizedDataset":
    """Write the tokens of all rows into files of this computer."""
    from qlora_trainer.data.chat_template import load_chat_template  # noqa: PLC0415 (as above)
    from qlora_trainer.data.row_encoder import RowEncoder  # noqa: PLC0415
    from qlora_trainer.data.tokenized_dataset import tokenize_dataset  # noqa: PLC0415

    chats = any(source.row_format == "chat" for source in dataset.all_sources)
    chat = load_chat_template(tokenizer, spec.dataset.chat_template) if chats else None
    return tokenize_dataset(dataset, rows, RowEncoder(tokenizer, spec.training.loss, chat), spec.training, work)


def preview_rows(tokenized: "TokenizedDataset", tokenizer: Any) -> Iterator[str]:
    """Yield some training rows as the model sees them."""
    from qlora_trainer.data.preview import format_preview, preview, shown_rows  # noqa: PLC0415 (as above)
    from qlora_trainer.data.shards import read_token_rows  # noqa: PLC0415

    numbers = shown_rows(tokenized.status.training_rows)
    for number, row in zip(numbers, read_token_rows(tokenized.training_file, numbers), strict=True):
        yield f"training row {number + 1}, what is learned is in ⟦⟧:\n{format_preview(preview(row, tokenizer))}"


def resolve_spec(spec: QLoRAJobSpec, model: InspectedModel, tokenized: "TokenizedDataset") -> ResolvedSpec:
    """Return what the manifest's words came to; a chat template that is the model's own is as if it were not given."""
    given = spec.dataset.chat_template
    return ResolvedSpec(
        model=model.status,
        dataset=tokenized.status,
        rows_digest=tokenized.digest,
        adapter=model.adapter,
        chat_template=None if given == model.tokenizer.chat_template else given,
    )


def _name_result(output: Store, config: PrepareConfig, resolved: ResolvedSpec) -> Prepared:
    spec = config.spec
    digest = result_digest(spec, resolved)
    prefix = f"{output.root}/{digest}"
    published = find_reusable(output, digest, spec.output.if_exists, config.uid)
    if published is not None and spec.output.if_exists == "Fail":
        raise RunError(
            Reason.OUTPUT_EXISTS,
            f"spec.output.ifExists: {prefix} was published at {published.created_at:%Y-%m-%d %H:%M} UTC; set Skip to "
            "use it, or change the seed to train again",
        )
    if published is not None:
        whereabouts = f"It was published as {published.result.adapter} by a run whose gate let it pass."
        check_gate(spec.evaluation.gate, published.result.evaluation, whereabouts)
    manifest = published or _accept_rejected(output, config, digest)
    return Prepared(
        digest=digest,
        prefix=prefix,
        model=resolved.model,
        dataset=resolved.dataset,
        trainer_version=__version__,
        published=with_merged(output, digest, spec.output, manifest.result) if manifest else None,
    )


def _accept_rejected(output: Store, config: PrepareConfig, digest: str) -> ResultManifest | None:
    """Publish what another gate refused and this one lets pass: nothing is trained twice."""
    spec, rejected = config.spec, find_rejected(output, digest)
    if rejected is None or not has_required_metrics(spec.evaluation.gate, rejected.result.evaluation):
        return None
    if not is_reusable(rejected, spec.output.if_exists, config.uid):
        return None
    check_gate(spec.evaluation.gate, rejected.result.evaluation, describe_rejected(rejected.result))
    return put_manifest(output, rejected)


def store_prepared(output: Store, prepared: Prepared, tokenized: "TokenizedDataset", tasks: PinnedTasks) -> None:
    """Write the token rows and the tasks of public benchmarks, and the facts last."""
    from qlora_trainer.data import shards  # noqa: PLC0415 (pyarrow is slow to import)

    folder = prepared.digest
    output.put(f"{folder}/{shards.TRAINING}", tokenized.training_file)
    output.put(f"{folder}/{shards.EVALUATION}", tokenized.held_out_file)
    if tasks.tasks:
        output.put(f"{folder}/{shards.TASKS}", tasks.model_dump_json(by_alias=True, indent=2).encode())
    output.put(f"{folder}/{shards.FACTS}", prepared.model_dump_json(by_alias=True, indent=2).encode())
