"""The report of an experiment's folder: ``report.html`` (self-contained), ``results.json``, ``results.md``, PNGs.

No arm is called better without an interval, and the corpus stands beside every figure.
"""

import statistics
from html import escape
from pathlib import Path
from typing import Any

from megatron_act.experiment import budget_table, page, table
from megatron_act.experiment.results import collect, write_results

Results = dict[str, Any]

CONVENTIONS = (
    "An MLP with a gate holds 3·h·F weights, one without 2·h·F: equal parameters and equal matmul FLOPs mean "
    "F = 1.5 times the gated width. FLOPs per token are those of forward and backward matmuls (backward is twice the "
    "forward), with half of the attention square, as a causal kernel needs. The trainable scalars come on top. "
    "Runs of one seed see the same tokens in the same order, with the same optimizer, unless a command says otherwise."
)
BUDGETS = {
    "tokens": "Every arm trained on the same tokens.",
    "flops": "Every arm spent the reference's matmul FLOPs: its steps are scaled where its FLOPs per token differ, and "
    "its schedule with them.",
    "seconds": "Every arm got the reference's time on training steps: its steps are scaled by the median ratio of step "
    "times, its schedule with them, and it was trained again. Times are those of this machine and this code.",
}


def write_report(output: str | Path) -> Path:
    """Reads an experiment's folder and writes its report there; returns the page's path.

    Raises:
        UserError: not an experiment's folder, or a run without metrics.
    """
    from megatron_act.experiment.figures import draw  # matplotlib: not for --help

    output = Path(output).resolve()
    results = collect(output)
    write_results(output, results)
    (output / "results.md").write_text(markdown(results), encoding="utf-8")
    pictures = draw(results, output / "figures")
    path = output / "report.html"
    draft = path.with_suffix(".partial")
    draft.write_text(html(results, pictures), encoding="utf-8")
    draft.replace(path)
    return path


def markdown(results: Results) -> str:
    """The results for a paper or a README: the comparisons, then every figure of the arms, with what they rest on."""
    rows = table.markdown(table.HEADINGS, table.result_rows(results))
    origin = f"{results['layout']}. Corpus: {corpus_text(results)}."
    return f"{budget_table.paper_table(results)}\n\n{budget_table.paper_note(results)} {origin}\n\n{rows}\n"


def html(results: Results, pictures: dict[str, str]) -> str:
    """The page."""
    names = [arm["name"] for arm in results["arms"]]
    tokens = max(arm["tokens"] for arm in results["arms"])
    budget = f"{tokens:,} training tokens each, at the parameters and FLOPs of {results['baseline']}"
    parts = [
        f"<header><h1>{escape(results['name'])}: activations at equal compute</h1>",
        page.paragraph(f"{', '.join(names)}: {budget}. Corpus: {corpus_text(results)}.", "soft"),
        page.paragraph(_note(results), "note"),
        "</header>",
        *(_budget_section(name, results) for name in results["budgets"]),
        _arms_section(results),
        _sweep_section(results),
        _figures_section(results, pictures),
        _match_section(results),
        _scalars_section(results),
        _export_section(results),
        _limits_section(results),
        _origin_section(results),
        _commands_section(results),
    ]
    return page.document(f"{results['name']}: activations at equal compute", "\n".join(filter(None, parts)))


def corpus_text(results: Results) -> str:
    """The corpus by its name, else by its files'."""
    return results["corpus"] or data_text(results)


def data_text(results: Results) -> str:
    """The data sets by name."""
    data = results["data"]
    if isinstance(data, str):
        return data
    return ", ".join(f"{part}: {' '.join(Path(prefix).name for prefix in prefixes)}" for part, prefixes in data.items())


def _note(results: Results) -> str:
    unfinished = [Path(run["folder"]).name for run in results["runs"] if not run["finished"]]
    unfinished += [Path(folder).name for folder in results["missing"]]
    diverged = [Path(run["folder"]).name for run in results["runs"] if run["diverged"]]
    parts = [
        f"{results['note']}.",
        f"Not finished: {', '.join(unfinished)}." if unfinished else "",
        f"Diverged: {', '.join(diverged)}." if diverged else "",
        f"Not compared yet: equal {', '.join(results['waiting'])}." if results["waiting"] else "",
    ]
    return " ".join(filter(None, parts))


