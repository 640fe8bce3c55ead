"""Solves the compute match: which MLP width gives an activation the parameters and FLOPs of a baseline model.

python tools/compute_match.py --model paper-1.1b --activation xielu relu2
python tools/compute_match.py --hf-config DIR --activation xielu --align 16 --tensor-model-parallel-size 4
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act import config_files, hf_args, model_args
from megatron_act.budget import Shape
from megatron_act.errors import UserError, run_cli
from megatron_act.layout_memory import Layout, state_bytes
from megatron_act.match import FREE, Match, check_activation, solve
from megatron_act.match_table import table
from megatron_act.one_line_parser import OneLineParser

DESCRIPTION = """\
Finds the --ffn-hidden-size at which an activation has the matmul parameters and FLOPs of a baseline, and counts both.
The baseline comes from a model of configs/ (--model), from another file of that form (--config), from a Hugging Face
config.json (--hf-config), or from flags; flags given besides a file win over it. FLOPs are matmul FLOPs per token, the
backward pass twice the forward; attention counts half of the square (causal) as Megatron's log does, and the full
square, as torch's FLOP counter does, where the name says so."""
# Without a file: the papers' models. A file keeps Megatron's own defaults instead.
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
SOURCES = "--model, --config, --hf-config, or --baseline and --baseline-ffn-hidden-size"
MARK = "compute_match:"  # begins the comment line that is ours in a written config; the others are the source's


def build_parser() -> OneLineParser:
    """The command line; names of model flags are Megatron's. Its errors are `UserError`."""
    parser = OneLineParser(description=DESCRIPTION, allow_abbrev=False)
    _add_baseline_flags(parser.add_argument_group("baseline"))
    _add_match_flags(parser.add_argument_group("match"))
    _add_model_flags(parser.add_argument_group("model (Megatron's flags)"))
    _add_layout_flags(parser.add_argument_group("hardware and layout"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_baseline_flags(group: Any) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="NAME", help=f"a model of configs/: {', '.join(config_files.names())}")
    source.add_argument("--config", metavar="FILE", help="a YAML in MODEL_ARGS form, as those in configs/")
    source.add_argument("--hf-config", metavar="FILE", help="a Hugging Face config.json or its folder")
    group.add_argument("--baseline", metavar="NAME", help="activation of the baseline (default: the file's)")
    group.add_argument("--baseline-ffn-hidden-size", type=int, metavar="F", help="MLP width of the baseline")
    tokens = "tokens that the baseline trains on (default: what the file's schedule says)"
    group.add_argument("--baseline-tokens", type=int, metavar="N", help=tokens)


def _add_match_flags(group: Any) -> None:
    names = "activations to match, e.g. xielu"
    group.add_argument("--activation", nargs="+", required=True, metavar="NAME", help=names)
    free = [name.replace("_", "-") for name in FREE]
    group.add_argument("--solve-for", choices=free, default=free[0], help="the size that is found (default: the width)")
    for name in free:
        group.add_argument(f"--target-{name}", type=int, metavar="N", help="in the matched model (default: baseline's)")


def _add_model_flags(group: Any) -> None:
    for flag, meaning in SIZES.items():
        group.add_argument(flag, type=int, metavar="N", help=meaning)
    for flag, meaning in SWITCHES.items():
        group.add_argument(flag, action="store_true", default=None, help=meaning)
    group.add_argument("--normalization", choices=("RMSNorm", "LayerNorm"), help="default: RMSNorm")


def _add_layout_flags(group: Any) -> None:
    for flag, letter in ((TENSOR_PARALLEL, "T"), (PIPELINE_PARALLEL, "P")):
        group.add_argument(flag, type=int, metavar=letter, help="default: the file's, else 1")
    group.add_argument("--data-parallel-size", type=int, default=1, metavar="D", help="default: 1")
    plain = "Adam's state on every data-parallel rank, not shared out (default: the distributed optimizer)"
    group.add_argument("--no-distributed-optimizer", action="store_true", help=plain)
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


def source_file(args: argparse.Namespace) -> Path | None:
    """The YAML that the baseline comes from, if any."""
    if args.model:
        return config_files.named(args.model)
    return Path(args.config) if args.config else None


def baseline_flags(args: argparse.Namespace) -> model_args.Flags:
    """The baseline as Megatron flags: from the file, if any, with the flags of the command line on top."""
    if file := source_file(args):
        flags = model_args.read(file)
    elif args.hf_config:
        flags = hf_args.from_hf(args.hf_config)
    else:
        flags = dict(DEFAULTS)
        if args.baseline is None or args.baseline_ffn_hidden_size is None:
            raise UserError(f"expected a baseline, got none: give {SOURCES}")
    given = _given_model_flags(args)
    if "--vocab-size" in given:
        flags.pop("--padded-vocab-size", None)
    return {**flags, **given}


def _given_model_flags(args: argparse.Namespace) -> model_args.Flags:
    values = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if value is not None}
    given = {flag: values[flag] for flag in MODEL_FLAGS if flag in values}
    if "--num-query-groups" in given:
        given["--group-query-attention"] = True
    return given


