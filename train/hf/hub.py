"""Models on the Hugging Face hub. Only this module imports `huggingface_hub`.

    a directory, or OWNER/NAME on the hub --directory_of--> a directory here        a directory --push--> OWNER/NAME

`HF_HUB_OFFLINE=1`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` work as documented for that library. Code and pickles are not
downloaded.
"""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from recipes.schema.errors import CheckpointError, RecipeError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]


def directory_of(name: Path) -> Path:
    """The directory itself, or the hub's cached copy of the model of this name. RecipeError if it is neither,
    CheckpointError if it cannot be fetched."""
    if name.is_dir():
        return name
    if not _ID.fullmatch(str(name)):
        raise RecipeError(f"{name} is neither a directory nor the name of a model on the hub (OWNER/NAME).")
    try:
        return Path(snapshot_download(str(name), allow_patterns=_WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{name} is not a directory here, and the hub's cache does not have it: HF_HUB_OFFLINE=1 forbids fetching it. "
                f"Unset HF_HUB_OFFLINE, or give a directory."
            ) from error
        raise CheckpointError(f"{name} cannot be fetched from {constants.ENDPOINT}: {error}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name} cannot be fetched from {constants.ENDPOINT}: {error} Check the name, HF_TOKEN and the network."
        ) from error


def check_push(name: str) -> None:
    """RecipeError if a push cannot work; called before anything is converted."""
    if not _ID.fullmatch(name):
        raise RecipeError(f"--push {name} is not the name of a model on the hub. Use OWNER/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"--push {name}: HF_HUB_OFFLINE=1 forbids it. Unset HF_HUB_OFFLINE, or leave --push out.")


def push(folder: Path, name: str) -> str:
    """Upload a directory as the model OWNER/NAME, private if it is new. -> its address. CheckpointError if it fails; the
    directory stays."""
    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True, private=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of {folder.name}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} was written, but not pushed to {name}: {error} Check HF_TOKEN and the network."
        ) from error
    return str(address)
