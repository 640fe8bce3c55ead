"""What an imported checkpoint consists of: the chunks of Megatron's tensors and the Hugging Face tensors in each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_act.checkpoint import families
from megatron_act.checkpoint.families import Rule, expanded
from megatron_act.checkpoint.import_flags import Source
from megatron_act.checkpoint.picks import Geometry, cut, place
from megatron_act.checkpoint.reader import LAYERS
from megatron_act.checkpoint.safetensors_folder import SafetensorsFolder, StoredTensor
from megatron_act.checkpoint.torch_dist import Part
from megatron_act.errors import UserError

IGNORED = ("rotary_emb.inv_freq",)  # buffers of old transformers; computed from the config
CONSTANT_ERROR = 4e-3  # relative; what bf16 makes of beta and eps


@dataclass(frozen=True)
class Swapped:
    """Another activation in place of a model's; ``raw`` scalars by name, for each layer."""

    activation: str
    raw: list[dict[str, float]]


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Sizes of heads and vocabulary by a config with transformers' defaults."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Geometry(heads, config.get("num_key_value_heads") or heads, head_dim, config["vocab_size"])


def megatron_shapes(source: Source, geometry: Geometry, padded: int) -> dict[str, tuple[int, ...]]:
    """Shapes of Megatron's tensors, of one layer or expert of it, by the names of the families' rules."""
    config, family = source.config, source.family
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], geometry.num_attention_heads
    features, expert = geometry.kv_channels, config.get("moe_intermediate_size")
    return {
        **{rule.megatron: (1,) if rule.scalar else (hidden,) for rule in family.layer},  # scalars and norms
        **{rule.megatron: (features,) for rule in families.QK_NORM},
        "embedding.word_embeddings.weight": (padded, hidden),
        "output_layer.weight": (padded, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * geometry.num_query_groups) * features, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * features),
        "mlp.linear_fc1.weight": (2 * width if family.activation == "swiglu" else width, hidden),
        "mlp.linear_fc2.weight": (hidden, width),
        "mlp.router.weight": (source.experts or 0, hidden),
        "mlp.experts.experts.linear_fc1.weight": (expert or 0, hidden),
        "mlp.experts.experts.linear_fc2.weight": (hidden, expert or 0),
    }


