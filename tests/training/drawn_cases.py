"""Random training configurations: what a case is, how valid ones are drawn, and which values a set of cases covers.

Shared by the test process and the ranks; imports no Megatron. Everything follows from the seed.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_act.kernels import api as kernels

HIDDEN, FFN, HEADS, CHANNELS = 32, 48, 8, 8  # fewer channels make the norms of queries and keys ill-conditioned
EXPERTS, TOP_K, EXPERT_FFN, SHARED_FFN = 4, 2, 24, 16
VOCABULARY, SEQUENCE, STEPS = 64, 16, 5
ROPE_BASE = 10  # a usual base hardly turns such short sequences, and leaves key biases almost without effect
LEARNING_RATE, WEIGHT_DECAY, BETAS = 0.05, 0.1, (0.9, 0.95)
EPSILON = 1e-2  # of Adam: its step stays sensitive to a gradient's size
CLIP = 0.2  # below every gradient norm of these models
RANKS = 4
LEAST = 3  # cases with each value of each dimension


@dataclass(frozen=True)
class Case:
    """One configuration of model, layout and training; the world is tp x pp x cp x dp ranks.

    Attributes:
        vpp: model chunks per pipeline stage, 1 without interleaving.
        experts: ``none``, ``shared`` (one set of scalars a layer) or ``per expert``.
        dense_first: with experts, the first layer has none.
        recompute: ``none``, ``full uniform``, ``full block`` or the module that is recomputed selectively.
        reduction: the scalars' sum is in the ``backward`` pass or in the ``finalize`` hook.
        mutant: what is broken on purpose (``drawn_mutants``); empty for a drawn case.
    """

    seed: int
    activation: str = "xielu"
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 1
    clip: bool = False
    per_token_loss: bool = False
    experts: str = "none"
    dense_first: bool = False
    shared_expert: bool = False
    dispatcher: str = "alltoall"
    recompute_activation: bool = False
    recompute: str = "none"
    reduction: str = "finalize"
    bias: bool = False
    groups: int = HEADS
    qk_norm: bool = False
    layer_norm: bool = False
    mtp: bool = False
    tied: bool = False
    mutant: str = ""

    @property
    def layers(self) -> int:
        """At least two, one for each model chunk: a case's time is that of its collectives."""
        return max(2, self.pp * self.vpp)

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def batch_size(self) -> int:
        return self.dp * self.micro_batches * self.micro_batch_size

    def __str__(self) -> str:
        """What differs from one rank's dense model."""
        plain = Case(0)
        parts = [f"{key}={value}" for key, value in asdict(self).items() if value != getattr(plain, key)]
        return " ".join(["case", *(part.replace(" ", "-") for part in parts)])


