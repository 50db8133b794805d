"""What self-tests of kernels have found on a GPU, kept in the user's cache directory.

A file holds the verdicts of one environment: whatever they depend on, as names and values.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def load(environment: dict[str, str]) -> dict[str, bool]:
    """Verdicts that are kept, by name; none where the file is missing or not what was written."""
    try:
        content = json.loads(_path(environment).read_text())
    except (OSError, RuntimeError, ValueError):
        # RuntimeError: no home directory
        return {}
    if not isinstance(content, dict) or content.get("environment") != environment:
        return {}
    verdicts = content.get("verdicts")
    if not isinstance(verdicts, dict):
        return {}
    return {k: v for k, v in verdicts.items() if isinstance(v, bool)}


def store(environment: dict[str, str], verdicts: dict[str, bool]) -> None:
    """Keep them, whole or not at all; where nothing can be written they are lost."""
    content = {"environment": environment, "verdicts": verdicts}
    try:
        path = _path(environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
    except (OSError, RuntimeError):
        return


def _path(environment: dict[str, str]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(json.dumps(environment).encode()).hexdigest()
    return folder / "llmos_fast" / f"self_test_{key[:16]}.json"
