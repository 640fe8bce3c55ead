"""Train the arms of an experiment at equal parameters and FLOPs, and write one page about them.

    python tools/compare.py EXPERIMENT.yaml --output DIR

DIR then holds report.html, results.json, results.md, figures/*.png, and under runs/ each run's metrics.jsonl, log.txt
and checkpoint. Run again, it trains only what is not finished. The experiment's form:

    name: tiny
    base_config: configs/tiny-swiglu.yaml   # MODEL_ARGS; `base: {--flag: value}` on top of it or instead
    arms: [swiglu, relu2, xielu, {name: xielu-slow, activation: xielu, flags: {--lr: 1.0e-3}}]
    data: {train: [edu_train], valid: [edu_valid]}
    tokenizer: tokenizer
    baseline: {activation: swiglu, ffn_hidden_size: 512}   # default: the base's own
    seeds: [1, 2, 3]                        # default: the base's --seed
    layout: {ranks: 2, tensor_parallel: 2}  # default: what this machine allows
    align: 16                               # what must divide each rank's MLP width; default 1

with paths relative to the file. Exit code: 0 done, 1 interrupted or a run failed, 2 bad input (one line).
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import FAILED, run_cli


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parse.add_argument("experiment", metavar="EXPERIMENT.yaml", help="the experiment (form: above)")
    parse.add_argument("--output", required=True, metavar="DIR", help="folder of runs and report; made if absent")
    again = parse.add_mutually_exclusive_group()
    again.add_argument("--force", action="store_true", help="train finished runs again")
    again.add_argument("--report-only", action="store_true", help="train nothing, write the report of what is there")
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


def run(args: argparse.Namespace) -> int:
    """Train, report, print the table and, last, the page's path."""
    from megatron_act.experiment.arms import load_experiment
    from megatron_act.experiment.layout import detect
    from megatron_act.experiment.report import write_report
    from megatron_act.experiment.results import collect
    from megatron_act.experiment.runner import RunFailed, run_arms
    from megatron_act.experiment.table import match_lines, terminal_table

    experiment = load_experiment(args.experiment)
    layout = experiment.layout(detect())
    print(layout)
    print(
        match_lines({arm.name: experiment.match(arm, layout).report() for arm in experiment.arms}, experiment.baseline)
    )
    if not args.report_only:
        try:
            run_arms(experiment, args.output, layout, force=args.force)
        except RunFailed as error:
            if args.debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            return FAILED
    path = write_report(args.output)
    print(terminal_table(collect(args.output)))
    print(path)
    return 0


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice cleans up like Ctrl-C
    return run_cli(lambda: run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
