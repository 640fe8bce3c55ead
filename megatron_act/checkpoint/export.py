"""Exports a Megatron checkpoint to a Hugging Face model folder."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_act.checkpoint import families
from megatron_act.checkpoint.card import Model, card_text
from megatron_act.checkpoint.families import Family, Rule, expanded
from megatron_act.checkpoint.generation import generation_config
from megatron_act.checkpoint.hf_config import config as hf_config
from megatron_act.checkpoint.info_checkpoint import short
from megatron_act.checkpoint.picks import Geometry, cut
from megatron_act.checkpoint.reader import MegatronCheckpoint, TensorInfo
from megatron_act.checkpoint.scalars import scalar_names, trained_activation
from megatron_act.checkpoint.tokenizer import Tokenizer, find_tokenizer, unpadded_vocab_size
from megatron_act.checkpoint.writer import Entry, check_output, complete_folder, write_json, write_model
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

log = logging.getLogger(__name__)

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")  # number, if layers are apart, and name within

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9  # what transformers' save_pretrained made for years


@dataclass(frozen=True)
class Exported:
    """What was written: ``parameters`` counts tied weights once and leaves out constants."""

    output: Path
    architecture: str
    activation: str
    iteration: int
    vocab_size: int
    dtype: str
    parameters: int


class _LastTensor:
    """Reads Megatron tensors and keeps the last one: neighbours in the tables are cut from the same tensor."""

    def __init__(self, checkpoint: MegatronCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.place: tuple | None = None
        self.tensor = torch.empty(0)

    def __call__(self, name: str, layer: int | None = None, row: tuple[int, ...] = ()) -> Tensor:
        if self.place != (name, layer, row):
            self.place, self.tensor = None, torch.empty(0)  # drop the old one before the next is read
            where = partial(self.checkpoint.layer_tensor, layer=layer) if layer is not None else self.checkpoint.tensor
            self.tensor, self.place = where(name, row=row), (name, layer, row)
        return self.tensor


def entries(
    checkpoint: MegatronCheckpoint, family: Family, vocab_size: int, dtype: torch.dtype | None
) -> Iterator[Entry]:
    """Every tensor of the Hugging Face model, to be read when it is written; ``dtype`` None: each as stored.

    Raises:
        UserError: a tensor that the family needs is not in the checkpoint, or of a dtype that is not written.
    """
    args, last = checkpoint.args, _LastTensor(checkpoint)
    geometry = Geometry(args.num_attention_heads, args.num_query_groups, args.kv_channels, vocab_size)
    untied = (families.UNTIED,) if args.untie_embeddings_and_output_weights else ()
    for rule in (*families.MODEL, *untied):
        yield _entry(rule, rule.hf, checkpoint.info(rule.megatron), partial(last, rule.megatron), geometry, dtype)
    for layer in range(args.num_layers):
        prefix = f"model.layers.{layer}."
        for rule, name, row in expanded(family, getattr(args, "num_experts", None)):
            key = rule.megatron if checkpoint.has_layer_tensor(rule.megatron, layer) else rule.other or rule.megatron
            stored = checkpoint.layer_info(key, layer)
            part = TensorInfo(stored.shape[len(row) :], stored.dtype)
            yield _entry(rule, prefix + name, part, partial(last, key, layer, row), geometry, dtype)
        for name, value in family.constants.items():
            yield Entry(prefix + name, (), torch.float32, partial(torch.tensor, value))


def _entry(
    rule: Rule,
    name: str,
    stored: TensorInfo,
    read: Callable[[], Tensor],
    geometry: Geometry,
    dtype: torch.dtype | None,
) -> Entry:
    planned = cut(rule.pick, torch.empty(stored.shape, device="meta"), geometry)
    kept = torch.float32 if rule.scalar else dtype or stored.dtype
    if kept not in DTYPES.values():
        raise UserError(f"export: expected weights in {', '.join(DTYPES)}, got {name} in {kept}: add --dtype float32")
    return Entry(name, tuple(planned.shape), kept, lambda: cut(rule.pick, read(), geometry))


def export(
    load: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    family: str | None = None,
    metrics: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Writes a checkpoint as a model folder that transformers opens by itself.

    Args:
        load: Megatron's save folder, or an ``iter_XXXXXXX`` folder.
        output: the folder to make; appears complete or not at all.
        dtype: ``float32`` or ``bfloat16`` for the weights (default: as stored). The activation's scalars stay fp32.
        tokenizer: folder with Hugging Face tokenizer files (default: the checkpoint's ``--tokenizer-model`` folder).
        vocab_size: rows of the embedding to keep (default: `tokenizer.real_vocab_size`; what is beyond is padding).
        family: one of ``families.NAMES``; default: what transformers has, else this project's modelling file.
        metrics: what the run's ``--metrics-jsonl`` wrote, for the model card.
        max_shard_bytes: largest size of one weight file.
        overwrite: replace an existing model folder.
        progress: show a progress bar on standard error.

    Raises:
        UserError: not a checkpoint or not a whole one, a model that no family represents, an output that exists, a
            wrong vocabulary size.
    """
    output = Path(output)
    check_output(output, overwrite)
    checkpoint = MegatronCheckpoint(load)
    checkpoint.check_whole()
    args, activation = checkpoint.args, trained_activation(checkpoint.args)
    chosen = families.choose(args, activation, family)
    if chosen is families.ARCEE_XIELU:
        log.warning("--family arcee: %s", families.ARCEE_NOTE)
    check_has_scalars(checkpoint, activation)
    check_all_used(checkpoint, chosen)
    words = find_tokenizer(args, tokenizer)
    padded = checkpoint.info(families.MODEL[0].megatron).shape[0]
    vocab_size = unpadded_vocab_size(args, words, padded, vocab_size)
    plan = list(entries(checkpoint, chosen, vocab_size, DTYPES[dtype] if dtype else None))
    dtype = dtype or short(plan[0].dtype)
    config = hf_config(chosen, args, vocab_size, dtype, words.token_ids if words else NO_TOKENS)
    parameters = sum(torch.Size(entry.shape).numel() for entry in plan if entry.shape)
    model = Model(output.name, chosen.architecture, activation, dtype, parameters, chosen.ships_code)
    card = card_text(checkpoint, model, metrics)
    with complete_folder(output, overwrite, checkpoint.identity) as folder:
        _write_weights(folder, plan, max_shard_bytes, progress)
        _write_rest(folder, config, words, card, chosen.ships_code)
    return Exported(output, chosen.architecture, activation, checkpoint.iteration, vocab_size, dtype, parameters)


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def check_has_scalars(checkpoint: MegatronCheckpoint, activation: str) -> None:
    """Raises UserError when the activation has scalars that the checkpoint lacks."""
    wanted = kernels.get(activation).params if activation in kernels.names() else ()
    missing = [param.name for param in wanted if param.name not in scalar_names(checkpoint)]
    if missing:
        raise UserError(
            f"{checkpoint.path}: expected a checkpoint with the scalars of {activation}, got one without "
            f"{', '.join(missing)}: save it with this project's MLP (something dropped them)"
        )


