"""The compute match: the papers' exact pairs, the solver's properties, and the command with good and bad input."""

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from megatron_act.budget import GATED, Shape, flops, parameters
from megatron_act.errors import UserError
from megatron_act.match import solve

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "compute_match.py"
SCALARS = {"xielu": 2, "crrelu": 1, "relu2": 0, "gelu": 0}
BASELINE = Shape(
    hidden_size=1536,
    num_layers=24,
    num_attention_heads=16,
    ffn_hidden_size=6144,
    activation="swiglu",
    vocab_size=147456,
)
PAPER = "--hidden-size 1536 --num-layers 24 --num-attention-heads 16 --baseline swiglu --baseline-ffn-hidden-size 6144"


def load_tool():
    spec = importlib.util.spec_from_file_location("compute_match_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the command in this process: words -> (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = load_tool()

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compute_match.py", *words])
        code = module.main()
        return code, *capsys.readouterr()

    return run


# The papers' models (1.1B, 3B), Apertus-8B, Apertus-70B, and back.
@pytest.mark.parametrize("align", [1, 16, 32, 128])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize(("gated", "plain"), [(6144, 9216), (8192, 12288), (14336, 21504), (28672, 43008)])
def test_exact_pairs(gated, plain, tensor_parallel, align):
    layout = {"tensor_parallel": tensor_parallel, "align": align}
    swiglu = dataclasses.replace(BASELINE, ffn_hidden_size=gated)
    there = solve(swiglu, "xielu", SCALARS, **layout)
    back = solve(there.target, "swiglu", SCALARS, **layout)
    assert (there.target.ffn_hidden_size, there.target.activation_scalars) == (plain, 2)
    assert back.target == swiglu
    for match in (there, back):
        assert match.exact
        assert match.parameters.matmul == match.baseline_parameters.matmul
        assert flops(match.target) == flops(match.baseline)
        assert match.residual_parameters_percent == match.residual_flops_percent == 0.0


def test_same_number_of_matrices_keeps_the_width():
    for baseline, name in (("swiglu", "geglu"), ("relu2", "xielu")):
        match = solve(dataclasses.replace(BASELINE, activation=baseline, ffn_hidden_size=1234), name, SCALARS)
        assert match.target.ffn_hidden_size == 1234
        assert match.exact


def test_solver_properties():
    """Aligned, nearest, signed, and exact whenever an aligned exact width exists: 400 random models."""
    rng = random.Random(0)
    exact_ones = 0
    for _ in range(400):
        tensor_parallel, align = rng.choice([1, 2, 4, 8]), rng.choice([1, 8, 16, 32, 128])
        width = tensor_parallel * rng.randint(1, 3000)
        baseline = dataclasses.replace(
            BASELINE,
            activation=rng.choice([*GATED, *SCALARS]),
            ffn_hidden_size=width,
            num_query_groups=rng.choice([4, 16]),
        )
        match = solve(baseline, rng.choice([*GATED, *SCALARS]), SCALARS, tensor_parallel=tensor_parallel, align=align)
        check_match(match, tensor_parallel * align)
        exact_ones += match.exact
    assert 40 < exact_ones < 360  # both kinds were tried


def check_match(match, multiple):
    width = match.target.ffn_hidden_size
    assert width > 0
    assert width % multiple == 0
    wanted = Fraction(match.baseline.ffn_hidden_size * match.baseline.mlp_matrices, match.target.mlp_matrices)
    rivals = [other for other in (width - multiple, width + multiple) if other > 0]
    assert all(abs(width - wanted) <= abs(other - wanted) for other in rivals)
    assert match.exact == (width == wanted)
    sign = (width > wanted) - (width < wanted)
    for residual in (match.residual_parameters_percent, match.residual_flops_percent):
        assert (residual > 0) - (residual < 0) == sign


def test_residual_by_hand():
    """An MLP only in the limit: F = 11008 gated wants 16512, the next multiples of 256 are 16384 and 16640."""
    baseline = dataclasses.replace(BASELINE, ffn_hidden_size=11008, vocab_size=0)
    match = solve(baseline, "xielu", SCALARS, tensor_parallel=2, align=128)
    assert match.target.ffn_hidden_size == 16384  # both are 128 away: the smaller one
    mlp, attention = 3 * 11008 * 1536, 4 * 1536 * 1536
    assert match.residual_parameters_percent == pytest.approx(-100 * 256 * 1536 / (mlp + attention), rel=1e-12)
    scores = 4096 * 1536  # half of the square, two matmuls, as multiply-adds
    assert match.residual_flops_percent == pytest.approx(-100 * 256 * 1536 / (mlp + attention + scores), rel=1e-12)
    spent = flops(match.target).training() * match.tokens_for_equal_flops(10**9)
    assert spent == pytest.approx(flops(baseline).training() * 10**9, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xilu", {}, "activation: expected one of swiglu, geglu, xielu, crrelu, relu2, gelu, got 'xilu'; did you mean"),
        ("xielu", {"align": 0}, "--align: expected an integer of at least 1, got 0"),
        ("xielu", {"tensor_parallel": 5}, "--ffn-hidden-size: expected a multiple of --tensor-model-parallel-size 5"),
        ("xielu", {"tensor_parallel": 0}, "--tensor-model-parallel-size: expected an integer of at least 1, got 0"),
    ],
)
def test_solver_refuses(name, options, message):
    with pytest.raises(UserError) as error:
        solve(BASELINE, name, SCALARS, **options)
    assert str(error.value).startswith(message)


