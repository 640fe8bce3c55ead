"""Checks of nodes, files and flags before hours are burnt: ``torchrun ... -m megatron_act.preflight FLAGS``.

The flags are those of `pretrain_gpt`, which runs it by ``--preflight-only``; ``python -m megatron_act.launch`` runs it
on the nodes of a job, before the training or, by the same flag, alone. All checks are run and reported, by rank 0: a
table of what passed, then a line for each failure, with what was expected, what came, and what to do. Exit code 0, or 2
where a check failed (torchrun itself then ends with 1).
"""

import argparse
import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_act import arguments, cpu_backend, preflight_software, te
from megatron_act.compat import install_typing_override
from megatron_act.errors import BAD_INPUT, OK, UserError
from megatron_act.one_line_parser import OneLineParser
from megatron_act.preflight_finding import Finding, caught, failed, merge, report

TIMEOUT = timedelta(minutes=3)


def parser() -> OneLineParser:
    """This command's own flags; all others are Megatron's."""
    parse = OneLineParser(
        prog="python -m megatron_act.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    minimum = "bus bandwidth of the slowest all-reduce, in GB/s, below which the check fails (default: 0, report only)"
    parse.add_argument("--min-bus-gbps", type=float, default=0.0, metavar="X", help=minimum)
    return parse


def main(argv: list[str]) -> int:
    """Runs and reports all checks.

    Raises:
        UserError: flags that cannot be read at all.
    """
    own, words = parser().parse_known_args(argv)
    flags, cpu = arguments.peek(words)
    findings = preflight_software.checks(cpu)
    ready = caught("Megatron", lambda: _import_megatron(cpu))
    if not ready.problem:
        ready = caught("rendezvous", lambda: _connect(cpu))
    findings.append(ready)
    if ready.problem:  # the ranks cannot talk: each says what it has found
        print(report(findings), flush=True)
        return BAD_INPUT
    try:
        return _all_ranks(findings, flags, words, cpu, own.min_bus_gbps)
    finally:
        dist.destroy_process_group()


def _all_ranks(findings: list[Finding], flags: dict[str, Any], words: list[str], cpu: bool, minimum: float) -> int:
    from megatron_act import preflight_model  # Megatron is there

    logging.getLogger("megatron").setLevel(logging.WARNING)  # its progress would hide the table
    talk = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        given = preflight_model.parse(flags, words, cpu)
        findings += preflight_model.checks(given, cpu, minimum, talk)
        findings += preflight_model.validated(flags, words, cpu)
    except UserError as error:
        findings.append(Finding("flags", "", str(error)))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        findings.append(failed("checks", "checks that run", got, "look at this rank's node first"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, findings, group=talk)
    merged = merge(gathered)
    if dist.get_rank() == 0:
        print(report(merged), flush=True)
    return BAD_INPUT if any(finding.problem for finding in merged) else OK


def _import_megatron(cpu: bool) -> str:
    install_typing_override()
    te.check_before_megatron(cpu)
    if cpu:
        cpu_backend.install()
    from megatron_act import preflight_model  # noqa: F401

    return "imports"


def _connect(cpu: bool) -> str:
    """Joins the process group of all ranks; alone, one of its own."""
    from megatron_act.command_line import stand_alone

    stand_alone()
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a hung collective raises instead of ending the process
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo" if cpu else "nccl", timeout=TIMEOUT)
    return f"{dist.get_world_size()} ranks"


def _entry() -> int:
    """One line per node for flags that cannot be read; anything unexpected keeps its traceback."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(_entry())
