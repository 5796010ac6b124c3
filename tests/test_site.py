"""The documentation as a site: it builds without a warning, its links lead somewhere, its pages read as on GitHub."""

import html.parser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown", reason="the site needs mkdocs-material, of the extra `dev`")
pytest.importorskip("material", reason="the site needs mkdocs-material, of the extra `dev`")

ROOT = Path(__file__).resolve().parent.parent
PAGES = list(ROOT.glob("docs/**/*.md"))


def build(root, folder):
    """(exit code, what mkdocs said but that it is at work) of a strict build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    # The theme tells of a later mkdocs unless the variable is set; the Makefile sets it too.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    usual = re.compile(r"INFO +- +(Cleaning site|Building documentation|Documentation built)|$")
    return done.returncode, [line for line in (done.stdout + done.stderr).splitlines() if not usual.match(line)]


class Reader(html.parser.HTMLParser):
    """What there is to check in a page of the site."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.tags, self.text, self.open = set(), [], [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in ("br", "hr", "img", "input", "link", "meta", "path"):
            self.open.append(tag)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag != "a":
            self.loads += [attrs[name] for name in ("src", "href") if attrs.get(name)]

    def handle_endtag(self, tag):
        while tag in self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "article" in self.open and not {"pre", "h1", "h2", "h3"} & set(self.open):
            self.text.append(("code" in self.open, data))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: what its pages contain, by their paths."""
    folder = tmp_path_factory.mktemp("site")
    code, said = build(ROOT, folder)
    assert (code, said) == (0, [])
    # The page for what is not found has links from the root of a server.
    return {path: Reader(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_in_the_site_and_in_its_navigation(site):
    (start,) = (path for path in site if path.name == "index.html" and (path.parent / "assets").is_dir())
    linked = {(start.parent / link.partition("#")[0]).resolve() for link in site[start].links if "://" not in link}
    for page in PAGES:
        place = page.relative_to(ROOT / "docs").with_suffix(".html")
        place = place.with_name("index.html") if place.name == "README.html" else place
        assert (start.parent / place).exists(), place
        # Of the decisions the first stands for all, until one is open.
        assert start.parent / place in linked or "decisions" in place.parts, place
    assert {"CONTRIBUTING.html", "CHANGELOG.html"} <= {path.name for path in linked}
    assert (start.parent / "decisions" / "index.html") in linked


def test_links_of_the_site_lead_somewhere(site):
    broken, count = [], 0
    for page, found in site.items():
        for link in [*found.links, *found.loads]:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            count += 1
            if not target.exists() or (anchor and target in site and anchor not in site[target].ids):
                broken.append(f"{page.name}: {link}")
    assert not broken
    assert count > 1000


def test_site_loads_nothing_from_elsewhere(site):
    assert not {link for found in site.values() for link in found.loads if re.match(r"[a-z]+:|//", link)}


def test_pages_show_no_markdown(site):
    """A list, a table, a link or a code block that is not read as such would stand there as it was written."""
    odd = re.compile(r"^\s*([-*+] |\d+\. |\||#+ )|```|\]\(|\*\*|`|<!--|\\\|", flags=re.MULTILINE)
    for page, found in site.items():
        for code, text in found.text:
            assert not (re.search(r"\\\|", text) if code else odd.search(text)), (page.name, text)
        # A word in angle brackets that is not marked as code would be a tag.
        assert not {tag for tag in found.tags if "_" in tag}, page.name


# -- the hooks of the build --------------------------------------------------------------------------------------------
@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """The module of hooks for another repository, with pages in and outside docs/."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    files = ["README.md", "NEWS.md", "docs/index.md", "docs/a/b.md", "docs/a/README.md"]
    for name in [*files, "plugins/x/README.md", "plugins/x/code.py", "plot.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    return module


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/index.md", "[x](a/b.md#c)", "[x](a/b.md#c)"),
        ("docs/a/b.md", "[x](../../NEWS.md)", "[x](../NEWS.md)"),
        ("docs/a/b.md", "[x](../../plugins/x/README.md#y)", "[x](../plugins/x/README.md#y)"),
        ("docs/a/b.md", "[x](../../README.md)", "[x](../index.md)"),
        ("docs/index.md", "[two\nwords](a/)", "[two\nwords](a/README.md)"),
        ("plugins/x/README.md", "[x](../../docs/a/b.md)", "[x](../../a/b.md)"),
        ("NEWS.md", "![x](plot.png)", "![x](plot.png)"),
        ("docs/index.md", "![x](../plot.png)", "![x](plot.png)"),
        ("docs/index.md", "see [`code.py`](../plugins/x/code.py).", "see `code.py`."),
        ("docs/index.md", "[x](../plugins)", "x"),
        ("docs/index.md", "[x](https://example.org/a.md)", "[x](https://example.org/a.md)"),
        ("docs/index.md", "[x](#here)", "[x](#here)"),
        ("docs/index.md", "[x](nowhere.md)", "[x](nowhere.md)"),
        ("docs/index.md", "`[x](../NEWS.md)`", "`[x](../NEWS.md)`"),
        ("docs/index.md", "```\n[x](../NEWS.md)\n```\n[x](../NEWS.md)", "```\n[x](../NEWS.md)\n```\n[x](NEWS.md)"),
    ],
)
def test_links_are_turned_to_the_site(hooks, page, link, expected):
    assert hooks.relinked(link, page) == expected