def test_json_of_the_papers_model(tool):
    code, output, _ = tool(*PAPER.split(), "--vocab-size", "147456", "--activation", "xielu", "--json")
    report = json.loads(output)
    assert code == 0
    assert report["ffn_hidden_size"] == 9216
    assert report["baseline_parameters"] == 1_132_537_344
    assert report["parameters"] == 1_132_537_344 + 48
    assert report["parameters_without_embeddings"] == 1_132_537_344 + 48 - 147456 * 1536
    assert report["flops_per_token"] == report["baseline_flops_per_token"] == flops(BASELINE).training()
    assert report["residual_parameters_percent"] == report["residual_flops_percent"] == 0.0
    assert report["exact"] is True


def test_table_shows_every_activation_of_the_registry(tool):
    from megatron_act.kernels import api as kernels

    code, output, _ = tool(*PAPER.split(), "--activation", *kernels.names(), "--baseline-tokens", "1000")
    rows = {line[:38].strip(): line[38:].split() for line in output.splitlines()}
    count = len(kernels.names())
    assert code == 0
    assert rows["ffn_hidden_size"] == ["6,144", *["9,216"] * count]
    assert rows["activation scalars"] == ["0", *(str(24 * len(kernels.get(n).params)) for n in kernels.names())]
    assert rows["residual of FLOPs per token"] == ["exact"] * count
    assert rows["tokens of equal total FLOPs"] == ["1,000"] * (count + 1)
    assert "embeddings and logits are not counted" in output


def test_forward_and_backward_parts_add_up(tool):
    _, output, _ = tool("--model", "paper-1.1b", "--activation", "xielu", "--json")
    report = json.loads(output)
    for prefix in ("", "baseline_"):
        forward, backward = (report[f"{prefix}flops_per_token_{name}"] for name in ("forward", "backward"))
        assert backward == {part: 2 * count for part, count in forward.items()}
        scores = forward["attention_scores_causal"], forward["attention_scores_full"]
        assert 2 * scores[0] == scores[1] == 4 * 24 * 4096 * 1536
        rest = sum(forward[part] for part in ("attention_projections", "mlp", "logits"))
        assert 3 * (rest + scores[0]) == report[f"{prefix}flops_per_token"]
        assert 3 * (rest + scores[1]) == report[f"{prefix}flops_per_token_full_attention"]


def test_bytes_with_the_flags_of_our_activations(tool):
    """bf16: 2 x 1536 x 2 for norms and inputs twice, q, k, v, attention's output; then 9216 before and after."""
    _, output, _ = tool("--model", "paper-1.1b", "--activation", "xielu", "--json")
    report, key = json.loads(output), "activation_bytes_per_token_per_layer"
    rest = 2 * (4 * 1536 + 3 * 1536 + 1536)
    assert report[key] == report[f"baseline_{key}"] == rest + 4 * 9216
    assert report[f"{key}_recompute"] == rest + 2 * 9216
    assert report[f"{key}_fp8_input"] == rest + 3 * 9216 + 4 * 9216 // 128
    assert report[f"baseline_{key}_recompute"] is report[f"baseline_{key}_fp8_input"] is None


