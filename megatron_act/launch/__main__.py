"""``python -m megatron_act.launch CONFIG.yaml --nodes N [--platform NAME] [--dry-run] [-- MEGATRON FLAGS]``."""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_act import model_args
from megatron_act.errors import UserError, run_cli
from megatron_act.launch import kubernetes, local, settings, skypilot, slurm
from megatron_act.launch.job import Job, job_name
from megatron_act.one_line_parser import OneLineParser


@dataclass(frozen=True)
class Platform:
    """How a job becomes a file, and the command that takes it."""

    render: Callable[[Job], str]
    submit: Callable[[str, Job], list[str]]
    suffix: str


PLATFORMS = {
    "local": Platform(local.render, local.submit, local.SUFFIX),
    "slurm": Platform(slurm.render, slurm.submit, slurm.SUFFIX),
    "kubernetes": Platform(kubernetes.render_pytorchjob, kubernetes.submit, kubernetes.SUFFIX),
    "jobset": Platform(kubernetes.render_jobset, kubernetes.submit, kubernetes.SUFFIX),
    "skypilot": Platform(skypilot.render, skypilot.submit, skypilot.SUFFIX),
}
HERE = "local"


def parser() -> OneLineParser:
    """The command line."""
    parse = OneLineParser(
        prog="python -m megatron_act.launch",
        description="From one YAML to a running job: one torchrun line here, on Slurm, Kubernetes and SkyPilot.",
        epilog="Words after -- go to the entry point and win over the config.",
        allow_abbrev=False,
    )
    add = parse.add_argument
    add("config", type=Path, metavar="CONFIG.yaml", help="MODEL_ARGS and, if you like, LAUNCH (launch/cluster.yaml)")
    add("--cluster", type=Path, metavar="FILE", help="YAML with a LAUNCH section; its values win over the config's")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs, or ranks with --cpu, on each (default: 8)")
    platforms = "default: local; kubernetes is a Kubeflow PyTorchJob, jobset the other way there"
    add("--platform", choices=list(PLATFORMS), default=HERE, help=platforms)
    add("--dry-run", action="store_true", help="print exactly what would run; write and run nothing")
    add("--script", type=Path, metavar="FILE", help="where the script goes (default: NAME.sh, .sbatch or .yaml here)")
    group = parse.add_mutually_exclusive_group()
    group.add_argument("--preflight-only", action="store_true", help="run the checks on all nodes and do not train")
    group.add_argument("--no-preflight", action="store_true", help="train at once")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parse


def job_of(args: argparse.Namespace, extra: list[str]) -> Job:
    """The job that the command line describes.

    Raises:
        UserError: a wrong config, LAUNCH section or size.
    """
    chosen = settings.read(args.config, args.cluster)
    if args.platform == HERE and not chosen.python:
        chosen = dataclasses.replace(chosen, python=sys.executable)
    if args.platform in ("kubernetes", "jobset") and not chosen.image:
        raise UserError("LAUNCH.image: expected a container image for Kubernetes, got none: set it (--cluster FILE)")
    if args.platform == "slurm" and not os.path.isabs(chosen.output):
        raise UserError(f"LAUNCH.output: expected an absolute path that all nodes share, got {chosen.output}: set it")
    return Job(
        name=job_name(args.config, chosen),
        flags=model_args.read(args.config),
        settings=chosen,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        extra=tuple(extra),
        preflight=not args.no_preflight,
        train=not args.preflight_only,
    )


def main(argv: list[str]) -> int:
    """Renders, and unless it is a dry run writes the script and runs its command in place of this process.

    Raises:
        UserError: bad input, or a platform whose command is not installed.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:split])
    job, platform = job_of(args, argv[split + 1 :]), PLATFORMS[args.platform]
    path = args.script or Path(f"{job.name}{platform.suffix}")
    text, command = platform.render(job), platform.submit(str(path), job)
    if args.dry_run:
        print(f"{text}# {path} is run by: {shlex.join(command)}")
        return 0
    if not shutil.which(command[0]):
        raise UserError(f"expected the command {command[0]}, got none: run it where it is installed, or --dry-run")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --script") from None
    if args.platform == HERE and job.nodes > 1:
        print(f"written: {path}; run it on each of {job.nodes} machines with NODE_RANK=0, 1, ... RDZV_HOST=MACHINE_0")
        return 0
    print(f"{path}: {shlex.join(command)}", flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    words = sys.argv[1:]
    ours = words[: words.index("--")] if "--" in words else words
    sys.exit(run_cli(lambda: main(words), debug="--debug" in ours))
