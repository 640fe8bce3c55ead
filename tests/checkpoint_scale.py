"""A random checkpoint of any size in Megatron's torch_dist format, and what its conversion takes in memory and time.

    python tests/checkpoint_scale.py --work DIR [--config configs/apertus-8b-xielu.yaml] [--tensor-parallel 2]

writes the checkpoint as that many tensor-parallel ranks would have (bf16, one tensor at a time, no Megatron), runs
``tools/convert_checkpoint.py export`` on it in a process of its own, and prints one JSON object. The work folder needs
twice the model's size.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron_act import model_args  # noqa: E402

COMMON = "common_state/shard_0_1"
# glibc keeps freed blocks below a threshold that moves up to 32 MB, which the tensors of a large model lie beyond
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
# what tensor-parallel ranks share out, and along which dimension of a layer's tensor
SPLIT = {
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
}


MODEL = {  # largest tensor 9.4 MB, all 190 MB, in bf16
    "--num-layers": 8,
    "--hidden-size": 768,
    "--num-attention-heads": 12,
    "--ffn-hidden-size": 6144,
    "--activation": "xielu",
    "--qk-layernorm": True,
    "--normalization": "RMSNorm",
    "--disable-bias-linear": True,
    "--position-embedding-type": "rope",
    "--norm-epsilon": 1e-5,
    "--rotary-base": 10000,
    "--untie-embeddings-and-output-weights": True,
    "--padded-vocab-size": 4096,
    "--max-position-embeddings": 128,
    "--init-method-std": 0.02,
    "--bf16": True,
}
SMALL = {"--num-layers": 3, "--hidden-size": 64, "--ffn-hidden-size": 96, "--num-attention-heads": 4}
SMALL |= {"--padded-vocab-size": 256}


def random_checkpoint(folder: Path, flags: dict | None = None, ranks: int = 1, iteration: int = 1) -> Path:
    """Writes ``model.yaml`` (`MODEL` with other ``flags``) and ``checkpoint`` of it; returns the latter."""
    (folder / "model.yaml").write_text(yaml.safe_dump({"MODEL_ARGS": MODEL | (flags or {})}))
    return write_checkpoint(folder / "checkpoint", arguments(folder / "model.yaml", ranks), iteration)


def arguments(config: Path, tensor_parallel: int) -> Namespace:
    """What Megatron would have saved as its arguments, as far as the export reads them."""
    flags = model_args.read(config)
    args = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    args["layernorm_epsilon"] = float(args.pop("norm_epsilon"))
    args["add_bias_linear"] = not args.pop("disable_bias_linear")
    args.setdefault("num_query_groups", args["num_attention_heads"])
    args.setdefault("kv_channels", args["hidden_size"] // args["num_attention_heads"])
    args.setdefault("untie_embeddings_and_output_weights", False)
    layout = {"tensor_model_parallel_size": tensor_parallel, "pipeline_model_parallel_size": 1}
    return Namespace(**args | layout | {"context_parallel_size": 1, "world_size": tensor_parallel})


def shapes(args: Namespace) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor; those of layers are stacked, scalars are fp32."""
    h, f, layers, d = args.hidden_size, args.ffn_hidden_size, args.num_layers, args.kv_channels
    heads, bf16 = args.num_attention_heads, torch.bfloat16
    yield "embedding.word_embeddings.weight", (args.padded_vocab_size, h), bf16
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": ((heads + 2 * args.num_query_groups) * d, h),
        "self_attention.q_layernorm.weight": (d,),
        "self_attention.k_layernorm.weight": (d,),
        "self_attention.linear_proj.weight": (h, heads * d),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (f, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    for name, shape in layer.items():
        yield f"decoder.layers.{name}", (layers, *shape), bf16
    for name in ("alpha_p", "alpha_n"):
        yield f"decoder.layers.mlp.activation_func.{name}", (layers, 1), torch.float32
    yield "decoder.final_layernorm.weight", (h,), bf16
    if args.untie_embeddings_and_output_weights:
        yield "output_layer.weight", (args.padded_vocab_size, h), bf16


def chunks(name: str, shape: tuple[int, ...], ranks: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Offsets, sizes and rank of each piece: one per layer and tensor-parallel rank, as Megatron cuts them."""
    stacked = name.startswith("decoder.layers.")
    split = next((dim + stacked for end, dim in SPLIT.items() if name.endswith(end)), None)
    for layer, rank in itertools.product(range(shape[0] if stacked else 1), range(1 if split is None else ranks)):
        offsets, sizes = [0] * len(shape), list(shape)
        if stacked:
            offsets[0], sizes[0] = layer, 1
        if split is not None:
            sizes[split] //= ranks
            offsets[split] = rank * sizes[split]
        yield tuple(offsets), tuple(sizes), rank


class Files:
    """The ranks' files, and where in them each record begins."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(ranks)]
        self.storage: dict[MetadataIndex, _StorageInfo] = {}

    def put(self, index: MetadataIndex, content: object, rank: int = 0) -> None:
        file = self.files[rank]
        start = file.tell()
        torch.save(content, file)
        self.storage[index] = _StorageInfo(Path(file.name).name, start, file.tell() - start)

    def close(self) -> None:
        for file in self.files:
            file.close()


def write_checkpoint(save: Path, args: Namespace, iteration: int = 1) -> Path:
    """Writes ``save/iter_XXXXXXX`` and the tracker, a piece at a time; every value is random. Returns ``save``."""
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    ranks, generator = args.tensor_model_parallel_size, torch.Generator().manual_seed(0)
    files, described = Files(folder, ranks), {}
    for name, shape, dtype in shapes(args):
        pieces = list(chunks(name, shape, ranks))
        stored = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in pieces]
        described[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), stored)
        for i, (offsets, sizes, rank) in enumerate(pieces):
            values = torch.empty(sizes, dtype=dtype).normal_(0.0, 0.02, generator=generator)
            files.put(MetadataIndex(name, torch.Size(offsets), i), values, rank)
    files.put(MetadataIndex(COMMON), {"args": args, "iteration": iteration, "content_metadata": {}})
    files.close()
    metadata = Metadata(described | {COMMON: BytesStorageMetadata()}, None, files.storage, StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return save


def measure(*words: str) -> dict[str, float]:
    """Runs ``tools/convert_checkpoint.py`` in a process of its own.

    Returns:
        ``seconds``; ``peak_bytes``, the largest resident memory; ``start_bytes``, the same when all is imported.
    """
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], env=ENVIRONMENT, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    start, peak = (int(line) for line in done.stdout.decode().splitlines()[-2:])
    return {"seconds": round(time.monotonic() - begun, 1), "peak_bytes": peak, "start_bytes": start}


# VmHWM, not getrusage: the latter starts at the parent's size
PROGRAM = f"""
import re, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
sys.argv[0] = "convert_checkpoint.py"
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
import convert_checkpoint, transformers
import megatron_act.checkpoint.export
start = peak()
code = convert_checkpoint.main()
print(start)
print(peak())
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "apertus-8b-xielu.yaml")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    chosen = parser.parse_args()
    load, output = chosen.work / "checkpoint", chosen.work / "hf"
    args = arguments(chosen.config, chosen.tensor_parallel)
    if not load.exists():
        write_checkpoint(load, args)
    largest = max(stored_bytes(*each) for each in shapes(args))
    size = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in shapes(args))
    figures = measure("export", "--load", str(load), "--output", str(output))
    print(json.dumps({"bytes": size, "largest_tensor_bytes": largest, **figures}, indent=1))


def stored_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Size of what is read at once: of a layer's tensor without the leading dimension."""
    return math.prod(shape[1:] if name.startswith("decoder.layers.") else shape) * dtype.itemsize


if __name__ == "__main__":
    main()
