"""Solves the compute match: which MLP width gives an activation the parameters and FLOPs of a baseline model.

    python tools/compute_match.py --hidden-size 1536 --num-layers 24 --num-attention-heads 16 --vocab-size 147456 \
        --baseline swiglu --baseline-ffn-hidden-size 6144 --activation xielu relu2
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act import model_args
from megatron_act.budget import Shape
from megatron_act.errors import UserError, run_cli
from megatron_act.match import Match, check_activation, solve
from megatron_act.memory import state_bytes_per_gpu

DESCRIPTION = """\
Finds the --ffn-hidden-size at which an activation has the matmul parameters and FLOPs of a baseline, and counts both.
The baseline comes from flags, from a config of this project (--config) or from a Hugging Face config.json
(--hf-config); flags given besides a file win over it. FLOPs are matmul FLOPs per token of forward and backward;
attention counts half of the square (causal) as Megatron's log does, and the full square where the name says so."""
# Without a file: the papers' models. A --config keeps Megatron's own defaults instead.
DEFAULTS = {"--normalization": "RMSNorm", "--disable-bias-linear": True, "--position-embedding-type": "rope"}
TENSOR_PARALLEL, PIPELINE_PARALLEL = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
SIZES = {
    "--hidden-size": "features of the residual stream",
    "--num-layers": "transformer layers",
    "--num-attention-heads": "query heads",
    "--num-query-groups": "key/value heads (default: one per query head)",
    "--kv-channels": "features per head (default: hidden size / heads)",
    "--seq-length": f"tokens per sequence (default: {Shape.seq_length})",
    "--vocab-size": "vocabulary, padded as Megatron does; without it embeddings and logits are not counted",
    "--make-vocab-size-divisible-by": "multiple of the padded vocabulary (default: 128)",
}
SWITCHES = {
    "--untie-embeddings-and-output-weights": "separate output layer (default: tied)",
    "--qk-layernorm": "norms of queries and keys",
    "--add-qkv-bias": "biases in linear_qkv",
}
MODEL_FLAGS = (*SIZES, *SWITCHES, "--normalization", TENSOR_PARALLEL, PIPELINE_PARALLEL)
GIB = 1 << 30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line; names of model flags are Megatron's. Its errors are `UserError`."""
    parser = _Parser(description=DESCRIPTION, allow_abbrev=False)
    _add_match_flags(parser.add_argument_group("match"))
    _add_model_flags(parser.add_argument_group("model (Megatron's flags)"))
    _add_layout_flags(parser.add_argument_group("hardware and layout"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_match_flags(group: Any) -> None:
    group.add_argument(
        "--activation", nargs="+", required=True, metavar="NAME", help="activations to match, e.g. xielu"
    )
    group.add_argument("--baseline", metavar="NAME", help="activation of the baseline, e.g. swiglu")
    group.add_argument("--baseline-ffn-hidden-size", type=int, metavar="F", help="MLP width of the baseline")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help="baseline from a YAML in MODEL_ARGS form (configs/)")
    source.add_argument("--hf-config", metavar="FILE", help="baseline from a Hugging Face config.json or its folder")
    group.add_argument("--baseline-tokens", type=int, metavar="N", help="also give the tokens of equal total FLOPs")


def _add_model_flags(group: Any) -> None:
    for flag, meaning in SIZES.items():
        group.add_argument(flag, type=int, metavar="N", help=meaning)
    for flag, meaning in SWITCHES.items():
        group.add_argument(flag, action="store_true", default=None, help=meaning)
    group.add_argument("--normalization", choices=("RMSNorm", "LayerNorm"), help="default: RMSNorm")


def _add_layout_flags(group: Any) -> None:
    for flag, letter in (("--tensor-model-parallel-size", "T"), ("--pipeline-model-parallel-size", "P")):
        group.add_argument(flag, type=int, metavar=letter, help="default: the config's, else 1")
    group.add_argument("--data-parallel-size", type=int, default=1, metavar="D", help="default: 1")
    meaning = "what must divide the width on each of the T ranks: 16 for FP8, 32 for MXFP8, 128 for speed (default: 1)"
    group.add_argument("--align", type=int, default=1, metavar="N", help=meaning)


def _add_output_flags(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="print JSON: an object, or a list for several activations")
    help_output = "write the matched model as a config; {activation} in the name is replaced"
    group.add_argument("--output", metavar="FILE", help=help_output)
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def registered_scalars() -> dict[str, int]:
    """Trainable scalars per layer of every activation in the kernels' registry."""
    from megatron_act.kernels import api  # here, not above: it loads torch, which --help can do without

    return {name: len(api.get(name).params) for name in api.names()}


def baseline_flags(args: argparse.Namespace) -> model_args.Flags:
    """The baseline as Megatron flags: from the file, if any, with the flags of the command line on top."""
    if args.config:
        flags = model_args.read(args.config)
    elif args.hf_config:
        flags = model_args.from_hf(args.hf_config)
    else:
        flags = dict(DEFAULTS)
        if args.baseline is None or args.baseline_ffn_hidden_size is None:
            raise UserError("expected --baseline and --baseline-ffn-hidden-size, or --config, or --hf-config; got none")
    given = _given_model_flags(args)
    if "--vocab-size" in given:
        flags.pop("--padded-vocab-size", None)
    return {**flags, **given}


def baseline_shape(args: argparse.Namespace, flags: model_args.Flags, scalars: dict[str, int]) -> Shape:
    """The baseline's shape; --baseline and --baseline-ffn-hidden-size win over the file."""
    name = args.baseline or model_args.activation(flags)
    check_activation(name, scalars)
    plain = {flag: value for flag, value in flags.items() if flag not in model_args.ACTIVATION_FLAGS}
    if args.baseline_ffn_hidden_size is not None:
        plain["--ffn-hidden-size"] = args.baseline_ffn_hidden_size
    return model_args.shape({**plain, "--activation": name}, scalars)


def full_report(match: Match, flags: model_args.Flags, args: argparse.Namespace) -> dict[str, Any]:
    """The match's figures with those that depend on the layout and on --baseline-tokens."""
    layout = {
        "tensor_parallel": model_args.integer(flags, TENSOR_PARALLEL, 1),
        "pipeline_parallel": model_args.integer(flags, PIPELINE_PARALLEL, 1),
        "data_parallel": args.data_parallel_size,
    }
    report = match.report()
    report["state_bytes_per_gpu"] = state_bytes_per_gpu(match.target, **layout)
    report["baseline_state_bytes_per_gpu"] = state_bytes_per_gpu(match.baseline, **layout)
    if args.baseline_tokens is not None:
        report["baseline_tokens"] = args.baseline_tokens
        report["tokens_for_equal_flops"] = match.tokens_for_equal_flops(args.baseline_tokens)
    return report


def table(reports: list[dict[str, Any]]) -> str:
    """The reports as aligned text: one column for the baseline, one per activation."""
    columns = [_column(reports[0], "baseline_"), *(_column(report, "") for report in reports)]
    labels = list(columns[-1])
    cells = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _column(report: dict[str, Any], prefix: str) -> dict[str, str]:
    def number(key: str) -> str:
        return f"{report[prefix + key]:,}"

    parts = report[prefix + "flops_per_token_forward"]
    column = {
        "": report[prefix + "activation"] + (" (baseline)" if prefix else ""),
        "ffn_hidden_size": number("ffn_hidden_size"),
        "parameters": number("parameters"),
        "  without embeddings": number("parameters_without_embeddings"),
        "  in matmuls": number("matmul_parameters"),
        "  activation scalars": number("activation_scalars"),
        "FLOPs per token, forward + backward": number("flops_per_token"),
        "  with full attention": number("flops_per_token_full_attention"),
        **{f"  forward: {name.replace('_', ' ')}": f"{value:,}" for name, value in parts.items()},
        "activation bytes per token and layer": number("activation_bytes_per_token_per_layer"),
        "  activation recomputed": number("activation_bytes_per_token_per_layer_recompute"),
        "weights, gradients, Adam: GiB per GPU": f"{report[prefix + 'state_bytes_per_gpu'] / GIB:.2f}",
    }
    if "baseline_tokens" in report:
        column["tokens of equal total FLOPs"] = number("tokens" if prefix else "tokens_for_equal_flops")
    if not prefix:
        column["residual of matmul parameters"] = _residual(report, "residual_parameters_percent")
        column["residual of FLOPs per token"] = _residual(report, "residual_flops_percent")
    return column


def _residual(report: dict[str, Any], key: str) -> str:
    return "exact" if report["exact"] else f"{report[key]:+.4f} %"


def _given_model_flags(args: argparse.Namespace) -> model_args.Flags:
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if value is not None}
    given = {flag: values[flag] for flag in MODEL_FLAGS if flag in values}
    if "--num-query-groups" in given:
        given["--group-query-attention"] = True
    return given


