"""The files that data.path stands for, and the texts in them: out of compression and archives.

All is read as streams, and nothing is unpacked to the disk: memory does not grow with a file, and
what an archive calls its members has no effect but on messages.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from tarfile import HeaderError, ReadError
from typing import Any, Protocol, Self, cast

from common.errors import UserError
from common.files import is_address, refuse_no_file, user_path
from data.config import DataConfig
from data.sources.remote import RemoteFile, Store, find, has_magic

HEAD = 1 << 20  # bytes by which a text is judged
MAX_HEADER = 1 << 20  # bytes of a header in a tar file, which is held in memory
# more than text ever expands to: only what is made to fill disks and memories does
MAX_RATIO, FREE = 1000, 1 << 26
FIRST = 5  # places that are named of all that were skipped

TEXTS = {".txt", ".md"}
RECORDS = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"}
ARCHIVES = {".zip", ".tar"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
SHORT = {".tgz": (".tar", ".gz"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz")}

# what Python's modules raise for content that is not what it should be, besides OSError without
# an errno; RuntimeError and NotImplementedError are zipfile's
DAMAGED = (
    EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError,
    NotImplementedError, UnicodeDecodeError, struct.error,
)  # fmt: skip
# headers of a tar file whose content is a part of the next member's header
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


File = Path | RemoteFile  # which has what is used of a Path here


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes | None: ...


@dataclass
class Tally:
    """What a pass over the data leaves out or replaces, counted; or refused, unless it may."""

    config: DataConfig
    skipped: int = 0
    first: list[str] = field(default_factory=list)
    replaced: int = 0  # bytes that are no characters
    where: str = ""  # the first of these
    separators: int = 0
    others: int = 0  # members of archives that have not the name of a text
    other: str = ""  # the first of these
    file: io.BufferedReader | None = None  # that is being read

    def position(self) -> int:
        """How much of that file has been read, in bytes."""
        return self.file.tell() if self.file and not self.file.closed else 0

    def counts(self) -> dict:
        """What another tally can go on from."""
        return {
            "skipped": self.skipped, "first": self.first[:], "replaced": self.replaced,
            "where": self.where, "separators": self.separators,
            "others": self.others, "other": self.other,
        }  # fmt: skip

    def skip(self, place: str, why: str, fix: str):
        """Leaves out what stands at `place`, if data.skip_bad says so. Raises UserError if not."""
        if not self.config.skip_bad:
            raise UserError(f"{place}: {why}; {fix}, or set data.skip_bad = true to leave it out")
        self.skipped += 1
        if len(self.first) < FIRST:
            self.first.append(f"{place} ({why})")

    def notes(self) -> list[str]:
        """For people, when the pass is over."""
        found = []
        if self.skipped:
            what = "the first: " if self.skipped > FIRST else ""
            found.append(f"note: skipped {self.skipped:,}: {what}{'; '.join(self.first)}")
        if self.others:
            found.append(
                f"note: left out {self.others:,} members of archives, by name, the first: "
                f'{self.other}; data.kind = "documents" reads all'
            )
        if self.replaced:
            encoding = self.config.encoding
            first = f", the first at {self.where}" if self.where else ""
            found.append(
                f"note: {self.replaced:,} places are not {encoding}: U+FFFD stands there{first}"
            )
        return found


@dataclass(frozen=True)
class Part:
    """One text or table: a file, or a member of an archive."""

    place: str  # for people: its path, or the archive's and its name there
    suffix: str  # in lower case, without that of a compression: ".jsonl" of corpus.jsonl.gz
    stream: io.BufferedReader
    path: "File | None"  # None: not a file as it is, which could be read in any order

    @property
    def head(self) -> bytes:
        """Up to HEAD bytes of its beginning, before anything is read."""
        return self.stream.peek(HEAD)[:HEAD]


@dataclass(frozen=True)
class Files:
    """What one setting names: files to be read one after the other, or two line by line."""

    where: str  # the setting, as it was given, for errors
    paths: tuple[File, ...] = ()
    parallel: bool = False  # line i of one file belongs to line i of the other
    alone: bool = False  # one file, by its own name

    def place(self, name: str) -> str:
        """Where an error is that one of the files has."""
        return self.where if len(self.paths) == 1 else f"{self.where}: {name}"


# Files --------------------------------------------------------------------------------------------


def find_files(path: str, where: str, kind: str, store: Store) -> list[File]:
    """The files that one path stands for: a file, all in a folder, or what a pattern matches.

    In the order of their names. Raises UserError, which begins with `where`, if there are none.
    """
    if is_address(path):
        remote = find(path, where, store)
        if "" in remote or has_magic(path):
            return list(remote.values())
        return choose(remote, path, where, kind, store.log)
    place = user_path(path)
    if not os.path.lexists(place) and glob.has_magic(path):
        found = (Path(name) for name in sorted(glob.glob(str(place), recursive=True)))
        files: list[File] = [file for file in found if file.is_file()]
        if not files:
            raise UserError(f"{where}: no file matches it; fix the pattern")
        return files
    refuse_no_file(path, where)
    if not place.is_dir():
        return [place]
    found = (file for file in sorted(place.rglob("*")) if file.is_file())
    named = {str(file.relative_to(place)): file for file in found}
    return choose(named, path, where, kind, store.log)


def choose(
    found: Mapping[str, File], path: str, where: str, kind: str, log: Callable[[str], object]
) -> list[File]:
    """Those of a folder's files, by their names in it, that are read. Raises UserError."""
    found = {name: file for name, file in found.items() if not is_hidden(PurePath(name).parts)}
    files = [file for file in found.values() if is_wanted(file.name, kind)]
    others = [name for name, file in found.items() if not is_wanted(file.name, kind)]
    if not files:
        known = " ".join(sorted(TEXTS | RECORDS | ARCHIVES))
        raise UserError(
            f"{where}: this folder has no {known}, also compressed, and is no folder of pairs with "
            'train.nl and train.cm; give another, or set data.kind = "documents" to read all files'
        )
    texts = [file for file in files if split_suffix(file.name)[0] in TEXTS]
    if kind == "auto" and texts and len(texts) < len(files):
        other = next(file for file in files if file not in texts)
        raise UserError(
            f"{where}: this folder has both text ({texts[0].name}) and other files ({other.name}); "
            f"give a pattern, such as '{path.rstrip('/')}/**/*{''.join(other.suffixes[-2:])}'"
        )
    if others:
        first = ", ".join(others[:FIRST])
        more = f" and {len(others) - FIRST:,} more" if len(others) > FIRST else ""
        log(
            f"note: {where}: left out {len(others):,} of its files, by name: {first}{more}; "
            'data.kind = "documents" reads all files'
        )
    return files


