"""Checks everything about a run that needs no GPU, the cheapest check first, and tokenizes its rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import maxsize
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qlora_api import __version__
from qlora_api.object_names import ObjectName
from qlora_api.prepared import PinnedTasks, Prepared, PreparedInputs
from qlora_api.reasons import Reason
from qlora_api.report import ResultManifest
from qlora_api.result import Result
from qlora_api.runconfig import PrepareConfig
from qlora_api.v1alpha1 import ModelStatus, QLoRAJobSpec
from qlora_trainer.data.dataset import (
    Dataset,
    DatasetScan,
    check_loss,
    describe_invalid,
    describe_lengths,
    describe_sources,
    open_dataset,
    scan_rows,
)
from qlora_trainer.data.sources import RowErrors
from qlora_trainer.errors import RunError
from qlora_trainer.observability.progress import LogFn, no_log
from qlora_trainer.publishing.gate import check_gate, describe_rejected, has_required_metrics
from qlora_trainer.result_digest import ResolvedSpec, full_digest, result_digest
from qlora_trainer.runtime.rank import default_work
from qlora_trainer.storage.credentials import Secrets, load_secrets
from qlora_trainer.storage.prepared_inputs import store_inputs, store_prepared_file
from qlora_trainer.storage.results import (
    find_rejected,
    find_reusable,
    is_reusable,
    manifest_uri,
    open_output,
    put_manifest,
    update_latest,
    with_merged,
)
from qlora_trainer.storage.safetensors_headers import fetch_headers
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver, check_text_files, text_files, weight_files
from qlora_trainer.storage.store import MODEL_FIELD, ObjectExistsError, Store, sha256_of

if TYPE_CHECKING:
    from qlora_trainer.data.tokenized_dataset import TokenizedDataset


def prepare(
    config: PrepareConfig, note: LogFn = no_log, *, secrets: Secrets | None = None, work: Path | None = None
) -> Prepared:
    """Validate a run, store its token rows in the output, and return the facts; RunError says what is wrong."""
    spec, work = config.spec, work or default_work()
    resolver = SourceResolver(config.platform, secrets or load_secrets(spec, config.namespace))
    output = open_output(resolver, spec, config.job)
    for sentence in check_writable(output):
        note(sentence)
    dataset = open_dataset(spec, resolver, work)
    for sentence in describe_sources(dataset):
        note(sentence)
    check_loss(spec.training.loss, dataset)
    rows = scan_rows(dataset, spec.dataset.evaluation.fraction)
    note(f"{rows.training_rows:,} rows to train on, {rows.held_out_rows:,} held out")
    for sentence in (*rows.sentences, *describe_invalid(rows.invalid)):
        note(sentence)
    snapshot = resolver.resolve(spec.model.uri, spec.model.revision, MODEL_FIELD)
    note(f"{spec.model.uri} is at commit {snapshot.commit}")
    model = inspect_model(spec, snapshot, work)
    for sentence in model.sentences:
        note(sentence)
    tasks = check_benchmarks(spec, resolver, work, note)
    with tokenize_rows(spec, dataset, rows, model.tokenizer, work, note) as tokenized:
        for sentence in check_rows_fit(model, tokenized):
            note(sentence)
        for sentence in describe_invalid(tokenized.rejected):
            note(sentence)
        for sentence in (*describe_lengths(tokenized.status, spec.training), *describe_prompts(tokenized)):
            note(sentence)
        for sentence in preview_rows(tokenized, model.tokenizer):
            note(sentence)
        prepared = _name_result(output, config, resolve_spec(spec, model, tokenized))
        if prepared.published is None:
            for sentence in rehearse_run(spec, model, tokenized, work):
                note(sentence)
            prepared = store_prepared(output, prepared, model, tokenized, tasks)
        else:
            update_latest(output, prepared.digest, manifest_uri(prepared.prefix, config.published))
    note(f"prepared {prepared.prefix}")
    return prepared


def check_writable(output: Store) -> Iterator[str]:
    """Write an object as results are written, and delete it; yield log lines.

    A missing permission, or a store without conditional writes, is found now and not after training.
    """
    probe, content = f".probe-{uuid4().hex}", b"Written to check that the output is writable.\n"
    output.put(probe, content, if_none_match=True)
    try:
        output.put(probe, content, if_none_match=True)
    except ObjectExistsError:
        yield f"{output.root} is writable"
    else:
        yield (
            f"{output.root} is writable, but its object store ignores If-None-Match: of two runs that publish the same "
            "result at once, the later replaces the files of the earlier"
        )
    output.delete(probe)


def check_benchmarks(spec: QLoRAJobSpec, resolver: SourceResolver, work: Path, note: LogFn) -> PinnedTasks:
    """Load the public benchmarks of the spec, so that a missing one is found now, and pin their revisions."""
    if not spec.evaluation.tasks:
        return PinnedTasks()
    from qlora_trainer.evaluation.lm_eval_tasks import (  # noqa: PLC0415 (imports torch)
        describe_benchmarks,
        load_benchmarks,
        pin_benchmarks,
        record_data,
    )

    tasks = pin_benchmarks(spec.evaluation.tasks, resolver)
    for sentence in describe_benchmarks(tasks):
        note(sentence)
    load_benchmarks(tasks, resolver, work)
    return record_data(tasks, resolver, work)


@dataclass(frozen=True)
class InspectedModel:
    """What a model's small files say about it."""

    status: ModelStatus
    type: str
    """model_type of its config.json."""
    folder: Path
    """Has its small files."""
    tokenizer: Any
    adapter: Mapping[str, Any]
    """spec.lora resolved for this model; empty with method full."""
    vocabulary: int
    """Rows of the embedding: every token id is below it."""
    positions: int | None
    """Tokens of the longest row that its table of positions allows; None if positions are computed."""
    trained_positions: int
    """Tokens of the longest row that it was pretrained on."""
    sentences: tuple[str, ...]
    """Log lines about the model."""
    files: dict[str, str]
    """SHA-256 of its small files by name."""
    weights: dict[str, str]
    """ETags of its weights by name; empty if the store has none, or a hub pins the content."""


