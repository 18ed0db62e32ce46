"""Models on the Hugging Face hub: fetched by "owner/name[@revision]" in place of a folder, and put there.

Only weights and texts travel (FILES), never what would run. What was fetched once is found again without a
connection. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are heeded, as by everything that uses the hub.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError
from .files import failure_reason

FILES = ("*.safetensors", "*.json", "*.yaml", "*.yml", "*.md")
_HIDDEN = (".*", "*/.*")
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@((?:{_WORD}/)*{_WORD}))?")


def local_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of that name where there is one, else the fetched model "owner/name[@revision]".

    A Path is always a folder. revision: branch, tag or commit; None: the newest. Raises CheckpointError, in
    one line, where the hub has no such model or cannot be reached and the model was not fetched before.
    """
    found = None if isinstance(source, Path) or Path(source).exists() else _NAME.fullmatch(source)
    if found is None:
        if revision is not None:
            raise CheckpointError(
                f"{source} is no model of the hub (owner/name), so it has no revision {revision!r}"
            )
        return Path(source)
    if revision is not None and _NAME.fullmatch(f"{found[1]}@{revision}") is None:
        raise CheckpointError(f"{revision!r} is no revision; give a branch, a tag or a commit")
    revision = revision or found[2]
    from huggingface_hub import snapshot_download

    with _in_one_line(found[1], revision):
        return Path(snapshot_download(found[1], revision=revision, allow_patterns=list(FILES)))


def push_folder(
    folder: str | Path, name: str, *, private: bool = False, revision: str | None = None, message: str
) -> str:
    """Put a folder's weights and texts on the hub in place of those there; return the commit's address.

    name: "owner/name", made where it is missing; revision: a branch, made where it is missing. All files come
    in one commit, so whoever fetches meanwhile gets the old model or the new one.
    """
    if (found := _NAME.fullmatch(name)) is None or found[2] is not None:
        raise CheckpointError(f"{name!r} is no name of a model on the hub; give it as owner/name")
    if revision is not None and _NAME.fullmatch(f"{name}@{revision}") is None:
        raise CheckpointError(f"{revision!r} is no name of a branch")
    from huggingface_hub import HfApi

    hub = HfApi()
    with _in_one_line(name, revision):
        hub.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        done = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=list(FILES),
            ignore_patterns=list(_HIDDEN),
            delete_patterns=list(FILES),
        )
    return str(done.commit_url)


@contextmanager
def _in_one_line(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into a CheckpointError; show its bars on a terminal only."""
    from huggingface_hub import errors, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} on the hub has no revision {revision!r}; see its branches") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise CheckpointError(
                f"the hub refuses {name} ({status}): there is no such model, or it is not yours to use; "
                "check the name, or log in by `hf auth login` or HF_TOKEN"
            ) from error
        raise CheckpointError(f"the hub fails at {name} ({status}); try again later") from error
    # HTTPError is that of httpx or httpx2, whichever the hub's client stands on.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise CheckpointError(
            f"{name} is no folder here, and the hub cannot be reached; connect, or give a folder"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # a full disk; names that lead out of the folder
        raise CheckpointError(f"{name} of the hub cannot be used: {failure_reason(error)}") from error
