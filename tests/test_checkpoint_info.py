"""info: what a checkpoint, a model folder or a config holds, which programs open it, what converting it takes."""

import io
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_scale import SMALL, random_checkpoint
from checkpoint_support import random_model
from safetensors.torch import load_file, save_file

from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.hf_config import AUTO_MAP
from megatron_act.checkpoint.info import describe, text
from megatron_act.checkpoint.info_checkpoint import describe_checkpoint
from megatron_act.checkpoint.info_openers import openers
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.torch_dist import Part
from megatron_act.checkpoint.torch_dist import write_checkpoint as write_parts
from megatron_act.checkpoint.verify import verify
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

PARAMS = {param.name: param for param in kernels.get("xielu").params}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info")
    random_checkpoint(folder, SMALL, ranks=2, iteration=7)
    export(folder / "checkpoint", folder / "hf", progress=False)
    return folder


def test_a_checkpoint(base: Path) -> None:
    content = describe(base / "checkpoint")
    checkpoint = MegatronCheckpoint(base / "checkpoint")
    assert (content["iteration"], content["activation"], content["exports_as"]) == (7, "xielu", "ApertusForCausalLM")
    assert content["layout"]["tensor_model_parallel_size"] == 2
    assert content["model"]["num_query_groups"] == 4
    fc1 = next(each for each in content["tensors"] if each["name"] == "decoder.layers.mlp.linear_fc1.weight")
    assert fc1 == {"name": fc1["name"], "shape": [3, 96, 64], "dtype": "bfloat16", "chunks": 6}
    layer = 64 * 64 * 4 + 2 * 96 * 64 + 2 * 64 + 2 * 16 + 2
    assert content["parameters"] == 3 * layer + 2 * 256 * 64 + 64
    for i, values in enumerate(content["scalars_by_layer"]):
        for name, param in PARAMS.items():
            raw = float(checkpoint.layer_tensor(f"mlp.activation_func.{name}", i))
            assert values[name] == [param.effective(raw)]
    assert len({values["alpha_p"][0] for values in content["scalars_by_layer"]}) == 3
    assert content["conversion"]["largest_tensor_bytes"] == 256 * 64 * 2  # not the three layers' fc1 together


def test_a_model_folder_says_the_same(base: Path) -> None:
    checkpoint, model = describe(base / "checkpoint"), describe(base / "hf")
    assert model["architecture"] == checkpoint["exports_as"]
    for key in ("parameters", "activation", "scalars_by_layer", "opens_in"):
        assert model[key] == checkpoint[key], key
    assert model["conversion"]["largest_tensor"] == "model.embed_tokens.weight"
    assert model["conversion"]["peak_memory_bytes"] == checkpoint["conversion"]["peak_memory_bytes"]
    assert {each["file"] for each in model["tensors"]} == {"model.safetensors"}
    assert json.loads(json.dumps(model)) == model


def test_a_model_that_is_flags_or_a_config_so_far(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "hf" / "config.json", tmp_path)
    for path in (base / "model.yaml", tmp_path):
        content = describe(path)
        assert content["parameters"] == describe(base / "checkpoint")["parameters"]
        assert content["conversion"]["peak_memory_bytes"] == describe(base / "hf")["conversion"]["peak_memory_bytes"]


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_experts": 3, "moe_intermediate_size": 40}]
)
def test_a_config_of_our_own_says_what_its_folder_does(tmp_path: Path, changes: dict) -> None:
    changes = changes | {"activation": "crrelu", "qk_norm": True, "activation_per_expert": True}
    random_model("megatron_act", tmp_path / "hf", **changes)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "alone")
    alone, whole = describe(tmp_path / "alone"), describe(tmp_path / "hf")
    assert alone["parameters"] == whole["parameters"]
    for key in ("largest_tensor_bytes", "peak_memory_bytes", "peak_memory_bytes_float32", "disk_bytes"):
        assert alone["conversion"][key] == whole["conversion"][key], key
    assert alone["activation"] == "crrelu" and "parameters" in text(alone)


