"""The tokenizer.json of Hugging Face."""

import json
import os
import re
from collections.abc import Iterator
from itertools import chain, islice

from data.tokenizers.foreign import ForeignTokenizer, failing_as, missing, silent_panics
from data.tokenizers.special_tokens import Roles, choose

LONG = 1 << 17  # characters from which a text is encoded in pieces
NEAR = 256  # characters on each side of a cut that must not depend on it
TRIES = 8  # places that are tried for a cut
WORD = re.compile(r"(?<=\w)(?= \w)|(?<=\S)(?=\n\w)|(?<=[\u3002\uff01\uff1f])(?=\w)")


class HuggingFaceTokenizer(ForeignTokenizer):
    """A tokenizer.json of Hugging Face, by their library `tokenizers`.

    content: of the file; special: its special tokens by role, those that are not to be found by
    name; hints: what files beside it say. Raises UserError that begins with `where`.
    """

    kind, name, file = "huggingface", "tokenizer.json of Hugging Face", "tokenizer.json"

    def __init__(
        self,
        content: bytes,
        special: Roles | None = None,
        hints: Roles | None = None,
        where: str = "tokenizer.json",
    ):
        # its own threads would compete with ours, and warn where a process forks
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import tokenizers
        except ImportError:
            raise missing(where, "tokenizers") from None
        self._content, self._where = content, where
        what = f"tokenizers {tokenizers.__version__} cannot read it"
        fix = "install a newer one (pip install -U tokenizers), or restore the file from a copy"
        with silent_panics(), failing_as(where, what, fix):
            self._tokenizer = made = tokenizers.Tokenizer.from_str(content.decode())
            stored = json.loads(content)
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True  # as text, which is what they are in a text
        if getattr(made.model, "dropout", None):
            made.model.dropout = None  # BPE's, of training: each time it would give other ids
        self.vocab_size = max(made.get_vocab().values(), default=-1) + 1
        added = made.get_added_tokens_decoder()
        listed = {token.content for token in added.values()}
        hints = {**(hints or {}), "unk": unknown_of(stored["model"])}
        roles = choose(special or {}, hints, listed, made.token_to_id, where)
        flagged = [i for i, token in added.items() if token.special]
        with failing_as(where, "cannot encode a text"):
            self._set_special(roles, flagged, made.token_to_id, self._spelled)
            # a text that spells the unknown token is found by its place in the text
            self._unk, unk = roles["unk"], [-1, -1]
            if self._unk is not None:
                whole, unk = self._spelled(self._unk)
                self._unk = self._unk if self.unk_id in whole else None
            self._unk_apart = unk

    def _spelled(self, token: str) -> tuple[list[int], list[int]]:
        def ids(text: str) -> list[int]:
            return [piece.id for piece in self._tokenizer.model.tokenize(text)]

        return ids(token), [i for character in token for i in ids(character)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows = [row.ids for row in self._tokenizer.encode_batch_fast(
            [text if len(text) <= LONG else "" for text in texts], add_special_tokens=False
        )]  # fmt: skip
        for n, text in enumerate(texts):
            if self._unk is not None and self._unk in text:
                rows[n] = self._encode_unknown(text)
            elif len(text) > LONG:
                rows[n] = [*chain.from_iterable(map(self._ids, self._pieces(text)))]
        return rows

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text in pieces with the same ids: tokenizers takes 400 bytes for a token.

        It is cut where a word begins, if the ids around show that nothing reaches across; where a
        tokenizer has something before each text, say, it is not cut.
        """
        start = 0
        while len(text) - start > LONG:
            for found in islice(WORD.finditer(text, start + LONG // 2), TRIES):
                at = found.start()
                left, right = text[at - NEAR : at], text[at : at + NEAR]
                if self._ids(left + right) == self._ids(left) + self._ids(right):
                    yield text[start:at]
                    start = at
                    break
            else:
                break
        yield text[start:]

    def _encode_unknown(self, text: str) -> list[int]:
        """The ids of a text in which the unknown token's name stands."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        parts = (
            self._unk_apart if i == self.unk_id and text[a:b].strip() == self._unk else [i]
            for i, (a, b) in zip(made.ids, made.offsets, strict=True)
        )
        return [*chain.from_iterable(parts)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, i: int) -> str:
        """One token as its vocabulary has it: often U+0120 or U+2581 for a space."""
        return self._tokenizer.id_to_token(i) or f"<{i}>"


def unknown_of(model: dict) -> str | None:
    """The unknown token of a model in a tokenizer.json."""
    if isinstance(at := model.get("unk_id"), int) and isinstance(model.get("vocab"), list):
        return model["vocab"][at][0]  # Unigram's; tokenizers has checked that it is there
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None
