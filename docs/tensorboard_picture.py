"""Makes docs/tensorboard.png: TensorBoard in a headless Chromium, three of its cards side by side.

    python train.py --name default
    apt-get install chromium chromium-driver && pip install selenium pillow
    python docs/tensorboard_picture.py runs/default

The picture is 1,800 pixels wide, so that at the width of a page its text has its natural size.
"""

import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

OUTPUT = Path(__file__).parent / "tensorboard.png"
SCALE, GAP = 2, 12  # pixels of the picture for one of the page; of the page, between two cards
SAMPLES_HEIGHT = 300  # of the card with texts, of which the newest stands on top
CHART = "tf-custom-scalar-multi-line-chart-card"
EXPAND = "[...all(card.shadowRoot || card)].find(e => e.matches('paper-icon-button')).click()"
# every element of the page, those inside shadow roots too
FIND = """
function* all(root) {
  for (const element of root.querySelectorAll('*')) {
    yield element;
    if (element.shadowRoot) yield* all(element.shadowRoot);
  }
}
const found = [...all(document)].filter(element => element.matches(arguments[0]));
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds: float = 60):
    """Waits for condition() to be true, and returns what it gave."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.3)
    return found


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(address, timeout=2):  # noqa: S310, our own TensorBoard
            return True
    except OSError:
        return False


def card(
    driver, address: str, tab: str, selector: str, width: int, tag: str = "", change: str = ""
) -> Image.Image:
    """A picture of the first element that matches and has this tag, in a window `width` wide.

    change: JavaScript that is run on it first.
    """
    driver.set_window_size(width, 1400)
    driver.get("about:blank")
    driver.get(f"{address}/#{tab}")
    wait_until(lambda: driver.execute_script(FIND + "return found.length", selector))
    time.sleep(4)  # curves are drawn and images loaded after their cards are there
    driver.execute_script(
        FIND + f"const card = found.find(e => String(e.tag).includes('{tag}')); {change};"
        "window.card = card",
        selector,
    )
    time.sleep(3)
    place = driver.execute_script(
        "window.card.scrollIntoView({block: 'center'});"
        "const r = window.card.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]"
    )
    time.sleep(1)
    whole = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    left, top, right, bottom = (round(SCALE * edge) for edge in place)
    return whole.crop((left, top, right, bottom))


def composed(left: Image.Image, right: Image.Image, below: Image.Image) -> Image.Image:
    """Two pictures side by side, one below them, on white."""
    gap = SCALE * GAP
    width = left.width + gap + right.width
    top = max(left.height, right.height)
    page = Image.new("RGB", (width, top + gap + below.height), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + gap, 0))
    page.paste(below.crop((0, 0, min(width, below.width), below.height)), (0, top + gap))
    return page


def main(run: Path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603, our own program
    options = Options()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", f"--force-device-scale-factor={SCALE}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        wait_until(lambda: answers(address))
        curves = card(driver, address, "custom_scalars", CHART, 830, change=EXPAND)
        maps = card(driver, address, "images", "tf-image-loader", 1200)
        samples = card(driver, address, "text", "tf-text-loader", 1200, "samples")
        samples = samples.crop((0, 0, samples.width, SCALE * SAMPLES_HEIGHT))
        composed(curves, maps, samples).save(OUTPUT, optimize=True)
    finally:
        driver.quit()
        server.terminate()
    print(f"{OUTPUT}: {Image.open(OUTPUT).size}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
