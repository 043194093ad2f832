"""Files, folders, patterns, compression and archives: what is read of them, what is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pytest

from data.config import DataConfig
from data.sources import paths
from data.sources.source import open_source
from tests.data.sources.test_readers import JSONL, opened, refusal

TEXT = "The first line\n\nand é, the last.\n" * 40


def zstd_compress(data: bytes) -> bytes:
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd_compress}


def tar(path, members, mode="w"):
    """Members: (name, content, or a function that changes the header)."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if callable(content):
                content(info)
                content = b""
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


# Files, folders, patterns -------------------------------------------------------------------------


def test_several_files_are_documents_in_the_order_given(tmp_path):
    for name in ("b.txt", "a.md", "c.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    given = tuple(str(tmp_path / name) for name in ("b.txt", "a.md", "b.txt"))
    source = open_source(DataConfig(path=given), lambda line: None, tmp_path)
    assert (source.name, source.kind) == ("b", "documents")
    assert list(source.train()) == ["text of b.txt\n", "text of a.md\n"]  # each once
    stream = open_source(DataConfig(path=given, kind="stream"), lambda line: None, tmp_path)
    assert "".join(stream.train()) == "text of b.txt\ntext of a.md\n"
    assert source.fingerprint != stream.fingerprint
    back = open_source(DataConfig(path=given[::-1]), lambda line: None, tmp_path)
    assert list(back.train()) == list(source.train())  # b comes first in both


def test_a_folder_and_a_pattern(tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "b/.x.txt", "image.png"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text(name)
    said = []
    source = open_source(DataConfig(path=str(corpus)), said.append, tmp_path)
    assert (source.name, source.kind) == ("corpus", "documents")
    assert list(source.train()) == ["a.txt", "b/1.txt", "b/2.txt"]
    assert "reading corpus as documents" in said[-1]
    assert said[0] == (
        f"note: data.path = {corpus}: left out 1 of its files, by name: image.png; "
        'data.kind = "documents" reads all files'
    )
    found = opened(f"{corpus}/**/[12].txt", tmp_path)
    assert (found.name, list(found.train())) == ("corpus", ["b/1.txt", "b/2.txt"])
    assert found.kind == "documents"
    every = opened(corpus, tmp_path, kind="documents")
    assert list(every.train()) == ["a.txt", "b/1.txt", "b/2.txt", "image.png"]
    (corpus / "odd [1].txt").write_text("its name is no pattern")
    assert list(opened(corpus / "odd [1].txt", tmp_path).train()) == ["its name is no pattern"]
    val = opened(tmp_path / "corpus/a.txt", tmp_path, kind="documents", val_path=f"{corpus}/b/*")
    assert list(val.val()) == ["b/1.txt", "b/2.txt"]


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "this folder has no" in refusal(opened, tmp_path / "empty", tmp_path)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "README.md").write_text("about it")
    (mixed / "data.jsonl.gz").write_bytes(gzip.compress(JSONL))
    message = refusal(opened, mixed, tmp_path)
    assert "both text (README.md) and other files" in message and "*.jsonl.gz'" in message
    assert opened(f"{mixed}/*.jsonl.gz", tmp_path).kind == "pairs"
    assert "no file matches it" in refusal(opened, f"{mixed}/*.zip", tmp_path)
    (mixed / "texts.jsonl").write_text('{"text": "one"}')
    message = refusal(opened, f"{mixed}/*.jsonl*", tmp_path)
    assert "has pairs, but" in message and "texts.jsonl has not" in message


# Compression --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_is_compressed_is_read_as_it_would_be_otherwise(tmp_path, suffix):
    compress = COMPRESS[suffix]
    for name, content in {"a.txt": TEXT.encode(), "b.jsonl": JSONL, "c": TEXT.encode()}.items():
        plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
        plain.write_bytes(content)
        packed.write_bytes(compress(content))
        first, second = opened(plain, tmp_path), opened(packed, tmp_path)
        assert first.kind == second.kind
        assert list(first.train()) == list(second.train()) == list(second.train())
    # several streams end to end, as parallel compressors write them
    packed.write_bytes(compress(b"one ") + compress(b"two"))
    assert "".join(opened(packed, tmp_path).train()) == "one two"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("harm", ["cut", "changed", "not compressed", "nothing"])
def test_damaged_compression_is_one_line(tmp_path, suffix, harm):
    text = "".join(f"{i * i} " for i in range(20_000))
    whole = COMPRESS[suffix](text.encode())
    middle = len(whole) // 2
    content = {
        "cut": whole[:middle],
        "changed": whole[:middle] + bytes(x ^ 255 for x in whole[middle : middle + 9]) * 9,
        "not compressed": b"plain text",
        "nothing": b"",
    }[harm]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    message = refusal(lambda: list(opened(path, tmp_path).train()))
    if harm == "nothing":  # which gzip and others take for no stream at all
        assert "is empty" in message or "cut short" in message
    else:
        assert message.startswith(f"{path}: cut short or damaged ("), message


def test_what_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FREE", 1 << 20)
    zeros = lzma.compress(bytes(30 << 20))
    for name in ("a.txt.xz", "b.tar.xz"):
        (tmp_path / name).write_bytes(zeros if name[0] == "a" else b"")
    tar(tmp_path / "b.tar", [("a.txt", b"a " * (15 << 20))])
    (tmp_path / "b.tar.xz").write_bytes(lzma.compress((tmp_path / "b.tar").read_bytes()))
    make_zip(tmp_path / "c.zip", [("a.txt.xz", lzma.compress(b"a " * (15 << 20)))])
    for name in ("a.txt.xz", "b.tar.xz", "c.zip"):
        settings = {"encoding": "latin-1", "kind": "stream"}
        message = refusal(
            lambda n=name, s=settings: list(opened(tmp_path / n, tmp_path, **s).train())
        )
        assert "expands to more than 1,000 times its size" in message


# Archives -----------------------------------------------------------------------------------------

MEMBERS = [
    ("a/1.txt", b"one"),
    ("a/", b""),
    ("__MACOSX/a/1.txt", b"junk"),
    ("a/._1.txt", b"junk"),
    ("a/2.jsonl.gz", gzip.compress(b'{"text": "two"}\n{"text": "three"}', mtime=0)),
    ("picture.png", b"\0\1"),
    ("3.md", b"\xef\xbb\xbffour"),
]


@pytest.mark.parametrize(
    "suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"]
)
def test_members_are_documents(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".zip":
        make_zip(path, MEMBERS)
    else:
        directory = [(n, c) if not n.endswith("/") else (n, as_folder) for n, c in MEMBERS]
        tar(tmp_path / "plain.tar", directory)
        whole = (tmp_path / "plain.tar").read_bytes()
        compress = COMPRESS.get(suffix.replace("tgz", "tar.gz")[4:], bytes)
        path.write_bytes(compress(whole))
    said = []
    source = open_source(DataConfig(path=str(path)), said.append, tmp_path)
    assert source.kind == "documents"
    assert list(source.train()) == list(source.train()) == ["one", "two", "three", "four"]
    left = "note: left out 1 members of archives, by name, the first: "
    assert [line.partition(";")[0] for line in said[1:]] == [f"{left}{path}: picture.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(
        {path.name, *(() if suffix == ".zip" else ("plain.tar",))}
    )


def as_folder(info):
    info.type = tarfile.DIRTYPE


def as_link(info):
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


def as_device(info):
    info.type = tarfile.CHRTYPE


BAD = [
    ("../out.txt", b"x", "leads out"),
    ("/out.txt", b"x", "leads out"),
    ("a/../../out.txt", b"x", "leads out"),
    ("a\\..\\out.txt", b"x", "leads out"),
    ("C:out.txt", b"x", "leads out"),
    ("link.txt", as_link, "a link"),
    ("device.txt", as_device, "a device"),
    ("inner.zip", b"PK", "an archive in an archive"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_are_refused_or_skipped(tmp_path, name, content, expected, kind):
    path = tmp_path / f"corpus.{kind}"
    good = ("good.txt", b"good")
    if kind == "tar":
        tar(path, [good, (name, content), ("last.txt", b"last")])
    elif content is as_device:
        pytest.skip("a zip file has none")
    else:
        info = zipfile.ZipInfo(name)
        info.filename = name
        info.external_attr = (0o120777 << 16) if content is as_link else 0
        make_zip(
            path, [good, (info, b"x" if callable(content) else content), ("last.txt", b"last")]
        )
    message = refusal(lambda: list(opened(path, tmp_path).train()))
    assert message.startswith(f"{path}: {name}: ") or "\\" in name
    assert expected in message and "set data.skip_bad = true" in message
    said = []
    source = open_source(DataConfig(path=str(path), skip_bad=True), said.append, tmp_path)
    assert list(source.train()) == list(source.train()) == ["good", "last"]
    assert sum("note: skipped 1: " in line for line in said) == 1  # told once
    assert os.listdir(tmp_path) == [path.name]


def test_an_archive_of_which_all_is_skipped_is_not_said_to_be_empty(tmp_path):
    make_zip(tmp_path / "corpus.zip", [("inner.zip", b"PK")])
    message = refusal(opened, tmp_path / "corpus.zip", tmp_path, skip_bad=True)
    assert "all records were skipped (1; the first: " in message
    assert "corpus.zip: inner.zip (an archive in an archive))" in message


def test_damaged_archives_are_one_line(tmp_path):
    members = [(f"{i}.txt", f"{i} ".encode() * 999) for i in range(9)]
    tar(tmp_path / "a.tar", members)
    make_zip(tmp_path / "a.zip", members)
    for name in ("a.tar", "a.zip"):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        third = 3 * (512 + 4 * 512) if name == "a.tar" else 0  # where a header is
        for content in (
            whole[: len(whole) // 2],
            whole[: third + 100],
            whole[:third] + b"\xff" * 700 + whole[third + 700 :],
            b"plain text",
        ):
            path.write_bytes(content)
            message = refusal(lambda p=path: list(opened(p, tmp_path).train()))
            assert "cut short or damaged" in message, (name, len(content), message)
    encrypted = bytearray(whole)
    at = encrypted.index(b"PK\1\2")
    encrypted[at + 8] |= 1
    path.write_bytes(encrypted)
    assert "encrypted" in refusal(lambda: list(opened(path, tmp_path).train()))


def test_a_header_in_a_tar_file_is_bounded(tmp_path):
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = tarfile.XHDTYPE, 2 << 20
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(3 << 20))
    assert "a header is larger" in refusal(
        lambda: list(opened(tmp_path / "a.tar", tmp_path).train())
    )


def test_memory_does_not_grow_with_what_is_compressed(tmp_path):
    resource = pytest.importorskip("resource")
    line = json.dumps({"text": "a document of some words " * 9}) + "\n"
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(10):
            file.write(line * 16_000)  # 38 MB in all
    sum(1 for _ in zip(opened(path, tmp_path).train(), range(20_000), strict=False))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in opened(path, tmp_path).train()) == 160_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB
