"""Text reaches a terminal, a page or a shell through one place each, which escapes it; checked by reading the code."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.contract.docs.blocks import ROOT

PACKAGES: Final = ("qlora_api", "qlora_planner", "qlora_operator", "qlora_cli", "qlora_trainer")
"""All but qlora_codegen, which is in no image and reads only this repository."""
MODULES: Final = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for folder in ("operator", "trainer_image")
    for path in sorted((ROOT / folder / package).rglob("*.py"))
}
CONSOLE: Final = "operator/qlora_cli/console.py"
ESCAPES: Final = "operator/qlora_api/escapes.py"
WRITERS: Final = {
    "operator/qlora_operator/__main__.py": "an invalid setting, before logs are configured; escaped",
    "trainer_image/qlora_trainer/watchdog.py": "stack traces of a process that hangs; escaped",
    "trainer_image/qlora_trainer/publishing/load_check.py": "a number, for the parent process",
    "trainer_image/qlora_trainer/rehearsal.py": "JSON, for the parent process",
}
"""Other modules that write to a standard stream, and what."""
COMMAND: Final = re.compile(
    r"(?:^|[\s`'\"(])(?:qlora|kubectl|vllm|aws|helm|pip|git|docker) [a-z][a-z-]*(?: [^;,.:]*)?$"
)
"""The end of a text that starts a command, so that what follows would be one of its words."""


def name_of(node: ast.AST) -> str:
    """Return a dotted name; empty for any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def prints(tree: ast.AST) -> list[str]:
    """Return the calls that print, and the imports of rich's own consoles and markup."""
    printers = {"print", "pprint", "typer.echo", "typer.secho", "click.echo", "click.secho", "rich.print"}
    consoles = re.compile(r"(rich\.(console\.Console|console|get_console|print|markup\.\w+)|click|pprint\.\w+)")
    return [
        *(name for call in calls(tree) if (name := name_of(call.func)) in printers),
        *(name for name in imports(tree) if consoles.fullmatch(name)),
    ]


def writes(tree: ast.AST) -> list[str]:
    """Return the calls that write to a standard stream."""
    streams = re.compile(r"(sys\.(__)?(stdout|stderr)(__)?\.(buffer\.)?(write|writelines)|os\.write)")
    return [name for call in calls(tree) if streams.fullmatch(name := name_of(call.func))]


def quotes(tree: ast.AST) -> list[str]:
    """Return the uses of shlex."""
    return [name for name in imports(tree) if name.split(".")[0] == "shlex"]


def commands(tree: ast.AST) -> list[str]:
    """Return the f-strings that put a value into a command."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for text, value in zip(node.values, node.values[1:], strict=False):
                is_text = isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue)
                if is_text and COMMAND.search(str(text.value)):  # type: ignore[attr-defined]
                    found.append(ast.unparse(node))
    return found


def templates(tree: ast.AST) -> list[str]:
    """Return the Jinja environments that do not pass every value through a function."""
    return [
        ast.unparse(call)
        for call in calls(tree)
        if name_of(call.func) == "Environment" and "finalize" not in {keyword.arg for keyword in call.keywords}
    ]


def violations(check: Callable[[ast.AST], list[str]], *allowed: str) -> dict[str, list[str]]:
    return {path: found for path, tree in MODULES.items() if path not in allowed and (found := check(tree))}


def test_only_one_module_prints():
    assert violations(prints, CONSOLE) == {}
    assert prints(MODULES[CONSOLE])


def test_standard_streams_are_written_by_few_modules():
    assert violations(writes, CONSOLE, *WRITERS) == {}
    assert [path for path in WRITERS if not writes(MODULES[path])] == []


def test_every_logger_escapes():
    handlers = {
        path: found
        for path, tree in MODULES.items()
        if (found := [call for call in calls(tree) if name_of(call.func).endswith("StreamHandler")])
    }
    assert list(handlers) == ["operator/qlora_api/logs/formatters.py"]


def test_only_one_module_quotes_for_a_shell():
    assert violations(quotes, ESCAPES, "operator/qlora_cli/completion.py") == {}  # completion shows none


def test_no_command_is_formatted():
    assert violations(commands) == {}


def test_every_page_escapes():
    assert violations(templates) == {}


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (prints, "print(x)"),
        (prints, "typer.echo(x)"),
        (prints, "from rich.console import Console"),
        (prints, "from rich import print"),
        (prints, "import click"),
        (writes, "sys.stderr.write(x)"),
        (writes, "sys.stdout.buffer.write(x)"),
        (quotes, "import shlex"),
        (quotes, "from shlex import quote"),
        (commands, "f'wait with qlora wait {name}'"),
        (commands, "f'`kubectl logs {pod} -n x`'"),
        (commands, "f'vllm serve {x}'"),
        (commands, "f'run kubectl get pods --namespace {ns}'"),
        (templates, "Environment(autoescape=True)"),
    ],
)
def test_violation_is_found(check: Callable[[ast.AST], list[str]], code: str):
    assert check(ast.parse(code))


def test_a_file_was_read():
    assert len(MODULES) > 200
    assert (ROOT / CONSOLE).is_file()
    assert all(Path(ROOT, path).is_file() for path in WRITERS)
