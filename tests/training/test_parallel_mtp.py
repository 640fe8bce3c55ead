"""Multi-token prediction layers have the activation too, with scalars that train equally in other layouts."""

import pytest
from training_support import INITIAL, Train

pytestmark = pytest.mark.distributed

MTP = ["--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "0.3"]
STEPS = ["--train-iters", "4", "--adam-eps", "0.1", "--lr", "0.5", "--min-lr", "0.5"]
TP2_PP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]


def test_a_prediction_layer_trains_scalars_of_its_own(forked_train: Train) -> None:
    common = ["--activation", "xielu", *MTP]
    first = forked_train(*common, *INITIAL)
    assert first.code == 0, first.log[-3000:]
    start = ["--load", str(first.checkpoint), "--finetune", "--no-load-optim", "--no-load-rng", *STEPS]
    one, many = forked_train(*common, *start), forked_train(*common, *start, *TP2_PP2, ranks=4)
    assert [one.code, many.code] == [0, 0], (one if one.code else many).log[-3000:]
    assert many.losses == pytest.approx(one.losses, rel=0, abs=1e-4)
    for ours, reference in zip(many.steps, one.steps, strict=True):
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0, abs=1e-4)
        for name, values in reference["scalars"].items():
            assert len(values) == 5
            assert ours["scalars"][name] == pytest.approx(values, rel=0, abs=1e-5)
    for values in one.steps[-1]["scalars"].values():
        assert values[4] != values[0]
        assert abs(values[4] - 0.8) > 5e-5
