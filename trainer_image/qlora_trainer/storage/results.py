"""Layout of results below spec.output.uri: manifests, merged models and rejected results."""

import json
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

from pydantic import ValidationError

from qlora_api.names import output_root
from qlora_api.reasons import Reason
from qlora_api.report import ManifestFile, MergedManifest, ResultManifest
from qlora_api.result import Result
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.v1alpha1 import MergeBase, OutputSpec, QLoRAJobSpec
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import load_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import OUTPUT_FIELD, ObjectExistsError, Store, sha256_of

MANIFEST: Final = "manifest.json"
"""Written last, in one request: if it exists, the result is complete."""
AnyManifest = TypeVar("AnyManifest", ResultManifest, MergedManifest)
IfExists: TypeAlias = Literal["Skip", "Fail", "Overwrite"]
"""spec.output.ifExists."""
LATEST: Final = "latest.json"
"""Points to the newest manifest of a job."""
RECORD: Final = "qlora.json"
"""Next to the weights: what merging and chat need to know about the adapter."""
REJECTED: Final = "rejected"
"""Folder of a result that its gate rejected."""
REJECTED_RECORD: Final = f"{REJECTED}/rejected.json"
"""Manifest of a rejected result, written last as well."""


def open_output(resolver: SourceResolver, spec: QLoRAJobSpec, job: str) -> Store:
    """Open the output of a job; all paths in it start with a result digest."""
    return resolver.open_store(output_root(spec.output.uri, job), OUTPUT_FIELD)


def open_own_output(config: PrepareConfig | RunConfig) -> Store:
    """Open the output with clients of its own, for a thread that other threads must not block."""
    resolver = SourceResolver(config.platform, load_secrets(config.spec, config.namespace))
    return open_output(resolver, config.spec, config.job)


def find_manifest(output: Store, digest: str) -> ResultManifest | None:
    """Return the manifest of a published result, or None."""
    return _find(output, f"{digest}/{MANIFEST}")


def find_reusable(
    output: Store, digest: str, if_exists: IfExists, run: str, full_digest: str | None = None
) -> ResultManifest | None:
    """Return the manifest of a result that makes training unnecessary.

    Args:
        output: Output of the job.
        digest: Result digest.
        if_exists: spec.output.ifExists.
        run: UID of the run; with Overwrite, only a result of this run is reusable.
        full_digest: All digits of the digest; None if an earlier version prepared the run.

    Raises:
        RunError: INVALID_SPEC if the manifest is not one of this job's results, or lists files that do not exist.

    """
    found = find_manifest(output, digest)
    if found is None or not is_reusable(found, if_exists, run):
        return None
    check_own(output, found, f"{digest}/{MANIFEST}", full_digest)
    return found


def is_reusable(manifest: ResultManifest, if_exists: IfExists, run: str) -> bool:
    """Return whether a result may be reused; with Overwrite only one of the same, named run."""
    return if_exists != "Overwrite" or (run != "" and manifest.run == run)


def find_rejected(output: Store, digest: str, full_digest: str | None = None) -> ResultManifest | None:
    """Return the manifest of a result that a gate rejected, or None; raises like `find_reusable`."""
    path = f"{digest}/{REJECTED_RECORD}"
    found = _find(output, path)
    if found is not None:
        check_own(output, found, path, full_digest)
    return found


def check_own(output: Store, manifest: ResultManifest, path: str, full_digest: str | None) -> None:
    """Raise RunError unless a manifest is of a result of this job and digest, and its adapter is complete.

    Whoever can write the bucket can plant a manifest, which must not bring URIs of their own into the status. The
    namespace is not compared: equal jobs of two namespaces that share an output share their results.
    """
    digest = path.partition("/")[0]
    job = output.root.rpartition("/")[2]
    if (manifest.digest, manifest.job) != (digest, job):
        raise _not_own(output, path, f"it is of job {manifest.job[:63]!r} with digest {manifest.digest[:64]!r}")
    if None not in {full_digest, manifest.full_digest} and manifest.full_digest != full_digest:
        raise _not_own(output, path, f"its full digest is {manifest.full_digest}, not {full_digest}")
    check_own_uris(output, manifest.result, path)
    folder = manifest.result.adapter.removeprefix(f"{output.root}/")
    listed = {(f"{digest}/{file.path}", file.size) for file in manifest.files}
    stored = {(entry.path, entry.size) for entry in output.list(folder)}
    adapter = {(name, size) for name, size in listed if name.startswith(f"{folder}/")}
    if not adapter or not adapter <= stored:
        missing = min(adapter - stored, default=(folder, 0))[0]
        raise _not_own(output, path, f"{output.root}/{missing} is missing or has another size")


