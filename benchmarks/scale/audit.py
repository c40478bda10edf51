"""Writes by account, from the API server's audit log."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

WRITES: Final = ("create", "update", "patch", "delete")
"""Verbs that change objects."""


@dataclass(frozen=True)
class Audit:
    """Audit log of the writes of some accounts."""

    folder: Path

    @property
    def log(self) -> Path:
        """Return the log file, with one JSON object per line."""
        return self.folder / "audit.log"

    def flags(self, *accounts: str) -> list[str]:
        """Return the API server's flags for an audit log of these accounts only."""
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
        """Count the writes so far, by verb and resource."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(_describe(json.loads(line)) for line in lines)

    def writes_since(self, before: Counter[str]) -> dict[str, int]:
        """Count the writes since an earlier count, the most frequent first."""
        return dict((self.count() - before).most_common())


def _describe(event: dict[str, Any]) -> str:
    target = event["objectRef"]
    resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
    code = event["responseStatus"]["code"]
    return f"{event['verb']} {resource}" + (f" ({code})" if code >= 400 else "")
