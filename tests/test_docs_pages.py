"""README.md and docs/: links and anchors hold on the code host and in the site, the site builds without a warning and
needs no network, every recipe is listed with numbers that stand in its header.
"""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import docs_commands
import pytest
import yaml
from docs_commands import ROOT, prose, text_of

from recipes.load import recipe_path

PAGES = docs_commands.pages()
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in recipe_path("").rglob("*.yaml"))
ELSEWHERE = (
    "docs/results.md",
    "docs/pretraining.md",
    "docs/adapting.md",
)  # where numbers of a recipe may stand as well
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}  # what a browser asks for


def hook():
    """docs/site_links.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINKS = hook()


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as a code host makes them."""
    found: set[str] = set()
    for line in prose(page):
        if heading := re.match(r"#+ (.*)", line):
            bare = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", heading[1])
            found.add(f"#{LINKS.slug(bare.strip())}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    folder = (ROOT / page).parent
    missing = []
    for line, target, anchor in LINKS.links(text_of(page)):
        path = (folder / target).resolve()
        known = anchors(path.relative_to(ROOT).as_posix()) if path.suffix == ".md" and path.is_file() else set()
        if not path.is_file() or (anchor and anchor not in known):
            missing.append(f"{page}:{line}: {target}{anchor}")
    own = re.findall(r"\]\((#[^)]+)\)", "\n".join(prose(page)))
    missing += [f"{page}: {anchor}" for anchor in own if anchor not in anchors(page)]
    assert not missing, "\n".join(missing)


def test_a_wrong_link_is_found():
    text = "see [x](nowhere.md#gone) and `[not](this.md)`\n```\n[nor](this.md)\n```\n[y](https://a.b/c.md) ![z](p.png)"
    assert LINKS.links(text) == [(1, "nowhere.md", "#gone"), (5, "p.png", "")]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.md does not exist"):
        LINKS.place(ROOT / "docs" / "nowhere.md")


@pytest.mark.parametrize("page", PAGES)
def test_pages_read_alike_on_the_code_host_and_in_the_site(page):
    # python-markdown begins a list or a table after an empty line only; code hosts do not mind
    lines, faults = prose(page), []
    for number, (before, line) in enumerate(pairwise(lines), start=2):
        begins = re.match(r"(\*|\d+\.) |\|", line) and before.strip()
        if begins and not re.match(r"\s*(\*|\d+\.) |\||  ", before) and not before.startswith("#"):
            faults.append(f"{page}:{number}: an empty line is missing before {line[:40]!r}")
    assert not faults, "\n".join(faults)
    for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text_of(page)):
        assert len(alt) > 20, f"{page}: {path} needs a description"


def test_the_first_screen():
    lines = text_of("README.md").split("\n")
    assert len(lines) <= 250
    first = "\n".join(lines[:20])
    assert "docs/images/demo.png" in first
    assert [block.text.count("make") for block in docs_commands.blocks("README.md")[:1]] == [2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_listed_with_numbers_of_its_header(recipe):
    rows = [line for line in text_of("docs/recipes.md").split("\n") if f"](../{recipe})" in line]
    assert len(rows) == 1, f"docs/recipes.md lists {recipe} {len(rows)} times"
    text = (ROOT / recipe).read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    known = header + "".join(text_of(page) for page in ELSEWHERE)
    *_, cost, expected = rows[0].strip("| ").split(" | ")
    told = re.sub(r"\(.*?\.md.*?\)|ViT-\w+/16|\d+×\d+", "", f"{cost} {expected}")
    for number in re.findall(r"\d[\d.,]*\d|\d+", told):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", known), f"{recipe}: where does {number} come from?"


class Html(HTMLParser):
    """What a page of the site links to, loads and names."""

    def __init__(self, path: Path):
        super().__init__()
        self.hrefs, self.ids, self.loaded, self.bare = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.hrefs.append(given["href"])
        if tag == "img" and not given.get("alt"):
            self.bare.append(given.get("src"))
        if tag in LOADED and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=quiet)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(LINKS.titles(nav)) | {"reference/index.md"}
    wanted = {page.removeprefix("docs/") for page in PAGES} - {"README.md"}
    assert not wanted ^ named


def test_links_of_the_site_lead_to_something(site):
    pages = {path: Html(path) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > len(PAGES)
    missing = []
    for path, page in pages.items():
        for href in page.hrefs:
            parts = urlsplit(href)
            if parts.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].ids if target in pages else set()
            if not target.is_file() or (target in pages and parts.fragment and unquote(parts.fragment) not in known):
                missing.append(f"{path.relative_to(site)}: {href}")
        assert not page.bare, f"{path.relative_to(site)}: {page.bare} has no text beside it"
    assert not missing, "\n".join(missing[:20])


def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        away = [url for url in Html(path).loaded if urlsplit(url).scheme or url.startswith("//")]
        assert not away, f"{path.relative_to(site)}: {away}"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import", styles)


def test_the_reference_has_text_and_fields(site):
    use, method = (Html(site / "reference" / f"{name}.html") for name in ("use", "method"))
    assert {"finetune.extractor.Extractor", "finetune.extractor.Extractor.crops", "finetune.gallery.Gallery"} <= use.ids
    assert "pretrain.masks.MasksConfig.ratios" in method.ids
    told = (site / "reference" / "method.html").read_text(encoding="utf-8")
    assert "of the last block; grows linearly from 0" in told, "the comment beside drop_path is its text"
