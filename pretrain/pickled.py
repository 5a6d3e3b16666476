"""A look at the codes of a pickle before torch's restricted reader runs it.

That reader calls nothing that could do harm, but a short file can still take all memory (a bytearray of any size), or
end the process (Python takes the hash of tuples in tuples by recursion).
"""

import io
import pickletools
from pathlib import Path

from recipes.errors import UserError

LONGEST = 16 << 20  # bytes; a tensor takes about 300
DEEPEST = 100  # tuples in one another
NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "BINPERSID")


def check(data: bytes, most: int, path: Path) -> None:
    """Look at up to `most` pickles one behind the other. UserError naming the file for what is above; ValueError for
    what is no pickle."""
    stream = io.BytesIO(data)
    for _ in range(most):
        if stream.tell() == len(data):
            return
        if _depth(stream, path) > DEEPEST:
            raise UserError(f"{path} holds tuples in tuples without end, which no checkpoint does: it is refused")


def _depth(stream: io.BytesIO, path: Path) -> int:
    """How deep tuples lie in one another in the next pickle, and what is made of them."""
    stack: list[int] = []  # depth of each value
    marks: list[int] = []
    notes: dict[int, int] = {}
    deepest = 0
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST") and str(argument).endswith(" bytearray"):
            raise UserError(f"{path} asks for a bytearray, which may take any amount of memory: it is refused")
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            notes[len(notes) if argument is None else argument] = stack[-1] if stack else 0
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(notes.get(argument, 0))
        else:
            start = len(stack)
            for kind in reversed(code.stack_before):
                if kind is pickletools.stackslice:
                    start = marks.pop() if marks else 0
                elif kind is not pickletools.markobject:
                    start -= 1
            taken = stack[max(0, start) :]
            del stack[max(0, start) :]
            depth = 1 + max(taken, default=0) if code.name in NESTING else 0
            deepest = max(deepest, depth)
            stack += [depth] * len(code.stack_after)
    return deepest
