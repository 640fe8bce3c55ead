"""The report of an experiment's folder: ``report.html`` (self-contained), ``results.json``, ``results.md``, PNGs."""

from html import escape
from pathlib import Path
from typing import Any

from megatron_act.experiment import page, table
from megatron_act.experiment.results import collect, write_results

Results = dict[str, Any]

CONVENTIONS = (
    "An MLP with a gate holds 3·h·F weights, one without 2·h·F: equal parameters and equal matmul FLOPs mean "
    "F = 1.5 times the gated width. FLOPs per token are those of forward and backward matmuls (backward is twice the "
    "forward), with half of the attention square, as a causal kernel needs. The trainable scalars come on top. "
    "All arms see the same tokens in the same order, with the same optimizer and learning rates unless a command says "
    "otherwise."
)


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
    """The results table in Markdown, with what it rests on."""
    rows = table.markdown(table.HEADINGS, table.result_rows(results))
    return f"{rows}\n\n{results['note']}. {results['layout']}. Data: {data_text(results)}.\n"


def html(results: Results, pictures: dict[str, str]) -> str:
    """The page."""
    names = [arm["name"] for arm in results["arms"]]
    tokens = max(arm["tokens"] for arm in results["arms"])
    budget = f"{tokens:,} training tokens each, at the parameters and FLOPs of {results['baseline']}"
    parts = [
        f"<header><h1>{escape(results['name'])}: activations at equal compute</h1>",
        page.paragraph(f"{', '.join(names)}: {budget}.", "soft"),
        page.paragraph(_note(results), "note"),
        "</header>",
        _results_section(results),
        _figures_section(pictures),
        _match_section(results),
        _scalars_section(results),
        _export_section(results),
        _limits_section(results),
        _origin_section(results),
        _commands_section(results),
    ]
    return page.document(f"{results['name']}: activations at equal compute", "\n".join(filter(None, parts)))


def data_text(results: Results) -> str:
    """The data sets by name."""
    data = results["data"]
    if isinstance(data, str):
        return data
    return ", ".join(f"{part}: {' '.join(Path(prefix).name for prefix in prefixes)}" for part, prefixes in data.items())


def _note(results: Results) -> str:
    unfinished = [f"{run['name']} (seed {run['seed']})" for run in results["runs"] if not run["finished"]]
    note = f"{results['note']}."
    return f"{note} Not finished: {', '.join(unfinished)}." if unfinished else note


def _results_section(results: Results) -> str:
    about = (
        "Training loss: mean of the last tenth of the logged steps. Validation loss: after the last step. "
        "Both in nats per token. Arms stand in the experiment's order, not by rank."
    )
    rows = [row[:-1] for row in table.result_rows(results)]  # the scalars have a table of their own
    return page.section("Results", page.table(table.HEADINGS[:-1], rows), page.paragraph(about, "soft"))


def _figures_section(pictures: dict[str, str]) -> str:
    from megatron_act.experiment.figures import FIGURES

    return page.section("Figures", *(page.figure(name, FIGURES[name][0], svg) for name, svg in pictures.items()))


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
        f"A model of {arm['parameters']:,} parameters on {arm['tokens']:,} tokens: an order of the arms here says "
        "nothing about another scale, corpus, schedule or learning rate.",
        "One learning rate for all arms: each might have a better one of its own.",
        "Equal FLOPs are equal matmul arithmetic, not equal time: tokens/s is this machine's.",
    ]
    if results["seeds"] == 1:
        points.insert(0, "One seed: differences between arms may be smaller than those between two seeds of one arm.")
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return page.section("What this does not show", f"<ul>{items}</ul>")


def _origin_section(results: Results) -> str:
    versions = {name: version for run in results["runs"] for name, version in run["versions"].items()}
    pairs = [("layout", results["layout"]), ("data", data_text(results)), *results["machine"].items()]
    pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return page.section("Machine and versions", page.definitions(pairs))


def _commands_section(results: Results) -> str:
    blocks = []
    for run in results["runs"]:
        summary = f"<summary>{escape(run['name'])}, seed {run['seed']}</summary>"
        blocks.append(f"<details>{summary}<pre>{escape(run['command'])}</pre></details>")
    return page.section("Commands", *blocks)
