"""Results as rows of text: one source for the terminal, Markdown and the page."""

from typing import Any

NOTHING = "-"
HEADINGS = (
    *("arm", "MLP width", "parameters", "without embeddings", "FLOPs/token", "total FLOPs", "train loss"),
    *("validation loss", "perplexity", "bits/byte", "tokens/s", "peak memory", "scalars: initial → range over layers"),
)
GIB = 2**30


def with_spread(value: dict[str, float | None], digits: int) -> str:
    """``3.1420`` for one seed, ``3.1420 ± 0.0100`` with half the 95 % interval for more, a dash for nothing."""
    mean, high = value["mean"], value["high"]
    if mean is None:
        return NOTHING
    text = f"{mean:,.{digits}f}"
    return text if high is None else f"{text} ± {high - mean:,.{digits}f}"


def scalars_text(arm: dict[str, Any]) -> str:
    """``alpha_p 0.80 → 0.71..1.07`` for each scalar: initial value, smallest and largest over the layers."""
    initial = arm["scalars_initial"]
    parts = (
        f"{name} {initial[name][0]:.2f} → {min(final):.2f}..{max(final):.2f}"
        for name, final in arm["scalars_final"].items()
    )
    return ", ".join(parts) or NOTHING


def memory_text(value: dict[str, float | None]) -> str:
    """Mean peak in GiB."""
    return NOTHING if value["mean"] is None else f"{value['mean'] / GIB:.2f} GiB"


def result_rows(results: dict[str, Any]) -> list[list[str]]:
    """One row per arm in the experiment's order: never ranked, a rank would claim a winner."""
    return [
        [
            arm["name"],
            f"{arm['ffn_hidden_size']:,}",
            f"{arm['parameters']:,}",
            f"{arm['parameters_without_embeddings']:,}",
            f"{arm['flops_per_token']:,}",
            f"{arm['total_flops']:.3e}",
            with_spread(arm["final_train_loss"], 4),
            with_spread(arm["validation_loss"], 4),
            with_spread(arm["validation_perplexity"], 2),
            with_spread(arm["bits_per_byte"], 4),
            with_spread(arm["tokens_per_second"], 0),
            memory_text(arm["peak_memory_bytes"]),
            scalars_text(arm),
        ]
        for arm in results["arms"]
    ]


MATCH_HEADINGS = (
    *("arm", "activation", "MLP width", "matmul parameters", "trainable scalars", "FLOPs/token", "difference"),
    "parameters counted / built",
)


def match_rows(results: dict[str, Any]) -> list[list[str]]:
    """What the compute match chose for each arm, against the baseline's model."""
    built = {arm["name"]: arm["parameters_built"] for arm in results["arms"]}
    return [
        [
            name,
            match["activation"],
            f"{match['ffn_hidden_size']:,}",
            f"{match['matmul_parameters']:,}",
            f"{match['activation_scalars']:,}",
            f"{match['flops_per_token']:,}",
            match_residual(match),
            f"{match['parameters']:,} / {built[name]:,}",
        ]
        for name, match in results["match"].items()
    ]


def match_residual(match: dict[str, Any]) -> str:
    """``none`` for an exact match, else the excess over the baseline in percent."""
    if match["exact"]:
        return "none"
    return f"parameters {match['residual_parameters_percent']:+.3f} %, FLOPs {match['residual_flops_percent']:+.3f} %"


def match_lines(match_by_arm: dict[str, dict[str, Any]], baseline: str) -> str:
    """What was chosen, for the terminal before training."""
    rows = [
        [
            name,
            f"{m['ffn_hidden_size']:,}",
            f"{m['parameters_without_embeddings']:,}",
            f"{m['flops_per_token']:,}",
            match_residual(m),
        ]
        for name, m in match_by_arm.items()
    ]
    heading = ("arm", "MLP width", "parameters without embeddings", "FLOPs/token", f"difference to {baseline}")
    return plain(heading, rows)


def plain(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Aligned columns; the first and the last to the left, numbers to the right."""
    table = [list(headings), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    last = len(headings) - 1

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if column in (0, last) else text.rjust(widths[column])

    return "\n".join("  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in table)


def markdown(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(headings) - 2), "---"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(headings), rule, *rows])


def terminal_table(results: dict[str, Any]) -> str:
    """The table that a person sees at the end: the columns that differ between the arms."""
    shown = ("arm", "MLP width", "parameters", "train loss", "validation loss", "perplexity", "tokens/s", HEADINGS[-1])
    columns = [HEADINGS.index(name) for name in shown]
    rows = [[row[column] for column in columns] for row in result_rows(results)]
    verdicts = [
        f"equal {budget}: {pair['verdict']}"
        for budget, found in results["budgets"].items()
        for pair in found["pairs"]
        if pair["p"] is not None
    ]
    return "\n".join([plain(shown, rows), *verdicts, results["note"]])
