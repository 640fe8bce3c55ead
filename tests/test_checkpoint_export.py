"""Export of checkpoints that Megatron training wrote at TP=2, PP=2, EP=2, judged by a Python with transformers only."""

import copy
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_runs import ARMS, KINDS, LAYERS, PP2, ROOT, STEPS, VOCAB_SIZE, XIELU, run, train
from checkpoint_support import MISTAKES, altered, changes_of, opened
from forked_runs import ForkedRuns, forked_runs
from safetensors.torch import load_file

from megatron_act.checkpoint import verify as verification
from megatron_act.checkpoint.differences import Verified
from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.scalars import check_scalars, effective_scalars
from megatron_act.checkpoint.verify import verify_all
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def forked(base: Path) -> Iterator[ForkedRuns]:
    with forked_runs(base / "server.log") as runs:
        yield runs


@pytest.fixture(scope="module")
def trained(base: Path, forked: ForkedRuns) -> dict[str, Path]:
    return {name: train(forked, base / name, flags) for name, flags in ARMS.items()}


@pytest.fixture(scope="module")
def exported(trained: dict[str, Path], base: Path) -> dict[str, Path]:
    return {name: export(load, base / f"hf-{name}", progress=False).output for name, load in trained.items()}


@pytest.fixture(scope="module")
def verified(trained: dict[str, Path], exported: dict[str, Path]) -> dict[str, Verified]:
    pairs = [(trained[name], exported[name]) for name in ARMS]
    return dict(zip(ARMS, verify_all(pairs, length=64, new_tokens=8), strict=True))


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


@pytest.mark.parametrize(("name", "activation"), [("apertus", "xielu"), ("crrelu", "crrelu"), ("experts", "xielu")])
def test_scalars_moved_and_differ_by_layer(trained: dict[str, Path], name: str, activation: str) -> None:
    layers = effective_scalars(MegatronCheckpoint(trained[name]))
    for param in kernels.get(activation).params:
        values = [layer[param.name] for layer in layers]
        assert len(values) == LAYERS
        assert all(abs(value - param.init) > 100 * TOLERANCE for value in values)
        assert len({round(value, 3) for value in values}) == LAYERS


