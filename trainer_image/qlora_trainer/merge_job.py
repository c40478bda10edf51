"""Merges a published adapter into its base: at the end of a run, or later by `qlora merge`."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final
from uuid import uuid4

import pyarrow as pa

from qlora_api.foreign_files import read_file
from qlora_api.local_requests import MergedFolder, MergeRequest
from qlora_api.names import SecretRole
from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.report import MAX_MANIFEST_BYTES, AdapterRecord, EvaluatedRow
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import GIB, MIB
from qlora_api.v1alpha1 import MergeBase
from qlora_trainer import stages
from qlora_trainer.data.rows import Example
from qlora_trainer.data.shards import EVALUATION, read_token_rows
from qlora_trainer.data.tokenization import TokenRow, encode_examples
from qlora_trainer.errors import RunError
from qlora_trainer.inference.compatibility import check_adapter_weights, check_compatible
from qlora_trainer.inference.published_adapter import (
    PublishedAdapter,
    fetch_base,
    fetch_published,
    open_adapter,
    parents,
)
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.observability.progress import LogFn, no_log
from qlora_trainer.publishing.merge_weights import MEASURED_TOKENS, MergeTask, merge_adapter
from qlora_trainer.publishing.publish import ROWS, MergedModel, publish_merged
from qlora_trainer.runtime.liveness import LIVENESS
from qlora_trainer.runtime.resource_limits import memory_limit
from qlora_trainer.storage.results import (
    MANIFEST,
    RECORD,
    check_own_uris,
    merged_folder,
    with_merged,
)
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import FieldRef, Store, sha256_of

ADAPTER_FIELD = "ADAPTER"
"""The argument of `qlora merge` that names the adapter."""
_MAX_ROWS_BYTES: Final = GIB
"""Of the prepared rows, and of the memory to read some: whoever wrote the adapter may have written a bomb."""
_MEASURED_BYTES: Final = 16 * MIB
"""Of the evaluated rows, the first of which are enough to measure a merged model."""
TARGET_FIELD = "--to"


def add_merged(  # noqa: PLR0913 (what is merged, from where to where)
    resolver: SourceResolver, output: Store, config: RunConfig, result: Result, work: Path, *, reuse: bool
) -> Result:
    """Return the result with the merged model that the spec asks for; `reuse` takes one that is in the output."""
    digest = config.prepared.digest
    if config.spec.output.merged == "none":
        return result
    complete = with_merged(output, digest, config.spec.output, result) if reuse else None
    if complete is not None:
        return complete
    adapter = fetch_published(output, digest, result.adapter, work)
    task = MergeTask(
        model=stages.fetch_model(resolver, config, work),
        adapter=adapter,
        base=config.spec.output.merge_base,
        record=ignore_unknown(AdapterRecord, read_file(adapter / RECORD, MAX_MANIFEST_BYTES), RECORD),
        rows=stages.load_rows(output, config, EVALUATION, work),
    )
    folder = stages.empty_folder(ObjectName(digest).below(work / "merged"))
    with LIVENESS.paused():  # the adapter is published, no GPU is computing, and a layer may take minutes
        merged = MergedModel(folder, merge_adapter(task, folder))
    uri = publish_merged(output, config, result.adapter, merged, datetime.now(UTC))
    path = f"{digest}/{merged_folder(config.spec.output.merge_base)}/{MANIFEST}"
    return check_own_uris(output, result.model_copy(update={"merged": uri}), path)


def merge_published(request: MergeRequest, resolver: SourceResolver, work: Path, note: LogFn = no_log) -> MergedFolder:
    """Merge an adapter into its base and write the model to a folder, atomically."""
    target = Path(request.target)
    check_target(target)
    published = open_adapter(resolver, request.adapter, ADAPTER_FIELD, work)
    check_adapter_weights(published.folder)
    record = published.record
    check_init(record, request.base)
    note(f"{record.job}: an adapter for {record.base} at {record.commit}{published.caveat}")
    model = fetch_base(resolver, record, request.model, work)
    check_compatible(published, model, "--base-model" if request.model else "the adapter's base")
    task = MergeTask(model, published.folder, request.base, record, find_rows(resolver, published, work))
    with atomic_folder(target) as partial:
        report = merge_adapter(task, partial, note)
    return MergedFolder(
        folder=request.target,
        adapter=published.uri,
        base_model=request.model or record.base,
        base_commit=None if request.model else record.commit,
        merge=report,
    )


def check_target(target: Path) -> None:
    """Raise RunError if the target exists and is not an empty folder; a link cannot be replaced by the new one."""
    try:
        is_empty = target.is_dir() and not any(target.iterdir())
        is_free = not target.is_symlink() and (is_empty or not target.exists())
    except OSError as error:
        message = f"{TARGET_FIELD}: {target} cannot be used: {error.strerror}; choose another folder"
        raise RunError(Reason.OUTPUT_EXISTS, message) from error
    if not is_free:
        raise RunError(Reason.OUTPUT_EXISTS, f"{TARGET_FIELD}: {target} is not an empty folder; choose another one")


def check_init(record: AdapterRecord, base: MergeBase) -> None:
    """Reject a LoftQ adapter on the original base: it corrects a quantization error that this base does not have."""
    if record.init == "loftq" and base == "original":
        raise RunError(
            Reason.INVALID_SPEC,
            "--base: the adapter was initialized with loftq, so it corrects the quantization error of the 4-bit base, "
            "which the original base does not have; set --base dequantised",
        )


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to the target that is renamed to it at the end, or deleted on an error."""
    partial = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            Reason.INVALID_SPEC, f"{TARGET_FIELD}: cannot write {target}: {error.strerror}; choose another folder"
        ) from error
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_rows(resolver: SourceResolver, published: PublishedAdapter, work: Path) -> Sequence[TokenRow]:
    """Return the held-out rows stored with an adapter: its token rows, else those of its report, else none."""
    for parent in parents(published.uri):
        store = resolver.open_store(parent, FieldRef(SecretRole.OUTPUT, ADAPTER_FIELD))
        # Permission to read an adapter does not imply permission to read its parent, and only the measurement needs it.
        # What others left there may be no rows.
        with contextlib.suppress(RunError, ValueError, MemoryError):
            if store.exists(EVALUATION):
                return _prepared_rows(store, work)
            if store.exists(ROWS):
                return _reported_rows(store, published)
    return ()


def _prepared_rows(store: Store, work: Path) -> Sequence[TokenRow]:
    path = ObjectName(sha256_of(store.root.encode())[:16]).below(work / "rows") / EVALUATION
    if store.read_start(EVALUATION, 1)[1] > _MAX_ROWS_BYTES:
        return ()
    store.download(EVALUATION, path)
    pa.allocate_buffer(1)  # the allocator reserves its arena now, so that it does not count as memory of the file
    with memory_limit(_MAX_ROWS_BYTES):
        return tuple(islice(read_token_rows(path), MEASURED_TOKENS))


def _reported_rows(store: Store, published: PublishedAdapter) -> Sequence[TokenRow]:
    """Tokenize the first prompts and references of a report; rows of plain text have neither."""
    start, size = store.read_start(ROWS, _MEASURED_BYTES)
    lines = start.decode(errors="replace").split("\n")[: None if size <= _MEASURED_BYTES else -1]
    rows = (ignore_unknown(EvaluatedRow, line, ROWS) for line in lines if line)
    examples = islice((Example(row.prompt, row.reference) for row in rows if row.prompt), MEASURED_TOKENS)
    return encode_examples(list(examples), load_tokenizer(published.folder, field=ADAPTER_FIELD), "completion")
