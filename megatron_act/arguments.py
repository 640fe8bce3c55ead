"""The command line: Megatron's flags, the few of this project, and a YAML of either.

``--config FILE`` holds flags in Megatron's MODEL_ARGS form::

    MODEL_ARGS:
      --num-layers: 4
      --qk-layernorm: true      # a switch; false leaves it out
      --activation: xielu

It becomes part of the command line before Megatron parses it; a flag given on the command line wins.
"""

import argparse
import difflib
import functools
from typing import Any, NoReturn

from megatron_act import model_args
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

ConfigValue = Any


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds this project's flags to Megatron's parser (an ``extra_args_provider``); its errors become one line."""
    group = parser.add_argument_group("megatron-act")
    group.add_argument("--config", metavar="FILE", help="YAML with MODEL_ARGS: {--flag: value}; the command line wins")
    group.add_argument("--activation", metavar="NAME", help=f"activation of every MLP: {', '.join(kernels.names())}")
    group.add_argument(
        "--activation-init",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="effective initial values of the scalars, e.g. alpha_p=0.8 (default: the papers')",
    )
    group.add_argument(
        "--activation-backend",
        choices=["auto", "triton", "reference"],
        default="auto",
        help="auto: Triton kernels on a GPU, torch on a CPU",
    )
    group.add_argument(
        "--activation-per-expert",
        action="store_true",
        help="mixture of experts: scalars for each routed expert, not one set per layer",
    )
    group.add_argument(
        "--activation-init-missing",
        action="store_true",
        help="load a checkpoint of another activation; the scalars that it lacks take their initial values",
    )
    group.add_argument(
        "--recompute-activation-function",
        action="store_true",
        help="keep the pre-activation only; the backward pass computes the activation again",
    )
    _add_fp8(group)
    group.add_argument("--cpu", action="store_true", help="train on the CPU with gloo (development and tests)")
    group.add_argument("--metrics-jsonl", metavar="FILE", help="write loss, scalars and speed of each logged step here")
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="dense TFLOP/s of one GPU, for MFU (default: known for A100, H100, H200, B200 and GB200 in bf16)",
    )
    _add_logs(group)
    _add_faults(group)
    parser.error = functools.partial(_one_line_error, parser)  # type: ignore[method-assign]
    parser.formatter_class = _Help
    return parser


def _add_logs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-dir",
        metavar="DIR",
        help="folder of Megatron's own output, a file a rank (default: SAVE/logs; without --save: the console)",
    )
    group.add_argument("--megatron-log", action="store_true", help="leave Megatron's own output on the console")
    group.add_argument("--preflight-only", action="store_true", help="run the checks of megatron_act.preflight and end")


def _add_faults(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hang-timeout-seconds",
        type=float,
        metavar="N",
        help="end a rank that makes no progress for so long, with its stacks in a file (default: not watched)",
    )
    group.add_argument(
        "--keep-last-checkpoints", type=int, metavar="K", help="remove older ones after each save (default: keep all)"
    )
    group.add_argument(
        "--save-interval-minutes",
        type=float,
        metavar="N",
        help="save by the clock too, or, without --save-interval, only",
    )
    group.add_argument(
        "--export-best", metavar="DIR", help="keep the checkpoint of the lowest validation loss there, for transformers"
    )
    group.add_argument(
        "--no-exit-signal-handler",
        action="store_false",
        dest="exit_signal_handler",
        default=argparse.SUPPRESS,  # Megatron's own flag has the default
        help="die by SIGTERM at once, as Megatron does by default; here a run saves and ends with 0",
    )


def _add_fp8(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--activation-fp8-output",
        action="store_true",
        help="with --fp8-format: the activation writes fc2's input in FP8 (Transformer Engine 2.20, plain MLPs)",
    )
    group.add_argument(
        "--activation-fp8-grad",
        action="store_true",
        help="with --fp8-format: the backward pass writes the gradient that fc1 reads in FP8 (not tensorwise)",
    )
    group.add_argument(
        "--activation-fp8-input-store",
        action="store_true",
        help="keep the pre-activation in FP8 for the backward pass: half the memory, gradients within FP8's error",
    )
    group.add_argument(
        "--dataloader",
        choices=["megatron", "dali"],
        default="megatron",
        help="dali: NVIDIA DALI (pip install nvidia-dali-cuda130) reads the same samples in the same order",
    )


class _Help(argparse.HelpFormatter):
    """Prints help texts with a bare % sign as they are: Megatron has some, and argparse takes it for a format."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def _one_line_error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    unknown = message.removeprefix("unrecognized arguments: ") if message.startswith("unrecognized") else ""
    flags = [word for word in unknown.split() if word.startswith("--")]
    hints = [_nearest(flag, parser._option_string_actions) for flag in flags]
    raise UserError(f"{message}{''.join(hints)} (see --help)")


def _nearest(flag: str, known: Any) -> str:
    close = difflib.get_close_matches(flag.split("=")[0], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_init(pairs: list[str]) -> dict[str, float]:
    """``["alpha_p=0.8"]`` to ``{"alpha_p": 0.8}``.

    Raises:
        UserError: an entry that is not KEY=NUMBER.
    """
    init = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            init[key] = float(value)
        except ValueError:
            raise UserError(f"--activation-init: expected KEY=NUMBER, got {pair!r}: write e.g. alpha_p=0.8") from None
    return init


def config_to_argv(flags: dict[str, ConfigValue], parser: argparse.ArgumentParser, given: list[str]) -> list[str]:
    """Turns MODEL_ARGS into command-line words, leaving out flags that the command line gives itself.

    Args:
        flags: flag to value; a list for flags with several values, a boolean for switches.
        parser: Megatron's parser with this project's flags.
        given: the words of the command line.

    Raises:
        UserError: a flag that the parser does not know (names the nearest), or a switch with another value.
    """
    actions = parser._option_string_actions
    present = {actions[word.split("=")[0]].dest for word in given if word.split("=")[0] in actions}
    words: list[str] = []
    for flag, value in flags.items():
        if flag not in actions:
            raise UserError(f"--config: expected a Megatron flag, got {flag}{_nearest(flag, actions)}")
        action = actions[flag]
        if action.dest in present:
            continue
        words += _words(flag, value, action)
    return words


def _words(flag: str, value: ConfigValue, action: argparse.Action) -> list[str]:
    if action.nargs != 0:
        return model_args.to_words({flag: value})
    if not isinstance(value, bool):
        raise UserError(f"--config: expected true or false for the switch {flag}, got {value!r}")
    negatives = [word for word in action.option_strings if word.startswith("--no-")]
    if not value and isinstance(action, argparse.BooleanOptionalAction):
        return negatives
    return [flag] if value else []


def peek(argv: list[str]) -> tuple[dict[str, ConfigValue], bool]:
    """What must be known before Megatron is imported: the config's flags, and whether ``--cpu`` is among all flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--cpu", action="store_true")
    parser.error = functools.partial(_one_line_error, parser)  # type: ignore[method-assign]
    known, _ = parser.parse_known_args(argv)
    flags = model_args.read(known.config) if known.config else {}
    return flags, known.cpu or flags.get("--cpu") is True
