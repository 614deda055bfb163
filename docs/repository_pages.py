"""MkDocs hook: pages keep their paths of the repository, so that the links between them hold on the site as well."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "rlhf_mel/assets/README.md", "docs/*.md")
LINKED = ("docs/comparison/*.png", "docs/comparison/*.jsonl", "docs/images/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and what they link to."""
    for pattern in (*PAGES, *LINKED):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
