"""A finished run, for a person: what the adapter improved, and where it is."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_api.reasons import REASONS
from qlora_api.report import LastWord
from qlora_api.result import Result
from qlora_api.v1alpha1 import EvaluationStatus
from qlora_cli.uris import to_place


def show_outcome(word: LastWord, console: Console) -> None:
    """Print reason, comparison and places."""
    console.print(f"[bold green]{word.reason}[/]: {REASONS[word.reason].sentence}")
    if word.result is None:
        return
    console.print(compare(word.result.evaluation))
    for name, place in places(word.result).items():
        console.print(f"[bold]{name:<8}[/] {escape(place)}", soft_wrap=True)


def places(result: Result) -> dict[str, str]:
    """Return where the parts of a result are; files of this computer as paths."""
    merged = {"merged": to_place(result.merged)} if result.merged else {}
    return {
        "adapter": to_place(result.adapter),
        **merged,
        "report": to_place(result.report).removesuffix(".json") + ".html",
    }


def compare(evaluation: EvaluationStatus) -> Table:
    """Return base model and adapter side by side."""
    base, adapter = evaluation.base, evaluation.adapter
    table = Table(title=f"{evaluation.rows} held-out rows, {evaluation.tokens} answer tokens", title_justify="left")
    table.add_column("")
    for heading in ("base", "adapter", "change"):
        table.add_column(heading, justify="right")
    table.add_row("loss", f"{base.loss:.3f}", f"{adapter.loss:.3f}", relative(base.loss, adapter.loss))
    table.add_row(
        "perplexity",
        f"{base.perplexity:.1f}",
        f"{adapter.perplexity:.1f}",
        relative(base.perplexity, adapter.perplexity),
    )
    shares = [("token accuracy", base.token_accuracy, adapter.token_accuracy)]
    if base.exact_match is not None and adapter.exact_match is not None:
        shares.append((f"exact match, n={evaluation.answers}", base.exact_match, adapter.exact_match))
    if base.rouge_l is not None and adapter.rouge_l is not None:
        shares.append((f"ROUGE-L, n={evaluation.answers}", base.rouge_l, adapter.rouge_l))
    for name, before, after in shares:
        table.add_row(name, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
    return table


def relative(before: float, after: float) -> str:
    """Return the change in percent."""
    return f"{(after - before) / before:+.1%}" if before else ""
