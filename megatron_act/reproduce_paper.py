"""The xIELU paper's runs (arXiv 2411.13010): ``launch/reproduce_paper.sh [--dry-run] ... [-- MEGATRON FLAGS]``.

1.1B and 3B parameters, SwiGLU, ReLU^2 and xIELU, with the paper's tokens, batch, learning rate and schedule, which are
in configs/paper-*.yaml. Runs follow one another; a finished one is skipped, an interrupted one goes on from its last
checkpoint. On several nodes start the same command on each, with --rendezvous.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from megatron_act import config_files
from megatron_act.errors import FAILED, UserError, run_cli
from megatron_act.one_line_parser import OneLineParser
from megatron_act.reproduction import EARLY_XIELU, PAPER_ACTIVATIONS, PAPER_GPUS, TOKEN_BYTES, Inputs, Machines, Run

TRACKER = "latest_checkpointed_iteration.txt"
DATA, TOKENIZER = "DATA/edu", "TOKENIZER"  # what a dry run calls the inputs that it is not given
TOKENIZE = (
    f"python tools/preprocess_fineweb_edu.py --hub-config sample-100BT --tokenizer {TOKENIZER} --output-prefix {DATA} "
    "--split train:0.999 valid:0.001"
)
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # Megatron insists on it with tensor parallelism before Blackwell
H100_TFLOPS, MFU = 989.4, 0.4


def parser() -> OneLineParser:
    """The command line of ``launch/reproduce_paper.sh``."""
    parse = OneLineParser(
        prog="launch/reproduce_paper.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parse.add_argument
    add("--dry-run", action="store_true", help="print every command, GPU-hours and disk; run nothing")
    names = "models of configs/ with a schedule (default: paper-1.1b paper-3b)"
    add("--model", nargs="+", default=list(PAPER_GPUS), metavar="NAME", help=names)
    add("--activation", nargs="+", default=list(PAPER_ACTIVATIONS), metavar="NAME", help="default: swiglu relu2 xielu")
    add("--seed", nargs="+", type=int, metavar="N", help="default: the paper's, 42")
    init = "initial alphas of xielu: the paper's 0.8 and 0.8, or what the authors' first code made of it"
    add("--xielu-init", choices=("paper", "early"), default="paper", help=init)
    _add_inputs(parse.add_argument_group("data and output"))
    _add_machines(parse.add_argument_group("machines"))
    add("--debug", action="store_true", help="show the traceback of an error")
    return parse


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--train", nargs="+", metavar="PREFIX", help=".bin/.idx files of tools/preprocess_fineweb_edu.py, to train on")
    add("--valid", nargs="+", metavar="PREFIX", help="the same, for validation")
    add("--tokenizer", metavar="DIR", help="the tokenizer that made them; the paper's is Mistral-Nemo-Base-2407's")
    add("--output", type=Path, default=Path("reproduction"), metavar="DIR", help="default: reproduction")
    add("--save-interval", type=int, default=10000, metavar="N", help="steps between checkpoints (default: 10000)")


def _add_machines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--nodes", type=int, metavar="N", help="default: as many as the paper's 88 and 256 GPUs take")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add("--rendezvous", metavar="HOST:PORT", help="the first node's name and a free port, with several nodes")
    add("--micro-batch-size", type=int, metavar="N", help="sequences a GPU sees at once (default: the paper's 5)")
    add("--mfu", type=float, default=MFU, metavar="X", help=f"assumed for the GPU-hours (default: {MFU})")
    peak = f"dense bf16 TFLOP/s of one GPU (default: an H100's, {H100_TFLOPS})"
    add("--peak-tflops", type=float, default=H100_TFLOPS, metavar="N", help=peak)


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Every run asked for, in order; seeds outermost, so that a comparison is complete early."""
    return [
        Run(
            model=model,
            activation=activation,
            machines=_machines(args, model),
            seed=seed,
            micro_batch=args.micro_batch_size,
            init=EARLY_XIELU if activation == "xielu" and args.xielu_init == "early" else {},
        )
        for model in args.model
        for seed in args.seed or [None]
        for activation in args.activation
    ]


