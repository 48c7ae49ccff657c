"""An export as a repository on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from zoft.errors import UserError


def require_name(name: str) -> None:
    """Refuse what is no repository's name, before anything is loaded."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name!r} is no name on the hub: give OWNER/NAME") from None
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        raise UserError("HF_HUB_OFFLINE is set, and --push needs the hub: unset it, or export without --push")


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload a folder; the repository is made where it is not there.

    Args:
        folder: an export.
        name: OWNER/NAME.
        public: whether all may see it.

    Returns:
        Its address.

    Raises:
        UserError: no login, no right, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Add the export of a zoft run")
    except Exception as error:  # the client raises a dozen kinds; the token is in none of their first lines
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"could not push to {name}: {reason:.200}; log in with `hf auth login` or HF_TOKEN. "
            f"The export is in {folder}"
        ) from None
    return str(repository)
