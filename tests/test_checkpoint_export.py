"""Export of checkpoints that Megatron training wrote at TP=2 and PP=2, judged by a Python with transformers only."""

import importlib.util
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_act.checkpoint import verify as verification
from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.scalars import check_scalars, effective_scalars
from megatron_act.checkpoint.verify import Verified, verify_all
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
LAYERS, STEPS, VOCAB_SIZE = 4, 14, 127  # the vocabulary is padded to 256 at TP=2, to 128 at PP=2
TOLERANCE = 1e-4
COMMON = f"""
    --cpu --num-layers {LAYERS} --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --normalization RMSNorm --norm-epsilon 1e-4 --position-embedding-type rope --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 4 --lr 3e-2
    --lr-decay-style constant --init-method-std 0.2 --eval-iters 0 --eval-interval 1000 --mock-data
    --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --ckpt-format torch_dist --train-iters {STEPS}
    --distributed-timeout-minutes 2"""
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
UNTIED = "--untie-embeddings-and-output-weights"
GROUPS = "--group-query-attention --num-query-groups 2"
XIELU = (
    f"--activation xielu --qk-layernorm --ffn-hidden-size 160 --kv-channels 24 --rotary-base 500000 {GROUPS} {UNTIED}"
)
ARMS = {
    "apertus": f"{XIELU} {TP2}",
    "qwen3": f"--swiglu --qk-layernorm --ffn-hidden-size 96 {GROUPS} {TP2}",  # tied embeddings
    "llama": f"--swiglu --ffn-hidden-size 96 --use-rope-scaling {UNTIED} {PP2}",
}


def train(save: Path, flags: str, load: Path | None = None) -> Path:
    """Runs Megatron on 2 ranks and returns the save folder; with ``load`` at the last step it only saves again."""
    where = f"--save {save} --save-interval {STEPS if load is None else 10 * STEPS}"
    words = f"{COMMON} {flags} {where} {f'--load {load}' if load else ''}".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*command, "-m", "megatron_act.pretrain_gpt", *words])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return save


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    ours = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | ours, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, Path]:
    return {name: train(base / name, flags) for name, flags in ARMS.items()}


@pytest.fixture(scope="module")
def exported(trained: dict[str, Path], base: Path) -> dict[str, Path]:
    return {name: export(load, base / f"hf-{name}", progress=False).output for name, load in trained.items()}


@pytest.fixture(scope="module")
def verified(trained: dict[str, Path], exported: dict[str, Path]) -> dict[str, Verified]:
    pairs = [(trained[name], exported[name]) for name in ARMS]
    return dict(zip(ARMS, verify_all(pairs, length=64), strict=True))


