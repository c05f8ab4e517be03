"""Hooks of mkdocs: pages of the root folder join the site, and links out of docs/ become text.

The pages are written for a code host, where a link may name any file of the repository. The site
holds docs/ and the pages in `ROOT_PAGES`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages in the root folder of the repository, and their names on the site."""

CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the root folder."""
    root = Path(config.config_file_path).parent
    for source, name in ROOT_PAGES.items():
        text = (root / source).read_text("utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fits a page's relative links to the site; a link to a file that it lacks becomes text."""
    sources = {name: source for source, name in ROOT_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        bang, text, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        if path not in ROOT_PAGES and not (path.startswith("docs/") and name in files.src_uris):
            return text
        return f"{bang}[{text}]({posixpath.relpath(name, folder)}{anchor})"

    # code stays as it is
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(on_site, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(on_site, markdown[end:])])
