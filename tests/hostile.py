"""Hostile files are read in a process of their own that watches itself: what it opens to write, starts or calls, how
much memory it takes, how it ends."""

import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import resource
import signal
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recipes.errors import UserError

DEEP = "[" * 100_000 + "]" * 100_000
SECONDS = 30  # until a reader is stopped
MEGABYTES = 500  # that a reader may take above what the process had
# events of sys.addaudithook that reading must not cause
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"),
    *("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.mkdir"),
    *("shutil.rmtree", "shutil.copyfile", "shutil.move", "shutil.unpack_archive", "socket.connect", "socket.bind"),
    *("urllib.Request", "ftplib.connect", "webbrowser.open", "ctypes.call_function", "code.__new__"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Trap:
    """Pickles to a call that leaves the file `sign` behind."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch {self.sign}",)


class Found(NamedTuple):
    """How a process fared with a file."""

    outcome: str  # "refused", "read", or what it died of
    told: str  # the sentence, or the traceback
    megabytes: int  # that it took at most
    deeds: list[str]  # forbidden ones

    def faults(self, expected: str) -> list[str]:
        """What is wrong with it."""
        wrong = [] if self.outcome in expected.split(" or ") else [f"{self.outcome}: {self.told}"]
        wrong += [f"{self.megabytes} MB"] if self.megabytes > MEGABYTES else []
        return wrong + self.deeds


def _memory(name: str) -> int:
    """A line of /proc/self/status, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) >> 10


def _watch(deeds: list[str]) -> None:
    def hook(event: str, given: tuple) -> None:
        if event in FORBIDDEN:
            deeds.append(f"{event} {given!r:.200}")
        elif event == "open" and isinstance(given[2], int) and given[2] & WRITING and given[0] != os.devnull:
            deeds.append(f"open to write {given[0]!r:.200}")

    sys.addaudithook(hook)


def _attempt(read: Callable[[], Any], deeds: list[str]) -> Found:
    """In the child."""
    signal.alarm(SECONDS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _memory("VmRSS")
    deeds.clear()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            read()
        outcome, told = "read", ""
    except UserError as error:
        outcome, told = "refused", str(error)
    except BaseException as error:
        outcome, told = f"crash, {type(error).__name__}", traceback.format_exc()[-1500:]
    return Found(outcome, told[:2000], _memory("VmHWM") - before, [*deeds])


def _child(reads: list[Callable[[], Any]], pipe: int) -> None:
    """Tell what became of each, a line of JSON at a time."""
    with contextlib.suppress(AttributeError):  # glibc: free memory of the process before would hide what is taken
        ctypes.CDLL(None).malloc_trim(0)
    sys.dont_write_bytecode = True
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    deeds: list[str] = []
    _watch(deeds)
    for read in reads:
        os.write(pipe, json.dumps(_attempt(read, deeds)).encode() + b"\n")


def examine(*reads: Callable[[], Any]) -> list[Found]:
    """What they do, one after the other in a forked process; in another one after each that ends it."""
    done: list[Found] = []
    while len(done) < len(reads):
        out, into = os.pipe()
        child = os.fork()
        if not child:
            try:
                _child([*reads[len(done) :]], into)
            finally:
                os._exit(0)
        os.close(into)
        with os.fdopen(out) as pipe:
            done += [Found(*json.loads(line)) for line in pipe]
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            done.append(Found(f"died of signal {os.WTERMSIG(status)}", "", 0, []))
    return done


def survey(cases: dict[str, tuple[str, Callable[[], Any]]]) -> list[str]:
    """The faults of all cases. A case is what is expected ("refused", "read" or "refused or read") and the reader."""
    found = examine(*(read for _, read in cases.values()))
    pairs = zip(cases.items(), found, strict=True)
    return [f"{name}: {fault}" for (name, (expected, _)), each in pairs for fault in each.faults(expected)]


def put(path: Path, data: bytes | str) -> Path:
    """A file with that content."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def hole(path: Path, size: int) -> Path:
    """A file of zeros that takes no room on disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def trapped(sign: Path, protocol: int = 2) -> bytes:
    """A pickle that runs a program when Python's own reader gets it."""
    return pickle.dumps({"keys": [Trap(sign)]}, protocol)


def zip_bomb(name: str, size: int) -> bytes:
    """A zip with one member of `size` zeros, in a thousandth of that."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = block * (size >> 20) + packer.flush()
    length, packed = min(size, 2**32 - 1), len(data)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0x21, 0, packed, length, len(name), 0) + name.encode()
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0x21, 0, packed, length, len(name), *[0] * 6)
    directory = entry + name.encode()
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(local) + packed, 0)
    return local + data + directory + end


def png(width: int, height: int, chunks: list[tuple[bytes, bytes]] = [], bits: int = 1, kind: int = 0) -> bytes:  # noqa: B006
    """A PNG of black pixels, with chunks in front of them."""
    row = 1 + -(-width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind] // 8)
    header = struct.pack(">2L5B", width, height, bits, kind, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(row * min(256, height - at))) for at in range(0, height, 256))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows + packer.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data)) for name, data in parts
    )