def test_the_bound_counts_gate_and_up_together_and_the_wider_dtype(tmp_path: Path) -> None:
    """Megatron holds both in one tensor, which an import with --dtype float32 fills in fp32."""
    random_model("llama", tmp_path / "hf", torch.bfloat16, intermediate_size=200)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "alone")
    for folder in (tmp_path / "hf", tmp_path / "alone"):
        cost = describe(folder)["conversion"]
        assert cost["largest_tensor_bytes"] == 2 * 200 * 32 * 2
        assert cost["peak_memory_bytes"] == 450 * 10**6 + 3 * 2 * 200 * 32 * 2
        assert cost["peak_memory_bytes_float32"] == 450 * 10**6 + 3 * 2 * 200 * 32 * 4


def test_the_70b_model_converts_in_7_gigabytes() -> None:
    content = describe(Path(__file__).parents[1] / "configs" / "apertus-70b-xielu.yaml")
    assert content["conversion"]["largest_tensor_bytes"] == 131072 * 8192 * 2
    assert content["conversion"]["peak_memory_bytes"] == 450 * 10**6 + 3 * 131072 * 8192 * 2
    assert "at most 6.89 GB of memory, 13.33 GB with --dtype float32 (" in text(content)


def test_text_has_every_fact(base: Path) -> None:
    shown = text(describe(base / "checkpoint"))
    content = describe(base / "checkpoint")
    rows = [line.split() for line in shown.splitlines()[-3:]]
    names = shown.splitlines()[-4].split()[1:3]
    for row, values in zip(rows, content["scalars_by_layer"], strict=True):
        assert [float(word) for word in row[1:]] == pytest.approx([values[name][0] for name in names], abs=1e-6)
    for part in ("iteration    7", "tensor_model_parallel_size 2", "ApertusForCausalLM", "3x96x64", "vllm         yes"):
        assert part in shown
    assert "scalar " in text(describe(base / "hf"))  # shape () of beta and eps


def test_missing_constants_open_nowhere(base: Path, tmp_path: Path) -> None:
    """transformers would fill them with uninitialised memory and only report it."""
    shutil.copytree(base / "hf", tmp_path / "hf")
    tensors = load_file(base / "hf" / "model.safetensors")
    for name in ("model.layers.1.mlp.act_fn.beta", "model.layers.2.mlp.act_fn.eps"):
        del tensors[name]
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    answers = describe(tmp_path / "hf")["opens_in"]
    assert set(answers) == {"transformers", "vllm"}
    assert all(answer.startswith("no: 2 tensors are missing") for answer in answers.values())


def test_our_own_modelling_file_needs_no_constants(base: Path, tmp_path: Path) -> None:
    export(base / "checkpoint", tmp_path / "hf", family="megatron_act", progress=False)
    content = describe(tmp_path / "hf")
    assert content["opens_in"]["transformers"].startswith("yes, with trust_remote_code=True")
    assert content["scalars_by_layer"] == describe(base / "hf")["scalars_by_layer"]


@pytest.mark.parametrize(
    ("experts", "answer"), [(None, "yes, with trust"), (4, "no: its Transformers backend replaces")]
)
def test_a_checkpoint_answers_as_its_export_will(base: Path, experts: int | None, answer: str) -> None:
    """vLLM runs a dense model with our modelling file, which a checkpoint's folder does not hold yet."""
    checkpoint = MegatronCheckpoint(base / "checkpoint")
    vars(checkpoint.args).update(qk_layernorm=False, num_experts=experts)
    assert describe_checkpoint(checkpoint)["opens_in"]["vllm"].startswith(answer)


