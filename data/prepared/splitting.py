"""Which texts are trained on and which are for validation: by a hash, or where a stream is cut."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from common.errors import UserError
from data.config import DataConfig
from data.sources.readers import Place
from data.sources.records import Pair
from data.sources.source import Source

MAX_HELD_OUT = 10  # validation pairs that travel with every checkpoint
# where to begin and to end in the texts, and in those for validation; None: at their end
Share = Sequence[tuple[Place, Place | None]]
WHOLE: Share = [(Place(), None)] * 2


def split_texts(
    source: Source,
    config: DataConfig,
    characters: int = 0,
    place: Place | None = None,
    share: Share | None = None,
    mark: Callable[[str | Pair], Iterable[dict]] = lambda _: (),
) -> Iterator:
    """(its side, text or pair) of each document or piece of a stream, in one pass from `place` on.

    A stream of so many `characters` is cut in one place. For others the hash of the normalised
    prompt decides, so that a prompt never stands on both sides, however often it occurs, and a
    document stays on its side when others are added. After each comes what `mark` makes of it.
    """
    place = place or Place()
    bound = 0 if source.val else config.val_fraction
    cut = characters - round(characters * bound)
    for is_val, item in read_all(source, place, share or WHOLE):
        if is_val or not bound or source.kind != "stream":
            side = is_val or (bound and hash_fraction(item) < bound)
            yield "val" if side else "train", item
        else:
            end = min(max(0, cut - place.characters), len(item))
            place.characters += len(item)
            for side, piece in (("train", item[:end]), ("val", item[end:])):
                if piece:
                    yield side, piece
        yield from mark(item)


def read_all(source: Source, place: Place, share: Share) -> Iterator[tuple[bool, str | Pair]]:
    """(whether it is of the files for validation, item) of all from `place` on."""
    for number, reader in enumerate(filter(None, (source.train, source.val))):
        if number < place.reader:
            continue
        begin, end = share[number]
        if number > place.reader:
            place.reader, place.file, place.item = number, begin.file, begin.item
            place.tally = begin.tally
        for item in reader(place, end):
            yield number == 1, item


def hash_fraction(document: str | Pair) -> float:
    """Where a document falls in [0, 1): by its prompt, or by its text where there is none."""
    text = document if isinstance(document, str) else document[0] or document[1]
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") * 2.0**-64


def count_characters(source: Source, config: DataConfig) -> int:
    """How long a stream is of which the end is held out; 0 where that is of no interest."""
    splits = source.kind == "stream" and not source.val and config.val_fraction
    return sum(map(len, source.train())) if splits else 0


def check_sides(source: Source, config: DataConfig):
    """Refuses documents that all fall on one side of the split; the first few nearly always tell.

    Before anything is made of them, because an empty side has many other consequences.
    """
    if source.kind == "stream" or source.val or not config.val_fraction:
        return
    sides, different, count = set(), set(), 0
    for side, document in split_texts(source, config):
        sides.add(side)
        if len(sides) == 2:
            return
        count += 1
        if len(different) < 2:
            different.add(hash_fraction(document))
    missing = "train" if "val" in sides else "val"
    what = "prompts" if source.kind == "pairs" else source.kind
    why = f"none of its {count:,} {what} falls there; give more text"
    if len(different) == 1:
        why = f"all its {count:,} {what} are equal, and stay on one side; give different {what}"
    if count == 1:
        why = "it is a single document; give more"
        if source.kind == "lines":
            why = 'it is a single line, and so a single document; set data.kind = "stream"'
        if source.kind == "documents":
            why = 'it is a single document; set data.separator, or data.kind = "stream"'
    raise UserError(
        f"data.path: {source.name} leaves nothing for the {missing} split with data.val_fraction = "
        f"{config.val_fraction}: {why}, or set data.val_fraction = 0 for no validation"
    )


# Held out -----------------------------------------------------------------------------------------


def collect_held_out(documents: Iterable, by_share: dict[float, Pair]) -> Iterator:
    """The documents as they come; `by_share` gets what `hold_out` chooses from."""
    for item in documents:
        if not isinstance(item, dict) and item[0] == "val":
            by_share.setdefault(hash_fraction(item[1]), item[1])
            if len(by_share) > 100 * MAX_HELD_OUT:  # memory does not grow with the split
                for each in sorted(by_share)[MAX_HELD_OUT:]:
                    del by_share[each]
        yield item


def hold_out(by_share: dict[float, tuple[str, str]]) -> list[dict]:
    """A few pairs with different prompts, spread over the split by their hash."""
    chosen = [pair for _, pair in sorted(by_share.items())[:MAX_HELD_OUT]]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]