def check_all_used(checkpoint: MegatronCheckpoint, family: Family) -> None:
    """Raises UserError for a tensor that the family has no rule for, such as the norms of queries and keys in Llama."""
    layer = {name for rule in family.layer for name in (rule.megatron, rule.other)}
    untied = checkpoint.args.untie_embeddings_and_output_weights
    known = {rule.megatron for rule in (*families.MODEL, *([families.UNTIED] if untied else []))}
    for name, stored in checkpoint.keys().items():
        within = _LAYER.match(name)
        if within is None:
            used = name in known
        else:
            last = stored.shape[0] - 1 if within[1] is None else int(within[1])
            used = within[2] in layer and last < checkpoint.args.num_layers
        if not used:
            raise UserError(
                f"{checkpoint.path}: expected the tensors of {family.architecture} as the saved arguments describe it, "
                f"got {name} besides: it would be lost"
            )


def _write_weights(folder: Path, plan: list[Entry], max_shard_bytes: int, progress: bool) -> None:
    total = sum(entry.size_bytes for entry in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
        write_model(folder, plan, max_shard_bytes, bar.update)


def _write_rest(folder: Path, config: dict, words: Tokenizer | None, card: str, ships_code: bool) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(config, words))
    (folder / "README.md").write_text(card, encoding="utf-8")
    code = [Path(__file__).with_name(f"{kind}_{families.OWN}.py") for kind in ("configuration", "modeling")]
    for file in (*(words.files if words else ()), *(code if ships_code else ())):
        shutil.copy(file, folder / file.name)
