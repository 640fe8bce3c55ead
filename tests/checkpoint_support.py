"""What the conversion's tests share: random Hugging Face models, data whose loss is known, mistakes of converters."""

import copy
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_act.checkpoint import modeling_megatron_act as shipped
from megatron_act.checkpoint.configuration_megatron_act import MegatronActConfig

sys.path.append(str(Path(__file__).parent / "training"))  # forked_runs and what it needs
from forked_runs import ForkedRuns

LENGTH, LAYERS = 64, 2
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **BOUNDS, "rope_theta": 2e4}
LLAMA32 = LLAMA3 | {"factor": 32.0, "rope_theta": 5e5}  # as in Llama-3.2
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-3,  # no default of anything
    "initializer_range": 0.2,
    "rope_parameters": PLAIN,
}


def random_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves a model of a kind of transformers or ``megatron_act``: random weights, norms and scalars, all different."""
    torch.manual_seed(0)
    words = SIZES | changes
    if kind == "megatron_act":
        model: Any = shipped.MegatronActForCausalLM(MegatronActConfig(**words))
    else:
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **words))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            if ".act_fn." in name:
                tensor.add_(torch.randn_like(tensor) * 0.4)
    model.to(dtype).save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    """The folder's model in fp32."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    reader: Any = shipped.MegatronActForCausalLM if kind == "megatron_act" else AutoModelForCausalLM
    return reader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def altered(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model folder with other keys in its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def pattern(vocab_size: int) -> torch.Tensor:
    """Token ids (LENGTH,), without the last id, which Megatron's NullTokenizer takes for the end of a document."""
    return torch.randint(vocab_size - 1, (LENGTH,), generator=torch.Generator().manual_seed(1))


def write_periodic(prefix: Path, vocab_size: int) -> Path:
    """A data set of which every sample is `pattern`, then its first token: Megatron's .bin and .idx."""
    tokens = np.tile(pattern(vocab_size).numpy().astype(np.int32), 40)
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    tables = struct.pack("<iqqq", len(tokens), 0, 0, 1)
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2) + tables)
    return prefix


@torch.no_grad()
def loss_of(model: Any, padding: int = 0) -> float:
    """The language-model loss of a sample of `write_periodic`, with ``padding`` more tokens of logit 0."""
    tokens = pattern(model.config.vocab_size)
    logits = F.pad(model(tokens[None]).logits[0], (0, padding))
    return float(F.cross_entropy(logits.double(), tokens.roll(-1)))


@dataclass(frozen=True)
class Continued:
    """A training run from an imported checkpoint."""

    losses: list[float]
    log: str
    saved: Path


def train_on(forked: ForkedRuns, load: Path, work: Path, *flags: str, ranks: int = 2) -> Continued:
    """Trains three steps on by the entry point, with the flags that the import wrote, and saves."""
    import yaml

    vocab_size = yaml.safe_load((load / "megatron_flags.yaml").read_text())["MODEL_ARGS"]["--vocab-size"]
    work.mkdir(parents=True)
    data = write_periodic(work / "data", vocab_size)
    words = f"""--cpu --config {load}/megatron_flags.yaml --load {load} --data-path {data} --split 100,0,0
        --data-cache-path {work}/cache --micro-batch-size 1 --global-batch-size 2 --train-iters 3 --lr 5e-3
        --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1 --num-workers 0
        --metrics-jsonl {work}/metrics.jsonl --save {work}/saved --save-interval 3 --ckpt-format torch_dist
        --distributed-timeout-minutes 2""".split()
    codes = forked.run([*words, *flags], ranks, work / "log.txt")
    log = (work / "log.txt").read_text()
    assert codes == [0] * ranks, log[-3000:]
    events = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return Continued([event["loss"] for event in events if event["event"] == "step"], log, work / "saved")


def _swap_rows(weight: torch.Tensor, order: torch.Tensor) -> None:
    weight.copy_(weight[order])


def _rope_of_pairs(model: Any) -> None:
    """Rows of a head as if rotary embeddings turned neighbours instead of halves."""
    attention = model.model.layers[0].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        rows = torch.arange(len(weight)).view(-1, 2, attention.head_dim // 2)
        _swap_rows(weight, rows.transpose(1, 2).reshape(-1))


def _heads_in_other_groups(model: Any) -> None:
    """Query heads dealt out to the groups in turn, not in blocks."""
    attention = model.model.layers[0].self_attn
    rows = torch.arange(len(attention.q_proj.weight)).view(2, -1, attention.head_dim)
    _swap_rows(attention.q_proj.weight, rows.transpose(0, 1).reshape(-1))


def _keys_for_values(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def _up_for_gate(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def _default_eps(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def _tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _untied(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))


def _plain_rope(model: Any) -> None:
    """Rotary frequencies without the scaling of the config."""
    rope, config = model.model.rotary_emb, model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    rope.inv_freq = rope.original_inv_freq = config.rope_parameters["rope_theta"] ** -exponents


def _factor_of_8(model: Any) -> None:
    """Rotary frequencies of the one llama3 factor that megatron-core passes on."""
    config = copy.deepcopy(model.config)
    config.rope_parameters["factor"] = 8.0
    model.model.rotary_emb = type(model.model.rotary_emb)(config)


def _other_head_dim(model: Any) -> None:
    """Attention scores scaled as if a head had hidden size / heads features."""
    for layer in model.model.layers:
        layer.self_attn.scaling = (model.config.hidden_size / model.config.num_attention_heads) ** -0.5


def _no_qk_norm(model: Any) -> None:
    model.model.layers[0].self_attn.q_norm.weight.fill_(1.0)


MISTAKES: dict[str, Callable[[Any], None]] = {
    "rope of pairs": _rope_of_pairs,
    "heads in other groups": _heads_in_other_groups,
    "keys for values": _keys_for_values,
    "up for gate": _up_for_gate,
    "default eps": _default_eps,
    "tied": _tied,
    "untied": _untied,
    "plain rope": _plain_rope,
    "factor of 8": _factor_of_8,
    "other head dim": _other_head_dim,
    "no QK-norm": _no_qk_norm,
}
GENERAL = ("rope of pairs", "heads in other groups", "keys for values", "default eps")


def changes_of(model: Any) -> dict[str, Callable[[Any], None]]:
    """Every scalar of a model set to what it is at init, each alone, and every constant slope at 0 to another."""
    names = [name for name, _ in model.named_parameters() if ".act_fn." in name]

    def reset(name: str) -> Callable[[Any], None]:
        initial = shipped.FORMULAS[_activation(model)][1][name.rpartition(".")[2]]
        return lambda other: other.get_parameter(name).fill_(initial)

    slopes = [name for name, _ in model.named_buffers() if name.endswith(".act_fn.beta")]
    moved = {name: lambda other, name=name: other.get_buffer(name).fill_(0.49) for name in slopes}
    return {name: reset(name) for name in names} | moved


def _activation(model: Any) -> str:
    return getattr(model.config, "activation", None) or model.config.hidden_act