@pytest.mark.parametrize("name", ARMS)
def test_logits_equal_megatrons(verified: dict[str, Verified], exported: dict[str, Path], name: str) -> None:
    assert verified[name].max_difference <= TOLERANCE
    assert verified[name].tokens == 4 * 64
    assert verified[name].same_generation(TOLERANCE) and len(verified[name].generated.split()) == 8 + 8
    config = json.loads((exported[name] / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == (KINDS.get(name, name), VOCAB_SIZE)


CORNERS = {
    "apertus": ("heads in other groups", "other head dim", "no QK-norm", "tied"),
    "qwen3": ("up for gate", "untied", "no QK-norm"),
    "llama": ("up for gate", "plain rope", "factor of 8", "tied", "rope of pairs", "keys for values", "default eps"),
    "arcee": ("other head dim", "heads in other groups"),
    "crrelu": ("no QK-norm", "untied", "rope of pairs"),
    "experts": ("keys for values", "default eps"),
    "own-scalars": ("no QK-norm",),
}


@pytest.mark.parametrize("name", ARMS)
def test_every_corner_case_shows_in_the_logits(exported: dict[str, Path], name: str) -> None:
    """What each mistake would have made of the export, whose own logits are Megatron's (the test above)."""
    model, tokens = opened(exported[name]), torch.arange(64)[None]
    with torch.no_grad():
        wanted = model(tokens).logits
        for mistake, change in ({key: MISTAKES[key] for key in CORNERS[name]} | changes_of(model)).items():
            other = copy.deepcopy(model)
            change(other)
            assert (other(tokens).logits - wanted).abs().max() > 2 * TOLERANCE, mistake


NORMS = {"input_layernorm": "self_attention.linear_qkv.layer_norm", "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm"}
DUMP = """
import sys, torch
from megatron_act.checkpoint import megatron_logits
megatron_logits.start()
for path, output in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    torch.save({k: v for k, v in megatron_logits.load_model(path).state_dict().items() if torch.is_tensor(v)}, output)
"""


def test_reader_returns_what_megatron_loads(trained: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = {name: MegatronCheckpoint(trained[name]) for name in ("apertus", "qwen3", "llama")}
    words = [str(word) for name in checkpoints for word in (checkpoints[name].path, tmp_path / name)]
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


def test_export_is_the_same_from_tp2_and_pp2(
    trained: dict[str, Path], exported: dict[str, Path], base: Path, forked: ForkedRuns
) -> None:
    other = train(
        forked, base / "apertus-pp2", f"{XIELU} {PP2} --make-vocab-size-divisible-by 256", load=trained["apertus"]
    )
    assert MegatronCheckpoint(other).args.pipeline_model_parallel_size == 2
    again = export(other, base / "hf-apertus-pp2", progress=False).output
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (exported["apertus"] / file).read_bytes()


OPTIONS = {"text": None, "prompt": "", "windows": 2, "length": 64, "new_tokens": 1, "sample": False}


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


def test_command_with_tokenizer(trained: dict[str, Path], words: Path, tmp_path: Path, command: Callable) -> None:
    output = tmp_path / "hf"
    load = str(trained["apertus"])
    assert command(["export", "--load", load, "--output", str(output), "--tokenizer", str(words)]) == 0
    assert (output / "tokenizer.json").read_bytes() == (words / "tokenizer.json").read_bytes()
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 1
    config = json.loads((output / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["vocab_size"]) == (1, None, VOCAB_SIZE)


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


def wrong_checkpoints(good: Path, folder: Path) -> dict[str, str]:
    """Copies of a checkpoint that are not what their arguments say, or not whole; an empty folder and a file beside."""
    made = {
        "bare": without_scalars(good, folder / "bare"),
        "other": with_arguments(good, folder / "other", activation="crrelu"),
        "normed": with_arguments(good, folder / "normed", qk_layernorm=False),
        "biased": with_arguments(good, folder / "biased", add_bias_linear=True),
        "cut": Path(shutil.copytree(good, folder / "cut")),
    }
    next(made["cut"].glob("iter_*/.metadata")).write_bytes(b"\x80\x04")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    return {name: str(path) for name, path in made.items()}


def test_bad_input_is_one_line_and_code_2(
    trained: dict[str, Path],
    exported: dict[str, Path],
    tmp_path: Path,
    command: Callable,
    capsys: pytest.CaptureFixture,
) -> None:
    good, output = str(trained["apertus"]), tmp_path / "out" / "hf"
    wrong = wrong_checkpoints(trained["apertus"], tmp_path)
    to = ["--output", str(output)]
    cases = [
        (
            ["export", "--load", str(tmp_path / "none"), *to],
            "expected a folder with a Megatron checkpoint, got nothing",
        ),
        (["export", "--load", str(tmp_path / "file"), *to], "got a file"),
        (["export", "--load", str(tmp_path / "empty"), *to], "expected a Megatron checkpoint"),
        (["export", "--load", wrong["cut"], *to], "broken .metadata"),
        (["export", "--load", wrong["bare"], *to], "expected a checkpoint with the scalars of xielu"),
        (["export", "--load", wrong["other"], *to], "expected a checkpoint with the scalars of crrelu"),
        (["export", "--load", wrong["normed"], *to], "k_layernorm.weight besides: it would be lost"),
        (["export", "--load", wrong["biased"], *to], "it needs --disable-bias-linear"),
        (
            ["export", "--load", good, *to, "--tokenizer", str(tmp_path / "empty")],
            "expected a folder with tokenizer.json",
        ),
        (["export", "--load", good, *to, "--vocab-size", "999"], "256 embedding rows, got 999"),
        (["export", "--load", good, *to, "--vocab-size", "-5"], "--vocab-size: expected at least 1, got -5"),
        (["export", "--load", good, *to, "--max-shard-size", "0GB"], "--max-shard-size"),
        (
            ["export", "--load", good, *to, "--family", "gpt2"],
            "apertus, arcee, llama, qwen3, megatron_act",
        ),
        (["export", "--load", good, *to, "--family", "arcee"], "got xielu with --qk-layernorm: leave the flag out"),
        (["export", "--load", good, *to, "--metrics-jsonl", str(tmp_path / "none")], "--metrics-jsonl"),
        (["import", "--hf", str(exported["llama"]), "--save", good], "expected a new folder"),
        (["import", "--hf", str(tmp_path / "empty"), "--save", str(output)], "a config.json"),
        (
            ["import", "--hf", str(exported["llama"]), "--save", str(output), "--activation", "xielu"],
            "silu(gate x) * (up x)",
        ),
        (["import", "--hf", str(exported["arcee"]), "--save", str(output), "--activation", "xeilu"], "'xielu'"),
        (["import", "--hf", str(exported["experts"]), "--save", str(output), "--activation", "gelu"], "got experts"),
        (["import", "--hf", str(exported["llama"]), "--save", str(output), "--text", "x"], "expected --activation"),
        (["import", "--hf", good, "--save", str(output), "--tensor-model-parallel-size", "0"], "at least 1, got 0"),
        (["export", "--load", good, *to, "--dtype", "float8"], "float8"),
        (["export", "--load", good, "--output", str(exported["llama"])], "add --overwrite"),
        (["export", "--load", good, "--output", good, "--overwrite"], "expected a model folder to overwrite"),
        (["export", "--load", good, "--output", str(tmp_path / "file" / "hf")], "a place to write to"),
        (["verify", "--load", good, "--hf", str(tmp_path / "empty")], "config.json"),
        (["verify", "--load", good, "--hf", str(exported["apertus"]), "--text", str(tmp_path / "none")], "--text"),
        (["info", str(tmp_path / "none")], "got nothing"),
        ([], "{export,import,verify,info}"),
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf.partial", "hf"]  # its weights can be used again
    assert (output / "config.json").read_bytes() == (exported["llama"] / "config.json").read_bytes()
    export(trained["apertus"], output, overwrite=True, progress=False)
    assert (output / "config.json").read_bytes() == (exported["apertus"] / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_help() -> None:
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    for words in ([], ["export"], ["import"], ["verify"], ["info"]):
        done = subprocess.run([sys.executable, tool, *words, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "usage:" in done.stdout
