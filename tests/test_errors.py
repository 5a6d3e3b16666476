"""What a user can mend becomes one sentence and an exit code; what only we can mend keeps its traceback."""

import errno
import os
import pickle

import pytest
from torch.utils.data import DataLoader

from recipes.errors import Exit, UserError, disk_sentence, naming, plain_errors


def outcome(error: BaseException, capsys) -> tuple[int, str]:
    """Exit code and what is told when an entry script raises this."""
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise error
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ("disk is full while writing", "make room there")),
        (errno.EDQUOT, ("quota is used up", "delete files")),
        (errno.EFBIG, ("ulimit -f", "raise the limit")),
        (errno.EROFS, ("read-only file system", "another folder")),
        (errno.EACCES, ("no permission for", "owner or mode")),
        (errno.EPERM, ("does not permit to change", "owner, mode")),
        (errno.EIO, ("input/output error", "system's log")),
        (errno.ESTALE, ("stale file handle", "mount the folder anew")),
    ],
)
def test_the_disk_s_answers_name_the_file_and_what_to_do(number, words, capsys):
    code, told = outcome(OSError(number, os.strerror(number), "/runs/a/metrics.jsonl"), capsys)
    assert code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert all(word in told for word in (*words, "/runs/a/metrics.jsonl"))


def test_other_faults_of_the_system_keep_their_traceback():
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        PermissionError(errno.EPERM, "no"),
        OSError("?"),
    ):
        with pytest.raises(OSError, match=r"No such file|no|\?"), plain_errors():
            raise error
        assert disk_sentence(error) is None


def test_exit_brings_its_own_code_and_survives_a_pipe(capsys):
    error = pickle.loads(pickle.dumps(Exit("stopped by SIGTERM after step 7; the same command goes on", 75)))
    assert (error.message, error.code) == ("stopped by SIGTERM after step 7; the same command goes on", 75)
    assert outcome(error, capsys) == (75, "stopped by SIGTERM after step 7; the same command goes on\n")


def test_an_interruption_is_one_line(capsys):
    assert outcome(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    assert outcome(UserError("x must be 1"), capsys) == (2, "error: x must be 1\n")


def test_the_name_gets_into_errors_of_a_descriptor(tmp_path):
    descriptor = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor") as caught, naming(tmp_path / "a"):
        os.write(descriptor, b"x")
    assert caught.value.filename == str(tmp_path / "a")


class Refused:
    """A data set that meets a full disk, with a file's name and without."""

    def __init__(self, name: str | None):
        self.name = name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)


@pytest.mark.parametrize("name", [None, "/cache/a: b's.part"])
def test_a_full_disk_under_a_worker_of_a_loader_is_told_like_any_other(name, capsys):
    with pytest.raises(SystemExit), plain_errors():
        list(DataLoader(Refused(name), num_workers=1))
    told = capsys.readouterr().err
    assert f"error: the disk is full while writing {name or 'a file'}: make room" in told
    assert "Traceback" not in told
