"""Make the pictures of the server's page in docs/: light, dark and on a phone.

    python tools/make_page_pictures.py model_cards/msa-hf-tiny docs

Encodes an invented world, serves it, and asks a question that takes two documents, in a headless Chromium. Needs
selenium, chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.generation import PromptProtocol
from msa_hf.synthetic.corpora import make_corpus

QUESTION = "What is the mother tongue of the person who made the Dintotust Astrolabe?"
# Name -> section, width, height, dark
PICTURES = {
    "serving_light": ("ask", 940, 1240, False),
    "serving_dark": ("ask", 940, 1240, True),
    "serving_phone": ("ask", 390, 1180, False),
    "serving_documents": ("documents", 940, 700, False),
}
COLORS = 96


def take(browser: Any, url: str, section: str, width: int, height: int, dark: bool) -> Image.Image:
    """A picture of a section."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get("about:blank")
    browser.get(f"{url}#{section}")
    wait = WebDriverWait(browser, 120)
    wait.until(lambda page: page.execute_script("return document.documentElement.dataset.ready"))
    if section == "ask":
        browser.find_element(By.ID, "question").send_keys(f"{QUESTION}\n")
        wait.until(lambda page: page.find_element(By.ID, "facts").text)
    wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, f"#{section} li"))
    return Image.open(io.BytesIO(browser.get_screenshot_as_png()))


def main(arguments: list[str] | None = None) -> int:
    """Make them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="model_cards/msa-hf-tiny")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    tokenizer, protocol = AutoTokenizer.from_pretrained(args.model), PromptProtocol.from_pretrained(args.model)
    model = MSAForCausalLM.from_pretrained(args.model).eval()
    corpus = make_corpus(300, seed=7, split="test")
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    with tempfile.TemporaryDirectory() as bank:
        with BankStore(model, bank, tokenizer, protocol) as store:
            pairs = zip(corpus.names(), corpus.texts(), strict=True)
            store.add([{"key": name, "text": text} for name, text in pairs])
        code = "import sys; from msa_hf.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", args.model, bank, "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stderr is not None
                url = next(line for line in server.stderr if "documents at" in line).split()[-1]
                browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
                try:
                    for name, picture in PICTURES.items():
                        image = take(browser, url, *picture).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
                        image.save(args.folder / f"{name}.png", optimize=True)
                finally:
                    browser.quit()
            finally:
                server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
