"""Tokenizers that others have trained: real ones of each kind, made here by their own libraries."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings

import generate
import train
from common import cli
from common.errors import UserError
from data.config import DataConfig
from data.dataset import prepare
from data.prompt_format import prompt_ids
from data.tokenizers import huggingface
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.char import CharTokenizer
from data.tokenizers.huggingface import HuggingFaceTokenizer
from data.tokenizers.load import load_tokenizer, named_tokenizer, tokenizer_from_files
from data.tokenizers.round_trip import PROBES, lost, warning
from data.tokenizers.tiktoken import KNOWN, PATTERNS
from generation.explain import Explained
from generation.sampling import Sampling
from generation.streaming import StreamedText
from tests.data.tokenizers.foreign_files import CORPUS, all_kinds, sentencepiece_model
from tests.data.tokenizers.test_own import anything, examples
from tests.helpers import write_config
from training.command_line import read_command_line
from training.setup import given_tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

SPELLED = "a <|endoftext|> b<s>c</s> [SEP] <pad> <unk> [UNK]"  # which no text means by it
KINDS = ["byte_bpe", "wordpiece", "unigram", "words", "sentencepiece", "tiktoken"]
EXACT = ["byte_bpe", "tiktoken"]


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """The file of each kind."""
    return all_kinds()


@pytest.fixture(scope="module")
def files(contents, tmp_path_factory) -> dict[str, Path]:
    """The same as files that somebody has."""
    folder, files = tmp_path_factory.mktemp("theirs"), {}
    for kind, content in contents.items():
        suffix = {"sentencepiece": "model", "tiktoken": "tiktoken"}.get(kind, "json")
        files[kind] = folder / f"{kind}.{suffix}"
        files[kind].write_bytes(content)
    return files


@pytest.fixture(scope="module")
def made(files):
    return {
        kind: load_tokenizer(path, pattern="gpt2" if kind == "tiktoken" else "")
        for kind, path in files.items()
    }


# Ids and text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=anything)
@examples
@example(SPELLED)
@example("one  Two\n\n\tthree \U0001f600\U0001f601 \u4e2d")
def test_any_text_has_ids(made, kind, text):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & (tokenizer.special_ids - {tokenizer.unk_id})
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_batch([text, "x", text])[::2] == [ids, ids]
    back = tokenizer.decode(ids)
    assert tokenizer.decode(np.array(ids, np.uint16)) == back
    assert tokenizer.decode([tokenizer.start_id, *ids, tokenizer.end_id, tokenizer.pad_id]) == back
    if kind in EXACT:
        assert back == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_spells_a_special_token_is_a_text(made, kind):
    tokenizer = made[kind]
    for token in filter(None, tokenizer.roles.values()):
        for text in (token, f"a{token}", f"a {token} b", f"{token}{token}\n"):
            ids = tokenizer.encode(text)
            assert not set(ids) & (tokenizer.special_ids - {tokenizer.unk_id})
            if kind in EXACT:
                assert tokenizer.decode(ids) == text


def test_the_unknown_tokens_name_is_no_unknown_text(contents):
    stored = json.loads(contents["unigram"])
    known = {piece for piece, _ in stored["model"]["vocab"]}
    stored["model"]["vocab"] += [[c, -9.0] for c in "<>unk/s\u2581" if c not in known]
    tokenizer = HuggingFaceTokenizer(json.dumps(stored).encode())
    ids = tokenizer.encode("a <unk> b <s></s>")
    assert tokenizer.decode(ids) == "a <unk> b <s></s>" and tokenizer.unk_id not in ids
    assert tokenizer.unk_id in tokenizer.encode("a <unk> \u4e2d")


def test_what_only_training_does_is_left_out(contents):
    """Truncation, padding, a frame of special tokens, BPE's dropout."""
    plain = HuggingFaceTokenizer(contents["byte_bpe"])
    theirs = tokenizers.Tokenizer.from_str(contents["byte_bpe"].decode())
    theirs.enable_truncation(4)
    theirs.enable_padding(length=40)
    theirs.model.dropout = 0.5
    text = "the lamp was on the table, and the keeper was asleep"
    assert HuggingFaceTokenizer(theirs.to_str().encode()).encode(text) == plain.encode(text)


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram", "words"])
def test_a_long_text_has_the_same_ids_in_pieces(made, kind, monkeypatch):
    text = (CORPUS + "\n\n  x  \n") * 3
    whole = made[kind].encode(text)
    monkeypatch.setattr(huggingface, "LONG", 400)
    assert made[kind].encode(text) == whole
    pieces = [*made[kind]._pieces(text)]
    assert "".join(pieces) == text and max(map(len, pieces)) < 2000


