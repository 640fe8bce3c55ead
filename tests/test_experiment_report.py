"""A real run's files to figures, table and page."""

import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_act.errors import UserError
from megatron_act.experiment import budget_table, curves, readme, results, table
from megatron_act.experiment.figures import FIGURES
from megatron_act.experiment.report import write_report

# By tools/compare.py: 2 arms, 20 steps, 2 learning rates on tuning seed 101, 2 seeds, 17 steps for equal seconds; paths
# and digits cut.
FIXTURE = Path(__file__).parent / "data" / "experiment"


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURE / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def final(lines: list[dict]) -> tuple[float, float]:
    """Mean training loss of the last tenth (2 of 20 steps), last validation loss."""
    steps = [line["loss"] for line in lines if line["event"] == "step"]
    return statistics.mean(steps[-2:]), [line["loss"] for line in lines if line["event"] == "evaluation"][-1]


def test_results_are_the_runs_figures() -> None:
    found = results.collect(FIXTURE)
    xielu = next(arm for arm in found["arms"] if arm["name"] == "xielu")
    runs = [lines_of(f"xielu-lr0.005-seed{seed}") for seed in (1, 2)]
    train, valid = zip(*map(final, runs), strict=True)
    assert xielu["final_train_loss"]["mean"] == pytest.approx(sum(train) / 2, rel=1e-12)
    sd = abs(valid[0] - valid[1]) / math.sqrt(2)
    assert xielu["validation_loss"]["mean"] == pytest.approx(sum(valid) / 2, rel=1e-12)
    assert xielu["validation_loss"]["sd"] == pytest.approx(sd, rel=1e-9)
    assert xielu["validation_loss"]["high"] == pytest.approx(sum(valid) / 2 + 12.7062 * sd / math.sqrt(2), rel=1e-5)
    assert xielu["validation_perplexity"]["mean"] == pytest.approx(sum(map(math.exp, valid)) / 2, rel=1e-12)
    bits = sum(valid) / 2 * 3140 / 6347 / math.log(2)  # the fixture's held-out set: 3,141 tokens, 6,347 bytes
    assert xielu["bits_per_byte"]["mean"] == pytest.approx(bits, rel=1e-12)
    assert (xielu["tokens"], xielu["ffn_hidden_size"], xielu["rate"]) == (20 * 4 * 32, 96, 0.005)
    # 2 layers x (attention 4 h^2 + MLP 2 h F) + embedding and output, norms, 4 scalars
    without = 2 * (4 * 32**2 + 2 * 32 * 96) + 2 * (2 * 32 + 2 * 16) + 32 + 4
    assert xielu["parameters_without_embeddings"] == without
    assert xielu["parameters"] == xielu["parameters_built"] == without + 2 * 512 * 32
    flops = 3 * 2 * (2 * (4 * 32**2 + 2 * 32 * 96) + 512 * 32) + 3 * 2 * (4 * 32 * 32) // 2
    assert xielu["flops_per_token"] == flops
    assert xielu["total_flops"] == flops * 2560
    assert xielu["scalars_initial"] == {"alpha_p": [0.8, 0.8], "alpha_n": [0.8, 0.8]}
    steps = [[line for line in lines if line["event"] == "step"] for lines in runs]
    for name, column in (("scalars_final", "scalars"), ("fractions_final", None)):
        for key, by_layer in xielu[name].items():
            last = [(each[-1][column] if column else each[-1])[key] for each in steps]
            assert by_layer == pytest.approx([(a + b) / 2 for a, b in zip(*last, strict=True)])
    seconds = [sum(line["step_seconds"] for line in each) for each in steps]
    assert xielu["train_seconds"]["mean"] == pytest.approx(sum(seconds) / 2)
    assert found["note"] == "2 seeds: mean ± half of the 95 % interval (Student's t)"


def test_comparisons_take_the_runs_of_their_own_length() -> None:
    found = results.collect(FIXTURE)
    budgets = found["budgets"]
    assert budgets["seconds"]["steps"] == {"swiglu": 20, "xielu": 17}
    for budget, suffix in (("tokens", ""), ("flops", ""), ("seconds", "-17steps")):
        (pair,) = budgets[budget]["pairs"]
        losses = {
            name: [final(lines_of(folder.format(seed)))[1] for seed in (1, 2)]
            for name, folder in (("swiglu", "swiglu-lr0.01-seed{}"), ("xielu", "xielu-lr0.005-seed{}" + suffix))
        }
        differences = [b - a for a, b in zip(losses["swiglu"], losses["xielu"], strict=True)]
        assert pair["mean"] == pytest.approx(statistics.mean(differences), rel=1e-9)
        assert pair["sd"] == pytest.approx(statistics.stdev(differences), rel=1e-9)
    assert found["sweep"]["xielu"] == {
        rate: [pytest.approx(final(lines_of(f"xielu-lr{rate}-seed101"))[1])] for rate in ("0.005", "0.01")
    }
    assert [arm["tokens"] for arm in budgets["seconds"]["arms"]] == [20 * 128, 17 * 128]


