"""Links of README and of the pages lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = [
    path for path in (*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *DOCS.rglob("*.md"),
                      *(ROOT / "tutorials").glob("*.md"))
]
SITE = "https://pyrocurv.github.io/pyrocurv/latest/"  # page -> docs/page.md
REPOSITORY = re.compile(r"https://(?:github|raw\.githubusercontent)\.com/pyrocurv/pyrocurv/"
                        r"(?:(?:blob|tree)/)?main/(.*)")
INLINE = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"^\[[^\]]+\]: (\S+)$", re.MULTILINE)
USED = re.compile(r"\]\[([^\]]+)\]")
SNIPPET = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)


def prose(path: Path) -> str:
    """The text without code, and with the files that it includes."""
    text = SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(), path.read_text())
    return re.sub(r"`[^`\n]+`", "code", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(path: Path) -> set[str]:
    """Those of the headings, as GitHub and mkdocs make them."""
    text = SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(), path.read_text())
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        for heading in headings
    }


def source(page: Path) -> Path:
    """The file that a page is made from: a tutorial's is its notebook."""
    notebook = ROOT / "tutorials" / f"{page.stem}.ipynb"
    return notebook if page.parent == DOCS / "tutorials" and notebook.exists() else page


def target(path: Path, link: str) -> tuple[Path, str] | None:
    """The file and the anchor that a link is to; None if it leads out of the project."""
    address, _, anchor = link.partition("#")
    if found := REPOSITORY.fullmatch(address):
        return ROOT / found[1], anchor
    if address.startswith(SITE):
        page = address.removeprefix(SITE).strip("/") or "index"
        folder = DOCS / page / "index.md"
        return folder if folder.exists() else source(DOCS / f"{page}.md"), anchor
    if re.match(r"\w+:", address):
        return None
    return (source(path.parent / address) if address else path), anchor


def check_links(path: Path) -> None:
    text = prose(path)
    defined = re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE)
    assert not (missing := set(USED.findall(text)) - set(defined)), missing
    for link in (*INLINE.findall(text), *REFERENCE.findall(text)):
        if (found := target(path, link)) is None:
            continue
        file, anchor = found
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    check_links(path)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, with `code`\n\n[here](#no-heading) and [there](nowhere.md)\n")
    assert anchors(page) == {"a-heading-with-code"}
    with pytest.raises(AssertionError, match="no-heading"):
        check_links(page)
    assert target(page, f"{SITE}guides/#which-guide") == (DOCS / "guides.md", "which-guide")


def test_readme_has_absolute_links_and_is_short() -> None:
    """PyPI shows it without the repository."""
    readme = ROOT / "README.md"
    text = prose(readme)
    for link in (*INLINE.findall(text), *REFERENCE.findall(text)):
        assert link.startswith("https://"), link
    assert len(readme.read_text().splitlines()) <= 200
