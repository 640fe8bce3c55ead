"""An activation of ``megatron_act.kernels`` as a Megatron module: one set of raw fp32 scalars per layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megatron_act import fp8_function, recompute
from megatron_act.kernels import api as kernels
from megatron_act.parallel import GradientProbe, sum_gradients_over_group, sum_over_group


class TrainableActivation(MegatronModule):
    """``y = f(x + bias; raw scalars)`` on the local slice of the ffn dimension.

    Each scalar is a ``torch.nn.Parameter`` of shape (1,) in fp32, named as in the papers (xIELU: ``alpha_p``,
    ``alpha_n``), holding the raw value that the optimizer moves; softplus and offsets are applied in the kernel. Shape
    (1,) is what exempts it from Megatron's weight decay. It stays fp32 when the model is cast to bf16 or fp16: a bf16
    scalar near 0.2 moves in steps of 0.001, more than an optimizer step. Its gradient is summed over ``tp_group`` in
    the backward pass, or after it where ``finalize.install`` has set ``sums_in_backward`` to False.

    Args:
        config: the layer's configuration.
        name: a name of ``kernels.names()``.
        init: effective initial values by parameter name; others take the paper's (``Param.init``).
        backend: ``auto``, ``triton`` or ``reference`` (``kernels.apply``).
        tp_group: the group over which the ffn dimension is split; None means Megatron's.
        recompute: make a result that ``recompute.dropped_input`` can drop until the backward pass.
        fp8_store: keep the pre-activation in FP8 for the backward pass.

    Raises:
        ValueError: an unknown activation, parameter name or impossible effective value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        name: str,
        init: Mapping[str, float] | None = None,
        backend: str = "auto",
        tp_group: torch.distributed.ProcessGroup | None = None,
        recompute: bool = False,
        fp8_store: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.activation = kernels.get(name)
        self.backend = backend
        self.recompute = recompute
        self.fp8_store = fp8_store
        self.sums_in_backward = True
        self.probe: GradientProbe | None = None  # set while the reductions are being checked
        self.role = ""  # in a layer with several sets of scalars: whose this is, as telemetry names it
        self.layer_number = 0  # from 1, set by the layer that owns this MLP; telemetry sorts by it
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        for param, raw in zip(self.activation.params, raw_initial_values(name, init), strict=True):
            tensor = torch.tensor([raw], dtype=torch.float32, device=device)
            self.register_parameter(param.name, torch.nn.Parameter(tensor))

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        *,
        fp8_output: Any = None,
        fp8_grad: Any = None,
    ) -> torch.Tensor:
        """Applies the activation.

        Args:
            x: fc1's output, shape (..., ffn_hidden_size / tp), fp32, bf16 or fp16.
            bias: fc1's bias, shape (ffn_hidden_size / tp,), or None.
            weights: one factor per token (an expert's router probabilities), shape ``x.shape[:-1]``, or None.
            fp8_output, fp8_grad: quantizers of the result and of x's gradient (``fp8_output``), without weights.

        Returns:
            A tensor of x's shape and dtype; with ``fp8_output`` Transformer Engine's quantized tensor.

        Raises:
            ValueError: weights together with FP8.
        """
        raw = self.wired_scalars()
        if fp8_output is not None or fp8_grad is not None or self.fp8_store:
            if weights is not None:
                raise ValueError("weights: expected none with FP8, got a tensor: the kernels that write FP8 take none")
            plan = fp8_function.Plan(self.activation.name, self.backend, fp8_output, fp8_grad, self.fp8_store)
            return fp8_function.apply(plan, x, bias, raw)
        apply = recompute.apply if self.recompute else kernels.apply
        return apply(self.activation.name, x, raw, bias=bias, weights=weights, backend=self.backend)

    def wired_scalars(self) -> Sequence[torch.Tensor]:
        """The raw scalars as a forward pass must use them: connected to the reduction of their gradients."""
        raw: Sequence[torch.Tensor] = self.raw_scalars()
        if self.sums_in_backward:
            raw = sum_gradients_over_group(raw, self.tp_group)
        return self.probe.watch(raw) if self.probe else raw

    def received(self, partials: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The scalars' gradients from this rank's partial ones, for a caller that does its own backward pass."""
        if self.probe:
            self.probe.add(partials)
        if self.sums_in_backward:
            partials = sum_over_group(partials, self.tp_group)
        return tuple(partials)

    def raw_scalars(self) -> list[torch.Tensor]:
        """The raw scalars in the registry's order."""
        return [getattr(self, param.name) for param in self.activation.params]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "TrainableActivation":
        """Follows device moves and casts to float64; keeps fp32 under casts to bf16 and fp16 (Float16Module)."""
        before = {name: param.detach() for name, param in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, param in self.named_parameters(recurse=False):
            if param.dtype.itemsize < torch.float32.itemsize:
                param.data = before[name].to(device=param.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.activation.name}, backend={self.backend}"


def raw_initial_values(name: str, init: Mapping[str, float] | None) -> list[float]:
    """Raw start values of an activation's scalars from effective ones.

    Args:
        name: a name of ``kernels.names()``.
        init: effective values by parameter name, e.g. ``{"alpha_p": 0.8}``; absent ones take the paper's.

    Raises:
        ValueError: a name that the activation lacks, or a value outside its range.
    """
    activation, init = kernels.get(name), dict(init or {})
    known = [param.name for param in activation.params]
    for key in init:
        if key not in known:
            raise ValueError(f"expected a scalar of {name} ({', '.join(known) or 'it has none'}), got {key!r}")
    return [param.raw(init[param.name]) if param.name in init else param.raw_init for param in activation.params]


def activations_of(model: Any) -> list[TrainableActivation]:
    """Every TrainableActivation in a module or list of modules, in layer order."""
    chunks = model if isinstance(model, list | tuple) else [model]
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, TrainableActivation)]