class Plan:
    """Every chunk of the checkpoint, to be read when it is written.

    Raises:
        UserError: a tensor missing, left over or of another shape; constants that Megatron does not compute with.
    """

    def __init__(
        self,
        source: Source,
        folder: SafetensorsFolder,
        padded: int,
        dtype: torch.dtype | None,
        swapped: Swapped | None,
    ) -> None:
        self.source, self.folder, self.dtype, self.swapped = source, folder, dtype, swapped
        self.geometry = geometry_of(source.config)
        self.layers, self.padded = source.config["num_hidden_layers"], padded
        self.shapes = megatron_shapes(source, self.geometry, padded)
        self.used: set[str] = set()
        self._notes: list[str] = []
        self.parts = [*self._model(), *(part for layer in range(self.layers) for part in self._layer(layer))]
        self._check_left_over()
        self._check_dtypes()

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know, each once."""
        extra = self.padded - self.geometry.vocab_size
        padding = (
            [f"{extra} rows of zeros pad the vocabulary: the loss counts each as a token of logit 0"] if extra else []
        )
        return (*dict.fromkeys(self._notes), *padding)

    def _model(self) -> Iterator[Part]:
        untied = () if self.source.config["tie_word_embeddings"] else (families.UNTIED,)
        if not untied and families.UNTIED.hf in self.folder.tensors:
            self._check_copy()
        for rule in (*families.MODEL, *untied):
            yield self._part(rule.megatron, (), (), [(rule, rule.hf)])

    def _check_copy(self) -> None:
        """A tied model's head must be a copy of the embedding; where it is not, transformers unties the two."""
        head, embedding = families.UNTIED.hf, families.MODEL[0].hf
        self._stored(embedding)
        self.used.add(head)
        if not torch.equal(self.folder.read(head), self.folder.read(embedding)):
            raise UserError(
                f"--hf {self.folder.folder}: expected {head} equal to {embedding} (tie_word_embeddings), got another: "
                "set tie_word_embeddings to false in config.json, as transformers takes it, or remove the tensor"
            )

    def _layer(self, layer: int) -> Iterator[Part]:
        prefix = f"model.layers.{layer}."
        rules = expanded(self.source.family, self.source.experts)
        for (key, row), group in groupby(rules, lambda found: (found[0].megatron, found[2])):
            members = [(rule, prefix + name) for rule, name, _ in group]
            if members[0][0].scalar and self.swapped:
                self.used.update(name for _, name in members)
                continue
            rows = (self.layers, self.source.experts) if row else (self.layers,)
            yield self._part(LAYERS + key, (layer, *row), rows, members)
            if members[0][0].other and self.source.experts:
                yield self._part(LAYERS + members[0][0].other, (layer, *row), rows, members)
        self._check_constants(prefix)
        for name, raw in self.swapped.raw[layer].items() if self.swapped else ():
            key, value = f"{LAYERS}mlp.activation_func.{name}", torch.tensor([raw], dtype=torch.float32)
            yield Part(key, (layer,), (self.layers,), (1,), torch.float32, value.clone)

    def _part(self, key: str, row: tuple, rows: tuple, members: list[tuple[Rule, str]]) -> Part:
        stored = [self._stored(name) for _, name in members]
        scalar = members[0][0].scalar
        if scalar and stored[0].dtype != torch.float32:
            self._notes.append(f"the scalars were stored in {stored[0].dtype}, with its rounding".replace("torch.", ""))
        dtype = torch.float32 if scalar else self.dtype or reduce(torch.promote_types, (each.dtype for each in stored))
        shape = self.shapes[members[0][0].megatron]
        self._check_shapes(shape, members)
        return Part(key, row, rows, shape, dtype, self._reader(shape, dtype, members))

    def _check_shapes(self, shape: tuple[int, ...], members: list[tuple[Rule, str]]) -> None:
        for rule, name in members:
            wanted = tuple(cut(rule.pick, torch.empty(shape, device="meta"), self.geometry).shape)
            got = self.folder.tensors[name].shape
            if got != wanted:
                raise UserError(
                    f"--hf {self.folder.folder}: expected {name} of shape {wanted}, as config.json has it, got {got}"
                )

    def _reader(
        self, shape: tuple[int, ...], dtype: torch.dtype, members: list[tuple[Rule, str]]
    ) -> Callable[[], Tensor]:
        def read() -> Tensor:
            whole = torch.zeros(shape, dtype=dtype)
            for rule, name in members:
                place(rule.pick, whole, self.geometry, self.folder.read(name))
            return whole

        return read

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.folder.tensors:
            raise UserError(f"--hf {self.folder.folder}: expected a tensor {name}, the folder has none (dropped?)")
        self.used.add(name)
        return self.folder.tensors[name]

    def _check_constants(self, prefix: str) -> None:
        """Megatron's formula has transformers' own beta and eps; a folder that lacks them was written carelessly."""
        for name, value in self.source.family.constants.items():
            self.used.add(prefix + name)
            if prefix + name not in self.folder.tensors:
                self._notes.append(f"{name} is not in the folder (transformers would read garbage): taken as {value:g}")
                continue
            stored = self.folder.read(prefix + name)
            wanted, got = float(torch.tensor(value, dtype=stored.dtype)), float(stored)  # fp16 keeps eps to 1.4 % only
            if abs(got - wanted) > CONSTANT_ERROR * abs(value):
                raise UserError(f"--hf: expected {prefix}{name} {value:g}, got {got:g}: Megatron has no other")

    def _check_left_over(self) -> None:
        names = set(self.folder.tensors) - self.used
        extra = sorted(name for name in names if not name.endswith(IGNORED))
        if extra:
            raise UserError(
                f"--hf {self.folder.folder}: expected the tensors of {self.source.family.architecture}, got "
                f"{len(extra)} more, such as {extra[0]}: not imported"
            )

    def _check_dtypes(self) -> None:
        """Megatron's stacked tensors have one dtype for all layers."""
        first: dict[str, torch.dtype] = {}
        for part in self.parts:
            if first.setdefault(part.key, part.dtype) != part.dtype:
                raise UserError(
                    f"--hf {self.folder.folder}: expected one dtype in all layers, got {first[part.key]} and "
                    f"{part.dtype} for {part.key}: add --dtype float32"
                )

    @property
    def empty(self) -> list[str]:
        """Objects without content that Megatron's layers, local or Transformer Engine's, ask a checkpoint for."""
        norms = ["self_attention.q_layernorm", "self_attention.k_layernorm"] * self.source.family.qk_norm
        plain, experts = ["linear_qkv", "linear_proj"], self.source.experts
        names = [f"self_attention.{name}" for name in plain] + norms
        names += ["pre_mlp_layernorm"] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
        state, count = "_extra_state/shard", self.layers
        found = [f"{LAYERS}{name}.{state}_{layer}_{count}" for name in names for layer in range(count)]
        for expert in range(experts or 0):
            found += [
                f"{LAYERS}mlp.experts.experts.{name}.{state}_{layer}.{expert}_{count}.{experts}"
                for name in ("linear_fc1", "linear_fc2")
                for layer in range(count)
            ]
        return [*found, f"decoder.final_layernorm.{state}_0_1"]
