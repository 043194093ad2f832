"""Tokens to text while they come: whole characters, cut in front of a stop string."""

from collections.abc import Sequence

from data.slots import UNFINISHED, Slots
from data.tokenizers.base import Tokenizer
from data.tokenizers.sentencepiece import ESCAPE

CONTEXT = 8  # tokens before those that are made text of: some tokenizers need to see them
NO_SLOTS = Slots("", on=False)


class StreamedText:
    """The text of one row as its tokens come, with the arguments of its prompt put back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        prompt: Sequence[int] = (),
        slots: Slots = NO_SLOTS,
    ):
        """prompt: the ids that the row goes on from; a special token among them begins a text."""
        self.tokenizer, self.stops, self.slots = tokenizer, stops, slots
        begins = max((n for n, i in enumerate(prompt, 1) if i in tokenizer.special_ids), default=0)
        self.before = [*prompt[begins:]][-CONTEXT:]
        self.text = ""
        self.stopped = False
        self.pending: list[int] = []  # tokens that end inside a character
        self.shown = 0

    def add(self, token: int) -> bool:
        """Takes a token; whether a stop string is complete."""
        self.pending.append(token)
        # U+FFFD: bytes of a character of which more may come; ESCAPE: half of an escaped one
        text = self.tokenizer.continuation(self.before, self.pending)
        half = self.slots.on and UNFINISHED.search(text)  # of an escaped character, too
        if not text.endswith(("\ufffd", ESCAPE)) and not half:
            self.flush()
        return self.stopped

    def flush(self):
        """Makes text of the tokens held back."""
        before = len(self.text)
        self.text += self.slots.show(self.tokenizer.continuation(self.before, self.pending))
        self.before = [*self.before, *self.pending][-CONTEXT:]
        self.pending = []
        found = [self.text.find(stop, max(0, before - len(stop))) for stop in self.stops]
        if any(at >= 0 for at in found):
            self.text = self.text[: min(at for at in found if at >= 0)]
            self.stopped = True

    def new_text(self, complete: bool = False) -> str:
        """Text not returned yet; unless complete, without what may begin a stop string."""
        end = len(self.text)
        if not complete:
            held = (n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n]))
            end -= max(held, default=0)
        start, self.shown = self.shown, max(self.shown, end)
        return self.text[start:end]