def inspect_model(spec: QLoRAJobSpec, snapshot: Snapshot, work: Path) -> InspectedModel:
    """Return the model's facts from its small files, without its weights."""
    weights = weight_files(snapshot.files, MODEL_FIELD)
    if "config.json" not in snapshot.files:
        what = "spec.model.uri: no config.json; use a model in the Hugging Face format"
        raise RunError(Reason.MODEL_UNSUPPORTED, what)
    texts = text_files(snapshot.files)
    folder = snapshot.fetch(texts, work)
    check_text_files(folder, texts, MODEL_FIELD)
    # torch and transformers take seconds to import; checks above this line fail immediately.
    from qlora_trainer.model.adapter import resolve_adapter  # noqa: PLC0415
    from qlora_trainer.model.architecture import build_empty, describe, load_tokenizer, read_config  # noqa: PLC0415
    from qlora_trainer.model.full_finetune import check_parameter_limit  # noqa: PLC0415
    from qlora_trainer.model.module_sizes import describe_size  # noqa: PLC0415
    from qlora_trainer.model.quantization import (  # noqa: PLC0415
        check_quantizable,
        check_stored_quantization,
        describe_quantizable,
    )
    from qlora_trainer.model.target_modules import check_modules  # noqa: PLC0415

    empty, bits = build_empty(folder), spec.quantization.bits
    check_stored_quantization(empty.config, spec)
    unused = check_weights(snapshot, folder, weights, work)
    architecture = describe(empty)
    check_quantizable(architecture.name, architecture.quantizable, bits)
    if spec.method == "full":
        check_parameter_limit(architecture.name, architecture.parameters)
    else:
        check_modules(architecture, spec)
    sizes = describe_size(empty, read_config(folder))  # before PEFT replaces modules
    adapter = {} if spec.method == "full" else resolve_adapter(empty, spec.lora)
    size = f"{architecture.name} with {architecture.parameters:,} weights"
    facts = {"architecture": architecture.name, "parameters": architecture.parameters, "config": sizes}
    return InspectedModel(
        ModelStatus(uri=spec.model.uri, commit=snapshot.commit, **facts),
        empty.config.model_type,
        folder,
        load_tokenizer(folder),
        adapter,
        vocabulary=architecture.vocabulary,
        positions=architecture.positions,
        trained_positions=getattr(empty.config.get_text_config(), "max_position_embeddings", None) or maxsize,
        sentences=(size, *unused, *describe_quantizable(architecture.quantizable, bits)),
        files={name: sha256_of(ObjectName(name).below(folder)) for name in texts},
        weights={name: snapshot.etags.get(name, "") for name in weights},
    )


