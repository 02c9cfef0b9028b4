"""Sentences that every Python has, in two classes: docstrings and comments of its library.

They are split by file, and files differ in style, so that training and test text are not of the
same hand.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

from language.corpus import ALPHABET, LEFT_OUT, SPLIT_SEED

CLASSES = ("comment", "docstring")
SHORTEST, LONGEST = 24, 72  # characters
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
PER_FILE = 16  # of each class, so that no file dominates


class Sentence(NamedTuple):
    """A line of text and its class, a number into CLASSES."""

    text: str
    label: int


def sentences(*sizes: int) -> list[list[Sentence]]:
    """Parts of these sizes, both classes equally often, no file in two of them.

    Raises ValueError if the library has too few.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & {*p.relative_to(root).parts})
    random.Random(SPLIT_SEED).shuffle(paths)
    order, seen = random.Random(SPLIT_SEED), set[str]()
    remaining, parts = iter(paths), []
    for size in sizes:
        part: list[Sentence] = []
        while len(part) < size:
            path = next(remaining, None)
            if path is None:
                raise ValueError(f"sizes={sizes}: the standard library has too few sentences")
            fresh = [
                [*dict.fromkeys(text for text in own if text not in seen)] for own in _of_file(path)
            ]
            count = min(PER_FILE, *map(len, fresh))
            for label, own in enumerate(fresh):
                part += [Sentence(text, label) for text in order.sample(own, count)]
                seen.update(own)
        order.shuffle(part)
        parts.append(part[:size])
    return parts


def _of_file(path: Path) -> tuple[list[str], list[str]]:
    """The first lines of comments and of docstrings."""
    source = path.read_text(encoding="utf-8", errors="replace")
    nodes = [*ast.walk(ast.parse(source))]
    in_strings = {
        line for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    docstrings = [
        text.splitlines()[0].strip() for node in nodes
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node))
    ]
    comments, last = [], -1
    for number, line in enumerate(source.splitlines(), start=1):
        if line.lstrip().startswith("#") and number not in in_strings:
            if number > last + 1:
                comments.append(line.strip().lstrip("#! "))
            last = number
    return [*filter(_is_sentence, comments)], [*filter(_is_sentence, docstrings)]


def _is_sentence(line: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in line)
    is_ascii = all(character in ALPHABET for character in line)
    return SHORTEST <= len(line) <= LONGEST and letters > 0.8 * len(line) and is_ascii
