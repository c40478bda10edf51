"""Who wrote what: the API server's own record."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

WRITES: Final = ("create", "update", "patch", "delete")
"""Verbs that change something."""


@dataclass(frozen=True)
class Audit:
    """The record of some accounts' writes."""

    folder: Path

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.folder / "audit.log"

    def flags(self, *accounts: str) -> list[str]:
        """Return what has the API server write the record; there is nothing in it of anybody else."""
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [
                {
                    "level": "Metadata",
                    "verbs": list(WRITES),
                    "users": [f"system:serviceaccount:{account}" for account in accounts],
                },
                {"level": "None"},
            ],
        }
        file = self.folder / "audit-policy.yaml"
        file.write_text(yaml.safe_dump(policy))
        return [f"--audit-policy-file={file}", f"--audit-log-path={self.log}", "--audit-log-mode=blocking"]

    def count(self) -> Counter[str]:
        """Count what was written until now, by verb and resource."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(_describe(json.loads(line)) for line in lines)

    def writes_since(self, before: Counter[str]) -> dict[str, int]:
        """Count what was written since an earlier count, the most frequent first."""
        return dict((self.count() - before).most_common())


def _describe(event: dict[str, Any]) -> str:
    target = event["objectRef"]
    resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
    code = event["responseStatus"]["code"]
    return f"{event['verb']} {resource}" + (f" ({code})" if code >= 400 else "")
