"""Model folders into Megatron: its own training loads them in several layouts and starts at transformers' loss."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_args import common_states
from checkpoint_support import (
    GENERAL,
    LLAMA3,
    LLAMA32,
    MISTAKES,
    Continued,
    altered,
    changes_of,
    loss_of,
    opened,
    random_model,
    train_on,
    with_config,
)
from forked_runs import ForkedRuns, forked_runs
from safetensors.torch import load_file

from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.import_hf import Imported, common_state, import_model
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.scalars import effective_scalars
from megatron_act.errors import UserError

# what Megatron does not keep: the tokenizer's ids, and the base class's own activation in our modelling file
NOT_COMPARED = {"transformers_version", "hidden_act", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id"}
pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
TOLERANCE = 2e-6  # of a loss near 5, fp32 in two orders of summation
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "activation": "xielu", "qk_norm": True, "head_dim": 12}
# kind of model, what differs from checkpoint_support.SIZES, layout of the run, mistakes that it must notice besides
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "apertus": (
        "apertus",
        {"rope_parameters": LLAMA3, "head_dim": 12},
        TP2,
        ("plain rope", "tied", "other head dim", "no QK-norm"),
    ),
    "llama": (
        "llama",
        {"rope_parameters": LLAMA32, "head_dim": 16},
        PP2,
        ("plain rope", "factor of 8", "tied", "up for gate", "other head dim"),
    ),
    "qwen3": (
        "qwen3",
        {"head_dim": 12, "tie_word_embeddings": True},
        TP2,
        ("untied", "up for gate", "other head dim", "no QK-norm"),
    ),
    "arcee": ("arcee", {"vocab_size": 127}, TP2, ("tied",)),
    "crrelu": ("megatron_act", {"activation": "crrelu", "rope_parameters": LINEAR}, PP2, ("plain rope", "tied")),
    "experts": ("megatron_act", EXPERTS, ("--expert-model-parallel-size", "2"), ("no QK-norm",)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def forked(base: Path) -> Iterator[ForkedRuns]:
    with forked_runs(base / "server.log") as runs:
        yield runs


@pytest.fixture(scope="module")
def models(base: Path) -> dict[str, Path]:
    return {name: random_model(kind, base / f"hf-{name}", **changes) for name, (kind, changes, *_) in MODELS.items()}


@pytest.fixture(scope="module")
def imported(models: dict[str, Path], base: Path, forked: ForkedRuns) -> dict[str, Imported]:
    options = {"tensor_parallel": 2, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_act.checkpoint.import_hf.common_state", common_states(forked, base))
        return {name: import_model(folder, base / name, **options) for name, folder in models.items()}


@pytest.fixture(scope="module")
def continued(imported: dict[str, Imported], base: Path, forked: ForkedRuns) -> dict[str, Continued]:
    return {
        name: train_on(forked, imported[name].save, base / f"run-{name}", *layout)
        for name, (_, _, layout, _) in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_training_starts_at_transformers_loss(
    models: dict[str, Path], imported: dict[str, Imported], continued: dict[str, Continued], name: str
) -> None:
    padding = imported[name].padded_vocab_size - imported[name].vocab_size
    assert padding == (1 if name == "arcee" else 0)
    model, losses = opened(models[name]), continued[name].losses
    assert abs(losses[0] - loss_of(model, padding)) <= TOLERANCE
    assert losses[2] < losses[1] < losses[0]
    mistakes = {mistake: MISTAKES[mistake] for mistake in (*GENERAL, *MODELS[name][3])} | changes_of(model)
    for mistake, change in mistakes.items():
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        assert abs(losses[0] - loss_of(other, padding)) > 10 * TOLERANCE, mistake
    if padding:
        assert abs(losses[0] - loss_of(model)) > 10 * TOLERANCE


def test_scalars_train_on_from_what_was_imported(
    imported: dict[str, Imported], continued: dict[str, Continued]
) -> None:
    for name in ("apertus", "experts"):
        before, after = (
            effective_scalars(MegatronCheckpoint(folder)) for folder in (imported[name].save, continued[name].saved)
        )
        for old, new in zip(before, after, strict=True):
            assert all(1e-4 < abs(new[scalar] - old[scalar]) < 0.1 for scalar in old)


def test_there_and_back_changes_no_bit(models: dict[str, Path], imported: dict[str, Imported], base: Path) -> None:
    for name, folder in models.items():
        back = export(imported[name].save, base / f"back-{name}", progress=False).output
        wanted, got = (load_file(path / "model.safetensors") for path in (folder, back))
        assert got.keys() == wanted.keys(), name
        assert all(got[key].dtype == wanted[key].dtype and torch.equal(got[key], wanted[key]) for key in wanted), name
        first, second = (json.loads((path / "config.json").read_text()) for path in (folder, back))
        same = first.keys() & second.keys() - NOT_COMPARED
        assert {key: second[key] for key in same} == {key: first[key] for key in same}, name


def test_flags_are_megatrons(imported: dict[str, Imported]) -> None:
    flags = {name: yaml.safe_load(done.flags.read_text())["MODEL_ARGS"] for name, done in imported.items()}
    assert flags["apertus"]["--kv-channels"] == 12 and flags["apertus"]["--use-rope-scaling"]
    assert (flags["apertus"]["--rope-scaling-factor"], flags["llama"]["--rope-scaling-factor"]) == (8.0, 32.0)
    assert flags["crrelu"]["--rotary-seq-len-interpolation-factor"] == 4
    assert flags["llama"]["--swiglu"] and flags["llama"]["--norm-epsilon"] == 1e-3
    assert "--untie-embeddings-and-output-weights" not in flags["qwen3"] and flags["qwen3"]["--qk-layernorm"]
    assert (flags["arcee"]["--padded-vocab-size"], flags["arcee"]["--vocab-size"]) == (128, 127)
    assert (flags["experts"]["--num-experts"], flags["experts"]["--moe-ffn-hidden-size"]) == (4, 24)
    saved = MegatronCheckpoint(imported["arcee"].save).args  # what Megatron's own parser made of them
    assert MegatronCheckpoint(imported["llama"].save).args.rope_scaling_factor == 32.0
    assert (saved.padded_vocab_size, saved.activation, saved.layernorm_epsilon) == (128, "relu2", 1e-3)


def test_arcee_rounds_the_scalars_of_xielu(base: Path, forked: ForkedRuns, caplog: pytest.LogCaptureFixture) -> None:
    """Why xielu without QK-norm is exported with our modelling file unless --family arcee says otherwise."""
    fine = {f"model.layers.{i}.mlp.act_fn.alpha_p": torch.tensor([0.7123456 + i]) for i in range(2)}
    parent = random_model("arcee", base / "hf-rounded", hidden_act="xielu")
    folder = altered(parent, base / "hf-fine", lambda tensors: tensors.update(fine))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_act.checkpoint.import_hf.common_state", common_states(forked, base))
        save = import_model(folder, base / "fine", progress=False).save
    ours = export(save, base / "ours", progress=False)
    said = [record for record in caplog.records if not record.name.startswith("transformers")]
    assert ours.architecture == "MegatronActForCausalLM" and not said
    theirs = export(save, base / "theirs", family="arcee", progress=False)
    assert theirs.architecture == "ArceeForCausalLM" and "in bf16 even with dtype=float32" in caplog.text
    for name, value in fine.items():
        assert torch.equal(load_file(theirs.output / "model.safetensors")[name], value)
        assert torch.equal(opened(ours.output).get_parameter(name), value)
        assert torch.equal(opened(theirs.output).get_parameter(name).float(), value.bfloat16().float())


@pytest.fixture
def no_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports without asking Megatron's parser, for tests that end before or look at tensors alone."""
    monkeypatch.setattr("megatron_act.checkpoint.import_hf.common_state", lambda words: b"")


