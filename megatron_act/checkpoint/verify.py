"""Proves an export: the same tokens through Megatron and through transformers, in two processes, answers compared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_act.checkpoint.differences import Verified, compare
from megatron_act.checkpoint.families import MODEL
from megatron_act.checkpoint.reader import MegatronCheckpoint, find_iteration
from megatron_act.checkpoint.tokenizer import MARKERS, find_tokenizer, real_vocab_size
from megatron_act.errors import UserError

TOLERANCE = 1e-4  # largest difference of two fp32 logits: rounding of two orders of summation, far below any mistake
PROMPT = "The most important thing about"
HF_PROGRAM = Path(__file__).with_name("hf_logits.py")
REQUEST = "request.json"


def verify(load: str | Path, hf: str | Path, text: str | None = None, **options: Any) -> Verified:
    """Compares a checkpoint and its export on the CPU in fp32: `verify_all` for one pair."""
    return verify_all([(load, hf)], text, **options)[0]


def verify_all(
    pairs: Sequence[tuple[str | Path, str | Path]],
    text: str | None = None,
    *,
    prompt: str = PROMPT,
    windows: int = 4,
    length: int = 128,
    new_tokens: int = 32,
    sample: bool = False,
    trust_remote_code: bool = False,
    vocab_size: int | None = None,
) -> list[Verified]:
    """Compares checkpoints and their exports on the CPU in fp32; each stack starts once for all pairs.

    Args:
        pairs: Megatron's save folder (or an ``iter_XXXXXXX`` folder) and the exported folder.
        text: what to run through both, by the export's tokenizer; None means random tokens of a fixed seed.
        prompt: start of the generated text (without a tokenizer: the first 8 tokens).
        windows: how many sequences to compare.
        length: tokens in each, cut to the model's ``max_position_embeddings``.
        new_tokens: length of the generated text; Megatron's greedy tokens are compared with it.
        sample: draw from the distribution with a fixed seed instead of taking the likeliest token; not compared.
        trust_remote_code: run a folder's own modelling file even if it is not this project's.
        vocab_size: rows that the export should have (default: as `export` decides, by tokenizer and saved arguments).

    Returns:
        Per pair the largest and mean absolute difference of logits over the export's vocabulary, the hidden states'
        by layer, the number of equal greedy tokens, and the generated text.

    Raises:
        UserError: not a checkpoint or not a whole one, not a model folder, foreign code in it, or a folder that
            transformers does not open in full.
        RuntimeError: Megatron failed; carries its last lines.
    """
    checkpoints = [find_iteration(load).resolve() for load, _ in pairs]
    for path in checkpoints:
        MegatronCheckpoint(path).check_whole()
    options = {"text": text, "prompt": prompt, "windows": windows, "length": length}
    options |= {"new_tokens": new_tokens, "sample": sample, "trust": trust_remote_code}
    requests = [options | {"folder": str(_model_folder(hf))} for _, hf in pairs]
    with tempfile.TemporaryDirectory(prefix="megatron-act-verify-") as work:
        places = [Path(work) / str(i) for i in range(len(pairs))]
        run_transformers(places, requests)
        run_megatron(places, checkpoints)
        sizes = [vocab_size or _vocab_size(path, hf) for path, (_, hf) in zip(checkpoints, pairs, strict=True)]
        return [compare(place, size) for place, size in zip(places, sizes, strict=True)]


def _vocab_size(checkpoint: Path, hf: str | Path) -> int | None:
    """Rows that stand for tokens, by the export's tokenizer and the checkpoint's arguments; None: neither tells."""
    opened = MegatronCheckpoint(checkpoint)
    has_tokenizer = any((Path(hf) / marker).is_file() for marker in MARKERS)
    words = find_tokenizer(opened.args, hf if has_tokenizer else None)
    return real_vocab_size(opened.args, words, opened.info(MODEL[0].megatron).shape[0])


def _model_folder(hf: str | Path) -> Path:
    folder = Path(hf).resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"--hf {hf}: expected a model folder with config.json, got none: export one first")
    return folder


def run_transformers(places: Sequence[Path], requests: Sequence[dict[str, Any]]) -> None:
    """Has one isolated Python answer requests (`hf_logits`), each in a new folder; UserError if it refuses one."""
    for place, request in zip(places, requests, strict=True):
        place.mkdir()
        trust = request.get("trust") or _ships_our_code(Path(request["folder"]))
        (place / REQUEST).write_text(json.dumps(request | {"trust": trust}), encoding="utf-8")
    done = _run([sys.executable, "-I", str(HF_PROGRAM), *(str(place / REQUEST) for place in places)], places[0])
    if done.returncode:
        raise UserError(f"--hf: transformers does not open the export as it is: {_last_lines(done, 1)}")


def _ships_our_code(folder: Path) -> bool:
    """Whether the folder's Python files are this project's; False without any, UserError with others."""
    files = list(folder.glob("*.py"))
    ours = Path(__file__).parent
    foreign = [file for file in files if not _same(file, ours / file.name)]
    if files and _names_other_code(folder / "config.json"):
        foreign.append(folder / "config.json")
    if foreign:
        raise UserError(
            f"--hf {folder}: expected this project's modelling file, got another {foreign[0].name}: read it, then add "
            "--trust-remote-code"
        )
    return bool(files)


def _names_other_code(config: Path) -> bool:
    """Whether it takes classes of another folder or of a hub: `OWNER/NAME--MODULE.CLASS`."""
    try:
        return "--" in str(json.loads(config.read_text(encoding="utf-8")).get("auto_map"))
    except (OSError, ValueError, AttributeError):
        return False  # which transformers will say


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def run_megatron(places: Sequence[Path], checkpoints: Sequence[Path]) -> None:
    """Has one process with the CPU backend compute Megatron's logits of each folder's tokens (`megatron_logits`)."""
    words = [str(word) for pair in zip(checkpoints, places, strict=True) for word in pair]
    root = Path(__file__).parents[2]
    done = _run([sys.executable, "-m", "megatron_act.checkpoint.megatron_logits", *words], root)
    if done.returncode:
        raise RuntimeError(f"Megatron could not run {checkpoints[0]}: {_last_lines(done, 3)}")


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCHDYNAMO_DISABLE": "1"}
    with tempfile.TemporaryDirectory(prefix="megatron-act-modules-") as modules:  # of a folder with a modelling file
        env = os.environ | ours | {"HF_MODULES_CACHE": modules}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def _last_lines(done: subprocess.CompletedProcess, count: int) -> str:
    return " | ".join(done.stderr.strip().splitlines()[-count:]) or f"exit code {done.returncode}"