def test_tiktoken_reads_what_openai_publishes_by_its_hash(contents, files, monkeypatch):
    digest = hashlib.sha256(contents["tiktoken"]).hexdigest()
    monkeypatch.setitem(KNOWN, digest, ("cl100k_base", {"<|endoftext|>": 300, "<|x|>": 301}))
    tokenizer = load_tokenizer(files["tiktoken"])
    assert tokenizer.end_id == 300 and tokenizer.vocab_size == 302
    assert tokenizer.decode([*tokenizer.encode("the\n"), 299, 301, 5000]) == "the\n"
    assert tokenizer.token(299) == "<299>" and tokenizer.token(301) == "<|x|>"
    for pattern in PATTERNS:  # all compile, and lose nothing
        again = load_tokenizer(files["tiktoken"], pattern=pattern)
        assert again.decode(again.encode(CORPUS)) == CORPUS


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\u00e9\ud800") == [97, 0xC3, 0xA9, 0xEF, 0xBF, 0xBD]
    assert tokenizer.encode_array("a\u00e9").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([257, 97, 0xC3, 258, 256]) == "a\ufffd"
    assert [tokenizer.token(i) for i in (97, 0xC3, 258)] == ["a", "<0xC3>", "<end>"]
    assert prompt_ids("stream", tokenizer, "") == [10]


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_from_its_files(made, kind, tmp_path):
    tokenizer = made[kind]
    tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), tokenizer_from_files(tokenizer.files())):
        assert again.fingerprint == tokenizer.fingerprint and type(again) is type(tokenizer)
        assert again.encode(SPELLED) == tokenizer.encode(SPELLED)
        assert again.describe() == tokenizer.describe()
        for name in ("pad_id", "unk_id", "start_id", "end_id", "vocab_size"):
            assert getattr(again, name) == getattr(tokenizer, name)


def roles(tokenizer) -> list:
    names = (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.unk_id)
    return [None if i is None else tokenizer.token(i) for i in names]


def test_special_tokens_are_found(made):
    assert {kind: roles(tokenizer) for kind, tokenizer in made.items()} == {
        "byte_bpe": ["<|endoftext|>"] * 3 + [None],
        "wordpiece": ["[CLS]", "[SEP]", "[PAD]", "[UNK]"],
        "unigram": ["<s>", "</s>", "<pad>", "<unk>"],
        "words": ["[SEP]", "[SEP]", "[SEP]", "[UNK]"],
        "sentencepiece": ["<s>", "</s>", "</s>", "<unk>"],
        "tiktoken": ["<|endoftext|>"] * 3 + [None],
    }
    assert made["wordpiece"].describe() == (
        f"tokenizer.json of Hugging Face, {made['wordpiece'].vocab_size} tokens; [CLS] starts, "
        "[SEP] ends, [PAD] pads, [UNK] stands for unknown text"
    )


