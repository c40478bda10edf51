"""Compile the requirement files: one per extra and one to build with, all with hashes and of one set of versions."""

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
PYPROJECT: Final = HERE.parent / "pyproject.toml"


def compile_extras(name: str, extras: tuple[str, ...], options: list[str]) -> None:
    """Write requirements/<name>.txt for these extras."""
    constraint = [] if name == "dev" else ["--constraint", str(HERE / "dev.txt")]
    compile_file(name, *constraint, *options, *(f"--extra={extra}" for extra in extras), str(PYPROJECT))


def compile_file(name: str, *arguments: str) -> None:
    """Write requirements/<name>.txt for what the arguments of `uv pip compile` name."""
    flags = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-emit-index-url"]
    command = "uv pip compile via `make lock`"
    subprocess.run(
        [
            Path(sys.executable).with_name("uv"),
            *("pip", "compile", "--quiet", *flags, *arguments),
            *("--custom-compile-command", command, "--output-file", str(HERE / f"{name}.txt")),
        ],
        check=True,
    )


if __name__ == "__main__":
    for file, wanted in EXTRAS.items():
        compile_extras(file, wanted, sys.argv[1:])
    compile_file("build", "--constraint", str(HERE / "dev.txt"), *sys.argv[1:], "--group", f"{PYPROJECT}:build")
