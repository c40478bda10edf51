"""The matrix of methods, options and distribution strategies: every cell is a spec that validation checks; pure."""

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
    """One combination of method, option and strategy."""

    base: str
    variant: str
    strategy: str

    @property
    def spec(self) -> QLoRAJobSpec:
        """Return a spec of this combination for two processes."""
        return QLoRAJobSpec.model_validate(
            {**_BASE, **BASES[self.base], **VARIANTS[self.variant], "distribution": self.strategy}
        )

    @property
    def rejection(self) -> str | None:
        """Return the message of the first violation, or None if it is supported."""
        return next((violation.message for violation in check(self.spec)), None)


def matrix_cells() -> Iterator[MatrixCell]:
    """Yield every cell, row by row; options of spec.lora do not apply to method full."""
    for base in BASES:
        for variant in VARIANTS:
            if base != "full" or variant not in _FOR_ADAPTERS:
                yield from (MatrixCell(base, variant, strategy) for strategy in STRATEGIES)


def render_distribution_matrix() -> str:
    """Return the matrix as a Markdown table, with the messages of unsupported cells below it."""
    results = [(cell, cell.rejection) for cell in matrix_cells()]
    reasons = list(dict.fromkeys(rejection for _, rejection in results if rejection))
    marks = {rejection: f"no ({number})" for number, rejection in enumerate(reasons, start=1)}
    rows = [results[start : start + len(STRATEGIES)] for start in range(0, len(results), len(STRATEGIES))]
    lines = [
        f"| method and base | with | {' | '.join(STRATEGIES)} |",
        f"|---|---|{'---|' * len(STRATEGIES)}",
        *(
            f"| {row[0][0].base} | {row[0][0].variant} | "
            + " | ".join(marks[rejection] if rejection else "yes" for _, rejection in row)
            + " |"
            for row in rows
        ),
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
    ]
    return "\n".join(lines)
