"""Megatron checkpoints to Hugging Face: export, verify, info.

python tools/convert_checkpoint.py export --load checkpoints/xielu --output hf/xielu
python tools/convert_checkpoint.py verify --load checkpoints/xielu --hf hf/xielu --text sample.txt
python tools/convert_checkpoint.py info checkpoints/xielu
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/x.py` from a checkout

from megatron_act.errors import FAILED, OK, UserError, run_cli

DESCRIPTION = """\
Converts torch_dist checkpoints of any tensor- and pipeline-parallel layout to Hugging Face model folders on one CPU,
one tensor at a time. swiglu becomes Llama, swiglu with QK-norm Qwen3, xielu with QK-norm Apertus."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line; its errors are `UserError`."""
    parser = _Parser(description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,verify,info}")
    _add_export(commands)
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
        "--vocab-size", type=int, metavar="N", help="embedding rows to keep (default: the tokenizer's size)"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of one weight file (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")


def _add_verify(commands: Any) -> None:
    text = "compare logits of a checkpoint (Megatron) and its export (transformers) on the CPU; exit 1 if they differ"
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
    parser.add_argument("--sample", action="store_true", help="generate by sampling with a fixed seed, not greedily")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="sequences to compare (default: 4)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens in each (default: 128)")


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _info, "print tensors, layout, activation and its scalars by layer")
    parser.add_argument("path", metavar="PATH", help="Megatron's --save folder, or an iter_XXXXXXX in it")


def _export(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.export import export

    if args.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb: expected a positive number, got {args.max_shard_gb:g}")
    done = export(
        args.load,
        args.output,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        overwrite=args.overwrite,
    )
    print(
        f"{done.output}: {done.architecture} ({done.activation}), iteration {done.iteration}, "
        f"{done.parameters:,} parameters in {done.dtype}, vocabulary {done.vocab_size}"
    )
    return OK


def _verify(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.verify import PROMPT, verify

    text = _read_text(args.text) if args.text else None
    prompt = args.prompt or PROMPT
    sizes = {"windows": args.windows, "length": args.length}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--{name}: expected at least 1, got {value}")
    done = verify(args.load, args.hf, text, prompt=prompt, sample=args.sample, **sizes)
    equal = done.max_difference <= args.tolerance  # False for NaN
    print(f"largest difference  {done.max_difference:.3e} (tolerance {args.tolerance:g}, {done.tokens} tokens)")
    print(f"mean difference     {done.mean_difference:.3e}")
    print(f"generated           {done.generated!r}")
    print("equal" if equal else "DIFFERENT: the export is not the model that Megatron trained")
    return OK if equal else FAILED


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: expected a readable UTF-8 file, got: {error}") from None
    if not text.strip():
        raise UserError(f"--text {path}: expected some text, got an empty file")
    return text


def _info(args: argparse.Namespace) -> int:
    from megatron_act.checkpoint.info import describe
    from megatron_act.checkpoint.reader import MegatronCheckpoint

    print(describe(MegatronCheckpoint(args.path)))
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
