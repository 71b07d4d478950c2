"""Keeps `manifest.json` beside exported files: sizes and checksums, checked before a file is parsed.

It detects damaged files. It is not a signature: whoever can alter a file can also alter the manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qat_lightning.base.atomic import replacing
from qat_lightning.base.errors import Int8FileError

MANIFEST = "manifest.json"


def add(*paths: Path) -> None:
    """Adds the checksums of files to the manifest of their folder."""
    manifest = paths[0].with_name(MANIFEST)
    entries = _entries(manifest) if manifest.is_file() else {}
    entries |= {path.name: _entry(path.read_bytes()) for path in paths}
    with replacing(manifest) as partial:
        partial.write_text(json.dumps({"version": 1, "files": entries}, indent=2, sort_keys=True) + "\n")


def read(path: Path, *, verify: bool = True) -> bytes:
    """Reads a file once, and compares its content with the manifest before anything parses it.

    Args:
        path: The file.
        verify: Whether to compare. If False, the content is returned unchecked.

    Raises:
        FileNotFoundError: There is no such file.
        Int8FileError: There is no manifest, the file is not in it, or its checksum differs from the manifest.
    """
    content = path.read_bytes()
    if not verify:
        return content
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        raise Int8FileError(
            f"{path} has no {MANIFEST} beside it, so it cannot be verified. Copy the manifest "
            "of the export as well, or pass verify=False to read it unchecked."
        )
    listed = _entries(manifest).get(path.name)
    if listed is None:
        raise Int8FileError(
            f"{manifest} does not list {path.name}: a file must keep the name that it was exported under. "
            "Rename it back, export it again, or pass verify=False to read it unchecked."
        )
    found = _entry(content)
    if found != listed:
        raise Int8FileError(
            f"{path} is not the file that was exported: {MANIFEST} lists {listed['bytes']} bytes with "
            f"SHA-256 {listed['sha256'][:12]}…, but the file has {found['bytes']} with "
            f"{found['sha256'][:12]}…. It was altered, truncated or replaced: copy or export it again."
        )
    return content


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _entries(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["files"]
        _ = [(entry["bytes"], entry["sha256"][:12]) for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Int8FileError(f"{manifest} is damaged: {error!r}. Copy or export the files again.") from error
    return entries