def check_weights(snapshot: Snapshot, texts: Path, names: Sequence[str], work: Path) -> tuple[str, ...]:
    """Check all weights by the headers of their files, and return log lines; no weight is downloaded."""
    from qlora_trainer.model.model_files import check_shards  # noqa: PLC0415 (as above)
    from qlora_trainer.model.weight_check import check_weight_files  # noqa: PLC0415

    check_shards(texts, snapshot.files, MODEL_FIELD)
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work) as folder:
        for name in text_files(snapshot.files):
            ObjectName(name).below(Path(folder)).symlink_to(ObjectName(name).below(texts).absolute())
        fetch_headers(snapshot, names, Path(folder), MODEL_FIELD)
        return check_weight_files(Path(folder))


def check_rows_fit(model: InspectedModel, tokenized: "TokenizedDataset") -> Iterator[str]:
    """Check that the model has an embedding and a position for every token of the rows; yield a log line.

    On a GPU a missing one ends the run with a device-side assertion that names neither.
    """
    if tokenized.largest_token >= model.vocabulary:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.model.uri: a row has the token id {tokenized.largest_token}, and the model's embedding has "
            f"{model.vocabulary} rows, so its tokenizer has more tokens than the model; use the tokenizer that the "
            "model was published with, or resize the embedding",
        )
    if model.positions is not None and tokenized.longest_row > model.positions:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.training.maxLength: the longest row has {tokenized.longest_row} tokens, and the model has "
            f"{model.positions} positions; set maxLength to {model.positions}",
        )
    if tokenized.longest_row > model.trained_positions:
        yield (
            f"the longest row has {tokenized.longest_row:,} tokens, more than the {model.trained_positions:,} that the "
            "model was pretrained on (max_position_embeddings); lower spec.training.maxLength unless that is intended"
        )


def rehearse_run(spec: QLoRAJobSpec, model: InspectedModel, tokenized: "TokenizedDataset", work: Path) -> Iterator[str]:
    """Rehearse a run with a model of a family that no test of the trainer takes through one; yield a log line."""
    from qlora_trainer.rehearsal import PROVEN_TYPES, RehearsalTask, rehearse_in_process  # noqa: PLC0415 (as above)

    if model.type in PROVEN_TYPES:
        return
    task = RehearsalTask(
        folder=str(model.folder.absolute()),
        method=spec.method,
        quantization=spec.quantization,
        lora=spec.lora,
        merged=None if spec.output.merged == "none" else spec.output.merge_base,
        largest_token=tokenized.largest_token,
    )
    yield from rehearse_in_process(task, model.status.architecture, work)


def tokenize_rows(  # noqa: PLR0913, PLR0917 (all that rows are made of)
    spec: QLoRAJobSpec, dataset: Dataset, rows: DatasetScan, tokenizer: Any, work: Path, note: LogFn
) -> "TokenizedDataset":
    """Tokenize all rows into local files; if no held-out row has an answer that fits, hold out others."""
    from qlora_trainer.data.chat_template import load_chat_template  # noqa: PLC0415 (as above)
    from qlora_trainer.data.row_encoder import RowEncoder  # noqa: PLC0415
    from qlora_trainer.data.tokenized_dataset import NoHeldOutRowError, tokenize_dataset  # noqa: PLC0415

    chats = any(source.row_format == "chat" for source in dataset.all_sources)
    chat = load_chat_template(tokenizer, spec.dataset.chat_template) if chats else None
    encoder = RowEncoder(tokenizer, spec.training.loss, chat)
    try:
        return tokenize_dataset(dataset, rows, encoder, spec.training, work)
    except NoHeldOutRowError as error:
        if dataset.held_out is not None:
            raise
        try:
            others = scan_rows(dataset, spec.dataset.evaluation.fraction, error.unusable)
        except RunError:  # no two rows are left
            raise error from None
        note(f"{error.message}; other rows are held out")
        return tokenize_dataset(
            dataset, others, replace(encoder, rejected=RowErrors(), special=RowErrors()), spec.training, work
        )


def describe_prompts(tokenized: "TokenizedDataset") -> Iterator[str]:
    """Yield log lines if texts are not what they seem, or answers are learned where a server does not ask for them."""
    if tokenized.special.total:
        location, token = tokenized.special.first[0]
        yield (
            f"{tokenized.special.total:,} rows have special tokens of the tokenizer in their text, such as {token} in "
            f"{location}; they are read as these tokens, by servers too: remove them unless that is intended"
        )
    if tokenized.beside_prompt:
        yield (
            f"{tokenized.beside_prompt:,} of {tokenized.status.evaluation_rows:,} held-out rows do not begin with the "
            "prompt that a server renders for them, so what is learned is not what a server asks for; if the chat "
            "template's prompt begins a thought (<think>), begin the answers with one, or set spec.dataset.chatTemplate"
        )


