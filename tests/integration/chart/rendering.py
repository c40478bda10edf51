"""The chart as `helm template` renders it: no cluster is asked."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.host.commands import run
from tests.cluster.programs.binaries import binary

ROOT: Final = Path(__file__).parents[3]
CHART: Final = ROOT / "charts/qlora-operator"
BEFORE: Final = Path(__file__).parent / "qlora-operator-0.1.0.tgz"
"""The chart's previous version, as `helm package` packed it."""
RELEASE: Final = "qlora-operator"
NAMESPACE: Final = "qlora-system"


def render_text(values: Mapping[str, Any], *, apis: Sequence[str] = ()) -> str:
    """What Helm would send, as text; `apis` are served beside Kubernetes's own."""
    return _template(json.dumps(values), tuple(apis))


@cache
def _template(values: str, apis: tuple[str, ...]) -> str:
    served = [f"--api-versions={api}" for api in apis]
    return run([*helm("template"), "--values=-", *served], stdin=values)


def render(values: Mapping[str, Any], *, apis: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What Helm would send."""
    text = render_text(values, apis=apis)
    return [manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]


def helm(verb: str) -> list[object]:
    """Helm's command line for this release of this chart."""
    return [binary("helm"), verb, RELEASE, CHART, f"--namespace={NAMESPACE}"]


def notes_of(values: Mapping[str, Any]) -> str:
    """What Helm prints after it installed."""
    command = [*helm("install"), "--values=-", "--dry-run=client"]
    return run(command, stdin=json.dumps(values), env={"KUBECONFIG": os.devnull}).partition("\nNOTES:\n")[2]


def names_of(manifests: list[dict[str, Any]]) -> set[str]:
    """Kind and name of each."""
    return {f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in manifests}
