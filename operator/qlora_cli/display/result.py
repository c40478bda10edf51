"""Result of a finished run: the comparison of base and adapter, and the output URIs."""

from rich.table import Table

from qlora_api.reasons import REASONS
from qlora_api.report import TerminationMessage
from qlora_api.result import Result
from qlora_api.significance import describe_small_validation
from qlora_api.v1alpha1 import EvaluationStatus
from qlora_cli.console import Console, print_line
from qlora_cli.uris import to_display_path


def show_result(message: TerminationMessage, console: Console) -> None:
    """Print reason, comparison and output locations."""
    print_line(console, f": {REASONS[message.reason].sentence}", message.reason, "bold green")
    if message.result is None:
        return
    console.print(comparison_table(message.result.evaluation))
    for name, location in output_locations(message.result).items():
        print_line(console, location, f"{name:<8} ", "bold")


def output_locations(result: Result) -> dict[str, str]:
    """Return the locations of adapter, merged model and report; local files as paths."""
    merged = {"merged": to_display_path(result.merged)} if result.merged else {}
    return {
        "adapter": to_display_path(result.adapter),
        **merged,
        "report": to_display_path(result.report).removesuffix(".json") + ".html",
    }


def comparison_table(evaluation: EvaluationStatus) -> Table:
    """Return a table that compares base model and adapter."""
    base, adapter = evaluation.base, evaluation.adapter
    table = Table(
        title=f"{evaluation.rows} held-out rows, {evaluation.tokens} answer tokens",
        title_justify="left",
        caption=describe_small_validation(evaluation.rows, evaluation.tokens) or None,
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("base", "adapter", "change"):
        table.add_column(heading, justify="right")
    table.add_row("loss", f"{base.loss:.3f}", f"{adapter.loss:.3f}", format_change(base.loss, adapter.loss))
    table.add_row(
        "perplexity",
        f"{base.perplexity:.1f}",
        f"{adapter.perplexity:.1f}",
        format_change(base.perplexity, adapter.perplexity),
    )
    shares = [("token accuracy", base.token_accuracy, adapter.token_accuracy)]
    if base.exact_match is not None and adapter.exact_match is not None:
        shares.append((f"exact match, n={evaluation.answers}", base.exact_match, adapter.exact_match))
    if base.rouge_l is not None and adapter.rouge_l is not None:
        shares.append((f"ROUGE-L, n={evaluation.answers}", base.rouge_l, adapter.rouge_l))
    for name, before, after in shares:
        table.add_row(name, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
    return table


def format_change(before: float, after: float) -> str:
    """Format the relative change in percent."""
    return f"{(after - before) / before:+.1%}" if before else ""
