"""What a tokenizer does not give back as it was: tried on probes, and on the first texts."""

from collections.abc import Iterable
from itertools import islice

from common.errors import UserError
from data.tokenizers.base import Tokenizer, clean_text

PLAIN = "one two three"
PROBES = {  # what is lost where a text does not come back
    "upper case": "one Two THREE",
    "accents": "caf\u00e9 na\u00efve \u00fcber",
    "combining characters": "cafe\u0301",
    "compatibility characters (\ufb01, \uff12, \u2122)": "\ufb01ve \uff12 \u2122",
    "other scripts": "\u6771\u4eac \u043c\u0438\u0440 \u0639\u0631\u0628",
    "emoji": "one \U0001f600",
    "spaces where a text begins": "  one",
    "spaces where it ends": "one  ",
    "runs of spaces": "one  two    three",
    "newlines": "one\ntwo\n\nthree",
    "tabs": "one\ttwo",
    "carriage returns": "one\r\ntwo",
    "control characters": "one\0two\x1bthree",
    "no-break spaces": "one\u00a0two",
    "which spaces are beside punctuation": "one,two . (three )  [four]=5",
    "digits": "0 12 345 6789",
    "signs": "#$%&*+/<=>@\\^_`{|}~",
}
TEXTS, CHARACTERS = 100, 200_000  # of the data that are tried at most
AROUND = 20  # characters shown of a difference
LEAST = 0.05  # of the characters of these texts must come back, or nothing can be learned


def lost(tokenizer: Tokenizer) -> list[str]:
    """What does not come back, by name."""
    plain = tokenizer.decode(tokenizer.encode(PLAIN))
    if plain.strip() != PLAIN:
        return [f"everything ({PLAIN!r} comes back as {plain!r})"]
    found = [] if plain == PLAIN else ["where a text begins and ends (spaces are added)"]
    before, _, after = plain.partition(PLAIN)
    rows = tokenizer.encode_batch([*PROBES.values()])
    return found + [
        name
        for (name, probe), row in zip(PROBES.items(), rows, strict=True)
        if tokenizer.decode(row) != before + probe + after
    ]


def changed(tokenizer: Tokenizer, texts: Iterable) -> str:
    """How many of the first texts, or pairs of them, come back changed, and how; "" if none.

    Raises UserError where next to nothing comes back.
    """
    total = count = size = kept = 0
    example = ""
    for text in islice(texts, TEXTS):
        for part in (text,) if isinstance(text, str) else text:
            part = clean_text(part[:CHARACTERS])
            back = tokenizer.decode(tokenizer.encode(part))
            total += 1
            size += len(part)
            kept += min(len(part), len(back))
            if back != part:
                count += 1
                example = example or difference(part, back)
        if size >= CHARACTERS:
            break
    if kept < LEAST * size:
        raise UserError(
            f"data.tokenizer_path: only {kept:,} of the first {size:,} characters come back from "
            "the tokenizer; use another one, or fix data.tokenizer_pattern if that is set"
        )
    return f"{count:,} of the first {total:,} texts come back changed ({example})" if count else ""


def difference(text: str, back: str) -> str:
    """Where two texts begin to differ."""
    at = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), None)
    at = min(len(text), len(back)) if at is None else at
    start = max(0, at - AROUND // 2)
    return f"{text[start : start + AROUND]!r} as {back[start : start + AROUND]!r}"


def warning(tokenizer: Tokenizer, texts: Iterable) -> str:
    """A line for people: what of text gets lost in this tokenizer; "" if nothing.

    Raises UserError where nearly all does.
    """
    if tokenizer.exact:
        return ""
    names, what = lost(tokenizer), changed(tokenizer, texts)
    if not names and not what:
        return ""
    return (
        "warning: the tokenizer does not give back text as it was, and neither will the model; "
        + "; ".join(filter(None, [f"lost: {', '.join(names)}" if names else "", what]))
    )
