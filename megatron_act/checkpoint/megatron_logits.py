"""Runs checkpoints through Megatron's own GPTModel on the CPU, in fp32 and without parallelism.

    python -m megatron_act.checkpoint.megatron_logits CHECKPOINT FOLDER [CHECKPOINT FOLDER]...

reads ``tokens.npy`` in each folder and writes ``megatron_logits.npy`` and ``megatron_states.npy`` beside it; where
``request.json`` asks for a greedy text, it continues the prompt of ``generated.npy`` in ``megatron_generated.npy``.

The model is built from the arguments that the checkpoint saved and loaded by Megatron's own distributed checkpointing,
so that nothing of the export's tables or reader takes part in the comparison.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_act import cpu_backend, te

# How the checkpoint's run was laid out and sped up, undone; what the model computes is left alone.
PLAIN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "tensor_parallel_num_weight_shards": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "expert_tensor_parallel_num_weight_shards": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_p2p_comm": False,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "use_transformer_engine_op_fuser": False,
    "recompute_granularity": None,
    "recompute_modules": None,
    "cuda_graph_impl": "none",
    "fp8": None,
    "fp4": None,
    "bf16": False,
    "fp16": False,
    "activation_backend": "reference",
}


def build_model(args: Namespace) -> Any:
    """Megatron's GPTModel for the arguments of a checkpoint, on the CPU in fp32 and without parallelism."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_act.specs import layer_spec

    vars(args).update(PLAIN, params_dtype=torch.float32)
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = getattr(args, "rope_scaling_factor", config.rope_scaling_factor)  # it drops that flag
    if getattr(args, "activation", None):
        own = getattr(args, "activation_per_expert", False)
        config.transformer_layer_spec = layer_spec(args.activation, backend="reference", per_expert=own)
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def start() -> None:
    """Installs the CPU backend and makes this process a process group of one."""
    te.check_before_megatron(cpu=True)
    cpu_backend.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def load_model(path: str) -> Any:
    """The model of an ``iter_XXXXXXX`` folder with its weights, loaded by Megatron; after `start`."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict
    from megatron.core.dist_checkpointing.validation import StrictHandling

    common = load_common_state_dict(path)
    model = build_model(common["args"])
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = model.sharded_state_dict(metadata=metadata)
    loaded = dist_checkpointing.load(wanted, path, strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    model.load_state_dict({key: loaded[key] for key in wanted})
    return model


def logits_of(model: Any, tokens: Any) -> Any:
    """Logits (windows, length, padded vocabulary) of token ids (windows, length), one window at a time."""
    import torch

    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        return torch.cat([model(window[None], positions, None) for window in tokens])


def states_of(model: Any, tokens: Any) -> tuple[Any, Any]:
    """`logits_of`, and the hidden states (places, windows, length, hidden) behind embedding, layers and last norm."""
    import torch

    kept: list[list[torch.Tensor]] = []
    hooks = []
    for part in (model.embedding, *model.decoder.layers, model.decoder.final_layernorm):
        kept.append([])
        # (length, 1, hidden); a layer returns a context beside it
        hooks.append(
            part.register_forward_hook(
                lambda _, __, out, into=kept[-1]: into.append((out[0] if isinstance(out, tuple) else out)[:, 0])
            )
        )
    logits = logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([torch.stack(windows) for windows in kept])


def continued(model: Any, ids: Any, new_tokens: int, vocab_size: int) -> Any:
    """Greedy continuation of ids (length,), the whole sequence computed anew for each token; padding rows never win."""
    import torch

    for _ in range(new_tokens):
        best = logits_of(model, ids[None])[0, -1, :vocab_size].argmax()
        ids = torch.cat([ids, best[None]])
    return ids


def answer(path: str, work: Path) -> None:
    """Answers one folder with ``tokens.npy`` and ``hf_logits.npy`` for the checkpoint in ``path``."""
    import numpy as np
    import torch

    model = load_model(path)
    logits, states = states_of(model, torch.from_numpy(np.load(work / "tokens.npy")))
    np.save(work / "megatron_logits.npy", logits.numpy())
    np.save(work / "megatron_states.npy", states.numpy())
    if not json.loads((work / "request.json").read_text(encoding="utf-8"))["sample"]:
        ids, new = torch.from_numpy(np.load(work / "generated.npy")), len(np.load(work / "margins.npy"))
        vocab_size = np.load(work / "hf_logits.npy", mmap_mode="r").shape[-1]
        np.save(work / "megatron_generated.npy", continued(model, ids[: len(ids) - new], new, vocab_size).numpy())


def main(words: list[str]) -> None:
    """Answers pairs of an ``iter_XXXXXXX`` folder and a folder that `hf_logits` has answered."""
    start()
    for path, folder in zip(words[::2], words[1::2], strict=True):
        answer(path, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
