"""Trains, evaluates and publishes the quickstart's adapter locally: `make demo`."""

import shutil
import textwrap
from pathlib import Path
from typing import Final

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from examples.quickstart.make_data import DATA, HELD_OUT, TRAIN
from examples.quickstart.make_model import DEFAULT_MIRROR, make_model
from qlora_api.report import RunReport, Sample, TerminationMessage
from qlora_api.runconfig import Platform
from qlora_cli.commands.run import load_manifest, run_with_progress
from qlora_cli.console import Console
from qlora_cli.display.result import show_result
from qlora_cli.uris import to_display_path

HERE: Final = Path(__file__).parent
OUTPUT: Final = Path("out/quickstart")
ALL_STEPS: Final = 173
"""One epoch of 1,384 rows; job.yaml stops earlier."""
SHOWN_SAMPLES: Final = 3
"""Number of samples of the report to show."""
SHOWN_CHARACTERS: Final = 240
"""Characters of an answer to show; a base model may not stop by itself."""


def main() -> None:
    """Run the quickstart's manifest with local files instead of hub and S3."""
    console = Console(markup=True)
    changes = local_changes()
    console.print("[bold]1. The model[/]")
    console.print(f"[dim]{escape(str(make_model(DEFAULT_MIRROR, console.print)))}[/]", soft_wrap=True)
    console.print("\n[bold]2. The run[/], the same as")
    console.print(Padding(command(changes), (0, 0, 0, 3)))
    termination_message = run_local(changes, console)
    console.print("\n[bold]3. The result[/]")
    show_result(termination_message, console)
    show_samples(load_report(termination_message).samples[:SHOWN_SAMPLES], console)
    console.print("[bold]Next[/]: chat with the adapter, train for one epoch, or apply the same manifest in a cluster")
    console.print(Padding(chat_command(termination_message), (0, 0, 0, 3)))
    console.print(Padding(command([*changes, f"training.maxSteps={ALL_STEPS}"]), (0, 0, 0, 3)))
    console.print(Padding("kubectl apply -f examples/quickstart/job.yaml", (0, 0, 0, 3)))


def local_changes() -> list[str]:
    """Return the changes of the manifest for a local run."""
    root = Path.cwd()
    data = DATA.relative_to(root) if DATA.is_relative_to(root) else DATA
    return [f"dataset.uri={data / TRAIN}", f"dataset.evaluation.uri={data / HELD_OUT}", f"output.uri={OUTPUT}"]


def chat_command(termination_message: TerminationMessage) -> str:
    """Return the command that starts a chat with the adapter."""
    adapter = Path(to_display_path(termination_message.result.adapter)) if termination_message.result else Path()
    shown = adapter.relative_to(Path.cwd()) if adapter.is_relative_to(Path.cwd()) else adapter
    return f"{program()} chat --hub-mirror {short(DEFAULT_MIRROR)} \\\n  --adapter {shown}"


def program() -> str:
    """Return the path of the `qlora` command."""
    return "qlora" if shutil.which("qlora") else ".venv/bin/qlora"


def command(changes: list[str]) -> str:
    """Return the command of a run with these changes."""
    options = "".join(f" \\\n  --set {change}" for change in changes)
    return f"{program()} run examples/quickstart/job.yaml \\\n  --hub-mirror {short(DEFAULT_MIRROR)}{options}"


def short(path: Path) -> str:
    """Return a path with ~ for the home folder."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def run_local(changes: list[str], console: Console) -> TerminationMessage:
    """Run the manifest in this process."""
    manifest = load_manifest(str(HERE / "job.yaml"), changes, console)
    return run_with_progress(manifest, Platform(hub_mirror=DEFAULT_MIRROR.as_uri()), console)


def load_report(termination_message: TerminationMessage) -> RunReport:
    """Read the published report."""
    if termination_message.result is None:
        raise ValueError("the run has no result")
    return RunReport.model_validate_json(Path(to_display_path(termination_message.result.report)).read_text())


def show_samples(samples: tuple[Sample, ...], console: Console) -> None:
    """Show held-out questions with the answers of base and adapter."""
    console.print("\n[bold]Held-out questions[/], answered by base and adapter")
    for sample in samples:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 3))
        table.add_row("[bold]question[/]", f"[bold]{escape(question(sample.prompt))}[/]")
        for name, answer in (("docstring", sample.reference), ("base", sample.base), ("adapter", sample.adapter)):
            table.add_row(f"[dim]{name}[/]", escape(textwrap.shorten(answer, SHOWN_CHARACTERS, placeholder=" …")))
        console.print(table)
        console.print()


def question(prompt: str) -> str:
    """Return the instruction without the headings of the template."""
    return next(line for line in prompt.splitlines() if line.strip() and not line.startswith("#"))


if __name__ == "__main__":
    main()
