"""The pages: tests that they name are there, and so are the functions."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)
    for path in re.findall(r"`((?:csrc|bench|examples|kloss|tests)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([\w.]+\.md)\)", text):
        assert (page.parent / target).exists(), target
    for function in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
        module, _, name = function.rpartition(".")
        assert hasattr(import_module(module), name) or import_module(function), function


def test_each_page_is_in_the_menu_and_isolation_names_its_tests():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert len(PAGES) >= 4 and all(f"{page.name}," in menu or f"{page.name}]" in menu for page in PAGES)
    assert len(re.findall(r"`tests/\w+\.py::", (ROOT / "docs/isolation.md").read_text(encoding="utf-8"))) > 15
