"""Compile the requirement files: one per extra, every file with hashes, all of one set of versions."""

import subprocess
import sys
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
EXTRAS: Final = {
    "dev": ("operator", "trainer", "cli", "dev"),
    "operator": ("operator",),
    "trainer": ("trainer",),
    "cli": ("cli",),
}
"""File to extras. `dev` comes first: it is the union, and the others are held to its versions."""


def compile_file(name: str, extras: tuple[str, ...], options: list[str]) -> None:
    """Write requirements/<name>.txt for these extras."""
    constraint = [] if name == "dev" else ["--constraint", str(HERE / "dev.txt")]
    flags = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-emit-index-url"]
    command = "uv pip compile via `make lock`"
    subprocess.run(
        [
            Path(sys.executable).with_name("uv"),
            *("pip", "compile", "--quiet", *flags, *constraint, *options),
            *(flag for extra in extras for flag in ("--extra", extra)),
            *("--custom-compile-command", command, "--output-file", str(HERE / f"{name}.txt")),
            str(HERE.parent / "pyproject.toml"),
        ],
        check=True,
    )


if __name__ == "__main__":
    for file, wanted in EXTRAS.items():
        compile_file(file, wanted, sys.argv[1:])
