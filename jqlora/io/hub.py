"""The files of a hub repository, and only those that loading needs."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jqlora.errors import SourceError

# Everything about a model but its weights: config, tokenizer, chat template.
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt"]
_NOT_NEEDED = ["onnx/*", "*.onnx*", "original/*", "runs/*", "checkpoint-*/*"]
_T = TypeVar("_T")


def download_model(label: str) -> Path:
    """The local snapshot of ``ORG/NAME[@REVISION]``: config, tokenizer and one form of the weights.

    Safetensors are preferred to ``.bin``, and both to a single ``.gguf``. Without a network the
    snapshot in huggingface_hub's cache is used. Raises SourceError.
    """
    repository, _, revision = label.partition("@")

    def online() -> str:
        info = HfApi().model_info(repository, revision=revision or None, timeout=30)
        files = [item.rfilename for item in info.siblings or []]
        return snapshot_download(
            repository,
            revision=info.sha,
            allow_patterns=[*_SMALL_FILES, *_weights(label, files)],
            ignore_patterns=_NOT_NEEDED,
        )

    def cached() -> str:
        return snapshot_download(repository, revision=revision or None, local_files_only=True)

    return Path(_from_hub(label, online, cached))


def download_file(label: str) -> Path:
    """The local copy of ``ORG/NAME/FILE.gguf``. Raises SourceError."""
    repository, _, name = label.rpartition("/")

    def online() -> str:
        HfApi().model_info(repository, timeout=30)  # fails at once where a download would retry
        return hf_hub_download(repository, name)

    def cached() -> str:
        return hf_hub_download(repository, name, local_files_only=True)

    return Path(_from_hub(label, online, cached))


def _weights(label: str, files: list[str]) -> list[str]:
    top = [name for name in files if "/" not in name]
    for chosen in ("model*.safetensors", "pytorch_model*.bin"):
        if any(Path(name).match(chosen) for name in top):
            return [chosen]
    ggufs = [name for name in top if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise SourceError(
            f"{label!r} offers several GGUF files: {', '.join(ggufs)}; give one: {label}/{ggufs[0]}"
        )
    raise SourceError(f"{label!r} on the hub has no weights in safetensors, .bin or GGUF")


def _from_hub(label: str, online: Callable[[], _T], cached: Callable[[], _T]) -> _T:
    try:
        return online()
    except SourceError:
        raise
    except HFValidationError as error:
        raise SourceError(f"{label!r} is neither a local path nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{label!r} is gated: accept its licence on the hub, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceError(
            f"{label!r} is neither a local path nor a model on the hub (or it is private: "
            "run `hf auth login`)"
        ) from error
    except Exception as error:  # the hub's client lets errors of its HTTP library through
        try:
            return cached()
        except (LocalEntryNotFoundError, OSError):
            raise SourceError(
                f"{label!r} is not a local path, not in the hub's cache, and the hub cannot be "
                f"reached ({type(error).__name__}: {_first_line(error)}); give a local directory, "
                "a .gguf file or package:NAME"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]
