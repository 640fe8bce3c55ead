"""The compute match: the MLP width that gives an activation the matmul parameters and FLOPs of a baseline.

An MLP holds m * h * F weights, m = 3 with a gate and 2 without. Attention, embeddings and logits do not depend on the
activation, so equal MLP weights mean equal matmul parameters and equal FLOPs at once:

    F = F_baseline * m_baseline / m        swiglu 6144 -> xielu 9216, and back

Hardware wants multiples: every tensor-parallel rank holds F / T columns, and its matmuls want ``align`` to divide them
(16 for FP8, 32 for MXFP8, 128 for speed). Where the exact F is no multiple of T * align the nearest one is taken, the
smaller of two equally near ones, and what remains is reported.

Layers L or hidden size h can be solved for instead. Neither keeps parameters and FLOPs equal at once (the attention
square has no parameters, embeddings depend on h), so FLOPs are matched and the residual in parameters is reported.
"""

import bisect
import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_act.budget import BACKWARD_PASSES, GATED, Flops, Parameters, Shape, flops, parameters
from megatron_act.errors import UserError
from megatron_act.memory import activation_bytes

HEAD_STEP = 8  # a solved hidden size gives heads of a multiple of this: what fused attention takes
FREE = ("ffn_hidden_size", "num_layers", "hidden_size")


@dataclass(frozen=True)
class Match:
    """A baseline and the model matched to it; residuals in percent, positive when the matched model is the larger."""

    baseline: Shape
    target: Shape
    multiple: int  # the width is a multiple of this: tensor-parallel size * align

    @property
    def exact(self) -> bool:
        """Whether matmul parameters and FLOPs are equal."""
        return not (self.residual_parameters_percent or self.residual_flops_percent)

    @property
    def parameters(self) -> Parameters:
        """Parameters of the matched model."""
        return parameters(self.target)

    @property
    def baseline_parameters(self) -> Parameters:
        """Parameters of the baseline."""
        return parameters(self.baseline)

    @property
    def residual_parameters_percent(self) -> float:
        """Excess matmul parameters of the matched model, in % of the baseline's."""
        return _percent(self.parameters.matmul, self.baseline_parameters.matmul)

    @property
    def residual_flops_percent(self) -> float:
        """Excess training FLOPs per token of the matched model (causal attention), in % of the baseline's."""
        return _percent(flops(self.target).training(), flops(self.baseline).training())

    def tokens_for_equal_flops(self, baseline_tokens: int) -> int:
        """Tokens on which the matched model spends the baseline's FLOPs, to the nearest token.

        Raises:
            UserError: fewer than one token.
        """
        if baseline_tokens < 1:
            raise UserError(f"--baseline-tokens: expected an integer of at least 1, got {baseline_tokens}")
        ratio = Fraction(flops(self.baseline).training(), flops(self.target).training())
        return round(baseline_tokens * ratio)

    def report(self) -> dict[str, Any]:
        """Every figure of the match as plain JSON values; parameters are counts, FLOPs are per token."""
        matched, baseline = describe(self.target), describe(self.baseline)
        return {
            **matched,
            **{f"baseline_{key}": value for key, value in baseline.items()},
            "padded_vocab_size": self.target.vocab_size,
            "seq_length": self.target.seq_length,
            "ffn_hidden_size_multiple_of": self.multiple,
            "exact": self.exact,
            "residual_parameters_percent": self.residual_parameters_percent,
            "residual_flops_percent": self.residual_flops_percent,
        }


def solve(
    baseline: Shape,
    activation: str,
    scalars: Mapping[str, int],
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    align: int = 1,
    free: str = "ffn_hidden_size",
    fixed: Mapping[str, int] | None = None,
) -> Match:
    """Finds the size at which a model with ``activation`` costs what the baseline costs.

    Args:
        baseline: the model to match.
        activation: a gated one of `budget.GATED` or a key of ``scalars``.
        scalars: trainable scalars per layer of every known activation without a gate.
        tensor_parallel: T; the width is a multiple of T * align.
        pipeline_parallel: the layers are a multiple of it.
        align: what must divide the width held by one tensor-parallel rank, and the hidden size.
        free: what is solved for, one of `FREE`.
        fixed: other sizes in which the matched model differs from the baseline.

    Returns:
        The match with the smallest residual in FLOPs, the smaller of two equally good ones; exact where an aligned
        size is.

    Raises:
        UserError: an unknown activation or size, or one that the layout cannot hold.
    """
    check_activation(activation, scalars)
    check_tensor_parallel(baseline, tensor_parallel)
    if align < 1:
        raise UserError(f"--align: expected an integer of at least 1, got {align}")
    differences: dict[str, Any] = {"activation_scalars": scalars.get(activation, 0), **(fixed or {})}
    changed = dataclasses.replace(baseline, activation=activation, **differences)
    steps = _steps(changed, tensor_parallel, pipeline_parallel, align)
    if free not in steps:
        raise UserError(f"free: expected one of {', '.join(steps)}, got {free!r}")
    width, multiple = changed.ffn_hidden_size, steps["ffn_hidden_size"]
    if free != "ffn_hidden_size" and width % multiple:
        raise UserError(
            f"--target-ffn-hidden-size: expected a multiple of {multiple} (tensor parallel x align), got {width}"
        )
    return Match(baseline, _solved(changed, free, steps[free], flops(baseline).training()), multiple)


