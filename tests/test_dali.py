"""``--dataloader dali`` by itself: the arrays that DALI is given, and what it gives back, against Megatron's loader."""

import pickle
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_act.compat import install_typing_override

install_typing_override()  # before Megatron is imported

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from megatron.training.datasets.data_samplers import (  # noqa: E402
    MegatronPretrainingRandomSampler,
    MegatronPretrainingSampler,
)

from megatron_act.data import dali, dali_worker  # noqa: E402
from megatron_act.data.dali_source import Batches  # noqa: E402

needs_dali = pytest.mark.skipif(not dali.is_installed(), reason="no NVIDIA DALI")
LENGTH, MICRO_BATCH, RANKS, SAMPLES, EOD = 32, 2, 2, 26, 0
GLOBAL_BATCH = MICRO_BATCH * RANKS
CASES = [("single", 0, 0), ("single", 1, 8), ("cyclic", 0, 0), ("cyclic", 1, 8), ("cyclic", 0, 24 + 4)]
BATCHES = 12  # more than an epoch has


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A blend of two data sets whose samples use everything that a sample can: masked EODs, positions that restart."""
    folder = tmp_path_factory.mktemp("blend")
    prefixes = [_write(folder / name, seed, dtype) for name, seed, dtype in (("a", 1, "<u2"), ("b", 2, "<i4"))]
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=LENGTH,
        blend=(prefixes, [0.3, 0.7]),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=Namespace(eod=EOD, pad=-1, vocab_size=None, unique_identifiers={}),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, config).build()[0]


def _write(prefix: Path, seed: int, dtype: str) -> str:
    """An indexed data set of 60 documents of 1 to 39 tokens and an EOD."""
    draw = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for length in draw.integers(1, 40, 60):
        builder.add_document(np.append(draw.integers(1, 60_000, length), EOD), [length + 1])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def sampler(dataset: Any, order: str, rank: int, consumed: int) -> Any:
    place = {"data_parallel_rank": rank, "data_parallel_size": RANKS, "micro_batch_size": MICRO_BATCH}
    if order == "single":
        return MegatronPretrainingSampler(len(dataset), consumed, **place)
    return MegatronPretrainingRandomSampler(dataset, len(dataset), consumed, **place, data_sharding=True)


def loader(dataset: Any, order: str, rank: int, consumed: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler(dataset, order, rank, consumed))


def expected(dataset: Any, order: str, rank: int, consumed: int) -> list[dict[str, torch.Tensor]]:
    """Megatron's own batches, at most `BATCHES`."""
    theirs = loader(dataset, order, rank, consumed)
    epochs = [theirs] if order == "single" else [theirs] * 3  # its sampler goes on to the next epoch
    return [batch for epoch in epochs for batch in epoch][:BATCHES]


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    for got, want in zip(ours, theirs, strict=True):
        assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in want.items()}
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def test_the_data_exercises_what_a_sample_can_hold(dataset: Any) -> None:
    batches = expected(dataset, "single", 0, 0)
    assert {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"} < set(batches[0])
    assert len(batches) == len(dataset) // GLOBAL_BATCH < BATCHES
    assert all((batch["loss_mask"] == 0).any() for batch in batches)
    assert any((batch["position_ids"] < torch.arange(LENGTH)).any() for batch in batches)


@pytest.mark.parametrize(("order", "rank", "consumed"), CASES)
def test_what_dali_is_given_are_megatrons_batches(dataset: Any, order: str, rank: int, consumed: int) -> None:
    batches = Batches.of(loader(dataset, order, rank, consumed), again=order == "cyclic")
    arrays = [item for item, _ in zip(batches, range(BATCHES), strict=False)]
    ours = [dict(zip(batches.fields, map(torch.from_numpy, item), strict=True)) for item in arrays]
    assert_equal(ours, expected(dataset, order, rank, consumed))


def test_a_resumed_rank_gets_what_would_have_followed(dataset: Any) -> None:
    """Consumed samples count over all ranks: two global batches are two of the rank's own."""
    whole = expected(dataset, "single", 1, 0)
    assert_equal(expected(dataset, "single", 1, 2 * GLOBAL_BATCH), whole[2:])
    assert not torch.equal(whole[0]["tokens"], whole[2]["tokens"])


@needs_dali
@pytest.mark.parametrize(("order", "rank", "consumed"), CASES)
def test_dali_gives_megatrons_batches(dataset: Any, order: str, rank: int, consumed: int) -> None:
    batches = Batches.of(loader(dataset, order, rank, consumed), again=order == "cyclic")
    ours = [batch for batch, _ in zip(served(batches, workers=0), range(BATCHES), strict=False)]
    assert_equal(ours, expected(dataset, order, rank, consumed))


@needs_dali
def test_a_worker_process_gives_them_too_and_ends(dataset: Any) -> None:
    ours = list(served(Batches.of(loader(dataset, "single", 1, 8), again=False), workers=2))
    assert_equal(ours, expected(dataset, "single", 1, 8))


def served(batches: Batches, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of DALI; none may change when later ones are read."""
    kept: list[dict[str, torch.Tensor]] = []
    for batch in dali.DaliLoader(batches, MICRO_BATCH, workers):
        for earlier, copy in zip(kept[::2], kept[1::2], strict=True):
            assert all(torch.equal(earlier[name], copy[name]) for name in earlier)
        copy = {name: value.clone() for name, value in batch.items()}
        kept += [batch, copy]
        yield copy


@needs_dali
def test_the_benchmark_finds_equal_loaders_and_times_them(tmp_path: Path) -> None:
    from megatron_act.data import dali_benchmark as benchmark

    load = benchmark.Load(seq_length=LENGTH, micro_batch_size=2, batches=10, repeats=2)
    dataset = benchmark.open_dataset(_write(tmp_path / "c", 4, "<u2"), load, tmp_path / "cache")
    starts = benchmark.contenders(dataset, load, [0])
    benchmark.compare(starts)
    rows = benchmark.measure(benchmark.contenders(dataset, load, [0]), load)
    assert [(row.loader, row.processes, len(row.rates)) for row in rows] == [("Megatron", 0, 2), ("DALI", 0, 2)]
    other = benchmark.open_dataset(_write(tmp_path / "d", 5, "<u2"), load, tmp_path / "cache")
    with pytest.raises(RuntimeError, match="expected equal batches"):
        benchmark.compare({**starts, ("other", 0): benchmark.contenders(other, load, [0])["Megatron", 0]})


def test_mapped_files_are_sent_by_name(tmp_path: Path) -> None:
    values = np.arange(100_000, dtype=np.int32).reshape(-1, 2)
    np.save(tmp_path / "index.npy", values)
    mapped = np.load(tmp_path / "index.npy", mmap_mode="r")
    data = dali_worker.dumps({"mapped": mapped, "part": mapped[7:9]})
    assert len(data) < 2_000
    got = pickle.loads(data)
    assert isinstance(got["mapped"], np.memmap) and np.array_equal(got["mapped"], values)
    assert got["part"].tolist() == values[7:9].tolist()


ARGS = {
    "dataloader": "dali",
    "dataloader_type": None,
    "full_validation": False,
    "multiple_validation_sets": False,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataloader_type": "external"}, ["--dataloader-type single or cyclic, got external", "remove it"]),
        ({"full_validation": True}, ["--full-validation", "remove one"]),
        ({"multiple_validation_sets": True}, ["--multiple-validation-sets", "remove one"]),
    ],
)
def test_what_it_does_not_serve_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict, words: list[str]) -> None:
    monkeypatch.setattr(dali, "is_installed", lambda: True)
    assert dali.conflict(Namespace(**ARGS)) is None
    why = dali.conflict(Namespace(**{**ARGS, **change}))
    assert why is not None and why.startswith("--dataloader dali: expected")
    assert all(word in why for word in words) and "\n" not in why


def test_without_dali_one_line_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    why = dali.conflict(Namespace(**ARGS))
    assert why == (
        "--dataloader dali: expected the package nvidia-dali-cuda130 (or -cuda120), got none: pip install it or "
        "remove the flag"
    )
    assert dali.conflict(Namespace(**{**ARGS, "dataloader": "megatron"})) is None
