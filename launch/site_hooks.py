"""MkDocs hooks: pages of the site that are files outside docs/, and links between files.

README.md is the home page, CONTRIBUTING.md, CHANGELOG.md and the notebooks are pages, without a
copy in git. Links are those of the repository, as a code host resolves them: a link to a file that
is no page of the site becomes a link to the code host (`repo_url` in mkdocs.yml), or plain text
without one. A link to nothing stays as it is, and fails a strict build.
"""

import base64
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# File of the repository -> page of the site. Other files in docs/ keep their paths.
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Add the pages whose sources are outside docs/, and the pictures of notebooks."""
    files.remove(files.get_file_from_path("README.md"))
    for source, page in PAGES.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            text, pictures = notebook_page(path)
            for name, content in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=content))
        else:
            text = path.read_text()
        if page == "index.md":  # its navigation is the tabs
            text = f"---\nhide: [navigation]\n---\n\n{text}"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page from the repository's paths to the site's.

    A page without sections has no table of contents: its tables get the room.
    """
    if not re.search("^(## |::: )", FENCE.sub("", markdown), re.MULTILINE):
        page.meta.setdefault("hide", []).append("toc")
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match):
        picture, text, link = match.groups()
        new = site_link(link, source, page.file.src_uri, config.repo_url, files.src_uris)
        return f"{picture}[{text}]({new})" if new is not None else text

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):  # code keeps its brackets
        pieces += [LINK.sub(rewrite, nested(markdown[end : fence.start()])), fence.group()]
        end = fence.end()
    return "".join([*pieces, LINK.sub(rewrite, nested(markdown[end:]))])


def nested(text):
    """Text with the indentation in lists doubled: code hosts nest by two spaces, MkDocs by four."""
    lines, in_list = [], False
    for line in text.split("\n"):
        if line and not line.startswith(" "):
            in_list = bool(re.match(r"(?:[-*+]|\d+\.) ", line))
        indent = len(line) - len(line.lstrip(" ")) if in_list else 0
        lines.append(" " * indent + line)
    return "\n".join(lines)


def site_link(link, source, page, repo_url, uris):
    """Link of the site for a link of the repository.

    Args:
        link: as it is in the file.
        source: the file with the link, by its path in the repository.
        page: the page that is made from it, by its path in docs/.
        repo_url: address of the repository on a code host; None without one.
        uris: paths of the site's files in docs/.

    Returns: the link; None if the site has no such file and there is no code host.
    """
    path, mark, anchor = link.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    for name in (target, f"{target}/README.md"):
        uri = PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if uri in uris:
            return posixpath.relpath(uri, posixpath.dirname(page) or ".") + mark + anchor
    if target == "notebooks" and NOTEBOOKS:
        first = f"notebooks/{NOTEBOOKS[0].stem}.md"
        return posixpath.relpath(first, posixpath.dirname(page) or ".")
    if target.startswith("..") or not (ROOT / target).exists():
        return link
    return f"{repo_url.rstrip('/')}/blob/HEAD/{target}{mark}{anchor}" if repo_url else None


def notebook_page(path):
    """Markdown of a notebook with its outputs, and its pictures as {file name: bytes}."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above](../notebooks/{name})")
            else:
                printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip("\n")
                table = printed.startswith("| ") and "\n|---" in printed
                parts.append(printed if table else f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n", pictures
