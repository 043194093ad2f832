"""Why each token of a text was chosen, for people (`generate.py --explain`) and as JSON."""

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

from common import cli
from data.slots import readable
from data.tokenizers.base import Tokenizer
from data.tokenizers.sentencepiece import ESCAPE
from generation.sampling import Explanation, Sampling, explain

COLOURS = ((0.5, 32), (0.1, 33), (0.0, 31))  # from this probability: green, yellow, red


class Explained:
    """The tokens of one text, in order, the one that ends it included."""

    def __init__(self, tokenizer: Tokenizer, rules: Sampling, slots: bool = False):
        self.tokenizer, self.rules, self.slots = tokenizer, rules, slots
        self.tokens: list[tuple[int, Explanation]] = []

    def add(self, logits: list[float], token: int):
        """Takes the token that was chosen from `logits` (V)."""
        self.tokens.append((token, explain(logits, self.rules, token)))

    def as_json(self) -> list[dict]:
        """An object for each token: its id, its text, and the fields of `Explanation`."""
        return [
            {"id": token, "token": self.name(token, quote=str)} | asdict(why)
            for token, why in self.tokens
        ]

    def table(self, colour: bool) -> str:
        """A line of headings, then one for each token; a rule that is off has no column."""
        by_k = self.rules.top_k > 0 and not self.rules.deterministic
        by_p = self.rules.top_p < 1 and not self.rules.deterministic
        columns = {"probability": "{0.probability:11.2%}"}
        if by_k or by_p:
            columns["  drawn"] = "{0.drawn:7.2%}"
        columns |= {"  rank": "{0.rank:6,}", " bits": "{0.entropy:5.2f}"}
        if by_k:
            columns["top_k removes"] = "{0.top_k_removed:5,} {0.top_k_probability:7.2%}"
        if by_p:
            columns["top_p removes"] = "{0.top_p_removed:5,} {0.top_p_probability:7.2%}"
        lines = ["  ".join([*columns, "token"])]
        for token, why in self.tokens:
            cells = [form.format(why) for form in columns.values()]
            name = self.name(token)
            if colour:
                code = next(code for least, code in COLOURS if why.probability >= least)
                name = f"\x1b[{code}m{name}\x1b[0m"
            lines.append("  ".join([*cells, name]))
        return "\n".join(lines) + "\n"

    def name(self, token: int, quote: Callable[[str], str] = repr) -> str:
        """A token's text in quotes, control characters escaped; <end> and lone bytes by name."""
        # after a token, because some tokenizers drop the space that a text begins with
        text = self.tokenizer.continuation([token], [token])
        if text and "\ufffd" not in text and ESCAPE not in text:
            return quote(readable(text) if self.slots else text)
        return cli.visible(self.tokenizer.token(token))


def in_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: on a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
