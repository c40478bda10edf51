"""Reads the stored spec and status of a QLoRAJob, whichever version wrote them, and keeps what it cannot read.

A run is judged before its first training Job exists. Afterwards nothing that this version does not know may end it, so
reading never raises: it returns what can be read, and a sentence about the rest.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from qlora_api import __version__
from qlora_api.escapes import escape_line
from qlora_api.names import ConditionType, Phase
from qlora_api.reasons import Reason
from qlora_api.tolerant_reader import Stored, read_stored
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus
from qlora_operator.models import RawJob, Skew

UNKNOWN_REASON: Final = Reason.TRAINER_ERROR
"""What a reason of another version counts as: a failure that has used one of the retries."""
_UNKNOWN_WORDS: Final = frozenset({"literal_error", "enum"})
"""Errors of pydantic for a word that is not on a list; the CRD of this version has the same lists."""
_DECISIVE: Final = frozenset({"plan", "attempts", "output"})
"""Fields of a status that the next attempt depends on."""
_KEYS: Final = ("number", "type")
"""Fields that identify an attempt and a condition in their lists."""
_SHOWN: Final = 5
"""Fields that a message lists at most."""


class ReadJob(NamedTuple):
    """Spec and status of a QLoRAJob, as far as this version can read them."""

    spec: QLoRAJobSpec | None
    """None if a required field cannot be read."""
    status: QLoRAJobStatus
    skew: Skew


def read_job(raw: RawJob) -> ReadJob:
    """Read spec and status; unknown fields are ignored and logged."""
    source = "/".join(raw.ref)
    spec, status = read_stored(QLoRAJobSpec, raw.spec, f"spec of {source}"), _read_status(raw.status, source)
    words = [f"spec.{_path(error['loc'])}" for error in spec.invalid if error["type"] in _UNKNOWN_WORDS]
    unreadable = [*words, *(f"spec.{path}" for path in spec.unreadable)]
    unreadable += [f"status.{path}" for path in status.unreadable if path.partition(".")[0] in _DECISIVE]
    if spec.value is None:
        unreadable += [f"spec.{_path(error['loc'])}" for error in spec.invalid]
    invalid = "; ".join(f"{_path(('spec', *error['loc']))}: {error['msg']}" for error in spec.invalid)
    skew = Skew(
        invalid,
        unreadable=_describe(unreadable) if unreadable else "",
        unknown_words=bool(words),
        ignored=spec.unknown,
        recorded=bool(raw.status.get("plan") or raw.status.get("attempts")),
    )
    return ReadJob(spec.value, status.value or QLoRAJobStatus(), skew)


def _path(location: Iterable[int | str]) -> str:
    return ".".join(map(str, location))


def _describe(fields: Iterable[str]) -> str:
    names = list(dict.fromkeys(fields))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{escape_line(', '.join(names[:_SHOWN]))}{more}: written by another version, and operator {__version__} does "
        "not know the value; upgrade the operator, which continues the run. Until then it stays as it is"
    )


def _read_status(status: Mapping[str, Any], source: str) -> Stored[QLoRAJobStatus]:
    read = read_stored(QLoRAJobStatus, status, f"status of {source}")
    if not read.invalid:
        return read
    return read_stored(QLoRAJobStatus, _with_known_words(status), f"status of {source}")


def _with_known_words(status: Mapping[str, Any]) -> dict[str, Any]:
    """Replace phases and reasons of another version by what is safe to assume of them."""
    known = dict(status)
    if "phase" in known and known["phase"] not in tuple(Phase):
        known["phase"] = _phase_of(known)
    for name in ("attempts", "conditions"):
        if isinstance(known.get(name), list):
            known[name] = [_with_known_reason(entry) for entry in known[name]]
    return known


def _phase_of(status: Mapping[str, Any]) -> Phase:
    """Return the phase that the conditions describe: a run that is over stays so, any other is reconciled."""
    entries = status.get("conditions")
    held = [
        entry.get("type")
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, Mapping) and entry.get("status") == "True"
    ]
    if ConditionType.FINISHED not in held:
        return Phase.PENDING
    return Phase.SUCCEEDED if ConditionType.SUCCEEDED in held else Phase.FAILED


def _with_known_reason(entry: object) -> object:
    if not isinstance(entry, Mapping) or entry.get("reason") in (None, *Reason):
        return entry
    return {**entry, "reason": UNKNOWN_REASON}


def keep_unknown(stored: Any, before: Any, after: Any) -> Any:
    """Return what to write: a new value as derived, and what did not change as it is stored, unknown fields included.

    Args:
        stored: The status as the API server has it, or a part of it; None if it has none.
        before: That part, read by this version and written again.
        after: That part of the new status.

    """
    if after == before:
        return stored
    if isinstance(stored, Mapping) and isinstance(before, Mapping) and isinstance(after, Mapping):
        merged = {
            name: keep_unknown(stored.get(name), before.get(name), after.get(name)) for name in {**stored, **after}
        }
        return {name: value for name, value in merged.items() if value is not None}
    key = next((key for key in _KEYS if _is_keyed(after, key) and _is_keyed(stored, key)), None)
    return _keep_entries(stored, before or (), after, key) if key else after


def _is_keyed(entries: Any, key: str) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, Mapping) and isinstance(entry.get(key), (int, str)) for entry in entries
    )


def _keep_entries(stored: Any, before: Any, after: Any, key: str) -> list[Any]:
    """Merge two lists of attempts or conditions; entries that only the stored one has are kept."""
    old, read = ({entry[key]: entry for entry in entries} for entries in (stored, before))
    new = {entry[key]: keep_unknown(old.get(entry[key]), read.get(entry[key]), entry) for entry in after}
    unknown = [entry for name, entry in old.items() if name not in read and name not in new]
    return [*unknown, *new.values()]
