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
from megatron_act.experiment import results, table
from megatron_act.experiment.report import write_report

FIXTURE = Path(__file__).parent / "data" / "experiment"  # by tools/compare.py: 2 arms x 2 seeds, 20 steps


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURE / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_results_are_the_runs_figures() -> None:
    found = results.collect(FIXTURE)
    xielu = next(arm for arm in found["arms"] if arm["name"] == "xielu")
    runs = [lines_of(f"xielu-seed{seed}") for seed in (1, 2)]
    train = [
        statistics.mean(
            line["loss"] for line in lines[-30:] if line.get("iteration", 0) in (19, 20) and line["event"] == "step"
        )
        for lines in runs
    ]
    valid = [[line["loss"] for line in lines if line.get("split") == "validation"][-1] for lines in runs]
    assert xielu["final_train_loss"]["mean"] == pytest.approx(sum(train) / 2, rel=1e-12)
    assert xielu["final_train_loss"]["sd"] == pytest.approx(abs(train[0] - train[1]) / math.sqrt(2), rel=1e-9)
    assert xielu["validation_loss"]["mean"] == pytest.approx(sum(valid) / 2, rel=1e-12)
    assert xielu["validation_perplexity"]["mean"] == pytest.approx(sum(map(math.exp, valid)) / 2, rel=1e-12)
    assert (xielu["tokens"], xielu["ffn_hidden_size"]) == (20 * 4 * 32, 96)
    # 2 layers x (attention 4 h^2 + MLP 2 h F) + embedding and output, norms, 4 scalars
    without = 2 * (4 * 32**2 + 2 * 32 * 96) + 2 * (2 * 32 + 2 * 16) + 32 + 4
    assert xielu["parameters_without_embeddings"] == without
    assert xielu["parameters"] == xielu["parameters_built"] == without + 2 * 256 * 32
    flops = 3 * 2 * (2 * (4 * 32**2 + 2 * 32 * 96) + 256 * 32) + 3 * 2 * (4 * 32 * 32) // 2
    assert xielu["flops_per_token"] == flops
    assert xielu["total_flops"] == flops * 2560
    assert xielu["scalars_initial"] == {"alpha_p": [0.8, 0.8], "alpha_n": [0.8, 0.8]}
    last = [[line for line in lines if line["event"] == "step"][-1]["scalars"]["alpha_p"] for lines in runs]
    assert xielu["scalars_final"]["alpha_p"] == pytest.approx([(a + b) / 2 for a, b in zip(*last, strict=True)])
    assert found["note"] == "2 seeds: mean ± standard deviation"


def test_arms_are_matched() -> None:
    swiglu, xielu = results.collect(FIXTURE)["arms"]
    assert swiglu["flops_per_token"] == xielu["flops_per_token"]
    assert xielu["parameters"] - swiglu["parameters"] == 4  # two scalars in each of two layers
    assert results.collect(FIXTURE)["match"]["xielu"]["exact"] is True


def test_speed_ignores_evaluations() -> None:
    steps = [{"event": "step", "iteration": i, "tokens": 100 * i, "loss": 1.0, "scalars": {}} for i in range(1, 6)]
    for step, seconds in zip(steps, (0.0, 0.1, 0.2, 9.2, 9.3), strict=True):  # an evaluation took 9 s
        step["seconds"] = seconds
    assert results.tokens_per_second(results.read_curve(steps)) == pytest.approx(1000.0)


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "one")
    description = json.loads((tmp_path / "one" / "experiment.json").read_text())
    description["runs"] = [run for run in description["runs"] if run["seed"] == 1]
    (tmp_path / "one" / "experiment.json").write_text(json.dumps(description))
    text = table.terminal_table(results.collect(tmp_path / "one"))
    assert text.endswith("\n1 seed: no interval, no winner claimed")
    assert "±" not in text


def test_table_shows_mean_and_deviation() -> None:
    assert table.with_spread({"mean": 4.5, "sd": None}, 4) == "4.5000"
    assert table.with_spread({"mean": 4.5, "sd": 0.0123}, 4) == "4.5000 ± 0.0123"
    assert table.with_spread({"mean": None, "sd": None}, 4) == "-"
    found = results.collect(FIXTURE)
    loss = found["arms"][1]["final_train_loss"]
    assert f"{loss['mean']:.4f} ± {loss['sd']:.4f}" in table.terminal_table(found)
    rows = table.markdown(table.HEADINGS, table.result_rows(found)).splitlines()
    assert rows[0].startswith("| arm | MLP width |") and rows[2].startswith("| swiglu | 64 |") and len(rows) == 4


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
    assert figures == ["loss_tokens", "loss_flops", "scalars", "activations", "activation_changes"]
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
        assert f"{arm['validation_loss']['mean']:.4f} ± {arm['validation_loss']['sd']:.4f}" in text
        assert f"{arm['parameters']:,} / {arm['parameters_built']:,}" in text
    for run in found["runs"]:
        assert run["command"] in text and " --metrics-jsonl " in run["command"]
        assert run["versions"]["megatron_core"] in text
    assert "ApertusForCausalLM" in text and "2.50e-06" in text and "<b>Rome & sons" in text
    assert "2 seeds: mean ± standard deviation." in text


def test_report_names_unfinished_runs(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "out")
    metrics = tmp_path / "out" / "runs" / "xielu-seed2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]))
    (metrics.parent / "run.json").unlink()
    text = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "2 seeds: mean ± standard deviation. Not finished: xielu (seed 2)." in text


def test_curves_are_the_reference_at_the_learned_scalars() -> None:
    from megatron_act.experiment.figures import activation_values

    x = np.array([-2.0, 0.0, 1.5])
    arm = {"activation": "xielu"}
    y = activation_values(arm, x, {"alpha_p": [0.0, 1.1], "alpha_n": [0.0, 0.7]}, layer=1)
    expected = [0.7 * (math.expm1(-2.0) + 2.0) + 0.5 * -2.0, 0.0, 1.1 * 1.5**2 + 0.5 * 1.5]
    assert y == pytest.approx(expected, rel=1e-12)
    gate = activation_values({"activation": "swiglu"}, x, {}, layer=0)
    assert gate == pytest.approx([value / (1 + math.exp(-value)) for value in x], rel=1e-12)


def test_smoothing_keeps_lines_straight_and_constants_exact() -> None:
    from megatron_act.experiment.figures import smooth

    line = [float(i) for i in range(200)]
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])  # reach 4 on both sides
    assert smooth(line)[0] == pytest.approx(2.0)  # mean of 0..4
    assert smooth([7.0] * 50) == pytest.approx([7.0] * 50)


def test_a_folder_without_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an experiment's folder, got no experiment\.json"):
        write_report(tmp_path)
