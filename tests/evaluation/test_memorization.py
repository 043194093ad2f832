"""The longest run in the data against a search of everything."""

import numpy as np
import pytest

from common.errors import UserError
from evaluation import memorization
from evaluation.memorization import Run, open_index, shares


def brute_force(data: list[int], text: list[int]) -> Run:
    for length in range(len(text), 0, -1):
        for start in range(len(text) - length + 1):
            run = text[start : start + length]
            places = [i for i in range(len(data)) if data[i : i + length] == run]
            if places:
                return Run(start, length, len(places), places[0])
    return Run(0, 0, 0, -1)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 60_000])
@pytest.mark.parametrize("segment", [7, 50, 1000])
def test_it_finds_what_a_search_of_everything_finds(tmp_path, vocabulary, segment):
    draws = np.random.default_rng(vocabulary)
    # with parts that come again, longer than what places are ordered by
    data = draws.integers(0, vocabulary, 160).astype("<u2")
    data = np.concatenate([data, data[20:90], draws.integers(0, vocabulary, 9), data[30:95]])
    data = data.astype("<u2")
    index = open_index(data, tmp_path / "index.npy", segment)
    again = open_index(data, tmp_path / "index.npy", segment)  # as it lies on the disk
    texts = [draws.integers(0, vocabulary + 1, n).tolist() for n in (1, 2, 5, 30)]
    texts += [[], data[40:88].tolist(), [vocabulary, *data[25:93].tolist(), *data[:40].tolist()]]
    texts += [data[-5:].tolist() + data[:3].tolist(), data.tolist()]
    for text in texts:
        wanted = brute_force(data.tolist(), text)
        assert index.longest(text) == again.longest(text) == wanted


def test_shares_are_means_over_texts(tmp_path):
    index = open_index(np.arange(100, dtype="<u2"), tmp_path / "index.npy")
    assert shares(index, [[3, 4, 5, 6], [3, 4, 3, 200], []]) == {
        "longest_run": 0.75,
        "verbatim": 0.5,
    }
    assert shares(index, [[]]) == {"longest_run": 0.0, "verbatim": 0.0}


def test_a_damaged_index_is_refused_and_half_a_one_never_left(tmp_path, monkeypatch):
    data, file = np.arange(50, dtype="<u2"), tmp_path / "index.npy"
    open_index(data, file)
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(UserError, match="remove it to make it again"):
        open_index(data, file)
    file.write_bytes(content[:-8] + b"\xff" * 8)
    with pytest.raises(UserError, match="damaged, or of other data"):
        open_index(data, file)
    file.unlink()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(memorization, "order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_index(data, file)
    assert list(tmp_path.iterdir()) == []
