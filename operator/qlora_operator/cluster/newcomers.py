"""QLoRAJobs that nobody has worked on, as the watch told of them: their first pass need not read them again."""

import json

from qlora_operator.cluster.parse import Json, parse_job
from qlora_operator.values import JobRef, RawJob


class Newcomers:
    """What the watch told, until somebody takes it; as text, since ten thousand parsed ones would be 150 MB."""

    def __init__(self) -> None:
        self._told: dict[JobRef, str] = {}

    def saw(self, ref: JobRef, item: Json) -> None:
        """Remember a QLoRAJob without a phase, and forget one that has it."""
        self.forget(ref)
        if not item.get("status", {}).get("phase"):
            metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
            self._told[ref] = json.dumps({**item, "metadata": metadata})

    def take(self, ref: JobRef) -> RawJob | None:
        """Return it once: whoever comes back has something newer to read."""
        text = self._told.pop(ref, None)
        return parse_job(json.loads(text)) if text else None

    def forget(self, ref: JobRef) -> None:
        """Drop what was told of a QLoRAJob."""
        self._told.pop(ref, None)
