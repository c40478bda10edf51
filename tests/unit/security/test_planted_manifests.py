"""Whoever can write the bucket plants manifests: none brings foreign URIs or numbers into the status of a run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_api.reasons import Reason
from qlora_api.report import MergedManifest, MergeReport, ResultManifest
from qlora_api.v1alpha1 import ManifestRef, OutputSpec
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import fetch_published, open_adapter
from qlora_trainer.publishing.publish import MergedModel, publish, publish_merged, upload_rejected
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.results import (
    MANIFEST,
    REJECTED_RECORD,
    find_merged,
    find_rejected,
    find_reusable,
    with_merged,
)
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import OUTPUT_FIELD
from tests.make import NOW
from tests.unit.trainer.results import DIGEST, config, result
from tests.unit.trainer.trained import make_record

FULL_DIGEST = DIGEST + "0" * 48
Change = Callable[[dict[str, Any], str], object]
"""Changes the content of a manifest; its second argument is the prefix of the run."""


@pytest.fixture
def output(tmp_path: Path) -> FileStore:
    """The output of a job with a published and a rejected result."""
    store = FileStore(f"file://{tmp_path}/output/colours", OUTPUT_FIELD)
    run = config(store.root)
    run = run.model_copy(update={"prepared": run.prepared.model_copy(update={"full_digest": FULL_DIGEST})})
    prefix = run.prepared.prefix
    own = result(1.0).model_copy(update={"adapter": f"{prefix}/adapter", "report": f"{prefix}/report/report.json"})
    record = make_record(run.spec.quantization).model_dump_json(by_alias=True)
    for name, content in (("adapter/adapter_config.json", "{}"), ("report/report.json", "{}")):
        (tmp_path / "files" / name).parent.mkdir(parents=True)
        (tmp_path / "files" / name).write_text(content)
    (tmp_path / "files/adapter/qlora.json").write_text(record)
    publish(store, run, own, tmp_path / "files", NOW)
    upload_rejected(store, run, own, tmp_path / "files", NOW)
    return store


def replaced(*path: str, by: object) -> Change:
    """Replace a field."""

    def change(content: dict[str, Any], prefix: str) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = by.replace("PREFIX", prefix) if isinstance(by, str) else by

    return change


ATTACKS = {
    "other-job": (replaced("job", by="other"), "it is of job 'other'"),
    "escape-in-job": (replaced("job", by="\x1b]52;c;x"), r"it is of job '\\x1b"),
    "other-full-digest": (replaced("fullDigest", by=DIGEST + "1" * 48), "its full digest is"),
    "shell-in-adapter": (replaced("result", "adapter", by="hf://x$(touch${IFS}x)"), "its adapter 'hf://x"),
    "shell-below-prefix": (replaced("result", "adapter", by="PREFIX/$(touch x)"), "its adapter '"),
    "line-below-prefix": (replaced("result", "adapter", by="PREFIX/adapter\n"), "its adapter '"),
    "query-below-prefix": (replaced("result", "adapter", by="PREFIX/adapter?x"), "its adapter '"),
    "prefix-itself": (replaced("result", "adapter", by="PREFIX"), "its adapter '"),
    "folder-next-to-prefix": (replaced("result", "adapter", by="PREFIX-evil/adapter"), "its adapter '"),
    "out-of-prefix": (replaced("result", "adapter", by="PREFIX/../evil/adapter"), "its adapter '"),
    "empty-segment": (replaced("result", "adapter", by="PREFIX//etc"), "its adapter '"),
    "other-bucket": (replaced("result", "adapter", by="s3://evil/colours/0123456789abcdef/adapter"), "its adapter '"),
    "script-as-report": (replaced("result", "report", by="javascript:alert(1)"), "its report '"),
    "foreign-merged-model": (replaced("result", "merged", by="hf://evil/model"), "its merged '"),
    "no-files": (replaced("files", by=[]), "it lists no file of .*/adapter"),
}

"""Manifests of somebody else, and what is said of them: they are neither used nor replaced."""
DAMAGED: dict[str, Change] = {
    "other-digest": replaced("digest", by="f" * 16),
    "short-full-digest": replaced("fullDigest", by=DIGEST),
    "endless-adapter": replaced("result", "adapter", by="s3://" + "x" * 9999),
    "huge-steps": replaced("result", "steps", by=10**40),
    "nan-speed": replaced("result", "tokensPerSecond", by=float("nan")),
    "infinite-loss": replaced("result", "evaluation", "base", "loss", by="1e999"),
    "text-as-rows": replaced("result", "evaluation", "rows", by="many"),
    "result-of-another-type": replaced("result", by=[1]),
}
"""What no trainer writes: it is skipped, and the run trains and replaces it."""


def plant(output: FileStore, path: str, change: Change) -> None:
    content = json.loads(output.read(path))
    change(content, f"{output.root}/{DIGEST}")
    output.put(path, json.dumps(content).encode())


@pytest.mark.parametrize(("change", "cause"), ATTACKS.values(), ids=ATTACKS)
def test_planted_manifest_is_refused(output: FileStore, change: Change, cause: str) -> None:
    plant(output, f"{DIGEST}/{MANIFEST}", change)
    with pytest.raises(RunError, match=cause) as caught:
        find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST)
    start = f"spec.output.uri: {output.root}/{DIGEST}/manifest.json is not a manifest of this run: "
    assert (caught.value.reason, caught.value.message.startswith(start)) == (Reason.INVALID_SPEC, True)
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize(("change", "cause"), ATTACKS.values(), ids=ATTACKS)
def test_planted_rejected_result_is_not_published(output: FileStore, change: Change, cause: str) -> None:
    plant(output, f"{DIGEST}/{REJECTED_RECORD}", change)
    with pytest.raises(RunError, match=cause):
        find_rejected(output, DIGEST, FULL_DIGEST)


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize(
    "change",
    [*(change for name, (change, _) in ATTACKS.items() if name != "no-files"), lambda *_: None],
    ids=[*(name for name in ATTACKS if name != "no-files"), "complete-and-of-this-job-and-digest"],
)
def test_manifest_planted_before_publication_is_not_the_result(
    output: FileStore, tmp_path: Path, change: Change, moment: str
) -> None:
    """The run has trained, and finds a manifest: when it looks, or when it writes its own."""
    path = f"{DIGEST}/{MANIFEST}"
    plant(output, path, change)
    planted = output.read(path)

    class PlantedLate(FileStore):
        """The output, without a manifest until one is written."""

        def exists(self, path: str) -> bool:
            return moment == "before" and super().exists(path)

        def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
            nonlocal moment
            moment = "before" if path.endswith(MANIFEST) else moment
            return super().put(path, source, if_none_match=if_none_match)

    run = config(output.root)
    run = run.model_copy(update={"prepared": run.prepared.model_copy(update={"full_digest": FULL_DIGEST})})
    own = result(2.0).model_copy(update={"adapter": f"{run.prepared.prefix}/adapter"})
    late = PlantedLate(output.root, OUTPUT_FIELD)
    found = publish(late, run, own, tmp_path / "files", NOW)
    assert found.evaluation.base.loss == 2.0
    assert found.adapter.startswith(f"{run.prepared.prefix}/")
    assert found.adapter != own.adapter
    assert output.read(path) == planted
    resolver = SourceResolver(run.platform, environment_secrets())
    opened = open_adapter(resolver, found.adapter, "ADAPTER", tmp_path / "work")
    assert (opened.verified, fetch_published(output, DIGEST, found.adapter, tmp_path / "work")) == (True, opened.folder)


def reported(output: FileStore, name: str = MANIFEST) -> ManifestRef:
    """The manifest that is there, as the pod that wrote it reported it."""
    digest = hashlib.sha256(output.read(f"{DIGEST}/{name}")).hexdigest()
    return ManifestRef(uri=f"{output.root}/{DIGEST}/{name}", digest=digest)


@pytest.mark.parametrize("name", [MANIFEST, REJECTED_RECORD])
def test_only_a_reported_manifest_counts_after_an_attempt(output: FileStore, name: str) -> None:
    """Its pod was lost after it had published; the digest of what it published is in the status."""

    def find(*published: ManifestRef) -> ResultManifest | None:
        if name == REJECTED_RECORD:
            return find_rejected(output, DIGEST, FULL_DIGEST, published)
        return find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST, published=published)

    honest, path = reported(output, name), f"{DIGEST}/{name}"
    assert find(honest) == ResultManifest.model_validate_json(output.read(path))
    assert find() is None
    plant(output, path, replaced("result", "steps", by=9))  # complete, and of this job and digest
    assert find(honest) is None
    assert find(honest.model_copy(update={"uri": f"{output.root}/{DIGEST}/0123/{name}"})) is None
    output.delete(path)
    assert find(honest) is None


def test_rejected_result_that_a_later_gate_accepted_is_found_under_its_new_name(output: FileStore) -> None:
    rejected = reported(output, REJECTED_RECORD)
    assert find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST, published=(rejected,)) is None
    output.put(f"{DIGEST}/{MANIFEST}", output.read(f"{DIGEST}/{REJECTED_RECORD}"))
    found = find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST, published=(rejected,))
    assert found == find_rejected(output, DIGEST, FULL_DIGEST, (rejected,))
    assert found is not None


@pytest.mark.parametrize("uri", ["s3://evil/manifest.json", "PREFIX/../manifest.json", "PREFIX//manifest.json", ""])
def test_reported_manifest_outside_the_output_is_not_read(output: FileStore, uri: str) -> None:
    planted = uri.replace("PREFIX", f"{output.root}/{DIGEST}")
    named = reported(output).model_copy(update={"uri": planted, "digest": "0" * 64})
    assert find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST, published=(named,)) is None


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_damaged_manifest_is_skipped(output: FileStore, change: Change) -> None:
    for path in (f"{DIGEST}/{MANIFEST}", f"{DIGEST}/{REJECTED_RECORD}"):
        plant(output, path, change)
    assert find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST) is None
    assert find_rejected(output, DIGEST, FULL_DIGEST) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"digest": 1}'])
def test_manifest_that_is_none_is_skipped(output: FileStore, content: bytes) -> None:
    output.put(f"{DIGEST}/{MANIFEST}", content)
    assert find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST) is None


@pytest.mark.parametrize("content", [None, b"", b"other size"])
def test_manifest_whose_adapter_is_incomplete_is_skipped(output: FileStore, content: bytes | None) -> None:
    path = f"{DIGEST}/adapter/adapter_config.json"
    output.delete(path)
    if content is not None:
        output.put(path, content)
    assert find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST) is None


@pytest.mark.parametrize(
    "uri", ["hf://evil/model", "PREFIX/merged/$(x)", "PREFIX/../evil", "s3://evil/merged/original"]
)
def test_foreign_merged_model_is_refused(output: FileStore, uri: str) -> None:
    published = find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST)
    assert published is not None
    planted = MergedManifest(
        digest=DIGEST,
        model=uri.replace("PREFIX", f"{output.root}/{DIGEST}"),
        adapter=published.result.adapter,
        base_model="hf://o/m",
        base_commit="c",
        created_at=NOW,
        merge=MergeReport(base="original"),
        files=published.files,
    )
    output.put(f"{DIGEST}/merged/original/{MANIFEST}", planted.model_dump_json(by_alias=True).encode())
    spec = OutputSpec(uri="s3://adapters/team-a", merged="bf16")
    with pytest.raises(RunError, match=r"merged/original/manifest\.json is not a manifest of this run: its merged '"):
        with_merged(output, DIGEST, spec, published.result)


def test_merged_model_planted_during_a_run_is_not_its_merged_model(output: FileStore, tmp_path: Path) -> None:
    """It is complete, and of the run's adapter; the run uploads its own beside it."""
    run = config(output.root)
    adapter, folder = f"{run.prepared.prefix}/adapter", tmp_path / "merged"
    for weights in (b"evil", b"own"):
        (folder / weights.decode()).mkdir(parents=True)
        (folder / weights.decode() / "model.safetensors").write_bytes(weights)
        merged = MergedModel(folder / weights.decode(), MergeReport(base="original"))
        uri = publish_merged(output, run, adapter, merged, NOW)
    assert output.read(f"{uri.removeprefix(f'{output.root}/')}/model.safetensors") == b"own"
    assert find_merged(output, DIGEST, "original", adapter) == uri


HONEST = {
    "as-published": lambda _, __: None,
    "of-an-earlier-version": lambda content, _: content.pop("fullDigest"),
    "of-a-newer-version": replaced("owner", by={"team": "a"}),
    "of-the-same-job-in-another-namespace": replaced("namespace", by="other"),
    "of-another-qlorajob": replaced("run", by="uid"),
}


@pytest.mark.parametrize("change", HONEST.values(), ids=HONEST)
def test_honest_result_is_found(output: FileStore, change: Change) -> None:
    plant(output, f"{DIGEST}/{MANIFEST}", change)
    found = find_reusable(output, DIGEST, "Skip", "", FULL_DIGEST)
    assert found == ResultManifest.model_validate_json(output.read(f"{DIGEST}/{MANIFEST}"), extra="ignore")
    assert find_reusable(output, DIGEST, "Skip", "") == found  # prepared by an earlier version
    assert find_rejected(output, DIGEST, FULL_DIGEST) is not None
