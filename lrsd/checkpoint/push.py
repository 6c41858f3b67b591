"""A checkpoint directory to a model hub, on explicit request only."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

# Of the HTTP client, which is another one from release to release.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from lrsd.checkpoint.manifest import RUN_NAME
from lrsd.checkpoint.verify import verify
from lrsd.errors import InputError, LaterError

# Refused whoever asks again: no right to it, no such owner, a name that is taken.
_REFUSED = (400, 401, 403, 404, 409)


def push(directory: Path, repository: str, *, public: bool = False) -> str:
    """Upload a checkpoint whose files are as they were written, to a repository that is made where there is
    none, private unless `public`; one that is there keeps who may see it.

    Returns: the address of the repository. Raises: CheckpointError for a damaged checkpoint, InputError if
    the hub refuses, LaterError if it does not answer.
    """
    verify(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is one file; expected a directory that lrsd compress wrote")
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=directory, ignore_patterns=[RUN_NAME],
            commit_message=f"Compressed by lrsd: {directory.name}",
        )  # fmt: skip
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise InputError(f"cannot push to {repository!r}: {_line(error)}") from error
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in _REFUSED
        kind = InputError if refused else LaterError
        advice = "; check the name and the token (`hf auth login`)" if refused else "; try again later"
        raise kind(f"the hub refused {repository!r}: {_line(error)}{advice}") from error
    except (NetworkError, OSError) as error:
        raise LaterError(f"the hub does not answer ({_line(error)}); check the network") from error
    return str(address)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
