"""The page in a real browser: by keyboard, on a phone, in the dark, and with documents that mean harm."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chromium import chromium
from served import Served, serving

import msa_hf.serving
from msa_hf.serving.keys import ApiKey

FILES = Path(msa_hf.serving.__file__).parent / "page"
HARM = "<img src=x onerror='window.harmed=1'>"
HOSTILE = {
    f"{HARM}</button><script>window.harmed=1</script>": f"{HARM}<script>window.harmed=1</script><svg/onload=harmed=1>",
    "javascript:window.harmed=1": "</textarea></p></li><iframe srcdoc='<script>parent.harmed=1</script>'></iframe>",
    "' onclick='window.harmed=1": "{{constructor.constructor('window.harmed=1')()}} ${window.harmed=1} &lt;b&gt;",
    "\u202egnp.exe\u0000\u0007": "reef \u202e reversed " + "\u0301" * 50 + " https://example.com/" + "a" * 400,
    "..": "The reef has a key that no path can hold.",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("page") / "bank") as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(own: Served, browser: Any) -> Iterator["Page"]:
    made = Page(browser, own)
    made.show(1000, 900)
    made.open()
    yield made
    made.show(1000, 900)
    errors = [item for item in browser.get_log("browser") if "favicon" not in item["message"]]
    expected = ("409", "401")
    assert [item for item in errors if not any(status in item["message"] for status in expected)] == []


class Page:
    """The page as somebody uses it."""

    def __init__(self, browser: Any, served: Served) -> None:
        self.browser, self.served = browser, served

    def show(self, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, section: str = "ask", url: str = "") -> None:
        self.browser.get("about:blank")
        self.browser.get(f"{url or self.served.url}#{section}")
        self.wait(lambda: self.run("return document.documentElement.dataset.ready"))

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait(self, holds: Callable[[], Any]) -> Any:
        found: list[Any] = []

        def look() -> bool:
            found[:] = [holds()]
            return bool(found[0])

        self.served.wait_for(look)
        return found[0]

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys: str) -> Any:
        """Type into whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)
        return self.browser.switch_to.active_element

    def ask(self, question: str) -> None:
        self.one("#question").clear()
        self.one("#question").send_keys(question + "\n")
        self.wait(lambda: self.text("#facts") or self.text("#problem"))


def test_a_question_is_answered_with_its_sources_and_its_trace(page: Page) -> None:
    assert page.run("return document.activeElement.id") == "question"
    page.press("How many miles?", "\n")
    page.wait(lambda: page.text("#facts"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "How many miles?"}]}
    answer = page.served.client().post("/v1/chat/completions", json=body).json()
    expected = answer["choices"][0]["message"]["content"] or "(no answer)"
    assert page.text("#answer") == expected and page.text("#asked") == "How many miles?"
    assert [item.text for item in page.all("#sources button")] == [item["key"] for item in answer["sources"]]
    marked = [part["text"] for item in answer["sources"] for part in item["passage"] if part["marked"]]
    assert [item.text for item in page.all("#sources mark")] == marked != []
    figures = page.all("#trace figure")
    assert figures and page.all("#trace svg[role=img][aria-label]")
    assert page.run("return document.querySelectorAll('#trace svg circle').length") >= 8
    assert page.run("return document.querySelectorAll('#trace .read circle').length") >= 1
    figures[0].find_element("css selector", "summary").click()
    assert page.all("#trace table td")


def test_an_answer_is_shown_as_it_is_written_and_can_be_stopped(page: Page) -> None:
    import threading

    steps, go = [0], threading.Event()

    def slow(module: Any, arguments: Any) -> None:
        steps[0] += 1
        if steps[0] > 6:
            go.wait(20)

    hook = page.served.service.model.register_forward_pre_hook(slow)
    try:
        page.one("#question").send_keys("Where is the pine?\n")
        page.wait(lambda: page.text("#answer"))
        assert page.one("#answer").get_attribute("aria-busy") == "true"
        page.one("#stop-button").click()
        page.wait(lambda: page.text("#facts") == "Stopped.")
        page.served.wait_for(lambda: page.served.application.load.running == 0)
    finally:
        go.set()
        hook.remove()
    page.ask("Where is the reef?")
    assert "tokens read" in page.text("#facts")