def batch(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and loss mask of a global batch, each (batch, sequence); masked tokens under per-token loss only.

    A token follows from the one before in half of the places, so that there is something to learn. Megatron averages
    means of micro-batches unless it is told otherwise, and prediction layers' losses too: with all ones these are the
    mean over the global batch.
    """
    rng = torch.Generator().manual_seed(1000 * case.seed + step)
    shape = (case.batch_size, SEQUENCE + 1)
    ids = (torch.rand(shape, generator=rng) ** 3 * VOCABULARY).long()
    for place in range(1, SEQUENCE + 1):
        follows = torch.rand(shape[0], generator=rng) < 0.5
        ids[:, place] = torch.where(follows, (3 * ids[:, place - 1] + 1) % VOCABULARY, ids[:, place])
    mask = torch.ones(shape[0], SEQUENCE)
    if case.per_token_loss and not case.mtp:
        mask = (torch.rand(mask.shape, generator=rng) < 0.7).float()
    return ids[:, :-1], ids[:, 1:], mask


def _layout(rng: random.Random) -> dict:
    world = rng.choice([1, 2, 4, 4, 4, 4])
    sizes = [s for s in itertools.product((1, 2, 4), repeat=4) if s[0] * s[1] * s[2] * s[3] == world]
    tp, pp, cp, dp = rng.choices(sizes, weights=[3 if s[0] > 1 else 1 for s in sizes])[0]
    return {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "vpp": rng.choice([1, 2]) if pp == 2 else 1}


def _experts(rng: random.Random, layout: dict) -> dict:
    kind = rng.choice(["none", "shared", "per expert"])
    if kind == "none":
        return {"experts": kind}
    stage = layout["tp"] * layout["cp"] * layout["dp"]  # ranks that a stage's experts are spread over
    ep, etp = rng.choice([(e, t) for e in (1, 2, 4) for t in (1, 2, 4) if stage % (e * t) == 0])
    dispatcher = "allgather" if etp > 1 else rng.choice(["alltoall", "allgather"])  # gloo gathers equal shares only
    shares = {"shared_expert": rng.random() < 0.5, "dense_first": rng.random() < 0.4}
    return {"experts": kind, "ep": ep, "etp": etp, "dispatcher": dispatcher, **shares}


def _data_parallel(rng: random.Random) -> dict:
    sharded, overlapped = rng.random() < 0.5, rng.random() < 0.5
    gather = sharded and overlapped and rng.random() < 0.5
    return {
        "distributed_optimizer": sharded,
        "overlap_grad_reduce": overlapped,
        "overlap_param_gather": gather,
    }


def _recompute(rng: random.Random, moe: dict, bias: bool) -> dict:
    """Megatron's recompute of the MLP alone does not end where it has biases; that of norms needs other layers."""
    modules = ["core_attn"] + (["moe"] if moe["experts"] != "none" else [] if bias else ["mlp"])
    modules += ["shared_experts"] if moe.get("shared_expert") else []
    value = rng.choice(["none", "none", "full uniform", "full block", *modules])
    return {"recompute": value, "recompute_activation": rng.random() < 0.5}


def draw_one(rng: random.Random) -> Case:
    """A valid case: every choice is made among what the choices before it leave possible."""
    layout = _layout(rng)
    moe = _experts(rng, layout)
    has_experts = moe["experts"] != "none"
    flag = lambda chance=0.5: rng.random() < chance  # noqa: E731
    bias = moe.get("etp", 1) == 1 and not moe.get("shared_expert") and flag()  # Megatron's shared experts have none
    mtp = layout["cp"] == 1 and flag(0.3)  # its loss is averaged per context-parallel rank
    return Case(
        seed=rng.randrange(10**6),
        activation=rng.choice(kernels.names()),
        **layout,
        sp=layout["tp"] > 1 and (has_experts or flag()),  # experts under tensor parallelism need it
        **moe,
        **_data_parallel(rng),
        micro_batches=rng.choice([2, 2, 4] if layout["vpp"] > 1 else [1, 1, 2, 2, 3]),
        micro_batch_size=rng.choice([1, 2]),
        clip=flag(),
        per_token_loss=flag(),
        **_recompute(rng, moe, bias),
        reduction=rng.choice(["backward", "finalize"]),
        bias=bias,
        groups=rng.choice([HEADS, 4, 2]),
        qk_norm=flag(),
        layer_norm=flag(0.3),
        mtp=mtp,
        tied=not (mtp and layout["pp"] > 1) and flag(0.3),  # Megatron has no sharded state for that
    )


def values(case: Case) -> Iterator[tuple[str, str]]:
    """The (dimension, value) pairs of a case; some dimensions count only where they make a difference."""
    fields = asdict(case) | {"world": case.world}
    hidden = {"seed", "mutant"}
    if case.experts == "none":
        hidden |= {"ep", "etp", "dense_first", "shared_expert", "dispatcher"}
    yield from ((key, str(value)) for key, value in fields.items() if key not in hidden)
    if case.tp > 1:
        yield "sequence parallel over tp", str(case.sp)
    if case.tp > 1 and kernels.get(case.activation).params:
        yield "scalars split over tp", case.activation
        yield "scalars split over tp, summed in", case.reduction
    if case.dp * case.cp > 1:
        yield "optimizer over dp, cp", "sharded" if case.distributed_optimizer else "replicated"


@functools.cache
def draw(count: int, seed: int = 0) -> tuple[Case, ...]:
    """``count`` cases; each is, of several drawn, the one with the most values that are still drawn too rarely."""
    rng, seen, cases = random.Random(seed), Counter(), []
    for _ in range(count):
        candidates = [draw_one(rng) for _ in range(100)]
        best = max(candidates, key=lambda case: sum(max(0, LEAST - seen[pair]) for pair in values(case)))
        cases.append(best)
        seen.update(values(best))
    return tuple(cases)


def coverage(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """How many cases have each value of each dimension, values that the registry or a choice names included."""
    rng = random.Random(1)
    known = {pair for _ in range(2000) for pair in values(draw_one(rng))}
    counted = Counter(pair for case in cases for pair in values(case))
    found: dict[str, dict[str, int]] = {}
    for dimension, value in sorted(known):
        found.setdefault(dimension, {})[value] = counted[dimension, value]
    return found
