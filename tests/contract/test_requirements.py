"""What the images must not have, and below what they must not fall."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SECURITY_PAGE = ROOT / "docs/security.md"

FLOORS = {
    "aiohttp": ("3.12.14", "CVE-2025-53643"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pillow": ("11.3.0", "CVE-2025-48379"),
    "protobuf": ("6.31.1", "CVE-2025-4565"),
    "pyyaml": ("5.4", "CVE-2020-14343"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),
    "torch": ("2.10", "CVE-2026-24747"),
    "transformers": ("5.3", "CVE-2026-4372"),
    "urllib3": ("2.6.0", "CVE-2025-66418"),
}
"""First releases without a hole that our use of them would meet."""


def pins(name: str) -> dict[str, Version]:
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if "==" in line and not line.startswith((" ", "#"))]
    return {pin.name: Version(next(iter(pin.specifier)).version) for pin in found}


def test_trap_38_nothing_of_the_image_downloads_kernels():
    # With `kernels` installed, transformers and bitsandbytes fetch code from the hub when a model is first used.
    trainer = pins("trainer")
    assert "bitsandbytes" in trainer
    assert "kernels" not in trainer


@pytest.mark.parametrize("image", ["operator", "trainer", "cli"])
def test_pins_are_above_known_vulnerabilities(image: str):
    pinned = pins(image)
    assert {name: str(pinned[name]) for name, (floor, _) in FLOORS.items()
            if name in pinned and pinned[name] < Version(floor)} == {}  # fmt: skip


def test_every_floor_is_of_something_in_an_image():
    assert FLOORS.keys() <= pins("operator").keys() | pins("trainer").keys()


def test_the_page_names_every_floor():
    page = SECURITY_PAGE.read_text()
    assert [name for name, (floor, hole) in FLOORS.items() if f"| {name} | {floor} | {hole} |" not in page] == []


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_requirement_is_one_version_with_hashes(path: Path):
    entries = re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    assert entries
    pinned = re.compile(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+( ; [^#@]+?)?( +--hash=sha256:[0-9a-f]{64})+")
    assert [entry for entry in entries if not pinned.fullmatch(entry)] == []


INSTALLERS = ("Dockerfile", "Makefile", *(f".github/workflows/{path.name}" for path in WORKFLOWS))


@pytest.mark.parametrize("name", INSTALLERS)
def test_everything_installed_has_hashes(name: str):
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in re.split(r"&&|\|\||;|\{", line) if " install " in part]
    ours = "--no-deps --build-constraints requirements/build.txt --editable ."
    assert [part for part in commands if "--require-hashes -r " not in part and ours not in part] == []


def test_wheel_is_built_with_hashed_tools():
    built = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uv build" in line]
    assert built
    assert all("--require-hashes --build-constraints requirements/build.txt" in line for line in built)


def test_release_pins_the_base_image_by_digest():
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    assert re.search(r"^ARG BASE=\S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert 'echo "base=$base@$digest"' in workflow
    assert "[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]]" in workflow
    assert "BASE=${{ needs.verify.outputs.base }}" in workflow


def unpinned(dockerfile: str) -> list[str]:
    """Return the images that are neither a stage, nor have a digest, nor are the one that a release pins."""
    stages = set(re.findall(r"^FROM \S.*? AS (\S+)", dockerfile, re.MULTILINE | re.IGNORECASE))
    images = re.findall(r"^FROM (?:--\S+ +)*(\S+)", dockerfile, re.MULTILINE | re.IGNORECASE)
    images += re.findall(r"(?:--from=|,from=|^# *syntax=)(\S+?)(?=[,\s])", dockerfile, re.MULTILINE)
    pinned = re.compile(r"\S+@sha256:[0-9a-f]{64}")
    return [image for image in images if image not in {*stages, "${BASE}"} and not pinned.fullmatch(image)]


DOCKERFILES = sorted(path for path in ROOT.rglob("*Dockerfile*") if not set(path.parts) & {".git", ".venv"})


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_image_is_pinned_by_digest_or_by_the_release(path: Path):
    assert unpinned(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "FROM python:3.12-slim-bookworm",
        "from --platform=linux/amd64 python:3.12 AS a",
        "FROM python@sha256:abc",
        "FROM ${OTHER}",
        "COPY --from=ghcr.io/astral-sh/uv:latest /uv /uv",
        "RUN --mount=type=bind,from=busybox,target=/x true",
        "# syntax=docker/dockerfile:1\n",
    ],
)
def test_image_without_a_digest_is_found(line: str):
    assert len(unpinned(f"{line}\nRUN true\n")) == 1


def test_release_and_audit_scan_the_image():
    for name in ("release", "audit"):
        workflow = (ROOT / f".github/workflows/{name}.yml").read_text()
        assert "uses: anchore/scan-action@" in workflow
        assert "fail-build" not in workflow


def test_dockerfile_has_no_other_base_and_downloads_nothing_else():
    text = (ROOT / "Dockerfile").read_text()
    sources = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert sources == {"${BASE}", "operator-packages", "trainer-packages"}
    assert not re.search(r"^ADD |curl|wget|apt-get|git clone", text, re.MULTILINE)
