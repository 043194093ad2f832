"""Sources by name: what the standard library gives, and downloads that go wrong."""

import hashlib
import http.server
import json
import sys
import threading
import warnings

import pytest

from common.errors import UserError
from data.config import SOURCES, DataConfig
from data.sources import __main__ as command
from data.sources import builtin
from data.sources.builtin import Download, download
from data.sources.source import open_source
from tests.data.sources.test_readers import refusal

# The standard library -----------------------------------------------------------------------------


def test_stdlib_of_this_python(tmp_path):
    reports = []
    config = DataConfig()
    source = open_source(config, reports.append, tmp_path)
    pairs = list(source.train())
    assert source.kind == "pairs" and 4000 < len(pairs) == len(set(pairs))
    wanted = "Set the logging level of this handler. level must be an int or a str."
    assert (wanted, "def setLevel(self, level):") in pairs
    assert all(0 < len(prompt) <= 160 and "  " not in prompt for prompt, _ in pairs)
    assert all(name.endswith(":") and "\n" not in name for _, name in pairs)
    assert any("extracting" in line for line in reports)

    reports.clear()  # the second time comes from the cache
    assert open_source(config, reports.append, tmp_path).fingerprint == source.fingerprint
    assert not any("extracting" in line for line in reports)


def test_stdlib_words_of_this_python(tmp_path):
    source = open_source(DataConfig(source="stdlib_words"), lambda line: None, tmp_path)
    words = list(source.train())
    assert source.kind == "lines" and 12_000 < len(words) and words == sorted(set(words))
    assert {"the", "return", "self"} <= set(words)
    assert all(word.isascii() and word.islower() and 2 <= len(word) <= 15 for word in words)


def test_signatures():
    text = '''
class A:
    @property
    def second(self, a: int = 1, *, b="\\n", **c) -> str:
        """First   line
        goes on.

        Not this."""
        async def inner():
            "In\\\\side."
    def undocumented(self): pass
    def empty(self): "  "
    def long(self): "%s"
    def half(self): "\\ud800"
def twice(): "Same."
def twice(): "Same."
''' % " ".join(["word"] * 50)  # noqa: UP031, braces abound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = builtin._signatures([text, "not Python (", 'def f(): "\\d."', "\0"])
    pairs = [tuple(json.loads(line).values()) for line in lines]
    assert pairs == [
        ("First line goes on.", "def second(self, a: int=1, *, b='\\n', **c) -> str:"),
        ("In\\side.", "async def inner():"),
        (" ".join(["word"] * 32), "def long(self):"),
        ("Same.", "def twice():"),
        ("\\d.", "def f():"),
    ]


def test_words():
    text = "One word, two_words a x86 caféolé CamelCase " + "b" * 15 + " " + "c" * 16
    assert builtin._words([text, "two"]) == ["b" * 15, "two", "word", "words"]


def test_what_is_left_out(tmp_path, monkeypatch):
    kept = ["a", "b/c", "b/c/d", "e/f", "e/g", "h/i", "j/k", "l/m"]  # in order
    left_out = ["test/n", "b/tests/o", "site-packages/p", "e/_vendor/q/r"]
    for name in [f"{stem}.py" for stem in reversed(kept + left_out)] + ["s.txt"]:
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.stem)
    assert list(builtin._python_files(tmp_path / "lib")) == [stem[-1:].encode() for stem in kept]
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    config = DataConfig()
    assert "data.path" in refusal(open_source, config, lambda line: None, tmp_path / "cache")


def test_interrupted_extraction_leaves_nothing(tmp_path):
    def lines():
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin._publish(tmp_path / "words.txt", lines())
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(source="stdlib_words")
    message = refusal(open_source, config, lambda line: None, tmp_path / "file")
    assert "data.cache_dir" in message


