"""The documentation as a whole: every page is in the index, every link and picture is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target == ROOT or ROOT in target.parents, link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_index_has_every_page_once():
    listed = LINK.findall((ROOT / "docs" / "README.md").read_text())
    pages = {f.name for f in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(name for name in listed if "/" not in name) == sorted(pages)


def test_every_picture_has_the_command_that_makes_it():
    index = (ROOT / "docs" / "README.md").read_text()
    for picture in (ROOT / "docs").glob("*.png"):
        assert f"`docs/{picture.name}` from `" in index
        assert any(f"{picture.name})" in page.read_text() for page in PAGES)