def test_documents_come_change_and_go_by_the_keyboard(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open("documents")
    total = page.wait(lambda: page.text("#list-state"))
    assert total.endswith("of 18")
    page.one("#add-button").send_keys(Keys.ENTER)
    page.press("towers/new", Keys.TAB)
    page.press("The new tower stands by the sea.", Keys.TAB)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text("#list-state").endswith("of 19"))
    assert page.served.service.store.get("towers/new").text == "The new tower stands by the sea."
    page.one("#query").send_keys("new tower by the sea\n")
    page.wait(lambda: "found" in page.text("#list-state"))
    keys = [item.text for item in page.all("#list button")]
    page.all("#list button")[keys.index("towers/new")].send_keys(Keys.ENTER)
    page.wait(lambda: page.one("#document-text").get_attribute("value"))

    # Somebody else is faster: nothing of theirs is lost.
    client = page.served.client()
    assert client.put("/v1/documents/towers%2Fnew", json={"text": "Another text."}).status_code == 200
    page.one("#document-text").send_keys(" It is mine.")
    page.one("#document-save").click()
    assert "version 2" in page.wait(lambda: page.text("#document-problem"))
    assert client.get("/v1/documents/towers%2Fnew").json()["text"] == "Another text."
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.run("return document.getElementById('document').open"))
    assert page.run("return document.activeElement.textContent") == "towers/new"

    page.press(Keys.ENTER)
    page.wait(lambda: "Another" in page.one("#document-text").get_attribute("value"))
    page.one("#document-delete").send_keys(Keys.ENTER)
    assert page.served.service.store.get("towers/new") is not None  # asks once more
    page.one("#document-delete").send_keys(Keys.ENTER)
    page.wait(lambda: not page.run("return document.getElementById('document').open"))
    assert client.get("/v1/documents/towers%2Fnew").status_code == 404


def test_documents_that_mean_harm_are_text(page: Page) -> None:
    client = page.served.client()
    for key, text in HOSTILE.items():
        assert client.post("/v1/documents", json={"key": key, "text": text}).status_code == 201
    page.open("documents")
    page.wait(lambda: page.text("#list-state"))
    shown = {item.get_attribute("textContent") for item in page.all("#list button")}
    page.one("#next").click()
    page.wait(lambda: page.text("#list-state").startswith("21"))
    shown |= {item.get_attribute("textContent") for item in page.all("#list button")}
    assert set(HOSTILE) <= shown
    for key, text in HOSTILE.items():
        page.open("documents")
        page.one("#query").send_keys("reef\n")
        page.wait(lambda: "found" in page.text("#list-state"))
        page.run(
            "for (const b of document.querySelectorAll('#list button')) if (b.textContent === arguments[0]) b.click()",
            key,
        )
        page.wait(lambda text=text: page.one("#document-text").get_attribute("value") == text)
    page.open()
    page.ask(f"{HARM} reef <script>window.harmed=1</script>")
    assert HARM in page.text("#asked")
    page.wait(lambda: page.text("#facts"))
    assert page.run("return window.harmed === undefined")
    assert page.run("return document.querySelectorAll('main img, main iframe, main script, dialog img').length") == 0
    for key in HOSTILE:
        client.delete("/v1/documents", params={"key": key})


def test_nothing_else_can_run_or_be_loaded(page: Page) -> None:
    page.ask("Where is the reef?")
    loaded = page.run("return performance.getEntriesByType('resource').map((item) => item.name)")
    assert loaded and all(name.startswith(page.served.url) for name in loaded)
    page.run(
        "const s = document.createElement('script');"
        "try { s.textContent = 'window.harmed = 1'; document.body.append(s); } catch (error) { window.refused = 1; }"
        "try { document.body.innerHTML = '<b>x</b>'; } catch (error) { window.refused = 2; }"
    )
    assert page.run("return [window.harmed ?? null, window.refused]") == [None, 2]
    page.browser.get_log("browser")  # says so


NAMES = """
const named = (item) => item.getAttribute('aria-label') || (item.labels?.[0] ?? item).textContent.trim();
return [...document.querySelectorAll('input, textarea, button, a, summary, select')]
  .filter((item) => !named(item)).map((item) => item.outerHTML)"""
