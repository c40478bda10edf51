"""Adapter and report as files, uploaded and verified; the manifest last, and only once."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from qlora_api.names import Reason
from qlora_api.report import EvaluatedRow, Manifest, ManifestFile, RunReport
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer.chart import draw_loss
from qlora_trainer.errors import RunError
from qlora_trainer.output import MANIFEST, find_manifest, point_latest
from qlora_trainer.report import render_html
from qlora_trainer.store import AlreadyThereError, Store, sha256_of

ADAPTER: Final = "adapter"
REPORT: Final = "report/report.json"
PAGE: Final = "report/report.html"
ROWS: Final = "report/evaluation.jsonl"
PICTURE: Final = "report/loss.png"


def write_adapter(peft: Any, tokenizer: Any, uri: str, commit: str, folder: Path) -> Path:
    """Write the adapter as peft and vLLM read it, with the tokenizer beside it."""
    target = folder / ADAPTER
    # With 'auto' peft would ask the hub whether the vocabulary was resized; it never is (peft#2898).
    peft.save_pretrained(target, save_embedding_layers=False)
    tokenizer.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    config = target / "adapter_config.json"
    config.write_text(canonical_config(config.read_text(), uri, commit))
    return target


def canonical_config(text: str, uri: str, commit: str) -> str:
    """Name the base as the hub does and not by a path of this computer (vLLM compares names), and sort the targets."""
    config = json.loads(text)
    config["base_model_name_or_path"] = uri.removeprefix("hf://")
    config["revision"] = commit if uri.startswith("hf://") else None
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def write_report(report: RunReport, rows: Sequence[EvaluatedRow], folder: Path) -> None:
    """Write the report as data, as a picture and as a page, and the rows that its figures come from."""
    picture = draw_loss(report.history, report.evaluation)
    (folder / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(report.model_dump_json(by_alias=True, indent=2))
    (folder / ROWS).write_text("".join(f"{row.model_dump_json(by_alias=True)}\n" for row in rows), encoding="utf-8")
    (folder / PICTURE).write_bytes(picture)
    (folder / PAGE).write_text(render_html(report, picture), encoding="utf-8")


def publish(output: Store, config: RunConfig, result: Result, folder: Path, now: datetime) -> Result:
    """Upload a folder and then its manifest; whoever published this digest first is right."""
    digest = config.prepared.digest
    published = find_manifest(output, digest) or _upload_all(output, config, result, folder, now)
    point_latest(output, digest, config.prepared.prefix)
    return published.result


def _upload_all(output: Store, config: RunConfig, result: Result, folder: Path, now: datetime) -> Manifest:
    """Return the manifest that is there in the end: this publisher's, or that of somebody faster."""
    files, digest = describe_files(folder), config.prepared.digest
    if not _upload(output, digest, files, folder):
        # A crashed attempt left other files there, or somebody is publishing right now: their manifest must stay true.
        place = _own_place(files)
        files, result = _moved_files(files, place), _moved_result(result, f"{config.prepared.prefix}/{place}")
        if not _upload(output, digest, files, folder, place):
            where = f"{config.prepared.prefix}/{place}"
            raise RunError(
                Reason.UPLOAD_FAILED, f"spec.output.uri: {where} holds files that nobody uploaded; remove it"
            )
    manifest = build_manifest(config, result, files, now)
    try:
        output.put(f"{digest}/{MANIFEST}", _json_of(manifest), if_none_match=True)
    except AlreadyThereError:
        return find_manifest(output, digest) or manifest
    return manifest


def _upload(output: Store, digest: str, files: tuple[ManifestFile, ...], folder: Path, place: str = "") -> bool:
    """Upload files without ever replacing one; False where there is one with another content."""
    for file in files:
        path = f"{digest}/{file.path}"
        try:
            output.put(path, folder / file.path.removeprefix(f"{place}/"), if_none_match=True)
        except AlreadyThereError:
            if output.sha256(path) != file.sha256:
                return False
    return True


def _own_place(files: tuple[ManifestFile, ...]) -> str:
    """Return a folder's name that depends on the files' content, so that no two publishers disagree about it."""
    listing = "\n".join(f"{file.sha256} {file.path}" for file in files)
    return sha256_of(listing.encode())[:16]


def _moved_files(files: tuple[ManifestFile, ...], place: str) -> tuple[ManifestFile, ...]:
    return tuple(file.model_copy(update={"path": f"{place}/{file.path}"}) for file in files)


def _moved_result(result: Result, prefix: str) -> Result:
    return result.model_copy(update={"adapter": f"{prefix}/{ADAPTER}", "report": f"{prefix}/{REPORT}"})


def describe_files(folder: Path) -> tuple[ManifestFile, ...]:
    """Return every file under a folder, with size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        ManifestFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    )


def build_manifest(config: RunConfig, result: Result, files: tuple[ManifestFile, ...], now: datetime) -> Manifest:
    """Return the manifest of a result."""
    prepared = config.prepared
    return Manifest(
        digest=prepared.digest,
        job=config.job,
        namespace=config.namespace,
        base_model=prepared.model.uri,
        base_commit=prepared.model.commit,
        dataset_uri=config.spec.dataset.uri,
        dataset_digest=prepared.dataset.digest,
        trainer_version=prepared.trainer_version,
        created_at=now,
        result=result,
        files=files,
    )


def _json_of(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(by_alias=True, indent=2).encode()