def _machines(args: argparse.Namespace, model: str) -> Machines:
    config_files.named(model)
    nodes = -(-PAPER_GPUS.get(model, 1) // max(1, args.gpus_per_node)) if args.nodes is None else args.nodes
    return Machines(nodes=nodes, gpus_per_node=args.gpus_per_node, rendezvous=args.rendezvous)


def inputs_of(args: argparse.Namespace, extra: list[str], several_nodes: bool) -> Inputs:
    """Data, tokenizer and output; a dry run fills what is not given with names in capitals.

    Raises:
        UserError: something that training needs is missing.
    """
    if not args.dry_run:
        needed = {"--train": args.train, "--valid": args.valid, "--tokenizer": args.tokenizer}
        needed |= {"--rendezvous": args.rendezvous} if several_nodes else {}
        for flag, value in needed.items():
            if not value:
                raise UserError(f"{flag}: expected a value, got none: give it, or --dry-run")
        for prefix in (*args.train, *args.valid):
            if not Path(f"{prefix}.idx").is_file():
                raise UserError(f"{prefix}.idx: expected token files, got none: run tools/preprocess_fineweb_edu.py")
    return Inputs(
        train=args.train or [f"{DATA}_train"],
        valid=args.valid or [f"{DATA}_valid"],
        tokenizer=args.tokenizer or TOKENIZER,
        output=args.output,
        save_interval=args.save_interval,
        extra=extra,
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that no estimate can be made from."""
    if args.save_interval < 1:
        raise UserError(f"--save-interval: expected an integer of at least 1, got {args.save_interval}")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu: expected a share of the peak, above 0 and at most 1, got {args.mfu:g}")
    if not args.peak_tflops > 0:
        raise UserError(f"--peak-tflops: expected TFLOP/s above 0, got {args.peak_tflops:g}")


def described(run: Run, inputs: Inputs, args: argparse.Namespace) -> str:
    """What a run is, what it takes, and its command."""
    machines, data = run.machines, run.layout.data_parallel
    hours = run.gpu_hours(args.mfu, args.peak_tflops)
    count, size = run.checkpoints(inputs.save_interval), run.checkpoint_bytes()
    return "\n".join(
        (
            f"{run.name}: {run.steps:,} steps of {run.batch} x {run.shape.seq_length} tokens, {run.tokens / 1e9:.2f} B",
            f"  {run.schedule}",
            f"  {machines.gpus} GPUs ({machines.nodes} x {machines.gpus_per_node}), TP {run.layout.tensor_parallel}, "
            f"DP {data}, micro-batches {run.micro} x {run.batch // run.micro // data} a step; "
            f"model state {run.state_bytes() / 2**30:.1f} GiB per GPU",
            f"  {run.flops:.3g} FLOPs: {hours:,.0f} GPU-hours, {hours / machines.gpus:.1f} h; "
            f"{count} checkpoints of {size / 1e9:.1f} GB",
            f"  {' '.join(f'{key}={value}' for key, value in ENVIRONMENT.items())} {shlex.join(run.command(inputs))}",
        )
    )


def totals(runs: list[Run], inputs: Inputs, args: argparse.Namespace) -> str:
    """GPU-hours and disk of all runs."""
    hours = sum(run.gpu_hours(args.mfu, args.peak_tflops) for run in runs)
    checkpoints = sum(run.checkpoints(inputs.save_interval) * run.checkpoint_bytes() for run in runs)
    tokens = TOKEN_BYTES * max(run.tokens for run in runs)
    return (
        f"{len(runs)} runs: {hours:,.0f} GPU-hours at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s, an estimate; "
        f"disk {(tokens + checkpoints) / 1e12:.2f} TB: tokens {tokens / 1e9:,.0f} GB, "
        f"checkpoints {checkpoints / 1e9:,.0f} GB"
    )


def is_finished(run: Run, output: Path) -> bool:
    """Whether the last step's checkpoint is there."""
    tracker = run.folder(output) / "checkpoint" / TRACKER
    return tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(run.steps)


def train(run: Run, inputs: Inputs) -> None:
    """Runs one command and waits; what it prints goes to this terminal.

    Raises:
        RuntimeError: it failed.
    """
    from megatron_act.experiment.jobs import stop_tree  # here: a dry run needs none of its imports

    run.folder(inputs.output).mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(run.command(inputs), env={**os.environ, **ENVIRONMENT})
    try:
        code = process.wait()
    except BaseException:  # Ctrl-C above all: torchrun's workers must not outlive this
        stop_tree(process)
        raise
    if code:
        raise RuntimeError(f"{run.name}: its command ended with exit code {code}; its output above says why")


def main(argv: list[str]) -> int:
    """Plans, prints, and unless it is a dry run trains.

    Raises:
        UserError: bad input, before anything runs.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:split])
    check_numbers(args)
    runs = runs_of(args)
    inputs = inputs_of(args, argv[split + 1 :], any(run.machines.nodes > 1 for run in runs))
    if args.dry_run and not args.train:
        print(f"tokens, once (https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu):\n  {TOKENIZE}")
    print("\n".join([*(described(run, inputs, args) for run in runs), totals(runs, inputs, args)]), flush=True)
    for run in [] if args.dry_run else runs:
        if is_finished(run, inputs.output):
            print(f"{run.name}: finished already, kept", flush=True)
            continue
        try:
            train(run, inputs)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice ends the run like Ctrl-C
    sys.exit(run_cli(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
