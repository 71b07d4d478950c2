"""Prints docs/compatibility.md."""

from __future__ import annotations

from tests.compatibility import page

print(page(), end="")
