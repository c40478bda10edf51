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

    def find_foreign_uri(self, prefix: str) -> str | None:
        """Return the first field with a URI that is not below the run's prefix, as `adapter 's3://…'`; else None."""
        uris = {"adapter": self.adapter, "report": self.report, "merged": self.merged}
        foreign = (
            f"{name} {uri[:_SHOWN_CHARACTERS]!r}"
            for name, uri in uris.items()
            if uri is not None and not is_below(uri, prefix)
        )
        return next(foreign, None)
