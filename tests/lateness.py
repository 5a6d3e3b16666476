"""Make one process of a run late in one phase; told before its script starts (forked.py)."""

import os
import time
from typing import Any

from pretrain import planning
from pretrain.keeping import Keeper
from pretrain.loader import ViewMaker
from pretrain.student_teacher import Student

PLACES = {
    "plan": (planning, "plan"),
    "data": (ViewMaker, "__getitems__"),
    "compute": (Student, "forward"),
    "checkpoint": (Keeper, "after"),
}


def be_late(phase: str, rank: int, seconds: float) -> None:
    """Process `rank` sleeps so long in this phase of each micro-batch or step, or once before them all ("plan")."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    owner, name = PLACES[phase]
    real = getattr(owner, name)

    def late(*given: Any, **named: Any) -> Any:
        print(f"late in {phase}", flush=True)
        time.sleep(seconds)
        return real(*given, **named)

    setattr(owner, name, late)
