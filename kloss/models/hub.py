"""What the hub has under a name, asked once: a network that is not there must not take a minute to say so."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

REACHED_WITHIN = 5.0  # seconds


def refusal(name: str, repo_type: str = "model") -> str:
    """Ask the hub once for a repository. Return why it did not give it, "" if it did.

    repo_type: "model" or "dataset".
    """
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=REACHED_WITHIN)
    except Exception as error:  # the hub's client has many kinds, some of them its HTTP library's
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def model_folder(name: str, kind: str, patterns: Sequence[str]) -> Path:
    """Return the folder `name`, or that of the hub's model `name`, downloaded or as it was downloaded before.

    kind: what it is for, for messages.
    patterns: of the files to download.
    Without a network the hub is asked once, not again and again. Raises UserError if neither has it.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{kind} {name} is not a folder")
    from huggingface_hub import snapshot_download

    reason = refusal(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=bool(reason)))
    except Exception as error:
        reason = reason or " ".join(str(error).split())[:200]
        advice = "give a local folder in transformers' format, or run once with a network, which fills the hub's cache"
        raise UserError(f"{kind} {name} is no local folder, and the hub did not give it ({reason}); {advice}") from error
