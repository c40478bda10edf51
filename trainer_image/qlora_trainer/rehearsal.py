"""Runs the code of a whole run on a shrunk copy of the model on the CPU: what a GPU would find is found in prepare.

`python -m qlora_trainer.rehearsal < TASK` reads a RehearsalTask and prints a Rehearsal.

A copy may fail for what it lacks and not for what it is: a model that transformers itself cannot train after it was
shrunk is not rehearsed, and never refused.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM

from qlora_api.base import ApiModel
from qlora_api.reasons import Reason
from qlora_api.report import AdapterRecord
from qlora_api.v1alpha1 import LoraSpec, MergeBase, QuantizationSpec, TrainingSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import load_architecture
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import (
    TrainableModel,
    attach_lora,
    load_base,
    load_text_config,
    packing_is_exact,
    prepare_full_finetune,
)
from qlora_trainer.model.full_finetune import save_full_model
from qlora_trainer.model.generation_config import save_model
from qlora_trainer.model.hardware import observe_hardware
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.model.shrunk_model import CannotShrinkError, write_shrunk_model
from qlora_trainer.model.target_modules import ALL_LINEAR, match_modules
from qlora_trainer.model.weight_check import check_loaded
from qlora_trainer.publishing.load_check import LoadingTask, compute_loss, mean_loss, rows_of_task
from qlora_trainer.publishing.merge_weights import MergeTask, build_merged
from qlora_trainer.publishing.publish import save_adapter
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.loop import Schedule, TrainingCallbacks, make_loop

PROVEN_TYPES: Final = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt_neox",
        "falcon",
    }
)
"""model_type of families that tests take through a whole run, so that rehearsing them would only take time."""
_TIMEOUT_SECONDS: Final = 600.0
"""Several times what the slowest architecture takes on half a core."""
_ROWS: Final = 4
_ROW_TOKENS: Final = 24
_PADDED_TOKENS: Final = 5
_RANK: Final = 8
"""Largest rank of an adapter on a copy."""
_TOLERANCE: Final = 0.1
"""Nats per token between training and reloading; bf16 on a CPU rounds by up to 0.02, a lost adapter is far above."""


class RehearsalTask(ApiModel):
    """What to rehearse."""

    folder: str
    """Has the model's config.json."""
    method: str
    quantization: QuantizationSpec
    lora: LoraSpec
    merged: MergeBase | None
    largest_token: int
    """Largest token id of the rows."""


class Rehearsal(ApiModel):
    """How a rehearsal went; with neither sentence, well."""

    not_rehearsed: str = ""
    """Why no copy could be trained by transformers alone."""
    failed: str = ""
    """What failed, and with which error."""


class StageError(Exception):
    """A stage of the rehearsal failed."""


