"""The model card and the generation config of an export."""

import json
from pathlib import Path

import pytest
import yaml
from checkpoint_scale import MODEL, SMALL, arguments, write_checkpoint

import megatron_act
from megatron_act.checkpoint.card import Model, card_text, training_figures
from megatron_act.checkpoint.generation import generation_config
from megatron_act.checkpoint.info import describe
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.tokenizer import read_tokenizer
from megatron_act.data.bpe import train_bpe
from megatron_act.errors import UserError

RECORDS = [
    {"event": "start", "activation": "xielu"},
    {"event": "evaluation", "split": "validation", "iteration": 10, "loss": 4.5},
    {"event": "step", "iteration": 19, "loss": 3.5},
    {"event": "step", "iteration": 20, "loss": 3.25},
    {"event": "evaluation", "split": "test", "iteration": 20, "loss": 9.0},
    {"event": "step", "iteration": 21, "loss": 3.0},
    {"event": "evaluation", "split": "validation", "iteration": 30, "loss": 2.0},
]
MODEL_OF_CARD = Model("mine", "ApertusForCausalLM", "xielu", "bfloat16", 1234567)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MegatronCheckpoint:
    folder = tmp_path_factory.mktemp("card")
    (folder / "model.yaml").write_text(yaml.safe_dump({"MODEL_ARGS": MODEL | SMALL}))
    args = arguments(folder / "model.yaml", tensor_parallel=1)
    vars(args).update(consumed_train_samples=640, seq_length=128, lr=3e-4, seed=5, metrics_jsonl=str(folder / "gone"))
    return MegatronCheckpoint(write_checkpoint(folder / "checkpoint", args, iteration=20))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_figures(checkpoint: MegatronCheckpoint, metrics: Path) -> None:
    figures = training_figures(checkpoint, metrics)
    wanted = {
        "iteration": "20",
        "tokens": "81,920",
        "training loss": "3.2500 (iteration 20)",
        "validation loss": "4.5000 (iteration 10)",  # the last before; neither test's nor a later one
        "lr": "0.0003",
        "seed": "5",
    }
    assert {name: figures[name] for name in wanted} == wanted
    assert "training loss" not in training_figures(checkpoint)  # the run's own file is gone


def test_the_runs_own_metrics_are_found(checkpoint: MegatronCheckpoint) -> None:
    path = Path(checkpoint.args.metrics_jsonl)
    path.write_text(json.dumps(RECORDS[3]) + "\n")
    assert training_figures(checkpoint)["training loss"] == "3.2500 (iteration 20)"
    path.unlink()


def test_wrong_metrics_are_refused(checkpoint: MegatronCheckpoint, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(RECORDS[2]) + "\n")
    with pytest.raises(UserError, match="expected a step of iteration 20, got none"):
        training_figures(checkpoint, other)
    other.write_text("{\n")
    with pytest.raises(UserError, match="expected one JSON object a line"):
        training_figures(checkpoint, other)
    with pytest.raises(UserError, match="--metrics-jsonl"):
        training_figures(checkpoint, tmp_path / "none")


def test_card(checkpoint: MegatronCheckpoint, metrics: Path) -> None:
    card = card_text(checkpoint, MODEL_OF_CARD, metrics, ["convert_checkpoint.py", "export", "--load", "a b"])
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-act", "xielu"],
    }
    lines = body.splitlines()
    assert "# mine" in lines and "| tokens | 81,920 |" in lines
    assert f"megatron-act {megatron_act.__version__}:" in lines
    assert "convert_checkpoint.py export --load 'a b'" in lines
    rows = [line for line in lines if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    layers = describe(checkpoint.path)["scalars_by_layer"]
    names = next(line for line in lines if line.startswith("| layer |")).split(" | ")[1:]
    assert rows == [
        f"| {i} | " + " | ".join(f"{layer[name.removesuffix(' |')][0]:.6f}" for name in names) + " |"
        for i, layer in enumerate(layers)
    ]
    assert "trust_remote_code" not in card
    own = Model("mine", "MegatronActForCausalLM", "crrelu", "float32", 1, ships_code=True)
    assert 'dtype="float32", trust_remote_code=True)' in card_text(checkpoint, own, None, ["x"])


def test_hugging_face_reads_the_header(checkpoint: MegatronCheckpoint) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card_text(checkpoint, MODEL_OF_CARD, None, ["x"])).data
    assert (data.library_name, data.pipeline_tag, data.tags) == (
        "transformers",
        "text-generation",
        ["megatron-act", "xielu"],
    )


def test_generation_config(tmp_path: Path) -> None:
    train_bpe(["some words of a text"] * 5, 260, tmp_path / "tokenizer")
    config = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    plain = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    assert generation_config(config, None) == plain
    assert generation_config(config, read_tokenizer(tmp_path / "tokenizer")) == plain
    file = tmp_path / "tokenizer" / "generation_config.json"
    own = {"eos_token_id": [0, 259], "temperature": 0.6, "do_sample": True}
    file.write_text(json.dumps(own))
    words = read_tokenizer(tmp_path / "tokenizer")
    assert generation_config(config, words) == own
    assert file not in words.files  # written once, by the export
    file.write_text(json.dumps(own | {"eos_token_id": [0, 260]}))
    with pytest.raises(UserError, match="expected eos_token_id below 260, got 260"):
        generation_config(config, read_tokenizer(tmp_path / "tokenizer"))
    file.write_text("{")
    with pytest.raises(UserError, match="expected a JSON file"):
        read_tokenizer(tmp_path / "tokenizer")
