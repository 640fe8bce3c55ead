"""The modelling file that comes with exports: all activations of the registry, fp32 scalars, generation with cache."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_support import opened, random_model

from megatron_act.checkpoint import modeling_megatron_act as shipped
from megatron_act.checkpoint.hf_config import AUTO_MAP
from megatron_act.kernels import api as kernels

FOLDER = Path(shipped.__file__).parent
PARAMS = {"qk_norm": True, "head_dim": 12}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "activation_per_expert": True, "routed_scaling_factor": 1.5}


@pytest.mark.parametrize("name", kernels.names())
def test_formulas_are_the_registrys(name: str) -> None:
    activation, (_, initial) = kernels.get(name), shipped.FORMULAS[name]
    assert [param.name for param in activation.params] == list(initial)
    assert [param.raw_init for param in activation.params] == pytest.approx(list(initial.values()), abs=1e-12)
    ends = torch.tensor([-torch.inf, -1e4, -1e-9, 0.0, 1e-9, 1e4, torch.inf], dtype=torch.float64)
    x = torch.cat([torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64), ends])
    module = shipped.TrainableActivation(name).double()
    for shift in (0.0, 0.3, -0.7):
        raw = [torch.tensor([param.raw_init + shift], dtype=torch.float64) for param in activation.params]
        with torch.no_grad():
            for mine, theirs in zip(module.parameters(), raw, strict=True):
                mine.copy_(theirs)
            torch.testing.assert_close(module(x), activation.reference(x, *raw), rtol=1e-12, atol=1e-12)
            half = x.bfloat16()  # computed in fp32, rounded once
            torch.testing.assert_close(module(half), activation.reference(half, *raw), rtol=0.0, atol=0.0)


def test_there_are_no_formulas_besides() -> None:
    assert set(shipped.FORMULAS) == set(kernels.names())


def with_code(folder: Path) -> Path:
    """A saved model as an export has it: the code beside it and named in its config."""
    for kind in ("configuration", "modeling"):
        shutil.copy(FOLDER / f"{kind}_megatron_act.py", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return folder


PROGRAM = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
options = {"trust_remote_code": True, "output_loading_info": True}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    assert not any(info.values()), info
    scalars = {name: value for name, value in model.named_parameters() if ".act_fn." in name}
    assert {value.dtype for value in scalars.values()} == {torch.float32}
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    model, _ = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokens = torch.arange(7)[None]
    options_ = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(tokens, use_cache=True, **options_)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **options_))
    decoder, info = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)  # what serving programs build on
    assert {key: names for key, names in info.items() if names} == {"unexpected_keys": {"lm_head.weight"}}, info
    states = decoder(tokens).last_hidden_state
    assert torch.equal(model.lm_head(states), model(tokens).logits)
    torch.save({"logits": model(tokens).logits.detach(), "scalars": scalars, "cached": cached}, folder + "/answer")
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron_act", "megatron")]
"""


def test_opens_with_transformers_alone(tmp_path: Path) -> None:
    """In an isolated Python that cannot import this project; scalars stay fp32 in a bf16 model, to the last bit."""
    folders = [
        with_code(random_model("megatron_act", tmp_path / "crrelu", activation="crrelu")),
        with_code(random_model("megatron_act", tmp_path / "experts", activation="xielu", **PARAMS, **EXPERTS)),
    ]
    command = [sys.executable, "-I", "-c", PROGRAM, *map(str, folders)]
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        model, answer = opened(folder), torch.load(folder / "answer")
        torch.testing.assert_close(answer["logits"], model(torch.arange(7)[None]).logits.detach(), rtol=0.0, atol=1e-5)
        for name, value in answer["scalars"].items():
            assert torch.equal(value, model.get_parameter(name)), name


def test_training_moves_every_parameter(tmp_path: Path) -> None:
    for words in ({"activation": "crrelu"}, {"activation": "xielu", **PARAMS, **EXPERTS}):
        model = opened(random_model("megatron_act", tmp_path / words["activation"], **words)).train()
        tokens = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))
        model(tokens, labels=tokens).loss.backward()
        still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
        assert still == []