def test_arms_are_matched() -> None:
    swiglu, xielu = results.collect(FIXTURE)["arms"]
    assert swiglu["flops_per_token"] == xielu["flops_per_token"]
    assert xielu["parameters"] - swiglu["parameters"] == 4  # two scalars in each of two layers
    assert results.collect(FIXTURE)["match"]["xielu"]["exact"] is True


def step(iteration: int, seconds: float, **other: object) -> dict:
    record = {"event": "step", "iteration": iteration, "tokens": 100 * iteration, "loss": 1.0, "seconds": 99.0}
    record |= {"step_seconds": seconds, "grad_norm": 1.0, "scalars": {}, "scalar_gradients": {}}
    return {**record, "peak_memory_bytes": 5, "telemetry_seconds": 0.001, **other}


def test_time_is_that_of_training_steps() -> None:
    """Megatron's timer stands still during evaluations; a record is the mean since the one before."""
    lines = [step(4, 0.3), step(8, 0.1), step(12, 0.1), step(16, 0.2)]
    curve = curves.read_curve(lines)
    assert curve.train_seconds == pytest.approx([1.2, 1.6, 2.0, 2.8])
    assert curves.tokens_per_second(curve) == pytest.approx(1000.0)
    assert curves.telemetry_share(lines) == pytest.approx(0.001 / 0.4)  # of 0.4, 0.4 and 0.8 s


def test_a_resumed_runs_repeated_step_counts_once_and_a_diverged_run_has_no_loss() -> None:
    lines = [step(1, 1.0, loss=5.0), step(2, 1.0, loss=9.0), step(2, 1.0, loss=4.0)]
    curve = curves.read_curve(lines)
    assert curve.losses == [5.0, 4.0] and curves.final_loss(curve) == 4.0
    assert curves.final_loss(curves.read_curve([*lines, step(3, 1.0, loss=math.nan)])) is None
    assert curves.final_loss(curves.read_curve([step(1, 1.0, loss=None)])) is None


def with_seed_1_only(folder: Path) -> Path:
    shutil.copytree(FIXTURE, folder)
    description = json.loads((folder / "experiment.json").read_text())
    description["runs"] = [run for run in description["runs"] if run["seed"] == 1]
    (folder / "experiment.json").write_text(json.dumps(description))
    return folder


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    found = results.collect(with_seed_1_only(tmp_path / "one"))
    text = table.terminal_table(found)
    assert text.endswith("\n1 seed: no interval, no winner claimed")
    assert "±" not in text and "lower" not in text and "higher" not in text
    assert [pair["verdict"] for pair in found["budgets"]["tokens"]["pairs"]] == [
        "xielu and swiglu: one pair of runs, no interval, nothing claimed"
    ]


def test_tables_show_means_and_intervals() -> None:
    assert table.with_spread({"mean": 4.5, "high": None}, 4) == "4.5000"
    assert table.with_spread({"mean": 4.5, "high": 4.5123}, 4) == "4.5000 ± 0.0123"
    assert table.with_spread({"mean": None, "high": None}, 4) == "-"
    found = results.collect(FIXTURE)
    loss, pair = found["arms"][1]["validation_loss"], found["budgets"]["tokens"]["pairs"][0]
    text = f"{loss['mean']:.4f} ± {loss['high'] - loss['mean']:.4f}"
    assert text in table.terminal_table(found)
    rows = table.markdown(table.HEADINGS, table.result_rows(found)).splitlines()
    assert rows[0].startswith("| arm | MLP width |") and rows[2].startswith("| swiglu | 64 |") and len(rows) == 4
    paper = budget_table.paper_table(found).splitlines()
    difference = f"{pair['mean']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}] (n.s.)"
    assert paper[3].startswith(f"| xielu | {text} | {difference} | {text} | {difference} |")
    assert paper[2].count("|  |") == 3  # the reference has no difference from itself


def test_a_difference_reads_the_same_from_the_other_end() -> None:
    """The reference may stand after an arm: signs and ends of the interval turn round."""
    pair = {"first": "a", "second": "b", "mean": -0.2, "low": -0.3, "high": -0.1, "p_holm": 0.01}
    arms = [{"name": name, "validation_loss": {"mean": mean, "high": None}} for name, mean in (("a", 3.2), ("b", 3.0))]
    comparison = {"metric": "validation_loss", "arms": arms, "pairs": [pair]}
    found = {"budgets": {"tokens": comparison}, "reference": "b", "arms": arms}
    assert budget_table.paper_table(found).splitlines()[2] == "| a | 3.2000 | +0.2000 [+0.1000, +0.3000] |"


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("report") / "out"
    shutil.copytree(FIXTURE, folder)
    export = {"family": "ApertusForCausalLM", "max_logit_difference": 2.5e-6, "generated": "<b>Rome & sons"}
    (folder / "export.json").write_text(json.dumps({"arms": {"xielu": export}}))
    path = write_report(folder)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return path, page


