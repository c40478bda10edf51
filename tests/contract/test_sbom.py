"""The bill of materials that the images write of themselves."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from requirements.sbom import debian_components, main, make_document
from tests.contract.test_requirements import pins

ROOT: Final = Path(__file__).parents[2]
STATUS: Final = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u13
Description: GNU C Library
 Shared libraries.

Package: removed
Status: deinstall ok config-files
Architecture: amd64
Version: 1:2.0
"""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of this environment, made as an image makes its own."""
    script = ROOT / "requirements/sbom.py"
    text = subprocess.run([sys.executable, script, "here"], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(text))


def test_it_is_cyclonedx(document: dict[str, Any]) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None


def test_it_lists_what_is_pinned_in_the_version_that_is_installed(document: dict[str, Any]) -> None:
    listed = {component["name"]: component["version"] for component in document["components"]}
    expected = {name: version(name) for name in pins("operator") if name != "pywin32"}
    assert expected.items() <= listed.items()


def test_the_same_content_gives_the_same_bytes(capsys: pytest.CaptureFixture[str], document: dict[str, Any]) -> None:
    main("here")
    assert json.loads(capsys.readouterr().out) == document


def test_another_content_has_another_serial_number(document: dict[str, Any]) -> None:
    other = make_document("here", document["components"][1:])
    assert other["serialNumber"] != document["serialNumber"]


def test_debian_s_packages_are_listed_where_they_are_installed() -> None:
    [component] = debian_components(STATUS, "debian-12")
    assert component["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=debian-12"
    document = make_document("image", [component])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_both_images_write_one(image: str) -> None:
    stage = (ROOT / "Dockerfile").read_text().partition(f"AS {image}\n")[2].partition("\nFROM ")[0]
    assert f"sbom.py qlora-{image} > /opt/qlora-operator/sbom.cdx.json" in stage
