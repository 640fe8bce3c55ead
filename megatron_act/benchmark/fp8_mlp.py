"""fc1, activation, fc2 under FP8, forward and backward: ours in Megatron's layers, next to Transformer Engine's MLP.

Every MLP begins with its RMSNorm, has no biases, and quantizes its weights in every step, as training does with one
micro-batch a step. A gated one is 2/3 as wide: equal parameters and FLOPs. Between its GEMMs Transformer Engine's MLP
runs its own fused kernels: ReLU squared (srelu) and SwiGLU.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_act import fp8_bytes, te
from megatron_act.benchmark.cases import Shape
from megatron_act.benchmark.table import SEED, Row, Table, explained
from megatron_act.benchmark.timing import Buffer, Sampler, Timing, Work, measure, sampler
from megatron_act.compat import install_typing_override
from megatron_act.errors import UserError
from megatron_act.fp8_options import BF16, Fp8Options

STEPS = 4  # of a launch: what Python needs before the first kernel is shared
FORMAT = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}  # --fp8-format
RELU2, FUSER = "ReLU², TE's MLP", "ReLU², TE's op fuser"
SWIGLU, STOCK = "SwiGLU, TE's MLP", "SwiGLU, Megatron's MLP"
BASELINES = (RELU2, FUSER, SWIGLU, STOCK)
GATED = (SWIGLU, STOCK)
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ours:
    """What of the activation is in FP8; ``fuser``: an operation of Transformer Engine's fuser, which decides that."""

    fp8: Fp8Options = BF16
    fuser: bool = False


OURS = {
    "xIELU, bf16": Ours(),
    "xIELU, FP8 result": Ours(Fp8Options(output=True)),
    "xIELU, FP8 result and gradient": Ours(Fp8Options(output=True, grad=True)),
    "xIELU, op fuser": Ours(fuser=True),
}


@dataclass(frozen=True)
class Case:
    """One recipe at one shape: all MLPs."""

    shape: Shape
    recipe: str

    @property
    def label(self) -> str:
        """``4096x4096x21504``: tokens, hidden size, width without a gate."""
        return f"{self.shape.rows}x{self.shape.hidden}x{self.shape.cols}"

    @property
    def name(self) -> str:
        """As notes name it."""
        return f"MLP {self.recipe} {self.label}"

    @property
    def flops(self) -> float:
        """Of one step: two matrices of the width without a gate, three GEMMs each."""
        return 3.0 * 2 * 2 * self.shape.rows * self.shape.hidden * self.shape.cols


def select(shapes: Sequence[Shape], device: str) -> list[Case]:
    """The first two shapes with a known hidden size, by every recipe that the GPU runs.

    Raises:
        UserError: no Transformer Engine, or no such shape or recipe.
    """
    if why := te.problem():
        raise UserError(f"the MLP under FP8: {why}")
    capability = torch.cuda.get_device_capability()
    recipes = [r for r in fp8_bytes.SCALE if te.fp8_problem(r, capability, torch.version.cuda) is None]
    cases = [Case(shape, recipe) for shape in [s for s in shapes if s.hidden][:2] for recipe in recipes]
    if not cases:
        raise UserError(
            f"the MLP under FP8: expected a GPU with FP8 and shapes with a hidden size, got {capability}: "
            "leave --shapes out, or name other parts with --only"
        )
    return cases


def run(
    cases: list[Case], device: str,
    progress: Callable[[list[Case]], Iterable[Case]] = iter, deadline: float = float("inf"),
) -> Table:  # fmt: skip
    """Times every case; from ``deadline`` (``time.monotonic``) on it starts no further one."""
    table = Table()
    with _one_rank(device):
        for case in progress(cases):
            if time.monotonic() > deadline:
                table.left_out.append(case.name)
                continue
            samplers = _samplers(case, device, table)
            table.rows += _rows(case, measure(samplers, device))
    return table


@contextlib.contextmanager
def _one_rank(device: str) -> Iterator[None]:
    """Megatron's parallel state in this process, for layers that are not sharded."""
    install_typing_override()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(SEED)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _samplers(case: Case, device: str, table: Table) -> dict[str, Sampler]:
    """Everybody who runs."""
    found: dict[str, Sampler] = {}
    for name, build in _builders(case).items():
        try:
            found[name] = _sampler(case, *build(), device)
        except Exception as error:  # the others are worth having: the caller's exit code tells
            (table.failed if name in OURS else table.notes).append(f"{name}, {case.name}: {explained(error)}")
    return found


def _builders(case: Case) -> dict[str, Callable[[], tuple[Any, Forward]]]:
    config = _config(case)
    ours = {name: (lambda each=each: _ours(case, each)) for name, each in OURS.items() if not each.fp8.conflict(config)}
    return {
        **ours,
        RELU2: lambda: _engine(case, "srelu", case.shape.cols),
        FUSER: lambda: _fuser(case),
        SWIGLU: lambda: _engine(case, "swiglu", case.shape.gated_cols),
        STOCK: lambda: _stock(case),
    }


