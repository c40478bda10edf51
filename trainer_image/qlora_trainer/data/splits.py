"""Which rows are learned from, how often, and which are held out: functions of the rows' content hashes alone."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import FieldRef

Digests: TypeAlias = Sequence[bytes]
"""Of the rows of a source, in their order."""


@dataclass(frozen=True)
class SourceWeight:
    """How often the rows of one source are learned from."""

    full_passes: int
    extra_rows: frozenset[bytes]
    held_out: frozenset[bytes]

    def times(self, digest: bytes) -> int:
        """Return how often an epoch sees a row; a held-out row is never learned from."""
        return 0 if digest in self.held_out else self.full_passes + (digest in self.extra_rows)


def split_validation(sources: Sequence[Digests], fraction: float, field_ref: FieldRef) -> frozenset[bytes]:
    """Hold out the share of distinct rows with the lowest hashes, at least one; copies of a row stay together."""
    distinct = sorted({digest for digests in sources for digest in digests})
    if len(distinct) < 2:
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{field_ref.field}: {len(distinct)} distinct row cannot be both trained and evaluated on; add rows, or "
            "set "
            "spec.dataset.evaluation.uri",
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    return frozenset(distinct[:count])


def make_source_weight(digests: Digests, weight: float, held_out: frozenset[bytes]) -> SourceWeight:
    """Divide a weight: its whole part is for every row, the rest for the share of rows with the lowest hashes."""
    distinct = sorted(set(digests) - held_out)
    whole = int(weight)
    return SourceWeight(whole, frozenset(distinct[: round((weight - whole) * len(distinct))]), held_out)


def check_training_rows_left(
    sources: Sequence[Digests], source_weights: Sequence[SourceWeight], field_ref: FieldRef
) -> None:
    """Nobody is examined on what was rehearsed, so that held-out rows may leave nothing to learn from."""
    if not any(training_digests(sources, source_weights)):
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{field_ref.field}: every row is held out as well (spec.dataset.evaluation), or has a weight near 0; "
            "add rows",
        )


def training_digests(sources: Sequence[Digests], source_weights: Sequence[SourceWeight]) -> Iterator[bytes]:
    """Yield the digest of each row to learn from, as often as an epoch sees it."""
    for digests, share in zip(sources, source_weights, strict=True):
        for digest in digests:
            for _ in range(share.times(digest)):
                yield digest


def dataset_digest(training: Iterable[bytes], held_out: Iterable[bytes]) -> str:
    """Return the SHA-256 over all rows in use, in order, and over the side that each is on."""
    digest = hashlib.sha256()
    for side, rows in (("training", training), ("evaluation", held_out)):
        for row in rows:
            digest.update(f"{side} {row.hex()}\n".encode())
    return digest.hexdigest()
