"""Training text that every Python installation carries, in three domains.

``code``
    Source of the standard library without its docstrings and longer comments.
``prose``
    English: those docstrings and comments, the docstrings of built-in modules and the topics
    of ``help()``. Examples, grammars, tables and signatures are left out.
``structured``
    JSON documents, tables and arithmetic with right answers, generated (``structured_text.py``).

Text is split by file: a hash of a file's path below the standard library decides whether
everything from it, code and docstrings alike, is for training or held out. Generated
files carry numbered names and follow the same rule. A held-out line or paragraph that also
stands in a training file is dropped, because the standard library repeats itself.

Nothing here does work at import, reads a clock or draws from a global generator: one
Python version gives one corpus, in one order.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from structured_text import structured_file

DOMAINS = ("code", "prose", "structured")
HELD_OUT_ONE_IN = 12
STRUCTURED_FILES = 1500

SKIPPED_FOLDERS = {
    "__pycache__",
    "encodings",  # tables of characters
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
}
C_MODULES = tuple("array binascii math select unicodedata zlib _datetime _decimal _socket".split())
MIN_CODE_CHARS = 200
MAX_TABLE_LINES = 60
MAX_SOURCE_BYTES = 250_000  # beyond are tables; topics.py is read apart
MIN_PARAGRAPH_CHARS = 40


@dataclass
class Split:
    """Documents of one domain, each a string, in a fixed order."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """File ``text`` under the side that ``name`` belongs to."""
        if text:
            (self.held_out if is_held_out(name) else self.train).append(text)


def is_held_out(name: str) -> bool:
    """Whether the file ``name`` is kept from training; the same on every machine."""
    # pydoc_data/topics.py is a quarter of all prose: training needs it
    if name == "pydoc_data/topics.py":
        return False
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def build_corpus(seed: int = 0, structured_files: int = STRUCTURED_FILES) -> dict[str, Split]:
    """Build all three domains, with held-out repetitions of training text removed."""
    corpus = {domain: Split() for domain in DOMAINS}
    for name, source, tree in library_modules():
        code, comments = take_comments(without_docstrings(source, tree))
        corpus["code"].add(name, tidy_code(code))
        corpus["prose"].add(name, "\n\n".join(docstring_paragraphs(tree) + comments))
    for name, text in builtin_docstrings():
        corpus["prose"].add(name, text)
    for topic, text in help_topics():
        corpus["prose"].add("pydoc_data/topics.py", f"{topic}\n\n{text}")
    for index in range(structured_files):
        corpus["structured"].add(f"structured/{index:05d}", structured_file(seed, index))
    corpus["code"].held_out = drop_repeated(corpus["code"], "\n\n")
    corpus["prose"].held_out = drop_repeated(corpus["prose"], "\n\n")
    return corpus


def drop_repeated(split: Split, separator: str) -> list[str]:
    """Held-out documents without the blocks that also stand in a training document."""
    seen = {block.strip() for text in split.train for block in text.split(separator)}
    kept = []
    for text in split.held_out:
        blocks = [block for block in text.split(separator) if block.strip() not in seen]
        if blocks:
            kept.append(separator.join(blocks))
    return kept


def library_modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (path below the standard library, source, tree) of every module worth reading."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if SKIPPED_FOLDERS & set(folders) or any(f.startswith("config-") for f in folders):
            continue
        if relative.name.startswith("_sysconfigdata") or path.stat().st_size > MAX_SOURCE_BYTES:
            continue
        try:
            source = path.read_text(encoding="utf-8").replace("\f", " ")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        yield relative.as_posix(), source, tree


def docstring_nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """Yield (owner, statement) of each docstring in ``tree``, in source order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, owners) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                found.append((node, first))
    yield from sorted(found, key=lambda pair: pair[1].lineno)


def without_docstrings(source: str, tree: ast.Module) -> str:
    """Source without docstrings, and without the middle of long tables of data."""
    lines = source.split("\n")
    for owner, statement in docstring_nodes(tree):
        start, end = statement.lineno - 1, statement.end_lineno
        if lines[start][: statement.col_offset].strip():
            continue  # the docstring shares its line with the def
        indent = " " * statement.col_offset
        lines[start:end] = [""] * (end - start)
        if len(owner.body) == 1 and indent:
            lines[start] = indent + "pass"
    for node in tree.body:
        is_table = isinstance(getattr(node, "value", None), (ast.Dict, ast.List, ast.Tuple))
        if is_table and node.end_lineno - node.lineno > MAX_TABLE_LINES:
            lines[node.lineno : node.end_lineno - 1] = [""] * (node.end_lineno - node.lineno - 1)
    return "\n".join(lines)