def test_report_holds_every_figure_and_nothing_external(report: tuple[Path, Page]) -> None:
    path, page = report
    html = path.read_text(encoding="utf-8")
    figures = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert figures == list(FIGURES)  # the fixture has something for each of them
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(figures)
    for name in figures:
        assert (path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe", "object")]
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key.endswith(("src", "href"))]
    assert links and all(value.startswith("#") for value in links)  # glyph and clip references inside a figure
    assert set(re.findall(r'https?://[^"<> ]+', html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html and "url(h" not in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#24292f" not in html


def test_report_says_what_was_measured(report: tuple[Path, Page]) -> None:
    path, page = report
    text = " ".join(page.text)
    found = json.loads((path.parent / "results.json").read_text())
    for arm in found["arms"]:
        loss = arm["validation_loss"]
        assert f"{loss['mean']:.4f} ± {loss['high'] - loss['mean']:.4f}" in text
        assert f"{arm['parameters']:,} / {arm['parameters_built']:,}" in text
    for comparison in found["budgets"].values():
        assert all(pair["verdict"] in text for pair in comparison["pairs"])
    assert "(at the grid's edge)" in text and "3,141 tokens, 6,347 bytes" in text
    captions = [part for part in page.text if part.endswith(" Corpus: wiki leads.")]
    assert len(captions) >= len(FIGURES)  # the corpus stands beside every figure
    for run in found["runs"]:
        assert run["command"] in text and " --metrics-jsonl " in run["command"]
        assert run["versions"]["megatron_core"] in text
    assert "ApertusForCausalLM" in text and "2.50e-06" in text and "<b>Rome & sons" in text
    assert "2 seeds: mean ± half of the 95 % interval (Student's t)." in text


def test_unfinished_runs_are_named_and_not_compared(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "out")
    runs = tmp_path / "out" / "runs"
    metrics = runs / "xielu-lr0.005-seed2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]))
    (metrics.parent / "run.json").unlink()
    shutil.rmtree(runs / "xielu-lr0.005-seed1-17steps")
    text = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "Not finished: xielu-lr0.005-seed2, xielu-lr0.005-seed1-17steps." in text
    found = results.collect(tmp_path / "out")
    assert [pair["seeds"] for pair in found["budgets"]["tokens"]["pairs"]] == [[1]]
    assert [pair["seeds"] for pair in found["budgets"]["seconds"]["pairs"]] == [[2]]


def test_the_summary_holds_no_curves_commands_or_paths(report: tuple[Path, Page]) -> None:
    path, _ = report
    text = (path.parent / "summary.json").read_text()
    assert json.loads(text)["budgets"] == json.loads((path.parent / "results.json").read_text())["budgets"]
    assert "--metrics-jsonl" not in text and '"curve"' not in text and str(path.parent) not in text
    assert len(text) < 30_000


def test_the_readmes_section_is_the_summarys(tmp_path: Path, report: tuple[Path, Page]) -> None:
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    assert readme.rendered(page, tmp_path) == f"before\n{readme.BEGIN}\n{readme.NO_RUN}\n{readme.END}\nafter"
    (tmp_path / "launch").mkdir()
    shutil.copy(report[0].parent / "summary.json", tmp_path / readme.RESULTS)
    found, text = results.collect(FIXTURE), readme.rendered(page, tmp_path)
    assert budget_table.paper_table(found) in text and "Corpus: wiki leads." in text and "\nold\n" not in text
    verdict = found["budgets"]["tokens"]["pairs"][0]["verdict"]
    assert f"- equal tokens and equal FLOPs: {verdict}\n" in text
    with pytest.raises(UserError, match=r"README\.md: expected one line"):
        readme.rendered("no markers", tmp_path)


def test_the_readme_is_as_the_committed_summary_says() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.rendered(text) == text


def test_curves_are_the_reference_at_the_learned_scalars() -> None:
    from megatron_act.experiment.activation_figures import activation_values

    x = np.array([-2.0, 0.0, 1.5])
    arm = {"activation": "xielu"}
    y = activation_values(arm, x, {"alpha_p": [0.0, 1.1], "alpha_n": [0.0, 0.7]}, layer=1)
    expected = [0.7 * (math.expm1(-2.0) + 2.0) + 0.5 * -2.0, 0.0, 1.1 * 1.5**2 + 0.5 * 1.5]
    assert y == pytest.approx(expected, rel=1e-12)
    gate = activation_values({"activation": "swiglu"}, x, {}, layer=0)
    assert gate == pytest.approx([value / (1 + math.exp(-value)) for value in x], rel=1e-12)


def test_smoothing_keeps_lines_straight_and_constants_exact() -> None:
    from megatron_act.experiment.panels import smooth

    line = [float(i) for i in range(200)]
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])  # reach 4 on both sides
    assert smooth(line)[0] == pytest.approx(2.0)  # mean of 0..4
    assert smooth([7.0] * 50) == pytest.approx([7.0] * 50)


def test_a_folder_without_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an experiment's folder, got no experiment\.json"):
        write_report(tmp_path)
