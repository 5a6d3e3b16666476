"""Pickles that hold plain values only, read without Python's unpickler.

A pickle is a program for a machine with a stack. Python's own machine can be kept from calling things, but not from
taking memory: six bytes make it reserve 34 GB for its notes, and tuples in tuples end the process. This one knows the
codes that build text, bytes, numbers, lists, tuples and dicts; at any other it stops. It imports and calls nothing, and
takes no more memory than some 20 times the file.
"""

import codecs
import struct
from collections.abc import Callable
from typing import Any

CONTAINERS = 100_000  # lists, tuples and dicts in one file: a list of names is one
NOTES = 100_000  # values that are noted under numbers out of turn
PLAIN = (str, bytes, int, float, bool, type(None))
ENCODE = object()  # on the stack: what Python 3 calls in pickles of protocol 0 to 2 to have bytes


class NotPlain(ValueError):
    """The bytes are no whole pickle, or ask for more than plain values."""


def _number(text: bytes) -> int | bool:
    if text in (b"00", b"01"):  # how protocol 0 writes booleans
        return text == b"01"
    return int(text)


def _quoted(text: bytes) -> str:
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise NotPlain("a string without quotes")
    return _old(codecs.escape_decode(text[1:-1])[0])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old(data: bytes) -> str:
    """An 8-bit string of Python 2: names there are UTF-8 or of unknown encoding."""
    return data.decode("utf-8", "surrogateescape")


# code -> bytes of the length that follows, what becomes of so many bytes
COUNTED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    0x8C: (1, _text), ord("X"): (4, _text), 0x8D: (8, _text),
    ord("C"): (1, bytes), ord("B"): (4, bytes), 0x8E: (8, bytes),
    ord("U"): (1, _old), ord("T"): (4, _old),
    0x8A: (1, lambda data: int.from_bytes(data, "little", signed=True)),
    0x8B: (4, lambda data: int.from_bytes(data, "little", signed=True)),
}  # fmt: skip
# code -> bytes that follow, what becomes of them
FIXED: dict[int, tuple[int, Callable[[bytes], Any]]] = {
    ord("J"): (4, lambda data: int.from_bytes(data, "little", signed=True)),
    ord("K"): (1, lambda data: data[0]), ord("M"): (2, lambda data: int.from_bytes(data, "little")),
    ord("G"): (8, lambda data: struct.unpack(">d", data)[0]),
    ord("N"): (0, lambda _: None), 0x88: (0, lambda _: True), 0x89: (0, lambda _: False),
}  # fmt: skip
# code -> what becomes of the rest of the line
LINES: dict[int, Callable[[bytes], Any]] = {
    ord("I"): _number, ord("L"): lambda text: int(text.removesuffix(b"L")), ord("F"): float, ord("S"): _quoted,
    ord("V"): lambda text: text.decode("raw-unicode-escape"),
}  # fmt: skip
PUT, GET = {ord("q"): 1, ord("r"): 4, ord("p"): 0}, {ord("h"): 1, ord("j"): 4, ord("g"): 0}  # bytes; 0 = a line
TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}


