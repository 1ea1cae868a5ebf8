"""The Write and Look inside views in a real Chromium."""

import json
import time

import httpx
import pytest
from live import CHROMIUM, needs_chromium, serving
from served import FIRST, LAST, make_app, models, tiny_run

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def url(monkeypatch):
    monkeypatch.chdir(tiny_run().name)
    with serving(make_app()) as url:
        yield url


@pytest.fixture
def open_page(browser, url):
    """`open_page("write?prompt=a")`; afterwards no error is on the console, and nothing was asked of another host."""
    contexts, errors, asked = [], [], []

    def open_at(place: str, width: int = 1400, theme: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/#{place}")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert [error for error in errors if "status of 400" not in error] == []  # Chromium tells of each refused request
    assert all(address.startswith((url, "data:", "blob:")) for address in asked)


def wait_until_written(page, column: int = 0) -> str:
    """The column's text, prompt included."""
    of = page.locator(".column").nth(column)
    of.locator(".status", has_text="mean surprise").wait_for()
    return of.locator(".output").text_content()


def generated(url: str, **body) -> tuple[str, list[dict]]:
    """The text that the server gives, and its tokens' lines."""
    lines = [json.loads(line) for line in httpx.post(f"{url}/api/generate", json=body, timeout=60).text.splitlines()]
    return "".join(line.get("text", line.get("end", "")) for line in lines[1:]), lines[1:-1]


def test_a_prompt_is_streamed_and_a_token_replaced(url, open_page):
    page = open_page("write?prompt=the quick&max_new_tokens=40&seed=4&top_p=0.9")
    page.get_by_role("button", name="Write", exact=True).click()
    text = wait_until_written(page)
    options = {"model": LAST, "prompt": "the quick", "max_new_tokens": 40, "seed": 4, "top_p": 0.9}
    wanted, lines = generated(url, **options)
    assert text == "the quick" + wanted
    page.locator(".token").nth(5).click()
    table = lines[5]["candidates"]
    head = page.locator(".candidates thead th").all_text_contents()
    assert head == ["candidate", *table["stages"]]
    cells = [row.locator("td").all_text_contents() for row in page.locator(".candidates tbody tr").all()]
    assert cells == [[f"{prob:.2%}" if prob else "–" for prob in probs]
                     for probs in [*(row["probs"] for row in table["rows"]), table["others"]]]
    other = next(row for row in table["rows"] if row["id"] != lines[5]["id"])
    page.locator(".candidate").nth(table["rows"].index(other)).click()
    page.locator(".replaced").wait_for()
    again = wait_until_written(page)
    kept = [*(line["id"] for line in lines[:5]), other["id"]]
    assert again == "the quick" + generated(url, **options, written=kept)[0]
    assert again.startswith(text[:len("the quick") + 5])
    assert page.locator(".token").count() == 46
    page.locator(".token").nth(2).click()  # a kept one still has its candidates
    assert page.locator(".candidates tbody tr").count() == len(lines[2]["candidates"]["rows"]) + 1


def test_two_columns_have_a_checkpoint_each_and_a_link_that_holds_both(url, open_page):
    page = open_page(f"write?prompt=Line&max_new_tokens=20&compare=1&b.model={FIRST}&b.temperature=0")
    page.get_by_role("button", name="Write", exact=True).click()
    texts = [wait_until_written(page, column) for column in (0, 1)]
    options = {"prompt": "Line", "max_new_tokens": 20}
    assert texts == ["Line" + generated(url, model=LAST, **options)[0],
                     "Line" + generated(url, model=FIRST, temperature=0, **options)[0]]
    again = open_page(page.url.partition("#")[2])
    assert again.get_by_label("Model").nth(1).input_value() == FIRST
    assert again.get_by_label("temperature").nth(1).input_value() == "0"


@pytest.mark.parametrize("leave", ["stop", "escape", "close"])
def test_stop_ends_the_work_and_so_does_closing_the_tab(open_page, leave):
    page = open_page("write?prompt=the quick&max_new_tokens=16000&temperature=0")  # drawn, a text may end by itself
    page.get_by_role("button", name="Write", exact=True).click()
    page.locator(".token").nth(3).wait_for()
    assert models().active
    if leave == "stop":
        page.get_by_role("button", name="Stop").click()
    elif leave == "escape":
        page.keyboard.press("Escape")
    else:
        page.close()
    end = time.monotonic() + 30
    while models().active and time.monotonic() < end:
        time.sleep(0.05)
    assert not models().active
    if leave != "close":
        page.locator(".status", has_text="stopped").wait_for()


def test_the_keyboard_alone_writes_chooses_and_replaces(open_page):
    page = open_page("write?max_new_tokens=12")
    page.get_by_label("Prompt").focus()
    page.keyboard.type("the quick")
    page.keyboard.press("Control+Enter")
    wait_until_written(page)
    while page.evaluate("!document.activeElement.classList.contains('token')"):
        page.keyboard.press("Tab")
    for key in ("Enter", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator(".details h3").text_content().startswith("Token 3: ")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".replaced").wait_for()
    wait_until_written(page)
    assert page.locator(".token").count() == 15


def test_an_error_is_a_sentence_in_the_page(open_page):
    page = open_page("write?prompt=a&temperature=-1")
    page.get_by_role("button", name="Write", exact=True).click()
    assert "temperature=-1 must be 0 or more" in page.get_by_role("alert").text_content()


@pytest.mark.parametrize(("width", "theme"), [(1400, "light"), (390, "dark")])
def test_look_inside_shows_tokens_attention_and_neighbors_and_fits_the_screen(url, open_page, width, theme):
    page = open_page("inside?prompt=the quick Ü", width, theme)
    page.locator(".neighbors tbody tr").first.wait_for()
    chips = page.locator("ol.tokens").first.locator("button")
    assert chips.all_text_contents()[:4] == ["t116", "h104", "e101", "␣32"]
    chips.nth(6).click()
    page.get_by_label("layer", exact=True).select_option("1")
    body = {"model": LAST, "prompt": "the quick Ü", "layer": 1, "head": 0}
    weights = httpx.post(f"{url}/api/attention", json=body, timeout=60).json()["weights"]
    page.wait_for_function("weight => document.querySelectorAll('.looks .chip')[2].title === weight",
                           arg=f"{weights[6][2]:.4f}")
    page.locator(".neighbors th", has_text="nearest to i").wait_for()
    box = page.locator("canvas").bounding_box()
    side = box["width"] / len(weights)
    page.locator("canvas").hover(position={"x": 2.5 * side, "y": 7.5 * side})
    assert page.locator(".caption").text_content() == f"c (7) looks at e (2): {weights[7][2]:.4f}"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.goto(f"{url}/#write?prompt=a")
    page.get_by_role("button", name="Write", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
