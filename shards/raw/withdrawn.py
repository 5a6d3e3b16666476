"""Data sets that their authors took back. A copy that somebody has can be read, nothing is fetched or linked."""

from recipes.errors import UserError


def require_acknowledgement(title: str, acknowledged: bool) -> None:
    """UserError with what `acknowledge_withdrawn` means, unless it is set."""
    if not acknowledged:
        raise UserError(
            f"{title} was withdrawn by its authors in 2019 for privacy: the people in it were filmed without their "
            "consent. With source.acknowledge_withdrawn=true you say that you know this and that you may use the copy "
            "which you have; this project neither links to the set nor downloads it"
        )
