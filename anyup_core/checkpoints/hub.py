"""Model repositories on the Hugging Face hub; `huggingface_hub` fetches and uploads.

So HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, tokens and progress bars are that library's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from anyup_core.checkpoints import hub_folder, hub_transfer
from anyup_core.checkpoints.fetching import SlowServer

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_name(source: str) -> bool:
    """Return whether `source` can be the name of a repository, "org/name"."""
    if source.count("/") != 1:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """Return a file of a repository, from the hub's cache or fetched into it.

    Args:
        repository: "org/name".
        file: its path in the repository.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        FileNotFoundError: if there is no such repository, revision or file.
        PermissionError: if the repository is gated, or the token does not suffice.
        ConnectionError: if the file is not in the cache and the hub cannot be asked.
    """
    import huggingface_hub

    def download(progress_bar: type) -> str:
        return huggingface_hub.hf_hub_download(repository, file, revision=revision, tqdm_class=progress_bar)

    with explained(repository, file, revision):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        with hub_transfer.locked(repository):
            return Path(hub_transfer.run(download, repository))


def snapshot(path: Path, file: str) -> Path:
    """Return the folder of the commit that a fetched file belongs to; its name is the commit's."""
    return path.parents[file.count("/")]


def fetch_beside(repository: str, file: str, folder: Path) -> Path | None:
    """Return another file of the commit whose folder is given; None if the commit has none. Raises as `fetch` does."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=folder.name)
    if cached is not None and not isinstance(cached, str):  # the cache remembers that there is none
        return None
    try:
        return fetch(repository, file, folder.name)
    except FileNotFoundError:
        return None


def push(
    folder: Path, repository: str, *, private: bool | None = None, revision: str | None = None, message: str
) -> str:
    """Upload a folder into a repository, which is created if there is none, and return the address of the commit.

    Raises:
        PermissionError: if the token is missing, or does not suffice.
        FileNotFoundError: if there is no such revision.
        ConnectionError: if the hub cannot be reached.
        ValueError: if `repository` is no name.
    """
    import huggingface_hub

    if not is_name(repository):
        raise ValueError(f"{repository!r} is no name of a repository; give one such as org/name.")
    with explained(repository, revision=revision):
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=message
        ).commit_url


@contextlib.contextmanager
def explained(repository: str, file: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turn what the library raises into an OSError with one sentence, and what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore - the base of all, of httpx or httpx2

    where = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{where} is gated: ask for access on that page, and {LOG_IN}.") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is no path here, and there is no repository {where} that you may read; check the name. If "
            f"it is private, {LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{where} has no revision {revision!r}; give one of its branches, tags or commits."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        what = f"{where} at revision {revision}" if revision else where
        by_name = "; name a .safetensors, .pth or .bin file of it with file=, if it has one of AnyUp"
        ours = file in (hub_folder.CONFIG, hub_folder.WEIGHTS)
        raise FileNotFoundError(f"{what} has no {file}{by_name if ours else '; check its name'}.") from error
    except SlowServer as error:
        raise ConnectionError(f"Could not fetch {file} of {where} ({error}); try again later.") from error
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(repository, file, error.__cause__ or error) from error
    except (errors.OfflineModeIsEnabled, HTTPError, ConnectionError) as error:
        raise unreachable(repository, file, error) from error
    except RuntimeError as error:  # a file of an upload; the cause says why
        raise unreachable(repository, file, error.__cause__ or error) from error


def unreachable(repository: str, file: str | None, error: BaseException) -> OSError:
    """Return the error for a file that is not in the cache, or for an upload, where the hub did not do as asked."""
    from huggingface_hub import constants, errors

    where = f"{constants.ENDPOINT}/{repository}"
    missing = f"{repository} is no path here, {file} of {where} is not in the cache {constants.HF_HUB_CACHE}, and"
    what = missing if file else f"{where}:"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{what} HF_HUB_OFFLINE forbids to ask the hub; unset it once, or copy the cache here.")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return PermissionError(
            f"{where} refuses access (HTTP status {error.response.status_code}): {LOG_IN} with rights for it."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # its cause is missing: offline by the library's own choice
        return ConnectionError(f"{what} the hub was not asked; check HF_HUB_OFFLINE.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConnectionError(f"{what} the hub did not answer as it should ({reason[:300]}); try again later.")
