"""A disk that takes its time, in a forked run: it is told before its script starts. See forked.py."""

import time

from pretrain import committed


def slow(seconds: float) -> None:
    """Each file of tensors takes so long more."""
    real = committed.save_file

    def save_file(*given) -> None:
        time.sleep(seconds)
        real(*given)

    committed.save_file = save_file
