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

    Error 1 -- Usage 2, NotFound 1, Conflict 3 (Held 3, Moved 3), Fenced 4,
               Blocked 5, TimedOut 6, Unavailable 7 (Throttled 7, Busy 7),
               Corrupt 8, Unknown 9, Unsafe 10, Denied 11

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
        raise Corrupt(f"{key} holds a JSON {type(doc).__name__}, not an object",
                      key=key, hint="doctor lists every damaged object")
    return doc


def iso(seconds: float) -> str:
    """Seconds since 1970 as 0.2 writes times.

    >>> iso(0)
    '1970-01-01T00:00:00.000000+00:00'
    """
    whole, micros = divmod(int(round(seconds * 1e6)), 1_000_000)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
    return f"{stamp}.{micros:06d}+00:00"


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


# == 3. Records ========================================================
#
# Pure: (stored record, event, age in seconds) -> new record or refusal.
# Knows no store and no clock; `at` is a time as text. Rules: protocol.md 1, 4-5.
# A decision that needs no write returns the very object it was given.

ENDED = ("complete", "failed", "blocked", "needs_review")
TO_02 = {"released": "pending", "failed": "blocked"}  # how 0.2 reads our states
NOBODY = "(released)"


class Me:
    """Who acts: an agent id, an instance of it, and the token it holds (or None).

    explicit: the user named the instance, so the record itself may lend its token.
    """

    __slots__ = ("agent", "instance", "token", "explicit")

    def __init__(self, agent: str, instance: str, *, token: int | None = None,
                 explicit: bool = False) -> None:
        self.agent, self.instance = agent, instance
        self.token, self.explicit = token, explicit


