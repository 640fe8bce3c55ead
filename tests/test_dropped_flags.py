"""A flag that Megatron's own entry point drops is refused: the model would train with another scaling in silence."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_act.compat import install_typing_override

install_typing_override()  # before Megatron is imported
from megatron.training import global_vars  # noqa: E402

from megatron_act import specs  # noqa: E402


def build(monkeypatch: pytest.MonkeyPatch, args: Namespace | None, **config: float) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    monkeypatch.setattr(specs, "stock_spec", lambda config, stage: None)
    monkeypatch.setattr(specs, "with_activation", lambda *args, **kwargs: "built")
    monkeypatch.setattr(specs.finalize, "watch", lambda config: None)
    assert specs.layer_spec("xielu")(SimpleNamespace(transformer=None, **config)) == "built"


def test_the_factor_of_rotary_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Namespace(use_rope_scaling=True, rope_scaling_factor=32.0)
    with pytest.raises(ValueError, match=r"factor 32: expected a model with it, got one with 8: .* drops"):
        build(monkeypatch, wanted, rope_scaling_factor=8.0)
    build(monkeypatch, wanted, rope_scaling_factor=32.0)
    build(monkeypatch, Namespace(use_rope_scaling=False, rope_scaling_factor=32.0), rope_scaling_factor=8.0)
    build(monkeypatch, None, rope_scaling_factor=8.0)
