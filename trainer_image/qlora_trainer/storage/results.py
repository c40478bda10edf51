"""Layout of results below spec.output.uri: manifests, merged models and rejected results."""

import json
import logging
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypeVar

from qlora_api.names import output_root
from qlora_api.reasons import Reason
from qlora_api.report import MAX_MANIFEST_BYTES, ManifestFile, MergedManifest, ResultManifest
from qlora_api.result import Result, is_below
from qlora_api.runconfig import PrepareConfig, Published, RunConfig
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import GIB
from qlora_api.v1alpha1 import ManifestRef, MergeBase, OutputSpec, QLoRAJobSpec
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import load_secrets
from qlora_trainer.storage.listed_files import sizes_below
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import OUTPUT_FIELD, ObjectExistsError, ObjectTooLargeError, Store, sha256_of

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
"""Written last, in one request: if it exists, the result is complete."""
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
_SHOWN_DIGITS: Final = 64
"""Of a foreign digest in a message."""
_SHOWN_CHARACTERS: Final = 1000
"""Of the errors in a manifest: somebody else's may have a hundred thousand."""
_MAX_VERIFIED_BYTES: Final = GIB
"""Largest file that is read to verify a result without a new training; adapters are smaller, full models are not."""
_NOT_OF_A_RESULT: Final = frozenset({MANIFEST, "checkpoints", "hangs", "merged", "prepared"})
"""First segments of objects next to a result that its manifest does not list."""
_Manifest = TypeVar("_Manifest", ResultManifest, MergedManifest)


def open_output(resolver: SourceResolver, spec: QLoRAJobSpec, job: str) -> Store:
    """Open the output of a job; all paths in it start with a result digest."""
    return resolver.open_store(output_root(spec.output.uri, job), OUTPUT_FIELD)


def open_own_output(config: PrepareConfig | RunConfig) -> Store:
    """Open the output with clients of its own, for a thread that other threads must not block."""
    resolver = SourceResolver(config.platform, load_secrets(config.spec, config.namespace))
    return open_output(resolver, config.spec, config.job)


def find_manifest(output: Store, digest: str) -> ResultManifest | None:
    """Return the manifest of a published result, or None; what is no manifest is logged and skipped."""
    return _find(output, digest, MANIFEST, ResultManifest)


def find_reusable(  # noqa: PLR0913 (what decides it)
    output: Store,
    digest: str,
    if_exists: IfExists,
    run: str,
    full_digest: str | None = None,
    *,
    published: Published = None,
) -> ResultManifest | None:
    """Return the manifest of a result that makes training unnecessary; its files must be those that it lists.

    Args:
        output: Output of the job.
        digest: Result digest.
        if_exists: spec.output.ifExists.
        run: UID of the run; with Overwrite, only a result of this run is reusable.
        full_digest: All digits of the digest; None if an earlier version prepared the run.
        published: The manifests that earlier attempts reported; only they count, unless it is None.

    Raises:
        RunError: INVALID_SPEC if the manifest is of another job, digest or place.

    """
    if published is not None:
        return _find_reported(output, digest, MANIFEST, full_digest, published)
    found = find_manifest(output, digest)
    if found is None or not is_reusable(found, if_exists, run):
        return None
    check_own(output, found, f"{digest}/{MANIFEST}", full_digest)
    return _if_intact(output, found)


def _find_reported(
    output: Store, digest: str, name: str, full_digest: str | None, published: Sequence[ManifestRef]
) -> ResultManifest | None:
    """Return the newest manifest of this name that an attempt of the run reported, as it was reported."""
    for reported in published:
        path = reported.uri.removeprefix(f"{output.root}/")
        own = is_below(reported.uri, f"{output.root}/{digest}") and path.endswith(f"/{name}")
        # A rejected result that a later gate accepted has its manifest under both names.
        for candidate in dict.fromkeys([path, f"{digest}/{name}"] if own else [f"{digest}/{name}"]):
            if _is_reported(output, candidate, reported):
                found = _find(output, digest, candidate.partition("/")[2], ResultManifest)
                if found is not None:
                    check_own(output, found, candidate, full_digest)
                return _if_intact(output, found)
    if not published and output.exists(f"{digest}/{name}"):
        log.warning("%s/%s/%s is skipped: no attempt of this run reported it", output.root, digest, name)
    return None


