"""Summary of a published run: reported by the training pod at its end, found by a later preparation."""

import re
from typing import Annotated, Final

from pydantic import Field

from qlora_api.base import ReportedModel
from qlora_api.v1alpha1 import EvaluationStatus

_BELOW: Final = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._-]+)+")
"""The path of a file or folder of a result, below its prefix."""
_SHOWN_CHARACTERS: Final = 200
"""Characters of a foreign URI in a message."""
ResultUri = Annotated[str, Field(max_length=2048)]


def is_below(uri: str, prefix: str) -> bool:
    """Return whether a URI, which whoever can write the bucket may have chosen, is a path below a result's prefix."""
    return uri.startswith(prefix) and _BELOW.fullmatch(uri, len(prefix)) is not None


class Result(ReportedModel):
    """Summary of a published run; it fits into a termination message."""

    adapter: ResultUri
    """URI of the adapter's folder."""
    report: ResultUri
    """URI of report.json."""
    merged: ResultUri | None = None
    """URI of the merged model, if spec.output.merged requests one."""
    evaluation: EvaluationStatus
    steps: int
    tokens_per_second: float
    gpu_seconds: Annotated[int, Field(ge=0)] | None = None
    """GPU-seconds of its training steps; None on a CPU, and if an earlier version published it."""

    def without_prefix(self, prefix: str) -> "Result":
        """Return the result with URIs relative to the run's prefix: `/adapter`."""
        return self.model_copy(update={name: uri.removeprefix(prefix) for name, uri in self._uris() if uri})

    def with_prefix(self, prefix: str) -> "Result":
        """Return the result of `without_prefix` as it was."""
        return self.model_copy(update={name: f"{prefix}{uri}" for name, uri in self._uris() if uri and uri[0] == "/"})

    def _uris(self) -> tuple[tuple[str, str | None], ...]:
        return ("adapter", self.adapter), ("report", self.report), ("merged", self.merged)

    def find_foreign_uri(self, prefix: str) -> str | None:
        """Return the first field with a URI that is not below the run's prefix, as `adapter 's3://…'`; else None."""
        foreign = (
            f"{name} {uri[:_SHOWN_CHARACTERS]!r}"
            for name, uri in self._uris()
            if uri is not None and not is_below(uri, prefix)
        )
        return next(foreign, None)
