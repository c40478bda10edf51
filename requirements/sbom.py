"""What is installed beside this interpreter, as a CycloneDX document: Python packages, and those of Debian below them.

The images write it when they are built, from what they really have, with nothing but the standard library. The same
content gives the same bytes, so there is no time and no random number in it.
"""

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

DPKG_STATUS: Final = Path("/var/lib/dpkg/status")
OS_RELEASE: Final = Path("/etc/os-release")


def make_document(image: str, components: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the document of an image; its serial number is a hash of what it lists."""
    listed = sorted(components, key=lambda component: str(component["purl"]))
    digest = hashlib.sha256(json.dumps([image, listed]).encode()).digest()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image, "bom-ref": image}},
        "components": listed,
    }


def _component(kind: str, name: str, version: str, qualifiers: str = "", **more: Any) -> dict[str, Any]:
    purl = f"pkg:{kind}/{quote(name)}@{quote(version, safe='')}{qualifiers}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, **more}


def python_components(found: Iterable[Distribution]) -> Iterator[dict[str, Any]]:
    """Yield every Python package once, the first on the path as an import would find it, and the interpreter."""
    yield _component("generic", "cpython", platform.python_version())
    seen: set[str] = set()
    for distribution in found:
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in seen:
            seen.add(name)
            expression = distribution.metadata.get("License-Expression")
            licenses = {"licenses": [{"expression": expression}]} if expression else {}
            yield _component("pypi", name, distribution.version, **licenses)


def debian_components(status: str, release: str) -> Iterator[dict[str, Any]]:
    """Yield the packages that dpkg has installed."""
    parser = HeaderParser()
    for paragraph in filter(None, status.split("\n\n")):
        package = parser.parsestr(paragraph)
        if package["Status"] and package["Status"].endswith(" installed"):
            where = f"?arch={package['Architecture']}&distro={quote(release)}"
            yield _component("deb/debian", package["Package"], package["Version"], where)


def _release(text: str) -> str:
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return f"{fields.get('ID', 'debian')}-{fields.get('VERSION_ID', '')}".replace('"', "").rstrip("-")


def main(image: str) -> None:
    """Print the document of this machine's content."""
    components = list(python_components(distributions()))
    if DPKG_STATUS.is_file():
        release = _release(OS_RELEASE.read_text(encoding="utf-8")) if OS_RELEASE.is_file() else "debian"
        components += debian_components(DPKG_STATUS.read_text(encoding="utf-8"), release)
    sys.stdout.write(json.dumps(make_document(image, components), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