def _is_reported(output: Store, path: str, reported: ManifestRef) -> bool:
    """Return whether an object is the manifest that was reported; another one is logged."""
    if not output.exists(path):
        return False
    same = sha256_of(output.read(path, MAX_MANIFEST_BYTES)) == reported.digest
    if not same:
        log.warning("%s/%s is skipped: it is not the manifest that an attempt of this run reported", output.root, path)
    return same


def is_reusable(manifest: ResultManifest, if_exists: IfExists, run: str) -> bool:
    """Return whether a result may be reused; with Overwrite only one of the same, named run."""
    return if_exists != "Overwrite" or (run != "" and manifest.run == run)


def find_rejected(
    output: Store, digest: str, full_digest: str | None = None, published: Published = None
) -> ResultManifest | None:
    """Return the manifest of a result that a gate rejected, or None; arguments and errors as of `find_reusable`."""
    if published is not None:
        return _find_reported(output, digest, REJECTED_RECORD, full_digest, published)
    path = f"{digest}/{REJECTED_RECORD}"
    found = _find(output, digest, REJECTED_RECORD, ResultManifest)
    if found is not None:
        check_own(output, found, path, full_digest)
    return _if_intact(output, found)


def check_own(output: Store, manifest: ResultManifest, path: str, full_digest: str | None) -> None:
    """Raise RunError unless a manifest is of a result of this job and digest, and lists an adapter of it.

    Whoever can write the bucket can plant a manifest, which must not bring URIs of their own into the status. The
    namespace is not compared: equal jobs of two namespaces that share an output share their results.
    """
    digest = path.partition("/")[0]
    job = output.root.rpartition("/")[2]
    if (manifest.digest, manifest.job) != (digest, job):
        raise _not_own(
            output, path, f"it is of job {manifest.job[:63]!r} with digest {manifest.digest[:_SHOWN_DIGITS]!r}"
        )
    if None not in {full_digest, manifest.full_digest} and manifest.full_digest != full_digest:
        raise _not_own(output, path, f"its full digest is {manifest.full_digest}, not {full_digest}")
    check_own_uris(output, manifest.result, path)
    folder = manifest.result.adapter.removeprefix(f"{output.root}/{digest}/")
    if not any(file.path.startswith(f"{folder}/") for file in manifest.files):
        raise _not_own(output, path, f"it lists no file of {manifest.result.adapter}")


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
    found = _find(output, digest, f"{merged_folder(base)}/{MANIFEST}", MergedManifest)
    intact = _if_intact(output, found) if found is not None and found.adapter == adapter else None
    return intact.model if intact else None


def with_merged(output: Store, digest: str, spec: OutputSpec, result: Result) -> Result | None:
    """Return a published result with the requested merged model, or None if that is still missing."""
    if spec.merged == "none":
        return result
    merged = find_merged(output, digest, spec.merge_base, result.adapter)
    if merged is None:
        return None
    found = result.model_copy(update={"merged": merged})
    return check_own_uris(output, found, f"{digest}/{merged_folder(spec.merge_base)}/{MANIFEST}")


def _find(output: Store, digest: str, name: str, model: type[_Manifest]) -> _Manifest | None:
    path = f"{digest}/{name}"
    if not output.exists(path):
        return None
    try:
        found = ignore_unknown(model, output.read(path, MAX_MANIFEST_BYTES), path)
    except (ValueError, ObjectTooLargeError) as error:
        log.warning("%s/%s skipped, it is no manifest: %s", output.root, path, str(error)[:_SHOWN_CHARACTERS])
        return None
    if found.digest != digest:  # its files would be looked for, and replaced ones deleted, in another result
        log.warning("%s/%s skipped, it is the manifest of %s", output.root, path, found.digest[:_SHOWN_DIGITS])
        return None
    return found