@pytest.fixture(scope="module")
def command() -> Callable[[list[str]], int]:
    """tools/convert_checkpoint.py's main, in this process."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(words: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
            return module.main()

    return call


def test_scalars_moved_and_differ_by_layer(trained: dict[str, Path]) -> None:
    layers = effective_scalars(MegatronCheckpoint(trained["apertus"]))
    for param in kernels.get("xielu").params:
        values = [layer[param.name] for layer in layers]
        assert len(values) == LAYERS
        assert all(abs(value - param.init) > 100 * TOLERANCE for value in values)
        assert len({round(value, 3) for value in values}) == LAYERS


@pytest.mark.parametrize("name", ARMS)
def test_logits_equal_megatrons(verified: dict[str, Verified], exported: dict[str, Path], name: str) -> None:
    assert verified[name].max_difference <= TOLERANCE
    assert verified[name].tokens == 4 * 64
    assert len(verified[name].generated.split()) == 8 + 32
    config = json.loads((exported[name] / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == (name, VOCAB_SIZE)


NORMS = {"input_layernorm": "self_attention.linear_qkv.layer_norm", "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm"}
DUMP = """
import sys, torch
from megatron_act.checkpoint import megatron_logits
megatron_logits.start()
for path, output in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    torch.save({k: v for k, v in megatron_logits.load_model(path).state_dict().items() if torch.is_tensor(v)}, output)
"""


def test_reader_returns_what_megatron_loads(trained: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = {name: MegatronCheckpoint(trained[name]) for name in ARMS}
    words = [str(word) for name in ARMS for word in (checkpoints[name].path, tmp_path / name)]
    done = run([sys.executable, "-c", DUMP, *words])
    assert done.returncode == 0, done.stderr
    for name, checkpoint in checkpoints.items():
        seen = set()
        for key, wanted in torch.load(tmp_path / name).items():
            where = key.removeprefix("decoder.layers.")
            if where == key:
                got = checkpoint.tensor(key)
                seen.add(key)
            else:
                layer, _, rest = where.partition(".")
                rest = next((rest.replace(old + ".", new + "_") for old, new in NORMS.items() if old in rest), rest)
                got = checkpoint.layer_tensor(rest, int(layer))
                seen.add("decoder.layers." + rest)
            if got.shape[0] != wanted.shape[0]:  # padding of the vocabulary follows the layout
                got, wanted = got[:VOCAB_SIZE], wanted[:VOCAB_SIZE]
            assert torch.equal(got, wanted), key
        assert seen == set(checkpoint.keys())


def test_export_is_the_same_from_tp2_and_pp2(trained: dict[str, Path], exported: dict[str, Path], base: Path) -> None:
    other = train(base / "apertus-pp2", f"{XIELU} {PP2} --make-vocab-size-divisible-by 256", load=trained["apertus"])
    assert MegatronCheckpoint(other).args.pipeline_model_parallel_size == 2
    again = export(other, base / "hf-apertus-pp2", progress=False).output
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (exported["apertus"] / file).read_bytes()


def altered(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


OPTIONS = {"text": None, "prompt": "", "windows": 2, "length": 64, "new_tokens": 1, "sample": False}


def test_every_scalar_reset_is_noticed(exported: dict[str, Path], tmp_path: Path) -> None:
    """The first folder is the export itself, whose logits are Megatron's (test_logits_equal_megatrons)."""
    params = {f"alpha_{sign}": kernels.get("xielu").params[i].raw_init for i, sign in enumerate("pn")}
    resets = {f"model.layers.{i}.mlp.act_fn.{name}": [raw] for i in range(LAYERS) for name, raw in params.items()}
    resets |= {f"model.layers.{i}.mlp.act_fn.beta": 0.49 for i in range(LAYERS)}
    folders = [exported["apertus"]]
    for name, value in resets.items():
        change = {name: torch.tensor(value)}
        folders.append(altered(folders[0], tmp_path / name, lambda tensors, new=change: tensors.update(new)))
    places = [tmp_path / f"answer-{folder.name}" for folder in folders]
    verification.run_transformers(places, [OPTIONS | {"folder": str(folder)} for folder in folders])
    for name, place in zip(resets, places[1:], strict=True):
        shutil.copy(places[0] / "hf_logits.npy", place / "megatron_logits.npy")
        assert verification.compare(place).max_difference > 2 * TOLERANCE, name