# Downloads ----------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 800
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT: /range can go on, /plain cannot; the other paths misbehave."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        getattr(self, f"serve_{self.path[1:]}")()

    def reply(self, status, content, length=None, **headers):
        self.send_response(status)
        if length != 0:
            self.send_header("Content-Length", str(length or len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def serve_range(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(CONTENT):
            self.reply(416, b"")
        else:
            whole = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
            self.reply(206 if start else 200, CONTENT[start:], Content_Range=whole)

    def serve_plain(self):
        self.reply(200, CONTENT)

    def serve_cut(self):
        self.reply(200, CONTENT[:100_000], length=len(CONTENT))

    def serve_wrong(self):
        self.reply(200, b"something else")

    def serve_large(self):
        self.reply(200, CONTENT + b"x")

    def serve_endless(self):
        self.reply(200, b"", length=0)  # says nothing of its length
        try:
            for _ in range(200):
                self.wfile.write(CONTENT)
            self.server.ranges.append("all sent")
        except OSError:
            pass  # hung up: well done

    def serve_stalled(self):
        self.reply(200, CONTENT[:1000], length=len(CONTENT))
        self.server.closing.wait(10)

    def serve_missing(self):
        self.reply(404, b"")

    def serve_moved(self):
        self.reply(302, b"", Location=f"http://127.0.0.1:{self.server.server_port}/range")

    def serve_http(self):
        self.reply(302, b"", Location=f"http://localhost:{self.server.server_port}/range")

    def serve_disk(self):
        self.reply(302, b"", Location="file:///etc/hosts")

    def serve_broken(self):
        self.reply(302, b"", Location="https://[")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.ranges, server.closing = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def get(server, page, path, sha256=SHA256, timeout=5.0):
    url = f"http://127.0.0.1:{server.server_port}/{page}"
    download(url, path, sha256, len(CONTENT), timeout, allow_local_http=True)


@pytest.mark.parametrize("page", ["range", "plain", "moved"])
def test_download(server, tmp_path, page):
    path = tmp_path / "downloads" / "file"
    get(server, page, path)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("wrong", "sha256"),
        ("cut", "cut off after 100000 of 204800"),
        ("large", "larger than"),
        ("endless", "larger than"),
        ("stalled", "timed out"),
        ("missing", "404"),
        ("http", "not https"),
        ("disk", "file:"),
        ("broken", "URL"),
    ],
)
def test_failed_download_keeps_the_old_file(server, tmp_path, page, expected):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    message = refusal(get, server, page, path, timeout=0.3)
    assert expected in message and f"/{page}: " in message
    assert f"by hand to {path}" in message and "--data.path" in message
    assert path.read_bytes() == b"old"
    assert "all sent" not in server.ranges
    # what can be continued is kept, what is wrong is not
    kept = {"cut": 100_000, "stalled": 1000}.get(page)
    part = tmp_path / "file.part"
    assert (part.stat().st_size if part.exists() else None) == kept


@pytest.mark.parametrize("page", ["range", "plain"])
@pytest.mark.parametrize("have", [100_000, len(CONTENT)])
def test_interrupted_download_goes_on(server, tmp_path, page, have):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    get(server, page, path)
    assert server.ranges == [f"bytes={have}-"]
    assert path.read_bytes() == CONTENT
    assert not (tmp_path / "file.part").exists()


def test_damaged_part_is_given_up(server, tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"damaged")
    assert "sha256" in refusal(get, server, "range", path)
    get(server, "range", path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://127.0.0.1/x", "ftp://host/x", "file:///etc/hosts"])
def test_https_only(tmp_path, url):
    assert "not https" in refusal(download, url, tmp_path / "file", SHA256, 1000)


def test_unreachable_server(tmp_path):
    url = "https://127.0.0.1:1/file"  # nothing listens on port 1
    assert url in refusal(download, url, tmp_path / "file", SHA256, 1000, timeout=2.0)


def test_named_download(tmp_path, monkeypatch):
    asked = []

    def fake(url, path, sha256, max_bytes):
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"anna\nbob\n")

    right = hashlib.sha256(b"anna\nbob\n").hexdigest()
    monkeypatch.setattr(builtin, "download", fake)
    monkeypatch.setitem(builtin.DOWNLOADS, "names", (Download("https://x/y", "n.txt", right, 99),))
    for _ in range(2):
        source = open_source(DataConfig(source="names"), lambda line: None, tmp_path)
        assert source.kind == "lines" and list(source.train()) == ["anna", "bob"]
    assert asked == ["https://x/y"]  # once
    (tmp_path / "downloads" / "n.txt").write_bytes(b"damaged")
    open_source(DataConfig(source="names"), lambda line: None, tmp_path)
    assert len(asked) == 2


def test_the_split_of_the_paper(tmp_path, monkeypatch):
    """With the sizes that the paper gives, each line where the authors' scripts put it."""
    files = []
    for ending in ("nl", "cm"):
        file = tmp_path / "downloads" / f"nl2bash.{ending}"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{ending} {i} \n" for i in range(12_607)))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        files.append(Download("https://x/y", file.name, digest, 1 << 20))
    monkeypatch.setitem(builtin.DOWNLOADS, "nl2bash", tuple(files))
    source = open_source(DataConfig(source="nl2bash_paper"), lambda line: None, tmp_path)
    sides = [list(source.train()), list(source.val())]
    test = DataConfig(path=str(tmp_path / "nl2bash_paper" / "test.nl"))
    sides.append(list(open_source(test, lambda line: None, tmp_path).train()))
    assert [len(side) for side in sides] == [8090, 609, 606]
    assert len({pair for side in sides for pair in side}) == 8090 + 609 + 606
    assert all(nl.split()[1] == cm.split()[1] for side in sides for nl, cm in side)
    assert sides[2][0] == ("nl 4", "cm 4")  # as their scripts have it


def test_table_of_downloads():
    for downloads in builtin.DOWNLOADS.values():
        for url, file, sha256, _ in downloads:
            assert url.startswith("https://") and len(bytes.fromhex(sha256)) == 32
            assert "/" not in file
    assert tuple(builtin.NAMED) == SOURCES


# Command line -------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sources", *arguments])
        return command.main()

    assert call("list") == 0
    assert "tinyshakespeare" in capsys.readouterr().out
    monkeypatch.setattr(command, "DEFAULT_CACHE_DIR", tmp_path)
    dead = Download("http://127.0.0.1/x", "n.txt", "00" * 32, 99)
    monkeypatch.setitem(builtin.DOWNLOADS, "names", (dead,))
    with pytest.raises(UserError, match="not https"):
        call("fetch", "names")
    with pytest.raises(UserError, match="nmes"):
        call("fetch", "nmes")