def size_of(file: File) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def is_wanted(name: str, kind: str) -> bool:
    """Whether a file in a folder or an archive, which nobody named, is read."""
    return kind not in ("auto", "pairs") or split_suffix(name)[0] in TEXTS | RECORDS | ARCHIVES


def is_hidden(parts: tuple[str, ...]) -> bool:
    """Whether a file is one that systems and programs leave beside people's own."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in parts)


def split_suffix(name: str) -> tuple[str, str]:
    """(suffix of what is inside, suffix of its compression or "") of a file's name."""
    path = PurePosixPath(name.lower())
    if path.suffix in SHORT:
        return SHORT[path.suffix]
    if path.suffix in COMPRESSED:
        return path.with_suffix("").suffix, path.suffix
    return path.suffix, ""


# Parts --------------------------------------------------------------------------------------------


def open_parts(path: File, kind: str, tally: Tally) -> Iterator[Part]:
    """Each text in a file, which must be read before the next is asked for.

    Raises OSError, and UserError for damaged compression and for members that are no plain files.
    """
    suffix, compression = split_suffix(path.name)
    with path.open("rb", HEAD) as file:
        tally.file = cast(io.BufferedReader, file)
        budget = Budget(max(FREE, MAX_RATIO * size_of(path)))
        stream = cast(io.BufferedReader, file)
        if compression:
            stream = expand(file, compression, str(path), budget)
        if suffix == ".zip" and not compression:
            members = zip_members(path, stream)
        elif suffix == ".tar":
            members = tar_members(path, stream)
        else:
            yield Part(str(path), suffix, stream, None if compression else path)
            return
        for name, wrong, content in members:
            shown = f"{path}: {name}"
            if wrong:
                tally.skip(shown, wrong, "pack the archive without it")
            elif is_hidden(PurePosixPath(name).parts):
                continue
            elif not is_wanted(name, kind):
                tally.others, tally.other = tally.others + 1, tally.other or shown
            else:
                suffix, compression = split_suffix(name)
                if suffix in ARCHIVES:
                    tally.skip(shown, "an archive in an archive", "unpack the outer one")
                    continue
                inner = buffered(content, shown, budget)
                if compression:
                    inner = expand(inner, compression, shown, budget)
                yield Part(shown, suffix, inner, None)


