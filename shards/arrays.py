"""Arrays on disk (.npy) that others may have written: the header is looked at before any memory is taken."""

import io
import math
import os
import tokenize
from typing import BinaryIO, NamedTuple

import numpy as np

# what numpy raises for the header of a damaged .npy, which it reads as Python
DAMAGE = (
    *(ValueError, EOFError, SyntaxError, TypeError, KeyError, IndexError, OverflowError, MemoryError, RecursionError),
    *(AttributeError, tokenize.TokenError),
)


class Header(NamedTuple):
    """What a .npy file says about itself."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # bytes from the start of the file to the first number

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> Header:
    """The header at the start of a file. ValueError where there is none, or one that makes no sense."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape}")
    return Header(shape, dtype, file.tell())


def from_bytes(data: bytes) -> np.ndarray:
    """The array of a whole .npy file. ValueError where the bytes are none, or of Python objects."""
    file = io.BytesIO(data)
    header = read_header(file)
    if header.dtype.hasobject or header.size != len(data):
        raise ValueError(f"{len(data):,} bytes are no array of {header.dtype} {header.shape}")
    return np.frombuffer(data, header.dtype, offset=header.start).reshape(header.shape)


def check_size(file: BinaryIO) -> Header:
    """The header of an array file, whose length must be what it says. ValueError where it is not."""
    header, size = read_header(file), os.fstat(file.fileno()).st_size
    if header.size != size:
        raise ValueError(f"it has {size:,} bytes where {header.size:,} would hold {header.dtype} {header.shape}")
    return header
