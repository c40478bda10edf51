"""The merged model of a published adapter: made after the adapter is safe, or later when somebody asks for it."""

from datetime import UTC, datetime
from pathlib import Path

from qlora_api.report import AdapterRecord
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import stages
from qlora_trainer.merge import MergeTask, merge
from qlora_trainer.output import RECORD, with_merged
from qlora_trainer.publish import Merged, publish_merged
from qlora_trainer.shards import EVALUATION
from qlora_trainer.snapshot import Places
from qlora_trainer.store import Store


def add_merged(places: Places, output: Store, config: RunConfig, result: Result, work: Path) -> Result:
    """Return the result with the merged model that the spec asks for; what is there already is not made again."""
    digest = config.prepared.digest
    complete = with_merged(output, digest, config.spec.output, result)
    if complete is not None:
        return complete
    adapter = fetch_adapter(output, result.adapter, work)
    task = MergeTask(
        model=stages.fetch_model(places, config, work),
        adapter=adapter,
        base=config.spec.output.merge_base,
        record=AdapterRecord.model_validate_json((adapter / RECORD).read_text()),
        rows=stages.load_rows(output, config, EVALUATION, work),
    )
    folder = stages.empty_folder(work / "merged" / digest)
    merged = Merged(folder, merge(task, folder))
    uri = publish_merged(output, config, result.adapter, merged, datetime.now(UTC))
    return result.model_copy(update={"merged": uri})


def fetch_adapter(output: Store, uri: str, work: Path) -> Path:
    """Return a folder with the published adapter."""
    path = uri.removeprefix(f"{output.root}/")
    target = stages.empty_folder(work / "adapters" / path)
    for entry in output.list(path):
        output.download(entry.path, target / entry.path.removeprefix(f"{path}/"))
    return target
