"""The main job on one machine: text to tokens, four arms of equal compute, Hugging Face exports, one page.

``bash launch/quickstart.sh`` runs this after the set-up. Everything lands in one folder: ``data/``,
``experiment.yaml``, ``compute_match.json``, ``runs/``, ``export/``, ``report.html``, ``figures/``, ``results.json``.
"""

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_act import model_args
from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.verify import TOLERANCE, verify_all
from megatron_act.data import sample_path
from megatron_act.data.bpe import train_bpe
from megatron_act.data.checksum import file_checksum
from megatron_act.data.manifest import read_manifest
from megatron_act.data.preprocess import preprocess
from megatron_act.data.source import expand_inputs, iter_texts
from megatron_act.data.split import parse_split
from megatron_act.errors import FAILED, run_cli
from megatron_act.experiment.arms import Experiment
from megatron_act.experiment.jobs import RunFailed
from megatron_act.experiment.layout import Layout, detect
from megatron_act.experiment.parse import parse_experiment
from megatron_act.experiment.records import is_finished, run_folder
from megatron_act.experiment.report import write_report
from megatron_act.experiment.results import collect
from megatron_act.experiment.runner import run_arms
from megatron_act.experiment.table import match_lines, terminal_table
from megatron_act.model_args import Flags

ARMS = ("swiglu", "relu2", "xielu", "crrelu")
EXPORTED = ("xielu", "swiglu")
VOCAB_SIZE = 4096  # a 50k vocabulary would make a 1 M parameter model all logits
TOKENIZER_DOCUMENTS = 4000  # enough text for 4096 merges, read in a second
STEPS, QUICK_STEPS = 240, 30
PROMPT = "The most important thing about"


def parser() -> argparse.ArgumentParser:
    """The command line of ``launch/quickstart.sh``."""
    parse = argparse.ArgumentParser(prog="launch/quickstart.sh", description=__doc__.split("\n")[0], allow_abbrev=False)
    parse.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps an arm instead of {STEPS}: every stage, minutes less"
    )
    parse.add_argument(
        "--data", nargs="+", metavar="PARQUET", help="FineWeb-Edu parquet files (default: the packaged sample)"
    )
    parse.add_argument("--output", type=Path, default=Path("quickstart"), metavar="DIR", help="default: quickstart")
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


def prepare_data(inputs: Sequence[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Trains the tokenizer and writes ``text_train`` and ``text_valid`` (.bin/.idx); keeps what the same inputs made.

    Args:
        inputs: parquet files with columns ``text`` and ``id``.
        folder: gets ``tokenizer/``, the token files and ``text.manifest.json``.
        vocab_size: of the tokenizer.

    Raises:
        UserError: bad input.
    """
    if _is_prepared(inputs, folder):
        print(f"data: {folder} holds the tokens of these files, kept")
        return
    texts = itertools.islice(iter_texts(inputs), TOKENIZER_DOCUMENTS)
    size = train_bpe(texts, vocab_size, folder / "tokenizer", overwrite=True)
    split = parse_split(["train:0.95", "valid:0.05"])
    manifest = preprocess(inputs, folder / "tokenizer", folder / "text", split=split, overwrite=True)
    tokens = ", ".join(f"{part['tokens']:,} {part['name']}" for part in manifest["outputs"])
    print(f"data: BPE of {size} tokens trained; {tokens} tokens written to {folder}")


def _is_prepared(inputs: Sequence[str], folder: Path) -> bool:
    path = folder / "text.manifest.json"
    if not path.is_file() or not (folder / "tokenizer" / "tokenizer.json").is_file():
        return False
    recorded = [source["checksum"] for source in read_manifest(path)["sources"]]
    return recorded == [file_checksum(source) for source in expand_inputs(inputs)]


def base_flags(steps: int) -> Flags:
    """The model and schedule of the arms: ``configs/tiny-swiglu.yaml`` for ``steps`` steps (WSD, same proportions)."""
    flags = model_args.read(Path(__file__).parents[2] / "configs" / "tiny-swiglu.yaml")
    flags |= {"--train-iters": steps, "--lr-decay-iters": steps}
    flags |= {"--lr-warmup-iters": steps // 10, "--lr-wsd-decay-iters": steps // 5}
    return flags | {"--eval-interval": steps + 1, "--eval-iters": 20, "--log-interval": 1}  # validation: at the end


def write_experiment(folder: Path, steps: int) -> Experiment:
    """Writes ``experiment.yaml``, which ``tools/compare.py`` runs too, and returns the experiment."""
    content = {
        "name": "quickstart",
        "base": base_flags(steps),
        "arms": list(ARMS),
        "data": {"train": ["data/text_train"], "valid": ["data/text_valid"]},
        "tokenizer": "data/tokenizer",
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return parse_experiment(content, folder)


def write_match(folder: Path, experiment: Experiment, layout: Layout) -> None:
    """Solves the compute match of every arm, prints it and writes ``compute_match.json``."""
    matches = {arm.name: experiment.match(arm, layout).report() for arm in experiment.arms}
    (folder / "compute_match.json").write_text(json.dumps(matches, indent=1) + "\n", encoding="utf-8")
    print(match_lines(matches, experiment.baseline))


def export_arms(folder: Path, experiment: Experiment, layout: Layout) -> bool:
    """Exports the xIELU and SwiGLU checkpoints, compares their logits with Megatron's, writes ``export.json``.

    Returns:
        Whether every difference is within the tolerance.
    """
    runs = {run.arm.name: run_folder(folder, run) for run in experiment.runs(experiment.layout(layout))}
    families = {}
    for name in EXPORTED:
        done = export(runs[name].checkpoint, folder / "export" / name, dtype="float32", overwrite=True, progress=False)
        families[name] = done.architecture
    pairs = [(runs[name].checkpoint, folder / "export" / name) for name in EXPORTED]
    checked = verify_all(pairs, prompt=PROMPT, sample=True)
    arms = {
        name: {"family": families[name], "max_logit_difference": each.max_difference, "generated": each.generated}
        for name, each in zip(EXPORTED, checked, strict=True)
    }
    (folder / "export.json").write_text(json.dumps({"arms": arms}, indent=1) + "\n", encoding="utf-8")
    for name, arm in arms.items():
        print(f"{name}: {arm['family']}, largest logit difference to Megatron {arm['max_logit_difference']:.1e}")
        print(f"  {' '.join(str(arm['generated']).split())}")
    return all(each.max_difference <= TOLERANCE for each in checked)


def run(args: argparse.Namespace) -> int:
    """Every stage, in order; the page's path is printed last."""
    began = time.monotonic()
    folder = args.output.resolve()
    layout = detect()
    print(layout, flush=True)
    prepare_data([str(item) for item in args.data or [sample_path()]], folder / "data")
    experiment = write_experiment(folder, QUICK_STEPS if args.quick else STEPS)
    write_match(folder, experiment, experiment.layout(layout))
    finished = all(is_finished(run_folder(folder, run), run) for run in experiment.runs(experiment.layout(layout)))
    try:
        run_arms(
            experiment, folder, layout, force=finished
        )  # an interrupted quickstart goes on, a finished one repeats
    except RunFailed as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    equal = export_arms(folder, experiment, layout)
    path = write_report(folder)
    print(terminal_table(collect(folder)))
    print(f"done in {time.monotonic() - began:.0f} s")
    if not equal:
        print(
            f"error: expected exported logits within {TOLERANCE:g} of Megatron's, got more: see above", file=sys.stderr
        )
    print(path)
    return 0 if equal else FAILED


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