class _Machine:
    """Reads `data` from front to end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.notes: list[Any] = []  # under 0, 1, 2, ...
        self.others: dict[int, Any] = {}  # under any other number
        self.containers = 0
        self.codes: dict[int, Callable[[], None]] = {
            0x80: self._protocol, 0x95: lambda: self._take(8) and None, ord("("): self._mark,
            0x94: lambda: self._note(len(self.notes)),
            ord("]"): lambda: self._push([]), ord("l"): lambda: self._push(self._marked()),
            ord("t"): lambda: self._push(tuple(self._marked())),
            ord("}"): lambda: self._push({}), ord("d"): lambda: self._push(self._pairs({}, self._marked())),
            ord("a"): self._append, ord("e"): self._extend, ord("s"): self._set, ord("u"): self._set_all,
            ord("0"): lambda: self._pop() and None, ord("2"): self._double,
            ord("c"): self._ask, 0x93: self._ask_stack, ord("R"): self._call,
        }  # fmt: skip

    def run(self) -> Any:
        while True:
            code = self._take(1)[0]
            if code in COUNTED:
                size, make = COUNTED[code]
                length = int.from_bytes(self._take(size), "little", signed=code in (ord("T"), 0x8B))
                self.stack.append(make(self._take(length)))
            elif code in FIXED:
                size, make = FIXED[code]
                self.stack.append(make(self._take(size)))
            elif code in self.codes:
                self.codes[code]()
            elif code in PUT:
                self._note(self._place(PUT[code]))
            elif code in GET:
                self.stack.append(self._noted(self._place(GET[code])))
            elif code in TUPLES:
                count = TUPLES[code]
                self._push(tuple([self._pop() for _ in range(count)][::-1]))
            elif code in LINES:
                self.stack.append(LINES[code](self._line()))
            elif code == ord("."):
                return self._pop()
            else:
                raise NotPlain(f"it has the code {bytes([code])!r}, which plain values do not need")

    def _take(self, length: int) -> bytes:
        if length < 0 or self.at + length > len(self.data):
            raise NotPlain("it is cut short")
        self.at += length
        return self.data[self.at - length : self.at]

    def _line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise NotPlain("it is cut short")
        return self._take(end + 1 - self.at)[:-1]

    def _push(self, value: list | tuple | dict) -> None:
        self.containers += 1
        if self.containers > CONTAINERS:
            raise NotPlain(f"it has more than {CONTAINERS:,} lists, tuples and dicts")
        self.stack.append(value)

    def _double(self) -> None:
        value = self._pop()
        self.stack += [value, value]

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise NotPlain("it takes what is not there")
        return self.stack.pop()

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _marked(self) -> list[Any]:
        if not self.marks:
            raise NotPlain("it takes what is not there")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise NotPlain(f"it fills what is no {kind.__name__}")
        return self.stack[-1]

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _extend(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def _set(self) -> None:
        value, key = self._pop(), self._pop()
        self._pairs(self._top(dict), [key, value])

    def _set_all(self) -> None:
        values = self._marked()
        self._pairs(self._top(dict), values)

    def _pairs(self, into: dict, values: list[Any]) -> dict:
        if len(values) % 2 or not all(isinstance(key, PLAIN) for key in values[::2]):
            raise NotPlain("it has a dict whose keys are no plain values")
        into.update(zip(values[::2], values[1::2], strict=True))
        return into

    def _place(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little") if size else int(self._line())

    def _note(self, place: int) -> None:
        value = self._pop()
        self.stack.append(value)
        if place == len(self.notes):
            self.notes.append(value)
        elif 0 <= place < len(self.notes):
            self.notes[place] = value
        else:
            self.others[place] = value
            if len(self.others) > NOTES:
                raise NotPlain("its notes are out of turn")

    def _noted(self, place: int) -> Any:
        if 0 <= place < len(self.notes):
            return self.notes[place]
        if place not in self.others:
            raise NotPlain("it takes what is not there")
        return self.others[place]

    def _protocol(self) -> None:
        if self._take(1)[0] > 5:
            raise NotPlain("it is of an unknown protocol")

    def _ask(self) -> None:
        self._wanted(_old(self._line()), _old(self._line()))

    def _ask_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._wanted(module, name)

    def _wanted(self, module: Any, name: Any) -> None:
        if (module, name) != ("_codecs", "encode"):
            told = ".".join(part[:80] if isinstance(part, str) else type(part).__name__ for part in (module, name))
            raise NotPlain(f"it asks for {told}")
        self.stack.append(ENCODE)

    def _call(self) -> None:
        given, what = self._pop(), self._pop()
        plain = type(given) is tuple and len(given) == 2 and isinstance(given[0], str) and given[1] == "latin1"
        if what is not ENCODE or not plain:
            raise NotPlain("it calls something")
        self.stack.append(given[0].encode("latin1"))
        self.containers -= 1  # the tuple was for the call


def loads(data: bytes) -> Any:
    """The value: text, bytes, numbers, None, lists, tuples and dicts. NotPlain for anything else."""
    try:
        return _Machine(data).run()
    except NotPlain:
        raise
    except ValueError as error:  # text or a number that is none
        raise NotPlain(str(error)) from error
