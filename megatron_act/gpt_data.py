"""Megatron's GPT datasets from the command line, and the checks that save a run from wrong data."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_act.data import dali_loaders
from megatron_act.errors import UserError
from megatron_act.gpt_step import has_mtp

SAMPLED_TOKENS = 1_000_000  # how far the vocabulary check looks: a wrong tokenizer shows at once


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its arguments (same fields and meaning as in Megatron-LM's entry)."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=json.loads(Path(sequences).read_text()) if sequences else None,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def _is_built_here(vp_stage: int | None = None) -> bool:
    reads = is_first_or_last_pipeline_stage(vp_stage) or has_mtp(vp_stage)
    return mpu.get_tensor_model_parallel_rank() == 0 and reads


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Train, validation and test datasets for ``pretrain``, or with ``--dataloader dali`` their loaders.

    Args:
        num_samples: the wanted sizes of the three.
        vp_stage: virtual pipeline stage.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0(f"> building {kind.__name__}s ...")
    builder = BlendedMegatronDatasetBuilder(
        kind, num_samples, partial(_is_built_here, vp_stage=vp_stage), dataset_config(args)
    )
    datasets = builder.build()
    return dali_loaders.loaders(datasets, args) if args.dataloader == "dali" else datasets


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron then calls it on every rank


def data_prefixes(args: Namespace) -> list[str]:
    """Every ``.bin/.idx`` prefix that the arguments name (weights of a blend left out)."""
    groups = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    words = [word for group in groups if group for word in group]
    return [word for word in words if not _is_number(word)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_data(args: Namespace, vocab_size: int) -> None:
    """Refuses local data that is absent or was tokenized with a larger vocabulary (its first million tokens tell).

    Raises:
        UserError: a missing file, or a token id that the model has no embedding for.
    """
    for prefix in data_prefixes(args):
        if is_object_storage_path(prefix):
            continue
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise UserError(
                    f"--data-path: expected {prefix}{suffix}, got no such file: run preprocess_fineweb_edu.py"
                )
        largest = _largest_id(prefix)
        if largest >= vocab_size:
            raise UserError(
                f"vocabulary mismatch: expected ids below {vocab_size} (the tokenizer's), got {largest} in "
                f"{prefix}.bin: use the tokenizer that made the data"
            )


def _largest_id(prefix: str) -> int:
    """The largest id among the first ``SAMPLED_TOKENS`` tokens of an indexed dataset (-1 if it is empty)."""
    dataset, largest, seen = IndexedDataset(prefix), -1, 0
    for document in range(len(dataset)):
        tokens = dataset[document]
        if len(tokens):
            largest = max(largest, int(tokens.max()))
        seen += len(tokens)
        if seen >= SAMPLED_TOKENS:
            break
    return largest
