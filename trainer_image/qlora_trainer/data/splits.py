"""Validation split and source weights, computed from the content hashes of the rows alone."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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


def split_validation(sources: Sequence[Digests], fraction: float, field_ref: FieldRef) -> frozenset[bytes]:
    """Return the validation split: the fraction of distinct rows with the lowest hashes, at least one.

    Duplicates of a row are on the same side of the split.
    """
    distinct = sorted({digest for digests in sources for digest in digests})
    if len(distinct) < 2:
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{field_ref.field}: {len(distinct)} distinct row is too few for a training and a validation set; "
            "add rows, or set spec.dataset.evaluation.uri",
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    return frozenset(distinct[:count])


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
