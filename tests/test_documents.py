"""The documents: relative links lead somewhere, and the source files that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
BLOCK = re.compile(r"```.*?```|^ {4}[^\n]*", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
SOURCE = re.compile(r"[\w/]+\.(?:py|h|cpp|cuh?|sh)\b")
FOLDERS = ("csrc", "mfef_ext", "tests", "benchmarks", "scripts")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(d.relative_to(ROOT)) for d in DOCUMENTS]
)


def anchors(text):
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each_document
def test_no_link_is_broken(document):
    for link in LINK.findall(CODE.sub("", document.read_text())):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@each_document
def test_source_files_exist(document):
    files = [f"/{p.relative_to(ROOT)}" for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    spans = SPAN.findall(BLOCK.sub("", document.read_text()))
    for name in (n for span in spans for n in SOURCE.findall(span)):
        assert "NAME" in name or any(f.endswith(f"/{name}") for f in files), name
