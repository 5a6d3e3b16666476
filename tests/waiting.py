"""Where the host would wait for a GPU: where it reads a number of a tensor, or a size that depends on its values.

On a CPU nothing waits, so the reads are counted, with the function of this project that asked.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("tolist", "item", "cpu", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__")
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")


def asking() -> str:
    """`file.py:function` of the innermost frame inside the packages; of the test where there is none."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "pretrain") or path.is_relative_to(ROOT / "shards"):
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "test"


class Reads(TorchDispatchMode):
    """`with Reads() as reads:` counts them in `reads.found`, by who asks; `reads.stage` is put before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], int] = {}
        self.stage = ""
        self.patches = pytest.MonkeyPatch()

    def _note(self, who: str) -> None:
        self.found[self.stage, who] = self.found.get((self.stage, who), 0) + 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in OPERATORS:
            self._note(asking())
        return func(*args, **kwargs or {})

    def __enter__(self) -> "Reads":
        for name in METHODS:
            self.patches.setattr(Tensor, name, self._noting(getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        self.patches.undo()
        super().__exit__(*given)

    def _noting(self, real: Any) -> Any:
        def read(tensor: Tensor, *given: Any, **named: Any) -> Any:
            self._note(asking())
            with torch._C._DisableTorchDispatch():  # once is enough
                return real(tensor, *given, **named)

        return read

    def who(self, stage: str = "") -> set[str]:
        """Who asked in a stage."""
        return {who for of, who in self.found if of == stage}