def _config(case: Case, **fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 1, "hidden_size": case.shape.hidden, "num_attention_heads": 1,
            "ffn_hidden_size": case.shape.cols, "add_bias_linear": False, "normalization": "RMSNorm",
            "bf16": True, "params_dtype": torch.bfloat16, "bias_activation_fusion": False,
            "fp8": FORMAT[case.recipe], "fp8_recipe": case.recipe, **fields,
        }
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    return {"linear_fc1": engine.TELayerNormColumnParallelLinear, "linear_fc2": engine.TERowParallelLinear}


def _ours(case: Case, ours: Ours) -> tuple[Any, Forward]:
    from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules
    from megatron_act.te_op import ActivationFusedMLP

    kind = ActivationFusedMLP if ours.fuser else ActivationMLP
    parts = ActivationMLPSubmodules(**_parts(), activation="xielu", activation_fp8=ours.fp8)
    return _megatron(kind(_config(case), parts, ffn_hidden_size=case.shape.cols))


def _stock(case: Case) -> tuple[Any, Forward]:
    """Megatron's, with its own fusion of the gate."""
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    width = case.shape.gated_cols
    gated = {"gated_linear_unit": True, "activation_func": F.silu, "bias_activation_fusion": True}
    config = _config(case, ffn_hidden_size=width, **gated)
    return _megatron(MLP(config, MLPSubmodules(**_parts()), ffn_hidden_size=width))


def _megatron(module: Any) -> tuple[Any, Forward]:
    def forward(x: Tensor) -> Tensor:
        module.set_is_first_microbatch()
        return module(x)[0]

    return module, forward


def _engine(case: Case, activation: str, width: int) -> tuple[Any, Forward]:
    module = importlib.import_module("transformer_engine.pytorch").LayerNormMLP(
        case.shape.hidden, width, normalization="RMSNorm", bias=False, activation=activation,
        params_dtype=torch.bfloat16,
    )  # fmt: skip
    return module, lambda x: module(x, is_first_microbatch=True)


def _fuser(case: Case) -> tuple[Any, Forward]:
    ops, hidden, width = importlib.import_module("transformer_engine.pytorch.ops"), case.shape.hidden, case.shape.cols
    like: dict[str, Any] = {"dtype": torch.bfloat16}
    linear = [ops.Linear(*sizes, bias=False, **like) for sizes in ((hidden, width), (width, hidden))]
    module = ops.Sequential(ops.RMSNorm(hidden, **like), linear[0], ops.SReLU(), linear[1])
    return module, module


def _sampler(case: Case, module: Any, forward: Forward, device: str) -> Sampler:
    shape = (case.shape.rows, 1, case.shape.hidden)  # sequence, batch, hidden
    generator = torch.Generator(device).manual_seed(SEED)
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    buffer = (torch.randn(shape, requires_grad=True, **like), torch.randn(shape, **like))
    step = _step(case, [p for p in module.parameters() if p.requires_grad], forward)
    _try(module, step, buffer)
    work = Work(lambda x, grad: (x, grad), lambda state: [step(state) for _ in range(STEPS)][-1])
    return sampler(work, [buffer], device, capture=False)


def _try(module: Any, step: Callable[[Buffer], Any], buffer: Buffer) -> None:
    """Two steps: the first makes fc1's and fc2's quantizers, the second must give ours those that it asks for."""
    given: list[dict[str, Any]] = []
    hooks = []
    if isinstance(activation := getattr(module, "activation_func", None), torch.nn.Module):
        note = lambda _, args, options: given.append(options)  # noqa: E731
        hooks.append(activation.register_forward_pre_hook(note, with_kwargs=True))
    for _ in range(2):
        step(buffer)
    for hook in hooks:
        hook.remove()
    if given and (missing := [name for name, quantizer in given[-1].items() if quantizer is None]):
        raise RuntimeError(f"expected quantizers, got none as {' and '.join(missing)}: the log says why")


def _step(case: Case, params: list[Tensor], forward: Forward) -> Callable[[Buffer], Any]:
    """Forward and backward in Megatron's own FP8 context."""
    from megatron.core.fp8_utils import get_fp8_context

    config = _config(case)

    def step(state: Buffer) -> Any:
        with get_fp8_context(config):
            y = forward(state[0])
        return torch.autograd.grad(y, [state[0], *params], state[1])

    return step


def _rows(case: Case, timings: dict[str, Timing]) -> list[Row]:
    return [
        {
            "mlp": name, "recipe": case.recipe, "shape": case.label,
            "width": case.shape.gated_cols if name in GATED else case.shape.cols,
            **{key: value / STEPS if key.endswith("_us") else value for key, value in asdict(timing).items()},
            "tflops": case.flops * STEPS / timing.median_us / 1e6,
            "over": {other: timings[other].median_us / timing.median_us for other in BASELINES if other in timings},
        }
        for name, timing in timings.items()
    ]  # fmt: skip
