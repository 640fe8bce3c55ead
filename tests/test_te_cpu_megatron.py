"""Megatron's Transformer Engine layers and whole training runs on the stand-in (``te_cpu``)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from te_cpu.cases import RECIPES, recipe_of
from te_cpu.process import in_engine, one_rank
from torch import Tensor

TRAINING = Path(__file__).parent / "training"
ENTRY = Path(__file__).parent / "te_cpu" / "pretrain_gpt.py"


@in_engine
def test_megatrons_layers_compute_the_same_model() -> None:
    """A GPT model of local layers and of TE's, in bf16: logits and every gradient."""
    one_rank()
    sys.path.append(str(TRAINING / "workers"))
    import variants
    from small_gpt import Variant

    found = variants.difference("cpu", Variant(dtype="bfloat16"), Variant(dtype="bfloat16", engine=True))
    assert {name: error for name, error in found.items() if error > 6e-2} == {}, found


@pytest.mark.parametrize(("name", "fused"), [(name, fused) for name in RECIPES for fused in (False, True)])
@in_engine
def test_megatrons_fp8_layers_learn(name: str, fused: bool) -> None:
    """SwiGLU in TE's modules and in its op fuser: loss and gradients near those of bf16; scales have left 1."""
    one_rank()
    recipe_of(name)
    fp8 = {"fp8": "hybrid" if name == "delayed" else "e4m3", "fp8_recipe": name}
    (plain, plain_grads), (loss, grads) = swiglu_model(fused), swiglu_model(fused, **fp8)
    assert loss != plain and loss == pytest.approx(plain, rel=2e-3)
    for key, grad in grads.items():
        difference = (grad - plain_grads[key]).norm() / plain_grads[key].norm()
        assert difference < 0.2, f"{key}: {difference}"


def swiglu_model(fused: bool, **fp8: str) -> tuple[float, dict[str, Tensor]]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, normalization="RMSNorm", bf16=True,
        add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, params_dtype=torch.bfloat16, use_cpu_initialization=True,
        use_transformer_engine_op_fuser=fused, **fp8,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec(use_te_op_fuser=fused)
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=32, position_embedding_type="rope")
    tokens = torch.arange(64).reshape(2, 32)
    for _ in range(2):
        model.zero_grad()
        loss = model(tokens, torch.arange(32).expand(2, 32), None, labels=tokens.flip(1)).mean()
        loss.backward()
    return loss.item(), {name: param.grad.float() for name, param in model.named_parameters() if param.grad is not None}


RUN = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --activation xielu --bf16 --train-iters 4 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 511 --transformer-impl transformer_engine
""".split()  # noqa: SIM905
DELAYED = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]


def losses(folder: Path, *flags: str, ranks: int = 1) -> list[float]:
    sys.path.append(str(TRAINING))
    from training_support import MODEL_FLAGS, environment, torchrun

    metrics = folder / f"{len(list(folder.iterdir()))}.jsonl"
    words = [str(ENTRY), "--cpu", *MODEL_FLAGS, *RUN, "--metrics-jsonl", str(metrics), *flags]
    if ranks > 1:
        done = torchrun(*words, ranks=ranks)
    else:
        command = [sys.executable, *words]
        done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr}"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.distributed
def test_whole_runs(tmp_path: Path) -> None:
    """The entry point with TE's layers: bf16 against Megatron's local ones, FP8 against bf16, FP8 in two ranks."""
    local, plain = losses(tmp_path, "--transformer-impl", "local"), losses(tmp_path)
    assert plain == pytest.approx(local, abs=5e-3) and plain[0] - plain[-1] > 0.5
    delayed = losses(tmp_path, *DELAYED)
    assert delayed != plain and delayed == pytest.approx(plain, abs=2e-2)
    split = losses(tmp_path, *DELAYED, "--tensor-model-parallel-size", "2", "--sequence-parallel", ranks=2)
    assert split == pytest.approx(delayed, abs=1e-1)  # other initial weights: TP 2 draws them from other seeds
