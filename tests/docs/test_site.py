"""The pages as a site (`make docs`), checked without mkdocs: every page is in its menu, and no link is dead."""

from __future__ import annotations

import functools
import importlib.util
import operator
import re
from pathlib import Path

import pytest
from places import ROOT

import red_kernels as rk

DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.glob("*.md"))
PAGES += [ROOT / "csrc/cuda/README.md", ROOT / "red_kernels/backends/triton/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
FENCE = re.compile(r"^```.*?^```[ \t]*$", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.lru_cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(one.startswith(slug) for one in found)}")
    return found


def links(page: Path) -> list[str]:
    """The links of a page that lead into the repository; not those in code."""
    text = re.sub(r"`[^`\n]+`(?!\])", "", FENCE.sub("", page.read_text()))
    found = [one or other for one, other in LINK.findall(text)]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: {sorted(anchors(target))}"


def test_a_dead_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n\n[here](#a-b-c) [there](#a-b) [away](https://some.where) [gone](other.md)\n")
    assert links(page) == ["#a-b-c", "#a-b", "other.md"]
    assert anchors(page) == {"a-b-c"}


def test_the_menu_has_every_page_once(hooks):
    menu = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = {path.name for path in DOCS.rglob("*.md")} | {*hooks.PAGES, hooks.API_PAGE}
    assert sorted(menu) == sorted(pages)


def test_the_api_has_every_public_name_once(hooks):
    names = [name for group in hooks.API.values() for name in group]
    assert len(set(names)) == len(names)
    modules = {"__version__", "functional", "reference"}
    assert {name for name in names if "." not in name} == set(rk.__all__) - modules
    for name in names:
        path, _, last = f"red_kernels.{name}".rpartition(".")
        if not path.startswith("red_kernels.integrations"):  # these need other packages
            assert operator.attrgetter(last)(importlib.import_module(path)).__doc__
        else:
            source = (ROOT / path.replace(".", "/")).with_suffix(".py")
            source = source if source.exists() else source.with_suffix("") / "__init__.py"
            assert last in source.read_text()


def test_links_on_the_site(hooks):
    text = (
        "[a](docs/install.md#the-demo) ![b](docs/pictures/x.svg) [c](LICENSE) [d](https://x.y) [e](CHANGELOG.md)\n"
        '<img src="docs/pictures/x.svg">\n```python gpu\n[f](docs/kept.md)\n```\n'
    )
    assert hooks.site_text(text, "README.md") == (
        "[a](install.md#the-demo) ![b](pictures/x.svg) c [d](https://x.y) [e](changelog.md)\n"
        '<img src="pictures/x.svg">\n```python\n[f](docs/kept.md)\n```\n'
    )
    page = "[a](#b) [c](kinds.md) ![d](../benchmarks/results/one/x.png) [e](../red_kernels/cli.py) [f](../README.md)"
    assert hooks.site_text(page, "docs/some.md") == "[a](#b) [c](kinds.md) ![d](results/one/x.png) e [f](index.md)"
