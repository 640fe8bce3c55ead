"""verify: it passes what is equal, and names the first layer that is not."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_act.checkpoint import differences, verify
from megatron_act.checkpoint.differences import Generated, Place, Verified, compare
from megatron_act.checkpoint.export import export
from megatron_act.errors import UserError

ROOT = Path(__file__).parents[1]
LAYERS, TOLERANCE = 3, 1e-4
FLAGS = f"""
    --cpu --activation xielu --qk-layernorm --num-layers {LAYERS} --hidden-size 32 --ffn-hidden-size 96
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 64
    --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --untie-embeddings-and-output-weights --micro-batch-size 2 --global-batch-size 2 --lr 3e-2
    --lr-decay-style constant --init-method-std 0.2 --eval-iters 0 --eval-interval 1000 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --ckpt-format torch_dist --train-iters 4 --save-interval 4"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("trained")
    ours = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = [*command, "-m", "megatron_act.pretrain_gpt", *FLAGS.split(), "--save", str(save)]
    done = subprocess.run(words, env=os.environ | ours, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return save


def moved(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Changes one tensor a little."""
    return lambda tensors: tensors[name].add_(0.1)


LAYER = "model.layers.{}."
PADDED = {"vocab_size": 128}  # the checkpoint's rows, of which one is padding
PENALTY = {"repetition_penalty": 3.0, "do_sample": True}  # as generation configs of chat models have them
CASES = {  # change of the export, the first place that must differ
    "none": (lambda tensors: None, None),
    "embedding": (moved("model.embed_tokens.weight"), "embedding"),
    "scalar": (moved(LAYER.format(1) + "mlp.act_fn.alpha_p"), "layer 1"),
    "query": (moved(LAYER.format(2) + "self_attn.q_norm.weight"), "layer 2"),
    "norm": (moved("model.norm.weight"), "final norm"),
    "logits": (lambda tensors: tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].roll(1, 0)), None),
}


@pytest.fixture(scope="module")
def verified(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verified]:
    base = tmp_path_factory.mktemp("exports")
    good = export(trained, base / "good", progress=False).output
    for name, (change, _) in CASES.items():
        shutil.copytree(good, base / name)
        tensors = load_file(good / "model.safetensors")
        change(tensors)
        save_file(tensors, base / name / "model.safetensors", metadata={"format": "pt"})
    export(trained, base / "padded", **PADDED, progress=False)
    shutil.copytree(good, base / "penalty")
    (base / "penalty" / "generation_config.json").write_text(json.dumps(PENALTY))
    names = [*CASES, "padded", "penalty"]
    pairs = [(trained, base / name) for name in names]
    done = verify.verify_all(pairs, windows=2, length=32, new_tokens=12)
    return dict(zip(names, done, strict=True))


def test_the_export_is_equal_in_every_place(verified: dict[str, Verified]) -> None:
    done = verified["none"]
    assert done.equal(TOLERANCE) and done.tokens == 64 and done.mean_difference < done.max_difference
    assert [place.name for place in done.places] == ["embedding", "layer 0", "layer 1", "layer 2", "final norm"]
    assert done.places[0].relative_difference == 0.0
    assert max(place.relative_difference for place in done.places) < TOLERANCE / 10
    assert done.greedy == Generated(tokens=12, same=12, margin=0.0)
    assert len(done.generated.split()) == 8 + 12


@pytest.mark.parametrize("name", [name for name in CASES if name != "none"])
def test_the_first_differing_place_is_named(verified: dict[str, Verified], name: str) -> None:
    done, wanted = verified[name], CASES[name][1]
    assert not done.equal(TOLERANCE) and done.max_difference > 10 * TOLERANCE
    first = done.first_differing(TOLERANCE)
    assert (first and first.name) == wanted


def test_generations_are_megatrons_own(verified: dict[str, Verified]) -> None:
    """Where the logits' matrix is another, so are the tokens: Megatron's text is not a copy of transformers'."""
    greedy = verified["logits"].greedy
    assert greedy and greedy.same < greedy.tokens and greedy.margin > 2 * TOLERANCE


def test_another_vocabulary_is_another_model(verified: dict[str, Verified]) -> None:
    """Rows of padding change no logit that both have, and yet the export has tokens that do not exist."""
    done, good = verified["padded"], verified["none"]
    assert done.max_difference < TOLERANCE and done.same_generation(TOLERANCE) and not done.equal(TOLERANCE)
    assert (done.vocab_size, done.wanted_vocab_size) == (128, 127)
    assert (good.vocab_size, good.wanted_vocab_size) == (127, 127)
    lines = differences.as_lines(done, TOLERANCE)
    assert any("128 rows, expected 127" in line for line in lines) and lines[-1].startswith("DIFFERENT: the export has")


def test_a_generation_config_does_not_change_what_is_compared(verified: dict[str, Verified]) -> None:
    assert verified["penalty"].greedy == verified["none"].greedy


def written(folder: Path, ours: np.ndarray, theirs: np.ndarray) -> Path:
    folder.mkdir()
    np.save(folder / "megatron_logits.npy", ours)
    np.save(folder / "hf_logits.npy", theirs)
    (folder / "generated.txt").write_text("")
    return folder


def test_padding_is_left_out_and_a_nan_never_passes(tmp_path: Path) -> None:
    theirs = np.zeros((1, 2, 3), dtype=np.float32)
    padded = np.concatenate([theirs, np.full((1, 2, 1), 9.0, dtype=np.float32)], axis=-1)
    assert compare(written(tmp_path / "padded", padded, theirs)).max_difference == 0.0
    broken = theirs.copy()
    broken[0, 1, 2] = np.nan
    assert not compare(written(tmp_path / "nan", broken, theirs)).equal(TOLERANCE)
    with pytest.raises(UserError, match="another model"):
        compare(written(tmp_path / "shape", theirs[:, :1], theirs))
    assert Verified(0.0, 0.0, 1, "", (Place("layer 0", float("nan")),)).first_differing(TOLERANCE)


@pytest.mark.parametrize(("same", "margin", "equal"), [(5, 0.0, True), (3, 1.9e-4, True), (3, 2.1e-4, False)])
def test_a_token_may_differ_only_in_a_tie(same: int, margin: float, equal: bool) -> None:
    assert Verified(0.0, 0.0, 1, "", greedy=Generated(5, same, margin)).equal(TOLERANCE) is equal


@pytest.fixture
def command() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(words: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
            return module.main()

    return call


@pytest.mark.parametrize(
    ("difference", "tolerance", "code"),
    [(3e-5, "1e-4", 0), (3e-4, "1e-4", 1), (3e-4, "1e-3", 0), (float("nan"), "1", 1)],
)
def test_exit_code_and_verdict(
    command: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    difference: float,
    tolerance: str,
    code: int,
) -> None:
    seen: dict = {}
    done = Verified(
        difference, 1e-6, 64, "a b", (Place("embedding", 0.0), Place("layer 0", 2e-2)), Generated(7, 7, 0.0)
    )
    monkeypatch.setattr(verify, "verify", lambda *words, **options: seen.update(options) or done)
    words = ["verify", "--load", "ckpt", "--hf", "hf", "--tolerance", tolerance, "--generate", "7"]
    assert command(words) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ["equal", "DIFFERENT, first in layer 0: the export is not the model that Megatron trained"][
        code
    ] or (tolerance == "1" and last.startswith("DIFFERENT: "))
    assert seen["new_tokens"] == 7 and seen["trust_remote_code"] is False
    assert command([*words, "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert content["equal"] is (code == 0) and content["layers"][1] == {"name": "layer 0", "relative_difference": 2e-2}
    assert content == differences.as_json(done, float(tolerance)) or math.isnan(difference)


def test_foreign_code_is_not_run(tmp_path: Path) -> None:
    ours = Path(verify.__file__).parent / "modeling_megatron_act.py"
    shutil.copy(ours, tmp_path)
    assert verify._ships_our_code(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auto_map": {"AutoConfig": "someone/else--modeling_megatron_act.MegatronActConfig"}}))
    with pytest.raises(UserError, match=r"got another config\.json: read it"):
        verify._ships_our_code(tmp_path)
    config.unlink()
    (tmp_path / ours.name).write_text(ours.read_text() + "print('theirs')\n")
    with pytest.raises(
        UserError, match=r"got another modeling_megatron_act\.py: read it, then add --trust-remote-code"
    ):
        verify.run_transformers([tmp_path / "answer"], [{"folder": str(tmp_path)}])