@pytest.mark.usefixtures("no_megatron")
def test_dropped_tensors_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Also every scalar, and the norms of queries and keys: what careless converters lose."""
    for name, key in (
        ("apertus", "model.layers.1.mlp.act_fn.alpha_p"),
        ("apertus", "model.layers.0.mlp.act_fn.alpha_n"),
        ("apertus", "model.layers.1.self_attn.q_norm.weight"),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
        ("llama", "lm_head.weight"),
    ):
        folder = altered(models[name], tmp_path / key, lambda tensors, key=key: tensors.pop(key))
        with pytest.raises(UserError, match=f"expected a tensor {key}, the folder has none"):
            import_model(folder, tmp_path / "out", progress=False)
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    folder = altered(models["llama"], tmp_path / "extra", lambda tensors: tensors.update(extra))
    with pytest.raises(UserError, match=r"got 1 more, such as model.layers.0.self_attn.q_proj.bias"):
        import_model(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_megatron")
def test_constants(models: dict[str, Path], tmp_path: Path) -> None:
    """Folders without beta and eps exist; ones with other values have no Megatron form."""
    keys = [f"model.layers.{layer}.mlp.act_fn.{name}" for layer in range(2) for name in ("beta", "eps")]
    bare = altered(models["apertus"], tmp_path / "bare", lambda tensors: [tensors.pop(key) for key in keys])
    notes = import_model(bare, tmp_path / "out", progress=False).notes
    assert [note.split()[0] for note in notes] == ["mlp.act_fn.beta", "mlp.act_fn.eps"]
    other = altered(models["apertus"], tmp_path / "other", lambda tensors: tensors[keys[2]].fill_(0.4))
    with pytest.raises(UserError, match=r"layers.1.mlp.act_fn.beta 0.5, got 0.4: Megatron has no other"):
        import_model(other, tmp_path / "out2", progress=False)


@pytest.mark.usefixtures("no_megatron")
def test_bfloat16_model(tmp_path: Path) -> None:
    """Weights keep their dtype, scalars become fp32 and their rounding is told."""
    folder = random_model("apertus", tmp_path / "hf", dtype=torch.bfloat16, head_dim=12)
    done = import_model(folder, tmp_path / "out", progress=False)
    assert done.notes == ("the scalars were stored in bfloat16, with its rounding",)
    checkpoint, tensors = MegatronCheckpoint(done.save), load_file(folder / "model.safetensors")
    for layer in range(2):
        got = checkpoint.layer_tensor("mlp.activation_func.alpha_p", layer)
        assert got.dtype == torch.float32
        assert torch.equal(got, tensors[f"model.layers.{layer}.mlp.act_fn.alpha_p"].float())
        weight = checkpoint.layer_tensor("mlp.linear_fc1.weight", layer)
        assert torch.equal(weight, tensors[f"model.layers.{layer}.mlp.up_proj.weight"])
    wide = import_model(folder, tmp_path / "wide", dtype="float32", progress=False)
    assert MegatronCheckpoint(wide.save).layer_tensor("mlp.linear_fc1.weight", 0).dtype == torch.float32


@pytest.mark.usefixtures("no_megatron")
def test_folders_of_several_files(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    opened(models["qwen3"]).save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(models["qwen3"] / "config.json", folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    whole, parts = (
        import_model(path, tmp_path / name, progress=False).save / "release"
        for name, path in (("whole", models["qwen3"]), ("parts", folder))
    )
    assert (whole / "__0_0.distcp").read_bytes() == (parts / "__0_0.distcp").read_bytes()
    first = sorted(folder.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(UserError, match="expected a safetensors file, got a broken one"):
        import_model(folder, tmp_path / "out", progress=False)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: expected a safetensors file, got a broken one"):
        import_model(folder, tmp_path / "out", progress=False)
    quantized = {"model.norm.weight": torch.ones(32, dtype=torch.int8)}
    folder = altered(models["llama"], tmp_path / "int8", lambda tensors: tensors.update(quantized))
    with pytest.raises(UserError, match="expected fp32, bf16 or fp16, got I8 in"):
        import_model(folder, tmp_path / "out", progress=False)


def test_norm_of_experts_under_either_name(models: dict[str, Path], imported: dict[str, Imported], base: Path) -> None:
    """Megatron's local layers and Transformer Engine's name it differently; the import writes both, each will do."""
    names = ("decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight")
    wanted = load_file(models["experts"] / "model.safetensors")
    for number, name in enumerate(names):
        save = shutil.copytree(imported["experts"].save, base / f"one-name-{number}")
        file = save / "release" / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        del metadata.state_dict_metadata[name]
        file.write_bytes(pickle.dumps(metadata))
        got = load_file(export(save, base / f"hf-one-name-{number}", progress=False).output / "model.safetensors")
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.usefixtures("no_megatron")
def test_vocabulary_padding(models: dict[str, Path], tmp_path: Path) -> None:
    done = import_model(models["arcee"], tmp_path / "out", tensor_parallel=2, divisible_by=64, progress=False)
    assert (done.vocab_size, done.padded_vocab_size) == (127, 128)
    wanted = load_file(models["arcee"] / "model.safetensors")
    for key, name in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        rows = MegatronCheckpoint(done.save).tensor(f"{key}.weight")
        assert torch.equal(rows[:127], wanted[f"{name}.weight"]) and not rows[127:].any()


def test_models_that_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    bounds = {"low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 4096}
    kinds = {
        "yarn": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32},
    }
    scalings = [LLAMA32 | {name: value} for name, value in bounds.items()]
    scalings += [{"rope_type": kind, "rope_theta": 1e4, **rest} for kind, rest in kinds.items()]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"model_type": "gpt2"}, "expected model_type apertus, arcee, llama, qwen3, megatron_act, got 'gpt2'"),
        ("llama", {"attention_bias": True}, "expected linear layers without bias"),
        *(("llama", {"rope_parameters": each}, "expected plain RoPE, linear scaling, or llama3") for each in scalings),
        (
            "llama",
            {"rope_parameters": LINEAR | {"factor": 2.5}},
            "whole number as factor of rotary embeddings, got 2.5",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1.5}}, "whole number as rope_theta"),
        ("llama", {"hidden_act": "gelu"}, "expected hidden_act 'silu'"),
        ("llama", {"intermediate_size": 64}, "as config.json has it"),
        ("llama", {"num_key_value_heads": 4}, "as config.json has it"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "full attention"),
        ("arcee", {"hidden_act": "mish"}, "expected hidden_act xielu, relu2"),
    ]
    for number, (name, changes, message) in enumerate(cases):
        folder = with_config(models[name], tmp_path / str(number), **changes)
        with pytest.raises(UserError, match=message):
            import_model(folder, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="a model folder with a config"):
        import_model(tmp_path, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="expected a new folder, got an existing one"):
        import_model(models["llama"], tmp_path, progress=False)
    assert not (tmp_path / "out").exists()


def test_failure_leaves_no_output(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_act.checkpoint.import_hf.common_state", lambda words: b"")

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    for place, left in (("torch_dist.write_file", []), ("import_hf.config_files.write", [".out.partial"])):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(f"megatron_act.checkpoint.{place}", fails)
            import_model(models["llama"], tmp_path / "out", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == left  # finished weights can be used again


PEAK = """
import re, sys
from megatron_act.checkpoint import import_hf
import_hf.common_state = lambda words: b""
def peak():  # of this program; ru_maxrss would be the parent's if that is larger
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
import_hf.open_source(sys.argv[1])  # imports what is imported late
before = peak()
import_hf.import_model(sys.argv[1], sys.argv[2], progress=False)
print(peak() - before)
"""


def test_peak_memory_follows_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 130 MB whose largest tensor has 17 MB; all that the conversion may take is three of those."""
    sizes = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 20}
    folder = random_model("arcee", tmp_path / "hf", **sizes)
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    largest = sizes["vocab_size"] * sizes["hidden_size"] * 4
    assert (folder / "model.safetensors").stat().st_size > 6 * largest
    assert largest < int(done.stdout) < 3 * largest, int(done.stdout) / largest


def test_flags_that_megatron_refuses(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"--hf: Megatron refuses the model's flags: .*num-layerz"):
        common_state(["--num-layerz", "2"])
