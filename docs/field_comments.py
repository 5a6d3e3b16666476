"""The comments beside the fields of configs and tuples as their text in the reference (an extension of griffe)."""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, Extension


@cache
def comments(path: Path) -> dict[int, tuple[str, bool]]:
    """By line: the comment, and whether it has the line for itself."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def beside(path: Path, first: int, last: int) -> str:
    """The comment of a field that stands in these lines: above it, in it and behind it."""
    found, above = comments(path), []
    while found.get(first - 1 - len(above), ("", False))[1]:
        above.insert(0, found[first - 1 - len(above)][0])
    return " ".join([*above, *(found[line][0] for line in range(first, last + 1) if line in found)])


class FieldComments(Extension):
    """A field without a docstring gets its comment."""

    def on_attribute_instance(self, *, node: ast.AST, attr: Attribute, **_: Any) -> None:
        """Called by griffe for each attribute."""
        if attr.docstring or not isinstance(node, ast.AnnAssign) or not attr.parent or not attr.parent.is_class:
            return
        if text := beside(attr.filepath, node.lineno, node.end_lineno):
            attr.docstring = Docstring(text, parent=attr)