def number(doc: dict | None, name: str, default: int = 0) -> int:
    """doc[name] as a whole number >= 0, or `default`: records come from anywhere."""
    value = (doc or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    return int(value) if 0 <= value < 2**53 else default


def texts(doc: dict | None, name: str) -> list:
    """The strings of the list doc[name]; [] when it is none."""
    value = (doc or {}).get(name)
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def stamped(doc: dict, old: dict | None, *, nonce: str, keep: int = RECENT,
            above: int = 0) -> dict:
    """`doc` as the successor of `old`: rev, nonce, prev, recent (protocol 1.3).

    above: a rev that the new one must exceed, for documents 0.2 has rewritten.
    """
    rev = max(number(old, "rev"), above) + 1
    recent = texts(old, "recent") + [f"{rev}:{nonce}"]
    return {**doc, "rev": rev, "nonce": nonce, "prev": (old or {}).get("nonce"),
            "recent": recent[-keep:]}


def settle(seen: dict | None, sent: dict, *, unchanged: bool) -> str:
    """What became of `sent`, a write whose answer was lost, given what is stored now.

    unchanged: the object still has the ETag (or absence) the write was conditioned on.
    'landed', 'again' (send the same bytes under the same condition), 'lost' (decide
    anew) or 'unknown'. protocol.md 1.4.
    """
    if unchanged:
        return "again"
    rev, prev, recent = sent["rev"], sent.get("prev"), texts(seen, "recent")
    if f"{rev}:{sent['nonce']}" in recent:
        return "landed"
    mine_taken = any(entry.startswith(f"{rev}:") for entry in recent)
    before_me = prev is None or f"{rev - 1}:{prev}" in recent
    return "lost" if mine_taken and before_me else "unknown"


def settle_op(seen: dict | None, *, nonce: str, rev: int) -> str:
    """The same for a command repeated with --op ID@REV: 'landed', 'lost' or 'unknown'.

    rev 0: no attempt is known, so only 'landed' or 'lost'.
    """
    recent = texts(seen, "recent")
    if any(entry.partition(":")[2] == nonce for entry in recent):
        return "landed"
    if rev == 0 or number(seen, "rev") < rev:
        return "lost"
    taken = any(entry.startswith(f"{rev}:") for entry in recent)
    return "lost" if taken else "unknown"


# -- a step's claim ----------------------------------------------------


def state_of(claim: dict | None) -> str:
    """pending, in_progress, released, complete, failed, blocked or needs_review."""
    if claim is None:
        return "pending"
    state = claim.get("state", "in_progress")
    return state if state in ENDED or state == "released" else "in_progress"


def token_of(claim: dict | None) -> int:
    """The fencing token; a 0.2 claim has none and counts as the first."""
    return 0 if claim is None else max(1, number(claim, "token", 1))


def expired(claim: dict, age: float | None) -> bool:
    """Whether a takeover may be tried. ttl 0 (and 0.2, which has none): never."""
    ttl = number(claim, "ttl")
    return bool(ttl) and age is not None and age >= ttl + GRACE


def holds(claim: dict | None, me: Me) -> bool:
    """Whether `me` holds the step: agent and token match (protocol 1, Who I am)."""
    if claim is None or state_of(claim) != "in_progress":
        return False
    return claim.get("agent") == me.agent and _token_matches(claim, me)


def _token_matches(claim: dict, me: Me) -> bool:
    if me.token is not None:
        return me.token == token_of(claim)
    instance = claim.get("instance")
    return instance is None or (me.explicit and instance == me.instance)


def _transition(claim: dict | None, *, state: str, by: str, token: int, at: str,
                why: str, **fields: object) -> dict:
    """The claim moved to `state` by an agent, which the end of its history says."""
    new = {"agent": by, "claimed_at": at, **(claim or {}), "state": state,
           "token": token, **fields}
    new.setdefault("attempt", 1)
    new.setdefault("ttl", 0)
    past = new.get("history") if isinstance(new.get("history"), list) else []
    event = {"state": state, "agent": by, "token": token, "at": at, "why": why}
    new["history"] = (past + [event])[-HISTORY:]
    return new


def _taken(claim: dict | None, me: Me, *, at: str, ttl: int, attempt: int, why: str,
           ends: str) -> dict:
    return _transition(
        claim, state="in_progress", by=me.agent, token=token_of(claim) + 1, at=at,
        why=why, attempt=attempt, ttl=ttl, renewed_at=at, expires_at=ends,
        agent=me.agent, claimed_at=at, instance=me.instance)


def take(claim: dict | None, me: Me, age: float | None, *, at: str, ends: str = "",
         ttl: int = TTL, missing: tuple = (), reopen: bool = False,
         resume: bool = False, max_attempts: int = MAX_ATTEMPTS) -> dict:
    """The claim after `me` asks for the step. Raises Held, Blocked or Conflict.

    age: seconds since the record's last write, by the store. ends: `at` + ttl as text.
    missing: needs that are not complete. The table of protocol.md 4, row by row; a step
    whose attempts are used up comes back `failed`, with the next token.
    """
    state = state_of(claim)
    if state == "in_progress":
        return _take_held(claim, me, age, at=at, ends=ends, ttl=ttl, resume=resume,
                          max_attempts=max_attempts)
    if state == "complete" and not reopen:
        raise Conflict(f"is complete (by {shown(claim.get('agent'))})", state=state,
                       hint="--reopen starts it again")
    if state in ENDED and not reopen:
        raise Conflict(f"is {state} (agent: {shown(claim.get('agent'))})", state=state,
                       hint="--reopen starts it again")
    if missing:
        raise Blocked(f"waits for {', '.join(missing)}", missing=list(missing),
                      hint="wait-for them, or --ignore-needs")
    if state == "released":
        return _taken(claim, me, at=at, ends=ends, ttl=ttl, why="claimed",
                      attempt=number(claim, "attempt", 1) + 1)
    why = "claimed" if claim is None else f"reopened from {state}"
    return _taken(claim, me, at=at, ends=ends, ttl=ttl, attempt=1, why=why)


def _take_held(claim: dict, me: Me, age: float | None, *, at: str, ends: str, ttl: int,
               resume: bool, max_attempts: int) -> dict:
    same_agent = claim.get("agent") == me.agent
    if holds(claim, me) or (same_agent and claim.get("instance") == me.instance):
        half = number(claim, "ttl") / 2
        if half and (age is None or age > half):
            return {**claim, "renewed_at": at, "expires_at": ends}
        return claim
    if same_agent and resume:
        return _taken(claim, me, at=at, ends=ends, ttl=ttl, why="resumed",
                      attempt=number(claim, "attempt", 1))
    if not expired(claim, age):
        raise held(claim, me, age)
    attempt = number(claim, "attempt", 1) + 1
    holder = claim.get("agent")
    if attempt > max_attempts:
        return _transition(
            claim, state="failed", by=me.agent, token=token_of(claim) + 1, at=at,
            why=f"lease of {holder} expired and all {max_attempts} attempts are used",
            agent=me.agent, instance=me.instance)
    return _taken(claim, me, at=at, ends=ends, ttl=ttl, attempt=attempt,
                  why=f"takeover: the lease of {holder} expired")


def held(claim: dict, me: Me, age: float | None) -> Held:
    """The refusal that names the holder, the age of its lease and the seconds left."""
    holder, ttl = shown(claim.get("agent", "unknown")), number(claim, "ttl")
    left = None if not ttl or age is None else max(0, int(ttl + GRACE - age))
    hint = "its lease never expires; ask it to release" if left is None else \
        f"free in {left}s unless renewed; --wait {left + 5} waits for it"
    if claim.get("agent") == me.agent:
        hint = "another instance of you holds it; --resume takes it over"
    return Held(f"already claimed by {holder}", hint=hint, holder=claim.get("agent"),
                age_s=None if age is None else int(age), expires_in_s=left,
                token=token_of(claim))


def refusal(claim: dict | None, me: Me, age: float | None = None) -> Error:
    """Why `me` may not touch this step: fenced, ended, or never held."""
    if claim is None:
        return Conflict("is not claimed", hint="claim it first")
    holder, state = shown(claim.get("agent")), state_of(claim)
    if me.token is not None and me.token < token_of(claim):
        since = claim.get("claimed_at") if state == "in_progress" else _ended_at(claim)
        return Fenced(f"your token {me.token} is fenced: {holder} has token"
                      f" {token_of(claim)} since {shown(since)} ({state})",
                      hint="stop this work; what you upload no longer counts",
                      holder=claim.get("agent"), token=token_of(claim), state=state)
    if state in ENDED:
        return Conflict(f"is {state} already (agent: {holder})", state=state,
                        hint="claim it with --reopen to change that")
    if state == "released":
        return Conflict("was released", state=state, hint="claim it again")
    if claim.get("agent") == me.agent:
        return held(claim, me, age)
    return Held(f"is claimed by '{holder}', not '{me.agent}'",
                holder=claim.get("agent"), token=token_of(claim),
                hint="--force overrides, e.g. if the claim-holder crashed")


def _ended_at(claim: dict) -> object:
    past = claim.get("history")
    last = past[-1] if isinstance(past, list) and past else {}
    return last.get("at") if isinstance(last, dict) else None


def renew(claim: dict | None, me: Me, *, at: str, ends: str) -> dict:
    """The claim with its lease begun anew; the token stays."""
    if not holds(claim, me):
        raise refusal(claim, me)
    return {**claim, "renewed_at": at, "expires_at": ends}


def release(claim: dict | None, me: Me, *, at: str, why: str = "released") -> dict:
    """The claim given back, claimable by anyone. Twice is once."""
    if claim is not None and state_of(claim) == "released":
        if me.token == token_of(claim) or claim.get("released_by") == me.agent:
            return claim
    if not holds(claim, me):
        raise refusal(claim, me)
    new = _transition(claim, state="released", by=me.agent, token=token_of(claim),
                      at=at, why=why, agent=NOBODY, released_by=me.agent)
    new.pop("instance", None)
    return new


def end(claim: dict | None, me: Me, state: str, *, at: str, handoff: dict,
        force: str = "") -> dict:
    """The claim ended as `state` with `handoff` inside: one record, one CAS.

    force: a person's reason to end another's step; it costs the holder its token.
    Ended the same way under my token: unchanged. No claim at all: created, ended (the
    0.2 habit).
    """
    if claim is None:
        new = _transition(None, state=state, by=me.agent, token=1, at=at,
                          why="ended without a claim", instance=me.instance)
        return _with_handoff(new, handoff)
    if holds(claim, me):
        new = _transition(claim, state=state, by=me.agent, token=token_of(claim),
                          at=at, why="ended")
        return _with_handoff(new, handoff)
    if state_of(claim) in ENDED and _ended_by(claim, me) and state_of(claim) == state:
        return claim
    if not force:
        raise refusal(claim, me)
    new = _transition(claim, state=state, by=me.agent, token=token_of(claim) + 1,
                      at=at, why=f"forced: {force}", agent=me.agent,
                      instance=me.instance)
    return _with_handoff(new, handoff)


def _ended_by(claim: dict, me: Me) -> bool:
    return claim.get("agent") == me.agent and (
        me.token in (None, token_of(claim)))


def _with_handoff(claim: dict, handoff: dict) -> dict:
    past = claim.get("handoffs") if isinstance(claim.get("handoffs"), list) else []
    note = {**handoff, "token": claim["token"]}
    return {**claim, "handoffs": (past + [note])[-RECENT:]}


def judge(claim: dict | None, me: Me, *, approve: bool, at: str, note: str) -> dict:
    """needs_review -> complete or released, by anybody; the token stays."""
    state = state_of(claim)
    if state != "needs_review":
        raise Conflict(f"is {state}, not needs_review", state=state,
                       hint="only a step that needs review is approved or rejected")
    word = "approved" if approve else "rejected"
    why = f"{word} by {me.agent}" + (f": {note}" if note else "")
    fields = {} if approve else {"agent": NOBODY, "released_by": claim.get("agent")}
    return _transition(claim, state="complete" if approve else "released", at=at,
                       by=me.agent, token=token_of(claim), why=why, **fields)


# -- projections and 0.2.x ---------------------------------------------


def project_status(claim: dict) -> dict:
    """status.json as 0.2 reads it, carrying the token and rev it repeats."""
    state = state_of(claim)
    doc = {"status": TO_02.get(state, state), "agent": claim.get("agent"),
           "started_at": claim.get("claimed_at")}
    if state == "complete":
        doc["completed_at"] = _ended_at(claim)
    return {**doc, "state": state, "token": token_of(claim),
            "rev": number(claim, "rev")}


def project_handoff(claim: dict) -> dict | None:
    """handoff.json (schema 2) from the newest hand-off in the claim; None without."""
    notes = claim.get("handoffs")
    if not isinstance(notes, list) or not notes or not isinstance(notes[-1], dict):
        return None
    return {"schema": 2, **notes[-1], "rev": number(claim, "rev")}


def bare(doc: dict | None) -> bool:
    """Whether a projection was written by 0.2: it carries no token of ours."""
    return doc is not None and "token" not in doc


def adopt(claim: dict | None, status: dict | None, seen: object) -> dict | None:
    """The claim as it stands once acts of 0.2 clients in status.json are honoured.

    seen: the stamp of that status.json; the one named by `status_seen` was known when
    the token rose and is never adopted again. Whoever writes next writes this down.
    """
    if not bare(status):
        return claim
    state, agent = status.get("status"), status.get("agent") or "unknown"
    if claim is None:
        if state not in ENDED and state != "in_progress":
            return None
        return _transition(None, state=state, by=agent, token=1, why="adopted from 0.2",
                           at=str(status.get("started_at") or ""))
    if state_of(claim) in ENDED or state not in ENDED:
        return claim
    if seen is not None and claim.get("status_seen") == seen:
        return claim
    at = str(status.get("completed_at") or status.get("started_at") or "")
    if claim.get("agent") == agent:
        return _transition(claim, state=state, by=agent, token=token_of(claim), at=at,
                           why="ended by an 0.2 client")
    return _transition(claim, state=state, by=agent, token=token_of(claim) + 1, at=at,
                       why=f"forced by {agent} with an 0.2 client",
                       agent=agent, instance=None)


# -- memory ------------------------------------------------------------


def live(doc: dict | None, now: float) -> bool:
    """Whether a memory document has a value: there, no tombstone, not expired."""
    if doc is None or doc.get("deleted_at"):
        return False
    ends = parse_iso(doc["expires_at"]) if doc.get("expires_at") else None
    return ends is None or now < ends


def assign(old: dict | None, value: str, *, by: str, at: str, kind: str = "text",
           expires_at: str = "", deleted: bool = False) -> dict:
    """The memory document that says `value`; unknown fields of `old` survive."""
    new = {"value": value, **(old or {})}
    for gone in ("expires_at", "deleted_at", "blob"):
        new.pop(gone, None)
    new.update(value=value, set_by=by, set_at=at, type=kind)
    if expires_at:
        new["expires_at"] = expires_at
    if deleted:
        new["deleted_at"] = at
    return new


def guard_value(old: dict | None, now: float, *, if_rev: int | None = None,
                if_absent: bool = False, if_value: str | None = None) -> None:
    """Raise Conflict with the present rev unless the caller's condition holds."""
    rev, there = number(old, "rev"), live(old, now)
    if old is not None and "rev" not in old and if_rev is not None:
        raise Conflict("was written by an 0.2 client, which keeps no revision", rev=0,
                       hint="set it once without --if-rev")
    if if_rev is not None and if_rev != rev:
        raise Conflict(f"is at revision {rev}, not {if_rev}", rev=rev,
                       hint="read it again and decide anew")
    if if_absent and there:
        raise Conflict(f"is there already (revision {rev})", rev=rev,
                       hint="set it without --if-absent")
    if if_value is not None and (not there or old.get("value") != if_value):
        raise Conflict(f"has another value (revision {rev})", rev=rev,
                       hint="read it again and decide anew")


def add_number(text: str, by: float) -> str:
    """The JSON number `text` (empty: 0) plus `by`; Conflict if it is no number."""
    import json
    try:
        value = json.loads(text) if text else 0
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Conflict(f"is not a number: {shown(text[:40])!r}", hint="set it first")
    total = value + by
    return json.dumps(int(total) if float(total).is_integer() else total)


def append_value(text: str, kind: str, item: str) -> str:
    """A JSON list grown by `item` (JSON if it parses), else text grown by a line."""
    import json
    if kind == "json" and text.lstrip().startswith("["):
        try:
            more = json.loads(item)
        except ValueError:
            more = item
        return json.dumps(json.loads(text) + [more], ensure_ascii=False)
    return f"{text}\n{item}" if text else item


def merge_patch(target: object, patch: object) -> object:
    """RFC 7396: objects merge key by key, null removes, anything else replaces.

    >>> merge_patch({"a": 1, "b": {"c": 2}}, {"a": None, "b": {"d": 3}})
    {'b': {'c': 2, 'd': 3}}
    """
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


# -- mail --------------------------------------------------------------


def stream_of(cursor: dict | None, name: str) -> dict:
    """One stream of a read cursor: {floor (seconds or None), watermark, seen (set)}.

    Takes 0.2's bare watermark and malformed values as 0.2 does: read all again.
    """
    raw = (cursor or {}).get(name)
    if isinstance(raw, str):
        raw = {"watermark": raw}
    if not isinstance(raw, dict):
        raw = {}
    floor = raw.get("floor")
    if isinstance(floor, bool) or not isinstance(floor, (int, float)):
        floor = None
    mark = raw.get("watermark") if isinstance(raw.get("watermark"), str) else None
    return {"floor": floor, "watermark": mark, "seen": set(texts(raw, "seen"))}


def unseen(entries: list, stream: dict) -> list:
    """The (key, modified) of `entries` that this cursor has not shown, oldest first.

    New is what the *store* received after the floor: a sender's clock, and a put that
    took its time, cannot hide a message (facts 7.7).
    """
    floor = stream["floor"]
    return [(key, at) for key, at in entries
            if key not in stream["seen"] and (floor is None or at > floor)]


def advance(stream: dict, entries: list, displayed: set, *, now: float,
            prefix: str) -> dict:
    """The stream after `displayed` keys were shown out of what was listed.

    The floor trails the newest arrival by MAIL_GRACE and stays below anything withheld;
    it never falls. `seen` keeps every shown key that the floor or 0.2's watermark does
    not cover. 0.2 reads watermark and seen.
    """
    seen = stream["seen"] | displayed
    newest = max((at for _, at in entries), default=now)
    floor = min(newest, now) - MAIL_GRACE
    withheld = [at for key, at in unseen(entries, stream) if key not in displayed]
    if withheld:
        floor = min(floor, min(withheld) - 1)
    floor = max(floor, stream["floor"] or 0)
    mark = f"{prefix}{max(0, int(floor * 1e9)):019d}"
    mark = max(mark, stream["watermark"] or "")
    keep = {key for key, at in entries if key in seen and (at > floor or key > mark)}
    return {"watermark": mark, "floor": floor, "seen": sorted(keep)}


# -- artifacts ---------------------------------------------------------


def next_head(head: dict | None, new: dict, *, overwrite: bool) -> dict:
    """The manifest head after an upload of `new` (sha256, size, key, producer ...).

    The same digest: unchanged. Another: Conflict, unless --overwrite or the head came
    from a lower token of the same step (its holder was fenced). protocol.md 8.
    """
    if head is None:
        return {**new, "previous": []}
    if head.get("sha256") == new["sha256"] and not head.get("deleted_at"):
        return head
    was, now = head.get("producer") or {}, new["producer"]
    newer = now.get("token") and was.get("step") == now.get("step") \
        and number(was, "token") < now["token"]
    if not (overwrite or newer or head.get("deleted_at")):
        raise Conflict(f"has other content: {str(head.get('sha256'))[:12]} there,"
                       f" {new['sha256'][:12]} here", there=head.get("sha256"),
                       here=new["sha256"], hint="--overwrite replaces it")
    old = {name: head[name] for name in ("sha256", "size", "key", "producer", "rev")
           if name in head}
    past = head.get("previous") if isinstance(head.get("previous"), list) else []
    kept = {name: value for name, value in head.items() if name != "deleted_at"}
    return {**kept, **new, "previous": (past + [old])[-RECENT:]}


def fold(claim: dict, found: dict) -> dict:
    """The claim with what an 0.2 client wrote into a projection kept inside it.

    A hand-off goes before the newest of ours; an end goes into the history. What is
    there already changes nothing.
    """
    if "status" in found and "from_agent" not in found:
        if found["status"] not in ENDED:
            return claim
        at = str(found.get("completed_at") or found.get("started_at") or "")
        event = {"state": found["status"], "agent": found.get("agent"), "at": at,
                 "token": token_of(claim), "why": "written by an 0.2 client"}
        past = claim.get("history") if isinstance(claim.get("history"), list) else []
        if event in past:
            return claim
        return {**claim, "history": (past[:-1] + [event] + past[-1:])[-HISTORY:]}
    past = claim.get("handoffs") if isinstance(claim.get("handoffs"), list) else []
    note = {**found, "token": token_of(claim)}
    if note in past:
        return claim
    return {**claim, "handoffs": (past[:-1] + [note] + past[-1:])[-RECENT:]}


def waited(views: list, names: list, *, any_: bool) -> bool:
    """Whether a wait for these step views is over; Blocked if it never can be."""
    done = [view["state"] == "complete" for view in views]
    if any(done) if any_ else all(done):
        return True
    stuck = [(view, name) for view, name in zip(views, names)
             if view["state"] in ("blocked", "failed")]
    if stuck and (not any_ or len(stuck) == len(views)):
        view, name = stuck[0]
        raise Blocked(f"Step {name} is {view['state']} (agent: {shown(view['agent'])})"
                      " — it will not complete without intervention. Resolve it and"
                      " re-run wait-for.", step=view["step"], state=view["state"])
    return False
