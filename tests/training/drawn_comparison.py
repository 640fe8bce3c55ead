"""What the oracle says of a drawn case, and where a run through Megatron differs from it.

Megatron runs in fp32, the oracle in fp64, so the bounds are fp32's rounding (6e-8 of each operation) after some ten
layers of sums that partly cancel: over twice the worst of 90 drawn cases, far below what a wrong reduction does (1e-3
to 1, ``test_a_broken_reduction_is_noticed``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import drawn_cases as drawn
import torch
from drawn_cases import Case
from oracle_gpt import GPT, Shape, derivatives
from oracle_state import Shard, from_megatron, renamed
from torch import Tensor

GRADIENT = 1e-5  # of the norm of the parameter's gradient; worst of 300: 3.8e-6, the router's bias
SCALAR = 5e-6  # of the sum of the absolute terms of the scalar's gradient; worst of 300: 1.1e-6
NORM = 2e-6  # of the gradient norm, at the first step, where both have the same weights; worst of 300: 4e-7
LATER_NORM = 2e-4  # in later steps, whose weights carry the earlier differences; worst of 300: 6.6e-5, of relu2
LOSS = 2e-5  # nats, in all steps, likewise; worst of 300: 4e-6
MOVED = 250 * LOSS  # what training must change at least, or equal losses would say little
# Nearer to a decision than this, fp32 may fall to the other side of it:
MARGIN = 2e-5  # between the router's logits of a chosen and a rejected expert
NEAREST = 5e-6  # between a pre-activation and the bend of an activation


@dataclass
class Truth:
    """An fp64 run of the oracle.

    Attributes:
        losses: of each step, in nats.
        grad_norms: of each step before clipping, every parameter counted once.
        gradients: of the first step, by Megatron's name.
        terms: of the first step, by a scalar's Megatron name: the sum of the absolute terms of its gradient.
        moved: what the training changed of the last step's loss, nats.
        close: why fp32 might not decide as fp64 does, empty if it must.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    close: str = ""


def truth(case: Case, start: Mapping[str, Tensor]) -> Truth:
    """Trains the oracle from whole tensors by Megatron's names, with torch's AdamW in fp64."""
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    shape = Shape(case.activation, drawn.HEADS, case.groups, drawn.TOP_K, case.layer_norm, rope_base=drawn.ROPE_BASE)
    optimizer, found = adamw(leaves), Truth()
    for step in range(drawn.STEPS):
        model = GPT(shape, from_megatron(leaves, shape))
        optimizer.zero_grad()
        total, loss = model.loss(*drawn.batch(case, step))
        total.backward()
        found.close = found.close or close_call(case, step, model)
        if step == 0:
            found.gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
            found.terms = {name: model.record.terms.get(renamed(name), 0.0) for name in leaves if is_scalar(name)}
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), drawn.CLIP if case.clip else float("inf"))
        optimizer.step()
        found.losses.append(float(loss.detach()))
        found.grad_norms.append(float(norm))
    untrained = GPT(shape, from_megatron(start, shape)).loss(*drawn.batch(case, drawn.STEPS - 1))[1]
    found.moved = abs(float(untrained) - found.losses[-1])
    return found


