"""The checks that need Megatron: its own validation, layout, groups, data, memory, disk."""

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.training.arguments import add_megatron_arguments

from megatron_act import (
    arguments,
    boards,
    command_line,
    console,
    cpu_backend,
    preflight_data,
    preflight_groups,
    preflight_layout,
    preflight_memory,
    preflight_storage,
    te,
)
from megatron_act.budget import padded_vocab_size, parameters
from megatron_act.compat import use_built_helpers
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels
from megatron_act.preflight_finding import Finding, caught, failed
from megatron_act.preflight_software import GRADIENT_FUSION

_NOT_COUNTED = ("num_experts", "multi_latent_attention", "mtp_num_layers", "hybrid_layer_pattern")


def parse(flags: dict[str, Any], argv: list[str], cpu: bool) -> Namespace:
    """Megatron's arguments as given, not validated: what the layout's checks read.

    Args:
        flags: MODEL_ARGS of ``--config``.
        argv: the words of the command line.
        cpu: adds what `cpu_backend` must tell Megatron.

    Raises:
        UserError: a flag that does not exist, or a value of the wrong type.
    """
    parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    words = arguments.config_to_argv(flags, parser, argv) + argv
    args = parser.parse_args([*cpu_backend.FLAGS, *words] if cpu else words)
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # as Megatron's parsing does
    missing = {name: value for name, value in command_line.DEFAULTS.items() if getattr(args, name) is None}
    return Namespace(**{**vars(args), **missing})


def checks(given: Namespace, cpu: bool, minimum_gbps: float, talk: "dist.ProcessGroup | None") -> list[Finding]:
    """The checks of the parsed arguments; a collective.

    Args:
        given: of `parse`.
        cpu: gloo and no GPU.
        minimum_gbps: of `preflight_groups`.
        talk: a gloo group of all ranks.
    """
    layout = preflight_layout.checks(given, dist.get_world_size())
    findings = [*layout, *implementation(given, cpu)]
    if any(finding.problem for finding in layout):
        findings.append(Finding("all-reduce", "not run: the layout does not divide"))
    else:
        findings += preflight_groups.checks(given, _device(cpu), minimum_gbps)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once a node
        findings += preflight_data.checks(given)
    return [*findings, *_folder(given, talk)]


def _device(cpu: bool) -> torch.device:
    return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())


def _folder(args: Namespace, talk: "dist.ProcessGroup | None") -> list[Finding]:
    if not args.save:
        return [Finding("--save", "not given: nothing will be saved")]
    folder = Path(args.save)
    return [
        caught("--save", functools.partial(preflight_storage.writable, folder)),
        caught("--save, shared", functools.partial(preflight_storage.shared, folder, talk)),
    ]


def implementation(args: Namespace, cpu: bool) -> list[Finding]:
    """Whether what Megatron turns on by default is installed."""
    findings = []
    if not cpu and args.transformer_impl == "transformer_engine":
        why = te.problem()
        findings.append(Finding("Transformer Engine", "loads", f"{why}, or --transformer-impl local" if why else ""))
    name = "gradient accumulation fusion"
    if args.gradient_accumulation_fusion and not importlib.util.find_spec(GRADIENT_FUSION):
        remedy = "add --no-gradient-accumulation-fusion, or build NVIDIA apex with its CUDA extensions"
        return [*findings, failed(name, f"apex's {GRADIENT_FUSION}", "none", remedy)]
    return [*findings, Finding(name, "on" if args.gradient_accumulation_fusion else "off")]


def validated(flags: dict[str, Any], argv: list[str], cpu: bool) -> list[Finding]:
    """Whether Megatron and this project take the flags; and if they do, what the model needs of memory and disk."""
    use_built_helpers()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            command_line.parse(flags, argv)  # what the training does first; it may mend what --load names, and says so
            sys.argv += boards.OFF  # a board would show the preflight as a run
            args = command_line.validate()
    except UserError as error:
        return [Finding("flags", "", str(error))]
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        return [failed("flags", "flags that Megatron accepts", got, "correct what it names")]
    finally:
        for line in filter(console.shown, said.getvalue().splitlines()):
            print(line, flush=True)
    return [Finding("flags", "accepted by Megatron and megatron-act"), *_sizes(args, cpu)]


def _sizes(args: Namespace, cpu: bool) -> list[Finding]:
    """Memory and disk of dense models, which the counts cover."""
    rows = _rows(args)
    missing = [name for name in _NOT_COUNTED if getattr(args, name)] + ([] if rows else ["no --padded-vocab-size"])
    if missing:
        return [Finding("memory", f"not estimated: {', '.join(missing)}")]
    shape = preflight_memory.shape_of(args, rows, _scalars(args))
    estimate = preflight_memory.estimate(args, shape, args.data_parallel_size)
    findings = [preflight_memory.checked(str(estimate), estimate.total, _memory(cpu))]
    if args.save and dist.get_rank() == 0:
        findings.append(caught("disk", functools.partial(preflight_storage.room, args, parameters(shape).total)))
    return findings


def _rows(args: Namespace) -> int:
    """Rows of the embedding."""
    tensor = args.tensor_model_parallel_size
    return args.padded_vocab_size or padded_vocab_size(args.vocab_size or 0, args.make_vocab_size_divisible_by, tensor)


def _scalars(args: Namespace) -> int:
    return len(kernels.get(args.activation).params) if args.activation else 0


def _memory(cpu: bool) -> int:
    """Bytes of this rank's GPU, or its share of this machine's memory."""
    if cpu:
        return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
