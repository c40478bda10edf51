"""The commands of `qlora`; each is a module of qlora_cli.commands, imported only when it is used."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from qlora_cli.errors import exit_on_path_error


@dataclass(frozen=True)
class CommandEntry:
    """Where a command is, and the first sentence of its help."""

    module: str
    function: str
    summary: str


COMMANDS: Final[Mapping[str, CommandEntry]] = {
    "init": CommandEntry("init", "init", "Write a first manifest, with the description of each field."),
    "validate": CommandEntry("validate", "validate", "Check manifests offline; other kinds in a file are ignored."),
    "plan": CommandEntry(
        "plan",
        "plan",
        "Show the memory that runs need and how they will be executed, without a cluster, a GPU or a network.",
    ),
    "render": CommandEntry(
        "render",
        "render",
        "Print QLoRAJobs with all defaults, and the objects that the operator would create for them, as YAML.",
    ),
    "run": CommandEntry(
        "run", "run", "Prepare, train, evaluate and publish on this machine; credentials come from the environment."
    ),
    "merge": CommandEntry(
        "merge", "merge", "Merge an adapter with its base into one bf16 model, and measure the difference."
    ),
    "chat": CommandEntry(
        "chat", "chat", "Chat with a base model and adapters side by side; the base is in memory only once."
    ),
    "submit": CommandEntry(
        "submit",
        "submit",
        "Create QLoRAJobs; all are validated before the first is created. Other kinds in a file are ignored.",
    ),
    "list": CommandEntry("list", "list_jobs", "List QLoRAJobs, newest last."),
    "status": CommandEntry(
        "status",
        "status",
        "Show the state of a run, why, and the fix if it needs one; with --watch live progress, time left and loss.",
    ),
    "wait": CommandEntry(
        "wait",
        "wait",
        "Wait until runs have ended. Exit code 0: all succeeded; 3: one failed; 124: timed out; 1: an error.",
    ),
    "logs": CommandEntry(
        "logs",
        "logs",
        "Print the logs of all pods of an attempt; once the pods are gone, those archived in the output.",
    ),
    "events": CommandEntry(
        "events",
        "events",
        "Show the Events of a run, its Jobs and its pods, newest last; Kubernetes keeps Events for an hour.",
    ),
    "suspend": CommandEntry(
        "suspend",
        "suspend",
        "Let a run write a checkpoint, stop and release its GPUs; qlora resume continues from there.",
    ),
    "resume": CommandEntry("suspend", "resume", "Resume a suspended run from its last checkpoint."),
    "rerun": CommandEntry(
        "rerun",
        "rerun",
        "Run a finished run again: a failed one in place, from its checkpoint; another is deleted and created again.",
    ),
    "usage": CommandEntry(
        "usage", "usage", "Show what runs held of GPUs, for what, and what it cost: by run, team or month."
    ),
    "report": CommandEntry(
        "report",
        "report",
        "Show and open the report of a published run; from a bucket it is downloaded, with the local S3 credentials.",
    ),
    "serve-snippet": CommandEntry(
        "serve_snippet",
        "serve_snippet",
        "Print how to serve a published run, with the base model's commit and the right --max-lora-rank.",
    ),
}
_OTHER_NAMES: Final[Mapping[str, str]] = {
    other: name
    for name, others in (
        ("run", "train finetune fine-tune start preprocess prepare"),
        ("list", "get ls ps jobs"),
        ("status", "describe show watch"),
        ("submit", "apply create deploy push"),
        ("init", "new"),
        ("validate", "check lint"),
        ("plan", "estimate"),
        ("render", "template"),
        ("chat", "inference generate ask"),
        ("merge", "merge-lora export"),
        ("logs", "log"),
        ("suspend", "stop cancel pause delete"),
        ("rerun", "retry restart"),
        ("resume", "continue"),
        ("serve-snippet", "serve"),
        ("--version", "version"),
        ("--help", "help"),
    )
    for other in others.split()
}
"""Names that other programs give to a command."""


class _LazyCommands(MutableMapping[str, Any]):
    """The commands by name; reading one imports its module."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _load(name: str) -> TyperCommand:
    entry = COMMANDS[name]
    function = getattr(import_module(f"qlora_cli.commands.{entry.module}"), entry.function)
    info = CommandInfo(name=name, callback=exit_on_path_error(function))
    command = get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")
    return cast("TyperCommand", command)


class LazyGroup(TyperGroup):
    """A group whose help lists the commands without importing them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _LazyCommands()
        self._listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 (the base class's signature)
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 (as above)
        """Return a command, or, for the list in the help, its name and summary."""
        if cmd_name not in COMMANDS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name].summary)
        return self.commands[cmd_name]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name; for a name of another program, say what it is here."""
        known = _OTHER_NAMES.get(args[0]) if args and args[0] not in COMMANDS else None
        if known and not ctx.resilient_parsing:
            raise typer.BadParameter(f"no such command {args[0]!r}; write {ctx.command_path} {known}", ctx=ctx)
        return super().resolve_command(ctx, args)
