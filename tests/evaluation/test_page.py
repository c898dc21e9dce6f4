"""report.html: structure, hostile texts, size; and in a browser, where there is one."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from PIL import Image
from reports import PROMPTS, SEEDS, made_up, texts

from gadjax.evaluation import page as pages
from gadjax.evaluation.page import page_data, picture_order, render_page
from gadjax.evaluation.sheets import sheet

VOID = {"meta", "input", "link", "img", "br"}
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--&quot;\u2028{{ 7 * 7 }}"
SETTINGS = {"teacher": "a folder", "seeds": 3, "command": "gadjax evaluate --out 'a b'"}


class Reader(HTMLParser):
    """Elements with their attributes, open ones checked against their end tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.open[-1] if self.open else ""] = data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read_data(text: str) -> dict:
    """The page's data as its script reads them."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


@pytest.mark.parametrize("labels", [("student",), ("a", "b", "c")])
def test_structure(labels):
    evaluation = made_up(labels)
    text = render_page(evaluation, texts(), SETTINGS)
    reader = Reader(text)
    several = len(labels) > 1
    expected = f"{'Students' if several else 'Student'} compared with "
    assert reader.texts["h1"].startswith(expected) and reader.texts["code"] == SETTINGS["command"]
    # Nothing is fetched, every link stays in the page, every label has its control.
    assert all(a.get("href", "#").startswith("#") for a in reader.named("a"))
    assert not reader.named("img") and not reader.named("link")
    assert len(reader.named("script")) == 2 and not re.search(r"https?://|@import", text)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in reader.named("a")} <= set(ids)
    assert "gadjax evaluate --out &#39;a b&#39;" in text and "no moves asked for" in text
    # A bar for every value, twice for those of the summary.
    values = sum(len(row.metrics) for row in evaluation.rows)
    assert len([a for a in reader.named("rect") if a["class"] == "value"]) == 2 * values
    assert text.count("0.400 – 0.600") == 2 * len(evaluation.rows)


def test_bars_are_on_the_scale_of_their_metric():
    panel = pages._panel(made_up(), "vendi_ratio")
    assert [line["label"] for line in panel["lines"]] == ["teacher, 4 steps", "student, 4 steps"]
    bar, unit = panel["lines"][0]["bar"], pages.BAR / (0.3 * 1.12)
    ends = [0.06 * 0.3 * unit, 0.16 / 0.16 * (0.1 + 0.018) * unit, (0.3 + 0.018) * unit]
    np.testing.assert_allclose([bar["low"], bar["value"], bar["high"]], ends, atol=0.01)
    assert panel["reference"] == pytest.approx((0.2 + 0.018) * unit, abs=0.01)


def test_hostile_texts_stay_inert():
    evaluation = made_up((HOSTILE, "b"))
    prompts = [HOSTILE, *texts()[1:]]
    text = render_page(evaluation, prompts, {HOSTILE: HOSTILE, "command": HOSTILE})
    reader = Reader(text)
    assert len(reader.named("script")) == 2 and not reader.named("img")
    assert not any(name.startswith("on") for _, a in reader.elements for name in a)
    found = next(p for p in read_data(text)["prompts"] if p["index"] == 0)
    assert found["text"] == HOSTILE.replace("\u2028", " ") and "{{ 7 * 7 }}" in text
    assert "49" not in reader.texts["code"] and "\u2028" not in text


def test_not_a_number_is_refused():
    evaluation = made_up()
    evaluation.rows[2].differences_P[3] = np.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_page(evaluation, texts(), SETTINGS)


def test_the_worst_prompts_have_pictures_first(monkeypatch):
    evaluation = replace(made_up(("a", "b")), strips=())
    order = picture_order(evaluation.rows)
    assert sorted(order) == list(range(PROMPTS))
    # By any student: the first is the last prompt of the one, then the first of the other.
    assert set(order[:3]) == {0, PROMPTS - 1, 8} and order[0] in (0, PROMPTS - 1)
    one = len(page_data(evaluation, texts())["prompts"][0]["sheet"])
    monkeypatch.setattr(pages, "BUDGET", 4 * one)
    data = page_data(evaluation, texts())
    shown = [prompt["index"] for prompt in data["prompts"]]
    assert (
        3 <= len(shown) <= 4 and shown == sorted(order[: len(shown)]) and data["total"] == PROMPTS
    )
    assert sum(len(prompt["sheet"]) for prompt in data["prompts"]) <= 4 * one


def test_a_file_of_many_models_is_at_most_5_mb():
    """Of noise, which cannot be compressed: pictures are shown smaller, at least eight prompts and
    the strips are there."""
    labels = tuple(f"student {n}" for n in range(6))
    text = render_page(made_up(labels, prompts=9, side=170), texts(9), SETTINGS)
    data = read_data(text)
    assert 2_000_000 < len(text) <= 5_000_000 and data["tile"]["width"] == 80
    assert len(data["prompts"]) >= pages.LEAST_SHOWN and len(data["strips"]) == 2


def test_strips_take_half_of_the_file(monkeypatch):
    """Those that do not fit are left out, so that prompts are shown."""
    evaluation = made_up()
    strips = page_data(evaluation, texts())["strips"]
    one = sum(map(len, strips[0]["sheets"].values()))
    monkeypatch.setattr(pages, "BUDGET", 3 * one)
    data = page_data(evaluation, texts())
    assert data["strips"] == strips[:1] and len(data["prompts"]) >= PROMPTS - 2


def test_a_sheet_has_every_picture_in_its_place():
    images = made_up().rows[0].images_PSHWC[:2]
    decoded = base64.b64decode(sheet(images).removeprefix("data:image/webp;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(decoded)).convert("RGB"))
    side = images.shape[2]
    for row in range(2):
        for column in range(SEEDS):
            cut = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
            np.testing.assert_array_equal(cut, images[row, column])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A report of two students, with a hostile prompt, in a browser."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    folder = tmp_path_factory.mktemp("browser")
    path: Path = folder / "report.html"
    prompts = [HOSTILE, *texts()[1:]]
    path.write_text(render_page(made_up(("a", "b")), prompts, SETTINGS), encoding="utf-8")
    with browser(folder / "profile") as page:
        yield page, path


def chosen(page) -> str:
    return page.evaluate("document.querySelector('input[name=prompt]:checked').value")


def test_the_page_loads_without_an_error(opened):
    page, path = opened
    for dark in (False, True):
        page.open(path, dark)
        dark_now = page.evaluate("getComputedStyle(document.body).backgroundColor") != (
            "rgb(255, 255, 255)"
        )
        assert dark_now == dark
        page.evaluate("document.getElementById('theme').click()")
        assert page.evaluate("document.documentElement.dataset.theme") == (
            "light" if dark else "dark"
        )
        assert page.faults() == [] and "owned" not in page.evaluate("document.title")


def test_prompts_and_seeds_are_chosen_by_the_keyboard(opened):
    page, path = opened
    page.open(path)
    assert chosen(page) == str(PROMPTS - 1)  # the first student's worst
    page.evaluate("document.querySelector('input[name=prompt]:checked').focus()")
    page.press("ArrowDown")
    assert chosen(page) == str(PROMPTS - 2)
    assert page.evaluate("document.getElementById('prompt').textContent") == "prompt 10"
    page.evaluate("document.querySelector('input[name=seed]:checked').focus()")
    for seed in ("1", "2"):
        page.press("ArrowRight")
        assert page.evaluate("document.querySelector('input[name=seed]:checked').value") == seed
    assert page.evaluate("document.querySelectorAll('#seeds td.on').length") == 4
    assert page.evaluate("document.querySelector('#large-seed .tile').ariaLabel") == (
        "teacher, 4 steps, seed 2"
    )
    # By the other student the first prompt, the hostile one, comes first.
    page.evaluate("document.getElementById('sort').focus()")
    page.press("ArrowDown")
    assert chosen(page) == "0"
    shown = page.evaluate("document.getElementById('prompt').textContent")
    assert shown == HOSTILE.replace("\u2028", " ") and page.faults() == []


def test_the_slider_moves_every_model(opened):
    page, path = opened
    page.open(path)
    position = "document.querySelectorAll('#large-step .tile')[1].style.backgroundPosition"
    first = page.evaluate(position)
    page.evaluate("document.getElementById('step').focus()")
    page.press("ArrowRight")
    assert page.evaluate("document.getElementById('step-name').textContent") == "12%"
    assert page.evaluate(position) != first
    page.evaluate("document.querySelector('#way input:checked').focus()")
    page.press("ArrowRight")
    assert page.evaluate("document.getElementById('step-name').textContent") == "0°"
    assert page.evaluate("document.querySelectorAll('#large-step .tile').length") == 4
    assert page.faults() == []


def test_a_narrow_page_does_not_scroll_sideways(opened):
    page, path = opened
    page.open(path, width=380)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
