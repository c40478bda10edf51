"""What preparation left for training, with digests, so that no file can be swapped in between unnoticed."""

import logging
from pathlib import Path
from typing import Final

from qlora_api.object_names import ObjectName
from qlora_api.prepared import Prepared, PreparedInputs
from qlora_api.reasons import Reason
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import MIB
from qlora_trainer.errors import RunError
from qlora_trainer.storage.snapshots import Snapshot, text_files, weight_files
from qlora_trainer.storage.store import MODEL_FIELD, OUTPUT_FIELD, ObjectExistsError, Store, sha256_of

MAX_PREPARED_BYTES: Final = 4 * MIB
"""Largest record of preparation that is read; a model of 10,000 weight files has one of 1.5 MiB."""
_SHOWN_DIGITS: Final = 16
"""Digits of a SHA-256 in a message; the comparison is of all 64."""

log = logging.getLogger(__name__)


def store_prepared_file(output: Store, digest: str, name: str, source: Path | bytes) -> tuple[str, str]:
    """Upload a file that training will read, and return its path below the result's prefix and its SHA-256.

    Runs with equal results may differ in such files, as benchmarks do not change the adapter; if the name is taken by
    other content, the file gets a name of its own, so that no run replaces what another one recorded.
    """
    sha256 = sha256_of(source)
    try:
        output.put(f"{digest}/{name}", source, if_none_match=True)
    except ObjectExistsError:
        path = f"{digest}/{name}"
        if (output.stored_sha256(path) or output.sha256(path)) != sha256:
            name = _name_by_content(name, sha256)
            output.put(f"{digest}/{name}", source)
    return name, sha256


def find_prepared_file(inputs: PreparedInputs | None, name: str) -> str:
    """Return the path of a file that preparation recorded under this name, or under one with its SHA-256."""
    recorded = inputs.prepared.items() if inputs else ()
    return next((path for path, sha256 in recorded if path in {name, _name_by_content(name, sha256)}), name)


def _name_by_content(name: str, sha256: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return f"{stem}-{sha256[:_SHOWN_DIGITS]}{dot}{extension}"


def store_inputs(output: Store, prepared: Prepared, inputs: PreparedInputs) -> Prepared:
    """Upload the digests, and return the facts with the digest of these; the operator takes it to the training pods."""
    content = inputs.model_dump_json(by_alias=True, indent=2).encode()
    recorded = prepared.model_copy(update={"inputs": sha256_of(content)})
    output.put(f"{prepared.digest}/{_name_of(recorded)}", content)
    return recorded


def find_inputs(output: Store, prepared: Prepared) -> PreparedInputs | None:
    """Return what preparation recorded; None if an earlier version prepared the run.

    Raises:
        RunError: INVALID_SPEC if the record itself was changed.

    """
    if prepared.inputs is None:
        log.warning("an earlier version prepared this run and recorded no digests: its inputs are not checked")
        return None
    name = _name_of(prepared)
    content = output.read(f"{prepared.digest}/{name}", MAX_PREPARED_BYTES)
    _check(name, prepared.inputs, content, prepared)
    return ignore_unknown(PreparedInputs, content, name)


def check_prepared_file(inputs: PreparedInputs | None, name: str, source: Path | bytes, prepared: Prepared) -> None:
    """Raise RunError if a file that preparation wrote has other content now."""
    if inputs is not None:
        _check(name, inputs.prepared.get(name, ""), source, prepared)


def check_model(inputs: PreparedInputs | None, snapshot: Snapshot, folder: Path) -> None:
    """Raise RunError if the model's files are not those that preparation saw, or if there are others.

    Args:
        inputs: What preparation recorded; None if an earlier version prepared the run.
        snapshot: The model, listed after the download.
        folder: The downloaded files.

    """
    if inputs is None:
        return
    texts = {name: sha256_of(ObjectName(name).below(folder)) for name in text_files(snapshot.files)}
    weights = {name: snapshot.etags.get(name, "") for name in weight_files(snapshot.files, MODEL_FIELD)}
    changed = sorted(inputs.model.items() ^ texts.items() | inputs.weights.items() ^ weights.items())
    if changed:
        raise RunError(
            Reason.MODEL_NOT_FOUND,
            f"{MODEL_FIELD.field}: {changed[0][0]} of the model changed since preparation; create the QLoRAJob again, "
            "and restrict who can write to the model's bucket or mirror",
        )


def _name_of(prepared: Prepared) -> str:
    """Return the path of the record below the prefix; named by its content, so that no other run replaces it."""
    return f"prepared/inputs-{(prepared.inputs or '')[:_SHOWN_DIGITS]}.json"


def _check(name: str, expected: str, source: Path | bytes, prepared: Prepared) -> None:
    actual = sha256_of(source)
    if actual != expected:
        raise RunError(
            Reason.INVALID_SPEC,
            f"{OUTPUT_FIELD.field}: {prepared.prefix}/{name} changed since preparation (SHA-256 "
            f"{actual[:_SHOWN_DIGITS]}…, recorded {expected[:_SHOWN_DIGITS] or 'none'}…); create the QLoRAJob again, "
            "and restrict who can write below this prefix",
        )
