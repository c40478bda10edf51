"""Validation split and source weights, computed from the content hashes of the rows alone."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import FieldRef

Digests: TypeAlias = Sequence[bytes]
"""Content hashes of the rows of a source, in order."""


@dataclass(frozen=True)
class SourceWeight:
    """How often an epoch repeats the rows of one source."""

    full_passes: int
    extra_rows: frozenset[bytes]
    held_out: frozenset[bytes]

    def times(self, digest: bytes) -> int:
        """Return how often a row occurs in an epoch; a held-out row never does."""
        return 0 if digest in self.held_out else self.full_passes + (digest in self.extra_rows)


@dataclass(frozen=True)
class ValidationSplit:
    """The hashes of the held-out rows."""

    held_out: frozenset[bytes]
    by_question: bool
    """Whether rows with the same question are on the same side; false if too many have the same."""


def split_validation(
    sources: Sequence[Digests], groups: Sequence[Sequence[int]], fraction: float, field_ref: FieldRef
) -> ValidationSplit:
    """Return the validation split: the fraction of distinct rows with the lowest hashes, at least one.

    Rows of a group, those with the same question, are on the same side: groups are held out in the order of their
    lowest hashes, without those that are too large. Where every group has one row, these are the rows with the lowest
    hashes; so too where groups would hold less than half, or more than twice of what is to be held out.
    """
    distinct = sorted({digest for digests in sources for digest in digests})
    if len(distinct) < 2:
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{field_ref.field}: {len(distinct)} distinct row is too few for a training and a validation set; "
            "add rows, or set spec.dataset.evaluation.uri",
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    members = _members(sources, groups)
    if len(members) == 1 and len(next(iter(members.values()))) == len(distinct):
        return ValidationSplit(frozenset(distinct[:count]), by_question=False)
    by_digest = {digest: rows for rows in members.values() for digest in rows}
    held_out: set[bytes] = set()
    for digest in distinct:
        rows = by_digest.get(digest, frozenset((digest,)))
        if digest not in held_out and len(held_out) + len(rows) <= count:
            held_out |= rows
    if not held_out:
        held_out |= min(members.values(), key=lambda rows: (len(rows), min(rows)))
    # A few questions with many answers each leave no groups of the right size.
    if 2 * len(held_out) < count or len(held_out) > 2 * count:
        return ValidationSplit(frozenset(distinct[:count]), by_question=False)
    return ValidationSplit(frozenset(held_out), by_question=True)


def _members(sources: Sequence[Digests], groups: Sequence[Sequence[int]]) -> dict[int, frozenset[bytes]]:
    """Return the distinct rows of each group that has several; most have one, and are not kept in memory."""
    numbers, counts = np.unique(np.concatenate([np.asarray(of, dtype=np.uint64) for of in groups]), return_counts=True)
    shared: dict[int, set[bytes]] = {int(number): set() for number in numbers[counts > 1]}
    for digests, of in zip(sources, groups, strict=True):
        for digest, group in zip(digests, of, strict=True):
            if group in shared:
                shared[group].add(digest)
    return {group: frozenset(rows) for group, rows in shared.items() if len(rows) > 1}


def make_source_weight(digests: Digests, weight: float, held_out: frozenset[bytes]) -> SourceWeight:
    """Split a weight: the integer part applies to every row, the fraction to the rows with the lowest hashes."""
    distinct = sorted(set(digests) - held_out)
    full_passes = int(weight)
    extra_rows = frozenset(distinct[: round((weight - full_passes) * len(distinct))])
    return SourceWeight(full_passes, extra_rows, held_out)


def check_training_rows_left(
    sources: Sequence[Digests], source_weights: Sequence[SourceWeight], field_ref: FieldRef
) -> None:
    """Raise DatasetEmpty if no training rows are left: held-out rows are never trained on."""
    if not any(training_digests(sources, source_weights)):
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{field_ref.field}: every row is also in the validation set (spec.dataset.evaluation), or has a "
            "weight near 0; add rows",
        )


def training_digests(sources: Sequence[Digests], source_weights: Sequence[SourceWeight]) -> Iterator[bytes]:
    """Yield the digests of the training rows, each as often as it occurs in an epoch."""
    for digests, source_weight in zip(sources, source_weights, strict=True):
        for digest in digests:
            for _ in range(source_weight.times(digest)):
                yield digest


class DatasetDigest:
    """The SHA-256 over all rows in use, in order, each with its split; training rows first, whatever the order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._held_out: list[bytes] = []

    def add_training(self, row: bytes, times: int = 1) -> None:
        """Add a training row."""
        self._digest.update(f"training {row.hex()}\n".encode() * times)

    def add_held_out(self, row: bytes) -> None:
        """Add a held-out row."""
        self._held_out.append(row)

    def hexdigest(self) -> str:
        """Return the digest of the rows so far."""
        digest = self._digest.copy()
        for row in self._held_out:
            digest.update(f"evaluation {row.hex()}\n".encode())
        return digest.hexdigest()


def dataset_digest(training: Iterable[bytes], held_out: Iterable[bytes]) -> str:
    """Return the digest of a dataset."""
    digest = DatasetDigest()
    for row in training:
        digest.add_training(row)
    for row in held_out:
        digest.add_held_out(row)
    return digest.hexdigest()