CONTRAST = r"""
const parse = (color) => color.match(/[\d.]+/g).map(Number);
const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (item) => {
  for (; item; item = item.parentElement) {
    const color = parse(getComputedStyle(item).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const poor = [];
for (const item of document.querySelectorAll('body *')) {
  const own = [...item.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !item.checkVisibility() || item.disabled) continue;
  const style = getComputedStyle(item);
  const front = item instanceof SVGElement ? style.fill : style.color;
  const [one, two] = [light(parse(front)), light(behind(item))];
  const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  if (ratio < 4.5) poor.push([item.tagName, item.textContent.trim().slice(0, 30), ratio]);
}
return poor"""
SMALL = """
return [...document.querySelectorAll('button, nav a, input, summary')].filter((item) => item.checkVisibility())
  .map((item) => [item.textContent || item.id, item.getBoundingClientRect()])
  .filter(([, box]) => box.height < 24 || box.width < 24).map(([name]) => name)"""


@pytest.mark.parametrize(("width", "dark"), [(320, False), (1000, True)], ids=["phone, light", "desk, dark"])
def test_it_can_be_read_and_reached(page: Page, dark: bool, width: int) -> None:
    page.show(width, 800, dark)
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    page.open()
    page.ask("Where is the reef?")
    page.run("document.querySelectorAll('details').forEach((item) => (item.open = true))")
    for section in ("ask", "documents", "bank"):
        page.run("location.hash = arguments[0]", section)
        page.wait(lambda section=section: page.one(f"#{section}").is_displayed())
        if section != "ask":
            page.wait(lambda section=section: page.all(f"#{section} li, #{section} dd"))
        assert page.run(NAMES) == [] and page.run(CONTRAST) == [] and page.run(SMALL) == []
        assert page.run(wide), section
    page.run("location.hash = 'documents'")
    page.wait(lambda: page.all("#list button"))[0].click()
    page.wait(lambda: page.one("#document-text").get_attribute("value"))
    assert page.run(CONTRAST.replace("body *", "dialog[open] *")) == []
    box = page.run("const b = document.getElementById('document').getBoundingClientRect(); return [b.left, b.right]")
    assert box[0] >= 0 and box[1] <= width
    background = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    assert page.run("return document.documentElement.lang") == "en"


def test_the_tab_key_reaches_everything_in_order(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.ask("Where is the reef?")
    page.run("document.activeElement.blur(); document.querySelector('.skip').focus()")
    seen = []
    for _ in range(30):
        item = page.press(Keys.TAB)
        name = item.get_attribute("id") or item.tag_name
        if item.tag_name == "body" or name in seen[:1]:
            break
        seen.append(name)
        outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or name == "body"
    assert seen[:5] == ["to-ask", "to-documents", "to-bank", "question", "ask-button"]
    assert "summary" in seen and "button" in seen


def test_a_key_is_asked_for(browser: Any, fresh: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    key = "page-key-0123456789"
    with serving(fresh, keys=[ApiKey.of(key)]) as served:
        page = Page(browser, served)
        browser.get(served.url)
        page.wait(lambda: page.run("return document.getElementById('key').open"))
        page.one("#key-input").send_keys("wrong-key-0123456789", Keys.ENTER)
        page.wait(lambda: page.run("return document.getElementById('key').open"))
        page.one("#key-input").clear()
        page.one("#key-input").send_keys(key, Keys.ENTER)
        page.wait(lambda: page.run("return document.documentElement.dataset.ready"))
        page.ask("Where is the reef?")
        assert "tokens read" in page.text("#facts") and key not in browser.page_source
        browser.get_log("browser")


def test_its_files_are_ours_alone_and_say_what_may_run(server: Served) -> None:
    client = server.client()
    for file in sorted(FILES.iterdir()):
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        found = client.get(path)
        assert found.status_code == 200 and found.content == file.read_bytes()
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert client.get(path, headers={"If-None-Match": found.headers["etag"]}).status_code == 304
        assert client.head(path).status_code == 200
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not [word for word in ("http:", "https:", "innerHTML", "eval(", "style=", 'onclick="') if word in text]
    for path in ("/page/", "/page/../app.py", "/page/%2e%2e/app.py", "/page/index.html", "/page/nothing.js"):
        assert httpx.get(f"{server.url.rstrip('/')}{path}").status_code == 404