def rehearse_in_process(task: RehearsalTask, architecture: str, work: Path) -> Iterator[str]:
    """Rehearse in a process of its own, which returns its memory; yield log lines, raise ModelUnsupported if it fails.

    Args:
        task: What to rehearse.
        architecture: Class of the model, for messages.
        work: Folder for the copy.

    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "qlora_trainer.rehearsal"],
            input=task.model_dump_json(by_alias=True),
            capture_output=True,
            text=True,
            cwd=work,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield f"{architecture} was not rehearsed: a copy with few layers took longer than {_TIMEOUT_SECONDS:g} s"
        return
    if done.returncode != 0:  # killed, as by the memory limit of the pod
        yield f"{architecture} was not rehearsed: the process ended with {done.returncode}: {done.stderr[-300:]}"
        return
    found = Rehearsal.model_validate_json(done.stdout.splitlines()[-1])
    if found.failed:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.model.uri: a copy of {architecture} with few layers and random weights could not be trained as this "
            f"manifest says: {found.failed}; use another model, or change spec.lora, spec.quantization or "
            "spec.output.merged",
        )
    yield (
        f"{architecture} was not rehearsed: {found.not_rehearsed}"
        if found.not_rehearsed
        else f"a copy of {architecture} with few layers was trained, evaluated, saved and loaded again"
    )


def rehearse(task: RehearsalTask, work: Path) -> Rehearsal:
    """Load, train, generate, save, load again and merge a shrunk copy of the model."""
    copy = work / "model"
    try:
        write_shrunk_model(Path(task.folder), copy)
        _train_with_transformers(copy)
    except CannotShrinkError as error:
        return Rehearsal(not_rehearsed=f"no smaller copy can be built: {_describe(error)}")
    # The copy is at fault, not the model.
    except Exception as error:
        return Rehearsal(not_rehearsed=f"transformers cannot train its copy: {_describe(error)}")
    if obstacle := find_obstacle(task.lora, copy):
        return Rehearsal(not_rehearsed=obstacle)
    ranks = {name: min(rank, _RANK) for name, rank in task.lora.rank_pattern.items()}
    # A copy is narrower, and PiSSA and LoftQ need a weight that is as wide as the rank.
    lora = task.lora.model_copy(update={"rank": min(task.lora.rank, _RANK), "rank_pattern": ranks})
    try:
        _run(task.model_copy(update={"lora": lora}), copy, work)
    except StageError as error:
        return Rehearsal(failed=str(error))
    return Rehearsal()


def find_obstacle(lora: LoraSpec, copy: Path) -> str:
    """Return why the copy cannot have the adapter that the manifest describes; empty if it can."""
    names = (*lora.targets, *lora.modules_to_save, *lora.rank_pattern, *lora.alpha_pattern)
    if any(part.isdigit() for name in names for part in name.split(".")):
        return "spec.lora names single layers, and a copy has fewer"
    architecture = load_architecture(copy)
    linears, modules = set(architecture.linears), architecture.modules_with_weights
    missing = [name for name in lora.targets if name != ALL_LINEAR and not match_modules(linears, [name])]
    missing += [name for name in lora.modules_to_save if not match_modules(modules, [name])]
    return f"its copy has no {', '.join(missing)}" if missing else ""


def _train_with_transformers(copy: Path) -> None:
    """Take one step with transformers alone, in the dtype of a run, and generate."""
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16, trust_remote_code=False)
    ids = _tokens(model.config.get_text_config().vocab_size)[None]
    loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"its loss is {float(loss)}")
    model.eval()
    model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


def _tokens(vocabulary: int, start: int = 3) -> torch.Tensor:
    """Return arbitrary token ids [_ROW_TOKENS]."""
    return (torch.arange(_ROW_TOKENS) * 37 + start) % vocabulary


def _run(task: RehearsalTask, copy: Path, work: Path) -> None:
    """Run every stage of a run on the copy."""
    settings = _settings(copy)
    with _stage("loading the base"):
        base = _load(task, copy, settings)
    with _stage("comparing packed rows with separate ones"), torch.autocast("cpu", settings.dtype):
        packing = packing_is_exact(base)
    if not packing:
        settings = settings.without_packing("")
    vocabulary = base.get_input_embeddings().weight.shape[0]
    rows = _rows(vocabulary, task.largest_token)
    for checkpointing in (False, True):
        if checkpointing and not base.supports_gradient_checkpointing:
            continue
        with _stage(f"a training step {'with' if checkpointing else 'without'} gradient checkpointing"):
            fresh = _load(task, copy, settings) if checkpointing else base
            trainable = _train(task, fresh, settings, rows, checkpointing=checkpointing)
    with _stage("evaluation"):
        expected = mean_loss(trainable, rows)
    with _stage("generating answers"), trainable.evaluating(), trainable.autocast():
        _generate(trainable.model, vocabulary)
    with _stage("saving"):
        target = _save(task, trainable, settings, work)
    loading = LoadingTask(
        method=task.method,
        base=str(copy),
        quantization=task.quantization,
        device="cpu",
        dtype="bfloat16",
        attention=settings.attention,
        rows=rows_of_task(rows),
    )
    with _stage("loading the result again"):
        loss = compute_loss(loading, target)
        if abs(loss - expected) > _TOLERANCE:
            raise ValueError(f"its loss is {loss:.4f}, and it was {expected:.4f} before it was saved")
    if task.merged is not None and task.method != "full":
        with _stage("merging"):
            _merge(task, task.merged, copy, target, settings)


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Name the stage that fails."""
    try:
        yield
    # Models raise whatever Python and torch raise.
    except Exception as error:
        raise StageError(f"{name} failed with {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, RunError | ValueError) else f"{type(error).__name__}: {text[:300]}"


def _generate(model: Any, vocabulary: int) -> None:
    """Generate as the evaluation does: prompts of different lengths in one batch, padded on the left."""
    ids = _tokens(vocabulary).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :_PADDED_TOKENS] = 0
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)


