"""Where a prompt stands in what the model reads, for each kind of data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.tokenizers.base import Tokenizer


def prompt_ids(
    kind: str, tokenizer: "Tokenizer", prompt: str, start_token: bool = True
) -> list[int]:
    """What the model reads first: never empty. Raises UserError for characters it cannot know.

    A prompt stands before <start> for pairs, after it for lines and documents, and alone for a
    stream, where an empty one is the end of a line, if the tokenizer knows that. start_token:
    data.start_token; documents without begin after the <end> of another.
    """
    ids = tokenizer.encode(prompt)
    if kind == "pairs":
        return [*ids, tokenizer.start_id]
    if kind in ("lines", "documents"):
        if not start_token:
            return [tokenizer.end_id, *ids]
        return [tokenizer.start_id, *ids]
    if not ids and tokenizer.kind != "char_bos":  # which may refuse it
        ids = tokenizer.encode("\n")
        ids = [] if tokenizer.unk_id in ids else ids
    return ids or [tokenizer.start_id]


def unread(prompts: "Sequence[list[int]]", tokenizer: "Tokenizer", max_len: int) -> str:
    """What a model of `max_len` places does not read of prompts, as ids: a note; "" if nothing."""
    long = sum(len(ids) > max_len for ids in prompts)
    unknown = sum(i == tokenizer.unk_id for ids in prompts for i in ids)
    found = []
    if long:
        found.append(
            f"{long:,} of {len(prompts):,} prompts longer than the model's window of {max_len:,} "
            "tokens, of which only the end is read"
        )
    if unknown:
        tokens = sum(map(len, prompts))
        found.append(
            f"{unknown:,} of the prompts' {tokens:,} tokens are <unk>, for characters that the "
            "vocabulary lacks"
        )
    return f"note: {'; '.join(found)}" if found else ""


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