def test_special_tokens_by_the_files_beside_it_and_by_flag(contents, files, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(contents["unigram"])
    beside = tmp_path / "tokenizer_config.json"
    for config, expected in (
        ({"eos_token": "<s>", "pad_token": {"content": "</s>"}}, ["<s>", "<s>", "</s>", "<unk>"]),
        ({"eos_token": "<|im_end|>", "unk_token": 3}, ["<s>", "</s>", "<pad>", "<unk>"]),
        ([], ["<s>", "</s>", "<pad>", "<unk>"]),
    ):
        beside.write_text(json.dumps(config))
        assert roles(load_tokenizer(tmp_path)) == expected
    given = {"start": "<pad>", "unk": "</s>"}  # the unknown token is not the end
    assert roles(load_tokenizer(tmp_path, given)) == ["<pad>", "</s>", "<pad>", None]
    # a piece that its users have defined, which texts spell
    tokenizer = load_tokenizer(files["sentencepiece"], {"end": "<|endoftext|>"})
    assert tokenizer.end_id not in tokenizer.encode("end <|endoftext|> end")
    # a file of tiktoken has none: what is named is added
    tokenizer = load_tokenizer(files["tiktoken"], {"pad": "<|pad|>"}, "gpt2")
    assert roles(tokenizer) == ["<|endoftext|>", "<|endoftext|>", "<|pad|>", None]
    assert tokenizer.vocab_size == 267
    # Llama 3's tokenizer.model is one of tiktoken
    (tmp_path / "tokenizer.model").write_bytes(contents["tiktoken"])
    assert load_tokenizer(tmp_path / "tokenizer.model", pattern="cl100k_base").kind == "tiktoken"


# What is refused ----------------------------------------------------------------------------------


def refused(path: Path, special=None, pattern="") -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, special, pattern)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_had_is_one_line(contents, files, tmp_path):
    stored = json.loads(contents["byte_bpe"])
    path = tmp_path / "tokenizer.json"

    def says(change=None, **flags) -> str:
        path.write_text(json.dumps(stored | (change or {})))
        return refused(path, **flags)

    assert "set data.end_token" in says({"added_tokens": []})
    assert "data.end_token = '<eos>' is not in its vocabulary" in says(special={"end": "<eos>"})
    assert "special tokens there: '<|endoftext|>'" in says(special={"pad": "<eos>"})
    more = {"vocab_size": 600, "byte_fallback": True, "eos_id": -1, "user_defined_symbols": ["<x>"]}
    model = tmp_path / "bpe.model"
    model.write_bytes(sentencepiece_model(model_type="bpe", **more))
    assert "(special tokens there: '<s>', '<unk>', '<x>')" in refused(model)
    assert "data.end_token = '!' is what texts are made of" in says(special={"end": "!"})
    assert "data.tokenizer_pattern: " in says(pattern="gpt2")
    # a component that only a later version has
    assert "install a newer one" in says({"pre_tokenizer": {"type": "Quantum"}})
    assert "install a newer one" in says({"version": "9.0"})
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}  # which makes Rust panic
    assert "cannot read it" in says({"normalizer": broken})
    huge = {"type": "WordLevel", "vocab": {"[SEP]": 0, "a": 1 << 31}, "unk_token": "[SEP]"}
    assert "its highest id is" in says({"model": huge, "added_tokens": [
        {"id": 0, "content": "[SEP]", "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}]})  # fmt: skip
    assert "set data.tokenizer_pattern" in refused(files["tiktoken"])
    assert "fix the regular expression" in refused(files["tiktoken"], pattern="(")
    cut = tmp_path / "cut.tiktoken"
    for content, expected in (
        (contents["tiktoken"] + b"@@ 3\n", "line 266 is not a token"),
        (b"\n".join(contents["tiktoken"].splitlines()[:90]), "lacks 166 of the 256 bytes"),
        (contents["tiktoken"] + b"YWI= 3\n", "must be different numbers"),
        (contents["tiktoken"] + b"YWI= 99999999999\n", "must be different numbers"),
    ):
        cut.write_bytes(content)
        assert expected in refused(cut, pattern="gpt2")
    CharTokenizer("ab").save(tmp_path)
    assert "data.pad_token: " in refused(tmp_path, special={"pad": "a"})
    (tmp_path / "special_tokens.json").write_text('{"added": {"a": -1}}')
    path.write_bytes(contents["byte_bpe"])
    assert "special_tokens.json is not one" in refused(tmp_path)
    with pytest.raises(UserError, match="end_token = '<x>' is of another tokenizer"):
        DataConfig(**{"end_token": "<x>"})


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def test_a_library_that_is_not_installed(files, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    kind = "byte_bpe" if library == "tokenizers" else "tiktoken"
    said = refused(files[kind], pattern="gpt2" if kind == "tiktoken" else "")
    assert f"pip install -e '.[{library}]'" in said


# What does not come back --------------------------------------------------------------------------


def test_what_is_lost_is_named(made, contents):
    assert lost(made["byte_bpe"]) == lost(made["tiktoken"]) == []
    assert warning(made["tiktoken"], [CORPUS, ("a\r\n", "\0")]) == ""
    assert warning(CharTokenizer("a"), ["b"]) == ""  # of which it is said how much is <unk>
    assert {"upper case", "runs of spaces", "newlines", "tabs"} <= {*lost(made["wordpiece"])}
    assert {"runs of spaces", "newlines", "spaces where a text begins"} <= {
        *lost(made["sentencepiece"])
    }
    said = warning(made["wordpiece"], iter([CORPUS, ("one", "Two")]))
    assert "2 of the first 3 texts come back changed (" in said
    from tokenizers import normalizers

    theirs = tokenizers.Tokenizer.from_str(contents["byte_bpe"].decode())
    for normalizer, expected in (
        (normalizers.Lowercase(), ["upper case"]),
        (normalizers.NFD(), ["accents", "combining characters"][:1]),
        (normalizers.Replace("\r\n", "\n"), ["carriage returns"]),
    ):
        theirs.normalizer = normalizer
        assert lost(HuggingFaceTokenizer(theirs.to_str().encode())) == expected
    theirs.normalizer = None
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    first, *others = lost(HuggingFaceTokenizer(theirs.to_str().encode()))
    assert first == "where a text begins and ends (spaces are added)" and len(others) <= 1
    theirs.decoder = None
    assert "everything ('one two three' comes back as" in lost(
        HuggingFaceTokenizer(theirs.to_str().encode())
    )[0]  # fmt: skip
    assert len(PROBES) == 17


def test_a_tokenizer_that_loses_nearly_all_is_refused(files, tmp_path):
    (tmp_path / "a.txt").write_text(CORPUS)
    path, theirs = str(tmp_path / "a.txt"), str(files["tiktoken"])
    for pattern, trains in ("x", False), ("[a-s]+", True):  # the latter loses a third
        config = DataConfig(
            path=path, cache_dir=str(tmp_path), tokenizer_path=theirs, tokenizer_pattern=pattern
        )
        said = []
        if trains:
            prepare(config, said.append, named_tokenizer(config))
            assert any("lost: everything" in line for line in said)
        else:
            with pytest.raises(UserError, match=r"^data\.tokenizer_path: only \d+ of .* fix"):
                prepare(config, said.append, named_tokenizer(config))


# Generating ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_appears_token_by_token_as_it_goes_on(made, kind):
    tokenizer = made[kind]
    text = "the lamp was \U0001f600 on the table\n\nand the STOP keeper" if kind in EXACT else (
        "the lamp was on the table and the keeper"
    )  # fmt: skip
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for cut in range(0, len(ids), 5):  # the prompt's tokens, and those that are written
        shown = tokenizer.decode(ids[:cut])
        if shown.endswith("\ufffd"):
            continue
        stops = () if cut else ("STOP",)
        row = StreamedText(tokenizer, stops, [tokenizer.start_id, *ids[:cut]])
        pieces = []
        for token in ids[cut:]:
            stopped = row.add(token)
            pieces.append(row.new_text())
            if stopped:
                break
        row.flush()
        pieces.append(row.new_text(complete=True))
        assert shown + "".join(pieces) == (whole if cut else whole.partition("STOP")[0])
        assert not any("\ufffd" in piece for piece in pieces)
    # after a special token a text begins
    row = StreamedText(tokenizer, (), [*ids, tokenizer.start_id])
    row.add(ids[0])
    row.flush()
    assert row.text == tokenizer.decode(ids[:1])


def test_tokens_are_shown_with_their_space(made):
    for kind in ("byte_bpe", "unigram", "sentencepiece", "tiktoken"):
        tokenizer = made[kind]
        explained = Explained(tokenizer, Sampling())
        the = tokenizer.encode("of the")[-1]
        assert explained.name(the) == "' the'"
        assert explained.name(tokenizer.end_id) == tokenizer.token(tokenizer.end_id)
    assert Explained(made["tiktoken"], Sampling()).name(0xF0) == "<0xF0>"


@pytest.mark.parametrize("kind", ["byte", *KINDS])
def test_it_trains_and_generates_with_every_engine(kind, files, tmp_path, monkeypatch, capsys):
    """Documents in which the end is spelled; then resumed; the tokenizer's file is gone by then."""
    records = [{"text": f"{line} {SPELLED}"} for line in CORPUS.split("\n") if line]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = write_config(tmp_path, tmp_path / "texts.jsonl")
    flags = ["--config", str(config), "--runs_dir", str(tmp_path), "--name", "run"]
    flags += ["--train.eval_interval", "0", "--data.val_fraction", "0.3"]
    if kind == "byte":
        flags += ["--data.tokenizer", "byte"]
    else:
        mine = tmp_path / files[kind].name
        mine.write_bytes(files[kind].read_bytes())
        flags += ["--data.tokenizer_path", str(mine)]
        flags += ["--data.tokenizer_pattern", "gpt2"] if kind == "tiktoken" else []
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--max_steps", "2"])
    assert cli.run("train.py", train.main) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert ("warning: the tokenizer does not give back" in out) == (kind not in ("byte", *EXACT))
    if kind != "byte":
        mine.unlink()
        assert " ends" in out
    more = ["--resume", str(tmp_path / "run"), "--extend", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", ["train.py", *more])
    assert cli.run("train.py", train.main) == 0
    capsys.readouterr()
    texts = []
    for engine in ("torch", "numpy", "python"):
        argv = ["--checkpoint", str(tmp_path / "run"), "--engine", engine, "--device", "cpu"]
        argv += ["--prompt", "the lamp", "--greedy", "--max_new_tokens", "8", "--explain"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *argv])
        assert cli.run("generate.py", generate.main) == 0
        texts.append(capsys.readouterr().out.partition("\n  probability")[0])
    assert len(set(texts)) == 1 and texts[0].startswith("the lamp")


def test_documents_end_only_where_they_end(made, tmp_path):
    known = CORPUS[:100]  # so that enough of each text is, in whole words too
    records = (json.dumps({"text": f"{SPELLED} {i} {known}"}) for i in range(40))
    (tmp_path / "texts.jsonl").write_text("\n".join(records))
    for kind, tokenizer in made.items():
        data = DataConfig(path=str(tmp_path / "texts.jsonl"), cache_dir=str(tmp_path / "cache"))
        train = prepare(data, lambda line: None, tokenizer).train
        assert (train.ids == tokenizer.end_id).sum() == len(train.borders) - 1, kind


def test_settings_of_a_command_line(files, tmp_path):
    flags = ["--config", str(write_config(tmp_path)), "--runs_dir", str(tmp_path)]
    flags += ["--data.tokenizer_path", str(files["unigram"])]
    spec = read_command_line(lambda line: None, [*flags, "--data.end_token", "<pad>"])
    assert spec is not None and roles(given_tokenizer(spec))[:2] == ["<s>", "<pad>"]
