"""Finds the documented objects of the standard library, and cleans their docstrings."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["clean_docstring", "find_documented", "find_sources"]

MIN_CHARS, MAX_CHARS = 20, 2_000

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_bundled", "dist-packages", "idle_test", "pydoc_data", "site-packages"}
    | {"test", "tests"}
)
# Private modules that hold the documented Python source of a public one.
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
PROPERTY_DECORATORS = frozenset({"property", "cached_property", "functools.cached_property"})

# Paragraphs that name a file's authors or licence, and version-control tags.
BANNER = re.compile(
    r"copyright \(?c|\(c\) copyright|all rights reserved|^\W*(written|cloned|contributed) by\b"
    r"|licensed to|\$(Id|Revision|Date)\b|under the terms of|licenses when using",
    re.IGNORECASE | re.MULTILINE,
)
# What follows such a line is a note by the authors to themselves.
AUTHORS_NOTE = re.compile(r"^\W*(XXX|TODO|FIXME)\b.*", re.MULTILINE | re.DOTALL)
# Docstrings without content: generated tables, and pointers to another docstring.
NO_CONTENT = re.compile(
    r"character mapping codec|^see (the )?(base|parent|super)\S*( class)?\W*$"
    r"|^(internal|private)\b",
    re.IGNORECASE,
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def find_sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield `(module name, file)` of each public standard library module under `root`, sorted."""
    found: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(_module_name(path.relative_to(root)), path) for path in paths]
    yield from sorted(item for item in found if _is_stdlib(item[0]))


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return PUBLIC_NAMES.get(name, name)


def _is_stdlib(module: str) -> bool:
    # The folder also holds files of the distribution or of the user, such as sitecustomize.py.
    return module.partition(".")[0] in sys.stdlib_module_names and _is_public(module)


def _is_public(name: str) -> bool:
    return all(not part.startswith("_") or part.endswith("__") for part in name.split("."))


def find_documented(module: str, tree: ast.Module) -> Iterator[tuple[str, str, str, str]]:
    """Yield `(kind, name, heading, answer)` of each object with a usable docstring in a module."""
    for kind, name, node in _walk(module, tree, inside_class=False):
        if not _is_public(name):
            continue
        if answer := clean_docstring(ast.get_docstring(node, clean=False) or ""):
            signature = _signature(node, kind) if isinstance(node, FunctionNode) else ""
            yield kind, name, name + signature, answer


def _walk(
    name: str, node: ast.Module | ast.ClassDef | FunctionNode, *, inside_class: bool
) -> Iterator[tuple[str, str, ast.Module | ast.ClassDef | FunctionNode]]:
    yield _kind(node, inside_class=inside_class), name, node
    if isinstance(node, FunctionNode):
        return  # definitions inside a function cannot be reached by name
    for child in _definitions(node.body):
        yield from _walk(f"{name}.{child.name}", child, inside_class=isinstance(node, ast.ClassDef))


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | FunctionNode]:
    for statement in body:
        if isinstance(statement, ast.ClassDef | FunctionNode):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):  # by platform, or after a failed import
            yield from _definitions(statement.body)
            for handler in getattr(statement, "handlers", ()):
                yield from _definitions(handler.body)
            yield from _definitions(statement.orelse)


def _kind(node: ast.AST, *, inside_class: bool) -> str:
    if not isinstance(node, FunctionNode):
        return "class" if isinstance(node, ast.ClassDef) else "module"
    if _decorators(node) & PROPERTY_DECORATORS:
        return "property"
    if any(name.endswith("SpecialForm") for name in _decorators(node)):
        return "special form"  # `typing.Optional` is written as a function but is not one
    return "method" if inside_class else "function"


def _decorators(node: FunctionNode) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def _signature(node: FunctionNode, kind: str) -> str:
    """Return the arguments as a caller sees them: without `self`; empty for a property."""
    if kind not in {"function", "method"}:
        return ""
    arguments = copy.copy(node.args)
    if kind == "method" and "staticmethod" not in _decorators(node):
        field = "posonlyargs" if arguments.posonlyargs else "args"
        setattr(arguments, field, getattr(arguments, field)[1:])
    return f"({ast.unparse(arguments)})"


def clean_docstring(docstring: str) -> str:
    """Return the docstring without indentation and banners, or "" if it is not usable."""
    text = AUTHORS_NOTE.sub("", inspect.cleandoc(docstring))
    paragraphs = re.split(r"\n\s*\n", text)
    text = "\n\n".join(part for part in paragraphs if not BANNER.search(part)).strip()
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return text if _is_usable(text) else ""


def _is_usable(text: str) -> bool:
    printable = all(line.isprintable() for line in text.split("\n"))
    readable = printable and "\N{REPLACEMENT CHARACTER}" not in text
    in_range = MIN_CHARS <= len(text) <= MAX_CHARS
    return readable and in_range and not NO_CONTENT.search(text) and _has_prose(text)


def _has_prose(text: str) -> bool:
    """Return whether a third of the text, and at least three words, are outside doctests."""
    # A doctest is a prompt and the lines after it, up to the next blank line.
    prose = re.sub(r"^[ ]*>>>.*(\n[ ]*\S.*)*", "", text, flags=re.MULTILINE)
    words = re.findall(r"[A-Za-z]{2,}", prose)
    return len(words) >= 3 and 3 * len(prose) >= len(text)