def check_own_uris(output: Store, result: Result, path: str) -> Result:
    """Return a result; raise RunError if the manifest at this path gave it a URI that is not below its own prefix."""
    prefix = f"{output.root}/{path.partition('/')[0]}"
    if foreign := result.find_foreign_uri(prefix):
        raise _not_own(output, path, f"its {foreign} is not below {prefix}")
    return result


def _not_own(output: Store, path: str, cause: str) -> RunError:
    return RunError(
        Reason.INVALID_SPEC,
        f"{OUTPUT_FIELD.field}: {output.root}/{path} is not a manifest of this run: {cause}; delete it to train again, "
        "and restrict who can write below this prefix",
    )


def merged_folder(base: MergeBase) -> str:
    """Return the folder of a merged model, next to the adapter's."""
    return f"merged/{base}"


def find_merged(output: Store, digest: str, base: MergeBase, adapter: str) -> str | None:
    """Return the URI of an adapter's merged model if it is complete; that of a replaced adapter does not count."""
    path = f"{digest}/{merged_folder(base)}/{MANIFEST}"
    if not output.exists(path):
        return None
    found = _parse(MergedManifest, output, path)
    return found.model if found.adapter == adapter else None


def with_merged(output: Store, digest: str, spec: OutputSpec, result: Result) -> Result | None:
    """Return a published result with the requested merged model, or None if that is still missing."""
    if spec.merged == "none":
        return result
    merged = find_merged(output, digest, spec.merge_base, result.adapter)
    if merged is None:
        return None
    found = result.model_copy(update={"merged": merged})
    return check_own_uris(output, found, f"{digest}/{merged_folder(spec.merge_base)}/{MANIFEST}")


def _find(output: Store, path: str) -> ResultManifest | None:
    return _parse(ResultManifest, output, path) if output.exists(path) else None


def _parse(kind: type[AnyManifest], output: Store, path: str) -> AnyManifest:
    try:
        return kind.model_validate_json(output.read(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _not_own(output, path, f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from error


def put_manifest(output: Store, manifest: ResultManifest) -> ResultManifest:
    """Publish a result by writing its manifest; return it, or the existing one if another run was faster."""
    try:
        output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest), if_none_match=True)
    except ObjectExistsError:
        return find_manifest(output, manifest.digest) or manifest
    return manifest


def replace_manifest(output: Store, manifest: ResultManifest) -> None:
    """Replace an earlier result by overwriting its manifest: one object, so readers see one result or the other."""
    output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest))


def remove_replaced(output: Store, former: ResultManifest) -> None:
    """Delete files that only the replaced manifest lists, and models merged from its adapter."""
    current = find_manifest(output, former.digest) or former
    listed = {file.path for file in current.files}
    for file in former.files:
        if file.path not in listed:
            output.delete(f"{former.digest}/{file.path}")
    if former.result.adapter != current.result.adapter:
        # Delete the manifests of merged models first: a listing has them after their files.
        entries = output.list(f"{former.digest}/merged")
        for entry in sorted(entries, key=lambda entry: not entry.path.endswith(f"/{MANIFEST}")):
            output.delete(entry.path)


def manifest_json(manifest: ResultManifest | MergedManifest) -> bytes:
    """Serialize a manifest."""
    return manifest.model_dump_json(by_alias=True, indent=2).encode()


def update_latest(output: Store, digest: str, prefix: str) -> None:
    """Point the job's latest.json to the manifest of its newest result."""
    output.put(LATEST, json.dumps({"digest": digest, "manifest": f"{prefix}/{MANIFEST}"}).encode())


def describe_files(folder: Path) -> tuple[ManifestFile, ...]:
    """Return every file below a folder, sorted by path, with size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        ManifestFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    )
