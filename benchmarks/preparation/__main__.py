"""`make bench-preparation`: how many rows per second of CPU time a preparation reads, renders and tokenizes."""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qlora_trainer.__main__ import configure_libraries
from qlora_trainer.runtime.rank import default_work

configure_libraries(default_work())  # as a pod does, before the libraries are imported

from qlora_api.runconfig import PrepareConfig  # noqa: E402
from qlora_api.v1alpha1 import QLoRAJobSpec  # noqa: E402
from qlora_trainer.prepare import prepare  # noqa: E402
from tests.unit.trainer.tiny import write_model  # noqa: E402

ROWS: Final = int(os.environ.get("ROWS", "10000"))
WARM_UP_ROWS: Final = 40
"""Rows of a first preparation, which imports the libraries and starts the process that renders templates."""
WORDS: Final = tuple(f"word{number}" for number in range(3000))
TEMPLATE: Final = (  # like Qwen3's: thoughts of earlier answers are left out, and the last answer always has some
    "{%- if messages[0].role == 'system' %}<s>system\n{{ messages[0].content }}</s>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<s>user\n{{ m.content }}</s>\n"
    "{% elif m.role == 'assistant' %}<s>assistant\n{% set thought = '' %}{% set said = m.content %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def main() -> None:
    """Print the figures of both kinds of rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", max_position_embeddings=4096)
        for kind in ("chat", "instruction"):
            seconds = measure(folder, kind)
            print(f"{ROWS:,} {kind} rows: {ROWS / seconds:,.0f} rows per second of CPU time, {seconds:.1f} s")


def measure(folder: Path, kind: str) -> float:
    """Return the CPU seconds of a preparation, with its child processes, after one that imports the libraries."""
    prepare_rows(folder, kind, WARM_UP_ROWS)
    before = cpu_seconds(os.getpid())
    prepare_rows(folder, kind, ROWS)
    return cpu_seconds(os.getpid()) - before


def prepare_rows(folder: Path, kind: str, count: int) -> None:
    """Prepare a run with as many rows."""
    path = folder / f"{kind}-{count}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in make_rows(kind, count)))
    template = {"chatTemplate": TEMPLATE} if kind == "chat" else {}
    spec = QLoRAJobSpec.model_validate({
        "model": {"uri": f"file://{folder / 'model'}"},
        "dataset": {"uri": f"file://{path}", **template},
        "output": {"uri": f"file://{folder / 'output'}"},
    })  # fmt: skip
    prepare(PrepareConfig(namespace="benchmark", job=path.stem, spec=spec), work=folder / "work")


def make_rows(kind: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of about 130 words: chats with a system message and two answers, or instructions."""
    chosen = random.Random(1)  # noqa: S311 (no secret)

    def text(words: int) -> str:
        return " ".join(chosen.choices(WORDS, k=words))

    for number in range(count):
        if kind == "instruction":
            yield {"instruction": f"{number} {text(60)}", "output": text(70)}
        else:
            texts = (f"{number} {text(25)}", text(40), text(25), text(40))
            roles = ("user", "assistant", "user", "assistant")
            turns = [{"role": role, "content": content} for role, content in zip(roles, texts, strict=True)]
            yield {"messages": [{"role": "system", "content": "Be kind."}, *turns]}


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process and of its living descendants (/proc/PID/stat, fields 14 and 15)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{process}/task").glob("*/children")
    return own + sum(cpu_seconds(int(child)) for path in children for child in path.read_text().split())


if __name__ == "__main__":
    main()
