"""Where a prompt stands in what the model reads, for each kind of data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def prompt_ids(kind: str, tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """What the model reads first: never empty. Raises UserError for characters it cannot know.

    A prompt stands before <start> for pairs, after it for lines, and alone for a stream, where an
    empty one is the end of a line, if the tokenizer knows that.
    """
    ids = tokenizer.encode(prompt)
    if kind == "pairs":
        return [*ids, tokenizer.start_id]
    if kind == "lines":
        return [tokenizer.start_id, *ids]
    if not ids and tokenizer.unk_id is not None:
        ids = tokenizer.encode("\n")
        ids = [] if tokenizer.unk_id in ids else ids
    return ids or [tokenizer.start_id]


def are_pairs(value: object) -> bool:
    """Whether a value from JSON is a list of prompts and completions."""
    return isinstance(value, list) and all(
        isinstance(pair, dict) and isinstance(pair.get(key), str)
        for pair in value
        for key in ("prompt", "completion")
    )


def end_id(kind: str, tokenizer: "Tokenizer") -> int | None:
    """The token that ends a text; a stream has none."""
    return None if kind == "stream" else tokenizer.end_id