def _steps(shape: Shape, tensor_parallel: int, pipeline_parallel: int, align: int) -> dict[str, int]:
    """What can be solved for, and what it must be a multiple of."""
    heads = shape.num_attention_heads * HEAD_STEP if shape.kv_channels is None else 1
    return {
        "ffn_hidden_size": tensor_parallel * align,
        "num_layers": pipeline_parallel,
        "hidden_size": math.lcm(heads, align),
    }


def _solved(shape: Shape, free: str, step: int, wanted: int) -> Shape:
    """The shape whose size ``free``, a multiple of ``step``, brings it nearest to ``wanted`` FLOPs per token."""

    def sized(steps: int) -> Shape:
        size: dict[str, Any] = {free: steps * step}
        return dataclasses.replace(shape, **size)

    def cost(steps: int) -> int:
        return flops(sized(steps)).training()

    bound = 1
    while cost(bound) < wanted:
        bound *= 2
    above = 1 + bisect.bisect_left(range(1, bound), wanted, key=cost)  # the first that costs at least as much
    below = max(above - 1, 1)
    return sized(below if wanted - cost(below) <= cost(above) - wanted else above)


def describe(shape: Shape) -> dict[str, Any]:
    """The figures of one model as plain JSON values: parameters, FLOPs per token and bytes per token and layer.

    Recompute and the FP8 pre-activation are None with a gate: they are flags that go with ``--activation``.
    """
    counts, cost = parameters(shape), flops(shape)
    forward = _forward_parts(cost)
    recompute, fp8_input = _kept_with_flags(shape)
    return {
        "activation": shape.activation,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "parameters": counts.total,
        "parameters_without_embeddings": counts.without_embeddings,
        "matmul_parameters": counts.matmul,
        "activation_scalars": counts.activation_scalars,
        "flops_per_token": cost.training(),
        "flops_per_token_full_attention": cost.training(causal=False),
        "flops_per_token_forward": forward,
        "flops_per_token_backward": {name: BACKWARD_PASSES * part for name, part in forward.items()},
        "activation_bytes_per_token_per_layer": activation_bytes(shape).total,
        "activation_bytes_per_token_per_layer_recompute": recompute,
        "activation_bytes_per_token_per_layer_fp8_input": fp8_input,
    }


def _kept_with_flags(shape: Shape) -> tuple[int | None, int | None]:
    if shape.gated:
        return None, None
    return activation_bytes(shape, recompute_activation=True).total, activation_bytes(shape, fp8_input=True).total


def check_activation(name: str, scalars: Mapping[str, int]) -> None:
    """Raises UserError, naming the nearest known one, when ``name`` is no activation of ours."""
    known = (*GATED, *scalars)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"activation: expected one of {', '.join(known)}, got {name!r}{hint}")


def check_tensor_parallel(shape: Shape, tensor_parallel: int) -> None:
    """Raises UserError when ``tensor_parallel`` ranks cannot share the heads or the MLP width of ``shape``."""
    if tensor_parallel < 1:
        raise UserError(f"--tensor-model-parallel-size: expected an integer of at least 1, got {tensor_parallel}")
    for flag, value in (("ffn-hidden-size", shape.ffn_hidden_size), ("num-attention-heads", shape.num_attention_heads)):
        if value % tensor_parallel:
            raise UserError(
                f"--{flag}: expected a multiple of --tensor-model-parallel-size {tensor_parallel}, got {value}: "
                "change one of the two"
            )


def _forward_parts(cost: Flops) -> dict[str, int]:
    return {
        "attention_projections": cost.attention_projections,
        "attention_scores_causal": cost.attention_scores // 2,
        "attention_scores_full": cost.attention_scores,
        "mlp": cost.mlp,
        "logits": cost.logits,
    }


def _percent(value: int, reference: int) -> float:
    return float(Fraction(100 * (value - reference), reference))
