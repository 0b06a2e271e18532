#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tracecraft: agents on any machine coordinate through one bucket. One file,
no server, nothing to install: Python 3.9+ and its standard library.

    python3 tracecraft.py demo                   watch real processes do it
    python3 tracecraft.py init s3://bucket/proj  or nothing: a local directory
    python3 tracecraft.py claim design           one winner, whoever asks
    python3 tracecraft.py complete design --note "see api.md" --to builder

How it works. All state is plain JSON in a bucket: any S3 store or a directory.
Every change that matters is one conditional PUT on one object: create with
If-None-Match, replace with If-Match on the ETag that was read (compare-and-swap,
CAS). The store picks the winner, so there is no server of ours and no clock to
trust.

A *step* is a piece of work. `claim` makes its claim.json name one holder and a
*fencing token* that only grows. A claim is a *lease*: when its holder has not
renewed it for `ttl` seconds, somebody else may take it over, again by CAS and
with the next token. The lease only says when others may try. What keeps a
stale holder from doing harm is the token: to complete, renew or release, the
record must still carry it.

An answer can be lost after the store has acted. So each write carries a random
`nonce` and the chain `rev`, `prev`, `recent`; after a doubt we re-read and find
out whether we won. What cannot be found out is reported as unknown (exit 9) with
an id that settles it later. It is never guessed, and never done twice.

Objects that repeat the truth for older clients (status.json, handoff.json) are
projections: written after it, rebuilt by `doctor --fix`. The layout is that of
tracecraft-ai 0.2.x; both can share a bucket.

Contents (grep -n '^# == ' prints them with line numbers):
  1 Constants and errors    2 Text            3 Records       4 Wire
  5 HTTP                    6 Stores          7 S3            8 Settings
  9 Credentials            10 Ledger         11 Steps        12 Memory
 13 Mail                   14 Artifacts      15 Project      16 Views
 17 Trials                 18 Command line