def zip_members(path: File, file: Readable) -> Iterator[tuple[str, str, Readable]]:
    """(name, why it is refused or "", content) of each member but folders."""
    with damage(str(path)), zipfile.ZipFile(cast(Any, file)) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if info.filename.endswith("/"):  # is_dir() fails for an empty name
                continue
            wrong = wrong_name(info.filename)
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                wrong = "a link or a device, not a file"
            if info.flag_bits & 1:
                wrong = "encrypted"
            if wrong:
                yield info.filename, wrong, io.BytesIO()
                continue
            with archive.open(info) as content:
                yield info.filename, "", content


def tar_members(path: File, file: Readable) -> Iterator[tuple[str, str, Readable]]:
    """The same of a tar file, which is read from its beginning to its end once."""
    with (
        damage(str(path)),
        tarfile.open(fileobj=cast(Any, file), mode="r|", tarinfo=Header) as archive,
    ):
        for info in archive:
            cast(Any, archive).members = []  # which would grow with the archive
            if info.isdir():
                continue
            wrong = wrong_name(info.name)
            if not info.isreg() or info.issparse():
                wrong = "a link, a device or a sparse file"
            content = None if wrong else archive.extractfile(info)
            yield info.name, wrong, content or io.BytesIO()


class Header(tarfile.TarInfo):
    """A header that must be right: tarfile takes a wrong one for the end, and the file's own end
    too, where the archive has been cut between two members.
    """

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark of the end
                raise
            raise ReadError(str(error)) from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in LONG_HEADERS and header.size > MAX_HEADER:
            raise ReadError("a header is larger than 1 MiB")
        return header


def wrong_name(name: str) -> str:
    """Why a member's name is none that a text has: it would be outside if it were unpacked."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "a name that leads out of the archive"
    return ""


@contextmanager
def damage(place: str) -> Generator[None]:
    """Has what Python's modules say of damaged content said in one line."""
    try:
        yield
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise damaged(place, error) from None


def damaged(place: str, error: Exception) -> UserError:
    return UserError(
        f"{place}: cut short or damaged ({error or type(error).__name__}); restore it from its "
        "source"
    )


# Streams ------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """How many bytes the contents of a file may expand to, all of them together."""

    bytes: int


class Checked(io.RawIOBase):
    """What is expanded: an error in it names the file, and it has an end."""

    def __init__(self, stream: Readable, place: str, budget: Budget):
        self.stream, self.place, self.budget = stream, place, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer, but at the end."""
        view, done = memoryview(buffer), 0
        with damage(self.place):
            while done < len(view):
                data = self.stream.read(len(view) - done)
                if not data:
                    break
                view[done : done + len(data)] = data
                done += len(data)
        self.budget.bytes -= done
        if self.budget.bytes < 0:
            raise UserError(
                f"{self.place}: expands to more than {MAX_RATIO:,} times its size, as no text "
                "does; give it unpacked if it is sound"
            )
        return done


def buffered(stream: Readable, place: str, budget: Budget) -> io.BufferedReader:
    return io.BufferedReader(Checked(stream, place, budget), HEAD)


def expand(file: Readable, compression: str, place: str, budget: Budget) -> io.BufferedReader:
    """What a compressed stream holds."""
    if compression == ".zst":
        return buffered(Zstd(file, place), place, budget)
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[compression]
    return buffered(opener(cast(Any, file), "rb"), place, budget)


class Zstd(io.RawIOBase):
    """A zstd stream, with Python's own module, or before 3.14 with the package that it comes from.

    Raises UserError where there is neither.
    """

    def __init__(self, file: Readable, place: str):
        try:
            from compression import zstd
        except ImportError:
            try:
                from backports import zstd
            except ImportError:
                raise UserError(
                    f"{place}: zstd is not installed; install it with pip install -e '.[zstd]'"
                ) from None
        self.zstd, self.stream = zstd, zstd.open(cast(Any, file), "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self.stream.readinto(buffer)
        except self.zstd.ZstdError as error:
            raise EOFError(error) from None
