"""Which ways to train several processes may share: every cell is one spec, judged by the rules; pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora_api.optimizers import ADAMW_8BIT
from qlora_api.strategies import FOR_SEVERAL
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.validation import check

STRATEGIES: Final = tuple(strategy.name for strategy in FOR_SEVERAL)
BASES: Final[Mapping[str, Mapping[str, Any]]] = {
    "qlora, 4 bits": {"method": "qlora", "quantization": {"bits": 4}},
    "qlora, 8 bits": {"method": "qlora", "quantization": {"bits": 8}},
    "lora, 16 bits": {"method": "lora", "quantization": {"bits": 16}},
    "full": {"method": "full", "quantization": {"bits": 16}},
}
VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "as it is": {},
    "dropout": {"lora": {"dropout": 0.1}},
    "rsLoRA": {"lora": {"rslora": True}},
    "DoRA": {"lora": {"dora": True}},
    "PiSSA": {"lora": {"init": "pissa"}},
    "LoftQ": {"lora": {"init": "loftq"}},
    "modulesToSave": {"lora": {"modulesToSave": ["lm_head"]}},
    "NEFTune": {"training": {"neftuneAlpha": 5}},
    "8-bit AdamW": {"training": {"optimizer": ADAMW_8BIT.name}},
    "padded rows": {"training": {"packing": False}},
}
_FOR_ADAPTERS: Final = frozenset({"dropout", "rsLoRA", "DoRA", "PiSSA", "LoftQ", "modulesToSave"})
_BASE: Final[Mapping[str, Any]] = {
    "model": {"uri": "hf://organization/model"},
    "dataset": {"uri": "s3://bucket/rows.jsonl"},
    "output": {"uri": "s3://bucket/adapters"},
    "resources": {"nodes": 2, "gpusPerNode": 0},
}


@dataclass(frozen=True)
class MatrixCell:
    """One way to train, and one to share it."""

    base: str
    variant: str
    strategy: str

    @property
    def spec(self) -> QLoRAJobSpec:
        """Return a spec of this kind, for two processes."""
        return QLoRAJobSpec.model_validate(
            {**_BASE, **BASES[self.base], **VARIANTS[self.variant], "distribution": self.strategy}
        )

    @property
    def refusal(self) -> str | None:
        """Return why it is refused, and what to do instead."""
        return next((violation.message for violation in check(self.spec)), None)


def matrix_cells() -> Iterator[MatrixCell]:
    """Yield every cell, row by row; the block lora has no say in method full."""
    for base in BASES:
        for way in VARIANTS:
            if base != "full" or way not in _FOR_ADAPTERS:
                yield from (MatrixCell(base, way, strategy) for strategy in STRATEGIES)


def render_distribution_matrix() -> str:
    """Return the table in Markdown, with the reasons of what is refused below it."""
    judged = [(cell, cell.refusal) for cell in matrix_cells()]
    reasons = list(dict.fromkeys(refusal for _, refusal in judged if refusal))
    marks = {refusal: f"no ({number})" for number, refusal in enumerate(reasons, start=1)}
    rows = [judged[start : start + len(STRATEGIES)] for start in range(0, len(judged), len(STRATEGIES))]
    lines = [
        f"| method and base | with | {' | '.join(STRATEGIES)} |",
        f"|---|---|{'---|' * len(STRATEGIES)}",
        *(
            f"| {row[0][0].base} | {row[0][0].variant} | "
            + " | ".join(marks[refusal] if refusal else "yes" for _, refusal in row)
            + " |"
            for row in rows
        ),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
    ]
    return "\n".join(lines)