"""

from __future__ import annotations

import os
import sys
import time

__version__ = "1.0.0"
__all__ = [
    "connect", "Project", "Claim", "Error", "Usage", "NotFound", "Conflict", "Held",
    "Fenced", "Blocked", "TimedOut", "Unavailable", "Throttled", "Corrupt", "Unknown",
    "Unsafe", "Denied", "main",
]

# == 1. Constants and errors ===========================================
#
# What the rest agrees on. Numbers say where they come from.

LAYOUT = 1  # of _project.json; a client refuses a newer one
TTL = 1800  # seconds a claim lives unrenewed: an agent's turn can block for minutes
GRACE = 5  # seconds beyond ttl before a takeover: 2 s of stamp truncation + skew
MAX_ATTEMPTS = 3
RECENT = 16  # rev:nonce pairs kept in a record (protocol 1.3) ...
RECENT_OPS = 256  # ... and where operations are applied (incr, append, merge)
HISTORY = 32  # transitions kept in a claim
MAX_RECORD = 8 << 20  # bytes; a record beyond it is not ours
MAX_VALUE = 64 << 10  # bytes of a memory value before it moves to a blob
MAX_MESSAGE = 8 << 10  # bytes of a message before it moves to an artifact
MULTIPART = 64 << 20  # bytes from which uploads go in parts
PART = 16 << 20  # bytes of a part: 10,000 of them make 160 GB
STALE_AFTER = 300  # seconds without heartbeat before an agent reads as stale (0.2)
MAIL_GRACE = 300  # seconds a message may surface late and still be new (0.2)
DEADLINE = 60  # seconds a command may keep retrying
REQUEST_TIMEOUT = 20  # seconds for one answer; SeaweedFS lets losers wait 8


class Error(Exception):
    """Expected trouble. Draws the exit code and the JSON `code` from its class.

    Error 1 ── Usage 2 · NotFound 1 · Conflict 3 ── Held 3, Moved 3 · Fenced 4
            ├─ Blocked 5 · TimedOut 6 · Unavailable 7 ── Throttled 7, Busy 7
            └─ Corrupt 8 · Unknown 9 · Unsafe 10 · Denied 11

    hint: what to do about it. details: further keys of the JSON error object.
    """

    exit, code, retryable = 1, "error", False

    def __init__(self, message: str, *, hint: str = "", **details: object) -> None:
        super().__init__(message)
        self.message, self.hint, self.details = message, hint, details


class Usage(Error):
    """The call itself is wrong."""

    exit, code = 2, "usage"


class NotFound(Error):
    """It is not there."""

    exit, code = 1, "not_found"


class Conflict(Error):
    """Held, changed meanwhile, or there with other content."""

    exit, code = 3, "conflict"


class Held(Conflict):
    """Another holds the lease; details name holder, age_s and expires_in_s."""

    code = "held"


class Moved(Conflict):
    """A condition failed: the object is not what it was when read."""

    code = "moved"


class Fenced(Error):
    """The caller's token is no longer the record's: the lease was lost."""

    exit, code = 4, "fenced"


class Blocked(Error):
    """Needs are not complete, or an awaited step cannot complete by itself."""

    exit, code = 5, "blocked"


class TimedOut(Error):
    """The time given ran out; nothing was decided."""

    exit, code, retryable = 6, "timeout", True


class Unavailable(Error):
    """The store was not reached; nothing was written by the failed request."""

    exit, code, retryable = 7, "unavailable", True


class Throttled(Unavailable):
    """The store asks for fewer requests; `after` seconds if it said so."""

    code = "throttled"
    after = 0.0


class Busy(Unavailable):
    """409: a rival request was in flight. Not lost; nothing of mine landed."""

    code = "busy"


class Corrupt(Error):
    """A document is not JSON, has the wrong shape, or fails its checksum."""

    exit, code = 8, "corrupt"


class Unknown(Error):
    """The answer was lost and the outcome could not be settled."""

    exit, code, retryable = 9, "unknown", True


class Unsafe(Error):
    """The store cannot arbitrate: it ignores, refuses or races conditions."""

    exit, code = 10, "unsafe"


class Denied(Error):
    """Credentials or permissions."""

    exit, code = 11, "denied"


# == 2. Text ===========================================================
#
# Names, keys, times and the JSON form. Pure: no clock, no store, no environment.

NAME_CHARS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
)
NAME_RULE = "letters, digits, '.', '_' and '-' only"


def check_name(kind: str, name: str) -> str:
    """`name` if it may become one component of a key (protocol 1.8), else Usage."""
    if not name.strip():
        raise Usage(f"{kind} cannot be empty", hint=f"give a name: {NAME_RULE}")
    if name.startswith("_"):
        raise Usage(f"{kind} {shown(name)!r} is reserved: names that begin with '_' are"
                    " tracecraft's own", hint="choose another name")
    if name in (".", "..") or not NAME_CHARS.issuperset(name) or len(name) > 200:
        raise Usage(f"{kind} {shown(name[:80])!r} does not fit: {NAME_RULE},"
                    " at most 200 of them, not '.' or '..'", hint="choose another name")
    return name


def step_id(name: str) -> str:
    """The id of a step as 0.2 spells it: lower case, '.' becomes '-'.

    >>> step_id("S1.A")
    's1-a'
    """
    return check_name("step id", name).lower().replace(".", "-")


def memory_parts(key: str) -> str:
    """The path of a memory key: dots separate, as in 0.2. Usage if it cannot be one.

    >>> memory_parts("phase1.status")
    'phase1/status'
    """
    if not key.strip():
        raise Usage("memory key cannot be empty", hint="e.g. plan.status")
    if "/" in key:
        raise Usage(f"memory key {shown(key)!r}: dots separate, '/' is not allowed",
                    hint=f"try {key.replace('/', '.')!r}")
    for part in key.split("."):
        if not part:
            raise Usage(f"memory key {shown(key)!r} has an empty part", hint="e.g. a.b")
        check_name("memory key", part)
    return key.replace(".", "/")


def artifact_path(path: str) -> str:
    """`path` if an artifact may have it (protocol 1.8), else Usage."""
    parts = path.split("/")
    bad = any(p in ("", ".", "..") for p in parts) or "\\" in path or len(path) > 700
    if bad or any(not c.isprintable() for c in path) or parts[-1].startswith("_"):
        raise Usage(f"artifact name {shown(path[:80])!r} does not fit: no empty, '.' or"
                    " '..' parts, no '\\' or control characters, no leading '_'",
                    hint="rename it with --name")
    return path


def file_safe(text: str) -> str:
    """`text` with everything that could not be in a name turned into '-'."""
    return "".join(c if c in NAME_CHARS else "-" for c in text).lstrip("_.-") or "x"


def dump_json(doc: object) -> bytes:
    """The stored form: UTF-8, two-space indented, ending in a newline."""
    import json
    text = json.dumps(doc, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # lone surrogates cannot be UTF-8


def parse_record(data: bytes, key: str) -> dict:
    """The JSON object in `data`. Corrupt, naming the key, for anything else."""
    import json
    if len(data) > MAX_RECORD:
        raise Corrupt(f"{key} has {len(data)} bytes; a record has at most {MAX_RECORD}",
                      hint="look at it with a bucket browser", key=key)
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError) as why:
        raise Corrupt(f"{key} is not JSON: {str(why)[:120]}", key=key,
                      hint="doctor lists every damaged object") from why
    if not isinstance(doc, dict):
        raise Corrupt(f"{key} holds a JSON {type(doc).__name__}, not an object", key=key,
                      hint="doctor lists every damaged object")
    return doc


def iso(seconds: float) -> str:
    """Seconds since 1970 as 0.2 writes times.

    >>> iso(0)
    '1970-01-01T00:00:00.000000+00:00'
    """
    whole, micros = divmod(int(round(seconds * 1e6)), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{micros:06d}+00:00"


def parse_iso(text: object) -> float | None:
    """Seconds since 1970 of an ISO 8601 time; None if it is not one."""
    from datetime import datetime, timezone
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        return when.timestamp()
    except (ValueError, OverflowError):
        return None


def shown(text: object, indent: str = "") -> str:
    """`text` made safe for a terminal: control, bidi and escape characters visible.

    Line ends stay, each followed by `indent`, so that a message cannot pretend to be
    the next line of ours.

    >>> shown("a\\x1b[31mb\\nc", indent="  ")
    'a\\\\x1b[31mb\\n  c'
    """
    text = str(text)
    if text.isprintable():
        return text
    out = []
    for char in text:
        if char == "\n" and indent:
            out.append("\n" + indent)
        elif char.isprintable() or (char == "\t" and indent):
            out.append(char)
        else:
            out.append(ascii(char)[1:-1])
    return "".join(out)


def age_text(seconds: float | None) -> str:
    """An age for people, as 0.2 words it: 12s ago, 5m ago, 3h ago, unknown."""
    if seconds is None:
        return "unknown"
    seconds = int(seconds)
    if seconds < 90:
        return f"{seconds}s ago"
    return f"{seconds // 60}m ago" if seconds < 5400 else f"{seconds // 3600}h ago"


def size_text(count: int) -> str:
    """A size for people: 12 B, 3.4 MiB."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def nearest(word: str, words: list) -> str:
    """'; did you mean X?' for the likeliest of `words`, or nothing."""
    import difflib
    close = difflib.get_close_matches(word, [str(w) for w in words], 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def event_key(prefix: str, *, at_ns: int, agent: str, uuid8: str) -> str:
    """The key of a create-once record: <prefix><ns>_<agent>_<uuid8>.json (0.2)."""
    return f"{prefix}{at_ns:019d}_{agent}_{uuid8}.json"


def event_parts(leaf: str) -> tuple:
    """(ns or None, agent or None) from the last component of an event key.

    >>> event_parts("1700000000000000000_a_b_0123abcd.json")
    (1700000000000000000, 'a_b')
    """
    parts = leaf[:-5].split("_") if leaf.endswith(".json") else []
    if len(parts) < 3 or not (parts[0].isascii() and parts[0].isdigit()):
        return None, None
    return int(parts[0]), "_".join(parts[1:-1])


def is_leaf(rest: str) -> bool:
    """Whether `rest` is user data directly below a prefix (0.2: no '/', no '_')."""
    return bool(rest) and "/" not in rest and not rest.startswith("_")


def common_start(words: list) -> str:
    """The longest string all `words` begin with; the narrowest prefix to list."""
    return os.path.commonprefix(words)
