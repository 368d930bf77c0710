"""The page as a person meets it: on a phone, in figures, and the files that lie within it."""

import base64
import gzip
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_report import FIVE, TWELVE, VOID, fake_run, fake_scores, report, write_run

import kloss.report
from kloss.cl.languages import LOCALES
from kloss.report import downloads, figures, write_report

STYLE = (Path(kloss.report.__file__).parent / "style.css").read_text()
PHONE = 390


class Nesting(HTMLParser):
    """(tag, attributes, classes of all around it) of each element."""

    def __init__(self, html):
        super().__init__()
        self.around, self.elements = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for names in self.around for name in names]))
        if tag not in VOID:
            self.around.append((dict(attributes).get("class") or "").split())

    def handle_endtag(self, tag):
        if tag not in VOID:
            self.around.pop()


@pytest.mark.parametrize("locales", [FIVE, LOCALES], ids=len)
def test_nothing_is_wider_than_a_phone_outside_a_box_that_scrolls(tmp_path, locales):
    html = report(tmp_path, fake_scores(locales, ("non-shared", "shared", "partial"), orders=1, seeds=2))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    elements = Nesting(html).elements
    tables = [(attributes["class"].split(), around) for tag, attributes, around in elements if tag == "table"]
    assert len(tables) >= 7 and all("scroll" in around for _, around in tables)
    assert not [tag for tag, attributes, _ in elements if tag == "svg" and "width" in attributes]
    for _, attributes, around in elements:
        widths = [float(px) for px in re.findall(r"width: ?([\d.]+)px", attributes.get("style") or "")]
        assert max(widths, default=0) <= PHONE or "scroll" in around
    media, narrow = STYLE.split("@media (max-width: 760px) {")
    fixed = re.findall(r"([^{}]+) \{[^{}]*?(?<!max-)(?<!-)\bwidth: ?(\d+)px", STYLE)
    assert all(int(px) <= PHONE or "figure.full > svg" in selector for selector, px in fixed)
    assert "figure.full { overflow-x: auto }" in narrow and ".scroll { overflow-x: auto" in media
    assert re.search(r"h1 b \{ white-space: normal \}", narrow), "a label that never breaks cut the headline off"


def test_a_wide_table_is_cards_on_a_phone_that_name_their_columns(tmp_path):
    html = report(tmp_path, fake_scores(FIVE, ("non-shared", "shared"), orders=1, seeds=2))
    wide = re.findall(r'(?s)<table class="[^"]*\bcards\b[^"]*">(.*?)</table>', html)
    assert len(wide) >= 4  # results, paper, its findings, contrasts
    for table in wide:
        heads = re.findall(r"<th>(.*?)</th>", table)
        for row in re.findall(r"(?s)<tr>(.*?)</tr>", table.split("<tbody>")[1]):
            assert re.findall(r'<td[^>]*data-head="(.*?)"', row) == heads[1:]
    assert 'data-head="CBT">' in wide[0] and 'data-head="verdict">' in wide[2]
    narrow = re.findall(r'(?s)<table class="(?![^"]*\b(?:cards|wide|settings)\b)[^"]*">(.*?)</table>', html)
    assert narrow and all(len(re.findall(r"<th>", table)) <= 4 and "data-head" not in table for table in narrow)
    assert "content: attr(data-head)" in STYLE and ".cards thead { display: none }" in STYLE


def test_the_first_screen_leads_to_every_section(tmp_path):
    html = report(tmp_path, fake_scores(FIVE, ("non-shared", "shared"), orders=1, seeds=1))
    links = re.findall(r'<a href="#(s\d+)">(.*?)</a>', html.split("</header>")[0])
    assert links == re.findall(r'<section id="(s\d+)">\s*<h2>(.*?)</h2>', html)
    assert [title for _, title in links][:3] == ["Results", "Along the sequence", "Score matrices"]


def pixels(panel):
    """The colours of a heat map's image, [rows, columns, 4]: matplotlib draws a pixel a cell or more."""
    import matplotlib.image

    data = re.search(r'xlink:href="data:image/png;base64,([^"]*)"', panel.svg)[1]
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))


def test_a_matrix_of_changes_shows_harm():
    """Changes below 0 all had the colour of 0: the matrix of damage showed gains alone."""
    change = np.zeros((5, 5))
    change[0, 4], change[4, 0], change[2, 2] = -0.2, 0.2, -0.1
    image = pixels(figures.heat_map("change", change, FIVE, 0.2, rows="learned"))
    h, w = image.shape[:2]

    def cell(i, j):
        return image[int((i + 0.5) * h / 5), int((j + 0.5) * w / 5), :3]

    harm, none, gain = (cell(*at) for at in ((0, 4), (1, 1), (4, 0)))
    if np.allclose(harm, gain, atol=0.05):
        pytest.fail("harm looks like gain")
    assert harm[0] > harm[2] + 0.2 and gain[2] > gain[0] + 0.2 and none.min() > 0.9  # red, blue, white
    assert none[2] > cell(2, 2)[2] > harm[2]
    texts = re.findall(r"<text[^>]*>([−.\d]+)</text>", figures.heat_map("change", change, FIVE, 0.2).svg)
    assert {"−.20", ".20", "−.10", ".00"} <= set(texts)


def test_names_of_bars_lie_within_their_figure():
    """Longer names than the demo's began left of the figure, which a phone cuts off."""
    values = {"mean of its family, merged head": [0.2, 0.3], "SHARED LoRA r=16": [0.4]}
    svg = figures.named_bars("merged", values, "F1").svg
    names = re.findall(r'<text style="font-size: 8px; text-anchor: end[^"]*" x="([\d.]+)"[^>]*>(\D[^<]+)</text>', svg)
    assert "".join(name for _, name in names).replace(" ", "") == "".join(values).replace(" ", "")
    for x, name in names:
        assert float(x) - 9.6 * 0.5 * len(name) > 0  # at a phone's size of text
    assert "font-family" not in svg, "the text of figures has the page's font"


def of_page(html):
    """name -> bytes of the files within a page."""
    links = re.findall(r'<a download="([^"]*)" href="data:application/octet-stream;base64,([^"]*)">', html)
    return {name: base64.b64decode(data) for name, data in links}


def test_the_run_s_files_lie_within_its_page(tmp_path, monkeypatch):
    scores = fake_scores(TWELVE, ("shared",), orders=1, seeds=1)
    folder = write_run(tmp_path, scores)
    (folder / "scores.csv").write_text("strategy,rank\nshared,8\n")
    (folder / "log.jsonl").write_text((json.dumps({"phase": "lora", "step": 1, "loss": 1.0}) + "\n") * 4000)
    html = write_report(folder).read_text()
    files = of_page(html)
    assert list(files) == ["scores.csv", "scores.json", "config.json", "env.json", "log.jsonl.gz"]
    assert files["scores.csv"] == b"strategy,rank\nshared,8\n" and json.loads(files["scores.json"]) == scores
    assert gzip.decompress(files["log.jsonl.gz"]) == (folder / "log.jsonl").read_bytes()
    assert write_report(folder).read_text() == html, "the same run, another page"
    monkeypatch.setattr(downloads, "LARGEST", 100_000)
    html = write_report(folder).read_text()
    assert "log.jsonl.gz" not in of_page(html) and "log.jsonl is too large for it and lies beside" in re.sub(r"\s+", " ", html)


def test_a_folder_with_scores_alone_has_a_page(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(fake_scores(FIVE, runs=[fake_run("shared", FIVE)])))
    assert list(of_page(write_report(tmp_path).read_text())) == ["scores.json"]
