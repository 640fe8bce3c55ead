"""Megatron checkpoints to Hugging Face and back: export, import, verify, info.

python tools/convert_checkpoint.py export --load checkpoints/xielu --output hf/xielu
python tools/convert_checkpoint.py import --hf hf/model --save checkpoints/model
python tools/convert_checkpoint.py verify --load checkpoints/xielu --hf hf/xielu --text sample.txt
python tools/convert_checkpoint.py info checkpoints/xielu
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import FAILED, OK, UserError, run_cli

DESCRIPTION = """\
Converts torch_dist checkpoints of any tensor- and pipeline-parallel layout to Hugging Face model folders on one CPU,
one tensor at a time, and back. swiglu is Llama, swiglu with QK-norm Qwen3, relu2 Arcee, xielu with QK-norm Apertus;
every other activation, and experts, a modelling file that comes with the folder (trust_remote_code=True)."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line; its errors are `UserError`."""
    parser = _Parser(description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,import,verify,info}")
    _add_export(commands)
    _add_import(commands)
    _add_verify(commands)
    _add_info(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", _export, "write a checkpoint as a Hugging Face model folder")
    parser.add_argument(
        "--load", required=True, metavar="CKPT", help="Megatron's --save folder, or an iter_XXXXXXX in it"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the model folder to write, complete or not at all"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as stored); scalars stay float32"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer folder to copy (default: the run's --tokenizer-model, if a folder)",
    )
    parser.add_argument(
        "--metrics-jsonl", metavar="FILE", help="what the run's --metrics-jsonl wrote, for the model card"
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="llama, qwen3, arcee, apertus or megatron_act (default: what transformers has, else our modelling file)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="embedding rows to keep (default: those of the tokenizer's tokens, "
        "or the run's own --vocab-size if that is more)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file: 5GB, 200MB (default: 5GB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")


def _add_import(commands: Any) -> None:
    text = "write a Hugging Face model folder as a Megatron checkpoint, and the flags that train it on"
    parser = _command(commands, "import", _import, text)
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument(
        "--save",
        required=True,
        metavar="CKPT",
        help="the folder to write, complete or not at all: --load of the run to come; the same command goes on with an "
        "interrupted import",
    )
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="N", help="pad the vocabulary to a multiple of it"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=1, metavar="N", help="pad it to N times that (default: 1)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as stored)")
    parser.add_argument(
        "--activation", metavar="NAME", help="experiment: another activation, fitted to the model's in each layer"
    )
    parser.add_argument("--text", metavar="FILE", help="with --activation: text that the model reads for the fit")


def _add_verify(commands: Any) -> None:
    text = "compare a checkpoint (Megatron) and its export (transformers): logits, layers, text; exit 1 if they differ"
    parser = _command(commands, "verify", _verify, text)
    parser.add_argument(
        "--load", required=True, metavar="CKPT", help="Megatron's --save folder, or an iter_XXXXXXX in it"
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="the exported folder")
    parser.add_argument(
        "--text", metavar="FILE", help="text to run through both (default: random tokens of a fixed seed)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest allowed difference of a logit (default: 1e-4)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="start of the generated text")
    parser.add_argument("--generate", type=int, default=32, metavar="N", help="greedy tokens to compare (default: 32)")
    parser.add_argument(
        "--sample", action="store_true", help="generate by sampling with a fixed seed, not greedily; not compared"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows that the export should have (default: as export decides)"
    )
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="sequences to compare (default: 4)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens in each (default: 128)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's modelling file even if it is not this project's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_info(commands: Any) -> None:
    text = "print what a checkpoint or a model folder holds, which programs open it, and what converting it takes"
    parser = _command(commands, "info", _info, text)
    parser.add_argument(
        "path",
        metavar="PATH",
        help="Megatron's --save folder or an iter_XXXXXXX in it, a Hugging Face folder (config.json alone will do), or "
        "a YAML file of configs/",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _export(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.export import export
    from megatron_act.checkpoint.families import NAMES
    from megatron_act.checkpoint.writer import shard_bytes

    if args.family and args.family not in NAMES:
        raise UserError(f"--family: expected one of {', '.join(NAMES)}, got {args.family!r}")
    done = export(
        args.load,
        args.output,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        family=args.family,
        metrics=args.metrics_jsonl,
        max_shard_bytes=shard_bytes(args.max_shard_size),
        overwrite=args.overwrite,
    )
    print(
        f"{done.output}: {done.architecture} ({done.activation}), iteration {done.iteration}, "
        f"{done.parameters:,} parameters in {done.dtype}, vocabulary {done.vocab_size}"
    )
    return OK


def _import(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.import_hf import import_model

    for name in ("tensor_model_parallel_size", "make_vocab_size_divisible_by"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.text and not args.activation:
        raise UserError("--text: expected --activation NAME with it, got none: add it or remove the flag")
    done = import_model(
        args.hf,
        args.save,
        tensor_parallel=args.tensor_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dtype=args.dtype,
        swapped=_swapped(args) if args.activation else None,
    )
    print(
        f"{done.save}: {done.family} ({done.activation}), {done.parameters:,} parameters, vocabulary {done.vocab_size}"
    )
    for note in done.notes:
        print(f"note: {note}")
    print(f"train on:  torchrun ... -m megatron_act.pretrain_gpt --config {done.flags} --load {done.save} <your flags>")
    return OK


def _swapped(args: argparse.Namespace) -> Any:
    from megatron_act.checkpoint.import_flags import open_source
    from megatron_act.checkpoint.swap import swap

    chosen, fits, warning = swap(open_source(args.hf), args.activation, _read_text(args.text) if args.text else None)
    if warning:
        print(f"warning: {warning}")
    for layer, fit in enumerate(fits):
        values = ", ".join(f"{name} {value:.6f}" for name, value in fit.scalars.items())
        print(
            f"layer {layer}: {values or 'no scalars'}; remaining difference {fit.residual:.2%} of the parent's values"
        )
    return chosen


def _verify(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.differences import as_json, as_lines
    from megatron_act.checkpoint.verify import PROMPT, verify

    text = _read_text(args.text) if args.text else None
    for name, least in (("windows", 1), ("length", 1), ("generate", 0), ("vocab_size", 1)):
        if (given := getattr(args, name)) is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {given}")
    if not args.tolerance >= 0:
        raise UserError(f"--tolerance: expected at least 0, got {args.tolerance}")
    options = {"prompt": args.prompt or PROMPT, "sample": args.sample, "trust_remote_code": args.trust_remote_code}
    sizes = {"windows": args.windows, "length": args.length, "new_tokens": args.generate, "vocab_size": args.vocab_size}
    done = verify(args.load, args.hf, text, **options, **sizes)
    shown = json.dumps(as_json(done, args.tolerance), indent=1) if args.json else None
    print(shown or "\n".join(as_lines(done, args.tolerance)))
    return OK if done.equal(args.tolerance) else FAILED


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: expected a readable UTF-8 file, got: {error}") from None
    if not text.strip():
        raise UserError(f"--text {path}: expected some text, got an empty file")
    return text


def _info(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.info import describe, text

    content = describe(args.path)
    print(json.dumps(content, indent=1) if args.json else text(content))
    return OK


def run() -> int:
    """Runs the chosen command; returns its exit code."""
    args = build_parser().parse_args()
    return args.run(args)


def main() -> int:
    """Entry point; exit code 0, 1 (failure or logits that differ) or 2 (bad input)."""
    return run_cli(run, debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