def _budget_section(name: str, results: Results) -> str:
    comparison, title = results["budgets"][name], budget_table.BUDGET_NAMES[name]
    parts = [page.paragraph(BUDGETS[name])]
    if name != "tokens" and comparison["steps"] == results["budgets"]["tokens"]["steps"]:
        return page.section(
            _capital(title), *parts, page.paragraph(f"Here the runs at equal tokens are those at {title}.")
        )
    if comparison["arms"]:
        parts.append(page.table(budget_table.ARM_HEADINGS, budget_table.arm_rows(comparison)))
    if comparison["pairs"]:
        parts.append(page.table(budget_table.PAIR_HEADINGS, budget_table.pair_rows(comparison), words=True))
    if name == "tokens":
        parts.append(page.paragraph(f"{LOSS_ABOUT} {PAIRS_ABOUT}", "soft"))
    return page.section(_capital(title), *parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _arms_section(results: Results) -> str:
    rows = table.result_rows(results)
    columns = [table.HEADINGS.index(name) for name in ARM_COLUMNS]
    about = "At equal tokens. Training loss: mean of the last tenth of the logged steps."
    shown = page.table(ARM_COLUMNS, [[row[column] for column in columns] for row in rows])
    return page.section("Arms", shown, page.paragraph(about, "soft"))


ARM_COLUMNS = (
    *("arm", "MLP width", "parameters", "without embeddings", "FLOPs/token", "total FLOPs", "train loss"),
    *("tokens/s", "peak memory"),
)
LOSS_ABOUT = (
    "Validation loss: after the last step, over every held-out token, in nats per token. Arms stand in the "
    "experiment's order, not by rank."
)
PAIRS_ABOUT = (
    "Differences are paired by seed; intervals are 95 % by Student's t. Holm's correction is over the pairs of this "
    "table. Could be seen: the true difference that a study of this size and spread finds in 80 % of cases. The "
    "intervals cover seeds (initial weights, order of data), not the choice of corpus, scale or learning rates."
)


def _sweep_section(results: Results) -> str:
    if not results["sweep"]:
        return ""
    rates = [f"{rate:g}" for rate in results["learning_rates"]]
    rows = [
        [
            arm["name"],
            *(_sweep_cell(results["sweep"].get(arm["name"], {}).get(rate)) for rate in rates),
            _chosen(arm, rates),
        ]
        for arm in results["arms"]
    ]
    seeds = ", ".join(map(str, results["tuning_seeds"]))
    about = f"Mean validation loss over the tuning seeds ({seeds}), which are none of those that judge."
    return page.section("Learning rates", page.paragraph(about), page.table(("arm", *rates, "chosen"), rows))


def _sweep_cell(losses: list[float | None] | None) -> str:
    known = [loss for loss in losses or [] if loss is not None]
    if not losses:
        return table.NOTHING
    return f"{sum(known) / len(known):.4f}" if len(known) == len(losses) else "diverged"


def _chosen(arm: Results, rates: list[str]) -> str:
    rate = f"{arm['rate']:g}" if arm["rate"] is not None else table.NOTHING
    return f"{rate} (at the grid's edge)" if rate in (rates[0], rates[-1]) and len(rates) > 1 else rate


def _figures_section(results: Results, pictures: dict[str, str]) -> str:
    from megatron_act.experiment.figures import FIGURES

    corpus = corpus_text(results)
    figures = (page.figure(name, f"{FIGURES[name][0]} Corpus: {corpus}.", svg) for name, svg in pictures.items())
    return page.section("Figures", *figures)


def _match_section(results: Results) -> str:
    rows = table.match_rows(results)
    return page.section(
        "What was matched, and how", page.paragraph(CONVENTIONS), page.table(table.MATCH_HEADINGS, rows)
    )


def _scalars_section(results: Results) -> str:
    rows = [
        [arm["name"], name, *(f"{value:.4f}" for value in [arm["scalars_initial"][name][0], *values])]
        for arm in results["arms"]
        for name, values in arm["scalars_final"].items()
    ]
    if not rows:
        return ""
    layers = max(len(row) for row in rows) - 3
    rows = [row + [""] * (layers + 3 - len(row)) for row in rows]
    headings = ("arm", "scalar", "initial", *(f"layer {layer}" for layer in range(1, layers + 1)))
    about = "Effective values, after softplus and offset where the activation has them; means over seeds."
    return page.section("Scalars after training", page.table(headings, rows), page.paragraph(about, "soft"))


def _export_section(results: Results) -> str:
    if not results["export"]:
        return ""
    rows = [
        [name, item["family"], f"{item['max_logit_difference']:.2e}", item["generated"]]
        for name, item in results["export"].items()
    ]
    about = "Each checkpoint was exported, reopened with transformers, and its logits compared with Megatron's."
    headings = ("arm", "opens as", "largest logit difference", "generated text")
    return page.section("Hugging Face export", page.paragraph(about), page.table(headings, rows, words=True))


def _limits_section(results: Results) -> str:
    arm = results["arms"][0]
    points = [
        f"A model of {arm['parameters']:,} parameters on {arm['tokens']:,} tokens of {corpus_text(results)}: an order "
        "of the arms here says nothing about another scale, corpus or schedule.",
        "Equal FLOPs are equal matmul arithmetic, not equal time: tokens/s is this machine's.",
    ]
    if not results["sweep"]:
        points.append("One learning rate for all arms: each might have a better one of its own.")
    if max(len(arm["seeds"]) for arm in results["arms"]) == 1:
        points.insert(0, "One seed: differences between arms may be smaller than those between two seeds of one arm.")
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return page.section("What this does not show", f"<ul>{items}</ul>")


def _origin_section(results: Results) -> str:
    versions = {name: version for run in results["runs"] for name, version in run["versions"].items()}
    pairs = [("layout", results["layout"]), ("corpus", corpus_text(results)), ("data", data_text(results))]
    if results["held_out"]:
        held_out = results["held_out"]
        size = f"{held_out['bytes']:,} bytes" if held_out["bytes"] else "bytes not counted"
        held = (
            f"{held_out['documents']:,} documents, {held_out['tokens']:,} tokens, {size}, sha256 {held_out['sha256']}"
        )
        pairs.append(("held-out set", held))
    pairs += results["machine"].items()
    pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    shares = [run["telemetry_share"] for run in results["runs"] if run["telemetry_share"] is not None]
    if shares:
        pairs.append(("telemetry", f"{statistics.median(shares):.2%} of the training time (median over runs)"))
    return page.section("Machine and versions", page.definitions(pairs))


def _commands_section(results: Results) -> str:
    blocks = []
    for run in results["runs"]:
        summary = f"<summary>{escape(Path(run['folder']).name)}</summary>"
        blocks.append(f"<details>{summary}<pre>{escape(run['command'])}</pre></details>")
    return page.section("Commands", *blocks)
