"""The same training as DistributedDataParallel's and as a bare all-reduce's, but for rounding."""

import pytest

from benchmarks.distributed import SHARES, SIDES, start


def test_the_losses_are_theirs(tmp_path):
    flags = ["--side", str(tmp_path), "--rounds", "1", "--d_model", "64", "--layers", "1"]
    found = start(2, flags)
    assert [run["share"] for run in found] == list(SHARES)
    for run in found:
        losses = run["losses"]
        assert losses.keys() == set(SIDES)
        for side in SIDES:
            assert losses[side] == pytest.approx(losses["ours"], rel=1e-5), side
        assert losses["ours"] < 3.8, "nothing was learned"
