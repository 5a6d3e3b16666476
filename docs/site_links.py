"""Links of the pages, for the code host and for the site alike (a hook of mkdocs.yml).

On the code host a link is a path in the repository: `[reader.py](../shards/reader.py)`. In the site, pages keep their
links and go by their titles, README.md becomes the home page, CONTRIBUTING.md and SECURITY.md become pages, and any
other file that is linked to is shown as a page of its own, so that nothing needs the network. A link to what does not
exist stops the build.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("CONTRIBUTING.md", "SECURITY.md")
HOME = "index.md"
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cfg": "ini", ".toml": "toml"}
SHOWN = "---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n``````` {{ .{language} .file }}\n{text}\n```````\n"


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as code hosts make it: python-markdown's own would join hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def links(text: str) -> list[tuple[int, str, str]]:
    """Relative links outside of code: number of the line, path, anchor with its #."""
    found, fenced = [], False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            bare = re.sub(r"`[^`]*`", "x", line)
            found += [(number, match["path"], match["anchor"] or "") for match in LINK.finditer(bare)]
    return found


def place(path: Path) -> str:
    """Where a file of the repository is in the site; FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return HOME
    return name.removeprefix("docs/") if name.startswith("docs/") or name in ROOT_PAGES else f"repo/{name}.md"


def titles(nav: list[Any]) -> dict[str, str]:
    """Pages of the navigation -> their titles there."""
    found: dict[str, str] = {}
    for entry in nav:
        for title, value in entry.items() if isinstance(entry, dict) else ():
            found |= {value: title} if isinstance(value, str) else titles(value)
    return found


def source(src_uri: str) -> Path:
    """The file of the repository that a page of the site was made from."""
    return ROOT / src_uri if src_uri in ROOT_PAGES else ROOT / "docs" / src_uri


def on_config(config: Any) -> Any:
    """Anchors as on the code host."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages of the root, and files that some page links to."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    for page in pages:
        path = source(page)
        for _, target, _ in links(path.read_text(encoding="utf-8")):
            linked = (path.parent / target).resolve()
            uri = place(linked)
            if uri.startswith("repo/") and uri not in files.src_uris:
                text = linked.read_text(encoding="utf-8")
                name = linked.relative_to(ROOT).as_posix()
                shown = SHOWN.format(path=name, language=LANGUAGES.get(linked.suffix, "text"), text=text)
                files.append(File.generated(config, uri, content=shown))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links of the repository -> links of the site."""
    if page.file.src_uri.startswith("repo/"):
        return markdown
    folder, here = source(page.file.src_uri).parent, os.path.dirname(page.file.src_uri)
    known = titles(config.nav)

    def moved(match: re.Match) -> str:
        target, text = place((folder / match["path"]).resolve()), match["text"]
        if text.endswith(".md") and target in known:  # in the site, pages go by their titles
            text = known[target]
        return f"[{text}]({os.path.relpath(target, here or '.')}{match['anchor'] or ''})"

    lines, fenced = markdown.split("\n"), False
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines[number] = LINK.sub(moved, line)
    return "\n".join(lines)
