"""A model of two layers with random weights, and rows for it: for runs where it matters how they train, not on what."""

from pathlib import Path
from typing import Any, Final

from tests.cluster.cluster import Cluster
from tests.unit.trainer.tiny import instruction_rows, write_model, write_rows

COMMIT: Final = "3" * 40
MIRRORED: Final = "hub/models--example--tiny"
ROWS: Final = "tiny.jsonl"
BLOCKS: Final[dict[str, dict[str, Any]]] = {
    "model": {"uri": "hf://example/tiny"},
    "dataset": {"uri": f"s3://quickstart/{ROWS}", "evaluation": {"fraction": 0.2}},
    "training": {"learningRate": 0.001, "maxLength": 64},
}
"""What a manifest says to train it."""


def put_tiny_model(cluster: Cluster, folder: Path) -> tuple[Path, Path]:
    """Write model and rows into a folder and, for the pods, into mirror and bucket; return both paths."""
    model, rows = folder / "model", folder / ROWS
    write_model(model)
    write_rows(rows, [{"instruction": row["instruction"], "response": row["output"]} for row in instruction_rows(120)])
    client = cluster.s3.client()
    client.put_object(Bucket="models", Key=f"{MIRRORED}/refs/main", Body=COMMIT.encode())
    for path in model.iterdir():
        client.upload_file(str(path), "models", f"{MIRRORED}/snapshots/{COMMIT}/{path.name}")
    client.upload_file(str(rows), "quickstart", ROWS)
    client.close()
    return model, rows
