"""Writes adapter and report to files and uploads them; the manifest comes last and is written once."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from qlora_api.foreign_files import read_file
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.object_names import ObjectName
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.report import (
    AdapterRecord,
    EvaluatedRow,
    ManifestFile,
    MergedManifest,
    MergeReport,
    ResultManifest,
    RunReport,
)
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import ManifestRef
from qlora_trainer.errors import RunError
from qlora_trainer.model.adapter import rewrite_for_original_base
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.full_finetune import save_full_model
from qlora_trainer.publishing.html_report import render_html
from qlora_trainer.publishing.plots import draw_loss, draw_plots
from qlora_trainer.storage.listed_files import describe_files
from qlora_trainer.storage.results import (
    MANIFEST,
    RECORD,
    REJECTED,
    REJECTED_RECORD,
    find_manifest,
    is_complete,
    is_reusable,
    manifest_json,
    merged_folder,
    put_manifest,
    remove_replaced,
    replace_manifest,
    update_latest,
)
from qlora_trainer.storage.store import ObjectExistsError, Store, sha256_of
from qlora_trainer.training.state import Weights

log = logging.getLogger(__name__)

WEIGHTS_FOLDER: Final = {"qlora": "adapter", "lora": "adapter", "full": "model"}
"""Folder of the result, by method."""
REPORT: Final = "report/report.json"
PAGE: Final = "report/report.html"
ROWS: Final = "report/evaluation.jsonl"
LOSS_PLOT: Final = "report/loss.png"
AnnounceFn = Callable[[ManifestRef], None]
"""Reports a manifest before it is written."""


def no_announcement(_: ManifestRef) -> None:
    """Report nothing, since nobody records it."""


@dataclass(frozen=True)
class MergedModel:
    """A merged model in a local folder."""

    folder: Path
    report: MergeReport


def write_weights(
    trainable: TrainableModel, tokenizer: Any, record: AdapterRecord, folder: Path, weights: Weights | None = None
) -> Path:
    """Write the trained weights, the tokenizer and the adapter record.

    `weights` are the gathered weights of the adapter if the model has only shards of them (ZeRO-3).
    """
    target = folder / WEIGHTS_FOLDER[record.method]
    if trainable.is_full_finetune:
        save_full_model(trainable.model, record.base, target)
    else:
        save_adapter(trainable, record, target, weights)
    tokenizer.save_pretrained(target)
    (target / RECORD).write_text(record.model_dump_json(by_alias=True, indent=2))
    return target


def save_adapter(trainable: TrainableModel, record: AdapterRecord, target: Path, weights: Weights | None) -> None:
    """Write the adapter in the format of peft and vLLM."""
    state_dict = {"state_dict": trainable.wrapped.state_dict() | dict(weights)} if weights else {}
    # 'auto' sends a request to the hub to find out whether the vocabulary was resized; it never is (peft#2898).
    trainable.wrapped.save_pretrained(target, save_embedding_layers=False, **state_dict)
    if trainable.initial_weights:
        rewrite_for_original_base(target, trainable.initial_weights)
    config = target / "adapter_config.json"
    config.write_text(canonical_config(read_file(config, MAX_CONFIG_BYTES), record.base, record.commit))


def canonical_config(text: str | bytes, uri: str, commit: str) -> str:
    """Name the base as peft loads it (vLLM compares names), and not the copy that was trained on; sort the modules.

    What peft cannot load, in a bucket or a claim, keeps its URI; the model card says to download it.
    """
    config = json.loads(text)
    config["base_model_name_or_path"] = uri.removeprefix("hf://").removeprefix("file://")
    config["revision"] = commit if uri.startswith("hf://") else None
    for field in ("target_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def write_report(report: RunReport, rows: Sequence[EvaluatedRow], folder: Path) -> None:
    """Write the report as JSON and as HTML, the loss plot, and the evaluated rows."""
    (folder / LOSS_PLOT).parent.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(report.model_dump_json(by_alias=True, indent=2))
    (folder / ROWS).write_text("".join(f"{row.model_dump_json(by_alias=True)}\n" for row in rows), encoding="utf-8")
    (folder / LOSS_PLOT).write_bytes(draw_loss(report))
    (folder / PAGE).write_text(render_html(report, draw_plots(report, rows)), encoding="utf-8")


def publish(  # noqa: PLR0913, PLR0917 (what is published, when, and who is told)
    output: Store,
    config: RunConfig,
    result: Result,
    folder: Path,
    now: datetime,
    announce: AnnounceFn = no_announcement,
) -> Result:
    """Upload a folder and then its manifest, and return the result with the URIs of its files.

    What somebody published meanwhile is replaced if it is incomplete, or as spec.output.ifExists says. Otherwise it may
    be the result of an equal run, or forged: this run's own goes beside it, with a manifest of its own.
    """
    digest, if_exists = config.prepared.digest, config.spec.output.if_exists
    previous = find_manifest(output, digest)
    if previous is not None and is_reusable(previous, if_exists, config.uid) and is_complete(output, previous):
        return _publish_beside(output, config, result, folder, now, announce)
    subfolder, files = _upload(output, config.prepared, folder)
    manifest = build_manifest(config, _relocate_result(result, config.prepared.prefix, subfolder), files, now)
    announce(_refer(config.prepared, MANIFEST, manifest))
    if previous is not None:
        replace_manifest(output, manifest)
        remove_replaced(output, previous)
    elif not put_manifest(output, manifest):
        return _publish_beside(output, config, result, folder, now, announce)
    update_latest(output, digest, f"{config.prepared.prefix}/{MANIFEST}")
    return manifest.result


def _publish_beside(  # noqa: PLR0913, PLR0917 (as publish)
    output: Store, config: RunConfig, result: Result, folder: Path, now: datetime, announce: AnnounceFn
) -> Result:
    """Publish in a folder named by the files' content, with a manifest of its own."""
    prepared = config.prepared
    subfolder, files = _upload(output, prepared, folder, _content_folder(describe_files(folder)))
    name = f"{subfolder.partition('/')[0]}/{MANIFEST}"
    manifest = build_manifest(config, _relocate_result(result, prepared.prefix, subfolder), files, now)
    log.warning(
        "%s/%s is of somebody else: this run's result is published as %s",
        prepared.prefix,
        MANIFEST,
        manifest.result.adapter,
    )
    announce(_refer(prepared, name, manifest))
    output.put(f"{prepared.digest}/{name}", manifest_json(manifest))
    update_latest(output, prepared.digest, f"{prepared.prefix}/{name}")
    return manifest.result


