"""The site (mkdocs.yml): a strict build, its pages and links, and the API from docstrings."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from gadjax import objectives

pytest.importorskip("mkdocstrings", reason="pip install -r requirements.txt")
ROOT = Path(__file__).parents[1]


def build(folder, config=ROOT / "mkdocs.yml"):
    """Build the site strictly, as launch/docs.sh does, into a folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id":
                self.anchors.add(value)


def test_every_link_and_picture_leads_somewhere(site):
    """Within the site; nothing is loaded from another host."""
    pages = {path: Page(path) for path in site.rglob("index.html")}
    assert len(pages) > 25
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (anchor and target in pages and anchor not in known):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)


def test_the_site_loads_nothing_from_other_hosts(site):
    loaded = r"<(?:script|img|link)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+"
    for path in site.rglob("*.html"):
        hosts = [tag for tag in re.findall(loaded, path.read_text()) if "canonical" not in tag]
        assert not hosts, f"{path}: {hosts}"


def test_files_outside_docs_are_pages(site):
    home = (site / "index.html").read_text()
    assert "A JAX library that distils" in home
    assert 'src="results/quickstart/samples.png"' in home
    assert "Add a backbone" in (site / "contributing" / "index.html").read_text()
    assert (site / "changelog" / "index.html").exists()


def test_the_api_is_that_of_the_docstrings(site):
    page = (site / "api" / "gadjax" / "index.html").read_text()
    for name in ("load", "sample", "distill", "save"):
        assert f'id="gadjax.api.{name}"' in page
    text = re.sub(r"<[^>]+>", "", page)
    assert "compute dtype of the networks." in text and "Raises:" in text
    page = (site / "api" / "objectives" / "index.html").read_text()
    for term in objectives.TERMS.values():
        assert f'id="{term.__module__}.{term.__name__}"' in page


def test_the_readme_names_every_term():
    """And counts those of docs/methods.md, whose rows name three more, beside others."""
    readme, methods = ((ROOT / name).read_text() for name in ("README.md", "docs/methods.md"))
    assert not [name for name in objectives.TERMS if f"`{name}`" not in readme]
    rows = [line.split("|")[1] for line in methods.splitlines() if line.startswith("| `")]
    listed = objectives.TERMS.keys() & re.findall(r"`(\w+)`", " ".join(rows))
    others = listed - {"dmd", "consistency", "denoising"}
    assert f"{len(others)} terms of [other methods]" in readme


def test_the_page_of_the_training_config_names_the_bundled_configs():
    text = (ROOT / "docs" / "api" / "training.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        assert f"`{path.stem}`" in text


BROKEN = """
INHERIT: {root}/mkdocs.yml
docs_dir: {folder}
plugins: []
watch: []
hooks: [{root}/launch/site_hooks.py]
nav: [one.md]
validation:
  nav:
    omitted_files: ignore
"""


def test_a_broken_link_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "mkdocs.yml").write_text(BROKEN.format(root=ROOT, folder=docs))
    (docs / "README.md").touch()  # the hook reads that of the project
    (docs / "one.md").write_text("# One\n\n[two](two.md), [three](../README.md)\n")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 1 and "Aborted with" in done.stdout + done.stderr
    assert "'one.md' contains a link 'two.md'" in done.stderr
    assert "'one.md' contains a link 'index.md'" not in done.stderr


def test_links_of_the_repository_become_links_of_the_site():
    from site_hooks import site_link

    uris = {"index.md", "contributing.md", "results/README.md", "planning.md", "results/a.png"}

    def link(text, source="docs/results/README.md", repo_url=None):
        page = {"README.md": "index.md"}.get(source, source.removeprefix("docs/"))
        return site_link(text, source, page, repo_url, uris)

    assert link("../planning.md#example") == "../planning.md#example"
    assert link("../../README.md") == "../index.md"
    assert link("../../CONTRIBUTING.md#glossary") == "../contributing.md#glossary"
    assert link("docs/results", "README.md") == "results/README.md"
    assert link("docs/results/a.png", "README.md") == "results/a.png"
    assert link("https://example.org/a#b") == "https://example.org/a#b"
    assert link("#here") == "#here"
    # Files that are no pages: text, or a link to the code host.
    assert link("../../tests/conftest.py") is None
    host = "https://example.org/gadjax/"
    expected = "https://example.org/gadjax/blob/HEAD/tests/conftest.py"
    assert link("../../tests/conftest.py", repo_url=host) == expected
    # What does not exist stays, and fails the build.
    assert link("nothing.md") == "nothing.md"


def test_nested_lists_are_indented_by_four():
    from site_hooks import nested

    text = "- one\n  goes on\n  - two\n\nText\n\n    code\n"
    assert nested(text) == "- one\n    goes on\n    - two\n\nText\n\n    code\n"


def test_docstrings_become_markdown():
    from site_docstrings import escaped, with_list, with_sections

    text = with_sections("A map.\n\nReturns: one,\n  two.\nRaises: InputError for a fault.")
    assert "Returns:\n    one, two.\n" in text and "Raises:\n    InputError: for a fault.\n" in text
    text = with_list("A term.\n\nsteps: how many,\n  in all.\nother: text.", {"steps"})
    assert "\n- `steps`: how many,\n  in all.\nother: text." in text
    assert escaped("a <b> * `c * <d>`") == "a &lt;b> &#42; `c * <d>`"
    assert escaped("One.\n\n    a * b\n\n2 * 3") == "One.\n\n    a * b\n\n2 &#42; 3"
