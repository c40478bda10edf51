"""`make bench-families`: every causal architecture of transformers as a tiny model through a whole run."""

import argparse
import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Final

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked, which torch's threads do not survive

from qlora_trainer.__main__ import configure_libraries
from qlora_trainer.runtime.rank import default_work

configure_libraries(default_work())  # as a pod does, before the libraries are imported

import transformers  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from benchmarks.families.forked import Limits, call_forked, fork_modules  # noqa: E402
from benchmarks.families.models import architectures  # noqa: E402
from benchmarks.families.page import write_page  # noqa: E402
from benchmarks.families.trial import METHODS, Method, Outcome, try_architecture  # noqa: E402
from benchmarks.trainer.machine import observe_machine  # noqa: E402
from qlora_trainer.publishing import publish  # noqa: E402

_PRELOADED: Final = (
    *("deepspeed", "matplotlib.figure", "mlflow", "rouge_score.rouge_scorer", "torch.utils.tensorboard"),
    *("qlora_trainer.model.loftq", "qlora_trainer.publishing.plots", "qlora_trainer.rehearsal"),
    *("qlora_trainer.data.tokenized_dataset", "qlora_trainer.data.preview"),
)
"""What a run imports late, in seconds that every forked process would spend again."""
RESULTS: Final = Path(__file__).parents[1] / "results"
_LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes")
_SECONDS: Final = 1800.0
"""Far above what the slowest architecture takes on a busy machine."""
_CPU_SECONDS: Final = 180
"""Several times the CPU time of the slowest one."""
_MEMORY: Final = 8 << 30
"""Bytes of the private memory of a process, of which a gigabyte are libraries."""


def main() -> int:
    """Try what has no outcome yet, and write the page; return 1 if a run failed after its preparation."""
    options = _parse()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    preload()
    fork_modules()
    outcomes = {} if options.anew else _read(options.results)
    wanted = [(each, method) for method in options.methods for each in options.types or architectures()]
    for model_type, method in wanted:
        known = outcomes.get((model_type, method))
        if known is not None and known.outcome not in options.again:
            continue
        outcomes[model_type, method] = found = _try(model_type, method)
        with options.results.open("a") as stream:
            stream.write(f"{json.dumps(asdict(found))}\n")
        print(f"{method:5} {model_type:24} {found.outcome:8} {found.stage:9} {found.seconds:5} {found.sentence[:300]}")
        sys.stdout.flush()
    options.results.write_text("".join(f"{json.dumps(asdict(each))}\n" for _, each in sorted(outcomes.items())))
    page = write_page(list(outcomes.values()), len(architectures()), observe_machine(_LIBRARIES).libraries)
    options.results.with_suffix(".md").write_text(page)
    return int(any(each.outcome == "failed" for each in outcomes.values()))


def preload() -> None:
    """Import and compute once what every forked process would, and leave out the plots, which no model changes."""
    for name in _PRELOADED:
        import_module(name)
    get_checkpoint_conversion_mapping("olmo2")
    vars(publish).update(draw_plots=lambda *_: iter(()), draw_loss=lambda *_: b"")
    gc.freeze()  # a collection would look at all of it again, and copy its pages


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("types", nargs="*", help="model_type of the architectures; all of them without any")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--again", nargs="*", default=(), help="outcomes to try again, such as failed")
    parser.add_argument("--anew", action="store_true", help="forget earlier outcomes")
    parser.add_argument("--results", type=Path, default=RESULTS / "families.jsonl")
    return parser.parse_args()


def _read(path: Path) -> dict[tuple[str, str], Outcome]:
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [Outcome(**json.loads(line)) for line in lines]
    return {(each.model_type, each.method): each for each in found}


def _try(model_type: str, method: Method) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="families-") as name:
        folder = Path(name)

        def work() -> None:
            found = try_architecture(model_type, method, folder)
            (folder / "outcome.json").write_text(json.dumps(asdict(found)))

        code = call_forked(work, _SECONDS, Limits(_MEMORY, _CPU_SECONDS))
        if (written := folder / "outcome.json").is_file():
            return Outcome(**json.loads(written.read_text()))
        why = f"it took more than {_SECONDS:g} s" if code is None else f"its process ended with {code}"
        return Outcome(model_type, method, "failed", "process", why)


if __name__ == "__main__":
    sys.exit(main())
