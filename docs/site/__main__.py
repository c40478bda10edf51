"""Builds the site: `make docs`."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from docs.site.sources import stage

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
OUT: Final = ROOT / "out"


def write_sources(folder: Path) -> None:
    """Lay the configuration and the pages into an empty folder, from which the generator builds."""
    shutil.copy(HERE / "zensical.toml", folder)
    shutil.copytree(HERE / "assets", folder / "pages" / "assets")
    for place, content in stage(ROOT).items():
        path = folder / "pages" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(folder: Path) -> tuple[int, str]:
    """Build the site in a folder that has its sources; return the exit status and what was said."""
    built = subprocess.run(
        [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return built.returncode, built.stdout + built.stderr


def main() -> None:
    """Build the site anew; whatever was built before stays until the new one is there."""
    sources, site = OUT / "site-sources", OUT / "site"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir(parents=True)
    write_sources(sources)
    status, said = build(sources)
    sys.stdout.write(said)
    if status != 0:
        sys.exit(status)
    shutil.rmtree(site, ignore_errors=True)
    (sources / "site").rename(site)
    sys.stdout.write(f"{site.relative_to(ROOT)}/index.html\n")


if __name__ == "__main__":
    main()
