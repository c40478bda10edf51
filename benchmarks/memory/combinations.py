"""The measured combinations: model shapes of several families, with different rows and training settings."""

import random
from dataclasses import dataclass, fields
from typing import Any, Final

SEPARATE: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi"})
"""Families whose layers have a q_proj and a v_proj."""
EVERYTHING: Final = ("all-linear",)


@dataclass(frozen=True)
class Combination:
    """A model, rows and settings of one measured step."""

    family: str = "llama"
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int | None = None
    vocabulary: int = 1024
    tied: bool = True
    rows: int = 2
    tokens: int = 256
    """Length of the longest row."""
    shortest: float = 1.0
    """Length of the shortest row relative to the longest; the others are evenly spaced between them."""
    packing: bool = False
    learned: float = 1.0
    """Fraction of a row's tokens, counted from its end, that are labels."""
    method: str = "qlora"
    bits: int = 4
    dtype: str = "bfloat16"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    dropout: float = 0.0
    dora: bool = False
    checkpointing: bool = False

    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each row."""
        step = (1 - self.shortest) / max(self.rows - 1, 1)
        return tuple(max(2, round(self.tokens * (1 - step * number))) for number in range(self.rows))

    @property
    def model(self) -> str:
        """Return a short description of the model: family, layers x hidden / intermediate, heads, vocabulary."""
        heads = f"{self.heads}/{self.kv_heads}" + (f"x{self.head_dim}" if self.head_dim else "")
        return f"{self.family} {self.layers}x{self.hidden}/{self.intermediate} h{heads} v{self.vocabulary}"

    @property
    def layout(self) -> str:
        """Return a short description of the rows."""
        span = f"{self.rows}x{self.tokens}" + (f"..{min(self.lengths())}" if min(self.lengths()) < self.tokens else "")
        return " ".join([span, "packed" if self.packing else "padded", f"labels {self.learned:.0%}"])

    @property
    def training(self) -> str:
        """Return a short description of the training settings."""
        words = [self.method, f"{self.bits} bit", self.dtype]
        if self.method != "full":
            words += [",".join(self.targets), f"r{self.rank}"]
        words += [f"dropout {self.dropout}"] if self.dropout else []
        return " ".join([*words, *(word for word in ("dora", "checkpointing") if getattr(self, word))])

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}


def draw(number: int, seed: int) -> tuple[Combination, ...]:
    """Draw random combinations of everything that the trainer supports on a CPU."""
    generator = random.Random(seed)  # noqa: S311 (a sample, no secret)
    return tuple(_draw(generator) for _ in range(number))


def _draw(generator: random.Random) -> Combination:
    method, bits, dtype = generator.choice(
        [
            *[("qlora", 4, "bfloat16")] * 4,
            ("qlora", 4, "float32"),
            ("qlora", 8, "bfloat16"),
            ("lora", 16, "bfloat16"),
            ("lora", 16, "float32"),
            ("full", 16, "bfloat16"),
        ]
    )
    # bitsandbytes quantizes no layer of Falcon, and prepare rejects that.
    family = generator.choice(sorted(SEPARATE) + ["phi3", "gpt_neox"] + (["falcon"] if bits == 16 else []))
    heads = generator.choice([4, 8])
    grouped = family not in {"gpt_neox", "falcon", "phi"}
    return Combination(
        family=family,
        hidden=generator.choice([64, 128, 256, 384, 512]),
        intermediate=generator.choice([256, 512, 688, 1024]),
        layers=generator.randint(2, 8),
        heads=heads,
        kv_heads=generator.choice([heads, heads // 2, heads // 4]) if grouped else heads,
        head_dim=generator.choice([32, 64]) if family in {"qwen3", "gemma", "gemma2", "gemma3_text"} else None,
        vocabulary=generator.choice([1024, 4096, 16_384, 32_768]),
        tied=generator.random() < 0.5,
        rows=generator.choice([1, 2, 4, 8]),
        tokens=generator.choice([64, 128, 200, 256, 384, 512]),
        shortest=generator.choice([1.0, 0.7, 0.3]),
        packing=generator.random() < 0.5 and family != "falcon",
        learned=generator.choice([1.0, 0.5, 0.2]),
        method=method,
        bits=bits,
        dtype=dtype,
        targets=EVERYTHING if family not in SEPARATE or generator.random() < 0.5 else ("q_proj", "v_proj"),
        rank=generator.choice([4, 8, 16, 64]),
        dropout=generator.choice([0.0, 0.05]) if method != "full" else 0.0,
        dora=method != "full" and bits != 8 and generator.random() < 0.15,
        checkpointing=generator.random() < 0.35,
    )


_HEADS: Final[dict[str, dict[str, Any]]] = {
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 64},
}
UNEVEN: Final[dict[str, Any]] = {"rows": 4, "shortest": 0.4}
PACKED: Final[dict[str, Any]] = {"rows": 4, "shortest": 0.4, "packing": True}
CHOSEN: Final = (
    Combination(),
    # Shapes of every family that the planner supports, padded and packed.
    *(Combination(family=family, **_HEADS.get(family, {}), **UNEVEN) for family in sorted(SEPARATE - {"llama"})),
    *(Combination(family=family, targets=EVERYTHING, **PACKED) for family in ("phi3", "gpt_neox")),
    Combination(family="falcon", method="lora", bits=16, kv_heads=8, targets=EVERYTHING, **UNEVEN),
    # Rows: few and long, many and short, one; packed and padded; labels on answers only.
    Combination(tokens=1024, rows=1),
    Combination(tokens=64, rows=16),
    Combination(tokens=1024, rows=1, packing=True),
    Combination(**PACKED),
    Combination(**PACKED, tokens=512),
    Combination(**PACKED, learned=0.25),
    Combination(**UNEVEN, learned=0.25),
    # A vocabulary whose logits dominate, in one chunk and in several.
    Combination(vocabulary=32_000),
    Combination(vocabulary=32_000, rows=8, tokens=256, tied=False),
    Combination(vocabulary=32_000, family="gemma2", head_dim=32),
    # Adapters.
    Combination(targets=EVERYTHING),
    Combination(targets=EVERYTHING, rank=128),
    Combination(targets=EVERYTHING, dropout=0.05),
    Combination(targets=("o_proj", "down_proj"), dropout=0.05),
    Combination(dora=True, targets=EVERYTHING),
    Combination(dora=True, dropout=0.05),
    # Quantization and compute dtype of the base.
    Combination(dtype="float32"),
    Combination(bits=8),
    Combination(method="lora", bits=16, targets=EVERYTHING),
    Combination(method="lora", bits=16, dtype="float32"),
    Combination(method="full", bits=16),
    Combination(method="full", bits=16, checkpointing=True, tied=False, vocabulary=8192),
    # Gradient checkpointing.
    Combination(checkpointing=True, layers=8),
    Combination(checkpointing=True, **PACKED),
    Combination(checkpointing=True, targets=EVERYTHING, dropout=0.05),
    Combination(checkpointing=True, bits=8, targets=EVERYTHING),
    Combination(checkpointing=True, family="gemma3_text", head_dim=64, **UNEVEN),
    Combination(checkpointing=True, hidden=512, intermediate=1536, layers=6, tokens=512, targets=EVERYTHING),
)
"""Each changes one setting; some were used while the formula was written."""
