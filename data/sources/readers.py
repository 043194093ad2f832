"""Files to chunks of text, to texts or to pairs, from any place on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from common.errors import UserError
from data.config import DataConfig, Kind
from data.sources.kinds import holds_records, looks_like, refuse_bytes, unreadable
from data.sources.paths import File, Files, Part, Tally, open_parts, size_of
from data.sources.records import Pair, WrongError, as_document, as_pair, describe, records
from data.sources.text import chunks, is_whole, numbered_lines, separated, whole


@dataclass
class Place:
    """Where a pass over a source has come to. It begins there, and moves on with what it gives."""

    reader: int = 0  # of the source: train, val
    file: int = 0  # of the reader's
    item: int = 0  # of that file's chunks, texts or pairs
    characters: int = 0  # of a stream: before that
    tally: dict = field(default_factory=dict)  # what had been left out before that file
    read: Callable[[], int] = field(default=lambda: 0, compare=False)  # bytes, as on the disk

    def state(self) -> dict:
        """What `Place(**state)` is the same place with."""
        return {
            "reader": self.reader, "file": self.file, "item": self.item,
            "characters": self.characters, "tally": self.tally,
        }  # fmt: skip


class Reader:
    """Reads files from their beginning each time it is called.

    What was left out or replaced is told at the end of the first pass.
    """

    def __init__(self, files: Files, kind: Kind, config: DataConfig, log: Callable[[str], object]):
        self.files, self.kind, self.config, self.log = files, kind, config, log
        self.told, self.tally = False, Tally(config)
        # the two files of parallel ones are read as one
        self.parts = [files.paths] if files.parallel else [(path,) for path in files.paths]
        self.sizes = [sum(map(size_of, part)) for part in self.parts]
        self.before = [0, *accumulate(self.sizes)]

    def __call__(self, place: Place | None = None, end: Place | None = None) -> Iterator:
        """All from `place` on, and not from `end` on; files before and after are not opened."""
        place = place or Place()
        first, skipped = place.file, place.item
        whole = end is None and (bool(place.tally) or not (first or skipped))
        end = end or Place(file=len(self.parts))
        tally = self.tally = Tally(self.config, **place.tally)
        for number in range(first, len(self.parts)):
            place.tally, place.file, place.item = tally.counts(), number, 0
            place.read = lambda: self.before[place.file] + tally.position()
            if (number, 0) == (end.file, end.item):
                return
            for item in self.of_file(number, tally):
                place.item += 1
                if number > first or place.item > skipped:
                    yield item
                if (number, place.item) == (end.file, end.item):
                    return
        place.tally, place.file, place.item = tally.counts(), len(self.parts), 0
        if not self.told:
            self.told = True
            self.tell(tally, whole)

    def of_file(self, number: int, tally: Tally) -> Iterator:
        """What one file holds, or the two that are read line by line."""
        if self.files.parallel:
            yield from self.parallel(tally)
            return
        for part in open_parts(self.files.paths[number], self.config.kind, tally):
            yield from self.read(part, tally)

    def tell(self, tally: Tally, whole: bool):
        """What a pass has found. Raises UserError for a separator that a whole one has not."""
        for note in tally.notes():
            self.log(note)
        mark = self.config.separator
        if whole and self.kind == "documents" and mark and not tally.separators:
            raise UserError(
                f"data.separator = {mark!r}: does not occur in {self.files.where}; give what "
                "stands between its texts, or leave it out"
            )

    def read(self, part: Part, tally: Tally) -> Iterator:
        """The texts or pairs of one part."""
        try:
            refuse_bytes(part, self.config, part.place)
        except UserError as error:
            if not self.config.skip_bad:
                raise
            tally.skip(part.place, str(error).removeprefix(f"{part.place}: "), "")
            return iter(())
        if self.kind == "stream":
            return chunks(part, tally)
        if self.kind == "lines":
            lines = numbered_lines(part, tally, skips=True)
            texts = (t for n, t in lines if is_whole(t, f"{part.place}:{n}", tally))
            return filter(str.strip, texts)
        looks = looks_like(part.suffix, part.head, self.config)
        if self.kind == "pairs" or holds_records(part, looks):
            return self.of_records(part, looks, tally)
        texts = separated(part, tally) if self.config.separator else whole(part, tally)
        return filter(str.strip, texts)

    def of_records(self, part: Part, looks: str, tally: Tally) -> Iterator[str | Pair]:
        take = as_pair if self.kind == "pairs" else as_document
        for place, record in records(part, looks, tally):
            try:
                found = take(record, self.config)
            except WrongError as error:
                tally.skip(place, str(error), describe(self.config, self.kind))
                continue
            if not isinstance(found, str) or found.strip():
                yield found

    def lines(self, path: File, tally: Tally) -> Iterator[str]:
        for part in open_parts(path, self.config.kind, tally):
            yield from (line for _, line in numbered_lines(part, tally))

    def parallel(self, tally: Tally) -> Iterator[Pair]:
        prompts, completions = (self.lines(path, tally) for path in self.files.paths)
        for prompt, completion in zip(prompts, completions, strict=True):
            if prompt or completion:
                yield prompt, completion


def check_reader(reader: Reader) -> None:
    """Refuse files that cannot be opened or hold nothing, and two that do not belong together."""
    files = reader.files
    try:
        if files.parallel:
            tally = Tally(reader.config)
            first, second = (sum(1 for _ in reader.lines(path, tally)) for path in files.paths)
            if first != second:
                names = [path.name for path in files.paths]
                raise UserError(
                    f"{files.where}: {names[0]} has {first} lines but {names[1]} has {second}; "
                    "make line i of one belong to line i of the other"
                )
        empty = not any("".join(piece).strip() for piece in reader())
    except OSError as error:
        raise unreadable(files.where, error) from None
    if empty and reader.tally.skipped:
        shown = f"{reader.tally.skipped:,}; the first: {reader.tally.first[0]}"
        raise UserError(
            f"{files.where}: all records were skipped ({shown}); correct them, or leave "
            "data.skip_bad out to be told what each must be"
        )
    if empty:
        raise UserError(f"{files.where}: is empty or white space only; give a file with text in it")
