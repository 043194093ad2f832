"""Downloads that go wrong: the old file stays, and an interrupted one goes on."""

import contextlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.data.sources.test_builtin import CONTENT, SHA256, Handler
from tests.faults.campaign import Tally, campaign, one_line
from tests.helpers import ROOT

TIMEOUT = 0.5  # seconds a server may be silent
CLIENT = f"""
import sys
from pathlib import Path
from data.sources.builtin import download
from common import cli
url, path = sys.argv[1:]
to = Path(path), {SHA256!r}, {len(CONTENT)}, {TIMEOUT}, True
sys.exit(cli.run("download", lambda: download(url, *to)))
"""
GOOD = ["range", "plain", "moved", "slow"]
BAD = [
    "wrong", "cut", "large", "endless", "stalled", "missing", "http", "disk", "broken", "loop",
    "shorter", "negative", "letters", "huge", "garbage", "silent", "reset", "elsewhere", "headers",
]  # fmt: skip


class Server(Handler):
    """More ways to misbehave, those of a proxy among them."""

    def serve_slow(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        whole = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("Content-Range", whole)
        self.end_headers()
        with contextlib.suppress(OSError):  # killed meanwhile
            for place in range(start, len(CONTENT), 4096):
                self.wfile.write(CONTENT[place : place + 4096])
                time.sleep(0.01)

    def serve_loop(self):
        self.reply(302, b"", Location=self.path)

    def serve_shorter(self):
        self.reply(200, CONTENT, length=1000)

    def serve_negative(self):
        self.reply(200, b"something", length=-5)

    def serve_letters(self):
        self.reply(200, b"something", length="many")

    def serve_huge(self):
        self.reply(200, b"something", length=10**30)

    def serve_garbage(self):
        self.wfile.write(bytes(range(256)) * 9)

    def serve_silent(self):
        self.server.closing.wait(10)

    def serve_reset(self):
        self.reply(200, CONTENT[:5000], length=len(CONTENT))
        self.connection.close()

    def serve_elsewhere(self):
        self.reply(206, b"something", Content_Range="bytes 7-15/16")

    def serve_headers(self):
        self.send_response(200)
        for number in range(1000):
            self.send_header(f"X-{number}", "x" * 100)
        with contextlib.suppress(OSError):
            self.end_headers()

    def do_CONNECT(self):
        getattr(self, f"serve_{self.server.as_proxy}")()

    def handle(self):
        with contextlib.suppress(OSError, ValueError):  # the client has hung up
            super().handle()


@contextlib.contextmanager
def served():
    """The server, on a port of its own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.ranges, server.closing = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


@campaign("downloads", "20", "downloads cut, stalled, moved, wrong or killed", "downloads", 300, 10)
def downloads(tally: Tally, count: int, folder: Path, dice):
    """Each fails as it should, harms nothing, and is brought to its end by the next."""
    path = folder / "cache" / "file"
    (folder / "cache").mkdir()
    pages = [*GOOD, *BAD, *["killed"] * 8]
    dice.shuffle(pages)
    with served() as server:
        for number in range(count):
            if number % 10 == 9:
                through_proxy(tally, server, folder, dice.choice(["missing", "garbage", "wrong"]))
                continue
            old = dice.choice([None, b"old", CONTENT])
            page, cut = (
                pages[(number - number // 10) % len(pages)],
                CONTENT[: dice.randrange(len(CONTENT))],
            )
            wrong = [] if page == "killed" else [b"wrong", CONTENT + b"x"]
            part = dice.choice([None, cut, cut, *wrong])
            for file, content in ((path, old), (part_of(path), part)):
                file.unlink(missing_ok=True)
                if content is not None:
                    file.write_bytes(content)
            what = f"{page} after {str(old)[:6]}, part {str(part)[:9]}"
            tally.tried += 1
            if page == "killed":
                killed(tally, server, path, dice)
            else:
                result = get(server, page, path)
                judge(tally, result, page, path, old, part, what)
            goes_on(tally, server, path, what)
            left = {file.name for at in (folder, path.parent) for file in at.iterdir()}
            if left - {"code"} != {"cache", "file"}:
                tally.undetected.append(f"{what}: left {left}")


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def client(server, page: str, path: Path) -> tuple[list[str], dict]:
    """The command of a download, and its surroundings."""
    url = f"http://127.0.0.1:{server.server_port}/{page}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return [sys.executable, "-c", CLIENT, url, str(path)], {"env": environment, "cwd": path.parent}


def get(server, page: str, path: Path) -> subprocess.CompletedProcess:
    """A download to its end, or until it hangs."""
    arguments, more = client(server, page, path)
    try:
        return subprocess.run(arguments, **more, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, "of a hang", "", "")


def judge(tally: Tally, result, page: str, path: Path, old, part, what: str):
    """The file is there, or the download is refused and what was there before still is."""
    now = path.read_bytes() if path.exists() else None
    if result.returncode == 0 and now == CONTENT:
        return
    tally.counts["refused"] += 1
    if wrong := one_line(result):
        tally.undetected.append(f"{what}: {wrong[-300:]}")
    if now != old:
        tally.lost.append(f"{what}: the old file is {str(now)[:20]}")
    if page in GOOD and (part is None or CONTENT.startswith(part)):
        tally.lost.append(f"{what}: {result.stderr}")


def killed(tally: Tally, server, path: Path, dice):
    """SIGKILL at a random instant of a download."""
    before, had = path.read_bytes() if path.exists() else None, size_of(part_of(path))
    arguments, more = client(server, "slow", path)
    process = subprocess.Popen(arguments, **more, stderr=subprocess.DEVNULL)
    time.sleep(0.1 + 0.6 * dice.random())
    process.kill()
    process.wait()
    tally.counts["killed"] += 1
    tally.counts["killed inside a transfer"] += size_of(part_of(path)) not in (0, had)
    if (path.read_bytes() if path.exists() else None) not in (before, CONTENT):
        tally.lost.append("killed: the old file is changed")


def goes_on(tally: Tally, server, path: Path, what: str):
    """The next download goes on where the last one stopped; two, if what it had was wrong."""
    part = part_of(path).read_bytes() if part_of(path).exists() else b""
    server.ranges.clear()
    result = get(server, "range", path)
    asked = server.ranges[:1]
    if part and asked != [f"bytes={len(part)}-"]:
        tally.lost.append(f"{what}: not gone on with: {asked}")
    if part and result.returncode and not CONTENT.startswith(part):
        result = get(server, "range", path)
    if result.returncode or path.read_bytes() != CONTENT:
        tally.lost.append(f"{what}: the next download fails: {result.stderr[-300:]}")


def through_proxy(tally: Tally, server, folder: Path, page: str):
    """The program itself, in a copy of the code, behind a proxy that answers wrongly."""
    code, tally.tried = folder / "code", tally.tried + 1
    for folder in ("common", "data"):
        shutil.copytree(
            ROOT / folder, code / folder, ignore=shutil.ignore_patterns("cache"), dirs_exist_ok=True
        )
    old = code / "data" / "cache" / "downloads" / "names.txt"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text("old")
    proxy = {
        "https_proxy": f"http://127.0.0.1:{server.server_port}",
        "no_proxy": "",
        "NO_PROXY": "",
    }
    server.as_proxy = page
    result = subprocess.run(
        [sys.executable, "-m", "data.sources", "fetch", "names"], cwd=code, capture_output=True,
        env={**os.environ, "PYTHONPATH": "", **proxy}, text=True, timeout=60,
    )  # fmt: skip
    tally.counts["by data.sources, behind a bad proxy"] += 1
    if wrong := one_line(result):
        tally.undetected.append(f"data.sources fetch, proxy {page}: {wrong[-300:]}")
    if old.read_text() != "old" or len(list(old.parent.iterdir())) > 1:
        tally.lost.append(f"data.sources fetch, proxy {page}: {list(old.parent.iterdir())}")
