"""`qlora chat`: questions to a base and to several adapters on it, answered side by side."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_api.accelerators import DeviceName
from qlora_api.local_requests import ChatRequest, ChatTurn, GenerationConfig
from qlora_api.runconfig import Platform
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
from qlora_cli.uris import to_uri

QUIT: Final = "/quit"
RESET: Final = "/new"
PROMPT: Final = "> "
TRUNCATED: Final = " …"
"""Behind an answer that --max-tokens cut off."""
DEFAULT_MAX_TOKENS: Final = 256
"""Tokens of an answer: about 200 words."""
Show = Callable[[ChatTurn], None]


class Device(StrEnum):
    """Where the answers are computed."""

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
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="0 takes the likeliest token each time; higher values vary more.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0: the same seed, the same answer.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")] = Device.AUTO,
    base_model: BaseModel = None,
    hub_mirror: HubMirror = None,
    hub_endpoint: HubEndpoint = None,
    s3_endpoint: S3Endpoint = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Ask a base and the adapters on it, side by side; all of them share one base in memory."""
    console = Console(stderr=True, highlight=False)
    platform = make_platform(hub_mirror, hub_endpoint, s3_endpoint)
    manner = GenerationConfig(max_new_tokens=max_tokens, temperature=temperature, seed=seed, system=system)
    talking = not ask and sys.stdin.isatty()
    printers = {OutputFormat.JSON: print_json, OutputFormat.YAML: print_yaml}
    show = printers.get(output) or ChatPrinter(Console(highlight=False), questions=not talking).show
    with exit_on_error(console, "no more questions are answered", exit_error_without_remedy):
        panel = load_chat_model(adapter, device, base_model, platform, console)
        conversation = panel.start_conversation(manner, keep_history=talking)
        if talking:
            chat_interactively(conversation, show, console)
        else:
            for question in filter(None, map(str.strip, ask or sys.stdin)):
                show(answer(conversation, question, console))


def load_chat_model(
    adapters: list[str], device: Device, model: str | None, platform: Platform, console: Console
) -> Any:
    """Load the base and all adapters."""
    places, work = open_source_resolver(platform)
    from qlora_trainer.inference.multi_adapter_chat import load_multi_adapter_model  # noqa: PLC0415 (comes with torch)

    request = ChatRequest(
        adapters=tuple(map(to_uri, adapters)),
        device=choose_device(device),
        model=to_uri(model) if model else None,
    )
    with console.status("loading base and adapters"):
        return load_multi_adapter_model(request, places, work, lambda text: console.print(escape(text), soft_wrap=True))


def choose_device(device: Device) -> DeviceName:
    """Return where to compute, or refuse a GPU that is not there."""
    if device is Device.CUDA and not cuda_available():
        raise NoGpuError("--device is cuda, and PyTorch finds no CUDA device on this computer; give --device cpu")
    return "cuda" if device is Device.CUDA or (device is Device.AUTO and cuda_available()) else "cpu"


def chat_interactively(conversation: Any, show: Show, console: Console) -> None:
    """Answer what a person types, until they have enough; a question that cannot be asked ends nothing."""
    from qlora_trainer.errors import RunError  # noqa: PLC0415 (part of another installation)

    console.print(f"[dim]{QUIT} or Ctrl-D ends, {RESET} forgets what was said[/]")
    for line in read_questions():
        if line == RESET:
            conversation.reset()
            continue
        try:
            show(answer(conversation, line, console))
        except RunError as error:
            console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)


def read_questions() -> Iterator[str]:
    """Yield what a person types, but blank lines."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415 (its import lets input() have arrow keys; absent on Windows)
    try:
        while (line := input(PROMPT).strip()) != QUIT:
            if line:
                yield line
    except EOFError:
        typer.echo(err=True)  # Ctrl-D leaves the cursor behind the prompt


def answer(conversation: Any, question: str, console: Console) -> ChatTurn:
    """Let all answer, and show meanwhile who is about to."""
    with console.status("") as status:
        exchange: ChatTurn = conversation.ask(question, lambda label: status.update(f"{escape(label)} answers"))
    return exchange


def print_json(exchange: ChatTurn) -> None:
    """Print an exchange as one line."""
    typer.echo(exchange.model_dump_json(by_alias=True))


def print_yaml(exchange: ChatTurn) -> None:
    """Print an exchange as a document of its own."""
    typer.echo("---")
    print_data(exchange.model_dump(mode="json", by_alias=True), OutputFormat.YAML)


class ChatPrinter:
    """Prints exchanges for a person."""

    def __init__(self, console: Console, *, questions: bool) -> None:
        """Print questions as well where nobody has just typed them."""
        self._console = console
        self._questions = questions

    def show(self, exchange: ChatTurn) -> None:
        """Print who says what."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        if self._questions:
            table.add_row(Text("question", "bold"), Text(exchange.question, "bold"))
        for reply in exchange.replies:
            table.add_row(Text(reply.by, "dim"), Text(reply.text.strip() + ("" if reply.complete else TRUNCATED)))
        self._console.print(table)
        self._console.print()
