"""Take the pictures of docs/inspection.md of the report of a model and a plan, with the system's Chromium.

    python docs/screenshots.py --plan demo/plan       writes docs/pictures/*.png

Each picture holds a hash of the files that the page is made of: a test fails if these have changed since.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import click
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FOLDER = Path(__file__).resolve().parent / "pictures"
PAGE_SOURCES = Path(__file__).resolve().parents[1] / "fhopt" / "inspection"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SITE = 3  # a layer of the model
PHONE = (390, 844)
SHOTS = {
    "overview": ("#overview", 920),
    "site": (f"#site-{SITE}", 1020),
    "spectrum": (f"#site-{SITE} .chart", 600),
    "kernel": (f"#site-{SITE} pre.code", 640),
}  # picture: what it shows, and its height
COLORS = 256


def ui_hash() -> str:
    """Return the hash of what the page looks like: its templates, charts and drawings."""
    files = sorted([*(PAGE_SOURCES / "templates").iterdir(), PAGE_SOURCES / "charts.py", PAGE_SOURCES / "drawing.py"])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def save(picture: Image.Image, path: Path) -> None:
    """Save a picture with few colors and the hash of the page."""
    about = PngInfo()
    about.add_text("Source", ui_hash())
    picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=about)


def take(page: Any, place: str, size: tuple[int, int]) -> Image.Image:
    """Show a place of the page below its header, and return the picture."""
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.locator(place).first.wait_for()
    page.evaluate(
        "place => { const top = document.querySelector(place).getBoundingClientRect().top;"
        " window.scrollBy({top: top - document.querySelector('header').offsetHeight - 60, behavior: 'instant'}) }",
        place,
    )
    page.wait_for_timeout(500)  # charts are drawn when they come into view
    return Image.open(BytesIO(page.screenshot()))


def on_a_phone(page: Any) -> Image.Image:
    """Return three places of the page side by side, as wide as on a phone."""
    places = ("#overview", f"#site-{SITE}", "#bits")
    parts = [take(page, place, PHONE) for place in places]
    gap = 10
    whole = Image.new("RGB", (len(parts) * (PHONE[0] + gap) - gap, PHONE[1]), "#d4d4d8")
    for index, part in enumerate(parts):
        whole.paste(part, (index * (PHONE[0] + gap), 0))
    return whole


def screenshots(report: Path, folder: Path) -> None:
    """Write all pictures of a report file."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.locator(f"#site-{SITE} > summary").click()
        page.locator(f"#site-{SITE} pre.code span").first.wait_for()
        for name, (place, height) in SHOTS.items():
            save(take(page, place, (1100, height)), folder / f"{name}.png")
        save(on_a_phone(page), folder / "phone.png")
        browser.close()


@click.command()
@click.option("--model", default="demo", show_default=True, help="Model of the plan, as in `fhopt report`.")
@click.option("--plan", type=click.Path(exists=True, path_type=Path), required=True, help="Fitted plan.")
def main(model: str, plan: Path) -> None:
    """Write the pictures of the report of a plan."""
    from fhopt.cli.app import main as fhopt_command

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        fhopt_command(["report", model, "--plan", str(plan), "-o", str(report)], standalone_mode=False)
        screenshots(report, FOLDER)


if __name__ == "__main__":
    main()
