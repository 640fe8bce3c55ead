"""Train the arms of an experiment at equal parameters and FLOPs, and write one page about them.

    python tools/compare.py EXPERIMENT.yaml --output DIR [--jobs N | --slurm]

DIR then holds report.html, results.md (tables for a paper), results.json, figures/*.png, and under runs/ each run's
metrics.jsonl, log.txt and checkpoint. Run again, it trains only what is not finished: arms x seeds, before them
learning rates x tuning seeds where several are given, after them the arms that need another length for equal FLOPs or
equal wall clock. The experiment's form:

    name: tiny
    base_config: configs/tiny-swiglu.yaml   # MODEL_ARGS; `base: {--flag: value}` on top of it or instead
    arms: [swiglu, relu2, xielu, {name: xielu-slow, activation: xielu, flags: {--lr: 1.0e-3}}]
    baseline: {activation: swiglu, ffn_hidden_size: 512}   # default: the base's own
    seeds: [1, 2, 3]                        # same seed: same order of data; default: the base's --seed
    equal: [tokens, flops, seconds]         # the comparisons; default: tokens
    learning_rates: [1.0e-3, 2.0e-3]        # each arm takes its best on tuning_seeds; default: the base's --lr
    tuning_seeds: [101, 102]                # none of seeds
    schedule: {kind: wsd, warmup: 0.1, decay: 0.2, final: 0.0}   # 1-sqrt decay; or kind: cosine; default: the base's
    data: {train: [edu_train], valid: [edu_valid]}
    corpus: "FineWeb-Edu, sample-10BT"      # what people read beside every figure
    tokenizer: tokenizer                    # for the vocabulary and for bits per byte
    held_out_tokens: 1000000                # of valid, the first so many; default: all, the same for every run
    evaluations: 5                          # per run; default: one, after the last step
    layout: {ranks: 2, tensor_parallel: 2, device: cuda}   # default: what this machine allows
    align: 16                               # what must divide each rank's MLP width; default 1
    slurm: {partition: gpu, time: "04:00:00", parallel: 8} # sbatch options; parallel: runs at a time

with paths relative to the file. `--slurm` writes DIR/slurm/array.sh, one task a run, and submits it. Exit code: 0 done,
1 interrupted or a run failed, 2 bad input (one line).
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_act.experiment.arms import Experiment
    from megatron_act.experiment.layout import Layout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import FAILED, UserError, run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("experiment", metavar="EXPERIMENT.yaml", help="the experiment (form: above)")
    parse.add_argument("--output", required=True, metavar="DIR", help="folder of runs and report; made if absent")
    parse.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine (default 1)")
    how = parse.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="train finished runs again")
    how.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    how.add_argument("--dry-run", action="store_true", help="print what would be trained, command by command")
    how.add_argument("--slurm", action="store_true", help="submit the unfinished runs as one Slurm job array")
    how.add_argument("--only", metavar="RUN", help="train one run of the plan, write no report (an array's task)")
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


def run(args: argparse.Namespace) -> int:
    """Does what the flags say; after training prints the table and, last, the page's path."""
    from megatron_act.experiment.jobs import RunFailed
    from megatron_act.experiment.layout import detect
    from megatron_act.experiment.parse import load_experiment
    from megatron_act.experiment.runner import run_arms, run_one
    from megatron_act.experiment.slurm import submit
    from megatron_act.experiment.table import match_lines

    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
    experiment, machine = load_experiment(args.experiment), detect()
    try:
        if args.only:
            run_one(experiment, args.output, machine, args.only)
            return 0
        if args.slurm:
            print(submit(experiment, args.experiment, args.output, machine))
            return 0
        layout = experiment.layout(machine, args.jobs)
        print(layout)
        matches = {arm.name: experiment.match(arm, layout).report() for arm in experiment.arms}
        print(match_lines(matches, experiment.baseline))
        if args.dry_run:
            return dry_run(experiment, args.output, layout)
        if not args.report_only:
            run_arms(experiment, args.output, machine, force=args.force, jobs=args.jobs)
    except RunFailed as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return report(args.output)


def dry_run(experiment: "Experiment", output: str, layout: "Layout") -> int:
    """Prints the plan; trains and writes nothing."""
    from megatron_act.experiment.preview import preview

    print(preview(experiment, Path(output).resolve(), layout))
    return 0


def report(output: str) -> int:
    """Writes the report and prints the table."""
    from megatron_act.experiment.report import write_report
    from megatron_act.experiment.results import collect
    from megatron_act.experiment.table import terminal_table

    path = write_report(output)
    print(terminal_table(collect(output)))
    print(path)
    return 0


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice cleans up like Ctrl-C
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