def take_comments(source: str) -> tuple[str, list[str]]:
    """Split ``source`` into what remains and the paragraphs of its longer English comments."""
    paragraphs = []

    def take(match: re.Match) -> str:
        text = re.sub(r"(?m)^[ \t]*#+ ?", "", match.group())
        english = english_paragraphs(text)
        paragraphs.extend(english)
        return "" if english else match.group()

    remaining = re.sub(r"(?m)(?:^[ \t]*#.*\n){2,}", take, source)
    return remaining, paragraphs


def tidy_code(source: str) -> str:
    """Source with spaces for tabs and no trailing blanks; empty if short or not ASCII."""
    text = "\n".join(line.expandtabs().rstrip() for line in source.split("\n"))
    text = re.sub(r":\n\n+(?= )", ":\n", text)  # where a docstring stood
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"
    return text if text.isascii() and len(text) >= MIN_CODE_CHARS else ""


def docstring_paragraphs(tree: ast.Module) -> list[str]:
    """Readable English paragraphs of every docstring in ``tree``."""
    paragraphs = []
    for _, statement in docstring_nodes(tree):
        paragraphs += english_paragraphs(inspect.cleandoc(statement.value.value))
    return paragraphs


def builtin_docstrings() -> Iterator[tuple[str, str]]:
    """Yield (name, readable text) of the docstrings of each module written in C."""
    seen = set()
    for name in sorted({*sys.builtin_module_names, *C_MODULES}):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this platform
        kept = []
        for text in docstrings_of(module):
            kept += [p for p in english_paragraphs(inspect.cleandoc(text)) if p not in seen]
            seen.update(kept)
        yield f"builtin/{name}", "\n\n".join(dict.fromkeys(kept))


def docstrings_of(module: ModuleType) -> Iterator[str]:
    """Yield the docstrings of ``module``, its functions, its classes and their methods."""
    for _, item in [("", module), *sorted(vars(module).items())]:
        members = sorted(vars(item).items()) if isinstance(item, type) else []
        for _, thing in [("", item), *members]:
            if isinstance(text := getattr(thing, "__doc__", None), str):
                yield text


def help_topics() -> Iterator[tuple[str, str]]:
    """Yield (topic, readable text) of each ``help()`` topic, without texts inside others."""
    from pydoc_data.topics import topics

    seen = set()
    for name in sorted(topics):
        kept = [p for p in english_paragraphs(topics[name]) if p not in seen]
        seen.update(kept)
        if kept:
            yield name, "\n\n".join(kept)


def english_paragraphs(text: str) -> list[str]:
    """Paragraphs of ``text`` that read as English, each on one line (one per list item).

    Examples at the prompt, grammars, tables, signatures and underlined titles are left out.
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().split("\n")]
        joined = re.sub(
            r"\s+", " ", re.sub(r"\n(?![*+-] )", " ", "\n".join(lines)).replace("\n", "\0")
        )
        joined = joined.replace("\0", "\n").strip()
        if is_english(joined):
            paragraphs.append(joined)
    return paragraphs


def is_english(text: str) -> bool:
    """Whether ``text`` reads as a sentence rather than code, a table or a title."""
    if len(text) < MIN_PARAGRAPH_CHARS or not text.isascii():
        return False
    if re.search(r">>>|::=|\.\.\. |[=~^+*-]{4,}|^\$|^@|^#|^def |^class |^import ", text):
        return False
    words = re.findall(r"[A-Za-z]+", text)
    plain = sum(c.isalpha() or c in " ,." for c in text) / len(text)
    common = sum(w.lower() in COMMON_WORDS for w in words)
    return plain > 0.85 and len(words) >= 6 and common >= max(2, len(words) // 10)


COMMON_WORDS = frozenset(
    "a an the is are be was of to in on for from with as by at it its this that these if when then "
    "or and not no can may must will should which who has have do does return returns used use all "
    "any each one same other only into than but so".split()
)