def test_state_and_tokens_follow_layout_and_schedule(tool):
    words = ("--model", "paper-3b", "--activation", "xielu", "--json", "--data-parallel-size", "128")
    shared, copied = (
        json.loads(tool(*words, *more, "--align", "128")[1]) for more in ((), ("--no-distributed-optimizer",))
    )
    assert shared["layout"] == "TP 2, PP 1, DP 128, distributed optimizer"  # TP from the file
    assert copied["layout"] == "TP 2, PP 1, DP 128, optimizer on every rank"
    split, copies, scalars = 3_020_048_384 - 73 * 2048, 73 * 2048, 72
    weights = 2 * (split // 2 + copies)
    assert shared["baseline_state_bytes_per_gpu"]["weights"] == weights
    assert copied["state_bytes_per_gpu"] == {
        "weights": weights + 4 * scalars,
        "gradients": 2 * weights + 4 * scalars,
        "optimizer": 6 * weights + 8 * scalars,
        "total": 9 * weights + 16 * scalars,
    }
    assert shared["state_bytes_per_gpu"]["optimizer"] == -(-(6 * weights + 8 * scalars) // 128)
    assert shared["baseline_tokens"] == shared["tokens_for_equal_flops"] == 48000 * 640 * 4096


@pytest.mark.parametrize(
    ("words", "changed", "step"),
    [
        ("--solve-for num-layers", "num_layers", 1),
        ("--solve-for num-layers --pipeline-model-parallel-size 4", "num_layers", 4),
        ("--solve-for hidden-size", "hidden_size", 16 * 8),
        ("--solve-for hidden-size --align 96", "hidden_size", 3 * 16 * 8),
        ("--solve-for hidden-size --kv-channels 96 --align 32", "hidden_size", 32),
        ("--target-num-layers 20", "ffn_hidden_size", 1),
        ("--target-hidden-size 1792 --align 16", "ffn_hidden_size", 16),
    ],
)
def test_other_sizes_are_solved_for(tool, words, changed, step):
    """Of the sizes that the step allows none costs FLOPs nearer to the baseline's."""
    _, output, _ = tool("--model", "paper-1.1b", "--activation", "xielu", "--json", *words.split())
    report = json.loads(output)
    sizes = {name: report[name] for name in ("num_layers", "hidden_size", "ffn_hidden_size")}
    kv_channels = 96 if "--kv-channels" in words else None
    shape = dataclasses.replace(BASELINE, activation="xielu", activation_scalars=2, kv_channels=kv_channels, **sizes)
    wanted = flops(dataclasses.replace(BASELINE, kv_channels=kv_channels)).training()
    assert report["flops_per_token"] == flops(shape).training()
    assert report["parameters"] == parameters(shape).total
    assert sizes[changed] % step == 0
    miss = abs(report["flops_per_token"] - wanted)
    for rival in (sizes[changed] - step, sizes[changed] + step):
        assert miss <= abs(flops(dataclasses.replace(shape, **{changed: rival})).training() - wanted)
    assert report["residual_flops_percent"] == pytest.approx(100 * (report["flops_per_token"] / wanted - 1), abs=1e-9)
    # with heads of a given size all parameters and FLOPs but the square's are linear in the hidden size
    assert report["exact"] is ("--kv-channels" in words)


def test_config_of_a_model_of_another_depth(tool, tmp_path):
    file = tmp_path / "deep.yaml"
    words = ("--model", "paper-1.1b", "--activation", "xielu", "--target-num-layers", "20", "--output", str(file))
    _, output, _ = tool(*words)
    flags, header = yaml.safe_load(file.read_text())["MODEL_ARGS"], file.read_text().partition("MODEL_ARGS")[0]
    width = flags["--ffn-hidden-size"]
    assert width == round(1.2 * 9216 + 0.2 * (2 * 1536 + 4096 / 2))  # and a fifth of the attention, as width
    assert (flags["--num-layers"], flags["--hidden-size"], flags["--activation"]) == (20, 1536, "xielu")
    assert "of the FLOPs of swiglu, width 6144, 24 layers, hidden size 1536." in header
    assert output.count("%") == 2


def test_hf_model_to_config(tool, tmp_path):
    """A Hugging Face model's partner, as flags that Megatron trains."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"model_type": "llama", "vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "xielu.yaml"
    code, _, _ = tool("--hf-config", str(tmp_path), "--activation", "xielu", "--align", "16", "--output", str(file))
    flags = yaml.safe_load(file.read_text())["MODEL_ARGS"]
    assert code == 0
    assert flags == {
        "--num-layers": 3, "--hidden-size": 64, "--num-attention-heads": 4, "--ffn-hidden-size": 144,
        "--activation": "xielu", "--padded-vocab-size": 320, "--normalization": "RMSNorm",
        "--disable-bias-linear": True, "--position-embedding-type": "rope", "--norm-epsilon": 1e-5,
        "--untie-embeddings-and-output-weights": True, "--rotary-base": 500000, "--seq-length": 4096,
        "--max-position-embeddings": 4096,
    }  # fmt: skip


def test_written_configs_hold_the_matched_models(tool, tmp_path):
    config = str(ROOT / "configs" / "tiny-swiglu.yaml")
    name = str(tmp_path / "new" / "tiny-{activation}.yaml")
    code, _, _ = tool("--config", config, "--activation", "xielu", "relu2", "--output", name)
    assert code == 0
    for activation in ("xielu", "relu2"):
        written = yaml.safe_load((tmp_path / "new" / f"tiny-{activation}.yaml").read_text())
        shipped = yaml.safe_load((ROOT / "configs" / f"tiny-{activation}.yaml").read_text())
        assert written == shipped
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tiny-relu2.yaml", "tiny-xielu.yaml"]


def test_flags_win_over_the_config(tool):
    config = str(ROOT / "configs" / "paper-1.1b-swiglu.yaml")
    words = ("--config", config, "--activation", "relu2", "--json")
    _, plain, _ = tool(*words)
    _, changed, _ = tool(*words, "--num-layers", "12", "--vocab-size", "1000", "--baseline-ffn-hidden-size", "512")
    wanted = dataclasses.replace(BASELINE, num_layers=12, vocab_size=1024, ffn_hidden_size=512)
    assert json.loads(plain)["baseline_parameters"] == 1_132_537_344
    assert json.loads(changed)["baseline_parameters"] == parameters(wanted).total
    assert json.loads(changed)["ffn_hidden_size"] == 768


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--activation xielu", "expected a baseline, got none: give --model, --config, --hf-config, or --baseline and"),
        ("--model paper-2b --activation xielu", "--model: expected one of 125m, "),
        ("--model tiny --config x.yaml --activation xielu", "not allowed with argument --model (see --help)"),
        ("--model tiny --activation xielu --solve-for heads", "argument --solve-for: invalid choice: 'heads'"),
        (
            "--model tiny --activation xielu --target-ffn-hidden-size 640",
            "--target-ffn-hidden-size: expected another --solve-for, got ffn-hidden-size: remove one",
        ),
        (
            "--model tiny --activation xielu --solve-for num-layers --target-ffn-hidden-size 650 --align 16",
            "--target-ffn-hidden-size: expected a multiple of 16 (tensor parallel x align), got 650",
        ),
        ("--model tiny --activation xielu --target-hidden-size 127", "--hidden-size: expected a multiple of --num-att"),
        (f"{PAPER} --activation xielo", "got 'xielo'; did you mean xielu?"),
        (f"{PAPER} --activation xielu --tensor-model-parallel-size 7", "--ffn-hidden-size: expected a multiple of"),
        (
            f"{PAPER} --activation xielu --hidden-size 1537",
            "--hidden-size: expected a multiple of --num-attention-heads",
        ),
        (f"{PAPER} --activation xielu --align 0", "--align: expected an integer of at least 1, got 0"),
        (f"{PAPER} --activation xielu --vocab-size -1", "--vocab-size: expected an integer of at least 0, got"),
        (f"{PAPER} --activation xielu --baseline-tokens 0", "--baseline-tokens: expected an integer of at least 1"),
        (f"{PAPER} --activation xielu --data-parallel-size 0", "--data-parallel-size: expected an integer"),
        (f"{PAPER} --activation xielu --make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by: expected an"),
        (f"{PAPER} --activation xielu relu2 --output one.yaml", "--output: expected {activation} in the name"),
        (f"{PAPER} --activation geglu --output one.yaml", "geglu: expected an activation with a Megatron flag"),
        (
            "--baseline swiglu --baseline-ffn-hidden-size 8 --activation xielu",
            "--hidden-size: expected a value, got none",
        ),
        ("--config missing.yaml --activation xielu", "missing.yaml: expected a readable file, got No such file"),
        (f"{PAPER} --activation xielu --frobnicate", "unrecognized arguments: --frobnicate (see --help)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tool, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, output, error = tool(*words.split())
    assert code == 2
    assert output == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--help"], 0, ""),
        (
            ["--config", "missing.yaml", "--activation", "xielu"],
            2,
            "error: missing.yaml: expected a readable file, got",
        ),
        (
            [*PAPER.split(), "--activation", "xielu", "--output", "/dev/null/x.yaml"],
            2,
            "error: /dev/null/x.yaml: cannot",
        ),
        ([], 2, "error: the following arguments are required: --activation (see --help)"),
        (["--model", "tiny", "--activation", "xielu"], 0, ""),
    ],
)
def test_the_command_from_the_repository_root(words, code, message):
    command = [sys.executable, "tools/compute_match.py", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == (1 if code else 0)