def _settings(copy: Path) -> RuntimeSettings:

    with _stage("choosing an attention implementation"):
        attention, _ = choose_attention(attention_facts(load_text_config(copy)), observe_hardware("cpu"))
    return RuntimeSettings(
        torch.bfloat16, attention, gradient_checkpointing=False, packing=True, optimizer=OptimizerKind.ADAMW, reasons={}
    )


def _load(task: RehearsalTask, copy: Path, settings: RuntimeSettings) -> Any:

    dtype = torch.float32 if task.method == "full" else settings.dtype
    return load_base(copy, task.quantization, dtype, settings.attention, "cpu")


def _rows(vocabulary: int, largest_token: int) -> tuple[Any, ...]:
    """Return rows of arbitrary tokens; the last one ends with the largest token of the dataset."""
    texts = [tuple(_tokens(vocabulary, 3 + 11 * number).tolist()) for number in range(_ROWS)]
    texts[-1] = (*texts[-1][:-1], largest_token)
    return tuple(TokenRow(text, ((number + 2, len(text)),)) for number, text in enumerate(texts))


def _train(
    task: RehearsalTask, base: Any, settings: RuntimeSettings, rows: Any, *, checkpointing: bool
) -> TrainableModel:
    """Train one step, as a run does."""
    settings = replace(settings, gradient_checkpointing=checkpointing)
    trainable = (
        prepare_full_finetune(base, settings) if task.method == "full" else attach_lora(base, task.lora, 1, settings)
    )
    schedule = Schedule(TrainingSpec(global_batch_size=_ROWS, warmup_ratio=0.0), 2, 1)
    nothing = TrainingCallbacks(lambda _: None, lambda _: None, lambda: None, lambda *_: False, lambda *_: None)
    make_loop(trainable, rows, schedule, settings, World(base.device)).run(StopFlag(), nothing)
    return trainable


def _save(task: RehearsalTask, trainable: TrainableModel, settings: RuntimeSettings, work: Path) -> Path:
    """Save the weights as publishing does."""
    target = work / "result"
    target.mkdir()
    if task.method == "full":
        save_full_model(trainable.model, "rehearsal", target)
    else:
        save_adapter(trainable, _record(task, settings), target, None)
    return target


def _record(task: RehearsalTask, settings: RuntimeSettings) -> AdapterRecord:

    return AdapterRecord(
        job="rehearsal",
        digest="0" * 16,
        base="hf://rehearsal/model",
        commit="main",
        method=task.method,
        quantization=task.quantization,
        dtype="bfloat16",
        attention=settings.attention,
        format="text",
    )


def _merge(task: RehearsalTask, base: MergeBase, copy: Path, adapter: Path, settings: RuntimeSettings) -> None:
    """Merge, save, and load the merged model."""
    merged = build_merged(MergeTask(copy, adapter, base, _record(task, settings), ()))
    target = adapter.with_name("merged")
    save_model(merged, target)
    _, found = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.bfloat16, trust_remote_code=False, output_loading_info=True
    )
    check_loaded(found)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory(dir=".") as folder:
        outcome = rehearse(RehearsalTask.model_validate_json(sys.stdin.read()), Path(folder).absolute())
    sys.stdout.write(f"\n{outcome.model_dump_json(by_alias=True)}\n")
