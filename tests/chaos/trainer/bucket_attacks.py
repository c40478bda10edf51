"""What somebody who can write the bucket does to a run, object by object: the table of docs/security.md."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class BucketAttack:
    """One attack, and how its run ends."""

    when: str
    what: str
    noticed: str
    end: str

    def row(self) -> str:
        """Return the row of the table."""
        return f"| {self.when} | {self.what} | {self.noticed} | {self.end} |"


OWN_RESULT: Final = "`Succeeded` with its own weights"
REFUSED: Final = "`Failed`, `InvalidSpec`"
MODEL_REFUSED: Final = "`Failed`, `ModelNotFound`"
BEFORE_TRAINING: Final = "before training"
INTERRUPTED: Final = "after a first attempt"
TRAINING: Final = "while it trains"
LOST: Final = "published, and its pod is lost"
PUBLISHED: Final = "after its end"
_PREPARED_DIGEST: Final = "the pod, by the digest in its configuration"

ATTACKS: Final = {
    "rows-changed": BucketAttack(BEFORE_TRAINING, "token rows changed", _PREPARED_DIGEST, REFUSED),
    "rows-deleted": BucketAttack(BEFORE_TRAINING, "token rows deleted", _PREPARED_DIGEST, REFUSED),
    "digests-changed": BucketAttack(BEFORE_TRAINING, "their digests changed", _PREPARED_DIGEST, REFUSED),
    "facts-changed": BucketAttack(BEFORE_TRAINING, "`prepared.json` changed", "not read by the pod", OWN_RESULT),
    "weights-swapped": BucketAttack(BEFORE_TRAINING, "model weights swapped", _PREPARED_DIGEST, MODEL_REFUSED),
    "checkpoints-forged": BucketAttack(
        INTERRUPTED, "checkpoints replaced with their manifests, and later ones added", "the pod, by the digest in "
        "the status; the log names them", OWN_RESULT,
    ),
    "checkpoints-deleted": BucketAttack(INTERRUPTED, "checkpoints deleted", "the pod; it starts over", OWN_RESULT),
    "files-planted": BucketAttack(
        TRAINING, "files planted under the names of adapter and report", "the pod, by their content", OWN_RESULT
    ),
    "result-forged": BucketAttack(
        TRAINING, "complete result planted, with its manifest", "the pod; it publishes beside it", OWN_RESULT
    ),
    "latest-changed": BucketAttack(TRAINING, "`latest.json` planted", "not read; replaced", OWN_RESULT),
    "nothing": BucketAttack(LOST, "nothing", "", "`Succeeded`, `AlreadyPublished`, with its own weights"),
    "lost-result-forged": BucketAttack(
        LOST, "adapter, `qlora.json` and manifest replaced", "the next preparation, by the digest in the status",
        OWN_RESULT,
    ),
    "lost-result-deleted": BucketAttack(LOST, "manifest deleted", "the next preparation", OWN_RESULT),
    "adapter-changed": BucketAttack(
        PUBLISHED, "adapter changed", "`qlora chat` and `qlora merge`, by its manifest", "stays `Succeeded`"
    ),
    "record-changed": BucketAttack(
        PUBLISHED, "`qlora.json` changed", "`qlora chat` and `qlora merge`, by its manifest", "stays `Succeeded`"
    ),
    "everything-forged": BucketAttack(
        PUBLISHED, "adapter replaced with its manifest", "whoever compares `status.output.manifest.digest`; no command "
        "does", "stays `Succeeded`",
    ),
}  # fmt: skip
HEADER: Final = ("| when | what | noticed by | the run's end |", "|---|---|---|---|")
BEGIN: Final = "<!-- Checked by tests/contract/docs/test_security_page.py; the rows are those of bucket_attacks.py. -->"


def table() -> str:
    """Return the table."""
    return "\n".join([*HEADER, *(attack.row() for attack in ATTACKS.values())])
