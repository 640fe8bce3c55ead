"""Task: Megatron-Core's inference engine, with its cache of keys and values, against the training forward pass.

The engine is ``StaticInferenceEngine`` in its own loop (``legacy``), whose decoding Megatron's local layers run on any
device; the dynamic engine needs flash attention. On the CPU two names of CUDA that it reads are replaced.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.activations import squared_relu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_local_submodules
from megatron.core.transformer.enums import AttnBackend, CudaGraphModule
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import InferenceGroupedMLP
from small_gpt import LENGTH, VOCAB, Variant, build, forward, settings

from megatron_act import specs
from megatron_act.activation import activations_of

PROMPTS = ["3 14 15 9 2 6 5", "35 8 9 7"]
NEW_TOKENS = 6


class Words:
    """A tokenizer: numbers in a text are token ids."""

    eod, vocab_size, bos = VOCAB, VOCAB, None  # no end: every prompt gets all its tokens

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class Clock:
    """A CUDA event where there is no CUDA."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: "Clock") -> float:
        return 0.0


@contextlib.contextmanager
def cuda_names(device: str) -> Iterator[None]:
    """Random generators and events on the CPU, for the engine."""
    if device != "cpu":
        yield
        return
    generator = torch.Generator
    with (
        mock.patch.object(torch, "Generator", lambda device=None: generator()),
        mock.patch.object(torch.cuda, "Event", Clock),
    ):
        yield


def generate(device: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per variant: the largest differences of logits, and whether the greedy tokens are the training pass's."""
    return {name: measure(device, Variant(**fields)) for name, fields in cases.items()}


def measure(device: str, variant: Variant) -> dict[str, Any]:
    torch.manual_seed(5)
    model = build(variant, device)
    tokens, decoded, generated = run_engine(model, device)
    with torch.no_grad():
        trained = forward(model.train(), tokens)
        evaluated = forward(model.eval(), tokens)
        activations_of(model)[0].raw_scalars()[0].add_(0.05)
        changed = forward(model.train(), tokens)
    best = trained.argmax(-1)
    wanted = [best[row, len(words.split()) - 1 :][:NEW_TOKENS].tolist() for row, words in enumerate(PROMPTS)]
    return {
        "positions": decoded.shape[1],
        "plain": float((evaluated - trained).abs().max()),
        "engine": float((decoded - trained).abs().max()),
        "other scalar": float((decoded - changed).abs().max()),
        "generated": generated,
        "wanted": wanted,
    }


def run_engine(model: Any, device: str) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """What the engine fed to the model (batch, positions), the logits that it got, and the tokens that it chose."""
    model.config.attention_backend = AttnBackend.local  # the wrapper then makes the mask that local attention needs
    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(len(PROMPTS), LENGTH))
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = wrapper.run_one_forward_step

    def keep(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = step(inputs)
        steps.append((inputs["tokens"].clone(), logits.clone()))
        return logits

    wrapper.run_one_forward_step = keep
    sampling = SamplingParams(num_tokens_to_generate=NEW_TOKENS, top_k=1, return_log_probs=True)
    with cuda_names(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the static engine announces its end
        engine = StaticInferenceEngine(TextGenerationController(wrapper, Words()), legacy=True)
        requests = engine.generate(prompts=PROMPTS, sampling_params=sampling)
    InferenceMode.unset_active()
    fed, logits = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    return fed, logits, [request.generated_tokens.tolist() for request in requests]


def refusals(device: str) -> dict[str, str]:
    """What is said where Megatron would compute another activation in silence."""
    config = settings(Variant(), device)
    specs.with_activation(get_gpt_layer_local_spec(), "relu2", config)
    mixture = settings(Variant(experts=True), device)
    submodules = get_gpt_layer_local_submodules(num_experts=4)
    submodules.mlp.keywords["submodules"].experts = partial(InferenceGroupedMLP, submodules=None)
    stock = SimpleNamespace(submodules=submodules)
    optimized, graphs, attention_graphs = (settings(Variant(), device) for _ in range(3))
    optimized.transformer_impl = "inference_optimized"
    graphs.cuda_graph_impl = attention_graphs.cuda_graph_impl = "local"
    attention_graphs.cuda_graph_modules = [CudaGraphModule.attn]
    linears = get_gpt_layer_local_submodules().mlp.keywords["submodules"]
    experts = SimpleNamespace(config=config)

    def place(chosen: Any) -> str:
        return said(lambda: specs.with_activation(get_gpt_layer_local_spec(), "xielu", chosen))

    return {
        "stock MLP": said(lambda: MLP(config, linears)(torch.zeros(4, 1, config.hidden_size, device=device))),
        "fused experts": said(lambda: InferenceGroupedMLP._resolve_mcore_activation_type(experts)),
        "fused experts, stock": said(lambda: _fused_type_of_squared_relu(device)),
        "inference experts": said(lambda: specs.with_activation(stock, "xielu", mixture)),
        "inference layers": place(optimized),
        "graphs": place(graphs),
        "graphs of attention": place(attention_graphs),
    }


def _fused_type_of_squared_relu(device: str) -> None:
    """The control: with Megatron's own function the kernel is found."""
    config = settings(Variant(), device)
    config.activation_func = squared_relu
    raise ValueError(InferenceGroupedMLP._resolve_mcore_activation_type(SimpleNamespace(config=config)).name)


def said(action: Any) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
