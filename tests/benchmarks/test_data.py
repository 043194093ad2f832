"""The benchmarks of preparing and loading measure what they say they do."""

import json

from benchmarks import loader, preparing
from data.dataset import prepare


def test_the_library_is_given_the_strings_that_are_prepared(tmp_path):
    preparing.write_texts(tmp_path, 1)
    text = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert 1e6 <= len(text.encode()) < 2e6
    for kind, file in preparing.KINDS.items():
        given = preparing.strings(tmp_path, kind)
        config = preparing.DataConfig(
            path=str(tmp_path / file), kind=kind, tokenizer="char", val_fraction=0.0,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        ids = prepare(config, lambda _: None).train.ids
        texts = sum(map(len, given))
        marks = len(given) * (2 if kind == "lines" else 1)  # newlines, or <start> and <end>
        assert len(ids) == texts + marks - (kind == "stream")


def test_a_batch_of_the_loader_is_all_counted(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("some text to learn from\n" * 200)
    monkeypatch.setattr(loader, "SECONDS", 0.05)
    name = next(iter(loader.MODELS))
    _, batches = loader.open_data(name, tmp_path)
    assert loader.loading(batches)(0) == 12 * 64
    loader.measure("loader", name, str(tmp_path))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] > 0 and found["epochs"] > 0


def test_the_loader_begins_with_ten_billion_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "SECONDS", 0.05)
    loader.measure("large", "", str(tmp_path))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] > 0 and found["first_s"] > 0 and found["far_s"] > 0
    assert found["megabytes"] < 200
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 2 * loader.LARGE
