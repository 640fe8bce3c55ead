"""The oracle against models that others wrote: transformers' in fp64, torch's norms, the registry's derivatives."""

import math
from typing import Any

import pytest
import torch
import transformers
from oracle_gpt import GPT, Elementwise, Record, Shape, Weights, norm
from oracle_state import Shard, from_hugging_face, from_megatron, gather
from torch.overrides import TorchFunctionMode

from megatron_act.kernels import api as kernels

BOUND = 1e-12
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


class KeepDouble(TorchFunctionMode):
    """transformers casts to fp32 in norms, rotary embeddings and softmax whatever it is given; here these stay fp64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        wide = {torch.float32: torch.float64, torch.float: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {key: wide.get(v, v) if isinstance(v, torch.dtype) else v for key, v in (kwargs or {}).items()}
        return torch.Tensor.double(args[0]) if func is torch.Tensor.float else func(*args, **kwargs)


def hugging_face(name: str, **options: Any) -> Any:
    """A random model of a family, every weight moved from its start, built and run in fp64."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    with KeepDouble():
        model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


FAMILIES = {
    "Llama": ("silu", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Qwen3": ("silu", {"tie_word_embeddings": False}),
    "Arcee": ("relu2", {}),
    "Apertus": ("xielu", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    """Apertus's activation takes the other branch's value at -1e-6 < x <= 0: no pre-activation is there."""
    activation, options = FAMILIES[name]
    model = hugging_face(name, **options)
    tokens = torch.randint(SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    with KeepDouble():
        theirs = model(ids).logits
        torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten()).backward()
    state = {key: tensor.detach().double() for key, tensor in model.state_dict().items()}
    if options.get("tie_word_embeddings"):
        state.pop("lm_head.weight")
    leaves = {key: tensor.requires_grad_() for key, tensor in state.items()}
    oracle = GPT(Shape(activation, 4, 2, norm_eps=1e-4, rope_base=100.0), from_hugging_face(leaves))
    assert (oracle.logits(ids) - theirs).abs().max() < BOUND
    oracle.loss(ids, labels, torch.ones_like(ids))[0].backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert set(grads) <= set(leaves)
    assert {key: (leaves[key].grad - grad).norm() / grad.norm() for key, grad in grads.items()} == pytest.approx(
        dict.fromkeys(grads, 0.0), abs=BOUND
    )


def test_experts_equal_transformers() -> None:
    """Qwen3's experts are gated and fused into two tensors; the router is the same softmax over the chosen logits."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    model = hugging_face("Qwen3Moe", **options, mlp_only_layers=[0], experts_implementation="eager")
    tokens = torch.randint(SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(5))
    with KeepDouble():
        theirs = model(tokens).logits
    state = {}
    for key, tensor in from_hugging_face(model.state_dict()).items():
        key = key.replace(".mlp.gate.weight", ".mlp.router.weight") if tensor.shape[0] == 4 else key
        for number, expert in enumerate(tensor) if ".experts." in key else ():
            prefix = f"{key.rsplit('.', 1)[0]}.{number}"
            if key.endswith("gate_up_proj"):
                state[f"{prefix}.gate.weight"], state[f"{prefix}.up.weight"] = expert.chunk(2)
            else:
                state[f"{prefix}.down.weight"] = expert
        if ".experts." not in key:
            state[key] = tensor
    oracle = GPT(Shape("silu", 4, 2, norm_eps=1e-4, rope_base=100.0), state)
    assert (oracle.logits(tokens) - theirs).abs().max() < BOUND
    assert 0 < oracle.record.margin < 1


def test_layer_norm_equals_torch() -> None:
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 8), (8,), (8,)))
    ours = norm(Weights({"weight": weight, "bias": bias}), x, Shape("relu", 1, 1, layer_norm=True, norm_eps=1e-3))
    assert (ours - torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-3)).abs().max() < 1e-14


@pytest.mark.parametrize("name", kernels.names())
def test_derivatives_equal_the_registrys(name: str) -> None:
    """Automatic differentiation of the forward formula against the formula for the derivatives."""
    rng = torch.Generator().manual_seed(1)
    x = (2 * torch.randn(500, generator=rng).double()).requires_grad_()
    raws = [torch.tensor([param.raw_init + 0.1]).double().requires_grad_() for param in kernels.get(name).params]
    grad = torch.randn(500, generator=rng).double()
    record, names = Record(), [param.name for param in kernels.get(name).params]
    ours = torch.autograd.grad(Elementwise.apply(name, names, record, x, *raws), [x, *raws], grad)
    theirs = torch.autograd.grad(kernels.get(name).reference(x, *raws), [x, *raws], grad)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)) < 1e-13
    assert all(record.terms[key] > abs(float(total)) for key, total in zip(names, ours[1:], strict=True))


def shard(offset: int, value: list[float]) -> Shard:
    return Shard("w", (4,), (offset,), torch.tensor(value), 0, torch.tensor([]))


def test_shards_become_whole_tensors_and_faults_are_named() -> None:
    whole = gather([shard(0, [1.0, 2.0]), shard(2, [3.0, 4.0]), shard(0, [1.0, 2.0])])
    assert whole["w"].dtype == torch.float64
    assert whole["w"].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="w: expected equal values on all ranks"):
        gather([shard(0, [1.0, 2.0]), shard(2, [3.0, 4.0]), shard(0, [1.0, 2.5])])
    with pytest.raises(ValueError, match="expected every element on some rank"):
        gather([shard(0, [1.0, 2.0])])


def test_megatrons_interleaved_queries_keys_and_values_are_taken_apart() -> None:
    """Two groups of two queries each: rows q q k v q q k v, here of two channels."""
    rows = torch.arange(16.0)[:, None]
    found = from_megatron({"decoder.layers.0.self_attention.linear_qkv.weight": rows}, Shape("relu", 4, 2))
    taken = {key.rsplit(".", 2)[1]: tensor.flatten().tolist() for key, tensor in found.items()}
    assert taken == {"q": [0, 1, 2, 3, 8, 9, 10, 11], "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    gated = from_megatron({"decoder.layers.0.mlp.linear_fc1.weight": rows}, Shape("relu", 4, 2), gated=True)
    assert gated["layers.0.mlp.up.weight"].tolist() == rows[8:].tolist()
    assert math.isclose(float(gated["layers.0.mlp.gate.weight"].sum()), 28.0)
