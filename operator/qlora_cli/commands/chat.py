"""`qlora chat`: the answers of a base model and of several adapters, side by side."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from qlora_api.accelerators import DeviceName
from qlora_api.escapes import escape_json, escape_line, escape_text
from qlora_api.local_requests import ChatRequest, ChatTurn, GenerationConfig
from qlora_api.runconfig import Platform
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.formats import print_data
from qlora_cli.errors import exit_error_without_remedy, exit_on_error
from qlora_cli.local.trainer_libraries import NoGpuError, cuda_available, open_source_resolver
from qlora_cli.options import (
    BaseModel,
    HubEndpoint,
    HubMirror,
    OutputFormat,
    OutputOption,
    S3Endpoint,
    make_platform,
)
from qlora_cli.uris import to_model_uri, to_uri

QUIT: Final = "/quit"
RESET: Final = "/new"
PROMPT: Final = "> "
TRUNCATED: Final = " …"
"""Appended to an answer that --max-tokens cut off."""
DEFAULT_MAX_TOKENS: Final = 256
"""About 200 words."""
Show = Callable[[ChatTurn], None]


class Device(StrEnum):
    """Values of --device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def chat(  # noqa: PLR0913, PLR0917 (an option each)
    adapter: Annotated[
        list[str],
        typer.Option(help="Folder or s3:// URI of a published adapter; may be given several times.", metavar="ADAPTER"),
    ],
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A question; may be given several times. Without any, they are read from standard input.",
        ),
    ] = None,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="System message, for adapters that were trained on chats.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed of sampling, for a temperature above 0.")] = 0,
    device: Annotated[
        Device, typer.Option(help="Device to compute on; auto uses a GPU if there is one.")
    ] = Device.AUTO,
    base_model: BaseModel = None,
    hub_mirror: HubMirror = None,
    hub_endpoint: HubEndpoint = None,
    s3_endpoint: S3Endpoint = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Chat with a base model and adapters side by side; the base is in memory only once."""
    console = Console(stderr=True)
    platform = make_platform(hub_mirror, hub_endpoint, s3_endpoint)
    generation = GenerationConfig(max_new_tokens=max_tokens, temperature=temperature, seed=seed, system=system)
    interactive = not ask and sys.stdin.isatty()
    printers = {OutputFormat.JSON: print_json, OutputFormat.YAML: print_yaml}
    show = printers.get(output) or ChatPrinter(Console(), questions=not interactive).show
    with exit_on_error(console, "chat stopped", exit_error_without_remedy):
        model = load_chat_model(adapter, device, base_model, platform, console)
        conversation = model.start_conversation(generation, keep_history=interactive)
        if interactive:
            chat_interactively(conversation, show, console)
        else:
            for question in filter(None, map(str.strip, ask or sys.stdin)):
                show(answer(conversation, question, console))


def load_chat_model(
    adapters: list[str], device: Device, model: str | None, platform: Platform, console: Console
) -> Any:
    """Load the base model and all adapters."""
    sources, work = open_source_resolver(platform)
    from qlora_trainer.inference.multi_adapter_chat import load_multi_adapter_model  # noqa: PLC0415 (comes with torch)

    request = ChatRequest(
        adapters=tuple(to_uri(adapter, "--adapter") for adapter in adapters),
        device=choose_device(device),
        model=to_model_uri(model, "--base-model") if model else None,
    )
    with console.status("loading base and adapters"):
        return load_multi_adapter_model(request, sources, work, lambda text: print_line(console, text))


def choose_device(device: Device) -> DeviceName:
    """Return the device to compute on.

    Raises:
        NoGpuError: --device is cuda, but there is no CUDA device.

    """
    if device is Device.CUDA and not cuda_available():
        raise NoGpuError("--device is cuda, but PyTorch finds no CUDA device on this machine; use --device cpu")
    return "cuda" if device is Device.CUDA or (device is Device.AUTO and cuda_available()) else "cpu"


def chat_interactively(conversation: Any, show: Show, console: Console) -> None:
    """Answer questions from the terminal until the user quits; an error in one question does not end the chat."""
    from qlora_trainer.errors import RunError  # noqa: PLC0415 (part of the optional trainer)

    print_line(console, "", f"{QUIT} or Ctrl-D quits, {RESET} clears the history", "dim")
    for line in read_questions():
        if line == RESET:
            conversation.reset()
            continue
        try:
            show(answer(conversation, line, console))
        except RunError as error:
            print_line(console, error.message, "error: ", "bold red")


def read_questions() -> Iterator[str]:
    """Yield the lines that the user types, without blank ones."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 (importing it adds line editing to input(); absent on Windows)
    try:
        while (line := input(PROMPT).strip()) != QUIT:
            if line:
                yield line
    except EOFError:
        echo(err=True)  # Ctrl-D leaves the cursor on the prompt's line


def answer(conversation: Any, question: str, console: Console) -> ChatTurn:
    """Return the answers of all models; meanwhile show which one is generating."""
    with console.status("") as status:
        turn: ChatTurn = conversation.ask(question, lambda label: status.update(Text(f"{label} is answering")))
    return turn


def print_json(turn: ChatTurn) -> None:
    """Print a turn as one line of JSON."""
    echo(escape_json(turn.model_dump_json(by_alias=True)))


def print_yaml(turn: ChatTurn) -> None:
    """Print a turn as one YAML document."""
    echo("---")
    print_data(turn.model_dump(mode="json", by_alias=True), OutputFormat.YAML)


class ChatPrinter:
    """Prints turns as tables."""

    def __init__(self, console: Console, *, questions: bool) -> None:
        """Create a printer that also prints the questions, if `questions` is true."""
        self._console = console
        self._questions = questions

    def show(self, turn: ChatTurn) -> None:
        """Print one line per model."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        if self._questions:
            table.add_row(Text("question", "bold"), Text(escape_text(turn.question), "bold"))
        for reply in turn.replies:
            text = escape_text(reply.text.strip())
            table.add_row(Text(escape_line(reply.by), "dim"), Text(text + ("" if reply.complete else TRUNCATED)))
        self._console.print(table)
        self._console.print()