def adamw(leaves: Mapping[str, Tensor]) -> torch.optim.AdamW:
    """Weight decay for matrices, none for norms, biases and scalars."""
    groups = [
        {"params": [leaf for leaf in leaves.values() if leaf.dim() > 1], "weight_decay": drawn.WEIGHT_DECAY},
        {"params": [leaf for leaf in leaves.values() if leaf.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=drawn.LEARNING_RATE, betas=drawn.BETAS, eps=drawn.EPSILON)


def close_call(case: Case, step: int, model: GPT) -> str:
    """Whether rounding may choose another expert, or in the gradients that are compared another side of a bend."""
    if model.record.margin < MARGIN:
        return f"router logits {model.record.margin:.1e} apart in step {step}"
    if step == 0 and model.record.nearest < NEAREST and has_bend(case.activation):
        return f"a pre-activation {model.record.nearest:.1e} from the bend of {case.activation}"
    return ""


def has_bend(activation: str) -> bool:
    """Whether the derivative jumps at 0, as ReLU's does."""
    shape = Shape(activation, 1, 1)
    raws = [torch.tensor([0.3], dtype=torch.float64) for _ in drawn.kernels.get(shape.activation).params]
    left, right = derivatives(activation, torch.tensor([-1e-9, 1e-9], dtype=torch.float64), *raws)[0]
    return abs(float(left - right)) > 1e-3


def is_scalar(name: str) -> bool:
    """Whether a parameter is an activation's."""
    return ".activation_func." in name


@dataclass(frozen=True)
class Differences:
    """How far a run is from the oracle.

    Attributes:
        gradients: by parameter the worst rank's error, in units of its scale (``GRADIENT``, ``SCALAR``).
        unseen: parameters with elements whose gradient no rank's optimizer has.
        losses: largest absolute difference over steps and ranks, nats.
        norms: largest relative difference of the gradient norm over ranks, by step.
    """

    gradients: dict[str, float]
    unseen: list[str]
    losses: float
    norms: list[float]

    def problems(self) -> dict[str, float]:
        """What is beyond its bound, by name."""
        bound = {name: SCALAR if is_scalar(name) else GRADIENT for name in self.gradients}
        found = {name: error for name, error in self.gradients.items() if not error <= bound[name]}
        found |= {f"{name}: elements without a gradient": 1.0 for name in self.unseen}
        found |= {"losses": self.losses} if not self.losses <= LOSS else {}
        bounds = [NORM] + [LATER_NORM] * (drawn.STEPS - 1)
        norms = enumerate(zip(self.norms, bounds, strict=True))
        return found | {f"gradient norm, step {step}": error for step, (error, bound) in norms if not error <= bound}

    def worst(self) -> str:
        """One line for the log."""
        scalars = max((error for name, error in self.gradients.items() if is_scalar(name)), default=0.0)
        others = max(((error, name) for name, error in self.gradients.items() if not is_scalar(name)))
        steps = f"losses {self.losses:.1e}, norm {self.norms[0]:.1e} then {max(self.norms[1:]):.1e}"
        return f"scalars {scalars:.1e}, others {others[0]:.1e} ({others[1]}), {steps}"


def differences(ranks: Sequence[Mapping[str, list[float]]], shards: Sequence[Shard], known: Truth) -> Differences:
    """Compares what the ranks of a case report and hold with the truth.

    Args:
        ranks: ``losses`` (empty but on the last pipeline stage) and ``grad_norms`` of every rank.
        shards: of all ranks.
        known: the oracle's run from the same weights.
    """
    errors, unseen = gradient_errors(shards, known)
    losses = [each["losses"] for each in ranks if each["losses"]]
    norms = [each["grad_norms"] for each in ranks]
    pairs = [zip(each, known.losses, strict=True) for each in losses]
    by_step = [[abs(norm / right - 1) for norm, right in zip(each, known.grad_norms, strict=True)] for each in norms]
    off = max((abs(loss - right) for pair in pairs for loss, right in pair), default=float("nan"))
    return Differences(errors, unseen, off, [max(each) for each in zip(*by_step, strict=True)])


def gradient_errors(shards: Sequence[Shard], known: Truth) -> tuple[dict[str, float], list[str]]:
    """By parameter the worst rank's error in units of its scale; the parameters that no optimizer sees in full."""
    errors: dict[str, float] = {}
    seen: dict[str, Tensor] = {}
    for shard in shards:
        name, end = shard.name, shard.start + shard.grad.numel()
        whole = known.gradients.get(name)
        if whole is None:
            raise ValueError(f"expected every parameter to have a part in the oracle's loss, got none of {name}")
        scale = known.terms[name] if is_scalar(name) else float(whole.norm())
        error = float((shard.grad.double() - shard.of(whole).flatten()[shard.start : end]).norm())
        errors[name] = max(errors.get(name, 0.0), error / scale if scale else error)
        mine = torch.zeros(shard.value.numel(), dtype=torch.bool)
        mine[shard.start : end] = True
        shard.of(seen.setdefault(name, torch.zeros(shard.shape, dtype=torch.bool))).logical_or_(
            mine.view_as(shard.value)
        )
    return errors, [name for name, elements in seen.items() if not elements.all()]
