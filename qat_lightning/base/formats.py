"""Formats values as text, in the same way for the report's page, its plots and the terminal."""

from __future__ import annotations

import math
import unicodedata


def decibels(value: float) -> str:
    """Formats a signal-to-noise ratio.

    Example:
        >>> decibels(31.26), decibels(float("inf"))
        ('31.3', 'exact')
    """
    return "exact" if value == math.inf else number(value, ".1f")


def metric(name: str, value: float) -> str:
    """Formats a metric. Shares, such as an accuracy, become percentages.

    Example:
        >>> metric("val/accuracy", 0.98765), metric("val/loss", 0.98765)
        ('98.77 %', '0.9877')
    """
    return number(100 * value, ".2f") + " %" if is_share(name, value) else digits(value, 4)


def difference(name: str, value: float, base: float) -> str:
    """Formats the difference `value` - `base`. Differences of percentages are in percentage points.

    Example:
        >>> difference("accuracy", 0.75, 0.76), difference("loss", 1.5, 1.25)
        ('−1.00 pp', '+0.25')
    """
    if is_share(name, value) and is_share(name, base):
        return number(100 * (value - base), "+.2f") + " pp"
    return "0" if value == base else number(value - base, "+.2g")


def is_share(name: str, value: float) -> bool:
    """Returns whether a metric is usually read as a percentage."""
    return "acc" in name.lower() and 0 <= value <= 1


def share(value: float) -> str:
    """Formats a share between 0 and 1 as a percentage, without the sign.

    Example:
        >>> share(0.01234), share(0.0), share(0.00001)
        ('1.23', '0', '<0.01')
    """
    return "0" if value == 0 else "<0.01" if 0 < value < 0.0001 else number(100 * value, ".2f")


def size(count: int) -> str:
    """Formats a number of bytes.

    Example:
        >>> size(226_341), size(5_432_100)
        ('226 kB', '5.43 MB')
    """
    return f"{digits(count / 1e6, 3)} MB" if 1e6 <= count < 1e9 else f"{count / 1000:,.0f} kB"


def times(ratio: float) -> str:
    """Formats a ratio.

    Example:
        >>> times(3.876)
        '3.88×'
    """
    return number(ratio, ".2f") + "×"


def number(value: float, form: str = ".3g") -> str:
    """Formats a number, with a minus sign as wide as a plus sign.

    Example:
        >>> number(-1.5), number(float("-inf"))
        ('−1.5', '−∞')
    """
    return "nan" if math.isnan(value) else format(value, form).replace("inf", "∞").replace("-", "−")


def digits(value: float, count: int) -> str:
    """Formats a number with a fixed number of digits, including trailing zeros.

    Example:
        >>> digits(0.112, 4), digits(1234.0, 4)
        ('0.1120', '1234')
    """
    return "0" if value == 0 else number(value, f"#.{count}g").removesuffix(".")


def milliseconds(value: float, of: float | None = None) -> str:
    """Formats a duration with three digits. A part of a duration gets as many decimals as the whole.

    Example:
        >>> milliseconds(0.1234), milliseconds(12.34), milliseconds(1234.5), milliseconds(0.426, of=12.34)
        ('0.123', '12.3', '1,234', '0.4')
    """
    whole = value if of is None else of
    return number(value, ",.0f" if whole >= 100 else ".1f" if whole >= 10 else ".2f" if whole >= 1 else ".3f")


def printable(text: str) -> str:
    r"""Replaces characters that cannot be printed.

    Example:
        >>> printable("a\x00b")
        'a\ufffdb'
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def breadth(text: str) -> float:
    """Estimates the width of a text, in ems of a wide sans-serif font."""
    return sum(1.0 if unicodedata.east_asian_width(char) in "WF" else 0.6 for char in text)


def shorten(text: str, ems: float) -> str:
    """Shortens a text to a width in ems by leaving out its middle.

    Example:
        >>> shorten("features.12.block.2.fc1", 9)
        'feature…k.2.fc1'
    """
    text = printable(text)
    if breadth(text) <= ems:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while head and breadth(head + tail) > ems - 0.6:
        head, tail = (head[:-1], tail) if len(head) >= len(tail) else (head, tail[1:])
    return f"{head}…{tail}"
