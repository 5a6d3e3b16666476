"""Models on the Hugging Face Hub: `--ckpt hub:OWNER/NAME`, or one file of a repository, `--ckpt hub:OWNER/NAME/FILE`.

What is fetched stays in the cache of huggingface_hub, so that the second call needs no connection. Nothing of a
repository is executed: weights, config.json and the card are fetched, no code.
"""

from pathlib import Path

from recipes.errors import UserError

HUB = "hub:"
WANTED = ("*.json", "*.safetensors", "README.md")  # of a whole repository


def local(ckpt: str) -> str:
    """The path of what `hub:...` names, fetched if it is not in the cache; anything else comes back as it is.

    `hub:OWNER/NAME@REVISION` asks for a branch, tag or commit. UserError where it cannot be had.
    """
    if not str(ckpt).startswith(HUB):
        return ckpt
    name, _, revision = ckpt.removeprefix(HUB).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise UserError(f"--ckpt {ckpt}: expected hub:OWNER/NAME or hub:OWNER/NAME/FILE")
    import huggingface_hub  # half a second, for those who need it

    try:
        if file:
            return huggingface_hub.hf_hub_download(f"{owner}/{repository}", file, revision=revision or None)
        found = huggingface_hub.snapshot_download(
            f"{owner}/{repository}", revision=revision or None, allow_patterns=WANTED
        )
    except (OSError, ValueError) as error:  # no connection, no such repository, no such file, no such name
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"--ckpt {ckpt} cannot be had from the Hugging Face Hub ({type(error).__name__}: {told}). Check the name; "
            "without a connection, fetch it where there is one and give its path, or copy the cache and set HF_HOME"
        ) from error
    if not any(Path(found).glob("*.safetensors")):
        raise UserError(
            f"--ckpt {ckpt} holds no .safetensors; name one of its files: hub:{owner}/{repository}/FILE.pth"
        )
    return found