def _if_intact(output: Store, manifest: _Manifest | None) -> _Manifest | None:
    """Return the manifest if the output has all files that it lists; log the first difference."""
    if manifest is None:
        return None
    if not manifest.files:
        log.warning("the manifest of %s/%s lists no files, so the result is not used", output.root, manifest.digest)
        return None
    sizes = sizes_below(output, manifest.digest)
    for file in manifest.files:
        path = f"{manifest.digest}/{file.path}"
        if sizes.get(path) != file.size or not _has_content(output, path, file):
            log.warning("%s/%s does not match its manifest, so the result is not used", output.root, path)
            return None
    return manifest


def _has_content(output: Store, path: str, file: ManifestFile) -> bool:
    """Return whether an object has the listed SHA-256; what the store computed none of is read, if it is not large."""
    stored = output.stored_sha256(path)
    if not stored and file.size <= _MAX_VERIFIED_BYTES:
        stored = output.sha256(path)
    return stored in {"", file.sha256}


def put_manifest(output: Store, manifest: ResultManifest) -> bool:
    """Publish a result by writing its manifest; return False if there is one whose files are complete."""
    try:
        output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest), if_none_match=True)
    except ObjectExistsError:
        if is_complete(output, find_manifest(output, manifest.digest)):
            return False
        replace_manifest(output, manifest)
    return True


def is_complete(output: Store, manifest: ResultManifest | None) -> bool:
    """Return whether there is a manifest, and the output has all files that it lists."""
    return _if_intact(output, manifest) is not None


def find_manifest_of(output: Store, digest: str, adapter: str) -> ResultManifest | None:
    """Return the manifest of an adapter: that of the folder of a result beside another one, or else of the digest."""
    folder, _, rest = adapter.removeprefix(f"{output.root}/{digest}/").partition("/")
    own = _find(output, digest, f"{folder}/{MANIFEST}", ResultManifest) if rest else None
    return own or find_manifest(output, digest)


def replace_manifest(output: Store, manifest: ResultManifest) -> None:
    """Replace an earlier result by overwriting its manifest: one object, so readers see one result or the other."""
    output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest))


def remove_replaced(output: Store, former: ResultManifest) -> None:
    """Delete files that only the replaced manifest lists, and models merged from its adapter."""
    current = find_manifest(output, former.digest) or former
    listed = {file.path for file in current.files}
    for file in former.files:
        if file.path not in listed and file.path.partition("/")[0] not in _NOT_OF_A_RESULT:
            output.delete(f"{former.digest}/{file.path}")
    if former.result.adapter != current.result.adapter:
        # Delete the manifests of merged models first: a listing has them after their files.
        paths = sizes_below(output, f"{former.digest}/merged")
        for path in sorted(paths, key=lambda path: not path.endswith(f"/{MANIFEST}")):
            output.delete(path)


def manifest_json(manifest: ResultManifest | MergedManifest) -> bytes:
    """Serialize a manifest."""
    return manifest.model_dump_json(by_alias=True, indent=2).encode()


def update_latest(output: Store, digest: str, manifest: str) -> None:
    """Point the job's latest.json to the URI of the manifest of its newest result."""
    try:
        output.put(LATEST, json.dumps({"digest": digest, "manifest": manifest}).encode())
    except RunError as error:
        if error.reason is not Reason.UPLOAD_FAILED:
            raise
        log.info("%s was replaced by another run at the same time", LATEST)


def manifest_uri(prefix: str, published: Published = None) -> str:
    """Return the URI of the manifest of a result that was found: the one that was reported, if one was."""
    uris = (reported.uri for reported in published or ())
    return next((uri for uri in uris if uri.endswith(f"/{MANIFEST}")), f"{prefix}/{MANIFEST}")