def preview_rows(tokenized: "TokenizedDataset", tokenizer: Any) -> Iterator[str]:
    """Yield log lines with some training rows as the model sees them."""
    from qlora_trainer.data.preview import format_preview, preview, shown_rows  # noqa: PLC0415 (as above)
    from qlora_trainer.data.shards import read_token_rows  # noqa: PLC0415

    numbers = shown_rows(tokenized.status.training_rows)
    for number, row in zip(numbers, read_token_rows(tokenized.training_file, numbers), strict=True):
        yield f"training row {number + 1}, labels in ⟦⟧:\n{format_preview(preview(row, tokenizer))}"


def resolve_spec(spec: QLoRAJobSpec, model: InspectedModel, tokenized: "TokenizedDataset") -> ResolvedSpec:
    """Return the resolved values of the manifest; a chat template equal to the model's own counts as not set."""
    override = spec.dataset.chat_template
    return ResolvedSpec(
        model=model.status,
        dataset=tokenized.status,
        rows_digest=tokenized.digest,
        adapter=model.adapter,
        chat_template=None if override == model.tokenizer.chat_template else override,
    )


def _name_result(output: Store, config: PrepareConfig, resolved: ResolvedSpec) -> Prepared:
    spec = config.spec
    digest, full = result_digest(spec, resolved), full_digest(spec, resolved)
    prefix = f"{output.root}/{digest}"
    published = find_reusable(output, digest, spec.output.if_exists, config.uid, full, published=config.published)
    if published is not None and spec.output.if_exists == "Fail" and config.published is None:
        raise RunError(
            Reason.OUTPUT_EXISTS,
            f"spec.output.ifExists: {prefix} was published at {published.created_at:%Y-%m-%d %H:%M} UTC; set Skip to "
            "use it, or change the seed to train again",
        )
    if published is not None:
        location = f"It was published as {published.result.adapter} by a run whose gate it passed."
        check_gate(spec.evaluation.gate, published.result.evaluation, location)
    manifest = published or _accept_rejected(output, config, digest, full)
    return Prepared(
        digest=digest,
        full_digest=full,
        prefix=prefix,
        model=resolved.model,
        dataset=resolved.dataset,
        trainer_version=__version__,
        published=_complete(output, config, digest, manifest.result) if manifest else None,
    )


def _complete(output: Store, config: PrepareConfig, digest: str, result: Result) -> Result | None:
    """Return a published result with its merged model; None if a training pod has to merge it."""
    if config.published is not None and config.spec.output.merged != "none":
        return None  # no attempt reports the digest of a merged model
    return with_merged(output, digest, config.spec.output, result)


def _accept_rejected(output: Store, config: PrepareConfig, digest: str, full: str) -> ResultManifest | None:
    """Publish a result that another gate rejected and this one accepts, without training again."""
    spec, rejected = config.spec, find_rejected(output, digest, full, config.published)
    if rejected is None or not has_required_metrics(spec.evaluation.gate, rejected.result.evaluation):
        return None
    if not is_reusable(rejected, spec.output.if_exists, config.uid):
        return None
    check_gate(spec.evaluation.gate, rejected.result.evaluation, describe_rejected(rejected.result))
    put_manifest(output, rejected)
    return rejected


def store_prepared(
    output: Store, prepared: Prepared, model: InspectedModel, tokenized: "TokenizedDataset", tasks: PinnedTasks
) -> Prepared:
    """Upload the token rows, the pinned benchmark tasks and the digests, and the facts last; return the facts."""
    from qlora_trainer.data import shards  # noqa: PLC0415 (pyarrow is slow to import)

    files: dict[str, Path | bytes] = {
        shards.TRAINING: tokenized.training_file,
        shards.EVALUATION: tokenized.held_out_file,
    }
    if tasks.tasks:
        files[shards.TASKS] = tasks.model_dump_json(by_alias=True, indent=2).encode()
    digests = dict(store_prepared_file(output, prepared.digest, name, source) for name, source in files.items())
    inputs = PreparedInputs(prepared=digests, model=model.files, weights=model.weights)
    recorded = store_inputs(output, prepared, inputs)
    output.put(f"{prepared.digest}/{shards.FACTS}", recorded.model_dump_json(by_alias=True, indent=2).encode())
    return recorded
