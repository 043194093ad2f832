"""data/dataset.py: prepared once, no prompt on both sides, refused if wrong."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.batches import Examples, evaluation_batches
from data.config import DataConfig
from data.dataset import prepare
from data.prepared.splitting import hash_fraction
from data.prompt_format import end_id, prompt_ids
from tests.helpers import ROOT, TEXT


@pytest.fixture
def config(tmp_path):
    return DataConfig(path=str(TEXT), tokenizer="char", cache_dir=str(tmp_path / "cache"))


def quiet(_):
    pass


def write_pairs(path, pairs):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_stream_is_cut_in_one_place(config):
    data = prepare(config, quiet)
    text = TEXT.read_text(encoding="utf-8")
    cut = len(text) - round(len(text) / 10)
    assert data.tokenizer.decode(data.train.ids.tolist()) == text[:cut]
    assert data.tokenizer.decode(data.val.ids.tolist()) == text[cut:]
    assert data.val.bytes == len(text[cut:].encode())


def test_a_prompt_never_stands_on_both_sides(config, tmp_path):
    pairs = [(f"Prompt {i % 40}", f"completion {i}") for i in range(400)]
    pairs += [(f"  prompt   {i}", "again") for i in range(40)]  # the same but for case and space
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    data = prepare(replace(config, path=path), quiet)

    def prompts(split):
        texts = [
            data.tokenizer.decode(split.ids[start : start + n].tolist())
            for start, n in zip(split.starts, split.prompts, strict=False)
        ]
        return {" ".join(t.casefold().split()) for t in texts}

    assert prompts(data.train) | prompts(data.val) == {f"prompt {i}" for i in range(40)}
    assert not prompts(data.train) & prompts(data.val)
    assert len(data.train.starts) + len(data.val.starts) - 2 == len(pairs)
    held_out = [" ".join(h["prompt"].casefold().split()) for h in data.held_out]
    assert set(held_out) <= prompts(data.val)
    assert len(set(held_out)) == len(held_out)


def test_pairs_are_laid_out_as_promised(config, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", [("ab", "c"), ("", "ab")])
    data = prepare(replace(config, path=path, val_fraction=0.0), quiet)
    encode = data.tokenizer.encode
    assert data.train.ids.tolist() == [*encode("ab"), 2, *encode("c"), 3, 2, *encode("ab"), 3]
    assert data.train.starts.tolist() == [0, 5, 9]
    assert data.train.prompts.tolist() == [3, 1]
    assert data.val is None


def test_lines_split_by_their_text(config, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i}" for i in range(500)))
    data = prepare(replace(config, path=str(tmp_path / "lines.txt"), kind="lines"), quiet)
    assert data.kind == "lines"
    expected = sum(hash_fraction(f"line {i}") < 0.1 for i in range(500))
    assert len(data.val.starts) - 1 == expected
    assert 25 < expected < 80


@pytest.mark.parametrize("kind", ["char", "char_bos", "bpe"])
def test_documents_are_packed_with_nothing_left_out(config, tmp_path, kind):
    texts = [f"Text {i} of some words.\n" * (i % 7 + 1) for i in range(200)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = replace(config, path=str(path), tokenizer=kind, vocab_size=320)
    data = prepare(settings, quiet)
    assert data.kind == "documents" and data.train.starts is None and not data.held_out
    start = [] if kind == "char_bos" else [data.tokenizer.start_id]
    for split, is_val in ((data.train, False), (data.val, True)):
        expected = [text for text in texts if (hash_fraction(text) < 0.1) == is_val]
        borders, ids = split.borders.tolist(), split.ids.tolist()
        assert len(borders) == len(expected) + 1 and borders[-1] == len(ids)
        for text, begin, end in zip(expected, borders, borders[1:], strict=False):
            assert ids[begin:end] == [*start, *data.tokenizer.encode(text), data.tokenizer.end_id]
        assert split.bytes == sum(len(text.encode()) for text in expected)
        assert split.describe().startswith(f"{len(expected)} documents, ")
    # windows of a stream: side by side, and the last one short
    examples = Examples(data.val, 16, data.tokenizer.pad_id)
    batches = [*evaluation_batches(examples, 4)]
    assert np.concatenate([batch.targets for batch in batches]).tolist() == ids[1:]
    assert prompt_ids("documents", data.tokenizer, "Text")[0] == data.tokenizer.start_id
    assert end_id("documents", data.tokenizer) == data.tokenizer.end_id


def test_documents_that_fall_on_one_side_are_refused(config, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "one"}')
    with pytest.raises(UserError, match="it is a single document; set data"):
        prepare(replace(config, path=str(path)), quiet)
    data = prepare(replace(config, path=str(path), val_fraction=0.0), quiet)
    assert data.train.borders.tolist() == [0, 5]


def test_what_was_prepared_before_is_found_again(config, tmp_path):
    """Fingerprints of version 0.2: where one changes, its runs cannot be resumed."""
    text, pairs, table = (tmp_path / name for name in ("a.txt", "p.jsonl", "c.csv"))
    text.write_bytes("".join(f"line {i}\r\n é" for i in range(300)).encode())
    pairs.write_text("".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(300)))
    table.write_text("".join(f"a{i},b\n" for i in range(300)))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.nl").write_text("".join(f"p{i}\n" for i in range(50)))
        (tmp_path / f"{name}.cm").write_text("".join(f"c{i}\n" for i in range(50)))
    found = []
    for path, kind, val in (
        (text, "auto", ""),
        (text, "lines", ""),
        (text, "lines", str(table)),
        (pairs, "auto", ""),
        (pairs, "stream", ""),
        (table, "lines", ""),
        (tmp_path, "auto", ""),
        (pairs, "auto", str(tmp_path)),
    ):
        data = prepare(replace(config, path=str(path), kind=kind, val_path=val), quiet)
        found.append(data.fingerprint)
    assert found == [
        "782a5065490875cf",
        "eaf13736c46e5b40",
        "b18cad32c12c2e29",
        "96a4837584423807",
        "c0f49d9825ee6a7e",
        "b5d0e9845572e3d9",
        "f00909311bd2f4d9",
        "cbb2855c380367e0",
    ]


def test_it_is_prepared_once_and_again_when_anything_changes(config, tmp_path):
    said = []
    first = prepare(config, said.append)
    assert any("tokens" in line for line in said)
    said.clear()
    assert prepare(config, said.append).fingerprint == first.fingerprint
    assert not any("tokens" in line for line in said)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(TEXT.read_bytes())
    assert prepare(replace(config, path=str(moved)), quiet).fingerprint == first.fingerprint
    moved.write_bytes(TEXT.read_bytes() + b"!")
    assert prepare(replace(config, path=str(moved)), quiet).fingerprint != first.fingerprint
    assert prepare(replace(config, val_fraction=0.2), quiet).fingerprint != first.fingerprint


def test_a_given_tokenizer_is_used(config, tmp_path):
    tokenizer = prepare(config, quiet).tokenizer
    (tmp_path / "other.txt").write_text("abc " * 50 + "\u1234")
    data = prepare(replace(config, path=str(tmp_path / "other.txt")), quiet, tokenizer)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    assert data.tokenizer_given
    assert tokenizer.unk_id in data.val.ids


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda f: (f / "train-00000.ids").write_bytes(b"\1\0\2"),
            r"train-00000.ids: damaged \(3 bytes instead of",
        ),
        (lambda f: (f / "train-00000.ids").unlink(), "not a prepared data set"),
        (lambda f: (f / "manifest.json").write_text("{"), "not a prepared data set"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a prepared data set"),
        (lambda f: overwrite(f / "train-00000.ids", 60000), "damaged .its sha256 is not that"),
        (
            lambda f: overwrite(f / "train-00000.ids", 5),
            "train-00000.ids: damaged .its sha256 is not that",
        ),
        (lambda f: cut_seal(f / "manifest.json"), "does not match its own sha256"),
    ],
)
def test_a_damaged_cache_is_refused_with_the_mend(config, damage, said):
    prepare(config, quiet)
    (folder,) = (p for p in (ROOT / config.cache_dir).iterdir() if p.is_dir())
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        prepare(config, quiet)
    assert "remove" in str(error.value)
    assert "prepared again" in str(error.value)


def overwrite(path, number):
    ids = np.fromfile(path, "<u2")
    ids[len(ids) // 2] = number
    ids.tofile(path)


def cut_seal(path):
    path.write_bytes(path.read_bytes().replace(b'"bytes": ', b'"bytes": 1'))


def test_an_empty_side_is_refused(config, tmp_path):
    path = write_pairs(tmp_path / "one.jsonl", [("a", "b")])
    with pytest.raises(UserError, match=r"data.val_fraction"):
        prepare(replace(config, path=path), quiet)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "half a cache is left"
    assert prepare(replace(config, path=path, val_fraction=0.0), quiet).val is None


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize(
    ("name", "line", "count", "said"),
    [
        ("a.jsonl", '{"prompt": "p%d", "completion": "c"}', 9, "all its 9 prompts are equal"),
        ("b.jsonl", '{"prompt": "q%d", "completion": "c"}', 9, "all its 9 prompts are equal"),
        ("c.txt", "the same line", 9, "all its 9 lines are equal"),
        (
            "d.txt",
            "x" * 9999,
            1,
            'a single line, and so a single document; set data.kind = "stream"',
        ),
    ],
)
def test_documents_that_cannot_be_split_are_refused_with_the_cause(
    config, tmp_path, tokenizer, name, line, count, said
):
    """Whichever side they would all be on, before a tokenizer is trained on nothing."""
    kind = "pairs" if name.endswith(".jsonl") else "lines"
    for number in range(8):  # so that one of them falls on the rarer side, too
        (tmp_path / name).write_text(f"{line.replace('%d', str(number))}\n" * count)
        made = replace(
            config, path=str(tmp_path / name), kind=kind, tokenizer=tokenizer, val_fraction=0.5
        )
        with pytest.raises(UserError) as error:
            prepare(made, quiet)
        assert said in str(error.value) and "data.val_fraction = 0.5" in str(error.value)


def test_an_unwritable_cache_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        prepare(replace(config, cache_dir=str(tmp_path / "file" / "cache")), quiet)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has none")
def test_a_cache_of_somebody_else_says_what_to_do_and_can_be_read(config):
    with tempfile.TemporaryDirectory() as shared:  # tmp_path is one user's alone
        cache = Path(shared, "cache")
        Path(shared).chmod(0o755)
        shutil.copy(TEXT, shared)
        theirs = replace(config, path=f"{shared}/{TEXT.name}", cache_dir=str(cache))
        prepared = prepare(theirs, quiet)
        cache.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:  # who may write anywhere
                os.seteuid(65534)
            assert prepare(theirs, quiet).fingerprint == prepared.fingerprint
            with pytest.raises(UserError, match=r"Permission denied; set data\.cache_dir to a wri"):
                prepare(replace(theirs, val_fraction=0.3), quiet)
        finally:
            os.seteuid(user)
            cache.chmod(0o755)


def test_preparing_a_large_text_does_not_hold_it(tmp_path):
    """48 MB of text, prepared in a process that grows by less than a quarter of it."""
    line = "the quick brown fox jumps over the lazy dog 0123456789\n"
    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(48):
            file.write(line * (2**20 // len(line)))
    code = (
        "import sys, resource\n"
        "from data.config import DataConfig\n"
        "from data.dataset import prepare\n"
        "import numpy, filelock, tqdm\n"
        "grown = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = grown()\n"
        "c = DataConfig(path=sys.argv[1], tokenizer='char', cache_dir=sys.argv[2])\n"
        "data = prepare(c, print)\n"
        "print(len(data.train.ids), grown() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.txt", tmp_path / "cache"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tokens, grown = map(int, result.stdout.split()[-2:])
    assert tokens > 40e6
    # the memory-mapped ids count as resident once their range is checked: 2 bytes for each
    assert grown - 2 * tokens * 1.12 < 12e6