CONFIGS = [
    ("ApertusForCausalLM", "xielu", "yes; scalars take the dtype", "yes, but it rounds xielu's scalars to bfloat16"),
    ("ApertusForCausalLM", "relu2", "yes", "no: its ApertusForCausalLM raises unless hidden_act is xielu"),
    ("ArceeForCausalLM", "relu2", "yes", "yes"),
    ("ArceeForCausalLM", "xielu", "yes, but ArceeForCausalLM rounds xielu's scalars to bfloat16", "yes, but it rounds"),
    ("LlamaForCausalLM", "silu", "yes", "yes"),
    ("Qwen3ForCausalLM", "silu", "yes", "yes"),
    ("OtherForCausalLM", "xielu", "unknown", "no: it has no OtherForCausalLM"),
]


@pytest.mark.parametrize(("architecture", "activation", "transformers", "vllm"), CONFIGS)
def test_who_opens_it(architecture: str, activation: str, transformers: str, vllm: str) -> None:
    answers = openers({"architectures": [architecture], "hidden_act": activation})
    assert answers["transformers"].startswith(transformers) and answers["vllm"].startswith(vllm)
    assert (answers["vllm"] == "yes") == (vllm == "yes")


def test_own_modelling_file_needs_trust() -> None:
    config = {"architectures": ["MegatronActForCausalLM"], "auto_map": AUTO_MAP}
    assert all("yes, with trust_remote_code=True" in answer for answer in openers(config).values())
    assert openers(config | {"num_experts": 4})["vllm"].startswith("no: its Transformers backend replaces experts")
    older = config | {"auto_map": {"AutoModelForCausalLM": "x"}}
    assert openers(older)["vllm"].startswith("no: it has no MegatronActForCausalLM")


def part(name: str, rows: tuple[int, ...], row: tuple[int, ...], values: torch.Tensor) -> Part:
    return Part(f"decoder.layers.mlp.{name}", row, rows, tuple(values.shape), values.dtype, lambda: values)


def test_scalars_of_each_expert(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    args = Namespace(activation="crrelu", num_layers=2, num_experts=3, qk_layernorm=False)
    torch.save({"args": args, "iteration": 0}, buffer)
    rows = [(i, j) for i in range(2) for j in range(3)]
    parts = [
        part("experts.experts.activation_func.eps", (2, 3), row, torch.tensor([row[0] + row[1] / 8])) for row in rows
    ]
    parts += [part("experts.experts.linear_fc1.weight", (2, 3), row, torch.ones(5, 4)) for row in rows]
    parts += [part("shared_experts.activation_func.eps", (2,), (i,), torch.tensor([0.5 + i])) for i in range(2)]
    write_parts(tmp_path, parts, buffer.getvalue(), [], lambda _: None)
    content = describe(tmp_path)
    assert content["scalars_by_layer"] == [
        {"eps": [0.0, 0.125, 0.25], "shared.eps": [0.5]},
        {"eps": [1.0, 1.125, 1.25], "shared.eps": [1.5]},
    ]
    assert content["conversion"]["largest_tensor_bytes"] == 5 * 4 * 4  # one expert
    assert "1.000000..1.250000" in text(content).splitlines()[-1]


@pytest.mark.parametrize("change", [Path.unlink, lambda file: os.truncate(file, 1000)])
def test_a_file_missing_or_cut_short_is_named(base: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    shutil.copytree(base / "checkpoint", tmp_path / "broken")
    (file,) = (tmp_path / "broken").rglob("__1_0.distcp")
    size = file.stat().st_size
    change(file)
    said = f"{file.name} has 1000 of {size} bytes" if file.exists() else f"{file.name} is missing"
    calls = (describe, lambda path: export(path, tmp_path / "hf"), lambda path: verify(path, base / "hf"))
    for call in calls:
        with pytest.raises(UserError, match=re.escape(f"got a broken one ({said}): copy it again")):
            call(tmp_path / "broken")
    assert not (tmp_path / "hf").exists()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a folder with a Megatron checkpoint"):
        describe(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: expected a readable JSON file"):
        describe(tmp_path)
