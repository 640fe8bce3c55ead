"""``configs/fp8_*.yaml``: the models of their namesakes, with recipes and sizes that the GPU and the kernels take."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_act import model_args, te
from megatron_act.fp8_options import Fp8Options

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {
    "fp8_1.1b-xielu-delayed.yaml": ("paper-1.1b-xielu.yaml", (8, 9)),
    "fp8_1.1b-xielu-tensorwise.yaml": ("paper-1.1b-xielu.yaml", (8, 9)),
    "fp8_1.1b-xielu-blockwise.yaml": ("paper-1.1b-xielu.yaml", (9, 0)),
    "fp8_apertus-8b-xielu-mxfp8.yaml": ("apertus-8b-xielu.yaml", (10, 0)),
}
PRECISION = ("--fp8", "--activation-fp8", "--transformer-impl", "--first-last", "--num-layers-at")


def test_every_recipe_has_a_config() -> None:
    assert {path.name for path in CONFIGS.glob("fp8_*.yaml")} == FILES.keys()
    recipes = {model_args.read(CONFIGS / name)["--fp8-recipe"] for name in FILES}
    assert recipes == set(te.CAPABILITIES)


@pytest.mark.parametrize("name", FILES)
def test_it_is_its_namesake_in_fp8(name: str) -> None:
    flags, parent = (model_args.read(CONFIGS / file) for file in (name, FILES[name][0]))
    assert {key: value for key, value in flags.items() if not key.startswith(PRECISION)} == parent
    assert flags["--bf16"] and flags["--transformer-impl"] == "transformer_engine"


@pytest.mark.parametrize("name", FILES)
def test_its_flags_go_together_and_its_sizes_divide(name: str) -> None:
    flags, capability = model_args.read(CONFIGS / name), FILES[name][1]
    options = Fp8Options(*(flags.get(f"--activation-fp8-{part}", False) for part in ("output", "grad", "input-store")))
    assert options.output
    assert options.conflict(SimpleNamespace(fp8=flags["--fp8-format"], fp8_recipe=flags["--fp8-recipe"])) is None
    assert te.fp8_problem(flags["--fp8-recipe"], capability, "13.0") is None
    block = 32 if flags["--fp8-recipe"] == "mxfp8" else 16
    width = flags["--ffn-hidden-size"] // flags["--tensor-model-parallel-size"]
    tokens = flags["--seq-length"] * flags.get("--micro-batch-size", 1)
    assert [size % block for size in (width, flags["--hidden-size"], tokens)] == [0, 0, 0]
