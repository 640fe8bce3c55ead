"""Imports a Hugging Face model folder as a Megatron checkpoint of any layout, tensor by tensor."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_act import config_files, model_args
from megatron_act.budget import padded_vocab_size
from megatron_act.checkpoint import torch_dist
from megatron_act.checkpoint.import_flags import megatron_flags, open_source
from megatron_act.checkpoint.import_plan import Plan, Swapped
from megatron_act.checkpoint.resume import whole_folder
from megatron_act.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_act.checkpoint.tokenizer import MARKERS
from megatron_act.checkpoint.torch_dist import write_checkpoint
from megatron_act.errors import UserError

FLAGS_FILE = "megatron_flags.yaml"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Imported:
    """What was written; ``notes`` are sentences that the user must know."""

    save: Path
    flags: Path
    family: str
    activation: str
    parameters: int
    vocab_size: int
    padded_vocab_size: int
    notes: tuple[str, ...]


def import_model(
    hf: str | Path,
    save: str | Path,
    *,
    tensor_parallel: int = 1,
    divisible_by: int = 1,
    dtype: str | None = None,
    swapped: Swapped | None = None,
    progress: bool = True,
) -> Imported:
    """Writes a model folder as a checkpoint that ``--load`` takes in any layout, with the flags that go with it.

    Args:
        hf: a folder with config.json and safetensors.
        save: the folder to make; appears complete or not at all. After an interruption the same call keeps the files
            that are finished (`resume`).
        tensor_parallel: tensor-parallel size of the run to come; the embedding's rows must be a multiple of it.
        divisible_by: Megatron's ``--make-vocab-size-divisible-by``, times which they are padded.
        dtype: ``float32`` or ``bfloat16`` for the weights (default: as stored). The activation's scalars are fp32.
        swapped: another activation and its raw scalars (``swap``), in place of the model's.
        progress: show a progress bar on standard error.

    Raises:
        UserError: a model that Megatron cannot hold, a tensor missing or left over, a folder that exists.
    """
    save = Path(save)
    if save.exists():
        raise UserError(f"--save {save}: expected a new folder, got an existing one: choose another")
    source, folder = open_source(hf), SafetensorsFolder(hf)
    activation = swapped.activation if swapped else source.family.activation
    vocab_size = source.config["vocab_size"]
    padded = padded_vocab_size(vocab_size, divisible_by, tensor_parallel)
    plan = Plan(source, folder, padded, DTYPES.get(dtype or ""), swapped)
    has_tokenizer = any((Path(hf) / marker).is_file() for marker in MARKERS)
    flags = megatron_flags(source, activation, padded, has_tokenizer)
    words = model_args.to_words(flags)
    common = common_state(words)
    with whole_folder(save, _identity(folder, plan, words)) as place_:
        with tqdm(total=plan.size_bytes, unit="B", unit_scale=True, desc="import", disable=not progress) as bar:
            write_checkpoint(place_, plan.parts, common, plan.empty, bar.update)
        header = f"Trains {Path(hf).name} ({source.family.architecture}) on: --config {FLAGS_FILE} --load FOLDER"
        config_files.write(place_ / FLAGS_FILE, flags, header)
    names = (source.family.architecture, activation)
    parameters = sum(torch.Size(part.shape).numel() for part in plan.parts)
    return Imported(save, save / FLAGS_FILE, *names, parameters, vocab_size, padded, plan.notes)


def _identity(folder: SafetensorsFolder, plan: Plan, words: Sequence[str]) -> str:
    """Of the source and of all that decides what is written: flags, Megatron's version, each chunk, fitted scalars."""
    chunks = [(part.key, part.row, part.rows, part.shape, str(part.dtype)) for part in plan.parts]
    scalars = plan.swapped and plan.swapped.raw
    made = (folder.identity, words, version("megatron-core"), torch_dist.FILE_BYTES, chunks, scalars)
    return hashlib.sha256(repr(made).encode()).hexdigest()


def common_state(words: Sequence[str]) -> bytes:
    """What Megatron keeps beside tensors for a run with these flags, by Megatron's own parser in another process."""
    with tempfile.TemporaryDirectory(prefix="megatron-act-import-") as work:
        output = Path(work) / "common.pt"
        command = [sys.executable, "-m", "megatron_act.checkpoint.megatron_args", str(output), *words]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"--hf: Megatron refuses the model's flags: {last}")
        return output.read_bytes()
