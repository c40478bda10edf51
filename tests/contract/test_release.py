"""The release workflow's own script: one version everywhere, images pinned by digest, notes from the changelog."""

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from qlora_api import __version__

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts/qlora-operator"
RELEASE: Final[dict[str, Any]] = runpy.run_path(str(ROOT / ".github/release.py"))
check_version: Final[Callable[[str, Path], str]] = RELEASE["check_version"]
release_notes: Final[Callable[[str, Path], str]] = RELEASE["release_notes"]
main: Final[Callable[[list[str]], None]] = RELEASE["main"]
ReleaseError: Final[type[Exception]] = RELEASE["ReleaseError"]
OPERATOR: Final = f"registry.example/team/qlora-operator@sha256:{'1' * 64}"
TRAINER: Final = f"registry.example/team/qlora-trainer@sha256:{'2' * 64}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a release reads, with a changelog that is ready for it."""
    for name in ("operator/qlora_api/__init__.py", "charts/qlora-operator/Chart.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    sections = ("[Unreleased]\n", f"[{__version__}] - 2026-12-01\n\n- New.\n", "[0.0.9] - 2026-11-01\n\n- Old.\n")
    (tmp_path / "CHANGELOG.md").write_text("".join(f"## {section}\n" for section in sections), encoding="utf-8")
    return tmp_path


def test_version_of_a_matching_tag_is_printed(tree: Path) -> None:
    assert check_version(f"v{__version__}", tree) == __version__


@pytest.mark.parametrize("tag", [__version__, f"v{__version__}.1", "v9.9.9", "main"])
def test_tag_of_another_version_is_refused(tree: Path, tag: str) -> None:
    with pytest.raises(ReleaseError, match="they must be one"):
        check_version(tag, tree)


def test_chart_of_another_operator_is_refused(tree: Path) -> None:
    chart = tree / "charts/qlora-operator/Chart.yaml"
    chart.write_text(chart.read_text().replace(f'appVersion: "{__version__}"', 'appVersion: "9.9.9"'))
    with pytest.raises(ReleaseError, match="they must be one"):
        check_version(f"v{__version__}", tree)


def test_version_without_a_dated_section_is_refused(tree: Path) -> None:
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(" - 2026-12-01", ""))
    with pytest.raises(ReleaseError, match="YYYY-MM-DD"):
        check_version(f"v{__version__}", tree)


def test_changes_that_no_version_has_are_refused(tree: Path) -> None:
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("[Unreleased]\n", "[Unreleased]\n\n- Forgotten.\n"))
    with pytest.raises(ReleaseError, match="Unreleased"):
        check_version(f"v{__version__}", tree)


def test_notes_are_the_version_s_section_alone(tree: Path) -> None:
    assert release_notes(__version__, tree) == "- New."


def test_the_changelog_has_a_section_of_this_version() -> None:
    assert release_notes(__version__, ROOT)


def test_pinned_chart_differs_in_repositories_and_digests_alone(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    main(["pin-images", str(chart), OPERATOR, TRAINER])
    before = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    after = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    expected = {
        **before,
        "image": before["image"]
        | {"repository": "registry.example/team/qlora-operator", "digest": f"sha256:{'1' * 64}"},
        "trainerImage": before["trainerImage"]
        | {"repository": "registry.example/team/qlora-trainer", "digest": f"sha256:{'2' * 64}"},
    }
    assert after == expected
    jsonschema.validate(after, json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "images",
    [(OPERATOR,), (OPERATOR, TRAINER, TRAINER), ("registry.example/qlora-operator:0.1.0", TRAINER), (OPERATOR, "x@")],
)
def test_chart_is_pinned_by_two_digests_only(tmp_path: Path, images: tuple[str, ...]) -> None:
    shutil.copy(CHART / "values.yaml", tmp_path)
    with pytest.raises((ReleaseError, ValueError)):
        main(["pin-images", str(tmp_path), *images])
    assert (tmp_path / "values.yaml").read_bytes() == (CHART / "values.yaml").read_bytes()
