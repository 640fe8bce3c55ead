"""Another activation in a trained model: least squares over its own pre-activations, refusals, training on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_support import LAYERS, loss_of, opened, random_model, train_on
from forked_runs import ForkedRuns, forked_runs

from megatron_act.checkpoint import swap as swapping
from megatron_act.checkpoint.import_flags import open_source
from megatron_act.checkpoint.modeling_megatron_act import TrainableActivation
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.scalars import effective_scalars
from megatron_act.checkpoint.swap import fit, swap
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
TEXT = " ".join(f"word{2 + i * i % 118}" for i in range(200))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relu2 model with a tokenizer, whose second layer's pre-activations are three times as large."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = random_model("arcee", tmp_path_factory.mktemp("swap") / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1} | {f"word{i}": i for i in range(2, 128)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def pre_activations(folder: Path) -> list[torch.Tensor]:
    """All of them, by layer, while the model reads TEXT in windows as long as it was made for."""
    from transformers import AutoTokenizer

    model = opened(folder)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    kept: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    for layer, into in zip(model.model.layers, kept, strict=True):
        layer.mlp.up_proj.register_forward_hook(lambda _, __, x, into=into: into.append(x.flatten()))
    with torch.no_grad():
        for window in ids.split(64):
            model(window[None])
    return [torch.cat(into).double() for into in kept]


def closed_form(x: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """xIELU's least squares, where they are inside its range: both halves are linear in their scalar."""
    high, low = x[x > 0], x[x <= 0]
    h = torch.expm1(low) - low
    a_p = (high.square() * (wanted[x > 0] - 0.5 * high)).sum() / high.pow(4).sum()
    a_n = (h * (wanted[x <= 0] - 0.5 * low)).sum() / h.square().sum()
    return {"alpha_p": float(a_p), "alpha_n": float(a_n)}


def test_fit_is_the_least_squares_solution(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "SAMPLES", 1 << 30)  # all of them
    chosen, fits, warning = swap(open_source(parent), "xielu", TEXT)
    assert warning is None and chosen.activation == "xielu"
    values = pre_activations(parent)
    for layer, (x, each) in enumerate(zip(values, fits, strict=True)):
        assert each.scalars == pytest.approx(closed_form(x, torch.relu(x).square()), rel=1e-5)
        params = kernels.get("xielu").params
        raw = [torch.tensor([chosen.raw[layer][param.name]], dtype=torch.float64) for param in params]
        rest = kernels.get("xielu").reference(x, *raw) - torch.relu(x).square()
        wanted = float((rest.square().mean() / torch.relu(x).pow(4).mean()).sqrt())
        assert each.residual == pytest.approx(wanted, rel=1e-6)
    assert abs(fits[0].scalars["alpha_p"] - fits[1].scalars["alpha_p"]) > 0.02  # each layer has its own distribution


def test_a_sample_is_near_the_whole(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [fit("xielu", x, torch.relu(x).square()) for x in pre_activations(parent)]
    monkeypatch.setattr(swapping, "SAMPLES", 3000)
    for some, each in zip(swap(open_source(parent), "xielu", TEXT)[1], whole, strict=True):
        assert some.scalars == pytest.approx(each.scalars, rel=0.1)


def test_without_text_it_warns(parent: Path) -> None:
    _, fits, warning = swap(open_source(parent), "xielu")
    assert warning is not None and "standard normal distribution" in warning
    x = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fits[0].scalars == pytest.approx(closed_form(x, torch.relu(x).square()), rel=1e-5)
    assert fits[0] == fits[1]


def test_an_activation_fits_itself() -> None:
    """Also one whose scalars enter in no linear way, and one that is another's special case."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for name, shift in (("xielu", 0.4), ("crrelu", 0.2), ("xiprelup", 0.2), ("xgelu", 0.3)):
        activation = kernels.get(name)
        raw = [torch.tensor([param.raw_init + shift], dtype=torch.float64) for param in activation.params]
        found = fit(name, x, activation.reference(x, *raw))
        assert found.residual < 1e-5, name
        wanted = [param.effective(param.raw_init + shift) for param in activation.params]
        assert list(found.scalars.values()) == pytest.approx(wanted, rel=1e-3)
    assert fit("xgelu", x, kernels.get("gelu").reference(x)).scalars == pytest.approx({"alpha": 0.0}, abs=1e-6)
    assert fit("relu", x, torch.relu(x)).residual == 0.0  # without scalars there is nothing to fit


def test_scalars_stay_where_they_can_be_trained() -> None:
    """What wants xIELU's scalars beyond their bounds gets them near by: at a bound softplus has no slope left."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    found = fit("xielu", x, x.clamp(max=0.0))
    assert found.scalars["alpha_p"] == pytest.approx(swapping.LEAST)
    assert found.scalars["alpha_n"] == pytest.approx(0.5 + swapping.LEAST)


def test_gated_models_and_experts_are_refused(tmp_path: Path) -> None:
    gated = random_model("llama", tmp_path / "llama")
    with pytest.raises(UserError, match=r"without a gate, got LlamaForCausalLM, .*silu\(gate x\).*Train anew"):
        swap(open_source(gated), "xielu")
    words = {"activation": "relu2", "num_experts": 4, "moe_intermediate_size": 24}
    with pytest.raises(UserError, match="expected a dense model, got experts"):
        swap(open_source(random_model("megatron_act", tmp_path / "experts", **words)), "xielu")
    with pytest.raises(UserError, match="did you mean 'xielu'"):
        swap(open_source(gated), "xeilu")


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[ForkedRuns]:
    with forked_runs(tmp_path / "server.log") as runs:
        yield runs


@pytest.mark.distributed
def test_training_goes_on_from_a_swapped_model(parent: Path, tmp_path: Path, forked: ForkedRuns) -> None:
    """The first loss is that of the parent with the new function in its MLPs, by transformers."""
    save, text = tmp_path / "save", tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["import", "--hf", parent, "--save", save, "--activation", "xielu", "--text", text]
    done = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chosen, fits, _ = swap(open_source(parent), "xielu", TEXT)
    lines = done.stdout.splitlines()
    for layer, (line, fit_) in enumerate(zip(lines, fits, strict=False)):
        values = f"alpha_p {fit_.scalars['alpha_p']:.6f}, alpha_n {fit_.scalars['alpha_n']:.6f}"
        assert line == f"layer {layer}: {values}; remaining difference {fit_.residual:.2%} of the parent's values"
    assert f"--config {save}/megatron_flags.yaml --load {save}" in lines[-1]
    continued = train_on(forked, save, tmp_path / "run", ranks=1)
    model = opened(parent)
    original = loss_of(model)
    for layer, scalars in zip(model.model.layers, chosen.raw, strict=True):
        layer.mlp.act_fn = TrainableActivation("xielu")
        layer.mlp.act_fn.load_state_dict({name: torch.tensor([raw]) for name, raw in scalars.items()})
    assert abs(continued.losses[0] - loss_of(model)) <= 2e-6
    assert abs(continued.losses[0] - original) > 1e-3
    assert continued.losses[2] < continued.losses[0]
    moved = effective_scalars(MegatronCheckpoint(continued.saved))
    assert all(
        new[name] != pytest.approx(old[name], abs=1e-4)
        for old, new in zip(effective_scalars(MegatronCheckpoint(save)), moved, strict=True)
        for name in old
    )
    assert json.loads((parent / "config.json").read_text())["hidden_act"] == "relu2"