def _refer(prepared: Prepared, name: str, manifest: ResultManifest) -> ManifestRef:
    return ManifestRef(uri=f"{prepared.prefix}/{name}", digest=sha256_of(manifest_json(manifest)))


def upload_rejected(  # noqa: PLR0913, PLR0917 (as publish)
    output: Store,
    config: RunConfig,
    result: Result,
    folder: Path,
    now: datetime,
    announce: AnnounceFn = no_announcement,
) -> Result:
    """Upload a result that the gate rejected to the folder `rejected`, with the manifest that it would have."""
    subfolder, files = _upload(output, config.prepared, folder, REJECTED)
    rejected = _relocate_result(result, config.prepared.prefix, subfolder)
    record = build_manifest(config, rejected, files, now)
    announce(_refer(config.prepared, REJECTED_RECORD, record))
    output.put(f"{config.prepared.digest}/{REJECTED_RECORD}", manifest_json(record))
    return rejected


def publish_merged(output: Store, config: RunConfig, adapter: str, merged: MergedModel, now: datetime) -> str:
    """Upload a merged model and then its manifest, and return its URI; files that are there already are kept."""
    prepared, base = config.prepared, merged.report.base
    subfolder, files = _upload(output, prepared, merged.folder, merged_folder(base))
    manifest = MergedManifest(
        digest=prepared.digest,
        model=f"{prepared.prefix}/{subfolder}",
        adapter=adapter,
        base_model=prepared.model.uri,
        base_commit=prepared.model.commit,
        created_at=now,
        merge=merged.report,
        files=files,
    )
    # One that is there is of a replaced adapter, of an equal run whose files are the same, or forged.
    output.put(f"{prepared.digest}/{merged_folder(base)}/{MANIFEST}", manifest_json(manifest))
    return manifest.model


def _upload(
    output: Store, prepared: Prepared, folder: Path, subfolder: str = ""
) -> tuple[str, tuple[ManifestFile, ...]]:
    """Upload a folder without replacing any file; return its subfolder in the result, and its files there."""
    files = describe_files(folder)
    # A crashed attempt may have left other files, or another run is publishing now: its manifest must stay valid.
    candidates = [subfolder, f"{subfolder}/{_content_folder(files)}".removeprefix("/")]
    for candidate in candidates:
        relocated = _relocate_files(files, candidate) if candidate else files
        if _put_files(output, prepared.digest, relocated, [file.path.below(folder) for file in files]):
            return candidate, relocated
    location = f"{prepared.prefix}/{candidates[-1]}"
    raise RunError(
        Reason.UPLOAD_FAILED, f"spec.output.uri: {location} has files with other content than this result; delete it"
    )


def _put_files(output: Store, digest: str, files: Sequence[ManifestFile], sources: Sequence[Path]) -> bool:
    """Upload files; return False if one exists with other content."""
    for file, source in zip(files, sources, strict=True):
        path = f"{digest}/{file.path}"
        try:
            output.put(path, source, if_none_match=True)
        except ObjectExistsError:
            if output.sha256(path) != file.sha256:
                return False
    return True


def _content_folder(files: tuple[ManifestFile, ...]) -> str:
    """Return a folder name derived from the files' content, so that publishers of equal files agree on it."""
    listing = "\n".join(f"{file.sha256} {file.path}" for file in files)
    return sha256_of(listing.encode())[:16]


def _relocate_files(files: tuple[ManifestFile, ...], subfolder: str) -> tuple[ManifestFile, ...]:
    return tuple(file.model_copy(update={"path": ObjectName(f"{subfolder}/{file.path}")}) for file in files)


def _relocate_result(result: Result, prefix: str, subfolder: str) -> Result:
    if not subfolder:
        return result
    folder, weights = f"{prefix}/{subfolder}", result.adapter.rpartition("/")[2]
    return result.model_copy(update={"adapter": f"{folder}/{weights}", "report": f"{folder}/{REPORT}"})


def build_manifest(config: RunConfig, result: Result, files: tuple[ManifestFile, ...], now: datetime) -> ResultManifest:
    """Return the manifest of a result."""
    prepared = config.prepared
    return ResultManifest(
        digest=prepared.digest,
        full_digest=prepared.full_digest,
        job=config.job,
        namespace=config.namespace,
        run=config.uid,
        base_model=prepared.model.uri,
        base_commit=prepared.model.commit,
        dataset_uri=config.spec.dataset.source_uris,
        dataset_digest=prepared.dataset.digest,
        trainer_version=prepared.trainer_version,
        created_at=now,
        result=result,
        files=files,
    )
