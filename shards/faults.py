"""What an error of a remote read means: one that may pass, or one that no further attempt can mend, in a sentence."""

from urllib.parse import urlsplit

CREDENTIALS = {  # errors of botocore and google-auth, by name because neither need be installed
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError"),
    *("RefreshError",),
}
HOPELESS = {"InvalidURL", "ParamValidationError", "NoRegionError", "ClientConnectorCertificateError"}
MAY_PASS = (408, 425, 429)  # too slow, too early, too many: of the 4xx only these are worth another attempt


def shown(url: str) -> str:
    """The URL without what may be secret in it: user and password, and the query of a signed one."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or of its cause, as aiohttp, gcsfs, requests and botocore tell it."""
    found = None
    while error is not None:
        if "HttpProcessingError" in _names(error):  # aiohttp calls what it cannot parse, or ends too soon, a 400
            return None
        response = getattr(error, "response", None)
        botocore = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        requests = getattr(response, "status_code", None)
        direct = getattr(error, "status", None) if hasattr(error, "status") else getattr(error, "code", None)
        for status in (botocore, requests, direct):
            if found is None and isinstance(status, int):
                found = status
        error = error.__cause__
    return found


def told(error: BaseException) -> str:
    """The error in a few words, without the URL."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # its own text is the URL with everything in it
    if "ClientResponseError" in _names(error):  # its text repeats the URL with everything in it
        return f"HTTP status {_status(error)}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def final(error: BaseException, url: str) -> str | None:
    """The sentence for an error that another attempt cannot mend; None for one that may pass."""
    where, words, status, names = shown(url), told(error), _status(error), _names(error)
    if isinstance(error, ImportError):
        extra = "`pip install personssl[remote]` brings those of s3:// and https://"
        return f"{where} needs a library that is not installed ({error}); {extra}"
    if names & CREDENTIALS:
        return (
            f"{where} cannot be read without credentials ({words}); for S3 set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_S3='{\"anon\": true}' for a public bucket"
        )
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"no permission to read {where} ({words}); check the credentials and that it exists"
    if isinstance(error, TimeoutError):  # S3 tells it with status 400
        return None
    if status in (404, 410):
        return f"{where} does not exist ({words})"
    if status == 416:
        return f"{where} is shorter than expected ({words}); it was replaced or not uploaded completely"
    if status is not None:
        return f"{where} is refused ({words})" if 400 <= status < 500 and status not in MAY_PASS else None
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        # asking for a size over HTTP says "not found" whatever went wrong
        passing = error.__cause__ is not None and "ClientError" in _names(error.__cause__)
        return None if passing else f"{where} does not exist"
    if type(error) is ValueError or names & HOPELESS:
        return f"{where} cannot be read ({words})"
    return None
