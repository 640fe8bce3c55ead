"""The comparisons as rows of text: arms with their intervals, pairs with their tests, and the table for a paper."""

from typing import Any

from megatron_act.experiment.table import NOTHING, markdown, with_spread

Result = dict[str, Any]

BUDGET_NAMES = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal wall clock"}
ARM_HEADINGS = (
    *("arm", "runs", "learning rate", "steps", "tokens", "FLOPs", "seconds", "validation loss", "perplexity"),
    "bits/byte",
)
PAIR_HEADINGS = (
    *("difference", "pairs", "mean, nats", "95 % interval", "sd", "p", "p (Holm)", "could be seen"),
    "in words",
)


def arm_rows(comparison: Result) -> list[list[str]]:
    """One row per arm of a comparison, in the experiment's order."""
    return [
        [
            arm["name"],
            str(len(arm["seeds"])) + (f" ({len(arm['diverged'])} diverged)" if arm["diverged"] else ""),
            NOTHING if arm["rate"] is None else f"{arm['rate']:g}",
            f"{arm['steps']:,}",
            f"{arm['tokens']:,}",
            f"{arm['total_flops']:.3e}",
            with_spread(arm["train_seconds"], 1),
            with_spread(arm["validation_loss"], 4),
            with_spread(arm["validation_perplexity"], 2),
            with_spread(arm["bits_per_byte"], 4),
        ]
        for arm in comparison["arms"]
    ]


def pair_rows(comparison: Result) -> list[list[str]]:
    """One row per pair: the difference of the second arm from the first."""
    return [
        [
            f"{pair['second']} - {pair['first']}",
            str(pair["n"]),
            f"{pair['mean']:+.4f}",
            interval_text(pair),
            _number(pair["sd"], ".4f"),
            _number(pair["p"], ".2g"),
            _number(pair["p_holm"], ".2g"),
            _number(pair["detectable"], ".4f"),
            pair["verdict"],
        ]
        for pair in comparison["pairs"]
    ]


def interval_text(pair: Result) -> str:
    """``[-0.0145, -0.0101]``, or a dash for one pair."""
    return NOTHING if pair["low"] is None else f"[{pair['low']:+.4f}, {pair['high']:+.4f}]"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"


def paper_table(results: Result) -> str:
    """Markdown: an arm a row, for each comparison its loss and its difference from the reference arm."""
    budgets, reference = results["budgets"], results["reference"]
    headings = ["arm"]
    for name, comparison in budgets.items():
        what = "validation loss" if comparison["metric"] == "validation_loss" else "training loss"
        headings += [f"{what}, {BUDGET_NAMES[name]}", f"difference to {reference}"]
    rows = [
        [arm["name"], *(cell for comparison in budgets.values() for cell in _paper_cells(comparison, arm, reference))]
        for arm in results["arms"]
    ]
    return markdown(tuple(headings), rows)


def _paper_cells(comparison: Result, arm: Result, reference: str) -> list[str]:
    entry = next((entry for entry in comparison["arms"] if entry["name"] == arm["name"]), None)
    loss = with_spread(entry[comparison["metric"]], 4) if entry else NOTHING
    if arm["name"] == reference:
        return [loss, ""]
    for pair in comparison["pairs"]:
        if {pair["first"], pair["second"]} == {arm["name"], reference}:
            return [loss, _difference(pair, -1 if pair["second"] == reference else 1)]
    return [loss, NOTHING]


def _difference(pair: Result, sign: int) -> str:
    text = f"{sign * pair['mean']:+.4f}"
    if pair["low"] is None:
        return text
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    star = "" if pair["p_holm"] < 0.05 else " (n.s.)"
    return f"{text} [{low:+.4f}, {high:+.4f}]{star}"


def paper_note(results: Result) -> str:
    """What the table's figures are, in one paragraph."""
    tests = [pair for comparison in results["budgets"].values() for pair in comparison["pairs"] if pair["detectable"]]
    parts = [f"{results['note']}."]
    if tests:
        low, high = (f(pair["detectable"] for pair in tests) for f in (min, max))
        parts.append(
            "Differences in nats per token, paired by seed (same seed, same order of data), with 95 % intervals; "
            "n.s.: p above 0.05 after Holm's correction over all pairs. "
            f"The smallest difference that the study could see in 80 % of cases: {low:.4f} to {high:.4f} nats."
        )
    if results["held_out"] and results["held_out"]["bytes"]:
        held_out = results["held_out"]
        parts.append(
            f"Validation on the same {held_out['tokens']:,} held-out tokens ({held_out['bytes']:,} bytes of text)."
        )
    return " ".join(parts)