def baseline_shape(args: argparse.Namespace, flags: model_args.Flags, scalars: dict[str, int]) -> Shape:
    """The baseline's shape; --baseline and --baseline-ffn-hidden-size win over the file."""
    name = args.baseline or model_args.activation(flags)
    check_activation(name, scalars)
    plain = {flag: value for flag, value in flags.items() if flag not in model_args.ACTIVATION_FLAGS}
    if args.baseline_ffn_hidden_size is not None:
        plain["--ffn-hidden-size"] = args.baseline_ffn_hidden_size
    return model_args.shape({**plain, "--activation": name}, scalars)


def layout_of(args: argparse.Namespace, flags: model_args.Flags) -> Layout:
    """The layout whose memory is counted."""
    return Layout(
        tensor_parallel=model_args.integer(flags, TENSOR_PARALLEL, 1),
        pipeline_parallel=model_args.integer(flags, PIPELINE_PARALLEL, 1),
        data_parallel=args.data_parallel_size,
        distributed_optimizer=not args.no_distributed_optimizer,
    )


def solved(args: argparse.Namespace, baseline: Shape, layout: Layout, scalars: dict[str, int]) -> dict[str, Match]:
    """The match of every activation asked for.

    Raises:
        UserError: a size both given and solved for, or what `solve` refuses.
    """
    free = args.solve_for.replace("-", "_")
    fixed = {name: size for name in FREE if (size := getattr(args, f"target_{name}")) is not None}
    if free in fixed:
        raise UserError(f"--target-{args.solve_for}: expected another --solve-for, got {args.solve_for}: remove one")
    options: dict[str, Any] = {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "align": args.align,
        "free": free,
        "fixed": fixed,
    }
    return {name: solve(baseline, name, scalars, **options) for name in dict.fromkeys(args.activation)}


def full_report(match: Match, layout: Layout, baseline_tokens: int | None) -> dict[str, Any]:
    """The match's figures with those that depend on the layout and on the tokens."""
    report = match.report()
    report["layout"] = str(layout)
    for prefix, shape in (("", match.target), ("baseline_", match.baseline)):
        state = state_bytes(shape, layout)
        report[f"{prefix}state_bytes_per_gpu"] = {**dataclasses.asdict(state), "total": state.total}
    if baseline_tokens is not None:
        report["baseline_tokens"] = baseline_tokens
        report["tokens_for_equal_flops"] = match.tokens_for_equal_flops(baseline_tokens)
    return report


def scheduled_tokens(flags: model_args.Flags) -> int | None:
    """Tokens that the flags' schedule trains on; None where they leave it open."""
    sizes = [model_args.integer(flags, flag, 0) for flag in ("--train-iters", "--global-batch-size", "--seq-length")]
    return sizes[0] * sizes[1] * sizes[2] or None


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
    baseline, layout = baseline_shape(args, flags, scalars), layout_of(args, flags)
    matches = solved(args, baseline, layout, scalars)
    tokens = scheduled_tokens(flags) if args.baseline_tokens is None else args.baseline_tokens
    reports = [full_report(match, layout, tokens) for match in matches.values()]
    if paths and args.hf_config:
        flags |= hf_args.rope_from_hf(args.hf_config)
    configs = {name: _config(flags, matches[name]) for name in paths}
    like = model_args.read_text(file) if paths and (file := source_file(args)) else ""
    for name, path in paths.items():
        config_files.write(path, configs[name], _header(matches[name], like), like)
    if args.json:
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        print(table(reports))
        print(f"model state: {layout}")
        if not baseline.vocab_size:
            print("without --vocab-size: embeddings and logits are not counted")


def _config(flags: model_args.Flags, match: Match) -> model_args.Flags:
    config = model_args.with_mlp(flags, match.target.activation, match.target.ffn_hidden_size)
    config.update({"--num-layers": match.target.num_layers, "--hidden-size": match.target.hidden_size})
    config.setdefault("--seq-length", match.target.seq_length)
    config.setdefault("--max-position-embeddings", config["--seq-length"])
    return config


def _header(match: Match, like: str) -> str:
    """The source's own comment, then what was counted."""
    kept = [line for line in config_files.header_of(like).splitlines() if not line.startswith(MARK)]
    scalars = match.parameters.activation_scalars
    size = f"{match.parameters.total - scalars:,} parameters" + (f" + {scalars} scalars" if scalars else "")
    return "\n".join([*kept, f"{MARK} {size}; {_quality(match)}."])


def _quality(match: Match) -> str:
    base, target = match.baseline, match.target
    if target == base:
        return "the baseline of the match"
    model = f"{base.activation}, width {base.ffn_hidden_size}"
    if (base.num_layers, base.hidden_size) != (target.num_layers, target.hidden_size):
        model += f", {base.num_layers} layers, hidden size {base.hidden_size}"
    if match.exact:
        return f"exactly the matmul parameters and FLOPs of {model}"
    residuals = match.residual_parameters_percent, match.residual_flops_percent
    return "{:+.4f} % of the matmul parameters, {:+.4f} % of the FLOPs of ".format(*residuals) + model


def main() -> int:
    """Entry point; exit code 0, 1 (failure) or 2 (bad input)."""
    return run_cli(lambda: run(build_parser().parse_args()), debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