def test_missing_constants_are_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    names = [f"model.layers.2.mlp.act_fn.{buffer}" for buffer in ("beta", "eps")]
    folder = altered(exported["apertus"], tmp_path / "hf", lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(UserError, match=f"missing_keys.*{names[0]}.*{names[1]}"):
        verification.run_transformers([tmp_path / "answer"], [OPTIONS | {"folder": str(folder)}])


def test_constants_are_written(exported: dict[str, Path]) -> None:
    tensors = load_file(exported["apertus"] / "model.safetensors")
    for layer in range(LAYERS):
        for name, value in (("beta", 0.5), ("eps", -1e-6)):
            tensor = tensors[f"model.layers.{layer}.mlp.act_fn.{name}"]
            assert (tensor.dtype, tensor.shape, tensor.item()) == (torch.float32, (), torch.tensor(value).item())


@pytest.fixture(scope="module")
def words(base: Path) -> Path:
    """A tokenizer folder of 120 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"word{i}": i for i in range(2, 120)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(base / "tokenizer")
    return base / "tokenizer"


def test_commands_with_tokenizer(
    trained: dict[str, Path], words: Path, tmp_path: Path, command: Callable, capsys: pytest.CaptureFixture
) -> None:
    output, text = tmp_path / "hf", tmp_path / "text.txt"
    text.write_text(" ".join(f"word{2 + i * i % 118}" for i in range(300)))
    load = str(trained["apertus"])
    assert command(["export", "--load", load, "--output", str(output), "--tokenizer", str(words)]) == 0
    assert (output / "tokenizer.json").read_bytes() == (words / "tokenizer.json").read_bytes()
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 1
    config = json.loads((output / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["vocab_size"]) == (1, None, 120)
    verify = ["verify", "--load", load, "--hf", str(output), "--text", str(text), "--prompt", "word7 word9"]
    capsys.readouterr()
    assert command(verify) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "256 tokens" in lines[0] and lines[2].split(maxsplit=1)[1].startswith("'word7 word9")
    wrong = altered(output, tmp_path / "wrong", lambda tensors: tensors["model.layers.3.mlp.act_fn.alpha_p"].zero_())
    assert command([*verify[:4], str(wrong), *verify[5:]]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_bfloat16_keeps_scalars_in_fp32(trained: dict[str, Path], exported: dict[str, Path], tmp_path: Path) -> None:
    export(trained["apertus"], tmp_path / "hf", dtype="bfloat16", progress=False)
    full, half = (load_file(path / "model.safetensors") for path in (exported["apertus"], tmp_path / "hf"))
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        wanted = tensor if ".act_fn." in name else tensor.bfloat16()
        assert half[name].dtype == wanted.dtype and torch.equal(half[name], wanted), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_hold_the_same_tensors(trained: dict[str, Path], exported: dict[str, Path], tmp_path: Path) -> None:
    limit = 100_000
    output = export(trained["apertus"], tmp_path / "hf", max_shard_bytes=limit, progress=False).output
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 4
    whole, parts = load_file(exported["apertus"] / "model.safetensors"), {}
    for file in files:
        shard = load_file(output / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit
        assert {index["weight_map"][name] for name in shard} == {file}
        parts |= shard
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def test_info(trained: dict[str, Path], command: Callable, capsys: pytest.CaptureFixture) -> None:
    assert command(["info", str(trained["apertus"])]) == 0
    text = capsys.readouterr().out
    layers = effective_scalars(MegatronCheckpoint(trained["apertus"]))
    rows = [line.split() for line in text.splitlines()[-LAYERS:]]
    for row, layer in zip(rows, layers, strict=True):
        assert math.isclose(float(row[1]), layer["alpha_p"], abs_tol=1e-6)
        assert math.isclose(float(row[2]), layer["alpha_n"], abs_tol=1e-6)
    for part in (f"iteration    {STEPS}", "tensor_model_parallel_size 2", "xielu", "ApertusForCausalLM", "4x160x64"):
        assert part in text


def test_check_scalars(trained: dict[str, Path], tmp_path: Path) -> None:
    check_scalars(trained["apertus"], "xielu")
    check_scalars(trained["llama"], "swiglu")
    check_scalars(tmp_path, "xielu")  # nothing there yet
    check_scalars(tmp_path / "later", "xielu")
    with pytest.raises(UserError, match=r"--activation xielu \(scalars: alpha_n, alpha_p\), got one of swiglu"):
        check_scalars(trained["llama"], "xielu")
    with pytest.raises(UserError, match=r"--activation crrelu \(scalars: eps\), got one of xielu"):
        check_scalars(trained["apertus"], "crrelu")


def without_scalars(source: Path, target: Path) -> Path:
    """A copy whose scalars a careless converter dropped."""
    shutil.copytree(source, target)
    (path,) = target.glob("iter_*/.metadata")
    metadata = pickle.loads(path.read_bytes())
    for name in [name for name in metadata.state_dict_metadata if "activation_func" in name]:
        del metadata.state_dict_metadata[name]
    path.write_bytes(pickle.dumps(metadata))
    return target


def with_arguments(source: Path, target: Path, **changes: object) -> Path:
    """A copy that says it was trained with other arguments, kept where Megatron before 0.19 kept them."""
    shutil.copytree(source, target)
    plain = {
        k: v for k, v in vars(MegatronCheckpoint(source).args).items() if v is None or isinstance(v, int | str | float)
    }
    (folder,) = target.glob("iter_*")
    torch.save({"args": Namespace(**plain | changes), "iteration": STEPS}, folder / "common.pt")
    return target


def test_bad_input_is_one_line_and_code_2(
    trained: dict[str, Path],
    exported: dict[str, Path],
    tmp_path: Path,
    command: Callable,
    capsys: pytest.CaptureFixture,
) -> None:
    good, output = str(trained["apertus"]), tmp_path / "out" / "hf"
    bare = without_scalars(trained["apertus"], tmp_path / "bare")
    other = with_arguments(trained["apertus"], tmp_path / "other", activation="crrelu")
    biased = with_arguments(trained["apertus"], tmp_path / "biased", add_bias_linear=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cut = tmp_path / "cut"
    shutil.copytree(trained["apertus"], cut)
    next(cut.glob("iter_*/.metadata")).write_bytes(b"\x80\x04")
    to = ["--output", str(output)]
    cases = [
        (
            ["export", "--load", str(tmp_path / "none"), *to],
            "expected a folder with a Megatron checkpoint, got nothing",
        ),
        (["export", "--load", str(tmp_path / "file"), *to], "got a file"),
        (["export", "--load", str(tmp_path / "empty"), *to], "expected a Megatron checkpoint"),
        (["export", "--load", str(cut), *to], "broken .metadata"),
        (["export", "--load", str(bare), *to], "expected a checkpoint with the scalars of xielu"),
        (["export", "--load", str(other), *to], "crrelu with --qk-layernorm"),
        (["export", "--load", str(biased), *to], "it needs --disable-bias-linear"),
        (
            ["export", "--load", good, *to, "--tokenizer", str(tmp_path / "empty")],
            "expected a folder with tokenizer.json",
        ),
        (["export", "--load", good, *to, "--vocab-size", "999"], "256 embedding rows, got 999"),
        (["export", "--load", good, *to, "--max-shard-gb", "0"], "--max-shard-gb"),
        (["export", "--load", good, *to, "--dtype", "float8"], "float8"),
        (["export", "--load", good, "--output", str(exported["llama"])], "add --overwrite"),
        (["export", "--load", good, "--output", good, "--overwrite"], "expected a model folder to overwrite"),
        (["export", "--load", good, "--output", str(tmp_path / "file" / "hf")], "a place to write to"),
        (["verify", "--load", good, "--hf", str(tmp_path / "empty")], "config.json"),
        (["verify", "--load", good, "--hf", str(exported["apertus"]), "--text", str(tmp_path / "none")], "--text"),
        (["verify", "--load", good, "--hf", str(exported["apertus"]), "--text", __file__], "expected a tokenizer in"),
        (["info", str(tmp_path / "none")], "got nothing"),
        ([], "{export,verify,info}"),
    ]
    for words, expected in cases:
        assert command(words) == 2, words
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
        assert not output.parent.exists()


def test_overwrite_and_failure_leave_whole_folders(
    trained: dict[str, Path], exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hf"
    shutil.copytree(exported["llama"], output)

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_act.checkpoint.export._write_rest", fails)
        with pytest.raises(OSError, match="no space"):
            export(trained["apertus"], output, overwrite=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (output / "config.json").read_bytes() == (exported["llama"] / "config.json").read_bytes()
    export(trained["apertus"], output, overwrite=True, progress=False)
    assert (output / "config.json").read_bytes() == (exported["apertus"] / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_help() -> None:
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    for words in ([], ["export"], ["verify"], ["info"]):
        done = subprocess.run([sys.executable, tool, *words, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "usage:" in done.stdout
