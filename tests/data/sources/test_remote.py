"""Files on a real S3 server and a real web server on this machine, which also fail as such do."""

import gzip
import io
import json
import re
import shutil
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from checkpoint.reader import list_steps, step_of
from common.errors import UserError
from data.batches import Batches, Examples, Prefetch
from data.config import DataConfig
from data.dataset import open_dataset, prepare, store_of, verify
from data.prepared import remote_shards, token_files
from data.prepared.parts import prepare_part
from data.prepared.remote_shards import RemoteFolder, RemoteShards
from data.sources import block_cache, paths, remote, text
from data.sources.block_cache import BlockCache
from data.sources.source import open_source
from data.sources.spool import keep_standard_input
from tests.data.sources.test_readers import opened, refusal
from tests.helpers import TINY, losses, write_config

TEXTS = [f"text number {i}, " + "and so on, " * (i % 50) for i in range(3000)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def s3():
    """An S3 server with a bucket, as s3fs sees it."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    address = "http://{}:{}".format(*thread.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address,
        }.items():  # fmt: skip
            patch.setenv(name, value)
        # fsspec keeps a file system for the life of a process, and this one its server's port
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem(use_listings_cache=False)
        system.mkdir("bucket")
        yield system
        system.rm("bucket", recursive=True)  # moto keeps what it holds for the life of a process
    s3fs.S3FileSystem.clear_instance_cache()
    thread.stop()


class Web:
    """A web server: its files, what goes wrong next, and what was asked for."""

    def __init__(self, ranges: bool = True):
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.released, web = threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                self.answer(True)

            def answer(self, with_content: bool):
                name, wanted = self.path, self.headers.get("Range", "")
                web.asked.append((self.command, wanted))
                content = web.files.get(name)
                fault = web.faults.pop(0) if web.faults and with_content else ""
                if fault == "stall":
                    web.released.wait(30)
                    return
                if content is None or fault.isdigit():
                    self.send_response(int(fault or 404))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if ranges else None
                part = content[int(found[1]) : int(found[2]) + 1] if found else content
                self.send_response(206 if found else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("ETag", f'"{hash(content)}"')
                if found:
                    last = int(found[1]) + len(part) - 1
                    self.send_header("Content-Range", f"bytes {found[1]}-{last}/{len(content)}")
                self.end_headers()
                if with_content:
                    self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
                    self.close_connection = fault == "cut"

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(**options):
    pytest.importorskip("aiohttp")
    web = Web(**options)
    try:
        yield web
    finally:
        web.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Blocks of a size that files here have several of, and failures that take no time."""
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    monkeypatch.setattr(text, "CHUNK", 1 << 14)
    monkeypatch.setattr(paths, "HEAD", 1 << 14)
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT", 5)
    monkeypatch.setattr(block_cache, "ROOM", 0)


# An object store ----------------------------------------------------------------------------------


def packed(name: str, content: bytes) -> bytes:
    """Content as a file of that name holds it."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    if name.endswith(".zip"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("inside.jsonl", content)
        return file.getvalue()
    if name.endswith(".tar"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo("inside.jsonl")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return file.getvalue()
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"text": TEXTS, "more": TEXTS})
        parquet.write_table(table, file := io.BytesIO(), row_group_size=1000)
        return file.getvalue()
    return content


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.zip", "a.tar", "a.parquet"])
def test_a_remote_file_is_read_as_a_local_one(tmp_path, s3, name):
    content = packed(name, JSONL)
    s3.pipe_file(f"bucket/one/{name}", content)
    (tmp_path / name).write_bytes(content)
    mine, far = opened(tmp_path / name, tmp_path), opened(f"s3://bucket/one/{name}", tmp_path)
    assert (far.name, far.kind) == (mine.name, mine.kind) and mine.kind == "documents"
    assert list(far.train()) == list(mine.train()) == TEXTS


def test_text_folders_and_patterns(tmp_path, s3):
    names = ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "image.png")
    for name in names:
        s3.pipe_file(f"bucket/corpus/{name}", name.encode())
    one = opened("s3://bucket/corpus/a.txt", tmp_path)
    assert (one.name, one.kind, list(one.train())) == ("a", "stream", ["a.txt"])
    for folder in ("s3://bucket/corpus", "s3://bucket/corpus/"):
        source = opened(folder, tmp_path)
        assert (source.name, source.kind) == ("corpus", "documents")
        assert list(source.train()) == ["a.txt", "b/1.txt", "b/2.txt"]
    found = opened("s3://bucket/corpus/**/[12].txt", tmp_path)
    assert (found.name, list(found.train())) == ("corpus", ["b/1.txt", "b/2.txt"])
    given = ("s3://bucket/corpus/b/*", "s3://bucket/corpus/b/2.txt")
    both = open_source(DataConfig(path=given), print, tmp_path)
    assert list(both.train()) == ["b/1.txt", "b/2.txt"]
    val = opened("s3://bucket/corpus/a.txt", tmp_path, kind="documents", val_path=folder + "b/*")
    assert list(val.val()) == ["b/1.txt", "b/2.txt"]


def test_what_a_file_is_is_told_without_reading_it(tmp_path, s3):
    s3.pipe_file("bucket/i/a.jsonl", JSONL)
    first, again = (opened("s3://bucket/i/a.jsonl", tmp_path / name) for name in "xy")
    s3.copy("bucket/i/a.jsonl", "bucket/i/b.jsonl")
    moved = opened("s3://bucket/i/b.jsonl", tmp_path)
    assert first.fingerprint == again.fingerprint == moved.fingerprint
    assert sum(1 for _ in (tmp_path / "y" / "remote").rglob("*")) < 4  # only its first block
    s3.pipe_file("bucket/i/a.jsonl", JSONL[:-30])
    assert opened("s3://bucket/i/a.jsonl", tmp_path).fingerprint != first.fingerprint
    moved.refuse_changes()
    assert refusal(first.refuse_changes).startswith("s3://bucket/i/a.jsonl: changed while it was")


def test_what_is_wrong_with_an_address(tmp_path, s3, monkeypatch):
    s3.pipe_file("bucket/w/a.txt", b"text")
    for address, wrong in {
        "s3://bucket/w/b.txt": "there is no such file, folder or bucket; fix the address",
        "s3://none/b.txt": "there is no such file, folder or bucket (The specified bucket",
        "s3://bucket/w/*.md": "no file matches it; fix the pattern",
        "s3://none/*.md": "there is no such file, folder or bucket; fix the address",
        "s3://none/a/**/*.md": "there is no such file, folder or bucket",
        "s3://Bad_@/x": 'Invalid bucket name "Bad_@"',
        "nonsense://x/y": "Protocol not known: nonsense; fix the address",
        "s3://bucket/${NOT_SET}": "NOT_SET is not in the environment; set it there",
        "gs://bucket/x": "a package for gs:// is missing (Please install gcsfs",
        "http://127.0.0.1:1/a.txt": "after 3 tries; check the network",
        "http://nowhere.invalid/a.txt": "after 3 tries; check the network",
    }.items():
        message = refusal(opened, address, tmp_path)
        assert message.startswith(f"data.path = {address}: ") and wrong in message, message
    for address in ("nonsense://x", "s3://bucket/${NOT_SET}", "gs://bucket/x"):  # may be prepared
        config = DataConfig(path=address, cache_dir=str(tmp_path))
        assert refusal(prepare, config).startswith(f"data.path = {address}: ")
        folder = RemoteFolder(address, store_of(config, print))
        assert refusal(folder.mirror).startswith(f"{address}: ")  # of --to and --verify
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    assert "pip install -e '.[remote]'" in refusal(opened, "s3://bucket/w/a.txt", tmp_path)


def test_secrets_are_neither_taken_nor_shown(tmp_path, monkeypatch):
    for address in ("https://me:hidden@host/a.txt", "https://host/a?X-Amz-Signature=hidden"):
        message = refusal(DataConfig, path=("a.txt", address))
        assert "hidden" not in message and "${NAME}" in message
    with serving() as web:
        monkeypatch.setenv("QUERY", "sig=hidden")
        web.files["/a.jsonl?sig=hidden"] = JSONL
        said = []
        address = web.address + "/a.jsonl?${QUERY}"
        source = open_source(DataConfig(path=address), said.append, tmp_path)
        assert list(source.train()) == TEXTS
        monkeypatch.setenv("QUERY", "sig=other")
        message = refusal(opened, address, tmp_path)
        assert "there is no such file" in message
    web_is_gone = refusal(opened, address, tmp_path)
    assert not re.search("hidden|other", " ".join([*said, message, web_is_gone]))


# The web ------------------------------------------------------------------------------------------


def test_connections_that_are_cut_and_hang_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    with serving() as web:
        web.files["/a.jsonl"] = JSONL
        said = []
        source = open_source(DataConfig(path=web.address + "/a.jsonl"), said.append, tmp_path)
        web.faults += ["cut", "503", "stall", "429", "cut", "cut"]
        assert list(source.train()) == TEXTS
        assert not web.faults and any("trying again" in line for line in said)
        before = len(web.asked)
        assert list(source.train()) == TEXTS and len(web.asked) == before  # all of it is kept


@pytest.mark.parametrize(
    "fault, wrong",
    {
        "cut": "after 8 tries; check the network",
        "stall": "no answer within 0.05 s after 8 tries; check the network",
        "403": "access refused (403 Forbidden); set the credentials",
        "404": "there is no such file, folder or bucket; fix the address",
        "500": "500, message='Internal Server Error'",
    }.items(),
)
def test_what_does_not_come_is_one_line_and_goes_on_from_there(tmp_path, monkeypatch, fault, wrong):
    monkeypatch.setattr(remote, "AHEAD", 0)
    with serving() as web:
        web.files["/a.jsonl"] = JSONL
        source = opened(web.address + "/a.jsonl", tmp_path)
        texts = source.train()
        begun = [next(texts) for _ in range(100)]
        monkeypatch.setattr(remote, "TIMEOUT", 0.05)
        web.faults += [fault] * 100
        message = refusal(list, texts)
        assert message.startswith(f"{web.address}/a.jsonl: ") and wrong in message, message
        assert "\n" not in message
        web.faults.clear()
        web.released.set()
        monkeypatch.setattr(remote, "TIMEOUT", 5)
        before = len(web.asked)
        assert list(source.train()) == TEXTS and begun == TEXTS[:100]
        gets = [asked for asked in web.asked[before:] if asked[0] == "GET"]
        assert len(gets) < len(JSONL) / remote.BLOCK  # what had come is not asked for again


def test_a_server_that_sends_no_pieces(tmp_path):
    with serving(ranges=False) as web:
        web.files["/a.jsonl"] = JSONL
        web.files["/b.txt"] = b"One text."
        source = opened(web.address + "/a.jsonl", tmp_path)
        assert list(source.train()) == list(source.train()) == TEXTS
        assert sum(asked[0] == "GET" for asked in web.asked) == 2  # the probe and the copy
        assert opened(web.address + "/b.txt", tmp_path).kind == "stream"
    assert [path.name[:2] for path in tmp_path.glob("*.*")].count("a-") == 1


def test_a_local_address_is_a_path(tmp_path):
    (tmp_path / "a.txt").write_text("One text.")
    mine, its = (opened(f"{prefix}{tmp_path}/a.txt", tmp_path) for prefix in ("", "file://"))
    assert mine.fingerprint == its.fingerprint and its.kind == "stream"


# Standard input -----------------------------------------------------------------------------------


def test_standard_input_is_kept(tmp_path, monkeypatch):
    config, said = DataConfig(path=("-", "b.txt"), cache_dir=str(tmp_path)), []
    for content, suffix in ((JSONL, ""), (gzip.compress(JSONL), ".gz")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        found = keep_standard_input(config, said.append)
        assert found.path[1:] == ("b.txt",) and Path(found.path[0]).read_bytes() == content
        assert Path(found.path[0]).suffix == suffix and found.path[0] in said[-1]
        assert list(opened(found.path[0], tmp_path).train()) == TEXTS
    assert not list(tmp_path.glob(".*"))


# The cache ----------------------------------------------------------------------------------------


class Numbered:
    """Blocks that are made of their number, and how often each was asked for."""

    key = "numbered"

    def __init__(self, size: int = 1000):
        self.size, self.asked = size, []

    def fetch(self, number: int) -> bytes:
        self.asked.append(number)
        return number.to_bytes(2, "big") * (self.size // 2)


def test_the_cache_is_bounded_and_keeps_what_is_used(tmp_path):
    blocks, cache = Numbered(), BlockCache(tmp_path / "cache", 20_000, print)
    for number in range(200):
        expected = blocks.fetch(number)
        assert cache.read(blocks, number) == expected
        assert cache.read(blocks, number, 10, 13) == expected[10:13]
        assert cache.read(blocks, 0, 998) == bytes(2)  # used all the time: stays
        time.sleep(0.002)
        assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= 20_000
    assert blocks.asked.count(0) == 2 and len(blocks.asked) == 400
    other = BlockCache(tmp_path / "cache", 20_000, print)  # another process
    assert other.read(blocks, 199) == cache.read(blocks, 199) and len(blocks.asked) == 400


def test_a_damaged_block_is_fetched_again(tmp_path):
    blocks = Numbered()
    for damage in (lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b"", lambda b: bytes(1016)):
        BlockCache(tmp_path, 1e6, print).read(blocks, 7)
        (file,) = tmp_path.rglob("7")
        file.write_bytes(damage(file.read_bytes()))
        asked = len(blocks.asked)
        assert BlockCache(tmp_path, 1e6, print).read(blocks, 7) == b"\0\7" * 500
        assert len(blocks.asked) == asked + 1


def test_a_full_disk_costs_only_time(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "ROOM", 1 << 60)
    blocks, said = Numbered(), []
    cache = BlockCache(tmp_path, 1e6, said.append)
    cache.ahead(blocks, range(20))
    assert all(cache.read(blocks, n, 1, 2) == bytes([n % 256]) for n in [*range(20)] * 2)
    assert len(said) == 1 and "is not kept" in said[0] and not list(tmp_path.rglob("[0-9]*"))


def test_a_block_that_many_ask_for_is_fetched_once(tmp_path):
    blocks, cache = Numbered(), BlockCache(tmp_path, 1e6, print)
    cache.ahead(blocks, range(50))
    readers = [
        threading.Thread(target=lambda: [cache.read(blocks, n) for n in range(50)])
        for _ in range(8)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(blocks.asked) == [*range(50)]


def test_a_failure_reaches_all_who_wait(tmp_path):
    class Failing(Numbered):
        def fetch(self, number):
            raise UserError("place: gone; fix it")

    cache = BlockCache(tmp_path, 1e6, print)
    for _ in range(3):
        assert refusal(cache.read, Failing(), 3) == "place: gone; fix it"
    assert cache.read(Numbered(), 3) == b"\0\3" * 500


# Prepared data ------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch, s3):
    """A prepared folder of several shards here, and the same in the store."""
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200_000)
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), tokenizer="char", cache_dir=str(tmp_path / "cache")
    )
    prepare_part(config, tmp_path / "to", 1, 1, log=lambda line: None)
    here = tmp_path / "to"
    address = f"bucket/{tmp_path.name}"
    for file in here.rglob("*"):
        if file.is_file():
            s3.pipe_file(f"{address}/{file.relative_to(here)}", file.read_bytes())
    return here, DataConfig(path=f"s3://{address}", cache_dir=str(tmp_path / "other"))


def test_shards_are_read_as_they_are_here(prepared, s3):
    here, config = prepared
    mine, far = open_dataset(here), prepare(config, lambda line: None)
    assert (far.fingerprint, far.kind, far.name) == (mine.fingerprint, mine.kind, mine.name)
    assert far.tokenizer.fingerprint == mine.tokenizer.fingerprint and far.held_out == mine.held_out
    assert isinstance(far.train.ids, RemoteShards) and len(far.train.ids.paths) > 2
    assert not list(Path(config.cache_dir).glob("remote/*"))  # nothing has been read yet
    assert len(list(Path(config.cache_dir).glob("prepared-*"))) == 1
    for name in ("ids", "borders"):
        a, b = getattr(mine.train, name), getattr(far.train, name)
        assert len(a) == len(b) and (a[:] == b[:]).all() and a[-1] == b[-1] and a[7] == b[7]
        where = np.random.default_rng(0).integers(0, len(a), (5, 3))
        assert (a[where] == b[where]).all() and b[where].shape == (5, 3)
        assert (a[100:4000] == b[100:4000]).all() and len(b[5:5]) == 0
    made = []
    for data, depth in ((mine, 1), (far, 4)):
        prefetch = Prefetch(Batches(Examples(data.train, 64, 0), 16, 3), 2, depth=depth)
        made.append([batch.ids for step in (0, 1, 2, 3, 9, 10) for batch in prefetch(step)[0]])
        prefetch.close()
    assert all((a == b).all() for a, b in zip(*made, strict=True))
    verify(RemoteFolder(config.path, store_of(config, print)), lambda line: None)


def test_what_is_wrong_with_remote_shards(prepared, s3, tmp_path):
    here, config = prepared
    place = config.path.removeprefix("s3://")
    data = prepare(config, lambda line: None)
    name = data.train.ids.paths[1].name
    s3.pipe_file(f"{place}/1-of-1/{name}", b"x" * data.train.ids.paths[1].size)
    folder = RemoteFolder(config.path, store_of(config, print))
    again = f"prepare it again with python -m tools.prepare --to {config.path}, and try again"
    assert refusal(verify, folder, lambda line: None) == (
        f"{config.path}/1-of-1/{name}: damaged (its sha256 is not that of manifest.json); "
        f"remove it there, and {again}"
    )
    s3.pipe_file(f"{place}/1-of-1/{name}", b"xyz")
    size = data.train.ids.paths[1].size
    assert refusal(prepare, config) == (
        f"{config.path}/1-of-1/{name}: damaged (3 bytes instead of {size}); remove it there, and "
        f"{again}"
    )
    s3.rm(f"{place}/1-of-1/{name}")
    message = refusal(lambda: data.train.ids[:])
    assert message.startswith(f"{config.path}/1-of-1/{name}: there is no such file")
    for opening in (lambda: prepare(config), lambda: verify(folder)):
        message = refusal(opening)  # and not to remove what is kept here, which mends nothing
        assert message == f"{config.path}/1-of-1/{name}: is missing in the bucket; {again}"
    first = DataConfig(
        path=str(here.parent / "a.jsonl"), tokenizer="char", cache_dir=config.cache_dir
    )
    prepare_part(first, folder.mirror(), 1, 1, lambda line: None, there=folder)
    verify(folder)
    s3.pipe_file(f"{place}/manifest.json", b'{"splits": 1')
    assert "manifest.json is damaged" in refusal(prepare, config)
    s3.rm(f"{place}/manifest.json")
    wrong = DataConfig(path=config.path, cache_dir=str(tmp_path / "w"))
    assert "no manifest.json" in refusal(verify, RemoteFolder(wrong.path, store_of(wrong, print)))


def test_several_machines_prepare_into_the_store(tmp_path, monkeypatch, s3):
    """Part 2 waits for the tokenizer of part 1, each on a machine with a folder of its own."""
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 200_000)
    monkeypatch.setattr("data.prepared.parts.INTERVAL", 0.05)
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    whole = prepare(
        DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="char", cache_dir=str(tmp_path / "w")),
        lambda line: None,
    )
    address, ends = f"s3://bucket/{tmp_path.name}", {}

    def machine(part: int) -> None:
        config = DataConfig(
            path=str(tmp_path / "a.jsonl"), tokenizer="char", cache_dir=str(tmp_path / str(part))
        )
        there = RemoteFolder(address, store_of(config, print))
        quiet = lambda line: None  # noqa: E731
        ends[part] = prepare_part(config, there.mirror(), part, 2, quiet, there=there)

    second = threading.Thread(target=machine, args=(2,))
    second.start()
    machine(1)
    second.join()
    assert sorted(ends.values()) in ([False, True], [True, True])
    data = prepare(DataConfig(path=address, cache_dir=str(tmp_path / "x")), lambda line: None)
    assert data.fingerprint == whole.fingerprint
    assert (data.train.ids[:] == whole.train.ids[:]).all()
    assert (data.val.borders[:] == whole.val.borders[:]).all()
    assert not list(tmp_path.glob("[12]/to-*/*/*.ids"))  # moved, not copied
    machine(1)  # nothing to do
    assert ends[1]
    lost = next(name for name in s3.find(address) if name.endswith("1-of-2/train-00000.ids"))
    s3.rm(lost)
    machine(1)
    assert s3.exists(lost) and (data.train.ids[:] == whole.train.ids[:]).all()


def test_a_run_whose_data_does_not_come_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.setattr(remote_shards, "WHOLE_BLOCK", 1 << 10)
    (tmp_path / "a.jsonl").write_bytes(b"".join(JSONL.splitlines(True)[:250]))
    here = tmp_path / "to"
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), tokenizer="char", cache_dir=str(tmp_path / "here")
    )
    prepare_part(config, here, 1, 1, log=lambda line: None)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", "--runs_dir", str(tmp_path / "runs"), *flags])
        return train.main()

    with serving() as web:
        for file in here.rglob("*"):
            if file.is_file():
                web.files[f"/p/{file.relative_to(here)}"] = file.read_bytes()
        write_config(tmp_path, text=TINY.replace("path = {path!r}", f'path = "{web.address}/p"'))
        settings = "--config", str(tmp_path / "tiny.toml"), "--max_steps", "20"
        assert run(*settings, "--name", "whole") == 0
        shutil.rmtree(tmp_path / "cache")
        web.faults += [""] * 60 + ["404"] * 10_000
        assert "ids: there is no such file" in refusal(run, *settings, "--name", "cut")
        (*_, last) = list_steps(tmp_path / "runs" / "cut")
        assert 0 < step_of(last) < 20 and f"saved {last}" in capsys.readouterr().out
        web.faults.clear()
        assert run("--resume", str(tmp_path / "runs" / "cut")) == 0
    assert losses(tmp_path / "runs" / "cut") == losses(tmp_path / "runs" / "whole")
