"""The command line of a training: words to Megatron's arguments; what cannot work is refused before anything starts."""

import argparse
import os
import socket
import sys
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support
from megatron.training import print_rank_0
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

from megatron_act import (
    arguments,
    boards,
    console,
    cpu_backend,
    experts,
    fallback_load,
    graphs,
    interruption,
    recompute,
    restore,
    saves,
    te,
    throughput,
)
from megatron_act.activation import raw_initial_values
from megatron_act.checkpoint.tracker import repair_tracker
from megatron_act.data import dali
from megatron_act.errors import UserError
from megatron_act.fp8_options import Fp8Options
from megatron_act.kernels import api as kernels

# Megatron-LM's own entry serves these; it takes our activations through --spec.
_ELSEWHERE = ("sft", "fim_data", "dataloader_inter_document_masking", "hybrid_context_parallel", "logits_load_dir")


DEFAULTS = {"tokenizer_type": "HuggingFaceTokenizer"}  # of Megatron's flags that have none
EVALUATION = (
    "--eval-interval",
    "1000",
)  # the same; Megatron divides by it, and warns where one of DEFAULTS is not kept


def stand_alone() -> None:
    """Without torchrun, one process is a world of its own."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def parse(flags: dict[str, Any], argv: list[str]) -> Namespace:
    """The arguments as parsed; ``sys.argv`` becomes the whole command line, as Megatron reads it.

    Args:
        flags: MODEL_ARGS of ``--config``, empty without one.
        argv: the command line's words.

    Raises:
        UserError: whatever the user can correct in flags or files.
    """
    parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    words = arguments.config_to_argv(flags, parser, argv) + argv
    if "--cpu" in words:
        words = [*cpu_backend.FLAGS, *words]
    words = [*interruption.FLAGS, *EVALUATION, *saves.words_of(parser.parse_args(words)), *words]
    sys.argv = [sys.argv[0], *words]
    args = parser.parse_args(words)
    for said in (args.load and repair_tracker(args.load), fallback_load.ensure_readable(args)):
        if said:
            print(f"> megatron-act: {said}", flush=True)  # by the rank that came first
    if restored := restore.flags_of(args, parser, words):
        words = [*restored, *words]
        sys.argv, args = [sys.argv[0], *words], parser.parse_args(words)
        print_rank_0(f"> megatron-act: from the checkpoint's arguments: {' '.join(restored)}")
    if not torch.cuda.is_available() and "--cpu" not in words:
        raise UserError("expected a CUDA device, got none: add --cpu to train on the CPU (development and tests)")
    check_arguments(args)
    if note := te.notice(args):
        print_rank_0(f"> megatron-act: {note}")
    if "--cpu" in words and os.environ.get("RANK", "0") == "0":
        print(cpu_backend.NOTICE, flush=True)
    return args


def validate() -> Namespace:
    """Megatron's validated arguments of the command line that `parse` has left in ``sys.argv``.

    Raises:
        UserError: what Megatron refuses.
    """
    try:
        return parse_and_validate_args(arguments.add_arguments, args_defaults=DEFAULTS)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses the flags: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An exception's message, or where it has none the line of Megatron's code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(str(error).split()) or f"{last.line} ({Path(last.filename).name}:{last.lineno})"


def check_arguments(args: Namespace) -> None:
    """Refuses combinations that cannot work, before any process group exists.

    Args:
        args: parsed, not yet validated by Megatron.

    Raises:
        UserError: naming the flag to change.
    """
    for name in _ELSEWHERE:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag}: not served here: use Megatron-LM's pretrain_gpt.py with --spec megatron_act.specs NAME"
            )
    _check_tokenizer(args)
    _check_async(args)
    for part in (saves, throughput, dali, console, boards):
        if why := part.conflict(args):
            raise UserError(why)
    if args.activation is None:
        _check_without_activation(args)
    else:
        _check_activation(args)
    if why := te.conflict(args):  # last: flags that exclude each other are the user's to mend anywhere
        raise UserError(why)


def _check_activation(args: Namespace) -> None:
    try:
        kernels.get(args.activation)
        raw_initial_values(args.activation, arguments.parse_init(args.activation_init))
    except ValueError as error:
        raise UserError(f"--activation: {error}") from None
    _check_layout(args)


def _check_tokenizer(args: Namespace) -> None:
    model = args.tokenizer_model
    is_path = bool(model) and model.startswith(("/", ".", "~"))  # else it may be a name on a hub
    if is_path and not Path(model).expanduser().exists():
        raise UserError(f"--tokenizer-model: expected a file or folder, got {model}, which does not exist")


def _check_async(args: Namespace) -> None:
    """Megatron looks for the package at the first save, when the steps before it are lost."""
    if args.async_save and args.async_strategy == "nvrx" and not has_nvrx_async_support():
        raise UserError(
            "--async-save: expected the package nvidia-resiliency-ext for --async-strategy nvrx, got none: install it "
            "or add --async-strategy mcore"
        )


def _check_without_activation(args: Namespace) -> None:
    flags = {recompute.FLAG: args.recompute_activation_function, restore.FLAG: args.activation_init_missing}
    for flag in (*(flag for flag, given in flags.items() if given), *Fp8Options.of(args).flags):
        raise UserError(f"{flag}: expected --activation NAME with it, got none: add it or remove the flag")


def _check_layout(args: Namespace) -> None:
    gated = "remove it and set --ffn-hidden-size to 1.5x the gated one (tools/compute_match.py)"
    problems = (
        (args.swiglu, f"--swiglu is a gated MLP, --activation {args.activation} is not: {gated}"),
        (args.quick_geglu, f"--quick-geglu is a gated MLP, --activation {args.activation} is not: {gated}"),
        (args.squared_relu, "--squared-relu and --activation name two activations: remove one"),
        (args.spec is not None, "--spec and --activation both choose the layers: remove one"),
        (
            args.use_megatron_fsdp,
            "--use-megatron-fsdp: its sharding of the scalars is untested, hence refused: remove it",
        ),
        (args.use_torch_fsdp2, "--use-torch-fsdp2: it shards parameters of one dtype, the scalars are fp32: remove it"),
        (
            args.transformer_impl == "inference_optimized",
            "--transformer-impl inference_optimized: its experts compute Megatron's own activations, the others are "
            "untested: use transformer_engine or local, which generate too",
        ),
        (args.fp4, "--fp4-format: expected bf16 or --fp8-format, got NVFP4, which is planned and not built: remove it"),
        (args.use_te_activation_func, "--use-te-activation-func and --activation name two activations: remove one"),
    )
    for present, message in problems:
        if present:
            raise UserError(message)
    if why := experts.conflict(args) or graphs.conflict(args):
        raise UserError(why)
    fp8 = Fp8Options.of(args)
    if why := (args.recompute_activation_function and recompute.conflict(args, fp8)) or fp8.conflict(args):
        raise UserError(why)
    ffn, tp = args.ffn_hidden_size, args.tensor_model_parallel_size
    if ffn is not None and ffn % tp:
        raise UserError(f"--ffn-hidden-size: expected a multiple of --tensor-model-parallel-size {tp}, got {ffn}")
