"""What the hub's client raises, in this server's words.

The client's own may hold URLs, which may be signed, and what a hub answered, which may repeat a
token: none of its text is passed on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from server.errors import AdapterError, FathomError, NotFound, SourceUnavailable
from server.sources.location import RemoteAdapter

MAIN = "main"


@contextmanager
def in_own_words(location: RemoteAdapter) -> Iterator[None]:
    """Raise NotFound, AdapterError or SourceUnavailable instead; EntryNotFoundError stays what it is."""
    try:
        yield
    except FathomError:
        raise
    except LocalEntryNotFoundError:
        raise SourceUnavailable(f"{location}: the hub cannot be reached") from None
    except EntryNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever it is, its text stays here
        raise _told(location, error) from None


def _told(location: RemoteAdapter, error: Exception) -> FathomError:
    match error:
        case GatedRepoError():
            return AdapterError(f"{location}: is gated, and HF_TOKEN has not been let in")
        case RevisionNotFoundError():
            revision = location.revision or MAIN
            return NotFound(f"{location}: there is no revision {revision!r}", param="lora_path")
        case RepositoryNotFoundError():
            return NotFound(
                f"{location}: does not exist, or is private and HF_TOKEN may not read it",
                param="lora_path",
            )
        case HfHubHTTPError():
            return _answered(location, error.response.status_code)
        case FileMetadataError():
            return SourceUnavailable(f"{location}: what answers is no hub")
        case OSError() if error.strerror is not None:
            return SourceUnavailable(f"{location}: cannot be kept: {error.strerror}")
        case OSError():  # the client counts what came
            return SourceUnavailable(f"{location}: was cut off while it came")
    return SourceUnavailable(f"{location}: the hub cannot be reached ({type(error).__name__})")


def _answered(location: RemoteAdapter, status: int) -> FathomError:
    if status in (401, 403):
        return AdapterError(f"{location}: the hub does not accept HF_TOKEN ({status})")
    if status < 500 and status != 429:
        return AdapterError(f"{location}: the hub answers {status}")
    return SourceUnavailable(f"{location}: the hub answers {status}")