def test_what_pages_lead_to_joins_the_site(hooks, tmp_path):
    (tmp_path / "docs/index.md").write_text("[news](../NEWS.md) [code](../plugins/x/code.py) [b](a/b.md)")
    (tmp_path / "NEWS.md").write_text("![plot](plot.png) [x](plugins/x) `[no](README.md)`")
    assert list(hooks.linked("docs/index.md")) == ["NEWS.md", "docs/a/b.md"]
    assert list(hooks.linked("NEWS.md")) == ["plot.png", "plugins/x/README.md"]


LISTS = """Text
- one
  goes on
  - inner

    | a | b |
    | --- | --- |
    | `c \\| d` | e |

    ```sh
    - no item
    ```
- two

      code

  words
- three

Text
1. first
2. second

More
| f | g |
| --- | --- |
| h | i |
"""


def test_pages_are_read_as_on_github(hooks):
    extensions = ["tables", "pymdownx.superfences"]
    found = markdown.markdown(hooks.reformatted(LISTS), extensions=extensions)
    assert found.count("<ul>") == 2 and found.count("<ol>") == 1 and found.count("<li>") == 6
    assert found.count("<table>") == 2 and "<code>c | d</code>" in found
    code = [re.sub("<.*?>", "", block).strip() for block in re.findall("<pre>.*?</pre>", found, flags=re.DOTALL)]
    assert code == ["- no item", "code"]
    inner = re.search(r"<ul>.*?(<ul>.*?</ul>)", found, flags=re.DOTALL).group(1)
    assert "<table>" in inner and "<pre>" in inner
    # Left as it is, it is read otherwise.
    assert "<table>" not in markdown.markdown(LISTS, extensions=extensions)


@pytest.mark.parametrize(
    "text",
    ["a\n\n- b\n- c\n", "words\nin lines\n", "| a |\n| --- |\n| b |\n", "    code - here\n", "```sh\n- a\n```\n"],
)
def test_pages_that_both_read_alike_stay_as_they_are(hooks, text):
    assert hooks.reformatted(text) == text


def test_marks_of_generated_parts_are_left_out(hooks):
    text = hooks.reformatted(
        '<!-- x:begin -->\n| a |\n| --- |\n<!-- x:end -->\n```toml title="t" append\n<!-- y -->\n```'
    )
    assert text == '\n| a |\n| --- |\n\n```toml title="t"\n<!-- y -->\n```'


# -- what the build refuses --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("page", "refused"),
    [
        ("[x](#here)\n\n## Here\n", None),
        ("[x](nowhere.md)\n", "nowhere.md"),
        ("[x](#nowhere)\n", "#nowhere"),
        ("[x](/absolute.md)\n", "absolute"),
        ("[x](more.md)\n", "more.md"),  # a page that is not in the navigation
    ],
)
def test_build_refuses(page, refused, tmp_path):
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{config}\nnav:\n  - Home: index.md\n", encoding="utf-8")
    for folder in ("docs", "tools"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tools" / "docs_site.py").write_bytes((ROOT / "tools" / "docs_site.py").read_bytes())
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{page}", encoding="utf-8")
    if "more.md" in page:
        (tmp_path / "docs" / "more.md").write_text("# More\n", encoding="utf-8")
    code, said = build(tmp_path, tmp_path / "site")
    if refused is None:
        assert (code, said) == (0, [])
    else:
        assert code != 0 and any("WARNING" in line for line in said) and refused in "\n".join(said)
