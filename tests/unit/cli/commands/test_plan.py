"""`qlora plan`: figures known from elsewhere, read offline, and what it says where they cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_cli.__main__ import app
from tests.unit.cli.make import JOB

CONFIGS = Path(__file__).parents[2] / "planner" / "configs"
ON_GPU = JOB.replace("gpusPerNode: 0", "gpusPerNode: 1")
KEYS = [
    "weightsBytes",
    "adapterParameters",
    "adapterBytes",
    "optimizerBytes",
    "activationBytes",
    "peakBytesPerGpu",
    "microBatch",
    "gradientAccumulation",
    "gpus",
    "nodes",
    "strategy",
    "reasons",
]


def plan(*options: str, text: str = ON_GPU) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", "-", *options], input=text)
    return result.exit_code, result.output


def config_of(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


def figures(*options: str, text: str = ON_GPU) -> dict[str, Any]:
    code, output = plan(*options, "-o", "json", text=text)
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    return found


def test_plan_figures_of_llama_3b() -> None:
    found = figures("--config", config_of("llama-3.2-3b"), "--gpu-memory", "16Gi")
    assert list(found) == KEYS
    assert round(found["weightsBytes"] / 1e9, 1) == 2.2
    assert found["adapterParameters"] == 4_587_520
    assert (found["adapterBytes"], found["optimizerBytes"]) == (4 * 4_587_520, 8 * 4_587_520)
    assert found["peakBytesPerGpu"] < 0.98 * 16 * 2**30
    assert found["microBatch"] * found["gradientAccumulation"] * found["gpus"] == 16
    assert (found["gpus"], found["nodes"], found["strategy"]) == (1, 1, "single")


def test_as_few_gpus_of_a_node_as_suffice() -> None:
    full = ["--set", "method=full", "--set", "quantization.bits=16"]
    found = figures("--config", config_of("llama-3.2-3b"), "--gpu-memory", "40Gi", "--gpus-per-node", "8", *full)
    assert (found["gpus"], found["strategy"]) == (4, "zero2")
    assert found["reasons"][0] == "4 x GPU of 40.0 GiB on 1 node: the fewest that fit"
    assert (found["adapterParameters"], found["weightsBytes"]) == (0, 4 * 3_212_749_824)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("smollm2-135m", "16 GB GPU (T4)"), ("llama-2-70b", "80 GB GPU (H100)")],
)
def test_without_a_gpu_the_smallest_usual_one_is_named(name: str, gpu: str) -> None:
    targets = ["--set", "lora.targets=[all-linear]"]
    assert (
        figures("--config", config_of(name), *targets)["reasons"][0] == f"1 x {gpu} on 1 node: as spec.resources asks"
    )


def test_gpus_that_fit_and_those_that_do_not_are_named() -> None:
    reasons = figures("--config", config_of("llama-2-70b"))["reasons"]
    assert reasons[1].startswith("dtype bfloat16: sm_")
    (products,) = (reason for reason in reasons if reason.startswith("GPUs that fit: "))
    assert "80 GB GPU (H100) in bfloat16, 141 GB GPU (H200) in bfloat16; left out: 16 GB GPU (T4), 24 GB" in products
    one = figures("--config", config_of("llama-3.2-3b"), "--gpu-memory", "24Gi")["reasons"]
    assert not [reason for reason in one if reason.startswith("GPUs that fit")]


def test_gpu_product_name_has_its_memory() -> None:
    product = ["--set", "resources.gpuProduct=NVIDIA-A100-SXM4-40GB"]
    found = figures("--config", config_of("llama-3.1-8b"), *product)
    assert found["reasons"][0] == "1 x NVIDIA-A100-SXM4-40GB on 1 node: as spec.resources asks"


def test_cpu_run_shows_host_memory() -> None:
    found = figures("--config", config_of("smollm2-135m"), text=JOB)
    assert (found["gpus"], found["strategy"], found["microBatch"]) == (0, "single", 16)
    assert "device cpu: spec.resources.gpusPerNode is 0" in found["reasons"]
    assert any("spec.resources.memory 16Gi" in reason for reason in found["reasons"])
    code, table = plan("--config", config_of("smollm2-135m"), text=JOB)
    assert code == 0
    assert "in host memory" in table
    assert "of 16, spec.resources.memory" in table


def test_table_rows_sum_to_peak() -> None:
    code, table = plan("--config", config_of("llama-3.1-8b"), "--gpu-memory", "24Gi")
    assert code == 0
    assert "support-bot: hf://organization/name, 8,030,261,248 weights, qlora, 4 bits" in table
    cells = [line.split("│") for line in table.splitlines() if line.startswith("│") and line.split("│")[2].strip()]
    sizes = {cell[1].strip(): float(cell[2]) for cell in cells}
    peak = sizes.pop("peak")
    assert sum(sizes.values()) == pytest.approx(peak, abs=0.05)
    assert {"base", "scales", "adapter", "gradients", "optimizer", "activations", "fragmentation", "context"} == set(
        sizes
    )
    assert "gradient checkpointing" in table


def test_several_qlorajobs_are_a_list() -> None:
    code, output = plan("--config", config_of("smollm2-135m"), "-o", "json", text=f"{ON_GPU}---\n{ON_GPU}")
    assert code == 0
    assert [list(found) for found in json.loads(output)] == [KEYS, KEYS]


@pytest.mark.parametrize("reference", [True, False])
def test_config_is_found_in_hub_cache(tmp_path: Path, reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--organization--name"
    commit = "a" * 40 if reference else "main"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((CONFIGS / "smollm2-135m.json").read_text())
    if reference:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    assert figures("--hub-mirror", str(tmp_path))["weightsBytes"] > 0
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert figures()["weightsBytes"] > 0
    local = ["--set", f"model.uri={snapshot}"]
    assert figures(*local)["weightsBytes"] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param(
            ["--hub-mirror", "/nowhere"],
            "error: spec.model.uri: config.json of organization/name at main is not in /nowhere; run 'hf download "
            "organization/name config.json', or pass --config config.json",
            id="not-in-the-cache",
        ),
        pytest.param(
            ["--set", "model.uri=s3://models/x"],
            "error: spec.model.uri is s3://models/x, which is not on this machine; pass --config config.json",
            id="elsewhere",
        ),
        pytest.param(["--config", "/nowhere.json"], "error: /nowhere.json: No such file or directory", id="no-file"),
        pytest.param(
            ["--config", config_of("phi-3-mini-4k")],
            "error: spec.lora.targets: a model of type phi3 has no linear module q_proj, v_proj to adapt; choose among "
            "down_proj, gate_up_proj, o_proj, qkv_proj, or write all-linear",
            id="targets",
        ),
        pytest.param(
            ["--config", config_of("falcon-7b"), "--set", "lora.targets=[all-linear]"],
            "error: spec.quantization.bits: a model of type falcon has no layer that bitsandbytes can store in 4 bits; "
            "set spec.method to lora and spec.quantization.bits to 16",
            id="nothing-to-quantise",
        ),
        pytest.param(
            ["--config", config_of("llama-2-70b"), "--gpu-memory", "24Gi"],
            "more than the 23.5 GiB that a process has on a GPU of 24.0 GiB; it fits on a GPU with ",
            id="does-not-fit",
        ),
        pytest.param(
            ["--config", config_of("llama-3.2-3b"), "--set", "lora.rank=0"],
            "spec.lora.rank: must be ≥ 1, got 0",
            id="manifest",
        ),
    ],
)
def test_plan_error_message_has_a_fix(options: list[str], sentence: str) -> None:
    code, output = plan(*options)
    assert code == 1
    assert sentence in output


def test_gpu_memory_in_bytes_is_rejected() -> None:
    code, output = plan("--config", config_of("llama-3.2-3b"), "--gpu-memory", "80")
    assert (code, "'80' is less than 1 GiB; write a number and a unit, as in 24Gi" in " ".join(output.split())) == (
        2,
        True,
    )


def test_host_memory_below_the_tensors_alone_does_not_fit() -> None:
    change = ("--set", "resources.gpusPerNode=0", "--set", "resources.memory=500Mi")
    code, output = plan("--config", config_of("llama-3.2-3b"), *change)
    assert (code, "spec.resources.memory is 500Mi, and the weights and activations" in output) == (1, True)


def test_gpu_memory_without_unit_is_rejected() -> None:
    code, output = plan("--config", config_of("llama-3.2-3b"), "--gpu-memory", "24GB")
    assert code == 2
    assert "'24GB' is not an amount of memory; write a number and a unit, as in 24Gi or 80G" in " ".join(output.split())


def test_unknown_model_type_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "mamba"}')
    code, output = plan("--config", str(config))
    assert code == 1
    assert "the size of a model of type 'mamba' is not known" in output
    assert "set spec.resources.gpusPerNode and spec.training.microBatchSize yourself" in output
    config.write_text("{")
    cause = "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert plan("--config", str(config)) == (1, f"error: {config} {cause}; pass the model's own config.json\n")


def test_plan_imports_no_trainer_libraries(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(ON_GPU)
    program = (
        "import sys; from qlora_cli.__main__ import app\n"
        f"app({['plan', str(job), '--config', config_of('llama-3.2-3b')]!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'kopf', 'kubernetes'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
