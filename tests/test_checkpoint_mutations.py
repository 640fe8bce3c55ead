"""What each corner case of the conversion is worth: without its handling the logits are no longer Megatron's.

One model has them all. Each mutation takes one handling out of the converter, in one direction; the other side's
program then says what the result computes: Megatron of an import, transformers of an export.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_args import common_states
from checkpoint_logits import megatrons_logits
from checkpoint_support import LLAMA32, pattern, random_model
from forked_runs import ForkedRuns, forked_runs
from torch import Tensor

from megatron_act.checkpoint import export as exporting
from megatron_act.checkpoint import hf_config, import_hf, picks
from megatron_act.checkpoint.hf_logits import open_model
from megatron_act.checkpoint.picks import Geometry

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4
VOCAB_SIZE, PADDED = 127, 128
# grouped queries, a gate, heads of another size than hidden / heads, an odd vocabulary, Llama-3.2's rotary scaling
MODEL = {"head_dim": 16, "vocab_size": VOCAB_SIZE, "rope_parameters": LLAMA32, "tie_word_embeddings": False}
TIED = ("right, tied", "tied embeddings")  # these have the same model with one matrix for both embeddings
RIGHT = ("right", "right, tied")
Change = Callable[[pytest.MonkeyPatch], None]


def without_interleaving(patch: pytest.MonkeyPatch) -> None:
    """All queries, then all keys, then all values."""

    def rows(first: int, last: int) -> Callable[[Tensor, Geometry], Tensor]:
        def pick(qkv: Tensor, geometry: Geometry) -> Tensor:
            heads, groups = geometry.num_attention_heads, geometry.num_query_groups
            bounds = [0, heads, heads + groups, heads + 2 * groups]
            return qkv[bounds[first] * geometry.kv_channels : bounds[last] * geometry.kv_channels]

        return pick

    for number, name in enumerate(("query", "key", "value")):
        patch.setitem(picks.PICKS, name, rows(number, number + 1))


def gate_rows_in_turn(patch: pytest.MonkeyPatch) -> None:
    """A gate row, an up row, a gate row."""
    patch.setitem(picks.PICKS, "gate", lambda fc1, _: fc1[0::2])
    patch.setitem(picks.PICKS, "up", lambda fc1, _: fc1[1::2])


def rope_of_pairs(patch: pytest.MonkeyPatch) -> None:
    """Rows of a head in the order of embeddings that rotate neighbours."""
    for name in ("query", "key"):
        pick = picks.PICKS[name]

        def paired(qkv: Tensor, geometry: Geometry, pick: Any = pick) -> Tensor:
            heads = pick(qkv, geometry)
            return heads.unflatten(-2, (-1, 2)).transpose(-3, -2)

        patch.setitem(picks.PICKS, name, paired)


def without_key(name: str) -> Change:
    """config.json without a size: transformers takes its default."""
    return lambda patch: patch.delitem(hf_config.SIZES, name)


def with_rope(**changes: Any) -> Change:
    """Another rotary embedding in config.json."""
    return lambda patch: patch.setattr(hf_config, "rope_parameters", lambda args: {**LLAMA32, **changes})


def always_tied(patch: pytest.MonkeyPatch) -> None:
    """One matrix for both embeddings."""
    entries, config = exporting.entries, exporting.hf_config
    patch.setattr(exporting, "entries", lambda *words: [e for e in entries(*words) if e.name != "lm_head.weight"])
    patch.setattr(exporting, "hf_config", lambda *words: config(*words) | {"tie_word_embeddings": True})


def never_tied(patch: pytest.MonkeyPatch) -> None:
    config = exporting.hf_config
    patch.setattr(exporting, "hf_config", lambda *words: config(*words) | {"tie_word_embeddings": False})


def with_flag(name: str, value: bool | None) -> Change:
    """Another flag for Megatron; None: its default."""

    def change(patch: pytest.MonkeyPatch) -> None:
        flags = import_hf.megatron_flags
        patch.setattr(import_hf, "megatron_flags", lambda *words: flags(*words) | {name: value})

    return change


def without_flag(name: str) -> Change:
    return with_flag(name, None)


def padding_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exporting, "unpadded_vocab_size", lambda args, words, padded, given: padded)


def no_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(import_hf, "padded_vocab_size", lambda size, *_: size)


UNTIE = "--untie-embeddings-and-output-weights"
MUTATIONS: dict[str, tuple[Change, Change]] = {  # in the export, in the import
    "QKV interleaving": (without_interleaving, without_interleaving),
    "gate stride": (gate_rows_in_turn, gate_rows_in_turn),
    "rope convention": (rope_of_pairs, rope_of_pairs),
    "rotary base": (with_rope(rope_theta=1e4), without_flag("--rotary-base")),
    "rope scaling": (with_rope(rope_type="default"), without_flag("--use-rope-scaling")),
    "rope scaling factor": (with_rope(factor=8.0), without_flag("--rope-scaling-factor")),
    "vocabulary padding": (padding_kept, no_padding),
    "RMSNorm eps": (without_key("rms_norm_eps"), without_flag("--norm-epsilon")),
    "untied embeddings": (always_tied, without_flag(UNTIE)),
    "tied embeddings": (never_tied, with_flag(UNTIE, True)),
    "head size": (without_key("head_dim"), without_flag("--kv-channels")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.fixture(scope="module")
def forked(base: Path) -> Iterator[ForkedRuns]:
    with forked_runs(base / "server.log") as runs:
        yield runs


@pytest.fixture(scope="module")
def models(base: Path) -> dict[str, Path]:
    """The model of each mutation."""
    tied = random_model("llama", base / "tied", **MODEL | {"tie_word_embeddings": True})
    untied = random_model("llama", base / "untied", **MODEL)
    return {name: tied if name in TIED else untied for name in (*RIGHT, *MUTATIONS)}


def transformers_logits(folder: Path) -> Tensor | str:
    """(length, vocabulary), or why transformers does not open the folder in full."""
    try:
        opened = open_model(str(folder))
    except (SystemExit, RuntimeError) as error:
        return repr(error)
    with torch.no_grad():
        return opened(pattern(VOCAB_SIZE)[None]).logits[0]


@pytest.fixture(scope="module")
def saves(base: Path, models: dict[str, Path], forked: ForkedRuns) -> dict[str, Path]:
    """What each mutated import wrote, and what unchanged ones did."""
    known: dict[str, bytes] = {}  # one answer of Megatron's parser for the same flags
    ask = common_states(forked, base)

    def common_state(words: Sequence[str]) -> bytes:
        key = " ".join(words)
        if key not in known:
            known[key] = ask(words)
        return known[key]

    done = {}
    for number, (name, model) in enumerate(models.items()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_hf, "common_state", common_state)
            if name not in RIGHT:
                MUTATIONS[name][1](patch)
            done[name] = import_hf.import_model(model, base / f"{number}", tensor_parallel=2, progress=False).save
    return done


@pytest.fixture(scope="module")
def megatrons(base: Path, saves: dict[str, Path], forked: ForkedRuns) -> dict[str, Tensor | str]:
    logits = megatrons_logits(forked, base, list(saves.values()), pattern(VOCAB_SIZE))
    return {name: logits[save] for name, save in saves.items()}


def difference(got: Tensor | str, wanted: Tensor | str) -> float:
    """Largest; infinite for a model that does not open, or has another vocabulary."""
    assert isinstance(wanted, Tensor), wanted
    if isinstance(got, str) or got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max())


def padded(logits: Tensor | str) -> Tensor:
    assert isinstance(logits, Tensor), logits
    return F.pad(logits, (0, PADDED - VOCAB_SIZE))


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_dropped(
    models: dict[str, Path], saves: dict[str, Path], megatrons: dict[str, Tensor | str], tmp_path: Path, name: str
) -> None:
    assert difference(megatrons[name], padded(transformers_logits(models[name]))) <= TOLERANCE
    back = exporting.export(saves[name], tmp_path / "back", progress=False).output
    assert difference(padded(transformers_logits(back)), megatrons[name]) <= TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_dropped_from_the_import(models: dict[str, Path], megatrons: dict[str, Tensor | str], name: str) -> None:
    assert difference(megatrons[name], padded(transformers_logits(models[name]))) > 10 * TOLERANCE


@pytest.mark.parametrize("name", MUTATIONS)
def test_dropped_from_the_export(
    saves: dict[str, Path],
    megatrons: dict[str, Tensor | str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    right = RIGHT[name in TIED]
    MUTATIONS[name][0](monkeypatch)
    got = transformers_logits(exporting.export(saves[right], tmp_path / "hf", progress=False).output)
    wanted = megatrons[right]
    assert isinstance(wanted, Tensor)
    assert difference(got, wanted[:, :VOCAB_SIZE]) > 10 * TOLERANCE