def output_paths(args: argparse.Namespace) -> dict[str, Path]:
    """Where each activation's config goes.

    Raises:
        UserError: several activations and no {activation} in --output.
    """
    if not args.output:
        return {}
    if len(args.activation) > 1 and "{activation}" not in args.output:
        raise UserError(f"--output: expected {{activation}} in the name for several activations, got {args.output}")
    return {name: Path(args.output.replace("{activation}", name)) for name in args.activation}


def run(args: argparse.Namespace) -> None:
    """Solves everything, then writes the configs, then prints: bad input leaves nothing behind."""
    paths = output_paths(args)
    flags = baseline_flags(args)
    scalars = registered_scalars()
    baseline = baseline_shape(args, flags, scalars)
    layout = {"tensor_parallel": model_args.integer(flags, TENSOR_PARALLEL, 1), "align": args.align}
    matches = {name: solve(baseline, name, scalars, **layout) for name in dict.fromkeys(args.activation)}
    reports = [full_report(match, flags, args) for match in matches.values()]
    configs = {name: _config(flags, matches[name]) for name in paths}
    for name, path in paths.items():
        model_args.write(path, configs[name], _header(matches[name]))
    if args.json:
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        print(table(reports))
        if not baseline.vocab_size:
            print("without --vocab-size: embeddings and logits are not counted")


def _config(flags: model_args.Flags, match: Match) -> model_args.Flags:
    """The matched model's flags; the width last, as it is what was solved for."""
    config = model_args.with_mlp(flags, match.target.activation, match.target.ffn_hidden_size)
    config.setdefault("--seq-length", match.target.seq_length)
    config.setdefault("--max-position-embeddings", config["--seq-length"])
    return config


def _header(match: Match) -> str:
    baseline = f"{match.baseline.activation} with ffn_hidden_size {match.baseline.ffn_hidden_size}"
    quality = "exactly" if match.exact else f"to {match.residual_parameters_percent:+.4f} % of the matmul parameters"
    return f"Matched {quality} to {baseline}; written by tools/compute_match.py."


def main() -> int:
    """Entry point; exit code 0, 1 (failure) or 2 (bad input)."""
    return run_cli(lambda: run(build_parser().parse_args()), debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
