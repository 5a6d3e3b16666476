"""Errors as the libraries of the schemes raise them are told apart: those that may pass and those that stay."""

import socket

import pytest

from shards import faults

URL = "s3://bucket/set/a.tar"
NO_PERMISSION, NOT_THERE, REFUSED = "no permission", "does not exist", "is refused"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def amazon(code: str, status: int) -> Exception:
    """The error of s3fs for an answer of S3."""
    errors, exceptions = pytest.importorskip("s3fs.errors"), pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return errors.translate_boto_error(exceptions.ClientError(answer, "GetObject"))


@pytest.mark.parametrize(
    "code, status, expected",
    [
        *[("NoSuchKey", 404, NOT_THERE), ("NoSuchBucket", 404, NOT_THERE), ("404", 404, NOT_THERE)],
        *[("AccessDenied", 403, NO_PERMISSION), ("SignatureDoesNotMatch", 403, NO_PERMISSION)],
        *[("InvalidAccessKeyId", 403, NO_PERMISSION), ("ExpiredToken", 400, NO_PERMISSION)],
        *[("InvalidRange", 416, "is shorter"), ("InvalidBucketName", 400, REFUSED), ("Other", 405, REFUSED)],
        *[("SlowDown", 503, None), ("InternalError", 500, None), ("RequestTimeout", 400, None), ("Other", 502, None)],
        *[("TooManyRequests", 429, None)],
    ],
)
def test_answers_of_s3(code, status, expected):
    sentence = faults.final(amazon(code, status), URL)
    assert sentence is None if expected is None else (expected in sentence and URL in sentence)


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code: int):
        super().__init__("the answer")
        self.code = code


class Requests(Exception):
    """As requests has it: the response beside the text."""

    def __init__(self, status: int):
        super().__init__("the answer")
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize("kind", [HttpError, Requests])
@pytest.mark.parametrize("status, expected", [(404, NOT_THERE), (401, NO_PERMISSION), (409, REFUSED), (503, None)])
def test_answers_of_others(kind, status, expected):
    for error in (kind(status), caused(OSError("wrapped"), kind(status))):
        sentence = faults.final(error, URL)
        assert sentence is None if expected is None else expected in sentence


@pytest.mark.parametrize(
    "error",
    [
        *[ConnectionResetError(), TimeoutError(), socket.gaierror(-3, "no name"), EOFError(), OSError("half a block")],
        *[RuntimeError("Session is closed"), UnicodeDecodeError("utf-8", b"", 0, 1, "damaged answer")],
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass(error):
    assert faults.final(error, URL) is None


@pytest.mark.parametrize(
    "error, expected",
    [(FileNotFoundError("x"), NOT_THERE), (PermissionError("x"), NO_PERMISSION), (IsADirectoryError("x"), NOT_THERE)],
)
def test_errors_of_a_plain_file_system_stay(error, expected):
    assert expected in faults.final(error, URL)
    assert expected in faults.final(caused(error, KeyError("x")), URL)


@pytest.mark.parametrize(
    "url, expected",
    [
        ("https://me:secret@host:80/a/b.tar?X-Amz-Signature=secret#x", "https://host:80/a/b.tar"),
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("memory://a", "memory://a"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_urls_are_shown_without_secrets(url, expected):
    assert faults.shown(url) == expected
