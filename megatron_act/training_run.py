"""From command-line words to ``megatron.training.pretrain``: check files, place the activation, train."""

import os
import sys
import time
from argparse import Namespace
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_tokenizer, inprocess_restart, pretrain, print_rank_0, set_startup_timestamps
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

from megatron_act import (
    arguments,
    command_line,
    console,
    experts,
    finalize,
    gpt_data,
    interruption,
    mtp,
    nan_guard,
    norms,
    optimizer_resharding,
    restore,
    saves,
    specs,
    telemetry,
    watchdog,
)
from megatron_act.activation import activations_of
from megatron_act.checkpoint import restricted
from megatron_act.checkpoint.experts import check_experts
from megatron_act.checkpoint.optimizer import check_optimizer
from megatron_act.checkpoint.reader import chosen
from megatron_act.compat import use_built_helpers
from megatron_act.fp8_options import Fp8Options
from megatron_act.gpt_step import forward_step


def run(flags: dict[str, Any], argv: list[str], program_start: float) -> None:
    """Trains.

    Args:
        flags: MODEL_ARGS of ``--config``, empty without one.
        argv: the command line's words.
        program_start: ``time.time()`` when the program started.

    Raises:
        UserError: whatever the user can correct in flags or files.
    """
    command_line.stand_alone()
    use_built_helpers()
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    args = command_line.parse(flags, argv)
    with console.split(args, int(os.environ["RANK"]), sys.argv):
        _train(command_line.validate())


def _train(args: Namespace) -> None:
    _check_files(args)
    loading = restore.check(args)
    model_config = gpt_config_from_args(args)
    model_config.rope_scaling_factor = args.rope_scaling_factor  # which gpt_config_from_args leaves at 8
    model_config.post_wrap_hooks += loading
    optimizer_resharding.install()
    restricted.install()
    restore.install()
    if args.activation:
        init = arguments.parse_init(args.activation_init)
        model_config.transformer_layer_spec = specs.layer_spec(
            args.activation,
            init=init,
            backend=args.activation_backend,
            recompute=args.recompute_activation_function,
            fp8=Fp8Options.of(args),
            per_expert=args.activation_per_expert,
        )
        model_config.post_wrap_hooks += [mtp.number_layers, _announce, finalize.install]
    elif args.spec is None:
        mtp.install()
        model_config.transformer_layer_spec = norms.stock_spec
    telemetry.install(args, model_config)
    interruption.install()
    saves.install(args)
    guard = nan_guard.NanGuard(args, sys.argv)
    restartable, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    restartable(
        pretrain_cfg_container_from_args(args, model_config),
        guard.provider(gpt_data.datasets_provider),
        ModelType.encoder_or_decoder,
        watchdog.install(args, guard.forward_step(forward_step)),
        store=store,
    )


def _check_files(args: Namespace) -> None:
    """Refuses wrong data and checkpoints; one process per host, or one in all, looks: torchrun ends the others."""
    if args.rank % max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) == 0:
        gpt_data.check_data(args, get_tokenizer().vocab_size)
    if args.load and args.rank == 0:
        folder = chosen(args.load, args.ckpt_step)
        check_experts(folder, args)
        check_optimizer(folder, args)


def _announce(models: list[Any]) -> list[Any]:
    """Counts the activations that were really built: a spec that got lost would train Megatron's GELU in silence."""
    found = activations_of(models)
    layers = [module for chunk in models for module in chunk.modules() if isinstance(module, TransformerLayer)]
    bare = [layer.layer_number for layer in layers if not experts.is_activated(layer)]
    if bare:
        raise RuntimeError(f"expected trainable activations in all MLPs of each layer, found others in layers {bare}")
    if found:
        sets = f" ({len(found)} sets of scalars)" if len(found) != len(layers) else ""
        print_rank_0(f"> megatron-act: {found[0].activation.name} in {len(layers)} layers of this rank{sets}")
    return models
