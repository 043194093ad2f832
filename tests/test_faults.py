"""The campaigns of `python -m tests.faults`, each with a few tries."""

import pytest

from tests.faults.__main__ import load
from tests.faults.campaign import Skip


@pytest.mark.parametrize("campaign", load().values(), ids=lambda campaign: campaign.name)
def test_nothing_is_lost_and_nothing_is_undetected(campaign, tmp_path):
    try:
        tally = campaign(tmp_path, campaign.quick)
    except Skip as reason:
        pytest.skip(str(reason))
    assert tally.tried > 0
    assert not tally.lost
    assert not tally.undetected
