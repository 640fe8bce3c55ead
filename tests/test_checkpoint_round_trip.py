"""Model folders into Megatron and out again at once: no bit of a tensor changes, in no combination of parts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_args import common_states
from checkpoint_support import altered, random_model, with_config
from forked_runs import ForkedRuns, forked_runs
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_act.checkpoint.export import check_all_used, export
from megatron_act.checkpoint.families import choose
from megatron_act.checkpoint.import_flags import megatron_flags, open_source
from megatron_act.checkpoint.import_hf import import_model
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_act.errors import UserError

pytestmark = pytest.mark.distributed

EXPERTS = {"activation": "crrelu", "num_experts": 4, "moe_intermediate_size": 24, "activation_per_expert": True}
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# kind of model, dtype, what differs from checkpoint_support.SIZES
MODELS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "a key head for each query head": ("llama", FULL, {"num_key_value_heads": 4}),
    "one key head, tied": ("llama", HALF, {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 127}),
    "fp16": ("apertus", HALF, {"head_dim": 12}),
    "bf16, wide heads": ("arcee", BRAIN, {"head_dim": 16, "num_key_value_heads": 4}),
    "experts": ("megatron_act", BRAIN, EXPERTS | {"head_dim": 12, "qk_norm": True, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round_trip")


@pytest.fixture(scope="module")
def forked(base: Path) -> Iterator[ForkedRuns]:
    with forked_runs(base / "server.log") as runs:
        yield runs


def there_and_back(folder: Path, work: Path, forked: ForkedRuns) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_act.checkpoint.import_hf.common_state", common_states(forked, work.parent))
        import_model(folder, work / "megatron", tensor_parallel=2, progress=False)
    return export(work / "megatron", work / "back", progress=False).output


def same(folder: Path, back: Path) -> None:
    wanted, got = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if ".act_fn." not in name:
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        elif not name.endswith(("beta", "eps")) or tensor.dim():  # constants are written anew
            assert got[name].dtype == FULL and torch.equal(got[name], tensor.float()), name


@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes(name: str, tmp_path: Path, forked: ForkedRuns) -> None:
    kind, dtype, changes = MODELS[name]
    folder = random_model(kind, tmp_path / "hf", dtype, **changes)
    back = there_and_back(folder, tmp_path, forked)
    same(folder, back)
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert (second["dtype"], second["num_key_value_heads"]) == (first["dtype"], first["num_key_value_heads"])


def test_each_tensor_keeps_its_dtype(tmp_path: Path, forked: ForkedRuns) -> None:
    """Norms in fp32 beside bf16 weights; parts of one Megatron tensor take the wider type."""
    plain = random_model("llama", tmp_path / "plain", BRAIN)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" in name:
                tensors[name] = torch.rand_like(tensors[name], dtype=FULL)
            if "k_proj" in name:
                tensors[name] = torch.rand_like(tensors[name], dtype=FULL)

    folder = altered(plain, tmp_path / "hf", widen)
    wanted, got = (load_file(path / "model.safetensors") for path in (folder, there_and_back(folder, tmp_path, forked)))
    fused = ("q_proj", "v_proj")
    assert all(torch.equal(got[name].double(), tensor.double()) for name, tensor in wanted.items())
    assert all(got[name].dtype == wanted[name].dtype for name in wanted if not any(part in name for part in fused))
    key = "model.layers.1.mlp.up_proj.weight"
    odd = altered(plain, tmp_path / "odd", lambda tensors: tensors.update({key: tensors[key].float()}))
    with pytest.raises(UserError, match="expected one dtype in all layers"):
        there_and_back(odd, tmp_path / "other", forked)


def test_rows_beyond_the_tokenizer_are_kept(tmp_path: Path, forked: ForkedRuns) -> None:
    """Public models have more rows than their tokenizers have tokens."""
    folder = random_model("qwen3", tmp_path / "hf", FULL, head_dim=12, vocab_size=127)
    vocabulary = {f"word{number}": number for number in range(100)}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="word0")))
    words.save_pretrained(folder)
    back = there_and_back(folder, tmp_path, forked)
    assert len(load_file(back / "model.safetensors")["model.embed_tokens.weight"]) == 127
    same(folder, back)


def test_the_files_that_transformers_reads(tmp_path: Path) -> None:
    """Beside an index left over from an earlier model, transformers takes model.safetensors."""
    folder = random_model("llama", tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "old.safetensors"}}')
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    assert {stored.file.name for stored in SafetensorsFolder(folder).tensors.values()} == {"model.safetensors"}
    (folder / "model.safetensors").unlink()
    for broken in ("{", "[]", '{"weight_map": 1}'):
        index.write_text(broken)
        with pytest.raises(UserError, match="expected an index with a weight_map"):
            SafetensorsFolder(folder)


def test_models_that_are_not_what_their_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_act.checkpoint.import_hf.common_state", lambda words: b"")
    llama = random_model("llama", tmp_path / "llama")
    own = random_model("megatron_act", tmp_path / "own", activation="xielu", head_dim=8)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (llama, {"tie_word_embeddings": True}, "expected lm_head.weight equal to model.embed_tokens.weight"),
        (llama, {"num_key_value_heads": 3}, r"num_attention_heads \(4\) a multiple of num_key_value_heads \(3\)"),
        (llama, {"hidden_size": None}, "expected a config that transformers reads"),
        (own, {"activation": "tanh"}, "expected activation crrelu, .*, got 'tanh'"),
    ]
    for number, (model, changes, message) in enumerate(cases):
        folder = with_config(model, tmp_path / str(number), **changes)
        with pytest.raises(UserError, match=message) as refused:
            import_model(folder, tmp_path / "out", progress=False)
        assert "\n" not in str(refused.value)
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5}}
    source = open_source(with_config(llama, tmp_path / "theta", **theta))
    with pytest.raises(
        UserError, match=f"{tmp_path}/theta/config.json: expected a whole number"
    ):  # the user's own file
        megatron_flags(source, "swiglu", 128, tokenizer=False)


def test_nothing_of_a_checkpoint_is_dropped(tmp_path: Path, forked: ForkedRuns) -> None:
    """More layers than the arguments say, or an output matrix of a model that they call tied."""
    there_and_back(random_model("llama", tmp_path / "hf"), tmp_path, forked)
    for change, name in (
        ({"num_layers": 1}, "decoder.layers.mlp.linear_fc1"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight besides"),
    ):
        checkpoint = MegatronCheckpoint(tmp_path / "megatron")
        vars(checkpoint.args).update(change)
        with pytest.raises(UserError, match=f"got {name}.*: it would be lost"):
            check_all_used(checkpoint, choose(checkpoint.args, "swiglu"))
