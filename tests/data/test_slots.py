"""data/slots.py: arguments out of prompts and completions, and back."""

import json
import string
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.config import DataConfig
from data.dataset import prepare
from data.slots import ESCAPE, MAX_SLOTS, PLACEHOLDERS, RESERVED, TYPES, Slots, readable
from data.tokenizers.char import CharTokenizer

PAIRS = [  # a prompt, its completion, and both as the model has them
    (
        "Find all *.log files larger than 10M in /var",
        "find /var -name '*.log' -size +10M",
        "Find all *<E1> files larger than <N1>M in <P1>",
        "find <P1> -name '*<E1>' -size +<N1>M",
    ),
    (
        'Replace "foo" with "bar baz" in a.txt and b.txt',
        "sed -i 's/foo/bar baz/g' a.txt b.txt",
        'Replace "<W1>" with "<Q1>" in <F1> and <F2>',
        "sed -i 's/<W1>/<Q1>/g' <F1> <F2>",
    ),
    (
        "Copy $src to user `bob' on 10.0.0.7 since 2013-05-11, 3 times.",
        'for i in 1 2 3; do scp "${src}" bob@10.0.0.7:; done  # 2013-05-11',
        "Copy $<V1> to user `<W1>' on <H1> since <D1>, <N1> times.",
        'for i in 1 2 <N1>; do scp "${<V1>}" <W1>@<H1>:; done  # <D1>',
    ),
    (
        "Find files/directories named core of user root and print '1' of 644",
        "find / -name core -user root -perm 0644 | awk '{print $1}' 2>&1",
        "Find files/directories named <W1> of user <W2> and print '<N1>' of <N2>",
        "find / -name <W1> -user <W2> -perm 0<N2> | awk '{print $1}' 2>&1",
    ),
]
# texts in which quotes, patterns, placeholders and escapes come often
hostile = st.text(
    st.sampled_from(f"ab1.*/$'\"` -~{ESCAPE}{PLACEHOLDERS[0]}\ue1a0\ue1a1\ue1af\u2581\ue000\n"),
    max_size=40,
)


@pytest.mark.parametrize(
    "unit", ["dir/", "a", "_", "*", "a.", "a/", ".a", "a@", "~", "$", "-", "1", "'"]
)
@pytest.mark.parametrize("end", ["@", "=", ":", ""])
def test_a_long_word_takes_no_more_than_its_length(unit, end):
    """Of forms that fit in several ways each character would double the time, for years."""
    text = f"show dir/{unit * 20_000}{end}"
    slots = Slots(text)
    assert slots.show(slots.hide(text)) == text


@pytest.mark.parametrize("prompt, completion, asked, answered", PAIRS)
def test_arguments_stand_in_both(prompt, completion, asked, answered):
    slots = Slots(prompt)
    assert readable(slots.prompt) == asked
    hidden = slots.hide(completion)
    assert readable(hidden) == answered
    assert slots.show(hidden) == completion
    assert slots.show(slots.prompt) == prompt
    assert not slots.lacks(hidden)


@given(hostile, hostile)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(prompt, completion):
    slots = Slots(prompt)
    assert slots.show(slots.prompt) == prompt
    assert slots.show(slots.hide(completion)) == completion
    assert slots.show(slots.hide(prompt + completion)) == prompt + completion
    off = Slots(prompt, on=False)
    assert (off.prompt, off.hide(completion), off.show(completion)) == (
        prompt,
        completion,
        completion,
    )


@given(st.text(st.sampled_from(f"{string.printable}{PLACEHOLDERS}\ue1a3\ue1af"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_placeholder_is_ever_seen(written):
    slots = Slots("move a.txt to /tmp")
    assert not RESERVED.search(slots.show(written))
    cut = f"{written}{ESCAPE}", f"{ESCAPE}\ue1a3x{written}", f"{ESCAPE}\ue1af\ue1af"
    assert not any(RESERVED.search(slots.show(text)) for text in cut)


def test_a_slot_that_the_prompt_lacks():
    slots = Slots("move a.txt and b.txt")
    first_file, third_file, path = (PLACEHOLDERS[list(TYPES).index(t) * MAX_SLOTS] for t in "FFP")
    third_file = chr(ord(third_file) + 2)
    assert slots.show(f"mv {first_file} {third_file} {path}") == "mv a.txt b.txt ."
    assert slots.lacks(third_file) and slots.lacks(path) and not slots.lacks(first_file)


def test_more_arguments_than_slots_stay_as_they_are():
    names = [f"file{i}.txt" for i in range(MAX_SLOTS + 3)]
    slots = Slots(f"Remove {' '.join(names)}")
    hidden = slots.hide(f"rm {' '.join(names)}")
    assert readable(hidden).split()[-4:] == [f"<F{MAX_SLOTS}>", *names[MAX_SLOTS:]]
    assert slots.show(hidden) == f"rm {' '.join(names)}"


# As data -----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """60 pairs, each twice in different words, of which one in ten is held out."""
    pairs = [
        {"prompt": f"{verb} {name}{i}.txt with {i} lines", "completion": f"head -{i} {name}{i}.txt"}
        for i in range(10, 40)
        for verb, name in (("Show", "notes"), ("Print", "letters"))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return DataConfig(path=str(path), slots=True, vocab_size=360, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_prepared_pairs_have_placeholders(config, kind):
    config = replace(config, tokenizer=kind)
    data, plain = (prepare(replace(config, slots=on), lambda _: None) for on in (True, False))
    assert data.slots and not plain.slots and data.fingerprint != plain.fingerprint
    assert data.held_out == plain.held_out  # as they were given
    assert (data.train.bytes, data.val.bytes) == (plain.train.bytes, plain.val.bytes)
    decoded = [
        readable(data.tokenizer.decode(data.train.ids[start:end]))
        for start, end in pairwise(data.train.starts)
    ]
    assert len(decoded) > 40
    assert {text.removeprefix("Show").removeprefix("Print") for text in decoded} == {
        " <F1> with <N1> lineshead -<N1> <F1>"
    }
    for placeholder in PLACEHOLDERS:  # a token of its own, whatever stands beside it
        assert len(data.tokenizer.encode(f"a{placeholder}a{placeholder}")) == 4


def test_what_was_prepared_without_slots_keeps_its_fingerprint(config):
    """Recorded before there were any."""
    data = prepare(replace(config, slots=False, tokenizer="char"), lambda _: None)
    assert data.fingerprint == "146269624dc1ded1"


def test_a_tokenizer_without_placeholders_is_refused(config):
    with pytest.raises(UserError, match="has no tokens for placeholders"):
        prepare(config, lambda _: None, CharTokenizer(string.printable))


def test_slots_take_pairs(config, tmp_path):
    (tmp_path / "text.txt").write_text("one line\n" * 20)
    with pytest.raises(UserError, match=r"data\.slots = true: takes pairs, but text is stream"):
        prepare(replace(config, path=str(tmp_path / "text.txt")), lambda _: None)
