"""Models of the Hugging Face hub, copied to its cache."""

from __future__ import annotations

from pathlib import Path

# no pickle files: they are never read
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def download(name: str) -> Path:
    """The folder of a model of the hub, downloaded where the cache has not got it."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f'open_source: {name} is on the hub, which needs pip install "llmos_fast[hub]"'
        ) from error
    return Path(snapshot_download(name, allow_patterns=_PATTERNS))
