"""The chart as `helm template` renders it: no cluster is asked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.binaries import binary
from tests.cluster.commands import run

ROOT: Final = Path(__file__).parents[3]
CHART: Final = ROOT / "charts/qlora-operator"
BEFORE: Final = Path(__file__).parent / "qlora-operator-0.1.0.tgz"
"""The chart's previous version, as `helm package` packed it."""
RELEASE: Final = "qlora-operator"
NAMESPACE: Final = "qlora-system"


def render_text(values: Mapping[str, Any], *flags: str, apis: Sequence[str] = ()) -> str:
    """What Helm would send, as text; `apis` are served beside Kubernetes's own."""
    served = [f"--api-versions={api}" for api in apis]
    command = [binary("helm"), "template", RELEASE, CHART, f"--namespace={NAMESPACE}", "--values=-", *served, *flags]
    return run(command, stdin=json.dumps(values))


def render(values: Mapping[str, Any], *, apis: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What Helm would send."""
    return [manifest for manifest in yaml.safe_load_all(render_text(values, apis=apis)) if manifest]


def names_of(manifests: list[dict[str, Any]]) -> set[str]:
    """Kind and name of each."""
    return {f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in manifests}
