"""The result of preparation: reported by the prepare pod, input of the training pod."""

import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from qlora_api.base import ApiModel, ReportedModel, Sha256
from qlora_api.model_config import check_config
from qlora_api.object_names import ObjectName
from qlora_api.result import Result
from qlora_api.v1alpha1 import DataStatus, ModelStatus

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
"""A git commit, or a content hash cut to its length."""


def _check_reported(model: ModelStatus) -> ModelStatus:
    """Check what a pod reports; a status that an earlier version wrote must stay readable."""
    if not COMMIT.fullmatch(model.commit):
        raise ValueError("commit has not 40 hexadecimal digits")
    check_config(model.config)
    return model


class Prepared(ReportedModel):
    """What preparation found, without a GPU; also stored in the output as prepared/prepared.json."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """First 16 hex digits of the SHA-256 over everything that decides the result; equal digests mean equal results."""
    full_digest: Sha256 | None = None
    """All 64 digits of it; None if an earlier version prepared the run."""
    inputs: Sha256 | None = None
    """SHA-256 of the PreparedInputs in the output; None if an earlier version prepared the run."""
    prefix: str
    """<output.uri>/<job>/<digest>, the prefix of everything that belongs to this result."""
    model: Annotated[ModelStatus, AfterValidator(_check_reported)]
    dataset: DataStatus
    trainer_version: str
    published: Result | None = None
    """The result, if a complete manifest with this digest already exists."""

    def without_known_uris(self) -> "Prepared":
        """Return the facts without the URIs that the operator knows; with long ones, they are most of a message."""
        published = self.published and self.published.without_prefix(self.prefix)
        model = self.model.model_copy(update={"uri": ""})
        return self.model_copy(update={"prefix": "", "model": model, "published": published})

    def with_known_uris(self, root: str, model_uri: str) -> "Prepared":
        """Return the facts of `without_known_uris` as they were.

        Args:
            root: Output of the job, which the prefix is below.
            model_uri: spec.model.uri.

        """
        if self.prefix or self.model.uri:
            return self
        prefix = f"{root}/{self.digest}"
        model = self.model.model_copy(update={"uri": model_uri})
        published = self.published and self.published.with_prefix(prefix)
        return self.model_copy(update={"prefix": prefix, "model": model, "published": published})


class PreparedInputs(ApiModel):
    """prepared/inputs-….json: what training must find as preparation left it; too long for a termination message."""

    prepared: dict[str, Sha256]
    """SHA-256 of the files that preparation wrote, by their path below the result's prefix."""
    model: dict[str, Sha256]
    """SHA-256 of the model's configuration, tokenizer and chat template, by name."""
    weights: dict[str, str]
    """ETags of the model's weights, which preparation does not download, by name; empty if the store has none."""


class PinnedTask(ApiModel):
    """One leaf task of a public benchmark, with its data pinned to a commit, so that every attempt uses the same."""

    name: str
    file: ObjectName
    """Path of its configuration in lm-evaluation-harness's tasks folder."""
    dataset: str
    """Dataset repository on the hub."""
    commit: str
    part: str | None = None
    """Configuration of the dataset, if it has several."""
    data: Sha256 | None = None
    """SHA-256 over its files, as preparation loaded them: in a mirror, a commit is only a folder's name."""


class PinnedTasks(ApiModel):
    """prepared/tasks.json; not part of Prepared, because a hundred tasks would not fit into a termination message."""

    tasks: tuple[PinnedTask, ...] = ()
