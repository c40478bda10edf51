"""One architecture through a whole run, with the trainer's own entry points."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.families.models import NoTinyModelError, write_model, write_rows
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.v1alpha1 import Progress, QLoRAJobSpec, QuantizationSpec
from qlora_planner import make_plan
from qlora_trainer.errors import RunError
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import load_base, load_text_config
from qlora_trainer.model.hardware import observe_hardware
from qlora_trainer.prepare import prepare
from qlora_trainer.run import run

Method = Literal["qlora", "lora", "full"]
METHODS: Final[tuple[Method, ...]] = ("qlora", "lora", "full")
STEPS: Final = 2
PACKING_ERROR: Final = 1e-4
"""Relative distance of the logits of packed rows from those of separate ones in fp32, above which packing is wrong."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    model_type: str
    method: Method
    outcome: Literal["trained", "refused", "failed", "no model"]
    stage: str = ""
    """Where it ended; empty for a trained model."""
    sentence: str = ""
    """The reason of a refusal, or the error."""
    rehearsal: str = ""
    """What the preparation said of its rehearsal."""
    packing: bool | None = None
    """Whether rows were packed."""
    merged: bool = False
    seconds: float = 0.0


class Recorder:
    """Keeps the log of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def report(self, progress: Progress) -> None:
        """Ignore progress."""

    def note(self, text: str) -> None:
        """Keep a log line."""
        self.notes.append(text)


def try_architecture(model_type: str, method: Method, work: Path) -> Outcome:
    """Build, prepare, train, publish, load and merge; never raises."""
    started, stage, log = time.monotonic(), "building", Recorder()

    def ended(outcome: Any, sentence: str = "", **more: Any) -> Outcome:
        rehearsal = next((note for note in log.notes if "rehearsed" in note or "few layers" in note), "")
        return Outcome(
            model_type,
            method,
            outcome,
            "" if outcome == "trained" else stage,
            " ".join(sentence.split())[:600],
            rehearsal[:300],
            seconds=round(time.monotonic() - started, 1),
            **more,
        )

    try:
        write_model(model_type, work / "model")
        stage = "prepare"
        spec = write_spec(method, work)
        prepared = prepare(PrepareConfig(namespace="sweep", job="tiny", spec=spec), log.note, work=work)
        stage = "run"
        config = RunConfig(
            namespace="sweep", job="tiny", attempt=1, spec=spec, plan=make_plan(spec, prepared), prepared=prepared
        )
        result = run(config, log, work=work)
        stage = "reloading"
        packing = _report_of(work)["choices"]["packing"].startswith("on")
        check_published(method, work)
        stage = "packing"
        if packing:
            check_packing(work / "model")
    except NoTinyModelError as error:
        return ended("no model", str(error))
    except RunError as error:
        return ended("refused" if stage == "prepare" else "failed", f"{error.reason}: {error.message}")
    # What fails here is what the table is for.
    except BaseException as error:
        return ended("failed", f"{type(error).__name__}: {error}")
    return ended("trained", packing=packing, merged=bool(result and result.merged))


def write_spec(method: Method, work: Path) -> QLoRAJobSpec:
    """Write rows, and return a manifest's spec: all linear modules, and the merged model as well."""
    write_rows(work / "rows.jsonl")
    blocks = {} if method == "full" else {"lora": {"rank": 4, "dropout": 0, "targets": ["all-linear"]}}
    return QLoRAJobSpec.model_validate(
        {
            "method": method,
            "model": {"uri": (work / "model").as_uri()},
            "dataset": {"uri": (work / "rows.jsonl").as_uri(), "evaluation": {"fraction": 0.2}},
            "quantization": {"bits": 4 if method == "qlora" else 16},
            "training": {"maxSteps": STEPS, "globalBatchSize": 4, "learningRate": 1e-3, "maxLength": 64},
            "evaluation": {"generations": 1},
            "resources": {"gpusPerNode": 0},
            "output": {"uri": (work / "output").as_uri()} | ({} if method == "full" else {"merged": "bf16"}),
        }
        | blocks
    )


def _report_of(work: Path) -> dict[str, Any]:
    return dict(json.loads(next((work / "output").glob("**/report.json")).read_text()))


def check_published(method: Method, work: Path) -> None:
    """Load what was published with the public API alone, and compute with it."""
    folder = _folder_with(work / "output", "model" if method == "full" else "adapter")
    base = folder if method == "full" else work / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    if method != "full":
        before = _logits(model)
        model = PeftModel.from_pretrained(model, folder)
        if float((_logits(model) - before).norm()) == 0:
            raise ValueError("the adapter changes nothing")
        merged = AutoModelForCausalLM.from_pretrained(
            _folder_with(work / "output", "merged"), dtype=torch.float32, trust_remote_code=False
        )
        distance = float((_logits(merged) - _logits(model)).norm() / _logits(model).norm())
        if not distance < 0.05:  # bf16 rounds
            raise ValueError(f"the merged model's logits are {distance:.3f} away from base and adapter")
    if not torch.isfinite(_logits(model)).all():
        raise ValueError("its logits are not finite")


def _folder_with(output: Path, name: str) -> Path:
    pattern = f"**/{name}/**/adapter_config.json" if name == "adapter" else f"**/{name}/**/config.json"
    return next(output.glob(pattern)).parent


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.arange(2, 20)[None], use_cache=False).logits.float()
    return logits


@torch.no_grad()
def check_packing(folder: Path) -> None:
    """Compare packed rows with separate ones in fp32, as a run loads the model."""
    attention, _ = choose_attention(attention_facts(load_text_config(folder)), observe_hardware("cpu"))
    base = load_base(folder, QuantizationSpec(bits=16), torch.float32, attention, "cpu")
    first, second = torch.arange(2, 13)[None], torch.arange(40, 57)[None]
    positions = torch.cat([torch.arange(11), torch.arange(17)])[None]
    both = torch.cat([first, second], dim=1)
    packed = base(input_ids=both, position_ids=positions, use_cache=False).logits[0, 11:]
    separate = base(input_ids=second, use_cache=False).logits[0]
    distance = float((packed - separate).norm() / separate.norm())
    if distance > PACKING_ERROR:
        raise ValueError(f"packed rows are {distance:.5f} away from separate ones")
