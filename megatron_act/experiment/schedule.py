"""Learning-rate schedules as Megatron's own flags, and a run's flags at another length or learning rate.

    schedule: {kind: wsd, warmup: 0.1, decay: 0.2, final: 0.0}
    schedule: {kind: cosine, warmup: 0.1, final: 0.1}

``warmup`` and ``decay`` are shares of the run, ``final`` the last learning rate as a share of the peak. WSD: linear
warm-up, stable, then ``1 - sqrt``: at the share s of the decay the rate is ``final + (peak - final) (1 - sqrt(s))``.
Cosine: warm-up, then half a cosine over the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_act.errors import UserError
from megatron_act.model_args import Flags

KINDS = ("wsd", "cosine")
# Flags that count steps of the run: another length scales them.
_PROPORTIONAL = ("--lr-warmup-iters", "--lr-decay-iters", "--lr-wsd-decay-iters", "--eval-interval")


@dataclass(frozen=True)
class Schedule:
    """Warm-up and decay as shares of a run of any length.

    Attributes:
        kind: ``wsd`` or ``cosine``.
        warmup: share of the steps with a rising learning rate.
        decay: share of the steps with a falling one (wsd only).
        final: learning rate at the end, as a share of the peak.
    """

    kind: str
    warmup: float
    decay: float
    final: float

    def flags(self, steps: int, peak: float) -> Flags:
        """Megatron's flags for a run of ``steps`` steps with the learning rate ``peak``."""
        flags: Flags = {"--lr-warmup-iters": round(self.warmup * steps), "--lr-decay-iters": steps}
        flags["--min-lr"] = self.final * peak
        if self.kind == "cosine":
            return {**flags, "--lr-decay-style": "cosine"}
        decay = {"--lr-wsd-decay-style": "minus_sqrt", "--lr-wsd-decay-iters": round(self.decay * steps)}
        return {**flags, "--lr-decay-style": "WSD", **decay}


def parse_schedule(content: Mapping[str, Any]) -> Schedule:
    """Checks the YAML's mapping; absent: warm-up 0.1, decay 0.2, final 0.

    Raises:
        UserError: an unknown kind, or a share outside [0, 1).
    """
    kind = content.get("kind")
    if kind not in KINDS:
        raise UserError(f"schedule.kind: expected {' or '.join(KINDS)}, got {kind!r}")
    if kind == "cosine" and "decay" in content:
        raise UserError(f"schedule.decay: expected none with cosine, got {content['decay']!r}: remove it")
    defaults = {"warmup": 0.1, "decay": 0.2, "final": 0.0}
    shares = {name: _share(f"schedule.{name}", content.get(name, value)) for name, value in defaults.items()}
    if shares["warmup"] + shares["decay"] > 1:
        raise UserError(f"schedule: expected warmup + decay of at most 1, got {shares['warmup']} and {shares['decay']}")
    return Schedule(kind, **shares)


def _share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{key}: expected a share in [0, 1), got {value!r}")
    return float(value)


def at_length(flags: Mapping[str, Any], steps: int) -> Flags:
    """The same flags for a run of ``steps`` steps: whatever counts steps of the run is scaled in proportion."""
    before = flags["--train-iters"]
    scaled = {name: _scaled(flags[name], steps, before) for name in _PROPORTIONAL if flags.get(name)}
    return {**flags, **scaled, "--train-iters": steps}


def _scaled(value: int, steps: int, before: int) -> int:
    return value if steps == before else max(1, round(value * steps / before))


def at_rate(flags: Mapping[str, Any], peak: float) -> Flags:
    """The same flags with another peak learning rate; ``--min-lr`` keeps its share of it."""
    low, before = flags.get("--min-lr"), flags.get("--lr")
    final = {"--min-lr": low * peak / before} if low and before else {}
    return {**flags, **final, "--lr": peak}
