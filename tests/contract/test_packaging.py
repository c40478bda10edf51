"""The wheel, the images and the chart agree on license and version; what they need to be published is there."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from qlora_api import __version__

ROOT: Final = Path(__file__).parents[2]
LICENSE: Final = "Apache-2.0"
LICENSE_SHA256: Final = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of the text that the Apache Software Foundation publishes."""
IMAGES: Final = ("operator", "trainer")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def image_stage(target: str) -> str:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return dockerfile.partition(f" AS {target}\n")[2].partition("\nFROM ")[0]


def image_labels(target: str) -> dict[str, str]:
    return dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', image_stage(target)))


def make_recipe(target: str) -> list[str]:
    """Return the commands of a Makefile target, as they are typed in the root of the repository."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]


def test_license_text_is_the_unchanged_apache_license() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == LICENSE_SHA256


def test_wheel_names_and_carries_the_license(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert (project["license"], project["license-files"]) == (LICENSE, ["LICENSE"])


def test_chart_names_the_license() -> None:
    chart = yaml.safe_load((ROOT / "charts/qlora-operator/Chart.yaml").read_text(encoding="utf-8"))
    assert chart["annotations"]["artifacthub.io/license"] == LICENSE


@pytest.mark.parametrize("target", IMAGES)
def test_image_names_and_carries_the_license(target: str) -> None:
    assert image_labels(target)["licenses"] == LICENSE
    assert "COPY LICENSE " in image_stage(target)


@pytest.mark.parametrize("target", IMAGES)
def test_image_label_has_this_version(target: str) -> None:
    assert f"\nARG VERSION={__version__}\n" in image_stage(target)
    assert image_labels(target)["version"] == "${VERSION}"
    assert image_labels(target)["title"] == f"qlora-{target}"


def test_every_package_of_the_wheel_is_typed(pyproject: dict[str, Any]) -> None:
    packages = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package for package in packages if not (ROOT / package / "py.typed").is_file()} == set()


def test_pre_commit_hooks_run_commands_of_make_check() -> None:
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [repository] = configuration["repos"]
    entries = {hook["entry"] for hook in repository["hooks"]}
    assert entries - set(make_recipe("check")) == set()
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
