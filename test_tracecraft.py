"""The tests of tracecraft.py, in the order of its sections; run by pytest.

Real objects throughout: a memory store and a loopback S3 server that drop, delay or
repeat any answer, real processes, and real peers (marked `peers`).
"""

from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, quote_plus, unquote
from urllib.parse import urlencode, urlsplit
from xml.sax.saxutils import escape
import ast
import base64
import bisect
import calendar
import collections
import concurrent.futures
import contextlib
import datetime
import doctest
import errno
import functools
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import types
import uuid
import xml.etree.ElementTree as ElementTree

import pytest
import tracecraft
import tracecraft as t

try:  # oracles; without them the tests marked `peers` are left out
    from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.config import Config
    from botocore.credentials import Credentials
    import boto3
    import botocore.exceptions
except ImportError:
    boto3 = botocore = S3SigV4Auth = S3SigV4QueryAuth = AWSRequest = None
    Config = Credentials = None

# The status of every code but 400, which is that of the rest.
S3_CODES = {"NoSuchBucket": 404, "InvalidAccessKeyId": 403, "NoSuchUpload": 404,
            "RequestTimeTooSkewed": 403, "SignatureDoesNotMatch": 403,
            "BucketAlreadyOwnedByYou": 409, "MissingContentLength": 411,
            "InvalidRange": 416}
S3_FAULT_CODES = {301: "PermanentRedirect", 307: "TemporaryRedirect",
                  403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed",
                  409: "ConditionalRequestConflict", 429: "TooManyRequests",
                  500: "InternalError", 501: "NotImplemented", 503: "SlowDown"}
S3_CODES.update((code, status) for status, code in S3_FAULT_CODES.items())
FAULTS = set("""refuse lose reset reset_after delay late duplicate truncate landed
    redirect html ignore garbage age call lag""".split())
S3_SUBRESOURCES = """uploadId uploads delete location acl tagging versioning versions
    policy lifecycle cors website encryption retention restore attributes""".split()
SIGV4 = "AWS4-HMAC-SHA256"
STREAMING = {"STREAMING-UNSIGNED-PAYLOAD-TRAILER", "STREAMING-%s-PAYLOAD" % SIGV4,
             "STREAMING-%s-PAYLOAD-TRAILER" % SIGV4}
S3Reply = collections.namedtuple("S3Reply", "status headers body", defaults=({}, b""))


def _tags(**fields):
    return "".join("<%s>%s</%s>" % (name, escape(str(value), {"\r": "&#13;"}), name)
                   for name, value in fields.items() if value is not None)


def _xml_reply(name, inner, status=200, headers=()):
    space = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' * (name != "Error")
    text = '<?xml version="1.0" encoding="UTF-8"?>\n<%s%s>%s</%s>'
    headers = dict(headers, **{"Content-Type": "application/xml"})
    return S3Reply(status, headers, (text % (name, space, inner, name)).encode())


def _iso(when, tail=".000Z"):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + tail


class S3Error(Exception):
    def __init__(self, code, message=None, status=None, headers=(), **fields):
        super().__init__(code)
        self.status, self.headers = status or S3_CODES.get(code, 400), headers
        message = message or re.sub("(?<=[a-z])(?=[A-Z])", " ", code)
        self.fields = dict(Code=code, Message=message, **fields)

    def reply(self, req):
        inner = _tags(**self.fields, BucketName=req.bucket or None, Key=req.key or None,
                      Resource=req.path, RequestId=req.id)
        return _xml_reply("Error", inner, self.status, self.headers)


class Request:
    """A request and, once answered, its entry in the log: `status` is what the client
    was sent (0: nothing), `landed` says that a write took effect all the same. Faults
    look for their key in `subject`; `depth` writes and `lag` seconds are not seen."""
    status, landed, ignore, depth, lag = 0, False, False, 0, 0
    listing, origin, fault, options = False, "", "", {}

    def __init__(self, method, target, headers, body):
        self.id = uuid.uuid4().hex[:16].upper()
        self.method, self.headers, self.body = method, headers, body
        self.path, _, query = target.partition("?")
        self.pairs = parse_qsl(query, keep_blank_values=True)
        self.query = dict(self.pairs)
        self.subject = self.path


class S3Request(Request):
    def __init__(self, *args, buckets):
        super().__init__(*args)
        self.bucket, self.key = self.locate(buckets)
        self.listing = bool(self.query.get("list-type") and not self.key)
        self.subject = self.query.get("prefix", "") if self.listing else self.key
        if self.headers.get("x-amz-content-sha256") in STREAMING:
            self.body = _unchunk(io.BytesIO(self.body))
        self.body_size = len(self.body)

    def locate(self, buckets):
        return _locate(self.headers.get("host", ""), self.path, buckets)


def _locate(host, path, buckets):
    """The bucket and key of a request in either addressing style."""
    name = host.rpartition(":")[0] or host
    path = unquote(path[1:], errors="strict")
    for bucket in sorted(buckets, key=len, reverse=True):
        if name.startswith(bucket + "."):
            return bucket, path
    if "." in name and not re.fullmatch("[0-9.]+", name):
        return name.partition(".")[0], path
    return path.partition("/")[::2]


def _unchunk(stream):
    """The payload of HTTP chunks or of aws-chunked ones; trailers are skipped."""
    parts = []
    while True:
        size = int(stream.readline().split(b";")[0], 16)
        if not size:
            break
        parts.append(stream.read(size))
        stream.readline()
    while stream.readline() not in (b"\r\n", b""):
        pass
    return b"".join(parts)


def s3_signature(req, auth, scope, secret):
    """What a request should be signed with, and the canonical request it comes from."""
    signed = auth["SignedHeaders"].split(";")
    query = sorted((quote(name, safe=""), quote(value, safe=""))
                   for name, value in req.pairs if name != "X-Amz-Signature")
    values = ["%s:%s" % (h, " ".join(req.headers.get(h, "").split())) for h in signed]
    text = "\n".join([req.method, req.path, "&".join("%s=%s" % pair for pair in query),
                      *values, "", auth["SignedHeaders"], auth["Payload"]])
    # Latin-1 gives back the very bytes that arrived, whatever their encoding was.
    digest = hashlib.sha256(text.encode("latin-1")).hexdigest()
    steps = scope.split("/") + ["\n".join([SIGV4, auth["Date"], scope, digest])]
    key = functools.reduce(lambda key, step: hmac.digest(key, step.encode(), "sha256"),
                           steps, b"AWS4" + secret.encode())
    return key.hex(), text


def s3_verify(req, access_key, secret_key, session_token, region, now):
    """Raise what a request earns for its credentials, clock, signature or body."""
    auth = _authorization(req)
    access, _, scope = auth["Credential"].partition("/")
    if access != access_key:
        raise S3Error("InvalidAccessKeyId", AWSAccessKeyId=access)
    if session_token and auth.get("Security-Token") != session_token:
        raise S3Error("InvalidToken")
    _check_scope(scope, auth["Date"], region)
    _check_clock(auth, now)
    signed, payload = auth["SignedHeaders"].split(";"), auth["Payload"]
    bare = [name for name in req.headers if name not in signed and (
        name.startswith("x-amz-") or name in ("host", "if-match", "if-none-match"))]
    if bare or "host" not in signed:
        raise S3Error("AccessDenied", "There were headers present in the request which "
                      "were not signed", HeadersNotSigned=", ".join(bare))
    wanted, canonical = s3_signature(req, auth, scope, secret_key)
    # S3 signs the path as it would encode it, so an odd encoding never matches.
    odd = req.path != quote(unquote(req.path)) or signed != sorted(set(signed))
    if odd or auth["Signature"] != wanted:
        raise S3Error("SignatureDoesNotMatch", CanonicalRequest=canonical)
    if (payload != "UNSIGNED-PAYLOAD" and payload not in STREAMING
            and payload != hashlib.sha256(req.body).hexdigest()):
        raise S3Error("XAmzContentSHA256Mismatch")


def _authorization(req):
    """The fields of a SigV4 authorization, from the query or from the header."""
    presigned = "X-Amz-Signature" in req.query
    if presigned:
        auth = {name[6:]: value for name, value in req.pairs if name[:6] == "X-Amz-"}
    else:
        scheme, _, rest = req.headers.get("authorization", "").partition(" ")
        auth = dict(part.strip().partition("=")[::2] for part in rest.split(","))
        auth.update({"Algorithm": scheme, "Date": req.headers.get("x-amz-date"),
                     "Security-Token": req.headers.get("x-amz-security-token")})
    auth["Payload"] = req.headers.get("x-amz-content-sha256",
                                      "UNSIGNED-PAYLOAD" if presigned else None)
    if not auth.get("Algorithm"):
        raise S3Error("AccessDenied")
    needed = "Credential SignedHeaders Signature Date Payload" + " Expires" * presigned
    if auth["Algorithm"] != SIGV4 or not all(map(auth.get, needed.split())):
        raise S3Error("InvalidRequest", "Missing or unsupported authorization fields")
    return auth


def _check_scope(scope, stamp, region):
    date, asked, rest = (scope.split("/", 2) + ["", ""])[:3]
    if asked != region:
        message = "the region '%s' is wrong; expecting '%s'" % (asked, region)
        raise S3Error("AuthorizationHeaderMalformed", message, Region=region,
                      headers={"x-amz-bucket-region": region})
    if date != stamp[:8] or rest != "s3/aws4_request":
        raise S3Error("AuthorizationHeaderMalformed")


def _check_clock(auth, now):
    when = calendar.timegm(time.strptime(auth["Date"], "%Y%m%dT%H%M%SZ"))
    if "Expires" in auth:
        if not when - 900 <= now <= when + min(int(auth["Expires"]), 604800):
            raise S3Error("AccessDenied", "Request has expired",
                          ServerTime=_iso(now, "Z"))
    elif abs(now - when) > 900:
        raise S3Error("RequestTimeTooSkewed", RequestTime=auth["Date"],
                      ServerTime=_iso(now, "Z"), MaxAllowedSkewMilliseconds=900000)


def _etag_listed(value, etag):
    listed = [tag.strip().strip('"') for tag in value.split(",")]
    return value == "*" or etag.strip('"') in listed


def _check_put(headers, form, current):
    """Raise what the conditions of a PUT earn, given the object now under its key."""
    absent, match = headers.get("if-none-match"), headers.get("if-match")
    if absent not in (None, "*"):
        raise S3Error("NotImplemented")
    if absent and current:
        raise S3Error("PreconditionFailed", Condition="If-None-Match")
    if match is None:
        return
    if not current:
        raise S3Error("NoSuchKey")
    quoted, bare = current.etag, current.etag.strip('"')
    accepted = {"any": (quoted, bare), "quoted": (quoted,), "unquoted": (bare,)}[form]
    if match != "*" and match not in accepted:
        raise S3Error("PreconditionFailed", Condition="If-Match")


def _byte_range(spec, size):
    """The slice that a Range header asks for; None when S3 would disregard it."""
    match = re.fullmatch("bytes=([0-9]*)-([0-9]*)", spec or "")
    first, last = match.groups() if match else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start, end = int(first or 0), min(int(last or size), size - 1) + 1
    if not first:
        start, end = max(size - int(last), 0), size
    if start >= end:
        raise S3Error("InvalidRange", headers={"Content-Range": "bytes */%d" % size})
    return start, end


def _roll_up(keys, prefix, delimiter, after, limit):
    """The next keys and common prefixes past `after`, as {name: is a common prefix},
    and whether more follow."""
    found = {}
    for key in keys:
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        name = key if cut < 0 else key[:cut + len(delimiter)]
        if not key.startswith(prefix) or name <= after or name in found:
            continue
        if len(found) >= limit:
            return found, limit > 0
        found[name] = cut >= 0
    return found, False


class S3Store:
    """The objects, the lock that makes condition and write one step, and the past."""

    def __init__(self):
        self.objects, self.lock = {}, threading.RLock()
        self.history = collections.deque(maxlen=10000)

    def write(self, where, obj, check=None, gap=0):
        """Store obj, or delete with None. A gap lets others in after the check."""
        with self.lock:
            if check:
                check(self.objects.get(where))
            if not (check and gap):
                return self._set(where, obj)
        time.sleep(gap)
        with self.lock:
            self._set(where, obj)

    def _set(self, where, obj):
        old = self.objects.get(where)
        if old or obj:
            self.history.append((where, old, time.monotonic()))
        if obj:
            self.objects[where] = obj
        else:
            self.objects.pop(where, None)

    def past(self, bucket, depth=0, lag=0):
        """What the last `depth` writes to a bucket, or those of `lag` seconds, took the
        place of: (key, object), the latest first."""
        since = time.monotonic() - lag
        writes = (write for write in reversed(self.history) if write[0][0] == bucket)
        for nth, (where, old, at) in enumerate(writes if depth or lag else ()):
            if nth >= depth and at <= since:
                return
            yield where[1], old

    def read(self, where, lag=0):
        """The object there, or there `lag` seconds ago; None without one."""
        with self.lock:
            return dict(self.past(where[0], lag=lag)).get(where[1],
                                                          self.objects.get(where))

    def view(self, bucket, depth=0, lag=0):
        """{key: object} of a bucket as it was before its last `depth` writes, or `lag`
        seconds ago."""
        with self.lock:
            view = {key: obj for (b, key), obj in self.objects.items() if b == bucket}
            view.update(self.past(bucket, depth, lag))
        return {key: obj for key, obj in view.items() if obj}


class S3Api:
    """The operations of S3, one method for each kind of request."""

    def __init__(self, access_key="testkey", secret_key="testsecret",
                 session_token=None, region="us-east-1", etags="any", skew=0,
                 ignores=False, races=False, conditional_get=True, latency=0,
                 max_keys=1000, buckets=("bucket",), verify=True, lm=True,
                 md5_etags=True):
        # The options are plain attributes, so that a test can change them at any time.
        vars(self).update((k, v) for k, v in locals().items() if k != "self")
        self.buckets, self.uploads, self.store = set(buckets), {}, S3Store()
        self.objects, self.lock = self.store.objects, self.store.lock

    def now(self):
        return time.time() + self.skew

    def act(self, req):
        """Carry the request out and return the answer it deserves."""
        try:
            if self.verify:
                s3_verify(req, self.access_key, self.secret_key, self.session_token,
                          self.region, self.now())
            reply = self.route(req)
        except S3Error as error:
            return error.reply(req)
        except ElementTree.ParseError:
            return S3Error("MalformedXML").reply(req)
        except ValueError as error:
            return S3Error("InvalidArgument", str(error)).reply(req)
        req.landed = req.landed or req.method not in ("GET", "HEAD")
        return reply

    def route(self, req):
        level = "key" if req.key else "bucket"
        sub = [name for name in S3_SUBRESOURCES if name in req.query][:1]
        name = "_".join([req.method, level] + sub).lower()
        operation = getattr(self, name, None)
        if not operation or not req.bucket:
            raise S3Error("NotImplemented")
        if req.bucket not in self.buckets and name != "put_bucket":
            raise S3Error("NoSuchBucket")
        if len(req.key.encode()) > 1024:
            raise S3Error("KeyTooLongError")
        self.check_body(req)
        return operation(req)

    def check_body(self, req):
        length = req.headers.get("x-amz-decoded-content-length")
        if req.method == "PUT" and not (length or "content-length" in req.headers):
            raise S3Error("MissingContentLength")
        given = base64.b64decode(req.headers.get("content-md5", ""))
        if (given and given != hashlib.md5(req.body).digest()
                or length and int(length) != req.body_size):
            raise S3Error("BadDigest")

    def write(self, req, body, headers, etag=None):
        etag = etag or (hashlib.md5(body).hexdigest() if self.md5_etags
                        else uuid.uuid4().hex)
        obj = SimpleNamespace(body=body, etag='"%s"' % etag, modified=self.now(),
                              headers=headers)
        check = functools.partial(_check_put, req.headers, self.etags)
        if (self.ignores or req.ignore
                or not {"if-match", "if-none-match"} & set(req.headers)):
            check = None
        self.store.write((req.bucket, req.key), obj, check, 0.005 if self.races else 0)
        return obj

    def find(self, bucket, key, lag=0):
        obj = self.store.read((bucket, key), lag)
        if not obj:
            raise S3Error("NoSuchKey" if bucket in self.buckets else "NoSuchBucket")
        return obj

    def kept_headers(self, req):
        kept = {name: value for name, value in req.headers.items() if name in (
            "content-type", "cache-control") or name.startswith("x-amz-meta-")}
        return dict({"content-type": "binary/octet-stream"}, **kept)

    def put_key(self, req):
        if "x-amz-copy-source" in req.headers:
            return self.copy(req)
        obj = self.write(req, req.body, self.kept_headers(req))
        return S3Reply(200, {"ETag": obj.etag})

    def copy(self, req):
        source = unquote(req.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        old = self.find(source[0], source[2])
        wanted = req.headers.get("x-amz-copy-source-if-match", "*")
        if not _etag_listed(wanted, old.etag):
            raise S3Error("PreconditionFailed")
        replace = req.headers.get("x-amz-metadata-directive") == "REPLACE"
        new = self.write(req, old.body,
                         self.kept_headers(req) if replace else old.headers)
        return _xml_reply("CopyObjectResult", _tags(
            ETag=new.etag, LastModified=_iso(new.modified)))

    def get_key(self, req):
        obj = self.find(req.bucket, req.key, req.lag)
        headers = dict(obj.headers, **{"ETag": obj.etag, "Accept-Ranges": "bytes"})
        if self.lm:
            headers["Last-Modified"] = formatdate(obj.modified, usegmt=True)
        if self.conditional_get:
            if not _etag_listed(req.headers.get("if-match", "*"), obj.etag):
                raise S3Error("PreconditionFailed", Condition="If-Match")
            if _etag_listed(req.headers.get("if-none-match", ""), obj.etag):
                return S3Reply(304, headers)
        size = len(obj.body)
        start, end = _byte_range(req.headers.get("range"), size) or (0, None)
        if end is None:
            return S3Reply(200, headers, obj.body)
        headers["Content-Range"] = "bytes %d-%d/%d" % (start, end - 1, size)
        return S3Reply(206, headers, obj.body[start:end])

    head_key = get_key

    def delete_key(self, req):
        self.store.write((req.bucket, req.key), None)
        return S3Reply(204)

    def post_bucket_delete(self, req):
        root = ElementTree.fromstring(req.body)
        keys = [entry.findtext("{*}Key") for entry in root.findall("{*}Object")]
        if not 0 < len(keys) <= 1000 or None in keys:
            raise S3Error("MalformedXML")
        for key in keys:
            self.store.write((req.bucket, key), None)
        told = keys if root.findtext("{*}Quiet") != "true" else ()
        return _xml_reply("DeleteResult", "".join(
            "<Deleted>%s</Deleted>" % _tags(Key=key) for key in told))

    def get_bucket(self, req):
        query, view = req.query, self.store.view(req.bucket, req.depth, req.lag)
        if query.get("list-type") != "2":
            raise S3Error("NotImplemented")
        token, start = query.get("continuation-token"), query.get("start-after", "")
        after = base64.b64decode(token or "", validate=True).decode()
        limit = min(int(query.get("max-keys", 1000)), self.max_keys)
        # Code points sort as UTF-8 bytes do.
        found, more = _roll_up(sorted(key for key in view if key > start),
                               query.get("prefix", ""), query.get("delimiter", ""),
                               after, limit)
        following = base64.b64encode(max(found).encode()).decode() if more else None
        url = query.get("encoding-type") == "url"
        spell = functools.partial(quote_plus, safe="/*") if url else str
        head = _tags(Name=req.bucket, KeyCount=len(found), MaxKeys=limit,
                     IsTruncated=str(more).lower(), ContinuationToken=token,
                     NextContinuationToken=following,
                     EncodingType="url" if url else None)
        head += _tags(**{name.title().replace("-", ""): spell(query[name])
                         for name in ("delimiter", "start-after") if name in query})
        return _xml_reply("ListBucketResult", head + _tags(
            Prefix=spell(query.get("prefix", ""))) + "".join(
                self.rows(view, found, spell)))

    def rows(self, view, found, spell):
        for name, common in found.items():
            if common:
                yield "<CommonPrefixes>%s</CommonPrefixes>" % _tags(Prefix=spell(name))
                continue
            obj = view[name]
            yield "<Contents>%s</Contents>" % _tags(
                Key=spell(name), LastModified=_iso(obj.modified), ETag=obj.etag,
                Size=len(obj.body), StorageClass="STANDARD")

    def get_bucket_location(self, req):
        region = "" if self.region == "us-east-1" else self.region
        return _xml_reply("LocationConstraint", region)

    def head_bucket(self, req):
        return S3Reply(200, {"x-amz-bucket-region": self.region})

    def put_bucket(self, req):
        with self.lock:
            if req.bucket in self.buckets:
                raise S3Error("BucketAlreadyOwnedByYou")
            # Replaced, not grown: other threads iterate over it without the lock.
            self.buckets = self.buckets | {req.bucket}
        return S3Reply(200, {"Location": "/" + req.bucket})

    def post_key_uploads(self, req):
        name = uuid.uuid4().hex
        self.uploads[name] = SimpleNamespace(
            where=(req.bucket, req.key), headers=self.kept_headers(req), parts={})
        return _xml_reply("InitiateMultipartUploadResult", _tags(
            Bucket=req.bucket, Key=req.key, UploadId=name))

    def upload(self, req):
        upload = self.uploads.get(req.query["uploadId"])
        if not upload or upload.where != (req.bucket, req.key):
            raise S3Error("NoSuchUpload")
        return upload

    def put_key_uploadid(self, req):
        number = int(req.query.get("partNumber", ""))
        if not 1 <= number <= 10000 or "x-amz-copy-source" in req.headers:
            raise S3Error("NotImplemented")
        etag = hashlib.md5(req.body).hexdigest()
        self.upload(req).parts[number] = (etag, req.body)
        return S3Reply(200, {"ETag": '"%s"' % etag})

    def get_key_uploadid(self, req):
        parts = sorted(self.upload(req).parts.items())
        rows = ["<Part>%s</Part>" % _tags(PartNumber=number, ETag='"%s"' % etag,
                                          Size=len(body))
                for number, (etag, body) in parts]
        return _xml_reply("ListPartsResult", _tags(
            Bucket=req.bucket, Key=req.key, UploadId=req.query["uploadId"],
            IsTruncated="false") + "".join(rows))

    def post_key_uploadid(self, req):
        upload = self.upload(req)
        listed = {int(part.findtext("{*}PartNumber", "")):
                  part.findtext("{*}ETag", "").strip('"')
                  for part in ElementTree.fromstring(req.body).findall("{*}Part")}
        if not listed or list(listed) != sorted(listed):
            raise S3Error("InvalidPartOrder" if listed else "MalformedXML")
        parts = [upload.parts.get(number, ("", b"")) for number in listed]
        if [etag for etag, _ in parts] != list(listed.values()) or ("", b"") in parts:
            raise S3Error("InvalidPart")
        md5 = hashlib.md5(b"".join(bytes.fromhex(etag) for etag, _ in parts))
        obj = self.write(req, b"".join(body for _, body in parts), upload.headers,
                         "%s-%d" % (md5.hexdigest(), len(parts)))
        self.uploads.pop(req.query["uploadId"], None)
        return _xml_reply("CompleteMultipartUploadResult", _tags(
            Location=req.path, Bucket=req.bucket, Key=req.key, ETag=obj.etag))

    def delete_key_uploadid(self, req):
        self.upload(req)
        self.uploads.pop(req.query["uploadId"], None)
        return S3Reply(204)


def _canned_reply(api, kind, options, req):
    """The answer of a fault that keeps the request from being acted upon, or None."""
    if kind == "late":
        return api.refuse(options.get("status", 500), req)
    if isinstance(kind, int):
        wait = options.get("retry_after")
        return api.refuse(kind, req, {} if wait is None else {"Retry-After": wait})
    if kind == "redirect":
        return api.refuse(options.get("status", 307), req,
                          {"Location": options["location"]})
    if kind == "region":
        return api.refuse(301, req, {"x-amz-bucket-region": options["region"]})
    if kind == "html":
        return S3Reply(200, {"Content-Type": "text/html"},
                       b"<!DOCTYPE html><html><h1>Sign in to this network</h1></html>")
    return None


def _spoiled_reply(api, kind, options, req, reply):
    """The answer of a fault that falsifies what is told of a request carried out."""
    if kind == "landed":
        return api.refuse(options.get("status", 500), req)
    if kind == "garbage":
        flipped = bytes(byte ^ 255 for byte in reply.body) or b"\0garbage"
        return S3Reply(200, reply.headers, options.get("body", flipped))
    if kind == "age":
        aged = {"Age": 120, "Date": formatdate(api.now() - 120, usegmt=True)}
        return reply._replace(headers=dict(reply.headers, **aged))
    return reply


class Handler(socketserver.StreamRequestHandler):
    """One connection: reads requests, applies faults, writes answers."""
    disable_nagle_algorithm = True
    last = False

    def handle(self):
        self.server.live.add(self.connection)
        with contextlib.suppress(OSError):
            while not self.last:
                self.serve(self.server.api)
        self.server.live.discard(self.connection)

    def serve(self, api):
        try:
            req = self.read_request(api)
        except ValueError:
            self.wfile.write(b"HTTP/1.1 400 Bad Request\r\nx-amz-request-id: 0\r\n"
                             b"Content-Length: 0\r\nConnection: close\r\n\r\n")
            raise ConnectionError
        fault = api.take_fault(req)
        time.sleep(api.latency)
        reply = self.respond(api, req, fault.kind, fault.options)
        silent = fault.kind in ("refuse", "reset", "lose", "reset_after")
        req.status = 0 if silent else reply.status
        api.log.append(req)
        if fault.kind in ("reset", "reset_after"):
            self.reset()
        if silent:
            raise ConnectionError
        self.send(req, reply, formatdate(api.now(), usegmt=True), fault)

    def read_request(self, api):
        line = self.rfile.readline(65536)
        if not line:
            raise ConnectionError
        method, target, version = line.decode("latin-1").split()
        headers = {}
        for line in iter(self.rfile.readline, b"\r\n"):
            if not line:
                raise ConnectionError
            name, _, value = line.decode("latin-1").partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = headers[name] + "," + value if name in headers else value
        self.last = version == "HTTP/1.0" or "close" in headers.get(
            "connection", "").lower()
        return api.request(method, target, headers, self.read_body(headers))

    def read_body(self, headers):
        if headers.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "transfer-encoding" in headers:
            return _unchunk(self.rfile)
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError
        return body

    def respond(self, api, req, kind, options):
        """The answer, after acting on the request as far as the fault lets it."""
        req.fault, req.options = kind, options
        if kind in ("refuse", "reset"):
            return None
        if kind == "late":
            timer = threading.Timer(options["seconds"], api.act, (req,))
            timer.daemon = True
            timer.start()
        canned = _canned_reply(api, kind, options, req)
        if canned:
            return canned
        if kind == "delay":
            time.sleep(options["seconds"])
        if kind == "call":
            options["fn"](req)
        req.ignore = kind == "ignore"
        req.depth = options.get("depth", 1) if kind == "stale_list" else 0
        if kind == "lag":
            req.lag = options["seconds"]
        reply = api.act(req)
        if kind == "duplicate":
            api.act(req)
        return _spoiled_reply(api, kind, options, req, reply)

    def send(self, req, reply, date, fault):
        bare = req.method == "HEAD" and reply.status >= 300
        body = b"" if bare else reply.body
        headers = {"x-amz-request-id": req.id, "Date": date, **reply.headers}
        if not isinstance(body, bytes):
            headers["Transfer-Encoding"] = "chunked"
        elif reply.status not in (204, 304):
            headers["Content-Length"] = len(body)
        if self.last:
            headers["Connection"] = "close"
        head = "HTTP/1.1 %d %s\r\n" % (reply.status, responses.get(reply.status, "-"))
        head += "".join("%s: %s\r\n" % pair for pair in headers.items()) + "\r\n"
        if not isinstance(body, bytes):
            self.wfile.write(head.encode("latin-1"))
            self.stream(body)
            return
        data = head.encode("latin-1") + (body if req.method != "HEAD" else b"")
        if fault.kind != "truncate":
            self.wfile.write(data)
            return
        tail = 0 if req.method == "PUT" else len(data) - len(head)
        cut = len(head) + tail // 2 if tail else len(head) // 2
        self.wfile.write(data[:fault.options.get("at", cut)])
        raise ConnectionError

    def stream(self, pieces):
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def reset(self):
        """Close with RST: the linger must be set before the last reference goes."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                   struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


class Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256


class Loopback:
    """What serves an API on a loopback port, with a log of requests and faults to
    order. Of the faults queued, the first that matches and has nothing left to skip
    takes a request."""
    kinds = FAULTS

    def __init__(self, port=0):
        self.port, self.log, self.faults, self.listener = port, [], [], None

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def start(self):
        self.listener = Listener(("127.0.0.1", self.port), Handler)
        self.listener.api, self.listener.live = self, set()
        # Kept, so that a server stopped and started again is found where it was.
        self.port = self.listener.server_address[1]
        threading.Thread(target=self.listener.serve_forever, args=(0.02,),
                         daemon=True).start()
        return self

    def stop(self):
        listener, self.listener = self.listener, None
        if listener:
            listener.shutdown()
            listener.server_close()
            for connection in list(listener.live):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()

    def fault(self, kind, method=None, key="", times=1, skip=0, **options):
        if not isinstance(kind, int) and kind not in self.kinds:
            raise ValueError("no such fault: %r" % (kind,))
        fault = SimpleNamespace(kind=kind, method=method, key=key, times=times,
                                skip=skip, options=options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def take_fault(self, req):
        with self.lock:
            for fault in self.faults:
                if fault.times < 1 or not self.concerns(fault, req):
                    continue
                if fault.skip < 1:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return SimpleNamespace(kind="", options={})

    def concerns(self, fault, req):
        return (fault.method in (None, req.method) and fault.key in req.subject
                and (fault.kind != "stale_list" or req.listing)
                and fault.options.get("origin") in (None, req.origin))

    def clear_log(self):
        self.log.clear()


class S3Server(Loopback, S3Api):
    kinds = FAULTS | {"region", "stale_list"}

    def __init__(self, port=0, **options):
        S3Api.__init__(self, **options)
        Loopback.__init__(self, port)

    def request(self, *parts):
        return S3Request(*parts, buckets=self.buckets)

    def refuse(self, status, req, headers=()):
        code = S3_FAULT_CODES.get(status, "InternalError")
        return S3Error(code, status=status, headers=headers).reply(req)

    def count(self, method=None, key_contains=None):
        return sum(method in (None, req.method) and (key_contains or "") in req.key
                   for req in list(self.log))

    def body(self, key, bucket="bucket"):
        obj = self.objects.get((bucket, key))
        return obj.body if obj else None

    def env(self):
        env = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": self.access_key,
               "AWS_SECRET_ACCESS_KEY": self.secret_key,
               "AWS_DEFAULT_REGION": self.region,
               "AWS_SESSION_TOKEN": self.session_token}
        return {name: value for name, value in env.items() if value}


# AWS Signature Version 4 test vectors.  SIGV4_VECTORS is a list of dicts:
#   name, method, path, query, headers, body, access_key, secret_key, token,
#   region, service, amz_date, expires, canonical_request, string_to_sign, signature
# path: unencoded text; encode it once ("/" kept), never normalise it.
# query: decoded (name, value) pairs in request order; a bare "?name" has value "".
# headers: every header that is signed (Host, X-Amz-Date, X-Amz-Security-Token and
#   X-Amz-Content-SHA256 included), as sent, before trimming and case folding.
# expires: None for Authorization-header signing, seconds for a presigned URL (the
#   X-Amz-* query parameters are then not in query, and the payload is unsigned).
# The keys below are the published example credentials, not real ones.
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_FORM = "9095672bbd1f56dfc5b65f3e153adc8731a4a654192329106275f4c7b24d0b6e"
_HELLO = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072"
_UNRESERVED = ("-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
               "abcdefghijklmnopqrstuvwxyz")
_HOST = "host:example.amazonaws.com"
_DATE = "x-amz-date:20150830T123600Z"
_PLAIN = (_HOST, _DATE, "", "host;x-amz-date", _EMPTY)
_TOK1 = "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267"
_TOK2 = (
    "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKW"
    "HGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwthAx7mSEI/qkPpKPi/kMcGdQrmGdeehM4"
    "IC1NtBmUpp2wUE8phUZampKsburEDy0KPkyQDYwT7WZ0wq5VSXDvp75YU9HFvlRd8Tx6q6fE"
    "8YQcHNVXAkiY9q6d+xo0rKwT38xVqr7ZD0u0iPPkUL64lIZbqBAz+scqKmlzm8FDrypNC9Yj"
    "c8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA=="
)


def _vector(name, method, path, query, headers, body, creq, creq_sha256, signature,
            token, expires, amz_date, access_key, secret_key, service):
    scope = f"{amz_date[:8]}/us-east-1/{service}/aws4_request"
    return dict(
        name=name, method=method, path=path, query=query, headers=headers, body=body,
        access_key=access_key, secret_key=secret_key, token=token,
        region="us-east-1", service=service, amz_date=amz_date, expires=expires,
        canonical_request="\n".join((method, *creq)),
        string_to_sign=f"AWS4-HMAC-SHA256\n{amz_date}\n{scope}\n{creq_sha256}",
        signature=signature)


def _v(name, method, path, query, extra, body, creq, sha, sig, token=None):
    amz_date = "20150830T123600Z"
    headers = [("Host", "example.amazonaws.com"), *extra, ("X-Amz-Date", amz_date)]
    if token:
        headers.append(("X-Amz-Security-Token", token))
    return _vector(name, method, path, query, headers, body, creq, sha, sig, token,
                   None, amz_date, "AKIDEXAMPLE",
                   "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "service")


def _s3(name, method, path, query, extra, body, creq, sha, sig, expires=None):
    amz_date = "20130524T000000Z"
    headers = [("Host", "examplebucket.s3.amazonaws.com"), *extra]
    if expires is None:
        headers.append(("X-Amz-Date", amz_date))
    return _vector(name, method, path, query, headers, body, creq, sha, sig, None,
                   expires, amz_date, "AKIAIOSFODNN7EXAMPLE",
                   "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "s3")


_S3_HOST = "host:examplebucket.s3.amazonaws.com"
_S3_DATE = "x-amz-date:20130524T000000Z"
_S3_HASH = "x-amz-content-sha256:"
_S3_SIGNED = "host;x-amz-content-sha256;x-amz-date"

SIGV4_VECTORS = [
    # AWS Signature Version 4 Test Suite (Copyright 2019 Amazon.com, Apache-2.0), as
    # carried in botocore 1.31.0, tests/unit/auth/aws4_testsuite.
    _v("get-vanilla", "GET", "/", [], [], b"",
       ("/", "", *_PLAIN),
       "bb579772317eb040ac9ed261061d46c1f17a8133879d6129b6e1c25292927e63",
       "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
    _v("get-vanilla-empty-query-key", "GET", "/", [("Param1", "value1")], [], b"",
       ("/", "Param1=value1", *_PLAIN),
       "1e24db194ed7d0eec2de28d7369675a243488e08526e8c1c73571282f7c517ab",
       "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
    _v("get-vanilla-query-order-encoded", "GET", "/",
       [("Param-3", "Value3"), ("Param", "Value2"), ("\u1234", "Value1")], [], b"",
       ("/", "%E1%88%B4=Value1&Param=Value2&Param-3=Value3", *_PLAIN),
       "868294f5c38bd141c4972a373a76654f1418a8e4fc18b2e7903ae45e8ae0ec71",
       "371d3713e185cc334048618a97f809c9ffe339c62934c032af5a0e595648fcac"),
    _v("get-vanilla-query-order-key-case", "GET", "/",
       [("Param2", "value2"), ("Param1", "value1")], [], b"",
       ("/", "Param1=value1&Param2=value2", *_PLAIN),
       "816cd5b414d056048ba4f7c5386d6e0533120fb1fcfa93762cf0fc39e2cf19e0",
       "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
    _v("get-vanilla-query-order-key", "GET", "/",
       [("Param1", "value2"), ("Param1", "Value1")], [], b"",
       ("/", "Param1=Value1&Param1=value2", *_PLAIN),
       "704b4cef673542d84cdff252633f065e8daeba5f168b77116f8b1bcaf3d38f89",
       "eedbc4e291e521cf13422ffca22be7d2eb8146eecf653089df300a15b2382bd1"),
    _v("get-vanilla-query-order-value", "GET", "/",
       [("Param1", "value2"), ("Param1", "value1")], [], b"",
       ("/", "Param1=value1&Param1=value2", *_PLAIN),
       "c968629d70850097a2d8781c9bf7edcb988b04cac14cca9be4acc3595f884606",
       "5772eed61e12b33fae39ee5e7012498b51d56abc0abb7c60486157bd471c4694"),
    _v("get-vanilla-query-unreserved", "GET", "/", [(_UNRESERVED, _UNRESERVED)],
       [], b"",
       ("/", _UNRESERVED + "=" + _UNRESERVED, *_PLAIN),
       "c30d4703d9f799439be92736156d47ccfb2d879ddf56f5befa6d1d6aab979177",
       "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"),
    _v("get-vanilla-utf8-query", "GET", "/", [("\u1234", "bar")], [], b"",
       ("/", "%E1%88%B4=bar", *_PLAIN),
       "eb30c5bed55734080471a834cc727ae56beb50e5f39d1bff6d0d38cb192a7073",
       "2cdec8eed098649ff3a119c94853b13c643bcf08f8b0a1d91e12c9027818dd04"),
    _v("get-vanilla-with-session-token", "GET", "/", [], [], b"",
       ("/", "", _HOST, _DATE, "x-amz-security-token:" + _TOK1, "",
        "host;x-amz-date;x-amz-security-token", _EMPTY),
       "067b36aa60031588cea4a4cde1f21215227a047690c72247f1d70b32fbbfad2b",
       "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8", _TOK1),
    _v("get-unreserved", "GET", "/" + _UNRESERVED, [], [], b"",
       ("/" + _UNRESERVED, "", *_PLAIN),
       "6a968768eefaa713e2a6b16b589a8ea192661f098f37349f4e2c0082757446f9",
       "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
    _v("get-utf8", "GET", "/\u1234", [], [], b"",
       ("/%E1%88%B4", "", *_PLAIN),
       "2a0a97d02205e45ce2e994789806b19270cfbbb0921b278ccf58f5249ac42102",
       "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
    _v("get-space", "GET", "/example space/", [], [], b"",
       ("/example%20space/", "", *_PLAIN),
       "63ee75631ed7234ae61b5f736dfc7754cdccfedbff4b5128a915706ee9390d86",
       "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
    _v("get-special-character", "GET", "/example/$delete", [], [], b"",
       ("/example/%24delete", "", *_PLAIN),
       "4053e45b5cef7cec5e17f736b1c12b3faf0388fd4c0bd24326386f132039ce5c",
       "a853c9b21b528b19643d00910d35b83a10c366a10833ceefb45edd6c80e40f27"),
    _v("get-header-key-duplicate", "GET", "/", [],
       [("My-Header1", "value2"), ("My-Header1", "value2"), ("My-Header1", "value1")],
       b"",
       ("/", "", _HOST, "my-header1:value2,value2,value1", _DATE, "",
        "host;my-header1;x-amz-date", _EMPTY),
       "dc7f04a3abfde8d472b0ab1a418b741b7c67174dad1551b4117b15527fbe966c",
       "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"),
    _v("get-header-value-order", "GET", "/", [],
       [("My-Header1", "value4"), ("My-Header1", "value1"), ("My-Header1", "value3"),
        ("My-Header1", "value2")], b"",
       ("/", "", _HOST, "my-header1:value4,value1,value3,value2", _DATE, "",
        "host;my-header1;x-amz-date", _EMPTY),
       "31ce73cd3f3d9f66977ad3dd957dc47af14df92fcd8509f59b349e9137c58b86",
       "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"),
    _v("get-header-value-trim", "GET", "/", [],
       [("My-Header1", " value1"), ("My-Header2", ' "a   b   c"')], b"",
       ("/", "", _HOST, "my-header1:value1", 'my-header2:"a b c"', _DATE, "",
        "host;my-header1;my-header2;x-amz-date", _EMPTY),
       "a726db9b0df21c14f559d0a978e563112acb1b9e05476f0a6a1c7d68f28605c7",
       "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"),
    _v("post-vanilla", "POST", "/", [], [], b"",
       ("/", "", *_PLAIN),
       "553f88c9e4d10fc9e109e2aeb65f030801b70c2f6468faca261d401ae622fc87",
       "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    _v("post-vanilla-query", "POST", "/", [("Param1", "value1")], [], b"",
       ("/", "Param1=value1", *_PLAIN),
       "9d659678c1756bb3113e2ce898845a0a79dbbc57b740555917687f1b3340fbbd",
       "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11"),
    _v("post-header-key-sort", "POST", "/", [], [("My-Header1", "value1")], b"",
       ("/", "", _HOST, "my-header1:value1", _DATE, "",
        "host;my-header1;x-amz-date", _EMPTY),
       "9368318c2967cf6de74404b30c65a91e8f6253e0a8659d6d5319f1a812f87d65",
       "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"),
    _v("post-header-value-case", "POST", "/", [], [("My-Header1", "VALUE1")], b"",
       ("/", "", _HOST, "my-header1:VALUE1", _DATE, "", "host;my-header1;x-amz-date",
        _EMPTY),
       "d51ced243e649e3de6ef63afbbdcbca03131a21a7103a1583706a64618606a93",
       "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d"),
    _v("post-sts-header-before", "POST", "/", [], [], b"",
       ("/", "", _HOST, _DATE, "x-amz-security-token:" + _TOK2, "",
        "host;x-amz-date;x-amz-security-token", _EMPTY),
       "c237e1b440d4c63c32ca95b5b99481081cb7b13c7e40434868e71567c1a882f6",
       "85d96828115b5dc0cfc3bd16ad9e210dd772bbebba041836c64533a82be05ead", _TOK2),
    _v("post-x-www-form-urlencoded", "POST", "/", [],
       [("Content-Type", "application/x-www-form-urlencoded")], b"Param1=value1",
       ("/", "", "content-type:application/x-www-form-urlencoded", _HOST, _DATE, "",
        "content-type;host;x-amz-date", _FORM),
       "42a5e5bb34198acb3e84da4f085bb7927f2bc277ca766e6d19c73c2154021281",
       "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    _v("post-x-www-form-urlencoded-parameters", "POST", "/", [],
       [("Content-Type", "application/x-www-form-urlencoded; charset=utf8")],
       b"Param1=value1",
       ("/", "", "content-type:application/x-www-form-urlencoded; charset=utf8", _HOST,
        _DATE, "", "content-type;host;x-amz-date", _FORM),
       "2e1cf7ed91881a30569e46552437e4156c823447bf1781b921b5d486c568dd1c",
       "1a72ec8f64bd914b0e42e42607c7fbce7fb2c7465f63e3092b3b0d39fa77a6fe"),
    # Amazon S3 API Reference, "Signature Calculations for the Authorization Header:
    # Transferring Payload in a Single Chunk", Examples.
    _s3("s3-get-object", "GET", "/test.txt", [],
        [("Range", "bytes=0-9"), ("X-Amz-Content-SHA256", _EMPTY)], b"",
        ("/test.txt", "", _S3_HOST, "range:bytes=0-9", _S3_HASH + _EMPTY, _S3_DATE, "",
         "host;range;x-amz-content-sha256;x-amz-date", _EMPTY),
        "7344ae5b7ee6c3e7e6b0fe0640412a37625d1fbfff95c48bbb2dc43964946972",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
    _s3("s3-put-object", "PUT", "/test$file.text", [],
        [("Date", "Fri, 24 May 2013 00:00:00 GMT"), ("X-Amz-Content-SHA256", _HELLO),
         ("x-amz-storage-class", "REDUCED_REDUNDANCY")], b"Welcome to Amazon S3.",
        ("/test%24file.text", "", "date:Fri, 24 May 2013 00:00:00 GMT", _S3_HOST,
         _S3_HASH + _HELLO, _S3_DATE, "x-amz-storage-class:REDUCED_REDUNDANCY", "",
         "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", _HELLO),
        "9e0e90d9c76de8fa5b200d8c849cd5b8dc7a3be3951ddb7f6a76b4158342019d",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
    _s3("s3-get-bucket-lifecycle", "GET", "/", [("lifecycle", "")],
        [("X-Amz-Content-SHA256", _EMPTY)], b"",
        ("/", "lifecycle=", _S3_HOST, _S3_HASH + _EMPTY, _S3_DATE, "",
         _S3_SIGNED, _EMPTY),
        "9766c798316ff2757b517bc739a67f6213b4ab36dd5da2f94eaebf79c77395ca",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
    _s3("s3-list-objects", "GET", "/", [("max-keys", "2"), ("prefix", "J")],
        [("X-Amz-Content-SHA256", _EMPTY)], b"",
        ("/", "max-keys=2&prefix=J", _S3_HOST, _S3_HASH + _EMPTY, _S3_DATE, "",
         _S3_SIGNED, _EMPTY),
        "df57d21db20da04d7fa30298dd4488ba3a2b47ca3a489c74750e0f1e7df1b9b7",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    # Amazon S3 API Reference, "Authenticating Requests: Using Query Parameters".
    _s3("s3-presigned-get", "GET", "/test.txt", [], [], b"",
        ("/test.txt",
         "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE"
         "%2F20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z"
         "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host",
         _S3_HOST, "", "host", "UNSIGNED-PAYLOAD"),
        "3bfa292879f6447bbcda7001decf97f4a54dc650c8942174ae0a9121cf58ad04",
        "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404", 86400),
]


# == A Hub of our own ==================================================
#
# Hugging Face Hub, CAS, origin of bytes and S3 gateway on loopback ports: strict,
# with faults to order, and itself tried by the real clients (below). What it demands
# and answers: hf-buckets.md 2-9, xet-upload.md 2-7.

# -- Xet by the book ---------------------------------------------------
#
# Small and slow, and nothing of tracecraft's: the Hub derives every hash anew.

B3_START, B3_END, B3_PARENT, B3_ROOT, B3_KEYED = 1, 2, 4, 8, 16
B3_INIT = [int(word, 16) for word in "6a09e667 bb67ae85 3c6ef372 a54ff53a".split()]
B3_ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
B3_MIXES = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
XET_KEYS = {name: bytes.fromhex(key) for name, key in {
    "chunk": "6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229",
    "node": "017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f",
    "range": "7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3",
    "file": "00" * 32}.items()}
XET_MIN, XET_MAX, XET_XORB = 8192, 131072, 64 << 20
XET_EMPTY = "0" * 64
XET_TAG = bytes.fromhex(
    "48465265706f4d6574614461746100556967456a7b815783a5bdd95ccdd14aa9")
XET_GEAR = struct.unpack(">256Q", base64.b85decode("""
u!z&C=s@*ZR#M0JIqe|UMY4%$iHUNnYYK_gwvNYlHjh_6i+VA)9mY1?={DI*AbLzrRaDisq;#`JC?lH7
I|ise9HY4skmrqTF9N#v;mIxc6%Cq-
j+F&E5QfvOS}yeQxH<<Sr4Ou>pMZa^4s!$RfY{c7nXrD`6>zN&Xq_*$RsAq_002;e5uT)I#IS<~sE^Dj
KCows_BTrX@t=pQhOKlq@)DoFzH7%eND)a_T$rTo00037l}CHUAG$Yy8l39PJMeGTW2BpHnP`5Og5!rv
d7%b#s!-VD<gCx0ViEKpB_QV?hgXnsE7jBecp8eE0Nzc_-
4V!h>ZvgtT8B9=+jNe$7ra3KuUDFl_8`A+hNk7(8wtX(%rC<V!y=(BHC`(I!S_OEEt$ylz#*i2y537ll
mySi_q7;u9dLbVGKRKTd-
E(H006d#hOZ|Kp%vET+lr8RNKby8m$KoR%*uPWR}<p_za@mGE3olkt>@?yVqLt*003~54TqIlisq3B6P
{vky?1KYFWxw!`)dFn!u-I`$E0+)=6l2^y7uuF5bIr73CkZ_ZRc>&u(BEEmwik}0L;8NZl|qE%!Hi^-
<LlDbEEHl0c!Vf$OqEXhP}Q1e=5nAY<U+j&^M@S#>E8M^YMIU9;#rStfnTgO{(UHby}G>PfA+{kb{2aT
P&{LZs@I({Z<Es007zH5L4~go(4Oz(j42@2dj7SDgn~6>{S9)=42a0c>9#7M4S}H$59R&#=!OU001%zH
ss3Vf_yV3EQ=Z~6lY%xNa{gECVSJSNsa95@sV%&g7pJlh9Vn(^fdd3oxaZJIB!YV>R9;7$PbT70F4=jl
Kf=YZ8&gGy1$w>;4;ex(dWKQB8?&TtwjisV_dPnz$J;LMj)YcoTAQgr{~|}s^$Aw3=qnbD?APBCnx^sg
s<&;qTd{C`Qob|P0i7)2Xyr#0040Rtux|IqO9n9#g}*%n35-2v?yRn!iEun-SLT8yP0yJLP$Ot?{LjGW
>GMB000FOtNfT`z*x2zSjj+x3FuITmnGodk(c{B_&$A<ejZ|N61GduQVdj3e|uNazTtUsbmAlyZ`rIeB
I#9!03(%rn%}=Zpd5XEBTK#&tD?tPxTB1_4IiM+>^>_n3$~?;eqgzgLo?l5pQ2_p!u>maKmoy{`$2#tR
C5t0Wu;+-
r41O%_Id)nhlI6HX>SqTXXa32001B&{HPSGjMl!9ExFiIX;F!`>8^@b?vzut3fc@P*!*6p8hC_WtA@WB
8cL^U0073d$Yd4eCUX!MjtHVI?JW=+2aC!jJ3;M)vL>ke6Xqfk4=CIQqZRe*`*3Y0h!(?6GXc8J={Z}R
yK()l04(VsE^-z~LWA2KE3?TQ*L_AB(y^wc;_MgXZtI3?xZu7(Is3$X-
l1T`)hV3>e(Z+G(u_7VAsMX_pO~YWrp)wfVWNZYEK<(i_E^RjEwqObX{_CY008jT^PbD;J=NIBjW3jmi
WqXDD*^R{@`9wq4tqTEfFSHF%NwDVW|Owyo>}7)007Pz%zT6EAj?-Z_D7sMb}qj+S=U-
yAbb9TJ!v_0*L}efGo0Dgo2P?9gkpUIA$`RY>0eRlvU?gS{9bq#0M*TyF}r3hapRkSZFO@@epf2+2KyQ
#qH|9#YUv+^zk<fK0xaF~Ts!K<2VtPz&B&9xM?q<rZ4iZFTo`@<clfR_tS5Y3k$h``5-
Kc_TXnXXt<h;`007Tw=b8qa^TZ1JVBQe~AY&4GrIBaDVjbopY0-&I(TJ=a<|{`g5O6l)6-
#G4006jOC{;Qg^6ySe7$a{z+1B1>5xMpPq5OGO`$v%+>xKOTFDZ?^z9&#Gv%dP_;{!rb#LZ?NL=$AwR0
kL~0D`k@b@G@#u|<&s7W!uJ0vraMm`BR@DG=YsT1!$Pb6Yh&99O8d&O|XR>5kcKyp%3Q2EF=a@KA=Q5?
7QP{=>2r(^1Z?0Im>K;1ogv^-
Dm6Z$ji$004j4$h^GBzrCLG7v7uxs01)C@`X+kInGH}rRCVv|GDC%RyVqYRk^Jlo}ht?004^1^BEV4Na
DZ9(EIy1i{qF<=t#Bb4kr>829}_U)ex5GOGG3p5dpdvXOiJM!Y+3YMKNfd7K!ija=XQB0I4b&e^yZJym
ncTy`gwc#uP#0lKi-?2jMy_?J?w_lFR9YBTk)7k5Bb-yM2nq3zl%e3zj?3VwGB08UyPAWM6~j>Hq>%LH
y+w&4}`uyV{pX+IpDJ00648{zygo8Fm{6oAqT?i;rG|L$<9}K3yFB6i6Z2>|7o!qOi@6`uE`er~9>k00
02fx)PQf+CPvNgaNURaQ~2P<2qmK1t-;~z-
e&jBG~71V0;tl$*XYRWIQ{p?WD%sioO!#?C&2z05j)`03^b)bgXjA26PRTPpJU39eOF7GCgAiv%`F{n9
J(b$%f;{VR&<!pR4LNOGfpIZK4##uZ7H37o<Mex1*1QZp`da9h%$g`O32i6Ej--N?u^a^cC*X003!cP&
RV3ouwTT6jZy1gfbozxx2^~`#o>At1sP+U@%_ojur}y%fCw$>6C2f002*8I2#bd2i3QMZ_G{*<)t=qYH
ER1SFf@(N1%V*81qK=tI5-pV{OJ&)*912%!{i@IrsDSW5=lm!QB{p
""".replace("\n", "")))


def b3_compress(chain, words, counter, size, flags, ones=1):
    """BLAKE3's compression; of many blocks side by side if `ones` has a 1 in every 64
    bits and the other integers have a word there. The result is a chaining value."""
    mask = ones * 0xffffffff
    state = [*chain, *(word * ones for word in B3_INIT), counter, 0, size * ones,
             flags * ones]
    for _ in range(7):
        for (a, b, c, d), x, y in zip(B3_MIXES, words[::2], words[1::2]):
            for word, right, left in ((x, 16, 12), (y, 8, 7)):
                state[a] = state[a] + state[b] + word & mask
                mixed = state[d] ^ state[a]
                state[d] = (mixed >> right | mixed << 32 - right) & mask
                state[c] = state[c] + state[d] & mask
                mixed = state[b] ^ state[c]
                state[b] = (mixed >> left | mixed << 32 - left) & mask
        words = [words[at] for at in B3_ORDER]
    return [state[at] ^ state[at + 8] for at in range(8)]


def _side_by_side(words):
    return int.from_bytes(struct.pack("<%dQ" % len(words), *words), "little")


def _apart(chain, count):
    """The chaining values that are side by side in one."""
    return list(zip(*(struct.unpack("<%dQ" % count, word.to_bytes(8 * count, "little"))
                      for word in chain)))


def b3_leaves(key, data, first=0, root=0):
    """The chaining values of chunks of 1024 bytes, or of one that is shorter."""
    count = len(data) // 1024 or 1
    size = len(data) // count
    blocks = -(-size // 64) or 1
    words = struct.unpack("<%dI" % (count * blocks * 16),
                          data.ljust(count * blocks * 64, b"\0"))
    ones = _side_by_side([1] * count)
    chain = [word * ones for word in key]
    for block in range(blocks):
        last = block == blocks - 1
        flags = B3_KEYED | (B3_START if not block else 0) | (B3_END | root) * last
        chain = b3_compress(
            chain, [_side_by_side(words[block * 16 + at::blocks * 16])
                    for at in range(16)], _side_by_side(range(first, first + count)),
            size - 64 * block if last else 64, flags, ones)
    return _apart(chain, count)


def blake3_keyed(key, data):
    """The 32 bytes of keyed BLAKE3."""
    key, full = struct.unpack("<8I", key), max(0, len(data) - 1) // 1024
    if not full:
        return struct.pack("<8I", *b3_leaves(key, data, root=B3_ROOT)[0])
    cut = full * 1024
    level = b3_leaves(key, data[:cut]) + b3_leaves(key, data[cut:], full)
    while len(level) > 1:
        count, odd = divmod(len(level), 2)
        words = [left + right for left, right in zip(level[::2], level[1::2])]
        ones = _side_by_side([1] * count)
        flags = B3_KEYED | B3_PARENT | (B3_ROOT if len(level) == 2 else 0)
        level = _apart(b3_compress([word * ones for word in key],
                                   [_side_by_side(row) for row in zip(*words)], 0, 64,
                                   flags, ones), count) + level[len(level) - odd:]
    return struct.pack("<8I", *level[0])


def xet_string(raw):
    return "%016x%016x%016x%016x" % struct.unpack("<4Q", raw)


def xet_raw(string):
    if not re.fullmatch("[0-9a-f]{64}", string):
        raise ValueError("not a hash: %r" % string)
    return struct.pack("<4Q", *(int(string[at:at + 16], 16) for at in (0, 16, 32, 48)))


def xet_cuts(data):
    """The sizes of the chunks that data is cut into."""
    sizes, start = [], 0
    while start < len(data):
        stop, h = min(start + XET_MAX, len(data)), 0
        for at in range(start + XET_MIN - 65, stop):  # older bytes have left h
            h = h * 2 + XET_GEAR[data[at]] & 2**64 - 1
            if h < 2**48 and at + 1 >= start + XET_MIN:
                stop = at + 1
                break
        sizes.append(stop - start)
        start = stop
    return sizes


@functools.lru_cache(maxsize=4096)
def xet_chunk_hash(chunk):
    return blake3_keyed(XET_KEYS["chunk"], chunk)


def xet_root(entries):
    """The merkle root of (raw hash, size) pairs."""
    while len(entries) > 1:
        level, at = [], 0
        while at < len(entries):
            end = _group_end(entries, at)
            text = "".join("%s : %d\n" % (xet_string(raw), size)
                           for raw, size in entries[at:end])
            level.append((blake3_keyed(XET_KEYS["node"], text.encode()),
                          sum(size for _, size in entries[at:end])))
            at = end
        entries = level
    return entries[0][0]


def _group_end(entries, at):
    if len(entries) - at <= 2:
        return len(entries)
    last = min(at + 9, len(entries))
    return next((end for end in range(at + 3, last) if not entries[end - 1][0][24] & 3),
                last)


def xet_of_chunks(entries):
    """The hash string of the file that has these chunks, as (raw hash, size)."""
    if not entries:
        return XET_EMPTY
    return xet_string(blake3_keyed(XET_KEYS["file"], xet_root(entries)))


def xet_split(data):
    ends = list(itertools.accumulate(xet_cuts(data)))
    return [data[start:end] for start, end in zip([0] + ends, ends)]


@functools.lru_cache(maxsize=1024)
def xet_of(data):
    """The hash string of a file: its xetHash, and its ETag at the gateway."""
    return xet_of_chunks([(xet_chunk_hash(chunk), len(chunk))
                          for chunk in xet_split(data)])


def crc64nvme(data):
    crc = 2**64 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x9a6c9329ac4bc9b5 * (crc & 1)
    return crc ^ 2**64 - 1


class Xorb:
    """Chunks in one body, as clients store them; `ends` are offsets in it."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.entries = [(xet_chunk_hash(chunk), len(chunk)) for chunk in chunks]
        self.hash = xet_string(xet_root(self.entries))
        heads = ((len(chunk) << 8 | len(chunk) << 40).to_bytes(8, "little")
                 for chunk in chunks)
        self.body = b"".join(head + chunk for head, chunk in zip(heads, chunks))
        self.ends = [0, *itertools.accumulate(len(chunk) + 8 for chunk in chunks)]

    @classmethod
    def read(cls, body):
        chunks, at = [], 0
        while at < len(body):
            head = int.from_bytes(body[at:at + 8], "little")
            size, scheme, raw = head >> 8 & 0xffffff, head >> 32 & 255, head >> 40
            if head & 255 or scheme or not 0 < size == raw <= XET_MAX:
                raise ValueError("a chunk that is not plain: %016x" % head)
            chunks.append(body[at + 8:at + 8 + size])
            at += 8 + size
        if at != len(body) or not 0 < len(chunks) <= 8192 or at > XET_XORB:
            raise ValueError("a xorb of %d bytes, %d chunks" % (len(body), len(chunks)))
        return cls(chunks)


def read_shard(body):
    """The files and xorbs that a shard in upload form tells of."""
    tag, version, footer = struct.unpack_from("<32sQQ", body)
    if tag != XET_TAG or version != 2 or footer % 8 or len(body) % 48 and not footer:
        raise ValueError("not the head of a shard")
    rows = iter([body[at:at + 48] for at in range(48, len(body) - footer, 48)])
    bookend = b"\xff" * 32 + bytes(16)
    files, xorbs = [], []
    for row in iter(lambda: _row(rows), bookend):
        name, flags, count, zero = struct.unpack("<32sIIQ", row)
        terms = [struct.unpack("<32s4I", _row(rows)) for _ in range(count)]
        checks = [_row(rows)[:32] for _ in range(count) if flags >> 31]
        digest = _row(rows)[:32] if flags >> 30 & 1 else None
        if zero or any(term[1] for term in terms) or len(checks) != count:
            raise ValueError("a file of a shard is not as it should be")
        files.append(SimpleNamespace(hash=xet_string(name), terms=terms, checks=checks,
                                     sha256=digest))
    for row in iter(lambda: _row(rows), bookend):
        name, flags, count, size, stored = struct.unpack("<32s4I", row)
        xorbs.append(SimpleNamespace(
            hash=xet_string(name), size=size, stored=stored,
            chunks=[struct.unpack("<32s4I", _row(rows)) for _ in range(count)]))
    if next(rows, None) is not None:
        raise ValueError("a shard goes on after its end")
    return files, xorbs


def _row(rows):
    for row in rows:
        return row
    raise ValueError("a shard ends before its end")


# -- what all of its origins share -------------------------------------


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=(), **fields):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)
        self.fields = fields

    def reply(self):
        told = {"X-Error-Message": str(self).replace("\n", " ")}
        if self.code:
            told["X-Error-Code"] = self.code
        return _json({"error": str(self), **self.fields}, self.status,
                     {**told, **self.headers})


def _json(doc, status=200, headers=()):
    return S3Reply(status, {"Content-Type": "application/json; charset=utf-8",
                            **dict(headers)}, json.dumps(doc).encode())


def _ms(when):
    return _iso(when, ".%03dZ" % (when % 1 * 1000))


def _name_trouble(path):
    """What is wrong with the path of a file in a bucket, or None."""
    if not path or path[0] == "/" or path[-1] == "/" or "//" in path:
        return "a slash too many"
    if path.startswith("./") or path.endswith("..") or "../" in path:
        return "a step up or to nowhere"
    return "a backslash or NUL" if set("\\\0") & set(path) else None


class HubRequest(Request):
    """A request to the Hub, the CAS below its /cas, or the origin of bytes: the same
    port, under another name."""

    def __init__(self, *args):
        super().__init__(*args)
        self.parts = [unquote(part) for part in self.path.split("/")[1:]]
        if self.headers.get("host", "").startswith("localhost"):
            self.origin = "bytes"
        elif self.parts[0] == "cas" or self.parts[-1] == "telemetry":
            self.origin = "cas"
        else:
            self.origin = "hub"
        self.listing = "tree" in self.parts[4:5]
        named = self.body if self.parts[-1] in ("batch", "paths-info") else b""
        self.subject = "/%s\n%s" % ("/".join(self.parts), named.decode("latin-1"))
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        self.bearer = token.strip() if scheme.lower() == "bearer" else None


class HubStore(S3Store):
    """The files of every bucket, what hashes stand for, and who changed what when."""

    def __init__(self):
        super().__init__()
        self.contents, self.changes, self.updated = {XET_EMPTY: b""}, [], {}
        self.news = threading.Condition(self.lock)

    def _set(self, where, obj):
        old = self.objects.get(where)
        super()._set(where, obj)
        if obj:
            self.contents[obj.etag.strip('"')] = obj.body
        if obj or old:
            self.note(where[0], where[1], old, obj)

    def note(self, bucket, path, old, obj):
        now = time.time()
        self.updated[bucket] = now
        op = "delete" if not obj else "update" if old else "add"
        change = {"path": path, "op": op}
        if obj:
            change.update(size=len(obj.body), xetHash=obj.etag.strip('"'),
                          uploadedAt=_ms(obj.modified))
        self.changes.append((bucket, now, change))
        self.news.notify_all()


    def after(self, bucket, at):
        """The changes of a bucket from number `at` on."""
        return [change for name, _, change in self.changes[at:] if name == bucket]

    def place(self, bucket, cursor=None, since=None):
        """The number of the first change that somebody wants who resumes there."""
        if cursor is not None:
            at = int(cursor[1:])
            if cursor != "c%d" % at or at > len(self.changes):
                raise ValueError("no such cursor")
            return at
        if since is None:
            return len(self.changes)
        when = calendar.timegm(time.strptime(since[:19], "%Y-%m-%dT%H:%M:%S"))
        when += float("0" + since[19:-1])
        return next((at for at, (_, then, _) in enumerate(self.changes)
                     if then >= when), len(self.changes))

    def forgotten(self, bucket, at, replay):
        """Whether a change from `at` on is older than can be replayed."""
        oldest = time.time() - replay
        return any(name == bucket and when < oldest
                   for name, when, _ in self.changes[at:])


class Limits:
    """What is left to an account in the window, for each class of URL."""

    def __init__(self, quota, window):
        self.quota = dict.fromkeys(("api", "resolvers", "pages"), 100000)
        self.quota.update(quota)
        self.window, self.used, self.lock = window, {}, threading.Lock()

    def charge(self, account, path):
        """Whether one more request may pass, and the headers that tell of it."""
        kind = "resolvers" if "/resolve/" in path else "pages"
        kind = "api" if path.startswith("/api/") else kind
        now, most = time.monotonic(), self.quota[kind]
        with self.lock:
            begun, used = self.used.get((account, kind), (now, 0))
            if now >= begun + self.window:
                begun, used = now, 0
            self.used[account, kind] = begun, used + 1
        rest = math.ceil(begun + self.window - now)
        return used < most, {
            "RateLimit": '"%s";r=%d;t=%d' % (kind, max(0, most - used - 1), rest),
            "RateLimit-Policy": '"fixed window";"%s";q=%d;w=%d' % (
                kind, most, math.ceil(self.window))}


# -- the Hub -----------------------------------------------------------


class HubRights:
    """Who may do what, and which method answers."""

    def __init__(self, hub):
        self.hub, self.store = hub, hub.store

    def act(self, req):
        allowed, told = self.hub.limits.charge(req.bearer, req.path)
        try:
            if not allowed:
                raise HubError(429, "We had to rate limit you")
            reply = self.route(req)
        except HubError as error:
            reply = error.reply()
        return reply._replace(headers={**told, **reply.headers})

    def route(self, req):
        """The answer of the method named after the verb and the last fixed word."""
        parts = req.parts
        if parts[:2] == ["api", "buckets"] and len(parts) > 2:
            space = self.user(req) if parts[2] == "me" else parts[2]
            name, rest = "/".join([space] + parts[3:4]), parts[5:]
            word = parts[4].replace("-", "_") if parts[4:] else "bucket"
            word = word if parts[3:] else "buckets"
        elif parts[0] == "buckets" and parts[3:4] == ["resolve"]:
            name, word, rest = "/".join(parts[1:3]), "resolve", parts[4:]
        else:
            name, word, rest = "", "_".join(parts[1:]).replace("-", "_"), ()
        act = getattr(self, "%s_%s" % (req.method.lower(), word), None)
        if not act:
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        return act(req, name, "/".join(rest))

    def user(self, req):
        """The name behind the token; None for a request without one."""
        if req.bearer is None:
            return None
        if req.bearer not in self.hub.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[req.bearer][0]

    def member(self, req, space):
        user = self.user(req)
        return bool(user) and space in (user, *self.hub.orgs.get(user, ()))

    def bucket(self, req, name, write=False):
        """The bucket, if the request may have it."""
        found, member = self.hub.buckets.get(name), self.member(req, name.split("/")[0])
        if not found or found.private and not member:
            raise HubError(404 if req.bearer else 401, "Repository not found",
                           "RepoNotFound")
        if write:
            self.may_write(req, name)
        return found

    def may_write(self, req, name):
        if self.user(req) is None:
            raise HubError(401, "Invalid username or password.")
        if (not self.member(req, name.split("/")[0])
                or self.hub.accounts[req.bearer][1] != "write"):
            raise HubError(403, "Forbidden: you don't have the required permissions to"
                           " perform this action on %s" % name)


class HubFiles(HubRights):
    """What is in a bucket: trees, bytes, batches (hf-buckets.md 2.1, 2.2, 3)."""

    def get_tree(self, req, name, prefix):
        bucket = self.bucket(req, name)
        if req.path.endswith("/"):
            return S3Reply(307, {"Location": req.path.rstrip("/")})
        rows = self.rows(self.store.view(bucket.id, req.depth,
                                         req.lag or self.hub.list_lag), prefix,
                         req.query.get("recursive", "true") != "false")
        after = base64.urlsafe_b64decode(req.query.get("cursor", "")).decode()
        rows = [row for row in rows if row["path"] > after]
        most = min(int(req.query.get("limit", self.hub.page)), self.hub.page)
        if not 0 < most <= 5000:
            raise HubError(400, "limit must be from 1 to 5000")
        return _json(rows[:most], headers=self.following(req, rows, most))

    def following(self, req, rows, most):
        if len(rows) <= most:
            return {}
        cursor = base64.urlsafe_b64encode(rows[most - 1]["path"].encode()).decode()
        query = urlencode({**req.query, "cursor": cursor})
        return {"Link": '<%s%s?%s>; rel="next"' % (self.hub.url, req.path, query)}

    def rows(self, view, prefix, recursive):
        """The entries below a directory, by path."""
        base, found = prefix + "/" if prefix else "", {}
        for path, obj in sorted(view.items()):
            if not path.startswith(base):
                continue
            cut = path.find("/", len(base))
            if recursive or cut < 0:
                found[path] = self.entry(path, obj)
                continue
            newest = max(_ms(obj.modified), found.get(path[:cut], {}).get(
                "uploadedAt", ""))
            found[path[:cut]] = {"type": "directory", "path": path[:cut],
                                 "uploadedAt": newest}
        return [found[path] for path in sorted(found)]

    def entry(self, path, obj):
        row = {"type": "file", "path": path, "size": len(obj.body),
               "xetHash": obj.etag.strip('"'), "uploadedAt": _ms(obj.modified)}
        if getattr(obj, "mtime", None) is not None:
            row["mtime"] = _ms(obj.mtime / 1000)
        if "content-type" in obj.headers:
            row["contentType"] = obj.headers["content-type"]
        return row

    def post_paths_info(self, req, name, rest):
        bucket, form = self.bucket(req, name), req.headers.get("content-type", "")
        if form.startswith("application/json"):
            paths = json.loads(req.body)["paths"]
        else:
            pairs = parse_qsl(req.body.decode(), keep_blank_values=True)
            paths = [value for key, value in pairs if key == "paths"]
        if not isinstance(paths, list) or len(paths) > 2000:
            raise HubError(400, "paths must be a list of at most 2000")
        view = self.store.view(bucket.id, req.depth, req.lag or self.hub.read_lag)
        return _json([row for path in paths for row in self.named(view, path)])

    def named(self, view, path):
        if path in view:
            return [self.entry(path, view[path])]
        inside = [obj.modified for name, obj in view.items()
                  if name.startswith(path + "/")]
        return [{"type": "directory", "path": path, "uploadedAt": _ms(max(inside))}
                ] if inside else []

    def get_resolve(self, req, name, path):
        bucket = self.bucket(req, name)
        obj = self.store.read((bucket.id, path), req.lag or self.hub.read_lag)
        if not obj:
            raise HubError(404, "Entry not found", "EntryNotFound")
        told, tag = self.metadata(name, path, obj), obj.etag.strip('"')
        if req.headers.get("accept") == "application/vnd.xet-fileinfo+json":
            return _json({"hash": tag, "size": len(obj.body)}, headers=told)
        if len(obj.body) <= self.hub.direct:
            return _ranged(req, obj.body, told)
        where = self.hub.signed("/files/" + tag)
        return S3Reply(302, {**told, "Location": where, "Content-Type": "text/plain"},
                       b"Found. Redirecting to " + where.encode())

    head_resolve = get_resolve

    def metadata(self, name, path, obj):
        api = "%s/api/buckets/%s/xet-read-token" % (self.hub.url, name)
        info = "%s/cas/v1/reconstructions/%s" % (self.hub.url, obj.etag.strip('"'))
        return {"X-Xet-Hash": obj.etag.strip('"'), "X-Linked-Size": len(obj.body),
                "X-Linked-Etag": obj.etag, "ETag": obj.etag, "Accept-Ranges": "bytes",
                "Content-Type": obj.headers.get("content-type",
                                                "application/octet-stream"),
                "Link": '<%s>; rel="xet-auth", <%s>; rel="xet-reconstruction-info"' % (
                    api, info)}

    def post_batch(self, req, name, rest):
        bucket = self.bucket(req, name, write=True)
        if req.headers.get("content-type") != "application/x-ndjson":
            raise HubError(400, "expecting application/x-ndjson")
        try:
            acts = [json.loads(line) for line in req.body.splitlines() if line.strip()]
        except ValueError:
            raise HubError(400, "not JSON, one object per line") from None
        if not 0 < len(acts) <= 1000:
            raise HubError(400, "from 1 to 1000 operations")
        failed = []
        with self.store.lock:
            for act in acts:
                trouble = self.trouble(req, act)
                if trouble:
                    failed.append({"path": act.get("path"), "error": trouble})
                else:
                    self.apply(bucket, act)
        done = len(acts) - len(failed)
        return _json({"success": not failed, "processed": len(acts), "succeeded": done,
                      "failed": failed}, 200 if done else 422)

    def trouble(self, req, act):
        """Why one operation of a batch is not carried out, or None."""
        path, kind, wanted = act.get("path"), act.get("type"), req.options.get("paths")
        if not isinstance(path, str) or _name_trouble(path):
            return "Invalid path: %s" % _name_trouble(path or "")
        if req.fault == "invalid" or req.fault == "failed" and (
                not wanted or any(part in path for part in wanted)):
            return "Internal error, please try again"
        if kind == "deleteFile":
            return None
        if kind not in ("addFile", "copyFile"):
            return "no such operation"
        if act.get("xetHash") not in self.store.contents:
            return "unknown xetHash"
        if type(act.get("mtime", 0)) is not int or act.get("size") not in (
                None, len(self.store.contents[act["xetHash"]])):
            return "mtime or size is wrong"
        if kind == "copyFile" and act.get("sourceRepoType") != "bucket":
            return "unknown source"
        if kind == "copyFile":
            self.bucket(req, act.get("sourceRepoId", ""))
        return None

    def apply(self, bucket, act):
        if act["type"] == "deleteFile":
            self.store.write((bucket.id, act["path"]), None)
            return
        kind = act.get("contentType")
        self.store.write((bucket.id, act["path"]), SimpleNamespace(
            body=self.store.contents[act["xetHash"]], etag='"%s"' % act["xetHash"],
            modified=time.time(), mtime=act.get("mtime"),
            headers={"content-type": kind} if kind else {}))


class HubApi(HubFiles):
    """Accounts, buckets, Xet tokens and the feed of changes (hf-buckets.md 2, 4)."""

    def get_whoami_v2(self, req, name, rest):
        user = self.user(req)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return _json({"type": "user", "name": user, "fullname": user.title(),
                      "orgs": [{"type": "org", "name": org, "roleInOrg": "write"}
                               for org in self.hub.orgs.get(user, ())],
                      "auth": {"type": "access_token", "accessToken": {
                          "displayName": "test", "role": self.hub.accounts[
                              req.bearer][1]}}})

    def post_bucket(self, req, name, rest):
        self.may_write(req, name)
        wanted = json.loads(req.body or b"{}")
        url = "%s/buckets/%s" % (self.hub.url, name)
        if wanted.get("visibility") not in (None, "public", "private"):
            raise HubError(400, "no such visibility")
        with self.store.lock:
            if name in self.hub.buckets:
                raise HubError(409, "You already created this bucket repo", url=url)
            self.hub.bucket(name, wanted.get("visibility") == "private")
        return _json({"url": url, "id": name})

    def told(self, bucket):
        files = self.store.view(bucket.id).values()
        return {"id": bucket.id, "private": bucket.private, "size": sum(
            len(obj.body) for obj in files), "totalFiles": len(files),
                "createdAt": _ms(bucket.created),
                "updatedAt": _ms(self.store.updated[bucket.id])}

    def get_bucket(self, req, name, rest):
        return _json(self.told(self.bucket(req, name)))

    def get_buckets(self, req, space, rest):
        sought = req.query.get("search", "")
        return _json([self.told(bucket) for bucket in list(self.hub.buckets.values())
                      if bucket.id.startswith(space + "/") and sought in bucket.id
                      and (not bucket.private or self.member(req, space))])

    def delete_bucket(self, req, name, rest):
        self.bucket(req, name, write=True)
        for path in self.store.view(name):
            self.store.write((name, path), None)
        self.hub.buckets.pop(name, None)
        return S3Reply(200)

    def put_settings(self, req, name, rest):
        self.bucket(req, name, write=True).private = json.loads(req.body)["private"]
        return S3Reply(200)

    def post_repos_move(self, req, _, rest):
        wanted = json.loads(req.body)
        old, new = wanted["fromRepo"], wanted["toRepo"]
        self.bucket(req, old, write=True)
        self.may_write(req, new)
        if wanted["type"] != "bucket" or new in self.hub.buckets:
            raise HubError(409, "cannot move there")
        self.hub.bucket(new, self.hub.buckets.pop(old).private)
        for path, obj in self.store.view(old).items():
            self.store.write((new, path), obj)
            self.store.write((old, path), None)
        return S3Reply(200)

    def get_xet_write_token(self, req, name, rest):
        self.bucket(req, name, write=True)
        return self.xet_token(name, "write")

    def get_xet_read_token(self, req, name, rest):
        self.bucket(req, name)
        return self.xet_token(name, "read")

    def xet_token(self, name, scope):
        token, ends = self.hub.issue(name, scope)
        where = self.hub.url + "/cas"
        return _json({"accessToken": token, "exp": int(ends), "casUrl": where},
                     headers={"X-Xet-Access-Token": token, "X-Xet-Cas-Url": where,
                              "X-Xet-Token-Expiration": int(ends)})

    def get_events(self, req, name, rest):
        """The feed of changes (hf-buckets.md 4)."""
        bucket, how = self.bucket(req, name), self.hub.events
        if how == "off":
            raise HubError(501, "Live follow is not enabled")
        if "text/event-stream" not in req.headers.get("accept", ""):
            raise HubError(400, "Accept must be text/event-stream")
        try:
            at = self.store.place(bucket.id, **req.query)
        except (TypeError, ValueError, IndexError):
            raise HubError(400, "no such cursor or time") from None
        feed = self.broken_feed() if how == "broken" else self.feed(bucket.id, at)
        return S3Reply(200, {"Content-Type": "text/event-stream"}, feed)

    def broken_feed(self):
        yield b'event: ready\ndata: {"cursor": 7\n\nevent: changes\ndata: [[]]\n\n'
        yield b"data\n\xff\xfe: <html>\n\nevent: changes\ndata: {"

    def feed(self, bucket, at):
        """Events from change number `at` on, until the server stops or recycles it."""
        hub, store, ready, turn = self.hub, self.store, False, self.hub.turn
        spoke, ends = time.monotonic(), time.monotonic() + hub.recycle
        if store.forgotten(bucket, at, hub.replay):
            yield _event("reset", reason="cursor_too_old")
            return
        while hub.listener and hub.turn == turn and time.monotonic() < ends:
            with store.news:
                seen, fresh = len(store.changes), store.after(bucket, at)
                if ready and (not fresh or hub.events == "silent"):
                    store.news.wait(min(hub.ping / 4, ends - time.monotonic()))
                    seen, fresh = at, ()
            at = seen
            said = [_event("changes", cursor="c%d" % at, changes=fresh)] * bool(fresh)
            if not ready:
                known = {"cursor": "c%d" % at} if store.after(bucket, 0) else {}
                said, ready = said + [_event("ready", **known)], True
            if not said and time.monotonic() > spoke + hub.ping and (
                    hub.events != "silent"):
                said = [b": ping\n\n"]
            if said:
                yield b"".join(said)
                spoke = time.monotonic()
        yield _event("reconnect", cursor="c%d" % at)


def _event(name, **data):
    return ("event: %s\ndata: %s\n\n" % (name, json.dumps(data))).encode()


def _ranged(req, body, headers):
    """A whole body or the part that a Range asks for."""
    try:
        span = _byte_range(req.headers.get("range"), len(body))
    except S3Error as error:
        return S3Reply(416, error.headers)
    if not span:
        return S3Reply(200, headers, body)
    where = "bytes %d-%d/%d" % (span[0], span[1] - 1, len(body))
    return S3Reply(206, {**headers, "Content-Range": where}, body[slice(*span)])


# -- the CAS and the origin of bytes -----------------------------------


class CasApi:
    """Xorbs and shards, every hash of them derived anew (xet-upload.md 4-7)."""

    def __init__(self, hub):
        self.hub, self.store = hub, hub.store
        self.xorbs, self.files, self.grants = {}, {XET_EMPTY: []}, {}

    def act(self, req):
        if req.parts[-1] == "telemetry":
            return S3Reply(200)
        _, version, what, *rest = req.parts
        name = "%s_%s" % (req.method.lower(), what.replace("-", "_"))
        act = getattr(self, name, None)
        if not act:
            raise HubError(404, "no such route")
        self.check_rights(req, write=req.method in ("POST", "PUT"))
        try:
            return act(req, version, rest)
        except (ValueError, struct.error) as error:
            raise HubError(400, str(error)) from None

    def check_rights(self, req, write):
        bucket, scope, ends = self.hub.xet_tokens.get(req.bearer, ("", "", 0))
        if ends <= self.hub.now() or req.fault == "expired":
            raise HubError(401, "Unauthorized")
        if write and scope != "write" or req.fault == "scope":
            raise HubError(403, "Forbidden: the token is for reading")

    # xorbs

    def post_xorbs(self, req, version, rest):
        prefix, name = rest
        xorb = Xorb.read(req.body)
        if xorb.hash != name or prefix != "default":
            raise ValueError("that xorb is %s, not %s" % (xorb.hash, name))
        return _json({"was_inserted": self.keep(xorb)})

    def keep(self, xorb):
        with self.store.lock:
            return self.xorbs.setdefault(xorb.hash, xorb) is xorb

    def head_xorbs(self, req, version, rest):
        return S3Reply(200 if rest[1] in self.xorbs else 404)

    def get_chunks(self, req, version, rest):
        return S3Reply(404)  # what anybody else has stored is not told

    def post_xorb_grants(self, req, version, rest):
        """Leave to send a xorb to the origin of bytes."""
        if not self.hub.grants:
            return S3Reply(404)
        if rest[1] in self.xorbs:
            return S3Reply(200)
        wanted, name = json.loads(req.body), uuid.uuid4().hex
        if wanted["checksum"]["algo"] != "crc64nvme":
            raise ValueError("no such checksum")
        headers = {"X-Checksum": wanted["checksum"]["value"], "Content-Type": "x/xorb"}
        self.grants[name] = SimpleNamespace(size=wanted["length"], headers=headers,
                                            body=None)
        return _json({"id": name, "url": self.hub.signed("/grants/" + name),
                      "method": "PUT", "headers": headers}, 201)

    def take(self, req, name):
        """The body that was granted."""
        grant = self.grants[name]
        sent = {key: req.headers.get(key.lower()) for key in grant.headers}
        if sent != grant.headers or len(req.body) != grant.size or str(
                crc64nvme(req.body)) != sent["X-Checksum"]:
            raise HubError(400, "not what was granted")
        grant.body = req.body
        return S3Reply(200)

    def post_xorb_commits(self, req, version, rest):
        _, name, _, grant = rest
        if not getattr(self.grants.get(grant), "body", None):
            return S3Reply(404)
        req.body = self.grants.pop(grant).body
        return self.post_xorbs(req, version, ["default", name])

    # shards

    def post_shards(self, req, version, rest):
        if version == "v2" and not self.hub.shards_v2:
            return S3Reply(404)
        files, xorbs = read_shard(req.body)
        for told in xorbs:
            self.check_xorb(told)
        fresh = [file for file in files if self.keep_file(file)]
        if version == "v1":
            return _json({"result": int(bool(fresh))})
        frames = [{"type": "validating", "verified": len(files), "total": len(files)},
                  {"type": "committing", "stage": "uploading"}, {"type": "result"}]
        return S3Reply(200, {"Content-Type": "application/x-ndjson"}, b"".join(
            json.dumps(frame).encode() + b"\n" for frame in frames))

    def stored(self, name):
        if name not in self.xorbs:
            raise ValueError("xorb %s was not sent before its shard" % name)
        return self.xorbs[name]

    def check_xorb(self, told):
        xorb = self.stored(told.hash)
        sizes = [size for _, size in xorb.entries]
        starts = [0, *itertools.accumulate(sizes)]
        wanted = [(raw, start, size, 0, 0)
                  for (raw, size), start in zip(xorb.entries, starts)]
        if told.chunks != wanted or told.size != sum(sizes) or told.stored not in (
                0, len(xorb.body)):
            raise ValueError("xorb %s is not as the shard says" % told.hash)

    def keep_file(self, file):
        """Whether the file was unknown, its hashes having proved right."""
        pieces = []
        for (raw, _, size, first, end), check in zip(file.terms, file.checks):
            xorb = self.stored(xet_string(raw))
            part = xorb.entries[first:end]
            if not 0 <= first < end <= len(xorb.entries) or size != sum(
                    size for _, size in part):
                raise ValueError("a term that is not in its xorb")
            if check != blake3_keyed(XET_KEYS["range"], b"".join(
                    raw for raw, _ in part)):
                raise ValueError("a term with another range hash")
            pieces += [(xorb, at) for at in range(first, end)]
        if xet_of_chunks([xorb.entries[at] for xorb, at in pieces]) != file.hash:
            raise ValueError("that file is not %s" % file.hash)
        return self.keep_pieces(file, pieces)

    def keep_pieces(self, file, pieces):
        body = b"".join(xorb.chunks[at] for xorb, at in pieces)
        # Read as a hash string, so every eight bytes are turned round.
        words = struct.unpack(">4Q", hashlib.sha256(body).digest())
        digest = struct.pack("<4Q", *words)
        if file.sha256 not in (None, digest):
            raise ValueError("that file has another SHA-256")
        if xet_cuts(body) != [len(xorb.chunks[at]) for xorb, at in pieces]:
            self.hub.violations.append("%s is not cut as it should be" % file.hash)
        with self.store.lock:
            self.store.contents[file.hash] = body
            return self.files.setdefault(file.hash, pieces) is pieces

    # reading

    def pieces(self, name):
        """The chunks of a file, as (xorb, number); of one put at the gateway too."""
        if name not in self.store.contents:
            raise HubError(404, "no such file")
        with self.store.lock:
            if name not in self.files:
                xorb = Xorb(xet_split(self.store.contents[name]))
                self.keep(xorb)
                self.files[name] = [(xorb, at) for at in range(len(xorb.chunks))]
        return self.files[name]

    def head_files(self, req, version, rest):
        return S3Reply(200 if rest[0] in self.store.contents else 404)

    def get_reconstructions(self, req, version, rest):
        if version == "v2" and not self.hub.reconstructions_v2:
            return S3Reply(404)
        pieces = self.pieces(rest[0])
        try:
            span = _byte_range(req.headers.get("range"), len(
                self.store.contents[rest[0]]))
        except S3Error:
            return S3Reply(416)
        skipped, runs = _runs(pieces, *(span or (0, 1 << 62)))
        told = {"offset_into_first_range": skipped, "terms": [
            {"hash": xorb.hash, "unpacked_length": sum(map(len, xorb.chunks[a:b])),
             "range": {"start": a, "end": b}} for xorb, a, b in runs]}
        where = collections.defaultdict(list)
        for xorb, a, b in runs:
            where[xorb.hash].append(self.place(version, xorb, a, b))
        return _json({**told, "fetch_info" if version == "v1" else "xorbs": where})

    def place(self, version, xorb, a, b):
        url = self.hub.signed("/xorbs/" + xorb.hash)
        chunks = {"start": a, "end": b}
        span = {"start": xorb.ends[a], "end": xorb.ends[b] - 1}
        if version == "v1":
            return {"range": chunks, "url": url, "url_range": span}
        return {"url": url, "ranges": [{"chunks": chunks, "bytes": span}]}


def _runs(pieces, start, stop):
    """Where the bytes from start to stop are: how many to skip in the first chunk, and
    runs of chunks as [xorb, first, end]."""
    runs, at, skipped = [], 0, 0
    for xorb, nth in pieces:
        size = len(xorb.chunks[nth])
        if at + size > start and at < stop:
            skipped = skipped if runs else start - at
            if runs and runs[-1][0] is xorb and runs[-1][2] == nth:
                runs[-1][2] += 1
            else:
                runs.append([xorb, nth, nth + 1])
        at += size
    return skipped, runs


class BytesApi:
    """Files and xorbs by signed URL; a stranger to every credential."""

    def __init__(self, hub):
        self.hub = hub

    def act(self, req):
        kind, name = (req.parts + [""])[:2]
        if req.query.get("sig") != self.hub.signature(req.path):
            raise HubError(403, "that URL was not signed by us")
        if (kind, req.method) == ("grants", "PUT"):
            return self.hub.cas.take(req, name)
        if req.method not in ("GET", "HEAD"):
            raise HubError(405, "only for reading")
        if kind == "files":
            body = self.hub.store.contents[name]
        else:
            body = self.hub.cas.xorbs[name].body
        return _ranged(req, body, {"ETag": '"%s"' % name, "Accept-Ranges": "bytes",
                                   "Content-Type": "application/octet-stream"})


# -- the gateway -------------------------------------------------------


class GatewayRequest(S3Request):
    """A request to /{namespace}/{bucket}/{key}; the bucket is the first two."""
    origin = "gateway"

    def locate(self, buckets):
        parts = unquote(self.path[1:], errors="strict").split("/", 2)
        return "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""


class HubGateway(S3Server):
    """The S3 gateway (hf-buckets.md 8), on the store of the Hub."""

    def __init__(self, hub, **options):
        super().__init__(access_key=hub.keys[0], secret_key=hub.keys[1],
                         conditional_get=False, **options)
        self.hub, self.store, self.objects = hub, hub.store, hub.store.objects
        self.lock, self.buckets = hub.store.lock, hub.buckets
        self.log, self.faults = hub.log, hub.faults

    def request(self, *parts):
        req = GatewayRequest(*parts, buckets=self.buckets)
        req.lag = self.hub.list_lag if req.listing else self.hub.read_lag
        self.hub.watch(req)
        return req

    def route(self, req):
        if "aws-chunked" in req.headers.get("content-encoding", "") or req.headers.get(
                "x-amz-content-sha256") in STREAMING:
            raise S3Error("NotImplemented", "aws-chunked is not parsed here")
        if req.bucket.split("/")[0] not in self.hub.spaces():
            raise S3Error("AccessDenied")
        if req.key and req.method in ("PUT", "POST") and _name_trouble(req.key):
            raise S3Error("InvalidArgument", _name_trouble(req.key))
        if req.query.get("delimiter", "/") != "/":
            raise S3Error("InvalidArgument", "only / is a delimiter here")
        return super().route(req)

    def write(self, req, body, headers, etag=None):
        return super().write(req, body, headers, xet_of(body))

    def kept_headers(self, req):
        return {"content-type": req.headers.get("content-type",
                                                "application/octet-stream")}

    def copy(self, req):
        """Only within a namespace, from a source that is not percent-encoded; what the
        request says of the target is ignored."""
        space, source = req.bucket.split("/")[0], req.headers["x-amz-copy-source"]
        place = source.lstrip("/")
        if "%s/%s" % (space, place.partition("/")[0]) in self.buckets:
            place = "%s/%s" % (space, place)
        if not place.startswith(space + "/"):
            raise S3Error("NotImplemented", "only within one namespace")
        _, name, key = (place.split("/", 2) + ["", ""])[:3]
        old = self.find("%s/%s" % (space, name), key)
        if not _etag_listed(req.headers.get("x-amz-copy-source-if-match", "*"),
                            old.etag):
            raise S3Error("PreconditionFailed")
        req.ignore = True
        new = self.write(req, old.body, old.headers)
        return _xml_reply("CopyObjectResult", _tags(
            ETag=new.etag, LastModified=_iso(new.modified)))

    def get_key(self, req):
        reply = super().get_key(req)
        agent = req.headers.get("user-agent", "").lower()
        if req.method == "HEAD" or any(name in agent for name in (
                "aws-cli", "botocore", "aws-sdk-rust")):
            return reply
        etag = reply.headers["ETag"]
        told = {"ETag": etag} if self.hub.redirect_etag else {}
        return S3Reply(302, {**told, "Location": self.hub.signed(
            "/files/" + etag.strip('"'))})

    head_key = get_key

    def put_bucket(self, req):
        with self.lock:
            if req.bucket in self.buckets:
                raise S3Error("BucketAlreadyOwnedByYou")
            self.hub.bucket(req.bucket, False)
        return S3Reply(200, {"Location": "/" + req.bucket})


# -- all of it ---------------------------------------------------------


class HubServer(Loopback):
    """Hub, CAS, bytes and gateway over one store; at its end no secret may have been
    where it does not belong.

    direct: files up to that size come from resolve itself, without a redirect. page:
    entries of a page of a tree at most. quota, window: requests by class of URL and
    the seconds they are for. read_lag, list_lag: seconds that reading and listing are
    behind, at the gateway too. token_life: seconds of a Xet token. events: on, off,
    silent (nothing after `ready`) or broken. ping, replay, recycle: seconds between
    pings, of changes to replay, of a stream. The others: which routes there are, and
    whether a redirect of the gateway tells the ETag. All may be changed at any time.
    """
    kinds = FAULTS | {"stale_list", "expired", "scope", "failed", "invalid"}

    def __init__(self, port=0, user="alice", orgs=("team",), direct=-1, page=1000,
                 quota=(), window=300, read_lag=0, list_lag=0, latency=0, skew=0,
                 token_life=900, shards_v2=False, reconstructions_v2=True, grants=False,
                 redirect_etag=True, events="on", ping=30, replay=900, recycle=1200):
        vars(self).update((k, v) for k, v in locals().items() if k != "self")
        super().__init__(port)
        self.token, self.read_token, self.foreign_token = (
            "hf_" + uuid.uuid4().hex for _ in range(3))
        self.accounts = {self.token: (user, "write"), self.read_token: (user, "read"),
                         self.foreign_token: ("mallory", "write")}
        self.orgs = {user: orgs}
        self.keys = "HFAK" + uuid.uuid4().hex[:16].upper(), uuid.uuid4().hex
        self.buckets, self.xet_tokens, self.violations, self.turn = {}, {}, [], 0
        self.store, self.limits = HubStore(), Limits(dict(quota), window)
        self.lock, self.secret = self.store.lock, uuid.uuid4().bytes
        self.cas, self.gate = CasApi(self), HubGateway(self, latency=latency, skew=skew)
        self.origins = {"hub": HubApi(self), "cas": self.cas, "bytes": BytesApi(self)}

    def now(self):
        return time.time() + self.skew

    @property
    def gateway(self):
        return self.gate.url

    def start(self):
        self.gate.start()
        return super().start()

    def stop(self):
        super().stop()
        self.gate.stop()
        with self.lock:
            self.store.news.notify_all()

    def __exit__(self, kind, *exc):
        self.stop()
        assert kind or not self.violations, self.violations

    # requests

    def concerns(self, fault, req):
        if fault.kind in ("failed", "invalid") and req.parts[-1] != "batch":
            return False
        if fault.kind in ("expired", "scope") and req.origin != "cas":
            return False
        return super().concerns(fault, req)

    def request(self, *parts):
        req = HubRequest(*parts)
        self.watch(req)
        return req

    def act(self, req):
        try:
            reply = self.origins[req.origin].act(req)
        except HubError as error:
            reply = error.reply()
        except (ValueError, KeyError, TypeError) as error:
            reply = HubError(400, repr(error)).reply()
        req.landed = req.method not in ("GET", "HEAD") and reply.status < 300
        return reply

    def refuse(self, status, req, headers=()):
        """An answer that a fault gives; the Hub itself tells of limits its own way."""
        headers = dict(headers)
        if status == 429 and req.origin == "hub":
            headers = {"RateLimit": '"api";r=0;t=%d' % headers.get("Retry-After", 1)}
        return HubError(status, responses.get(status, "?"), headers=headers).reply()

    def watch(self, req):
        """Note what a request has with it that is not for where it goes."""
        sent = [req.path, *req.query.values(), *req.headers.values()]
        for token in (*self.accounts, *self.xet_tokens, self.keys[1]):
            home = "cas" if token in self.xet_tokens else "hub"
            if any(token in value for value in sent) and (
                    req.origin != home or token not in req.headers.get(
                        "authorization", "")):
                self.violations.append("a %s secret in %s %s of the %s origin" % (
                    home, req.method, req.path, req.origin))
        bare = [name for name in req.headers if name.startswith("x-amz-")
                or name in ("authorization", "cookie")]
        if req.origin == "bytes" and bare:
            self.violations.append("%s at the origin of bytes: %s" % (bare, req.path))

    def issue(self, bucket, scope):
        """A new Xet token and when it ends."""
        token, ends = "xet_" + uuid.uuid4().hex, self.now() + self.token_life
        self.xet_tokens[token] = bucket, scope, ends
        return token, ends

    def expire_tokens(self):
        """Let every Xet token issued so far be refused from now on."""
        for token, (bucket, scope, _) in list(self.xet_tokens.items()):
            self.xet_tokens[token] = bucket, scope, 0

    def reconnect(self):
        """End every stream of events as the server does, with `reconnect`."""
        with self.lock:
            self.turn += 1
            self.store.news.notify_all()

    def signature(self, path):
        return hmac.digest(self.secret, path.encode(), "sha256").hex()

    def signed(self, path):
        """The URL of bytes, on their own origin."""
        return "http://localhost:%d%s?sig=%s" % (self.port, path, self.signature(path))

    # what tests ask

    def spaces(self):
        """The namespaces of the user."""
        return {self.user, *self.orgs[self.user]}

    def bucket(self, name, private=True):
        """A new bucket."""
        made = SimpleNamespace(id=name, private=private, created=time.time())
        self.store.updated[name] = made.created
        self.buckets[name] = made
        return made

    def files(self, name):
        """{path: bytes} of a bucket."""
        return {path: obj.body for path, obj in self.store.view(name).items()}

    def count(self, method=None, path_contains=None, origin=None):
        return sum(method in (None, req.method) and origin in (None, req.origin)
                   and (path_contains or "") in unquote(req.path)
                   for req in list(self.log))

    def env(self, native=True, gateway=True):
        env = {"HF_ENDPOINT": self.url, "HF_S3_ENDPOINT": self.gateway}
        if native:
            env["HF_TOKEN"] = self.token
        if gateway:
            env.update(HF_S3_ACCESS_KEY_ID=self.keys[0],
                       HF_S3_SECRET_ACCESS_KEY=self.keys[1])
        return env


# == 3. Records ========================================================
#
# Tables of protocol.md 4 and 5, the protocol as a state space, and checkers of
# histories that other tests use.


# -- text --------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "S1.A", "x_y-z", "...", "9", "a" * 200])
def test_a_name_of_the_allowed_characters_is_taken_as_it_is(name):
    assert t.check_name("agent", name) == name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "_x", "a/b", "a b", "ü", "a\n",
                                  "a\0", "a\\b", "a" * 201, "٣"])
def test_a_name_that_cannot_be_part_of_a_key_is_refused_with_the_rule(name):
    with pytest.raises(t.Usage) as why:
        t.check_name("agent", name)
    assert why.value.hint and "\n" not in why.value.message


def test_step_ids_are_spelled_as_0_2_spells_them():
    assert t.step_id("S1.A") == t.step_id("s1-a") == "s1-a"


@pytest.mark.parametrize("key, path", [("a", "a"), ("a.b.c", "a/b/c"), ("a/b", None),
                                       ("a..b", None), (".a", None), ("a.", None),
                                       ("a._b", None), ("", None), ("a.b c", None)])
def test_dots_separate_the_parts_of_a_memory_key(key, path):
    if path is None:
        with pytest.raises(t.Usage):
            t.memory_parts(key)
    else:
        assert t.memory_parts(key) == path


@pytest.mark.parametrize("path", [
    "a", "dir/ü.txt", "日本.md", "a b", "Bild 1\u202fPM.png", "x\u00a0y", "\U0001f469"
    "\u200d\U0001f4bb.png"])
def test_an_artifact_may_have_any_utf8_name(path):
    assert t.artifact_path(path) == path


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", ".", "a/..", "../a", "a\\b",
                                  "a\nb", "a\x7f", "\x00", "\ud800", "a/_b"])
def test_an_artifact_name_that_leaves_its_place_or_hides_is_refused(path):
    with pytest.raises(t.Usage):
        t.artifact_path(path)


def test_what_is_made_file_safe_passes_as_a_name():
    for text in ("", "...", "_x", "a b/c", "ü", "-", "ok"):
        assert t.check_name("x", t.file_safe(text))
    assert t.file_safe("a b/c") == "a-b-c"


@pytest.mark.parametrize("doc", [{}, {"a": [1, "ü", None]}, {"s": "\ud800"}, {"": 1e9}])
def test_what_is_dumped_is_read_back_equal(doc):
    data = t.dump_json(doc)
    assert data.endswith(b"}\n") and t.parse_record(data, "k") == doc


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff\xfe{", b"3",
                                  b'{"a":' * 100_000, b"{}x"])
def test_a_document_that_is_no_json_object_is_corrupt_and_names_its_key(data):
    with pytest.raises(t.Corrupt) as why:
        t.parse_record(data, "steps/s/claim.json")
    assert "steps/s/claim.json" in why.value.message


def test_a_record_beyond_the_limit_is_refused_before_it_is_parsed():
    with pytest.raises(t.Corrupt):
        t.parse_record(b" " * (t.MAX_RECORD + 1), "k")


@pytest.mark.parametrize("seconds", [0, 1.5, 1700000000.123456, 0.9999996, 4e9])
def test_a_time_survives_its_text_to_the_microsecond(seconds):
    assert abs(t.parse_iso(t.iso(seconds)) - seconds) <= 1e-6


@pytest.mark.parametrize("text, seconds", [
    ("1970-01-01T00:00:01Z", 1), ("1970-01-01T01:00:00+01:00", 0),
    ("1970-01-01T00:00:02", 2), ("yesterday", None), (None, None), (5, None),
    ("", None)])
def test_a_time_without_zone_is_utc_and_no_time_is_none(text, seconds):
    assert t.parse_iso(text) == seconds


def test_nothing_that_is_shown_can_drive_a_terminal():
    for code in [*range(32), 127, *range(128, 160), 0x202E, 0x2066, 0x200B, 0xD800]:
        assert t.shown(f"a{chr(code)}b").isprintable()
    assert t.shown("a\nb") == "a\\nb" and t.shown("a\nb", indent="| ") == "a\n| b"


@pytest.mark.parametrize("seconds, text", [
    (None, "unknown"), (0, "0s ago"), (89.9, "89s ago"), (90, "1m ago"),
    (5399, "89m ago"), (5400, "1h ago")])
def test_ages_are_worded_as_in_0_2(seconds, text):
    assert t.age_text(seconds) == text


def test_sizes_are_short():
    assert [t.size_text(n) for n in (0, 1023, 1024, 3 << 20)] == [
        "0 B", "1023 B", "1.0 KiB", "3.0 MiB"]


@pytest.mark.parametrize("leaf, parts", [
    ("x", (None, None)), ("1_a_b", (None, None)), ("1_a_b.json", (1, "a")),
    ("1_a_b_c.json", (1, "a_b")), ("x_a_b.json", (None, None)),
    ("٣_a_b.json", (None, None)), ("1_b.json", (None, None)),
    ("1_a_b.jsonl", (1, "a")), ("1_a_b.json.gz", (None, None))])
def test_a_foreign_leaf_has_no_event_parts(leaf, parts):
    assert t.event_parts(leaf) == parts


def test_event_keys_sort_by_time_and_give_their_parts_back():
    keys = [t.event_key("m/", at_ns=ns, agent="a_b", uuid8="0" * 8)
            for ns in (5, 10**9, 17 * 10**17)]
    assert keys == sorted(keys)
    assert t.event_parts(keys[1][2:]) == (10**9, "a_b")


# -- chains and lost answers -------------------------------------------


def written(*nonces, keep=t.RECENT):
    """The versions of a record written with these nonces, one after the other."""
    docs, doc = [], None
    for nonce in nonces:
        doc = t.stamped({}, doc, nonce=nonce, keep=keep)
        docs.append(doc)
    return docs


def test_a_stamped_record_names_its_predecessor_and_the_last_writes():
    first, second, third = written("a", "b", "c", keep=2)
    assert (first["rev"], first["prev"], first["recent"]) == (1, None, ["1:a"])
    assert (third["rev"], third["prev"], third["nonce"]) == (3, "b", "c")
    assert third["recent"] == ["2:b", "3:c"] and second["rev"] == 2


def test_the_successor_of_a_0_2_document_exceeds_the_revs_known_before():
    new = t.stamped({"value": "x"}, {"value": "y"}, nonce="n", above=7)
    assert (new["rev"], new["prev"], new["recent"]) == (8, None, ["8:n"])


@pytest.mark.parametrize("old", [{"rev": "9"}, {"rev": True}, {"rev": -1},
                                 {"rev": 1e99}, {"rev": None, "recent": "no"},
                                 {"recent": [1, None]}])
def test_a_malformed_predecessor_counts_as_one_without_rev(old):
    assert t.stamped({}, old, nonce="n")["rev"] == 1


SENT = written("a", "b", "me")[2]  # rev 3 over 2:b


@pytest.mark.parametrize("seen, unchanged, became", [
    (written("a", "b")[1], True, "again"),
    (None, True, "again"),
    (SENT, False, "landed"),
    (written("a", "b", "me", "c", "d")[4], False, "landed"),
    (written("a", "b", "c")[2], False, "lost"),
    (written("a", "b", "c", "d")[3], False, "lost"),
    (written("a", "b", "c", "d", keep=3)[3], False, "lost"),
    (written("a", "b", "c", "d", keep=2)[3], False, "unknown"),  # 2:b has left
    (written("a", "b", "me", "d", "e", keep=2)[4], False, "unknown"),
    (written("a", "x", "c")[2], False, "unknown"),  # another chain
    ({"value": "of 0.2"}, False, "unknown"),
    (None, False, "unknown"),
    ({"recent": "junk", "rev": 3}, False, "unknown"),
])
def test_a_lost_answer_is_settled_by_the_chain(seen, unchanged, became):
    assert t.settle(seen, SENT, unchanged=unchanged) == became


def test_a_lost_create_has_lost_when_another_is_first():
    assert t.settle(written("x")[0], written("me")[0], unchanged=False) == "lost"
    assert t.settle(written("me", "x")[1], written("me")[0],
                    unchanged=False) == "landed"


def test_my_nonce_under_another_rev_has_landed_too():
    assert t.settle(written("a", "b", "c", "me")[3], SENT, unchanged=False) == "landed"


@pytest.mark.parametrize("seen, rev, became", [
    (SENT, 3, "landed"),
    (SENT, 0, "landed"),
    (written("a", "b", "me", "c")[3], 3, "landed"),
    (written("a", "b")[1], 3, "lost"),
    (written("a", "b", "c", "d")[3], 3, "lost"),
    (written("a", "b", "me", "c", "d", keep=2)[4], 3, "unknown"),
    (None, 0, "lost"),
    (None, 1, "lost"),
    (None, 3, "unknown"),  # nobody deletes records
    ({"value": "of 0.2"}, 3, "unknown"),  # a writer without rev has passed
    ({"value": "of 0.2"}, 0, "lost"),
])
def test_a_repeated_operation_is_settled_by_its_id_and_rev(seen, rev, became):
    assert t.settle_op(seen, nonce="me", rev=rev) == became


# -- the table of protocol.md 4 ----------------------------------------

ME = t.Me("a", "i1", token=3)
TWIN = t.Me("a", "i2")  # the same agent, another instance, without a token
OTHER = t.Me("b", "i3")


def record(state="in_progress", **fields):
    """A claim of ME under token 3; fields None are absent."""
    doc = {"agent": "a", "claimed_at": "T", "instance": "i1", "state": state,
           "token": 3, "attempt": 1, "ttl": 100, "rev": 9, "nonce": "n", "strange": [1],
           **fields}
    return {name: value for name, value in doc.items() if value is not None}


RELEASED = record("released", agent=t.NOBODY, released_by="a", instance=None)
ENDED = [record(state) for state in t.ENDED]


def take(claim, me, age=0, **how):
    return t.take(claim, me, age, at="NOW", **how)


def brief(claim):
    names = ("state", "agent", "instance", "token", "attempt")
    return tuple(claim.get(name) for name in names)


@pytest.mark.parametrize("claim, me, age, how, expected", [
    (None, OTHER, None, {}, (1, 1)),
    (RELEASED, OTHER, 0, {}, (4, 2)),
    (record("complete"), OTHER, 0, {"reopen": True}, (4, 1)),
    (record("failed", attempt=3), OTHER, 0, {"reopen": True}, (4, 1)),
    (record("blocked"), ME, 0, {"reopen": True}, (4, 1)),
    (record("needs_review"), TWIN, 0, {"reopen": True}, (4, 1)),
    (record(), TWIN, 0, {"resume": True}, (4, 1)),
    (record(), OTHER, 105, {}, (4, 2)),
    (record(), TWIN, 105, {}, (4, 2)),
    (None, OTHER, None, {"missing": ()}, (1, 1)),
])
def test_a_claim_that_succeeds_has_the_next_token(claim, me, age, how, expected):
    new = take(claim, me, age, ttl=60, **how)
    assert brief(new) == ("in_progress", me.agent, me.instance, *expected)
    assert (new["ttl"], new["claimed_at"], new["renewed_at"]) == (60, "NOW", "NOW")
    assert new["history"][-1]["token"] == new["token"]


@pytest.mark.parametrize("claim, me, age, how, error", [
    (record(), OTHER, 0, {}, t.Held),
    (record(), OTHER, 104.9, {}, t.Held),
    (record(), OTHER, None, {}, t.Held),  # of unknown age
    (record(ttl=0), OTHER, 10**9, {}, t.Held),
    (record(ttl=None), OTHER, 10**9, {}, t.Held),  # 0.2 has no ttl
    (record(ttl="100"), OTHER, 10**9, {}, t.Held),
    (record(), TWIN, 0, {}, t.Held),
    (record(), OTHER, 0, {"resume": True}, t.Held),  # not its own
    (record(), OTHER, 0, {"reopen": True}, t.Held),
    (record("complete"), OTHER, 0, {}, t.Conflict),
    (record("failed"), OTHER, 0, {}, t.Conflict),
    (record("blocked"), ME, 0, {"resume": True}, t.Conflict),
    (record("needs_review"), OTHER, 0, {}, t.Conflict),
    (None, OTHER, None, {"missing": (("x", "pending"),)}, t.Blocked),
    (RELEASED, OTHER, 0, {"missing": (("x", "pending"),)}, t.Blocked),
    (record("complete"), OTHER, 0, {"missing": (("x", "pending"),), "reopen": True}, t.Blocked),
])
def test_a_claim_that_is_refused_says_why(claim, me, age, how, error):
    before = json.dumps(claim)
    with pytest.raises(error) as why:
        take(claim, me, age, **how)
    assert why.value.exit == (5 if error is t.Blocked else 3) and why.value.hint
    assert json.dumps(claim) == before


def test_a_refused_claimant_learns_holder_age_and_seconds_left():
    with pytest.raises(t.Held) as why:
        take(record(), OTHER, 40.7)
    said = why.value.details
    assert (said["holder"], said["age_s"], said["expires_in_s"]) == ("a", 40, 64)
    with pytest.raises(t.Held, match="already claimed") as why:
        take(record(), TWIN, 40)
    assert "--resume" in why.value.hint


@pytest.mark.parametrize("age, renewed", [(0, False), (50, False), (51, True),
                                          (500, True), (None, True)])
def test_claiming_what_is_mine_keeps_the_token_and_renews_after_half_the_ttl(age,
                                                                             renewed):
    for me in (ME, t.Me("a", "i1"), t.Me("a", "other", token=3)):
        claim = record()
        new = take(claim, me, age)
        assert brief(new) == brief(claim) and (new is not claim) == renewed


@pytest.mark.parametrize("token", [None, 1])
def test_a_0_2_claim_is_mine_if_the_agent_matches(token):
    claim = {"agent": "a", "claimed_at": "T"}
    assert take(claim, t.Me("a", "i9", token=token), 10**9) is claim
    with pytest.raises(t.Held):
        take(claim, OTHER, 10**9)


def test_a_takeover_beyond_the_last_attempt_fails_the_step_under_the_next_token():
    new = take(record(attempt=3), OTHER, 105)
    assert (new["state"], new["token"], "attempts" in new["history"][-1]["why"]) == (
        "failed", 4, True)
    assert take(record(attempt=3), OTHER, 105, max_attempts=4)["attempt"] == 4


def test_unknown_fields_survive_and_history_keeps_the_last_32():
    claim = record(history=[{"state": n} for n in range(40)])
    new = take(claim, OTHER, 105)
    assert new["strange"] == [1] and len(new["history"]) == t.HISTORY
    assert new["history"][-2] == {"state": 39}


ACTS = {
    "renew": lambda claim, me: t.renew(claim, me, at="NOW", ends="END"),
    "release": lambda claim, me: t.release(claim, me, at="NOW"),
    **{state: lambda claim, me, s=state: t.end(claim, me, s, at="NOW",
                                               handoff={"note": "n"})
       for state in t.ENDED},
}
STALE_ME, PASSED_ON = t.Me("a", "i1", token=2), t.Me("a", "i7", token=3)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("me", [ME, PASSED_ON, t.Me("a", "i1", explicit=True)],
                         ids=["kept", "passed on", "named instance"])
def test_the_holder_may_and_the_token_stays(act, me):
    new = ACTS[act](record(), me)
    assert new["token"] == 3 and new["strange"] == [1]
    assert new["state"] == {"renew": "in_progress", "release": "released"}.get(act, act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("claim, me, exit", [
    (record(), STALE_ME, 4),
    (record(agent="b", instance="i3"), STALE_ME, 4),
    (RELEASED, STALE_ME, 4),
    (record("complete", agent="b"), STALE_ME, 4),
    (record("failed"), STALE_ME, 4),
    (record(), OTHER, 3),
    (record(), t.Me("b", "i3", token=3), 3),  # a token alone is not enough
    (record(), TWIN, 3),
    (record(), t.Me("a", "i1"), 3),  # its token is lost
    (record(), t.Me("a", "i2", explicit=True), 3),
    (record("complete", agent="b"), OTHER, 3),
    (RELEASED, OTHER, 3),
], ids=range(12))
def test_a_stale_holder_is_fenced_and_who_never_held_it_is_refused(act, claim, me,
                                                                    exit):
    with pytest.raises(t.Error) as why:
        ACTS[act](claim, me)
    assert why.value.exit == exit and why.value.hint


@pytest.mark.parametrize("act", ["renew", "release"])
def test_nobody_renews_or_releases_what_is_not_claimed(act):
    with pytest.raises(t.Conflict):
        ACTS[act](None, ME)


@pytest.mark.parametrize("state", t.ENDED)
def test_the_same_end_again_writes_nothing_and_another_end_is_refused(state):
    claim = record(state)
    assert ACTS[state](claim, ME) is claim
    for other in set(t.ENDED) - {state}:
        with pytest.raises(t.Conflict):
            ACTS[other](claim, ME)


@pytest.mark.parametrize("state", t.ENDED)
def test_another_instance_that_never_held_it_cannot_end_it_again(state):
    with pytest.raises(t.Conflict):
        ACTS[state](record(state), TWIN)


@pytest.mark.parametrize("state", t.ENDED)
def test_ending_what_nobody_claimed_creates_it_ended_with_token_1(state):
    new = t.end(None, TWIN, state, at="NOW", handoff={"note": "n"})
    assert brief(new)[:4] == (state, "a", "i2", 1)
    assert new["handoffs"] == [{"note": "n", "token": 1}]


def test_the_hand_off_is_inside_the_end_and_names_its_token():
    new = ACTS["complete"](record(handoffs=[{"token": 1}]), ME)
    assert [note["token"] for note in new["handoffs"]] == [1, 3]


@pytest.mark.parametrize("claim", [record(), RELEASED, *ENDED[1:]],
                         ids=lambda claim: claim["state"])
def test_force_takes_the_token_and_gives_its_reason(claim):
    new = t.end(claim, OTHER, "complete", at="NOW", handoff={}, force="he is ill")
    assert brief(new)[:4] == ("complete", "b", "i3", 4)
    assert "he is ill" in new["history"][-1]["why"]
    assert new["handoffs"][-1]["token"] == 4


def test_force_by_the_holder_is_an_ordinary_end():
    assert t.end(record(), ME, "failed", at="", handoff={}, force="x")["token"] == 3


LOCK_ME = t.Me("a", "i1", token=3, words=t.LOCK_WORDS)
LOCK_OTHER = t.Me("b", "i3", words=t.LOCK_WORDS)


def test_a_lock_is_refused_in_its_own_words_and_a_step_in_those_of_0_2():
    with pytest.raises(t.Held, match="^is held by a$"):
        t.take(record(), LOCK_OTHER, 0, at="NOW")
    with pytest.raises(t.Held, match="^already claimed by a$"):
        t.take(record(), OTHER, 0, at="NOW")
    free = t.refusal(None, LOCK_OTHER)
    assert (free.message, free.hint) == ("is not held", "acquire it first")
    assert t.refusal(None, OTHER).hint == "claim it first"
    assert "claim" not in t.refusal(record(), LOCK_OTHER).hint
    assert t.take(None, LOCK_OTHER, None, at="NOW")["history"][-1]["why"] == "acquired"


def test_force_releases_anothers_lease_for_one_token_and_gives_the_reason():
    new = t.release(record(), LOCK_OTHER, at="NOW", force="he is ill")
    assert (new["state"], new["token"], new["agent"]) == ("released", 4, t.NOBODY)
    assert new["history"][-1]["why"] == "forced: he is ill"
    assert t.refusal(new, LOCK_ME).exit == 4
    assert t.release(new, LOCK_OTHER, at="", force="again") is new


def test_force_by_the_holder_is_an_ordinary_release():
    assert t.release(record(), LOCK_ME, at="", force="x")["token"] == 3


@pytest.mark.parametrize("lease", [None, record("complete")])
def test_force_makes_nothing_free_that_nobody_holds(lease):
    with pytest.raises(t.Conflict):
        t.release(lease, LOCK_OTHER, at="", force="x")


def test_an_extension_changes_the_length_only_when_told():
    assert t.renew(record(), LOCK_ME, at="N", ends="E")["ttl"] == 100
    assert t.renew(record(), LOCK_ME, at="N", ends="E", ttl=7)["ttl"] == 7


def test_releasing_twice_is_once():
    released = ACTS["release"](record(), ME)
    assert brief(released)[:4] == ("released", t.NOBODY, None, 3)
    for me in (ME, PASSED_ON, t.Me("a", "i1")):
        assert ACTS["release"](released, me) is released


@pytest.mark.parametrize("approve, state, agent", [(True, "complete", "a"),
                                                   (False, "released", t.NOBODY)])
def test_a_review_ends_complete_or_released_under_the_same_token(approve, state, agent):
    new = t.judge(record("needs_review"), OTHER, approve=approve, at="NOW", note="ok")
    assert (new["state"], new["agent"], new["token"]) == (state, agent, 3)
    assert "by b" in new["history"][-1]["why"] and "ok" in new["history"][-1]["why"]


@pytest.mark.parametrize("claim", [None, record(), RELEASED, *ENDED[:3]])
def test_only_a_step_that_needs_review_is_judged(claim):
    for approve in (True, False):
        with pytest.raises(t.Conflict):
            t.judge(claim, OTHER, approve=approve, at="", note="")


def test_decisions_change_no_record_they_were_given():
    for claim in (record(), RELEASED, *ENDED):
        before = json.dumps(claim)
        for me, act in itertools.product((ME, TWIN, OTHER, STALE_ME), ACTS.values()):
            try:
                act(claim, me)
            except t.Error:
                pass
        assert json.dumps(claim) == before


def test_no_decision_on_a_malformed_record_raises_outside_the_tree():
    junk = [None, True, -1, 1e308, "x", [], {}, [None], {"a": 1}]
    for name, value in itertools.product([*record(), "history", "handoffs"], junk):
        claim = {**record(), name: value}
        for act in (*ACTS.values(), take, lambda c, me: t.adopt(c, {"status": "x"}, 1)):
            try:
                act(claim, ME)
            except t.Error:
                pass


# -- 0.2.x in the same bucket ------------------------------------------


def status(state="complete", agent="a", **more):
    return {"status": state, "agent": agent, "started_at": "S", **more}


@pytest.mark.parametrize("claim, bare, expected", [
    (None, None, None),
    (None, status("pending"), None),
    (None, status("junk"), None),
    (None, status("in_progress"), ("in_progress", "a", None, 1)),
    (None, status("complete"), ("complete", "a", None, 1)),
    (None, status("blocked", agent=None), ("blocked", "unknown", None, 1)),
    (record(), status("needs_review"), ("needs_review", "a", "i1", 3)),  # its own end
    (record(), status("complete", agent="b"), ("complete", "b", None, 4)),  # forced
    (RELEASED, status("complete", agent="b"), ("complete", "b", None, 4)),
], ids=range(9))
def test_an_end_written_by_0_2_is_honoured(claim, bare, expected):
    new = t.adopt(claim, bare, ["etag", 1])
    assert (new and brief(new)[:4]) == expected
    assert t.adopt(new, bare, ["etag", 1]) == new


@pytest.mark.parametrize("claim, found", [
    (record(), None),
    (record(), status("in_progress", agent="b")),
    (record(), {**status(agent="b"), "token": 2}),  # a projection of ours
    (record("failed"), status("complete")),  # ended already
    (record(status_seen=["etag", 1]), status(agent="b")),  # known when the token rose
])
def test_what_is_no_new_end_by_0_2_changes_nothing(claim, found):
    assert t.adopt(claim, found, ["etag", 1]) is claim


def test_a_forced_end_by_0_2_fences_the_holder_and_says_so_in_the_history():
    new = t.adopt(record(), status(agent="b"), ["etag", 1])
    assert "forced by b" in new["history"][-1]["why"]
    with pytest.raises(t.Fenced):
        ACTS["complete"](new, ME)


def test_a_status_that_was_adopted_does_not_end_the_reopened_step_again():
    adopted = t.adopt(record(), status(agent="b"), ["etag", 1])
    again = take(adopted, OTHER, 0, reopen=True)
    assert t.adopt(again, status(agent="b"), ["etag", 1]) is again
    assert t.adopt(again, status(agent="c"), ["etag2", 2])["state"] == "complete"


@pytest.mark.parametrize("state, told", [("released", "pending"), ("failed", "blocked"),
                                         ("complete", "complete"),
                                         ("in_progress", "in_progress")])
def test_a_projection_speaks_0_2_and_names_its_source(state, told):
    doc = t.project_status(record(state))
    assert (doc["status"], doc["state"]) == (told, state)
    assert (doc["token"], doc["rev"]) == (3, 9)
    assert not t.bare(doc) and ("completed_at" in doc) == (state == "complete")


def test_the_newest_hand_off_is_projected_in_schema_2():
    assert t.project_handoff(record()) is None
    doc = t.project_handoff(record(handoffs=[{"note": "x"}, {"note": "y", "token": 3}]))
    assert doc == {"schema": 2, "note": "y", "token": 3, "rev": 9}


def test_what_0_2_wrote_into_a_projection_is_folded_in_once():
    claim = record(handoffs=[{"note": "mine"}], history=[{"state": "complete"}])
    for found in (status(agent="b"), {"from_agent": "b", "note": "theirs"}):
        once = t.fold(claim, found)
        assert once != claim and t.fold(once, found) is once
        assert once["handoffs"][-1] == {"note": "mine"}
        assert once["history"][-1] == {"state": "complete"}
    assert t.fold(claim, status("in_progress")) is claim


@pytest.mark.parametrize("states, any_, result", [
    ("cc", False, True), ("cp", False, False), ("cp", True, True), ("pp", True, False),
    ("cb", False, "b"), ("fb", True, "b"), ("fp", True, False), ("cf", True, True)])
def test_a_wait_ends_when_it_is_over_or_cannot_be(states, any_, result):
    words = {"c": "complete", "p": "pending", "b": "blocked", "f": "failed"}
    views = [{"state": words[s], "agent": "a", "step": s} for s in states]
    if result == "b":
        with pytest.raises(t.Blocked):
            t.waited(views, list(states), any_=any_)
    else:
        assert t.waited(views, list(states), any_=any_) is result


# -- memory ------------------------------------------------------------


def test_a_memory_value_replaces_what_said_it_was_gone_and_keeps_unknown_fields():
    gone = t.assign({"x": 1, "rev": 4}, "", by="a", at="T", deleted=True)
    assert gone["deleted_at"] == "T" and not t.live(gone, 0)
    back = t.assign({**gone, "blob": "b", "expires_at": "E"}, "v", by="b", at="U")
    assert back == {"value": "v", "x": 1, "rev": 4, "set_by": "b", "set_at": "U",
                    "type": "text"}


@pytest.mark.parametrize("doc, now, alive", [
    (None, 0, False), ({}, 0, True), ({"deleted_at": "T"}, 0, False),
    ({"expires_at": t.iso(10)}, 9.9, True), ({"expires_at": t.iso(10)}, 10, False),
    ({"expires_at": "soon"}, 10**10, True)])
def test_a_value_lives_until_it_is_deleted_or_expires(doc, now, alive):
    assert t.live(doc, now) is alive


V5, BARE = {"value": "v", "rev": 5}, {"value": "v"}
DEAD = {"value": "", "rev": 6, "deleted_at": "T"}


@pytest.mark.parametrize("doc, condition, good", [
    (V5, {"if_rev": 5}, True), (V5, {"if_rev": 4}, False), (V5, {"if_rev": 0}, False),
    (None, {"if_rev": 0}, True), (None, {"if_rev": 1}, False),
    (BARE, {"if_rev": 0}, False), (BARE, {"if_rev": 1}, False), (BARE, {}, True),
    (DEAD, {"if_rev": 6}, True), (DEAD, {"if_absent": True}, True),
    (None, {"if_absent": True}, True), (V5, {"if_absent": True}, False),
    (BARE, {"if_absent": True}, False), (V5, {"if_value": "v"}, True),
    (V5, {"if_value": "w"}, False), (None, {"if_value": ""}, False),
    (DEAD, {"if_value": ""}, False),
    ({**V5, "expires_at": t.iso(1)}, {"if_absent": True}, True)])
def test_a_conditional_set_is_refused_with_the_present_rev(doc, condition, good):
    if good:
        t.guard_value(doc, 99, **condition)
    else:
        with pytest.raises(t.Conflict) as why:
            t.guard_value(doc, 99, **condition)
        assert why.value.details["rev"] == t.number(doc, "rev")


@pytest.mark.parametrize("text, by, result", [
    ("", 1, "1"), ("41", 1, "42"), ("0.5", 0.25, "0.75"), ("0.5", 0.5, "1"),
    ("-1", 1, "0"), (str(2**53), 1.0, str(2**53 + 1)),
    (str(10**30), 1, str(10**30 + 1)),
    ("x", 1, None), ("true", 1, None), ('"1"', 1, None), ("[1]", 1, None),
    ("NaN", 1, None), ("1e999", 1, None), ("1" + "0" * 400, 1, None)])
def test_only_numbers_are_counted_and_none_is_lost_to_rounding(text, by, result):
    if result is None:
        with pytest.raises(t.Conflict):
            t.add_number(text, by)
    else:
        assert t.add_number(text, by) == result


@pytest.mark.parametrize("text, kind, item, result", [
    ("", "text", "a", "a"), ("a", "text", "b", "a\nb"), ("[1]", "text", "2", "[1]\n2"),
    ("[1]", "json", "2", "[1, 2]"), ("[]", "json", "x y", '["x y"]'),
    ("[]", "json", '{"ü": 1}', '[{"ü": 1}]'), ('{"a": 1}', "json", "x", None),
    ("[broken", "json", "x", None)])
def test_an_item_is_appended_to_a_list_or_as_a_line(text, kind, item, result):
    if result is None:
        with pytest.raises(t.Conflict):
            t.append_value(text, kind, item)
    else:
        assert t.append_value(text, kind, item) == result


@pytest.mark.parametrize("target, patch, result", [  # RFC 7396, appendix A
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}), ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}), ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}), (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]), ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}})])
def test_a_merge_is_that_of_rfc_7396(target, patch, result):
    before = json.dumps(target)
    assert t.merge_patch(target, patch) == result and json.dumps(target) == before


# -- artifacts ---------------------------------------------------------


def head(sha="x", token=None, step="s", **more):
    return {"sha256": sha, "size": 1, "key": f"blobs/{sha}",
            "producer": {"agent": "a", "step": step, "token": token}, **more}


def test_the_first_head_is_what_was_uploaded():
    assert t.next_head(None, head(), overwrite=False) == {**head(), "previous": []}


@pytest.mark.parametrize("token", [None, 2, 3])
def test_the_same_digest_again_changes_nothing(token):
    old = head(token=3)
    assert t.next_head(old, head(token=token), overwrite=False) is old


def test_the_same_digest_of_a_later_token_becomes_that_token_s_output():
    """protocol.md 8: outputs of a step are those of its current or ending token."""
    new = t.next_head(head(token=1, rev=4), head(token=2), overwrite=False)
    assert new["producer"]["token"] == 2 and new["key"] == "blobs/x"


@pytest.mark.parametrize("old, new, overwrite, good", [
    (head("x"), head("y"), False, False), (head("x"), head("y"), True, True),
    (head("x", 1), head("y", 2), False, True),
    (head("x", 2), head("y", 2), False, False),
    (head("x", 2), head("y", 2), True, True),
    (head("x", 1, step="r"), head("y", 2), False, False),
    (head("x", 2), head("y", 1), False, False),
    (head("x", 2), head("y", 1), True, False),
    (head("x", deleted_at="T"), head("y"), False, True),
    (head("x", producer="junk"), head("y", 1), False, False)], ids=range(10))
def test_other_content_replaces_a_head_only_by_overwrite_or_a_later_token(
        old, new, overwrite, good):
    if not good:
        with pytest.raises((t.Conflict, t.Fenced)):
            t.next_head({**old, "rev": 4}, new, overwrite=overwrite)
        return
    after = t.next_head({**old, "rev": 4, "odd": 1}, new, overwrite=overwrite)
    assert after["previous"][-1]["rev"] == 4 and after["odd"] == 1
    assert after["sha256"] == new["sha256"] and "deleted_at" not in after


# -- mail --------------------------------------------------------------

PREFIX = "messages/a/"
EMPTY = {"floor": None, "watermark": None, "seen": set()}


def mail(number, at, skew=0):
    """(key, arrival) of a message whose sender's clock is off by `skew` seconds."""
    ns = max(0, int((at + skew) * 1e9))
    return t.event_key(PREFIX, at_ns=ns, agent="b", uuid8=f"{number:08x}"), at


def read_all(stream, entries, now, shows=lambda key: True):
    """(keys shown, the stream after them) of one reading."""
    shown = [key for key, _ in t.unseen(entries, stream) if shows(key)]
    new = t.advance(stream, entries, set(shown), now=now, prefix=PREFIX)
    return shown, t.stream_of({"direct": json.loads(json.dumps(new))}, "direct")


@pytest.mark.parametrize("raw, floor, mark, seen", [
    (None, None, None, set()), ("m", None, "m", set()), (7, None, None, set()),
    ([], None, None, set()), ({"floor": True, "seen": "x"}, None, None, set()),
    ({"floor": 5, "watermark": 1, "seen": ["k", 2]}, 5, None, {"k"}),
    ({"floor": 1.5, "watermark": "m", "seen": []}, 1.5, "m", set())])
def test_a_malformed_cursor_reads_all_again(raw, floor, mark, seen):
    assert t.stream_of({"direct": raw}, "direct") == {
        "floor": floor, "watermark": mark, "seen": seen}


@pytest.mark.parametrize("skew", [-10**9, -86400, 0, 86400])
def test_a_sender_s_clock_hides_no_message(skew):
    early = [mail(1, 10**9)]
    _, stream = read_all(EMPTY, early, 10**9)
    late = mail(2, 10**9 + 1, skew=skew)
    shown, stream = read_all(stream, early + [late], 10**9 + 1)
    assert shown == [late[0]]
    assert read_all(stream, early + [late], 10**9 + 9)[0] == []


def test_the_floor_stays_below_what_was_withheld_and_never_falls():
    entries = [mail(n, 1000 + 500 * n) for n in range(5)]
    _, stream = read_all(EMPTY, entries, 3000, shows=lambda key: key != entries[1][0])
    assert stream["floor"] < 1500
    assert read_all(stream, entries, 9000)[0] == [entries[1][0]]
    after = t.advance({**stream, "floor": 2500}, entries[:1], set(), now=1000,
                      prefix=PREFIX)
    assert after["floor"] == 2500


def test_the_watermark_that_0_2_reads_never_falls():
    mark = mail(1, 10**9)[0]
    after = t.advance({**EMPTY, "watermark": mark}, [mail(2, 1000)], set(), now=1000,
                      prefix=PREFIX)
    assert after["watermark"] == mark


def test_seen_does_not_grow_with_what_the_floor_covers():
    entries, stream = [mail(n, 1000 + 100 * n) for n in range(50)], EMPTY
    _, stream = read_all(stream, entries, 6000)
    _, stream = read_all(stream, entries + [mail(99, 9000)], 9000)
    assert len(stream["seen"]) <= 1


def test_a_reader_with_an_older_listing_forgets_nothing_the_other_has_seen():
    """Two readers of one agent: the loser of the CAS advances the winner's cursor."""
    old, new = mail(1, 1000), mail(2, 1001)
    _, stream = read_all(EMPTY, [old, new], 1001)
    after = t.advance(stream, [old], {old[0]}, now=1000, prefix=PREFIX)
    after = t.stream_of({"direct": after}, "direct")
    assert t.unseen([old, new], after) == []


def mailbox_run(dice, *, crashes, readers=1):
    """{key: times shown} after messages and readings in random order, and their number.

    Senders' clocks are days off; a put shows up to 250 s after the time it is stamped
    with; a reading may be limited, filtered, cut by a crash before its cursor moves."""
    now, hidden, stream, times, count, batches = 10**9, [], EMPTY, {}, 0, []

    def listed():
        return sorted(entry for visible, entry in hidden if visible <= now)
    for _ in range(40):
        now += dice.choice([0, 1, 30, 299, 301, 5000])
        for _ in range(dice.choice([0, 0, 1, 3])):
            count += 1
            skew = dice.choice([-2 * 86400, -400, 0, 0, 400, 2 * 86400])
            hidden.append((now + dice.choice([0, 0, 250]), mail(count, now, skew)))
        while len(batches) < readers:
            entries, limit = listed(), dice.choice([1, 2, 99, 99])
            keys = [key for key, _ in t.unseen(entries, stream)][:limit]
            batches.append((entries, keys, now))
        for entries, keys, then in batches:  # they listed before any of them commits
            for key in keys:
                times[key] = times.get(key, 0) + 1
            if not (crashes and dice.random() < 0.3):
                new = t.advance(stream, entries, set(keys), now=then, prefix=PREFIX)
                stream = t.stream_of({"direct": new}, "direct")
        batches = []
    now += 251
    for key, _ in t.unseen(listed(), stream):
        times[key] = times.get(key, 0) + 1
    return times, count


def test_every_message_is_shown_once_when_nothing_crashes():
    """protocol.md 11.2"""
    for seed in range(150):
        times, count = mailbox_run(random.Random(seed), crashes=False)
        assert len(times) == count and set(times.values()) <= {1}, seed


@pytest.mark.parametrize("readers", [1, 2])
def test_a_crash_shows_a_message_again_and_never_not_at_all(readers):
    """protocol.md 11.2"""
    for seed in range(100):
        times, count = mailbox_run(random.Random(seed), crashes=True, readers=readers)
        assert len(times) == count, seed


def test_every_order_of_four_arrivals_and_readings_shows_each_message_once():
    skews = (-86400, 0, 86400, -1)
    for order in itertools.product((0, 1, 2, 3), repeat=4):
        entries, stream, shown = [], EMPTY, []
        for number, pause in enumerate(order):
            now = 10**9 + sum((1, 299, 301, 4000)[p] for p in order[:number + 1])
            entries.append(mail(number, now, skews[number]))
            if pause % 2:
                keys, stream = read_all(stream, sorted(entries), now)
                shown += keys
        shown += [key for key, _ in t.unseen(entries, stream)]
        assert sorted(shown) == sorted(key for key, _ in entries), order


# -- channels in a cursor, signatures, pages ---------------------------

OPS = "_channel.ops"
SIGNED = {"from": "ada", "to": "bob", "message": "hi", "sent_at": "T", "id": "i" * 16,
          "thread": "t", "reply_to": "r", "kind": "question", "subject": "s",
          "importance": "high", "ack": True, "step": "s-1", "expires_at": "T2",
          "artifacts": [{"name": "a", "sha256": "x", "size": 3}]}
WHERE = "messages/bob/0000000000000000001_ada_iiiiiiii.json"


def rewritten_by_02(cursor):
    """What 0.2.5 makes of a cursor: its own two streams, `seen` kept and capped."""
    new = {"updated_at": "x"}
    for name in ("direct", "broadcast"):
        raw = cursor.get(name) if isinstance(cursor.get(name), dict) else {}
        mark, seen = raw.get("watermark"), raw.get("seen") or []
        kept = [key for key in sorted(seen) if mark is None or key > mark]
        new[name] = {"watermark": mark, "seen": kept[-1000:]}
    return json.loads(json.dumps(new))


@pytest.mark.parametrize("word", ["ops", "#ops", "_channel.ops", " #ops "])
def test_a_channel_may_be_written_in_three_ways(word):
    assert t.channel_box(word) == OPS
    if "#" in word or "_" in word:
        assert t.box_of(word) == OPS


@pytest.mark.parametrize("word", ["", "#", "a/b", "_x", "##a", "_channel.", "#é", "."])
def test_a_channel_that_does_not_fit_is_refused(word):
    with pytest.raises(t.Usage):
        t.channel_box(word)


def test_a_channel_s_stream_survives_the_cursor_and_its_rewriting_by_0_2():
    keys = {f"messages/{OPS}/{n:019d}_b_0000000{n}.json" for n in range(3)}
    mark = "messages/_broadcast/1700000000000000000"
    cursor = t.with_streams({"broadcast": {"watermark": mark, "seen": ["old"]}}, {
        OPS: {"floor": 1234.5, "seen": keys}, "_channel.a": {"floor": 7, "seen": []}})
    for doc in (cursor, rewritten_by_02(cursor)):
        assert t.channels_of(doc) == ["_channel.a", OPS]
        assert t.stream_of(doc, OPS) == {"floor": 1234.5, "watermark": None,
                                         "seen": keys}
    left = t.with_streams(cursor, {OPS: None})
    assert t.channels_of(left) == ["_channel.a"]
    assert not any("ops" in key for key in left["broadcast"]["seen"])
    assert "old" in left["broadcast"]["seen"]


def test_a_membership_survives_the_cap_of_0_2_over_thousands_of_keys():
    keys = {f"messages/_channel.z/{n:019d}_b_0.json" for n in range(3000)}
    cursor = t.with_streams({}, {"_channel.z": {"floor": 5, "seen": keys},
                                 "_channel.a": {"floor": 6, "seen": set()}})
    again = rewritten_by_02(cursor)
    assert t.channels_of(again) == ["_channel.a", "_channel.z"]
    assert t.stream_of(again, "_channel.a")["floor"] == 6


@pytest.mark.parametrize("key", [
    "messages/_channel/", "messages/_channel/ops", "messages/_channel/ops/x",
    "messages/_channel//1", "messages/_channel/ops/" + "9" * 5000,
    "messages/_channel/ops/²"])
def test_what_looks_like_a_membership_and_is_none_joins_nothing(key):
    assert t.channels_of({"broadcast": {"seen": [key]}}) == []


def channel_run(dice, *, forget=None):
    """Keys shown of a channel, and how many arrived after joining. Arrivals, readings,
    partial readings and rewrites by 0.2 in random order; floors are as stored."""
    now, entries, times, count, cursor = 10**9, [], {}, 0, t.with_streams(
        {}, {OPS: {"floor": 0, "seen": set()}})
    prefix = f"messages/{OPS}/"
    for _ in range(40):
        now += dice.choice([0, 1, 301, 90_000])
        for _ in range(dice.choice([0, 1, 3])):
            count += 1
            ns = int((now - dice.choice([0, 0, 2 * 86400])) * 1e9)
            entries.append((t.event_key(prefix, at_ns=ns, agent="b",
                                        uuid8=f"{count:08x}"), now))
        stream = t.stream_of(cursor, OPS)
        part = dice.random() < 0.5
        listed = [e for e in sorted(entries) if not part
                  or e[0] > t.ns_key(prefix, stream["floor"] - t.LATE)]
        keys = [key for key, _ in t.unseen(listed, stream)][:dice.choice([1, 99])]
        for key in keys:
            times[key] = times.get(key, 0) + 1
        moved = t.advance(stream, listed, set(keys), prefix=prefix,
                          now=None if part and not forget else now)
        cursor = t.with_streams(cursor, {OPS: moved})
        if dice.random() < 0.2:
            cursor = rewritten_by_02(cursor)
    for key, _ in t.unseen(sorted(entries), t.stream_of(cursor, OPS)):
        times[key] = times.get(key, 0) + 1
    return times, count


def test_every_message_of_a_channel_is_shown_once_through_0_2_and_partial_listings():
    """protocol.md 11.2"""
    for seed in range(150):
        times, count = channel_run(random.Random(seed))
        assert len(times) == count and set(times.values()) <= {1}, seed


def test_a_floor_that_rises_with_a_partial_listing_loses_messages():
    """The broken variant of the test before."""
    runs = [channel_run(random.Random(seed), forget=True) for seed in range(20)]
    assert any(len(times) < count for times, count in runs)


@pytest.mark.parametrize("field", [*SIGNED, "new"])
def test_a_changed_or_missing_field_makes_a_signed_message_forged(field):
    doc = {**SIGNED, "hmac": t.signature("secret", WHERE, SIGNED)}
    assert t.genuine("secret", WHERE, {**doc, "rev": 1, "nonce": "n"}) == "verified"
    other = ["x"] if field in ("ack", "artifacts") else str(doc.get(field)) + "x"
    assert t.genuine("secret", WHERE, {**doc, field: other}) == "forged"
    if field in doc:
        del doc[field]
        assert t.genuine("secret", WHERE, doc) == "forged"


@pytest.mark.parametrize("where", [
    WHERE.replace("/bob/", "/eve/"), WHERE.replace("001_", "002_"),
    WHERE.replace("bob", "_broadcast"), WHERE.replace("ada", "eve")])
def test_a_signed_message_copied_to_another_key_is_forged(where):
    doc = {**SIGNED, "hmac": t.signature("secret", WHERE, SIGNED)}
    assert t.genuine("secret", where, doc) == "forged"


@pytest.mark.parametrize("secret, mac, word", [
    ("", "x", "unverified"), ("k", None, "unverified"), ("k", 5, "forged"),
    ("k", "", "forged"), ("k", "é", "forged"), ("k", ["x"], "forged")])
def test_without_a_secret_or_a_signature_nothing_is_verified(secret, mac, word):
    assert t.genuine(secret, WHERE, {**SIGNED, "hmac": mac}) == word


def test_the_signature_is_the_one_the_comment_describes():
    import hashlib
    import hmac
    text = ('["tracecraft mail 1","messages/b/1.json",'
            '{"from":"\\u00e4","n":1,"to":"b"}]')
    doc = {"to": "b", "n": 1, "from": "ä", "nonce": "x"}
    assert t.signature("k", "messages/b/1.json", doc) == hmac.new(
        b"k", text.encode(), hashlib.sha256).hexdigest()


def test_a_forged_message_names_no_sender_but_whom_it_claims():
    doc = {**SIGNED, "hmac": "0" * 64}
    got = t.message_of(WHERE, doc, secret="k", target="direct")
    assert (got["from"], got["claimed_from"], got["verified"]) == ("?", "ada", False)
    assert t.message_of(WHERE, doc, secret="", target="direct")["from"] == "ada"


@pytest.mark.parametrize("change, good", [
    ({}, True), ({"reply_to": "other"}, False), ({"reply_to": "i" * 8}, False),
    ({"reply_to": None}, False), ({"from": "ada"}, False),
    ({"signature": "forged"}, False)])
def test_only_a_reply_to_the_question_by_somebody_else_answers_it(change, good):
    reply = {"reply_to": SIGNED["id"], "from": "bob", "signature": "unverified"}
    assert t.answers({**reply, **change}, SIGNED, "ada", signed=False) is good


@pytest.mark.parametrize("ends, now, over", [
    (None, 5, False), ("1970-01-01T00:00:09+00:00", 8.9, False), ("nonsense", 5, False),
    ("1970-01-01T00:00:09+00:00", 9, True), (7, 9**9, False)])
def test_a_message_lapses_when_it_says_so(ends, now, over):
    assert t.lapsed({"expires_at": ends}, now) is over


@pytest.mark.parametrize("text, line", [
    ("abc", "abc"), ("no", ""), ("x" * 300 + "\nABC " + "y" * 300, None)])
def test_a_context_is_one_line_around_the_word(text, line):
    got = t.context(text, "abc")
    if line is None:
        assert "ABC" in got and "\n" not in got and len(got) <= 102
    else:
        assert got == line


def test_a_leap_lands_half_a_page_before_the_end_or_nowhere():
    keys = [t.event_key("m/", at_ns=n * 10**9, agent="a", uuid8="0" * 8)
            for n in range(1000)]
    assert t.leap(keys, 10_000 * 10**9) == 10_000 * 10**9 - 999 * 10**9 * 500 // 1000
    assert t.leap(keys, 1100 * 10**9) is None
    assert t.leap(keys[:1], 10**13) is t.leap(["odd", "keys"], 5) is None


# -- the protocol as a state space -------------------------------------
#
# The real decisions of section 3 run over a modelled store in every order of events.
# Agents read (settle, decide) and PUT, two events; a PUT may be answered, or its answer
# lost and the PUT land at any later moment or never, or be told 409. A read finds the
# lease expired only while the record truly is old ("ages" is an event of its own; any
# write makes it young again). A crash is an agent that takes no further event.

PAST_LEASE = t.TTL + t.GRACE
FIELDS = ("agent", "instance", "state", "token", "attempt", "ttl", "rev", "nonce",
          "prev", "recent", "released_by", "handoffs")
VERBS = {"complete": "complete", "fail": "failed", "review": "needs_review",
         "force": "complete"}


class Violation(Exception):
    """An invariant of protocol.md 11 does not hold in a reachable state."""


def freeze(doc):
    """A record as a value: what the decisions look at, without times and history."""
    return doc if doc is None else tuple(
        tuple(doc["recent"]) if name == "recent"
        else doc["handoffs"][-1]["token"] if name == "handoffs" and doc.get(name)
        else doc.get(name) for name in FIELDS)


def thaw(record):
    if record is None:
        return None
    doc = {n: v for n, v in zip(FIELDS, record) if v is not None}
    doc["recent"] = list(doc["recent"])
    if "handoffs" in doc:
        doc["handoffs"] = [{"token": doc["handoffs"]}]
    return doc


class Agent(NamedTuple):
    """One process: where it stands in its script, and what it knows."""

    at: int = 0  # act of the script
    token: object = None  # the token it holds, by its own knowledge
    sent: object = None  # (record sent, record replaced) while a PUT is to be answered
    doubt: bool = False  # an answer of this act was lost
    put: bool = False  # the next event is a PUT (of `sent`)


class World(NamedTuple):
    """The bucket, the network, the agents, and what the checker remembers (ghosts)."""

    record: object
    old: bool  # the lease has run out by the store's clock
    agents: tuple
    flying: frozenset  # PUTs without an answer: (actor, act, token, new, replaced)
    faults: int  # lost answers and 409s still allowed
    wins: frozenset  # (token, (agent, instance)) acknowledged by claim
    landed: frozenset  # (write, (actor, act)) that took effect
    told: frozenset  # (actor, act) whose command said: not done
    done: frozenset  # writes whose command said: done


class Model:
    """The protocol of protocol.md 1.4 and 4. Subclasses break one rule each."""

    keep, believes = t.RECENT, False

    def __init__(self, *scripts, faults=1, start=None):
        """scripts: (agent, instance, acts), one process each."""
        self.scripts, self.faults = scripts, faults
        self.start, self.memo, self.seen, self.outcomes = start, {}, set(), set()

    def write_id(self, actor, act):
        """One per logical write, the same over its retries: 'verb#op' shares it."""
        return self.scripts[actor][2][act].partition("#")[2] or f"{actor}.{act}"

    def verb(self, actor, act):
        return self.scripts[actor][2][act].partition("#")[0]

    # what a broken variant may change

    def nonce(self, actor, act):
        return self.write_id(actor, act)

    def age(self, actor, old):
        return PAST_LEASE if old else 0

    def matches(self, record, replaced):
        return record == replaced  # ETag: a hash of the bytes

    def me(self, actor, token):
        agent, instance, _ = self.scripts[actor]
        return t.Me(agent, instance, token=token)

    def released(self, doc):
        return doc

    def after_409(self):
        return "again"

    def settle(self, record, sent, replaced):
        return t.settle(thaw(record), thaw(sent), unchanged=record == replaced)

    # decisions

    def repeated(self, record, actor, act):
        """Whether a command with --op was run before, by whomever (protocol.md 1.4)."""
        return "#" in self.scripts[actor][2][act] and t.settle_op(
            thaw(record), nonce=self.nonce(actor, act), rev=0) == "landed"

    def decide(self, actor, agent, record, old):
        """('refused', exit) | ('same', record) | ('put', new record); memoised."""
        key = (actor, agent.at, agent.token, record, old)
        if key not in self.memo:
            self.memo[key] = self._decide(actor, agent, record, old)
        return self.memo[key]

    def _decide(self, actor, agent, record, old):
        doc, me = thaw(record), self.me(actor, agent.token)
        try:
            new = self.act(actor, agent.at, doc, me=me, age=self.age(actor, old))
        except t.Error as why:
            return "refused", why.exit
        if new is doc:
            return "same", record
        if new is None:
            return "put", None
        nonce = self.nonce(actor, agent.at)
        return "put", freeze(t.stamped(new, doc, nonce=nonce, keep=self.keep))

    def act(self, actor, at, doc, *, me, age):
        verb = self.verb(actor, at)
        if verb in ("claim", "resume", "reopen"):
            return t.take(doc, me, age, at="", resume=verb == "resume",
                          reopen=verb == "reopen")
        if verb == "renew":
            return t.renew(doc, me, at="", ends="")
        if verb == "release":
            return self.released(t.release(doc, me, at=""))
        if verb in ("approve", "reject"):
            return t.judge(doc, me, approve=verb == "approve", at="", note="")
        return t.end(doc, me, VERBS[verb], at="", handoff={},
                     force="person" if verb == "force" else "")

    # events

    def first(self):
        return World(self.start, False, tuple(Agent() for _ in self.scripts),
                     frozenset(), self.faults, frozenset(), frozenset(), frozenset(),
                     frozenset())

    def events(self, world):
        """Every world one event away."""
        if world.record is not None and not world.old and world.record[2] == \
                "in_progress":
            yield world._replace(old=True)
        for actor, agent in enumerate(world.agents):
            if agent.at < len(self.scripts[actor][2]):
                yield from (self.answers(world, actor, agent) if agent.put
                            else [self.read(world, actor, agent)])
        for put in world.flying:
            landed = world._replace(flying=world.flying - {put})
            if self.matches(world.record, put[4]):
                yield self.land(landed, *put)

    def read(self, world, actor, agent):
        if agent.sent is not None:
            became = self.settle(world.record, *agent.sent)
            if became == "unknown" and not agent.doubt:
                became = "lost"
            if became == "landed" and agent.sent[0][9][-1] in world.record[9]:
                return self.finish(world, actor, agent, "done", agent.sent[0])
            if became == "landed":  # another run of the same operation wrote it
                return self.repeat(world, actor, agent)
            if became == "again":
                return self.move(world, actor, agent._replace(put=True))
            if became == "unknown":
                return self.finish(world, actor, agent, "unknown", None)
        elif self.repeated(world.record, actor, agent.at):
            return self.repeat(world, actor, agent)
        outcome, value = self.decide(actor, agent, world.record, world.old)
        if outcome == "put":
            sent = (value, world.record)
            return self.move(world, actor, agent._replace(sent=sent, put=True))
        if outcome == "same":
            return self.finish(world, actor, agent, "done", value)
        return self.finish(world, actor, agent, "told", value)

    def repeat(self, world, actor, agent):
        """Another run of this operation landed; what it won may be lost by now."""
        mine = world.record[:2] == self.scripts[actor][:2] or self.believes
        return self.finish(world, actor, agent, "done" if mine else "superseded",
                           world.record)

    def answers(self, world, actor, agent):
        """What may become of a PUT."""
        put = (actor, agent.at, agent.token, *agent.sent)
        if self.matches(world.record, agent.sent[1]):
            after = self.land(world, *put)
            yield self.finish(after, actor, agent, "done", agent.sent[0])
        else:
            yield self.move(world, actor, agent._replace(put=False))  # 412: re-read
        if world.faults:
            fewer = world._replace(faults=world.faults - 1)
            doubt = agent._replace(put=False, doubt=True)
            yield self.move(fewer._replace(flying=world.flying | {put}), actor, doubt)
            if world.flying and self.after_409() == "told":
                yield self.finish(fewer, actor, agent, "told", 3)

    def move(self, world, actor, agent):
        agents = world.agents[:actor] + (agent,) + world.agents[actor + 1:]
        return world._replace(agents=agents)

    def finish(self, world, actor, agent, how, value):
        """The command returns: what it says becomes a ghost."""
        verb, token = self.verb(actor, agent.at), agent.token
        self.outcomes.add((verb, how, value if how == "told" else agent.doubt))
        if how == "done" and value is not None:
            if verb in ("claim", "resume", "reopen") and value[2] == "in_progress":
                token = value[3]
                world = world._replace(wins=world.wins | {
                    (token, self.scripts[actor][:2])})
            if agent.sent is not None and value == agent.sent[0]:
                write = self.write_id(actor, agent.at)
                world = world._replace(done=world.done | {write})
        if how == "told":
            world = world._replace(told=world.told | {(actor, agent.at)})
        return self.move(world, actor, Agent(at=agent.at + 1, token=token))

    def land(self, world, actor, act, token, new, replaced):
        """A PUT takes effect: invariant 3 and the growth of tokens are checked here."""
        was, verb = world.record, self.verb(actor, act)
        self.check_tokens(was, new)
        if verb in ("renew", "release", "complete", "fail", "review") and was:
            agent = self.scripts[actor][0]
            if (was[0], was[2], was[3]) != (agent, "in_progress", token):
                raise Violation(f"stale holder: {verb} with {token} over {was}")
        if verb == "claim" and was and was[2] == "in_progress" and not world.old and \
                was[:2] != self.scripts[actor][:2]:
            raise Violation(f"a live lease was taken over: {was}")
        nonce = self.write_id(actor, act)
        if nonce in {write for write, _ in world.landed}:
            raise Violation(f"{verb} was applied twice")
        landed = world.landed | {(nonce, (actor, act))}
        return world._replace(record=new, old=False, landed=landed)

    def check_tokens(self, was, new):
        if new is None:
            return
        if was and new[3] < was[3]:
            raise Violation(f"the token fell: {was} -> {new}")
        held = new[2] == "in_progress"
        same = was and was[:4] == new[:4]
        if was and held and not same and new[3] <= was[3]:
            raise Violation(f"a new holder has the old token: {was} -> {new}")
        if new[2] in t.ENDED and new[11] is not None and was and was[2] == \
                "in_progress" and new[11] != new[3] and new[2] != "failed":
            raise Violation(f"an ended step does not name its token: {new}")

    def check(self, world):
        """Invariant 1, and that no command said what is not so."""
        tokens = [token for token, _ in world.wins]
        if len(tokens) != len(set(tokens)):
            raise Violation(f"two winners of one token: {sorted(world.wins)}")
        if world.told & {act for _, act in world.landed}:
            raise Violation(f"told 'not done', yet it landed: {world.told}")
        if world.done - {write for write, _ in world.landed}:
            raise Violation(f"told 'done', yet it did not land: {world.done}")

    def explore(self, limit=400_000):
        """All reachable worlds; raises Violation. Returns how many there are."""
        todo, self.seen = [self.first()], {self.first()}
        while todo:
            for world in self.events(todo.pop()):
                if world not in self.seen:
                    self.check(world)
                    self.seen.add(world)
                    todo.append(world)
            assert len(self.seen) < limit, "the state space is not bounded as meant"
        return len(self.seen)


A, A2, B, C = ("a", "i1"), ("a", "i2"), ("b", "i3"), ("c", "i4")


def model(*scripts, cls=Model, faults=1, **how):
    """A model of "who: acts" pairs, e.g. (A, "claim complete")."""
    return cls(*[(agent, instance, tuple(acts.split()))
                 for (agent, instance), acts in scripts], faults=faults, **how)


@pytest.mark.parametrize("faults, scripts", [
    (3, [(A, "claim renew complete"), (B, "claim complete")]),
    (3, [(A, "claim release complete"), (B, "claim renew fail")]),
    (3, [(A, "claim complete"), (A2, "resume complete")]),
    (3, [(A, "claim renew release"), (B, "force")]),
    (2, [(A, "claim#x complete#y"), (A, "claim#x complete#y")]),
    (0, [(A, "claim release#x"), (A, "claim release#x"), (B, "claim complete")]),
    (1, [(A, "claim complete"), (B, "claim release"), (C, "force")]),
    (1, [(A, "claim renew"), (B, "claim complete"), (C, "claim release")]),
    (1, [(A, "claim review"), (B, "reopen review"), (C, "approve reject")]),
    (1, [(A, "claim complete"), (A2, "resume release"), (B, "claim renew")]),
])
def test_no_order_of_events_breaks_invariants_1_and_3(faults, scripts):
    """protocol.md 11.1 and 11.3, in every reachable state."""
    assert model(*scripts, faults=faults).explore() > 100


def test_the_enumeration_meets_takeovers_fences_and_answers_lost_after_landing():
    m = model((A, "claim complete"), (B, "claim complete"), faults=2)
    m.explore()
    assert ("claim", "done", True) in m.outcomes  # in doubt, then settled
    assert ("complete", "told", t.Fenced.exit) in m.outcomes
    assert any(len(world.wins) == 2 for world in m.seen)  # a takeover


def test_three_claimants_have_one_winner_until_a_lease_expires():
    m = model((A, "claim"), (B, "claim"), (C, "claim"), faults=2)
    m.explore()
    first = [world for world in m.seen if world.record and world.record[3] == 1]
    assert first and all(len(world.wins) <= 1 for world in first)


# Each of these breaks one rule of the protocol; the checker has to notice.

class NoNonce(Model):
    def nonce(self, actor, act):
        return ""


class ReleaseByDelete(Model):
    def released(self, doc):
        return None


class TokenResetOnRelease(Model):
    def released(self, doc):
        return {**doc, "token": 0}


class PutWithoutCondition(Model):
    def matches(self, record, replaced):
        return True


class LeaseByClientClock(Model):
    def age(self, actor, old):
        return super().age(actor, old) + (PAST_LEASE if actor else 0)  # B's is fast


class BusyMeansLost(Model):
    def after_409(self):
        return "told"


class MovedIsLost(Model):
    def read(self, world, actor, agent):
        if agent.sent is not None and world.record != agent.sent[1]:
            return self.finish(world, actor, agent, "told", 3)
        return super().read(world, actor, agent)


class TheNameIsEnough(Model):
    def act(self, actor, at, doc, *, me, age):
        if self.verb(actor, at) == "complete":
            me = t.Me(me.agent, me.instance, token=t.token_of(doc))
        return super().act(actor, at, doc, me=me, age=age)


class WhatLandedOnceIsStillMine(Model):
    believes = True


@pytest.mark.parametrize("cls, faults, scripts, words", [
    (NoNonce, 1, [(A, "claim"), (B, "claim")], "two winners"),
    (ReleaseByDelete, 0, [(A, "claim release"), (B, "claim")], "two winners"),
    (TokenResetOnRelease, 0, [(A, "claim release"), (B, "claim")], "token fell"),
    (PutWithoutCondition, 0, [(A, "claim"), (B, "claim")], "old token|two winners"),
    (LeaseByClientClock, 0, [(A, "claim renew"), (B, "claim")], "live lease"),
    (BusyMeansLost, 2, [(A, "claim"), (B, "claim")], "yet it landed"),
    (MovedIsLost, 1, [(A, "claim"), (B, "claim")], "yet it landed"),
    (TheNameIsEnough, 0, [(A, "claim complete"), (A2, "resume")], "stale holder"),
])
def test_the_checker_notices_a_protocol_without_one_of_its_rules(cls, faults, scripts,
                                                                 words):
    assert model(*scripts, faults=faults).explore()
    with pytest.raises(Violation, match=words):
        model(*scripts, cls=cls, faults=faults).explore()


class Counter(Model):
    """A record that only counts: what was applied twice shows at once."""

    def act(self, actor, at, doc, *, me, age):
        return dict(doc or {})

    def check_tokens(self, was, new):
        pass


def test_an_increment_is_applied_once_whatever_answers_are_lost():
    """protocol.md 11.2"""
    assert model((A, "incr incr"), (B, "incr"), cls=Counter, faults=3).explore()


@pytest.mark.parametrize("keep", [2, 3])
def test_what_has_left_recent_is_unknown_and_not_applied_again(keep):
    m = model((A, "incr"), (B, "incr incr incr"), cls=Counter, faults=1)
    m.keep = keep
    m.explore()
    assert ("incr", "unknown", True) in m.outcomes


@pytest.mark.parametrize("cls, scripts", [
    (Counter, [(A, "incr#x"), (A, "incr#x"), (B, "incr")]),
    (Model, [(A, "claim#x complete"), (A, "claim#x complete"), (B, "claim")]),
])
def test_two_runs_of_one_operation_apply_it_once(cls, scripts):
    assert model(*scripts, cls=cls).explore()


def test_a_repeated_claim_that_believes_the_record_is_its_own_is_noticed():
    scripts = [(A, "claim#x"), (A, "claim#x"), (B, "claim")]
    assert model(*scripts, faults=0).explore()
    with pytest.raises(Violation, match="two winners"):
        model(*scripts, cls=WhatLandedOnceIsStillMine, faults=0).explore()


# -- histories ---------------------------------------------------------
#
# For tests with real processes: what was asked and answered, on one monotonic clock,
# and whether some legal order explains it.

UNKNOWN = object()  # the outcome of an operation whose answer was lost
FOREVER = float("inf")


class Op:
    """One operation: asked at `start`, answered at `end` (never: FOREVER)."""

    __slots__ = ("process", "name", "arg", "start", "end", "result")

    def __init__(self, process, name, arg=None, *, start, end=FOREVER, result=UNKNOWN):
        self.process, self.name, self.arg = process, name, arg
        self.start, self.end, self.result = start, end, result

    def __repr__(self):
        result = "?" if self.result is UNKNOWN else self.result
        return f"{self.process}:{self.name}({self.arg!r})={result!r}" \
               f"@{self.start}-{self.end}"


class History:
    """Operations of many threads: op = h.invoke(...); then h.ok(op, result), or
    h.unknown(op) where it may or may not have happened, or h.fail(op) where it has not.
    What is never answered counts as unknown."""

    def __init__(self, clock=time.monotonic):
        self.clock, self.ops, self.lock = clock, [], threading.Lock()

    def invoke(self, process, name, arg=None):
        op = Op(process, name, arg, start=self.clock())
        with self.lock:
            self.ops.append(op)
        return op

    def ok(self, op, result=None):
        op.result, op.end = result, self.clock()

    def unknown(self, op):
        op.result, op.end = UNKNOWN, FOREVER

    def fail(self, op):
        with self.lock:
            self.ops.remove(op)

    def run(self, process, name, arg, call):
        """call() as one operation: Conflict and Unavailable say it did not happen."""
        op = self.invoke(process, name, arg)
        try:
            result = call()
        except (t.Conflict, t.Fenced, t.Unavailable):
            self.fail(op)
            raise
        except BaseException:
            self.unknown(op)
            raise
        self.ok(op, result)
        return result

    def named(self, name):
        return [op for op in self.ops if op.name == name]


def check_chain(docs, acked=()):
    """What is wrong with these versions of one record (any order, gaps allowed): each
    rev has one nonce, `prev` and `recent` agree, acked nonces are there once."""
    at, wrong = {}, []

    def witness(rev, nonce, by):
        if at.setdefault(rev, nonce) != nonce:
            wrong.append(f"rev {rev} is {at[rev]} and, says rev {by}, {nonce}")
    for doc in docs:
        rev = doc["rev"]
        recent = [(int(e.split(":")[0]), e.split(":")[1]) for e in doc["recent"]]
        if [r for r, _ in recent] != list(range(rev - len(recent) + 1, rev + 1)):
            wrong.append(f"recent of rev {rev} has gaps: {doc['recent']}")
        witness(rev, doc["nonce"], rev)
        if doc.get("prev") is not None:
            witness(rev - 1, doc["prev"], rev)
        for known, nonce in recent:
            witness(known, nonce, rev)
    for nonce in acked:
        count = list(at.values()).count(nonce)
        if count != 1:
            wrong.append(f"acknowledged {nonce} is there {count} times")
    return wrong


def check_counter(ops, final, start=0):
    """What is wrong with incr(arg)=result operations, arg > 0, ending at `final`."""
    sure = [op for op in ops if op.result is not UNKNOWN]
    maybe = [op.arg for op in ops if op.result is UNKNOWN]
    sums, wrong = {start + sum(op.arg for op in sure)}, []
    for by in maybe:
        sums |= {total + by for total in sums}
    if final not in sums:
        wrong.append(f"ends at {final}, not one of {sorted(sums)[:9]}")
    results = [op.result for op in sure]
    if len(set(results)) != len(results):
        wrong.append(f"two increments read the same: {sorted(results)}")
    wrong += [f"{b} came after {a}, yet counts less" for a in sure for b in sure
              if a.end < b.start and b.result <= a.result]
    return wrong


def check_lock(intervals, effects=()):
    """What is wrong with holdings (start, end, token), as their holders believed them,
    and with the tokens of guarded effects in the order in which they took place."""
    wrong, held = [], sorted(intervals)
    for (_, end, token), (start, _, later) in zip(held, held[1:]):
        if start < end:
            wrong.append(f"tokens {token} and {later} were held at once")
        if later <= token:
            wrong.append(f"token {later} came after {token}")
    wrong += [f"an effect of token {b} after one of {a}"
              for a, b in zip(effects, effects[1:]) if b < a]
    return wrong


class Register:
    """read()=value, write(value), cas((old, new))=True or False."""

    first = None

    def step(self, state, op):
        """The state after `op`, or raises ValueError where its result is impossible."""
        if op.name == "write":
            return op.arg
        if op.name == "read":
            return self.expect(op, state, state)
        hit = state == op.arg[0]
        return self.expect(op, hit, op.arg[1] if hit else state)

    def expect(self, op, result, state):
        if op.result not in (UNKNOWN, result):
            raise ValueError
        return state


class Lock(Register):
    """acquire()=token and release(token); tokens grow; state: (holder, last token)."""

    first = (None, 0)

    def step(self, state, op):
        holder, last = state
        if op.name == "acquire":
            token = last + 1 if op.result is UNKNOWN else op.result
            if holder is not None or token <= last:
                raise ValueError
            return token, token
        if holder != op.arg:
            raise ValueError
        return None, last


def linearizable(ops, model):
    """Whether one order of `ops` within their times is legal for `model` (Wing-Gong).

    Unknown ones may stand anywhere after their start, or nowhere. For some 25 ops."""
    ops, tried = sorted(ops, key=lambda op: op.start), set()
    sure = frozenset(i for i, op in enumerate(ops) if op.result is not UNKNOWN)

    def search(left, state):
        if not left & sure:
            return True
        if (left, state) in tried:
            return False
        tried.add((left, state))
        until = min(ops[i].end for i in left)
        for i in left:
            if ops[i].start > until:
                continue
            try:
                after = model.step(state, ops[i])
            except ValueError:
                continue
            if search(left - {i}, after):
                return True
        return False
    return search(frozenset(range(len(ops))), model.first)


def ops_of(text):
    """Ops from "start end name arg result", one a line; '?' is an unknown outcome."""
    ops = []
    for n, line in enumerate(text.strip().splitlines()):
        start, end, name, arg, result = line.split()
        lost = result == "?"
        ops.append(Op(n, name, eval(arg), start=int(start),
                      end=FOREVER if lost else int(end),
                      result=UNKNOWN if lost else eval(result)))
    return ops


def test_a_history_records_what_was_asked_answered_and_left_open():
    h = History(clock=iter(range(9)).__next__)
    first, second, third = (h.invoke("p", "incr", n) for n in (1, 2, 3))
    h.ok(second, 5)
    h.unknown(first)
    h.fail(third)
    assert [(op.arg, op.start, op.end) for op in h.named("incr")] == [
        (1, 0, FOREVER), (2, 1, 3)]


def test_a_history_takes_refusals_as_not_done_and_lost_answers_as_open():
    h = History()

    def raises(error):
        raise error
    with pytest.raises(t.Held):
        h.run("p", "acquire", None, lambda: raises(t.Held("no")))
    with pytest.raises(t.Unknown):
        h.run("p", "acquire", None, lambda: raises(t.Unknown("?")))
    assert h.run("p", "acquire", None, lambda: 7) == 7
    assert [op.result for op in h.ops] == [UNKNOWN, 7]


def test_a_chain_of_stamped_records_is_a_witness():
    docs = written(*"abcdef", keep=3)
    assert check_chain(docs, acked="abcdef") == []
    assert check_chain([docs[5], docs[1], docs[1]]) == []


@pytest.mark.parametrize("docs, acked, words", [
    (written("a", "b") + written("a", "c"), "", "rev 2 is b and"),
    (written("a", "b")[:1] + written("x", "b")[1:], "", "rev 1 is a and"),
    (written("a", "b"), "c", "c is there 0 times"),
    (written("a", "b", "a"), "a", "a is there 2 times"),
    ([{**written("a", "b")[1], "recent": ["1:a", "3:b"]}], "", "gaps"),
])
def test_a_chain_with_a_fork_a_gap_or_a_lost_write_is_rejected(docs, acked, words):
    assert any(words in line for line in check_chain(docs, acked))


@pytest.mark.parametrize("ops, final, good", [
    ("0 1 incr 1 1\n2 3 incr 1 2", 2, True),
    ("0 1 incr 1 1\n2 3 incr 1 ?", 1, True),
    ("0 1 incr 1 1\n2 3 incr 1 ?", 2, True),
    ("0 1 incr 1 1\n2 3 incr 1 ?", 3, False),  # applied twice
    ("0 1 incr 1 1\n2 3 incr 1 2", 1, False),  # lost
    ("0 5 incr 1 1\n2 3 incr 1 1", 2, False),  # both read 0
    ("0 1 incr 1 2\n2 3 incr 1 1", 2, False),  # the later one counts less
])
def test_a_counter_that_lost_or_doubled_an_increment_is_rejected(ops, final, good):
    assert (check_counter(ops_of(ops), final) == []) is good


@pytest.mark.parametrize("intervals, effects, good", [
    ([(0, 2, 1), (2, 4, 2), (5, 6, 7)], [1, 1, 2, 7], True),
    ([(0, 3, 1), (2, 4, 2)], [], False),  # two at once
    ([(0, 2, 2), (3, 4, 2)], [], False),  # a token twice
    ([(0, 2, 2), (3, 4, 1)], [], False),
    ([(0, 2, 1), (3, 4, 2)], [1, 2, 1], False),  # a stale holder's effect
])
def test_a_lock_held_twice_or_by_a_stale_holder_is_rejected(intervals, effects, good):
    assert (check_lock(intervals, effects) == []) is good


@pytest.mark.parametrize("ops, good", [
    ("0 1 write 1 None\n2 3 read 0 1", True),
    ("0 1 write 1 None\n2 3 read 0 None", False),  # a stale read
    ("0 9 write 1 None\n1 2 read 0 1\n3 4 read 0 None", False),  # back in time
    ("0 9 write 1 None\n1 2 read 0 None\n3 4 read 0 1", True),
    ("0 1 write 1 ?\n2 3 read 0 None\n4 5 read 0 1", True),  # it landed late
    ("0 1 write 1 ?\n2 3 read 0 1\n4 5 read 0 None", False),
    ("0 5 cas (None,1) True\n1 6 cas (None,2) True", False),  # two winners
    ("0 5 cas (None,1) True\n1 6 cas (None,2) False", True),
    ("0 1 cas (None,1) ?\n2 6 cas (None,2) True\n7 8 read 0 2", True),
    ("0 1 write 1 None\n2 3 write 2 None\n4 5 cas (1,3) True", False),
    ("4 5 write 1 ?\n1 2 read 0 1", False),  # read before it was asked
])
def test_a_register_is_linearizable_or_found_not_to_be(ops, good):
    assert linearizable(ops_of(ops), Register()) is good


@pytest.mark.parametrize("ops, good", [
    ("0 1 acquire 0 1\n2 3 release 1 None\n4 5 acquire 0 2", True),
    ("0 1 acquire 0 1\n2 3 acquire 0 2", False),  # two holders
    ("0 1 acquire 0 1\n2 3 release 1 ?\n4 5 acquire 0 2", True),
    ("0 1 acquire 0 ?\n2 3 acquire 0 1", True),  # the lost one never happened
    ("0 1 acquire 0 1\n2 9 release 1 None\n3 4 acquire 0 1", False),  # a token twice
    ("0 1 acquire 0 1\n2 3 release 1 None\n4 5 release 1 None", False),
])
def test_a_lock_is_linearizable_or_found_not_to_be(ops, good):
    assert linearizable(ops_of(ops), Lock()) is good


def test_the_search_ends_soon_on_a_wide_history():
    ops = [Op(n, "write", n, start=0, end=100, result=None) for n in range(12)]
    ops += [Op(n, "read", start=101 + n, end=101 + n, result=7) for n in range(3)]
    assert linearizable(ops, Register())
    ops.append(Op(99, "read", start=200, end=201, result=8))
    assert not linearizable(ops, Register())


# == 4. Wire ===========================================================
#
# Signatures against the published vectors and against botocore; dates, ETags, XML.


def wire_at(amz_date):
    return calendar.timegm(time.strptime(amz_date, "%Y%m%dT%H%M%SZ"))


def wire_keys(vector):
    return tracecraft.Keys(vector["access_key"], vector["secret_key"],
                           token=vector["token"] or "")


@pytest.mark.parametrize("vector", SIGV4_VECTORS, ids=lambda v: v["name"])
def test_signatures_are_those_that_aws_published(vector):
    common = dict(path=vector["path"], query=vector["query"], region=vector["region"],
                  credentials=wire_keys(vector), at=wire_at(vector["amz_date"]))
    host = dict(vector["headers"])["Host"]
    if vector["expires"]:
        query = tracecraft.presign(vector["method"], host=host, **common,
                                   expires=vector["expires"])
        assert query.endswith("&X-Amz-Signature=" + vector["signature"])
        return
    digest = hashlib.sha256(vector["body"]).hexdigest()
    request = tracecraft.canonical_request(
        vector["method"], vector["path"], query=vector["query"],
        headers=vector["headers"], payload_hash=digest)
    assert request == vector["canonical_request"]
    headers = tracecraft.sign(vector["method"], host=host, headers=vector["headers"],
                              payload_hash=digest, service=vector["service"], **common)
    assert headers["authorization"].endswith("Signature=" + vector["signature"])


WIRE_CHARS = "abz09 +%~&=?#/.-_*'()!$,:;@[]{}|\\^\"<>\u00fc\u4f60\U0001f600"


def wire_text(rng, least, most):
    return "".join(rng.choice(WIRE_CHARS) for _ in range(rng.randint(least, most)))


def wire_request(rng):
    """A random request in the shapes that S3 clients make."""
    bucket, base = "bucket-1", rng.choice(["s3.eu-west-1.amazonaws.com", "localhost:9000",
                                           "[::1]:8080", "example.org"])
    key = wire_text(rng, 0, 20).lstrip("/").replace("//", "/")
    virtual = base.endswith(".com") and rng.random() < 0.5
    query = [(rng.choice(["prefix", "a", "b", "uploads", "start-after"]),
              wire_text(rng, 0, 6)) for _ in range(rng.randint(0, 4))]
    headers = {}
    if rng.random() < 0.4:
        headers[rng.choice(["If-Match", "If-None-Match"])] = rng.choice(
            ['"0123"', "*", "bare"])
    if rng.random() < 0.3:
        headers["Range"] = "bytes=0-9"
    return dict(method=rng.choice(["GET", "PUT", "HEAD", "POST", "DELETE"]),
                host=f"{bucket}.{base}" if virtual else base,
                path=f"/{key}" if virtual else f"/{bucket}/{key}", query=query,
                headers=headers, token=rng.choice(["", "tok+en/=="]),
                region=rng.choice(["eu-west-1", "us-east-1", "auto"]),
                at=rng.randint(10**9, 2 * 10**9),
                body=rng.choice([b"", b"x", os.urandom(9)]),
                unsigned=rng.random() < 0.3)


def botocore_signature(case, monkeypatch, expires=None):
    """(Authorization header) or (query) that botocore makes of the same request."""
    import datetime
    from botocore import auth, awsrequest, config, credentials
    fixed = datetime.datetime.fromtimestamp(case["at"], datetime.timezone.utc)

    class Frozen(datetime.datetime):
        @classmethod
        def utcnow(cls):
            return fixed.replace(tzinfo=None)

        @classmethod
        def now(cls, tz=None):
            return fixed if tz else fixed.replace(tzinfo=None)

    monkeypatch.setattr(auth.datetime, "datetime", Frozen)
    if hasattr(auth, "get_current_datetime"):
        monkeypatch.setattr(auth, "get_current_datetime",
                            lambda remove_tzinfo=True: fixed.replace(tzinfo=None))
    keys = credentials.Credentials("AKID", "secret/+key", case["token"] or None)
    url = f"https://{case['host']}{tracecraft.uri_escape(case['path'], True)}"
    if case["query"]:
        url += "?" + tracecraft.canonical_query(case["query"])
    request = awsrequest.AWSRequest(case["method"], url, headers=case["headers"],
                                    data=case["body"])
    if case["unsigned"]:
        s3 = {"payload_signing_enabled": False}
        request.context["client_config"] = config.Config(s3=s3)
    if expires:
        auth.S3SigV4QueryAuth(keys, "s3", case["region"], expires).add_auth(request)
        return request.url.partition("?")[2]
    auth.S3SigV4Auth(keys, "s3", case["region"]).add_auth(request)
    return request.headers["Authorization"]


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.soak)])
def test_random_requests_are_signed_as_botocore_signs_them(monkeypatch, count):
    pytest.importorskip("botocore")
    seed = int(os.environ.get("TRACECRAFT_TEST_SEED") or random.randrange(10**9))
    print("seed", seed)
    rng = random.Random(seed)
    for number in range(count):
        case = wire_request(rng)
        keys = tracecraft.Keys("AKID", "secret/+key", token=case["token"])
        digest = tracecraft.UNSIGNED if case["unsigned"] else \
            hashlib.sha256(case["body"]).hexdigest()
        mine = tracecraft.sign(
            case["method"], host=case["host"], path=case["path"], query=case["query"],
            headers=case["headers"], payload_hash=digest, credentials=keys,
            region=case["region"], at=case["at"])["authorization"]
        theirs = botocore_signature(case, monkeypatch)
        assert mine == theirs, (seed, number, case)


def test_random_presigned_urls_are_those_of_botocore(monkeypatch):
    pytest.importorskip("botocore")
    from urllib.parse import parse_qsl
    seed = int(os.environ.get("TRACECRAFT_TEST_SEED") or random.randrange(10**9))
    print("seed", seed)
    rng = random.Random(seed)
    for number in range(500):
        case = dict(wire_request(rng), headers={}, unsigned=False, body=b"")
        case["query"] = list(dict(case["query"]).items())  # botocore keeps one of a name
        keys = tracecraft.Keys("AKID", "secret/+key", token=case["token"])
        mine = tracecraft.presign(
            case["method"], host=case["host"], path=case["path"], query=case["query"],
            credentials=keys, region=case["region"], at=case["at"], expires=900)
        theirs = botocore_signature(case, monkeypatch, expires=900)
        assert sorted(parse_qsl(mine, True)) == sorted(parse_qsl(theirs, True)), \
            (seed, number, case)


def test_keys_show_no_secret():
    keys = tracecraft.Keys("AKID", "topsecret", token="toktok", source="test")
    assert "topsecret" not in repr(keys) and "toktok" not in repr(keys)


@pytest.mark.parametrize("text, seconds", [
    ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777.0), ("", None), (None, None),
    ("yesterday", None), ("Sun, 06 Xyz 1994 08:49:37 GMT", None)])
def test_http_dates(text, seconds):
    assert tracecraft.parse_date(text) == seconds


@pytest.mark.parametrize("a, b, same", [
    ('"x"', "x", True), ('W/"x"', '"x"', True), ('"x"', '"y"', False),
    (None, None, False), ("", "", False)])
def test_etags_compare_without_quotes(a, b, same):
    assert tracecraft.same_etag(a, b) is same


@pytest.mark.parametrize("data", [
    b"", b"<a>", b"not xml", b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
    b"<a>&b;</a>", "<a>\u00fc</a>".encode("latin-1"), "<a/>".encode("utf-16"),
    b"<a>" * 100_000], ids=range(8))
def test_what_is_not_plain_utf8_xml_is_corrupt(data):
    with pytest.raises(tracecraft.Corrupt):
        tracecraft.xml_root(data)


def test_xml_beyond_the_limit_is_corrupt_and_not_parsed():
    with pytest.raises(tracecraft.Corrupt):
        tracecraft.xml_root(b"<a>" + b" " * tracecraft.MAX_XML + b"</a>")


def test_an_error_document_is_read_and_nothing_else_is():
    data = b'<Error xmlns="x"><Code>NoSuchKey</Code><Message/></Error>'
    assert tracecraft.xml_error(data) == {"Code": "NoSuchKey", "Message": ""}
    assert tracecraft.xml_error(b"<html><Code>no</Code></html>") == {}
    assert tracecraft.xml_error(b"") == {}


# == 5. HTTP ===========================================================
#
# One request over real sockets: a server that plays back bytes, proxies, TLS.


OK_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: \"x\"\r\n\r\nok"


class Playback:
    """A server that answers each request with the next of `answers`, as they stand.

    b"" closes without an answer. `requests` are the heads it saw, with their bodies.
    """

    def __init__(self, *answers, tls=None, hold=0.0, family=socket.AF_INET):
        self.answers, self.requests, self.connections = list(answers), [], 0
        self.hold, self.tls = hold, tls
        self.socket = socket.socket(family)
        self.socket.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self.socket.listen(20)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.run, daemon=True).start()

    @property
    def url(self):
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def run(self):
        while True:
            try:
                conn, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.talk, args=(conn,), daemon=True).start()

    def talk(self, conn):
        try:
            if self.tls:
                conn = self.tls.wrap_socket(conn, server_side=True)
            self.connections += 1
            with conn:
                while self.turn(conn):
                    pass
        except OSError:
            return

    def turn(self, conn):
        data = b""
        while b"\r\n\r\n" not in data:
            more = conn.recv(65536)
            if not more:
                return False
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        size = [int(line.split(b":")[1]) for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")]
        while size and len(body) < size[0]:
            body += conn.recv(65536)
        self.requests.append((head.decode("latin-1"), body))
        answer = self.answers.pop(0) if self.answers else b""
        time.sleep(self.hold)
        conn.sendall(answer)
        return bool(answer) and b"Connection: close" not in answer

    def __enter__(self):
        return self

    def __exit__(self, *why):
        self.socket.close()


@pytest.fixture(params=["Http", "RequestsHttp"])
def link_to(request):
    """link_to(origin, **options): either of the two transports."""
    if request.param == "RequestsHttp":
        pytest.importorskip("requests")
    links = []

    def make(origin, **options):
        links.append(getattr(tracecraft, request.param)(origin, **options))
        return links[-1]
    yield make
    for link in links:
        link.close()


def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_an_answer_has_status_headers_body_and_times(link_to):
    with Playback(OK_ANSWER) as server:
        answer = link_to(server.url).send("GET", "/a?b=", headers={"x-y": "1"})
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, b"ok", '"x"')
    assert answer.sent_at <= answer.got_at
    head = server.requests[0][0]
    assert head.startswith("GET /a?b= HTTP/1.1\r\n") and "x-y: 1" in head.lower()
    assert head.lower().count("\r\nhost:") == 1


def test_the_connection_is_kept(link_to):
    with Playback(OK_ANSWER, OK_ANSWER, OK_ANSWER) as server:
        link = link_to(server.url)
        for _ in range(3):
            link.send("GET", "/")
    assert server.connections == 1 and link.sent == 3


def test_an_empty_put_says_that_it_is_empty(link_to):
    with Playback(OK_ANSWER) as server:
        link_to(server.url).send("PUT", "/")
    assert "content-length: 0" in server.requests[0][0].lower()


def test_a_file_is_sent_and_told_of(link_to, tmp_path):
    path, seen = tmp_path / "f", []
    path.write_bytes(b"0123456789")
    body = tracecraft.Slice(str(path), 2, size=5, sent=seen.append)
    body.rewind()
    with Playback(OK_ANSWER) as server:
        link_to(server.url).send("PUT", "/", body=body)
    assert server.requests[0][1] == b"23456" and sum(seen) == 5


def test_a_file_that_shrinks_is_a_conflict(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"01")
    with pytest.raises(tracecraft.Conflict):
        tracecraft.Slice(str(path), 0, size=5).digests()


@pytest.mark.parametrize("cause", ["refused", "name", "tls", "proxy"])
def test_what_never_left_is_not_sent(link_to, cause):
    port = closed_port()
    origin, environ = {
        "refused": (f"http://127.0.0.1:{port}", {}),
        "name": ("http://no-such-host.invalid", {}),
        "tls": (f"https://127.0.0.1:{port}", {}),
        "proxy": ("https://example.org", {"HTTPS_PROXY": f"http://127.0.0.1:{port}"}),
    }[cause]
    with pytest.raises(tracecraft.NotSent) as caught:
        link_to(origin, environ=environ).send("PUT", "/")
    assert isinstance(caught.value, tracecraft.Unavailable) and caught.value.hint


@pytest.mark.parametrize("answer", [
    b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"SSH-2.0-x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nab",
], ids=range(5))
def test_what_was_sent_and_not_answered_is_lost(link_to, answer):
    with Playback(answer) as server:
        server.answers = [answer]
        link = link_to(server.url, timeout=1)
        with pytest.raises(tracecraft.Lost) as caught:
            link.send("PUT", "/", body=b"x")
    assert isinstance(caught.value, tracecraft.Unknown) and len(server.requests) == 1


def test_silence_is_lost_when_the_time_is_up(link_to):
    with Playback(OK_ANSWER, hold=3) as server:
        began = time.monotonic()
        with pytest.raises(tracecraft.Lost):
            link_to(server.url, timeout=0.3).send("PUT", "/", body=b"x")
        assert time.monotonic() - began < 2


def kill_idle(server, link):
    """One good request, after which the server shuts the connection for the next."""
    server.answers = [OK_ANSWER, b"", OK_ANSWER]
    link.send("GET", "/first")


def test_an_idle_connection_that_died_is_replaced_for_reading():
    with Playback() as server:
        link = tracecraft.Http(server.url)
        kill_idle(server, link)
        assert link.send("GET", "/second").body == b"ok"
    assert [head.split()[1] for head, _ in server.requests] == [
        "/first", "/second", "/second"]


def test_and_a_write_on_it_is_lost_never_sent_twice():
    with Playback() as server:
        link = tracecraft.Http(server.url)
        kill_idle(server, link)
        with pytest.raises(tracecraft.Lost):
            link.send("PUT", "/second", body=b"x")
    assert len(server.requests) == 2


def test_a_connection_closed_while_idle_is_noticed_before_a_write():
    closing = OK_ANSWER.replace(b"\r\n\r\n", b"\r\nX: Connection: closed\r\n\r\n")
    with Playback(closing, OK_ANSWER) as server:  # it closes, without announcing it
        link = tracecraft.Http(server.url)
        link.send("GET", "/")
        time.sleep(0.1)
        assert link.send("PUT", "/", body=b"x").status == 200
    assert server.connections == 2


def test_a_body_is_cut_at_the_limit(link_to):
    big = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000
    with Playback(big, big) as server:
        answer = link_to(server.url).send("GET", "/", limit=10)
        assert (answer.body, answer.truncated) == (b"x" * 10, True)
        answer = link_to(server.url).send("GET", "/", limit=100000)
        assert (len(answer.body), answer.truncated) == (100000, False)


def test_a_sink_gets_the_body_in_pieces_and_may_decline(link_to):
    with Playback(OK_ANSWER, OK_ANSWER) as server:
        link, parts = link_to(server.url), []
        answer = link.send("GET", "/", sink=lambda answer: parts.append)
        assert (b"".join(parts), answer.body) == (b"ok", b"")
        assert link.send("GET", "/", sink=lambda answer: None).body == b"ok"


def test_many_threads_share_a_link(link_to):
    with Playback(*[OK_ANSWER] * 200) as server:
        link, seen = link_to(server.url), []
        threads = [threading.Thread(target=lambda: seen.extend(
            link.send("GET", "/").status for _ in range(20))) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [200] * 200 and server.connections <= 10 + 1


def test_the_trace_shows_requests_and_no_signature(link_to):
    lines = []
    with Playback(OK_ANSWER) as server:
        link_to(server.url, trace=lines.append).send(
            "GET", "/b/k?X-Amz-Signature=beef", headers={"authorization": "secret"})
    assert lines[0].startswith("GET /b/k 200 ") and "B" in lines[0]
    assert "beef" not in lines[0] and "secret" not in lines[0]


def test_ipv6(link_to):
    try:
        server = Playback(OK_ANSWER, family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert link_to(f"http://[::1]:{server.port}").send("GET", "/").status == 200
    assert f"host: [::1]:{server.port}" in server.requests[0][0].lower()


@pytest.mark.parametrize("origin", ["ftp://x", "nonsense", "http://", "https:///p"])
def test_nonsense_is_no_origin(origin):
    with pytest.raises(tracecraft.Usage):
        tracecraft.Http(origin)


# -- proxies -----------------------------------------------------------


@pytest.mark.parametrize("origin, environ, proxy", [
    ("https://a.b", {}, ""),
    ("https://a.b", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
    ("https://a.b", {"https_proxy": "p:1"}, "http://p:1"),
    ("https://a.b", {"HTTP_PROXY": "http://p:1"}, ""),
    ("http://a.b", {"ALL_PROXY": "socks5://p:1"}, "socks5://p:1"),
    ("http://a.b", {"HTTP_PROXY": "p", "NO_PROXY": "*"}, ""),
    ("http://a.b", {"HTTP_PROXY": "p", "NO_PROXY": "x, .b"}, ""),
    ("http://a.b", {"HTTP_PROXY": "p", "no_proxy": "a.b:80,a.b:81"}, "http://p"),
    ("http://a.b:81", {"HTTP_PROXY": "p", "no_proxy": "a.b:80,a.b:81"}, ""),
    ("http://ab", {"HTTP_PROXY": "p", "NO_PROXY": "b"}, "http://p"),
    ("http://10.1.2.3", {"HTTP_PROXY": "p", "NO_PROXY": "10.0.0.0/8"}, ""),
    ("http://[::1]:9", {"HTTP_PROXY": "p", "NO_PROXY": "::1"}, ""),
])
def test_the_environment_chooses_the_proxy(origin, environ, proxy):
    assert tracecraft.proxy_for(origin, environ) == proxy


def test_a_plain_request_goes_through_the_proxy_with_its_password(link_to):
    with Playback(OK_ANSWER) as proxy:
        environ = {"HTTP_PROXY": f"http://us%40er:p%3Aw@127.0.0.1:{proxy.port}"}
        link_to("http://store.invalid", environ=environ).send("GET", "/k")
    head = proxy.requests[0][0]
    assert head.startswith("GET http://store.invalid/k HTTP/1.1")
    assert "Proxy-Authorization: Basic dXNAZXI6cDp3" in head
    assert "host: store.invalid" in head.lower()


def test_a_proxy_that_refuses_to_connect_means_not_sent(link_to):
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with Playback(refusal) as proxy:
        environ = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.port}"}
        with pytest.raises(tracecraft.NotSent, match="407|[Tt]unnel"):
            link_to("https://store.invalid", environ=environ).send("PUT", "/k")
    assert proxy.requests[0][0].startswith("CONNECT store.invalid:443")


def test_a_socks_proxy_wants_requests():
    pytest.importorskip("requests")
    link = tracecraft.open_http("http://a", environ={"ALL_PROXY": "socks5://p:1"})
    assert isinstance(link, tracecraft.RequestsHttp)
    assert isinstance(tracecraft.open_http("http://a"), tracecraft.Http)


def test_requests_not_installed_is_said_clearly(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "requests", None)
    with pytest.raises(tracecraft.Usage, match="not installed") as caught:
        tracecraft.open_http("http://a", environ={"TRACECRAFT_HTTP": "requests"})
    assert "pip install" in caught.value.hint


def test_an_unknown_transport_is_refused():
    with pytest.raises(tracecraft.Usage):
        tracecraft.open_http("http://a", environ={"TRACECRAFT_HTTP": "curl"})


# -- TLS ---------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """(path of a certificate for 127.0.0.1, server-side SSLContext)."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    return make_authority(tmp_path_factory.mktemp("ca"))


def make_authority(folder):
    """A certificate for 127.0.0.1 that signs itself, and a context to serve it."""
    pem, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days",
                    "2", "-keyout", key, "-out", pem, "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True,
                   capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)
    return pem, context


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_ca_named_in_the_environment_is_trusted(link_to, authority, name):
    with Playback(OK_ANSWER, tls=authority[1]) as server:
        link = link_to(server.url, environ={name: str(authority[0])})
        assert link.send("GET", "/").status == 200


def test_a_hashed_directory_of_cas_is_trusted(link_to, authority, tmp_path):
    done = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", authority[0]],
                          check=True, capture_output=True, text=True)
    shutil.copy(authority[0], tmp_path / f"{done.stdout.strip()}.0")
    with Playback(OK_ANSWER, tls=authority[1]) as server:
        link = link_to(server.url, environ={"SSL_CERT_DIR": str(tmp_path)})
        assert link.send("GET", "/").status == 200


def test_an_unknown_ca_is_refused_before_anything_is_sent(link_to, authority):
    with Playback(OK_ANSWER, tls=authority[1]) as server:
        with pytest.raises(tracecraft.NotSent) as caught:
            link_to(server.url).send("PUT", "/", headers={"authorization": "secret"})
    assert server.requests == [] and "AWS_CA_BUNDLE" in caught.value.hint


def test_a_missing_bundle_is_a_wrong_setting(authority):
    with Playback(OK_ANSWER, tls=authority[1]) as server:
        link = tracecraft.Http(server.url, environ={"AWS_CA_BUNDLE": "/no/such.pem"})
        with pytest.raises(tracecraft.Usage, match="AWS_CA_BUNDLE"):
            link.send("GET", "/")


# -- backoff and clock -------------------------------------------------


def test_backoff_is_jittered_and_bounded():
    assert tracecraft.backoff(0, lambda: 0.0) == 0
    assert tracecraft.backoff(99, lambda: 1.0) == 8
    rng = random.Random(1)
    assert all(0 <= tracecraft.backoff(n, rng.random) <= 8 for n in range(50))


def dated(sent, got, date, **headers):
    text = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(date))
    return tracecraft.Answer(200, {"date": text, **headers}, sent_at=sent, got_at=got)


@pytest.mark.parametrize("skew", [0, 0.4, -0.7, 3600, -90000.3])
def test_the_clock_brackets_the_offset(skew):
    rng, clock = random.Random(7), tracecraft.Clock()
    for number in range(200):
        sent = 1e9 + number * 1.37
        got = sent + rng.uniform(0.01, 0.2)
        clock.observe(dated(sent, got, int(rng.uniform(sent, got) + skew)))
    assert abs(clock.offset() - skew) < 0.2 or (clock.offset() == 0 and abs(skew) < 1)


def test_cached_answers_do_not_set_the_clock():
    clock = tracecraft.Clock()
    clock.observe(dated(1e9, 1e9, 2e9, age="120"))
    assert clock.offset() == 0
    clock.observe(dated(1e9, 1e9, 1e9 + 500, age="0"))
    assert 499 <= clock.offset() <= 501


def test_a_clock_that_was_set_is_followed():
    clock = tracecraft.Clock()
    clock.observe(dated(1e9, 1e9, 1e9))
    clock.observe(dated(1e9, 1e9, 1e9 + 3600))
    assert 3599 <= clock.offset() <= 3601


def test_a_fork_does_not_share_connections():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    with Playback(OK_ANSWER, OK_ANSWER, OK_ANSWER) as server:
        link = tracecraft.Http(server.url)
        link.send("GET", "/")
        pid = os.fork()
        if not pid:
            os._exit(0 if link.send("GET", "/").status == 200 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        link.send("GET", "/")
    assert server.connections == 2


# == 6. Stores =========================================================
#
# The directory store, with real processes, real kills and a real disk.


def spawn(target, *args):
    """A started process; forked where there is fork, so that tests stay quick."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    return process


def join_all(processes, seconds=60):
    for process in processes:
        process.join(seconds)
    assert [p.exitcode for p in processes] == [0] * len(processes)


@pytest.fixture
def store(tmp_path):
    store = tracecraft.DirectoryStore(str(tmp_path / "root"), "p")
    yield store
    store.close()


def other(store):
    """A second store on the same directory: what another process would have."""
    return tracecraft.DirectoryStore(store.bucket, store.project)


def keys(store, prefix="", **options):
    return [entry.key for entry in store.list(prefix, **options).entries]


def disk(store, key):
    return os.path.join(store.bucket, store.project, *key.split("/"))


# -- reading and writing -----------------------------------------------


@pytest.mark.brief
def test_what_was_put_is_got_with_etag_and_times(store):
    stamp = store.put("a/b.json", b"one")
    found = store.get("a/b.json")
    assert (found.body, found.etag, found.size) == (b"one", stamp.etag, 3)
    assert found.etag.startswith('"') and found.etag.endswith('"')
    assert found.modified == stamp.modified and 0 <= found.age < 5


@pytest.mark.brief
def test_files_are_the_layout(store):
    store.put("steps/a/claim.json", b"{}\n")
    with open(disk(store, "steps/a/claim.json"), "rb") as file:
        assert file.read() == b"{}\n"


@pytest.mark.brief
def test_a_missing_key_is_not_found(store):
    for read in (store.get, store.head):
        with pytest.raises(tracecraft.NotFound):
            read("nothing/here.json")


@pytest.mark.brief
def test_reading_creates_no_store(store):
    with pytest.raises(tracecraft.NotFound):
        store.get("x")
    assert store.list("").entries == [] and store.clock() > 0
    assert not os.path.exists(store.bucket)


@pytest.mark.brief
def test_a_folder_is_no_object(store):
    store.put("a/b", b"1")
    with pytest.raises(tracecraft.NotFound):
        store.get("a")


@pytest.mark.brief
def test_get_says_not_modified(store):
    stamp = store.put("k", b"1")
    assert store.get("k", if_none_match=stamp.etag).body is None
    assert store.get("k", if_none_match='"other"').body == b"1"


@pytest.mark.brief
def test_get_returns_a_part(store):
    store.put("k", b"0123456789")
    assert store.get("k", start=3, limit=4).body == b"3456"
    big = bytes(range(256)) * 8192  # 2 MiB: beyond SMALL
    store.put("big", big)
    found = store.get("big", start=1_000_000, limit=7)
    assert found.body == big[1_000_000:1_000_007] and found.size == len(big)


@pytest.mark.brief
def test_head_has_size_and_etag_but_no_bytes(store):
    stamp = store.put("k", b"12345")
    found = store.head("k")
    assert (found.body, found.size, found.etag) == (b"", 5, stamp.etag)


@pytest.mark.brief
def test_create_refuses_what_exists(store):
    store.put("k", b"1", if_none_match=True)
    with pytest.raises(tracecraft.Moved):
        store.put("k", b"2", if_none_match=True)
    assert store.get("k").body == b"1"


@pytest.mark.parametrize("size", [3, (1 << 20) + 5])
@pytest.mark.brief
def test_a_replace_needs_the_etag_that_is_there(store, size):
    first = store.put("k", b"1" * size)
    second = store.put("k", b"2" * size, if_match=first.etag)
    assert second.etag != first.etag
    with pytest.raises(tracecraft.Moved):
        store.put("k", b"3" * size, if_match=first.etag)
    assert store.get("k").body == b"2" * size
    store.put("k", b"4", if_match=store.get("k").etag)


@pytest.mark.brief
def test_a_replace_of_an_absent_key_has_moved(store):
    with pytest.raises(tracecraft.Moved):
        store.put("k", b"1", if_match='"abc"')
    assert keys(store) == []


@pytest.mark.brief
def test_an_etag_without_quotes_matches_too(store):
    stamp = store.put("k", b"1")
    store.put("k", b"2", if_match=stamp.etag.strip('"'))


@pytest.mark.brief
def test_delete_takes_folders_along_and_may_be_repeated(store):
    store.put("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    store.put("a", b"now a file")
    assert keys(store) == ["a"]


@pytest.mark.brief
def test_a_folder_left_empty_by_a_crash_does_not_block_its_name(store):
    store.put("x", b"1")
    os.makedirs(disk(store, "a"))
    assert store.list("", delimiter="/").prefixes == []
    store.put("a", b"2", if_none_match=True)


@pytest.mark.brief
def test_age_never_is_negative(store):
    store.put("k", b"1")
    ahead = time.time() + 1000
    os.utime(disk(store, "k"), (ahead, ahead))
    assert store.get("k").age == 0.0


@pytest.mark.brief
def test_age_counts_by_the_clock_of_the_files(store):
    store.put("k", b"1")
    past = time.time() - 100
    os.utime(disk(store, "k"), (past, past))
    assert 99 < store.get("k").age < 105
    assert abs(store.offset()) < 1


@pytest.mark.brief
def test_a_document_is_readable_while_it_is_replaced(store):
    store.put("k", b"a" * 5000)
    stop, bad = threading.Event(), []

    def read():
        mine = other(store)
        while not stop.is_set():
            body = mine.get("k").body
            if len(body) != 5000 or len(set(body)) != 1:
                bad.append(body)
    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(200):
        store.put("k", b"ab"[turn % 2:turn % 2 + 1] * 5000)
    stop.set()
    for reader in readers:
        reader.join()
    assert bad == []


# -- races -------------------------------------------------------------


def _create_all(root, name, rounds, gate):
    store = tracecraft.DirectoryStore(root, "p")
    gate.wait()
    for turn in range(rounds):
        try:
            store.put(f"race/{turn}", name.encode(), if_none_match=True)
            store.put(f"won/{turn}/{name}", b"")
        except tracecraft.Moved:
            pass


def winners(store, rounds):
    assert len(keys(store, "race/")) == rounds
    for turn in range(rounds):
        won = keys(store, f"won/{turn}/")
        assert won == [f"won/{turn}/{store.get(f'race/{turn}').body.decode()}"]


@pytest.mark.brief
def test_of_8_processes_one_creates(store):
    gate = multiprocessing.Barrier(8)
    join_all([spawn(_create_all, store.bucket, f"w{n}", 25, gate) for n in range(8)])
    winners(store, 25)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.brief
def test_of_8_threads_one_creates(store, shared, monkeypatch):
    gate = threading.Barrier(8)
    if shared:
        monkeypatch.setattr(tracecraft, "DirectoryStore", lambda *_: store)
    threads = [threading.Thread(target=_create_all,
                                args=(store.bucket, f"w{n}", 25, gate))
               for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners(store, 25)


def _count(root, times):
    store = tracecraft.DirectoryStore(root, "p")
    for _ in range(times):
        while True:
            found = store.get("counter")
            try:
                store.put("counter", b"%d" % (int(found.body) + 1), if_match=found.etag)
                break
            except tracecraft.Moved:
                time.sleep(random.random() * 0.005)


@pytest.mark.brief
def test_a_counter_of_8_processes_loses_no_update(store):
    store.put("counter", b"0")
    join_all([spawn(_count, store.bucket, 25) for _ in range(8)])
    assert store.get("counter").body == b"200"


def _twins(root, name, gate):
    store = tracecraft.DirectoryStore(root, "p")
    gate.wait()
    try:
        store.put(name, b"1")
    except tracecraft.Conflict:
        pass


@pytest.mark.parametrize("names", [("Key", "kEY"), ("A/x", "a/y"), ("b", "b/c"),
                                   ("C/x", "c")])
@pytest.mark.brief
def test_racing_twins_leave_one(store, names):
    for turn in range(10):
        gate = multiprocessing.Barrier(2)
        join_all([spawn(_twins, store.bucket, f"{turn}/{name}", gate)
                  for name in names])
        assert len(keys(store, f"{turn}/")) == 1


def _put_forever(root, size):
    store, turn = tracecraft.DirectoryStore(root, "p"), 0
    while True:
        turn += 1
        store.put("doc", b"%08d" % turn * (size // 8))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9")
@pytest.mark.parametrize("size", [64, 400_000])
@pytest.mark.brief
def test_a_killed_writer_leaves_the_old_or_the_new_document(store, size):
    for turn in range(12):
        writer = spawn(_put_forever, store.bucket, size)
        time.sleep(0.05 + random.random() * 0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        if "doc" in keys(store):
            body = store.get("doc").body
            assert len(body) == size and body == body[:8] * (size // 8)
        store.put("after", b"%d" % turn)  # its locks died with it
    assert keys(store) == ["after", "doc"]


def _hold_lock(root, ready):
    store = tracecraft.DirectoryStore(root, "p")
    with store._tree.lock(disk(store, "k")):
        ready.set()
        time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.brief
def test_a_stopped_holder_of_a_lock_makes_others_busy_not_hang(store, monkeypatch):
    monkeypatch.setattr(tracecraft, "REQUEST_TIMEOUT", 0.3)
    ready = multiprocessing.Event()
    holder = spawn(_hold_lock, store.bucket, ready)
    assert ready.wait(10)
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(tracecraft.Busy):
        store.put("k", b"1")
    assert keys(store) == []
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    store.put("k", b"1")


# -- forking -----------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def in_child(act):
    """Run act() in a forked child; whether it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@needs_fork
@pytest.mark.brief
def test_a_child_does_not_share_its_parents_locks(store, monkeypatch):
    monkeypatch.setattr(tracecraft, "REQUEST_TIMEOUT", 0.3)
    store.put("k", b"1")
    with store._tree.lock(disk(store, "k")):
        assert in_child(lambda: pytest.raises(tracecraft.Busy, store.put, "k", b"2"))
    assert in_child(lambda: store.put("k", b"3"))
    assert store.get("k").body == b"3"


@needs_fork
@pytest.mark.brief
def test_a_fork_in_the_middle_of_a_threads_put_leaves_the_child_free(store):
    stop = threading.Event()

    def write():
        while not stop.is_set():
            store.put("k", b"x")
    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(in_child(lambda: store.put("k", b"child")) for _ in range(15))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@needs_fork
@pytest.mark.brief
def test_parent_and_children_count_with_one_inherited_store(store):
    store.put("counter", b"0")

    def count():
        for _ in range(20):
            while True:
                found = store.get("counter")
                try:
                    store.put("counter", b"%d" % (int(found.body) + 1),
                              if_match=found.etag)
                    break
                except tracecraft.Moved:
                    pass
    children = [spawn(count) for _ in range(3)]
    count()
    join_all(children)
    assert store.get("counter").body == b"80"


# -- names -------------------------------------------------------------


@pytest.mark.parametrize("first, second", [
    ("a/Key.json", "a/key.json"), ("Dir/x", "dir/y"), ("é/x", "É/y"),
    ("a/straße", "a/STRASSE"), ("caf\u00e9", "CAFE\u0301")])
@pytest.mark.brief
def test_keys_that_differ_only_in_case_are_refused(store, first, second):
    store.put(first, b"1")
    with pytest.raises(tracecraft.Conflict, match="case"):
        store.put(second, b"2")
    assert keys(store) == [first]


@pytest.mark.brief
def test_a_key_under_a_file_is_refused(store):
    store.put("a", b"1")
    for condition in ({}, {"if_none_match": True}):
        with pytest.raises(tracecraft.Conflict, match="under 'a'"):
            store.put("a/b/c", b"2", **condition)
    with pytest.raises(tracecraft.NotFound):
        store.get("a/b/c")
    store.delete("a/b/c")
    assert keys(store) == ["a"]


@pytest.mark.brief
def test_a_key_over_a_folder_is_refused(store):
    store.put("a/b", b"1")
    with pytest.raises(tracecraft.Conflict, match="directory"):
        store.put("a", b"2")
    store.delete("a")
    assert keys(store) == ["a/b"]


@pytest.mark.parametrize("key", ["", "a//b", "../x", "a/./b", "/etc/x", "a/..", "a\0b",
                                 ".tmp-1", "a/.tmp-x", "\ud800"])
@pytest.mark.brief
def test_keys_that_are_no_path_below_the_root_are_refused(store, key):
    for act in (store.get, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(tracecraft.Usage):
            act(key)


@pytest.mark.parametrize("project", ["", ".locks", "..", "a/../b", ".LOCKS"])
@pytest.mark.brief
def test_projects_that_are_no_folder_are_refused(tmp_path, project):
    with pytest.raises(tracecraft.Usage):
        tracecraft.DirectoryStore(str(tmp_path), project)


@pytest.mark.brief
def test_a_name_too_long_for_the_disk_is_refused(store):
    with pytest.raises(tracecraft.Usage):
        store.put("x" * 300, b"1")
    with pytest.raises(tracecraft.NotFound):
        store.get("x" * 300)


@pytest.mark.brief
def test_artifact_names_may_be_any_text(store):
    names = ["artifacts/s/#?&", "artifacts/s/ä ö", "artifacts/s/日本/a+b%20.txt"]
    for name in names:
        store.put(name, name.encode())
    assert keys(store, "artifacts/") == names
    assert store.get(names[0]).body == names[0].encode()


@pytest.mark.brief
def test_the_url_is_the_canonical_one(tmp_path):
    store = tracecraft.DirectoryStore(str(tmp_path / "a b") + "/../a b", "p q")
    here = tracecraft.url_path(str(tmp_path))
    assert store.url == f"file://{here}/a%20b/p%20q"


# -- listing -----------------------------------------------------------

MANY = ["a", "a-b", "a.b", "a/b", "a/b-c", "a/b/c", "a/b0", "a0", "b/1", "b/2", "c/x/y",
        "z", "é", "日"]
# "a" and "a/..." cannot live in one tree
TREE = [key for key in MANY if key not in ("a", "a/b")]


@pytest.fixture
def tree(store):
    for key in random.sample(TREE, len(TREE)):
        store.put(key, key.encode())
    return store


@pytest.mark.brief
def test_listing_is_in_the_byte_order_of_keys(tree):
    assert keys(tree) == sorted(TREE, key=str.encode)
    sizes = {entry.key: entry.size for entry in tree.list("").entries}
    assert sizes == {key: len(key.encode()) for key in TREE}
    assert {entry.etag for entry in tree.list("").entries} == {None}


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/b/", "b/", "c/x/", "nope",
                                    "nope/x", "z", "z/", "é"])
@pytest.mark.brief
def test_listing_agrees_with_its_definition(tree, prefix):
    for after in ["", *TREE, "a/", "a/b", "b", "zz"]:
        want = sorted(k for k in TREE if k.startswith(prefix) and k > after)
        assert keys(tree, prefix, start_after=after) == want
        for limit in (0, 1, 3, len(want)):
            page = tree.list(prefix, start_after=after, limit=limit)
            assert [e.key for e in page.entries] == want[:limit]
            assert page.truncated == (limit < len(want))


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "c/", "nope/"])
@pytest.mark.brief
def test_a_delimiter_folds_keys_into_prefixes(tree, prefix):
    for after in ["", "a/b/c", "b/1", "b/2"]:
        plain, folds = [], []
        for key in sorted(TREE):
            if key.startswith(prefix) and key > after:
                head, slash, _ = key[len(prefix):].partition("/")
                (folds if slash else plain).append(prefix + head + slash)
        page = tree.list(prefix, start_after=after, delimiter="/")
        assert [e.key for e in page.entries] == plain
        assert page.prefixes == sorted(set(folds))


@pytest.mark.brief
def test_temporary_files_are_no_keys(store):
    store.put("a/b", b"1")
    for name in (".tmp-1-x", "a/.tmp-2-y"):
        with open(disk(store, name), "wb") as file:
            file.write(b"half")
    os.makedirs(disk(store, "c"))
    with open(disk(store, "c/.tmp-3-z"), "wb"):
        pass
    assert keys(store) == ["a/b"]
    assert store.list("", delimiter="/").prefixes == ["a/"]


@pytest.mark.brief
def test_old_temporary_files_are_swept_by_a_writer(store):
    store.put("a/b", b"1")
    old, new = disk(store, "a/.tmp-1-old"), disk(store, "a/.tmp-1-new")
    for name in (old, new):
        with open(name, "wb"):
            pass
    os.utime(old, (1, 1))
    store.put("a/c", b"1")
    assert not os.path.exists(old) and os.path.exists(new)


@pytest.mark.brief
def test_files_whose_name_is_no_text_are_passed_over(store):
    store.put("a", b"1")
    try:
        os.close(os.open(os.fsencode(disk(store, "")) + b"\xff", os.O_CREAT))
    except OSError:
        pytest.skip("this file system takes only text")
    assert keys(store) == ["a"]


@pytest.mark.brief
def test_lock_files_are_outside_the_layout_and_stay(store):
    store.put("k", b"1")
    locks = os.path.join(store.bucket, ".locks")
    before = sorted(os.listdir(locks))
    store.delete("k")
    assert sorted(os.listdir(locks)) == before and len(before) <= 258
    assert keys(store) == []


# -- disks that refuse -------------------------------------------------


def as_nobody(act):
    """act() in a child without root's powers; whether it returned."""
    def drop_and_act():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        act()
    return in_child(drop_and_act)


def open_up(path):
    """Let nobody reach `path` (pytest makes its folders 0700)."""
    while path not in ("/", "/tmp"):
        os.chmod(path, os.stat(path).st_mode | 0o055)
        path = os.path.dirname(path)


@needs_fork
@pytest.mark.brief
def test_a_read_only_directory_is_readable_and_refuses_writes(tmp_path):
    store = tracecraft.DirectoryStore(str(tmp_path / "r"), "p")
    store.put("a/b", b"1")
    open_up(str(tmp_path))
    for folder, _, names in os.walk(str(tmp_path / "r")):
        for name in names:
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)

    def act():
        mine = other(store)
        assert mine.get("a/b").body == b"1" and mine.get("a/b").age >= 0
        assert keys(mine) == ["a/b"] and abs(mine.offset()) < 1
        assert mine.head("a/b").size == 1
        for write in (lambda: mine.put("a/c", b"2"), lambda: mine.put("n/c", b"2"),
                      lambda: mine.put("a/b", b"2"), lambda: mine.delete("a/b")):
            with pytest.raises(tracecraft.Denied, match=str(tmp_path)):
                write()
    try:
        assert as_nobody(act)
    finally:
        for folder, _, _ in os.walk(str(tmp_path / "r")):
            os.chmod(folder, 0o755)
    assert keys(store) == ["a/b"]


@pytest.mark.brief
def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file" / "root", tmp_path / "file"):
        store = tracecraft.DirectoryStore(str(root), "p")
        assert keys(store) == []
        for act in (store.ensure, lambda: store.put("k", b"1")):
            with pytest.raises(tracecraft.Error, match="file") as caught:
                act()
            assert caught.value.exit in (3, 7, 11)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
@pytest.mark.brief
def test_proc_is_no_place_for_a_store():
    with pytest.raises((tracecraft.Unavailable, tracecraft.Denied), match="/proc"):
        tracecraft.DirectoryStore("/proc/tracecraft", "p").put("k", b"1")


@pytest.mark.parametrize("code, error", [
    (errno.ENOSPC, "Unavailable"), (errno.EROFS, "Denied"), (errno.EIO, "Unavailable")])
@pytest.mark.brief
def test_a_disk_that_fails_at_fsync_leaves_nothing(store, monkeypatch, code, error):
    store.put("k", b"old")

    def refuse(fd):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(getattr(tracecraft, error), match="root/p/k"):
        store.put("k", b"new")
    assert store.get("k").body == b"old"
    assert os.listdir(disk(store, "")) == ["k"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.brief
def test_a_full_disk_below_a_download_is_an_oserror_of_the_callers_file(store):
    store.put("k", b"x" * 10)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError):
        store.download("k", full, size=10)


# -- files of any size -------------------------------------------------


@pytest.mark.brief
def test_upload_and_download_keep_every_byte(store, tmp_path):
    data = random.Random(7).randbytes(3_500_001)
    (tmp_path / "in").write_bytes(data)
    told = []
    store.upload("big", str(tmp_path / "in"), progress=lambda *now: told.append(now))
    assert told[-1] == (len(data), len(data))
    with open(tmp_path / "out", "wb") as file:
        store.download("big", file, size=len(data))
    assert (tmp_path / "out").read_bytes() == data
    with pytest.raises(tracecraft.Moved):
        store.upload("big", str(tmp_path / "in"), if_none_match=True)


@pytest.mark.brief
def test_a_small_upload_has_the_etag_of_its_bytes(store, tmp_path):
    (tmp_path / "in").write_bytes(b"hello")
    stamp = store.upload("a", str(tmp_path / "in"))
    assert stamp.etag == store.get("a").etag == store.put("b", b"hello").etag


@pytest.mark.brief
def test_an_upload_of_no_file_names_it(store, tmp_path):
    with pytest.raises(tracecraft.Error, match="missing"):
        store.upload("k", str(tmp_path / "missing"))


@pytest.mark.brief
def test_a_download_of_another_size_has_moved(store, tmp_path):
    store.put("k", b"12345")
    with open(tmp_path / "out", "wb") as file, pytest.raises(tracecraft.Moved):
        store.download("k", file, size=4)


@pytest.mark.brief
def test_copy_copies(store):
    store.put("a", b"1")
    stamp = store.copy("a", "b/c")
    assert store.get("b/c").body == b"1" and stamp.etag == store.get("b/c").etag
    with pytest.raises(tracecraft.NotFound):
        store.copy("nothing", "d")


# -- what other systems do ---------------------------------------------


class FakeMsvcrt(types.ModuleType):
    """msvcrt.locking as documented: one byte at the file position, no waiting."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        super().__init__("msvcrt")
        self.held, self.guard = {}, threading.Lock()

    def locking(self, fd, mode, count):
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0 and count == 1
        inode = os.fstat(fd).st_ino
        with self.guard:
            if mode == self.LK_UNLCK:
                assert self.held.pop(inode) == fd
            elif inode in self.held:
                raise PermissionError(errno.EACCES, "Permission denied")
            else:
                self.held[inode] = fd


@pytest.mark.brief
def test_without_fcntl_msvcrt_locks(store, monkeypatch):
    fake = FakeMsvcrt()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr(tracecraft, "REQUEST_TIMEOUT", 0.2)
    store.put("k", b"1")
    assert fake.held == {}
    with store._tree.lock(disk(store, "k")):
        with pytest.raises(tracecraft.Busy):
            other(store).put("k", b"2")
    other(store).put("k", b"3")
    assert fake.held == {}


@pytest.mark.brief
def test_without_links_a_create_still_is_exclusive(store, monkeypatch):
    monkeypatch.delattr(os, "link", raising=False)
    store.put("k", b"1", if_none_match=True)
    with pytest.raises(tracecraft.Moved):
        store.put("k", b"2", if_none_match=True)


@pytest.mark.parametrize("winerror, times, works", [(32, 3, True), (5, 1, True),
                                                    (32, 99, False), (None, 1, False)])
@pytest.mark.brief
def test_a_file_in_use_is_replaced_a_little_later(store, monkeypatch, winerror, times,
                                                  works):
    real, calls = os.replace, []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def replace(old, new):
        calls.append(new)
        if len(calls) <= times:
            why = PermissionError(errno.EACCES, "in use")
            if winerror:
                why.winerror = winerror
            raise why
        real(old, new)
    monkeypatch.setattr(os, "replace", replace)
    if works:
        store.put("k", b"1")
        assert len(calls) == times + 1
    else:
        with pytest.raises(tracecraft.Denied):
            store.put("k", b"1")
        assert os.listdir(disk(store, "")) == []


@pytest.mark.brief
def test_a_disk_without_locks_is_unsafe(store, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(tracecraft.Unsafe):
        store.put("k", b"1")


@pytest.mark.brief
def test_on_a_case_blind_disk_another_spelling_is_refused(store):
    store.put("Dir/Key", b"1")
    store._tree._blind = True  # as on macOS and Windows: look at the names listed
    assert store.get("Dir/Key").body == b"1" and keys(store, "Dir/") == ["Dir/Key"]
    store.put("Dir/Key", b"2", if_match=store.get("Dir/Key").etag)
    for twin in ("dir/Key", "Dir/key"):
        with pytest.raises(tracecraft.Conflict):
            store.put(twin, b"3")
    assert keys(store) == ["Dir/Key"]
    assert not store._tree.spelled(disk(store, "Dir/key"))


def mountinfo(*rows):
    return [tracecraft._mountinfo(f"36 35 98:0 / {point} rw,noatime shared:1 - {kind}"
                                  " dev rw\n") for point, kind in rows]


@pytest.mark.brief
def test_mount_points_with_spaces_are_understood():
    assert mountinfo(("/mnt/a\\040b", "nfs")) == [("/mnt/a b", "nfs")]


@pytest.mark.parametrize("kind, atomic", [
    ("ext4", True), ("nfs4", True), ("nfs", False), ("cifs", False), ("smb3", False),
    ("9p", False), ("fuse.sshfs", False), ("overlay", True), ("tmpfs", True)])
@pytest.mark.brief
def test_network_file_systems_are_advisory(store, monkeypatch, kind, atomic):
    monkeypatch.setattr(tracecraft, "file_system", lambda path: kind)
    assert store.verdict["atomic"] is atomic and kind in store.verdict["why"]
    store.verdict = {"atomic": True, "why": "set by hand"}
    assert store.verdict["why"] == "set by hand"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
@pytest.mark.brief
def test_the_file_system_of_proc_is_proc():
    assert tracecraft.file_system("/proc/self/nothing") == "proc"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 256 KiB; needs root and mount(8)."""
    import subprocess
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(point)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount")
    except OSError:
        pytest.skip("no mount")
    yield str(point)
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.brief
def test_a_full_disk_is_unavailable_and_keeps_the_old(small_disk):
    store = tracecraft.DirectoryStore(small_disk, "p")
    store.put("k", b"old")
    with pytest.raises(tracecraft.Unavailable, match=f"{small_disk}/p/k.*[Ss]pace"):
        store.put("k", b"x" * 500_000)
    assert store.get("k").body == b"old" and os.listdir(disk(store, "")) == ["k"]
    store.put("k", b"new")
    store.close()


@pytest.mark.brief
def test_a_read_only_mount_can_be_read(small_disk):
    import subprocess
    store = tracecraft.DirectoryStore(small_disk, "p")
    store.put("k", b"1")
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert store.get("k").body == b"1" and 0 <= store.get("k").age < 60
    assert keys(store) == ["k"] and store.verdict["atomic"] and store.offset() == 0
    for write in (lambda: store.put("k", b"2"), lambda: store.delete("k"),
                  lambda: store.put("n/m", b"2")):
        with pytest.raises(tracecraft.Denied, match=small_disk):
            write()
    store.close()


# == 7. S3 =============================================================
#
# The bucket store against the suite's own strict server, with faults per request.


@pytest.fixture
def s3():
    with S3Server() as server:
        yield server


def bucket_store(server, project="p", **options):
    """A store on `server`; options override those of S3Store."""
    keys = tracecraft.Keys(server.access_key, server.secret_key,
                           token=server.session_token or "")
    how = dict(endpoint=server.url, region=server.region, keys=lambda: keys,
               random=lambda: 0.1)
    made = tracecraft.S3Store("bucket", project, **dict(how, **options))
    made.deadline = time.monotonic() + 10
    return made


@pytest.fixture
def store3(s3):
    made = bucket_store(s3)
    yield made
    made.close()


def keys_of(listing):
    return [entry.key for entry in listing.entries]


# -- addresses ---------------------------------------------------------


@pytest.mark.parametrize("bucket, endpoint, region, path_style, place", [
    ("b-1", "", "eu-west-1", None, ("https://b-1.s3.eu-west-1.amazonaws.com", "")),
    ("b-1", "", "", None, ("https://b-1.s3.us-east-1.amazonaws.com", "")),
    ("b.x", "", "eu-west-1", None, ("https://s3.eu-west-1.amazonaws.com", "/b.x")),
    ("B-1", "", "eu-west-1", None, ("https://s3.eu-west-1.amazonaws.com", "/B-1")),
    ("b-1", "", "cn-north-1", None,
     ("https://b-1.s3.cn-north-1.amazonaws.com.cn", "")),
    ("b-1", "https://s3.us-east-1.amazonaws.com", "eu-west-1", None,
     ("https://b-1.s3.eu-west-1.amazonaws.com", "")),
    ("b-1", "https://s3.amazonaws.com", "eu-west-1", None,
     ("https://b-1.s3.eu-west-1.amazonaws.com", "")),
    ("b-1", "https://x.vpce.amazonaws.com", "eu-west-1", None,
     ("https://b-1.x.vpce.amazonaws.com", "")),
    ("b-1", "http://localhost:9000", "r", None, ("http://localhost:9000", "/b-1")),
    ("b-1", "https://fakeamazonaws.com", "r", None, ("https://fakeamazonaws.com",
                                                      "/b-1")),
    ("b-1", "http://s3.local", "r", False, ("http://b-1.s3.local", "")),
    ("b-1", "", "eu-west-1", True, ("https://s3.eu-west-1.amazonaws.com", "/b-1")),
    ("b-1", "https://s3.hf.co/ns/", "r", None, ("https://s3.hf.co", "/ns/b-1")),
])
def test_where_requests_go(bucket, endpoint, region, path_style, place):
    assert tracecraft.s3_place(bucket, endpoint=endpoint, region=region,
                               path_style=path_style) == place


def test_virtual_host_addressing_is_signed_as_sent(s3):
    url = s3.url.replace("127.0.0.1", "localhost")
    store = bucket_store(s3, endpoint=url, path_style=False)
    try:
        store.put("k", b"1")
    except tracecraft.NotSent:
        pytest.skip("bucket.localhost does not resolve here")
    assert s3.body("p/k") == b"1"


def test_the_url_names_the_store_without_secrets():
    store = tracecraft.S3Store("b", "p", endpoint="http://h:1", region="r",
                               keys=lambda: tracecraft.Keys("AK", "secret"))
    assert store.url == "s3://b/p?endpoint=http://h:1&region=r"


# -- reading and writing -----------------------------------------------


ODD_KEYS = ["a", "a b/c+d", "%41~&=?#", "\u00fc/\u4f60\u597d.txt", "x'(y)!*;,$@"]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_key_is_written_read_listed_copied_and_deleted(s3, store3, key):
    store3.put(key, b"one")
    assert store3.get(key).body == b"one" and store3.head(key).size == 3
    assert keys_of(store3.list("")) == [key]
    store3.copy(key, "copy of " + key)
    assert s3.body("p/copy of " + key) == b"one"
    store3.delete(key)
    with pytest.raises(tracecraft.NotFound):
        store3.get(key)


def test_found_carries_etag_times_and_size(store3):
    stamp = store3.put("k", b"12345")
    found = store3.get("k")
    assert found.etag == stamp.etag and found.size == 5 and 0 <= found.age < 3
    assert abs(found.now - time.time()) < 3 and found.modified <= found.now + 1


def test_a_part_of_an_object(store3):
    store3.put("k", b"0123456789")
    assert store3.get("k", start=2, limit=3).body == b"234"
    assert store3.get("k", start=2, limit=3).size == 10
    assert store3.get("k", limit=4).body == b"0123"
    assert store3.get("k", start=99).body == b""
    store3.put("k", b"")
    assert store3.get("k", limit=4).body == b""


def test_a_big_object_is_cut_at_the_limit_without_reading_it_all(store3):
    store3.put("k", b"x" * (tracecraft.MAX_RECORD + 9))
    found = store3.get("k", limit=tracecraft.MAX_RECORD + 1)
    assert len(found.body) == tracecraft.MAX_RECORD + 1
    assert found.size == tracecraft.MAX_RECORD + 9


def test_a_known_etag_brings_no_body(store3):
    etag = store3.put("k", b"1").etag
    assert store3.get("k", if_none_match=etag).body is None
    assert store3.get("k", if_none_match='"other"').body == b"1"


def test_conditions_decide(store3):
    etag = store3.put("k", b"1", if_none_match=True).etag
    with pytest.raises(tracecraft.Moved):
        store3.put("k", b"2", if_none_match=True)
    store3.put("k", b"2", if_match=etag)
    with pytest.raises(tracecraft.Moved):
        store3.put("k", b"3", if_match=etag)
    with pytest.raises(tracecraft.Moved):
        store3.put("absent", b"3", if_match=etag)
    assert store3.get("k").body == b"2"


def test_deleting_what_is_absent_is_fine(store3):
    store3.delete("nothing")


# -- what answers mean -------------------------------------------------


@pytest.mark.parametrize("fault, options, kind, landed", [
    (409, {}, "Busy", False), (412, {}, "Moved", False), (429, {}, "Throttled", False),
    (403, {}, "Denied", False), (501, {}, "Unsafe", False), (500, {}, "Unknown", False),
    (503, {}, "Unknown", False), ("landed", {}, "Unknown", True),
    ("landed", {"status": 503}, "Unknown", True), ("lose", {}, "Unknown", True),
    ("reset", {}, "Unknown", False), ("reset_after", {}, "Unknown", True),
    ("refuse", {}, "Unknown", False), ("truncate", {}, "Unknown", True),
    ("truncate", {"at": 120}, "Unknown", True), ("truncate", {"at": 150}, "Unknown", True),
    ("html", {}, "Unavailable", False)])
def test_a_write_is_one_attempt_and_says_what_became_of_it(s3, store3, fault, options,
                                                           kind, landed):
    s3.fault(fault, "PUT", **options)
    with pytest.raises(tracecraft.Error) as caught:
        store3.put("k", b"1", if_none_match=True)
    assert isinstance(caught.value, getattr(tracecraft, kind))
    assert (s3.body("p/k") == b"1") is landed and s3.count("PUT") == 1


def test_a_refused_connection_certainly_wrote_nothing(s3, store3):
    s3.stop()
    with pytest.raises(tracecraft.Unavailable):
        store3.put("k", b"1")


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "lose", "truncate"])
def test_reading_is_repeated(s3, store3, fault):
    store3.put("k", b"body")
    s3.fault(fault, "GET", times=3)
    assert store3.get("k").body == b"body" and s3.count("GET") >= 4


def test_listing_and_deleting_are_repeated(s3, store3):
    store3.put("k", b"1")
    s3.fault(503, times=4)
    assert keys_of(store3.list("")) == ["k"]
    s3.fault("lose", "DELETE")
    store3.delete("k")
    assert s3.body("p/k") is None


def test_retrying_ends_at_the_deadline(s3, store3):
    s3.fault(503, "GET", times=10**6)
    store3.deadline = time.monotonic() + 0.5
    began = time.monotonic()
    with pytest.raises(tracecraft.Throttled):
        store3.get("k")
    assert time.monotonic() - began < 1.5 and s3.count("GET") > 1


def test_retry_after_is_obeyed(s3, store3):
    store3.put("k", b"1")
    s3.fault(503, "GET", retry_after=1)
    began = time.monotonic()
    store3.get("k")
    assert 1 <= time.monotonic() - began < 3
    s3.fault(429, "PUT", retry_after=9999)
    with pytest.raises(tracecraft.Throttled) as caught:
        store3.put("k", b"2")
    assert caught.value.after == tracecraft.PATIENCE


def test_an_address_that_never_answered_is_given_up_soon(s3):
    s3.stop()
    store = bucket_store(s3)
    began = time.monotonic()
    with pytest.raises(tracecraft.Unavailable, match="cannot connect"):
        store.get("k")
    assert time.monotonic() - began < 2


def test_a_store_that_drops_out_and_comes_back_is_waited_for(s3, store3):
    store3.put("k", b"1")
    s3.stop()
    threading.Timer(0.7, s3.start).start()
    assert store3.get("k").body == b"1"


def test_errors_name_operation_key_status_code_and_request(s3, store3):
    s3.fault(403, "GET")
    with pytest.raises(tracecraft.Denied) as caught:
        store3.get("some/key")
    error = caught.value
    assert "read some/key: 403 AccessDenied" in error.message and error.hint
    assert f"(request {s3.log[-1].id})" in error.message
    assert (error.details["status"], error.details["s3_code"]) == (403, "AccessDenied")


@pytest.mark.parametrize("change, code", [
    (dict(secret_key="wrongwrong"), "SignatureDoesNotMatch"),
    (dict(access_key="nobodynobody"), "InvalidAccessKeyId")])
def test_wrong_keys_are_denied_and_not_shown(s3, change, code):
    pair = dict(dict(access_key=s3.access_key, secret_key=s3.secret_key), **change)
    store = bucket_store(s3, keys=lambda: tracecraft.Keys(**pair))
    with pytest.raises(tracecraft.Denied, match=code) as caught:
        store.put("k", b"1")
    told = caught.value.message + caught.value.hint + repr(caught.value.details)
    assert not any(value in told for value in change.values())


def test_no_keys_means_an_unsigned_request(s3):
    store = bucket_store(s3, keys=lambda: None)
    with pytest.raises(tracecraft.Denied):
        store.get("k")
    assert "authorization" not in s3.log[-1].headers
    s3.verify = False
    store.put("k", b"1")


def test_session_tokens_are_sent_and_signed(s3):
    s3.session_token = "tok/en+=="
    bucket_store(s3).put("k", b"1")
    assert s3.body("p/k") == b"1"


def test_a_missing_bucket_is_not_a_missing_key(s3):
    s3.buckets = set()
    store = bucket_store(s3)
    acts = [lambda: store.get("k"), lambda: store.list(""), lambda: store.delete("k"),
            lambda: store.put("k", b"1", if_match='"x"'),
            lambda: store.upload("k", __file__)]
    for act in acts:
        with pytest.raises(tracecraft.NotFound, match="no bucket 'bucket'") as caught:
            act()
        assert caught.value.details["bucket"] == "bucket"
        assert "init" in caught.value.hint
    assert store.ensure() is True and store.ensure() is False
    store.put("k", b"1")


@pytest.mark.parametrize("act", ["get", "head", "list", "put", "delete", "copy"])
def test_a_captive_portal_is_not_a_store(s3, store3, act):
    store3.deadline = time.monotonic() + 0.3
    s3.fault("html", times=10**6)
    arguments = dict(get=("k",), head=("k",), list=("",), put=("k", b"1"),
                     delete=("k",), copy=("k", "l"))[act]
    with pytest.raises(tracecraft.Unavailable, match="in place of the store|ETag"):
        getattr(store3, act)(*arguments)


def test_a_listing_that_is_something_else_is_a_portal(s3, store3):
    store3.deadline = time.monotonic()
    s3.fault("garbage", "GET", body=b"<ListAllMyBucketsResult/>", times=99)
    with pytest.raises(tracecraft.Unavailable, match="in place of the store"):
        store3.list("")


def test_a_put_answered_without_an_etag_is_read_back(s3, store3, monkeypatch):
    real = S3Server.put_key

    def without(self, req):
        return S3Reply(200, {}) if real(self, req) else None
    monkeypatch.setattr(S3Server, "put_key", without)
    stamp = store3.put("k", b"1")
    assert stamp.etag == store3.get("k").etag
    monkeypatch.setattr(S3Server, "put_key", lambda self, req: S3Reply(200))
    with pytest.raises(tracecraft.Unknown):  # what is stored is not what was sent
        store3.put("k", b"2")


# -- regions, redirects, clocks ----------------------------------------


def test_the_right_region_is_learned_and_kept(s3):
    s3.region = "eu-central-1"
    store = bucket_store(s3, region="us-east-1")
    store.put("k", b"1", if_none_match=True)
    store.put("k", b"2")
    assert [req.status for req in s3.log] == [400, 200, 200]
    assert store.region == "eu-central-1" and store.requests == 3


def test_a_region_in_a_redirect_is_learned(s3, store3):
    s3.region = "eu-west-3"
    s3.fault("region", region="eu-west-3")
    store3.put("k", b"1")
    assert store3.region == "eu-west-3"


def test_a_head_learns_the_region_too(s3):
    s3.region = "eu-central-1"
    store = bucket_store(s3, region="us-east-1")
    with pytest.raises(tracecraft.NotFound):
        store.head("k")
    assert store.region == "eu-central-1"


@pytest.mark.parametrize("location", ["http://127.0.0.1:1/x", "https://elsewhere/x", ""])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD"])
def test_a_redirect_elsewhere_is_refused(s3, store3, location, method):
    store3.deadline = time.monotonic() + 0.2
    s3.fault("redirect", location=location, times=99)
    act = {"PUT": lambda: store3.put("k", b"1"), "HEAD": lambda: store3.head("k"),
           "DELETE": lambda: store3.delete("k")}[method]
    with pytest.raises(tracecraft.Unavailable, match="redirects"):
        act()


def test_a_get_follows_to_https_without_credentials(s3, store3, monkeypatch):
    store3.put("k", b"1")
    sent = []

    class Cdn:
        sent = 0

        def send(self, method, target, **how):
            sent.append((method, target, how["headers"]))
            answer = tracecraft.Answer(200, {"etag": '"c"', "date": "x"}, sent_at=0,
                                       got_at=0)
            answer.body = b"from the cdn"
            return answer

        def close(self):
            return None

    store3._links["https://cdn.example"] = Cdn()
    s3.fault("redirect", "GET", location="https://cdn.example/b?sig=1", status=302)
    found = store3.get("k", start=3)
    assert found.body.endswith(b"m the cdn") and found.now > 1e9
    assert sent == [("GET", "/b?sig=1", {"range": "bytes=3-"})]
    s3.fault("redirect", "GET", location="http://cdn.example/b", times=99)
    store3.deadline = time.monotonic() + 0.2
    with pytest.raises(tracecraft.Unavailable, match="redirects"):
        store3.get("k")


@pytest.mark.parametrize("skew", [3600, -7200])
@pytest.mark.parametrize("first", ["put", "head"])
def test_a_wrong_clock_heals_itself(s3, skew, first):
    s3.skew = skew
    store = bucket_store(s3)
    if first == "head":
        with pytest.raises(tracecraft.NotFound):
            store.head("k")
    store.put("k", b"1")
    assert s3.count() == (3 if first == "head" else 2)
    assert abs(store.offset() - skew) < 2 and abs(store.clock() - time.time() - skew) < 2
    assert store.get("k").age < 3


def test_a_clock_within_the_precision_of_date_is_left_alone(store3):
    store3.put("k", b"1")
    assert store3.offset() == 0


def test_an_aged_answer_does_not_date_an_object(s3, store3):
    store3.put("k", b"1")
    s3.fault("age", "GET")
    found = store3.get("k")
    assert abs(found.now - time.time()) < 3 and store3.offset() == 0


def test_an_answer_without_last_modified_has_no_age(s3, store3):
    s3.lm = False
    store3.put("k", b"1")
    assert store3.get("k").age is None


# -- dialects ----------------------------------------------------------


def test_a_store_that_wants_bare_etags_is_found_out_and_remembered(s3, store3):
    s3.etags = "unquoted"
    etag = store3.put("k", b"1").etag
    etag = store3.put("k", b"2", if_match=etag).etag
    assert [req.method for req in s3.log] == ["PUT", "PUT", "HEAD", "PUT"]
    s3.clear_log()
    store3.put("k", b"3", if_match=etag)
    assert s3.log[0].headers["if-match"] == etag.strip('"') and s3.count() == 1


def test_a_known_dialect_costs_no_look(s3):
    s3.etags = "unquoted"
    store = bucket_store(s3, verdict={"atomic": True, "dialect": "unquoted"})
    etag = store.put("k", b"1").etag
    store.put("k", b"2", if_match=etag)
    with pytest.raises(tracecraft.Moved):
        store.put("k", b"3", if_match=etag)
    assert s3.count() == 3


def test_a_lost_race_is_lost_in_any_dialect(s3, store3):
    etag = store3.put("k", b"1").etag
    store3.put("k", b"2")
    with pytest.raises(tracecraft.Moved):
        store3.put("k", b"3", if_match=etag)
    assert store3.get("k").body == b"2"


# -- listing -----------------------------------------------------------


def test_all_pages_come_in_byte_order(s3, store3):
    s3.max_keys = 7
    names = sorted((f"d/{n:03d}" for n in range(40)), key=str.encode)
    for name in [*names, "\U0001f600", "\uffee", "other"]:
        store3.put(name, b"")
    assert keys_of(store3.list("d/")) == names
    assert keys_of(store3.list("d/", start_after="d/030")) == names[31:]
    assert keys_of(store3.list(""))[-2:] == ["\uffee", "\U0001f600"]


def test_a_limit_ends_a_listing_and_says_so(s3, store3):
    for n in range(5):
        store3.put(f"k{n}", b"")
    assert len(store3.list("", limit=3).entries) == 3
    assert store3.list("", limit=3).truncated
    assert not store3.list("", limit=5).truncated and not store3.list("").truncated


def test_a_delimiter_rolls_up(s3, store3):
    s3.max_keys = 2
    for name in ("a/1", "a/2", "b/1", "c", "d/1"):
        store3.put(name, b"")
    listing = store3.list("", delimiter="/")
    assert (listing.prefixes, keys_of(listing)) == (["a/", "b/", "d/"], ["c"])


def test_entries_are_relative_to_the_project(s3, store3):
    store3.put("k", b"12")
    bucket_store(s3, project="other").put("k", b"")
    (entry,) = store3.list("").entries
    assert (entry.key, entry.size) == ("k", 2) and entry.etag
    assert abs(entry.modified - time.time()) < 3


@pytest.mark.parametrize("broken", ["ignores the token", "gives none"])
def test_a_server_without_working_tokens_is_asked_by_the_last_key(s3, store3, broken,
                                                                  monkeypatch):
    s3.max_keys, real = 2, S3Server.get_bucket
    for name in ("a/1", "a/2", "b", "c", "d/1", "e", "f"):
        store3.put(name, b"")

    def crippled(self, req):
        if broken == "ignores the token":
            req.query.pop("continuation-token", None)
        reply = real(self, req)
        if broken == "gives none":
            head, _, rest = reply.body.partition(b"<NextContinuationToken>")
            reply = reply._replace(
                body=head + rest.partition(b"</NextContinuationToken>")[2])
        return reply
    monkeypatch.setattr(S3Server, "get_bucket", crippled)
    assert keys_of(store3.list("")) == ["a/1", "a/2", "b", "c", "d/1", "e", "f"]
    assert store3.list("", delimiter="/").prefixes == ["a/", "d/"]


def test_a_listing_that_never_ends_is_given_up(s3, store3, monkeypatch):
    real = S3Server.get_bucket
    store3.put("k", b"")

    def stuck(self, req):
        req.query.pop("start-after", None)
        body = real(self, req).body.replace(b"<IsTruncated>false", b"<IsTruncated>true")
        return S3Reply(200, {}, body)
    monkeypatch.setattr(S3Server, "get_bucket", stuck)
    with pytest.raises(tracecraft.Unavailable, match="repeats itself"):
        store3.list("")


# -- files -------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(tracecraft, "MULTIPART", 3 << 20)
    monkeypatch.setattr(tracecraft, "PART", 1 << 20)


@pytest.fixture
def big_file(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(os.urandom((4 << 20) + 777))
    return path


def sent_parts(s3):
    return [req for req in s3.log if "partNumber" in req.query]


def test_a_small_file_is_one_put(s3, store3, tmp_path):
    path, seen = tmp_path / "f", []
    path.write_bytes(b"content")
    stamp = store3.upload("f", str(path), if_none_match=True,
                          progress=lambda done, total: seen.append((done, total)))
    assert s3.body("p/f") == b"content" and seen[-1] == (7, 7) and s3.count() == 1
    assert stamp.etag == store3.head("f").etag
    with pytest.raises(tracecraft.Moved):
        store3.upload("f", str(path), if_none_match=True)


def test_an_empty_file_is_uploaded(s3, store3, tmp_path):
    (tmp_path / "f").write_bytes(b"")
    store3.upload("f", str(tmp_path / "f"))
    assert s3.body("p/f") == b""


def test_a_plain_upload_is_repeated_a_conditional_one_is_not(s3, store3, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"content")
    s3.fault("lose", "PUT")
    store3.upload("f", str(path))
    s3.fault("lose", "PUT")
    with pytest.raises(tracecraft.Unknown):
        store3.upload("g", str(path), if_none_match=True)


def test_a_big_file_goes_in_parts(s3, store3, big_file, small_parts):
    seen = []
    stamp = store3.upload("big", str(big_file),
                          progress=lambda done, total: seen.append(done))
    assert s3.body("p/big") == big_file.read_bytes() and len(sent_parts(s3)) == 5
    assert stamp.etag == store3.head("big").etag
    assert seen[-1] == big_file.stat().st_size and not s3.uploads


@pytest.mark.parametrize("fault", [500, 503, "lose", "reset", "landed"])
def test_every_request_of_an_upload_is_repeated(s3, store3, big_file, small_parts, fault):
    s3.fault(fault, "POST")
    s3.fault(fault, "PUT", times=3)
    s3.fault(fault, "POST", skip=2)
    store3.upload("big", str(big_file))
    assert s3.body("p/big") == big_file.read_bytes()


def test_a_failed_upload_is_aborted(s3, store3, big_file, small_parts):
    s3.fault(403, "PUT", skip=2, times=99)
    with pytest.raises(tracecraft.Denied):
        store3.upload("big", str(big_file))
    assert not s3.uploads and s3.body("p/big") is None


def test_unless_it_can_be_resumed(s3, store3, big_file, small_parts):
    resume = {}
    s3.fault(403, "PUT", skip=2, times=99)
    with pytest.raises(tracecraft.Denied):
        store3.upload("big", str(big_file), resume=resume)
    assert list(s3.uploads) == [resume["upload_id"]]
    there = len(s3.uploads[resume["upload_id"]].parts)
    s3.faults.clear()
    s3.clear_log()
    store3.upload("big", str(big_file), resume=resume)
    assert len(sent_parts(s3)) == 5 - there < 5
    assert s3.body("p/big") == big_file.read_bytes()


def test_a_resumed_upload_that_is_gone_begins_anew(s3, store3, big_file, small_parts):
    resume = {}
    s3.fault(403, "PUT", times=99)
    with pytest.raises(tracecraft.Denied):
        store3.upload("big", str(big_file), resume=resume)
    s3.faults.clear()
    s3.uploads.clear()
    store3.upload("big", str(big_file), resume=resume)
    assert s3.body("p/big") == big_file.read_bytes()


def test_a_big_file_does_not_replace_what_is_there(s3, store3, big_file, small_parts):
    store3.put("big", b"mine")
    with pytest.raises(tracecraft.Moved):
        store3.upload("big", str(big_file), if_none_match=True)
    assert s3.body("p/big") == b"mine"


def test_a_missing_local_file_is_said(store3, tmp_path):
    with pytest.raises(tracecraft.Error, match="cannot read"):
        store3.upload("f", str(tmp_path / "nothing"))


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_broken_download_goes_on_where_it_broke(s3, store3, ignores_range,
                                                  monkeypatch):
    data, file, seen = os.urandom(2 << 20), io.BytesIO(), []
    store3.put("k", data)
    if ignores_range:
        monkeypatch.setitem(globals(), "_byte_range", lambda spec, size: None)
    for part in range(1, 4):
        s3.fault("truncate", "GET", at=part * 600_000 if ignores_range else 600_000)
    store3.download("k", file, size=len(data),
                    progress=lambda done, total: seen.append(done))
    assert file.getvalue() == data and seen[-1] == len(data) and s3.count("GET") == 4
    assert seen == sorted(seen)
    assert all("if-match" in req.headers for req in s3.log[2:])


def test_a_download_of_what_changed_meanwhile_is_refused(s3, store3):
    store3.put("k", b"a" * 100_000)
    s3.fault("truncate", "GET", at=50_000)
    s3.fault("call", "GET", fn=lambda req: s3.store.write(
        ("bucket", "p/k"), s3_object(b"b" * 100_000)))
    with pytest.raises(tracecraft.Moved):
        store3.download("k", io.BytesIO(), size=100_000)


def s3_object(body):
    etag = hashlib.md5(body).hexdigest()
    return SimpleNamespace(body=body, etag=f'"{etag}"', modified=time.time(), headers={})


def test_a_download_of_another_size_is_refused_before_it_begins(store3):
    store3.put("k", b"12345")
    with pytest.raises(tracecraft.Moved):
        store3.download("k", io.BytesIO(), size=4)


def test_a_full_disk_is_not_the_networks_fault(s3, store3):
    class Full(io.BytesIO):
        name = "target"

        def write(self, data):
            raise OSError(28, "No space left on device")

    store3.put("k", b"12345")
    with pytest.raises(tracecraft.Unavailable, match="write target: No space"):
        store3.download("k", Full(), size=5)
    assert s3.count("GET") == 1


def test_a_download_of_nothing_is_not_found(store3):
    with pytest.raises(tracecraft.NotFound):
        store3.download("k", io.BytesIO(), size=1)


# -- the probe ---------------------------------------------------------


def test_an_honest_store_is_atomic_and_left_clean(s3, store3):
    verdict = tracecraft.probe_store(store3, seconds=2)
    assert verdict["atomic"] and verdict["dialect"] == "quoted" and verdict["races"]
    assert store3.verdict is verdict and keys_of(store3.list("")) == []


@pytest.mark.parametrize("etags, dialect", [("quoted", "quoted"),
                                            ("unquoted", "unquoted")])
def test_the_probe_learns_the_dialect(s3, store3, etags, dialect):
    s3.etags = etags
    assert tracecraft.probe_store(store3, races=False)["dialect"] == dialect


@pytest.mark.parametrize("options, why", [
    (dict(ignores=True), "ignores"), (dict(races=True), "checks, then acts")])
def test_the_probe_refuses_a_store_that_cannot_arbitrate(s3, store3, options, why):
    vars(s3).update(options)
    verdict = tracecraft.probe_store(store3, seconds=5)
    assert not verdict["atomic"] and why in verdict["why"]
    assert keys_of(store3.list("")) == []


def test_a_store_that_refuses_conditions_is_refused(s3, store3):
    s3.fault(501, "PUT", times=99)
    verdict = tracecraft.probe_store(store3)
    assert not verdict["atomic"] and "refuses conditional writes" in verdict["why"]


def test_a_store_in_trouble_gets_no_verdict(s3, store3):
    s3.stop()
    store3.deadline = time.monotonic()
    with pytest.raises(tracecraft.Unavailable):
        tracecraft.probe_store(store3)
    assert store3.verdict is None


def test_faults_do_not_make_an_honest_store_look_bad(s3, store3):
    rng = random.Random(3)
    for fault in ("lose", 500, 409, "landed", 429, "reset") * 3:
        s3.fault(fault, "PUT", skip=rng.randrange(8))
    assert tracecraft.probe_store(store3, seconds=1)["atomic"]


def test_a_directory_passes_the_probe(tmp_path):
    store = tracecraft.DirectoryStore(str(tmp_path), "p")
    verdict = tracecraft.probe_store(store, seconds=1)
    assert verdict["atomic"] and keys_of(store.list("")) == []


# == 8. Settings =======================================================
#
# Where a command works and as whom: real files, real git, no mocks of our own.


OLD = {"backend": "s3", "bucket": "team", "project": "site", "agent_id": "designer",
       "endpoint": "http://localhost:9000", "access_key": "AKIA",
       "secret_key": "s3cr3t"}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return str(tmp_path / "home")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return str(tmp_path / "work")


def load(cwd, home=None, *, flags=None, **environ):
    if home:
        environ["HOME"] = home
    return tracecraft.load_settings(flags or {}, {"USER": "bob", **environ}, cwd)


def write(path, doc):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(doc if isinstance(doc, str) else json.dumps(doc))


def git(cwd, *words):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.com",
                    *words], cwd=cwd, check=True, capture_output=True)


def repository(path):
    os.makedirs(path, exist_ok=True)
    git(path, "init", "-q")
    git(path, "commit", "-q", "--allow-empty", "-m", "start")
    return os.path.realpath(path)


# -- store URLs --------------------------------------------------------


@pytest.mark.parametrize("url, parts", [
    ("s3://b/p", {"kind": "s3", "bucket": "b", "project": "p"}),
    ("s3://b", {"kind": "s3", "bucket": "b", "project": ""}),
    ("s3://b/a/b/", {"kind": "s3", "bucket": "b", "project": "a/b"}),
    ("s3://my.b-1/My%20Project", {"kind": "s3", "bucket": "my.b-1",
                                  "project": "My Project"}),
    ("s3://b/p?endpoint=http://localhost:9000&region=eu-west-1",
     {"kind": "s3", "bucket": "b", "project": "p", "endpoint": "http://localhost:9000",
      "region": "eu-west-1"}),
    ("s3://b/p?endpoint=http%3A%2F%2F[::1]:9000/&path_style=1",
     {"kind": "s3", "bucket": "b", "project": "p", "endpoint": "http://[::1]:9000",
      "path_style": "1"}),
    ("hf://user/bucket/project", {"kind": "hf", "bucket": "user/bucket",
                                  "project": "project"}),
    ("file:///srv/a%20b/p", {"kind": "file", "bucket": "/srv/a b", "project": "p"}),
    ("file://localhost/srv/p", {"kind": "file", "bucket": "/srv", "project": "p"}),
])
@pytest.mark.brief
def test_store_urls_are_read_and_written_back(url, parts):
    assert tracecraft.parse_store_url(url) == parts
    assert tracecraft.parse_store_url(tracecraft.store_url(parts)) == parts


@pytest.mark.parametrize("url, says", [
    ("", "begins with none"), ("bucket/project", "begins with none"),
    ("gs://b/p", "begins with none"), ("s3:/b/p", "begins with none"),
    ("s3://", "bucket"), ("s3:///p", "bucket"), ("s3://b c/p", "bucket"),
    ("s3://key:secret@b/p", "keys"), ("s3://b/../p", "project"),
    ("s3://b//p/a//b", "does"),
    ("s3://b/p?regio=x", "did you mean region"), ("s3://b/p?region=", "region"),
    ("s3://b/p?region=a&region=b", "repeated"), ("s3://b/p#x", "%23"),
    ("s3://b/p?endpoint=localhost:9000", "http"), ("s3://b/p?path_style=yes", "0 or 1"),
    ("s3://b/p?endpoint=http://u:pw@h", "password"), ("s3://b/p\x1b[31m", "control"),
    ("hf://user", "USER/BUCKET"), ("file://dir/p", "three slashes"),
    ("file:///p", "project"), ("file:///", "project"), ("file:///a/../../p", "project"),
    ("file:///d/p?x=1", "unknown"), ("s3://b/p%00", "does not fit"),
])
@pytest.mark.brief
def test_nonsense_is_no_store_url(url, says):
    with pytest.raises(tracecraft.Usage, match=says) as caught:
        tracecraft.parse_store_url(url)
    assert "\x1b" not in str(caught.value)


@pytest.mark.brief
def test_a_secret_in_a_url_is_not_repeated():
    with pytest.raises(tracecraft.Usage) as caught:
        tracecraft.parse_store_url("s3://AKIA:hunter2@b/p")
    assert "hunter2" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("url, hint", [
    ("https://minio:9000", "s3://BUCKET/PROJECT?endpoint=https://minio:9000"),
    ("./dir", "file:///DIR/PROJECT"), ("/srv/dir", "file:///DIR/PROJECT")])
@pytest.mark.brief
def test_a_likely_mistake_gets_the_right_form(url, hint):
    with pytest.raises(tracecraft.Usage) as caught:
        tracecraft.parse_store_url(url)
    assert hint in caught.value.hint


# -- which setting wins ------------------------------------------------


@pytest.mark.brief
def test_flag_before_environment_before_config_before_default(work, home):
    steps = [({}, {}, None, "work", True)]
    config = {"store": "s3://c/from-config"}
    steps.append(({}, {}, config, "from-config", False))
    environ = {"TRACECRAFT_STORE": "s3://e/from-env"}
    steps.append(({}, environ, config, "from-env", False))
    steps.append(({"store": "s3://f/from-flag"}, environ, config, "from-flag", False))
    for flags, variables, doc, project, embedded in steps:
        if doc:
            write(f"{work}/.tracecraft.json", doc)
        found = load(work, home, flags=flags, **variables)
        assert (found.project, found.embedded) == (project, embedded)


@pytest.mark.parametrize("flags, environ, project", [
    ({"project": "f"}, {"TRACECRAFT_PROJECT": "e"}, "f"),
    ({}, {"TRACECRAFT_PROJECT": "e"}, "e"), ({}, {"TRACECRAFT_PROJECT": ""}, "site"),
    ({"store": "s3://b/u"}, {"TRACECRAFT_PROJECT": "e"}, "u"),
    ({"store": "s3://b"}, {"TRACECRAFT_PROJECT": "e"}, "e"),
    ({}, {"TRACECRAFT_STORE": "s3://b/u"}, "u"),
    ({}, {"TRACECRAFT_STORE": "s3://b/u", "TRACECRAFT_PROJECT": "e"}, "e"),
    ({"store": "s3://b"}, {}, "site")])
@pytest.mark.brief
def test_a_project_comes_from_the_first_that_names_one(work, home, flags, environ,
                                                       project):
    write(f"{work}/.tracecraft.json", OLD)
    assert load(work, home, flags=flags, **environ).project == project


@pytest.mark.brief
def test_agent_and_numbers_by_the_same_order(work, home):
    write(f"{work}/.tracecraft.json", {**OLD, "ttl": 60})
    found = load(work, home)
    assert (found.agent, found.agent_given, found.ttl) == ("designer", True, 60)
    assert (found.as_json, found.token, found.deadline) == (False, None, 60)
    found = load(work, home, TRACECRAFT_AGENT="tester", TRACECRAFT_TTL="90",
                 TRACECRAFT_JSON="1", TRACECRAFT_KEY="k")
    assert (found.agent, found.ttl) == ("tester", 90)
    assert (found.as_json, found.key) == (True, "k")
    found = load(work, home, TRACECRAFT_AGENT="tester", TRACECRAFT_TTL="90",
                 flags={"agent": "x", "ttl": 0, "token": 7, "deadline": "1.5"})
    assert (found.agent, found.ttl, found.token, found.deadline) == ("x", 0, 7, 1.5)


@pytest.mark.parametrize("flags, environ", [
    ({"agent": "a b"}, {}), ({"agent": "_x"}, {}), ({}, {"TRACECRAFT_AGENT": "a/b"}),
    ({}, {"TRACECRAFT_TTL": "soon"}), ({"token": "x"}, {}), ({"deadline": "nan"}, {}),
    ({"deadline": "later"}, {}), ({"project": "a/../b"}, {}), ({"store": "x"}, {}),
    ({"instance": "a b"}, {}), ({}, {"TRACECRAFT_STORE": "s3://"}),
    ({"store": "s3://b/p"}, {"AWS_ENDPOINT_URL": "nonsense"})])
@pytest.mark.brief
def test_bad_values_are_usage_errors(work, home, flags, environ):
    with pytest.raises(tracecraft.Usage):
        load(work, home, flags=flags, **environ)


@pytest.mark.brief
def test_the_environment_names_the_endpoint_unless_the_url_does(work, home):
    aws = {"AWS_ENDPOINT_URL": "http://all:1", "AWS_ENDPOINT_URL_S3": "http://s3:2/"}
    found = load(work, home, flags={"store": "s3://b/p"}, **aws)
    assert found.store["endpoint"] == "http://s3:2"
    assert found.store_url == "s3://b/p?endpoint=http://s3:2"
    found = load(work, home, flags={"store": "s3://b/p?endpoint=http://mine"}, **aws)
    assert found.store["endpoint"] == "http://mine"


@pytest.mark.brief
def test_an_endpoint_that_overrides_the_config_is_told(work, home):
    write(f"{work}/.tracecraft.json", OLD)
    found = load(work, home, AWS_ENDPOINT_URL="http://other:1")
    assert found.store["endpoint"] == "http://other:1"
    assert "localhost:9000" in " ".join(found.notes)


@pytest.mark.brief
def test_a_lent_token_is_for_the_named_resource_only(work, home):
    assert load(work, home, TRACECRAFT_TOKEN="3").lent() == {}
    found = load(work, home, TRACECRAFT_TOKEN="3", TRACECRAFT_STEP="S1.A")
    assert found.lent() == {"step/s1-a": 3} and found.token is None
    found = load(work, home, TRACECRAFT_TOKEN="3", TRACECRAFT_LOCK="models.py")
    assert found.lent() == {"lock/models.py": 3}


# -- config files ------------------------------------------------------


@pytest.mark.brief
def test_an_02_config_is_read_as_it_is(work, home):
    write(f"{work}/.tracecraft.json", OLD)
    found = load(work, home)
    assert found.store_url == "s3://team/site?endpoint=http://localhost:9000"
    assert (found.agent, found.project, found.embedded) == ("designer", "site", False)
    assert found.config["secret_key"] == "s3cr3t" and "s3cr3t" not in found.store_url
    with open(f"{work}/.tracecraft.json", encoding="utf-8") as file:
        assert json.load(file) == OLD


@pytest.mark.brief
def test_an_02_hf_config_is_read(work, home):
    write(f"{work}/.tracecraft.json", {"backend": "hf", "bucket": "me/b",
                                       "project": "p", "agent_id": "a",
                                       "hf_token": "hf_x"})
    found = load(work, home)
    assert found.store_url == "hf://me/b/p" and found.config["hf_token"] == "hf_x"


@pytest.mark.brief
def test_keys_of_one_store_are_not_shown_to_another(work, home):
    write(f"{work}/.tracecraft.json", OLD)
    found = load(work, home, flags={"store": "s3://team/site?endpoint=http://evil:1"})
    assert "secret_key" not in found.config and "access_key" not in found.config
    same = "s3://team/other?endpoint=http://localhost:9000"
    assert load(work, home, flags={"store": same}).config["secret_key"] == "s3cr3t"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"bucket": 5}', "\x00" * 9,
                                  '{"bucket": "b", "backend": "ftp"}',
                                  '{"store": "nonsense"}', '{"agent_id": ["x"]}',
                                  '{"bucket": "b", "endpoint": "here"}', "[" * 100_000])
@pytest.mark.brief
def test_a_damaged_config_is_named_not_a_traceback(work, home, text):
    write(f"{work}/.tracecraft.json", text)
    with pytest.raises(tracecraft.Usage):
        load(work, home)


@pytest.mark.brief
def test_a_config_with_a_byte_order_mark_is_read(work, home):
    write(f"{work}/.tracecraft.json", "\ufeff" + json.dumps(OLD))
    assert load(work, home).project == "site"


@pytest.mark.brief
def test_a_named_config_must_exist(work, home):
    for flags, environ in (({"config": "no.json"}, {}),
                           ({}, {"TRACECRAFT_CONFIG": "no"})):
        with pytest.raises(tracecraft.Usage, match="no"):
            load(work, home, flags=flags, **environ)


@pytest.mark.brief
def test_a_named_config_wins(work, home):
    write(f"{work}/.tracecraft.json", OLD)
    write(f"{work}/env.json", {**OLD, "project": "env"})
    write(f"{work}/flag.json", {**OLD, "project": "flag"})
    assert load(work, home, TRACECRAFT_CONFIG="env.json").project == "env"
    flags = {"config": "flag.json"}
    found = load(work, home, flags=flags, TRACECRAFT_CONFIG="env.json")
    assert found.project == "flag"


@pytest.mark.brief
def test_parents_then_home_are_searched(work, home):
    deep = f"{work}/a/b"
    os.makedirs(deep)
    assert tracecraft.find_config(deep, {"HOME": home}) == ""
    write(f"{home}/.tracecraft/config.json", {**OLD, "project": "home"})
    assert load(deep, home).project == "home"
    write(f"{work}/.tracecraft.json", OLD)
    assert load(deep, home).project == "site"


@needs_git
@pytest.mark.brief
def test_the_search_ends_at_the_git_root(work, home):
    write(f"{work}/.tracecraft.json", OLD)
    top = repository(f"{work}/repo")
    os.makedirs(f"{top}/src")
    assert tracecraft.find_config(f"{top}/src", {"HOME": home}) == ""
    write(f"{top}/.tracecraft.json", {**OLD, "project": "inner"})
    assert load(f"{top}/src", home).project == "inner"


@needs_git
@pytest.mark.brief
def test_a_worktree_uses_the_main_worktrees_config(work, home):
    top = repository(f"{work}/repo")
    git(top, "worktree", "add", "-q", f"{work}/tree")
    write(f"{top}/.tracecraft.json", OLD)
    os.makedirs(f"{work}/tree/src")
    assert load(f"{work}/tree/src", home).project == "site"
    write(f"{work}/tree/.tracecraft.json", {**OLD, "project": "own"})
    assert load(f"{work}/tree/src", home).project == "own"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root")
@pytest.mark.brief
def test_a_strangers_config_in_an_open_directory_is_passed_over(work, home):
    os.chmod(work, 0o1777)
    os.makedirs(f"{work}/mine")
    write(f"{work}/.tracecraft.json", OLD)
    os.chown(f"{work}/.tracecraft.json", 65534, 65534)
    assert load(f"{work}/mine", home).embedded
    assert not load(work, home).embedded  # there it was asked for


@pytest.mark.brief
def test_a_config_is_written_for_its_owner_only(work):
    path = f"{work}/sub/.tracecraft.json"
    assert tracecraft.write_config(path, OLD) == []
    assert tracecraft.read_config(path) == OLD
    if os.name != "nt":
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(f"{work}/sub") == [".tracecraft.json"]


@needs_git
@pytest.mark.brief
def test_in_git_a_config_is_ignored_once(work):
    top = repository(f"{work}/repo")
    write(f"{top}/.gitignore", "*.pyc")
    lines = tracecraft.write_config(f"{top}/.tracecraft.json", OLD)
    assert lines == ["Added .tracecraft.json to .gitignore"]
    assert tracecraft.write_config(f"{top}/.tracecraft.json", OLD) == []
    with open(f"{top}/.gitignore", encoding="utf-8") as file:
        assert file.read() == "*.pyc\n.tracecraft.json\n"
    git(top, "check-ignore", ".tracecraft.json")


@needs_git
@pytest.mark.brief
def test_a_gitignore_that_cannot_be_written_is_told(work):
    top = repository(f"{work}/repo")
    os.mkdir(f"{top}/.gitignore")
    lines = tracecraft.write_config(f"{top}/.tracecraft.json", OLD)
    assert lines == ["warning: could not write to .gitignore — add '.tracecraft.json'"
                     " manually"]


@pytest.mark.brief
def test_a_config_that_cannot_be_written_is_an_error(work):
    write(f"{work}/file", "x")
    with pytest.raises(tracecraft.Error, match="file"):
        tracecraft.write_config(f"{work}/file/.tracecraft.json", OLD)


# -- the embedded default ----------------------------------------------


@pytest.mark.brief
def test_outside_git_it_is_here(work, home):
    found = load(work, home)
    assert found.embedded and found.store == {
        "kind": "file", "bucket": os.path.realpath(f"{work}/.tracecraft/store"),
        "project": "work"}
    assert not os.path.exists(f"{work}/.tracecraft")  # looking makes nothing


@pytest.mark.brief
def test_outside_git_the_nearest_existing_one_above_is_used(work, home):
    deep = f"{work}/a/b"
    os.makedirs(deep)
    os.makedirs(f"{work}/.tracecraft/store")
    found = load(deep, home)
    assert found.store["bucket"] == os.path.realpath(f"{work}/.tracecraft/store")
    assert found.project == "work"


@needs_git
@pytest.mark.brief
def test_inside_git_it_is_in_the_git_directory(work, home):
    top = repository(f"{work}/My Repo")
    os.makedirs(f"{top}/src/deep")
    found = load(f"{top}/src/deep", home)
    assert found.store["bucket"] == f"{top}/.git/tracecraft/store"
    assert found.project == "My-Repo"
    tracecraft.DirectoryStore(found.store["bucket"], found.project).put("k", b"1")
    said = subprocess.run(["git", "status", "--porcelain"], cwd=top, check=True,
                          capture_output=True).stdout
    assert said == b""


@needs_git
@pytest.mark.brief
def test_work_trees_share_one_store_but_not_one_agent(work, home):
    top = repository(f"{work}/repo")
    git(top, "worktree", "add", "-q", f"{work}/tree")
    main, tree = load(top, home), load(f"{work}/tree", home)
    assert tree.store == main.store and tree.project == "repo"
    assert tree.agent != main.agent and tree.instance != main.instance


@needs_git
@pytest.mark.brief
def test_submodules_and_bare_repositories_have_their_own(work, home):
    inner = repository(f"{work}/inner")
    outer = repository(f"{work}/outer")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", inner,
        "sub")
    assert tracecraft.find_repository(f"{outer}/sub").common \
        == f"{outer}/.git/modules/sub"
    assert load(f"{outer}/sub", home).project == "sub"
    git(work, "clone", "-q", "--bare", inner, "bare.git")
    git(f"{work}/bare.git", "worktree", "add", "-q", f"{work}/out")
    found = load(f"{work}/out", home)
    assert found.store["bucket"] \
        == os.path.realpath(f"{work}/bare.git/tracecraft/store")
    assert found.project == "bare"


@needs_git
@pytest.mark.parametrize("where", ["", "src"])
@pytest.mark.brief
def test_git_itself_agrees_on_the_common_directory(work, where):
    top = repository(f"{work}/repo")
    git(top, "worktree", "add", "-q", f"{work}/tree")
    for place in (top, f"{work}/tree"):
        cwd = os.path.join(place, where)
        os.makedirs(cwd, exist_ok=True)
        said = subprocess.run(["git", "rev-parse", "--git-common-dir"], cwd=cwd,
                              check=True, capture_output=True, text=True).stdout.strip()
        assert os.path.realpath(os.path.join(cwd, said)) \
            == tracecraft.find_repository(cwd).common


@pytest.mark.parametrize("text", ["", "gitdir: nowhere", "garbage", "gitdir:"])
@pytest.mark.brief
def test_a_broken_git_file_is_no_repository(work, text):
    write(f"{work}/sub/.git", text)
    assert tracecraft.find_repository(f"{work}/sub") is None


@pytest.mark.brief
def test_the_embedded_store_is_told_once(work, home):
    assert "embedded store" in " ".join(load(work, home).notes)
    assert load(work, home).notes == []


# -- identity and local state ------------------------------------------


@pytest.mark.brief
def test_the_default_agent_stays_and_differs_between_fresh_states(work, home, tmp_path):
    first = load(work, home)
    assert load(work, home).agent == first.agent and not first.agent_given
    assert load(work, home).instance == first.instance and not first.instance_given
    user, _, rest = first.agent.partition("-")
    assert user == "bob" and len(rest.rpartition("-")[2]) == 4
    others = {load(work, str(tmp_path / f"home{n}")).agent for n in range(4)}
    assert len(others | {first.agent}) > 3  # two of five may meet, once in 6,000


@pytest.mark.brief
def test_sessions_are_different_agents(work, home):
    one = load(work, home, CLAUDE_CODE_SESSION_ID="s-1")
    two = load(work, home, CLAUDE_CODE_SESSION_ID="s-2")
    assert one.instance != two.instance and one.state.directory != two.state.directory
    assert load(work, home, CLAUDE_CODE_SESSION_ID="s-1").instance == one.instance


@pytest.mark.brief
def test_a_given_instance_is_taken_and_has_its_own_state(work, home):
    plain, given = load(work, home), load(work, home, TRACECRAFT_INSTANCE="i1")
    assert (given.instance, given.instance_given) == ("i1", True)
    assert given.state.directory != plain.state.directory
    found = load(work, home, TRACECRAFT_INSTANCE="i1", flags={"instance": "i2"})
    assert found.instance == "i2"


@pytest.mark.brief
def test_a_fresh_instance_is_new_each_time_and_keeps_nothing(work, home):
    plain = load(work, home)
    one, two = (load(work, home, flags={"fresh": True}) for _ in range(2))
    assert len({plain.instance, one.instance, two.instance}) == 3
    assert one.state is None and one.agent == plain.agent and one.state_root


@pytest.mark.brief
def test_state_is_per_store_and_agent_and_the_same_below_the_directory(work, home):
    os.makedirs(f"{work}/.tracecraft/store")
    os.makedirs(f"{work}/sub")
    seen = {load(work, home, TRACECRAFT_AGENT=a, TRACECRAFT_STORE=s).state.directory
            for a in ("a", "b") for s in ("s3://b/p", "s3://b/q", "s3://c/p", "")}
    assert len(seen) == 8
    for store in ("", "s3://b/p"):  # a token is found again after `cd`
        here, below = (load(cwd, home, TRACECRAFT_STORE=store)
                       for cwd in (work, f"{work}/sub"))
        assert here.instance == below.instance


def _first_use(cwd, home, queue):
    found = load(cwd, home)
    queue.put((found.agent, found.instance))


@pytest.mark.brief
def test_8_processes_at_first_use_agree(work, home):
    queue = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=_first_use, args=(work, home, queue))
                 for _ in range(8)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()


@pytest.mark.brief
def test_state_lies_in_xdg_state_home(work, home, tmp_path):
    found = load(work, home, XDG_STATE_HOME=str(tmp_path / "xdg"))
    assert found.state.directory.startswith(str(tmp_path / "xdg" / "tracecraft"))
    found = load(work, home, XDG_STATE_HOME="relative")  # the standard: ignore it
    assert found.state.directory.startswith(f"{home}/.local/state/tracecraft")


@pytest.mark.skipif(os.name == "nt", reason="no modes")
@pytest.mark.brief
def test_state_is_for_its_owner_only(work, home):
    found = load(work, home)
    found.state.hold("step/x", 3, ttl=60, at=1.0)
    for folder, _, names in os.walk(found.state_root):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600


def no_home(tmp_path, kind):
    """HOME variables that cannot hold state."""
    (tmp_path / "plain").write_text("a file, no directory")
    return {"unset": {}, "empty": {"HOME": ""},
            "a file": {"HOME": str(tmp_path / "plain")},
            "below a file": {"HOME": str(tmp_path / "plain" / "home")},
            "read-only": {"HOME": "/proc/1/nothing"}}[kind]


HOMELESS = ["unset", "empty", "a file", "below a file", "read-only"]


@pytest.mark.parametrize("kind", HOMELESS)
@pytest.mark.brief
def test_without_a_home_state_lies_beside_the_config(work, tmp_path, kind):
    environ = no_home(tmp_path, kind)
    write(f"{work}/.tracecraft.json", {k: v for k, v in OLD.items() if k != "agent_id"})
    found = load(work, **environ)
    assert found.state_root == os.path.realpath(f"{work}/.tracecraft/state")
    found.state.hold("step/x", 3, ttl=60, at=1.0)
    again = load(work, **environ)
    assert again.agent == found.agent and again.state.token("step/x")["token"] == 3
    with open(f"{found.state_root}/.gitignore", encoding="utf-8") as file:
        assert file.read() == "*\n"


@pytest.mark.parametrize("kind", HOMELESS)
@pytest.mark.brief
def test_without_a_home_the_embedded_store_keeps_state_beside_it(work, tmp_path, kind):
    found = load(work, **no_home(tmp_path, kind))
    assert found.state_root == os.path.realpath(work) + "/.tracecraft/state"


@pytest.mark.parametrize("kind", HOMELESS)
@pytest.mark.brief
def test_without_any_place_there_is_no_state_but_a_stable_name(work, tmp_path, kind):
    environ = {**no_home(tmp_path, kind), "TRACECRAFT_STORE": "s3://b/p"}
    found = load(work, **environ)
    assert found.state is None and found.state_root == "" and found.instance
    assert any("--token" in note for note in found.notes)
    assert load(work, **environ).agent == found.agent
    assert load(work, **environ).instance != found.instance
    assert found.verdicts().load() is None
    found.verdicts().save({"atomic": True})
    assert sorted(os.listdir(work)) == []


@pytest.mark.brief
def test_an_unknown_user_has_an_agent_name_too(work, home):
    found = tracecraft.load_settings({}, {"HOME": home, "USER": "J. Ö/x"}, work)
    assert tracecraft.check_name("agent id", found.agent) == found.agent
    found = tracecraft.load_settings({}, {"HOME": home}, work)
    assert tracecraft.check_name("agent id", found.agent)


# -- class State -------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    return tracecraft.State(str(tmp_path / "s" / "t"), about={"store": "x"})


@pytest.mark.brief
def test_tokens_are_held_and_dropped(state):
    assert state.token("step/x") is None and state.holds() == {}
    state.drop("step/x")
    state.hold("step/x", 3, ttl=60, at=5.0)
    state.hold("lock/x", 4, ttl=0, at=6.0)
    assert state.token("step/x") == {"name": "step/x", "token": 3, "ttl": 60, "at": 5.0}
    assert {name: doc["token"] for name, doc in state.holds().items()} \
        == {"step/x": 3, "lock/x": 4}
    state.drop("step/x")
    assert list(state.holds()) == ["lock/x"]


@pytest.mark.brief
def test_facts_have_a_value_and_an_age(state):
    assert state.get("presence") is None and state.age("presence") is None
    state.set("presence", {"a": [1, None]})
    assert state.get("presence") == {"a": [1, None]}
    assert -2 <= state.age("presence") < 9
    path = state._path("fact", "presence")
    os.utime(path, (time.time() - 100,) * 2)
    assert 99 < state.age("presence") < 105
    os.utime(path, (time.time() + 100,) * 2)
    assert state.age("presence") is None


@pytest.mark.brief
def test_names_of_all_kinds_do_not_meet(state):
    names = ["a/b", "a-b", "A/b", "a b", "..", "", "é", "x" * 300, "a\nb"]
    for number, name in enumerate(names):
        state.set(name, number)
        state.hold(name, number, ttl=1, at=0)
    assert [state.get(name) for name in names] == list(range(len(names)))
    assert set(state.holds()) == set(names)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}', "\x00"])
@pytest.mark.brief
def test_a_damaged_file_reads_as_not_known(state, text):
    state.set("f", 1)
    state.hold("r", 1, ttl=1, at=0)
    for path in (state._path("fact", "f"), state._path("hold", "r")):
        write(path, text)
    assert (state.get("f"), state.token("r"), state.holds()) == (None, None, {})
    state.set("f", 2)
    assert state.get("f") == 2


@pytest.mark.brief
def test_a_disk_that_refuses_is_silent(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "s", tmp_path / "file", "/proc/1/tracecraft"):
        state = tracecraft.State(str(place))
        state.set("f", 1)
        state.hold("r", 1, ttl=1, at=0)
        state.drop("r")
        assert (state.get("f"), state.token("r"), state.holds()) == (None, None, {})
        assert state.age("f") is None and state.settle("f", 5) == 5


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.brief
def test_of_8_threads_one_settles_a_fact(state, links, monkeypatch):
    if not links:
        monkeypatch.delattr(os, "link", raising=False)
        state.settle("f", "first")  # without links only the later writers are certain
    gate, seen = threading.Barrier(8), []

    def settle(number):
        gate.wait()
        seen.append(state.settle("f", f"v{number}"))
    threads = [threading.Thread(target=settle, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and set(seen) == {state.get("f")}


@pytest.mark.brief
def test_nothing_half_written_is_left(state):
    for number in range(20):
        state.set("f", number)
        state.settle("f", "x")
    assert sorted(os.listdir(state.directory)) \
        == sorted(["about.json", os.path.basename(state._path("fact", "f"))])


@pytest.mark.brief
def test_verdicts_are_kept_per_endpoint_and_bucket(tmp_path):
    root = str(tmp_path)
    mine = tracecraft.Verdicts(root, "http://e", bucket="b")
    assert mine.load() is None
    mine.save({"atomic": True, "dialect": "quoted"})
    again = tracecraft.Verdicts(root, "http://e", bucket="b").load()
    assert again["dialect"] == "quoted"
    for endpoint, bucket in (("http://e", "c"), ("http://f", "b"), ("", "b")):
        assert tracecraft.Verdicts(root, endpoint, bucket=bucket).load() is None


@pytest.mark.brief
def test_settings_of_a_directory_load_neither_ssl_nor_http(work, home):
    code = ("import sys, tracecraft\n"
            f"s = tracecraft.load_settings({{}}, {{'HOME': {home!r}}}, {work!r})\n"
            "d = tracecraft.DirectoryStore(s.store['bucket'], s.project)\n"
            "d.put('k', b'1'); d.get('k'); d.list('')\n"
            "bad = {'ssl', 'http', 'urllib.parse', 'subprocess', 'tempfile', 'logging',"
            " 'dataclasses', 'pathlib', 'socket'} & set(sys.modules)\n"
            "print(sorted(bad))")
    folder = os.path.dirname(os.path.abspath(tracecraft.__file__))
    said = subprocess.run([sys.executable, "-I", "-S", "-c",
                           f"import sys; sys.path.insert(0, {folder!r})\n{code}"],
                          capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


# == 9. Credentials ====================================================
#
# Every source of keys with a local stand-in for the service behind it.


OFF = {"AWS_EC2_METADATA_DISABLED": "true"}
KEYS_JSON = {"AccessKeyId": "ASIA", "SecretAccessKey": "s3cr3t-value", "Token": "tok",
             "Expiration": "2033-05-18T03:33:20Z"}  # 2,000,000,000
STS_XML = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA</AccessKeyId>
<SecretAccessKey>s3cr3t-value</SecretAccessKey><SessionToken>tok</SessionToken>
<Expiration>2033-05-18T03:33:20Z</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


@pytest.fixture
def service():
    """A web server: `pages` maps 'METHOD /path' to (status, body); `seen` is asked."""
    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            size = int(self.headers.get("content-length") or 0)
            self.server.seen.append((f"{self.command} {self.path}", dict(
                (n.lower(), v) for n, v in self.headers.items()),
                self.rfile.read(size).decode()))
            status, body = self.server.pages.get(f"{self.command} {self.path}",
                                                 (404, "nothing"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *args):
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.seen = {}, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def aws_home(tmp_path):
    """aws_home(credentials, config) -> an environment with those profile files."""
    def write(credentials="", config="", **environ):
        folder = tmp_path / ".aws"
        folder.mkdir(exist_ok=True)
        (folder / "credentials").write_text(credentials)
        (folder / "config").write_text(config)
        return {"HOME": str(tmp_path), **OFF, **environ}
    return write


def key_chain(environ, config=None, **how):
    return tracecraft.CredentialChain(environ, config or {}, **how)


def triple(keys):
    return keys.access_key, keys.secret_key, keys.token


@pytest.fixture
def no_botocore(monkeypatch):
    for name in ("botocore", "botocore.exceptions", "botocore.session"):
        monkeypatch.setitem(sys.modules, name, None)


def test_flags_come_before_config_before_environment():
    environ = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "es",
               "AWS_SESSION_TOKEN": "et"}
    config, flags = dict(access_key="C", secret_key="cs"), dict(
        access_key="F", secret_key="fs", session_token="ft")
    assert triple(key_chain(environ, config, flags=flags)()) == ("F", "fs", "ft")
    assert triple(key_chain(environ, config)()) == ("C", "cs", "")
    assert triple(key_chain(environ)()) == ("E", "es", "et")


def test_half_a_pair_is_an_error_not_a_fallback():
    with pytest.raises(tracecraft.Denied, match="secret key is missing"):
        key_chain({"AWS_ACCESS_KEY_ID": "E"})()


@pytest.mark.usefixtures("no_botocore")
def test_nothing_found_says_what_was_tried(aws_home):
    with pytest.raises(tracecraft.Denied) as caught:
        key_chain(aws_home())()
    for source in ("flags", "config", "environment", "profile default", "web identity",
                   "container", "instance metadata", "botocore"):
        assert source in caught.value.message
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


# -- profile files -----------------------------------------------------


SHARED = """
[default]
aws_access_key_id = D
aws_secret_access_key = d%s
[other]
aws_access_key_id = O
aws_secret_access_key = os
aws_session_token = ot
"""


def test_the_default_profile_and_a_named_one(aws_home):
    assert triple(key_chain(aws_home(SHARED))()) == ("D", "d%s", "")
    environ = aws_home(SHARED, AWS_PROFILE="other")
    assert triple(key_chain(environ)()) == ("O", "os", "ot")


def test_the_files_may_lie_elsewhere(tmp_path):
    (tmp_path / "creds").write_text(SHARED)
    environ = dict(OFF, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "creds"),
                   AWS_CONFIG_FILE=str(tmp_path / "none"), HOME=str(tmp_path))
    assert key_chain(environ)().access_key == "D"


def test_the_config_file_names_its_profiles_otherwise(aws_home):
    config = ("[profile work]\nregion = eu-west-1\nendpoint_url = http://h:1\n"
              "aws_access_key_id = W\naws_secret_access_key = ws\n"
              "s3 =\n  addressing_style = path\n")
    environ = aws_home(config=config, AWS_PROFILE="work")
    assert key_chain(environ)().access_key == "W"
    assert tracecraft.aws_profile_setting(environ, "region") == "eu-west-1"
    assert tracecraft.aws_profile_setting(environ, "endpoint_url") == "http://h:1"
    assert tracecraft.aws_profile_setting(dict(environ, AWS_PROFILE="x"), "region") == ""


def test_an_unknown_profile_is_not_passed_over(aws_home):
    with pytest.raises(tracecraft.Denied, match="'nope' is in neither"):
        key_chain(aws_home(SHARED, AWS_PROFILE="nope"))()


def test_a_malformed_file_is_named_without_its_content(aws_home):
    with pytest.raises(tracecraft.Denied, match="credentials: Missing") as caught:
        key_chain(aws_home("aws_secret_access_key = s3cr3t-value"))()
    assert "s3cr3t" not in caught.value.message and caught.value.__cause__ is None


def process_profile(tmp_path, text, status=0):
    script = tmp_path / "helper.py"
    script.write_text(f"import sys; print({text!r}); sys.exit({status})")
    return f"[default]\ncredential_process = '{sys.executable}' '{script}'\n"


def test_a_credential_process_is_run(aws_home, tmp_path):
    doc = {"Version": 1, "AccessKeyId": "P", "SecretAccessKey": "ps",
           "SessionToken": "pt", "Expiration": "2033-05-18T03:33:20Z"}
    config = process_profile(tmp_path, json.dumps(doc))
    keys = key_chain(aws_home(config=config))()
    assert triple(keys) == ("P", "ps", "pt") and keys.expires_at == 2e9


@pytest.mark.parametrize("text, status", [
    ("s3cr3t-value", 0), ("s3cr3t-value", 3), ('{"Version": 2}', 0), ('{"Version": 1}', 0),
    ('{"Version":1,"AccessKeyId":"a","SecretAccessKey":"s3cr3t-value",'
     '"Expiration":"soon"}', 0)])
def test_a_failing_credential_process_is_denied_and_not_quoted(aws_home, tmp_path, text,
                                                               status):
    with pytest.raises(tracecraft.Denied) as caught:
        key_chain(aws_home(config=process_profile(tmp_path, text, status)))()
    assert "s3cr3t" not in caught.value.message


def test_a_process_that_is_not_there_is_denied(aws_home):
    with pytest.raises(tracecraft.Denied, match="FileNotFoundError"):
        key_chain(aws_home(config="[default]\ncredential_process = /no/such\n"))()


# -- web identity ------------------------------------------------------


@pytest.fixture
def identity(service, tmp_path):
    (tmp_path / "token").write_text("jwt.abc\n")
    return dict(OFF, AWS_WEB_IDENTITY_TOKEN_FILE=str(tmp_path / "token"),
                AWS_ROLE_ARN="arn:aws:iam::1:role/r", AWS_ENDPOINT_URL_STS=service.url,
                HOME=str(tmp_path))


def test_web_identity_asks_sts_unsigned(service, identity):
    service.pages["POST /"] = (200, STS_XML)
    keys = key_chain(identity)()
    assert triple(keys) == ("ASIA", "s3cr3t-value", "tok") and keys.expires_at == 2e9
    _, headers, body = service.seen[0]
    assert "authorization" not in headers and "WebIdentityToken=jwt.abc" in body
    assert "RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fr" in body


def test_web_identity_refused_names_the_code_and_hides_the_token(service, identity):
    service.pages["POST /"] = (403, "<ErrorResponse><Error><Code>AccessDenied</Code>"
                                    "<Message>jwt.abc</Message></Error></ErrorResponse>")
    with pytest.raises(tracecraft.Denied, match="HTTP 403 AccessDenied") as caught:
        key_chain(identity)()
    assert "jwt.abc" not in caught.value.message and len(service.seen) == 1


def test_web_identity_is_asked_again_after_a_500(service, identity, monkeypatch):
    monkeypatch.setattr(tracecraft, "backoff", lambda *args: 0)
    service.pages["POST /"] = (500, "")
    with pytest.raises(tracecraft.Denied, match="500"):
        key_chain(identity)()
    assert len(service.seen) == 3


# -- container ---------------------------------------------------------


def test_a_container_endpoint_with_its_token(service, tmp_path):
    service.pages["GET /creds?x=1"] = (200, json.dumps(KEYS_JSON))
    environ = dict(OFF, HOME=str(tmp_path),
                   AWS_CONTAINER_CREDENTIALS_FULL_URI=service.url + "/creds?x=1",
                   AWS_CONTAINER_AUTHORIZATION_TOKEN="Bearer a")
    assert triple(key_chain(environ)()) == ("ASIA", "s3cr3t-value", "tok")
    assert service.seen[0][1]["authorization"] == "Bearer a"
    (tmp_path / "t").write_text("Bearer b\n")
    environ["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = str(tmp_path / "t")
    key_chain(environ)()
    assert service.seen[1][1]["authorization"] == "Bearer b"


def test_a_relative_container_address_is_ecs(service, tmp_path, monkeypatch):
    service.pages["GET /v2/x"] = (200, json.dumps(KEYS_JSON))
    monkeypatch.setattr(tracecraft, "CONTAINER_HOST", service.url)
    environ = dict(OFF, HOME=str(tmp_path),
                   AWS_CONTAINER_CREDENTIALS_RELATIVE_URI="/v2/x",
                   HTTP_PROXY="http://127.0.0.1:1")  # must not be used
    assert key_chain(environ)().access_key == "ASIA"


@pytest.mark.parametrize("url, allowed", [
    ("https://anything.example/x", True), ("http://127.0.0.1:9/x", True),
    ("http://localhost/x", True), ("http://[::1]/x", True),
    ("http://169.254.170.23/x", True), ("http://[fd00:ec2::23]/x", True),
    ("http://10.0.0.1/x", False), ("http://example.org/x", False), ("ftp://a", False),
    ("http://127.0.0.1.example.org/", False)])
def test_plain_http_is_only_for_this_machine(url, allowed):
    assert tracecraft._may_hold_keys(url) is allowed


def test_a_foreign_container_address_is_refused(tmp_path):
    environ = dict(OFF, HOME=str(tmp_path),
                   AWS_CONTAINER_CREDENTIALS_FULL_URI="http://example.org/x")
    with pytest.raises(tracecraft.Denied, match="neither https"):
        key_chain(environ)()


# -- instance metadata -------------------------------------------------


ROLE_PAGE = "GET /latest/meta-data/iam/security-credentials/"


@pytest.fixture
def instance(service, tmp_path):
    service.pages.update({
        "PUT /latest/api/token": (200, "imds-token"), ROLE_PAGE: (200, "my-role\n"),
        ROLE_PAGE + "my-role": (200, json.dumps(dict(KEYS_JSON, Code="Success")))})
    return {"HOME": str(tmp_path), "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.url}


def test_instance_metadata_version_2(service, instance):
    assert triple(key_chain(instance)()) == ("ASIA", "s3cr3t-value", "tok")
    assert service.seen[0][1]["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
    assert [headers["x-aws-ec2-metadata-token"] for _, headers, _ in service.seen[1:]] \
        == ["imds-token"] * 2


@pytest.mark.usefixtures("no_botocore")
def test_instance_metadata_can_be_switched_off(service, instance):
    with pytest.raises(tracecraft.Denied, match="instance metadata .off"):
        key_chain(dict(instance, **OFF))()
    assert service.seen == []


@pytest.mark.usefixtures("no_botocore")
def test_a_silent_metadata_address_costs_a_second(tmp_path):
    import socket
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        environ = {"HOME": str(tmp_path), "AWS_EC2_METADATA_SERVICE_ENDPOINT":
                   f"http://127.0.0.1:{sock.getsockname()[1]}"}
        began = time.monotonic()
        with pytest.raises(tracecraft.Denied, match="instance metadata"):
            key_chain(environ)()
        assert time.monotonic() - began < 2.5


@pytest.mark.usefixtures("no_botocore")
def test_an_instance_without_a_role_is_passed_over(service, instance):
    service.pages[ROLE_PAGE] = (404, "")
    with pytest.raises(tracecraft.Denied, match="no credentials found"):
        key_chain(instance)()


# -- botocore ----------------------------------------------------------


FAKE_BOTOCORE = '''
class Session:
    def __init__(self, profile=None):
        self.profile = profile
    def get_credentials(self):
        return self
    def get_frozen_credentials(self):
        import types
        return types.SimpleNamespace(access_key="B" + (self.profile or ""),
                                     secret_key="bs", token=None)
'''


@pytest.fixture
def fake_botocore(tmp_path, monkeypatch):
    package = tmp_path / "site" / "botocore"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "session.py").write_text(FAKE_BOTOCORE)
    (package / "exceptions.py").write_text("class BotoCoreError(Exception): pass")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [n for n in sys.modules if n.partition(".")[0] == "botocore"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "botocore"]:
        del sys.modules[name]


def test_botocore_is_asked_last(aws_home, fake_botocore):
    clock = [1e9]
    found = key_chain(aws_home(), now=lambda: clock[0])
    assert found().source == "botocore" and found().access_key == "B"
    assert found().expires_at < 1e9 + 600  # it renews by itself: ask it often
    assert key_chain(aws_home(SHARED))().access_key == "D"


def test_a_profile_that_signs_in_by_role_goes_to_botocore(aws_home, fake_botocore):
    config = "[profile sso]\nsso_session = x\n"
    assert key_chain(aws_home(config=config, AWS_PROFILE="sso"))().access_key == "Bsso"


@pytest.mark.usefixtures("no_botocore")
def test_without_it_such_a_profile_says_what_it_needs(aws_home):
    config = "[profile sso]\nsso_session = x\n"
    with pytest.raises(tracecraft.Denied, match="needs the package `botocore`"):
        key_chain(aws_home(config=config, AWS_PROFILE="sso"))()


# -- renewal -----------------------------------------------------------


@pytest.fixture
def renewing(service, tmp_path):
    """(chain with a clock in a list, service): keys that end at 2e9."""
    service.pages["GET /c"] = (200, json.dumps(KEYS_JSON))
    clock = [2e9 - 3600]
    environ = dict(OFF, HOME=str(tmp_path),
                   AWS_CONTAINER_CREDENTIALS_FULL_URI=service.url + "/c")
    return key_chain(environ, now=lambda: clock[0]), clock


def test_keys_are_kept_until_five_minutes_before_their_end(service, renewing):
    found, clock = renewing
    assert found() is found() and len(service.seen) == 1
    clock[0] = 2e9 - 301
    found()
    assert len(service.seen) == 1
    clock[0] = 2e9 - 299
    service.pages["GET /c"] = (200, json.dumps(dict(
        KEYS_JSON, AccessKeyId="NEW", Expiration="2033-05-18T04:33:20Z")))
    assert found().access_key == "NEW" and len(service.seen) == 2


def test_a_failed_renewal_keeps_what_still_works(service, renewing):
    found, clock = renewing
    old = found()
    service.pages["GET /c"] = (403, "")
    clock[0] = 2e9 - 10
    assert found() is old
    clock[0] = 2e9 + 1
    with pytest.raises(tracecraft.Denied):
        found()


def test_many_threads_ask_once(service, renewing):
    found, seen = renewing[0], []
    threads = [threading.Thread(target=lambda: seen.append(found())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, seen))) == 1 and len(service.seen) == 1


def test_no_secret_in_what_is_shown(renewing):
    keys = renewing[0]()
    assert "s3cr3t" not in repr(keys) and "container" in repr(keys)


# == 10. Ledger ========================================================
#
# Everything between the pure records and the commands, on a store in memory that
# loses, delays, repeats or refuses any answer, and whose clock is a number.


HOUR = 3600
LEASE_OVER = tracecraft.TTL + tracecraft.GRACE
TRANSIENT = ("lose", "drop", "busy", "throttle", "down", "twice", "late")


class Crash(BaseException):
    """The process ends here."""


class Memories:
    """What the handles of one memory store share: objects, clock, log of writes."""

    def __init__(self):
        self.lock, self.objects, self.late = threading.RLock(), {}, []
        self.clock_at, self.serial, self.log = 1_700_000_000.0, 0, []


class MemoryStore:
    """A store in memory, linearisable under a lock; one handle for each agent.

    clock_at: its clock, a number; 1 ms passes with each request. Stamps are whole
    seconds, as on S3. log: every write that landed, in order. sent: every PUT of this
    handle. counts: requests of this handle by (method, key). page: keys of one LIST
    page; a longer listing counts as so many requests. gate: called before each request.
    """

    kind, endpoint, bucket = "memory", "", "memory"

    def __init__(self, project="p", shared=None, name="?"):
        self.project, self.name = project, name
        self.shared = shared or Memories()
        self.verdict = {"atomic": True, "dialect": "quoted", "why": "", "at": ""}
        self.deadline, self.chaos, self.page = time.monotonic() + 60, None, None
        self.gate = None
        self.forget()

    def forget(self):
        """Start counting afresh, without faults."""
        self.requests, self.counts, self.sent = 0, collections.Counter(), []
        self.faults, self.crash_at = [], None

    def handle(self, name="?"):
        """Another client of the same bucket."""
        return MemoryStore(self.project, self.shared, name)

    @property
    def url(self):
        return f"memory:///{self.project}"

    @property
    def clock_at(self):
        return self.shared.clock_at

    @clock_at.setter
    def clock_at(self, seconds):
        self.shared.clock_at = seconds

    @property
    def log(self):
        return self.shared.log

    # -- faults

    def fault(self, kind, method="PUT", key="", *, times=1, before=None, after=None):
        """The next request of `method` whose key contains `key` goes wrong.

        kind: lose (acts, no answer), drop (does not act, no answer), busy, throttle,
        down, dead (a read fails for good), twice (the first lands, the copy gets 412),
        late (no answer; lands just before the second request from now), crash-before,
        crash-after, denied, unsafe, ok. before, after: called around the act.
        """
        self.faults += [[kind, method, key, before, after] for _ in range(times)]

    def _next_fault(self, method, key):
        for fault in self.faults:
            if fault[1] in ("", method) and fault[2] in key:
                self.faults.remove(fault)
                return fault[0], fault[3], fault[4]
        if self.chaos and self.chaos[0].random() < self.chaos[1]:
            kinds = TRANSIENT * 4 + ("crash-before", "crash-after")
            return self.chaos[0].choice(kinds), None, None
        return "ok", None, None

    def _request(self, method, key, act):
        """One attempt: count it, let a fault have its way, perhaps act."""
        if self.gate:
            self.gate()
        with self.shared.lock:
            self.requests += 1
            self.counts[method, key] += 1
            number = self.requests
            kind, before, after = self._next_fault(method, key)
        if self.crash_at == (number, "before") or kind == "crash-before":
            raise Crash(f"before {method} {key}")
        if before:
            before()
        answer = self._perform(kind, act)
        if after:
            after()
        if self.crash_at == (number, "after") or kind == "crash-after":
            raise Crash(f"after {method} {key}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _perform(self, kind, act):
        with self.shared.lock:
            self.clock_at += 0.001
            self._land()
            if kind == "late":
                self.shared.late.append([2, act])
            refused = {
                "drop": tracecraft.Unknown("dropped"),
                "late": tracecraft.Unknown("late"),
                "busy": tracecraft.Busy("409"), "throttle": tracecraft.Throttled("429"),
                "down": tracecraft.Unavailable("503"),
                "dead": tracecraft.Unavailable("unreachable"),
                "denied": tracecraft.Denied("403"),
                "unsafe": tracecraft.Unsafe("501")}.get(kind)
            if refused:
                return refused
            answer = _outcome(act)
            if kind == "lose" and not isinstance(answer, tracecraft.Moved):
                return tracecraft.Unknown("the answer was lost")
            return _outcome(act) if kind == "twice" else answer

    def _land(self):
        """What was under way when its sender gave up arrives at last."""
        for late in self.shared.late[:]:
            late[0] -= 1
            if not late[0]:
                self.shared.late.remove(late)
                _outcome(late[1])

    def _read(self, method, key, act):
        # Reads are repeated inside, as the interface says; "dead" is past the deadline.
        while True:
            try:
                return self._request(method, key, act)
            except (tracecraft.Unknown, tracecraft.Unavailable) as why:
                if "unreachable" in why.message:
                    raise

    # -- the interface

    def get(self, key, *, if_none_match=None, start=0, limit=None):
        def act():
            body, etag, at = self._there(key)
            end = None if limit is None else start + limit
            part = None if if_none_match == etag else body[start:end]
            return tracecraft.Found(key, part, etag=etag, modified=at,
                                    now=float(int(self.clock_at)), size=len(body))
        return self._read("GET", key, act)

    def head(self, key):
        def act():
            body, etag, at = self._there(key)
            return tracecraft.Found(key, b"", etag=etag, modified=at, size=len(body),
                                    now=float(int(self.clock_at)))
        return self._read("HEAD", key, act)

    def _there(self, key):
        if key not in self.shared.objects:
            raise tracecraft.NotFound(f"{key} does not exist", key=key)
        return self.shared.objects[key]

    def put(self, key, data, *, if_match=None, if_none_match=False):
        self.sent.append((key, data))

        def act():
            was = self.shared.objects.get(key)
            if if_none_match and was or if_match and (not was or was[1] != if_match):
                raise tracecraft.Moved(f"{key}: 412", key=key)
            return self._store(key, data)
        return self._request("PUT", key, act)

    def _store(self, key, data):
        self.shared.serial += 1
        etag, at = f'"{self.shared.serial:x}"', float(int(self.clock_at))
        self.shared.objects[key] = (bytes(data), etag, at)
        self.log.append((key, bytes(data), self.clock_at, self.name))
        return tracecraft.Stamp(etag, modified=at, now=at)

    def delete(self, key):
        def act():
            if self.shared.objects.pop(key, None):
                self.log.append((key, None, self.clock_at, self.name))
        return self._read("DELETE", key, act)

    def list(self, prefix, *, start_after="", delimiter="", limit=None):
        found = self._read("LIST", prefix, lambda: self._listing(
            prefix, start_after, delimiter, limit))
        size = len(found.entries) + len(found.prefixes)
        if self.page and size > self.page:
            self.counts["LIST", prefix] += (size - 1) // self.page
        return found

    def _listing(self, prefix, start_after, delimiter, limit):
        entries, prefixes = [], []
        for key in sorted(self.shared.objects):
            if not key.startswith(prefix) or key <= start_after:
                continue
            head, cut, _ = key[len(prefix):].partition(delimiter or "\n")
            if limit is not None and len(entries) + len(prefixes) >= limit:
                return tracecraft.Listing(entries, prefixes, truncated=True,
                                          now=float(int(self.clock_at)))
            if cut and prefix + head + cut not in prefixes:
                prefixes.append(prefix + head + cut)
            elif not cut:
                body, etag, at = self.shared.objects[key]
                entries.append(tracecraft.Entry(key, size=len(body), etag=etag,
                                                modified=at))
        return tracecraft.Listing(entries, prefixes, now=float(int(self.clock_at)),
                                  truncated=False)

    def upload(self, key, path, *, if_none_match=False, progress=None):
        with open(path, "rb") as file:
            return self.put(key, file.read(), if_none_match=if_none_match)

    def download(self, key, file, *, size, start=0, progress=None):
        file.write(self.get(key).body[start:])

    def copy(self, key_from, key_to):
        return self.put(key_to, self.get(key_from).body)

    def clock(self):
        return self.clock_at

    def offset(self):
        return self.clock_at - time.time()

    def ensure(self):
        return None

    def credentials(self):
        return tracecraft.Keys("x", "y", source="memory")

    def close(self):
        return None

    # -- what tests ask

    def doc(self, key):
        """The document at `key` now, without a request; None when absent."""
        there = self.shared.objects.get(key)
        return json.loads(there[0]) if there else None

    def place(self, key, doc):
        """Write as somebody else would: 0.2, or a person with a bucket browser."""
        with self.shared.lock:
            data = doc if isinstance(doc, bytes) else json.dumps(doc).encode()
            self._store(key, data)

    def writes(self, key):
        """How many writes of `key` landed."""
        return sum(1 for name, body, *_ in self.log if name == key and body is not None)

    def history(self, key):
        """Every document `key` has held, in order."""
        return [json.loads(body) for name, body, *_ in self.log
                if name == key and body is not None]

    def under(self, prefix):
        return sorted(key for key in self.shared.objects if key.startswith(prefix))

    def asked(self):
        """{"METHOD key": times} of this handle, event names shortened."""
        tally = collections.Counter()
        for (method, key), times in self.counts.items():
            folder, _, leaf = key.rpartition("/")
            event = tracecraft.event_parts(leaf)[0] is not None
            tally[f"{method} {folder + '/*' if event else key}"] += times
        return dict(tally)


def _outcome(act):
    try:
        return act()
    except tracecraft.Error as why:
        return why


class LocalState:
    """Local state that survives a crash of its agent: what section 8 keeps on disk."""

    def __init__(self):
        self.kept, self.facts, self.set_at = {}, {}, {}

    def token(self, resource):
        return self.kept.get(resource)

    def hold(self, resource, token, *, ttl, at):
        self.kept[resource] = {"token": token, "ttl": ttl, "at": at}

    def drop(self, resource):
        self.kept.pop(resource, None)

    def holds(self):
        return dict(self.kept)

    def get(self, name):
        return self.facts.get(name)

    def set(self, name, value):
        self.facts[name] = json.loads(json.dumps(value))
        self.set_at[name] = time.time()

    def age(self, name):
        return time.time() - self.set_at[name] if name in self.set_at else None


def agent_on(bucket, name, *, instance="", ledger=tracecraft.Ledger, deadline=5,
             key="", **who):
    """A Project of agent `name` on its own handle; its warnings are in .warned."""
    warned = []
    ledger = ledger(bucket.handle(name), deadline=deadline, warn=warned.append)
    me = tracecraft.Who(name, instance or f"{name}-1", **who)
    settings = types.SimpleNamespace(
        project="p", config_path=None, config={}, state=who.get("state"), key=key,
        environ={"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"})
    project = tracecraft.Project(settings, ledger, me)
    project.warned = warned
    return project


@pytest.fixture
def bucket():
    return MemoryStore()


@pytest.fixture
def ada(bucket):
    return agent_on(bucket, "ada")


@pytest.fixture
def bob(bucket):
    return agent_on(bucket, "bob")


def refused(kind, act, *args, **how):
    """The error of exactly that kind which the act raises."""
    with pytest.raises(kind) as caught:
        act(*args, **how)
    assert type(caught.value) is kind
    return caught.value


def count_up(record):
    old = record.doc or {}
    return {**old, "n": old.get("n", 0) + 1}


def bump(project, times=1, **how):
    for _ in range(times):
        change = project.ledger.change("n.json", count_up, **how)
    return change


# -- outcomes of one write ---------------------------------------------


@pytest.mark.parametrize("kind, attempts", [
    ("ok", 1), ("lose", 1), ("drop", 2), ("busy", 2), ("throttle", 2), ("down", 2),
    ("twice", 1), ("late", 2)])
def test_one_change_is_applied_once_whatever_happens_to_it(ada, bucket, kind, attempts):
    ada.store.fault(kind)
    change = bump(ada)
    assert (change.wrote, change.doc["n"], bucket.doc("n.json")["n"]) == (True, 1, 1)
    assert bucket.writes("n.json") == 1
    assert ada.store.counts["PUT", "n.json"] == attempts


@pytest.mark.parametrize("first", TRANSIENT)
@pytest.mark.parametrize("second", TRANSIENT)
def test_two_troubles_in_a_row_apply_it_once_too(ada, bucket, first, second):
    bump(ada)
    ada.store.fault(first)
    ada.store.fault(second)
    bump(ada)
    assert [doc["n"] for doc in bucket.history("n.json")] == [1, 2]


def test_every_retry_sends_the_same_bytes(ada):
    for kind in ("drop", "busy", "throttle", "down", "late"):
        ada.store.fault(kind)
    bump(ada)
    assert len(ada.store.sent) >= 5
    assert len({data for _, data in ada.store.sent}) == 1


def test_a_lost_answer_is_settled_though_others_wrote_since(ada, bob, bucket):
    ada.store.fault("lose", after=lambda: bump(bob, 3))
    change = bump(ada)
    assert (change.wrote, change.doc["n"], change.after.doc["n"]) == (True, 1, 4)
    assert bucket.doc("n.json")["n"] == 4


def test_a_write_that_did_not_land_is_decided_again(ada, bob, bucket):
    bump(ada)
    ada.store.fault("drop", after=lambda: bump(bob))
    assert bump(ada).doc["n"] == 3
    assert bucket.writes("n.json") == 3


def test_a_late_landing_is_never_a_second_application(ada, bob, bucket):
    bump(ada)
    ada.store.fault("late", after=lambda: bump(bob))
    bump(ada)
    assert bucket.doc("n.json")["n"] == bucket.writes("n.json") == 3


def test_409_is_never_lost(ada):
    decided = []
    ada.store.fault("busy", times=3)
    ada.ledger.change("n.json", lambda r: decided.append(1) or count_up(r))
    assert decided == [1]


def test_409_until_the_deadline_is_unavailable_and_nothing_landed(bucket):
    ada = agent_on(bucket, "ada", deadline=0.1)
    ada.store.fault("busy", times=50)
    assert refused(tracecraft.Busy, bump, ada).exit == 7
    assert bucket.under("") == []


def test_412_on_ones_own_write_is_a_success(ada):
    decided = []
    ada.store.fault("twice")
    change = ada.ledger.change("n.json", lambda r: decided.append(1) or count_up(r))
    assert change.wrote and decided == [1]


def test_a_rival_between_read_and_write_is_seen_by_the_next_decision(ada, bob, bucket):
    ada.store.fault("ok", before=lambda: bump(bob))
    assert bump(ada).doc["n"] == 2


def test_what_cannot_be_settled_is_unknown_and_never_applied_twice(ada, bob, bucket):
    ada.store.fault("lose", after=lambda: bump(bob, tracecraft.RECENT))
    error = refused(tracecraft.Unknown, bump, ada)
    op = error.details["op"]
    assert error.exit == 9 and op.endswith("@1") and f"--op {op}" in error.hint
    refused(tracecraft.Unknown, bump, ada, op=op)
    assert bucket.doc("n.json")["n"] == tracecraft.RECENT + 1


@pytest.mark.parametrize("kind, landed", [("lose", True), ("drop", False)])
def test_an_unknown_outcome_is_settled_later_by_its_op(ada, bucket, kind, landed):
    ada.store.fault(kind)
    ada.store.fault("ok", "GET")
    ada.store.fault("dead", "GET")
    op = refused(tracecraft.Unknown, bump, ada).details["op"]
    assert bucket.writes("n.json") == landed
    assert bump(ada, op=op).wrote is not landed
    assert bucket.doc("n.json")["n"] == 1


def test_an_op_that_did_not_land_is_applied_after_others_wrote(ada, bob, bucket):
    bump(bob)
    ada.store.fault("drop")
    ada.store.fault("ok", "GET")
    ada.store.fault("dead", "GET")
    op = refused(tracecraft.Unknown, bump, ada).details["op"]
    assert op.endswith("@2")
    bump(bob)
    assert bump(ada, op=op).doc["n"] == 3


def test_a_writer_without_rev_makes_a_doubtful_outcome_unknown(ada, bucket):
    ada.store.fault("lose", after=lambda: bucket.place("n.json", {"n": 7}))
    refused(tracecraft.Unknown, bump, ada)
    assert bucket.doc("n.json") == {"n": 7}


def test_a_plain_412_without_doubt_is_decided_again_after_a_writer_without_rev(
        ada, bucket):
    bump(ada)
    ada.store.fault("ok", before=lambda: bucket.place("n.json", {"n": 7}))
    assert bump(ada).doc["n"] == 8


@pytest.mark.parametrize("after", ["denied", "dead", "down"])
def test_trouble_after_a_doubt_is_unknown_not_refused(bucket, after):
    ada = agent_on(bucket, "ada", deadline=0.1)
    ada.store.fault("drop")
    ada.store.fault(after, times=60)
    error = refused(tracecraft.Unknown, bump, ada)
    assert error.details["op"].endswith("@1")


def test_an_op_is_applied_once(ada, bob, bucket):
    bump(ada, op="job7")
    bump(bob, 3)
    assert bump(ada, op="job7").wrote is False
    bump(ada, op="job8")
    assert bucket.doc("n.json")["n"] == 5


def test_an_op_is_one_for_each_key(ada, bucket):
    bump(ada, op="job7")
    assert ada.ledger.change("m.json", count_up, op="job7").wrote


def test_what_follows_the_at_of_an_op_must_be_a_number(ada):
    assert refused(tracecraft.Usage, bump, ada, op="job@x").exit == 2


def test_eight_threads_lose_no_update(bucket):
    agents = [agent_on(bucket, f"a{n}", deadline=30) for n in range(8)]
    run_all([lambda a=a: bump(a, 25) for a in agents])
    assert bucket.doc("n.json")["n"] == bucket.writes("n.json") == 200
    assert chain_faults(bucket) == []


def run_all(acts):
    """Run the acts in threads of their own; the first of their errors is raised."""
    errors = []

    def guarded(act):
        try:
            act()
        except BaseException as why:  # noqa: a thread's error belongs to the test
            errors.append(why)
    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_rev_prev_and_recent_form_one_chain(ada, bob, bucket):
    for turn in range(20):
        bump((ada, bob)[turn % 2])
    docs = bucket.history("n.json")
    assert [doc["rev"] for doc in docs] == list(range(1, 21))
    assert [doc["prev"] for doc in docs[1:]] == [doc["nonce"] for doc in docs[:-1]]
    assert docs[-1]["recent"] == [f"{d['rev']}:{d['nonce']}" for d in docs[-16:]]


def test_a_decision_for_no_change_writes_nothing(ada, bob, bucket):
    bump(bob)
    change = ada.ledger.change("n.json", lambda record: record.doc)
    assert (change.wrote, ada.store.counts["PUT", "n.json"]) == (False, 0)


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff", b"",
                                  pytest.param(b"[" * 99_999, id="nested")])
def test_a_damaged_record_is_reported_and_kept(ada, bucket, body):
    bucket.place("n.json", body)
    error = refused(tracecraft.Corrupt, bump, ada)
    assert error.exit == 8 and "n.json" in error.message
    assert bucket.shared.objects["n.json"][0] == body


def test_fields_we_do_not_know_survive(ada, bucket):
    bucket.place("n.json", {"n": 1, "colour": {"deep": [1]}})
    bump(ada)
    assert bucket.doc("n.json")["colour"] == {"deep": [1]}


@pytest.mark.parametrize("first", ("ok", *TRANSIENT))
@pytest.mark.parametrize("second", ("ok", *TRANSIENT))
def test_created_bytes_are_written_once_whatever_happens(ada, bucket, first, second):
    for kind in (first, second):
        ada.store.fault(kind)
    ada.ledger.create_bytes("b", b"1")
    ada.ledger.create_bytes("b", b"1")
    assert (bucket.shared.objects["b"][0], bucket.writes("b")) == (b"1", 1)


def test_bytes_whose_creation_stays_open_are_unknown_and_carry_their_name(bucket):
    ada = agent_on(bucket, "ada", deadline=0.2)
    ada.store.fault("lose")
    ada.store.fault("dead", "HEAD", times=9)
    assert refused(tracecraft.Unknown, ada.ledger.create_bytes, "d/b", b"1"
                   ).details["op"] == "b@1"
    ada.store.forget()
    ada.ledger.create_bytes("d/b", b"1")
    assert bucket.writes("d/b") == 1


def test_a_created_record_is_written_once(ada, bucket):
    for kind in ("lose", "twice", "drop"):
        ada.store.fault(kind)
        assert ada.ledger.create(f"e/{kind}.json", {})
        assert bucket.writes(f"e/{kind}.json") == 1


def test_creating_needs_no_arbiter(ada, bucket):
    ada.store.verdict = {"atomic": False, "why": "ignores If-Match"}
    ada.store.fault("unsafe")
    assert ada.ledger.create("e/x.json", {"a": 1})
    assert bucket.doc("e/x.json")["a"] == 1
    ada.store.fault("unsafe")
    ada.ledger.create_bytes("e/y", b"1")
    assert bucket.shared.objects["e/y"][0] == b"1"


def test_information_is_overwritten_with_retries(ada, bucket):
    for kind in ("lose", "drop", "busy", "down"):
        ada.store.fault(kind)
    ada.ledger.put("agents/ada.json", {"id": "ada"})
    assert bucket.doc("agents/ada.json") == {"id": "ada"}


def test_an_advisory_store_is_refused(ada, bucket):
    ada.store.verdict = {"atomic": False, "why": "ignores If-Match"}
    error = refused(tracecraft.Unsafe, bump, ada)
    assert error.exit == 10 and "ignores If-Match" in error.message
    assert bucket.under("") == []


def test_an_allowed_advisory_store_warns_each_time(ada):
    ada.store.verdict = {"atomic": False, "why": "ignores If-Match"}
    ada.ledger.allow_advisory = True
    bump(ada, 2)
    assert [("advisory" in text) for text in ada.warned] == [True, True]


def test_the_verdict_of_the_project_saves_the_probe(ada, bucket):
    bucket.place("_project.json", {"verdicts": {bucket.url: {"atomic": True}}})
    ada.store.verdict = None
    bump(ada, 2)
    assert ada.store.counts["GET", "_project.json"] == 1


def test_the_verdict_of_this_user_saves_the_question(ada):
    kept = types.SimpleNamespace(load=lambda: {"atomic": True}, save=None)
    ada.store.verdict, ada.ledger.verdicts = None, kept
    bump(ada)
    assert ("GET", "_project.json") not in ada.store.counts


def test_an_age_is_the_difference_of_two_times_of_one_answer(ada, bucket):
    bump(ada)
    bucket.clock_at += 90
    assert ada.ledger.read("n.json").age == 90


def test_an_age_survives_a_proxy_that_strips_last_modified(ada, bucket, monkeypatch):
    bump(ada)
    bucket.clock_at += 90
    get = ada.store.get

    def stripped(key, **how):
        found = get(key, **how)
        found.modified = None
        return found
    monkeypatch.setattr(ada.store, "get", stripped)
    assert ada.ledger.read("n.json").age == 90


def test_a_project_that_lives_longer_than_its_deadline_still_retries(bucket):
    ada = agent_on(bucket, "ada", deadline=0.3)
    time.sleep(0.35)
    ada.store.fault("busy")
    assert ada.memory.incr("n")["value"] == "1"


@pytest.mark.parametrize("act", ["change", "memory"])
def test_a_record_that_never_rests_is_given_up_at_the_deadline(bucket, act):
    ada, bob = agent_on(bucket, "ada", deadline=0.4), agent_on(bucket, "bob")
    key = {"change": "n.json", "memory": "memory/n.json"}[act]
    ada.store.fault("ok", key=key, times=999, before=lambda: bob.ledger.change(
        key, lambda r: {**(r.doc or {}), "value": "1", "x": bob.ledger.hex()}))
    began = time.monotonic()
    refused(tracecraft.Busy, lambda: bump(ada) if act == "change" else
            ada.memory.incr("n"))
    assert time.monotonic() - began < 4


def test_a_decision_that_refuses_leaves_nothing_behind(ada, bob, bucket):
    def refuse(record):
        raise tracecraft.Conflict("no")
    bump(bob)
    refused(tracecraft.Conflict, ada.ledger.change, "n.json", refuse)
    assert bucket.writes("n.json") == 1 and ada.store.sent == []


def test_records_are_read_in_order_with_damage_in_its_place(ada, bucket):
    bucket.place("a.json", {"n": 1})
    bucket.place("b.json", b"{")
    found = ada.ledger.read_many(["b.json", "none.json", "a.json", "a.json"])
    assert [type(r.fault).__name__ for r in found] == ["Corrupt"] + ["NoneType"] * 3
    assert [r.doc for r in found] == [None, None, {"n": 1}, {"n": 1}]


def chain_faults(bucket):
    """What is wrong with the rev/nonce/prev chains of all records; [] if nothing."""
    wrong, last = [], {}
    for key, body, *_ in bucket.log:
        doc = json.loads(body) if body is not None else {}
        if "nonce" not in doc:
            last.pop(key, None)
            continue
        old = last.get(key)
        if old and (doc["rev"], doc["prev"]) != (old["rev"] + 1, old["nonce"]):
            wrong.append(f"{key}: rev {doc['rev']} does not follow {old['rev']}")
        if not old and doc["prev"] is not None:
            wrong.append(f"{key}: rev {doc['rev']} follows nothing")
        last[key] = doc
    return wrong


# == 11. Steps =========================================================
#
# The table of protocol.md 4 with two agents, and one agent in two instances.

CLAIM = "steps/s/claim.json"
STATUS = "steps/s/status.json"
HANDOFF = "steps/s/handoff.json"


@pytest.fixture
def ada2(bucket):
    """The same agent in another session."""
    return agent_on(bucket, "ada", instance="ada-2")


def pass_time(bucket, seconds=LEASE_OVER + 1):
    bucket.clock_at += seconds


def test_the_first_claim_gets_token_1(ada, bucket):
    claim = ada.claim("s")
    doc = bucket.doc(CLAIM)
    assert (claim.token, claim.attempt, claim.fresh) == (1, 1, True)
    assert (doc["agent"], doc["instance"], doc["state"], doc["ttl"], doc["rev"]) == (
        "ada", "ada-1", "in_progress", tracecraft.TTL, 1)


def test_a_held_step_is_refused_with_holder_age_and_seconds_left(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket, 100)
    error = refused(tracecraft.Held, bob.claim, "s")
    assert error.exit == 3 and error.details == {
        "holder": "ada", "age_s": 100, "expires_in_s": LEASE_OVER - 100, "token": 1}
    assert bucket.writes(CLAIM) == 1


def test_my_own_claim_is_mine_again_without_a_write(ada, bucket):
    ada.claim("s")
    claim = ada.claim("s")
    assert (claim.token, claim.fresh, bucket.writes(CLAIM)) == (1, False, 1)


def test_my_own_claim_older_than_half_its_lease_is_renewed(ada, bucket):
    ada.claim("s")
    pass_time(bucket, tracecraft.TTL / 2 + 1)
    assert ada.claim("s").token == 1
    assert bucket.writes(CLAIM) == 2
    assert ada.step_status("s")["age_s"] == 0


def test_my_other_instance_is_refused_and_told_of_resume(ada, ada2):
    ada.claim("s")
    error = refused(tracecraft.Held, ada2.claim, "s")
    assert error.exit == 3 and "--resume" in error.hint


def test_resume_takes_over_and_fences_my_old_instance(ada, ada2):
    ada.claim("s")
    claim = ada2.claim("s", resume=True)
    assert (claim.token, claim.attempt) == (2, 1)
    assert refused(tracecraft.Fenced, ada.complete, "s").exit == 4


def test_resume_does_not_take_from_another_agent(ada, bob):
    ada.claim("s")
    refused(tracecraft.Held, bob.claim, "s", resume=True)


@pytest.mark.parametrize("seconds, free", [
    (tracecraft.TTL, False), (LEASE_OVER - 1, False), (LEASE_OVER, True)])
def test_a_lease_ends_ttl_and_grace_after_its_last_write(
        ada, bob, bucket, seconds, free):
    ada.claim("s")
    pass_time(bucket, seconds)
    if free:
        assert bob.claim("s").token == 2
    else:
        refused(tracecraft.Held, bob.claim, "s")


def test_a_takeover_adds_one_to_token_and_attempt_and_says_why(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket)
    claim = bob.claim("s")
    assert (claim.token, claim.attempt, bucket.doc(CLAIM)["agent"]) == (2, 2, "bob")
    assert "takeover" in bucket.doc(CLAIM)["history"][-1]["why"]


def test_the_previous_holder_gets_a_message(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket)
    bob.claim("s")
    [message] = ada.inbox(new=True).messages
    assert (message["from"], message["step"]) == ("bob", "s")
    assert "token 2" in message["message"]


def test_a_holder_that_cannot_be_told_does_not_spoil_the_takeover(bob, bucket):
    bucket.place(CLAIM, {"agent": "no name/at all", "state": "in_progress", "ttl": 9})
    pass_time(bucket, 15)
    assert bob.claim("s").token == 2
    assert "was not told" in bob.warned[-1]


@pytest.mark.parametrize("act", ["renew", "complete", "release"])
def test_a_stale_holder_is_fenced_and_changes_nothing(ada, bob, bucket, act):
    ada.claim("s")
    pass_time(bucket)
    bob.claim("s")
    before = bucket.doc(CLAIM)
    error = refused(tracecraft.Fenced, getattr(ada, act), "s")
    assert error.exit == 4 and "bob" in error.message
    assert (error.details["holder"], error.details["token"]) == ("bob", 2)
    assert bucket.doc(CLAIM) == before


@pytest.mark.parametrize("ended", ["complete", "release"])
def test_a_stale_holder_is_fenced_after_the_next_one_ended_it_too(
        ada, bob, bucket, ended):
    ada.claim("s")
    pass_time(bucket)
    bob.claim("s")
    getattr(bob, ended)("s")
    for act in (ada.renew, ada.complete, ada.release):
        refused(tracecraft.Fenced, act, "s")


@pytest.mark.parametrize("act", ["renew", "complete", "release"])
def test_who_never_held_it_gets_a_conflict(ada, bob, bucket, act):
    ada.claim("s")
    error = refused(tracecraft.Held, getattr(bob, act), "s")
    assert error.exit == 3
    assert bucket.writes(CLAIM) == 1


@pytest.mark.parametrize("act", ["renew", "release"])
def test_nothing_to_renew_or_release_is_a_conflict(ada, bucket, act):
    assert refused(tracecraft.Conflict, getattr(ada, act), "s").exit == 3
    assert bucket.under("") == []


def test_a_token_given_by_the_caller_acts_for_another_instance(ada, ada2):
    token = ada.claim("s").token
    ada2.renew("s", token=token)
    assert ada2.complete("s", token=token)["state"] == "complete"


def test_a_token_of_the_environment_is_for_its_step_only(ada, bucket):
    ada.claim("s")
    ada.claim("t")
    lent = agent_on(bucket, "ada", instance="x", lent={"step/s": 1})
    lent.renew("s")
    refused(tracecraft.Held, lent.renew, "t")


def test_an_explicit_instance_may_use_the_token_of_the_record(ada, bucket):
    ada.claim("s")
    again = agent_on(bucket, "ada", instance="ada-1", explicit=True)
    assert again.complete("s")["token"] == 1


def test_without_a_token_another_process_cannot_end_my_claim(ada, ada2):
    ada.claim("s")
    refused(tracecraft.Held, ada2.complete, "s")


def test_renewing_begins_the_lease_anew_and_keeps_the_token(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket, LEASE_OVER - 5)
    assert ada.renew("s")["token"] == 1
    pass_time(bucket, LEASE_OVER - 5)
    refused(tracecraft.Held, bob.claim, "s")


def test_a_renewal_that_loses_to_my_other_process_goes_on(ada, bucket):
    ada.claim("s")
    twin = agent_on(bucket, "ada", lent={"step/s": 1})
    ada.store.fault("ok", key=CLAIM, before=lambda: twin.renew("s"))
    assert ada.renew("s")["rev"] == 3


def test_a_lease_of_ttl_0_never_ends(ada, bob, bucket):
    ada.claim("s", ttl=0)
    pass_time(bucket, 10_000 * HOUR)
    assert refused(tracecraft.Held, bob.claim, "s").details["expires_in_s"] is None


def test_release_gives_it_back_and_twice_is_once(ada, bob, bucket):
    ada.claim("s")
    ada.release("s")
    assert ada.release("s")["state"] == "released"
    assert bucket.writes(CLAIM) == 2
    assert (bob.claim("s").token, bucket.doc(CLAIM)["attempt"]) == (2, 2)


def test_a_released_step_names_nobody_and_reads_as_pending_for_02(ada, bucket):
    ada.claim("s")
    ada.release("s")
    assert bucket.doc(CLAIM)["agent"] == "(released)"
    assert bucket.doc(STATUS)["status"] == "pending"


@pytest.mark.parametrize("state, status", [
    ("complete", "complete"), ("failed", "blocked"), ("blocked", "blocked"),
    ("needs_review", "needs_review")])
def test_an_end_is_projected_as_02_reads_it(ada, bucket, state, status):
    ada.claim("s")
    ada.complete("s", state=state, note="why", to="bob", findings=["f"])
    claim, shown, note = (bucket.doc(k) for k in (CLAIM, STATUS, HANDOFF))
    assert (shown["status"], shown["state"], shown["agent"]) == (status, state, "ada")
    assert (shown["token"], shown["rev"]) == (claim["token"], claim["rev"])
    assert (note["schema"], note["from_agent"], note["next_agent"], note["note"]) == (
        2, "ada", "bob", "why")
    assert note["findings"] == ["f"] and claim["handoffs"][-1]["note"] == "why"


def test_the_same_end_again_writes_nothing(ada, bucket):
    ada.claim("s")
    ada.complete("s", note="one")
    before = len(bucket.log)
    assert ada.complete("s", note="two")["state"] == "complete"
    assert len(bucket.log) == before


def test_another_end_is_refused(ada, bucket):
    ada.claim("s")
    ada.complete("s")
    assert refused(tracecraft.Conflict, ada.complete, "s", state="failed").exit == 3
    assert bucket.doc(CLAIM)["state"] == "complete"


def test_an_end_without_any_claim_creates_it_ended(ada, bob, bucket):
    ada.complete("s", note="done by hand")
    assert (bucket.doc(CLAIM)["state"], bucket.doc(CLAIM)["token"]) == ("complete", 1)
    refused(tracecraft.Conflict, bob.complete, "s", state="failed")


@pytest.mark.parametrize("state", ["complete", "failed", "blocked", "needs_review"])
def test_an_ended_step_is_claimed_only_with_reopen(ada, bob, state):
    ada.complete("s", state=state)
    error = refused(tracecraft.Conflict, bob.claim, "s")
    assert error.exit == 3 and "--reopen" in error.hint
    claim = bob.claim("s", reopen=True)
    assert (claim.token, claim.attempt) == (2, 1)


def test_reopening_a_held_step_is_no_takeover(ada, bob):
    ada.claim("s")
    refused(tracecraft.Held, bob.claim, "s", reopen=True)


def test_force_ends_it_with_the_next_token_and_the_reason(ada, bob, bucket):
    ada.claim("s")
    doc = bob.complete("s", force="ada is gone", note="n")
    assert (doc["token"], doc["agent"], doc["state"]) == (2, "bob", "complete")
    assert "ada is gone" in doc["history"][-1]["why"]
    refused(tracecraft.Fenced, ada.complete, "s")


def test_approving_completes_and_rejecting_gives_back(ada, bob, bucket):
    ada.complete("s", state="needs_review")
    ada.complete("t", state="needs_review")
    assert bob.approve("s")["state"] == "complete"
    doc = bob.reject("t", note="no tests")
    assert (doc["state"], doc["token"]) == ("released", 1)
    assert "no tests" in doc["history"][-1]["why"]
    assert bob.claim("t").token == 2
    refused(tracecraft.Conflict, bob.approve, "s")


def test_a_step_whose_attempts_are_used_up_fails(ada, bob, bucket):
    for agent in (ada, bob, ada):
        agent.claim("s")
        pass_time(bucket)
    error = refused(tracecraft.Conflict, bob.claim, "s")
    doc = bucket.doc(CLAIM)
    assert error.exit == 3 and (doc["state"], doc["token"]) == ("failed", 4)
    assert bucket.doc(STATUS)["status"] == "blocked"
    refused(tracecraft.Fenced, ada.complete, "s")
    assert bob.claim("s", reopen=True).attempt == 1


def test_a_spec_may_allow_fewer_attempts(ada, bob, bucket):
    ada.add_step("s", max_attempts=1)
    ada.claim("s")
    pass_time(bucket)
    refused(tracecraft.Conflict, bob.claim, "s")
    assert bucket.doc(CLAIM)["state"] == "failed"


def test_a_failed_step_tells_its_last_holder_that_it_failed(ada, bob, bucket):
    ada.add_step("s", max_attempts=1)
    ada.claim("s")
    pass_time(bucket)
    refused(tracecraft.Conflict, bob.claim, "s")
    [message] = ada.inbox().messages
    assert "took it over" not in message["message"]


@pytest.mark.parametrize("ttl", [-1, 0.5, "60", True, 2**60, float("nan")])
def test_a_lease_is_a_whole_number_of_seconds(ada, bucket, ttl):
    """Anything else would be read back as 0: a lease that never ends."""
    assert refused(tracecraft.Usage, ada.claim, "s", ttl=ttl).exit == 2
    assert bucket.under("") == []


@pytest.mark.parametrize("state", ["done", "released", "in_progress", "", "pending"])
def test_an_end_is_one_of_four(ada, bucket, state):
    """Another word would be read back as in_progress, with the hand-off inside."""
    ada.claim("s")
    assert refused(tracecraft.Usage, ada.complete, "s", state=state).exit == 2
    assert bucket.writes(CLAIM) == 1


# -- winners -----------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_claim_wins_once_through_any_trouble(ada, bob, bucket, kind):
    ada.store.fault(kind)
    assert ada.claim("s").token == 1
    assert bucket.writes(CLAIM) == 1
    refused(tracecraft.Held, bob.claim, "s")


def test_a_claim_whose_rival_landed_first_is_refused(ada, bob):
    ada.store.fault("ok", before=lambda: bob.claim("s"))
    assert refused(tracecraft.Held, ada.claim, "s").details["holder"] == "bob"


def test_sixteen_claims_at_once_have_one_winner(bucket):
    winners, agents = [], [agent_on(bucket, f"a{n}") for n in range(16)]

    def claim(agent):
        try:
            winners.append(agent.claim("s").token)
        except tracecraft.Held:
            pass
    run_all([lambda a=a: claim(a) for a in agents])
    assert winners == [1]


def test_sixteen_takeovers_at_once_have_one_winner(ada, bucket):
    ada.claim("s")
    pass_time(bucket)
    winners, agents = [], [agent_on(bucket, f"a{n}") for n in range(16)]

    def claim(agent):
        try:
            winners.append(agent.claim("s").token)
        except tracecraft.Held:
            pass
    run_all([lambda a=a: claim(a) for a in agents])
    assert winners == [2] and bucket.doc(CLAIM)["token"] == 2


def test_a_takeover_fails_when_the_holder_renewed_meanwhile(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket)
    bob.store.fault("ok", key=CLAIM, before=lambda: ada.renew("s"))
    refused(tracecraft.Held, bob.claim, "s")
    assert ada.complete("s")["token"] == 1


def test_a_claim_taken_over_before_its_answer_was_settled_is_fenced(ada, bob, bucket):
    def overtake():
        pass_time(bucket)
        bob.claim("s")
    ada.store.fault("lose", key=CLAIM, after=overtake)
    assert refused(tracecraft.Fenced, ada.claim, "s").exit == 4
    assert bucket.doc(CLAIM)["agent"] == "bob"


def test_a_renewal_taken_over_before_its_answer_was_settled_is_fenced(
        ada, bob, bucket):
    def overtake():
        pass_time(bucket)
        bob.claim("s")
    ada.claim("s")
    ada.store.fault("lose", key=CLAIM, after=overtake)
    refused(tracecraft.Fenced, ada.renew, "s")


def test_a_lease_lost_during_a_slow_claim_is_not_handed_out(ada, bob, bucket):
    def slow():
        time.sleep(0.4)  # over a third of the lease of one second
        pass_time(bucket, 7)
        bob.claim("s")
    ada.store.fault("ok", key=CLAIM, after=slow)
    refused(tracecraft.Fenced, ada.claim, "s", ttl=1)


def test_a_slow_claim_is_renewed_before_it_is_handed_out(ada, bucket):
    ada.store.fault("ok", key=CLAIM, after=lambda: time.sleep(0.4))
    assert ada.claim("s", ttl=1).token == 1
    assert bucket.writes(CLAIM) == 2


def test_a_repeated_op_does_not_hand_out_the_token_of_a_successor(ada, bob, bucket):
    ada.claim("s", op="c1")
    pass_time(bucket)
    bob.claim("s")
    with pytest.raises((tracecraft.Fenced, tracecraft.Conflict)):
        ada.claim("s", op="c1")


def test_a_repeated_op_does_not_give_my_next_instances_token_to_the_old_one(ada, ada2):
    ada.claim("s", op="c1")
    ada2.claim("s", resume=True)
    with pytest.raises((tracecraft.Fenced, tracecraft.Conflict)):
        ada.claim("s", op="c1")
    refused(tracecraft.Fenced, ada.complete, "s")


@pytest.mark.parametrize("act", ["renew", "complete"])
def test_a_repeated_end_or_renewal_does_not_learn_a_newer_token(ada, ada2, act):
    ada.claim("s")
    getattr(ada, act)("s", op="x1")
    ada2.claim("s", resume=True, reopen=True)
    try:
        getattr(ada, act)("s", op="x1")
    except tracecraft.Fenced:
        pass
    refused(tracecraft.Fenced, ada.release, "s")


def test_a_repeated_claim_op_of_a_step_ended_since_hands_out_no_claim(ada):
    ada.claim("s", op="c1")
    ada.complete("s")
    refused(tracecraft.Conflict, ada.claim, "s", op="c1")


def test_a_claim_as_a_context_completes_or_releases(ada, bucket):
    with ada.claim("s"):
        pass
    with pytest.raises(ZeroDivisionError), ada.claim("t"):
        raise ZeroDivisionError
    assert bucket.doc(CLAIM)["state"] == "complete"
    assert bucket.doc("steps/t/claim.json")["state"] == "released"


def test_a_claim_that_was_fenced_leaves_quietly(ada, bob, bucket):
    with pytest.raises(tracecraft.Fenced):
        with ada.claim("s") as claim:
            pass_time(bucket)
            bob.claim("s")
            claim.renew()
    assert bucket.doc(CLAIM)["agent"] == "bob"


# -- needs and waiting -------------------------------------------------


def test_a_step_waits_for_its_needs(ada, bob):
    ada.add_step("s", needs=["a", "b"])
    ada.complete("a")
    error = refused(tracecraft.Blocked, bob.claim, "s")
    assert error.exit == 5 and error.details["missing"] == ["b"]
    assert bob.step_status("s")["state"] == "waiting"
    ada.complete("b")
    assert bob.claim("s").token == 1


@pytest.mark.parametrize("state", ["failed", "blocked", "needs_review"])
def test_a_need_that_ended_otherwise_is_not_met(ada, bob, state):
    ada.add_step("s", needs=["a"])
    ada.complete("a", state=state)
    refused(tracecraft.Blocked, bob.claim, "s")


def test_needs_can_be_ignored(ada, bob):
    ada.add_step("s", needs=["a"])
    assert bob.claim("s", ignore_needs=True).token == 1


def test_many_needs_are_looked_up_in_one_listing(ada, bob):
    ada.add_step("s", needs=[f"n{i}" for i in range(9)])
    assert len(refused(tracecraft.Blocked, bob.claim, "s").details["missing"]) == 9
    assert [m for m, _ in bob.store.counts.elements()].count("LIST") == 2


def test_needs_count_when_a_lost_race_leaves_a_released_step(ada, bob, bucket):
    ada.claim("s", ignore_needs=True)
    ada.add_step("s", needs=["a"])
    pass_time(bucket)
    bob.store.fault("ok", key=CLAIM, before=lambda: ada.release("s"))
    refused(tracecraft.Blocked, bob.claim, "s")


def test_the_same_spec_again_changes_nothing_and_another_is_refused(ada, bob, bucket):
    ada.add_step("S.1", title="t", needs=["a"])
    bob.add_step("s-1", title="t", needs=["a"])
    assert bucket.writes("steps/s-1/spec.json") == 1
    refused(tracecraft.Conflict, bob.add_step, "s-1", title="other", needs=["a"])
    refused(tracecraft.Usage, bob.add_step, "x", needs=["x"])


def test_a_claim_can_wait_for_its_holder(ada, bob, bucket):
    ada.claim("s")
    threading.Timer(0.2, lambda: ada.release("s")).start()
    assert bob.claim("s", wait=5).token == 2


def test_a_wait_that_ends_says_who_holds_it(ada, bob):
    ada.claim("s")
    error = refused(tracecraft.TimedOut, bob.claim, "s", wait=0.1)
    assert error.exit == 6 and error.details["holder"] == "ada"


def test_waiting_ends_when_all_are_complete(ada, bob):
    ada.complete("s")
    threading.Timer(0.2, lambda: ada.complete("t")).start()
    views = bob.wait_for(["s", "t"], timeout=5)
    assert [(v["step"], v["state"]) for v in views] == [("s", "complete"),
                                                        ("t", "complete")]


def test_waiting_for_any_ends_with_the_first(ada, bob):
    ada.complete("t")
    assert [v["state"] for v in bob.wait_for(["s", "t"], any_=True)] == [
        "pending", "complete"]


@pytest.mark.parametrize("state", ["blocked", "failed"])
def test_waiting_for_what_needs_somebody_ends_at_once(ada, bob, state):
    ada.complete("s", state=state)
    error = refused(tracecraft.Blocked, bob.wait_for, ["s", "t"])
    assert (error.exit, error.details["step"]) == (5, "s")


def test_waiting_for_any_goes_on_while_one_can_come_true(ada, bob):
    ada.complete("s", state="failed")
    refused(tracecraft.TimedOut, bob.wait_for, ["s", "t"], any_=True, timeout=0.1)
    ada.complete("t", state="blocked")
    refused(tracecraft.Blocked, bob.wait_for, ["s", "t"], any_=True)


def test_a_review_is_waited_for(ada, bob):
    ada.complete("s", state="needs_review")
    threading.Timer(0.2, lambda: bob.approve("s")).start()
    assert bob.wait_for(["s"], timeout=5)[0]["state"] == "complete"


def test_a_wait_times_out_and_ticks(ada):
    ticks = []
    tick = lambda views, left: ticks.append((views[0]["state"], left))
    error = refused(tracecraft.TimedOut, ada.wait_for, ["s"], timeout=0.3, tick=tick)
    assert error.exit == 6 and ticks[0][0] == "pending" and 0 < ticks[0][1] <= 0.3


def test_waiting_for_six_steps_is_one_listing_a_round(ada, bob):
    names = [f"w{n}" for n in range(6)]
    for name in names:
        ada.complete(name)
    bob.wait_for(names + names)
    assert [m for m, _ in bob.store.counts.elements()].count("LIST") == 1


# -- 0.2.x in the same bucket ------------------------------------------


def test_a_claim_of_02_never_ends_and_is_mine_by_name(ada, bob, bucket):
    bucket.place(CLAIM, {"agent": "ada", "claimed_at": "2024-01-01T00:00:00+00:00"})
    pass_time(bucket, 9999 * HOUR)
    refused(tracecraft.Held, bob.claim, "s")
    assert ada.complete("s")["token"] == 1


def test_a_bare_status_without_claim_is_the_state(ada, bob, bucket):
    bucket.place(STATUS, {"status": "in_progress", "agent": "ada"})
    assert bob.step_status("s")["agent"] == "ada"
    refused(tracecraft.Held, bob.claim, "s")
    assert ada.claim("s").token == 1
    assert bucket.doc(CLAIM)["agent"] == "ada"


def test_a_bare_pending_status_leaves_the_step_free(ada, bucket):
    bucket.place(STATUS, {"status": "pending", "agent": None})
    assert ada.claim("s").token == 1
    assert bucket.doc(STATUS)["status"] == "in_progress"


def test_a_bare_end_of_my_own_step_is_honoured_at_once(ada, bob, bucket):
    ada.claim("s")
    bucket.place(STATUS, {"status": "complete", "agent": "ada"})
    assert bob.step_status("s")["state"] == "complete"
    refused(tracecraft.Conflict, bob.claim, "s")
    assert bob.claim("s", reopen=True).token == 2


def test_an_end_forced_by_02_fences_the_holder(ada, bob, bucket):
    ada.claim("s")
    bucket.place(STATUS, {"status": "complete", "agent": "eve"})
    view = bob.step_status("s")
    assert (view["state"], view["agent"], view["token"]) == ("complete", "eve", 2)
    refused(tracecraft.Fenced, ada.complete, "s")


@pytest.mark.parametrize("act", ["renew", "release"])
def test_an_end_forced_by_02_is_not_undone_by_its_stale_holder(ada, bob, bucket, act):
    ada.claim("s")
    bucket.place(STATUS, {"status": "complete", "agent": "eve"})
    try:
        getattr(ada, act)("s")
    except tracecraft.Fenced:
        pass
    assert bob.step_status("s")["state"] == "complete"


def test_a_status_seen_when_the_token_rose_is_never_adopted_again(ada, bob, bucket):
    bucket.place(STATUS, {"status": "complete", "agent": "eve"})
    bob.store.fault("crash-before", key=STATUS)
    with pytest.raises(Crash):
        bob.claim("s", reopen=True)
    assert ada.step_status("s")["state"] == "in_progress"
    refused(tracecraft.Held, ada.claim, "s")


def test_a_takeover_rewrites_the_status_that_02_reads_first(ada, bob, bucket):
    ada.complete("s")
    bob.claim("s", reopen=True)
    assert (bucket.doc(STATUS)["status"], bucket.doc(STATUS)["agent"]) == (
        "in_progress", "bob")


def test_a_handoff_of_02_is_kept_when_ours_is_projected(ada, bucket):
    ada.claim("s")
    bucket.place(HANDOFF, {"schema": 2, "from_agent": "old", "note": "from 0.2"})
    ada.complete("s", note="ours")
    assert [note["note"] for note in bucket.doc(CLAIM)["handoffs"]] == [
        "from 0.2", "ours"]
    assert bucket.doc(HANDOFF)["note"] == "ours"


def test_a_handoff_that_only_02_wrote_is_shown(ada, bucket):
    bucket.place(HANDOFF, {"schema": 2, "from_agent": "old", "note": "from 0.2"})
    assert ada.handoff("s")["note"] == "from 0.2"
    refused(tracecraft.NotFound, ada.handoff, "t")


def test_a_projection_never_goes_back(ada, bob, bucket):
    """A slow projector meets the status of a later token (protocol.md 11.3)."""
    def later():
        bob.claim("s", reopen=True)
        bob.complete("s", note="later")
    ada.claim("s")
    ada.store.fault("ok", key=STATUS, before=later)
    ada.complete("s", note="earlier")
    assert (bucket.doc(STATUS)["token"], bucket.doc(HANDOFF)["note"]) == (2, "later")


@pytest.mark.parametrize("kind", TRANSIENT)
def test_projections_survive_any_trouble(ada, bucket, kind):
    ada.claim("s")
    ada.store.fault(kind, key=HANDOFF)
    ada.store.fault(kind, key=STATUS)
    ada.complete("s")
    assert bucket.doc(STATUS)["rev"] == bucket.doc(HANDOFF)["rev"] == 2


def test_a_projection_that_cannot_be_written_is_a_warning(ada, bucket):
    ada.ledger.allow_seconds = 0.1
    ada.claim("s")
    ada.store.fault("down", key=STATUS, times=99)
    assert ada.complete("s")["state"] == "complete"
    assert STATUS in ada.warned[-1]


def test_a_projection_that_is_denied_is_a_warning_too(ada, bucket):
    ada.claim("s")
    ada.store.fault("denied", key=STATUS)
    assert ada.complete("s")["state"] == "complete"


# -- damage ------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["claim.json", "spec.json", "status.json"])
def test_a_damaged_document_stops_its_step_and_no_other(ada, bob, bucket, leaf):
    ada.complete("t")
    bucket.place(f"steps/s/{leaf}", b"{not json")
    error = refused(tracecraft.Corrupt, bob.claim, "s")
    assert error.exit == 8 and f"steps/s/{leaf}" in error.message
    assert bucket.shared.objects[f"steps/s/{leaf}"][0] == b"{not json"
    assert bob.step_status("t")["state"] == "complete"
    assert bob.claim("u").token == 1


def test_a_damaged_spec_does_not_stop_the_holder(ada, bucket):
    ada.claim("s")
    bucket.place("steps/s/spec.json", b"[]")
    ada.renew("s")
    assert ada.complete("s")["state"] == "complete"


def test_a_damaged_handoff_does_not_stop_the_end(ada, bucket):
    ada.claim("s")
    bucket.place(HANDOFF, b"oops")
    assert ada.complete("s")["state"] == "complete"
    assert bucket.shared.objects[HANDOFF][0] == b"oops" and HANDOFF in ada.warned[0]
    assert bucket.doc(STATUS)["state"] == "complete"


@pytest.mark.parametrize("doc", [
    {}, {"agent": 5}, {"agent": "ada", "token": "x", "history": 7, "handoffs": {}},
    {"agent": None, "state": ["x"], "ttl": "soon"}, {"recent": 5, "rev": "no"}])
def test_a_claim_of_wrong_shape_is_held_or_reported_never_free(bob, bucket, doc):
    bucket.place(CLAIM, doc)
    with pytest.raises((tracecraft.Held, tracecraft.Corrupt)):
        bob.claim("s")
    assert bucket.writes(CLAIM) == 1


def test_fields_of_a_claim_that_we_do_not_know_survive(ada, bob, bucket):
    ada.claim("s")
    bucket.place(CLAIM, {**bucket.doc(CLAIM), "x-colour": "red"})
    ada.renew("s")
    ada.release("s")
    bob.claim("s")
    bob.complete("s")
    assert bucket.doc(CLAIM)["x-colour"] == "red"


def test_two_spellings_of_one_step_meet(ada, bob, bucket):
    ada.claim("S1.A")
    refused(tracecraft.Held, bob.claim, "s1-a")
    assert bucket.doc("steps/s1-a/claim.json")["spelling"] == "S1.A"


@pytest.mark.parametrize("name", ["", " ", "_x", "a/b", "..", "ä", "x" * 201, "a b"])
def test_names_that_do_not_fit_are_refused_before_any_request(ada, name):
    assert refused(tracecraft.Usage, ada.claim, name).exit == 2
    assert ada.store.requests == 0


# -- presence ----------------------------------------------------------


def test_presence_keeps_what_was_there_and_counts_age_by_the_store(ada, bob, bucket):
    bucket.place("agents/ada.json", {"id": "ada", "started_at": "then", "x": 1})
    ada.heartbeat(step="s")
    pass_time(bucket, 400)
    [row] = bob.agents()
    assert (row["started_at"], row["x"], row["step"]) == ("then", 1, "s")
    assert (row["status"], row["heartbeat_age_s"]) == ("stale", 400)


def test_checkin_renews_my_claims_and_says_what_was_lost(ada, bob, bucket):
    ada.claim("s")
    ada.claim("t", ttl=60)
    pass_time(bucket, 100)
    bob.claim("t")
    bob.send("ada", "hello")
    seen = ada.checkin()
    assert (seen["renewed"], seen["lost"], seen["unread"]) == (["s"], ["t"], 2)


def aged_claim(bucket, seconds):
    """An agent with local state whose claim of s was renewed `seconds` ago."""
    state = LocalState()
    agent = agent_on(bucket, "ada", state=state)
    agent.claim("s")
    state.kept["step/s"]["at"] -= seconds
    agent.heartbeat()
    return agent_on(bucket, "ada", state=state)


@pytest.mark.parametrize("seconds, mutating, renewed", [
    (tracecraft.TTL / 3 + 9, True, 1), (tracecraft.TTL / 3 - 9, True, 0),
    (tracecraft.TTL, False, 0)])
def test_a_mutating_command_renews_what_is_due(bucket, seconds, mutating, renewed):
    agent = aged_claim(bucket, seconds)
    agent.tidy(mutating=mutating)
    assert agent.store.counts["PUT", CLAIM] == renewed


def test_a_due_renewal_that_was_lost_is_a_warning(bucket, bob):
    agent = aged_claim(bucket, tracecraft.TTL)
    pass_time(bucket)
    bob.claim("s")
    agent.tidy(mutating=True)
    assert "lease of step s was lost" in agent.warned[-1]
    agent.tidy(mutating=True)
    assert len(agent.warned) == 1


@pytest.mark.parametrize("kind", ["dead", "denied", "down"])
def test_what_goes_beside_a_command_never_fails_it(bucket, kind):
    agent = aged_claim(bucket, tracecraft.TTL)
    agent.ledger.allow_seconds = 0.1
    agent.who.state.set_at["presence"] -= 100
    agent.store.fault(kind, "", times=99)
    agent.tidy(mutating=True)


@pytest.mark.parametrize("seconds, written", [(50, 0), (70, 1)])
def test_presence_is_refreshed_after_a_minute(bucket, seconds, written):
    agent = aged_claim(bucket, 0)
    agent.who.state.set_at["presence"] -= seconds
    agent.tidy(mutating=False)
    assert agent.store.counts["PUT", "agents/ada.json"] == written


def test_who_left_reads_as_left(ada, bob):
    ada.heartbeat()
    ada.leave()
    assert [row["status"] for row in bob.agents()] == ["left"]


def test_a_damaged_presence_does_not_hide_the_others(ada, bob, bucket):
    bucket.place("agents/eve.json", b"}")
    bucket.place("agents/joe.json", {"heartbeat": 5, "status": []})
    ada.heartbeat()
    assert "ada" in [row["id"] for row in bob.agents()]


# == 12. Memory ========================================================
#
# Values with revisions; their history; what 0.2 wrote between.

NESTED = "[" * 99_999  # what json.loads gives up on with a RecursionError


def test_a_value_is_read_back_with_who_and_which_revision(ada, bob):
    ada.memory.set("plan.status", "ready")
    doc = bob.memory.get("plan.status")
    assert (doc["key"], doc["value"], doc["set_by"], doc["rev"]) == (
        "plan.status", "ready", "ada", 1)


def test_the_last_writer_wins_and_history_has_all(ada, bob):
    ada.memory.set("k", "one")
    bob.memory.set("k", "two")
    assert ada.memory.get("k")["value"] == "two"
    assert [d["value"] for d in ada.memory.history("k")] == ["one", "two"]
    assert [d["value"] for d in ada.memory.history("k", limit=1)] == ["two"]


@pytest.mark.parametrize("condition, holds", [
    ({"if_rev": 1}, True), ({"if_rev": 2}, False), ({"if_rev": 0}, False),
    ({"if_absent": True}, False), ({"if_value": "one"}, True),
    ({"if_value": "two"}, False)])
def test_a_condition_on_memory_holds_or_refuses_with_the_rev(
        ada, bob, condition, holds):
    ada.memory.set("k", "one")
    if holds:
        assert bob.memory.set("k", "new", **condition)["rev"] == 2
        return
    error = refused(tracecraft.Conflict, bob.memory.set, "k", "new", **condition)
    assert error.exit == 3 and error.details["rev"] == 1
    assert [d["value"] for d in ada.memory.history("k")] == ["one"]


def test_if_absent_and_if_rev_0_create(ada):
    assert ada.memory.set("a", "x", if_absent=True)["rev"] == 1
    assert ada.memory.set("b", "x", if_rev=0)["rev"] == 1
    refused(tracecraft.Conflict, ada.memory.set, "c", "x", if_value="")


def test_a_condition_is_judged_again_after_a_lost_race(ada, bob):
    ada.memory.set("k", "one")
    ada.store.fault("ok", key="memory/k.json",
                    before=lambda: bob.memory.set("k", "two"))
    refused(tracecraft.Conflict, ada.memory.set, "k", "three", if_rev=1)
    assert [d["value"] for d in ada.memory.history("k")] == ["one", "two"]


def test_a_deleted_key_is_absent_keeps_its_history_and_counts_on(ada, bucket):
    ada.memory.set("k", "one")
    ada.memory.delete("k")
    refused(tracecraft.NotFound, ada.memory.get, "k")
    refused(tracecraft.NotFound, ada.memory.delete, "k")
    assert ada.memory.list() == ([], False)
    assert bucket.doc("memory/k.json")["value"] == ""
    assert ada.memory.set("k", "two", if_absent=True)["rev"] == 3
    assert "deleted_at" not in bucket.doc("memory/k.json")


def test_a_value_expires_by_the_stores_clock(ada, bucket):
    ada.memory.set("k", "v", expires_in=60)
    pass_time(bucket, 59)
    assert ada.memory.get("k")["value"] == "v"
    pass_time(bucket, 2)
    refused(tracecraft.NotFound, ada.memory.get, "k")
    assert ada.memory.incr("k")["value"] == "1"
    assert ada.memory.get("k")["value"] == "1"


@pytest.mark.parametrize("start, by, total", [
    (None, 1, "1"), ("41", 1, "42"), ("1.5", 1, "2.5"), ("1.5", 0.5, "2"),
    ("-3", -4, "-7"), ("9007199254740993", 1, "9007199254740994"), ("0", 0, "0")])
def test_incr_adds(ada, start, by, total):
    if start:
        ada.memory.set("n", start)
    assert ada.memory.incr("n", by)["value"] == total


@pytest.mark.parametrize("text", ["x", "true", "[1]", "null", '"5"', "1 2"])
def test_incr_of_what_is_no_number_is_refused(ada, text):
    ada.memory.set("n", text)
    assert refused(tracecraft.Conflict, ada.memory.incr, "n").exit == 3
    assert len(ada.memory.history("n")) == 1


@pytest.mark.parametrize("text, by", [
    ("9" * 400, 1), ("NaN", 1), ("Infinity", 1), ("1e308", 1e308), ("1", float("nan")),
    ("1", float("inf")), pytest.param(NESTED, 1, id="nested")])
def test_a_sum_that_is_no_number_is_refused(ada, text, by):
    ada.memory.set("n", text)
    with pytest.raises((tracecraft.Conflict, tracecraft.Usage)):
        ada.memory.incr("n", by)
    assert ada.memory.get("n")["value"] == text


@pytest.mark.parametrize("text", ['{"a": 1}', "5", "[oops", '"text"',
                                  pytest.param(NESTED, id="nested")])
def test_nothing_is_appended_to_json_that_is_no_list(ada, bucket, text):
    bucket.place("memory/k.json", {"value": text, "type": "json"})
    refused(tracecraft.Conflict, ada.memory.append, "k", "x")


@pytest.mark.parametrize("patch", [
    "", "{]", pytest.param(NESTED, id="nested"),
    pytest.param('{"a":' * 9999, id="deep")])
def test_a_patch_that_cannot_be_read_is_a_usage_error(ada, patch):
    refused(tracecraft.Usage, ada.memory.merge, "k", patch)


def test_a_deep_patch_merges_or_is_refused(ada):
    patch = '{"a":' * 500 + "1" + "}" * 500
    assert json.loads(ada.memory.merge("k", patch)["value"]) == json.loads(patch)


def test_append_grows_text_by_lines_and_lists_by_elements(ada):
    ada.memory.append("t", "a")
    assert ada.memory.append("t", "b")["value"] == "a\nb"
    ada.memory.set("l", '["a"]', as_json=True)
    ada.memory.append("l", '{"b": 1}')
    assert json.loads(ada.memory.append("l", "plain")["value"]) == [
        "a", {"b": 1}, "plain"]


def test_merge_follows_rfc_7396(ada):
    ada.memory.merge("o", '{"a": {"b": 1, "c": 2}}')
    doc = ada.memory.merge("o", '{"a": {"b": null}, "d": [1]}')
    assert json.loads(doc["value"]) == {"a": {"c": 2}, "d": [1]}
    refused(tracecraft.Usage, ada.memory.merge, "o", "{")
    ada.memory.set("t", "text")
    refused(tracecraft.Conflict, ada.memory.merge, "t", "{}")


@pytest.mark.parametrize("kind", TRANSIENT)
def test_an_update_of_memory_is_applied_once_through_any_trouble(ada, bucket, kind):
    ada.memory.append("k", "0")
    ada.store.fault(kind, key="memory/k.json")
    ada.store.fault(kind, key="memory/_history")
    assert ada.memory.append("k", "1")["value"] == "0\n1"
    assert [d["value"] for d in ada.memory.history("k")] == ["0", "0\n1"]


def test_two_hundred_increments_from_eight_agents_count_two_hundred(bucket):
    agents = [agent_on(bucket, f"a{n}", deadline=30) for n in range(8)]

    def work(agent):
        for _ in range(25):
            agent.memory.incr("n")
    run_all([lambda a=a: work(a) for a in agents])
    assert agents[0].memory.get("n")["value"] == "200"
    values = [int(d["value"]) for d in agents[0].memory.history("n", limit=0)]
    assert sorted(values) == list(range(1, 201))
    assert chain_faults(bucket) == []


def test_an_op_of_memory_is_applied_once_even_after_200_others(ada, bob):
    ada.memory.incr("n", 5, op="o1")
    for _ in range(200):
        bob.memory.incr("n")
    assert ada.memory.incr("n", 5, op="o1")["value"] == "205"


def test_the_history_shows_both_writes_of_two_agents_with_one_op(ada, bob):
    ada.memory.incr("n", op="job7")
    bob.memory.incr("n", op="job7")
    assert [d["value"] for d in ada.memory.history("n")] == ["1", "2"]


def test_an_unknown_update_keeps_its_snapshot_and_is_settled_by_its_op(ada, bucket):
    ada.store.fault("lose", key="memory/n.json")
    ada.store.fault("ok", "GET", "memory/n.json")
    ada.store.fault("dead", "GET", "memory/n.json")
    error = refused(tracecraft.Unknown, ada.memory.incr, "n")
    assert [d["value"] for d in ada.memory.history("n")] == ["1"]
    assert ada.memory.incr("n", op=error.details["op"])["value"] == "1"
    assert len(ada.memory.history("n")) == 1


def test_a_snapshot_of_unknown_outcome_means_that_nothing_was_changed(ada, bucket):
    ada.memory.set("n", "1")
    ada.store.fault("lose", key="memory/_history")
    ada.store.fault("dead", "GET", "memory/_history")
    assert refused(tracecraft.Unavailable, ada.memory.incr, "n").exit == 7
    assert bucket.doc("memory/n.json")["value"] == "1"
    assert [d["value"] for d in ada.memory.history("n")] == ["1"]


def test_the_history_of_a_crashed_attempt_is_told_by_what_landed(ada, bob):
    """The first attempt is refused, its snapshot survives a crash, then again."""
    ada.memory.incr("n")
    ada.store.fault("ok", key="memory/n.json", before=lambda: bob.memory.incr("n"))
    ada.store.fault("crash-before", "GET", "memory/n.json")
    ada.store.faults.insert(0, ["ok", "GET", "memory/n.json", None, None])
    with pytest.raises(Crash):
        ada.memory.incr("n", op="o1")
    ada.store.forget()
    assert ada.memory.incr("n", op="o1")["value"] == "3"
    assert [d["value"] for d in ada.memory.history("n")] == ["1", "2", "3"]


def test_a_value_over_64_kib_moves_to_a_blob_and_comes_back(ada, bob, bucket):
    ada.memory.set("big", "ä" * 40_000)
    assert "sha256" in bucket.doc("memory/big.json")["value"]
    assert bob.memory.get("big")["value"] == "ä" * 40_000
    ada.memory.append("big", "end")
    assert bob.memory.get("big")["value"].endswith("ä\nend")


@pytest.mark.parametrize("text", ["", "\x00\x1b[31m", "\ud800", "a\r\nb\u2028",
                                  "ﬁ\u202e"])
def test_any_text_is_kept_as_it_is_or_escaped(ada, text):
    ada.memory.set("k", text)
    got = ada.memory.get("k")["value"]
    assert got == text or got == text.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("key", ["", "a..b", ".a", "a/b", "_x", "a._x", "ä", "a b",
                                 "a\n"])
def test_keys_that_do_not_fit_are_refused(ada, key):
    assert refused(tracecraft.Usage, ada.memory.set, key, "v").exit == 2
    assert ada.store.requests == 0


def test_existing_names_of_02_are_readable(ada, bucket):
    bucket.place("memory/with space.json", {"value": "v", "set_by": "x"})
    assert ada.memory.get("with space")["value"] == "v"
    assert [d["key"] for d in ada.memory.list()[0]] == ["with space"]


def test_after_02_overwrote_it_the_rev_exceeds_all_history(ada, bucket):
    for _ in range(3):
        ada.memory.incr("n")
    bucket.place("memory/n.json", {"value": "7", "set_by": "eve", "set_at": "x"})
    refused(tracecraft.Conflict, ada.memory.set, "n", "1", if_rev=3)
    refused(tracecraft.Conflict, ada.memory.set, "n", "1", if_rev=0)
    doc = ada.memory.incr("n")
    assert (doc["value"], doc["rev"]) == ("8", 4)


def test_a_list_is_cut_and_says_so(ada):
    for n in range(5):
        ada.memory.set(f"a.k{n}", "v")
    ada.memory.delete("a.k0")
    items, truncated = ada.memory.list("a", limit=3)
    assert [d["key"] for d in items] == ["a.k1", "a.k2", "a.k3"] and truncated
    assert ada.memory.list("a", limit=4)[1] is False
    assert ada.memory.list("b") == ([], False)


def test_damaged_memory_is_reported_kept_and_hides_nothing(ada, bucket):
    ada.memory.set("good", "v")
    bucket.place("memory/bad.json", b"{")
    for act in (lambda: ada.memory.set("bad", "x"), lambda: ada.memory.get("bad")):
        assert "memory/bad.json" in refused(tracecraft.Corrupt, act).message
    assert [d["key"] for d in ada.memory.list()[0]] == ["good"]
    assert "memory/bad.json" in ada.warned[0]
    assert bucket.shared.objects["memory/bad.json"][0] == b"{"


def test_a_damaged_snapshot_does_not_hide_the_history(ada, bucket):
    ada.memory.set("k", "v")
    bucket.place("memory/_history/k/1700000000000000000_eve_00000000.json", b"{")
    assert [d["value"] for d in ada.memory.history("k")] == ["v"]


@pytest.mark.parametrize("doc", [{}, {"value": 5}, {"value": None}, {"value": ["x"]},
                                 {"value": "v", "expires_at": "never"},
                                 {"value": "v", "blob": "no", "rev": "x"}])
def test_memory_of_odd_shape_can_be_read_listed_and_replaced(ada, bucket, doc):
    bucket.place("memory/k.json", doc)
    assert ada.memory.get("k")["key"] == "k"
    assert len(ada.memory.list()[0]) == 1
    assert ada.memory.set("k", "new")["value"] == "new"


def test_a_refused_update_leaves_no_snapshot(ada, bob, bucket):
    ada.store.fault("ok", key="memory/k.json", before=lambda: bob.memory.set("k", "b"))
    ada.memory.set("k", "a")
    assert len(bucket.under("memory/_history/k/")) == 2


def test_a_denied_update_leaves_no_snapshot(ada, bucket):
    ada.store.fault("denied", key="memory/k.json")
    refused(tracecraft.Denied, ada.memory.set, "k", "a")
    assert bucket.under("memory/") == []


# == 13. Mail ==========================================================
#
# A cursor that trusts only the store's clock, moved after the output was flushed.


def mail_texts(batch):
    return [message["message"] for message in batch.messages]


def read_new(project, **how):
    """The texts of a read that was shown and committed."""
    batch = project.inbox(new=True, **how)
    batch.commit()
    return mail_texts(batch)


def place_message(bucket, to, text, *, behind=0, sender="eve", seq=0):
    """A message whose sender's clock is `behind` seconds slow."""
    ns = int((bucket.clock_at - behind) * 1e9) + seq
    key = tracecraft.event_key(f"messages/{to}/", at_ns=ns, agent=sender,
                               uuid8=f"{seq:08x}")
    bucket.place(key, {"from": sender, "to": to, "message": text, "sent_at": "x"})
    return key


def test_a_message_arrives_with_its_fields(ada, bob):
    ada.send("bob", "hello", step="S.1", thread="t", reply_to="r", kind="question",
             subject="su", importance="high", ack=True)
    [message] = bob.inbox().messages
    assert {name: message[name] for name in ("from", "to", "message", "step", "thread",
                                             "reply_to", "kind", "subject", "ack")} == {
        "from": "ada", "to": "bob", "message": "hello", "step": "s-1", "thread": "t",
        "reply_to": "r", "kind": "question", "subject": "su", "ack": True}
    assert message["target"] == "direct" and message["verified"] is False


def test_a_message_is_new_until_it_was_committed(ada, bob):
    ada.send("bob", "one")
    assert mail_texts(bob.inbox(new=True)) == ["one"]
    assert read_new(bob) == ["one"]
    assert read_new(bob) == []
    assert mail_texts(bob.inbox()) == ["one"]


def test_messages_come_in_the_order_they_were_sent(ada, bob):
    for n in range(5):
        ada.send("bob" if n % 2 else "_broadcast", str(n))
    assert read_new(bob) == list("01234")


def test_a_broadcast_reaches_everybody_but_its_sender(ada, bob):
    ada.send("_broadcast", "all")
    bob.send("_broadcast", "too")
    assert (read_new(ada), read_new(bob)) == (["too"], ["all"])


def test_only_own_broadcasts_are_no_news_and_cost_no_reads(ada):
    for n in range(3):
        ada.send("_broadcast", str(n))
    ada.store.forget()
    assert read_new(ada) == []
    assert set(m for m, _ in ada.store.counts) == {"LIST"}


@pytest.mark.parametrize("behind", [3 * HOUR, 200, -200, -3 * HOUR])
def test_a_sender_with_a_wrong_clock_is_read_once(bob, bucket, behind):
    place_message(bucket, "bob", "first")
    assert read_new(bob) == ["first"]
    pass_time(bucket, HOUR)
    place_message(bucket, "bob", "skewed", behind=behind, seq=1)
    assert read_new(bob) == ["skewed"]
    for _ in range(5):
        pass_time(bucket, HOUR)
        place_message(bucket, "bob", "more", seq=9)
        assert read_new(bob) == ["more"]


def test_a_message_that_surfaces_up_to_five_minutes_late_is_new(bob, bucket):
    late = place_message(bucket, "bob", "late")
    hidden = bucket.shared.objects.pop(late)
    pass_time(bucket, 299)
    place_message(bucket, "bob", "prompt", seq=1)
    assert read_new(bob) == ["prompt"]
    bucket.shared.objects[late] = hidden
    assert read_new(bob) == ["late"]


def test_what_a_limit_withheld_is_shown_next(bob, bucket):
    for n in range(7):
        place_message(bucket, "bob", str(n), seq=n)
        pass_time(bucket, HOUR)
    batch = bob.inbox(new=True, limit=3)
    batch.commit()
    assert mail_texts(batch) == ["0", "1", "2"] and batch.truncated
    assert read_new(bob, limit=3) == ["3", "4", "5"]
    assert read_new(bob) == ["6"]


def test_what_a_filter_withheld_stays_new(ada, bob, bucket):
    ada.send("bob", "from ada", thread="t1")
    pass_time(bucket, HOUR)
    place_message(bucket, "bob", "from eve")
    assert read_new(bob, by="eve") == ["from eve"]
    pass_time(bucket, HOUR)
    assert read_new(bob, thread="t1") == ["from ada"]
    assert read_new(bob) == []


def test_a_crash_between_showing_and_committing_shows_it_again(ada, bob, bucket):
    ada.send("bob", "one")
    bob.inbox(new=True)
    again = agent_on(bucket, "bob")
    assert read_new(again) == ["one"]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_commit_survives_any_trouble(ada, bob, kind):
    ada.send("bob", "one")
    bob.store.fault(kind, key="_cursor")
    assert read_new(bob) == ["one"]
    assert read_new(bob) == []


def test_of_two_readers_both_see_all_and_none_loses_a_message(ada, bob, bucket):
    other = agent_on(bucket, "bob", instance="bob-2")
    ada.send("bob", "one")
    first = bob.inbox(new=True)
    ada.send("bob", "two")
    second = other.inbox(new=True)
    second.commit()
    first.commit()
    assert (mail_texts(first), mail_texts(second)) == (["one"], ["one", "two"])
    assert read_new(agent_on(bucket, "bob")) == []


def test_a_reader_with_a_limit_does_not_hide_what_another_has_not_shown(
        ada, bob, bucket):
    other = agent_on(bucket, "bob", instance="bob-2")
    for n in range(4):
        ada.send("bob", str(n))
        pass_time(bucket, HOUR)
    first, second = bob.inbox(new=True, limit=1), other.inbox(new=True, limit=2)
    second.commit()
    first.commit()
    assert read_new(agent_on(bucket, "bob")) == ["2", "3"]


def test_many_readers_at_once_lose_no_message(bucket):
    """Invariant 2 of protocol.md 11, over readers that share one agent id."""
    shown = collections.Counter()
    senders = [agent_on(bucket, f"s{n}") for n in range(3)]
    readers = [agent_on(bucket, "bob", instance=f"b{n}") for n in range(3)]

    def send(agent):
        for n in range(10):
            agent.send("bob", f"{agent.agent}-{n}")

    def read(agent):
        for _ in range(8):
            shown.update(read_new(agent, limit=4))
            time.sleep(0.005)
    run_all([lambda a=a: send(a) for a in senders] +
            [lambda a=a: read(a) for a in readers])
    while True:
        rest = read_new(readers[0])
        shown.update(rest)
        if not rest:
            break
    assert set(shown) == {f"s{a}-{n}" for a in range(3) for n in range(10)}


def test_waiting_for_mail_ends_with_the_first_message(ada, bob):
    threading.Timer(0.2, lambda: ada.send("bob", "now")).start()
    assert mail_texts(bob.inbox(new=True, wait=5)) == ["now"]


def test_waiting_for_mail_times_out(bob):
    assert refused(tracecraft.TimedOut, bob.inbox, new=True, wait=0.1).exit == 6


def test_an_unknown_recipient_gets_it_and_the_sender_a_suggestion(ada, bob):
    bob.heartbeat()
    ada.send("bbo", "hello")
    assert "'bbo'" in ada.warned[0] and "did you mean bob?" in ada.warned[0]
    ada.send("bob", "hello")
    assert len(ada.warned) == 1


@pytest.mark.parametrize("name", ["", "_x", "a/b", "..", "_broadcastx", "ä"])
def test_a_recipient_that_does_not_fit_is_refused(ada, name):
    assert refused(tracecraft.Usage, ada.send, name, "hi").exit == 2
    assert ada.store.requests == 0


def test_a_message_of_ten_megabytes_is_sent_by_digest(ada, bob, bucket):
    text = "long\n" * (2 << 20)
    sent = ada.send("bob", text)
    [message] = bob.inbox().messages
    [part] = message["artifacts"]
    assert (part["size"], len(message["message"]) < 2000) == (len(text), True)
    assert len(bucket.shared.objects[sent["key"]][0]) < tracecraft.MAX_MESSAGE
    assert message["message"].startswith("long\nlong")


@pytest.mark.parametrize("text", ["", "\x1b[2J\x00", "\u202eevil", "\ud800", "a\r\nb"])
def test_a_message_of_odd_characters_is_delivered_not_interpreted(ada, bob, text):
    ada.send("bob", text)
    [got] = mail_texts(bob.inbox())
    assert got == text or got == text.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_message_is_sent_once_through_any_trouble(ada, bob, bucket, kind):
    ada.send("bob", "warm up")
    ada.store.fault(kind)
    ada.send("bob", "one")
    assert mail_texts(bob.inbox()) == ["warm up", "one"]


def test_a_message_sent_again_with_its_op_is_one_message(ada, bob, bucket):
    ada.send("bob", "one", op="m1")
    pass_time(bucket, 10)
    ada.send("bob", "one", op="m1")
    assert mail_texts(bob.inbox()) == ["one"]


def test_a_message_of_unknown_outcome_is_settled_by_its_op(ada, bob):
    ada.send("bob", "warm up")
    ada.store.fault("lose")
    ada.store.fault("dead", "GET")
    error = refused(tracecraft.Unknown, ada.send, "bob", "one")
    ada.send("bob", "one", op=error.details["op"])
    assert mail_texts(bob.inbox()) == ["warm up", "one"]


def test_a_damaged_message_is_shown_as_such_and_once(ada, bob, bucket):
    key = place_message(bucket, "bob", "x")
    bucket.place(key, b"{")
    ada.send("bob", "good")
    shown = read_new(bob)
    assert len(shown) == 2 and "unreadable" in shown[0] and key in shown[0]
    assert read_new(bob) == []


@pytest.mark.parametrize("doc", [{}, {"from": 5, "message": ["x"]}, {"message": None}])
def test_a_message_of_odd_shape_is_shown(bob, bucket, doc):
    key = place_message(bucket, "bob", "x")
    bucket.place(key, doc)
    assert len(read_new(bob)) == 1


def test_a_message_deleted_while_it_is_read_is_skipped(ada, bob):
    sent = ada.send("bob", "gone")
    ada.send("bob", "stays")
    bob.store.fault("ok", "GET", sent["key"],
                    before=lambda: bob.mail.delete(sent["key"]))
    assert read_new(bob) == ["stays"]


def test_deleting_is_for_my_own_mailbox(ada, bob):
    sent = ada.send("bob", "x")
    refused(tracecraft.Usage, ada.mail.delete, sent["key"])
    bob.mail.delete(sent["key"])
    assert mail_texts(bob.inbox()) == []


# -- acknowledging -----------------------------------------------------


@pytest.mark.parametrize("name", ["id", "key", "start"])
def test_a_message_is_acknowledged_by_id_beginning_or_key(ada, bob, bucket, name):
    sent = ada.send("bob", "x", ack=True)
    ada.send("bob", "y")
    sent["start"] = sent["id"][:8]
    assert bob.ack(sent[name])["message"] == sent["key"]
    leaf = sent["key"].rsplit("/", 1)[1]
    assert bucket.doc(f"messages/bob/_acks/{leaf}")["by"] == "bob"


def test_acknowledging_twice_is_once(ada, bob, bucket):
    sent = ada.send("bob", "x")
    bob.ack(sent["id"])
    pass_time(bucket, 60)
    bob.ack(sent["id"])
    assert bucket.writes(bucket.under("messages/bob/_acks/")[0]) == 1


@pytest.mark.parametrize("name", ["nope", "", "00000000", "../x", "_cursor.json"])
def test_acknowledging_what_is_not_there_is_not_found(bob, ada, name):
    ada.send("bob", "x")
    assert refused(tracecraft.NotFound, bob.ack, name).exit == 1


def test_acknowledging_is_not_reading(ada, bob):
    sent = ada.send("bob", "x")
    bob.ack(sent["id"])
    assert read_new(bob) == ["x"]


# -- cursors of 0.2 and damage -----------------------------------------


def test_a_cursor_of_02_is_taken_with_its_seen_and_its_age_as_floor(bob, bucket):
    old = place_message(bucket, "bob", "old")
    pass_time(bucket, HOUR)
    seen = place_message(bucket, "bob", "seen", seq=1)
    place_message(bucket, "bob", "unseen", seq=2)
    bucket.place("messages/bob/_cursor.json", {
        "direct": {"watermark": old, "seen": [seen]}, "updated_at": "x"})
    assert read_new(bob) == ["unseen"]
    assert bucket.doc("messages/bob/_cursor.json")["rev"] == 1


def test_our_cursor_hides_from_02_only_what_was_shown(ada, bob, bucket):
    """0.2 shows keys above `watermark` that are not in `seen`."""
    place_message(bucket, "bob", "one")
    pass_time(bucket, HOUR)
    place_message(bucket, "bob", "two", seq=1)
    read_new(bob)
    stream = bucket.doc("messages/bob/_cursor.json")["direct"]
    late = place_message(bucket, "bob", "late", behind=200, seq=2)
    keys = [key for key in bucket.under("messages/bob/1")
            if key > stream["watermark"] and key not in stream["seen"]]
    assert keys == [late]


@pytest.mark.parametrize("doc", [
    {}, {"direct": "text"}, {"direct": 5}, {"direct": {"seen": 7, "floor": "x"}},
    {"rev": 1, "direct": None}, {"rev": "x", "direct": {"floor": True}}])
def test_a_cursor_of_odd_shape_shows_rather_than_hides(bob, bucket, doc):
    bucket.place("messages/bob/_cursor.json", doc)
    place_message(bucket, "bob", "one")
    assert read_new(bob) == ["one"]
    assert read_new(bob) == []


def test_a_damaged_cursor_is_reported_not_overwritten(ada, bob, bucket):
    ada.send("bob", "one")
    bucket.place("messages/bob/_cursor.json", b"{")
    error = refused(tracecraft.Corrupt, bob.inbox, new=True)
    assert error.exit == 8 and "_cursor.json" in error.message
    assert mail_texts(bob.inbox()) == ["one"]
    assert bucket.shared.objects["messages/bob/_cursor.json"][0] == b"{"


def test_a_cursor_kept_locally_is_dropped_when_another_moved_it(ada, bob, bucket):
    ada.send("bob", "one")
    read_new(bob)
    ada.send("bob", "two")
    read_new(agent_on(bucket, "bob"))
    assert read_new(bob) == []


def test_the_cursor_keeps_no_keys_that_its_floor_covers(ada, bob, bucket):
    for n in range(20):
        place_message(bucket, "bob", str(n), seq=n)
        pass_time(bucket, HOUR)
        read_new(bob)
    assert len(bucket.doc("messages/bob/_cursor.json")["direct"]["seen"]) <= 2


# == Plans =============================================================
# == Broken transfers ==================================================
#
# Uploads and downloads that a process does not live to finish: the next one goes on,
# two at once do not meet in one file, and no size of file needs more memory.


TRANSFER = """
import os, sys
import tracecraft
tracecraft.MULTIPART, tracecraft.PART = 3 << 20, 1 << 20
act, url, path, last = sys.argv[1:]

def progress(done, total):
    if done >= int(last):
        os.kill(os.getpid(), 9)

if act == "upload":
    sys.argv[1:] = ["artifact", "upload", path, "--store", url]
    tracecraft.main()
else:
    with tracecraft.connect(url) as project:
        project.artifacts.download("big", output=path, keep=1, progress=progress)
with open("/proc/self/status") as file:  # getrusage would tell our parent's peak
    print(*(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


def transfer(act, url, path, environ, last=1 << 60):
    """A process that moves one file and is killed at byte `last`, started."""
    environ = {**environ, "PYTHONPATH": os.path.dirname(PROGRAM), "TRACECRAFT_AGENT": "a",
               "HOME": str(pathlib.Path(path).parent), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-S", "-c", TRANSFER, act, url, str(path), str(last)],
        cwd=environ["HOME"], env=environ, encoding="utf-8", stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def finished(process):
    """The peak memory in MiB of a transfer that ends well."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return int(out.split()[-1]) / 1024


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@pytest.fixture
def big_there(s3):
    """(store URL, bytes) of an artifact `big` of 6 MiB in a bucket."""
    data = random.Random(1).randbytes(6 << 20)
    with on_s3(s3) as project:
        project.artifacts.put_bytes("big", data)
    s3.clear_log()
    return f"s3://bucket/p?endpoint={s3.url}", data


def on_s3(s3, agent="ada", **keys):
    """A library handle on the project `p` of the suite's S3 server."""
    return tracecraft.connect(f"s3://bucket/p?endpoint={s3.url}", agent=agent,
                              environ={**s3.env(), **keys}, cwd="/")


def ranges(s3):
    return [req.headers.get("range") for req in s3.log
            if req.method == "GET" and "/big" in req.key and "manifests" not in req.key]


def partials(folder):
    return [name for name in os.listdir(folder) if name.startswith(".tmp-")]


@linux
def test_a_download_killed_by_the_kernel_goes_on_where_it_broke(s3, big_there, tmp_path):
    url, data = big_there
    target = tmp_path / "out"
    assert transfer("download", url, target, s3.env(), 4 << 20).wait(60) == -9
    [part] = partials(tmp_path)
    there = (tmp_path / part).stat().st_size
    assert 3 << 20 < there < 6 << 20 and not target.exists()
    finished(transfer("download", url, target, s3.env()))
    assert ranges(s3)[-1] == f"bytes={there}-"
    assert target.read_bytes() == data and partials(tmp_path) == []


@linux
def test_an_upload_killed_by_the_kernel_sends_only_the_parts_that_lack(s3, tmp_path):
    s3.latency, path = 0.15, tmp_path / "big"
    data = random.Random(2).randbytes(12 << 20)
    path.write_bytes(data)
    url = f"s3://bucket/p?endpoint={s3.url}"
    process = transfer("upload", url, path, s3.env())
    until = time.monotonic() + 60
    while not s3.uploads or len(next(iter(s3.uploads.values())).parts) < 4:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    time.sleep(0.3)  # what was under way lands or does not
    [upload] = s3.uploads.values()
    s3.latency, there = 0, len(upload.parts)
    s3.clear_log()
    finished(transfer("upload", url, path, s3.env()))
    assert len(sent_parts(s3)) == 12 - there and there >= 4
    assert s3.body(f"p/blobs/{sha(data)}") == data and not s3.uploads


def test_a_stale_partial_of_other_content_is_discarded(project, tmp_path):
    project.artifacts.put_bytes("a", b"first content")
    with pytest.raises(Crash):
        broken_download(project, tmp_path / "a", after=5)
    assert len(partials(tmp_path)) == 1
    project.artifacts.put_bytes("a", b"other content", overwrite=True)
    project.artifacts.download("a", output=str(tmp_path / "a"), keep=1)
    assert (tmp_path / "a").read_bytes() == b"other content"
    assert partials(tmp_path) == []


def broken_download(project, target, after, how=Crash):
    """A download that ends after some bytes, as by a signal or by the network."""
    inner = project.ledger.store.download

    def download(key, file, **more):
        data = project.ledger.store.get(key).body
        file.write(data[more.get("start", 0):after])
        raise how
    project.ledger.store.download = download
    try:
        project.artifacts.download("a", output=str(target), keep=1)
    finally:
        project.ledger.store.download = inner


def test_a_damaged_partial_costs_a_second_try_and_is_not_believed(project, tmp_path):
    project.artifacts.put_bytes("a", b"0123456789")
    with pytest.raises(Crash):
        broken_download(project, tmp_path / "a", after=5)
    [part] = partials(tmp_path)
    (tmp_path / part).write_bytes(b"01X34")
    project.artifacts.download("a", output=str(tmp_path / "a"), keep=1)
    assert (tmp_path / "a").read_bytes() == b"0123456789" and partials(tmp_path) == []


@pytest.mark.parametrize("left, fetched", [(b"", 0), (b"01234", 5), (b"0123456789", None),
                                           (b"0123456789more", 0)])
def test_what_a_partial_has_is_not_fetched_again(project, tmp_path, left, fetched):
    project.artifacts.put_bytes("a", b"0123456789")
    with pytest.raises(Crash):
        broken_download(project, tmp_path / "a", after=5)
    [part] = partials(tmp_path)
    (tmp_path / part).write_bytes(left)
    inner, starts = project.ledger.store.download, []

    def download(key, file, **more):
        starts.append(more["start"])
        return inner(key, file, **more)
    project.ledger.store.download = download
    project.artifacts.download("a", output=str(tmp_path / "a"), keep=1)
    assert starts == ([] if fetched is None else [fetched])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("why, kept", [(tracecraft.Unavailable("503"), 1),
                                       (KeyboardInterrupt(), 1),
                                       (tracecraft.Denied("403"), 0)])
def test_only_a_transfer_that_broke_leaves_something_behind(project, tmp_path, why, kept):
    project.artifacts.put_bytes("a", b"0123456789")
    with pytest.raises(type(why)):
        broken_download(project, tmp_path / "a", after=5, how=why)
    assert len(partials(tmp_path)) == kept


def test_two_downloads_side_by_side_write_two_files(handle, tmp_path):
    first, second, target = handle(), handle("bob"), tmp_path / "a"
    first.artifacts.put_bytes("a", b"0123456789")
    inner = first.ledger.store.download

    def download(key, file, **more):
        file.write(b"01234")
        file.flush()
        second.artifacts.download("a", output=str(target), keep=1)
        assert target.read_bytes() == b"0123456789"
        target.unlink()
        return inner(key, file, **{**more, "start": 5})
    first.ledger.store.download = download
    first.artifacts.download("a", output=str(target), keep=1)
    assert target.read_bytes() == b"0123456789" and partials(tmp_path) == []


def test_a_partial_that_became_the_target_is_not_written_to(tmp_path):
    """Between open and lock its holder may have given it its name."""
    with tracecraft.Landing(str(tmp_path / "a"), "f" * 64) as landing:
        landing.file.write(b"whole")
        path, landed = landing.path, tracecraft.try_lock

        def try_lock(fd):
            landing.land()
            landing.file.close()
            return landed(fd)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracecraft, "try_lock", try_lock)
            assert tracecraft.open_alone(path) is None


def test_a_link_in_place_of_a_partial_is_not_followed(project, tmp_path):
    project.artifacts.put_bytes("a", b"0123456789")
    with pytest.raises(Crash):
        broken_download(project, tmp_path / "a", after=5)
    [part] = partials(tmp_path)
    (tmp_path / part).unlink()
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / part).symlink_to(tmp_path / "mine")
    project.artifacts.download("a", output=str(tmp_path / "a"), keep=1)
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_server_that_ignores_the_range_costs_bytes_but_no_damage(s3, store3, tmp_path):
    store3.put("big", b"0123456789")
    s3.get_key, inner = lambda req: inner(without_range(req)), s3.get_key
    with open(tmp_path / "f", "w+b") as file:
        file.write(b"01234")
        store3.download("big", file, size=10, start=5)
        file.seek(0)
        assert file.read() == b"0123456789"


def without_range(req):
    req.headers.pop("range", None)
    return req


def test_a_remote_digest_keeps_nothing_and_asks_twice(s3, store3):
    store3.put("big", b"0123456789")
    s3.clear_log()
    assert tracecraft.remote_digest(store3, "big") == (sha(b"0123456789"), 10)
    assert [req.method for req in s3.log] == ["HEAD", "GET"]


@linux
@pytest.mark.slow
def test_a_large_file_needs_no_more_memory_than_a_small_one(s3, tmp_path):
    moved_within_64_mib(f"s3://bucket/p?endpoint={s3.url}", s3.env(), tmp_path, 48)


@linux
@pytest.mark.soak
@pytest.mark.bucket
def test_soak_a_gibibyte_goes_there_and_back_in_64_mib(real_bucket, tmp_path):
    url, environ = real_bucket
    head, _, query = url.partition("?")
    url = f"{head}/big{uuid.uuid4().hex[:6]}" + ("?" + query if query else "")
    keys = {name: value for name, value in environ.items() if name.startswith("AWS_")}
    moved_within_64_mib(url, keys, tmp_path, 1024)


def moved_within_64_mib(url, environ, folder, mib):
    path, rng = folder / "big", random.Random(3)
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(rng.randbytes(1 << 20))
    with tracecraft.connect(url, environ=environ, cwd=str(folder)) as project:
        project.store.ensure()
    assert finished(transfer("upload", url, path, environ)) < 64
    digest = tracecraft.file_source(str(path)).sha256
    (folder / "back").mkdir()
    killed = transfer("download", url, folder / "back" / "big", environ, mib << 19)
    assert killed.wait(300) == -9
    assert finished(transfer("download", url, folder / "back" / "big", environ)) < 64
    assert tracecraft.file_source(str(folder / "back" / "big")).sha256 == digest


# == Artifacts by the dozen ============================================
#
# Deleting, directories there and back, lineage, URLs, everything verified: what a stale
# holder, a crash at any request, an 0.2 client and a hostile name can do to them.


def tree_of(folder, **files):
    """A directory with these files; a '/' in a name is written as '__'."""
    for name, data in files.items():
        path = pathlib.Path(folder, *name.replace("_dot_", ".").split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def names_of(items):
    return [item["name"] for item in items]


def errors_of(items):
    return {item["name"]: item["error"]["code"] for item in items if "error" in item}


def head_faults(bucket):
    """What is wrong with the chains of revisions of all heads; [] if nothing."""
    log = [entry for entry in bucket.log if entry[0].endswith("/_head.json")]
    return chain_faults(types.SimpleNamespace(log=log))


HEAD_F = "manifests/shared/f/_head.json"


# -- deleting ----------------------------------------------------------


def test_a_deleted_artifact_says_by_whom_and_when_and_keeps_its_manifest(ada, bob, bucket):
    ada.artifacts.put_bytes("f", b"one")
    head = bob.artifacts.delete("f")
    assert (head["changed"], head["deleted_by"], head["rev"]) == (True, "bob", 2)
    assert head["sha256"] == sha(b"one") and head["producer"]["agent"] == "ada"
    why = refused(tracecraft.NotFound, ada.artifacts.download, "f")
    assert f"was deleted by bob at {head['deleted_at']}" in why.message
    assert ada.artifacts.show("f")["deleted_by"] == "bob"
    assert ada.artifacts.list() == [] and bucket.under("artifacts/")


def test_deleted_twice_is_once(ada, bob, bucket):
    ada.artifacts.put_bytes("f", b"one")
    first = ada.artifacts.delete("f")
    again = bob.artifacts.delete("f")
    assert (again["changed"], again["deleted_by"]) == (False, "ada")
    assert bucket.writes(HEAD_F) == 2 == first["rev"]


def test_a_delete_repeated_by_its_op_is_done_once(ada, bucket):
    ada.artifacts.put_bytes("f", b"one")
    ada.artifacts.delete("f", op="d1")
    ada.artifacts.put_bytes("f", b"two")
    assert ada.artifacts.delete("f", op="d1")["changed"] is False
    assert "deleted_at" not in bucket.doc(HEAD_F)


@pytest.mark.parametrize("data", [b"one", b"two"])
def test_a_deleted_name_can_be_used_again(ada, bucket, data):
    ada.artifacts.put_bytes("f", b"one")
    ada.artifacts.delete("f")
    head = ada.artifacts.put_bytes("f", data)
    assert (head["rev"], head["key"]) == (3, f"blobs/{sha(data)}")
    assert "deleted_at" not in head and "deleted_by" not in head
    [old] = head["previous"]
    assert old["deleted_by"] == "ada" and "key" not in old
    assert bucket.shared.objects["artifacts/shared/f"][0] == data
    assert ada.artifacts.verify("f")["ok"]


def test_what_was_never_there_cannot_be_deleted(ada, bucket):
    ada.artifacts.put_bytes("report.md", b"x")
    why = refused(tracecraft.NotFound, ada.artifacts.delete, "repor.md")
    assert "did you mean report.md" in why.message
    assert not bucket.under("manifests/shared/repor.md")


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_delete_with_a_lost_answer_is_one_tombstone(ada, bucket, fault):
    ada.artifacts.put_bytes("f", b"one")
    ada.store.fault(fault, key=HEAD_F)
    assert ada.artifacts.delete("f")["changed"] is True
    assert [doc["rev"] for doc in bucket.history(HEAD_F)] == [1, 2]


def test_a_delete_that_crashed_anywhere_can_be_repeated():
    points = 0
    for bucket, ada, where in crashes(lambda b, a: a.artifacts.put_bytes("f", b"one"),
                                      lambda a: a.artifacts.delete("f")):
        points += 1
        ada.artifacts.delete("f")
        assert bucket.doc(HEAD_F)["deleted_by"] == "ada", where
        assert bucket.writes(HEAD_F) == 2 and head_faults(bucket) == [], where
        assert tracecraft.diagnose(ada)["ok"], where
    assert points >= 6


def test_an_artifact_of_02_gets_a_head_to_be_deleted_by(ada, bucket):
    bucket.place("artifacts/shared/f", b"by 0.2")
    head = ada.artifacts.delete("f")
    assert (head["rev"], head["sha256"]) == (2, sha(b"by 0.2"))
    refused(tracecraft.NotFound, ada.artifacts.show, "g")
    assert bucket.shared.objects["artifacts/shared/f"][0] == b"by 0.2"


@pytest.mark.parametrize("act", ["download", "list", "upload"])
def test_what_02_uploads_after_the_deletion_is_there_again(ada, bucket, tmp_path, act):
    """Invariant 7: no acknowledged byte of an 0.2 client counts as deleted."""
    ada.artifacts.put_bytes("f", b"one")
    ada.artifacts.delete("f")
    pass_time(bucket, 5)
    bucket.place("artifacts/shared/f", b"two by 0.2")
    if act == "download":
        path = ada.artifacts.download("f", output=str(tmp_path / "f"))
        assert open(path, "rb").read() == b"two by 0.2"
    elif act == "list":
        assert names_of(ada.artifacts.list()) == ["f"]
    else:
        refused(tracecraft.Conflict, ada.artifacts.put_bytes, "f", b"three")
        assert ada.artifacts.show("f")["sha256"] == sha(b"two by 0.2")


def test_a_late_copy_of_what_was_deleted_is_no_upload(ada, bucket):
    """An uploader may be so slow that its 0.2 copy lands after the tombstone."""
    ada.artifacts.put_bytes("f", b"one")
    ada.artifacts.put_bytes("f", b"two", overwrite=True)
    ada.artifacts.delete("f")
    pass_time(bucket, 5)
    bucket.place("artifacts/shared/f", b"two")
    why = refused(tracecraft.NotFound, ada.artifacts.download, "f")
    assert "was deleted by ada" in why.message and bucket.writes(HEAD_F) == 3


# -- who may -----------------------------------------------------------


def test_an_output_of_an_ended_step_is_deleted_by_nobody_else(ada, bob, bucket):
    ada.claim("s")
    ada.artifacts.put_bytes("f", b"one", step="s")
    ada.complete("s")
    why = refused(tracecraft.Conflict, bob.artifacts.delete, "f", step="s")
    assert "artifacts/s/f is an output of token 1" in why.message
    assert ada.artifacts.delete("f", step="s")["changed"]


def test_a_step_held_by_another_has_nothing_deleted_by_me(ada, bob):
    ada.claim("s")
    ada.artifacts.put_bytes("f", b"one", step="s")
    why = refused(tracecraft.Held, bob.artifacts.delete, "f", step="s")
    assert why.message.startswith("Step s is claimed by 'ada'")


def test_the_next_holder_deletes_what_a_fenced_one_has_made(ada, bob, bucket):
    ada.claim("s")
    ada.artifacts.put_bytes("f", b"one", step="s")
    pass_time(bucket)
    bob.claim("s")
    assert bob.artifacts.delete("f", step="s")["changed"]
    refused(tracecraft.Fenced, ada.artifacts.put_bytes, "f", b"one", step="s")


STALE_ACTS = {
    "delete": lambda a: a.artifacts.delete("f", step="s"),
    "overwrite": lambda a: a.artifacts.put_bytes("f", b"stale", step="s", overwrite=True),
    "the same": lambda a: a.artifacts.put_bytes("f", b"ada's", step="s"),
}


def overtaken(act):
    """Ada's act with bob taking the step over and uploading before each request of it;
    the points after which something else than bob's counts as the output."""
    wrong, at = [], 1
    while True:
        bucket = MemoryStore()
        ada, bob = agent_on(bucket, "ada"), agent_on(bucket, "bob")
        ada.claim("s")
        ada.artifacts.put_bytes("f", b"ada's", step="s")
        if not interrupted(ada, at, lambda: take_over(bucket, bob), act):
            return wrong
        head = bucket.doc("manifests/s/f/_head.json")
        bytes_there = bucket.shared.objects[head["key"]][0]
        if head.get("deleted_at") or bytes_there != b"bob's":
            wrong.append(at)
        at += 1


def take_over(bucket, bob):
    pass_time(bucket)
    bob.claim("s")
    bob.artifacts.put_bytes("f", b"bob's", step="s")


def interrupted(ada, at, between, act):
    """Run an act, something else before its request number `at`; whether it came so far."""
    inner, left = ada.store._request, [at]

    def request(*how):
        left[0] -= 1
        if left[0] == 0:
            between()
        return inner(*how)
    ada.store._request = request
    try:
        act(ada)
    except tracecraft.Error:
        pass
    return left[0] <= 0


@pytest.mark.parametrize("name", STALE_ACTS)
def test_a_stale_holder_never_changes_what_counts_as_output(name):
    """Invariant 3 of protocol.md 11, at every request."""
    assert overtaken(STALE_ACTS[name]) == []


def believes_what_it_read(patch):
    patch.setattr(tracecraft.Files, "_producer", lambda self, place, token: {
        "agent": "ada" if self._project.agent == "ada" else "bob", "step": place.sid,
        "token": 1 if self._project.agent == "ada" else 2})
    patch.setattr(tracecraft, "spare_output", lambda head, now: None)


def writes_blindly(patch):
    inner = MemoryStore.put

    def put(self, key, data, *, if_match=None, if_none_match=False):
        return inner(self, key, data, if_none_match=if_none_match)
    patch.setattr(MemoryStore, "put", put)


@pytest.mark.parametrize("broken", [believes_what_it_read, writes_blindly])
@pytest.mark.parametrize("name", ["delete", "overwrite"])
def test_the_check_of_stale_holders_notices_a_broken_rule(monkeypatch, broken, name):
    broken(monkeypatch)
    assert overtaken(STALE_ACTS[name]) != []


@pytest.mark.parametrize("was, now, good", [
    (None, None, True), (1, 1, True), (1, 2, True), (2, 1, False), (1, None, False)])
def test_a_tombstone_needs_the_token_of_the_output(was, now, good):
    by = {"agent": "a", "step": "s", "token": now}
    old = head("x", was)
    if good:
        new = t.deleted_head(old, by, at="T")
        assert new == {**old, "deleted_at": "T", "deleted_by": "a"}
        assert t.deleted_head(new, by, at="later") is new
    else:
        with pytest.raises((t.Fenced, t.Conflict)):
            t.deleted_head(old, by, at="T")


# -- directories -------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    return tree_of(tmp_path / "site", a=b"A", sub__b=b"B", sub__deep__c=b"")


def test_a_directory_keeps_its_paths_there_and_back(ada, site, tmp_path):
    items = ada.artifacts.upload_folder(site)
    assert names_of(items) == ["site/a", "site/sub/b", "site/sub/deep/c"]
    assert [item["size"] for item in items] == [1, 1, 0]
    back = ada.artifacts.download_folder("site/", output=str(tmp_path / "out"))
    assert [item["changed"] for item in back] == [True] * 3
    for name in ("a", "sub/b", "sub/deep/c"):
        assert (tmp_path / "out" / "site" / name).read_bytes() == \
            (tmp_path / "site" / name).read_bytes()


@pytest.mark.parametrize("prefix, lead", [(None, "site/"), ("x/y", "x/y/"), ("x/", "x/"),
                                          (".", ""), ("", "")])
def test_a_directory_goes_below_its_own_name_or_another(ada, site, prefix, lead):
    items = ada.artifacts.upload_folder(site, prefix=prefix, step="s")
    assert names_of(items) == [f"{lead}a", f"{lead}sub/b", f"{lead}sub/deep/c"]
    assert items[0]["artifact"] == f"artifacts/s/{lead}a"


@pytest.mark.parametrize("prefix", ["..", "../x", "/etc", "a//b", "a\nb"])
def test_a_directory_below_no_name_is_refused_as_a_whole(ada, site, bucket, prefix):
    refused(tracecraft.Usage, ada.artifacts.upload_folder, site, prefix=prefix)
    refused(tracecraft.Usage, ada.artifacts.download_folder, prefix)
    assert not bucket.log


@pytest.mark.parametrize("listed, header, result", [
    (10.9, 10.0, True), (11.0, 10.0, False), (10.9, 10.2, False), (10.1, 10.2, True),
    (None, 10.0, True), (10.0, None, True)])
def test_a_listing_in_fractions_is_compared_with_a_header_in_seconds(
        listed, header, result):
    entry = tracecraft.Entry("k", size=1, etag=None, modified=listed)
    assert tracecraft.listed_older(
        entry, tracecraft.Record("h", {}, modified=header)) is result


def test_an_unchanged_directory_costs_two_listings_and_a_read_of_each_head(ada, site):
    ada.artifacts.upload_folder(site, jobs=1)
    cost = spent(ada, ada.artifacts.upload_folder, site)
    heads = {f"GET manifests/shared/site/{name}/_head.json": 1
             for name in ("a", "sub/b", "sub/deep/c")}
    assert cost == {"LIST artifacts/shared/site/": 1, "LIST manifests/shared/site/": 1,
                    **heads}


def test_only_what_changed_is_sent_again(ada, bucket, site):
    ada.artifacts.upload_folder(site)
    tree_of(site, a=b"new")
    items = ada.artifacts.upload_folder(site, overwrite=True)
    assert [item["changed"] for item in items] == [True, False, False]
    assert items[0]["rev"] == 2 and bucket.writes("artifacts/shared/site/sub/b") == 1


def test_a_refused_file_does_not_keep_the_others_from_going(ada, site):
    ada.artifacts.put_bytes("site/sub/b", b"theirs")
    tree_of(site, sub___init_dot_py=b"", z=b"Z")
    items = ada.artifacts.upload_folder(site)
    assert errors_of(items) == {"site/sub/b": "conflict", "site/sub/_init.py": "usage"}
    assert ada.artifacts.show("site/z")["size"] == 1
    assert ada.artifacts.verify("site/a")["ok"]


def test_state_of_others_and_links_out_of_the_tree_are_left_out(ada, site, tmp_path):
    tree_of(site, _dot_git__config=b"x", _dot_tmp_x=b"x", _dot_tracecraft_dot_json=b"key")
    pathlib.Path(site, ".tmp-12").write_bytes(b"half")
    (tmp_path / "secret").write_bytes(b"secret")
    for name, there in (("out", tmp_path / "secret"), ("in", tmp_path / "site" / "a"),
                        ("loop", tmp_path / "site"), ("gone", tmp_path / "nothing")):
        pathlib.Path(site, name).symlink_to(there)
    names = names_of(ada.artifacts.upload_folder(site, prefix="."))
    assert names == [".tmp_x", "a", "in", "sub/b", "sub/deep/c"]
    assert sorted(line.split()[0] for line in ada.warned) == ["gone", "loop", "out"]


def test_a_directory_store_never_uploads_itself(tmp_path):
    tree_of(tmp_path / "work", a=b"A")
    url = f"file://{tmp_path}/work/store/p"
    with tracecraft.connect(url, agent="ada", cwd=str(tmp_path),
                            environ={"HOME": str(tmp_path)}) as project:
        for _ in range(2):
            items = project.artifacts.upload_folder(str(tmp_path / "work"))
            assert names_of(items) == ["work/a"]


def test_what_would_meet_every_file_is_raised_at_once(ada, bob, bucket, site):
    ada.claim("s")
    refused(tracecraft.Held, bob.artifacts.upload_folder, site, step="s")
    pass_time(bucket)
    bob.claim("s")
    refused(tracecraft.Fenced, ada.artifacts.upload_folder, site, step="s")
    assert not bucket.under("artifacts/s/")


def test_a_directory_upload_that_crashed_anywhere_is_finished_by_the_same_one(site):
    points, contents = 0, {"a": b"A", "sub/b": b"B", "sub/deep/c": b""}

    def act(project):
        project.artifacts.upload_folder(site, jobs=1, overwrite=True)
    before = {"site/a": b"old", "site/sub/b": b"B"}
    for bucket, ada, where in crashes(
            lambda b, a: [a.artifacts.put_bytes(*pair) for pair in before.items()], act):
        points += 1
        assert all(row["ok"] for row in ada.artifacts.verify_all()), where
        act(ada)
        for name, data in contents.items():
            assert ada.artifacts.verify(f"site/{name}")["sha256"] == sha(data), where
            assert bucket.shared.objects[f"artifacts/shared/site/{name}"][0] == data
        assert ada.artifacts.read_blob(sha(b"old")) == b"old", where
        assert head_faults(bucket) == [], where
    assert points > 20


def test_progress_over_many_files_ends_at_their_size(ada, site, tmp_path):
    for act in (lambda how: ada.artifacts.upload_folder(site, progress=how),
                lambda how: ada.artifacts.verify_all(progress=how),
                lambda how: ada.artifacts.download_folder(
                    "site/", output=str(tmp_path / "out"), progress=how)):
        seen = []
        act(lambda *at: seen.append(at))
        assert seen == sorted(seen) and seen[-1] == (2, 2)


def test_many_files_go_side_by_side_to_a_bucket(s3, tmp_path):
    files = {f"f{n:02d}": os.urandom(2000 + n) for n in range(40)}
    folder = tree_of(tmp_path / "many", **files)
    s3.latency = 0.02
    with on_s3(s3) as project:
        begun = time.monotonic()
        assert not errors_of(project.artifacts.upload_folder(folder))
        took = time.monotonic() - begun
        project.artifacts.download_folder("many/", output=str(tmp_path / "out"))
    assert took < 40 * 3 * 0.02  # three requests each, one after the other
    assert {name: (tmp_path / "out" / "many" / name).read_bytes()
            for name in files} == files


# -- fetching many -----------------------------------------------------


def test_what_is_there_is_skipped_and_what_differs_is_refused(ada, site, tmp_path):
    ada.artifacts.upload_folder(site, step="s")
    out = tree_of(tmp_path / "out", site__a=b"A", site__sub__b=b"mine")
    items = ada.artifacts.download_folder(step="s", output=out)
    assert errors_of(items) == {"site/sub/b": "conflict"}
    assert [item.get("changed") for item in items] == [False, None, True]
    assert (tmp_path / "out/site/sub/b").read_bytes() == b"mine"
    items = ada.artifacts.download_folder(step="s", output=out, overwrite=True)
    assert not errors_of(items) and (tmp_path / "out/site/sub/b").read_bytes() == b"B"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\x", "a\x1bb", ".."])
def test_a_hostile_name_is_refused_and_the_others_are_fetched(ada, bucket, tmp_path, name):
    ada.artifacts.put_bytes("good", b"x", step="s")
    bucket.place(f"artifacts/s/{name}", b"evil")
    bucket.place(f"manifests/s/{name}/_head.json", {
        "sha256": sha(b"evil"), "size": 4, "key": f"artifacts/s/{name}"})
    items = ada.artifacts.download_folder(step="s", output=str(tmp_path / "in" / "out"))
    assert errors_of(items) == {name: "usage"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["good", "in", "out"]


def test_a_link_on_the_way_does_not_lead_out(ada, site, tmp_path):
    ada.artifacts.upload_folder(site)
    (tmp_path / "out" / "site").mkdir(parents=True)
    (tmp_path / "away").mkdir()
    (tmp_path / "out" / "site" / "sub").symlink_to(tmp_path / "away")
    (tmp_path / "out" / "site" / "a").symlink_to(tmp_path / "away" / "a")
    items = ada.artifacts.download_folder("site/", output=str(tmp_path / "out"))
    assert errors_of(items) == {"site/a": "conflict", "site/sub/b": "usage",
                                "site/sub/deep/c": "usage"}
    assert os.listdir(tmp_path / "away") == []


def test_a_damaged_artifact_among_many_is_named_and_leaves_no_file(ada, bucket, site,
                                                                   tmp_path):
    ada.artifacts.upload_folder(site)
    ada.artifacts.put_bytes("site/a", b"new", overwrite=True)
    bucket.place(f"blobs/{sha(b'new')}", b"n3w")
    items = ada.artifacts.download_folder("site/", output=str(tmp_path / "out"))
    assert errors_of(items) == {"site/a": "corrupt"}
    assert not (tmp_path / "out" / "site" / "a").exists()
    assert (tmp_path / "out" / "site" / "sub" / "b").exists()


def test_nothing_below_a_prefix_is_not_found(ada, site):
    ada.artifacts.upload_folder(site)
    for how in ({"prefix": "sit/"}, {"step": "other"}):
        refused(tracecraft.NotFound, ada.artifacts.download_folder, **how)


# -- listing and verifying ---------------------------------------------


def test_a_listing_tells_digests_and_keys_of_02_and_nothing_deleted(ada, bucket):
    ada.artifacts.put_bytes("a", b"1")
    ada.artifacts.put_bytes("b", b"2", step="s")
    ada.artifacts.put_bytes("c", b"3")
    ada.artifacts.delete("c")
    bucket.place("artifacts/shared/old", b"0.2")
    rows = ada.artifacts.list()
    assert [(row["key"], row["rev"], row["sha256"]) for row in rows] == [
        ("artifacts/s/b", 1, sha(b"2")), ("artifacts/shared/a", 1, sha(b"1")),
        ("artifacts/shared/old", 0, None)]
    assert spent(ada, ada.artifacts.list, "s") == {
        "LIST artifacts/s/": 1, "LIST manifests/s/": 1, "GET manifests/s/b/_head.json": 1}


def test_a_head_whose_02_copy_is_missing_is_listed_all_the_same(ada, bucket):
    ada.artifacts.put_bytes("a", b"1")
    ada.artifacts.put_bytes("a", b"22", overwrite=True)
    ada.store.delete("artifacts/shared/a")
    [row] = ada.artifacts.list()
    assert (row["name"], row["size"], row["rev"]) == ("a", 2, 2)


def test_verifying_all_finds_each_kind_of_damage(ada, bucket):
    for name in "abcd":
        ada.artifacts.put_bytes(name, b"one " + name.encode())
        ada.artifacts.put_bytes(name, b"two " + name.encode(), overwrite=True)
    bucket.place(f"blobs/{sha(b'two a')}", b"tw0 a")
    ada.store.delete(f"blobs/{sha(b'two b')}")
    bucket.place("manifests/shared/c/_head.json", b"{")
    items = ada.artifacts.verify_all()
    assert errors_of(items) == dict.fromkeys("abc", "corrupt")
    assert [item["ok"] for item in items] == [False, False, False, True]
    assert all(item["error"]["exit"] == 8 for item in items[:3])


# -- inputs and lineage ------------------------------------------------


def test_an_input_is_recorded_with_its_digest_and_revision(ada):
    ada.artifacts.put_bytes("data", b"1")
    ada.artifacts.put_bytes("data", b"2", overwrite=True)
    ada.artifacts.put_bytes("api.md", b"api", step="design")
    head = ada.artifacts.put_bytes("out", b"o", inputs=("data", "design:api.md"))
    assert head["inputs"] == [
        {"artifact": "artifacts/shared/data", "sha256": sha(b"2"), "rev": 2},
        {"artifact": "artifacts/design/api.md", "sha256": sha(b"api"), "rev": 1}]


@pytest.mark.parametrize("text, key", [
    ("x", "artifacts/build/x"), ("shared:x", "artifacts/shared/x"),
    ("design:x", "artifacts/design/x"), ("design/x", "artifacts/design/x"),
    ("artifacts/shared/x", "artifacts/shared/x"), ("d/x", "artifacts/shared/d/x"),
    ("S1.A:x", "artifacts/s1-a/x")])
def test_an_input_is_found_where_it_is_likeliest(ada, text, key):
    for step in ("build", "design", "d", None, "s1-a"):
        ada.artifacts.put_bytes("x", b"x", step=step)
    ada.artifacts.put_bytes("d/x", b"x")
    head = ada.artifacts.put_bytes("out", b"o", step="build", inputs=(text,))
    assert [edge["artifact"] for edge in head["inputs"]] == [key]


def test_an_input_that_is_not_there_is_refused_before_a_byte_is_written(ada, bucket):
    ada.artifacts.put_bytes("data", b"1")
    why = refused(tracecraft.NotFound, ada.artifacts.put_bytes, "out", b"o",
                  inputs=("dat",))
    assert why.message.startswith("input dat: ") and "did you mean data" in why.message
    refused(tracecraft.Usage, ada.artifacts.put_bytes, "out", b"o", inputs=("../x",))
    assert not bucket.under("artifacts/shared/out")


def test_bytes_of_02_are_an_exact_input_as_well(ada, bucket):
    bucket.place("artifacts/shared/old", b"by 0.2")
    head = ada.artifacts.put_bytes("out", b"o", inputs=("old",))
    assert head["inputs"] == [
        {"artifact": "artifacts/shared/old", "sha256": sha(b"by 0.2"), "rev": 0}]


def test_the_same_bytes_from_other_inputs_are_recorded_so(ada, bucket):
    ada.artifacts.put_bytes("data", b"1")
    ada.artifacts.put_bytes("out", b"o", inputs=("data",))
    ada.artifacts.put_bytes("data", b"2", overwrite=True)
    head = ada.artifacts.put_bytes("out", b"o", inputs=("data",))
    assert (head["inputs"][0]["rev"], head["rev"]) == (2, 2)
    assert head["key"] == f"blobs/{sha(b'o')}" in bucket.shared.objects
    assert ada.artifacts.put_bytes("out", b"o")["changed"] is False


def test_inputs_of_an_output_are_not_changed_by_others():
    old = {**head("x", 2), "inputs": []}
    for token, changed in ((None, False), (1, False), (2, True), (3, True)):
        new = {**head("x", token), "inputs": [{"artifact": "a"}]}
        assert (t.next_head(old, new, overwrite=True) is not old) is changed


def worked_lineage(ada):
    """raw -> clean -> model -> report, and clean -> report."""
    ada.artifacts.put_bytes("raw", b"raw")
    ada.artifacts.put_bytes("clean", b"clean", step="prep", inputs=("raw",))
    ada.artifacts.put_bytes("model", b"model", inputs=("prep:clean",))
    ada.artifacts.put_bytes("report", b"report", inputs=("model", "prep:clean"))


def test_a_lineage_goes_up_to_the_sources_and_names_each_once(ada):
    worked_lineage(ada)
    tree = ada.artifacts.lineage("report", down=False)
    model, clean = tree["from"]
    assert [model["artifact"], clean["artifact"]] == ["artifacts/shared/model",
                                                      "artifacts/prep/clean"]
    assert clean["from"][0]["name"] == "raw" and clean["step"] == "prep"
    assert model["from"][0]["seen"] and "from" not in model["from"][0]
    assert not tree["truncated"] and "into" not in tree


def test_a_lineage_goes_down_to_what_depends_on_it(ada):
    worked_lineage(ada)
    tree = ada.artifacts.lineage("raw", up=False)
    [clean] = tree["into"]
    assert [node["name"] for node in clean["into"]] == ["model", "report"]
    assert clean["state"] == "current" and "from" not in tree


def test_a_replaced_input_is_stale_and_its_own_inputs_stay_exact(ada):
    worked_lineage(ada)
    ada.artifacts.put_bytes("raw2", b"raw2")
    ada.artifacts.put_bytes("clean", b"clean2", step="prep", inputs=("raw2",),
                            overwrite=True)
    model, clean = ada.artifacts.lineage("report", down=False)["from"]
    assert (clean["state"], clean["now"]) == ("replaced", sha(b"clean2"))
    assert (clean["sha256"], clean["rev"]) == (sha(b"clean"), 1)
    assert [node["name"] for node in clean["from"]] == ["raw"]
    assert model["state"] == "current"
    [model, report] = ada.artifacts.lineage("clean", step="prep", up=False)["into"]
    assert model["state"] == report["state"] == "replaced"


def test_a_deleted_input_is_marked_and_still_traced(ada):
    worked_lineage(ada)
    ada.artifacts.delete("model")
    model, _ = ada.artifacts.lineage("report", down=False)["from"]
    assert model["state"] == "deleted" and model["from"][0]["name"] == "clean"
    assert ada.artifacts.lineage("model")["state"] == "deleted"


def test_a_cycle_ends(ada):
    ada.artifacts.put_bytes("a", b"1")
    ada.artifacts.put_bytes("b", b"1", inputs=("a",))
    ada.artifacts.put_bytes("a", b"2", inputs=("b",), overwrite=True)
    ada.artifacts.put_bytes("b", b"1", inputs=("a",))
    tree = ada.artifacts.lineage("a")
    text = json.dumps(tree)
    assert text.count('"seen": true') == 2 and len(text) < 5000


@pytest.mark.parametrize("inputs", [
    "x", [1], [{}], [{"artifact": 5}], [{"artifact": "no"}], ["a"], {"artifact": "a"},
    [{"artifact": "artifacts/shared/../x", "sha256": []}],
    [{"artifact": "artifacts/\x1b[2J/x", "sha256": "\x1b"}]])
def test_a_malformed_lineage_is_no_crash(ada, bucket, inputs):
    bucket.place(HEAD_F, {"sha256": sha(b"f"), "size": 1, "key": "artifacts/shared/f",
                          "inputs": inputs, "previous": "x", "producer": None})
    bucket.place("artifacts/shared/f", b"f")
    tree = ada.artifacts.lineage("f")
    lines = [t.node_line(tree), *t.branch_lines(tree, "from", "")]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("key", ["artifacts/shared/../../x", "artifacts/..//x", "x/y/z",
                                 "artifacts/shared", "artifacts/s s/x", ""])
def test_an_input_that_no_artifact_can_be_is_shown_and_not_looked_for(project, key):
    project.ledger.store.put("artifacts/shared/f", b"f")
    project.ledger.store.put(HEAD_F, json.dumps({
        "sha256": sha(b"f"), "size": 1, "key": "artifacts/shared/f", "rev": 1,
        "inputs": [{"artifact": key, "sha256": "x", "rev": 1}]}).encode())
    [node] = project.artifacts.lineage("f", down=False)["from"]
    assert (node["artifact"], node["state"], node["name"]) == (key, "unknown", None)


def test_a_lineage_costs_a_read_for_each_artifact_above(ada):
    worked_lineage(ada)
    cost = spent(ada, ada.artifacts.lineage, "report", down=False)
    assert cost == {f"GET manifests/{where}/_head.json": 1 for where in (
        "shared/report", "shared/model", "prep/clean", "shared/raw")}


def test_a_lineage_ends_at_its_limits_and_says_so(ada, monkeypatch):
    for at in range(8):
        ada.artifacts.put_bytes(f"n{at}", b"x", inputs=(f"n{at - 1}",) if at else ())
    monkeypatch.setattr(tracecraft, "LINEAGE_DEPTH", 3)
    tree = ada.artifacts.lineage("n7", down=False)
    assert tree["truncated"] and json.dumps(tree).count('"artifact"') == 4
    monkeypatch.setattr(tracecraft, "LINEAGE_DEPTH", 50)
    assert not ada.artifacts.lineage("n7")["truncated"]
    monkeypatch.setattr(tracecraft, "LINEAGE", 5)
    assert ada.artifacts.lineage("n7")["truncated"]


# -- URLs --------------------------------------------------------------


def fetched(url):
    """(status, body) of a plain GET by somebody without credentials."""
    import urllib.request
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as why:
        return why.code, b""


@pytest.fixture(params=["suite", pytest.param("bucket", marks=pytest.mark.bucket)])
def shared_one(request, s3):
    """A handle on a bucket that checks signatures, with `größe 1.txt` in it twice."""
    url, environ = f"s3://bucket?endpoint={s3.url}", s3.env()
    if request.param == "bucket":
        url, environ = request.getfixturevalue("real_bucket")
    store = s3_store(url, environ, "t" + uuid.uuid4().hex[:10])
    store.ensure()
    project = project_on(store, "ada")
    project.artifacts.put_bytes("größe 1.txt", b"one")
    project.artifacts.put_bytes("größe 1.txt", b"two", overwrite=True)
    project.artifacts.put_bytes("d/+ &?.txt", b"odd", step="s")
    yield project
    store.close()


def test_a_url_reads_the_current_content_without_credentials(shared_one):
    doc = shared_one.artifacts.url("größe 1.txt", expires=60)
    assert fetched(doc["url"]) == (200, b"two")
    assert (doc["sha256"], doc["expires_in_s"]) == (sha(b"two"), 60)
    assert fetched(shared_one.artifacts.url("d/+ &?.txt", step="s")["url"]) == (200, b"odd")


def test_a_tampered_or_expired_url_is_refused(shared_one, s3):
    url = shared_one.artifacts.url("größe 1.txt", expires=60)["url"]
    if fetched(url.replace("X-Amz-Signature=", "X-Amz-Signature=0"))[0] == 200:
        pytest.skip("this server does not verify signatures")
    for old, new in (("X-Amz-Expires=60", "X-Amz-Expires=600"),
                     (sha(b"two"), sha(b"one")), ("X-Amz-Signature=", "X-Amz-Signature=0")):
        assert fetched(url.replace(old, new))[0] == 403
    if s3.url in url:
        s3.skew = 61
        assert fetched(url)[0] == 403


def test_a_url_costs_the_head_and_a_look_at_its_bytes(ada, bucket):
    ada.artifacts.put_bytes("f", b"one")
    cost = spent(ada, ada.artifacts.url, "f")
    assert cost == {f"GET {HEAD_F}": 1, "HEAD artifacts/shared/f": 1}


@pytest.mark.parametrize("expires", [0, -5, 604_801])
def test_a_url_lives_at_most_a_week(ada, expires):
    assert "1 to 604800" in refused(tracecraft.Usage, ada.artifacts.url, "f",
                                    expires=expires).message


def test_a_url_ends_with_temporary_credentials(s3):
    keys = tracecraft.Keys("testkey", "testsecret", token="tok",
                           expires_at=time.time() + 100)
    store = bucket_store(s3, keys=lambda: keys)
    shared = store.presigned("f", 3600)
    assert 95 <= shared["expires_in_s"] <= 100 and shared["temporary"]
    assert "X-Amz-Security-Token=tok" in shared["url"]
    keys.expires_at = time.time() - 1
    refused(tracecraft.Denied, store.presigned, "f", 3600)


def test_without_credentials_there_is_no_url(s3):
    store = bucket_store(s3, keys=lambda: None)
    assert "not signed" in refused(tracecraft.Denied, store.presigned, "f", 60).message


def test_a_default_port_is_no_part_of_what_is_signed():
    keys = tracecraft.Keys("a", "b")
    for endpoint, host in (("https://s3.x.org:443", "https://s3.x.org/"),
                           ("http://s3.x.org:80", "http://s3.x.org/"),
                           ("http://s3.x.org:443", "http://s3.x.org:443/")):
        store = tracecraft.S3Store("b-1", "p", endpoint=endpoint, keys=lambda: keys)
        assert store.presigned("f", 60)["url"].startswith(host)


def test_a_url_of_what_is_gone_is_not_made(ada, bucket):
    ada.artifacts.put_bytes("f", b"one")
    ada.artifacts.put_bytes("f", b"two", overwrite=True)
    ada.store.delete(f"blobs/{sha(b'two')}")
    refused(tracecraft.Corrupt, ada.artifacts.url, "f")


# -- the commands ------------------------------------------------------


def test_a_directory_is_shared_fetched_and_deleted_by_commands(sh):
    tree_of(sh.cwd + "/site", a=b"A", sub__b=b"B")
    assert sh.ok("artifact", "upload", "site", "--step", "build") == (
        "Uploaded site/a -> artifacts/build/site/a\n"
        "Uploaded site/sub/b -> artifacts/build/site/sub/b\n")
    assert sh.ok("artifact", "upload", "site", "--step", "build").count("(unchanged)") == 2
    assert sh.ok("artifact", "download", "--step", "build", "-o", "out") == (
        "Downloaded artifacts/build/site/a -> out/site/a\n"
        "Downloaded artifacts/build/site/sub/b -> out/site/sub/b\n")
    assert sh.ok("artifact", "download", "site/", "--step", "build",
                 "-o", "out").count("(unchanged)") == 2
    assert sh.ok("artifact", "delete", "site/a", "--step", "build") == (
        "Deleted artifacts/build/site/a\n")
    assert "(by ada at " in sh.ok("artifact", "delete", "site/a", "--step", "build")
    assert "was deleted by ada at " in sh.refused(1, "artifact", "download", "site/a",
                                                  "--step", "build")
    assert sh.ok("artifact", "list") == "artifacts/build/site/sub/b\n"
    assert "  deleted: by ada at " in sh.ok("artifact", "show", "site/a", "--step", "build")


def test_a_long_directory_is_cut_at_20_lines_and_whole_in_json(sh):
    tree_of(sh.cwd + "/many", **{f"f{n:02d}": b"x" for n in range(25)})
    lines = sh.ok("artifact", "upload", "many").splitlines()
    assert len(lines) == 21 and lines[-1] == "+5 more"
    assert len(sh.json("artifact", "upload", "many")["items"]) == 25


def test_refused_files_are_named_and_the_worst_exit_code_is_that_of_the_command(sh):
    tree_of(sh.cwd + "/site", a=b"A", b=b"B")
    sh.ok("artifact", "upload", "site")
    tree_of(sh.cwd + "/site", a=b"changed", c=b"C")
    done = sh.run("artifact", "upload", "site")
    assert done.returncode == 3 and "Uploaded site/c" in done.out
    assert done.err.startswith("Error: site/a: Artifact artifacts/shared/site/a has other")
    done = sh.run("artifact", "upload", "site", "--json")
    assert (done.returncode, done.err) == (3, "")
    assert [item.get("error", {}).get("exit") for item in json.loads(done.out)["items"]] \
        == [3, None, None]


def test_what_to_download_must_be_said(sh):
    assert "needs a NAME" in sh.refused(2, "artifact", "download")
    assert "not both" in sh.refused(2, "artifact", "verify")
    assert "not both" in sh.refused(2, "artifact", "verify", "a", "--all")


def test_a_directory_store_has_no_urls_but_says_where_the_file_is(sh):
    tree_of(sh.cwd, a=b"A")
    sh.ok("artifact", "upload", "a")
    err = sh.refused(2, "artifact", "url", "a")
    path = err.split("the file is ")[1].strip()
    assert "has no URLs" in err and open(path, "rb").read() == b"A"


def test_a_url_is_the_answer_and_its_danger_a_warning(sh, s3):
    tree_of(sh.cwd, a=b"A")
    where = {"TRACECRAFT_STORE": f"s3://bucket/p?endpoint={s3.url}", **s3.env()}
    sh.ok("artifact", "upload", "a", **where)
    done = sh.run("artifact", "url", "a", "--expires", "60", **where)
    assert fetched(done.out.strip()) == (200, b"A")
    assert done.err.count("warning") == 1 and "can read the file, for 60s" in done.err
    assert "can read" not in sh.run("artifact", "url", "a", "-q", **where).err


def test_a_lineage_is_a_tree_of_at_most_20_lines(sh):
    tree_of(sh.cwd, raw=b"1", out=b"2", **{f"x{n:02d}": b"x" for n in range(25)})
    sh.ok("artifact", "upload", "raw")
    sh.ok("artifact", "upload", "out", "--inputs", "raw,raw", "--step", "s")
    raw, out = sha(b"1")[:12], sha(b"2")[:12]
    assert sh.ok("artifact", "lineage", "out", "--step", "s") == (
        f"artifacts/s/out {out} rev 1 (ada)\n"
        f"  from artifacts/shared/raw {raw} rev 1 (ada)\n")
    tree_of(sh.cwd, raw=b"3")
    sh.ok("artifact", "upload", "raw", "--overwrite")
    assert f"rev 1 (ada), stale: now {sha(b'3')[:12]}\n" in sh.ok(
        "artifact", "lineage", "out", "--step", "s", "--up")
    for n in range(25):
        sh.ok("artifact", "upload", f"x{n:02d}", "--input", "raw")
    lines = sh.ok("artifact", "lineage", "raw", "--down").splitlines()
    assert len(lines) == 21 and lines[-1] == "+7 more, --json shows all"


def test_verifying_all_names_the_damaged_and_exits_8(sh):
    tree_of(sh.cwd, a=b"A", b=b"B")
    sh.ok("artifact", "upload", "a")
    sh.ok("artifact", "upload", "b", "--step", "s")
    assert sh.ok("artifact", "verify", "--all") == "2 artifacts, 2 B: all as recorded\n"
    tree_of(sh.cwd, a=b"A2")
    sh.ok("artifact", "upload", "a", "--overwrite")
    [blob] = [path for path in sh.objects() if f"{os.sep}{sha(b'A2')}" in path]
    pathlib.Path(blob).write_bytes(b"A3")
    done = sh.run("artifact", "verify", "--all")
    assert done.returncode == 8 and "artifacts/shared/a: " in done.out
    assert done.out.endswith("2 artifacts, 3 B: 1 damaged\n")
    assert sh.run("artifact", "verify", "--all", "--step", "s").returncode == 0


# == Queue items =======================================================
#
# Every decision about an item, and all states that two workers can bring it to.


def an_item(state="ready", *, token=0, attempt=0, agent="ada", **more):
    return {"state": state, "token": token, "attempt": attempt, "agent": agent,
            "instance": f"{agent}-1", "body": "b", "type": "text", "max_attempts": 2,
            "ttl": 60, "claimed_at": "then", "visible_after": "", "released_by": None,
            **more}


def item_me(name="ada", token=None, **how):
    return t.Me(name, f"{name}-1", token=token, **how)


NO_TIME = {"now": 1000.0, "at": "now", "ttl": 60}


@pytest.mark.parametrize("item, age, left", [
    (an_item(), 0, 0), (an_item(visible_after=t.iso(1007)), 0, 7),
    (an_item(visible_after=t.iso(999)), 0, 0), (an_item(visible_after="soon"), 0, 0),
    (an_item("leased"), 0, 65), (an_item("leased"), 64.9, 65 - 64.9),
    (an_item("leased"), 65, 0), (an_item("leased"), None, 65),
    (an_item("leased", ttl=0), 1e9, None), (an_item("done"), 1e9, None),
    (an_item("dead"), 1e9, None)])
def test_an_item_may_be_popped_when_ready_and_visible_or_leased_and_expired(
        item, age, left):
    assert t.due_in(item, age, 1000.0) == left
    if left == 0:
        assert t.pop_item(item, item_me("bob"), age, **NO_TIME)["agent"] == "bob"
    else:
        with pytest.raises(t.Conflict):
            t.pop_item(item, item_me("bob"), age, **NO_TIME)


@pytest.mark.parametrize("state, attempt, limit, becomes", [
    ("ready", 0, 2, "leased"), ("ready", 1, 2, "leased"), ("ready", 2, 2, "dead"),
    ("leased", 1, 2, "leased"), ("leased", 2, 2, "dead"), ("leased", 99, 0, "leased")])
def test_a_pop_counts_the_attempt_and_one_too_many_is_a_dead_letter(
        state, attempt, limit, becomes):
    item = an_item(state, token=7, attempt=attempt, max_attempts=limit)
    new = t.pop_item(item, item_me("bob"), 66, **NO_TIME)
    assert (new["state"], new["token"]) == (becomes, 8)
    assert new["attempt"] == attempt + (becomes == "leased")
    assert item["token"] == 7  # the old one is as it was


OWNERS = [  # who acts on an item leased by ada-1 under token 3: may they?
    (item_me(token=3), True), (item_me(token=2), False), (item_me(token=4), False),
    (item_me(), False), (item_me(explicit=True), True), (item_me("bob", 3), False)]
ENDINGS = {
    "ack": lambda item, me: t.ack_item(item, me, at="now"),
    "nack": lambda item, me: t.nack_item(item, me, at="now", visible="", why="w"),
    "extend": lambda item, me: t.extend_item(item, me, at="now", ends="", ttl=9)}


@pytest.mark.parametrize("verb", ENDINGS)
@pytest.mark.parametrize("me, may", OWNERS)
def test_only_the_popped_token_of_its_agent_ends_or_extends_a_lease(verb, me, may):
    item = an_item("leased", token=3, attempt=1)
    if may:
        assert ENDINGS[verb](item, me)["token"] == 3
        return
    why = refused(t.Fenced, ENDINGS[verb], item, me)
    assert (why.exit, why.details["holder"], why.details["token"]) == (4, "ada", 3)


@pytest.mark.parametrize("verb", ENDINGS)
def test_an_expired_lease_that_nobody_took_is_still_its_holders(verb):
    assert ENDINGS[verb](an_item("leased", token=1, attempt=1), item_me(token=1))


def test_acknowledging_or_giving_back_twice_under_one_token_is_once():
    leased = an_item("leased", token=1, attempt=1)
    for verb in ("ack", "nack"):
        once = ENDINGS[verb](leased, item_me(token=1))
        for me in (item_me(token=1), item_me()):
            assert ENDINGS[verb](once, me) is once
        refused(t.Fenced, ENDINGS[verb], once, item_me("bob", 1))
        other = {"ack": "nack", "nack": "ack"}[verb]
        assert refused(t.Conflict, ENDINGS[other], once, item_me(token=1)).details[
            "state"] == once["state"]


@pytest.mark.parametrize("attempt, limit, becomes", [(1, 2, "ready"), (2, 2, "dead"),
                                                     (1, 1, "dead"), (9, 0, "ready")])
def test_giving_back_the_last_attempt_makes_a_dead_letter(attempt, limit, becomes):
    item = an_item("leased", token=5, attempt=attempt, max_attempts=limit)
    new = ENDINGS["nack"](item, item_me(token=5))
    assert (new["state"], new["token"], new["attempt"]) == (becomes, 5, attempt)


def test_only_a_dead_item_is_requeued_and_its_token_goes_on():
    dead = an_item("dead", token=4, attempt=2)
    again = t.requeue_item(dead, item_me(), at="now")
    assert (again["state"], again["token"], again["attempt"]) == ("ready", 4, 0)
    assert t.requeue_item(again, item_me(), at="now") is again
    for state in ("leased", "done"):
        refused(t.Conflict, t.requeue_item, an_item(state), item_me(), at="now")
    refused(t.NotFound, t.requeue_item, None, item_me(), at="now")


def test_the_same_id_with_the_same_body_is_the_same_item_whatever_became_of_it():
    new = {"body": "b", "type": "text", "priority": 1}
    item = t.push_item(None, new, by="ada", at="now")
    assert (item["state"], item["token"], item["attempt"]) == ("ready", 0, 0)
    for state in t.ITEM_STATES:
        there = an_item(state)
        assert t.push_item(there, new, by="bob", at="later") is there
    for other in ({"body": "c"}, {"type": "json"}, {"blob": {"sha256": "0"}}):
        refused(t.Conflict, t.push_item, item, {**new, **other}, by="ada", at="now")


@pytest.mark.parametrize("change", [
    {"state": "open"}, {"state": None}, {"state": []}, {"token": None}, {"token": "1"},
    {"token": True}, {"token": -1}, {"token": 2**60}, {"body": None}, {"body": 3},
    {"blob": "x"}])
def test_a_record_that_is_no_item_is_corrupt(change):
    assert t.checked_item(None, "k") is None and t.checked_item(an_item(), "k")
    why = refused(t.Corrupt, t.checked_item, {**an_item(), **change}, "queues/k")
    assert why.details["key"] == "queues/k"


@pytest.mark.parametrize("field", ["attempt", "ttl", "max_attempts", "history", "agent",
                                   "visible_after", "ready_at", "priority"])
@pytest.mark.parametrize("value", [None, [], "x", -1, 1e400, {}])
def test_no_strange_field_of_an_item_ends_in_a_traceback(field, value):
    for state in t.ITEM_STATES:
        item = {**an_item(state, token=1), field: value}
        t.due_in(item, 5.0, 9.0), t.stands(item), t.ready_ns(item), t.last_why(item)
        for act in (*ENDINGS.values(), lambda i, m: t.requeue_item(i, m, at=""),
                    lambda i, m: t.pop_item(i, m, 99, **NO_TIME)):
            with contextlib.suppress(t.Error):
                act(item, item_me(token=1))


@pytest.mark.parametrize("token, item, ready_past, lease_past", [
    (1, None, False, False), (1, an_item(), False, False),
    (1, an_item("leased", token=1), True, False),
    (2, an_item("leased", token=1), False, False),
    (2, an_item("ready", token=1), False, False),
    (1, an_item("ready", token=1), True, True), (2, an_item("dead", token=1), False,
                                                 False),
    (1, an_item("dead", token=1), True, True), (1, an_item("done", token=1), True, True),
    (2, an_item("done", token=1), True, False),
    (1, an_item("leased", token=2), True, True)])
def test_a_marker_is_past_only_when_it_can_never_come_true(token, item, ready_past,
                                                          lease_past):
    assert (t.marker_is_past(token, item), t.lease_is_past(token, item)) == (
        ready_past, lease_past)


def moves_of(item, tokens, pop=t.pop_item, ack=t.ack_item):
    """Every state that one act of ada or bob, with any token, makes of an item."""
    for name in ("ada", "bob"):
        for age in (10, 70):
            with contextlib.suppress(t.Error):
                yield name, "pop", pop(item, item_me(name), age, **NO_TIME), age
        with contextlib.suppress(t.Error):
            yield name, "requeue", t.requeue_item(item, item_me(name), at=""), 0
        for token in tokens:
            me = item_me(name, token)
            for verb, act in {**ENDINGS, "ack": lambda i, m: ack(i, m, at="")}.items():
                with contextlib.suppress(t.Error):
                    yield name, verb, act(item, me), token


def item_walk(**variant):
    """What is wrong in all histories of one item up to token 5; [] if nothing."""
    start = t.push_item(None, {"body": "b", "type": "text", "max_attempts": 2},
                        by="ada", at="")
    todo, seen, wrong = [start], set(), []
    while todo:
        item = todo.pop()
        for name, verb, new, how in moves_of(item, range(6), **variant):
            if new is item:
                continue
            wrong += item_faults(item, new, f"{verb} by {name} ({how})", how)
            key = tuple(str(new.get(field)) for field in (
                "state", "token", "attempt", "agent", "released_by"))
            if key not in seen and new["token"] < 5:
                seen.add(key)
                todo.append(new)
    assert len(seen) > 10
    return wrong


def item_faults(old, new, what, how=None):
    """Why an item may not go from `old` to `new`; what: the act, for the message."""
    faults = []
    was, now = old["state"], new["state"]
    rose = new["token"] - old["token"]
    if was == "done":
        faults.append("done is not the end")
    if rose not in (0, 1) or (now == "leased" and was != "leased" and not rose):
        faults.append("a token is given twice")
    if not rose and was == "leased" and new.get("released_by") != old["agent"] \
            and new.get("agent") != old["agent"]:
        faults.append("another ended the lease")
    if now == "done" and (was != "leased" or rose):
        faults.append("done without a lease")
    if "ack" in what and isinstance(how, int) and how not in (old["token"], 0):
        faults.append("an old token did it")
    limit, tried = new.get("max_attempts", 3), old["attempt"]
    if now == "leased" and rose and new["attempt"] != tried + 1:
        faults.append("the attempt is not counted")
    if now == "dead" and was != "dead" and not (limit and tried >= limit):
        faults.append("dead before its attempts are used")
    if now in ("ready", "leased") and limit and new["attempt"] > limit:
        faults.append("tried too often")
    return [f"{what}: {was} {old['token']} -> {now} {new['token']}: {fault}"
            for fault in faults]


def test_no_history_of_an_item_breaks_a_rule():
    assert item_walk() == []


def uncounted(item, me, age, **how):
    return {**t.pop_item(item, me, age, **how), "attempt": item["attempt"]}


def any_token(item, me, *, at):
    me = t.Me(item["agent"], "", token=item["token"])
    return t.ack_item(item, me, at=at)


def same_token(item, me, age, **how):
    return {**t.pop_item(item, me, age, **how), "token": max(1, item["token"])}


@pytest.mark.parametrize("variant", [{"pop": uncounted}, {"pop": same_token},
                                     {"ack": any_token}])
def test_broken_decisions_about_items_are_caught(variant):
    assert item_walk(**variant)


# == Queues ============================================================
#
# Items between workers on the memory store: markers deleted, forged, late; crashes,
# lost answers, and queues that are broken on purpose.

ITEM = "queues/q/items/{}.json"


def queue_of(project, *, kind=t.Queue, chance=0.0, sweep=True):
    """Queue q of a project; it looks at expired leases only when nothing is ready."""
    queue = kind("q", project.queues.leases, project.artifacts)
    project.queues._open["q"] = queue
    queue.reader.chance = chance
    if not sweep:
        queue.reader._swept = lambda: ()
    return queue


@pytest.fixture
def jobs(ada):
    return queue_of(ada)


@pytest.fixture
def jobs2(bob):
    return queue_of(bob)


def item_at(bucket, name):
    return bucket.doc(ITEM.format(name))


def drain(queue, pops=1000):
    """Ids of what can be popped, each acknowledged."""
    ids = []
    with contextlib.suppress(t.Empty):
        for _ in range(pops):
            with queue.pop() as item:
                ids.append(item.id)
    return ids


def test_an_item_is_pushed_popped_and_acknowledged(jobs, jobs2, bucket):
    assert jobs.push("work", id="a")["created"]
    item = jobs2.pop()
    assert (item.id, item.body, item.token, item.attempt) == ("a", "work", 1, 1)
    refused(t.Empty, jobs.pop)
    assert item.ack()["state"] == item_at(bucket, "a")["state"] == "done"
    assert bucket.under("queues/q/") == [ITEM.format("a")]


def test_a_body_is_text_json_or_large(jobs):
    for body in ("text", "", {"a": [1, None]}, 3, "x" * 70_000, {"k": "ü" * 70_000}):
        jobs.push(body)
        with jobs.pop() as item:
            assert item.body == body
    for bad in (float("nan"), object(), b"x"):
        refused(t.Usage, jobs.push, bad)
    assert jobs.push("[1]", as_json=True)["type"] == "json" and jobs.pop().body == [1]


def test_a_damaged_large_body_is_noticed(jobs, bucket):
    doc = jobs.push("x" * 70_000, id="a")
    bucket.place(doc["blob"]["key"], b"y" * 70_000)
    with pytest.raises(t.Corrupt), jobs.pop() as item:
        item.body
    assert item_at(bucket, "a")["state"] == "ready"  # it was given back


def test_a_body_that_only_says_it_is_json_is_corrupt(jobs, bucket):
    jobs.push("{", id="a")
    bucket.place(ITEM.format("a"), {**item_at(bucket, "a"), "type": "json"})
    refused(t.Corrupt, lambda: jobs.pop().body)


def test_items_come_by_priority_then_age_then_the_given_order(jobs, bucket):
    jobs.push("", id="late", priority=9)
    jobs.push("", id="z")
    jobs.push_many(["", "", ""], id="m")
    jobs.push("", id="first", priority=0)
    jobs.push("", id="a")
    assert drain(jobs) == ["first", "z", "m-1", "m-2", "m-3", "a", "late"]


def test_the_same_id_is_one_item_with_one_marker(jobs, jobs2, bucket):
    assert jobs.push("b", id="a")["created"]
    assert not jobs2.push("b", id="a")["created"]
    refused(t.Conflict, jobs2.push, "other", id="a")
    assert len(bucket.under("queues/q/ready/")) == 1
    assert drain(jobs) == ["a"] and not jobs.push("b", id="a")["created"]
    assert bucket.under("queues/q/items/") == [ITEM.format("a")]


def test_many_are_pushed_once_under_one_id_or_operation(jobs, bucket):
    for how in ({"id": "batch"}, {"op": "o1"}):
        first = jobs.push_many(["x", "x", "y"], **how)
        again = jobs.push_many(["x", "x", "y"], **how)
        assert [d["id"] for d in first] == [d["id"] for d in again]
    assert len(bucket.under("queues/q/items/")) == 6


@pytest.mark.parametrize("how", [
    {"id": "a/b"}, {"id": "_x"}, {"priority": 10}, {"priority": -1}, {"priority": True},
    {"priority": "1"}, {"delay": -1}, {"delay": float("nan")}, {"delay": "1"},
    {"max_attempts": -1}, {"max_attempts": 1.5}, {"delay": 1e12}])
def test_a_push_with_nonsense_is_refused_before_anything_is_written(how, jobs, bucket):
    refused(t.Usage, jobs.push, "b", **how)
    assert not bucket.log


def test_an_item_is_not_popped_before_its_time(jobs, jobs2, bucket):
    jobs.push("", id="a", delay=60)
    jobs.push("", id="b", delay=3)
    why = refused(t.Empty, jobs2.pop)
    assert why.details["expires_in_s"] in (3, 4) and "the next item is due" in str(why)
    pass_time(bucket, 4)
    assert drain(jobs2) == ["b"]
    pass_time(bucket, 60)
    assert drain(jobs2) == ["a"]


def test_a_pusher_whose_clock_is_ahead_hides_nothing(jobs, jobs2, bucket):
    bucket.clock_at += 4
    jobs.push("", id="a")
    bucket.clock_at -= 4
    assert drain(queue_of(agent_on(bucket, "bob"), sweep=False)) == ["a"]


def test_a_page_of_items_whose_time_has_not_come_hides_no_other(ada, bucket):
    jobs = queue_of(ada, sweep=False)
    at = int((bucket.clock_at + 900) * 1e9)
    for n in range(t.PAGE + 5):
        bucket.place(f"queues/q/ready/00/{at:019d}_d{n}.1", {})
    jobs.push("", id="a", priority=7)
    assert drain(jobs) == ["a"]


def test_a_given_back_item_comes_again_under_the_next_token(jobs, jobs2, bucket):
    jobs.push("", id="a")
    jobs.pop().nack("no disk", delay=30)
    refused(t.Empty, jobs2.pop)
    pass_time(bucket, 31)
    item = jobs2.pop()
    assert (item.token, item.attempt) == (2, 2)
    assert [e["why"] for e in item.doc["history"]] == ["pushed", "popped", "no disk",
                                                       "popped"]


def test_an_error_gives_the_item_back_and_leaving_acknowledges(jobs, bucket):
    jobs.push("", id="a")
    with pytest.raises(ZeroDivisionError), jobs.pop():
        1 / 0
    assert t.last_why(item_at(bucket, "a")) == "given back after ZeroDivisionError"
    with jobs.pop():
        pass
    assert item_at(bucket, "a")["state"] == "done"


@pytest.mark.parametrize("end", ["nack", "expire"])
def test_an_item_is_dead_after_its_last_attempt_and_can_be_revived(end, jobs, bucket):
    jobs.push("", id="a", max_attempts=2)
    for attempt in (1, 2):
        item = jobs.pop(ttl=60)
        assert item.attempt == attempt
        item.nack() if end == "nack" else pass_time(bucket, 66)
    refused(t.Empty, jobs.pop)
    [dead] = jobs.dead()
    assert dead["id"] == "a" and "all 2 attempts are used" in dead["why"]
    assert jobs.counts()["dead"] == 1 and not bucket.under("queues/q/ready/")
    jobs.requeue("a")
    item = jobs.pop()
    assert (item.attempt, item.token) == (1, 3 if end == "nack" else 4)


def test_an_expired_lease_goes_to_another_and_its_holder_is_fenced(jobs, jobs2, bucket):
    jobs.push("", id="a")
    old = jobs.pop(ttl=60)
    pass_time(bucket, 64)
    refused(t.Empty, jobs2.pop)
    pass_time(bucket, 2)
    new = jobs2.pop()
    assert (new.token, new.attempt) == (2, 2)
    for act in (old.ack, old.nack, old.renew):
        why = refused(t.Fenced, act)
        assert why.details["holder"] == "bob" and "leased by bob (token 2)" in str(why)
    assert new.ack()["state"] == "done"


def test_an_expired_lease_is_found_though_others_are_ready(jobs, jobs2, bucket):
    jobs.push("", id="a")
    jobs.pop(ttl=60)
    jobs.push("", id="b")
    pass_time(bucket, 66)
    jobs2.reader.chance = 1
    assert jobs2.pop().id == "a"


def test_an_extended_lease_does_not_expire(jobs, jobs2, bucket):
    jobs.push("", id="a")
    item = jobs.pop(ttl=60)
    for _ in range(3):
        pass_time(bucket, 60)
        item.renew()
        refused(t.Empty, jobs2.pop)
    assert jobs.extend("a", ttl=600)["ttl"] == 600
    pass_time(bucket, 600)
    refused(t.Empty, jobs2.pop)
    assert item.ack()["state"] == "done"


def test_a_token_that_was_never_popped_is_fenced_and_no_item_is_not_found(jobs, jobs2):
    jobs.push("", id="a")
    jobs.pop()
    for act in (jobs2.ack, jobs2.nack, jobs2.extend):
        refused(t.Fenced, act, "a")
        refused(t.Fenced, act, "a", token=1)  # the agent must match as well
        refused(t.NotFound, act, "ghost")
        refused(t.Usage, act, "a/b")


def test_ending_a_lease_leaves_nothing_to_renew_or_to_remember(bucket):
    state = LocalState()
    ada = agent_on(bucket, "ada", state=state)
    jobs = queue_of(ada)
    jobs.push_many(["", "", ""], id="a")
    jobs.pop(), jobs.pop()
    assert ada.renew_all(older=0)[0] == ["queue/q/a-1", "queue/q/a-2"]
    jobs.ack("a-1"), jobs.nack("a-2")
    assert ada.whoami()["holds"] == {} and state.holds() == {}
    assert jobs.ack("a-1")["state"] == "done"  # though its token is forgotten


def test_a_pop_repeated_under_its_operation_is_the_same_item(jobs, bob, bucket):
    jobs.push_many(["", ""], id="a")
    assert [jobs.pop(op="o").id, jobs.pop(op="o").id] == ["a-1", "a-1"]
    assert queue_of(bob).pop(op="o").id == "a-2"  # another agent's is another
    assert item_at(bucket, "a-1")["token"] == 1


def test_a_pop_waits_for_an_item_and_gives_up_in_time(jobs, jobs2, bucket):
    refused(t.TimedOut, jobs.pop, wait=0.3)
    threading.Timer(0.2, jobs2.push, ("b",)).start()
    assert jobs.pop(wait=20).body == "b"


def test_one_who_waits_sweeps_seldom(jobs, bucket):
    refused(t.TimedOut, jobs.pop, wait=1.5)
    counts = jobs.ledger.store.counts
    assert counts["LIST", "queues/q/ready/"] >= 4
    assert counts["LIST", "queues/q/items/"] == 1


def test_peeking_and_counting_change_nothing(jobs, jobs2, bucket):
    for n in range(4):
        jobs.push(f"b{n}", id=f"i{n}", priority=4 - n)
    jobs.push("", id="later", delay=60)
    jobs2.pop(), jobs2.pop().ack()
    before = dict(bucket.shared.objects)
    assert [row["id"] for row in jobs.peek()] == ["i1", "i0", "later"]
    assert jobs.peek(limit=1)[0]["body"] == "b1" and jobs.peek()[2]["due_in_s"] > 50
    assert jobs.counts() == {"ready": 3, "leased": 1, "done": 1, "dead": 0,
                             "damaged": 0, "total": 5}
    assert bucket.shared.objects == before


def test_a_damaged_item_stops_nobody_and_is_counted(ada, jobs, bucket):
    jobs.push("", id="bad", priority=0)
    jobs.push("", id="good")
    bucket.place(ITEM.format("bad"), {"state": "ready"})
    assert drain(jobs) == ["good"]
    assert jobs.counts()["damaged"] == 1
    assert any("bad.json is no item" in text for text in ada.warned)
    refused(t.Corrupt, jobs.ack, "bad", token=1)


# -- markers deleted and forged ----------------------------------------


def test_no_item_is_lost_with_its_ready_marker(jobs, bucket):
    jobs.push_many([""] * 5, id="a")
    for key in bucket.under("queues/q/ready/"):
        bucket.delete(key)
    assert sorted(drain(jobs)) == [f"a-{n}" for n in range(1, 6)]


@pytest.mark.parametrize("family", ["active/", ""])
def test_no_lease_lives_on_for_want_of_its_active_marker(family, jobs, jobs2, bucket):
    jobs.push("", id="a")
    for token in (1, 2, 3):
        item = (jobs if token % 2 else jobs2).pop(ttl=60)
        assert (item.id, item.token) == ("a", token)
        for key in bucket.under("queues/q/" + family):
            if "/items/" not in key:
                bucket.delete(key)
        pass_time(bucket, 66)
    refused(t.Empty, jobs.pop)
    assert [row["id"] for row in jobs2.dead()] == ["a"]


def test_a_sweep_brings_the_missing_markers_back(jobs, bucket):
    jobs.push_many([""] * 5, id="a")
    jobs.pop()
    markers = [key for key in bucket.under("queues/q/") if "/items/" not in key]
    for key in markers:
        bucket.delete(key)
    jobs.pop()
    back = [key for key in bucket.under("queues/q/") if "/items/" not in key]
    assert {key for key in back if "a-2" not in key} == {
        key for key in markers if "a-2" not in key}


FORGED_MARKERS = [
    "ready/00/{now}_held.1", "ready/00/{now}_held.2", "ready/00/{now}_held.9",
    "ready/00/{now}_done.1", "ready/00/{now}_done.2", "ready/00/{now}_ghost.1",
    "ready/00/{now}_later.1", "ready/00/{now}_free.7", "ready/05/{never}_free.1",
    "ready/00/{now}_.1", "ready/00/{now}_a/b.1", "ready/00/x", "ready/77/{now}_free.1",
    "ready/00/{now}_ü.1", "ready/00/{now}_free.²", "ready/00/{now}_.._up.1",
    "active/free.1", "active/free.9", "active/done.1", "active/done.7", "active/ghost.1",
    "active/held.7", "active/x", "active/a/b.1", "active/.1"]


@pytest.mark.parametrize("real", [True, False], ids=["beside real ones", "alone"])
def test_forged_markers_give_nothing_twice_and_hide_nothing(real, jobs, jobs2, bucket):
    jobs.push("", id="done"), jobs.pop().ack()
    jobs.push("", id="held"), jobs.pop(ttl=60)
    jobs.push("", id="later", delay=200)
    jobs.push("", id="free")
    for key in bucket.under("queues/q/ready/") if not real else ():
        bucket.delete(key)
    for key in FORGED_MARKERS:
        bucket.place("queues/q/" + key.format(
            now=int(bucket.clock_at * 1e9), never="9" * 19), {})
    assert drain(jobs2) == ["free"]
    pass_time(bucket, 100)
    assert drain(jobs2) == ["held"] and item_at(bucket, "held")["token"] == 2
    pass_time(bucket, 200)
    assert drain(jobs2) == ["later"]
    pass_time(bucket, t.HINT_LIVES)
    assert drain(jobs2) == [] and queue_faults(bucket) == []


def test_a_marker_of_a_push_under_way_is_left_for_an_hour(jobs, bucket):
    key = f"queues/q/ready/05/{int(bucket.clock_at * 1e9):019d}_soon.1"
    bucket.place(key, {})
    refused(t.Empty, jobs.pop)
    assert bucket.under("queues/q/ready/") == [key]
    pass_time(bucket, t.HINT_LIVES + 1)
    refused(t.Empty, jobs.pop)
    assert not bucket.under("queues/q/ready/")


def test_who_loses_an_item_leaves_the_active_marker_to_the_winner(jobs, jobs2, bucket):
    jobs.push("", id="a")
    jobs.ledger.store.fault("ok", "PUT", "active/", after=lambda: jobs2.pop())
    refused(t.Empty, jobs.pop)
    assert bucket.under("queues/q/active/") == ["queues/q/active/a.1"]
    assert item_at(bucket, "a")["agent"] == "bob"


def test_an_item_is_ready_only_once_its_marker_is_there(jobs, bucket):
    jobs.push("", id="a")
    jobs.pop().nack()
    order = [key.split("/")[2] for key, body, *_ in bucket.log if body]
    assert order == ["ready", "items", "active", "items", "ready", "items"]


# -- crashes, and runs at random ---------------------------------------


def queue_faults(bucket):
    """What is wrong with how the items of a bucket moved; [] if nothing."""
    wrong, last = chain_faults(bucket), {}
    for key, body, at, _ in bucket.log:
        if "/items/" not in key:
            continue
        if body is None:
            wrong.append(f"{key}: deleted")
            continue
        doc, old = json.loads(body), last.get(key, {})
        last[key] = {**doc, "written": at}
        if not old:
            continue
        why = doc["history"][-1]["why"]
        wrong += item_faults(old, doc, f"{key}: {why[:3]}")
        soon = "expired" in why and at - int(old["written"]) < old["ttl"] + 5
        if soon and doc["token"] > old["token"]:
            wrong.append(f"{key}: taken over after {at - old['written']:.0f} s")
    return wrong


def a_dead_item(bucket, ada):
    queue_of(ada).push("", id="a", max_attempts=1)
    queue_of(ada).pop().nack()


def a_popped_item(bucket, ada):
    queue_of(ada).push("", id="a")
    queue_of(ada).pop()


def an_expired_item(bucket, ada):
    queue_of(agent_on(bucket, "eve")).push("", id="a")
    queue_of(agent_on(bucket, "eve")).pop(ttl=60)
    pass_time(bucket)


QUEUE_CRASHES = {  # verb: (before, act, the state after it was repeated)
    "push": (None, lambda a: queue_of(a).push("", id="a"), "ready"),
    "push with op": (None, lambda a: queue_of(a).push("", id="a", op="o"), "ready"),
    "pop": (lambda b, a: queue_of(a).push("", id="a"),
            lambda a: queue_of(a).pop(op="o"), "leased"),
    "pop expired": (an_expired_item, lambda a: queue_of(a).pop(op="o"), "leased"),
    "pop swept": (lambda b, a: (queue_of(a).push("", id="a"), b.delete(
        b.under("queues/q/ready/")[0])), lambda a: queue_of(a).pop(op="o"), "leased"),
    "ack": (a_popped_item, lambda a: queue_of(a).ack("a"), "done"),
    "nack": (a_popped_item, lambda a: queue_of(a).nack("a", delay=1), "ready"),
    "extend": (a_popped_item, lambda a: queue_of(a).extend("a", ttl=99), "leased"),
    "requeue": (a_dead_item, lambda a: queue_of(a).requeue("a"), "ready"),
}


@pytest.mark.parametrize("verb", QUEUE_CRASHES)
def test_a_queue_verb_that_crashed_anywhere_can_be_repeated(verb):
    prepare, act, state = QUEUE_CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        look_at_everything(ada)
        act(ada)
        assert item_at(bucket, "a")["state"] == state, where
        assert queue_faults(bucket) == [], where
        assert len(bucket.under("queues/q/items/")) == 1, where
    assert points >= 4


@pytest.mark.parametrize("sweep", [True, False])
@pytest.mark.parametrize("verb", QUEUE_CRASHES)
def test_after_a_crash_of_a_queue_verb_another_goes_on(verb, sweep):
    """Without a sweep too: the order of markers and state alone loses nothing."""
    prepare, act, _ = QUEUE_CRASHES[verb]
    for bucket, ada, where in crashes(prepare, act):
        pass_time(bucket)
        jobs = queue_of(agent_on(bucket, "bob"), sweep=sweep or verb == "pop swept")
        there = item_at(bucket, "a")
        went = there is not None and there["state"] in ("ready", "leased")
        assert drain(jobs) == ["a"] * went, where
        assert queue_faults(bucket) == [], where
        pass_time(bucket, t.HINT_LIVES)
        drain(jobs)
        assert not bucket.under("queues/q/ready/"), where
        assert not bucket.under("queues/q/active/"), where


class Worker:
    """A worker of a random run: it pushes, pops and settles, dies, and goes on."""

    def __init__(self, run, number):
        self.run, self.dice = run, random.Random(f"{run.seed} {number}")
        self.name, self.held, self.state = f"w{number}", [], LocalState()
        self.start()

    def start(self):
        """Begin as a new process; it knows what local state kept."""
        agent = agent_on(self.run.bucket, self.name, state=self.state)
        agent.store.chaos = (self.dice, self.run.faults)
        self.queue = queue_of(agent, kind=self.run.kind, chance=0.2, sweep=False)
        self.held = [self.dice.choice(self.held)] if self.held else []

    def act(self, serial):
        verb = self.dice.choice([self.push, self.push, self.pop, self.pop, self.pop,
                                 self.ack, self.ack, self.nack, self.extend,
                                 self.requeue])
        self.doubt = None
        try:
            verb(f"{self.name}-{serial}")
        except Crash:
            self.start()
        except (t.Empty, t.Conflict, t.Fenced, t.Unavailable, t.Unknown, t.NotFound):
            pass

    def push(self, name):
        self.queue.push(name, id=name, max_attempts=3, priority=self.dice.randrange(3),
                        delay=self.dice.choice((0, 0, 20)))
        self.run.told.append(("pushed", name, 0, self.name))

    def pop(self, name):
        item = self.queue.pop(ttl=30)
        self.held.append((item.id, item.token))
        self.run.told.append(("popped", item.id, item.token, self.name))

    def settle(self, act, what):
        if self.held:
            item_id, token = self.dice.choice(self.held)
            act(item_id, token=token)
            self.run.told.append((what, item_id, token, self.name))

    def ack(self, name):
        self.settle(self.queue.ack, "acked")

    def nack(self, name):
        self.settle(self.queue.nack, "nacked")

    def extend(self, name):
        self.settle(self.queue.extend, "extended")

    def requeue(self, name):
        if self.held:
            self.queue.requeue(self.held[0][0])


class QueueRun:
    """A random run of some workers on a store that fails; what they were told."""

    def __init__(self, seed, *, kind=t.Queue, faults=0.1):
        self.seed, self.kind, self.faults = seed, kind, faults
        self.bucket, self.told = MemoryStore(), []

    def faults_found(self, workers=3, rounds=40):
        def live(number):
            worker = Worker(self, number)
            for serial in range(rounds):
                worker.act(serial)
                if worker.dice.random() < 0.1:
                    self.bucket.clock_at += worker.dice.choice((5, 20, 60))
        run_all([lambda n=n: live(n) for n in range(workers)])
        return self.drained() + queue_faults(self.bucket) + self.untrue()

    def drained(self):
        """What is left when somebody pops all there is, by markers alone."""
        queue = queue_of(agent_on(self.bucket, "last"), kind=self.kind, sweep=False)
        for _ in range(4):
            pass_time(self.bucket, 100)
            drain(queue)
        left = [(key, self.bucket.doc(key)["state"]) for key in
                self.bucket.under("queues/q/items/")]
        return [f"{key} is {state} for ever" for key, state in left
                if state not in ("done", "dead")]

    def untrue(self):
        """What workers were told that no record ever said."""
        states = {"pushed": "ready", "popped": "leased", "acked": "done",
                  "extended": "leased"}
        wrong, given = [], {}
        for what, name, token, who in self.told:
            docs = self.bucket.history(ITEM.format(name))
            nacked = what == "nacked" and any(d["token"] == token and d.get(
                "released_by") == who for d in docs)
            if not nacked and not any((d["state"], d["token"]) == (
                    states.get(what), token) for d in docs):
                wrong.append(f"{name}: {what} under {token} by {who}, nobody wrote it")
            if what == "popped" and given.setdefault((name, token), who) != who:
                wrong.append(f"{name}: token {token} given to two")
        return wrong


@pytest.mark.parametrize("round_", range(4))
def test_no_random_run_of_a_queue_loses_or_doubles_an_item(round_):
    seed = random.randrange(10**9)
    print("seed", seed)
    run = QueueRun(seed)
    assert run.faults_found() == [], seed
    assert len(run.told) > 20


class AnyTokenAcks(t.Queue):
    """Acknowledges whatever is leased, under any token."""

    def ack(self, id, *, token=None, op="", first=None):
        change = self._change(id, lambda r: r.doc if r.doc["state"] == "done" else
                              any_token(r.doc, None, at=self.ledger.at()), op=op)
        return change.doc


class Uncounting(t.Queue):
    """Does not count the attempts."""

    def _change(self, id, decide, **how):
        def counting(record):
            new = decide(record)
            old = (record.doc or {}).get("attempt", 0)
            return {**new, "attempt": old} if new["state"] == "leased" else new
        return super()._change(id, counting, **how)


class LoserDrops(t.Queue):
    """Takes back the active marker that it put, when it did not get the item."""

    def _take(self, record, **how):
        item = super()._take(record, **how)
        if item is None:
            self.reader.hints.drop(self.reader.hints.active_key(
                self.reader.id_of(record.key), record.doc["token"] + 1))
        return item


class StateFirst(t.Queue):
    """Writes the state first and its marker second."""

    def _change(self, id, decide, **how):
        put, late = self.reader.hints.put, []
        self.reader.hints.put = late.append
        try:
            change = super()._change(id, decide, **how)
        finally:
            self.reader.hints.put = put
        for key in late:
            put(key)
        return change


class EarlyDrop(t.Queue):
    """Drops the marker of the old state before the new one has landed."""

    def _change(self, id, decide, **how):
        def dropping(record):
            new = decide(record)
            if record.doc and new is not record.doc:
                self.reader.hints.drop(self.reader.marker(id, record.doc))
            return new
        return super()._change(id, dropping, **how)


@pytest.mark.parametrize("kind", [AnyTokenAcks, Uncounting, LoserDrops, StateFirst,
                                  EarlyDrop])
def test_a_broken_queue_is_caught(kind):
    for seed in range(25):
        if QueueRun(seed, kind=kind, faults=0.25).faults_found():
            return
    pytest.fail(f"{kind.__name__} passed 25 runs")


# -- what it costs -----------------------------------------------------


def queue_cost(project, act, *args, **how):
    """The requests of one act: what each is about, markers without their names."""
    tally = collections.Counter()
    for what, times in spent(project, act, *args, **how).items():
        method, key = what.split(" ")
        tally[f"{method} {key.split('/')[2] or 'all'}"] += times
    return dict(tally)


def test_what_each_queue_verb_costs(ada, jobs):
    assert queue_cost(ada, jobs.push, "b", id="a") == {"PUT ready": 1, "PUT items": 1}
    assert queue_cost(ada, jobs.pop) == {
        "LIST ready": 1, "GET items": 1, "PUT active": 1, "PUT items": 1,
        "DELETE ready": 1}
    assert queue_cost(ada, jobs.extend, "a") == {"GET items": 1, "PUT items": 1}
    assert queue_cost(ada, jobs.nack, "a") == {
        "GET items": 1, "PUT ready": 1, "PUT items": 1, "DELETE active": 1}
    item = jobs.pop()
    assert queue_cost(ada, item.ack) == {"PUT items": 1, "DELETE active": 1}
    assert queue_cost(ada, jobs.ack, "a", token=2) == {"GET items": 1,
                                                       "DELETE active": 1}
    assert queue_cost(ada, jobs.pop) == {"LIST ready": 2, "LIST active": 2,
                                         "LIST items": 1, "GET items": 1}


@pytest.mark.parametrize("chance", [0, 1])
def test_a_pop_costs_at_most_six_requests_with_ten_thousand_items(bucket, chance):
    bob = agent_on(bucket, "bob")
    jobs = queue_of(bob, chance=chance)
    doc = t.stamped(t.push_item(None, {"body": "", "type": "text"}, by="a", at=""), None,
                    nonce="n")
    ended = {**doc, "state": "done", "token": 1}
    for n in range(10_000):
        at = int(bucket.clock_at * 1e9) - n
        bucket.place(ITEM.format(f"i{n}"), doc if n < 5000 else ended)
        if n < 5000:
            bucket.place(f"queues/q/ready/05/{at:019d}_i{n}.1", {})
    for _ in range(5):
        assert sum(spent(bob, jobs.pop).values()) <= 6
    assert len(bob.whoami()["holds"]) == 5


def test_an_idle_pop_reads_what_changed_and_no_more(jobs, bucket):
    jobs.push_many([""] * 30, id="a")
    drain(jobs)
    idle = {"LIST ready": 2, "LIST active": 2, "LIST items": 1}
    jobs.ledger.store.counts.clear()
    project = types.SimpleNamespace(store=jobs.ledger.store)
    assert queue_cost(project, jobs.pop) == idle
    jobs.push("", id="new")
    drain(jobs)
    assert queue_cost(project, jobs.pop) == idle


def test_a_sweep_reads_no_more_than_it_may_and_the_next_one_goes_on(jobs, bucket):
    jobs.push_many([""] * 25, id="a")
    jobs.reader.most = 10
    drain(jobs)
    for known in (20, 25, 25):
        jobs.ledger.store.counts.clear()
        refused(t.Empty, jobs.pop)
        assert len(jobs.reader.survey(most=0)) == known
        assert sum(n for (method, _), n in jobs.ledger.store.counts.items()
                   if method == "GET") <= 10


# -- real processes ----------------------------------------------------

QUEUE_WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import tracecraft
queue = tracecraft.connect(sys.argv[2], agent=sys.argv[3]).queue("q")
while True:
    try:
        item = queue.pop(ttl=2, wait=float(sys.argv[4]))
    except (tracecraft.Empty, tracecraft.TimedOut):
        break
    except (tracecraft.Unavailable, tracecraft.Unknown):
        continue
    print("got", item.id, item.token, flush=True)
    try:
        if item.body == "poison":
            item.nack("poison")
        else:
            item.ack()
            print("did", item.id, item.token, flush=True)
    except (tracecraft.Fenced, tracecraft.Unavailable, tracecraft.Unknown) as why:
        print("lost", item.id, item.token, flush=True)
"""


class Gang:
    """Worker processes on queue q of a store, some of which are killed."""

    def __init__(self, tmp, url, environ):
        self.tmp, self.url, self.environ = tmp, url, {**environ, "HOME": str(tmp)}
        self.live, self.names, self.kills = [], [], 0

    def start(self, wait):
        name = f"w{len(self.names)}"
        self.names.append(name)
        with open(self.tmp / name, "wb") as out:
            self.live.append(subprocess.Popen(
                [sys.executable, "-S", "-c", QUEUE_WORKER, os.path.dirname(PROGRAM),
                 self.url, name, str(wait)], env=self.environ, stdout=out,
                stderr=subprocess.STDOUT, cwd=str(self.tmp)))

    def kill(self, dice):
        """Kill one at random; whether one was there."""
        self.live = [process for process in self.live if process.poll() is None]
        if self.live:
            dice.choice(self.live).kill()
            self.kills += 1
        return bool(self.live)

    def told(self, word):
        """[(id, token)] of the lines that begin with `word`, of all workers."""
        lines = [line.split() for name in self.names
                 for line in (self.tmp / name).read_text().splitlines()]
        return [(line[1], int(line[2])) for line in lines
                if line[0] == word and len(line) == 3]

    def wait(self, seconds):
        for process in self.live:
            process.wait(seconds)

    def faults(self, queue):
        """What was popped twice, acknowledged in vain, not done, or dead too soon."""
        text = "".join((self.tmp / name).read_text() for name in self.names)
        wrong = [text[-2000:]] if "Traceback" in text else []
        got = collections.Counter(self.told("got"))
        wrong += [f"{pair} popped {times} times" for pair, times in got.items()
                  if times > 1]
        docs = {item_id: queue.reader.peek(item_id).doc
                for item_id in queue.reader.survey()}
        for item_id, doc in docs.items():
            due = doc["attempt"] >= doc["max_attempts"]
            if doc["state"] not in ("done", "dead") or (doc["state"] == "dead"
                                                        and not due):
                wrong.append(f"{item_id} is {doc['state']} after {doc['attempt']}")
            if doc["body"] == "poison" and doc["state"] != "dead":
                wrong.append(f"{item_id} is poison and {doc['state']}")
        wrong += [f"{item_id} was done under {token}, says {docs[item_id]['token']}"
                  for item_id, token in self.told("did")
                  if (docs[item_id]["state"], docs[item_id]["token"]) != ("done", token)]
        return wrong


def queue_in(url, environ, tmp):
    return t.connect(url, agent="boss", environ={**environ, "HOME": str(tmp)},
                     cwd=str(tmp)).queue("q")


def test_killed_processes_lose_no_item_and_do_none_twice(tmp_path):
    url, environ = f"file://{tmp_path}/store/p", {"PATH": os.environ["PATH"]}
    queue, dice = queue_in(url, environ, tmp_path), random.Random()
    queue.push_many(["poison" if n % 20 == 0 else "work" for n in range(60)], id="i")
    gang = Gang(tmp_path, url, environ)
    for _ in range(4):
        gang.start(wait=0)
    for _ in range(2):
        before, until = len(gang.told("got")), time.monotonic() + 20
        while len(gang.told("got")) < before + 5 and time.monotonic() < until:
            time.sleep(0.005)
        gang.kill(dice)
    gang.wait(60)
    for item_id, (state, *_) in queue.reader.survey().items():
        path = tmp_path / "store" / "p" / queue.reader.key(item_id)
        if state == "leased":  # its holder was killed: let the lease be old
            os.utime(path, (time.time() - 60,) * 2)
    gang.start(wait=0)
    gang.wait(60)
    assert gang.faults(queue) == [] and gang.kills
    assert queue.counts()["total"] == 60


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_soak_twenty_killed_processes_lose_no_item(kind, tmp_path):
    seed = int(os.environ.get("TRACECRAFT_SEED") or random.randrange(10**9))
    seconds = float(os.environ.get("TRACECRAFT_SOAK") or 20)
    print("seed", seed)
    count = 5000 if seconds >= 120 else 400
    with contextlib.ExitStack() as stack:
        url, environ = f"file://{tmp_path}/store/p", {"PATH": os.environ["PATH"]}
        if kind == "s3":
            server = stack.enter_context(S3Server())
            url, environ = f"s3://bucket/p?endpoint={server.url}", server.env()
        queue = queue_in(url, environ, tmp_path)
        queue.ledger.store.ensure()
        queue.push_many(["poison" if n % 100 == 0 else "work" for n in range(count)],
                        id="i")
        gang = killed_gang(tmp_path, url, environ, dice=random.Random(seed),
                           until=time.monotonic() + seconds)
        gang.wait(seconds + 300)
        while True:  # what the last killed ones held
            with contextlib.suppress(t.TimedOut):
                with queue.pop(wait=12) as item:
                    continue
            break
        print(f"{len(gang.told('got'))} pops, {gang.kills} kills")
        assert gang.faults(queue) == [] and gang.kills
        assert queue.counts()["total"] == count


def killed_gang(tmp, url, environ, *, dice, until):
    """Twenty workers, one killed and replaced now and then, until none is left."""
    gang = Gang(tmp, url, environ)
    for _ in range(20):
        gang.start(wait=10)
    while time.monotonic() < until:
        time.sleep(dice.random())
        if not gang.kill(dice):
            break
        gang.start(wait=10)
    return gang


# == Queue commands ====================================================


def test_a_queue_goes_round_in_processes(sh):
    assert sh.ok("queue", "push", "jobs", "one", "--id", "a") \
        == "Pushed item a to queue jobs\n"
    assert "was there already" in sh.ok("queue", "push", "jobs", "one", "--id", "a")
    sh.refused(3, "queue", "push", "jobs", "two", "--id", "a")
    assert sh.ok("queue", "peek", "jobs") == "a: one\n"
    popped = sh.run("queue", "pop", "jobs")
    assert (popped.out, popped.err) == (
        "one\n", "Popped item a of queue jobs (token 1, attempt 1)\n")
    assert sh.ok("queue", "extend", "jobs", "a", "--ttl", "99") \
        == "Extended item a of queue jobs for 99s\n"
    assert sh.ok("queue", "ack", "jobs", "a") == "Acknowledged item a of queue jobs\n"
    sh.ok("queue", "ack", "jobs", "a")
    assert sh.ok("queue", "len", "jobs") == "0 ready, 0 leased, 1 done, 0 dead\n"
    assert "nothing to pop" in sh.refused(1, "queue", "pop", "jobs")
    assert "waited 0.1s" in sh.refused(6, "queue", "pop", "jobs", "--wait", "0.1")


def test_a_popped_item_is_another_agents_business_to_nobody(sh):
    sh.ok("queue", "push", "jobs", "one", "--id", "a")
    item = sh.json("queue", "pop", "jobs")
    assert (item["id"], item["body"], item["token"], item["attempt"]) == (
        "a", "one", 1, 1)
    for verb in ("ack", "nack", "extend"):
        said = sh.refused(4, "queue", verb, "jobs", "a", "--token", "1",
                          TRACECRAFT_AGENT="bob")
        assert "leased by ada (token 1)" in said
        sh.refused(1, "queue", verb, "jobs", "ghost")
    error = json.loads(sh.run("--json", "queue", "ack", "jobs", "a",
                              "--token", "9").err)["error"]
    assert (error["exit"], error["code"], error["holder"]) == (4, "fenced", "ada")


def test_dead_items_are_listed_with_their_reason_and_requeued(sh):
    sh.ok("queue", "push", "jobs", "one", "--id", "a", "--max-attempts", "1")
    sh.ok("queue", "pop", "jobs")
    assert sh.ok("queue", "nack", "jobs", "a", "--reason", "no\x1b[2Jdisk") == (
        "Item a of queue jobs is dead: no\\x1b[2Jdisk; all 1 attempts are used\n")
    assert sh.json("queue", "dead", "jobs")["items"][0]["attempt"] == 1
    sh.refused(2, "queue", "requeue", "jobs")
    assert sh.ok("queue", "requeue", "jobs", "--all") \
        == "Requeued 1 item(s) of queue jobs\n"
    assert sh.ok("queue", "dead", "jobs") == "Queue jobs has no dead items.\n"
    assert sh.ok("queue", "pop", "jobs") == "one\n"


def test_lines_and_files_are_pushed_as_they_are(sh):
    sh.ok("queue", "push", "jobs", "--lines", "--id", "n", stdin=b"a b\n\n- c\n")
    assert sh.ok("queue", "push", "jobs", "--lines", "--id", "n", stdin=b"a b\n\n- c\n"
                 ) == "Pushed 0 items to queue jobs (2 were there already)\n"
    path = os.path.join(sh.cwd, "body.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("ü" * 70_000 + "\n")
    sh.ok("queue", "push", "jobs", "--file", path)
    got = [sh.ok("queue", "pop", "jobs") for _ in range(3)]
    assert got == ["a b\n", "- c\n", "ü" * 70_000 + "\n"]
    assert "not JSON" in sh.refused(2, "queue", "push", "jobs", "{", "--json")
    assert json.loads(sh.ok("queue", "push", "jobs", "{}", "--json"))["type"] == "json"


def test_a_command_gets_the_body_and_settles_the_item(sh):
    sh.ok("queue", "push", "jobs", "--lines", "--id", "n", stdin=b"0\n3\n",)
    script = ("read code; echo $TRACECRAFT_QUEUE $TRACECRAFT_ITEM $TRACECRAFT_TOKEN"
              " $TRACECRAFT_ATTEMPT; exit $code")
    done = sh.run("queue", "pop", "jobs", "--", "sh", "-c", script)
    assert (done.returncode, done.out) == (0, "jobs n-1 1 1\n")
    assert sh.run("queue", "pop", "jobs", "--", "sh", "-c", script).returncode == 3
    assert sh.ok("queue", "len", "jobs").startswith("1 ready, 0 leased, 1 done")
    said = sh.run("queue", "pop", "jobs", "--wait", "5", "--", "nosuchcommand")
    assert said.returncode == 2 and "1 ready" in sh.ok("queue", "len", "jobs")


@pytest.mark.parametrize("verb, state", [("ack", "done"), ("nack", "ready")])
def test_a_command_may_settle_its_item_itself(sh, verb, state):
    sh.ok("queue", "push", "jobs", "x", "--id", "a")
    script = " ".join(map(shlex.quote, RUN)) + f" queue {verb} jobs a; exit 0"
    outer = {"TRACECRAFT_STEP": "s", "TRACECRAFT_LOCK": "l", "TRACECRAFT_TOKEN": "7"}
    done = sh.run("queue", "pop", "jobs", "--", "sh", "-c", script, **outer)
    assert done.returncode == 0, done.err
    assert f"1 {state}" in sh.ok("queue", "len", "jobs")


def test_a_step_claimed_for_an_item_has_its_own_token(sh):
    sh.ok("queue", "push", "jobs", "x", "--id", "a")
    sh.ok("claim", "s"), sh.ok("release", "s")
    run = " ".join(map(shlex.quote, RUN))
    script = f"{run} claim s -- sh -c '{run} complete s'; {run} queue ack jobs a"
    done = sh.run("queue", "pop", "jobs", "--", "sh", "-c", script)
    assert done.returncode == 0, done.err
    assert sh.json("step", "show", "s")["state"] == "complete"
    assert "1 done" in sh.ok("queue", "len", "jobs")


def test_a_command_that_lost_its_lease_exits_4(sh):
    sh.ok("queue", "push", "jobs", "x", "--id", "a")
    item = pathlib.Path(sh.cwd).rglob("queues/jobs/items/a.json")
    [path] = [str(found) for found in item]
    script = (f"sed 's/\"token\": 1/\"token\": 2/' {path} > t; cat t > {path}")
    done = sh.run("queue", "pop", "jobs", "--", "sh", "-c", script)
    assert done.returncode == 4 and "not its lease" in done.err, done.err


def test_a_terminated_pop_gives_its_item_back(sh):
    sh.ok("queue", "push", "jobs", "x", "--id", "a")
    process = sh.start("queue", "pop", "jobs", "--", "sh", "-c", "echo up; sleep 60")
    assert process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(SLOW) == 130
    assert "1 ready, 0 leased" in sh.ok("queue", "len", "jobs")
    process.stdout.close(), process.stderr.close()


def test_a_pop_that_is_repeated_under_its_operation_is_the_same(sh):
    sh.ok("queue", "push", "jobs", "--lines", "--id", "n", stdin=b"1\n2\n")
    assert sh.ok("queue", "pop", "jobs", "--op", "o") == "1\n"
    assert sh.ok("queue", "pop", "jobs", "--op", "o") == "1\n"
    for words in (["ack", "jobs", "n-1"], ["push", "jobs", "3", "--id", "x"]):
        sh.ok("queue", *words, "--op", "p")
        sh.ok("queue", *words, "--op", "p")
    assert sh.ok("queue", "len", "jobs") == "2 ready, 0 leased, 1 done, 0 dead\n"


def test_doctor_knows_the_objects_of_a_queue(sh):
    sh.ok("queue", "push", "jobs", "--lines", "--id", "n", stdin=b"1\n2\n")
    sh.ok("queue", "pop", "jobs")
    checked = sh.json("doctor")
    assert checked["ok"] and not checked["problems"] and not checked["notes"]
    [path] = pathlib.Path(sh.cwd).rglob("queues/jobs/items/n-1.json")
    path.write_text('{"state": "ready"}')
    assert "n-1.json has no 'token'" in sh.run("doctor").out


# == Requests per command ==============================================
#
# Plans as text, graphs, and what a marker means: all pure.


PLAN = """# the plan
- [ ] design: the design (priority: 2)
  some prose: not a step
* [ ] S1.A: title (with brackets) (needs: design; labels: code, http; max_attempts: 1)
- [x] old: was done
- [ ] docs: the guide (needs: s1-a, old)
"""


def test_a_checklist_becomes_steps_and_what_is_ticked_is_left_out():
    plan, ticked, faults = t.plan_of(PLAN)
    assert (list(plan), ticked, faults) == (["design", "s1-a", "docs"], {"old"}, [])
    assert plan["s1-a"] == {"title": "title (with brackets)", "needs": ["design"],
                            "description": "", "priority": 5, "max_attempts": 1,
                            "labels": ["code", "http"], "spelling": "S1.A"}
    assert plan["design"]["priority"] == 2


def test_a_json_plan_says_the_same_as_its_checklist():
    steps = [{"id": "design", "title": "the design", "priority": 2},
             {"id": "S1.A", "title": "title (with brackets)", "needs": ["design"],
              "labels": ["code", "http"], "max_attempts": 1},
             {"id": "docs", "title": "the guide", "needs": ["s1-a", "old"]}]
    assert t.plan_of(json.dumps({"steps": steps}))[0] == t.plan_of(PLAN)[0]
    assert t.plan_of(json.dumps(steps))[0] == t.plan_of(PLAN)[0]


@pytest.mark.parametrize("text, fault", [
    ("", "has no steps"), ("# prose", "has no steps"), ("{", "not JSON"),
    ('{"step": []}', 'no list "steps"'), ('{"steps": [3]}', 'step 1'),
    ('[{"id": "a", "nedds": []}]', "did you mean needs?"),
    ('[{"id": "a", "priority": "2"}]', "priority is '2', not a number"),
    ('[{"id": "a", "priority": 10}]', "priority is 10"),
    ('[{"id": "a", "priority": true}]', "not a number"),
    ('[{"id": "a", "needs": [3]}]', "no name"), ('[{"id": "a b"}]', "does not fit"),
    ('[{"id": "a", "needs": "b"}]', "not a list"), ('[{"id": "_a"}]', "reserved"),
    ('[{"id": "a", "needs": ["a"]}]', "cannot need itself"),
    ('[{"id": "S.a"}, {"id": "s-A"}]', "are one step: s-a"),
    ("- [ ] a", "line 1: has no title"), ("- [ ] a: b (needs: x; foo: 1)", "'foo'"),
    ("- [ ] a: b (priority: high)", "'high', not a number"),
    ("- [ ] a: b (priority: 1; labels: u v)", "does not fit")])
def test_what_is_wrong_with_a_plan_is_said(text, fault):
    faults = t.plan_of(text)[2]
    assert len(faults) == 1 and fault in faults[0]


def test_all_faults_of_a_plan_are_listed_at_once():
    plan, _, _ = t.plan_of('[{"id": "a", "needs": ["b", "desing"]}, {"id": "b",'
                           '"needs": ["c"]}, {"id": "c", "needs": ["a"]}]')
    faults = t.plan_faults(plan, {"design": []})
    assert faults == ["a needs desing, which is not there; did you mean design?",
                      "cycle: a → b → c → a"]


def test_a_cycle_through_a_step_that_is_there_is_found():
    plan, _, _ = t.plan_of('[{"id": "new", "needs": ["old"]}]')
    assert t.plan_faults(plan, {"old": ["new"]}) == ["cycle: new → old → new"]


def random_graph(dice, size):
    names = [f"n{at}" for at in range(size)]
    return {name: dice.sample(names, dice.randrange(min(4, size))) for name in names}


def test_a_cycle_is_found_exactly_when_the_steps_have_no_order():
    dice = random.Random(5)
    for _ in range(400):
        needs = random_graph(dice, dice.randrange(1, 9))
        cycle, order = t.find_cycle(needs), t.in_order(needs)
        assert sorted(order) == sorted(needs)
        place = {sid: at for at, sid in enumerate(order)}
        sorted_well = all(place[need] < place[sid] for sid in needs
                          for need in needs[sid])
        assert sorted_well == (not cycle)
        assert not cycle or cycle[0] == cycle[-1] and all(
            b in needs[a] for a, b in zip(cycle, cycle[1:]))


def test_a_long_chain_is_no_problem_for_the_order_or_the_search_for_cycles():
    needs = {f"s{n}": [f"s{n - 1}"] if n else [] for n in range(20_000)}
    assert t.find_cycle(needs) == [] and t.in_order(needs)[-1] == "s19999"
    needs["s0"] = ["s19999"]
    assert len(t.find_cycle(needs)) == 20_001


@pytest.mark.parametrize("steps, alive", [
    ({"a": ("complete", [])}, ""), ({"a": ("failed", [])}, ""),
    ({"a": ("in_progress", []), "b": ("waiting", ["a"])}, "ab"),
    ({"a": ("failed", []), "b": ("waiting", ["a"]), "c": ("waiting", ["b"])}, ""),
    ({"a": ("needs_review", []), "b": ("waiting", ["a"])}, "ab"),
    ({"b": ("waiting", ["nobody"])}, "b"),
    ({"a": ("blocked", []), "b": ("released", ["a"]), "c": ("pending", [])}, "c")])
def test_what_waits_for_a_failed_step_is_not_alive(steps, alive):
    assert "".join(sorted(t.still_alive(steps))) == alive


def held_as(state, token):
    return {"agent": "a", "state": state, "token": token}


@pytest.mark.parametrize("token, claim, stand", [
    (1, None, "take"), (2, None, "past"), (0, None, "past"),
    (2, held_as("released", 1), "take"), (1, held_as("released", 1), "past"),
    (9, held_as("released", 1), "past"), (1, held_as("in_progress", 1), "held"),
    (2, held_as("in_progress", 1), "early"), (1, held_as("in_progress", 2), "past"),
    (3, held_as("in_progress", 1), "past"), (2, held_as("needs_review", 1), "early"),
    (2, held_as("complete", 1), "past"), (1, held_as("complete", 1), "past"),
    (2, held_as("failed", 1), "past"), (2, held_as("blocked", 1), "past")])
def test_a_marker_is_judged_by_the_claim_it_leads_to(token, claim, stand):
    assert t.stand_of(token, claim, described=True) == stand


def test_a_marker_without_claim_and_spec_may_be_of_a_step_that_is_being_added():
    assert t.stand_of(1, None, described=False) == "early"


def test_no_title_ends_the_quotes_of_a_drawing():
    row = {"step": "a", "state": "pending", "needs": [], "title": '"]; x\\" <b> ['}
    for kind in ("mermaid", "dot"):
        text = t.draw_graph([row], kind)
        assert text.count('"') == (2 if kind == "mermaid" else 4)
        assert "<b>" not in text and "\\" not in text


def hint(name, priority=5, modified=0, token=1):
    return t.Hint(f"ready/{priority:02d}/{name}.{token}", priority=priority, name=name,
                  token=token, at_ns=0, modified=modified, age=0)


def test_the_most_urgent_then_the_oldest_is_picked_first():
    hints = [hint("a", 5, 1), hint("b", 2, 9), hint("c", 2, 3), hint("d", 9, 0)]
    assert t.pick(hints, crowded=False, roll=0.99).name == "c"
    assert t.pick(hints, crowded=True, roll=0.99).name == "b"
    assert t.pick([], crowded=False, roll=0) is None


def test_a_crowd_spreads_over_the_older_half_of_many():
    hints = [hint(f"s{n:03}", 5, n) for n in range(200)]
    picked = {t.pick(hints, crowded=False, roll=(n + 0.5) / 100).name
              for n in range(100)}
    assert picked == {f"s{n:03}" for n in range(100)}


def test_a_timed_marker_is_parsed_only_when_its_time_is_of_ascii_digits(ada, bucket):
    for digits in ("²" * 19, "٣" * 19, "0" * 18 + "7"):
        bucket.place(f"queues/q/ready/05/{digits}_a.b.2", {})
    hints = t.Hints(ada.ledger, "queues/q/", timed=True).ready()
    assert [(h.name, h.token, h.at_ns) for h in hints] == [("a.b", 2, 7)]


def test_markers_are_listed_after_a_key(ada, bucket):
    for name in ("ready/00/a.1", "ready/00/b.1", "ready/07/c.1"):
        bucket.place(name, {})
    hints = t.Hints(ada.ledger).ready(after="ready/00/a.1")
    assert [h.name for h in hints] == ["b", "c"]
    assert [h.name for h in t.Hints(ada.ledger).ready(after="ready/000")] == ["c"]


# == Tasks =============================================================
#
# The frontier and the next step, on the memory store: markers deleted, forged, late.


READY = "ready/05/s.1"


@pytest.fixture
def eager(ada):
    """An agent that never looks at abandoned steps first."""
    ada.tasks.chance = 0
    return ada


def test_a_step_without_needs_has_a_marker_before_its_spec(ada, bucket):
    ada.add_step("s", priority=3)
    written = [key for key, *_ in bucket.log if not key.startswith("agents/")]
    assert written == ["ready/03/s.1", "steps/s/spec.json"]


def test_what_completes_makes_ready_what_waited_for_it(eager, bucket):
    eager.add_step("a")
    eager.add_step("b", needs=["a"], priority=1)
    eager.add_step("c", needs=["a", "b"])
    assert bucket.under("ready/") == ["ready/05/a.1"]
    eager.tasks.take().complete()
    assert bucket.under("ready/") == ["ready/01/b.1"]
    eager.tasks.take().complete()
    assert bucket.under("ready/") == ["ready/05/c.1"] and not bucket.under("active/")


def test_approving_makes_ready_what_waited_and_rejecting_gives_back(eager, bucket):
    eager.add_step("a")
    eager.add_step("b", needs=["a"])
    eager.tasks.take().complete(state="needs_review")
    refused(t.Empty, eager.tasks.take)
    eager.reject("a")
    assert eager.tasks.take().token == 2
    eager.complete("a", state="needs_review")
    eager.approve("a")
    assert eager.tasks.take().step == "b"


def test_next_claims_by_priority_then_age_and_one_step_once(eager, bob, bucket):
    bob.tasks.chance = 0
    for name, priority in (("z", 5), ("y", 5), ("x", 0), ("w", 9)):
        eager.add_step(name, priority=priority)
        pass_time(bucket, 2)
    got = [agent.tasks.take().step for agent in (eager, bob, eager, bob)]
    assert got == ["x", "z", "y", "w"]
    refused(t.Empty, bob.tasks.take)


def test_peeking_claims_nothing(eager):
    eager.add_step("s", title="the step")
    assert eager.tasks.peek()["step"] == "s" and eager.tasks.peek()["state"] == "pending"
    assert eager.tasks.take().step == "s"


def test_only_steps_with_a_wanted_label_are_taken(eager):
    eager.add_step("a", priority=0)
    eager.add_step("b", labels=["gpu", "big"])
    assert eager.tasks.take(labels=("gpu",)).step == "b"
    refused(t.Empty, eager.tasks.take, labels=("gpu",))
    assert eager.tasks.take().step == "a"


def test_a_released_step_is_offered_again_under_the_next_token(eager, bob):
    eager.add_step("s")
    eager.tasks.take().release()
    claim = bob.tasks.take()
    assert (claim.step, claim.token, claim.attempt) == ("s", 2, 2)


def test_an_expired_step_is_taken_over_when_nothing_else_is_ready(eager, bob, bucket):
    eager.add_step("s")
    eager.tasks.take(ttl=60)
    refused(t.Empty, bob.tasks.take)
    pass_time(bucket, 66)
    claim = bob.tasks.take()
    assert (claim.token, claim.attempt) == (2, 2)
    assert bucket.under("active/") == ["active/s.2"]
    refused(t.Fenced, eager.complete, "s")


def test_an_expired_step_is_found_though_others_are_ready(ada, bob, bucket):
    ada.add_step("s")
    ada.tasks.take(ttl=60)
    ada.add_step("other")
    pass_time(bucket, 66)
    bob.tasks.chance = 1
    assert bob.tasks.take().step == "s"


def test_a_step_whose_attempts_are_used_up_fails_and_says_so_to_what_waits(bucket):
    for n in range(3):
        agent = agent_on(bucket, f"w{n}")
        agent.tasks.chance = 0
        if not n:
            agent.add_step("s", max_attempts=2)
            agent.add_step("t", needs=["s"])
        elif n == 1:
            pass_time(bucket, 70)
        claim = agent.tasks.take(ttl=60) if n < 2 else None
    pass_time(bucket, 70)
    why = refused(t.NotFound, agent.tasks.take)
    assert agent.step_status("s")["state"] == "failed", claim
    assert agent.step_status("t")["stuck"] == {"s": "failed"}
    why = refused(t.NotFound, agent.tasks.take)
    assert "no step can become ready" in why.message and "failed or blocked: s" in \
        why.message


def test_giving_up_the_last_attempt_fails_the_step(eager):
    eager.add_step("s", max_attempts=2)
    assert eager.tasks.take().give_up("exit code 1") == "released"
    assert eager.tasks.take().give_up("exit code 1") == "failed"
    assert eager.handoff("s")["note"] == "exit code 1; attempt 2 of 2"


@pytest.mark.parametrize("family", ["ready/", "active/", "dependents/"])
def test_no_step_is_lost_with_its_markers(family, eager, bob, bucket):
    for name, needs in (("a", []), ("b", ["a"]), ("c", ["b"])):
        eager.add_step(name, needs=needs)
    done = []
    for _ in range(3):
        for key in bucket.under(family):
            bucket.delete(key)
        claim = eager.tasks.take(ttl=60)
        if family == "active/":
            for key in bucket.under(family):
                bucket.delete(key)
            pass_time(bucket, 70)
            claim = bob.tasks.take(ttl=60) if claim.token == 1 else claim
        claim.complete()
        done.append(claim.step)
    assert done == ["a", "b", "c"]


FORGED = ["ready/00/w.1", "ready/00/w.9", "ready/00/ghost.1", "ready/05/done.1",
          "ready/05/done.2", "ready/00/held.1", "ready/00/held.2", "ready/99/s.1",
          "ready/00/UPPER.1", "ready/00/_x.1", "ready/00/s", "ready/00/a.b.1",
          "ready/00/ü.1", "active/done.1", "active/ghost.3", "active/held.7", "active/x",
          "ready/00/s.99999999999999999999", "active/w.1", "dependents/done/ghost",
          "dependents/s/w", "ready/x/s.1"]


def test_a_forged_marker_runs_nothing_it_should_not(bob, eager, bucket):
    bob.claim("held")
    eager.complete("done")
    eager.add_step("w", needs=["held"])
    eager.add_step("s")
    for key in FORGED:
        bucket.place(key, {})
    claim = eager.tasks.take()
    assert (claim.step, claim.token) == ("s", 1)
    refused(t.Empty, eager.tasks.take)
    claim.complete()
    bob.complete("held")
    assert eager.tasks.take().step == "w"
    assert step_faults(bucket) == []


def test_a_marker_of_a_step_being_added_is_left_for_an_hour(eager, bucket):
    bucket.place("ready/05/soon.1", {})
    refused(t.NotFound, eager.tasks.take)
    assert bucket.under("ready/") == ["ready/05/soon.1"]
    pass_time(bucket, t.HINT_LIVES + 2)
    refused(t.NotFound, eager.tasks.take)
    assert bucket.under("ready/") == []


def test_a_need_that_ends_while_its_marker_is_withdrawn_is_not_missed(eager, bob,
                                                                      bucket):
    eager.add_step("w", needs=["n"])
    bob.claim("n")
    bucket.place("ready/05/w.1", {})
    eager.store.fault("ok", "DELETE", "ready/05/w.1", before=lambda: bob.complete("n"))
    assert eager.tasks.take().step == "w"


def test_a_holder_without_a_marker_gets_one_from_who_finds_it(eager, bob, bucket):
    eager.add_step("s")
    bob.claim("s", ttl=60)  # by name: its ready marker stays, it has no active one
    pass_time(bucket, 20)
    refused(t.Empty, eager.tasks.take)
    assert bucket.under("ready/") == [] and bucket.under("active/") == ["active/s.1"]
    pass_time(bucket, 70)
    assert eager.tasks.take().token == 2


def test_the_end_that_a_killed_worker_did_not_follow_up_is_followed_up(bucket):
    for point in range(4, 10):
        bucket.shared.objects.clear()
        ada, bob = agent_on(bucket, "ada"), agent_on(bucket, "bob")
        ada.add_step("a")
        ada.add_step("b", needs=["a"])
        claim = ada.tasks.take()
        ada.store.forget()
        ada.store.crash_at = (point, "before")
        with contextlib.suppress(Crash):
            claim.complete(note="done")
        pass_time(bucket, 10)
        bob.tasks._sweep = lambda labels: False  # the markers alone must lead there
        assert bob.tasks.take(wait=1).step == "b", point
        assert not bucket.under("active/a"), point


def test_waiting_for_a_step_ends_when_one_becomes_ready(eager, bob):
    eager.add_step("a")
    eager.add_step("b", needs=["a"])
    first = eager.tasks.take()
    later = threading.Timer(0.3, first.complete)
    later.start()
    assert bob.tasks.take(wait=5).step == "b"
    later.join()
    why = refused(t.TimedOut, eager.tasks.take, wait=0.2)
    assert "0.2s" in why.message


def test_waiting_ends_early_when_nothing_can_become_ready(eager):
    eager.add_step("a")
    eager.add_step("b", needs=["a"])
    eager.tasks.take().complete(state="failed")
    begun = time.monotonic()
    why = refused(t.NotFound, eager.tasks.take, wait=60)
    assert time.monotonic() - begun < 10 and why.details["stuck"] == ["a"]


def test_a_damaged_claim_does_not_stop_the_worker(eager, bucket):
    eager.add_step("s")
    bucket.place("steps/x/claim.json", b"{")
    bucket.place("active/x.1", {})
    pass_time(bucket, 10)
    assert eager.tasks.take().step == "s"


# -- plans in the store


def test_a_plan_is_added_once_whatever_happens_between(bucket):
    ada = agent_on(bucket, "ada")
    assert ada.plans.add(PLAN) == {"added": ["design", "s1-a", "docs"], "changed": [],
                                   "unchanged": []}
    size = len(bucket.log)
    assert ada.plans.add(PLAN)["unchanged"] == ["design", "s1-a", "docs"]
    assert len(bucket.log) == size
    assert bucket.doc("steps/s1-a/spec.json")["spelling"] == "S1.A"
    assert bucket.under("ready/") == ["ready/02/design.1"]


@pytest.mark.parametrize("text", ["- [ ] a: x (needs: nobody)", "- [ ] a: x\n- [ ] A: y",
                                  "- [ ] a: x (needs: b)\n- [ ] b: y (needs: a)",
                                  "- [ ] a: x\n- [ ] b c: y"])
def test_a_plan_with_a_fault_writes_nothing(ada, bucket, text):
    why = refused(t.Usage, ada.plans.add, text)
    assert len(why.details["faults"]) == 1 and bucket.log == []


def test_a_changed_spec_is_refused_unless_update_is_given(ada, bucket):
    ada.plans.add("- [ ] a: one\n- [ ] b: two")
    size = len(bucket.log)
    why = refused(t.Conflict, ada.plans.add, "- [ ] a: one\n- [ ] b: other\n- [ ] c: x")
    assert why.details["changed"] == ["b"] and len(bucket.log) == size
    told = ada.plans.add("- [ ] b: other\n- [ ] c: x", update=True)
    assert told == {"added": ["c"], "changed": ["b"], "unchanged": []}
    assert bucket.doc("steps/b/spec.json")["title"] == "other"


def test_a_ticked_need_counts_as_done_unless_it_is_a_step(ada):
    ada.plans.add("- [x] old: x\n- [ ] a: y (needs: old)")
    assert ada.step_status("a")["state"] == "pending"
    ada.add_step("real")
    ada.plans.add("- [x] real: x\n- [ ] b: y (needs: real)")
    assert ada.step_status("b")["missing"] == ["real"]


def test_a_step_that_would_close_a_cycle_is_refused(ada, bucket):
    ada.add_step("b", needs=["a"])
    ada.add_step("c", needs=["b"])
    why = refused(t.Usage, ada.add_step, "a", needs=["c"])
    assert "cycle: a → c → b → a" in why.message
    assert bucket.doc("steps/a/spec.json") is None
    ada.add_step("a")
    refused(t.Usage, ada.steps.edit, "a", needs=["c"])


def test_an_edited_priority_moves_the_marker(eager, bucket):
    eager.add_step("s", priority=7, title="x")
    eager.steps.edit("s", priority=1)
    assert bucket.under("ready/") == ["ready/01/s.1"]
    assert bucket.doc("steps/s/spec.json")["title"] == "x"
    refused(t.NotFound, eager.steps.edit, "nobody", title="x")


def test_an_edit_that_removes_the_last_missing_need_makes_the_step_ready(eager, bucket):
    eager.add_step("s", needs=["a"])
    assert bucket.under("ready/") == []
    eager.steps.edit("s", needs=[])
    assert eager.tasks.take().step == "s"


PLAN_CRASH = "- [ ] a: x\n- [ ] b: y (needs: a)\n- [ ] c: z (needs: a, b)"


def test_a_plan_that_crashed_anywhere_can_be_added_again():
    points = 0
    for bucket, ada, where in crashes(None, lambda a: a.plans.add(PLAN_CRASH)):
        points += 1
        bob = agent_on(bucket, "bob")
        ada.plans.add(PLAN_CRASH)
        order = []
        for _ in range(3):
            claim = bob.tasks.take()
            order.append(claim.step)
            claim.complete()
        assert order == ["a", "b", "c"], where
    assert points >= 8


NEXT_CRASHES = {  # verb: (before, act, what may be claimed after it)
    "next": (lambda b, a: a.plans.add(PLAN_CRASH), lambda a: a.tasks.take()),
    "next takes over": (
        lambda b, a: (a.plans.add(PLAN_CRASH), agent_on(b, "eve").tasks.take(ttl=60),
                      pass_time(b, 80)), lambda a: a.tasks.take()),
    "complete": (lambda b, a: (a.plans.add(PLAN_CRASH), a.tasks.take()),
                 lambda a: a.complete("a")),
    "release": (lambda b, a: (a.plans.add(PLAN_CRASH), a.tasks.take()),
                lambda a: a.release("a")),
    "fail": (lambda b, a: (a.plans.add(PLAN_CRASH), a.tasks.take()),
             lambda a: a.complete("a", state="needs_review") and a.reject("a")),
    "edit": (lambda b, a: a.plans.add(PLAN_CRASH),
             lambda a: a.steps.edit("a", priority=1)),
}


@pytest.mark.parametrize("verb", NEXT_CRASHES)
def test_after_a_crash_at_any_request_others_finish_the_plan(verb):
    prepare, act = NEXT_CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        bob = agent_on(bucket, "bob")
        for _ in range(12):
            pass_time(bucket)
            with contextlib.suppress(t.NotFound):
                bob.tasks.take().complete()
            if bob.step_status("a")["state"] == "needs_review":
                bob.approve("a")
        states = [bob.step_status(sid)["state"] for sid in "abc"]
        assert states == ["complete"] * 3, where
        assert step_faults(bucket) == [], where
        assert tracecraft.diagnose(bob)["ok"], where
    assert points >= 4


# -- many workers, lost answers, and an enemy of markers


class NoSweep(tracecraft.Next):
    """Believes that what no marker shows is not there."""

    def _sweep(self, labels):
        return False


class BlindTrust(tracecraft.Next):
    """Believes that what a marker shows is ready."""

    def _needs_are_met(self, hint, needs):
        return True


class Unmarked(tracecraft.Frontier):
    """Lets go of the active marker before it has made the dependents ready, and makes
    them so only by chance."""

    def announce(self, sids, *, done=""):
        if sids and sids[0] < "s5":
            super().announce(sids, done=done)


def run_plan(seed, *, kind=tracecraft.Next, frontier=None, enemy=True, faults=0.1):
    """What went wrong while four workers did 12 steps, with faults; [] if nothing."""
    bucket, dice = MemoryStore(), random.Random(seed)
    plan = {f"s{n}": [f"s{m}" for m in dice.sample(range(n), min(n, dice.randrange(3)))]
            for n in range(12)}
    boss = agent_on(bucket, "boss")
    boss.plans.add(json.dumps([{"id": sid, "needs": of} for sid, of in plan.items()]))
    ran, wrong = collections.Counter(), []

    def live(number):
        mine = random.Random(f"{seed} {number}")
        for turn in range(60):
            agent = agent_on(bucket, f"w{number}", instance=f"w{number}-{turn}")
            agent.steps.frontier.__class__ = frontier or tracecraft.Frontier
            tasks = kind(agent.ledger, agent.steps)
            agent.store.chaos = (mine, faults)
            if enemy:
                spoil(bucket, mine)
            with contextlib.suppress(Crash, t.Error):
                claim = tasks.take(ttl=30)
                ran[claim.step, claim.token] += 1
                wrong.extend(f"{claim.step} before {need}" for need in plan[claim.step]
                             if t.state_of(bucket.doc(f"steps/{need}/claim.json"))
                             != "complete")
                claim.complete() if mine.random() < 0.8 else claim.release()
            if mine.random() < 0.3:
                bucket.clock_at += mine.choice((1, 20, 40))
    run_all([lambda n=n: live(n) for n in range(4)])
    return wrong + finish_plan(bucket, plan, kind, frontier) + step_faults(bucket) + [
        f"{what} ran {times} times" for what, times in ran.items() if times > 1]


def spoil(bucket, dice):
    """Delete or forge a marker."""
    with bucket.shared.lock:
        markers = [key for family in ("ready/", "active/", "dependents/")
                   for key in bucket.under(family)]
        if markers and dice.random() < 0.3:
            bucket.shared.objects.pop(dice.choice(markers))
        if dice.random() < 0.3:
            family = dice.choice(("ready/00/", "active/"))
            bucket.place(f"{family}s{dice.randrange(12)}.{dice.randrange(1, 3)}", {})


def finish_plan(bucket, plan, kind, frontier):
    """Let one more worker without faults finish; the steps it never found."""
    last = agent_on(bucket, "last")
    last.steps.frontier.__class__ = frontier or tracecraft.Frontier
    tasks = kind(last.ledger, last.steps)
    for _ in range(40):
        bucket.clock_at += 40
        with contextlib.suppress(t.NotFound):
            tasks.take(ttl=30).complete()
    docs = {sid: bucket.doc(f"steps/{sid}/claim.json") or {} for sid in plan}
    # Three takeovers fail a step, as they should; what waits for it stays.
    dead = {sid for sid, doc in docs.items() if doc.get("state") == "failed"}
    for sid in plan:
        if dead.intersection(plan[sid]):
            dead.add(sid)
    return [f"{sid} was never found" for sid, doc in docs.items()
            if doc.get("state") != "complete" and sid not in dead]


@pytest.mark.parametrize("enemy", [False, True])
def test_workers_finish_a_plan_whatever_happens_to_answers_and_markers(enemy):
    """Invariants 1, 3 and 6 of protocol.md 11, for `next`."""
    seed = random.randrange(10**9)
    assert run_plan(seed, enemy=enemy) == [], seed


@pytest.mark.parametrize("broken", [{"kind": NoSweep}, {"kind": BlindTrust},
                                    {"kind": NoSweep, "frontier": Unmarked,
                                     "enemy": False}])
def test_a_broken_search_for_the_next_step_is_caught(broken):
    for seed in range(8):
        if run_plan(seed, **broken):
            return
    pytest.fail(f"{broken} passed eight runs")


# -- what it costs


def plan_of_many(bucket, count):
    for n in range(count):
        bucket.place(f"steps/s{n}/spec.json", {"title": "t", "needs": []})
        bucket.place(f"ready/05/s{n}.1", {})


@pytest.mark.parametrize("count", [1, 10_000])
def test_the_next_step_costs_six_requests_however_many_there_are(eager, bucket, count):
    plan_of_many(bucket, count)
    cost = spent(eager, eager.tasks.take)
    sid = next(key for key in cost if key.startswith("PUT active/")).split("/")[1][:-2]
    assert cost == {"LIST ready/": 1, f"LIST steps/{sid}/": 1, f"PUT active/{sid}.1": 1,
                    f"GET steps/{sid}/spec.json": 1, f"PUT steps/{sid}/claim.json": 1,
                    f"DELETE ready/05/{sid}.1": 1}


def test_each_need_of_the_next_step_costs_one_request_more(eager):
    eager.complete("a")
    eager.complete("b")
    eager.add_step("s", needs=["a", "b"])
    assert sum(spent(eager, eager.tasks.take).values()) == 8


def test_fifty_workers_at_once_need_eight_requests_at_most_nearly_always(bucket):
    plan_of_many(bucket, 2000)
    agents = [agent_on(bucket, f"w{n}") for n in range(50)]
    costs = []

    def work(agent):
        for _ in range(4):
            agent.store.counts.clear()
            assert agent.tasks.take().token == 1
            costs.append(sum(agent.store.counts.values()))
    run_all([lambda a=a: work(a) for a in agents])
    assert len(costs) == 200 and sorted(costs)[189] <= 8, sorted(costs)[-12:]


# -- context


def test_the_context_of_a_step_is_everything_upstream(ada, bucket):
    ada.add_step("a", title="the start")
    ada.add_step("b", needs=["a"])
    ada.add_step("c", needs=["b"], description="go on")
    ada.memory.set("plan.status", "half")
    with ada.claim("a") as claim:
        ada.artifacts.put_bytes("out.txt", b"hello", step="a")
        claim.complete(note="see memory plan.status", findings=["f1"], warnings=["w1"],
                       changed_files=["x.py"], next_action="test it")
    doc = tracecraft.gather_context(ada, "c")
    assert [(note["step"], note["state"], note["depth"]) for note in doc["upstream"]] == [
        ("b", "pending", 1), ("a", "complete", 2)]
    text = tracecraft.render_context(doc)
    digest = hashlib.sha256(b"hello").hexdigest()[:12]
    for fact in ("c (waiting)", "go on", "waiting for b", "a: the start (complete by ada)",
                 "note: see memory plan.status", "next: test it", "finding: f1",
                 "warning: w1", "changed: x.py", f"out.txt (5 B, sha256 {digest})",
                 "memory plan.status = half"):
        assert fact in text


def test_the_context_fits_and_says_what_it_left_out(ada):
    for n in range(60):
        ada.complete(f"n{n}", note="x" * 100)
    ada.add_step("s", needs=[f"n{n}" for n in range(60)])
    text = tracecraft.render_context(tracecraft.gather_context(ada, "s"))
    assert len(text.encode()) <= 2048 and re.search(r"\n\+\d+ more lines, --json$", text)


def test_the_context_of_a_rejected_step_says_why(ada):
    ada.claim("s")
    ada.complete("s", state="needs_review", note="please look")
    ada.reject("s", note="links are dead")
    assert "note: please look" in tracecraft.render_context(
        tracecraft.gather_context(ada, "s"))
    refused(t.NotFound, tracecraft.gather_context, ada, "nobody")


def test_what_other_agents_wrote_cannot_drive_the_terminal_of_who_reads_it(ada):
    ada.complete("a", note="\x1b[2J\nError: x", findings=["\x07"], to="\x1b]0;x")
    ada.add_step("s", needs=["a"], title="\x1b[1m")
    text = tracecraft.render_context(tracecraft.gather_context(ada, "s"))
    assert all(line.isprintable() for line in text.split("\n"))
# == Reservations ======================================================
#
# Patterns against an oracle and against brute force; entries of one document that
# agents change side by side; what guard refuses, in real git repositories.

# -- patterns ----------------------------------------------------------


class Sample(NamedTuple):
    """A random pattern, the regular expression that says the same of `path + "/"`, and
    what bounds the shortest path it shares with another."""

    text: str
    regex: str
    fixed: int  # characters that are no star
    names: int  # names that are no `**`
    deep: bool


def sample_chars(dice, letters, kinds="cccc**??[[{"):
    """(text, regex, fixed) of a piece of a name."""
    kind = dice.choice(kinds)
    one = dice.choice(letters)
    if kind == "[":
        no = dice.choice(["", "", "!", "^"])
        return f"[{no}{one}]", f"[{no and '^'}{re.escape(one)}{no and '/'}]", 1
    if kind == "{":
        (a, x, n), (b, y, m) = (sample_chars(dice, letters, "cc?[{")
                                  for _ in range(2))
        return f"{{{a},{b}}}", f"(?:{x}|{y})", max(n, m)
    return {"c": (one, re.escape(one), 1), "*": ("*", "[^/]*", 0),
            "?": ("?", "[^/]", 1)}[kind]


def sample_name(dice, letters):
    """A Sample of one name, of `**`, or of braces around names."""
    roll = dice.random()
    if roll < 0.2:
        return Sample("**", "(?:[^/]+/)*", 0, 0, True)
    if roll < 0.3:
        some = [sample_path(dice, letters, inner=True) for _ in range(2)]
        return Sample("{%s}" % ",".join(s.text for s in some),
                      "(?:%s)" % "|".join(s.regex for s in some),
                      max(s.fixed for s in some), max(s.names for s in some),
                      any(s.deep for s in some))
    parts = [sample_chars(dice, letters) for _ in range(dice.choice((1, 1, 2, 3)))]
    text = re.sub(r"\*+", "*", "".join(part[0] for part in parts))
    regex = "(?=[^/])" + "".join(part[1] for part in parts) + "/"
    return Sample(text, regex, sum(part[2] for part in parts), 1, False)


def sample_path(dice, letters, inner=False):
    """A Sample of a whole pattern, or of what is inside of braces."""
    count = dice.randint(1, 2 if inner else 3)
    names = [sample_name(dice, letters) for _ in range(count)]
    text = "/".join(name.text for name in names)
    if dice.random() < 0.1 and names[-1].text != "**" and not inner:
        names.append(Sample("", "(?:[^/]+/)*", 0, 0, True))
        text += "/"
    return Sample(text, "".join(name.regex for name in names),
                  sum(name.fixed for name in names), sum(name.names for name in names),
                  any(name.deep for name in names))


def all_paths(letters, longest):
    """Every path of at most that many characters."""
    found = []
    for size in range(1, longest + 1):
        for chars in itertools.product(letters + "/", repeat=size):
            path = "".join(chars)
            if not {"", ".", ".."} & set(path.split("/")):
                found.append(path)
    return found


def samples(dice, letters, count):
    """Random patterns that are none of those refused, with the paths each matches."""
    pool, longest = [], 7
    paths = [(path, path + "/") for path in all_paths(letters + "z", longest)]
    while len(pool) < count:
        sample = sample_path(dice, letters)
        try:
            tracecraft.normal(sample.text)
        except tracecraft.Usage:
            continue  # a part is '..', or only '.' fits it
        if any("." in text.split("/") for text in tracecraft._unbraced(sample.text)):
            continue  # './' is left out, here or of {.,a}/b
        fits = re.compile(sample.regex).fullmatch
        pool.append((sample, frozenset(path for path, full in paths if fits(full))))
    return pool, paths, longest


def witness_length(a, b):
    """No shorter path need be tried: one of this length matches both, or none does."""
    names = [sample.names for sample in (a, b) if not sample.deep]
    count = min(names) if names else a.names + b.names
    return a.fixed + b.fixed + 2 * max(1, count) - 1


def judged_pairs(dice, letters, *, pool, pairs):
    """[(a, b, overlap says, brute force says)] where the two differ, and how many
    pairs overlap."""
    pool, _, longest = samples(dice, letters, pool)
    wrong, met, tried = [], 0, 0
    while tried < pairs:
        (a, fits_a), (b, fits_b) = dice.choice(pool), dice.choice(pool)
        if witness_length(a, b) > longest:
            continue
        tried += 1
        says, truth = tracecraft.overlap(a.text, b.text), not fits_a.isdisjoint(fits_b)
        met += truth
        if says != truth:
            wrong.append((a.text, b.text, says, truth))
    return wrong, met


@pytest.mark.parametrize("letters", ["ab", "a."])
def test_overlap_agrees_with_trying_every_path(letters):
    seed = random.randrange(10**9)
    print("seed", seed)
    wrong, met = judged_pairs(random.Random(seed), letters, pool=150, pairs=2500)
    assert (wrong[:5], 250 < met < 2250) == ([], True), (seed, met)


@pytest.mark.soak
@pytest.mark.parametrize("letters", ["ab", "a."])
def test_soak_overlap_agrees_with_trying_every_path(letters):
    seed = int(os.environ.get("TRACECRAFT_SEED") or random.randrange(10**9))
    print("seed", seed)
    wrong, met = judged_pairs(random.Random(seed), letters, pool=1500, pairs=50_000)
    assert (wrong[:5], 5000 < met < 45_000) == ([], True), (seed, met)


@pytest.mark.parametrize("letters", ["ab", "a."])
def test_a_match_is_what_the_regular_expression_says(letters):
    seed = random.randrange(10**9)
    print("seed", seed)
    dice = random.Random(seed)
    pool, paths, _ = samples(dice, letters, 60)
    for sample, fits in pool:
        for path, _ in dice.sample(paths, 40) + [(p, "") for p in sorted(fits)[:10]]:
            assert tracecraft.matches(sample.text, path) == (path in fits), (
                sample.text, path, seed)


def test_a_wrong_decision_about_patterns_is_caught():
    """What ignores `**`, or judges by the beginnings alone, fails the brute force."""
    dice = random.Random(1)
    pool, _, longest = samples(dice, "ab", 100)
    shallow = prefixes = 0
    for (a, fits_a), (b, fits_b) in itertools.combinations(pool, 2):
        truth = not fits_a.isdisjoint(fits_b)
        if witness_length(a, b) <= longest:
            flat = [s.text.replace("**", "*") for s in (a, b)]
            shallow += tracecraft.overlap(*flat) != truth
            starts = [re.split(r"[*?\[{]", s.text)[0] for s in (a, b)]
            prefixes += (starts[0].startswith(starts[1]) or
                         starts[1].startswith(starts[0])) != truth
    assert shallow > 10 and prefixes > 10


@pytest.mark.parametrize("pattern, yes, no", [
    ("src/**", "src src/a src/a/b", "srcs a/src"),
    ("src/", "src/a src/a/b", "srcs"),
    ("**/*.py", "a.py a/b.py .py", "a.pyc a.py/b"),
    ("a/**/b", "a/b a/x/b a/x/y/b", "a/xb ab"),
    ("*", ".hidden a", "a/b"),
    ("[a-cX]?", "ax Xx b.", "dx a a/"),
    ("[!a]", "b ä", "a bb"),
    ("[]x]", "] x", "a"),
    ("[a-]", "a -", "b"),
    ("[*]", "*", "a"),
    ("{a,b/c}/d", "a/d b/c/d", "b/d c/d"),
    ("{a,{b,c}d}{,e}", "a ae bd cde", "b d"),
    ("docs/ä*.md", "docs/ä.md docs/äöü.md", "docs/a.md docs/Ä.md"),
    ("./src//x", "src/x", "x"),
    ("**", "a a/b .c", "")])
def test_a_pattern_matches_these_and_not_those(pattern, yes, no):
    for path in yes.split():
        assert tracecraft.matches(pattern, path), path
    for path in no.split():
        assert not tracecraft.matches(pattern, path), path


@pytest.mark.parametrize("a, b, meet", [
    ("src/**", "src", True), ("src/**", "**/x", True), ("src/*", "src/*/x", False),
    ("a*", "*b", True), ("a*b", "*c", False), ("[a-m]", "[m-z]", True),
    ("[a-m]", "[n-z]", False), ("[!a]", "a", False), ("[!a]", "[!b]", True),
    ("**/a/**", "**/b/**", True), ("*.py", "**/*.py", True), ("A", "a", False),
    ("{a,b}", "{b,c}", True), ("{a,b}/x", "{c,d}/x", False), ("ä", "?", True),
    ("[.a]", "[.b]", False), ("?[.]", "[.]?", False), ("?[.a]", "[.]?", True)])
def test_two_patterns_overlap_or_do_not(a, b, meet):
    assert (tracecraft.overlap(a, b), tracecraft.overlap(b, a)) == (meet, meet)


@pytest.mark.parametrize("pattern, word", [
    ("", "empty"), ("/etc/passwd", "absolute"), ("../x", "'..'"), ("a/../b", "'..'"),
    ("src\\x", "means nothing"), ("a**", "'**' beside"), ("**.py", "'**' beside"),
    ("[a", "not closed"), ("[]", "not closed"), ("[a/b]", "not closed"),
    ("[z-a]", "backwards"), ("[[:alpha:]]", "[:alpha:]"), ("{a", "not closed"),
    ("a}", "no {a,b}"), ("{id}", "no {a,b}"), ("{,a}", "nothing"),
    ("{a,/b}", "absolute"), ("[.]", "only '.'"), ("a\0", "no text"),
    ("{a,b}" * 7, "over 64"), ("x" * 1001, "1001 characters"),
    ("x" * 300 + "{a,b,c,d,e,f,g}", "over 2000"), ("[!\1-\U0010ffff]", "no character")])
def test_what_is_no_pattern_is_refused_in_one_sentence(pattern, word):
    why = refused(tracecraft.Usage, tracecraft.normal, pattern)
    assert word in why.message and why.hint and "\n" not in why.message


@pytest.mark.parametrize("given, kept", [
    ("./a", "a"), ("a//b", "a/b"), ("a/./b", "a/b"), ("src/", "src/**"), (".", "**"),
    ("src/**/", "src/**"), ("{a,b/}", "{a,b/}"), ("a/.", "a"), ("ä", "ä")])
def test_a_pattern_has_one_normal_form(given, kept):
    assert tracecraft.normal(given) == kept == tracecraft.normal(kept)


@pytest.mark.parametrize("a, b", [
    ("a*" * 100 + "b", "*a" * 100 + "c"), ("**/" * 200 + "x", "**/" * 200 + "y"),
    ("**/a*a/" * 60 + "x", "**/*a?a/" * 60 + "y"), ("a*" * 100 + "b", "a" * 900),
    ("{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}*" + "x", "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}*y")])
def test_no_pattern_is_slow_to_judge(a, b):
    """A backtracking matcher takes longer than the universe for any of these."""
    begun = time.process_time()
    assert not tracecraft.overlap(a, b)
    assert time.process_time() - begun < 3


# == Events ============================================================


RECORDS = {  # a key of each kind that has events, and a document it may hold
    "_project.json": {"project": "p", "created_by": "ada", "created_at": "AT"},
    "agents/ada.json": {"id": "ada", "status": "active", "started_at": "AT",
                        "heartbeat": "AT", "summary": "writes tests"},
    "memory/_history/a/b/0000000000000000001_ada_0123abcd.json": {
        "value": "1", "set_by": "ada", "set_at": "AT", "of_rev": 3},
    "messages/bob/0000000000000000001_ada_0123abcd.json": {
        "from": "ada", "to": "bob", "message": "hi\nyou", "sent_at": "AT"},
    "messages/bob/_acks/0000000000000000001_ada_0123abcd.json": {
        "by": "bob", "at": "AT"},
    "steps/s/spec.json": {"title": "T", "created_by": "ada", "created_at": "AT"},
    "steps/s/claim.json": {"agent": "ada", "claimed_at": "AT"},
    "steps/s/status.json": {"status": "complete", "agent": "ada", "completed_at": "AT"},
    "steps/s/handoff.json": {"from_agent": "ada", "next_agent": "bob", "note": "n",
                             "created_at": "AT"},
    "locks/models.py.json": {"agent": "ada", "claimed_at": "AT", "token": 1},
    "semaphores/gpu/0.json": {"agent": "ada", "claimed_at": "AT", "token": 1},
    "semaphores/gpu/config.json": {"k": 2, "created_by": "ada", "created_at": "AT"},
    "barriers/b/g1/config.json": {"n": 2, "created_by": "ada", "at": "AT"},
    "barriers/b/g1/arrive/ada": {"at": "AT"},
    "barriers/b/g1/verdict.json": {"verdict": "open", "by": "ada", "at": "AT"},
    "reservations.json": {"entries": [{"id": "e", "globs": ["src/**"], "agent": "ada",
                                       "ttl": 60, "renewed_at": "AT"}]},
    "queues/q/items/i.json": {"state": "ready", "history": [
        {"state": "ready", "agent": "ada", "token": 0, "at": "AT", "why": "pushed"}]},
    "manifests/shared/x.txt/_head.json": {
        "sha256": "0" * 64, "size": 1, "created_at": "AT",
        "producer": {"agent": "ada"}},
    "runs/r/meta.json": {"agent": "ada", "started_at": "AT", "notes": [
        {"at": "AT", "agent": "ada", "text": "t"}]},
    "sessions/claude/1/meta.json": {"agent": "ada", "last_uploaded_at": "AT"},
}
AT_2026 = "2026-01-31T12:00:00.000000+00:00"


def record_at(key, at=AT_2026):
    return json.loads(json.dumps(RECORDS[key]).replace("AT", at))


def words_of(key, doc, modified=None):
    return [row["text"] for row in t.Readers().events(key, doc, modified)[0]]


@pytest.mark.parametrize("key", RECORDS)
def test_each_kind_of_record_tells_what_happened_when_and_by_whom(key):
    rows, faults = t.Readers().events(key, record_at(key))
    assert rows and not faults
    for row in rows:
        assert (row["at"], row["key"]) == (AT_2026, key) and row["kind"] in t.KINDS
        assert row["agent"] in ("ada", "bob") and row["text"].startswith(row["agent"])
        assert "\n" not in row["text"] and json.dumps(row)


def test_every_shape_of_a_record_has_a_row_of_events_or_is_known_to_be_silent():
    silent = {"memory/**.json", "messages/*/_cursor.json", "messages/*/_ids/*.json",
              "sessions/*/*/_cursor.json"}
    rows = {pattern for pattern, _, read in t.EVENTS if read}
    wanted = {pattern for pattern, fields in t.SHAPES if fields is not None} - silent
    assert wanted - rows - {"semaphores/*/config.json"} == set()
    assert all(t.Readers().knows(key) for key in RECORDS)
    assert not t.Readers().knows("messages/bob/_cursor.json")


def test_projections_of_ours_repeat_no_event_and_those_of_02_tell_theirs(ada, bucket):
    ada.claim("s")
    ada.complete("s", note="n")
    for key in (STATUS, HANDOFF):
        assert words_of(key, bucket.doc(key)) == []
        assert words_of(key, record_at(key)) != []


def test_a_record_without_a_time_takes_the_store_s_or_is_counted():
    doc = {"from": "ada", "to": "bob", "message": "x"}
    key = "messages/bob/1_ada_x.json"
    rows, faults = t.Readers().events(key, doc, 100.0)
    assert rows[0]["at_s"] == 100.0 and faults == 0
    assert t.Readers().events(key, doc) == ([], 1)
    assert t.Readers().events(key, {**doc, "sent_at": "soon"}, 100.0) == ([], 1)


ODD_VALUES = [None, 0, -1, 1e300, True, "", "x", "9999-12-31T23:59:59Z", [], {}, [1],
              [None], [[]], [{}], {"a": 1}, [{"at": 5, "why": 7, "state": []}],
              [{"at": AT_2026, "globs": [1], "token": "x", "note": {}}]]


@pytest.mark.parametrize("key", RECORDS)
def test_no_document_whatever_it_holds_breaks_the_reading_of_events(key):
    chance, reader = random.Random(key), t.Readers()
    fields = sorted({name for doc in RECORDS.values() for name in doc} | {
        "history", "handoffs", "previous", "deleted_at", "ended_at", "state"})
    for _ in range(300):
        doc = {name: chance.choice(ODD_VALUES) for name in chance.sample(fields, 8)}
        rows, faults = reader.events(key, doc, chance.choice([None, 5.0]))
        assert faults >= 0
        for row in rows:
            assert t.event_line(row) and json.dumps(row) and t.event_order(row)


@pytest.mark.parametrize("text, then", [
    ("90s", 9910.0), ("5m", 9700.0), ("2h", 2800.0), ("0d", 10000.0),
    ("1970-01-01T00:00:07Z", 7.0), ("1970-01-01T01:00:07+01:00", 7.0)])
def test_since_takes_ages_and_iso_times(text, then):
    assert t.since(text, 10000.0) == then


@pytest.mark.parametrize("text", ["", "2", "h", "2 h", "-2h", "2y", "tomorrow", "²h"])
def test_since_refuses_what_is_no_time(text):
    assert "is no time" in refused(t.Usage, t.since, text, 0.0).message


def test_a_step_s_life_is_told_in_the_words_of_its_verbs(ada, bob, bucket):
    ada.add_step("s", title="Draw it")
    ada.claim("s")
    pass_time(bucket)
    bob.claim("s")
    bob.complete("s", state="needs_review", note="look", to="ada")
    ada.reject("s", note="no")
    said = [row["text"] for row in t.gather_past(ada, t.Wanted(step="s")).events
            if row["kind"] in ("step", "claim", "handoff")]
    assert said[:3] == ["ada added s: Draw it", "ada claimed s",
                        "bob took over s: takeover: the lease of ada expired"]
    assert set(said[3:5]) == {"bob asked for review of s",
                              "bob handed on s to ada: look"}
    assert said[5:] == ["ada rejected s: rejected by ada: no"]


# == Timeline ==========================================================


def told(project, limit=None, **wanted):
    return [row["text"] for row in t.gather_past(project, t.Wanted(**wanted),
                                                 limit=limit).events]


@pytest.fixture
def worked(ada, bob, bucket):
    """A project in which a little of everything has happened; its objects by clock."""
    bob.heartbeat()
    ada.add_step("a")
    ada.add_step("b", needs=["a"])
    ada.claim("a")
    ada.artifacts.put_bytes("x.txt", b"x", step="a")
    ada.complete("a", note="done", to="bob")
    bob.claim("b")
    ada.memory.set("k.v", "1")
    ada.send("bob", "one")
    ada.send("_broadcast", "all")
    bob.ack(ada.send("bob", "two", op="m2")["id"])
    return ada


def test_a_timeline_merges_every_record_the_newest_last(worked):
    rows = t.gather_past(worked, t.Wanted()).events
    assert [row["at_s"] for row in rows] == sorted(row["at_s"] for row in rows)
    assert {row["kind"] for row in rows} >= {
        "presence", "step", "claim", "handoff", "artifact", "memory", "message", "ack"}
    assert rows[-1]["text"] == "bob acknowledged mail of ada"
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_timeline_filters_by_agent_kind_step_and_time(worked, bucket):
    assert told(worked, by="bob", kinds=("claim", "ack")) == [
        "bob claimed b", "bob acknowledged mail of ada"]
    assert told(worked, step="a", kinds=("artifact", "step")) == [
        "ada added a", "ada uploaded a/x.txt"]
    bucket.clock_at += 1000
    split = bucket.clock_at
    worked.memory.set("later", "1")
    assert told(worked, since=split) == ["ada set later: 1"]
    assert "ada set later: 1" not in told(worked, until=split)


def test_a_timeline_of_lately_reads_no_old_object(worked, bucket):
    bucket.clock_at += 10_000
    worked.memory.set("later", "1")
    cost = spent(worked, t.gather_past, worked, t.Wanted(since=bucket.clock_at - 60))
    gets = [what for what in cost if what.startswith("GET")]
    assert gets == ["GET memory/_history/later/*"], cost
    assert sum(n for what, n in cost.items() if what.startswith("LIST")) <= 10


def test_a_timeline_of_one_kind_lists_one_prefix(worked):
    cost = spent(worked, t.gather_past, worked, t.Wanted(kinds=("memory",)))
    assert cost == {"LIST memory/_history/": 1, "GET memory/_history/k/v/*": 1}


def test_the_newest_20_of_1000_messages_are_found_by_at_most_128_reads(ada, bucket):
    for n in range(1000):
        bucket.clock_at += 1
        at = tracecraft.iso(bucket.clock_at)
        bucket.place(f"messages/bob/{int(bucket.clock_at * 1e9):019d}_eve_{n:08x}.json",
                     {"from": "eve", "to": "bob", "message": str(n), "sent_at": at})
    ada.store.counts.clear()
    past = t.gather_past(ada, t.Wanted(), limit=20)
    assert [row["text"].split()[-1] for row in past.events] == [
        str(n) for n in range(980, 1000)]
    assert past.more is None
    reads = sum(n for (method, _), n in ada.store.counts.items() if method == "GET")
    assert reads <= 64 + 64  # a batch, and those within the skew of its last


def test_a_limit_keeps_the_newest_and_counts_the_rest(worked):
    everything = t.gather_past(worked, t.Wanted()).events
    past = t.gather_past(worked, t.Wanted(), limit=3)
    assert past.events == everything[-3:] and past.more == len(everything) - 3


def test_damaged_records_are_named_and_stop_no_timeline(worked, bucket):
    bucket.place("steps/c/claim.json", b"{")
    past = t.gather_past(worked, t.Wanted())
    assert [row["key"] for row in past.damaged] == ["steps/c/claim.json"]
    assert "bob claimed b" in [row["text"] for row in past.events]


def test_attempts_of_one_memory_write_are_one_event(ada, bucket):
    for n, value in ((1, "x"), (2, "x")):
        bucket.place(f"memory/_history/k/{n:019d}_ada_{n:08x}.json",
                     {"value": value, "set_by": "ada", "op": "same",
                      "set_at": tracecraft.iso(n)})
    assert told(ada) == ["ada set k: x"]


# -- watch -------------------------------------------------------------


def test_a_watch_tells_what_is_new_and_nothing_of_before(worked):
    watch = t.Watch(worked)
    assert watch.look(1) == [] == watch.look(1)
    worked.memory.set("k.v", "2")
    worked.send("bob", "three")
    assert [row["text"] for row in watch.look(1)] == [
        "ada set k.v: 2", "ada wrote to bob: three"]
    assert watch.look(1) == []


def test_a_watch_that_begins_earlier_tells_that_too(worked, bucket):
    bucket.clock_at += 100
    worked.memory.set("k.v", "2")
    watch = t.Watch(worked, since=bucket.clock_at - 50)
    assert [row["text"] for row in watch.look(1)] == ["ada set k.v: 2"]


def test_an_idle_look_costs_one_listing(worked):
    watch = t.Watch(worked)
    watch.look(1)
    assert spent(worked, watch.look, 1) == {"LIST ": 1}
    worked.memory.set("k.v", "2")
    assert spent(worked, watch.look, 1) == {"LIST ": 1, "GET memory/_history/k/v/*": 1}


@pytest.mark.parametrize("prefix, listed", [
    ("", ""), ("steps/", "steps/"), ("steps/a", "steps/a"), ("mem", "mem"),
    ("memory/plan", "memory/_history/plan"), ("memory/_history/x", "memory/_history/x"),
    ("artifacts/shared/", "manifests/shared/"), ("queues/q", "queues/q")])
def test_a_prefix_is_watched_where_its_events_are_recorded(prefix, listed):
    assert t.watched_prefix(prefix) == listed


def test_a_prefix_under_which_nothing_is_recorded_is_refused():
    why = refused(t.Usage, t.watched_prefix, "step/a")
    assert "did you mean steps/?" in why.message


def watched_randomly(watch_class, seed):
    """(ids a watch told, ids a timeline tells that were not there at its start)."""
    chance, bucket = random.Random(seed), MemoryStore()
    agents = [agent_on(bucket, name) for name in ("ada", "bob")]
    verbs = [lambda p: p.claim(chance.choice("xyz"), reopen=True),
             lambda p: p.complete(chance.choice("xyz"), note=str(chance.random())),
             lambda p: p.release(chance.choice("xyz")),
             lambda p: p.memory.incr("k"), lambda p: p.send("bob", "m"),
             lambda p: p.heartbeat(summary=str(chance.random()))]
    told_ids, before, watch = [], set(), None
    for turn in range(60):
        bucket.clock_at += chance.choice([0, 1, 2000])
        try:
            chance.choice(verbs)(chance.choice(agents))
        except tracecraft.Error:
            pass
        if turn == 10:
            watch = watch_class(agents[0])
            watch.look(1)
            before = {row["id"] for row in t.gather_past(agents[0], t.Wanted()).events}
        if watch and chance.random() < 0.5:
            told_ids += [row["id"] for row in watch.look(1)]
    told_ids += [row["id"] for row in watch.look(1)]
    after = {row["id"] for row in t.gather_past(agents[0], t.Wanted()).events}
    return told_ids, after - before, before


class WatchThatForgets(t.Watch):
    """Broken: knows keys, not events, so every history is told anew."""

    def _take(self, record):
        self.known.clear()
        super()._take(record)


class WatchByKeysOnly(t.Watch):
    """Broken: looks only at objects that were not there."""

    def _mark(self, entry, now):
        return ("there",)


@pytest.mark.parametrize("seed", range(12))
def test_a_watch_tells_each_event_exactly_once(seed):
    told_ids, new, before = watched_randomly(t.Watch, seed)
    assert len(told_ids) == len(set(told_ids))
    # `told` may hold more: a presence that was overwritten since.
    assert new <= set(told_ids) and not before & set(told_ids)


@pytest.mark.parametrize("broken", [WatchThatForgets, WatchByKeysOnly])
def test_a_broken_watch_is_found_out(broken):
    wrong = 0
    for seed in range(12):
        told_ids, new, before = watched_randomly(broken, seed)
        wrong += len(told_ids) != len(set(told_ids)) or not new <= set(told_ids) \
            or bool(before & set(told_ids))
    assert wrong


def test_a_store_that_is_away_is_told_once_and_waited_for(worked):
    watch = t.Watch(worked)
    watch.look(1)
    rows = t.watching(worked.ledger, watch.look, interval=0.01, wait=5)
    worked.store.fault("dead", "LIST", times=3)
    worked.memory.set("k.v", "2")
    assert next(rows)["text"] == "ada set k.v: 2"
    assert [said for said in worked.warned if "watching" in said
            or "answers again" in said] == ["unreachable; still watching",
                                            "the store answers again"]


def test_a_store_that_stays_away_ends_a_watch_with_its_own_error(worked):
    watch = t.Watch(worked)
    worked.store.fault("dead", "LIST", times=1000)
    why = refused(t.Unavailable, list, t.watching(
        worked.ledger, watch.look, interval=0.01, wait=0.2))
    assert why.message == "unreachable"


def test_a_look_that_breaks_off_loses_no_event(worked):
    watch = t.Watch(worked)
    watch.look(1)
    for n in range(5):
        worked.memory.set(f"k{n}", "2")
    worked.store.fault("dead", "GET", "k3")
    refused(t.Unavailable, watch.look, 1)
    assert [row["text"] for row in watch.look(1)] == [f"ada set k{n}: 2"
                                                      for n in range(5)]


def test_two_writes_within_a_tick_of_a_directory_are_both_told(tmp_path):
    p = tracecraft.connect(f"file://{tmp_path}/s/p", agent="ada",
                           environ={"HOME": str(tmp_path)}, cwd=str(tmp_path))
    p.claim("s")
    watch = t.Watch(p)
    watch.look(1)
    p.release("s", why="aa")
    first = [row["why"] for row in watch.look(1) if row["kind"] == "claim"]
    key = os.path.join(str(tmp_path), "s", "p", "steps", "s", "claim.json")
    info = os.stat(key)
    p.claim("s")
    p.release("s", why="bb")
    os.utime(key, ns=(info.st_atime_ns, info.st_mtime_ns))
    second = [row["why"] for row in watch.look(1) if row["kind"] == "claim"]
    assert (first, second) == (["aa"], ["claimed", "bb"])


def test_a_watched_value_is_told_at_each_write_and_costs_one_request(ada, bob):
    watch = t.ValueWatch(ada, "k")
    assert watch.look(1) == []
    bob.memory.set("k", "1")
    assert [doc["value"] for doc in watch.look(1)] == ["1"]
    assert spent(ada, watch.look, 1) == {"GET memory/k.json": 1}
    bob.memory.set("k", "v" * 70_000)
    assert [len(doc["value"]) for doc in watch.look(1)] == [70_000]
    bob.memory.delete("k")
    assert watch.look(1)[0]["deleted_at"] and watch.look(1) == []


def test_idle_pauses_grow_to_half_a_minute():
    pauses = [max(t.idle_pause(tries) for _ in range(50)) for tries in range(1, 12)]
    assert pauses[0] <= 1 and pauses[-1] <= 30 < pauses[-1] * 1.1
    assert all(0.75 <= t.idle_pause(1) <= 1 for _ in range(20))


def test_timeline_and_watch_answer_as_commands(sh):
    sh.ok("claim", "s")
    sh.ok("memory", "set", "k", "1")
    lines = sh.ok("timeline", "--kind", "claim", "memory").splitlines()
    assert [line.split("  ")[1:3] for line in lines][0][0] == "claim"
    assert lines[-1].endswith("ada set k: 1")
    doc = sh.json("timeline", "--limit", "1")
    assert doc["truncated"] and len(doc["items"]) == 1
    assert "is no time" in sh.refused(2, "timeline", "--since", "soon")
    assert "nothing new" in sh.refused(6, "watch", "--wait", "0.1")
    assert "nothing new" in sh.refused(6, "memory", "watch", "k", "--wait", "0.1")
    assert sh.run("watch", "--since", "1h", "--wait", "0.1").returncode == 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_prints_lines_of_json_and_ends_cleanly(sh, kind):
    watch = sh.start("watch", "memory/k", "--interval", "0.1", "--json")
    time.sleep(1.5)
    sh.ok("memory", "set", "k", "1")
    sh.ok("memory", "set", "k", "2")
    rows = [json.loads(watch.stdout.readline()) for _ in range(2)]
    assert [row["text"] for row in rows] == ["ada set k: 1", "ada set k: 2"]
    watch.send_signal(kind)
    out, err = watch.communicate(timeout=SLOW)
    assert (watch.returncode, out) == (130, b"") and b"Traceback" not in err


# == Leftovers =========================================================


@pytest.mark.parametrize("key, parts", [
    ("ready/05/s.2", ("", "ready", "s", 2)),
    ("active/s-1.10", ("", "active", "s-1", 10)),
    ("queues/q/ready/05/" + "0" * 19 + "_i.x.1", ("q", "ready", "i.x", 1)),
    ("queues/q/active/i.3", ("q", "active", "i", 3)),
    ("ready/05/odd", ("", "ready", "", 0)),
])
def test_a_marker_s_name_says_what_it_stands_for(key, parts):
    assert t.marker_parts(key) == parts


def test_only_lapsed_reservations_are_dropped_and_odd_entries_stay():
    def entry(**fields):
        return {"id": "r1", "agent": "a", "mode": "shared", "globs": ["x"], "ttl": 60,
                "renewed_at": tracecraft.iso(1000), **fields}
    doc = {"entries": [entry(), entry(ttl=0), entry(ttl=600), "odd", {"ttl": 5},
                       entry(renewed_at="?")], "rev": 3}
    assert t.unexpired(doc, 1064) is doc  # not before the grace is over
    left = t.unexpired(doc, 1065)
    assert left == {**doc, "entries": doc["entries"][1:]}
    assert t.unexpired({"entries": 5}, 1e9) == {"entries": 5}


# == Housekeeping ======================================================
#
# A project in which everything that ever coordinates is there, in every state, long
# ago and just now.


LONG_AGO = 40 * 86400
CAS_KEYS = re.compile(
    r"_project\.json|memory/(?!_history/).*|messages/[^/]+/_cursor\.json|locks/.*"
    r"|steps/[^/]+/(spec|claim)\.json|semaphores/.*|barriers/.*|reservations\.json"
    r"|manifests/.*|runs/[^/]+/meta\.json|sessions/.*")


def item(state, **fields):
    return {"state": state, "token": 1, "attempt": 1, "body": "b", **fields}


def populate(bucket, ada, bob):
    """Records of every kind, some of them leftovers once LONG_AGO has passed."""
    ada.init(probe=False)
    for sid in ("done", "mine", "freed", "checked"):
        ada.add_step(sid)
        ada.claim(sid)
    ada.complete("done", note="n")
    ada.release("freed")
    ada.complete("checked", state="needs_review")
    ada.add_step("later", needs=["done"])
    for n in range(3):
        ada.send("bob", f"acked {n}", op=f"id{n}" if n else "")
    for sent in bob.inbox().messages:
        bob.ack(sent["id"])
    ada.send("bob", "unread")
    ada.send("_broadcast", "all")
    bob.inbox(new=True).commit()
    ada.memory.set("k", "1")
    ada.memory.set("big", "v" * 70_000)
    ada.artifacts.put_bytes("kept.txt", b"kept")
    ada.artifacts.put_bytes("gone.txt", b"gone")
    head = bucket.doc("manifests/shared/gone.txt/_head.json")
    bucket.place("manifests/shared/gone.txt/_head.json",
                 {**head, "rev": 2, "deleted_at": ada.ledger.at()})
    for key, doc in {
        "messages/bob/0000000000000000009_eve_99999999.json": {
            "from": "eve", "to": "bob", "message": "old", "sent_at": AT_2026,
            "expires_at": ada.ledger.at(60)},
        "locks/l.json": {"agent": "ada", "token": 1},
        "semaphores/g/config.json": {"k": 1}, "semaphores/g/0.json": {"agent": "ada"},
        "barriers/b/g1/config.json": {"n": 1}, "barriers/b/g1/arrive/ada": {},
        "barriers/b/g1/verdict.json": {"verdict": "open"},
        "reservations.json": {"rev": 1, "entries": [
            {"id": n, "agent": "eve", "mode": "exclusive", "globs": [n], "ttl": ttl,
             "renewed_at": ada.ledger.at()} for n, ttl in (("1", 60), ("2", 0))]},
        "queues/q/items/done.json": item("done"),
        "queues/q/items/dead.json": item("dead"),
        "queues/q/items/ready.json": item("ready"),
        "queues/q/items/leased.json": item("leased"),
        "runs/r/meta.json": {}, "sessions/h/1/_cursor.json": {},
        "ready/05/done.1": {}, "active/done.1": {}, "ready/05/freed.2": {},
        "active/mine.1": {}, "dependents/done/later": {}, "dependents/mine/later": {},
        "queues/q/ready/05/0000000000000000001_ready.1": {},
        "queues/q/ready/05/0000000000000000001_done.1": {},
        "queues/q/active/leased.1": {}, "queues/q/active/dead.1": {},
        "queues/q/active/never.1": {}, "_probe/x": {}, "odd/key": {},
    }.items():
        bucket.place(key, doc)


@pytest.fixture
def lived_in(bucket, ada, bob):
    populate(bucket, ada, bob)
    bucket.clock_at += LONG_AGO
    return bucket


def kept_wrongly_or_lost(before, after):
    """What invariant 2 and protocol.md 1.2 forbid: CAS records and unacknowledged mail
    that are gone. Arguments: {key: bytes}."""
    acked = {key.replace("_acks/", "") for key in before if "/_acks/" in key}
    expired = {key for key, data in before.items() if b'"expires_at"' in data}
    return [key for key in before if key not in after and (
        CAS_KEYS.fullmatch(key) or (
            t.key_pattern("messages/*/*.json").fullmatch(key)
            and key not in acked | expired))]


def contents(bucket):
    return {key: there[0] for key, there in bucket.shared.objects.items()}


LEFT_OVER = {
    "_probe/x", "active/done.1", "ready/05/done.1", "ready/05/checked.1",
    "queues/q/items/done.json", "artifacts/shared/gone.txt", "queues/q/active/dead.1", "queues/q/active/never.1",
    "queues/q/ready/05/0000000000000000001_done.1",
    "messages/bob/0000000000000000009_eve_99999999.json"}


def test_gc_removes_what_is_over_but_no_record_and_no_unread_mail(lived_in, ada):
    before = contents(lived_in)
    doc = t.collect(ada)
    gone = set(before) - set(contents(lived_in))
    assert kept_wrongly_or_lost(before, contents(lived_in)) == []
    assert {key for key in gone if "ada" not in key and "_ids/" not in key} == LEFT_OVER
    assert sum("/_acks/" in key for key in gone) == 3
    assert sum("/_ids/" in key for key in gone) == 2
    assert doc["count"] == len(gone) + 1  # and one entry of reservations.json
    assert [e["id"] for e in lived_in.doc("reservations.json")["entries"]] == ["2"]
    assert lived_in.doc("reservations.json")["rev"] == 2


def test_a_second_gc_finds_nothing(lived_in, ada):
    t.collect(ada)
    assert t.collect(ada) == {"dry_run": False, "count": 0, "bytes": 0, "classes": []}


def test_gc_of_a_young_project_finds_nothing(bucket, ada, bob):
    populate(bucket, ada, bob)
    bucket.clock_at += 300
    before = contents(bucket)
    found = {row["class"] for row in t.collect(ada)["classes"]}
    assert found == {"expired reservations"}
    assert set(contents(bucket)) == set(before)


def test_a_dry_run_says_the_same_and_writes_nothing(lived_in, ada):
    before = contents(lived_in)
    said = t.collect(ada, dry_run=True)
    assert contents(lived_in) == before and said["count"] > 10
    assert {**t.collect(ada), "dry_run": True} == said


def reads_acks_backwards(monkeypatch):
    """Broken: mail counts as acknowledged when it is not."""
    def settled(box, ids, everywhere, *, now, after):
        return [leaf for leaf in box if "/" not in leaf], [], []
    monkeypatch.setattr(t, "settled_mail", settled)


def takes_heads_for_bytes(monkeypatch):
    """Broken: the head of a deleted artifact goes in place of its bytes."""
    monkeypatch.setattr(t, "_bytes_of", lambda key: key)
    monkeypatch.setattr(t, "older", lambda entry, record: True)


@pytest.mark.parametrize("breakage", [reads_acks_backwards, takes_heads_for_bytes])
def test_a_broken_gc_is_found_out(lived_in, ada, breakage, monkeypatch):
    breakage(monkeypatch)
    before = contents(lived_in)
    try:
        t.collect(ada)
    except tracecraft.Error:
        pass
    assert kept_wrongly_or_lost(before, contents(lived_in))


def test_an_active_marker_stays_while_a_dependent_waits_to_be_found(lived_in, ada):
    del lived_in.shared.objects["ready/05/later.1"]  # its maker died before it was put
    t.collect(ada)
    assert lived_in.under("active/") == ["active/done.1", "active/mine.1"]
    ada.claim("later")
    t.collect(ada)
    assert "active/done.1" not in lived_in.under("active/")


def test_a_dependency_s_hint_goes_when_both_steps_are_complete(lived_in, ada):
    ada.claim("later", reopen=True)
    ada.complete("later")
    lived_in.clock_at += LONG_AGO
    t.collect(ada)
    assert lived_in.under("dependents/") == ["dependents/mine/later"]


def test_a_message_sent_again_after_gc_is_not_delivered_twice(bucket, ada, bob):
    first = ada.send("bob", "once", op="m1")
    bob.ack(bob.inbox().messages[0]["id"])
    bucket.clock_at += 3 * 86400
    t.collect(ada)
    assert not bob.inbox().messages
    assert ada.send("bob", "once", op="m1")["key"] == first["key"]
    assert not bob.inbox().messages
    bucket.clock_at += LONG_AGO  # a month later the id is forgotten, its marks go
    t.collect(ada)
    assert bucket.under("messages/bob/") == []


def test_a_message_settled_by_its_key_after_gc_is_not_sent_again(bucket, ada, bob):
    leaf = ada.send("bob", "once")["key"].rpartition("/")[2][:-len(".json")]
    bob.ack(bob.inbox().messages[0]["id"])
    assert ada.send("bob", "once", op=leaf)
    bucket.clock_at += 3 * 86400
    t.collect(ada)
    refused(t.Unknown, ada.send, "bob", "once", op=leaf)
    assert not bob.inbox().messages


def test_sending_again_what_never_arrived_still_sends_it(ada, bob, bucket):
    ada.store.fault("crash-before", "PUT", "_ada_")
    with pytest.raises(Crash):
        ada.send("bob", "once", op="m1")
    ada.send("bob", "once", op="m1")
    assert mail_texts(bob.inbox()) == ["once"]


def test_an_unreadable_id_marker_keeps_its_mailbox_s_acks(lived_in, ada):
    lived_in.place("messages/bob/_ids/x.json", b"{")
    acks = lived_in.under("messages/bob/_acks/")
    t.collect(ada)
    assert lived_in.under("messages/bob/_acks/") == acks
    assert lived_in.under("messages/bob/_ids/") != []


def test_a_deleted_artifact_uploaded_anew_while_gc_runs_keeps_its_02_copy(lived_in, ada,
                                                                          bob):
    def upload():
        bob.artifacts.put_bytes("gone.txt", b"again")
    ada.store.fault("ok", "DELETE", "artifacts/shared/gone.txt", before=upload)
    t.collect(ada)
    assert lived_in.shared.objects["artifacts/shared/gone.txt"][0] == b"again"


def test_gc_killed_anywhere_leaves_a_project_the_next_run_finishes():
    def prepare(bucket, ada):
        populate(bucket, ada, agent_on(bucket, "bob"))
        bucket.clock_at += LONG_AGO
        prepared.append(contents(bucket))
    prepared, whole, points = [], MemoryStore(), 0
    ada = agent_on(whole, "ada")
    prepare(whole, ada)
    t.collect(ada)
    for bucket, ada, where in crashes(prepare, t.collect):
        points += 1
        assert kept_wrongly_or_lost(prepared[-1], contents(bucket)) == [], where
        if points % 7 == 0:
            t.collect(ada)
            assert len(bucket.under("")) == len(whole.under("")), where
            assert t.collect(ada)["count"] == 0, where
    assert points > 40


def test_gc_lists_once_and_reads_only_what_must_have_its_say(lived_in, ada):
    cost = spent(ada, t.collect, ada, dry_run=True)
    assert cost["LIST "] == 1 and not any(what.startswith("PUT") for what in cost)
    assert not any("memory/" in what or "locks/" in what for what in cost)
    assert sum(cost.values()) <= 30


def test_mail_is_kept_for_a_day_at_least(ada):
    for after in (0, 86399, float("nan")):
        assert "--days" in refused(t.Usage, t.collect, ada, after=after).hint


def test_gc_keeps_mail_for_the_days_it_is_told(bucket, ada, bob):
    ada.send("bob", "x")
    bob.ack(bob.inbox().messages[0]["id"])
    bucket.clock_at += 5 * 86400
    assert t.collect(ada, after=6 * 86400)["count"] == 0
    assert t.collect(ada, after=4 * 86400)["count"] == 2


def test_gc_answers_as_a_command(sh):
    sh.ok("claim", "s")
    assert sh.ok("gc") == "Nothing to remove.\n"
    folder = f"{sh.cwd}/.tracecraft/store/work/messages/ada"
    sh.ok("send", "ada", "x", TRACECRAFT_AGENT="bob")
    sh.ok("ack", sh.json("inbox")["items"][0]["id"])
    for where, _, names in os.walk(folder):
        for name in names:
            os.utime(os.path.join(where, name), (1e9, 1e9))
    assert sh.json("gc", "--dry-run")["count"] == 2
    assert sh.ok("gc").splitlines()[-1].startswith("2 removed, ")
    assert not os.path.exists(folder)
    assert "--days" in sh.refused(2, "gc", "--days", "0")


def test_doctor_says_how_much_gc_would_remove(lived_in, ada):
    notes = t.diagnose(ada, fix=True)["notes"]
    assert any("gc would remove" in note for note in notes)


@pytest.mark.parametrize("key, doc, says", [
    ("locks/l.json", {"token": 1}, "has no 'agent'"),
    ("semaphores/g/0.json", {"agent": "a"}, "has no 'token'"),
    ("semaphores/g/config.json", [], "not an object"),
    ("barriers/b/g1/config.json", {"n": "2"}, "has a str as 'n'"),
    ("reservations.json", {"entries": {}}, "has a dict as 'entries'"),
    ("queues/q/items/i.json", {"state": "ready"}, "has no 'token'"),
    ("messages/_channel.dev/1_a_b.json", {"from": "a"}, "has no 'to'"),
])
def test_doctor_knows_the_shape_of_every_new_record(ada, bucket, key, doc, says):
    bucket.place(key, doc if isinstance(doc, dict) else b"[]")
    said = t.diagnose(ada)
    assert said["exit"] == 8 and says in said["problems"][0]["problem"]


def test_no_marker_of_the_layout_is_strange_to_doctor(ada, bucket):
    for key in ("ready/05/s.1", "active/s.1", "dependents/a/b", "queues/q/active/i.1",
                "queues/q/ready/05/0000000000000000001_i.1"):
        bucket.place(key, b"")
    said = t.diagnose(ada)
    assert said["ok"] and not any("layout" in note for note in said["notes"])


# == Archive ===========================================================


def exported(project, **how):
    file = io.BytesIO()
    t.export_to(project, file, **how)
    return file.getvalue()


def imported(project, data, **how):
    return t.import_from(project, io.BytesIO(data), **how)


def rewritten_tar(data, change):
    """The tar in `data` with change(info, content) -> [(info, content)] applied."""
    import tarfile
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, \
            tarfile.open(fileobj=out, mode="w") as new:
        for info in old:
            for info, content in change(info, old.extractfile(info).read()):
                new.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def tar(bucket, ada, bob):
    populate(bucket, ada, bob)
    return exported(ada)


def fresh_agent(name="ada"):
    bucket = MemoryStore()
    return bucket, agent_on(bucket, name)


def test_a_project_comes_out_of_its_tar_as_it_went_in(bucket, tar):
    other, ada = fresh_agent()
    said = imported(ada, tar)
    there, here = contents(bucket), contents(other)
    assert set(there) - set(here) == {"_probe/x"} and said["written"] == len(here)
    different = {key for key in here if here[key] != there[key]}
    assert different == {"_project.json", "messages/bob/_cursor.json"}
    assert t.diagnose(ada)["exit"] == t.diagnose(agent_on(bucket, "ada"))["exit"]


def test_the_same_objects_give_the_same_bytes(ada, bob, bucket, tar):
    assert exported(ada) == tar and exported(bob) == tar


def test_an_import_repeated_writes_nothing(tar):
    bucket, ada = fresh_agent()
    imported(ada, tar)
    before = len(bucket.log)
    said = imported(ada, tar)
    assert (said["written"], len(bucket.log)) == (0, before)


def test_a_prefix_exports_only_what_lies_below(ada, tar):
    bucket, eve = fresh_agent()
    imported(eve, exported(ada, prefix="memory/"))
    assert bucket.under("") == bucket.under("memory/") != []


def test_a_tar_cut_off_anywhere_is_refused_and_nothing_is_written(ada, tar):
    bucket, eve = fresh_agent()
    last = len(tar.rstrip(b"\0"))
    for cut in [*range(0, last, 3001), *range(last - 600, last, 97), last - 1]:
        assert refused(t.Corrupt, imported, eve, tar[:cut]).exit == 8
    assert bucket.log == []


def test_a_tar_with_any_byte_of_its_contents_changed_is_refused(tar):
    bucket, eve = fresh_agent()
    at = tar.index(b'"value": "1"') + 10
    changed = tar[:at] + b"2" + tar[at + 1:]
    assert "_export.json says" in refused(t.Corrupt, imported, eve, changed).message
    assert bucket.log == []


def renamed(name):
    def change(info, content):
        if info.name == "locks/l.json":
            info.name = name
        return [(info, content)]
    return change


def retyped(kind, target=""):
    def change(info, content):
        if info.name != "locks/l.json":
            return [(info, content)]
        info.type, info.linkname, info.size = kind, target, 0
        return [(info, b"")]
    return change


def added_after(info, content):
    import tarfile
    extra = tarfile.TarInfo("x" if info.name == "_export.json" else info.name + "x")
    return [(info, content)] + [(extra, b"")] * (info.name == "_export.json")


BAD_TARS = {
    "absolute": renamed("/etc/passwd"), "up": renamed("locks/../../x"),
    "dot": renamed("./x"), "empty part": renamed("a//b"), "backslash": renamed("a\\b"),
    "control": renamed("a\x1bb"), "probe": renamed("_probe/x"),
    "another name": renamed("locks/m.json"), "twice": renamed("locks/../locks/l.json"),
    "symlink": retyped(b"2", "/etc/passwd"), "hard link": retyped(b"1", "steps/s"),
    "device": retyped(b"3"), "fifo": retyped(b"6"), "folder": retyped(b"5"),
    "after the list": added_after,
    "doubled": lambda info, content: [(info, content)] * (1 + (info.name < "b")),
    "dropped": lambda info, content: [(info, content)] * (info.name != "locks/l.json"),
    "no list": lambda info, content: [(info, content)] * (info.name != "_export.json"),
    "odd list": lambda info, content: [(info, b"[]" + b" " * (info.size - 2))
                                       if info.name == "_export.json"
                                       else (info, content)],
    "newer": lambda info, content: [(info, content.replace(b'"format": 1',
                                                           b'"format": 9'))],
}


@pytest.mark.parametrize("fault", BAD_TARS)
def test_a_tar_that_no_export_writes_is_refused_before_the_first_write(tar, fault):
    bucket, eve = fresh_agent()
    bad = rewritten_tar(tar, BAD_TARS[fault])
    assert refused(t.Corrupt, imported, eve, bad).exit == 8
    assert bucket.log == []


@pytest.mark.parametrize("junk", [b"", b"x" * 5000, b"\0" * 10240, b"\x1f\x8b" * 600])
def test_what_is_no_tar_is_refused(junk):
    refused(t.Corrupt, imported, fresh_agent()[1], junk)


def test_import_overwrites_nothing(tar):
    bucket, eve = fresh_agent("eve")
    eve.memory.set("k", "mine")
    before = contents(bucket)
    why = refused(t.Conflict, imported, eve, tar)
    assert why.details["keys"] == ["memory/k.json"] and contents(bucket) == before


def test_import_keeps_the_place_s_own_project_record_and_presence(tar):
    bucket, ada = fresh_agent()
    ada.init(probe=False)
    ada.heartbeat(summary="here")
    before = contents(bucket)
    assert imported(ada, tar)["kept"] == 2
    assert all(contents(bucket)[key] == before[key] for key in before)


def test_no_verdict_of_another_store_is_imported(tar):
    bucket, eve = fresh_agent("eve")
    imported(eve, tar)
    assert bucket.doc("_project.json")["verdicts"] == {}


def test_a_dry_run_of_an_import_checks_all_and_writes_nothing(tar):
    bucket, ada = fresh_agent()
    assert imported(ada, tar, dry_run=True)["written"] > 30 and bucket.log == []


def test_a_killed_import_is_finished_by_the_same_call(tar):
    whole, points = contents(whole_import(tar)), 0
    for bucket, ada, where in crashes(None, lambda a: imported(a, tar)):
        points += 1
        if points % 9 == 0:
            imported(ada, tar)
            assert contents(bucket) == whole, where
    assert points > 60


def whole_import(tar):
    bucket, ada = fresh_agent()
    imported(ada, tar)
    return bucket


@pytest.mark.parametrize("kind", ["lose", "drop", "busy", "down", "twice", "late"])
def test_an_import_comes_through_lost_answers(tar, kind):
    bucket, ada = fresh_agent()
    ada.store.fault(kind, "PUT", "", times=5)
    imported(ada, tar)
    assert contents(bucket) == contents(whole_import(tar))


def test_bytes_are_written_before_the_heads_that_name_them_and_offers_last(tar):
    keys = [key for key, *_ in whole_import(tar).log]
    at = {key: n for n, key in enumerate(keys)}
    assert at["artifacts/shared/kept.txt"] < at["manifests/shared/kept.txt/_head.json"]
    assert at["steps/mine/claim.json"] < at["steps/mine/spec.json"] < len(keys)
    assert at["reservations.json"] < at["ready/05/freed.2"]


def test_mail_that_was_read_stays_read_and_other_mail_stays_new(bucket, ada, bob):
    ada.send("bob", "read")
    assert read_new(bob) == ["read"]
    bucket.clock_at += 86400
    ada.send("_broadcast", "heard")
    assert read_new(bob) == ["heard"]
    ada.send("bob", "fresh")
    other, bob2 = fresh_agent("bob")
    other.clock_at = bucket.clock_at + 1000
    imported(bob2, exported(ada))
    assert read_new(bob2) == ["fresh"] and read_new(bob2) == []


def test_a_cursor_of_02_is_moved_too(bucket, ada):
    old = ada.send("bob", "read")["key"]
    bucket.clock_at += 86400
    bucket.place("messages/bob/_cursor.json",
                 {"direct": {"watermark": old, "seen": []}})
    bucket.clock_at += 600
    ada.send("bob", "fresh")
    other, bob = fresh_agent("bob")
    other.clock_at = bucket.clock_at + 1000
    imported(bob, exported(ada))
    assert read_new(bob) == ["fresh"] and read_new(bob) == []


def claim_over_a_known_status(bucket, ada):
    """A step that 0.2 had ended, reopened by ada, who died before she projected."""
    bucket.place(STATUS, {"status": "complete", "agent": "eve"})
    ada.store.fault("crash-before", "PUT", STATUS)
    with pytest.raises(Crash):
        ada.claim("s", reopen=True)
    assert bucket.doc(CLAIM)["status_seen"] and "token" not in bucket.doc(STATUS)


def test_an_act_of_02_that_was_known_is_not_adopted_anew_after_an_import(bucket, ada):
    claim_over_a_known_status(bucket, ada)
    other, bob = fresh_agent("bob")
    imported(bob, exported(ada))
    assert bob.step_status("s")["state"] == "in_progress"
    assert imported(bob, exported(ada))["written"] == 0


def test_without_that_rule_it_would_be(bucket, ada, monkeypatch):
    claim_over_a_known_status(bucket, ada)
    monkeypatch.setattr(t, "known_status", lambda claim, status, stamp: None)
    bob = fresh_agent("bob")[1]
    imported(bob, exported(ada))
    assert bob.step_status("s")["state"] == "complete"


def test_an_act_of_02_that_nobody_adopted_yet_is_adopted_after_an_import(bucket, ada):
    ada.claim("s")
    bucket.place(STATUS, {"status": "complete", "agent": "eve"})
    bob = fresh_agent("bob")[1]
    imported(bob, exported(ada))
    assert bob.step_status("s")["state"] == "complete"


def test_a_lease_begins_anew_where_it_is_imported(bucket, ada):
    ada.claim("s")
    pass_time(bucket)
    other, bob = fresh_agent("bob")
    other.clock_at = bucket.clock_at
    imported(bob, exported(ada))
    assert refused(t.Held, bob.claim, "s").details["expires_in_s"] > tracecraft.TTL - 9
    pass_time(other)
    assert bob.claim("s").token == 2


def test_what_changes_during_an_export_goes_whole_or_not_at_all(bucket, ada, bob, tar):
    def act():
        bob.artifacts.put_bytes("new.txt", b"new")
        bob.memory.set("big", "w" * 70_000)
        bob.store.delete(bucket.under("messages/bob/")[0])
    ada.store.fault("ok", "GET", "memory/big.json", before=act)
    other, eve = fresh_agent()
    imported(eve, exported(ada))
    ours = [row for row in t.diagnose(bob)["problems"] if row["key"] != "_probe/x"]
    assert t.diagnose(eve)["problems"] == ours
    assert eve.memory.get("big")["value"] == "w" * 70_000


def test_bytes_replaced_under_their_head_during_an_export_are_noticed(ada, bob, tar):
    ada.store.fault("ok", "GET", "artifacts/shared/kept.txt",
                    before=lambda: bob.artifacts.put_bytes("kept.txt", b"other",
                                                           overwrite=True))
    assert "export again" in refused(t.Conflict, exported, ada).hint


def test_names_that_are_none_of_ours_are_left_out_with_a_warning(ada, bucket, tar):
    for key in ("folder//x", "_export.json", "a\x07"):
        bucket.place(key, b"")
    assert exported(ada) == tar and "3 objects are left out" in ada.warned[-1]


def test_a_large_object_goes_between_kinds_of_stores_through_files(tmp_path):
    def at(name):
        return tracecraft.connect(f"file://{tmp_path}/{name}/p", agent="ada", cwd=HERE,
                                  environ={"HOME": str(tmp_path)})
    data = os.urandom(1 << 20) * 3
    (tmp_path / "big.bin").write_bytes(data)
    with at("one") as one, at("two") as two, S3Server() as server:
        one.artifacts.upload(str(tmp_path / "big.bin"))
        one.claim("s")
        bucket = tracecraft.connect(
            f"s3://bucket/p?endpoint={server.url}", agent="ada", cwd=HERE,
            environ={"HOME": str(tmp_path), **server.env()})
        bucket.store.ensure()
        imported(bucket, exported(one))
        imported(two, exported(bucket))
        assert two.artifacts.verify("big.bin")["size"] == len(data)
        assert exported(two, prefix="steps/") != b""
        assert two.step_status("s")["agent"] == "ada"
        bucket.close()


def test_export_and_import_answer_as_commands(sh):
    sh.ok("memory", "set", "k", "1")
    assert re.match(r"Exported \d objects, .* to x.tar\n", sh.ok("export", "x.tar"))
    assert "is there already" in sh.refused(3, "export", "x.tar")
    to = ["--store", f"file://{sh.tmp}/other/p"]
    assert sh.ok("import", "x.tar", "--dry-run", *to).startswith("Would import ")
    assert sh.json("import", "x.tar", *to)["written"] >= 2
    assert sh.ok("memory", "get", "k", *to) == "1\n"
    piped = sh.run("export", "-", "--prefix", "memory/")
    done = sh.run("import", "-", "--store", f"file://{sh.tmp}/third/p",
                  stdin=piped.stdout)
    assert done.returncode == 0 and done.out.startswith("Imported 2 of 2 objects")
    with open(f"{sh.cwd}/x.tar", "r+b") as file:
        file.truncate(3000)
    assert "tar" in sh.refused(8, "import", "x.tar", *to)
    assert "cannot read" in sh.refused(2, "import", "none.tar")
    assert "stdout" in sh.refused(2, "export", "-", "--json")
# -- decisions on the one document -------------------------------------


BOOK = "reservations.json"


def entry_ids(bucket):
    return [entry["id"] for entry in (bucket.doc(BOOK) or {}).get("entries", [])]


def test_a_refusal_names_holder_reason_time_globs_and_how_to_ask(ada, bob, bucket):
    ada.reserve(["src/api/"], reason="new routes", ttl=900)
    pass_time(bucket, 100)
    why = refused(tracecraft.Held, bob.reserve, ["src/**/*.py"])
    for word in ("src/**/*.py overlaps src/api/**", "by ada (r1, exclusive, 80",
                 "s left): new routes"):
        assert word in why.message
    assert 'tracecraft send ada "please release r1"; --wait 8' in why.hint
    assert why.details["overlaps"] == [["src/**/*.py", "src/api/**"]]
    assert bucket.writes(BOOK) == 1


@pytest.mark.parametrize("first, second, meet", [
    (False, False, True), (True, False, True), (False, True, True),
    (True, True, False)])
def test_only_two_shared_reservations_may_overlap(ada, bob, first, second, meet):
    ada.reserve(["src/**"], shared=first)
    if meet:
        refused(tracecraft.Held, bob.reserve, ["src/a"], shared=second)
    else:
        assert bob.reserve(["src/a"], shared=second)["id"] == "r2"


def test_globs_that_share_no_path_are_reserved_side_by_side(ada, bob):
    ada.reserve(["src/*.py"])
    assert bob.reserve(["src/*/a.py", "docs/"])["globs"] == ["src/*/a.py", "docs/**"]


def test_one_glob_may_be_given_as_a_text(ada):
    assert ada.reserve("src/")["globs"] == ["src/**"]
    assert ada.unreserve("src/")[0]["id"] == "r1"


def test_one_s_own_reservations_never_conflict(ada, bucket):
    ada.reserve(["src/**"])
    ada.reserve(["src/a"])
    ada.reserve(["src/**"], shared=True)
    assert entry_ids(bucket) == ["r1", "r2", "r3"]


def test_another_instance_of_me_is_in_the_way_and_is_called_so(ada, bucket):
    ada.reserve(["src/**"])
    other = agent_on(bucket, "ada", instance="ada-2")
    why = refused(tracecraft.Held, other.reserve, ["src/a"])
    assert "another instance of you" in why.hint and "unreserve r1 --force" in why.hint


def test_who_knows_the_token_is_the_same_holder(ada, bucket):
    ada.reserve(["src/**"])
    heir = agent_on(bucket, "ada", instance="ada-2")
    heir.who.hold("reservation/r1", 1, ttl=9)
    assert heir.reserve(["src/**"])["id"] == "r1"
    thief = agent_on(bucket, "bob")
    thief.who.hold("reservation/r1", 1, ttl=9)
    refused(tracecraft.Held, thief.reserve, ["src/**"])


def test_the_same_again_is_the_same_reservation_begun_anew(ada, bucket):
    first = ada.reserve(["b", "a"], reason="x")
    pass_time(bucket, 60)
    again = ada.reserve(["a", "./b"], ttl=77)
    assert (again["id"], again["token"], again["reason"]) == ("r1", 1, "x")
    assert again["ttl"] == 77 and again["renewed_at"] > first["renewed_at"]
    assert entry_ids(bucket) == ["r1"]


@pytest.mark.parametrize("after, free", [
    (tracecraft.TTL, False), (LEASE_OVER - 2, False), (LEASE_OVER + 1, True)])
def test_a_reservation_ends_its_ttl_and_the_grace_after_its_renewal(
        ada, bob, bucket, after, free):
    ada.reserve(["a"])
    pass_time(bucket, 1000)
    ada.reservations.renew("r1")
    pass_time(bucket, after)
    if free:
        assert bob.reserve(["a"])["token"] == 2
        assert entry_ids(bucket) == ["r2"]
    else:
        refused(tracecraft.Held, bob.reserve, ["a"])


def test_ttl_0_never_expires(ada, bob, bucket):
    ada.reserve(["a"], ttl=0)
    pass_time(bucket, 10**8)
    why = refused(tracecraft.Held, bob.reserve, ["a"])
    assert "never expires" in why.message and why.details["expires_in_s"] is None


def test_the_next_writer_drops_what_has_expired_and_the_holder_is_fenced(
        ada, bob, bucket):
    ada.reserve(["a"])
    pass_time(bucket)
    bob.reserve(["b"])
    assert entry_ids(bucket) == ["r2"]
    why = refused(tracecraft.Fenced, ada.reservations.renew, "r1")
    assert (why.exit, "r1 was lost" in why.message) == (4, True)
    assert ada.whoami()["holds"] == {}


def test_what_expired_unnoticed_is_renewed_under_its_token(ada, bucket):
    ada.reserve(["a"])
    pass_time(bucket)
    assert ada.reservations.renew("r1")["token"] == 1
    assert ada.reservations.list()[0]["expires_in_s"] == LEASE_OVER


def test_a_renewal_dated_ahead_lasts_no_longer_than_one_of_now(ada, bob, bucket):
    ada.reserve(["a"])
    doc = bucket.doc(BOOK)
    doc["entries"][0]["renewed_at"] = tracecraft.iso(bucket.clock_at + 10**6)
    bucket.place(BOOK, doc)
    why = refused(tracecraft.Held, bob.reserve, ["a"])
    assert why.details["expires_in_s"] <= LEASE_OVER


def test_tokens_grow_though_everything_was_given_back(ada, bob, bucket):
    ada.reserve(["a"])
    ada.unreserve(every=True)
    assert (entry_ids(bucket), bucket.doc(BOOK)["token"]) == ([], 1)
    assert bob.reserve(["a"])["token"] == 2


def test_renewing_what_is_another_s_or_nobody_s_is_refused(ada, bob):
    ada.reserve(["a"])
    assert refused(tracecraft.Held, bob.reservations.renew, "r1").exit == 3
    refused(tracecraft.Conflict, bob.reservations.renew, "r9")


def test_waiting_takes_it_once_it_is_free(ada, bob, bucket):
    ada.reserve(["a"])
    later = threading.Timer(0.3, lambda: ada.unreserve(["a"]))
    later.start()
    assert bob.reserve(["a"], wait=20)["token"] == 2
    later.join()
    assert refused(tracecraft.TimedOut, ada.reserve, ["a"], wait=0.2).exit == 6


def test_a_glob_an_id_or_all_is_given_back(ada, bucket):
    ada.reserve(["a", "b"])
    ada.reserve(["c"])
    ada.reserve(["d"])
    gone = ada.unreserve(["./a", "r2"])
    assert [(e["id"], e["globs"]) for e in gone] == [("r1", ["a"]), ("r2", ["c"])]
    assert [e["globs"] for e in bucket.doc(BOOK)["entries"]] == [["b"], ["d"]]
    assert set(ada.whoami()["holds"]) == {"reservation/r1", "reservation/r3"}
    assert [e["id"] for e in ada.unreserve(every=True)] == ["r1", "r3"]
    assert (ada.unreserve(["a"]), ada.unreserve(every=True)) == ([], [])
    assert ada.whoami()["holds"] == {}


def test_nothing_is_given_back_when_a_word_names_another_s(ada, bob, bucket):
    ada.reserve(["a"])
    bob.reserve(["b"])
    for word in ("r2", "b"):
        why = refused(tracecraft.Held, ada.unreserve, ["a", word])
        assert why.details["holder"] == "bob" and "--force" in why.hint
    assert entry_ids(bucket) == ["r1", "r2"]


def test_what_two_share_is_given_back_by_each_for_itself(ada, bob, bucket):
    ada.reserve(["a"], shared=True)
    bob.reserve(["a"], shared=True)
    assert [e["id"] for e in ada.unreserve(["a"])] == ["r1"]
    assert entry_ids(bucket) == ["r2"]


def test_force_ends_another_s_which_its_holder_learns(ada, bob):
    ada.reserve(["a"], ttl=0)
    assert [e["id"] for e in bob.unreserve(["r1"], force=True)] == ["r1"]
    refused(tracecraft.Fenced, ada.reservations.renew, "r1")


@pytest.mark.parametrize("call, word", [
    (lambda a: a.reserve([]), "0 patterns"), (lambda a: a.reserve(["/etc"]), "absolute"),
    (lambda a: a.reserve(["a"], ttl=-1), "ttl"),
    (lambda a: a.reserve([f"{n}" for n in range(101)]), "101 patterns"),
    (lambda a: a.reserve(["a"], reason="x" * 501), "501 characters"),
    (lambda a: a.unreserve(["../x"]), "'..'")])
def test_nonsense_is_refused_before_any_request(ada, call, word):
    assert word in refused(tracecraft.Usage, call, ada).message
    assert ada.store.requests == 0


@pytest.mark.parametrize("damage", [
    {"ttl": "x"}, {"ttl": -1}, {"renewed_at": "soon"}, {"agent": 'x" & reboot'},
    {"mode": "both"}, {"mode": []}, {"globs": ["/etc"]}, {"globs": []}, {"globs": [1]},
    {"globs": "a"}, {"id": ["r1"]}, {"id": ""}, None, 7, [], {}], ids=str)
def test_a_damaged_entry_is_passed_over_kept_and_reported(ada, bob, bucket, damage):
    ada.reserve(["a"])
    doc = bucket.doc(BOOK)
    whole = isinstance(damage, dict) and damage
    bad = {**doc["entries"][0], **damage} if whole else damage
    bucket.place(BOOK, {**doc, "entries": [bad]})
    assert bob.reserve(["a"])["id"] == "r2"
    assert bucket.doc(BOOK)["entries"][0] == bad
    assert [e["id"] for e in bob.reservations.list()] == ["r2"]
    assert any("1 damaged" in line for line in bob.warned)


def test_a_document_of_another_shape_is_corrupt_and_stays(ada, bucket):
    for doc in ({"entries": {}}, b"[1]", b"{"):
        bucket.place(BOOK, doc)
        for act in (lambda: ada.reserve(["a"]), ada.reservations.list):
            assert BOOK in refused(tracecraft.Corrupt, act).message
    assert bucket.writes(BOOK) == 3


def test_fields_that_are_not_ours_survive(ada, bob, bucket):
    ada.reserve(["a"])
    doc = bucket.doc(BOOK)
    doc["note"], doc["entries"][0]["color"] = "x", "red"
    bucket.place(BOOK, doc)
    bob.reserve(["b"])
    ada.reservations.renew("r1")
    doc = bucket.doc(BOOK)
    assert (doc["note"], doc["entries"][0]["color"]) == ("x", "red")


def test_listing_is_by_agent_and_by_path(ada, bob):
    ada.reserve(["src/**"])
    bob.reserve(["docs/*.md"])
    for how, ids in (({}, ["r1", "r2"]), ({"by": "bob"}, ["r2"]),
                     ({"path": "src/a"}, ["r1"]), ({"path": "x"}, [])):
        assert [e["id"] for e in ada.reservations.list(**how)] == ids


def test_checkin_renews_reservations_and_says_which_were_lost(ada, bob, bucket):
    ada.reserve(["a"], ttl=60)
    ada.reserve(["b"])
    pass_time(bucket, 100)
    bob.reserve(["c"])
    seen = ada.checkin()
    assert seen["renewed"] == ["reservation r2"]
    assert seen["lost"] == ["reservation r1"]
    assert ada.checkin()["lost"] == []


def test_a_lost_answer_is_settled_by_the_operation(ada, bob, bucket):
    ada.store.fault("drop")
    ada.store.fault("dead", "GET", BOOK)
    ada.store.faults.insert(0, ["ok", "GET", BOOK, None, None])
    why = refused(tracecraft.Unknown, ada.reserve, ["a"], op="o1")
    bob.reserve(["b"])
    assert ada.reserve(["a"], op=why.details["op"])["id"] == "r2"
    assert ada.reserve(["a"], op=why.details["op"])["id"] == "r2"
    assert bucket.writes(BOOK) == 2
    ada.unreserve(["a"])
    refused(tracecraft.Fenced, ada.reserve, ["a"], op=why.details["op"])


def test_what_another_agent_reserved_is_blocked_in_either_mode(ada, bob, bucket):
    ada.reserve(["src/**"])
    bob.reserve(["docs/**"], shared=True)
    twin = agent_on(bucket, "ada", instance="hook")
    ways = {path: tracecraft.literal(path) for path in ("src/a", "docs/b", "x")}
    for who in (ada, twin):
        found = who.reservations.blocking(ways)
        assert {path: [e.id for e in some] for path, some in found.items()} == {
            "docs/b": ["r2"]}
    pass_time(bucket)
    assert ada.reservations.blocking(ways) == {}


@pytest.mark.parametrize("path, blocked", [
    ("src", True), ("src/api", True), ("src/api/x", False), ("sr", False),
    ("", True)])
def test_a_directory_stands_for_everything_below_it(ada, bob, path, blocked):
    ada.reserve(["src/api/*.py"])
    ways = {path: tracecraft.literal(path, below=True)}
    assert bool(bob.reservations.blocking(ways)) == blocked


@pytest.mark.parametrize("prepare, act, cost", [
    (None, lambda a: a.reserve(["a"]), "GET PUT"),
    (lambda a, b: b.reserve(["a"]), lambda a: a.reserve(["a"]), "GET"),
    (lambda a, b: a.reserve(["a"]), lambda a: a.reserve(["a"]), "GET PUT"),
    (lambda a, b: a.reserve(["a"]), lambda a: a.reservations.renew("r1"), "GET PUT"),
    (lambda a, b: a.reserve(["a"]), lambda a: a.unreserve(["a"]), "GET PUT"),
    (None, lambda a: a.unreserve(["a"]), "GET"),
    (None, lambda a: a.reservations.list(), "GET"),
    (None, lambda a: a.reservations.blocking({"a": tracecraft.literal("a")}), "GET")])
def test_what_a_reservation_costs(ada, bob, prepare, act, cost):
    if prepare:
        prepare(ada, bob)
    assert spent(ada, act, ada) == {f"{what} {BOOK}": 1 for what in cost.split()}


# -- crashes, races and variants that must be caught -------------------


def is_reserved_once(bucket, ada, where):
    [entry] = bucket.doc(BOOK)["entries"]
    assert (entry["globs"], entry["agent"]) == (["src/**"], "ada"), where
    assert ada.who.token_for(f"reservation/{entry['id']}") == entry["token"], where
    refused(tracecraft.Held, agent_on(bucket, "bob").reserve, ["src/a"])


def is_free(bucket, ada, where):
    assert entry_ids(bucket) == [], where
    assert agent_on(bucket, "bob").reserve(["src/a"])["token"] == 2, where


def is_gone_from_state(bucket, ada, where):
    is_free(bucket, ada, where)
    assert ada.whoami()["holds"] == {}, where


def src(project):
    return project.reserve(["src/**"])


RESERVATION_CRASHES = {  # verb: (before, act, what holds after the act was repeated)
    "reserve": (None, src, is_reserved_once),
    "reserve with op": (None, lambda a: a.reserve(["src/**"], op="o1"),
                        is_reserved_once),
    "reserve again": (lambda b, a: src(a), src, is_reserved_once),
    "reserve over an expired one": (
        lambda b, a: (agent_on(b, "eve").reserve(["src/**"]), pass_time(b)), src,
        is_reserved_once),
    "renew": (lambda b, a: src(a), lambda a: a.reservations.renew("r1"),
              is_reserved_once),
    "unreserve": (lambda b, a: src(a), lambda a: a.unreserve(["src/"]), is_free),
    "unreserve all": (lambda b, a: src(a), lambda a: a.unreserve(every=True),
                      is_gone_from_state),
    "unreserve by force": (
        lambda b, a: agent_on(b, "eve").reserve(["src/**"]),
        lambda a: a.unreserve(["r1"], force=True), is_free),
}


@pytest.mark.parametrize("verb", RESERVATION_CRASHES)
def test_a_reservation_verb_that_crashed_anywhere_can_be_repeated(verb):
    prepare, act, check = RESERVATION_CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        agent_on(bucket, "bob").reservations.list()
        act(ada)
        check(bucket, ada, where)
        assert chain_faults(bucket) == [], where
        assert tracecraft.diagnose(ada)["problems"] == [], where
    assert points >= 4


RIVAL_GLOBS = ("src/**", "src/*", "src/a/*.py", "**/*.py", "docs/", "docs/*.md", "*",
               "{src,docs}/a/**", "src/[ab]/x.py")


def share_a_path(some, others):
    """Whether a path matches one glob of each: an oracle that only tries paths."""
    tried = ["src/x", "src/a/x.py", "src/b/x.py", "src/x.py", "docs/a/b", "docs/x.md",
             "x.py", "x", "docs/a/x.py", "docs/x.py"]
    rules = {"src/**": r"src(/.+)?", "src/*": r"src/[^/]+", "docs/**": r"docs(/.+)?",
             "src/a/*.py": r"src/a/[^/]*\.py", "**/*.py": r"(.+/)?[^/]*\.py",
             "docs/*.md": r"docs/[^/]*\.md", "*": r"[^/]+",
             "{src,docs}/a/**": r"(src|docs)/a(/.+)?", "src/[ab]/x.py": r"src/[ab]/x\.py"}

    def fits(globs, path):
        return any(re.fullmatch(rules[glob], path) for glob in globs)
    return any(fits(some, path) and fits(others, path) for path in tried + ["src", "docs"])


class Tenant:
    """An agent that reserves and gives back at random, and notes what it was told."""

    def __init__(self, bucket, name, told, *, seed, ledger, faults):
        self.bucket, self.name, self.told = bucket, name, told
        self.dice, self.ledger, self.faults = random.Random(seed), ledger, faults
        self.state = LocalState()
        self.start()

    def start(self):
        self.agent = agent_on(self.bucket, self.name, ledger=self.ledger,
                              state=self.state, deadline=0.5)
        self.agent.store.chaos = (self.dice, self.faults)

    def turn(self):
        roll = self.dice.random()
        try:
            if roll < 0.1:
                self.bucket.clock_at += 12
            elif roll < 0.7:
                self.reserve(self.dice.sample(RIVAL_GLOBS, self.dice.choice((1, 1, 2))))
            else:
                self.give_back()
        except tracecraft.Error:
            pass
        except Crash:
            self.start()

    def reserve(self, globs):
        shared, begun = self.dice.random() < 0.3, self.bucket.clock_at
        entry = self.agent.reserve(globs, shared=shared, ttl=20)
        # Told from now on; mine until ttl after I began to ask, or I give it back.
        self.told.append({"who": self.name, "id": entry["id"], "globs": entry["globs"],
                          "shared": shared, "from": self.bucket.clock_at,
                          "until": begun + 20})

    def give_back(self):
        for held in self.told:
            if held["who"] == self.name:
                held["until"] = min(held["until"], self.bucket.clock_at)
        self.agent.unreserve(every=True)


def reservation_faults(told):
    """Pairs that two agents were told to have at one time (invariant 5)."""
    return [(a, b) for a, b in itertools.combinations(told, 2)
            if a["who"] != b["who"] and not (a["shared"] and b["shared"])
            and max(a["from"], b["from"]) < min(a["until"], b["until"])
            and share_a_path(a["globs"], b["globs"])]


def race_for_paths(seed, ledger=tracecraft.Ledger, *, faults=0.1, turns=25):
    """Four tenants in threads; what broke."""
    bucket, told = MemoryStore(), []
    some = [Tenant(bucket, f"a{n}", told, seed=seed * 10 + n, ledger=ledger,
                   faults=faults) for n in range(4)]
    together(*(lambda tenant=tenant: [tenant.turn() for _ in range(turns)]
               for tenant in some))
    assert len(told) > 2
    return reservation_faults(told) + chain_faults(bucket) * (
        ledger is tracecraft.Ledger)


@pytest.mark.parametrize("faults", [0, 0.15, 0.4])
def test_no_two_live_exclusive_reservations_overlap(faults):
    """Invariant 5 of protocol.md 11."""
    seed = random.randrange(10**8)
    print("seed", seed)
    for at in range(4):
        assert race_for_paths(seed + at, faults=faults) == [], seed + at


@pytest.mark.parametrize("name, faults", [
    ("CheckThenPut", 0), ("OwnClock", 0), ("Believing", 0.4)])
def test_a_ledger_that_lets_two_have_one_path_is_caught(name, faults):
    ledger = {"CheckThenPut": CheckThenPut, "OwnClock": OwnClock,
              "Believing": Believing}[name]
    assert any(race_for_paths(seed, ledger, faults=faults) for seed in range(60))


@pytest.mark.parametrize("broken", ["ignores **", "judges by the text", "ignores shared"])
def test_a_decision_that_lets_two_have_one_path_is_caught(broken, monkeypatch):
    right, spelled = tracecraft.reserve, tracecraft.spellings

    def by_text(doc, wish, me, **how):
        globs = [f"{glob}#" for glob in wish["globs"]]
        new = right(doc, {**wish, "globs": globs}, me, **how)
        new["entries"][-1]["globs"] = wish["globs"]
        return new

    def always_shared(doc, wish, me, **how):
        new = right(doc, {**wish, "mode": "shared"}, me, **how)
        new["entries"][-1]["mode"] = wish["mode"]
        return new
    if broken == "ignores **":
        monkeypatch.setattr(tracecraft, "spellings",
                            lambda glob: spelled(glob.replace("**", "*")))
    else:
        monkeypatch.setattr(tracecraft, "reserve", {
            "judges by the text": by_text, "ignores shared": always_shared}[broken])
    assert any(race_for_paths(seed, faults=0) for seed in range(20))


# -- commands, and what guard makes of real git repositories -----------


NOBODY_THERE = "s3://bucket/p?endpoint=http://127.0.0.1:9"


class Tree:
    """A git repository with a commit, in which ada works and bob has reserved."""

    def __init__(self, shell):
        self.shell, self.top = shell, shell.cwd
        self.git("init", "-q", "-b", "main")
        for name, value in (("user.name", "ada"), ("user.email", "a@example.com"),
                            ("protocol.file.allow", "always")):
            self.git("config", "--global", name, value)
        shell.ok("whoami")

    def git(self, *words, cwd=None, **more):
        done = subprocess.run(["git", *words], cwd=cwd or self.top, env=self.shell.env(
            more), stdin=subprocess.DEVNULL, capture_output=True, timeout=SLOW)
        return done.returncode, (done.stdout + done.stderr).decode()

    def write(self, path, text="x\n", top=None):
        full = os.path.join(top or self.top, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "w", encoding="utf-8") as file:
            file.write(text)

    def commit(self, path, text="x\n", why="c"):
        self.write(path, text)
        self.git("add", "-A")
        code, said = self.git("commit", "-q", "-m", why)
        assert code == 0, said

    def reserve(self, *globs, by="bob", **more):
        return self.shell.ok("reserve", *globs, TRACECRAFT_AGENT=by, **more)

    def refused(self, *words, **more):
        """The paths that guard refuses."""
        done = self.shell.run("-q", "--json", "guard", *(words or ("--staged",)), **more)
        assert done.returncode in (0, 3), done.err
        if done.returncode == 0:
            assert json.loads(done.out)["refused"] == []
            return []
        assert done.out == ""
        return sorted({row["path"] for row in json.loads(done.err)["error"]["refused"]})


@pytest.fixture
def checkout(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git here")
    return Tree(Shell(tmp_path))


@pytest.fixture
def committed(checkout):
    """The same with a commit of src/a.py and docs/a.md in it."""
    checkout.write("docs/a.md")
    checkout.commit("src/a.py")
    return checkout


def test_reserving_and_giving_back_on_the_command_line(sh):
    said = sh.ok("reserve", "src/", "**/*.py", "--reason", "new\x1b[2J", "--ttl", "60")
    assert said == "Reserved src/**, **/*.py as ada (r1, exclusive, for 60s)\n"
    why = sh.refused(3, "reserve", "src/a.c", TRACECRAFT_AGENT="bob")
    assert "src/a.c overlaps src/**, reserved by ada (r1, exclusive, " in why
    assert "\x1b" not in why and 'tracecraft send ada "please release r1"' in why
    assert "by ada, " in sh.ok("reservations")
    assert sh.json("reservations", "--path", "a.py")["items"][0]["token"] == 1
    assert sh.json("reservations", "--by", "bob")["items"] == []
    assert sh.ok("unreserve", "src/") == "Unreserved src/** (r1)\n"
    assert sh.ok("unreserve", "r1") == "Unreserved **/*.py (r1)\n"
    assert sh.ok("unreserve", "--all") == "Nothing of yours is reserved there.\n"
    assert sh.ok("reservations") == "Nothing is reserved.\n"


@pytest.mark.parametrize("words", [
    ["reserve", "/etc/"], ["reserve", "../x"], ["reserve", "a", "--ttl", "-1"],
    ["reserve"], ["unreserve"], ["unreserve", "a", "--all"],
    ["unreserve", "--all", "--force"], ["guard"], ["guard", "a", "--staged"],
    ["guard", ""], ["guard", "--staged"], ["reservations", "--path", "/etc/x"]])
def test_a_reservation_command_that_cannot_be_is_usage(sh, words):
    why = sh.refused(2, *words)
    assert why.startswith("Error: ") and len(why.splitlines()) == 2
    assert "reservations.json" not in str(list(sh.objects()))


def test_the_same_operation_settles_a_reservation(sh):
    assert sh.json("reserve", "a", "--op", "o1")["id"] == "r1"
    assert sh.json("reserve", "a", "--op", "o1@1")["token"] == 1
    assert "reservations.json" in str(list(sh.objects()))
    assert [e["id"] for e in sh.json("unreserve", "a", "--op", "o2")["items"]] == ["r1"]


def test_a_path_is_called_from_the_top_wherever_it_is_given(committed):
    sh = committed.shell
    committed.write("app/[id]/page.tsx")
    sh.cwd = os.path.join(committed.top, "src")
    for given, kept in (("a.py", "src/a.py"), ("../docs", "docs/**"), (".", "src/**"),
                        ("*.py", "src/*.py"), ("../docs/*.x", "docs/*.x"),
                        ("./new/", "src/new/**"), (committed.top, "**"),
                        (f"{committed.top}/lib/*", "lib/*"),
                        ("../app/[id]/page.tsx", "app/[[]id]/page.tsx"),
                        ("../app/[ab]/*", "app/[ab]/*")):
        assert sh.json("reserve", given)["globs"] == [kept]
        assert sh.json("unreserve", given)["items"][0]["globs"] == [kept]


def test_guard_refuses_what_another_reserved_and_says_how_to_ask(committed):
    committed.reserve("src/", "--reason", "new routes")
    why = committed.shell.refused(3, "guard", "src/a.py", "docs/a.md")
    assert "src/a.py: reserved by bob (r1, exclusive, " in why
    assert "s left): new routes\n" in why and "docs" not in why
    assert 'to ask: tracecraft send bob "please release r1"\n' in why
    said = committed.shell.ok("guard", "docs/a.md", TRACECRAFT_AGENT="eve")
    assert said == "Not reserved by others: docs/a.md\n"


def test_one_s_own_reservation_and_what_is_outside_pass(committed, tmp_path):
    committed.reserve("src/**", by="ada")
    assert committed.refused("src/a.py", TRACECRAFT_INSTANCE="another") == []
    committed.reserve("docs/**")
    assert committed.refused(str(tmp_path / "elsewhere"), "../x", "/etc/passwd") == []
    assert committed.refused(f"{committed.top}/docs/a.md", "docs") == ["docs", "docs/a.md"]


def test_guard_follows_links_of_directories_but_not_of_files(committed):
    os.symlink("docs", os.path.join(committed.top, "manual"))
    os.symlink("docs/a.md", os.path.join(committed.top, "link"))
    committed.reserve("docs/**")
    assert committed.refused("manual/a.md", "manual", "link") == ["docs/a.md"]


def test_outside_of_git_paths_begin_where_the_store_lies(sh):
    os.makedirs(os.path.join(sh.cwd, "src"))
    sh.ok("reserve", "src/", TRACECRAFT_AGENT="bob")
    sh.cwd = os.path.join(sh.cwd, "src")
    assert "src/x: reserved by bob" in sh.refused(3, "guard", "x")


def test_guard_reads_what_is_staged_before_the_first_commit(checkout):
    names = ["with space", "ä/ö", "new\nline", "-dash", "tab\t", 'q"uote', "free"]
    for name in names:
        checkout.write(name)
    checkout.git("add", "-A")
    checkout.reserve("[!f]*", "ä/")
    assert checkout.refused() == sorted(set(names) - {"free"})


def test_guard_counts_both_names_of_a_rename_and_a_deletion(committed):
    committed.git("mv", "src/a.py", "src/b.py")
    committed.git("rm", "-q", "docs/a.md")
    committed.git("config", "diff.renames", "copies")
    for glob, path in (("src/a.py", "src/a.py"), ("src/b.py", "src/b.py"),
                       ("docs/", "docs/a.md")):
        committed.reserve(glob)
        assert committed.refused() == [path]
        committed.shell.ok("unreserve", "--all", TRACECRAFT_AGENT="bob")


def test_guard_judges_what_is_staged_not_what_lies_about(committed):
    committed.reserve("src/")
    committed.write("src/a.py", "changed\n")
    committed.write("src/untracked")
    assert committed.refused() == []
    committed.git("add", "src/a.py")
    assert committed.refused() == ["src/a.py"]


def test_guard_names_staged_paths_from_the_top_in_any_directory(committed):
    committed.reserve("src/", "docs/")
    committed.git("config", "diff.relative", "true")
    committed.write("src/a.py", "changed\n")
    committed.write("docs/a.md", "changed\n")
    committed.git("add", "-A")
    committed.shell.cwd = os.path.join(committed.top, "src")
    assert committed.refused() == ["docs/a.md", "src/a.py"]


def test_guard_works_in_a_linked_work_tree(committed, tmp_path):
    other = str(tmp_path / "other")
    committed.git("worktree", "add", "-q", other)
    committed.reserve("src/")
    committed.write("src/a.py", "changed\n", top=other)
    committed.git("add", "-A", cwd=other)
    assert committed.refused() == []
    committed.shell.cwd = other
    assert committed.refused() == committed.refused("src/a.py") == ["src/a.py"]


def test_a_submodule_stands_for_all_that_is_in_it(committed, tmp_path):
    sub = str(tmp_path / "library")
    os.makedirs(sub)
    committed.git("init", "-q", cwd=sub)
    committed.git("commit", "-q", "--allow-empty", "-m", "x", cwd=sub)
    code, said = committed.git("submodule", "add", "-q", sub, "lib")
    assert code == 0, said
    committed.git("config", "-f", ".gitmodules", "submodule.lib.ignore", "all")
    committed.reserve("lib/x.c")
    assert committed.refused() == ["lib"]


def diverged(checkout, theirs, ours):
    """Two branches, each with its version of some files; main is checked out."""
    checkout.git("checkout", "-q", "-b", "side")
    for path, text in theirs.items():
        checkout.write(path, text)
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "theirs")
    checkout.git("checkout", "-q", "main")
    for path, text in ours.items():
        checkout.write(path, text)
    checkout.git("add", "-A")
    checkout.git("commit", "-q", "-m", "ours")


def test_in_a_merge_only_what_differs_from_every_parent_counts(committed):
    """What bob committed in his files is merged, what the merge itself changes is not.
    """
    diverged(committed, {"src/a.py": "theirs\n", "src/new": "theirs\n"},
             {"src/a.py": "ours\n"})
    code, said = committed.git("merge", "side")
    assert code == 1 and "CONFLICT" in said
    committed.write("src/a.py", "both\n")
    committed.git("add", "-A")
    committed.reserve("src/new")
    assert committed.refused() == []
    committed.reserve("src/a.py")
    assert committed.refused() == ["src/a.py"]
    committed.write("src/new", "sneaked in\n")
    committed.git("add", "-A")
    assert committed.refused() == ["src/a.py", "src/new"]
    committed.git("checkout", "side", "--", "src/a.py", "src/new")
    assert committed.refused() == []


def hook(checkout, name="pre-commit"):
    """The hook of the README, for ada."""
    path = os.path.join(checkout.top, ".git", "hooks", name)
    checkout.write(f".git/hooks/{name}", "#!/bin/sh\nexec " + " ".join(
        shlex.quote(word) for word in RUN) + " guard --staged\n")
    os.chmod(path, 0o755)


@pytest.mark.skipif(os.name == "nt", reason="the hook is a shell script")
def test_a_commit_hook_lets_pass_what_is_free_and_stops_what_is_not(committed):
    hook(committed)
    committed.reserve("src/")
    committed.write("src/a.py", "changed\n")
    committed.write("docs/a.md", "changed\n")
    committed.git("add", "-A")
    code, said = committed.git("commit", "-q", "-m", "all")
    assert code == 1 and "src/a.py: reserved by bob" in said
    # Only part of the index: git hands the hook an index of its own for that.
    assert committed.git("commit", "-q", "-m", "docs", "docs/a.md") == (0, "")
    assert committed.git("commit", "-q", "-m", "src", "src/a.py")[0] == 1
    committed.shell.ok("unreserve", "--all", TRACECRAFT_AGENT="bob")
    assert committed.git("commit", "-q", "-m", "src") == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="the hook is a shell script")
def test_a_merge_hook_lets_pass_what_others_have_committed(committed):
    """It runs before git has written MERGE_HEAD."""
    diverged(committed, {"src/new": "theirs\n"}, {"docs/a.md": "ours\n"})
    hook(committed, "pre-merge-commit")
    committed.reserve("src/")
    code, said = committed.git("merge", "-q", "side", "-m", "merged")
    assert code == 0, said
    assert committed.git("rev-list", "--count", "--merges", "HEAD") == (0, "1\n")


@pytest.mark.skipif(os.name == "nt", reason="the hook is a shell script")
def test_a_merge_hook_stops_what_the_merge_itself_changes(committed):
    lines = [f"{n}\n" for n in range(20)]
    committed.commit("src/both", "".join(lines))
    diverged(committed, {"src/both": "".join(["theirs\n", *lines[1:]])},
             {"src/both": "".join([*lines[:-1], "ours\n"])})
    hook(committed, "pre-merge-commit")
    committed.reserve("src/")
    code, said = committed.git("merge", "-q", "side", "-m", "merged")
    assert code != 0 and "src/both: reserved by bob" in said


def test_guard_fails_open_when_the_store_is_unreachable_unless_strict(committed):
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
            "TRACECRAFT_STORE": NOBODY_THERE}
    begun = time.monotonic()
    done = committed.shell.run("guard", "src/a.py", **keys)
    assert time.monotonic() - begun < 10
    assert (done.returncode, done.out) == (0, "")
    assert "reservations were not checked" in done.err and "--strict" in done.err
    done = committed.shell.run("--json", "guard", "src/a.py", **keys)
    assert json.loads(done.out)["checked"] is False
    committed.shell.refused(7, "guard", "src/a.py", "--strict", "--deadline", "0.5", **keys)


def test_guard_does_not_fail_open_on_a_damaged_document(committed):
    committed.reserve("src/")
    [path] = [p for p in committed.shell.objects() if p.endswith(BOOK)]
    pathlib.Path(path).write_text("{")
    assert BOOK in committed.shell.refused(8, "guard", "src/a.py")


def test_guard_asks_the_store_once_whatever_the_number_of_paths(committed):
    """And not at all when nothing is staged."""
    with S3Server() as server:
        keys = {**server.env(), "TRACECRAFT_STORE": "s3://bucket/p"}
        committed.shell.ok("heartbeat", **keys)
        for words, times in ((["a", "b", "c"], 1), (["--staged"], 0)):
            said = committed.shell.run("-v", "guard", *words, **keys).err
            assert len(re.findall(r"reservations\.json", said)) == times, said
            assert len(said.splitlines()) == times, said


def test_a_thousand_paths_are_judged_in_no_time(ada, bob):
    for n in range(60):
        ada.reserve([f"pkg{n}/**/*.py", f"lib/{{a,b}}{n}*/[a-f]*"])
    ways = {path: tracecraft.literal(path) for path in (
        f"pkg{n % 70}/x/y/file{n}.py" for n in range(1000))}
    begun = time.process_time()
    assert len(bob.reservations.blocking(ways)) > 800
    assert time.process_time() - begun < 4


# == Runs ==============================================================
#
# Their pure rules first, then a bucket that fails, then real processes.


RUN_STATES = (None, "running", *tracecraft.RUN_ENDS)


def end_faults(end):
    """What is wrong with a decision that ends runs, over every state and every end."""
    wrong = []
    for was, status in itertools.product(RUN_STATES, tracecraft.RUN_ENDS):
        old = was and {"status": was, "note": "kept"}
        try:
            new = end(old, status, by="ada", at="now")
        except tracecraft.Error as why:
            new = type(why)
        expected = {None: tracecraft.NotFound, "running": status, status: old}.get(
            was, tracecraft.Conflict)
        if was == "running":
            new = new.get("status") if new.get("note") == "kept" else "forgetful"
        if new is not expected and new != status:
            wrong.append((was, status, new))
        if was == status and new is not old:
            wrong.append((was, status, "written again"))
    return wrong


def end_anyway(run, status, *, by, at):
    return {**tracecraft.known_run(run), "status": status, "ended_at": at}


def end_never_twice(run, status, **how):
    tracecraft.under_way(run)
    return tracecraft.end_run(run, status, **how)


def test_ending_twice_is_once_and_an_end_is_never_changed():
    assert end_faults(tracecraft.end_run) == []
    assert end_faults(end_anyway) and end_faults(end_never_twice)


@pytest.mark.parametrize("line, point", [
    ('{"step": 10, "loss": 0.3}', {"step": 10, "at": "T", "loss": 0.3}),
    ('{"loss": NaN, "a/b": -Infinity}', {"at": "T", "loss": "NaN", "a/b": "-Infinity"}),
    ('{"loss": "Infinity", "step": null}', {"at": "T", "loss": "Infinity"}),
    ('{"loss": 1e999, "n": 3}', {"at": "T", "loss": "Infinity", "n": 3}),
    ('{"at": 0, "loss": 1}', {"at": "1970-01-01T00:00:00.000000+00:00", "loss": 1}),
    ('{"at": "1970-01-01T01:00:00+01:00", "loss": 1}',
     {"at": "1970-01-01T00:00:00.000000+00:00", "loss": 1})])
def test_a_line_of_metrics_becomes_a_point(line, point):
    made = t.read_point(line.encode(), "T")
    assert made == point
    assert t.points_of(t.point_line(made)) == ([point], 0)


@pytest.mark.parametrize("line, fault", [
    ("x", "not JSON"), ("", "not JSON"), ("[1]", "a JSON list"), ("3", "a JSON int"),
    ("{}", "no metric"), ('{"step": 3}', "no metric"), ('{"step": "3", "a": 1}', "step"),
    ('{"step": true, "a": 1}', "step"), ('{"step": NaN, "a": 1}', "step"),
    ('{"step": 1e300, "a": 1}', "step"), ('{"a": "x"}', "a is 'x'"),
    ('{"a": null}', "None"), ('{"a": {"b": 1}}', "not a number"),
    ('{"a": true}', "True"), ('{"": 1}', "name"), ('{"a\\u001b[2J": 1}', "\\x1b[2J"),
    ('{"at": "noon", "a": 1}', "at is"), ('{"a": %s}' % ("9" * 400), "not a number"),
    ("[" * 70_000, "70000 bytes"), ("[" * 50_000, "not JSON"), ('{"a": 1', "not JSON")])
def test_what_is_no_line_of_metrics_is_refused_with_what_is_wrong(line, fault):
    assert fault in refused(tracecraft.Usage, t.read_point, line.encode(), "T").message


def test_metrics_of_a_command_are_name_and_number():
    words = ["loss=0.5", "n=3", "big=-2e9", "bad=nan", "worst=-inf"]
    assert t.read_pairs(words, step=4.0, at="T") == {
        "step": 4, "at": "T", "loss": 0.5, "n": 3, "big": -2e9, "bad": "NaN",
        "worst": "-Infinity"}
    for word in ("loss", "loss=", "=3", "loss=x", "loss=1_0", "loss=+-3", "step=3",
                 "at=3"):
        refused(tracecraft.Usage, t.read_pairs, [word], step=None, at="T")
    refused(tracecraft.Usage, t.read_pairs, ["a=1", "a=2"], step=None, at="T")
    huge = t.read_pairs(["a=" + "9" * 400], step=None, at="T")
    assert huge["a"] == "Infinity"


@pytest.mark.parametrize("text, value", [
    ("0.1", 0.1), ("3", 3), ("true", True), ("adam", "adam"), ("", ""), ("NaN", "NaN"),
    ("1e999", "1e999"), ("[1]", "[1]"), ("null", "null"), ("01", "01"),
    ("[" * 50_000, "[" * 50_000)])
def test_a_param_is_a_number_or_the_text_it_was(text, value):
    assert t.param_value(text) == value


@pytest.mark.parametrize("said, facts", [
    ("", None), ("fatal: x", None),
    ("# branch.oid abc\n# branch.head main\n? new", ("abc", "main", False)),
    ("# branch.oid abc\n# branch.head a b\n1 .M N... x", ("abc", "a b", True)),
    ("# branch.oid (initial)\n# branch.head m\n2 R. x", ("(initial)", "m", True))])
def test_git_says_commit_branch_and_whether_tracked_files_changed(said, facts):
    named = facts and dict(zip(("commit", "branch", "dirty"), facts))
    assert t.git_facts(said) == named


def curve_of(points):
    curve = t.Curve()
    for x, y in points:
        curve.add(x, y)
    return curve


@pytest.mark.parametrize("seed", range(30))
def test_a_curve_is_the_same_in_whatever_order_its_points_come(seed):
    dice = random.Random(seed)
    points = [(dice.choice([dice.random(), dice.randrange(10**dice.randrange(1, 9)), -3]),
               dice.uniform(-5, 5)) for _ in range(dice.randrange(1, 300))]
    first = curve_of(points)
    exact = collections.defaultdict(list)
    for x, y in points:
        exact[int(x // first.width)].append(y)
    means = [sum(exact[at]) / len(exact[at]) for at in sorted(exact)]
    dice.shuffle(points)
    for curve in (first, curve_of(points)):
        assert curve.values() == pytest.approx(means)
        assert 1 <= len(curve.columns) <= t.CURVE


def test_a_curve_of_many_steps_uses_at_least_half_of_its_columns():
    for count in (20, 41, 1000, 100_000):
        assert 20 <= len(curve_of((x, x) for x in range(count)).values()) <= 40


@pytest.mark.parametrize("values", [[0], [1e308, -1e308], [5e-324, 0], [2, 2, 2],
                                    [2**1000, 3], list(range(40))])
def test_a_sparkline_has_one_mark_for_each_value(values):
    for plain, marks in ((False, "▁▂▃▄▅▆▇█"), (True, "_.-~=+*#")):
        line = t.sparkline(values, plain=plain)
        assert len(line) == len(values) and set(line) <= set(marks)
        if min(values) / 2 < max(values) / 2:
            assert marks[0] in line and marks[-1] in line


def test_a_series_keeps_its_extremes_its_last_point_and_what_is_not_finite():
    table, points = {}, [{"step": 3, "at": "b", "loss": "NaN"},
                         {"step": 1, "at": "c", "loss": 4}, {"at": "a", "acc": 1},
                         {"step": 2, "at": "a", "loss": 1.5}]
    t.add_points(table, points)
    view = table["loss"].view()
    assert (view["count"], view["last"], view["last_step"], view["min"], view["max"],
            view["not_finite"], view["curve"]) == (3, "NaN", 3, 1.5, 4, 1, [4, 1.5])
    assert table["acc"].view()["last_step"] is None
    json.dumps(view, allow_nan=False)


def test_the_memory_of_a_summary_is_bounded():
    table = {}
    points = [{f"m{n}": n} for n in range(3 * t.RUN_NAMES)]
    assert t.add_points(table, points) == 2 * t.RUN_NAMES
    assert len(table) == t.RUN_NAMES


def test_a_comparison_names_params_that_differ_and_every_metric():
    one = {"last": 1, "min": 0, "max": 2, "count": 3, "curve": []}
    views = [{"id": "a", "params": {"lr": 1, "o": {"e": 1, "k": 2}},
              "metrics": {"loss": one}},
             {"id": "b", "params": {"lr": 1, "o": {"e": 2, "k": 2}}, "metrics": {}},
             {"id": "c", "params": "junk", "metrics": {"loss": one, "acc": one}}]
    doc = t.compare_runs(views)
    brief = {"last": 1, "min": 0, "max": 2, "count": 3}
    assert doc["params"] == {"lr": [1, 1, None], "o.e": [1, 2, None],
                             "o.k": [2, 2, None]}
    assert doc["metrics"] == {"loss": [brief, None, brief], "acc": [None, None, brief]}
    assert list(t.compare_runs(views, ("acc",))["metrics"]) == ["acc"]


# -- on a bucket -------------------------------------------------------


def losses(project, run):
    """Every loss of a run, in the order of its points."""
    return [point["loss"] for point in project.runs.points(run)]


def test_a_run_records_how_it_came_about_and_what_became_of_it(ada, bucket):
    run = ada.run("train", params={"lr": 0.1}, tags=("gpu", "gpu"), step="S1.A")
    run.log(loss=0.5, step=1)
    run.note("it falls")
    run.end()
    doc = bucket.doc(f"runs/{run.id}/meta.json")
    assert doc["name"] == "train" and run.id.split("-")[1] == "train"
    assert (doc["params"], doc["tags"], doc["step"]) == ({"lr": 0.1}, ["gpu"], "s1-a")
    assert doc["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(doc["git"] or {"commit", "branch", "dirty"}) == {
        "commit", "branch", "dirty"}
    assert (doc["status"], doc["ended_by"], doc["notes"][0]["text"]) == (
        "complete", "ada", "it falls")
    assert chain_faults(bucket) == []


@pytest.mark.parametrize("name, how", [
    ("a/b", {}), ("", {}), ("_x", {}), ("..", {}), ("a" * 201, {}), ("a", {"op": "x y"}),
    ("a", {"op": "../b"}), ("a", {"tags": ["a b"]}), ("a", {"step": "/"}),
    ("a", {"params": {"x": float("nan")}}), ("a", {"params": {"x": object()}}),
    ("a", {"params": [1]}), ("a", {"params": {"x": "y" * 70_000}})])
def test_a_run_that_cannot_be_is_refused_and_nothing_is_written(ada, bucket, name, how):
    refused(tracecraft.Usage, ada.run, name, **how)
    assert bucket.under("") == []


def test_the_id_of_a_run_is_a_name_and_sorts_by_its_start(ada, bucket):
    first = ada.run("zz" * 100)
    pass_time(bucket, 2)
    second = ada.run("aa")
    assert first.id < second.id
    assert t.check_name("run id", first.id) == first.id


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_run_begins_once_whatever_happens_to_the_answer(ada, bucket, kind):
    ada.store.fault(kind)
    run = ada.run("train")
    assert bucket.under("runs/") == [f"runs/{run.id}/meta.json"]
    assert bucket.writes(f"runs/{run.id}/meta.json") == 1


def test_the_same_op_is_the_same_run_and_not_that_of_another_agent(ada, bob, bucket):
    assert ada.run("train", op="night").id == ada.run("train", op="night").id == "night"
    assert bucket.writes("runs/night/meta.json") == 1
    refused(tracecraft.Conflict, bob.run, "train", op="night")


def test_what_exit_9_prints_finds_the_run_that_began(bucket):
    ada = agent_on(bucket, "ada", deadline=0.2)
    ada.store.fault("lose")
    ada.store.fault("dead", "GET", times=9)
    op = refused(tracecraft.Unknown, ada.run, "train").details["op"]
    ada.store.forget()
    run = ada.run("train", op=op)
    assert bucket.under("runs/") == [f"runs/{run.id}/meta.json"]
    assert (run.fresh, run.id) == (False, op.partition("@")[0])


def test_points_of_several_writers_are_merged_by_step_then_time(ada, bob, bucket):
    run = ada.run("train")
    for agent, step, loss in ((ada, 3, 30), (bob, 1, 10), (ada, 2, 20), (bob, 2, 21)):
        agent.runs.log_once(run.id, t.check_point(
            {"step": step, "loss": loss}, tracecraft.iso(bucket.clock_at)))
        pass_time(bucket, 1)
    bob.runs.log_once(run.id, {"at": "", "loss": 99})
    assert losses(ada, run.id) == [10, 20, 21, 30, 99]
    view = bob.runs.show(run.id)["metrics"]["loss"]
    assert (view["last"], view["min"], view["max"], view["count"]) == (99, 10, 99, 5)


def test_a_run_that_ended_takes_notes_but_no_metrics(ada, bob):
    run = ada.run("train")
    run.end("failed")
    error = refused(tracecraft.Conflict, bob.runs.open, run.id)
    assert error.details["status"] == "failed" and run.id in error.message
    assert bob.runs.note(run.id, "why")["status"] == "failed"
    refused(tracecraft.NotFound, bob.runs.open, "nothing")
    refused(tracecraft.NotFound, bob.runs.end, "nothing")
    refused(tracecraft.Usage, bob.runs.end, run.id, "done")


@pytest.mark.parametrize("error, status", [
    (None, "complete"), (ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_a_run_as_a_block_ends_as_the_block_does(ada, bucket, error, status):
    try:
        with ada.run("train") as run:
            run.log({"train/loss": 0.3}, step=1)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert bucket.doc(f"runs/{run.id}/meta.json")["status"] == status
    assert [p["train/loss"] for p in ada.runs.points(run.id)] == [0.3]


def test_numbers_of_other_libraries_are_logged_and_other_objects_refused(ada):
    class Scalar:
        def __float__(self):
            return 0.25
    with ada.run("train") as run:
        run.log(loss=Scalar())
        for bad in (object(), "x", True, None):
            refused(tracecraft.Usage, run.log, loss=bad)
    assert losses(ada, run.id) == [0.25]


class Renaming(tracecraft.Points):
    """Sends a part whose answer was lost under a new name."""

    def _send(self):
        key, data, count = self._part
        self._part = (key.replace("ada_", f"ada_{os.urandom(2).hex()}"), data, count)
        super()._send()


class Hopeful(tracecraft.Points):
    """Takes a part as stored once it was sent."""

    def _send(self):
        try:
            super()._send()
        except tracecraft.Error:
            self._part, self.stored = None, self.stored + self._part[2]


class OneName(tracecraft.Points):
    """Gives the parts of all writers names that are not their own."""

    def _next(self):
        if self._part is None and self._lines:
            self.name_part(f"runs/{self.run}/metrics/1_{self.stored}_x.jsonl")
        return self._part


def metric_faults(writer, seed):
    """Two writers on a store that fails; what is wrong with the points afterwards."""
    dice, bucket = random.Random(seed), MemoryStore()
    agents = [agent_on(bucket, name, deadline=0.02) for name in ("ada", "bob")]
    logged, acknowledged = 0, set()
    for agent in agents:
        agent.points = writer(agent.ledger, agent.agent, "r", pause=0)
        agent.sent = []
    for _ in range(12):
        agent = dice.choice(agents)
        for kind in dice.choices(("ok", "lose", "drop", "late", "twice", "down"), k=3):
            agent.store.fault(kind)
        if dice.random() < 0.3:
            agent.store.fault("dead", "HEAD")
        agent.points.add({"step": logged, "n": logged})
        agent.sent.append(logged)
        logged += 1
        settle_points(agent, acknowledged)
    for agent in agents:
        agent.store.forget()
        settle_points(agent, acknowledged)
    found = stored_numbers(bucket)
    return [f"{n}: {found[n]} times" for n in range(logged)
            if found[n] > 1 or (found[n] == 0 and n in acknowledged)]


def settle_points(agent, acknowledged):
    """One flush; what it acknowledges is noted."""
    try:
        agent.points.flush()
    except tracecraft.Error:
        return
    acknowledged.update(agent.sent)


def stored_numbers(bucket):
    return collections.Counter(
        point["n"] for key in bucket.under("runs/r/metrics/")
        for point in t.points_of(bucket.shared.objects[key][0])[0])


def test_no_acknowledged_metric_is_lost_and_none_is_there_twice():
    assert [metric_faults(tracecraft.Points, seed) for seed in range(40)] == [[]] * 40
    for broken in (Renaming, Hopeful, OneName):
        assert any(metric_faults(broken, seed) for seed in range(40)), broken


class Hasty(tracecraft.Points):
    """Forgets when it sent last."""

    def _next(self):
        self._sent_at = -1e9
        return super()._next()


def pauses(writer, ada):
    """Seconds that three flushes in a row take."""
    points, began = writer(ada.ledger, "ada", "r"), time.monotonic()
    for n in range(3):
        points.add({"n": n})
        points.flush()
    return time.monotonic() - began


def test_a_writer_makes_one_put_a_second(ada):
    assert pauses(tracecraft.Points, ada) >= 2 * tracecraft.PART_PAUSE
    assert pauses(Hasty, ada) < 1


def test_a_hundred_thousand_points_are_few_parts_and_few_puts(ada, bucket):
    run, began = ada.run("train"), time.monotonic()
    for step in range(100_000):
        run.points.add({"step": step, "at": "", "loss": step})
        assert run.points._size <= tracecraft.PART_BYTES + 100
    run.end()
    puts = sum(method == "PUT" for method, _ in ada.store.counts.elements())
    assert puts <= 3 + time.monotonic() - began
    began = time.monotonic()
    view = ada.runs.show(run.id)
    assert (view["points"], view["metrics"]["loss"]["last"]) == (100_000, 99_999)
    assert len(view["metrics"]["loss"]["curve"]) <= 40
    assert time.monotonic() - began < SLOW


def test_what_trickles_in_is_stored_within_seconds_without_a_flush(ada, bucket):
    run = ada.run("train")
    run.log(loss=1)
    until = time.monotonic() + SLOW
    while not bucket.under(f"runs/{run.id}/metrics/"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert run.points.waiting == 0
    run.end()
    assert losses(ada, run.id) == [1]


def test_a_store_that_is_away_for_a_while_loses_no_point(bucket):
    ada = agent_on(bucket, "ada", deadline=0.1)
    with ada.run("train") as run:
        ada.store.fault("down", times=5)
        run.log(loss=1)
        time.sleep(1.5)
        run.log(loss=2)
        ada.store.forget()
    assert losses(ada, run.id) == [1, 2]


def test_points_that_could_not_be_stored_are_told_and_counted(bucket):
    ada = agent_on(bucket, "ada", deadline=0.1)
    run = ada.run("train")
    run.points.add({"at": "", "loss": 1})
    ada.store.fault("down", key="metrics", times=99)
    refused(tracecraft.Unavailable, run.end)
    doc = bucket.doc(f"runs/{run.id}/meta.json")
    assert (doc["status"], doc["lost_points"]) == ("complete", 1)


def test_a_full_buffer_counts_what_it_cannot_take_while_the_store_is_away(bucket):
    ada = agent_on(bucket, "ada", deadline=0.05)
    points = t.Points(ada.ledger, "ada", "r", pause=0)
    ada.store.fault("down", times=10**4)
    line = {"x" * 200: 1}
    while points.lost < 5:
        points.offer(line)
    taken = points.waiting
    assert taken * 200 >= tracecraft.PART_BYTES
    ada.store.forget()
    points.flush()
    assert (points.stored, points.waiting) == (taken, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_does_not_send_what_its_parent_holds(ada):
    points = t.Points(ada.ledger, "ada", "r")
    points.add({"n": 1})
    child = os.fork()
    if not child:
        points.start()
        os._exit(points.waiting)
    assert (os.waitpid(child, 0)[1], points.waiting) == (0, 1)


def test_a_run_that_gives_no_sign_of_life_reads_as_stale(ada, bob, bucket):
    run = ada.run("train")
    pass_time(bucket, tracecraft.STALE_AFTER - 2)
    assert bob.runs.list()[0][0]["status"] == "running"
    pass_time(bucket, 4)
    [row] = bob.runs.list()[0]
    assert (row["status"], bob.runs.show(run.id)["status"]) == ("stale", "stale")
    assert row["quiet_s"] > tracecraft.STALE_AFTER
    for sign in (lambda: ada.runs.log_once(run.id, {"at": "", "loss": 1}),
                 lambda: ada.runs.beat(run.id), lambda: bob.runs.note(run.id, "x")):
        sign()
        assert bob.runs.list()[0][0]["status"] == "running"
        assert bob.runs.show(run.id)["status"] == "running"
        pass_time(bucket, tracecraft.STALE_AFTER + 2)
    run.end()
    assert bob.runs.list(status="complete")[0][0]["id"] == run.id


def test_a_writer_without_points_shows_that_it_is_alive_now_and_then(ada):
    beats, began = [], time.monotonic()
    points = t.Points(ada.ledger, "ada", "r", pause=0.01,
                      beat=lambda: beats.append(time.monotonic() - began))
    points.start()
    while len(beats) < 2 and time.monotonic() - began < SLOW:
        time.sleep(0.01)
    points.close()
    assert beats[0] > 0.6 and beats[1] - beats[0] > 0.6
    assert ada.store.requests == 0


def test_a_sign_of_life_does_not_revive_a_run_that_ended(ada, bucket):
    run = ada.run("train")
    run.end("failed")
    before = bucket.doc(f"runs/{run.id}/meta.json")
    ada.runs.beat(run.id)
    assert bucket.doc(f"runs/{run.id}/meta.json") == before


def test_runs_are_listed_newest_first_by_tag_agent_and_status(ada, bob, bucket):
    ids = []
    for at in range(5):
        agent = (ada, bob)[at % 2]
        ids.insert(0, agent.run(f"r{at}", tags=["odd"] if at % 2 else []).id)
        pass_time(bucket, 1)
    ada.runs.end(ids[0])

    def listed(**how):
        rows, truncated = ada.runs.list(**how)
        return [row["id"] for row in rows], truncated
    assert listed() == (ids, False) and listed(limit=2) == (ids[:2], True)
    assert listed(tag="odd") == listed(by="bob") == ([ids[1], ids[3]], False)
    assert listed(status="complete") == (ids[:1], False)
    assert listed(status="failed") == ([], False)


def test_the_newest_of_many_runs_are_found_without_reading_all(ada, bucket):
    for n in range(200):
        bucket.place(f"runs/20260101{n:06d}-r-00000000/meta.json",
                     {"agent": "x", "status": "complete", "started_at": f"2026-{n:03}"})
    bucket.place("runs/named/meta.json", {"agent": "x", "status": "complete",
                                          "started_at": "2026-1985"})
    cost = spent(ada, ada.runs.list, limit=5)
    assert cost.pop("LIST runs/") == 1 and sum(cost.values()) <= 33
    assert [row["id"][8:14] for row in ada.runs.list(limit=3)[0]] == [
        "000199", "", "000198"]


def test_an_artifact_of_a_run_is_noted_with_its_digest_once(ada, bob, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    run = ada.run("train")
    made = [run.artifact(str(path)) for _ in range(2)][0]
    assert made["name"] == f"runs/{run.id}/model.bin"
    assert made["sha256"] == hashlib.sha256(b"weights").hexdigest()
    [noted] = bob.runs.show(run.id)["artifacts"]
    assert noted["sha256"] == made["sha256"]
    path.write_bytes(b"others")
    refused(tracecraft.Conflict, run.artifact, str(path))
    run.artifact(str(path), overwrite=True)
    assert len(bob.runs.show(run.id)["artifacts"]) == 2
    refused(tracecraft.NotFound, bob.runs.artifact, "nothing", str(path))


@pytest.mark.parametrize("field, value", [
    ("params", [1]), ("tags", 3), ("git", "x"), ("cmd", 3), ("started_at", {}),
    ("notes", "x"), ("notes", [1, {}]), ("artifacts", [None, {}]), ("status", []),
    ("agent", 4), ("ended_at", "x"), ("host", {"a": 1}), ("exit_code", "x")])
def test_a_damaged_record_of_a_run_is_shown_as_far_as_it_goes(ada, bucket, field, value):
    run = ada.run("train")
    doc = bucket.doc(f"runs/{run.id}/meta.json")
    bucket.place(f"runs/{run.id}/meta.json", {**doc, field: value})
    view = ada.runs.show(run.id)
    assert t.run_lines(view, plain=True) and ada.runs.list(limit=3)[0]
    t.compare_lines(ada.runs.compare([run.id, run.id]))
    if value == "x" and field == "notes":
        assert refused(tracecraft.Corrupt, ada.runs.note, run.id, "y").exit == 8


def test_lines_in_a_part_that_are_no_points_are_left_out_with_a_warning(ada, bucket):
    run = ada.run("train")
    bucket.place(f"runs/{run.id}/metrics/1_x_y.jsonl",
                 b'{"loss": 1}\n\xff{\n[]\n{"loss": "x", "step": []}\n{"loss": NaN}')
    bucket.place(f"runs/{run.id}/metrics/2_x_y.jsonl", b"x" * (9 << 20))
    bucket.place(f"runs/{run.id}/metrics/readme.txt", b"hello")
    view = ada.runs.show(run.id)
    assert (view["points"], view["metrics"]["loss"]["count"]) == (3, 2)
    assert len(ada.warned) == 2 and "2 lines are no points" in ada.warned[1]


def test_a_record_of_a_run_does_not_grow_without_end(ada, bucket):
    run = ada.run("train")
    doc = bucket.doc(f"runs/{run.id}/meta.json")
    full = {**doc, "notes": [{"text": "x"}] * tracecraft.RUN_ENTRIES}
    bucket.place(f"runs/{run.id}/meta.json", full)
    refused(tracecraft.Conflict, run.note, "y")
    for text in ("", " ", "x" * 9000):
        refused(tracecraft.Usage, run.note, text)


def test_runs_cost_the_requests_that_are_safe(ada, bucket, tmp_path):
    cost = spent(ada, ada.run, "train", op="r")
    meta, parts = "runs/r/meta.json", "runs/r/metrics/"
    assert cost == {f"GET {meta}": 1, f"PUT {meta}": 1}
    fresh = spent(ada, ada.run, "train")
    assert list(fresh.values()) == [1]
    assert spent(ada, ada.runs.log_once, "r", {"at": "", "loss": 1}) == {
        f"GET {meta}": 1, f"PUT {parts}*": 1}
    assert spent(ada, ada.runs.note, "r", "x") == {f"GET {meta}": 1, f"PUT {meta}": 1}
    assert spent(ada, ada.runs.show, "r") == {
        f"GET {meta}": 1, f"LIST {parts}": 1, f"GET {parts}*": 1}
    assert spent(ada, ada.runs.end, "r") == {f"GET {meta}": 1, f"PUT {meta}": 1}
    assert spent(ada, ada.runs.end, "r") == {f"GET {meta}": 1}


def run_r(bucket, ada):
    ada.run("train", op="r")


def holds_one(name, count=1):
    def check(bucket, ada, where):
        assert len(ada.runs.show("r").get(name) or ()) == count, where
    return check


def is_running(bucket, ada, where):
    assert ada.runs.show("r")["status"] == "running", where
    assert bucket.writes("runs/r/meta.json") == 1, where


def is_failed(bucket, ada, where):
    assert [doc["status"] for doc in bucket.history("runs/r/meta.json")] == [
        "running", "failed"], where


def logged_once(bucket, ada, where):
    assert losses(ada, "r") == [0.5], where


RUN_CRASHES = {  # verb: (before, act, what holds after the act was repeated)
    "start": (None, lambda a: a.run("train", op="r"), is_running),
    "log": (run_r, lambda a: a.runs.log_once("r", {"at": "", "loss": 0.5}, op="l1"),
            logged_once),
    "note": (run_r, lambda a: a.runs.note("r", "x", op="n1"), holds_one("notes")),
    "artifact": (run_r, lambda a: a.runs.artifact("r", tracecraft.__file__),
                 holds_one("artifacts")),
    "end": (run_r, lambda a: a.runs.end("r", "failed"), is_failed),
}


@pytest.mark.parametrize("verb", RUN_CRASHES)
def test_a_run_verb_that_crashed_anywhere_can_be_repeated(verb):
    prepare, act, check = RUN_CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        agent_on(bucket, "bob").runs.list()
        act(ada)
        check(bucket, ada, where)
        revs = [doc["rev"] for doc in bucket.history("runs/r/meta.json")]
        assert revs == [*range(1, len(revs) + 1)] and len(revs) <= 2, where
        assert tracecraft.diagnose(ada)["problems"] == [], where
    assert points >= 2


def test_a_writer_that_crashed_in_a_flush_lost_no_more_than_that_flush():
    def act(ada):
        for n in range(2):
            ada.points = t.Points(ada.ledger, "ada", "r")
            ada.points.add({"n": n})
            ada.points.flush()
    for bucket, ada, where in crashes(None, act):
        found = stored_numbers(bucket)
        assert max(found.values(), default=1) == 1, where
        done = where in ("after request 1", "before request 2", "after request 2")
        assert (found[0] == 1) == done, where


def test_two_writers_do_not_hinder_each_other(ada, bob, bucket):
    """Whatever one is about to do, the other's point costs what it costs alone."""
    run = ada.run("train").id
    alone = spent(bob, bob.runs.log_once, run, {"at": "", "loss": 0})
    costs = []

    def meanwhile():
        costs.append(spent(bob, bob.runs.log_once, run, {"at": "", "loss": 1}))
    ada.store.fault("ok", key="metrics", before=meanwhile, after=meanwhile)
    mine = spent(ada, ada.runs.log_once, run, {"at": "", "loss": 2})
    assert costs == [alone, alone] and mine == alone
    assert sorted(losses(ada, run)) == [0, 1, 1, 2]


def test_a_run_is_the_same_on_every_store(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    with ada.run("train", params={"lr": 0.1}) as run:
        for step in range(5):
            bob.runs.log_once(run.id, t.read_pairs(["n=1"], step=step, at="T"))
        run.log(n=2, step=9)
        run.note("half way")
    view = bob.runs.show(run.id)
    assert (view["status"], view["points"], view["parts"]) == ("complete", 6, 6)
    assert view["metrics"]["n"]["last"] == 2
    assert [row["id"] for row in bob.runs.list(tag=None, limit=1)[0]] == [run.id]


# -- as processes ------------------------------------------------------


def test_a_run_is_started_logged_noted_and_shown_without_naming_it(sh):
    run = sh.ok("-q", "run", "start", "train", "--param", "lr=0.1", "--tag",
                "gpu").strip()
    assert sh.ok("run", "log", "loss=0.5", "acc=nan", "--at-step", "10") \
        == f"Logged 1 point to run {run}\n"
    assert sh.ok("run", "note", "it falls") == f"Noted on run {run}: it falls\n"
    out = sh.ok("run", "show", PYTHONIOENCODING="ascii")
    assert "param: lr = 0.1" in out and "loss  0.5 at 10" in out
    assert "1 not finite" in out and "ada: it falls" in out and out.isascii()
    assert "~" in out and "▄" in sh.ok("run", "show", PYTHONIOENCODING="utf-8")
    assert sh.ok("run", "end") == sh.ok("run", "end") == f"Run {run} complete\n"
    assert "has ended already" in sh.refused(3, "run", "end", "--status", "failed")
    assert "takes no more" in sh.refused(3, "run", "log", "loss=1")
    assert sh.ok("run", "list").startswith(f"{run} complete (ada, ")


def test_the_environment_names_the_run_before_local_state_does(sh):
    first = sh.json("run", "start", "a")["id"]
    second = sh.json("run", "start", "b")["id"]
    assert sh.json("run", "log", "x=1", TRACECRAFT_RUN=first)["id"] == first
    assert sh.json("run", "log", "x=1", "--run", second, TRACECRAFT_RUN=first)[
        "id"] == second
    assert sh.json("run", "show")["id"] == second
    assert f"still names run {first}" in sh.run("run", "start",
                                                TRACECRAFT_RUN=first).err
    assert "which run?" in sh.refused(2, "run", "log", "x=1", TRACECRAFT_AGENT="bob")


def test_lines_of_json_become_points_and_bad_ones_are_reported(sh):
    sh.ok("run", "start")
    lines = b'{"step": 1, "loss": 3}\n\n{"step": 2, "loss": 2}\n'
    assert sh.json("run", "log", "-", stdin=lines)["points"] == 2
    done = sh.run("--json", "run", "log", "-", stdin=b'{"loss": 1}\nx\n{"loss": "y"}')
    error = json.loads(done.err)["error"]
    assert (done.returncode, error["bad"], error["stored"]) == (1, 2, 1)
    assert "2 of 3 lines" in error["message"] and "line 2:" in error["message"]
    long = b"{" + b"x" * 200_000 + b"\n" + b'{"loss": 0}\n'
    assert "1 of 2 lines" in sh.refused(1, "run", "log", "-", stdin=long)
    assert [json.loads(line)["loss"] for line in
            sh.ok("run", "show", "--format", "jsonl").splitlines()] == [3, 2, 1, 0]


def test_a_stream_is_stored_while_it_comes_and_a_kill_loses_only_its_end(sh):
    run = sh.json("run", "start")["id"]
    process = subprocess.Popen([*RUN, "run", "log", "-"], cwd=sh.cwd, env=sh.env({}),
                               stdin=subprocess.PIPE)
    process.stdin.write(b'{"step": 1, "loss": 1}\n')
    process.stdin.flush()
    until = time.monotonic() + SLOW
    while not sh.json("run", "show", run)["points"]:
        assert time.monotonic() < until
    process.kill()
    process.communicate()
    assert sh.json("run", "show", run)["metrics"]["loss"]["last"] == 1


def test_points_are_exported_as_csv_in_order(sh):
    sh.ok("run", "start")
    sh.ok("run", "log", "-", stdin=b'{"step": 2, "at": 0, "b,c": 1}\n'
          b'{"step": 1, "at": 0, "a": 2.5}\n')
    at = "1970-01-01T00:00:00.000000+00:00"
    assert sh.ok("run", "show", "--format", "csv") == \
        f'step,at,a,"b,c"\n1,{at},2.5,\n2,{at},,1\n'


def test_runs_are_compared_side_by_side(sh):
    ids = [sh.json("run", "start", "r", "--param", f"lr={n}", "--param", "k=same")["id"]
           for n in (1, 2, 3)]
    for n, run in enumerate(ids):
        sh.ok("run", "log", f"loss={n}", "--run", run)
    out = sh.ok("run", "compare", *ids)
    assert out.splitlines()[0].split() == ["run", *ids] and "same" not in out
    assert "lr      1 " in out and "2 (2 … 2)" in out
    doc = sh.json("run", "compare", *ids[:2], "--metric", "loss")
    assert [one["last"] for one in doc["metrics"]["loss"]] == [0, 1]
    assert "did you mean loss?" in sh.refused(1, "run", "compare", *ids, "--metric",
                                              "los")
    sh.refused(2, "run", "compare", ids[0])


def test_params_come_from_a_file_and_from_words_over_it(sh):
    with open(os.path.join(sh.cwd, "p.json"), "w") as file:
        file.write('{"lr": 1, "opt": {"eps": 2}}')
    doc = sh.json("run", "start", "--params", "p.json", "--param", "lr=0.5")
    assert doc["params"] == {"lr": 0.5, "opt": {"eps": 2}}
    for words in (["--params", "no.json"], ["--param", "lr"], ["--param", "=1"]):
        sh.refused(2, "run", "start", *words)
    sh.refused(2, "run", "start", "--params", "-", stdin=b"[1]")
    sh.refused(2, "run", "start", "--params", "-", stdin=b'{"a": NaN}')


MEASURED = """import json, os, sys
for step in range(3):
    print(json.dumps({"step": step, "loss": 3 - step}), flush=True)
print(json.dumps({"loss": 9}), json.dumps({"step": 4, "loss": "x"}), sep="\\n")
print(os.environ["TRACECRAFT_RUN"], end="")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code, status", [(0, "complete"), (7, "failed")])
def test_a_command_is_measured_passed_through_and_ends_its_run(sh, code, status):
    done = sh.run("run", "start", "m", "--", sys.executable, "-c", MEASURED, str(code))
    assert done.returncode == code
    view = sh.json("run", "list")["items"][0]
    assert done.out.splitlines()[0] == '{"step": 0, "loss": 3}'
    assert done.out.splitlines()[3:] == ['{"loss": 9}', '{"step": 4, "loss": "x"}',
                                         view["id"]]
    assert (view["status"], view["exit_code"], view["cmd"][0]) == (
        status, code, sys.executable)
    metric = sh.json("run", "show", view["id"])["metrics"]["loss"]
    assert (metric["count"], metric["last"]) == (3, 1)
    assert "1 lines with a step were not logged" in done.err


def test_the_points_of_a_command_are_stored_while_it_runs(sh):
    process = sh.start("run", "start", "m", *child(
        "import time; print('{\"step\": 1, \"loss\": 2}', flush=True); time.sleep(60)"))
    process.stdout.readline()
    run, until = sh.json("run", "list")["items"][0]["id"], time.monotonic() + SLOW
    while not sh.json("run", "show", run)["points"]:
        assert time.monotonic() < until
    process.terminate()
    process.communicate(timeout=SLOW)


def test_a_command_may_log_to_its_run_and_end_it(sh):
    code = ("import subprocess as s, sys; tool = [sys.executable, '-m', 'tracecraft',"
            "'run']; s.check_call([*tool, 'log', 'loss=1'], stdout=2);"
            "s.check_call([*tool, 'end', '--status', 'failed'], stdout=2)")
    assert sh.run("run", "start", "m", *child(code)).returncode == 0
    [view] = sh.json("run", "list")["items"]
    assert view["status"] == "failed" and "exit_code" not in view
    assert sh.json("run", "show", view["id"])["points"] == 1


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_a_run_ends_so_and_keeps_its_points(sh, kind):
    process = sh.start("run", "start", "m", *child(
        "import time; print('{\"step\": 1, \"loss\": 2}', flush=True); time.sleep(60)"))
    assert process.stdout.readline() == b'{"step": 1, "loss": 2}\n'
    time.sleep(0.3)
    process.send_signal(kind)
    process.communicate(timeout=SLOW)
    assert process.returncode == 130
    view = sh.json("run", "show", sh.json("run", "list")["items"][0]["id"])
    assert (view["status"], view["points"]) == ("interrupted", 1)


def test_a_reader_that_goes_away_does_not_end_the_measured_command(sh):
    code = ("import time\nfor n in range(30):\n"
            " print('{\"step\": %d, \"loss\": 2}' % n, flush=True); time.sleep(0.02)")
    process = sh.start("run", "start", "m", *child(code))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(SLOW) == 0
    process.stderr.close()
    assert sh.json("run", "show", sh.json("run", "list")["items"][0]["id"])[
        "points"] == 30


def test_a_command_that_is_not_there_starts_no_run(sh):
    before = sh.objects()
    assert "not found" in sh.refused(2, "run", "start", "--", "no-such-command")
    assert sh.objects() == before


def test_a_stream_takes_no_op_and_a_point_repeated_under_one_is_once(sh):
    sh.ok("run", "start")
    for _ in range(2):
        sh.ok("run", "log", "loss=1", "--op", "a1")
    assert sh.json("run", "show")["points"] == 1
    sh.refused(2, "run", "log", "-", "--op", "a1")
    assert sh.json("run", "start", "--op", "mine")["id"] == "mine"


# == Locks and barriers ================================================
#
# Locks, semaphores and barriers of protocol.md 6: what each verb does, its crash points
# and requests, and invariants 1 and 4 under schedules that a seed repeats.

# -- pure: slots, verdicts


@pytest.mark.parametrize("lease, age, state, left", [
    (None, None, "free", None), (record("released", agent=t.NOBODY), 9, "free", None),
    (record(), 10, "held", 95), (record(), 105, "expired", 0),
    (record(ttl=0), 10**6, "held", None), (record(), None, "held", None)])
def test_a_lease_is_shown_as_free_held_or_expired(lease, age, state, left):
    view = t.lease_view(lease, age)
    assert (view["state"], view["expires_in_s"]) == (state, left)
    assert view["holder"] == (None if state == "free" else "a")


def test_only_an_election_has_a_leader_and_only_while_it_is_held():
    assert "leader" not in t.lease_view(record(), 0)
    assert t.lease_view(record(elect=True), 0)["leader"] == "a"
    assert t.lease_view(record(elect=True), 106)["leader"] is None


@pytest.mark.parametrize("k", [1, 2, 3, 7, 50])
def test_every_slot_is_tried_once_and_instances_begin_apart(k):
    orders = [t.slot_order(f"i{n}", k) for n in range(100)]
    assert all(sorted(order) == list(range(k)) for order in orders)
    assert len({order[0] for order in orders}) > k / 2


@pytest.mark.parametrize("key, slot", [
    ("semaphores/g/0.json", 0), ("semaphores/g/12.json", 12), ("semaphores/g/x.json", None),
    ("semaphores/g/config.json", None), ("semaphores/g/12", None), ("s/-1.json", None),
    ("semaphores/g/99999999.json", None), ("semaphores/g/.json", None)])
def test_only_a_number_is_a_slot(key, slot):
    assert t.slot_of(key) == slot


@pytest.mark.parametrize("folder, gen", [("g1", 1), ("g120", 120), ("g", None),
                                         ("g0", None), ("g01", None), ("x1", None),
                                         ("g1x", None), ("", None), ("g" * 12, None)])
def test_only_g_and_a_number_is_a_generation(folder, gen):
    assert t.generation_in(folder) == gen


@pytest.mark.parametrize("arrived", range(5))
def test_a_barrier_opens_with_n_arrivals_and_breaks_only_with_fewer(arrived):
    names = [f"a{n}" for n in range(arrived)]
    verdict = t.verdict_on(names[::-1], 3, broken="late")
    assert verdict["state"] == ("open" if arrived >= 3 else "broken")
    assert verdict["participants"] == names
    assert (t.verdict_on(names, 3) is None) == (arrived < 3)


def test_the_most_slots_there_ever_were_are_remembered():
    config = t.resized({"k": 3, "peak": 3}, 1)
    assert (config["k"], t.most_slots(config)) == (1, 3)
    assert t.most_slots(t.resized(config, 5)) == 5
    assert t.resized(config, 1) is config


# -- locks


def test_a_lock_has_one_holder_until_it_is_released(ada, bob):
    lease = ada.lock("db")
    why = refused(t.Held, bob.lock, "db")
    assert (why.message, lease.token) == ("Lock db is held by ada", 1)
    ada.locks.release("db")
    assert bob.lock("db").token == 2
    assert refused(t.Fenced, ada.locks.extend, "db").exit == 4


def test_a_lock_acquired_again_by_the_same_instance_is_the_same(ada, bucket):
    ada.lock("db")
    again = ada.lock("db")
    assert (again.token, again.fresh, bucket.writes("locks/db.json")) == (1, False, 1)


def test_another_instance_takes_my_lock_only_when_it_says_resume(ada, bucket):
    ada.lock("db")
    twin = agent_on(bucket, "ada", instance="i2")
    assert "--resume" in refused(t.Held, twin.lock, "db").hint
    assert twin.lock("db", resume=True).token == 2
    assert refused(t.Fenced, ada.locks.release, "db").exit == 4


def test_an_expired_lock_is_taken_over_and_its_holder_is_told(ada, bob, bucket):
    ada.lock("db", ttl=30)
    pass_time(bucket, 34)
    assert refused(t.Held, bob.lock, "db").details["expires_in_s"] == 1
    pass_time(bucket, 2)
    assert bob.lock("db").token == 2
    assert any("Lock db" in text for text in mail_texts(ada.inbox()))


def test_a_lock_that_never_expires_is_never_taken_over(ada, bob, bucket):
    ada.lock("db", ttl=0)
    pass_time(bucket, 10**7)
    assert refused(t.Held, bob.lock, "db").details["expires_in_s"] is None


def test_force_releases_a_lock_fences_its_holder_and_tells_it(ada, bob, bucket):
    ada.lock("db")
    assert bob.locks.release("db", force="ada is gone")["token"] == 2
    assert refused(t.Fenced, ada.locks.extend, "db").exit == 4
    assert ["forced: ada is gone" in text for text in mail_texts(ada.inbox())] == [True]
    assert bob.locks.view("db")["state"] == "free" and ada.lock("db").token == 3


def test_a_lock_is_extended_to_another_length(ada, bucket):
    ada.lock("db", ttl=30)
    assert ada.locks.extend("db", ttl=500)["ttl"] == 500
    pass_time(bucket, 400)
    assert ada.locks.view("db")["state"] == "held"


def test_with_gives_a_lock_back_also_after_an_error(ada, bob):
    with pytest.raises(KeyError):
        with ada.lock("db"):
            raise KeyError
    with bob.lock("db") as lease:
        assert lease.token == 2
    assert bob.locks.view("db")["state"] == "free"


def test_waiting_for_a_lock_ends_when_it_is_free_or_with_6(ada, bob):
    ada.lock("db")
    assert refused(t.TimedOut, bob.lock, "db", wait=0.3).exit == 6
    threading.Timer(0.3, ada.locks.release, ["db"]).start()
    assert bob.lock("db", wait=20).token == 2


def test_who_waits_to_be_elected_outlasts_a_store_that_is_down(ada, bob):
    ada.store.fault("dead", "GET", times=2)
    assert refused(t.Unavailable, ada.lock, "db", wait=5).exit == 7
    assert ada.lock("db", wait=5, elect=True).token == 1
    assert bob.locks.view("db")["leader"] == "ada"


def test_checking_in_renews_locks_and_slots_and_names_those_that_are_lost(ada, bob,
                                                                          bucket):
    ada.lock("a"), ada.lock("b"), ada.semaphore("gpu", 1)
    bob.locks.release("b", force="mine")
    pass_time(bucket, 100)
    seen = ada.checkin()
    assert (seen["renewed"], seen["lost"]) == (["lock a", "semaphore gpu/0"], ["lock b"])
    assert ada.locks.view("a")["age_s"] == 0


def test_all_locks_are_listed_and_a_damaged_one_is_warned_of(ada, bucket):
    for name in ("b", "a.py"):
        ada.lock(name)
    bucket.place("locks/x.json", {"token": []})
    assert [view["lock"] for view in ada.locks.all()] == ["a.py", "b"]
    assert ["locks/x.json" in text for text in ada.warned] == [True]


@pytest.mark.parametrize("doc", [{}, {"agent": 3}, b"[1]", b"{", {"agent": None}])
def test_a_damaged_lock_is_reported_by_its_key_and_never_overwritten(ada, bucket, doc):
    bucket.place("locks/db.json", doc)
    before = bucket.shared.objects["locks/db.json"][0]
    for act in (ada.lock, ada.locks.extend, ada.locks.release, ada.locks.view):
        assert "locks/db.json" in refused(t.Corrupt, act, "db").message
    assert bucket.shared.objects["locks/db.json"][0] == before


@pytest.mark.parametrize("name", ["", "a/b", "_x", "..", "a b", "é", "x" * 201])
def test_a_name_that_cannot_be_a_key_is_refused_before_any_request(ada, name):
    for act in (ada.lock, ada.semaphore, ada.barrier, ada.locks.view):
        assert refused(t.Usage, act, name).hint
    assert ada.store.requests == 0


def test_the_token_passed_on_is_of_the_inner_of_a_step_and_a_lock(tmp_path):
    def lent(**environ):
        environ = {"HOME": str(tmp_path), "TRACECRAFT_TOKEN": "3", **environ}
        return t.load_settings({}, environ, str(tmp_path)).lent()
    assert lent(TRACECRAFT_STEP="S", TRACECRAFT_LOCK="db") == {"lock/db": 3}
    assert lent(TRACECRAFT_STEP="S") == {"step/s": 3}


# -- semaphores


def crowd(bucket, count):
    return [agent_on(bucket, f"a{n}") for n in range(count)]


def test_a_semaphore_admits_its_limit_and_no_more(bucket):
    *some, late = crowd(bucket, 4)
    slots = [agent.semaphore("gpu", 3).doc["slot"] for agent in some]
    assert sorted(slots) == [0, 1, 2]
    why = refused(t.Held, late.semaphore, "gpu")
    assert "is full: 3 hold it" in why.message and why.details["expires_in_s"] > 0
    some[1].semaphores.release("gpu")
    assert late.semaphore("gpu").doc["slot"] == slots[1]


def test_a_slot_acquired_again_is_the_same_also_by_the_next_process(bucket):
    state = LocalState()
    slot = agent_on(bucket, "ada", state=state).semaphore("gpu", 5).doc["slot"]
    again = agent_on(bucket, "ada", state=state).semaphore("gpu")
    assert (again.doc["slot"], again.token, again.fresh) == (slot, 1, False)
    assert bucket.writes(f"semaphores/gpu/{slot}.json") == 1


def test_an_instance_without_local_state_finds_its_slot_by_its_name(bucket):
    for _ in range(3):
        agent_on(bucket, "ada", instance="me", explicit=True).semaphore("gpu", 5)
    assert len(bucket.under("semaphores/gpu/")) == 2


def test_an_extra_slot_of_mine_is_given_back_when_it_is_seen(bucket, ada):
    ada.semaphore("gpu", 3)
    mine = bucket.under("semaphores/gpu/")[0]
    for slot in range(3):
        bucket.place(f"semaphores/gpu/{slot}.json", bucket.doc(mine))
    agent_on(bucket, "ada", explicit=True).semaphore("gpu")
    assert ada.semaphores.view("gpu")["held"] == 1


def test_the_limit_is_fixed_at_creation_and_only_resize_changes_it(ada, bob):
    assert refused(t.NotFound, ada.semaphore, "gpu").exit == 1
    ada.semaphore("gpu", 2)
    why = refused(t.Conflict, bob.semaphore, "gpu", 3)
    assert why.message == "Semaphore gpu has --limit 2, not 3" and "resize" in why.hint
    assert bob.semaphores.resize("gpu", 3)["k"] == 3
    assert bob.semaphore("gpu", 3).token == 1
    assert refused(t.NotFound, ada.semaphores.resize, "none", 3).exit == 1


@pytest.mark.parametrize("limit", [0, -1, 1001, 1.5, True, "3"])
def test_a_limit_that_is_no_number_of_slots_is_refused(ada, limit):
    assert "whole number" in refused(t.Usage, ada.semaphore, "gpu", limit).message
    assert ada.store.requests == 0


@pytest.mark.parametrize("doc", [{}, {"k": 0}, {"k": "3"}, {"k": -2}, {"k": None}, b"["])
def test_a_damaged_config_is_reported_by_its_key(ada, bucket, doc):
    bucket.place("semaphores/gpu/config.json", doc)
    for act in (lambda: ada.semaphore("gpu", 3), lambda: ada.semaphores.view("gpu"),
                lambda: ada.semaphores.resize("gpu", 2)):
        assert "semaphores/gpu/config.json" in refused(t.Corrupt, act).message
    assert ada.semaphores.all() == [] and ada.warned


def test_a_damaged_slot_costs_one_place_and_a_warning(ada, bob, bucket):
    ada.semaphore("gpu", 2)
    [free] = {0, 1} - {view["slot"] for view in ada.semaphores.view("gpu")["slots"]}
    bucket.place(f"semaphores/gpu/{free}.json", {"agent": 7})
    assert "is full: 1 hold it" in refused(t.Held, bob.semaphore, "gpu").message
    assert "does not say who holds it" in bob.warned[0]


def test_holders_beyond_a_shrunk_limit_finish_and_nobody_comes_before_that(bucket):
    agents = crowd(bucket, 4)
    for agent in agents[:3]:
        agent.semaphore("gpu", 3)
    late = agents[3]
    late.semaphores.resize("gpu", 1)
    by_slot = {agent.semaphore("gpu").doc["slot"]: agent for agent in agents[:3]}
    assert [view["draining"] for view in late.semaphores.view("gpu")["slots"]] == [
        False, True, True]
    by_slot[0].semaphores.release("gpu")
    refused(t.Held, late.semaphore, "gpu")  # slot 0 is free; 1 and 2 are still at it
    for slot in (2, 1):
        by_slot[slot].semaphores.extend("gpu")
        by_slot[slot].semaphores.release("gpu")
    assert late.semaphore("gpu").doc["slot"] == 0
    refused(t.Held, by_slot[1].semaphore, "gpu")


def test_a_shrink_while_a_slot_is_being_won_sends_its_winner_back(bucket):
    ada, bob, eve = crowd(bucket, 3)
    ada.semaphore("gpu", 2)
    [free] = {0, 1} - {view["slot"] for view in ada.semaphores.view("gpu")["slots"]}
    bob.store.fault("ok", "PUT", f"gpu/{free}.json",
                    after=lambda: eve.semaphores.resize("gpu", 1))
    refused(t.Held, bob.semaphore, "gpu")
    assert [view["holder"] for view in eve.semaphores.view("gpu")["slots"]] == ["a0"]


def test_a_slot_of_which_it_is_not_known_that_it_may_be_kept_is_not_extended(bucket):
    state = LocalState()
    ada = agent_on(bucket, "ada", state=state)
    ada.store.fault("crash-before", "GET", "config.json")
    ada.store.fault("ok", "GET", "config.json")
    ada.store.faults.reverse()  # the second reading of the config, after the slot is won
    with pytest.raises(Crash):
        ada.semaphore("gpu", 1)
    ada = agent_on(bucket, "ada", state=state)
    assert "acquire it again" in refused(t.Conflict, ada.semaphores.extend, "gpu").hint
    assert ada.semaphore("gpu").fresh is False
    assert ada.semaphores.extend("gpu")["token"] == 1


def test_a_slot_can_be_taken_away_by_force(ada, bob):
    slot = ada.semaphore("gpu", 1).doc["slot"]
    assert "--slot" in refused(t.Usage, bob.semaphores.release, "gpu", force="x").hint
    assert bob.semaphores.release("gpu", slot=slot, force="hangs")["token"] == 2
    assert refused(t.Fenced, ada.semaphores.extend, "gpu").exit == 4


def test_a_token_alone_finds_the_slot_it_is_of(ada, bucket):
    ada.semaphore("gpu", 3)
    there = agent_on(bucket, "ada", instance="other")
    refused(t.Conflict, there.semaphores.release, "gpu")
    assert there.semaphores.release("gpu", token=1)["state"] == "released"


# -- barriers


def test_nobody_passes_a_barrier_before_all_have_arrived(bucket):
    agents = crowd(bucket, 3)
    for agent in agents[:2]:
        assert agent.barrier("p", 3).arrive()["verdict"] is None
        why = refused(t.TimedOut, agent.barrier("p").verdict, 0)
        assert why.exit == 6 and "of 3 have arrived" in why.message
    assert agents[2].barrier("p").arrive()["verdict"] == "open"
    for agent in agents:
        assert agent.barrier("p").verdict(0)["participants"] == ["a0", "a1", "a2"]


def test_a_barrier_waits_until_the_last_has_come(ada, bob):
    threading.Timer(0.4, lambda: bob.barrier("p").arrive()).start()
    assert ada.barrier("p", 2).wait(20)["verdict"] == "open"


def test_arriving_twice_is_arriving_once_while_the_barrier_is_shut(ada, bucket):
    twin = agent_on(bucket, "ada", instance="i2")
    for agent in (ada, ada, twin):
        assert agent.barrier("p", 2).arrive()["arrived"] == ["ada"]
    assert bucket.writes("barriers/p/g1/arrive/ada") == 1


def test_after_the_verdict_the_next_generation_begins(ada, bob):
    for gen in (1, 2, 3):
        ada.barrier("p", 2).arrive()
        assert bob.barrier("p", 2).wait(5)["gen"] == gen
        assert ada.barrier("p").verdict(5)["gen"] == gen
    assert ada.barrier("p").status(gen=2)["verdict"] == "open"


@pytest.mark.parametrize("how", [{"gen": 1}, {"op": "o1"}])
def test_a_late_repetition_that_says_which_one_does_not_begin_the_next(ada, bob, how):
    ada.barrier("p", 2).arrive(**({} if "gen" in how else how))
    bob.barrier("p", 2).arrive()
    assert ada.barrier("p", 2).arrive(**how)["gen"] == 1
    assert ada.barrier("p", 2).arrive()["gen"] == 2


def test_each_generation_may_have_its_own_count_but_only_one(ada, bob):
    ada.barrier("p", 1).arrive()
    ada.barrier("p", 2).arrive()
    why = refused(t.Conflict, bob.barrier("p", 3).arrive)
    assert "generation 2, has --count 2, not 3" in why.message
    assert refused(t.NotFound, bob.barrier("q").arrive).exit == 1


def test_a_barrier_is_broken_for_everybody_or_for_nobody(ada, bob, bucket):
    ada.barrier("p", 2).arrive()
    why = refused(t.Blocked, ada.barrier("p").verdict, 0, break_=True)
    assert why.exit == 5 and "ada waited 0s" in why.message
    refused(t.Blocked, bob.barrier("p").verdict, 5, gen=1)
    assert bob.barrier("p", 2).arrive()["gen"] == 2
    assert bucket.writes("barriers/p/g1/verdict.json") == 1


def test_breaking_a_barrier_that_is_complete_opens_it(ada, bob, bucket):
    ada.barrier("p", 2).arrive()
    bob.store.fault("crash-before", "PUT", "verdict.json")
    with pytest.raises(Crash):
        bob.barrier("p").arrive()
    assert ada.barrier("p").verdict(0, break_=True)["verdict"] == "open"


def test_of_open_and_broken_at_once_one_wins_and_both_see_it(ada, bob, bucket):
    ada.barrier("p", 2).arrive()
    ada.store.fault("ok", "PUT", "verdict.json",
                    before=lambda: bob.barrier("p").arrive())
    assert ada.barrier("p").verdict(0, break_=True)["verdict"] == "open"
    assert bucket.writes("barriers/p/g1/verdict.json") == 1


def test_who_comes_after_the_verdict_goes_to_the_next_generation(ada, bob, bucket):
    ada.barrier("p", 1)
    eve = agent_on(bucket, "eve")
    bob.barrier("p", 2).arrive()
    ada.store.fault("ok", "PUT", "arrive/ada", before=lambda: eve.barrier("p").arrive())
    view = ada.barrier("p", 2).arrive()
    assert (view["gen"], view["verdict"]) == (2, None)
    assert bob.barrier("p").status(gen=1)["participants"] == ["bob", "eve"]


@pytest.mark.parametrize("leaf, doc", [
    ("config.json", {}), ("config.json", {"n": 0}), ("config.json", b"{"),
    ("verdict.json", {}), ("verdict.json", {"state": 3}), ("verdict.json", b"[]")])
def test_a_damaged_barrier_is_reported_by_its_key(ada, bucket, leaf, doc):
    bucket.place(f"barriers/p/g1/{leaf}", doc)
    for act in (ada.barrier("p", 2).status,
                lambda: ada.barrier("p", 2).arrive(gen=1)):
        assert leaf in refused(t.Corrupt, act).message


def test_a_barrier_that_is_not_there_is_not_found_and_can_be_waited_for(ada, bob):
    assert refused(t.NotFound, ada.barrier("p").status).exit == 1
    threading.Timer(0.3, lambda: bob.barrier("p", 1).arrive()).start()
    assert ada.barrier("p").verdict(20)["gen"] == 1


# -- requests


def test_a_lock_costs_two_requests_to_take_and_two_to_give_back(ada, bob):
    key = "locks/db.json"
    both = {f"GET {key}": 1, f"PUT {key}": 1}
    assert spent(ada, ada.lock, "db") == both
    assert spent(ada, ada.locks.extend, "db") == both
    assert spent(bob, bob.lock, "db") == {f"GET {key}": 1}
    assert spent(ada, ada.locks.release, "db") == both


def test_a_slot_costs_at_most_four_requests_to_take_and_two_to_give_back(ada, bob):
    config = "semaphores/gpu/config.json"
    cost = spent(ada, ada.semaphore, "gpu", 1)  # it makes the semaphore
    assert cost == {f"GET {config}": 2, f"PUT {config}": 1, "PUT semaphores/gpu/0.json": 1}
    both = {"GET semaphores/gpu/0.json": 1, "PUT semaphores/gpu/0.json": 1}
    assert spent(ada, ada.semaphores.extend, "gpu") == both
    assert spent(ada, ada.semaphores.release, "gpu") == both
    assert spent(ada, ada.semaphore, "gpu") == {f"GET {config}": 2, **both}
    assert spent(bob, bob.semaphore, "gpu") == {
        f"GET {config}": 1, "LIST semaphores/gpu/": 1, "GET semaphores/gpu/0.json": 1}
    bob.semaphores.resize("gpu", 9)
    cost = spent(bob, bob.semaphore, "gpu")
    assert sum(cost.values()) == 4 and cost["LIST semaphores/gpu/"] == 1


def test_a_barrier_costs_few_requests_to_arrive_and_one_for_each_look(ada, bob):
    folder = "barriers/p/g1/"
    assert spent(ada, ada.barrier("p", 2).arrive) == {
        "LIST barriers/p/": 1, f"PUT {folder}config.json": 1,
        f"PUT {folder}arrive/ada": 1, f"LIST {folder}": 1}
    assert spent(bob, bob.barrier("p", 2).arrive) == {
        "LIST barriers/p/": 1, f"LIST {folder}": 2, f"GET {folder}config.json": 1,
        f"PUT {folder}arrive/bob": 1, f"PUT {folder}verdict.json": 1}
    seen = {"gen": 1, "verdict": None, "arrived": [], "n": 2}
    assert spent(ada, ada.barrier("p").verdict, 5, seen=seen) == {
        f"GET {folder}verdict.json": 1}


# -- crash points


def lock_is(state, token):
    def check(bucket, ada, where):
        doc = bucket.doc("locks/db.json")
        assert (t.state_of(doc), doc["token"]) == (state, token), where
    return check


def slots_held(*holders):
    def check(bucket, ada, where):
        views = ada.semaphores.view("gpu")["slots"]
        assert sorted(view["holder"] for view in views) == list(holders), where
    return check


def limit_is(k):
    def check(bucket, ada, where):
        assert ada.semaphores.view("gpu")["limit"] == k, where
    return check


def verdict_is(state, gen=1):
    def check(bucket, ada, where):
        doc = bucket.doc(f"barriers/p/g{gen}/verdict.json")
        assert (doc and doc["state"]) == state, where
        assert not bucket.under(f"barriers/p/g{gen + 1}/"), where
    return check


def broken_by(agent):
    with contextlib.suppress(t.Blocked):
        agent.barrier("p").verdict(0, gen=1, break_=True)


LOCK_CRASHES = {  # verb: (before, act, what holds after the act was repeated)
    "lock acquire": (None, lambda a: a.lock("db"), lock_is("in_progress", 1)),
    "lock takeover": (
        lambda b, a: (agent_on(b, "eve").lock("db"), pass_time(b)),
        lambda a: a.lock("db"), lock_is("in_progress", 2)),
    "lock extend": (lambda b, a: a.lock("db"), lambda a: a.locks.extend("db", ttl=9),
                    lock_is("in_progress", 1)),
    "lock release": (lambda b, a: a.lock("db"), lambda a: a.locks.release("db"),
                     lock_is("released", 1)),
    "lock force": (lambda b, a: agent_on(b, "eve").lock("db"),
                   lambda a: a.locks.release("db", force="x"), lock_is("released", 2)),
    "semaphore acquire": (None, lambda a: a.semaphore("gpu", 2), slots_held("ada")),
    "semaphore acquire beside another": (
        lambda b, a: agent_on(b, "eve").semaphore("gpu", 2),
        lambda a: a.semaphore("gpu"), slots_held("ada", "eve")),
    "semaphore takeover": (
        lambda b, a: (agent_on(b, "eve").semaphore("gpu", 1), pass_time(b)),
        lambda a: a.semaphore("gpu"), slots_held("ada")),
    "semaphore acquire after a shrink": (
        lambda b, a: (agent_on(b, "eve").semaphore("gpu", 3),
                      agent_on(b, "eve").semaphores.resize("gpu", 2)),
        lambda a: a.semaphore("gpu"), slots_held("ada", "eve")),
    "semaphore extend": (lambda b, a: a.semaphore("gpu", 2),
                         lambda a: a.semaphores.extend("gpu"), slots_held("ada")),
    "semaphore release": (lambda b, a: a.semaphore("gpu", 2),
                          lambda a: a.semaphores.release("gpu"), slots_held()),
    "semaphore resize": (lambda b, a: a.semaphore("gpu", 2),
                         lambda a: a.semaphores.resize("gpu", 1, op="o"), limit_is(1)),
    "barrier arrive": (None, lambda a: a.barrier("p", 2).arrive(), verdict_is(None)),
    "barrier arrive last": (
        lambda b, a: agent_on(b, "eve").barrier("p", 2).arrive(),
        lambda a: a.barrier("p").arrive(op="o"), verdict_is("open")),
    "barrier break": (lambda b, a: a.barrier("p", 2).arrive(), broken_by,
                      verdict_is("broken")),
}


@pytest.mark.parametrize("verb", LOCK_CRASHES)
def test_a_verb_of_locks_that_crashed_anywhere_can_be_repeated(verb):
    """Invariant 6 of protocol.md 11."""
    prepare, act, check = LOCK_CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        assert t.diagnose(agent_on(bucket, "bob"))["ok"], where
        act(ada)
        check(bucket, ada, where)
        assert lease_faults(bucket) == [], where
    assert points >= 4


@pytest.mark.parametrize("verb", [verb for verb in LOCK_CRASHES if "barrier" not in verb])
def test_after_a_crash_of_a_verb_of_locks_others_go_on(verb):
    prepare, act, _ = LOCK_CRASHES[verb]
    for bucket, _, where in crashes(prepare, act):
        pass_time(bucket)
        bob = agent_on(bucket, "bob")
        if "semaphore" in verb:
            limit = None if bucket.under("semaphores/") else 2
            assert bob.semaphore("gpu", limit).fresh, where
        else:
            assert bob.lock("db").fresh, where
        assert lease_faults(bucket) == [], where


# -- invariants 1 and 4 under any schedule


def lease_faults(bucket):
    """What step_faults finds, in the records of locks and slots."""
    return step_faults(bucket, of=lambda key: key.startswith("locks/") or
                       t.slot_of(key) is not None)


class Turns:
    """Lets one request at a time through, its sender chosen by dice among all who are
    at work: a seed is a schedule, and it can be had again."""

    def __init__(self, seed, workers):
        self.dice, self.ready = random.Random(seed), threading.Condition()
        self.workers, self.asking, self.turn = set(range(workers)), set(), None
        self.here = threading.local()

    def gate(self):
        me = getattr(self.here, "number", None)
        if me is None:  # a thread of read_many: its starter has the turn
            return
        with self.ready:
            self.asking.add(me)
            self._choose()
            self.ready.wait_for(lambda: self.turn == me)
            self.turn = None
            self.asking.discard(me)

    def _choose(self):
        if self.turn is None and self.asking and self.asking == self.workers:
            self.turn = self.dice.choice(sorted(self.asking))
            self.ready.notify_all()

    def run(self, act):
        """The acts act(0), act(1), ... in threads, each ending when it returns."""
        def work(number):
            self.here.number = number
            try:
                act(number)
            finally:
                with self.ready:
                    self.workers.discard(number)
                    self._choose()
        run_all([lambda n=n: work(n) for n in sorted(self.workers)])


class Competitor:
    """One agent of a random run of locks and semaphores; it dies and comes back."""

    def __init__(self, run, number):
        self.run, self.number, self.state = run, number, LocalState()
        self.dice = random.Random(f"{run.seed} {number}")
        self.start()

    def start(self):
        run = self.run
        self.agent = agent_on(run.bucket, f"a{self.number}", state=self.state,
                              ledger=run.ledger)
        self.agent.store.gate = run.turns.gate
        self.agent.store.chaos = (self.dice, run.faults)
        self.agent.semaphores = run.kind(self.agent.ledger, self.agent.who,
                                         self.agent._tell)

    def act(self):
        """One verb at random, and what it was told."""
        verb = self.dice.choice(self.run.verbs)
        began = len(self.run.bucket.log)
        try:
            getattr(self, verb)(began)
        except Crash:
            self.start()
        except t.Error:
            pass
        if self.dice.random() < 0.1:
            self.run.bucket.clock_at += self.dice.choice((10, 20, 40))

    def take(self, began):
        lease = self.agent.semaphore("gpu", self.run.first_k or None, ttl=30)
        self.run.told.append((began, len(self.run.bucket.log), lease.key, lease.token,
                              self.number, self.run.bucket.clock_at))

    def give(self, began):
        self.agent.semaphores.release("gpu")

    def extend(self, began):
        self.agent.semaphores.extend("gpu")

    def resize(self, began):
        self.run.first_k = 0
        self.agent.semaphores.resize("gpu", self.dice.randint(1, 3))

    def lock(self, began):
        lease = self.agent.lock("db", ttl=30)
        self.run.told.append((began, len(self.run.bucket.log), lease.key, lease.token,
                              self.number, self.run.bucket.clock_at))

    def unlock(self, began):
        self.agent.locks.release("db")


SLOT_VERBS = ("take",) * 4 + ("give",) * 2 + ("extend", "resize")
LOCK_VERBS = ("lock",) * 3 + ("unlock",)


class Contest:
    """A random run, and what was wrong with it."""

    def __init__(self, seed, *, kind=tracecraft.Semaphores, ledger=tracecraft.Ledger,
                 verbs=SLOT_VERBS, faults=0.0, agents=3, rounds=8):
        self.seed, self.kind, self.ledger, self.verbs = seed, kind, ledger, verbs
        self.faults, self.bucket, self.told = faults, MemoryStore(), []
        self.turns, self.first_k = Turns(seed, agents), 3
        players = [Competitor(self, number) for number in range(agents)]
        self.turns.run(lambda number: [players[number].act() for _ in range(rounds)])

    def wrong(self):
        """Invariants 1 and 4 of protocol.md 11, as far as agents were told."""
        return lease_faults(self.bucket) + self._winners() + self._crowded()

    def _winners(self):
        given, wrong = {}, []
        for _, _, key, token, who, _ in self.told:
            if given.setdefault((key, token), who) != who:
                wrong.append(f"{key} token {token}: {given[key, token]} and {who}")
            if not any((doc["token"], doc["agent"]) == (token, f"a{who}")
                       for doc in self.bucket.history(key)):
                wrong.append(f"{key} token {token}: told, but never written")
        return wrong

    def _crowded(self):
        """Who was admitted while others were certainly there: at most the limit that
        was in force meanwhile, and one slot for each."""
        wrong, known = [], set()
        for at, (began, ended, key, token, who, clock) in enumerate(self.told):
            fresh = (key, token) not in known
            known.add((key, token))
            if "semaphores" not in key or not fresh:
                continue
            others = {(k, n): w for _, end, k, n, w, _ in self.told[:at]
                      if end <= began and k != key and self._live(k, n, ended, clock)}
            if len(others) + 1 > self._limit(began, ended):
                wrong.append(f"{who} is admitted to {key} beside {sorted(others)}")
            mine = [k for k, doc in self._held(ended, clock).items()
                    if doc["agent"] == f"a{who}" and k != key and t.slot_of(k) is not None]
            wrong += [f"{who} has {key} and {k}" for k in mine]
        return wrong

    def _live(self, key, token, index, clock):
        doc = self._held(index, clock).get(key)
        return doc is not None and doc["token"] == token

    def _held(self, index, clock):
        """{key: record} of the leases that somebody held at that time."""
        last = {key: (json.loads(body), at) for key, body, at, _ in
                self.bucket.log[:index]}
        return {key: doc for key, (doc, at) in last.items() if "ttl" in doc and
                t.state_of(doc) == "in_progress" and clock - at < doc["ttl"]}

    def _limit(self, began, ended):
        docs = [(at, json.loads(body)["k"]) for at, (name, body, *_) in
                enumerate(self.bucket.log[:ended]) if name.endswith("config.json")]
        return max([k for at, k in docs if at >= began]
                   + [k for at, k in docs if at < began][-1:])


@pytest.mark.parametrize("faults", [0.0, 0.1])
def test_no_schedule_admits_more_than_the_limit(faults):
    """Invariant 4: live holders are at most k, and after a shrink never more again."""
    seed = random.randrange(10**9)
    for number in range(seed, seed + 40):
        assert Contest(number, faults=faults).wrong() == [], number


def test_no_schedule_gives_a_lock_to_two():
    """Invariant 1 for locks, with lost answers and crashes."""
    seed = random.randrange(10**9)
    for number in range(seed, seed + 20):
        contest = Contest(number, verbs=LOCK_VERBS, faults=0.2)
        assert contest.told and contest.wrong() == [], number


class ConfigReadOnce(tracecraft.Semaphores):
    """Does not look at the config again once a slot is won."""

    def _room(self, name):
        return t.MAX_SLOTS, []


class SlotNumberOnly(tracecraft.Semaphores):
    """Compares the slot with the limit, and forgets who is still beyond it."""

    def _room(self, name):
        return super()._room(name)[0], []


class SlotForgotten(tracecraft.Semaphores):
    """Does not record the slot locally before it is used."""

    def _note(self, name, slot, token):
        if token:
            super()._note(name, slot, token)


class NeverSure(tracecraft.Semaphores):
    """Believes a slot that a crash left in doubt to be its own."""

    def _is_sure(self, name, lease):
        return lease.get("slot") == self._recall(name).get("slot")


@pytest.mark.parametrize("kind", [ConfigReadOnce, SlotNumberOnly, SlotForgotten,
                                  NeverSure])
def test_a_broken_semaphore_is_caught(kind):
    assert any(Contest(seed, kind=kind, faults=0.1 * (seed % 2), rounds=12).wrong()
               for seed in range(150)), kind


@pytest.mark.parametrize("ledger", ["Believing", "CheckThenPut", "DeletingLedger",
                                    "TokenReset", "OwnClock"])
def test_a_broken_ledger_gives_a_lock_twice_and_is_caught(ledger):
    assert any(Contest(seed, ledger=globals()[ledger], verbs=LOCK_VERBS, faults=0.3,
                       rounds=12).wrong() for seed in range(40)), ledger


class Meeting:
    """Agents that meet at a barrier under one schedule, and what was wrong with it.

    breaks: how many of them break it when it is not open at once.
    """

    def __init__(self, seed, *, kind=tracecraft.Barrier, agents=3, n=3, gens=2,
                 breaks=1, faults=0.0):
        self.seed, self.kind, self.n, self.gens = seed, kind, n, gens
        self.breaks, self.faults = breaks, faults
        self.bucket, self.told, self.arrived = MemoryStore(), [], collections.Counter()
        self.turns = Turns(seed, agents)
        self.turns.run(self._attend)

    def _attend(self, number):
        dice, state = random.Random(f"{self.seed} {number}"), LocalState()
        for gen in range(1, self.gens + 1):
            for _ in range(20):
                agent = agent_on(self.bucket, f"a{number}", state=state)
                agent.store.gate = self.turns.gate
                agent.store.chaos = (dice, self.faults)
                try:
                    self._visit(agent, number, gen)
                    break
                except (Crash, t.Unknown, t.Unavailable):
                    continue

    def _visit(self, agent, number, gen):
        barrier = self.kind(agent.ledger, agent.who, "p", self.n)
        seen = barrier.arrive(gen=gen)
        self.arrived[gen] += 1
        try:
            view = barrier.verdict(0, seen=seen, break_=number < self.breaks)
        except t.Blocked:
            view = barrier.status(gen=gen)
        except t.TimedOut:
            return
        self.told.append((gen, view["verdict"], tuple(view["participants"]),
                          len(self.bucket.log)))

    def wrong(self):
        """Invariant 4: nobody passes before n arrivals, all see one verdict."""
        wrong = []
        for gen in range(1, self.gens + 1):
            told = {facts[1:3] for facts in self.told if facts[0] == gen}
            if len(told) > 1 or self.bucket.writes(f"barriers/p/g{gen}/verdict.json") > 1:
                wrong.append(f"generation {gen} has {len(told)} verdicts")
            if self.arrived[gen] >= self.n and not self.bucket.doc(
                    f"barriers/p/g{gen}/verdict.json"):
                wrong.append(f"generation {gen}: all are there, and it is shut")
        return wrong + self._early()

    def _early(self):
        """Who passed before n arrivals of that generation were durable."""
        wrong = []
        for gen, verdict, participants, index in self.told:
            there = {key for key, *_ in self.bucket.log[:index]
                     if key.startswith(f"barriers/p/g{gen}/arrive/")}
            if verdict == "open" and min(len(there), len(participants)) < self.n:
                wrong.append(f"passed generation {gen} after {len(there)} arrivals")
        return wrong


@pytest.mark.parametrize("faults", [0.0, 0.15])
@pytest.mark.parametrize("breaks", [0, 1, 2])
def test_no_schedule_opens_a_barrier_early_or_for_some(faults, breaks):
    seed = random.randrange(10**9)
    for number in range(seed, seed + 25):
        meeting = Meeting(number, faults=faults, breaks=breaks)
        assert meeting.wrong() == [], number


class Overwriting(tracecraft.Barrier):
    """Writes its verdict over whatever verdict is there."""

    def _judge(self, gen, doc):
        self.ledger.put(self._key(gen, "verdict.json"), doc)
        return doc


class StaleListing(tracecraft.Barrier):
    """Counts the arrivals that it listed before its own."""

    def _names(self, gen):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(gen, super()._names(gen))


class OtherGenerations(tracecraft.Barrier):
    """Counts arrivals at any generation."""

    def _names(self, gen):
        names = super()._names(gen)
        keys = [entry.key for entry in self.ledger.list(f"barriers/{self.name}/").entries]
        return names | {f"arrive/{key.split('/')[2]}{key.split('/')[4]}"
                        for key in keys if "/arrive/" in key}


class CountBeforeArriving(tracecraft.Barrier):
    """Opens before its own arrival is written."""

    def _create(self, gen, leaf, names, *, op):
        if len([name for name in names if "arrive/" in name]) == self.count - 1:
            self._judge(gen, {"state": "open", "n": self.count, "participants": ["?"] * 3})
        super()._create(gen, leaf, names, op=op)


@pytest.mark.parametrize("kind", [Overwriting, StaleListing, OtherGenerations,
                                  CountBeforeArriving])
def test_a_broken_barrier_is_caught(kind):
    assert any(Meeting(seed, kind=kind, breaks=seed % 3).wrong()
               for seed in range(60)), kind


def test_locks_semaphores_and_barriers_work_on_every_store(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    got = together(*[lambda p=p: p.lock("db") for p in (ada, bob)])
    assert sorted(type(one).__name__ for one in got) == ["Held", "Lease"]
    slots = together(*[lambda p=p: p.semaphore("gpu", 2) for p in (ada, bob)])
    assert sorted(lease.doc["slot"] for lease in slots) == [0, 1]
    met = together(*[lambda p=p: p.barrier("p", 2).wait(30) for p in (ada, bob)])
    assert [view["participants"] for view in met] == [["ada", "bob"]] * 2


# -- commands


def test_a_lock_goes_from_hand_to_hand(sh):
    assert sh.ok("lock", "acquire", "db") == "Acquired lock db as ada (token 1)\n"
    assert "Lock db is held by ada" in sh.refused(3, "lock", "acquire", "db",
                                                  TRACECRAFT_AGENT="bob")
    assert "db: held by ada, token 1" in sh.ok("lock", "status")
    assert sh.ok("lock", "extend", "db", "--ttl", "60") == "Extended lock db for 60s\n"
    sh.ok("lock", "release", "db", "--force", "--reason", "ill", TRACECRAFT_AGENT="bob")
    assert "fenced" in sh.refused(4, "lock", "release", "db")
    view = sh.json("lock", "status", "db")
    assert (view["lock"], view["state"], view["token"]) == ("db", "free", 2)
    assert sh.ok("lock", "status", "other") == "other: free\n"


def test_a_command_under_a_lock_sees_it_and_lends_its_exit_code(sh):
    out = sh.run("lock", "run", "db", *child(
        "import os; print([os.environ['TRACECRAFT_' + n] for n in ('LOCK', 'TOKEN',"
        "'PROJECT', 'AGENT')]); raise SystemExit(7)"))
    assert (out.returncode, out.out) == (7, "['db', '1', 'work', 'ada']\n")
    assert sh.json("lock", "status", "db")["state"] == "free"


def test_a_command_may_give_back_its_own_lock(sh):
    assert sh.run("lock", "run", "db", *tool("lock", "release", "db")).returncode == 0


def test_inside_a_step_and_a_lock_both_can_be_ended(sh):
    inner = shlex.join(["lock", "run", "db", *tool("lock", "extend", "db")])
    both = f"{shlex.join(tool(*shlex.split(inner))[1:])} && " + shlex.join(
        tool("complete", "s", "--note", "inside")[1:])
    assert sh.run("claim", "s", "--", "sh", "-c", both).returncode == 0
    assert sh.json("handoff", "s")["note"] == "inside"


def test_a_command_whose_lock_was_taken_is_ended_with_4(sh):
    process = sh.start("lock", "run", "db", "--ttl", "3",
                       *child("import time; print(1, flush=True); time.sleep(60)"))
    assert process.stdout.readline() == b"1\n"
    sh.ok("lock", "release", "db", "--force", TRACECRAFT_AGENT="bob")
    _, err = process.communicate(timeout=SLOW)
    assert process.returncode == 4 and b"Lock db: the lease was lost" in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("words", [("lock", "run", "x"),
                                   ("semaphore", "run", "x", "--limit", "1"),
                                   ("lock", "run", "x", "--elect")])
def test_terminated_a_command_ends_and_what_it_held_is_free(sh, words):
    process = sh.start(*words, *child("import time; print(1, flush=True);"
                                      "time.sleep(60)"))
    assert process.stdout.readline() == b"1\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SLOW)
    assert process.returncode == 130
    view = sh.json(words[0], "status", "x")
    assert view.get("state", "free") == "free" and view.get("held", 0) == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_command_starts_ends_it(kind):
    lease = SimpleNamespace(doc={"ttl": 30}, renew=lambda: os.kill(os.getpid(), kind))
    with pytest.raises(KeyboardInterrupt):
        t.run_under(lease, ["sleep", "60"], dict(os.environ), subject="Lock x",
                    asked=time.monotonic() - 60)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_leader_that_lost_its_lock_competes_again(sh):
    code = ("import os, time; print(os.environ['TRACECRAFT_TOKEN'], flush=True);"
            "time.sleep(0 if os.environ['TRACECRAFT_TOKEN'] == '3' else 60);"
            "raise SystemExit(5)")
    process = sh.start("lock", "run", "boss", "--elect", "--ttl", "3", *child(code))
    assert process.stdout.readline() == b"1\n"
    assert sh.json("lock", "status", "boss")["leader"] == "ada"
    assert "boss: leader ada, token 1" in sh.ok("lock", "status")
    sh.ok("lock", "release", "boss", "--force", TRACECRAFT_AGENT="bob")
    out, err = process.communicate(timeout=SLOW)
    assert (out, process.returncode) == (b"3\n", 5) and b"competing again" in err


def test_when_a_leader_dies_the_next_one_leads_after_its_lease(sh):
    code = "import time; print(1, flush=True); time.sleep({})"
    first = sh.start("lock", "run", "boss", "--elect", "--ttl", "1",
                     *child(code.format(60)))
    assert first.stdout.readline() == b"1\n"
    assert sh.run("lock", "run", "boss", "--elect", "--wait", "0.5", *child("1"),
                  TRACECRAFT_AGENT="bob").returncode == 6
    second = sh.start("lock", "run", "boss", "--elect", *child(code.format(0)),
                      TRACECRAFT_AGENT="bob")
    first.kill()
    out, err = second.communicate(timeout=SLOW)
    assert (out, second.returncode) == (b"1\n", 0) and b"Leader of lock boss as bob" in err


def test_a_semaphore_from_the_command_line(sh):
    sh.environ["TRACECRAFT_TTL"] = "600"
    assert sh.ok("semaphore", "acquire", "gpu", "--limit", "1") \
        == "Acquired slot 0 of semaphore gpu as ada (token 1)\n"
    assert "is full" in sh.refused(3, "semaphore", "acquire", "gpu",
                                   TRACECRAFT_AGENT="bob")
    sh.refused(3, "semaphore", "acquire", "gpu", "--limit", "2")
    assert sh.ok("semaphore", "resize", "gpu", "2") == "Semaphore gpu has 2 slots\n"
    out = sh.ok("semaphore", "run", "gpu", *child(
        "import os; print(os.environ['TRACECRAFT_SEMAPHORE'],"
        "os.environ['TRACECRAFT_SLOT'])"), TRACECRAFT_AGENT="bob")
    assert out == "gpu 1\n"
    assert sh.ok("semaphore", "status").startswith("gpu: 1 of 2 held\n  slot 0: ada,")
    assert sh.ok("semaphore", "extend", "gpu") \
        == "Extended slot 0 of semaphore gpu for 600s\n"
    assert sh.ok("semaphore", "release", "gpu") == "Released slot 0 of semaphore gpu\n"
    assert sh.json("semaphore", "status", "gpu")["slots"] == []
    sh.refused(1, "semaphore", "status", "none")


def test_a_barrier_from_the_command_line(sh):
    line = "Barrier p, generation 1: {}, 2 of 2 arrived\n"
    assert sh.ok("barrier", "arrive", "p", "--count", "2") \
        == "Barrier p, generation 1: 1 of 2 arrived: ada\n"
    assert "1 of 2 have arrived" in sh.refused(6, "barrier", "wait", "p", "--wait", "0.2")
    assert sh.ok("barrier", "arrive", "p", "--wait", "5", TRACECRAFT_AGENT="bob") \
        == line.format("open")
    assert sh.ok("barrier", "wait", "p") == line.format("open")
    assert "is broken" in sh.refused(5, "barrier", "arrive", "p", "--count", "2",
                                     "--wait", "0.2", "--break")
    assert sh.json("barrier", "status", "p")["verdict"] == "broken"
    sh.refused(1, "barrier", "status", "none")


@pytest.mark.parametrize("words", [
    ("lock", "run", "db"), ("lock", "run", "db", "--"), ("semaphore", "run", "gpu"),
    ("lock", "acquire", "a/b"), ("lock", "acquire", "db", "--ttl", "-1"),
    ("semaphore", "acquire", "gpu", "--limit", "0"),
    ("semaphore", "release", "gpu", "--slot", "-1"),
    ("barrier", "arrive", "p", "--count", "0"), ("barrier", "wait", "p", "--gen", "0"),
    ("barrier", "arrive", "p", "--count", "2", "--wait", "nan")])
def test_a_call_that_cannot_be_meant_is_refused_and_writes_nothing(sh, words):
    before = sh.objects()
    assert sh.refused(2, *words).count("\n") == 2
    assert sh.objects() == before


# == Requests per command ==============================================
#
# What a command costs once verdict and local state are warm (protocol.md 1.7).


def spent(project, act, *args, **how):
    """The requests of one act, as {"METHOD key": times}."""
    project.store.counts.clear()
    try:
        act(*args, **how)
    except tracecraft.Error:
        pass
    return project.store.asked()


def test_a_claim_of_a_free_step_costs_two_requests(ada):
    assert spent(ada, ada.claim, "s") == {"LIST steps/s/": 1, f"PUT {CLAIM}": 1}


def test_a_refused_claim_costs_two_requests(ada, bob):
    ada.claim("s")
    assert spent(bob, bob.claim, "s") == {"LIST steps/s/": 1, f"GET {CLAIM}": 1}


def test_a_claim_with_a_need_costs_its_spec_and_the_need(ada, bob):
    ada.add_step("s", needs=["a"])
    ada.complete("a")
    assert spent(bob, bob.claim, "s") == {
        "LIST steps/s/": 1, "GET steps/s/spec.json": 1, "GET steps/a/claim.json": 1,
        f"PUT {CLAIM}": 1}


def test_completing_costs_two_requests_the_projections_and_who_waits_for_it(ada):
    ada.claim("s")
    assert spent(ada, ada.complete, "s") == {
        f"GET {CLAIM}": 1, f"PUT {CLAIM}": 1, f"GET {STATUS}": 1,
        f"PUT {HANDOFF}": 1, f"PUT {STATUS}": 1, "LIST dependents/s/": 1}


def test_releasing_costs_two_requests_the_projection_and_a_ready_marker(ada):
    ada.claim("s")
    assert spent(ada, ada.release, "s") == {
        f"GET {CLAIM}": 1, f"PUT {CLAIM}": 1, f"GET {STATUS}": 1, f"PUT {STATUS}": 1,
        "GET steps/s/spec.json": 1, "PUT ready/05/s.2": 1}


def test_renewing_costs_two_requests_and_a_look_for_acts_of_02(ada):
    ada.claim("s")
    assert spent(ada, ada.renew, "s") == {f"GET {CLAIM}": 1, f"GET {STATUS}": 1,
                                          f"PUT {CLAIM}": 1}


def test_a_takeover_costs_a_claim_its_projection_and_a_notice(ada, bob, bucket):
    ada.claim("s")
    pass_time(bucket)
    assert spent(bob, bob.claim, "s") == {
        "LIST steps/s/": 1, f"GET {CLAIM}": 1, f"PUT {CLAIM}": 1, f"PUT {STATUS}": 1,
        "PUT messages/ada/*": 1}


def test_sending_costs_one_request_and_a_listing_the_first_time(ada, bob):
    bob.heartbeat()
    assert spent(ada, ada.send, "bob", "1") == {"LIST agents/": 1,
                                                "PUT messages/bob/*": 1}
    assert spent(ada, ada.send, "bob", "2") == {"PUT messages/bob/*": 1}


def test_looking_for_new_mail_when_there_is_none_costs_two_listings(ada, bob):
    nothing = {"LIST messages/bob/": 1, "LIST messages/_broadcast/": 1}
    assert spent(bob, read_new, bob) == nothing
    ada.send("bob", "1")
    ada.send("_broadcast", "2")
    read_new(bob)
    assert spent(bob, read_new, bob) == nothing


def test_reading_one_new_message_costs_the_message_and_the_cursor(ada, bob):
    for _ in range(2):
        ada.send("bob", "1")
        cost = spent(bob, read_new, bob)
    assert cost == {"LIST messages/bob/": 1, "LIST messages/_broadcast/": 1,
                    "GET messages/bob/*": 1, "PUT messages/bob/_cursor.json": 1}


def test_memory_costs_one_request_to_read_and_three_to_write(ada):
    write = {"GET memory/a/b.json": 1, "PUT memory/_history/a/b/*": 1,
             "PUT memory/a/b.json": 1}
    for act in (ada.memory.set, ada.memory.append):
        assert spent(ada, act, "a.b", "v") == write
    assert spent(ada, ada.memory.get, "a.b") == {"GET memory/a/b.json": 1}


def test_listing_memory_costs_a_listing_and_its_documents(ada):
    for n in range(3):
        ada.memory.set(f"a.k{n}", "v")
    cost = spent(ada, ada.memory.list, "a.")
    assert cost == {"LIST memory/a/": 1, **{f"GET memory/a/k{n}.json": 1
                                            for n in range(3)}}


def test_a_heartbeat_costs_one_request_once_it_is_known(ada):
    assert spent(ada, ada.heartbeat) == {"GET agents/ada.json": 1,
                                         "PUT agents/ada.json": 1}
    assert spent(ada, ada.heartbeat) == {"PUT agents/ada.json": 1}


def test_acknowledging_costs_a_listing_and_a_create(ada, bob):
    sent = ada.send("bob", "x")
    cost = spent(bob, bob.ack, sent["id"])
    assert cost["PUT messages/bob/_acks/*"] == 1 and sum(cost.values()) <= 3


def test_who_am_i_costs_nothing(ada):
    ada.claim("s")
    assert spent(ada, ada.whoami) == {}
    assert ada.whoami()["holds"] == {"step/s": {"token": 1, "ttl": tracecraft.TTL}}


def test_a_round_of_waiting_costs_a_listing_and_what_changed(ada, bob):
    ada.complete("s")
    bob.store.counts.clear()
    with pytest.raises(tracecraft.TimedOut):
        bob.wait_for(["s", "t"], timeout=0.5)
    rounds = bob.store.counts["LIST", "steps/s/"]
    assert rounds >= 2 and bob.store.counts["LIST", "steps/t/"] == rounds
    assert (bob.store.counts["GET", CLAIM], bob.store.counts["GET", STATUS]) == (1, 0)


def test_the_status_of_a_large_project_is_at_most_ten_listings(ada, bucket):
    for n in range(500):
        bucket.place(f"steps/s{n}/spec.json", {"title": "t"})
    for n in range(100):
        bucket.place(f"agents/a{n}.json", {"id": f"a{n}"})
    cost = spent(ada, tracecraft.gather_status, ada)
    listings = sum(n for what, n in cost.items() if what.startswith("LIST"))
    assert listings <= 10 and not any("claim.json" in what for what in cost)


# == Crash points ======================================================
#
# Every mutating verb ends before and after each of its requests; then the same verb
# again, the next verb by a second agent, and the readers must cope. Invariant 6.


def crash_step(bucket, ada, state="in_progress"):
    """A step of ada's in some state, before the verb that crashes."""
    ada.claim("s")
    if state != "in_progress":
        ada.complete("s", state=state, note="first")


CRASHES = {  # verb: (what was there before, the act; what it leaves when it was done)
    "claim": (None, lambda a: a.claim("s"), "in_progress"),
    "claim with op": (None, lambda a: a.claim("s", op="c1"), "in_progress"),
    "claim with needs": (
        lambda b, a: (a.add_step("s", needs=["n"]), a.complete("n")),
        lambda a: a.claim("s"), "in_progress"),
    "renew": (crash_step, lambda a: a.renew("s"), "in_progress"),
    "claim again, renewing": (
        lambda b, a: (a.claim("s"), pass_time(b, tracecraft.TTL - 9)),
        lambda a: a.claim("s"), "in_progress"),
    "release": (crash_step, lambda a: a.release("s"), "released"),
    "complete": (crash_step, lambda a: a.complete("s", note="n"), "complete"),
    "complete unclaimed": (None, lambda a: a.complete("s", note="n"), "complete"),
    "fail": (crash_step, lambda a: a.complete("s", state="failed"), "failed"),
    "review": (crash_step, lambda a: a.complete("s", state="needs_review"),
               "needs_review"),
    "approve": (lambda b, a: crash_step(b, a, "needs_review"),
                lambda a: a.approve("s"), "complete"),
    "reject": (lambda b, a: crash_step(b, a, "needs_review"),
               lambda a: a.reject("s"), "released"),
    "reopen": (lambda b, a: crash_step(b, a, "complete"),
               lambda a: a.claim("s", reopen=True), "in_progress"),
    "takeover": (
        lambda b, a: (agent_on(b, "eve").claim("s"), pass_time(b)),
        lambda a: a.claim("s"), "in_progress"),
    "last attempt": (
        lambda b, a: (a.add_step("s", max_attempts=1), agent_on(b, "eve").claim("s"),
                      pass_time(b)),
        lambda a: a.claim("s"), "failed"),
    "force": (lambda b, a: agent_on(b, "eve").claim("s"),
              lambda a: a.complete("s", force="gone"), "complete"),
    "resume": (lambda b, a: agent_on(b, "ada", instance="old").claim("s"),
               lambda a: a.claim("s", resume=True), "in_progress"),
    "adopt": (lambda b, a: b.place(STATUS, {"status": "complete", "agent": "eve"}),
              lambda a: a.claim("s", reopen=True), "in_progress"),
    "fold": (lambda b, a: (a.claim("s"), b.place(HANDOFF, {"from_agent": "eve"})),
             lambda a: a.complete("s"), "complete"),
}
# A second try may be told that the first one had done it.
DONE_ALREADY = {"approve": tracecraft.Conflict, "reject": tracecraft.Conflict,
                "last attempt": tracecraft.Conflict}


def crashes(prepare, act):
    """Run `act` once for each point at which it can end; yield what is left each time.

    (bucket, the agent's next process with the local state it had, "before put 3").
    """
    number, when = 1, "before"
    while True:
        bucket, state = MemoryStore(), LocalState()
        ada = agent_on(bucket, "ada", state=state)
        if prepare:
            prepare(bucket, ada)
        pass_time(bucket, 1)
        ada.store.forget()
        ada.store.crash_at = (number, when)
        try:
            act(ada)
            crashed = False
        except Crash:
            crashed = True
        except tracecraft.Conflict:
            crashed = False
        if not crashed:
            return
        yield bucket, agent_on(bucket, "ada", state=state), f"{when} request {number}"
        number, when = (number, "after") if when == "before" else (number + 1, "before")


def step_faults(bucket, of=lambda key: key.endswith("/claim.json")):
    """What invariants 1 and 3 of protocol.md 11 forbid, found in the log. of: whether a
    key is one of the leases that are meant."""
    wrong, last = chain_faults(bucket), {}
    for key, body, at, _ in bucket.log:
        if not of(key):
            continue
        old = last.get(key)
        if body is None:
            wrong.append(f"{key}: deleted")
            continue
        doc = json.loads(body)
        last[key] = {**doc, "written": at}
        if old:
            wrong += _move_faults(key, old, doc, at)
    return wrong


def _move_faults(key, old, doc, at):
    """Why a claim may not go from `old` to `doc`, both as they were stored."""
    token, was = tracecraft.token_of(doc), tracecraft.token_of(old)
    state, before = tracecraft.state_of(doc), tracecraft.state_of(old)
    if token not in (was, was + 1):
        return [f"{key}: token {was} -> {token}"]
    if token == was:
        same = all(doc.get(name) == old.get(name) for name in ("agent", "instance"))
        if state == "in_progress" and (before != "in_progress" or not same):
            return [f"{key}: token {token} given twice"]
        if before in ("complete", "failed", "blocked") and state != before:
            return [f"{key}: {before} -> {state} under one token"]
    why = doc["history"][-1]["why"]
    if token > was and "takeover" in why and at - int(old["written"]) < old["ttl"] + 5:
        return [f"{key}: taken over after {at - old['written']:.0f} s"]
    return []


def projections_behind(bucket):
    """Whether status.json or handoff.json of step s say less than its claim."""
    reader = agent_on(bucket, "reader").ledger
    found = [reader.read(key) for key in (CLAIM, STATUS, HANDOFF)]
    return tracecraft.behind(*(None if r.doc is None else r for r in found))


def look_at_everything(project):
    """The reading views; none of them may stumble over what a crash left."""
    project.step_status("s")
    project.agents()
    project.memory.list()
    project.inbox()
    project.whoami()
    tracecraft.gather_status(project)


@pytest.mark.parametrize("verb", CRASHES)
def test_a_step_verb_that_crashed_anywhere_can_be_repeated(verb):
    prepare, act, state = CRASHES[verb]
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        look_at_everything(ada)
        try:
            act(ada)
        except DONE_ALREADY.get(verb, ()):
            pass
        claim = bucket.doc(CLAIM)
        assert tracecraft.state_of(claim) == state, where
        assert step_faults(bucket) == [], where
    assert points >= 4


@pytest.mark.parametrize("verb", CRASHES)
def test_after_a_crash_of_a_step_verb_a_second_agent_goes_on(verb):
    prepare, act, _ = CRASHES[verb]
    for bucket, ada, where in crashes(prepare, act):
        bob = agent_on(bucket, "bob")
        pass_time(bucket)
        if bob.step_status("s")["state"] == "needs_review":
            bob.reject("s")
        reopen = bob.step_status("s")["state"] in tracecraft.ENDED
        try:
            bob.claim("s", reopen=reopen)
        except tracecraft.Conflict:
            assert verb == "last attempt" and bob.step_status("s")["state"] == "failed"
            bob.claim("s", reopen=True)
        assert bob.complete("s", note="bob's")["agent"] == "bob", where
        for late in (ada.renew, ada.release):
            with pytest.raises((tracecraft.Fenced, tracecraft.Conflict)):
                late("s")
        assert not projections_behind(bucket), where
        assert bucket.doc(HANDOFF)["note"] == "bob's", where
        assert step_faults(bucket) == [], where
        look_at_everything(bob)


@pytest.mark.parametrize("verb", ["release", "complete", "fail", "review", "reopen",
                                  "takeover", "force", "fold", "adopt"])
def test_the_same_verb_again_brings_the_projections_up_to_date(verb):
    """Otherwise an 0.2 client would see the old state until somebody runs doctor."""
    prepare, act, _ = CRASHES[verb]
    for bucket, ada, where in crashes(prepare, act):
        act(ada)
        assert not projections_behind(bucket), where


@pytest.mark.parametrize("verb", CRASHES)
def test_doctor_mends_what_a_crashed_step_verb_left(verb):
    prepare, act, _ = CRASHES[verb]
    for bucket, ada, where in crashes(prepare, act):
        assert tracecraft.diagnose(ada, fix=True)["ok"], where
        after = tracecraft.diagnose(ada)
        assert (after["ok"], after["problems"]) == (True, []), where
        assert step_faults(bucket) == [], where
        look_at_everything(ada)


def memory_is(key, value):
    def check(bucket, ada, where):
        assert ada.memory.get(key)["value"] == value, where
        assert ada.memory.history(key)[-1]["value"] == value, where
        assert chain_faults(bucket) == [], where
    return check


def memory_gone(bucket, ada, where):
    refused(tracecraft.NotFound, ada.memory.get, "k")


def mail_is(*texts):
    def check(bucket, ada, where):
        assert mail_texts(agent_on(bucket, "bob").inbox()) == list(texts), where
    return check


def memory_holds_70_000(bucket, ada, where):
    assert ada.memory.get("k")["value"] == "v" * 70_000, where


def mail_is_large(bucket, ada, where):
    [message] = agent_on(bucket, "bob").inbox().messages
    assert message["artifacts"][0]["size"] == 9000, where


def acked_once(bucket, ada, where):
    assert len(bucket.under("messages/ada/_acks/")) == 1, where


def spec_is_there(bucket, ada, where):
    assert (bucket.writes("steps/s/spec.json"), ada.step_status("s")["needs"]) == (
        1, ["a"]), where


def is_present(bucket, ada, where):
    assert [row["id"] for row in ada.agents()] == ["ada"], where


OTHER_CRASHES = {  # verb: (before, act, what holds after the act was repeated)
    "memory set": (None, lambda a: a.memory.set("k", "v"), memory_is("k", "v")),
    "memory set with a blob": (None, lambda a: a.memory.set("k", "v" * 70_000),
                               memory_holds_70_000),
    "memory incr": (lambda b, a: a.memory.incr("k", 4),
                    lambda a: a.memory.incr("k", op="o1"), memory_is("k", "5")),
    "memory append": (lambda b, a: a.memory.append("k", "0"),
                      lambda a: a.memory.append("k", "1", op="o1"),
                      memory_is("k", "0\n1")),
    "memory merge": (None, lambda a: a.memory.merge("k", '{"a": 1}', op="o1"),
                     memory_is("k", '{"a": 1}')),
    "memory delete": (lambda b, a: a.memory.set("k", "v"),
                      lambda a: a.memory.delete("k", op="o1"), memory_gone),
    "send": (None, lambda a: a.send("bob", "one", op="m1"), mail_is("one")),
    "send large": (None, lambda a: a.send("bob", "x" * 9000, op="m1"), mail_is_large),
    "ack": (lambda b, a: agent_on(b, "bob").send("ada", "x"),
            lambda a: a.ack(a.inbox().messages[0]["id"]), acked_once),
    "add_step": (None, lambda a: a.add_step("s", needs=["a"]), spec_is_there),
    "heartbeat": (None, lambda a: a.heartbeat(), is_present),
    "leave": (None, lambda a: a.leave(), is_present),
    "init": (None, lambda a: a.init(probe=False), is_present),
}


def repeated_after_crashes(prepare, act, check):
    """The act again, after it ended at each of its requests; the readers cope."""
    points = 0
    for bucket, ada, where in crashes(prepare, act):
        points += 1
        look_at_everything(agent_on(bucket, "bob"))
        act(ada)
        check(bucket, ada, where)
        look_at_everything(ada)
    assert points >= 2


@pytest.mark.parametrize("verb", OTHER_CRASHES)
def test_a_verb_that_crashed_anywhere_can_be_repeated(verb):
    repeated_after_crashes(*OTHER_CRASHES[verb])


def test_a_crash_while_committing_shows_a_message_twice_but_never_not_at_all():
    def prepare(bucket, ada):
        for n in range(3):
            agent_on(bucket, "bob").send("ada", str(n))
    for bucket, ada, where in crashes(prepare, lambda a: a.inbox(new=True).commit()):
        again = read_new(ada)
        landed = bucket.writes("messages/ada/_cursor.json") > 1
        assert again in (["0", "1", "2"], []), where
        assert again or where.startswith("after"), where
        assert landed or again == [] or read_new(ada) == [], where


def test_a_crash_while_checking_in_loses_no_claim_and_no_mail():
    def prepare(bucket, ada):
        ada.claim("s")
        agent_on(bucket, "bob").send("ada", "hi")
    for bucket, ada, where in crashes(prepare, lambda a: a.checkin()):
        seen = ada.checkin()
        assert (seen["renewed"], seen["unread"]) == (["s"], 1), where


# == Channels, threads, pages ==========================================
#
# What mail grew: groups, conversations, waiting for what comes back, signatures, and
# large mailboxes. The read cursor's own rules are tested with the records.


def later(act, seconds=0.2):
    """Let `act` happen while the main thread waits."""
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def read_twice(project):
    return read_new(project), read_new(project)


# -- channels


def test_a_channel_reaches_those_who_joined_and_nobody_else(ada, bob, bucket):
    eve = agent_on(bucket, "eve")
    bob.channels.join("ops")
    ada.channels.join("#ops")
    assert ada.send("#ops", "one")["key"].startswith("messages/_channel.ops/")
    assert (read_twice(bob), read_twice(eve), read_twice(ada)) == (
        (["one"], []), ([], []), ([], []))
    assert bob.inbox().messages[0]["target"] == "#ops"


def test_a_new_member_sees_what_comes_and_with_history_all(ada, bob, bucket):
    eve = agent_on(bucket, "eve")
    ada.send("#ops", "before")
    bob.channels.join("ops")
    eve.channels.join("ops", history=True)
    ada.send("#ops", "after")  # within the second of joining
    assert read_new(bob) == ["after"] and read_new(eve) == ["before", "after"]


def test_joining_and_leaving_twice_is_once(bob, bucket):
    assert [bob.channels.join("ops")["changed"] for _ in "12"] == [True, False]
    assert [bob.channels.leave("ops")["changed"] for _ in "12"] == [True, False]
    assert bucket.writes("messages/bob/_cursor.json") == 2


def test_after_leaving_nothing_comes_and_joining_again_is_from_then(ada, bob):
    bob.channels.join("ops")
    bob.channels.leave("ops")
    ada.send("#ops", "missed")
    assert read_new(bob) == []
    bob.channels.join("ops")
    ada.send("#ops", "heard")
    assert read_new(bob) == ["heard"]


def test_joining_reads_no_direct_mail_away_and_keeps_what_0_2_had_read(bob, bucket):
    old = place_message(bucket, "bob", "old")
    pass_time(bucket, HOUR)
    bucket.place("messages/bob/_cursor.json", {
        "direct": {"watermark": old, "seen": []}, "updated_at": "x"})
    place_message(bucket, "bob", "new", seq=1)
    bob.channels.join("ops")
    assert read_new(bob) == ["new"]


def test_a_cursor_rewritten_by_0_2_keeps_channels_and_shows_nothing_twice(
        ada, bob, bucket):
    bob.channels.join("ops")
    ada.send("#ops", "one")
    assert read_new(bob) == ["one"]
    key = "messages/bob/_cursor.json"
    bucket.place(key, rewritten_by_02(bucket.doc(key)))
    ada.send("#ops", "two")
    assert read_twice(agent_on(bucket, "bob")) == (["two"], [])


def test_the_list_of_channels_counts_members_and_says_where_i_am(ada, bob):
    bob.channels.join("ops")
    ada.channels.join("ops")
    ada.send("#empty", "nobody hears")
    assert bob.channels.list() == [
        {"channel": "empty", "members": [], "joined": False},
        {"channel": "ops", "members": ["ada", "bob"], "joined": True}]


def test_status_counts_unread_channel_mail(ada, bob):
    bob.channels.join("ops")
    ada.send("#ops", "one")
    bob.send("#ops", "my own")
    rows = {row["agent"]: row for row in tracecraft.gather_status(bob)["mailboxes"]}
    assert rows["bob"]["unread"] == 1


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_join_survives_any_trouble(ada, bob, kind):
    bob.store.fault(kind, key="_cursor")
    bob.channels.join("ops", op="j1")
    ada.send("#ops", "one")
    assert read_twice(bob) == (["one"], [])


def test_many_readers_of_a_channel_lose_no_message_while_others_join_and_leave(bucket):
    """Invariant 2 of protocol.md 11."""
    shown = collections.Counter()
    readers = [agent_on(bucket, "bob", instance=f"b{n}") for n in range(2)]
    readers[0].channels.join("ops")

    def send(agent):
        for n in range(12):
            agent.send("#ops", f"{agent.agent}-{n}")

    def read(agent):
        for n in range(8):
            shown.update(read_new(agent, limit=4))
            (agent.channels.join if n % 2 else agent.channels.leave)("other")
            time.sleep(0.005)
    run_all([lambda a=agent_on(bucket, f"s{n}"): send(a) for n in range(2)]
            + [lambda a=a: read(a) for a in readers])
    while rest := read_new(readers[0]):
        shown.update(rest)
    assert set(shown) == {f"s{a}-{n}" for a in range(2) for n in range(12)}


# -- threads and answers


def test_a_reply_joins_the_thread_of_what_it_answers_or_starts_one(ada, bob):
    first = ada.send("bob", "shall we?")
    second = bob.send("ada", "yes", reply_to=first["id"][:8])
    third = ada.send("bob", "when?", reply_to=second["id"])
    assert second["reply_to"] == first["id"] and "thread" not in first
    assert second["thread"] == third["thread"] == first["id"]
    named = ada.send("bob", "news", thread="release")
    assert bob.send("ada", "ok", reply_to=named["id"])["thread"] == "release"
    assert bob.send("ada", "ok", reply_to="unknown")["thread"] == "unknown"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_thread_is_shown_in_order_to_both_sides_from_any_of_its_messages(
        ada, bob, at):
    ids = [ada.send("bob", "0")["id"]]
    bob.send("ada", "unrelated")
    for n, (who, to) in enumerate(((bob, "ada"), (ada, "bob")), 1):
        ids.append(who.send(to, str(n), reply_to=ids[-1])["id"])
    for who in (ada, bob):
        found, cursor = who.threads.thread(ids[at])
        assert ([m["message"] for m in found], cursor) == (["0", "1", "2"], None)
    assert [m["target"] for m in ada.threads.thread(ids[0])[0]] == [
        "to bob", "direct", "to bob"]


def test_a_thread_of_others_is_not_mine_to_see(ada, bob, bucket):
    first = ada.send("bob", "secret", thread="plan")
    eve = agent_on(bucket, "eve")
    for name in ("plan", first["id"]):
        assert refused(tracecraft.NotFound, eve.threads.thread, name).exit == 1


def test_a_thread_comes_in_pages_that_meet(ada, bob):
    for n in range(7):
        ada.send("bob", str(n), thread="long")
        ada.send("bob", "between")
    texts, cursor = [], ""
    while cursor is not None:
        found, cursor = bob.threads.thread("long", limit=3, after=cursor)
        texts += [m["message"] for m in found]
        assert len(found) <= 3
    assert texts == list("0123456")


def test_a_thread_that_began_before_the_message_named_is_shown_whole(ada, bob, bucket):
    ada.send("bob", "early", thread="release")
    pass_time(bucket, 5 * 24 * HOUR)
    late = ada.send("bob", "late", thread="release")
    found, _ = bob.threads.thread(late["id"])
    assert [m["message"] for m in found] == ["early", "late"]


def test_a_question_is_answered_and_other_mail_stays_new(ada, bob):
    def reply():
        asked = bob.inbox().messages[0]
        bob.send("ada", "other", reply_to="f" * 16)
        bob.send("ada", "8080", reply_to=asked["id"][:8])
    timer = later(reply)
    got = ada.ask("bob", "which port?", wait=5)
    timer.join()
    assert (got["message"], got["from"]) == ("8080", "bob")
    assert mail_texts(ada.inbox(new=True)) == ["other", "8080"]
    ada.mail.notice(got)
    assert read_twice(ada) == (["other"], [])


def test_an_answer_in_a_channel_is_found_there(ada, bob):
    bob.channels.join("ops")
    timer = later(lambda: bob.send("#ops", "me", reply_to=bob.inbox().messages[0]["id"]))
    assert ada.ask("#ops", "who deploys?", wait=5)["message"] == "me"
    timer.join()


def test_asking_again_under_one_id_sends_nothing_and_finds_what_came(ada, bob, bucket):
    late = refused(tracecraft.TimedOut, ada.ask, "bob", "port?", wait=0, op="q1")
    assert late.exit == 6 and "--id q1" in late.hint
    bob.send("ada", "80", reply_to=bob.inbox().messages[0]["id"])
    pass_time(bucket, HOUR)
    assert ada.ask("bob", "port?", wait=0, op="q1")["message"] == "80"
    assert mail_texts(bob.inbox()) == ["port?"]


def test_a_question_without_an_id_goes_on_under_the_one_it_was_told(ada, bob):
    late = refused(tracecraft.TimedOut, ada.ask, "bob", "port?", wait=0)
    asked = bob.inbox().messages[0]
    bob.send("ada", "80", reply_to=asked["id"])
    got = ada.ask("bob", "port?", wait=0, op=late.details["id"])
    assert got["reply_to"] == asked["id"] and mail_texts(bob.inbox()) == ["port?"]


def test_another_text_under_the_same_id_is_refused(ada, bob):
    ada.send("bob", "one", op="m1")
    assert refused(tracecraft.Conflict, ada.send, "bob", "two", op="m1").exit == 3
    assert mail_texts(bob.inbox()) == ["one"]


def asked_by_many(bucket):
    """[(what was asked, what came)] of questions whose answers come in any order."""
    bob, rows = agent_on(bucket, "bob"), []
    askers = [agent_on(bucket, "ada", instance=f"a{n}") for n in range(4)]

    def answer():
        asked = {}
        while len(asked) < 4:
            asked = {m["id"]: m["message"] for m in bob.inbox().messages}
        for name in sorted(asked, key=asked.get, reverse=True):
            bob.send("ada", "answer to " + asked[name], reply_to=name)

    def ask(n):
        rows.append((f"q{n}", askers[n].ask("bob", f"q{n}", wait=5)["message"]))
    run_all([lambda n=n: ask(n) for n in range(4)] + [answer])
    return rows


def test_each_question_gets_its_own_answer(bucket):
    rows = asked_by_many(bucket)
    assert len(rows) == 4
    assert all(got == f"answer to {asked}" for asked, got in rows)


def test_an_ask_that_takes_any_reply_is_caught(bucket, monkeypatch):
    """The broken variant of the test before."""
    monkeypatch.setattr(tracecraft, "answers", lambda message, question, agent, signed:
                        message.get("reply_to") and message["from"] != agent)
    assert any(got != f"answer to {asked}" for asked, got in asked_by_many(bucket))


# -- acknowledgements


def test_a_sender_waits_for_the_acknowledgement_of_one_or_of_all_members(
        ada, bob, bucket):
    eve = agent_on(bucket, "eve")
    for agent in (ada, bob, eve):
        agent.channels.join("ops")
    readers = ada.channels.readers("_channel.ops")
    sent = ada.send("#ops", "deploying", ack=True)
    bob.ack(sent["id"])
    late = refused(tracecraft.TimedOut, ada.mail.wait_acks, sent, wait=0,
                   agents=readers)
    assert (readers, late.details["missing"]) == (["bob", "eve"], ["eve"])
    timer = later(lambda: eve.ack(sent["id"]))
    assert ada.mail.wait_acks(sent, wait=5, agents=readers) == ["bob", "eve"]
    timer.join()
    [message], _ = ada.threads.thread(sent["id"])
    assert message["acked_by"] == ["bob", "eve"]


def test_readers_that_nobody_knows_cannot_be_waited_for(ada):
    for box in ("_broadcast", "_channel.nobody"):
        refused(tracecraft.Usage, ada.channels.readers, box)


def test_an_old_message_of_a_large_mailbox_can_be_acknowledged(bob, bucket):
    keys = fill_box(bucket, "bob", 1200, days=9)
    bob.store.page = 1000
    for _ in range(2):
        read_new(bob)
    assert bob.ack(keys[0])["message"] == keys[0]


# -- importance, expiry, attachments


def test_an_expired_message_is_no_news_but_stays_in_the_inbox(ada, bob, bucket):
    ada.send("bob", "soon over", expires_in=60)
    ada.send("bob", "lasting")
    pass_time(bucket, 61)
    assert read_new(bob) == ["lasting"]
    assert mail_texts(bob.inbox()) == ["soon over", "lasting"]


def test_only_expired_mail_is_read_once(ada, bob, bucket):
    ada.send("bob", "over", expires_in=60)
    pass_time(bucket, 61)
    read_new(bob)
    assert "GET messages/bob/*" not in spent(bob, read_new, bob)
    refused(tracecraft.TimedOut, bob.mail.listen)


def test_an_importance_that_is_none_is_refused_before_anything_is_sent(ada, bucket):
    refused(tracecraft.Usage, ada.send, "bob", "x", importance="urgent")
    assert ada.store.requests == 0


def test_attachments_carry_digest_and_size_and_can_be_fetched(ada, bob, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    ada.artifacts.put_bytes("plan.md", b"plan")
    ada.claim("s")
    ada.artifacts.put_bytes("out.csv", b"1,2", step="s")
    ada.send("bob", "see", attach=(str(tmp_path / "a.txt"), "plan.md", "s/out.csv"))
    [message] = bob.inbox().messages
    file, plan, out = message["artifacts"]
    assert (file["size"], plan["size"], out["step"]) == (3, 4, "s")
    path = bob.artifacts.download(file["name"], output=str(tmp_path / "got"))
    with open(path) as got:
        assert got.read() == "abc"
    assert file["sha256"] == tracecraft.bytes_source(b"abc").sha256


def test_an_attachment_that_is_nothing_leaves_nothing_half_sent(ada, bob, bucket):
    error = refused(tracecraft.Usage, ada.send, "bob", "see", attach=("no\x1b.txt",))
    assert "\x1b" not in error.message
    assert bucket.under("messages/") == []


# -- listening


def test_each_message_is_told_once_and_stays_new(ada, bob):
    ada.send("bob", "one")
    ada.send("bob", "two")
    batch = bob.mail.listen()
    assert (mail_texts(batch), batch.count) == (["one"], 2)
    assert mail_texts(bob.mail.listen()) == ["one"]  # it was not shown yet
    batch.commit()
    refused(tracecraft.TimedOut, bob.mail.listen)
    ada.send("bob", "three")
    assert mail_texts(bob.mail.listen()) == ["three"]
    assert read_new(bob) == ["one", "two", "three"]


def test_each_of_two_listeners_is_told_and_what_was_read_is_no_news(ada, bob, bucket):
    bob.channels.join("ops")
    other = agent_on(bucket, "bob", instance="bob-2", state=LocalState())
    ada.send("#ops", "one")
    for agent in (bob, other):
        batch = agent.mail.listen()
        batch.commit()
        assert mail_texts(batch) == ["one"]
    ada.send("bob", "two")
    read_new(bob)
    refused(tracecraft.TimedOut, other.mail.listen)


def test_a_listener_is_woken_by_mail(ada, bob):
    timer = later(lambda: ada.send("_broadcast", "now"))
    assert mail_texts(bob.mail.listen(wait=5)) == ["now"]
    timer.join()


def test_what_was_told_is_remembered_by_the_next_process(ada, bucket):
    state = LocalState()
    ada.send("bob", "one")
    agent_on(bucket, "bob", state=state).mail.listen().commit()
    refused(tracecraft.TimedOut, agent_on(bucket, "bob", state=state).mail.listen)


# -- searching


def test_words_are_found_in_mail_memory_and_handoffs_newest_first(ada, bob, bucket):
    ada.memory.set("api.port", "80")
    pass_time(bucket, 5)
    ada.claim("s")
    ada.complete("s", note="see the API docs", findings=["api is slow"])
    pass_time(bucket, 5)
    bob.send("ada", "the Api\nis ready")
    hits, more = ada.search.find("aPi")
    assert [(hit["area"], hit["who"], hit["name"]) for hit in hits[1:]] == [
        ("handoffs", "ada", "s"), ("memory", "ada", "api.port")]
    assert (hits[0]["line"], hits[0]["who"], more) == ("the Api is ready", "bob", False)
    assert ada.search.find("api", limit=1) == (hits[:1], True)
    assert [h["area"] for h in ada.search.find("api", by="bob")[0]] == ["mail"]
    assert [h["area"] for h in ada.search.find("api", area="memory")[0]] == ["memory"]


def test_a_search_shows_only_mail_that_i_may_see(ada, bob, bucket):
    ada.send("bob", "secret plan")
    ada.send("#ops", "secret channel")
    eve = agent_on(bucket, "eve")
    assert eve.search.find("secret") == ([], False)
    assert len(ada.search.find("secret")[0]) == 2
    assert [hit["line"] for hit in bob.search.find("SECRET")[0]] == ["secret plan"]


def test_a_search_passes_over_damage(ada, bucket):
    bucket.place("memory/a.json", b"{")
    bucket.place("steps/s/claim.json", {"agent": "x", "handoffs": [5, {"note": 7}]})
    bucket.place("messages/ada/1_b_0.json", [1])
    ada.memory.set("b", "word")
    assert [hit["name"] for hit in ada.search.find("word")[0]] == ["b"]


@pytest.mark.parametrize("how", [{"text": " "}, {"text": "x", "area": "all"}])
def test_a_search_for_nothing_or_nowhere_is_refused(ada, how):
    refused(tracecraft.Usage, ada.search.find, **how)


# -- signatures


@pytest.fixture
def keyed(bucket):
    """Agents that share a key: ada, bob; and eve, who has none."""
    return [agent_on(bucket, name, key=key) for name, key in (
        ("ada", "the key"), ("bob", "the key"), ("eve", ""))]


def senders(project, **how):
    return [(m["from"], m["signature"]) for m in project.inbox(**how).messages]


def test_signed_mail_is_verified_and_unsigned_is_not(keyed):
    ada, bob, eve = keyed
    bob.channels.join("ops")
    for to in ("bob", "_broadcast", "#ops"):
        ada.send(to, "x", step="s", attach=(), importance="low")
    ada.send("bob", "y" * 9000)
    eve.send("bob", "z")
    assert senders(bob) == [("ada", "verified")] * 4 + [("eve", "unverified")]
    assert senders(eve) == [("ada", "unverified")]


def forged_by_eve(bucket, keyed):
    """What bob's inbox shows of messages that eve made in ada's name."""
    ada, bob, eve = keyed
    stolen = ada.send("eve", "pay eve")
    doc = bucket.doc(stolen["key"])
    place = bucket.place
    place(stolen["key"].replace("/eve/", "/bob/"), doc)
    place(stolen["key"].replace("/eve/", "/_broadcast/"), {**doc, "to": "_broadcast"})
    for n, change in enumerate(({"to": "bob"}, {"message": "pay me"}, {"hmac": "00"})):
        place(tracecraft.event_key("messages/bob/", at_ns=10**18 + n, agent="ada",
                                   uuid8=f"{n:08d}"), {**doc, **change})
    eve.mail.secret = "guessed"
    eve.mail.who.agent = "ada"
    eve.send("bob", "from ada, truly")
    return bob.inbox().messages


def test_a_forged_message_is_never_shown_under_its_claimed_name(bucket, keyed):
    shown = forged_by_eve(bucket, keyed)
    assert len(shown) == 6
    assert {(m["from"], m["claimed_from"], m["verified"]) for m in shown} == {
        ("?", "ada", False)}
    bob = keyed[1]
    assert senders(bob, by="ada") == []
    assert {hit["who"] for hit in bob.search.find("pay")[0]} == {"?"}


@pytest.mark.parametrize("leaves_out", ["key", "message"])
def test_a_signature_that_leaves_something_out_is_caught(
        bucket, keyed, monkeypatch, leaves_out):
    """The broken variants of the test before."""
    whole = tracecraft.signature

    def weak(secret, key, doc):
        doc = {k: v for k, v in doc.items() if k != leaves_out}
        return whole(secret, "" if leaves_out == "key" else key, doc)
    monkeypatch.setattr(tracecraft, "signature", weak)
    shown = forged_by_eve(bucket, keyed)
    if leaves_out == "message":  # the copies are under other keys: one under its own
        stolen = shown[0]["key"].replace("/bob/", "/eve/")
        sent = [k for k in bucket.under("messages/eve/")][0]
        bucket.place(sent, {**bucket.doc(sent), "message": "changed"})
        assert tracecraft.genuine("the key", sent, bucket.doc(sent)) == "verified", stolen
    else:
        assert any(m["from"] == "ada" for m in shown)


def test_a_forged_answer_or_acknowledgement_counts_for_nothing(bucket, keyed):
    ada, bob, _ = keyed
    late = refused(tracecraft.TimedOut, ada.ask, "bob", "port?", wait=0, op="q")
    asked = late.details["question"]
    fake = tracecraft.event_key("messages/ada/", at_ns=int(bucket.clock_at * 1e9),
                                agent="bob", uuid8="00000000")
    bucket.place(fake, {"from": "bob", "to": "ada", "message": "666", "hmac": "0",
                        "reply_to": asked["id"], "sent_at": "x"})
    refused(tracecraft.TimedOut, ada.ask, "bob", "port?", wait=0, op="q")
    leaf = asked["key"].rpartition("/")[2]
    bucket.place(f"messages/bob/_acks/{leaf}", {"by": "bob", "hmac": "0"})
    refused(tracecraft.TimedOut, ada.mail.wait_acks, asked, wait=0, agents=["bob"])
    bucket.shared.objects.pop(f"messages/bob/_acks/{leaf}")
    bob.ack(asked["id"])
    assert ada.mail.wait_acks(asked, wait=0, agents=["bob"]) == ["bob"]


def test_the_key_is_in_no_object(bucket, keyed):
    ada, bob, _ = keyed
    ada.send("bob", "x" * 9000, ack=True)
    bob.ack(bob.inbox().messages[0]["id"])
    assert not any(b"the key" in body for _, body, *_ in bucket.log)


# -- large mailboxes


def fill_box(bucket, to, count, *, days=9.0, sender="eve"):
    """`count` messages whose times are spread over the last `days`; their keys."""
    now, step, keys = bucket.clock_at, days * 86400 / max(count, 1), []
    for n in range(count):
        at = now - (count - n) * step
        key = tracecraft.event_key(f"messages/{to}/", at_ns=int(at * 1e9), agent=sender,
                                   uuid8=f"{n:08x}")
        body = json.dumps({"from": sender, "to": to, "message": str(n), "sent_at": "x"})
        bucket.shared.objects[key] = (body.encode(), f'"f{n}"', float(int(at)))
        keys.append(key)
    return keys


def besides(project, act, *args, **how):
    """Requests of an act other than one GET per message."""
    cost = spent(project, act, *args, **how)
    return sum(n for what, n in cost.items() if not what.startswith("GET messages")
               or not what.endswith("/*"))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("days", [9, 0.01])
def test_the_newest_20_of_10_000_cost_three_requests_beside_the_messages(
        bob, bucket, warm, days):
    fill_box(bucket, "bob", 10_000, days=days)
    bob.store.page = 1000
    if warm:
        bob.inbox(limit=20)
    assert besides(bob, bob.inbox, limit=20) <= 3
    assert mail_texts(bob.inbox(limit=20)) == [str(n) for n in range(9980, 10_000)]


def test_the_newest_of_a_mailbox_at_rest_are_cheap_once_it_was_read(bob, bucket):
    fill_box(bucket, "bob", 10_000)
    pass_time(bucket, 99 * 24 * HOUR)
    bob.store.page = 1000
    assert mail_texts(bob.inbox(limit=2)) == ["9998", "9999"]
    assert besides(bob, bob.inbox, limit=20) <= 3


def test_20_new_messages_in_a_mailbox_of_10_000_cost_three_requests_too(
        bob, bucket):
    """As long as fewer than a page of them come in the day that senders may lag."""
    fill_box(bucket, "bob", 10_000, days=30)
    bob.store.page = 1000
    read_new(bob)
    pass_time(bucket, 600)
    for n in range(20):
        place_message(bucket, "bob", f"n{n}", seq=n)
    assert besides(bob, read_new, bob, limit=20) <= 3  # the third moves the cursor
    assert read_new(bob) == []


@pytest.mark.parametrize("count, limit", [(0, 5), (3, 5), (999, 20), (1000, 20),
                                          (1001, 20), (2500, 1500)])
def test_a_page_of_the_newest_is_the_same_whatever_the_size(bob, bucket, count, limit):
    fill_box(bucket, "bob", count)
    bob.store.page = 1000
    for _ in range(2):
        batch = bob.inbox(limit=limit)
        assert mail_texts(batch) == [str(n) for n in range(count)][-limit:]
        assert batch.truncated is (count > limit)


@pytest.mark.parametrize("shape", ["even", "bursts", "one moment", "long ago"])
def test_pages_back_through_a_mailbox_meet_and_miss_nothing(bob, bucket, shape):
    fill_box(bucket, "bob", 1300, days={"even": 9, "one moment": 1e-5}.get(shape, 3))
    fill_box(bucket, "_broadcast", 1100, days={"bursts": 0.001}.get(shape, 9))
    if shape == "long ago":
        pass_time(bucket, 400 * 24 * HOUR)
    bob.store.page, before, keys = 1000, "", []
    while before is not None:
        batch = bob.inbox(limit=600, before=before)
        keys = [m["key"] for m in batch.messages] + keys
        before = batch.cursor
    assert len(keys) == 2400 == len(set(keys))
    assert keys == sorted(keys, key=lambda key: key.rpartition("/")[2])


@pytest.mark.parametrize("mine_days", [9, 0.001])
def test_pages_back_miss_nothing_between_many_broadcasts_of_my_own(
        bob, bucket, mine_days):
    sent = fill_box(bucket, "_broadcast", 1100) + fill_box(bucket, "bob", 90)
    fill_box(bucket, "_broadcast", 2200, days=mine_days, sender="bob")
    bob.store.page, before, keys = 1000, "", []
    while before is not None:
        batch = bob.inbox(limit=100, before=before)
        keys += [m["key"] for m in batch.messages]
        before = batch.cursor
    assert sorted(keys) == sorted(sent)


def test_a_late_message_with_an_old_key_in_a_large_mailbox_is_new_within_the_hour(
        bob, bucket):
    fill_box(bucket, "bob", 1500)
    bob.store.page = 1000
    read_new(bob)
    for n in range(7):
        pass_time(bucket, 500)
        if n == 1:
            place_message(bucket, "bob", "slow clock", behind=40 * HOUR, seq=50)
        place_message(bucket, "bob", str(n), seq=n)
        assert str(n) in read_new(bob)
    pass_time(bucket, 500)
    assert read_twice(bob) == (["slow clock"], [])


def test_acknowledged_mail_makes_no_listing_longer(bob, bucket):
    for n in range(1200):
        bucket.place(f"messages/bob/_acks/{n:019d}_eve_0.json", {"by": "bob"})
    place_message(bucket, "bob", "one")
    bob.store.page = 1000
    assert besides(bob, read_new, bob) <= 3


def test_a_damaged_memory_of_large_mailboxes_only_costs_requests(bob, bucket):
    fill_box(bucket, "bob", 1100)
    for junk in (5, {"messages/bob/": 7}, {"messages/bob/": {"tail": 8}}, []):
        bob.who.remember("large", junk)
        assert mail_texts(bob.inbox(limit=1)) == ["1099"]


# -- what it costs, and crashes


def test_a_question_costs_a_message_and_a_listing_a_look(ada, bob):
    bob.heartbeat()
    cost = spent(ada, ada.ask, "bob", "port?", wait=0)
    assert cost == {"LIST agents/": 1, "PUT messages/bob/*": 1, "LIST messages/ada/": 1}


def test_joining_costs_a_listing_and_a_change_of_the_cursor(bob):
    assert spent(bob, bob.channels.join, "ops") == {
        "LIST messages/_channel.ops/": 1, "GET messages/bob/_cursor.json": 1,
        "PUT messages/bob/_cursor.json": 1}


def test_reading_a_channel_costs_one_listing_more(ada, bob):
    bob.channels.join("ops")
    ada.send("#ops", "1")
    assert spent(bob, read_new, bob) == {
        "LIST messages/bob/": 1, "LIST messages/_broadcast/": 1,
        "LIST messages/_channel.ops/": 1, "GET messages/_channel.ops/*": 1,
        "PUT messages/bob/_cursor.json": 1}


def test_listening_costs_the_listings_and_one_message(ada, bob):
    for n in range(5):
        ada.send("bob", str(n))
    assert spent(bob, bob.mail.listen) == {
        "LIST messages/bob/": 1, "LIST messages/_broadcast/": 1, "GET messages/bob/*": 1}


def member(bucket, ada, where):
    agent_on(bucket, "bob").send("#ops", "hi")
    assert read_twice(ada) == (["hi"], []), where
    assert chain_faults(bucket) == [], where


def no_member(bucket, ada, where):
    assert tracecraft.channels_of(bucket.doc("messages/ada/_cursor.json")) == [], where


def asked_once(bucket, ada, where):
    assert mail_texts(agent_on(bucket, "bob").inbox()) == ["port?"], where


def attached(bucket, ada, where):
    [message] = agent_on(bucket, "bob").inbox().messages
    assert message["artifacts"][0]["size"] == 4, where


def try_ask(agent):
    with contextlib.suppress(tracecraft.TimedOut):
        agent.ask("bob", "port?", wait=0, op="q1")


MAIL_CRASHES = {
    "join": (None, lambda a: a.channels.join("ops", op="j1"), member),
    "join with history": (
        None, lambda a: a.channels.join("ops", history=True), member),
    "leave": (lambda b, a: a.channels.join("ops"),
              lambda a: a.channels.leave("ops", op="l1"), no_member),
    "ask": (None, try_ask, asked_once),
    "send to a channel": (lambda b, a: agent_on(b, "bob").channels.join("ops"),
                          lambda a: a.send("#ops", "one", op="m1"), mail_is("one")),
    "attach": (lambda b, a: a.artifacts.put_bytes("plan.md", b"plan"),
               lambda a: a.send("bob", "see", attach=("plan.md",), op="m1"), attached),
}


@pytest.mark.parametrize("verb", MAIL_CRASHES)
def test_a_mail_verb_that_crashed_anywhere_can_be_repeated(verb):
    repeated_after_crashes(*MAIL_CRASHES[verb])


def test_a_crash_while_an_answer_is_noticed_shows_it_again_or_not():
    def prepare(bucket, ada):
        agent_on(bucket, "bob").send("ada", "80", reply_to="q")
        agent_on(bucket, "bob").send("ada", "other")

    def act(ada):
        ada.mail.notice(ada.inbox().messages[0])
    for bucket, ada, where in crashes(prepare, act):
        assert read_new(ada) in (["80", "other"], ["other"]), where


# -- the commands as processes


def test_a_question_an_answer_and_a_thread_on_the_command_line(sh):
    late = sh.refused(6, "ask", "bob", "which port?", "--id", "q1", "--wait", "0")
    assert "--id q1" in late
    asked = sh.ok("inbox", "--new", TRACECRAFT_AGENT="bob").splitlines()
    assert asked[1].startswith("  to answer: tracecraft send ada TEXT --reply-to ")
    name = asked[1].split()[-1]
    sh.ok("send", "ada", "8080", "--reply-to", name, TRACECRAFT_AGENT="bob")
    assert sh.ok("ask", "bob", "which port?", "--id", "q1").endswith("bob: 8080\n")
    assert sh.ok("inbox", "--new") == "No new messages.\n"
    thread = sh.ok("thread", name[:8]).splitlines()
    assert [line.partition("] ")[2] for line in (thread[0], thread[2])] == [
        "(to bob) ada: which port?", "(direct) bob: 8080"]


def test_a_channel_on_the_command_line(sh):
    assert sh.ok("channel", "join", "ops", TRACECRAFT_AGENT="bob") == "Joined #ops\n"
    sh.ok("send", "#ops", "one\ntwo\nthree", "--importance", "high")
    sh.ok("send", "_channel.ops", "four")
    told = sh.ok("listen", TRACECRAFT_AGENT="bob").splitlines()
    assert told[0].endswith("] (#ops) ada [high]: one") and told[1] == "two"
    assert told[2:] == ["+1 more", "read: tracecraft inbox --new"]
    sh.refused(6, "listen", TRACECRAFT_AGENT="bob")
    assert "(#ops) ada: four" in sh.ok("inbox", "--new", TRACECRAFT_AGENT="bob")
    assert sh.ok("channel", "list").split() == ["#ops", "1", "joined"]
    assert sh.json("channel", "leave", "ops", TRACECRAFT_AGENT="bob")["changed"]


def test_a_sender_waits_for_an_ack_on_the_command_line(sh):
    late = sh.refused(6, "send", "bob", "hi", "--ack", "--wait", "0")
    again = late.split("--id ")[1].split()[0]
    message, = sh.json("inbox", TRACECRAFT_AGENT="bob")["items"]
    sh.ok("ack", message["id"], TRACECRAFT_AGENT="bob")
    assert sh.ok("send", "bob", "hi", "--ack", "--wait", "9", "--id", again) == \
        "Sent to bob: hi\nAcknowledged by bob\n"
    assert len(sh.json("inbox", TRACECRAFT_AGENT="bob")["items"]) == 1
    sh.refused(2, "send", "bob", "hi", "--wait", "9")
    sh.refused(2, "send", "_broadcast", "hi", "--ack", "--wait", "9")


def test_pages_attachments_and_search_on_the_command_line(sh):
    with open(os.path.join(sh.cwd, "a b.txt"), "w") as file:
        file.write("abc")
    for n in range(3):
        sh.ok("send", "bob", f"number {n}", *(["--attach", "a b.txt"] if n == 2 else []))
    page = sh.json("inbox", "--limit", "2", TRACECRAFT_AGENT="bob")
    assert [m["message"] for m in page["items"]] == ["number 1", "number 2"]
    rest = sh.json("inbox", "--before", page["cursor"], TRACECRAFT_AGENT="bob")
    assert ([m["message"] for m in rest["items"]], rest["cursor"]) == (["number 0"], None)
    line = sh.ok("inbox", "--limit", "1", TRACECRAFT_AGENT="bob").splitlines()[1]
    command = shlex.split(line.partition("tracecraft ")[2])
    sh.ok(*command, "-o", "got.txt", TRACECRAFT_AGENT="bob")
    assert sh.ok("search", "NUMBER 1").endswith("ada: number 1\n")
    assert sh.run("search", "nothing like it").returncode == 1
    sh.ok("memory", "set", "port", "8080")
    assert " memory port ada: port: 8080" in sh.ok("memory", "search", "808")


def test_a_forged_sender_and_the_key_on_the_command_line(sh):
    key = {"TRACECRAFT_KEY": "s3cret-key", "TRACECRAFT_AGENT": "bob"}
    sh.ok("send", "bob", "signed", TRACECRAFT_KEY="s3cret-key")
    sh.ok("send", "bob", "plain")
    sh.ok("send", "bob", "wrong", TRACECRAFT_KEY="other")
    heads = [line.partition("] ")[2] for line in sh.ok("inbox", **key).splitlines()]
    assert heads == ["(direct) ada [verified]: signed",
                     "(direct) ada [unverified]: plain",
                     "(direct) (forged: claims ada) [forged]: wrong"]
    said = [sh.run(*words, **key) for words in (
        ["-v", "inbox"], ["config"], ["doctor"], ["whoami"], ["ask", "x", "y", "--wait",
                                                             "0"], ["thread", "none"])]
    assert not any("s3cret-key" in done.out + done.err for done in said)
    assert not any(b"s3cret-key" in body for body in sh.objects().values())


@pytest.mark.parametrize("words", [
    ["send", "#a b", "x"], ["channel", "join", "a/b"], ["search", " "],
    ["send", "bob", "x", "--expires-in", "-1"], ["send", "bob", "x", "--attach", "no"],
    ["inbox", "--new", "--before", "x"], ["search", "x", "--in", "nowhere"],
    ["send", "bob", "x", "--importance", "urgent"]])
def test_mail_words_that_do_not_fit_are_refused_in_one_sentence(sh, words):
    before = sh.objects()
    assert "Error: " in sh.refused(2, *words)
    assert sh.objects() == before


# == Histories =========================================================
#
# Agents at random on a store that fails at random; then every acknowledgement must
# have its witness in the chain of revisions, and nothing may be there twice.


class Witness:
    """What agents were told, and when. check() finds what the store's log contradicts.

    Times are lengths of that log: an act that began at b and was told at e is
    linearisable if its write, or what it read, was there between b and e.
    """

    def __init__(self, bucket):
        self.bucket, self.told = bucket, []

    def note(self, what, began, *facts):
        self.told.append((what, began, len(self.bucket.log), *facts))

    def all(self, what):
        return [facts[3:] for facts in self.told if facts[0] == what]

    def check(self):
        return (step_faults(self.bucket) + projection_faults(self.bucket)
                + self._claims() + self._ends() + self._counter() + self._messages()
                + self._refusals() + self._order() + self._reads() + self._snapshots())

    def _claims(self):
        given, wrong = {}, []
        for step, token, who in self.all("claimed"):
            if given.setdefault((step, token), who) != who:
                wrong.append(f"{step} token {token}: {given[step, token]} and {who}")
            docs = self.bucket.history(f"steps/{step}/claim.json")
            if not any(d["token"] == token and d.get("instance") == who for d in docs):
                wrong.append(f"{step} token {token}: {who} was told, nobody wrote it")
        return wrong

    def _ends(self):
        wrong = []
        for step, token, agent in self.all("ended"):
            docs = self.bucket.history(f"steps/{step}/claim.json")
            if not any((d["state"], d["token"], d["agent"]) ==
                       ("complete", token, agent) for d in docs):
                wrong.append(f"{step}: {agent} ended token {token}, nobody wrote it")
        return wrong

    def _counter(self):
        """Each acknowledged increment counts once, each doubtful one at most."""
        sure, doubtful = len(self.all("counted")), len(self.all("counted?"))
        docs = self.bucket.history("memory/n.json")
        value = int(docs[-1]["value"]) if docs else 0
        if sure <= value <= sure + doubtful:
            return []
        return [f"counter is {value} after {sure} increments and {doubtful} doubtful"]

    def _messages(self):
        """Each message acknowledged to its sender was shown, each is there once."""
        there = collections.Counter()
        for key in self.bucket.under("messages/"):
            doc = self.bucket.doc(key)
            if "message" in doc and doc.get("kind") != "notice":
                there[doc["message"]] += 1
        shown = {text for texts, in self.all("shown") for text in texts}
        sent = [text for text, in self.all("sent")]
        return ([f"message {text} was sent and never shown" for text in sent
                 if text not in shown] +
                [f"message {text} is there {there[text]} times" for text in sent
                 if there[text] != 1] +
                [f"message {text} is there twice" for text, in self.all("sent?")
                 if there[text] > 1])

    def _refusals(self):
        """Who was refused because somebody else was first had a rival that wrote."""
        wrong = []
        for step, holder in self.all("refused"):
            docs = self.bucket.history(f"steps/{step}/claim.json")
            if not any(doc["agent"] == holder for doc in docs):
                wrong.append(f"{step}: refused for {holder}, who never held it")
        return wrong

    def _order(self):
        """A write was made between the call and its answer."""
        landed = {}
        for at, (_, body, *_) in enumerate(self.bucket.log):
            if body is not None:
                landed.setdefault(json.loads(body).get("nonce"), at)
        return [f"{key} {nonce}: told at {ended}, began at {began},"
                f" landed at {landed.get(nonce)}"
                for what, began, ended, *facts in self.told if what == "wrote"
                for key, nonce in [facts]
                if not began <= landed.get(nonce, -1) < ended]

    def _reads(self):
        """A value that was read was the newest one at some time during the read."""
        wrong = []
        for what, began, ended, *facts in self.told:
            if what != "read":
                continue
            told = enumerate(self.bucket.log[:ended])
            log = [(at, body) for at, (key, body, *_) in told if key == "memory/n.json"]
            before = [body for at, body in log if at < began][-1:] or [None]
            bodies = before + [body for at, body in log if at >= began]
            if facts[0] not in [body and json.loads(body)["value"] for body in bodies]:
                wrong.append(f"read {facts[0]} at {began}, long after it was replaced")
        return wrong

    def _snapshots(self):
        """Each version of a value has its snapshot in the history."""
        there = {(d["op"], d["of_rev"], d["value"]) for d in map(
            self.bucket.doc, self.bucket.under("memory/_history/n/"))}
        return [f"n rev {d['rev']} has no snapshot"
                for d in self.bucket.history("memory/n.json")
                if (d["nonce"], d["rev"], d["value"]) not in there]


def projection_faults(bucket):
    """Where status.json or handoff.json went back, or said what no claim ever said."""
    wrong, last = [], {}
    for key, body, *_ in bucket.log:
        if not key.endswith(("/status.json", "/handoff.json")) or body is None:
            continue
        doc = json.loads(body)
        now = doc["token"], doc["rev"]
        if now <= last.get(key, (0, 0)):
            wrong.append(f"{key}: {last[key]} -> {now}")
        last[key] = now
        claims = bucket.history(key.rpartition("/")[0] + "/claim.json")
        if not any(c["rev"] == doc["rev"] for c in claims):
            wrong.append(f"{key}: rev {doc['rev']} is of no claim")
    return wrong


class Player:
    """One agent of a random run; it dies now and then and goes on with its state."""

    def __init__(self, witness, dice, *, name, instance, ledger, faults):
        self.witness, self.dice, self.faults = witness, dice, faults
        self.name, self.instance, self.ledger = name, instance, ledger
        self.state = LocalState()
        self.start()

    def start(self):
        self.agent = agent_on(self.witness.bucket, self.name, instance=self.instance,
                              ledger=self.ledger, state=self.state)
        self.agent.store.chaos = (self.dice, self.faults)

    def act(self, serial):
        """One random verb, and what it was told."""
        verb = self.dice.choice(
            [self.claim] * 4 + [self.end] * 3 + [self.renew, self.release, self.get,
             self.read_mail] + [self.count] * 2 + [self.send] * 2)
        self.step = f"s{self.dice.randrange(3)}"
        self.began = len(self.witness.bucket.log)
        self.doubt = None
        try:
            verb(f"{self.instance} {serial}")
        except tracecraft.Held as why:
            self.note("refused", self.step, why.details.get("holder"))
        except tracecraft.Unknown:
            self.note(*self.doubt or ("unknown",))
        except Crash:
            self.note(*self.doubt or ("crashed",))
            self.start()
        except (tracecraft.Conflict, tracecraft.Fenced, tracecraft.Unavailable,
                tracecraft.NotFound):
            pass

    def note(self, what, *facts):
        self.witness.note(what, self.began, *facts)

    def claim(self, text):
        claim = self.agent.claim(self.step, ttl=30, reopen=True)
        if claim.fresh:
            self.note("claimed", self.step, claim.token, self.instance)
            self.note("wrote", CLAIM, claim.doc["nonce"])

    def end(self, text):
        doc = self.agent.complete(self.step, note=text)
        self.note("ended", self.step, doc["token"], doc["agent"])

    def renew(self, text):
        self.agent.renew(self.step)

    def release(self, text):
        self.agent.release(self.step)

    def get(self, text):
        self.note("read", self.agent.memory.get("n")["value"])

    def count(self, text):
        self.doubt = ("counted?",)
        doc = self.agent.memory.incr("n")
        self.note("counted")
        self.note("wrote", "n", doc["nonce"])

    def send(self, text):
        self.doubt = ("sent?", text)
        self.agent.send(self.dice.choice("ab"), text)
        self.note("sent", text)

    def read_mail(self, text):
        batch = self.agent.inbox(new=True, limit=self.dice.choice((None, 2)))
        self.note("shown", mail_texts(batch))
        batch.commit()


def run_history(seed, ledger=tracecraft.Ledger, *, agents=4, rounds=25, faults=0.2):
    """What is wrong after a random run of some agents in threads; [] if nothing."""
    bucket = MemoryStore()
    witness = Witness(bucket)

    def live(number):
        dice = random.Random(f"{seed} {number}")
        player = Player(witness, dice, name="ab"[number % 2], instance=f"i{number}",
                        ledger=ledger, faults=faults)
        for serial in range(rounds):
            player.act(serial)
            if dice.random() < 0.1:
                bucket.clock_at += dice.choice((10, 20, 40, 400))
    run_all([lambda n=n: live(n) for n in range(agents)])
    for name in "ab":
        reader = agent_on(bucket, name)
        rest = read_new(reader)
        while rest:
            witness.note("shown", 0, rest)
            rest = read_new(reader)
    return witness.check()


@pytest.mark.parametrize("round_", range(4))
def test_no_random_run_breaks_an_invariant(round_):
    """Invariants 1, 2, 3 and 6 of protocol.md 11."""
    seed = random.randrange(10**9)
    print("seed", seed)
    assert run_history(seed) == [], seed


def test_a_run_without_faults_is_sound_too():
    assert run_history(7, faults=0) == []


# -- variants that must be caught --------------------------------------


class Unsettling(tracecraft.Ledger):
    """Takes a lost answer for a lost race: decides again, and applies twice."""

    def _settle(self, key, new, old, **how):
        return "lost", self.read(key)


class Believing(tracecraft.Ledger):
    """Takes a lost answer for a success."""

    def _settle(self, key, new, old, **how):
        if how["doubt"]:
            return "landed", tracecraft.Record(key, new)
        return super()._settle(key, new, old, **how)


class Forgetful(tracecraft.Ledger):
    """Takes a new nonce for each attempt, so it cannot recognise its own write."""

    def _settle(self, key, new, old, **how):
        fresh = {**new, "nonce": self.hex()}
        return super()._settle(key, fresh, old, **{**how, "doubt": False})


class BusyIsLost(tracecraft.Ledger):
    """Takes 409 for a lost race: somebody else must have been first."""

    def _write(self, key, new, old, op, **how):
        put, store = self.store.put, self.store

        def once(*args, **condition):
            try:
                return put(*args, **condition)
            except tracecraft.Busy:
                raise tracecraft.Held("was taken", holder="somebody") from None
        store.put = once
        try:
            return super()._write(key, new, old, op, **how)
        finally:
            store.put = put


class CheckThenPut(tracecraft.Ledger):
    """Compares before writing, but writes without a condition."""

    def _write(self, key, new, old, op, **how):
        now = self.read(key)
        if now.etag != old.etag:
            return "lost", now
        time.sleep(0.001)
        stamp = self.store.put(key, tracecraft.dump_json(new))
        return "landed", tracecraft.Record(key, new, etag=stamp.etag)


class DeletingLedger(tracecraft.Ledger):
    """Gives a claim back by deleting it: its tokens start again."""

    def _write(self, key, new, old, op, **how):
        if new.get("state") == "released":
            self.store.delete(key)
            return "landed", tracecraft.Record(key, new)
        return super()._write(key, new, old, op, **how)


class TokenReset(tracecraft.Ledger):
    """Starts each claim of a free step with token 1."""

    def _write(self, key, new, old, op, **how):
        if new.get("state") == "in_progress" and old.doc and (
                old.doc.get("state") != "in_progress"):
            new["token"] = 1
        return super()._write(key, new, old, op, **how)


class OwnClock(tracecraft.Ledger):
    """Judges leases by its own clock, which runs 40 s ahead."""

    def read(self, key):
        record = super().read(key)
        record.now = record.now + 40
        return record


class OldNews(tracecraft.Ledger):
    """Reads what it read before for a while, as through a cache."""

    def read(self, key):
        kept = self.__dict__.setdefault("kept", {})
        record, uses = kept.get(key, (None, 0))
        if not uses:
            record, uses = super().read(key), 3
        kept[key] = record, uses - 1
        return record


@pytest.mark.parametrize("broken", [Unsettling, Believing, Forgetful, BusyIsLost,
                                    CheckThenPut, DeletingLedger, TokenReset,
                                    OwnClock, OldNews])
def test_a_broken_ledger_is_caught(broken):
    for seed in range(12):
        if run_history(seed, broken, rounds=20, faults=0.4):
            return
    pytest.fail(f"{broken.__name__} passed twelve runs")


# == Every store: one contract =========================================
#
# The same tests on the memory store, the directory, the suite's own S3 server in its ETag
# dialects, S3 through `requests`, moto, a real server, and any bucket that
# TRACECRAFT_TEST_STORE names (a store URL; a fresh random project, removed afterwards).


BIN = os.path.join(os.path.dirname(os.path.abspath(tracecraft.__file__)), "..", "shared",
                   "s3")
KINDS = ["memory", "file", "s3-any", "s3-quoted", "s3-unquoted", "gateway"]
KINDS += [pytest.param(kind, marks=pytest.mark.peers) for kind in ("requests", "moto")]
KINDS += [pytest.param("bucket", marks=pytest.mark.bucket)]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="session")
def real_bucket(tmp_path_factory):
    """(store URL without project, environ) of a real S3 server: the one named, or
    ministack, which starts in a second."""
    url = os.environ.get("TRACECRAFT_TEST_STORE")
    if url:
        yield url, dict(os.environ)
        return
    serve = os.path.join(BIN, "serve-ministack")
    if not os.path.exists(serve) or not shutil.which("bash"):
        pytest.skip("TRACECRAFT_TEST_STORE is not set and no server is at hand")
    data = str(tmp_path_factory.mktemp("ministack"))
    said = subprocess.run([serve, data, str(free_port())], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    environ = dict(os.environ)
    for line in said.stdout.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        environ[name] = value
    yield f"s3://tracecraft-suite?endpoint={environ['AWS_ENDPOINT_URL']}", environ
    subprocess.run([os.path.join(BIN, "serve-down"), data, "--purge"], capture_output=True)


@pytest.fixture(scope="session")
def moto_server():
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=free_port())
    server.start()
    yield f"http://127.0.0.1:{server._port}"
    server.stop()


def remove_all(store):
    for entry in store.list("").entries:
        store.delete(entry.key)


def s3_store(url, environ, project):
    parts = tracecraft.parse_store_url(url)
    settings = tracecraft.load_settings(
        {"store": tracecraft.store_url({**parts, "project": project}), "fresh": True},
        environ, os.getcwd())
    return tracecraft.open_store(settings)


@pytest.fixture(params=KINDS)
def any_store(request, tmp_path):
    """A fresh, empty project in a store of each kind."""
    kind, project = request.param, "t" + uuid.uuid4().hex[:10]
    with contextlib.ExitStack() as stack:
        if kind == "memory":
            yield MemoryStore()
            return
        if kind == "file":
            store = tracecraft.DirectoryStore(str(tmp_path / "store"), project)
        elif kind == "moto":
            url = f"s3://suite?endpoint={request.getfixturevalue('moto_server')}"
            keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
            store = s3_store(url, keys, project)
        elif kind == "bucket":
            url, environ = request.getfixturevalue("real_bucket")
            store = s3_store(url, environ, project)
        elif kind == "gateway":
            hub = stack.enter_context(HubServer())
            hub.bucket("alice/suite")
            store = s3_store("hf://alice/suite", hub.env(), project)
        else:
            etags = kind[3:] if kind.startswith("s3-") else "any"
            server = stack.enter_context(S3Server(etags=etags))
            environ = {**server.env()}
            if kind == "requests":
                pytest.importorskip("requests")
                environ["TRACECRAFT_HTTP"] = "requests"
            store = s3_store("s3://bucket?endpoint=" + server.url, environ, project)
        store.deadline = time.monotonic() + 60
        store.ensure()
        yield store
        store.deadline = time.monotonic() + 60
        remove_all(store)
        store.close()


def ledger_on(store):
    ledger = tracecraft.Ledger(store, deadline=60)
    if store.verdict is None:
        store.verdict = tracecraft.probe_store(store, races=False)
    return ledger


def project_on(store, agent):
    class Plain:
        project, key, environ = "suite", "", {}
    return tracecraft.Project(Plain, ledger_on(store),
                              tracecraft.Who(agent, uuid.uuid4().hex[:8]))


def together(*acts):
    """Run callables at the same moment in threads; their results or exceptions."""
    barrier, out = threading.Barrier(len(acts)), [None] * len(acts)

    def run(at, act):
        barrier.wait()
        try:
            out[at] = act()
        except tracecraft.Error as why:
            out[at] = why
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(acts)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return out


def test_contract_a_key_is_created_once(any_store):
    any_store.put("a/k.json", b"one", if_none_match=True)
    with pytest.raises(tracecraft.Moved):
        any_store.put("a/k.json", b"another", if_none_match=True)
    assert any_store.get("a/k.json").body == b"one"


def test_contract_a_replacement_needs_the_etag_that_is_there(any_store):
    any_store.verdict = any_store.verdict or tracecraft.probe_store(any_store,
                                                                    races=False)
    first = any_store.put("k", b"1", if_none_match=True)
    second = any_store.put("k", b"2", if_match=first.etag)
    with pytest.raises(tracecraft.Moved):
        any_store.put("k", b"3", if_match=first.etag)
    assert any_store.get("k").body == b"2"
    any_store.put("k", b"4", if_match=second.etag)
    assert any_store.get("k").body == b"4"


def test_contract_nothing_is_replaced_where_nothing_is(any_store):
    any_store.verdict = any_store.verdict or tracecraft.probe_store(any_store,
                                                                    races=False)
    with pytest.raises(tracecraft.Moved):
        any_store.put("none", b"x", if_match='"0123456789abcdef0123456789abcdef"')
    with pytest.raises(tracecraft.NotFound):
        any_store.get("none")


def test_contract_an_answer_carries_etag_and_both_times(any_store):
    stamp = any_store.put("k", b"body")
    found = any_store.get("k")
    assert tracecraft.same_etag(found.etag, stamp.etag) and found.size == 4
    dated = any_store.head("k") if any_store.kind == "hf" else found  # bytes from a CDN
    assert -2 <= dated.now - dated.modified < 60 and dated.age >= 0
    assert any_store.get("k", if_none_match=found.etag).body is None


def test_contract_a_listing_is_in_byte_order_and_can_be_cut(any_store):
    for key in ("b/2", "a/1", "a/3/x", "b/10", "c"):
        any_store.put(key, b"")
    keys = [entry.key for entry in any_store.list("").entries]
    assert keys == ["a/1", "a/3/x", "b/10", "b/2", "c"]
    assert [e.key for e in any_store.list("b/").entries] == ["b/10", "b/2"]
    assert [e.key for e in any_store.list("", start_after="b/10").entries] == ["b/2", "c"]
    cut = any_store.list("", limit=2)
    assert len(cut.entries) == 2 and cut.truncated
    flat = any_store.list("", delimiter="/")
    assert ([e.key for e in flat.entries], flat.prefixes) == (["c"], ["a/", "b/"])


def test_contract_deleting_twice_is_deleting_once(any_store):
    any_store.put("k", b"")
    any_store.delete("k")
    any_store.delete("k")
    with pytest.raises(tracecraft.NotFound):
        any_store.head("k")


@pytest.mark.parametrize("name", ["a b", "a+b", "a%b", "a%20b", "a&b=c", "q?x#y", "é/ü"])
def test_contract_an_odd_name_is_read_back_as_it_was(any_store, name):
    any_store.put("artifacts/" + name, name.encode())
    assert any_store.get("artifacts/" + name).body == name.encode()
    assert [e.key for e in any_store.list("artifacts/").entries] == ["artifacts/" + name]


def test_contract_a_file_goes_up_and_comes_down_whole(any_store, tmp_path):
    if any_store.kind == "memory":
        pytest.skip("the memory store holds records")
    data = random.Random(1).randbytes(3 << 20)
    (tmp_path / "up").write_bytes(data)
    any_store.upload("blob", str(tmp_path / "up"))
    with open(tmp_path / "down", "wb") as file:
        any_store.download("blob", file, size=len(data))
    assert (tmp_path / "down").read_bytes() == data
    assert any_store.get("blob", start=5, limit=7).body == data[5:12]
    any_store.copy("blob", "again")
    assert any_store.head("again").size == len(data)


def test_contract_of_racing_creators_exactly_one_wins(any_store):
    for turn in range(3):
        out = together(*(lambda at=at: any_store.put(
            f"race/{turn}", b"%d" % at, if_none_match=True) for at in range(8)))
        won = [at for at, one in enumerate(out) if not isinstance(one, Exception)]
        body = any_store.get(f"race/{turn}").body
        # An answer of 409 or 500 is no loss: somebody's bytes are there, and one's only.
        assert len(won) <= 1 and body in [b"%d" % at for at in (won or range(8))]


@pytest.mark.timing
def test_contract_no_increment_is_lost_or_doubled(any_store):
    handles = [project_on(any_store, f"a{at}") for at in range(4)]

    def five(handle):
        for _ in range(5):
            handle.memory.incr("n")
    out = together(*(lambda h=h: five(h) for h in handles))
    assert [one for one in out if one] == []
    assert handles[0].memory.get("n")["value"] == "20"


def test_contract_two_agents_meet(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    out = together(lambda: ada.claim("design"), lambda: bob.claim("design"))
    won = [one for one in out if isinstance(one, tracecraft.Claim)]
    assert len(won) == 1 and any(isinstance(one, tracecraft.Held) for one in out)
    winner, other = (ada, bob) if out[0] is won[0] else (bob, ada)
    with pytest.raises(tracecraft.Held):
        other.complete("design")
    winner.complete("design", note="see api", to=other.agent)
    assert other.handoff("design")["note"] == "see api"
    winner.send(other.agent, "done")
    batch = other.inbox(new=True)
    assert [m["message"] for m in batch.messages] == ["done"]
    batch.commit()
    assert other.inbox(new=True).messages == []
    assert other.wait_for(["design"], timeout=5)[0]["state"] == "complete"


def test_contract_a_plan_is_worked_off_by_two_who_race(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    plan = {f"s{n}": [f"s{n - 4}"] if n >= 4 else [] for n in range(8)}
    ada.plans.add(json.dumps([{"id": sid, "needs": of} for sid, of in plan.items()]))
    done = []

    def work(agent):
        while True:
            try:
                claim = agent.tasks.take()
            except t.Empty:  # the other is about to make one ready
                time.sleep(0.05)
                continue
            except t.NotFound:
                return
            done.append(claim.step)
            claim.complete()
    run_all([lambda: work(ada), lambda: work(bob)])
    assert sorted(done) == sorted(plan)
    assert all(done.index(need) < done.index(sid) for sid in plan for need in plan[sid])
    assert not [e.key for family in ("ready/", "active/")
                for e in ada.ledger.list(family).entries]


def test_contract_items_of_a_queue_are_given_out_once_and_dead_ones_kept(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    ada.queue("q").push_many([f"item {n}" for n in range(6)])
    out = together(*[lambda a=a: a.queue("q").pop() for a in (ada, bob, ada, bob)])
    assert len({item.id for item in out}) == 4
    for item in out:
        item.ack()
    for _ in range(2):
        item = bob.queue("q").pop()
        item.nack("bad")
    assert ada.queue("q").counts()["done"] == 4


def test_contract_of_two_who_reserve_the_same_files_one_wins(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    out = together(lambda: ada.reserve(["src/**"]), lambda: bob.reserve(["**/a.py"]))
    assert sorted(type(one).__name__ for one in out) == ["Held", "dict"]
    winner = ada if isinstance(out[0], dict) else bob
    winner.unreserve(every=True)
    assert (bob if winner is ada else ada).reserve(["src/a.py"])["token"] == 2


def test_contract_a_question_is_answered_and_a_channel_heard(any_store):
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    bob.channels.join("ops")
    ada.send("#ops", "hear")

    def answer():
        batch = bob.inbox(new=True, wait=5)
        while not any(m.get("kind") == "question" for m in batch.messages):
            heard.extend(m["message"] for m in batch.messages)
            batch.commit()
            batch = bob.inbox(new=True, wait=5)
        heard.extend(m["message"] for m in batch.messages if m["message"] == "hear")
        [question] = [m for m in batch.messages if m.get("kind") == "question"]
        bob.send("ada", "8080", reply_to=question["id"])
        return "answered"
    heard = []
    out = together(lambda: ada.ask("bob", "which port?", wait=20), answer)
    assert out[0]["message"] == "8080" and heard == ["hear"]


def test_contract_a_directory_goes_up_comes_down_and_is_deleted(any_store, tmp_path):
    ada = project_on(any_store, "ada")
    for name in ("a.txt", "sub/ü b.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    ada.artifacts.upload_folder(str(tmp_path / "in"), step="s")
    ada.artifacts.download_folder("", step="s", output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "in" / "sub" / "ü b.txt").read_text() == "sub/ü b.txt"
    assert all(not item.get("error") for item in ada.artifacts.verify_all("s"))
    ada.artifacts.delete("in/a.txt", step="s")
    with pytest.raises(t.NotFound):
        ada.artifacts.download("in/a.txt", step="s", output=str(tmp_path / "x"))


@pytest.mark.slow
def test_contract_an_expired_lease_is_taken_over_and_its_holder_fenced(any_store):
    if any_store.kind == "memory":
        pytest.skip("its clock is a number; see the ledger's tests")
    ada, bob = project_on(any_store, "ada"), project_on(any_store, "bob")
    assert ada.claim("s", ttl=1).token == 1
    assert bob.claim("s", wait=20).token == 2
    with pytest.raises(tracecraft.Fenced):
        ada.complete("s")
    assert bob.complete("s")["token"] == 2


def test_contract_the_probe_finds_the_store_sound(any_store):
    if any_store.kind == "memory":
        pytest.skip("it is sound by construction")
    verdict = tracecraft.probe_store(any_store, races=True, seconds=4)
    assert verdict["atomic"], verdict
    assert any_store.list("_probe/").entries == []


@pytest.mark.parametrize("fault", ["ignores", "races"])
def test_a_store_that_cannot_arbitrate_is_refused(fault):
    with S3Server(**{fault: True}) as server:
        store = s3_store("s3://bucket/p?endpoint=" + server.url, server.env(), "p")
        store.deadline = time.monotonic() + 30
        verdict = tracecraft.probe_store(store, races=True, seconds=10)
        assert not verdict["atomic"] and verdict["why"]
        store.verdict = verdict
        with pytest.raises(tracecraft.Unsafe):
            project_on(store, "ada").claim("s")


def test_init_refuses_such_a_store_and_leaves_no_config(tmp_path):
    with S3Server(ignores=True) as server:
        done = subprocess.run(
            [sys.executable, tracecraft.__file__, "init", "s3://bucket/p", "--endpoint",
             server.url], cwd=tmp_path, env={**server.env(), "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=60)
        assert done.returncode == 10 and "cannot pick one winner" in done.stderr
        assert not (tmp_path / ".tracecraft.json").exists()
        assert not server.objects


@pytest.mark.bucket
@pytest.mark.slow
def test_processes_race_on_a_real_bucket_and_nothing_is_lost(real_bucket, tmp_path):
    url, environ = real_bucket
    head, _, query = url.partition("?")
    where = f"{head}/drill{uuid.uuid4().hex[:6]}" + ("?" + query if query else "")
    done = subprocess.run(
        [sys.executable, tracecraft.__file__, "drill", "--store", where, "--agents",
         "4", "--rounds", "2"], cwd=tmp_path, env={**environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_soak_histories_with_faults_keep_every_invariant():
    seed = int(os.environ.get("TRACECRAFT_SEED") or random.randrange(10**9))
    until = time.monotonic() + float(os.environ.get("TRACECRAFT_SOAK") or 20)
    print("seed", seed)
    rng = random.Random(seed)
    while time.monotonic() < until:
        with S3Server() as server:
            soak_round(server, rng)


def soak_round(server, rng):
    """Three agents claim, count and write to each other while answers get lost."""
    kinds = ["refuse", "lose", "reset", "reset_after", 409, 429, 500, 503, "truncate"]
    stores = [s3_store("s3://bucket/p?endpoint=" + server.url, server.env(), "p")
              for _ in range(3)]
    agents = [project_on(store, f"a{at}") for at, store in enumerate(stores)]
    for _ in range(25):
        server.fault(rng.choice(kinds), method=rng.choice(["PUT", "GET"]), key="p/",
                     skip=rng.randrange(12))
    wins, counts = [], []

    def work(project):
        for at in range(4):
            project.memory.incr("n")
            counts.append(1)
            try:
                claim = project.claim(f"s{at}")
                wins.append((claim.step, claim.token))
                claim.complete()
            except tracecraft.Conflict:
                pass
            project.send("a0", f"{project.agent} {at}")
    out = together(*(lambda p=p: work(p) for p in agents))
    unsettled = [why for why in out if isinstance(why, tracecraft.Unknown)]
    assert [why for why in out if why and why not in unsettled] == []
    assert len(set(wins)) == len(wins)
    value = int(agents[0].memory.get("n")["value"])
    assert len(counts) <= value <= len(counts) + len(unsettled)
    if not unsettled:
        texts = [m["message"] for m in agents[0].inbox().messages]
        assert sorted(texts) == sorted(f"a{a} {at}" for a in range(3) for at in range(4))
    [store.close() for store in stores]


# == 14. Artifacts =====================================================
#
# Files and manifests on a directory store: what is written in which order, crashes
# between any two requests, lost answers, 0.2 clients, names that would escape.


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def handle(tmp_path):
    """handle(agent) -> another handle on the same directory store."""
    def connect(agent="ada"):
        environ = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
        return tracecraft.connect(f"file://{tmp_path}/store/p", agent=agent,
                                  environ=environ, cwd=str(tmp_path))
    return connect


@pytest.fixture
def project(handle):
    return handle()


@pytest.fixture
def local(tmp_path):
    """local(name, data) -> the path of a new local file."""
    def write(name, data):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)
    return write


@pytest.fixture
def multipart(monkeypatch):
    """Files above 4 bytes count as multipart and are read from disk."""
    monkeypatch.setattr(tracecraft, "CHUNK", 3)
    monkeypatch.setattr(tracecraft, "MULTIPART", 4)


class Killed(BaseException):
    """kill -9 between two requests."""


class Faulty:
    """A store on which request number `at` that changes something goes wrong.

    how: "before" (killed, not sent), "after" (killed, landed), "lost" (landed, the
    answer lost), "gone" (not landed, the answer lost), "busy".
    """

    def __init__(self, store, *, at=0, how="before"):
        self._inner, self._at, self._how, self.writes = store, at, how, []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __setattr__(self, name, value):
        own = name in ("_inner", "_at", "_how", "writes")
        object.__setattr__(self if own else self._inner, name, value)

    def _act(self, name, key, *rest, **how):
        self.writes.append((name, key))
        here = len(self.writes) == self._at
        if here and self._how == "before":
            raise Killed
        if here and self._how == "busy":
            raise tracecraft.Busy("409")
        if here and self._how == "gone":
            raise tracecraft.Unknown("lost")
        try:
            return getattr(self._inner, name)(key, *rest, **how)
        finally:  # whatever the answer was, it is not heard
            if here and self._how == "after":
                raise Killed
            if here and self._how == "lost":
                raise tracecraft.Unknown("lost")

    def put(self, key, data, **how):
        return self._act("put", key, data, **how)

    def upload(self, key, path, **how):
        return self._act("upload", key, path, **how)

    def copy(self, key, to):
        return self._act("copy", key, to)


def faulty(project, **how):
    project.ledger.require_arbiter()  # a probe would count as well
    project.ledger.store = store = Faulty(project.ledger.store, **how)
    return store


def writes_to(store, prefix):
    return [key for _, key in store.writes if key.startswith(prefix)]


def body(project, key):
    return project.ledger.store.get(key).body


def head_of(project, name, where="shared"):
    return json.loads(body(project, f"manifests/{where}/{name}/_head.json"))


def there(project, key):
    try:
        project.ledger.store.head(key)
    except tracecraft.NotFound:
        return False
    return True


# -- upload ------------------------------------------------------------


def test_a_fresh_small_file_is_at_the_02_key_with_a_head_of_rev_1(project, local):
    store = faulty(project)
    head = project.artifacts.upload(local("api.md", b"# api"))
    assert head["key"] == head["artifact"] == "artifacts/shared/api.md"
    assert body(project, "artifacts/shared/api.md") == b"# api"
    assert store.writes == [("put", "artifacts/shared/api.md"),
                            ("put", "manifests/shared/api.md/_head.json")]
    stored = head_of(project, "api.md")
    assert (stored["rev"], stored["sha256"], stored["size"]) == (1, sha(b"# api"), 5)
    assert stored["producer"] == {"agent": "ada", "step": None, "token": None}
    assert stored["inputs"] == stored["previous"] == []
    assert {"nonce", "prev", "recent", "type", "created_at"} <= set(stored)
    assert "changed" not in stored and "name" not in stored


def test_the_same_content_again_writes_nothing(project, local):
    path = local("a.txt", b"one")
    assert project.artifacts.upload(path)["changed"] is True
    store = faulty(project)
    assert project.artifacts.upload(path)["changed"] is False
    assert store.writes == []


def test_other_content_is_a_conflict_that_names_both_digests(project, local):
    project.artifacts.put_bytes("a.txt", b"one")
    store = faulty(project)
    with pytest.raises(tracecraft.Conflict) as why:
        project.artifacts.upload(local("a.txt", b"two"))
    assert why.value.details == {"there": sha(b"one"), "here": sha(b"two")}
    assert "Artifact artifacts/shared/a.txt has other content" in why.value.message
    assert store.writes == []


def test_overwrite_keeps_the_old_bytes_and_projects_the_new(project):
    project.artifacts.put_bytes("a.txt", b"one")
    head = project.artifacts.put_bytes("a.txt", b"two", overwrite=True)
    assert head["rev"] == 2 and head["key"] == f"blobs/{sha(b'two')}"
    assert body(project, "artifacts/shared/a.txt") == b"two"
    assert head["previous"][0]["key"] == f"blobs/{sha(b'one')}"
    assert project.artifacts.read_blob(sha(b"one")) == b"one"


def test_multipart_goes_to_a_blob_copied_to_the_02_key(project, local, multipart):
    store = faulty(project)
    head = project.artifacts.upload(local("big.bin", b"0123456789"))
    assert head["key"] == f"blobs/{sha(b'0123456789')}" and head["rev"] == 1
    assert store.writes == [("upload", head["key"]),
                            ("put", "manifests/shared/big.bin/_head.json"),
                            ("copy", head["key"])]
    assert body(project, "artifacts/shared/big.bin") == b"0123456789"


def test_progress_ends_at_the_size(project, local, multipart):
    seen = []
    path = local("b", b"x" * 100)
    project.artifacts.upload(path, progress=lambda *at: seen.append(at))
    assert seen[-1] == (100, 100)
    assert project.artifacts.put_bytes("empty", b"")["size"] == 0


def test_a_file_that_changes_on_its_way_is_not_recorded(project, local, monkeypatch,
                                                        multipart):
    path = local("log", b"0123456789")
    inner = project.ledger.store.upload

    def upload(key, source, **how):
        with open(path, "ab") as file:
            file.write(b"more")
        return inner(key, source, **how)
    monkeypatch.setattr(project.ledger.store, "upload", upload)
    with pytest.raises(tracecraft.Conflict, match="changed while"):
        project.artifacts.upload(path)
    assert not there(project, f"blobs/{sha(b'0123456789')}")
    assert not there(project, "manifests/shared/log/_head.json")


@pytest.mark.parametrize("name", ["", "../x", "a//b", "/etc/x", "a\\b", "a\nb",
                                  "_head.json", "a/..", "."])
def test_names_that_do_not_fit_are_refused(project, name):
    with pytest.raises(tracecraft.Usage):
        project.artifacts.put_bytes(name, b"x")


def test_any_utf8_and_folders_are_names(project, tmp_path):
    project.artifacts.put_bytes("bericht/größe 1.txt", b"x", step="S1.A")
    row, = project.artifacts.list("s1.a")
    assert (row["name"], row["step"], row["size"]) == ("bericht/größe 1.txt", "s1-a", 1)
    path = project.artifacts.download("bericht/größe 1.txt", step="s1.a",
                                      output=str(tmp_path / "out") + "/")
    assert path.endswith(os.path.join("out", "bericht", "größe 1.txt"))


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_only_files_can_be_uploaded(project, tmp_path, what):
    (tmp_path / "folder").mkdir()
    with pytest.raises(tracecraft.Usage):
        project.artifacts.upload(str(tmp_path / what))


# -- under a step ------------------------------------------------------


def test_the_token_of_a_claimed_step_is_recorded(project):
    project.claim("build")
    head = project.artifacts.put_bytes("out", b"x", step="build")
    assert head["producer"] == {"agent": "ada", "step": "build", "token": 1}
    assert head["artifact"] == "artifacts/build/out"


def taken_over(project, handle, step="build"):
    """Another instance of ada takes the step from `project`: token 2."""
    project.claim(step)
    new = handle()
    new.claim(step, resume=True)
    return new


def test_a_stale_token_is_fenced_before_any_byte_is_written(project, handle):
    taken_over(project, handle)
    store = faulty(project)
    with pytest.raises(tracecraft.Fenced):
        project.artifacts.put_bytes("out", b"stale", step="build", overwrite=True)
    assert store.writes == []


def test_the_claim_is_read_again_before_the_heads_cas(project, handle, monkeypatch):
    # Protocol 11.3: the step is lost after the bytes were sent.
    project.claim("build")
    inner = project.ledger.store.put

    def put(key, data, **how):
        done = inner(key, data, **how)
        if key.startswith("artifacts/"):
            handle().claim("build", resume=True)
        return done
    monkeypatch.setattr(project.ledger.store, "put", put)
    with pytest.raises(tracecraft.Fenced):
        project.artifacts.put_bytes("out", b"stale", step="build")
    assert not there(project, "manifests/build/out/_head.json")


def test_a_later_token_replaces_the_output_of_a_fenced_one(project, handle):
    project.claim("build")
    project.artifacts.put_bytes("out", b"one", step="build")
    new = handle()
    new.claim("build", resume=True)
    head = new.artifacts.put_bytes("out", b"two", step="build")
    assert head["producer"]["token"] == 2
    assert head["previous"][0]["producer"]["token"] == 1


def test_a_step_held_by_another_takes_no_artifacts_from_me(project, handle):
    project.claim("build")
    with pytest.raises(tracecraft.Held, match="Step build is claimed by 'ada'"):
        handle("bob").artifacts.put_bytes("out", b"x", step="build")


def test_anybody_adds_to_an_ended_step_but_nobody_replaces_its_outputs(project, handle):
    project.claim("build")
    project.artifacts.put_bytes("out", b"x", step="build")
    project.complete("build")
    bob = handle("bob")
    head = bob.artifacts.put_bytes("notes", b"y", step="build")
    assert head["producer"]["token"] is None
    with pytest.raises(tracecraft.Conflict, match="is an output of token 1"):
        bob.artifacts.put_bytes("out", b"z", step="build", overwrite=True)


# -- beside 0.2 --------------------------------------------------------


def test_bytes_without_a_head_are_an_artifact(project, tmp_path):
    project.ledger.store.put("artifacts/shared/old.txt", b"old")
    shown = project.artifacts.show("old.txt")
    assert (shown["rev"], shown["sha256"], shown["size"]) == (0, None, 3)
    assert project.artifacts.verify("old.txt")["sha256"] == sha(b"old")
    path = project.artifacts.download("old.txt", output=str(tmp_path))
    assert open(path, "rb").read() == b"old"


def test_bytes_without_a_head_get_one_for_the_same_digest_only(project):
    project.ledger.store.put("artifacts/shared/old.txt", b"old")
    with pytest.raises(tracecraft.Conflict, match="has other content"):
        project.artifacts.put_bytes("old.txt", b"new")
    assert not there(project, "manifests/shared/old.txt/_head.json")
    head = project.artifacts.put_bytes("old.txt", b"old")
    assert (head["rev"], head["key"]) == (1, "artifacts/shared/old.txt")


def test_overwriting_bytes_without_a_head_keeps_them(project):
    project.ledger.store.put("artifacts/shared/old.txt", b"old")
    head = project.artifacts.put_bytes("old.txt", b"new", overwrite=True)
    assert head["previous"][0]["sha256"] == sha(b"old")
    assert project.artifacts.read_blob(sha(b"old")) == b"old"
    assert body(project, "artifacts/shared/old.txt") == b"new"


@pytest.mark.parametrize("act", ["download", "verify", "upload"])
def test_02_bytes_over_a_head_that_names_the_key_are_adopted(project, tmp_path, act):
    warned = []
    project.ledger.warn = warned.append
    project.artifacts.put_bytes("a.txt", b"one")
    project.ledger.store.put("artifacts/shared/a.txt", b"two by 0.2")
    if act == "download":
        path = project.artifacts.download("a.txt", output=str(tmp_path))
        assert open(path, "rb").read() == b"two by 0.2"
    elif act == "verify":
        assert project.artifacts.verify("a.txt")["rev"] == 2
    else:
        with pytest.raises(tracecraft.Conflict):
            project.artifacts.put_bytes("a.txt", b"one")
    head = head_of(project, "a.txt")
    assert (head["rev"], head["key"]) == (2, f"blobs/{sha(b'two by 0.2')}")
    old, = head["previous"]
    assert old["sha256"] == sha(b"one") and "key" not in old
    assert len(warned) == 1 and "0.2 client" in warned[0]


def test_the_02_key_is_not_read_while_the_head_names_a_blob(project, tmp_path):
    project.artifacts.put_bytes("a.txt", b"one")
    project.artifacts.put_bytes("a.txt", b"two", overwrite=True)
    project.ledger.store.put("artifacts/shared/a.txt", b"late 0.2 bytes")
    path = project.artifacts.download("a.txt", output=str(tmp_path))
    assert open(path, "rb").read() == b"two"


def test_a_listing_shows_02_keys_with_two_listings_and_the_heads(project):
    project.artifacts.put_bytes("b", b"bb")
    project.artifacts.put_bytes("x/y", b"1", step="s1")
    project.ledger.store.put("artifacts/shared/_old", b"0.2")
    before = project.ledger.store.requests
    rows = project.artifacts.list()
    assert project.ledger.store.requests == before + 4
    assert [(r["key"], r["step"], r["name"], r["size"]) for r in rows] == [
        ("artifacts/s1/x/y", "s1", "x/y", 1),
        ("artifacts/shared/_old", None, "_old", 3),
        ("artifacts/shared/b", None, "b", 2)]
    assert tracecraft.parse_iso(rows[0]["modified"]) and rows[0]["age_s"] == 0


# -- crashes, lost answers, rivals -------------------------------------


def uploads(local, folder):
    """What the crash tests do: (name, act before, act under test)."""
    small, big = local("small", b"new"), local("big", b"0123456789")
    return {
        "fresh": (None, lambda p: p.artifacts.upload(small, name="f")),
        "fresh multipart": (None, lambda p: p.artifacts.upload(big, name="f")),
        "overwrite rev 1": (
            lambda p: p.artifacts.put_bytes("f", b"old"),
            lambda p: p.artifacts.upload(small, name="f", overwrite=True)),
        "overwrite by multipart": (
            lambda p: p.artifacts.put_bytes("f", b"old"),
            lambda p: p.artifacts.upload(big, name="f", overwrite=True)),
        "overwrite a blob": (
            lambda p: (p.artifacts.put_bytes("f", b"old"),
                       p.artifacts.put_bytes("f", b"mid", overwrite=True)),
            lambda p: p.artifacts.upload(small, name="f", overwrite=True)),
        "overwrite headless": (
            lambda p: p.ledger.store.put("artifacts/shared/f", b"old"),
            lambda p: p.artifacts.upload(small, name="f", overwrite=True)),
        "adopt, then overwrite": (
            lambda p: (p.artifacts.put_bytes("f", b"gone"),
                       p.ledger.store.put("artifacts/shared/f", b"old!")),
            lambda p: p.artifacts.upload(small, name="f", overwrite=True)),
    }


CASES = ["fresh", "fresh multipart", "overwrite rev 1", "overwrite by multipart",
         "overwrite a blob", "overwrite headless", "adopt, then overwrite"]


@pytest.mark.parametrize("how", ["before", "after", "lost", "gone", "busy"])
@pytest.mark.parametrize("case", CASES)
def test_an_upload_broken_at_any_request_is_finished_by_the_same_command(
        tmp_path, local, multipart, case, how):
    # Protocol 11.2 and 11.6.
    for at in range(1, 12):
        where = tmp_path / f"{at}"
        project = tracecraft.connect(f"file://{where}/p", agent="ada",
                                     cwd=str(tmp_path), environ={"HOME": str(where)})
        prepare, act = uploads(local, tmp_path)[case]
        if prepare:
            prepare(project)
        inner = project.ledger.store
        store = faulty(project, at=at, how=how)
        try:
            act(project)
        except Killed:
            assert how in ("before", "after")
            kept_somewhere(project, case, inner)
        else:
            assert how not in ("before", "after") or len(store.writes) < at
        project.ledger.store = inner
        act(project)
        sound(project, case)
        if len(store.writes) < at:
            return
    raise AssertionError("more requests than expected")


def kept_somewhere(project, case, store):
    """After a crash what was acknowledged before is still to be had."""
    if case in ("overwrite rev 1", "overwrite by multipart"):
        head = head_of(project, "f")
        if head["sha256"] == sha(b"old"):
            assert store.get(head["key"]).body == b"old"
        else:
            assert project.artifacts.read_blob(sha(b"old")) == b"old"


def sound(project, case):
    want = b"0123456789" if "multipart" in case else b"new"
    head = head_of(project, "f")
    assert head["sha256"] == sha(want)
    assert project.ledger.store.get(head["key"]).body == want
    assert body(project, "artifacts/shared/f") == want
    assert (head["key"] == "artifacts/shared/f") == (case == "fresh")
    for old in head["previous"]:
        if old.get("key"):
            assert sha(body(project, f"blobs/{old['sha256']}")) == old["sha256"]
    assert head["rev"] == {"fresh": 1, "fresh multipart": 1, "overwrite a blob": 3,
                           "adopt, then overwrite": 3}.get(case, 2)


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_writers_at_once_one_wins_and_all_bytes_stay(handle, overwrite):
    outcomes, blocks = [], [f"writer {n}".encode() for n in range(6)]

    def run(n):
        try:
            head = handle(f"w{n}").artifacts.put_bytes("f", blocks[n],
                                                       overwrite=overwrite)
            outcomes.append(head["rev"])
        except tracecraft.Conflict:
            outcomes.append(0)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    project = handle()
    head = project.artifacts.verify("f")
    assert head["rev"] == max(outcomes) and len(outcomes) == 6
    if not overwrite:
        assert sorted(outcomes) == [0] * 5 + [1]
        return
    assert sorted(outcomes)[-1] >= 6 and len(set(outcomes)) == 6
    for old in head["previous"]:
        assert project.artifacts.read_blob(old["sha256"]) in blocks
    assert sha(body(project, "artifacts/shared/f")) == head["sha256"]


def test_a_rivals_head_between_bytes_and_head_is_a_conflict(
        project, handle, monkeypatch, multipart, local):
    inner, rival = project.ledger.store.upload, handle("bob")

    def upload(key, path, **how):
        monkeypatch.undo()
        done = inner(key, path, **how)
        rival.artifacts.put_bytes("f", b"rival")
        return done
    path = local("f", b"0123456789")
    monkeypatch.setattr(project.ledger.store, "upload", upload)
    with pytest.raises(tracecraft.Conflict):
        project.artifacts.upload(path)
    assert body(project, "artifacts/shared/f") == b"rival"


# -- download ----------------------------------------------------------


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(".tmp-")]


def test_a_download_is_whole_or_not_at_all(project, tmp_path):
    project.artifacts.put_bytes("a.txt", b"one")
    project.artifacts.put_bytes("a.txt", b"two", overwrite=True)
    project.ledger.store.put(f"blobs/{sha(b'two')}", b"tw0")
    target = tmp_path / "out.txt"
    target.write_bytes(b"mine")
    with pytest.raises(tracecraft.Corrupt) as why:
        project.artifacts.download("a.txt", output=str(target))
    assert why.value.exit == 8 and "has other content" in why.value.message
    assert target.read_bytes() == b"mine" and leftovers(tmp_path) == []
    with pytest.raises(tracecraft.Corrupt):
        project.artifacts.verify("a.txt")
    project.ledger.store.delete(f"blobs/{sha(b'two')}")
    with pytest.raises(tracecraft.Corrupt, match="is not there"):
        project.artifacts.verify("a.txt")
    assert project.artifacts.put_bytes("a.txt", b"two")["changed"] is False
    assert project.artifacts.verify("a.txt")["ok"] is True


def test_missing_artifacts_are_not_found_and_leave_nothing(project, tmp_path):
    project.artifacts.put_bytes("report.md", b"x")
    with pytest.raises(tracecraft.NotFound, match="did you mean report.md"):
        project.artifacts.download("repor.md", output=str(tmp_path / "new") + "/")
    assert not (tmp_path / "new").exists()


def test_output_is_a_file_or_a_directory_or_here(project, tmp_path, monkeypatch):
    project.artifacts.put_bytes("d/a.txt", b"one")
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    assert project.artifacts.download("d/a.txt") == os.path.join(".", "d", "a.txt")
    for output, path in (("dir", "dir/d/a.txt"), ("f.txt", "f.txt"), ("x/y", "x/y")):
        project.artifacts.download("d/a.txt", output=output)
        assert (tmp_path / path).read_bytes() == b"one"


def test_a_download_never_leaves_its_directory(project, tmp_path):
    project.artifacts.put_bytes("d/a.txt", b"one")
    (tmp_path / "dir").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "dir" / "d").symlink_to(tmp_path / "outside")
    with pytest.raises(tracecraft.Usage, match="would leave"):
        project.artifacts.download("d/a.txt", output=str(tmp_path / "dir"))
    assert os.listdir(tmp_path / "outside") == []
    for name in ("../a.txt", "/etc/passwd", "d/../../a"):
        with pytest.raises(tracecraft.Usage):
            project.artifacts.download(name, output=str(tmp_path / "dir"))


def test_a_link_at_the_target_is_replaced_not_written_through(project, tmp_path):
    project.artifacts.put_bytes("a.txt", b"one")
    (tmp_path / "secret").write_bytes(b"mine")
    (tmp_path / "a.txt").symlink_to(tmp_path / "secret")
    path = project.artifacts.download("a.txt", output=str(tmp_path))
    assert not os.path.islink(path) and (tmp_path / "secret").read_bytes() == b"mine"


def test_a_device_is_no_place_for_a_download(project):
    project.artifacts.put_bytes("a.txt", b"one")
    with pytest.raises(tracecraft.Usage, match="is not a file"):
        project.artifacts.download("a.txt", output=os.devnull)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"sha256": "x", "size": 1}'])
def test_a_damaged_head_is_reported_and_not_overwritten(project, text):
    key = "manifests/shared/a/_head.json"
    project.ledger.store.put(key, text.encode())
    for act in (lambda: project.artifacts.show("a"),
                lambda: project.artifacts.put_bytes("a", b"x", overwrite=True)):
        with pytest.raises(tracecraft.Corrupt) as why:
            act()
        assert why.value.details["key"] == key
    assert body(project, key) == text.encode()


# -- blobs -------------------------------------------------------------


def test_blobs_are_named_by_digest_and_stored_once(project):
    one = project.artifacts.blob(b"value")
    assert one == {"sha256": sha(b"value"), "size": 5, "key": f"blobs/{sha(b'value')}"}
    assert project.artifacts.blob(b"value") == one
    assert project.artifacts.read_blob(one["sha256"]) == b"value"


def test_a_blob_cut_off_by_the_store_is_replaced(project):
    key = f"blobs/{sha(b'value')}"
    project.ledger.store.put(key, b"val")
    with pytest.raises(tracecraft.Corrupt):
        project.artifacts.read_blob(sha(b"value"))
    project.artifacts.blob(b"value")
    assert body(project, key) == b"value"


class Counting:
    """A store that writes down what is asked of it."""

    def __init__(self, store):
        self.inner, self.calls = store, []

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if name not in ("get", "head", "list", "put", "delete"):
            return value

        def call(*args, **how):
            self.calls.append((name, args[0]))
            return value(*args, **how)
        return call

    def __setattr__(self, name, value):
        if name in ("inner", "calls"):
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def asked(self, verb, part=""):
        return [key for name, key in self.calls if name == verb and part in key]


def project_of(root, agent="ada", instance="i1"):
    store = Counting(t.DirectoryStore(str(root), "proj"))
    ledger = t.Ledger(store)
    settings = types.SimpleNamespace(project="proj", config_path=None, state=None, key="")
    return t.Project(settings, ledger, t.Who(agent, instance))


@pytest.fixture
def project_16(tmp_path):
    made = project_of(tmp_path / "store")
    made.store.ensure()
    return made


def files_of(project_16):
    return os.path.join(project_16.store.bucket, "proj")


def rewrite(project_16, key, text):
    path = os.path.join(files_of(project_16), *key.split("/"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text if isinstance(text, str) else json.dumps(text))


def row(snap, sid):
    return next(step for step in snap["steps"] if step["id"] == sid)


# -- status ------------------------------------------------------------


def test_status_keeps_the_keys_of_0_2(project_16):
    project_16.heartbeat()
    snap = t.gather_status(project_16)
    assert {"project", "backend", "bucket", "generated_at", "agents", "steps",
            "mailboxes", "sessions"} <= set(snap)
    assert {"id", "status", "step", "heartbeat", "heartbeat_age_s"} <= set(
        snap["agents"][0])
    assert set(snap["sessions"]) == {
        "count", "total_uploaded_bytes", "last_uploaded_at"}
    json.dumps(snap)


def test_a_claimed_step_shows_holder_token_and_seconds(project_16):
    project_16.claim("build", ttl=60)
    step = row(t.gather_status(project_16), "build")
    assert (step["status"], step["agent"], step["token"]) == ("in_progress", "ada", 1)
    assert 60 <= step["expires_in_s"] <= 65 and step["age_s"] == 0


def test_states_0_2_does_not_know_are_projected_and_named(project_16):
    project_16.claim("a")
    project_16.release("a")
    project_16.claim("b")
    project_16.steps.end("b", "failed")
    project_16.add_step("c", needs=["b"])
    snap = t.gather_status(project_16)
    assert [(s["status"], s["state"]) for s in snap["steps"]] == [
        ("pending", "released"), ("blocked", "failed"), ("pending", "waiting")]
    assert row(snap, "c")["missing"] == ["b"] and row(snap, "a")["agent"] is None


def test_an_end_by_an_0_2_client_is_honoured(project_16):
    project_16.claim("a")
    rewrite(project_16, "steps/a/status.json", {"status": "complete", "agent": "ada"})
    rewrite(project_16, "steps/b/status.json", {"status": "in_progress", "agent": "old"})
    snap = t.gather_status(project_16)
    assert row(snap, "a")["status"] == "complete"
    assert row(snap, "b")["agent"] == "old"


def test_status_lists_four_times_and_reads_only_what_listings_leave_open(project_16):
    for n in range(12):
        project_16.add_step(f"s{n}")
    for n in range(6):
        project_16.claim(f"s{n}")
    for n in range(3):
        project_16.complete(f"s{n}")
    project_16.send("bob", "hello")
    project_16.store.calls.clear()
    t.gather_status(project_16)
    store = project_16.store
    assert len(store.asked("list")) == 4
    assert len(store.asked("get", "claim.json")) == 6
    assert not store.asked("get", "status.json")  # ended, or not there
    assert len(store.asked("get", "spec.json")) == 6  # only of what is not claimed
    assert not store.asked("get", "messages/")  # no cursor, no read
    assert not store.asked("put")


def test_unread_is_what_inbox_new_would_show(project_16, tmp_path):
    bob = project_of(tmp_path / "store", "bob", "i2")
    project_16.send("bob", "one")
    batch = bob.inbox(new=True)
    batch.commit()
    project_16.send("bob", "two")
    project_16.send("_broadcast", "all")
    bob.send("_broadcast", "mine")
    boxes = {box["agent"]: box for box in t.gather_status(project_16)["mailboxes"]}
    assert boxes["bob"] == {"agent": "bob", "total": 2, "unread": 2}
    assert boxes["_broadcast"]["unread"] is None
    assert len(bob.inbox(new=True).messages) == 2


def test_a_damaged_object_is_a_warning_and_the_rest_is_shown(project_16):
    project_16.claim("good")
    rewrite(project_16, "steps/bad/claim.json", "{nope")
    rewrite(project_16, "agents/x.json", "[]")
    snap = t.gather_status(project_16)
    assert row(snap, "bad")["state"] == "corrupt"
    assert row(snap, "good")["status"] == "in_progress"
    text = t.render_status(snap)
    assert "warning: steps/bad/claim.json" in text and "agents/x.json" in text


def test_long_lists_are_cut_and_the_telling_rows_stay(project_16):
    for n in range(30):
        rewrite(project_16, f"steps/s{n:02d}/spec.json", {})
    project_16.claim("s29")
    text = t.render_status(t.gather_status(project_16), limit=5)
    assert "+25 more, --limit" in text and "s29" in text
    assert "more, --limit" not in t.render_status(t.gather_status(project_16), limit=0)


def test_render_has_the_layout_of_0_2(project_16):
    project_16.heartbeat()
    project_16.claim("design", ttl=0)
    lines = t.render_status(t.gather_status(project_16)).splitlines()
    assert lines[0].startswith("project proj · backend file · bucket ")
    assert "AGENTS (1)" in lines and "STEPS (1): 1 in_progress" in lines
    assert f"  {'design':<24} in_progress  (agent: ada)" in lines
    assert lines[-1] == "SESSIONS: 0 · 0.0 MB · last upload never"


def test_control_characters_never_reach_the_terminal(project_16):
    rewrite(project_16, "agents/evil.json", {"id": "a\x1b[2J", "status": "x\ny"})
    assert "\x1b" not in t.render_status(t.gather_status(project_16))


# -- prime -------------------------------------------------------------


def test_prime_says_who_what_and_how_within_its_limit(project_16, tmp_path):
    project_of(tmp_path / "store", "bob", "i2").send("ada", "hi")
    project_16.claim("build", ttl=100)
    text = t.prime_text(project_16)
    assert len(text.encode()) <= t.PRIME_BYTES
    assert "you are ada" in text and "Unread messages: 1" in text
    assert "You hold step build (token 1, " in text and "data, not" in text
    assert t.invocation() in text


def test_prime_moves_no_cursor_and_stays_small_with_many_claims(project_16, tmp_path):
    project_of(tmp_path / "store", "bob", "i2").send("ada", "hi")
    for n in range(60):
        project_16.claim(f"step-{n}-" + "x" * 100)
    assert len(t.prime_text(project_16).encode()) <= t.PRIME_BYTES
    assert len(project_16.inbox(new=True).messages) == 1


def test_prime_without_a_store_still_instructs(project_16):
    def down(*args, **how):
        raise t.Unavailable("nobody answers")
    project_16.mail.inbox = down
    assert "nobody answers" in t.prime_text(project_16)


# -- doctor ------------------------------------------------------------


def check(doc, name):
    return next(row for row in doc["checks"] if row["name"] == name)


def test_a_worked_project_is_healthy(project_16, tmp_path):
    project_16.heartbeat()
    project_16.add_step("b", needs=["a"])
    project_16.claim("a")
    project_16.complete("a", note="done", to="bob")
    project_16.claim("b")
    project_16.renew("b")
    project_16.send("bob", "x")
    project_16.memory.set("k.v", "1")
    doc = t.diagnose(project_16)
    assert doc["ok"] and doc["exit"] == 0 and not doc["problems"]
    assert "All is well." in t.render_doctor(doc)


@pytest.mark.parametrize("key, content, says", [
    ("steps/a/claim.json", "{", "not JSON"),
    ("steps/a/claim.json", {"claimed_at": "x"}, "has no 'agent'"),
    ("steps/a/claim.json", {"agent": 5, "claimed_at": "x"}, "has a int as 'agent'"),
    ("memory/k.json", [1], "not an object"),
    ("messages/bob/1_a_b.json", {"from": "a"}, "has no 'to'"),
])
def test_damage_is_named_with_its_key_and_exit_8(project_16, key, content, says):
    rewrite(project_16, key, content)
    doc = t.diagnose(project_16, fix=True)
    assert not doc["ok"] and doc["exit"] == 8
    assert doc["problems"][0]["key"] == key and says in doc["problems"][0]["problem"]
    assert key in t.render_doctor(doc)


def test_crashed_projections_are_found_and_mended(project_16):
    project_16.claim("a")
    project_16.complete("a", note="n")
    project_16.store.delete("steps/a/status.json")
    project_16.store.delete("steps/a/handoff.json")
    doc = t.diagnose(project_16)
    assert not doc["ok"] and doc["exit"] == 1
    doc = t.diagnose(project_16, fix=True)
    assert doc["ok"] and doc["problems"][0]["fixed"]
    assert t.diagnose(project_16)["ok"] and not t.diagnose(project_16)["problems"]


def test_unknown_keys_are_a_note_not_a_failure(project_16):
    rewrite(project_16, "stuff/x.txt", "?")
    doc = t.diagnose(project_16)
    assert doc["ok"] and "stuff/x.txt" in doc["notes"][0]


def test_stray_temporary_files_are_removed_by_fix_when_old(project_16):
    project_16.claim("a")
    folder = os.path.join(files_of(project_16), "steps", "a")
    old, new = (os.path.join(folder, t.TEMP + name) for name in ("1-old", "2-new"))
    for path in (old, new):
        open(path, "w").close()
    os.utime(old, (1, 1))
    assert t.diagnose(project_16)["problems"][0]["key"] == old
    assert t.diagnose(project_16, fix=True)["ok"]
    assert not os.path.exists(old) and os.path.exists(new)


def test_two_spellings_of_a_step_are_noted(project_16):
    rewrite(project_16, "steps/S1.A/spec.json", {})
    rewrite(project_16, "steps/s1-a/spec.json", {})
    assert any("S1.A" in note for note in t.diagnose(project_16)["notes"])


def test_a_silent_store_is_a_finding(project_16):
    def down(*args, **how):
        raise t.Unavailable("connection refused", hint="is it up?")
    project_16.store.inner.list = down
    doc = t.diagnose(project_16)
    assert (doc["ok"], doc["exit"]) == (False, 7)
    assert "connection refused" in check(doc, "store")["detail"]


def test_credentials_are_named_by_source_only(project_16):
    project_16.store.inner.kind = "s3"
    project_16.settings.config = {}
    project_16.settings.environ = {"AWS_ACCESS_KEY_ID": "AKIAX",
                                "AWS_SECRET_ACCESS_KEY": "hush"}
    doc = t.diagnose(project_16)
    assert "environ" in check(doc, "credentials")["detail"]
    assert "hush" not in json.dumps(doc) and "AKIAX" not in json.dumps(doc)


def settings_in(folder, name="proj"):
    store = t.store_url({"kind": "file", "bucket": str(folder / "store"),
                         "project": name})
    environ = {**os.environ, "HOME": str(folder),
               "XDG_STATE_HOME": str(folder / "state")}
    return t.load_settings({"store": store}, environ, str(folder))


def options_of(**given):
    return types.SimpleNamespace(**{"flags": {}, "as_json": False, **given})


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "src"
    (folder / "sub").mkdir(parents=True)
    for n in range(5):
        (folder / f"m{n}.py").write_text("x\n" * (n + 1) + "# TODO one\n")
    (folder / "sub" / "deep.txt").write_text("deep\n")
    (folder / "image.bin").write_bytes(b"\0\1\2")
    (folder / ".hidden").write_text("no\n")
    return folder


# -- demo --------------------------------------------------------------


def test_demo_holds_every_invariant_in_under_15_seconds(tmp_path, sources):
    out = io.StringIO()
    code = t.demo(settings_in(tmp_path), str(sources), out=out, live=False)
    text = out.getvalue()
    assert code == 0, text
    assert "FAIL" not in text and text.count("\nok  ") == 11
    assert float(re.search(r"\n([\d.]+) s\. The files", text).group(1)) < 15
    assert "kim   was killed (-9) while holding" in text
    assert "sam   was fenced" in text and "token 2" in text


@pytest.mark.soak
def test_demo_leaves_files_where_it_says(tmp_path, sources):
    out = io.StringIO()
    assert t.demo(settings_in(tmp_path), str(sources), out=out, live=True) == 0
    where = re.search(r"The files: (.*)", out.getvalue()).group(1)
    report = os.path.join(where, "artifacts", "report", "report.md")
    with open(report, encoding="utf-8") as file:
        assert "6 files" in file.read()
    with open(os.path.join(where, "steps", "f01-m0-py", "claim.json")) as file:
        assert json.load(file)["token"] == 2


@pytest.mark.soak
def test_a_directory_without_files_gets_samples_and_stays_empty(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = io.StringIO()
    assert t.demo(settings_in(tmp_path), str(empty), out=out, live=False) == 0
    assert "samples are added" in out.getvalue() and not list(empty.iterdir())


def test_demo_takes_text_files_only_and_at_most_the_limit(sources):
    names = [name for name, _ in t.demo_files(str(sources))]
    assert names == ["m0.py", "m1.py", "m2.py", "m3.py", "m4.py", "sub/deep.txt"]
    assert len(t.demo_files(str(sources), limit=3)) == 3


def test_measure_tells_lines_longest_todos_and_digest(sources):
    facts = t.measure(str(sources / "m1.py"))
    assert (facts["lines"], facts["longest"], facts["todos"]) == (3, 10, 1)
    assert len(facts["sha256"]) == 64


def claim_of(*events, token):
    return {"token": token, "history": [{"state": state, "token": number}
                                        for state, number in events]}


@pytest.mark.parametrize("claim, good", [
    (claim_of(("in_progress", 1), ("complete", 1), token=1), True),
    (claim_of(("in_progress", 1), ("in_progress", 2), ("complete", 2), token=2), True),
    (claim_of(("in_progress", 1), ("in_progress", 1), ("complete", 1), token=1), False),
    (claim_of(("in_progress", 2), ("in_progress", 1), ("complete", 1), token=1), False),
    (claim_of(("in_progress", 1), ("complete", 1), ("complete", 1), token=1), False),
    (claim_of(("in_progress", 1), token=1), False),
    (None, False),
])
def test_the_check_of_histories_catches_what_must_not_be(claim, good):
    assert t.tokens_grow(claim) is good


@pytest.mark.soak
def test_demo_fails_when_an_invariant_does_not_hold(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(t, "tokens_grow", lambda claim: False)
    out = io.StringIO()
    assert t.demo(settings_in(tmp_path), str(sources), out=out, live=False) == 1
    assert "FAIL  tokens only grow" in out.getvalue()


# -- workers -----------------------------------------------------------


def test_a_worker_of_an_unknown_kind_is_a_usage_error():
    with pytest.raises(t.Usage):
        t.worker(["nonsense"])


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP here")
def test_dismiss_ends_stopped_workers_too(tmp_path):
    settings = settings_in(tmp_path)
    crew = t.Crew(settings.store_url, settings.environ)
    crew.start("drill", "w", peer="w")
    assert crew.next(20)[1]["event"] == "ready"
    crew.signal("w", signal.SIGSTOP)
    crew.dismiss()
    assert crew.next(5)[1] == {"event": "end", "exit": -9}


def test_what_a_worker_prints_besides_events_is_kept(tmp_path):
    settings = settings_in(tmp_path)
    crew = t.Crew("ftp://nonsense", settings.environ)
    crew.start("drill", "w")
    events = [crew.next(20)[1], crew.next(20)[1]]
    crew.dismiss()
    assert events[0]["event"] in ("trouble", "noise") and events[1]["exit"] == 2


# -- drill -------------------------------------------------------------


def test_drill_finds_nothing_wrong_and_leaves_nothing(tmp_path):
    out = io.StringIO()
    code = t.drill(settings_in(tmp_path), options_of(agents=4, rounds=2), out=out)
    text = out.getvalue()
    assert code == 0, text
    assert "claims: winners per round 1 1 (token 1; 4 racers)" in text
    assert "counters: 8 acknowledged, 8 stored, 0 lost updates" in text
    assert "mail: 8 sent, 0 lost, 0 doubled" in text
    assert "takeovers: winners per round 1 1 (token 2" in text
    assert "former holder was fenced" in text and "p99 ms" in text
    store = t.DirectoryStore(str(tmp_path / "store"), re.search(
        r"drill-\w+", text).group(0))
    assert not store.list("").entries


def racers(answers):
    run = t.Drill(None, count=2, rounds=1)
    run.race = lambda mode, at: answers
    return run


def test_drill_reports_two_winners():
    run = racers([{"won": 1, "samples": []}, {"won": 1, "samples": []}])
    run.claims("claims", 1, token=1)
    assert run.wrong and run.lines[0].startswith("FAIL  claims: winners per round 2")


@pytest.mark.parametrize("won, winners, same, good", [
    (["a", ""], 1, False, True), (["a", "b"], 1, False, False),
    (["a", "b"], 2, False, True), (["a", "a"], 2, False, False),
    (["", ""], 1, False, False), (["open", "open"], 2, True, True),
    (["open", "broken"], 2, True, False), (["open", ""], 2, True, False)])
def test_drill_reports_too_many_too_few_and_one_thing_won_twice(won, winners, same,
                                                                good):
    run = racers([{"prize": prize, "samples": []} for prize in won])
    run.prizes("locks", winners=winners, same=same)
    assert bool(run.wrong) == (not good)


def test_drill_reports_lost_updates():
    run = racers([{"added": True, "samples": []}] * 2)
    run.counters(types.SimpleNamespace(memory=types.SimpleNamespace(
        get=lambda key: {"value": "1"})))
    assert "1 lost updates" in run.wrong[0]


@pytest.mark.parametrize("read, says", [
    ([["racer-1 1"], ["racer-0 1", "racer-0 1"]], "0 lost, 1 doubled"),
    ([["racer-1 1"], []], "1 lost, 0 doubled"),
])
def test_drill_reports_lost_and_doubled_messages(read, says):
    run = racers([])
    run.race = lambda mode, at: [{"read": texts if at else []} for texts in read]
    run.mail()
    assert says in run.wrong[0]


def test_drill_refuses_a_race_of_one(tmp_path):
    with pytest.raises(t.Usage):
        t.drill(settings_in(tmp_path), options_of(agents=1, rounds=1),
                out=io.StringIO())


@pytest.mark.parametrize("q, value", [(0.5, 51), (0.95, 96), (0.99, 100), (1, 100)])
def test_quantiles_are_by_nearest_rank(q, value):
    assert t.quantile(list(range(1, 101)), q) == value


# -- bench -------------------------------------------------------------


@pytest.mark.soak
def test_bench_measures_both_sides_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv(t.BENCH_STORE, raising=False)
    peer = f"{sys.executable} -c pass"
    out = io.StringIO()
    options = options_of(peer=peer, quick=True, as_json=True, agents=3, steps=5, size=1,
                         ready=8, workers=4, graph=6)
    assert t.bench(options, out=out) == 0
    text, rows = out.getvalue(), json.loads(out.getvalue().splitlines()[-1])["rows"]
    assert {"cold start: --version", "GETs on one connection", "upload of 1 MiB",
            "status, 3 agents, 5 steps"} <= {row["what"] for row in rows}
    cold = next(row for row in rows if row["what"] == "cold start: --version")
    assert cold["ratio"] == pytest.approx(cold["peer"] / cold["ours"])
    assert "skipped" in text
    assert not [name for name in os.listdir(tmp_path) if name.startswith("tracecraft-")]


def test_seeded_steps_look_like_worked_ones(tmp_path):
    settings = settings_in(tmp_path)
    with t.connect(settings.store_url, environ=settings.environ) as project:
        project.init()
        t.seed_project(project, 2, steps=10)
        snap = t.gather_status(project)
        assert len(snap["steps"]) == 10 and t.diagnose(project)["ok"]
        states = [step["state"] for step in snap["steps"]]
        assert states.count("complete") == 8 and states.count("in_progress") == 2


def test_the_hidden_command_runs_from_the_file_itself(tmp_path):
    job = {"store": t.store_url({"kind": "file", "bucket": str(tmp_path / "s"),
                                 "project": "p"}), "agent": "w", "peer": "w"}
    said = subprocess.run(
        [sys.executable, t.__file__, "_worker", "drill"], encoding="utf-8",
        input=json.dumps(job) + "\nclaims 1\nstop 0\n", stdout=subprocess.PIPE,
        env={**os.environ, "HOME": str(tmp_path)}, check=True).stdout
    events = [json.loads(line) for line in said.splitlines()]
    assert [event["event"] for event in events] == ["ready", "round"]
    assert events[1]["won"] == 1


# == 18. Rows ==========================================================
#
# The commands as real processes: an empty environment, an empty directory, the
# directory store. Texts are those of 0.2.5 where it has the command.


PROGRAM = os.path.abspath(tracecraft.__file__)
RUN = [sys.executable, "-S", "-m", "tracecraft"]  # as a module: its bytecode is cached
SLOW = 30  # seconds no command of these may take


class Shell:
    """Runs commands in one directory, as one agent, with nothing in the environment."""

    def __init__(self, tmp_path):
        self.tmp, self.cwd = tmp_path, str(tmp_path / "work")
        self.home, self.environ = str(tmp_path / "home"), {}
        os.makedirs(self.cwd)
        os.makedirs(self.home)

    def env(self, more):
        return {"PATH": "/usr/bin:/bin", "HOME": self.home, "TRACECRAFT_AGENT": "ada",
                "PYTHONPATH": os.path.dirname(PROGRAM), **self.environ, **more}

    def start(self, *words, **more):
        return subprocess.Popen([*RUN, *words], cwd=self.cwd,
                                env=self.env(more), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, stdin=b"", **more):
        done = subprocess.run([*RUN, *words], cwd=self.cwd,
                              env=self.env(more), input=stdin, timeout=SLOW * 4,
                              capture_output=True)
        done.out, done.err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in done.err, done.err
        return done

    def ok(self, *words, **how):
        done = self.run(*words, **how)
        assert done.returncode == 0, done.err
        return done.out

    def json(self, *words, **how):
        return json.loads(self.ok("--json", *words, **how))

    def refused(self, exit_code, *words, **how):
        done = self.run(*words, **how)
        assert (done.returncode, done.out) == (exit_code, ""), (done.out, done.err)
        return done.err

    def objects(self):
        """{file below the working directory: bytes}, locks and presence left out."""
        found = {}
        for folder, _, names in os.walk(self.cwd):
            for name in names:
                path = os.path.join(folder, name)
                if ".locks" not in path and f"{os.sep}agents{os.sep}" not in path:
                    with open(path, "rb") as file:
                        found[path] = file.read()
        return found


@pytest.fixture
def sh(tmp_path):
    shell = Shell(tmp_path)
    shell.ok("whoami")  # the embedded store has been announced
    return shell


@pytest.mark.parametrize("row", [run.row for run in tracecraft.command_functions()],
                         ids=lambda row: row.name)
def test_every_help_has_purpose_two_examples_and_exit_codes_on_one_screen(row):
    lines = tracecraft.row_help(row).splitlines()
    assert lines[1].strip() == row.purpose and len(row.examples) == 2
    assert all(example.startswith(row.name) for example in row.examples)
    assert any(line.startswith("exit codes: 0 done") for line in lines)
    assert len(lines) <= 28 and max(map(len, lines)) <= 88


@pytest.mark.parametrize("row", [run.row for run in tracecraft.command_functions()],
                         ids=lambda row: row.name)
def test_every_example_is_a_call_that_parses(row):
    for example in row.examples:
        text = example.split(" > ")[0].split(" | ")[0]
        words, _, rest = tracecraft.split_argv(shlex.split(text))
        run, words = tracecraft.find_command(words)
        tracecraft.parse_words(run, words, rest)


def test_without_a_command_the_list_fits_one_screen(sh):
    out = sh.ok()
    assert len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 80
    for run in tracecraft.command_functions():
        assert run.row.name.split()[0] in out


def test_version_carries_the_digest_of_the_file(sh):
    import hashlib
    with open(PROGRAM, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    assert sh.ok("--version") == f"tracecraft {tracecraft.__version__} ({digest})\n"


def test_the_embedded_store_is_named_once_on_stderr(tmp_path):
    shell = Shell(tmp_path)
    assert "embedded store" in shell.run("status").stderr.decode()
    assert shell.run("status").stderr == b""


def test_global_flags_stand_anywhere_before_the_dashes(sh):
    for words in (["--json", "claim", "s"], ["claim", "--json", "s"],
                  ["claim", "s", "--json", "--agent=ada"]):
        assert json.loads(sh.ok(*words))["step"] == "s"
    sh.ok("send", "bob", "--", "--json")
    assert "ada: --json\n" in sh.ok("inbox", TRACECRAFT_AGENT="bob")


# == 19. Step commands =================================================


def test_a_step_goes_from_hand_to_hand_in_the_words_of_0_2(sh):
    assert sh.ok("claim", "design") == "Claimed step design as ada\n"
    sh.ok("whoami", TRACECRAFT_AGENT="bob")
    err = sh.refused(3, "claim", "design", TRACECRAFT_AGENT="bob")
    assert err.startswith("Error: Step design already claimed by ada\n")
    assert sh.ok("step-status", "design") == "design: in_progress (agent: ada)\n"
    assert sh.ok("complete", "design", "--note", "see api.md", "--to", "bob") \
        == "Completed step design → handed off to bob\n"
    assert "note: see api.md" in sh.ok("handoff", "design", TRACECRAFT_AGENT="bob")
    assert sh.ok("wait-for", "design") == "All steps complete: design\n"
    assert sh.ok("step-status", "other") == "other: pending\n"


def test_completing_counts_the_files_git_saw_change(sh):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
                       cwd=sh.cwd, check=True, capture_output=True)
    git("init")
    for name in ("a é.txt", "b"):
        with open(os.path.join(sh.cwd, name), "w") as file:
            file.write("1")
    git("add", ".")
    git("commit", "-m", "x")
    for name in ("a é.txt", "b"):
        with open(os.path.join(sh.cwd, name), "w") as file:
            file.write("2")
    sh.ok("claim", "s")
    out = sh.ok("complete", "s", "--changed-files-from-git", "--to", "x")
    assert out == "Completed step s → handed off to x (2 changed file(s))\n"
    assert sh.json("handoff", "s")["changed_files"] == ["a é.txt", "b"]


@pytest.mark.parametrize("flag, line, state", [
    ("--blocked", "Blocked step s", "blocked"), ("--failed", "Failed step s", "failed"),
    ("--needs-review", "Needs review on step s", "needs_review")])
def test_a_step_can_end_otherwise(sh, flag, line, state):
    sh.ok("claim", "s")
    assert sh.ok("complete", "s", flag) == line + "\n"
    assert sh.json("step-status", "s")["state"] == state
    if state != "needs_review":
        assert "Step s is" in sh.refused(5, "wait-for", "s")


def test_review_is_approved_or_sent_back(sh):
    for step, verb, state in (("a", "approve", "complete"), ("b", "reject", "released")):
        sh.ok("claim", step)
        sh.ok("complete", step, "--needs-review")
        sh.ok(verb, step, "--note", "why", TRACECRAFT_AGENT="bob")
        assert sh.json("step-status", step)["state"] == state


def test_needs_are_waited_for(sh):
    sh.ok("step", "add", "api", "--title", "the API")
    sh.ok("step", "add", "docs", "--needs", "api")
    assert "api" in sh.refused(5, "claim", "docs")
    assert "docs                     pending [waiting for api]" in sh.ok("step", "list")
    sh.ok("claim", "docs", "--ignore-needs")
    assert "the API" in sh.ok("step", "show", "api")


def test_waiting_ends_with_the_time_given(sh):
    began = time.monotonic()
    sh.ok("claim", "s", TRACECRAFT_AGENT="bob")
    sh.refused(6, "claim", "s", "--wait", "0.5")
    assert "Timeout after 0.5s" in sh.refused(6, "wait-for", "s", "--timeout", "0.5")
    assert time.monotonic() - began < SLOW


# -- claim … -- CMD


def child(code):
    return ["--", sys.executable, "-c", code]


def tool(*words):
    return ["--", sys.executable, PROGRAM, *words]


def test_a_command_sees_its_step_and_completes_it(sh):
    sh.ok("step", "add", "n")
    sh.ok("complete", "n")
    sh.ok("step", "add", "s", "--title", "a title", "--needs", "n")
    out = sh.ok("claim", "S", *child(
        "import os; print([os.environ['TRACECRAFT_' + n] for n in ('STEP', 'TOKEN',"
        "'TITLE', 'NEEDS', 'ATTEMPT', 'PROJECT', 'AGENT')])"))
    assert out == "['s', '1', 'a title', 'n', '1', 'work', 'ada']\n"
    assert sh.json("step-status", "s")["state"] == "complete"


def test_a_command_that_fails_releases_its_step_and_lends_its_exit_code(sh):
    assert sh.run("claim", "s", *child("raise SystemExit(7)")).returncode == 7
    assert sh.json("step-status", "s")["state"] == "released"


def test_a_command_may_end_its_own_step(sh):
    assert sh.run("claim", "s", *tool("complete", "s", "--blocked")).returncode == 0
    assert sh.json("step-status", "s")["state"] == "blocked"


def test_a_claim_is_renewed_beside_its_command(sh):
    assert sh.run("claim", "s", "--ttl", "3", *child("import time; time.sleep(5)")
                  ).returncode == 0
    assert sh.json("step-status", "s")["token"] == 1


def test_a_command_whose_lease_was_taken_is_ended_with_4(sh):
    process = sh.start("claim", "s", "--ttl", "3",
                       *child("import time; print(1, flush=True); time.sleep(60)"))
    assert process.stdout.readline() == b"1\n"
    sh.ok("complete", "s", "--force", "--note", "by hand", TRACECRAFT_AGENT="bob")
    out, err = process.communicate(timeout=SLOW)
    assert process.returncode == 4 and b"bob" in err
    assert sh.json("step-status", "s")["agent"] == "bob"


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_a_command_ends_and_the_step_is_released(sh, kind):
    process = sh.start("claim", "s", *child("import time; print(1, flush=True);"
                                            "time.sleep(60)"))
    assert process.stdout.readline() == b"1\n"
    process.send_signal(kind)
    process.communicate(timeout=SLOW)
    assert process.returncode == 130
    assert sh.json("step-status", "s")["state"] == "released"


def test_a_command_that_is_not_there_claims_nothing(sh):
    before = sh.objects()
    assert "not found" in sh.refused(2, "claim", "s", "--", "no-such-command")
    assert "no command after --" in sh.refused(2, "claim", "s", "--")
    assert sh.objects() == before


# == Task commands =====================================================


def test_a_plan_is_worked_off_by_a_loop_of_one_line(sh):
    sh.ok("step", "add", "--plan", "-", stdin=PLAN.encode())
    script = ("echo $TRACECRAFT_STEP $TRACECRAFT_TOKEN $TRACECRAFT_ATTEMPT"
              " \"$TRACECRAFT_TITLE\" $TRACECRAFT_NEEDS")
    done = subprocess.run(
        ["sh", "-c", f"while {shlex.join(RUN)} next --claim --wait 60 -- sh -c"
         f" {shlex.quote(script)}; do :; done"], cwd=sh.cwd, env=sh.env({}),
        capture_output=True, text=True, timeout=SLOW * 2)
    assert done.stdout.splitlines() == [
        "design 1 1 the design", "s1-a 1 1 title (with brackets) design",
        "docs 1 1 the guide s1-a"], done.stderr
    assert "no step can become ready" in done.stderr
    assert "Completed step docs" in done.stderr


def test_a_step_whose_command_fails_is_tried_again_and_then_failed(sh):
    sh.ok("step", "add", "a", "--max-attempts", "2")
    sh.ok("step", "add", "b", "--needs", "a")
    for word in ("Released", "Failed"):
        done = sh.run("next", "--claim", "--", "false")
        assert done.returncode == 0 and f"{word} step a (exit code 1)" in done.err
    assert "no step can become ready; failed or blocked: a" in sh.refused(1, "next")
    assert "b                        pending [waiting for a (failed)]" in sh.ok(
        "step", "list")
    assert "waiting for a (failed)" in sh.ok("status")


def test_terminating_a_worker_releases_its_step_at_once(sh):
    sh.ok("step", "add", "a")
    worker = sh.start("next", "--claim", "--", "sh", "-c", "echo on; sleep 60")
    assert worker.stdout.readline() == b"on\n"
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=SLOW)
    assert worker.returncode == 130
    assert sh.json("step-status", "a")["state"] == "released"


def test_terminating_a_waiting_worker_ends_it_at_once(sh):
    sh.ok("claim", "other")
    worker = sh.start("next", "--claim", "--wait", "60", "--", "true")
    time.sleep(1)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=SLOW)
    assert worker.returncode == 130 and time.monotonic() - began < 3


def test_a_worker_that_was_fenced_exits_with_4(sh):
    sh.ok("step", "add", "a")
    force = shlex.join([*RUN, "complete", "a", "--force", "--agent", "boss"])
    done = sh.run("next", "--claim", "--", "sh", "-c",
                  f"unset TRACECRAFT_TOKEN TRACECRAFT_STEP; {force}")
    assert done.returncode == 4 and "fenced" in done.err


def test_a_command_of_next_may_end_its_own_step(sh):
    sh.ok("step", "add", "a")
    inner = shlex.join([*RUN, "complete", "a", "--blocked", "--note", "no key"])
    done = sh.run("next", "--claim", "--", "sh", "-c", inner)
    assert done.returncode == 0 and "Step a is blocked, as its command left it" in \
        done.err


def test_waiting_for_a_step_ends_with_6_and_finding_none_with_1(sh):
    sh.ok("claim", "other")
    assert "no step became ready within 0.3s" in sh.refused(
        6, "next", "--claim", "--wait", "0.3")
    assert "no step is ready now" in sh.refused(1, "next", "--claim")
    sh.refused(2, "next", "--", "no-such-command-here")


def test_next_prints_the_step_and_with_claim_its_claim_record(sh):
    sh.ok("step", "add", "b", "--title", "later", "--priority", "7")
    sh.ok("step", "add", "a", "--title", "the \x1b[1mfirst")
    assert sh.ok("next") == "a: the \\x1b[1mfirst\n"
    doc = sh.json("next", "--claim")
    assert (doc["step"], doc["token"], doc["agent"]) == ("a", 1, "ada")
    assert sh.ok("complete", "a", "--next") == (
        "Completed step a\nClaimed step b as ada\n")
    done = sh.run("complete", "b", "--next")
    assert (done.returncode, done.out) == (0, "Completed step b\n")
    assert "no step can become ready" in done.err


def test_a_plan_with_faults_lists_them_all_and_writes_nothing(sh):
    before = sh.objects()
    err = sh.refused(2, "step", "add", "--plan", "-", stdin=(
        b"- [ ] a: x (needs: b)\n- [ ] b: y (needs: a)\n- [ ] c d: z\n- [ ] e: z (nee"
        b"ds: f)\n"))
    assert "the plan has 3 fault(s), nothing was added" in err
    for fault in ("'c d' does not fit", "e needs f, which is not there",
                  "cycle: a → b → a"):
        assert fault in err
    assert sh.objects() == before


@pytest.mark.parametrize("words", [
    ["step", "add"], ["step", "add", "a", "--plan", "x"], ["step", "edit", "a"],
    ["step", "add", "--plan", "/nowhere"], ["step", "add", "a", "--priority", "10"],
    ["step", "add", "a", "--needs", "a"], ["step", "add", "a", "--label", "a b"]])
def test_a_step_cannot_be_described_with_nonsense(sh, words):
    assert sh.refused(2, *words)


def test_a_graph_is_drawn_in_three_languages(sh):
    sh.ok("step", "add", "--plan", "-", stdin=PLAN.encode())
    sh.ok("claim", "design")
    assert sh.ok("step", "graph").splitlines()[:2] == [
        "[~] design  the design  [in_progress]",
        "[ ] s1-a  title (with brackets)  ← design  [waiting]"]
    assert "s0 --> s1" in sh.ok("step", "graph", "--format", "mermaid")
    assert '"design" -> "s1-a";' in sh.ok("step", "graph", "--format", "dot")
    items = sh.json("step", "graph")["items"]
    assert [(row["step"], row["needs"]) for row in items] == [
        ("design", []), ("s1-a", ["design"]), ("docs", ["s1-a"])]


def test_context_is_what_went_before(sh):
    sh.ok("complete", "a", "--note", "mind the gap", "--finding", "f1")
    sh.ok("step", "add", "b", "--needs", "a", "--title", "next one")
    assert sh.ok("context", "b").splitlines() == [
        "b: next one (pending)", "a (complete by ada)", "  note: mind the gap",
        "  finding: f1"]
    assert sh.json("context", "b")["upstream"][0]["findings"] == ["f1"]
    sh.refused(1, "context", "nobody")


# == 20. Commands of memory, mail and files ============================
# == 20. Commands of memory and mail ===================================


def test_memory_is_set_read_counted_and_deleted(sh):
    assert sh.ok("memory", "set", "plan.status", "in review") \
        == "Set plan.status = in review\n"
    assert sh.ok("memory", "get", "plan.status") == "in review\n"
    assert list(json.loads(sh.ok("memory", "get", "plan.status", "--with-meta"))) \
        == ["key", "value", "set_by", "set_at"]
    assert sh.ok("memory", "incr", "n", "-2") == "Set n = -2\n"
    sh.ok("memory", "append", "log", "a")
    assert sh.ok("memory", "append", "log", "-", stdin=b"b\n") == "Set log = a\n  b\n"
    assert sh.ok("memory", "merge", "doc", '{"a": 1}') == 'Set doc = {"a": 1}\n'
    assert sh.ok("memory", "list") == "doc\nlog\nn\nplan.status\n"
    sh.ok("memory", "delete", "log")
    sh.refused(1, "memory", "get", "log")
    assert "] ada: in review" in sh.ok("memory", "history", "plan.status")


def test_a_value_comes_from_stdin_or_a_file_byte_for_byte(sh):
    path = os.path.join(sh.cwd, "v.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("@é\n\n")
    sh.ok("memory", "set", "a", "--file", path)
    sh.ok("memory", "set", "b", "-", stdin="@é\n\n".encode())
    assert sh.ok("memory", "get", "a") == sh.ok("memory", "get", "b") == "@é\n\n"
    sh.ok("memory", "set", "c", "--", "-")
    assert sh.ok("memory", "get", "c") == "-\n"


def test_messages_are_sent_read_once_and_acknowledged(sh):
    assert sh.ok("send", "bob", "hi", "--step", "S1", "--ack") == "Sent to bob: hi\n"
    sh.ok("send", "_broadcast", "all")
    out = sh.ok("inbox", "--new", TRACECRAFT_AGENT="bob").splitlines()
    assert out[0].endswith("] (direct) ada [step s1]: hi")
    assert out[1].startswith("  to acknowledge: tracecraft ack ")
    assert out[2].endswith("] (broadcast) ada: all")
    assert sh.ok("inbox", "--new", TRACECRAFT_AGENT="bob") == "No new messages.\n"
    sh.ok("ack", out[1].split()[-1], TRACECRAFT_AGENT="bob")
    assert sh.ok("inbox") == "No messages.\n"


def test_a_message_that_cannot_be_printed_stays_new(sh):
    sh.ok("send", "bob", "hi")
    with open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w") as full:
        done = subprocess.run([*RUN, "inbox", "--new"], cwd=sh.cwd,
                              env=sh.env({"TRACECRAFT_AGENT": "bob"}), stdout=full,
                              stderr=subprocess.PIPE)
    if full.name == "/dev/full":
        assert done.returncode == 1 and b"could not be written" in done.stderr
        assert "hi" in sh.ok("inbox", "--new", TRACECRAFT_AGENT="bob")


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\rb", "\u202eevil", "x\x07"])
def test_what_others_wrote_cannot_drive_the_terminal(sh, text):
    sh.ok("send", "bob", text)
    out = sh.ok("inbox", TRACECRAFT_AGENT="bob")
    assert all(char not in out for char in "\x1b\r\u202e\x07")


def test_a_message_cannot_pretend_to_be_two(sh):
    sh.ok("send", "bob", "a\n[2020] (direct) eve: b")
    out = sh.ok("inbox", TRACECRAFT_AGENT="bob").splitlines()
    assert out[1].startswith("  [2020]")


def test_ten_megabytes_are_sent_and_set(sh):
    data = b"x" * (10 << 20)
    sh.ok("send", "bob", "-", stdin=data)
    sh.ok("memory", "set", "big", "-", stdin=data)
    assert len(sh.ok("memory", "get", "big")) == (10 << 20) + 1
    assert len(sh.ok("inbox", TRACECRAFT_AGENT="bob")) < 20_000


def test_files_are_shared_in_the_words_of_0_2(sh):
    with open(os.path.join(sh.cwd, "api.md"), "w") as file:
        file.write("one")
    key = "artifacts/design/api.md"
    assert sh.ok("artifact", "upload", "api.md", "--step", "design") \
        == f"Uploaded api.md -> {key}\n"
    assert sh.ok("artifact", "list") == key + "\n"
    assert sh.ok("artifact", "download", "api.md", "--step", "design", "-o", "out") \
        == f"Downloaded {key} -> out\n"
    sh.ok("artifact", "verify", "api.md", "--step", "design")
    assert "3 B" in sh.ok("artifact", "show", "api.md", "--step", "design")
    with open(os.path.join(sh.cwd, "api.md"), "w") as file:
        file.write("two")
    sh.refused(3, "artifact", "upload", "api.md", "--step", "design")
    sh.ok("artifact", "upload", "api.md", "--step", "design", "--overwrite")
    sh.refused(1, "artifact", "download", "nope")


# == 21. Commands of presence, views and set-up ========================


def test_presence_and_views_answer(sh):
    sh.ok("heartbeat", "--summary", "x")
    assert sh.ok("agents").splitlines()[0].split()[:3] == ["ID", "Status", "Step"]
    sh.ok("claim", "s")
    assert sh.json("checkin")["renewed"] == ["s"]
    assert "renewed: s" in sh.ok("checkin")
    assert list(sh.json("status"))[:5] == ["project", "backend", "bucket",
                                           "generated_at", "agents"]
    assert len(sh.ok("prime").encode()) <= 2048
    assert sh.json("doctor")["ok"] is True
    assert sh.ok("leave") == "ada left\n"
    assert "ada" not in sh.ok("agents") and "ada" in sh.ok("agents", "--all")


def test_a_step_given_back_is_not_reported_as_lost(sh):
    sh.ok("claim", "s")
    sh.ok("release", "s")
    assert sh.json("checkin")["lost"] == []


def test_init_writes_a_config_that_every_command_finds(sh):
    url = f"file://{sh.tmp}/store/proj"
    out = sh.ok("init", url, "--agent", "eve")
    assert out.startswith("Initialized project 'proj' as agent 'eve'\nBackend: ")
    path = os.path.join(sh.cwd, ".tracecraft.json")
    assert os.name == "nt" or os.stat(path).st_mode & 0o777 == 0o600
    with open(path) as file:
        doc = json.load(file)
    assert doc["project"] == "proj" and doc["agent_id"] == "eve"
    assert sh.json("config")["store"] == url


def test_an_invitation_carries_the_store_and_no_secret(sh):
    sh.ok("init", f"file://{sh.tmp}/store/proj", "--agent", "eve")
    line = sh.ok("invite").strip()
    assert "\n" not in line and "eve" not in line
    os.makedirs(os.path.join(sh.home, "other"))
    sh.cwd = os.path.join(sh.home, "other")
    assert sh.ok("join", line, "--agent", "bob") \
        == "Joined project 'proj' as agent 'bob'\n"
    assert sh.json("config")["project"] == "proj"


def test_a_failed_init_leaves_the_config_as_it_was(sh):
    sh.ok("init", f"file://{sh.tmp}/store/proj", "--agent", "eve")
    before = sh.objects()
    sh.refused(7, "init", "s3://bucket/proj", "--endpoint", "http://127.0.0.1:9",
               "--access-key", "a", "--secret-key", "b", "--deadline", "1")
    assert sh.objects() == before


def test_install_leaves_a_launcher_of_a_compiled_copy_and_takes_it_away(sh):
    folder = str(sh.tmp / "bin")
    assert "is not on PATH" in sh.run("install", "--dir", folder).err
    launcher = os.path.join(folder, "tracecraft")
    assert len(open(launcher).read().splitlines()) == 4
    done = subprocess.run([launcher, "--version"], env={"HOME": sh.home},
                          capture_output=True, check=True)
    assert done.stdout.decode() == sh.ok("--version")
    copy = str(sh.tmp / "share" / "tracecraft")
    assert any(name.endswith(".pyc") for name in os.listdir(f"{copy}/__pycache__"))
    sh.ok("install", "--dir", folder, PATH=folder)
    sh.ok("install", "--uninstall", "--dir", folder)
    assert os.listdir(folder) == [] and not os.path.exists(copy)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_name_every_command(sh, shell):
    out = sh.ok("completion", shell)
    for run in tracecraft.command_functions():
        assert run.row.name.split()[-1] in out


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="no bash")
@pytest.mark.parametrize("words, found", [
    (["cl"], "claim"), (["memory", "hi"], "history"), (["claim", "--t"], "--ttl"),
    (["memory", "set", "--if-r"], "--if-rev")])
def test_bash_completes(sh, words, found):
    script = sh.ok("completion", "bash") + (
        f"COMP_WORDS=(tracecraft {' '.join(words)}); COMP_CWORD={len(words)};"
        ' _tracecraft; echo "${COMPREPLY[@]}"')
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, check=True)
    assert found in done.stdout.decode().split()


# == 22. Command line ==================================================

LONG = "x" * 201


@pytest.mark.parametrize("words, text", [
    (["clam", "s"], "unknown command 'clam'; did you mean claim?"),
    (["memory", "st", "k"], "did you mean memory set?"),
    (["memory"], "memory needs one of: set, get"),
    (["--jsn"], "unknown flag '--jsn'; did you mean --json?"),
    (["claim", "s", "--tll", "3"], "unknown flag '--tll'; did you mean --ttl?"),
    (["claim"], "the following arguments are required: step"),
    (["claim", "a", "b"], "unexpected argument 'b'"),
    (["claim", "s", "--ttl", "x"], "invalid int value: 'x'"),
    (["claim", "s", "--ttl", "-1"], "--ttl cannot be negative"),
    (["claim", ""], "step id cannot be empty"),
    (["claim", "a/b"], "step id 'a/b' does not fit"),
    (["claim", ".."], "step id '..' does not fit"),
    (["claim", "_s"], "step id '_s' is reserved"),
    (["claim", "é"], "does not fit"),
    (["claim", "a\nb"], "does not fit"),
    (["claim", LONG], "does not fit"),
    (["claim", "s", "--agent", "a/b"], "agent id 'a/b' does not fit"),
    (["--store"], "--store needs a value"),
    (["status", "--store", "s3:/x"], "is no store URL"),
    (["status", "--store", "http://x/y"], "is no store URL"),
    (["status", "--deadline", "soon"], "--deadline is 'soon', not seconds"),
    (["status", "--config", "nope.json"], "cannot read the config file"),
    (["status", "--op", "x"], "status changes nothing that --op could settle"),
    (["status", "--watch", "--json"], "mutually exclusive"),
    (["status", "--watch", "--interval", "0"], "--interval must be > 0"),
    (["complete", "s", "--blocked", "--failed"], "Use at most one of"),
    (["memory", "set", "", "v"], "memory key cannot be empty"),
    (["memory", "set", "a/b", "v"], "'/' is not allowed"),
    (["memory", "set", "_history.a", "v"], "is reserved"),
    (["memory", "set", "a..b", "v"], "has an empty part"),
    (["memory", "set", "k"], "give the value once"),
    (["memory", "set", "k", "v", "--file", "f"], "give the value once"),
    (["memory", "set", "k", "--file", "nope"], "cannot read nope"),
    (["memory", "set", "k", "{", "--json"], "the value is not JSON"),
    (["memory", "incr", "k", "many"], "invalid finite value"),
    (["memory", "merge", "k", "{"], "JSON"),
    (["send", "", "x"], "recipient cannot be empty"),
    (["send", "_me", "x"], "is reserved"),
    (["send", "a/b", "x"], "does not fit"),
    (["send", "bob", "-x"], "text that begins with - goes after --"),
    (["send", "bob"], "give the message once"),
    (["inbox", "--new", "--delete"], "mutually exclusive"),
    (["inbox", "--limit", "-1"], "--limit cannot be negative"),
    (["artifact", "upload", "nope"], "nope is not a file"),
    (["join", "hello"], "that is no invitation"),
    (["init", "--endpoint", "http://x"], "needs --bucket"),
    (["init", "s3://b/p", "--bucket", "c"], "give the store once"),
    (["init", "s3://b/p", "--access-key", "a"], "go together"),
    (["completion", "csh"], "invalid choice: 'csh'"),
    (["demo", "nowhere"], "nowhere is no directory"),
    (["_worker", "nothing"], "_worker"),
])
def test_a_wrong_call_gets_a_sentence_exit_2_and_changes_nothing(sh, words, text):
    before = sh.objects()
    done = sh.run(*words)
    assert (done.returncode, done.out) == (2, ""), done.err
    message = json.loads(done.err)["error"]["message"] if "--json" in words else done.err
    assert text in message
    assert sh.objects() == before


@pytest.mark.parametrize("words", [["memory", "set", "k", "-"], ["send", "bob", "-"],
                                   ["complete", "s", "--note", "-"]])
def test_stdin_that_is_not_utf_8_is_refused(sh, words):
    before = sh.objects()
    assert "stdin is not UTF-8 (byte 1)" in sh.refused(2, *words, stdin=b"a\xff")
    assert sh.objects() == before


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX only")
def test_an_argument_that_is_not_utf_8_is_refused(sh):
    before = sh.objects()
    assert "is not UTF-8" in sh.refused(2, "send", "bob", b"a\xff")
    assert sh.objects() == before


@pytest.mark.parametrize("text", ["@file", "@", "-", "--", "-- x", "", " "])
def test_ordinary_text_is_sent_as_it_is(sh, text):
    sh.ok("send", "bob", "--", text)
    assert sh.json("inbox", TRACECRAFT_AGENT="bob")["items"][0]["message"] == text


@pytest.mark.parametrize("body, text", [
    (b"", "is not JSON"), (b'{"agent": "x"', "is not JSON"), (b"[]", "holds a JSON list"),
    (b"\xff\xfe", "is not JSON"), (b"[" * 100_000, "is not JSON"),
    (b" " * ((8 << 20) + 1), "a record has at most")],
    ids=["empty", "cut", "list", "bytes", "nested", "oversized"])
def test_a_damaged_record_is_named_and_left_alone(sh, body, text):
    sh.ok("claim", "s")
    path, = [path for path in sh.objects() if path.endswith("claim.json")]
    with open(path, "wb") as file:
        file.write(body)
    before = sh.objects()
    for words in (["claim", "s"], ["complete", "s"], ["release", "s"], ["renew", "s"]):
        err = sh.refused(8, *words)
        assert text in err and "steps/s/claim.json" in err
    assert sh.objects() == before
    sh.ok("memory", "set", "k", "v")  # what does not need it goes on
    assert sh.run("doctor").returncode == 8


def test_an_error_in_json_says_all_there_is(sh):
    sh.ok("claim", "s", TRACECRAFT_AGENT="bob")
    error = json.loads(sh.refused(3, "claim", "s", "--json"))["error"]
    assert {"code": "held", "exit": 3, "retryable": False, "holder": "bob",
            "message": "Step s already claimed by bob"}.items() <= error.items()
    assert error["hint"] and error["expires_in_s"] > 0
    assert json.loads(sh.refused(1, "memory", "get", "k", TRACECRAFT_JSON="1"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_directory_is_a_sentence(sh):
    os.chmod(sh.cwd, 0o500)
    sh.refused(11, "claim", "s", "--store", f"file://{sh.cwd}/new/p")
    os.chmod(sh.cwd, 0o700)


def test_without_a_home_the_state_goes_beside_the_store(sh):
    sh.environ["HOME"] = "/nonexistent"
    assert sh.ok("claim", "s") == "Claimed step s as ada\n"
    assert sh.ok("complete", "s") == "Completed step s\n"


def test_a_server_that_is_not_there_is_exit_7(sh):
    err = sh.refused(7, "status", "--store", "s3://b/p?endpoint=http://127.0.0.1:9",
                     "--deadline", "1", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    assert "127.0.0.1:9" in err


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_reader_that_goes_away_is_no_error(sh):
    for at in range(3):
        sh.ok("memory", "set", f"k{at}", "v")
    done = subprocess.run(" ".join(map(shlex.quote, RUN))
                          + " memory list | true", shell=True, cwd=sh.cwd,
                          env=sh.env({}), capture_output=True)
    assert done.stderr == b""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("words", [["wait-for", "s"], ["inbox", "--new", "--wait", "60"],
                                   ["status", "--watch"]])
def test_ctrl_c_is_130_without_a_traceback(sh, words):
    process = sh.start(*words)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SLOW)
    assert process.returncode == 130 and b"Traceback" not in err


def test_a_bug_is_called_one(monkeypatch, capsys, tmp_path):
    def broken(argv):
        raise ZeroDivisionError("x")
    monkeypatch.setattr(tracecraft, "dispatch", broken)
    assert tracecraft.main(["status"]) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "a bug in tracecraft" in err


def test_many_processes_claim_and_one_wins(sh):
    crew = [sh.start("claim", "s", TRACECRAFT_AGENT=f"a{n}") for n in range(8)]
    outs = [process.communicate(timeout=SLOW) for process in crew]
    assert sorted(process.returncode for process in crew) == [0] + [3] * 7, outs


def test_a_reader_waits_for_mail(sh):
    later = threading.Timer(0.7, sh.ok, ["send", "bob", "hi"])
    later.start()
    assert "ada: hi" in sh.ok("inbox", "--new", "--wait", "20", TRACECRAFT_AGENT="bob")
    later.join()
    sh.refused(6, "inbox", "--new", "--wait", "0.3", TRACECRAFT_AGENT="bob")


def test_verbose_shows_requests_and_never_a_secret(sh):
    done = sh.run("-v", "status", "--store", "s3://b/p?endpoint=http://127.0.0.1:9",
                  "--deadline", "1", AWS_ACCESS_KEY_ID="AKIAX",
                  AWS_SECRET_ACCESS_KEY="s3cr3t-s3cr3t")
    assert done.returncode == 7 and "s3cr3t" not in done.err


def test_a_script_and_a_module_are_the_same_program(sh):
    done = subprocess.run([sys.executable, PROGRAM, "--version"], env={},
                          capture_output=True, check=True)
    assert done.stdout.decode() == sh.ok("--version")


# == 19. Interoperation with 0.2.5 =====================================
#
# The released CLI and ours, as processes, on one bucket: each reads what the other
# wrote (protocol.md 3, 4, 11.7). A call of 0.2.5 takes half a second: there are few.


PEER = os.path.join(os.path.dirname(sys.executable), "tracecraft")
# As the launcher of `install`: a script's bytecode would not be cached.
OURS = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1));"
        " from tracecraft import main; sys.exit(main())",
        os.path.dirname(os.path.abspath(tracecraft.__file__))]


class TwoClients:
    """One project in one bucket, with agents of ours and of 0.2.5 that have a directory
    each, and in it the config file that both clients read."""

    def __init__(self, root, config, project=None):
        self.root, self.config = root, config
        self.project = project or f"interop-{uuid.uuid4().hex[:8]}"

    def home(self, agent):
        folder = self.root / agent
        if not folder.exists():
            folder.mkdir()
            doc = dict(self.config, project=self.project, agent_id=agent)
            (folder / ".tracecraft.json").write_text(json.dumps(doc))
        return folder

    def command(self, program, agent, words):
        env = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.root),
               "AWS_EC2_METADATA_DISABLED": "true", "PYTHONIOENCODING": "utf-8"}
        return dict(args=[*program, *words], cwd=str(self.home(agent)), env=env,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8",
                    stderr=subprocess.PIPE)

    def run(self, program, agent, words, exit):
        done = subprocess.run(**self.command(program, agent, words), timeout=60)
        said = f"{agent} {' '.join(words)}: {done.returncode}\n" \
            f"{done.stdout}{done.stderr}"
        assert done.returncode == exit, said
        return done.stdout + (done.stderr if exit else "")

    def ours(self, agent, *words, exit=0):
        return self.run(OURS, agent, words, exit)

    def theirs(self, agent, *words, exit=0):
        return self.run([PEER], agent, words, exit)

    def ours_json(self, agent, *words, exit=0):
        return json.loads(self.ours(agent, "--json", *words, exit=exit))


@pytest.fixture(scope="module")
def peer_server():
    """A bucket and, in it, the fact that 0.2.5 is here to share it."""
    if not os.path.exists(PEER):
        if os.environ.get("CI"):
            pytest.fail("tracecraft-ai==0.2.5 is not installed; CI does not skip it")
        pytest.skip("tracecraft-ai==0.2.5 is not installed beside this Python")
    said = subprocess.run([PEER, "--version"], stdout=subprocess.PIPE, encoding="utf-8",
                          env={"PATH": os.environ.get("PATH", "")})
    assert "0.2.5" in said.stdout
    with S3Server() as server:
        yield server


@pytest.fixture
def both(peer_server, tmp_path):
    config = {"backend": "s3", "endpoint": peer_server.url, "bucket": "bucket",
              "access_key": peer_server.access_key,
              "secret_key": peer_server.secret_key}
    both = TwoClients(tmp_path, config)
    both.stored = lambda key: json.loads(
        peer_server.body(f"{both.project}/{key}") or "null")
    both.keys = lambda prefix="": sorted(
        key[len(both.project) + 1:] for bucket, key in list(peer_server.objects)
        if key.startswith(f"{both.project}/{prefix}"))
    return both


def healthy(both, agent="ada"):
    """Nothing damaged, no projection behind: what `doctor` says of the bucket."""
    doc = both.ours_json(agent, "doctor")
    assert doc["ok"] and not doc.get("problems"), doc
    return True


# -- configuration and presence ----------------------------------------


@pytest.mark.peers
def test_each_reads_the_config_the_other_wrote_and_sees_its_agent(both, tmp_path):
    flags = ("--endpoint", both.config["endpoint"], "--bucket", "bucket", "--project",
             both.project, "--access-key", both.config["access_key"], "--secret-key",
             both.config["secret_key"])
    for agent in ("ada", "old"):
        (tmp_path / agent).mkdir()
    both.ours("ada", "init", *flags, "--agent", "ada")
    both.theirs("old", "init", *flags, "--agent", "old")
    written = json.loads((tmp_path / "ada" / ".tracecraft.json").read_text())
    assert written.items() >= {**both.config, "project": both.project,
                               "agent_id": "ada"}.items()
    # From here on each works in the directory that the other one set up.
    assert {row["id"]: row["status"] for row in
            both.ours_json("old", "agents")["items"]} == {"ada": "active",
                                                          "old": "active"}
    table = both.theirs("ada", "agents")
    assert "ada                       active     -               0m ago" in table
    assert "\nold  " in table
    # Whoever moves over may run our init there: the keys stay in the config.
    both.ours("old", "init", "-q")
    moved = json.loads((tmp_path / "old" / ".tracecraft.json").read_text())
    assert moved.items() >= {**both.config, "agent_id": "old"}.items()


@pytest.mark.peers
def test_presence_that_one_client_wrote_survives_a_heartbeat_of_the_other(both):
    both.ours("ada", "heartbeat", "--summary", "writing tests")
    doc = both.stored("agents/ada.json")
    assert {"id", "status", "step", "started_at", "heartbeat", "summary"} <= set(doc)
    assert doc["id"] == "ada" and doc["summary"] == "writing tests"


# -- memory ------------------------------------------------------------


@pytest.mark.peers
def test_memory_and_its_history_are_one_for_both_clients(both):
    both.ours("ada", "memory", "set", "plan.status", "draft")
    assert both.theirs("old", "memory", "get", "plan.status") == "draft\n"
    both.theirs("old", "memory", "set", "plan.status", "in review")
    got = both.ours_json("ada", "memory", "get", "plan.status")
    assert (got["value"], got["set_by"]) == ("in review", "old")
    # 0.2 rewrites the document and drops its revision: nobody may compare with it.
    assert "0.2" in both.ours("ada", "memory", "set", "plan.status", "x",
                              "--if-rev", "1", exit=3)
    after = both.ours_json("ada", "memory", "set", "plan.status", "done")
    assert after["rev"] >= 2 and after["value"] == "done"
    history = both.theirs("old", "memory", "history", "plan.status").splitlines()
    assert [line.partition("] ")[2] for line in history] == [
        "ada: draft", "old: in review", "ada: done"]
    assert both.ours("ada", "memory", "history", "plan.status").splitlines() == history


@pytest.mark.peers
def test_what_one_client_adds_and_deletes_the_other_reads_so(both):
    both.ours("ada", "memory", "incr", "builds")
    both.theirs("old", "memory", "set", "builds", "41")
    both.ours("ada", "memory", "incr", "builds")
    assert both.theirs("old", "memory", "get", "builds") == "42\n"
    both.ours("ada", "memory", "delete", "builds")
    # A tombstone keeps an empty value, which is all that 0.2 can know of it.
    assert both.stored("memory/builds.json")["value"] == ""
    both.ours("ada", "memory", "get", "builds", exit=1)
    both.theirs("old", "memory", "set", "builds", "7")
    assert both.ours("ada", "memory", "get", "builds") == "7\n"
    assert "builds" in both.ours("ada", "memory", "list").splitlines()


# -- mail --------------------------------------------------------------


def texts_of(inbox):
    return [line.partition("] ")[2] for line in inbox.splitlines()]


@pytest.mark.peers
def test_messages_and_broadcasts_go_both_ways_in_the_same_words(both):
    both.ours("ada", "send", "old", "the API is ready", "--step", "design", "-q")
    both.ours("ada", "send", "_broadcast", "to all", "-q")
    both.theirs("old", "send", "ada", "thanks", "--step", "design")
    both.theirs("old", "send", "_broadcast", "noted")
    assert texts_of(both.theirs("old", "inbox")) == [
        "(direct) ada [step design]: the API is ready", "(broadcast) ada: to all"]
    assert texts_of(both.ours("ada", "inbox", "--new")) == [
        "(direct) old [step design]: thanks", "(broadcast) old: noted"]
    assert both.ours("ada", "inbox", "--new") == "No new messages.\n"


@pytest.mark.peers
def test_one_agent_may_read_with_either_client_and_sees_each_message_once(both):
    def send(text):
        both.ours("ada", "send", "mix", text, "-q")

    send("one")
    assert texts_of(both.theirs("mix", "inbox", "--new")) == ["(direct) ada: one"]
    assert both.ours("mix", "inbox", "--new") == "No new messages.\n"
    send("two")
    assert texts_of(both.ours("mix", "inbox", "--new")) == ["(direct) ada: two"]
    assert "rev" in both.stored("messages/mix/_cursor.json")
    send("three")
    both.ours("ada", "send", "_broadcast", "four", "-q")
    assert texts_of(both.theirs("mix", "inbox", "--new")) == [
        "(direct) ada: three", "(broadcast) ada: four"]
    assert "rev" not in both.stored("messages/mix/_cursor.json")
    assert both.ours("mix", "inbox", "--new") == "No new messages.\n"
    send("five")
    assert texts_of(both.ours("mix", "inbox", "--new")) == ["(direct) ada: five"]
    assert both.theirs("mix", "inbox", "--new") == "No new messages.\n"


@pytest.mark.peers
def test_a_message_sent_twice_under_one_id_reaches_0_2_once(both):
    for _ in range(2):
        both.ours("ada", "send", "old", "built", "--id", "build-7", "-q")
    assert texts_of(both.theirs("old", "inbox", "--new")) == ["(direct) ada: built"]


@pytest.mark.peers
def test_reading_with_0_2_loses_no_channel_and_shows_nothing_of_it_twice(both):
    both.ours("mix", "channel", "join", "ops")
    both.ours("ada", "send", "#ops", "one", "-q")
    both.theirs("old", "send", "_broadcast", "all")
    assert "(#ops) ada: one" in both.ours("mix", "inbox", "--new")
    both.theirs("old", "send", "_broadcast", "more")
    assert texts_of(both.theirs("mix", "inbox", "--new")) == ["(broadcast) old: more"]
    assert "rev" not in both.stored("messages/mix/_cursor.json")
    both.ours("ada", "send", "#ops", "two", "-q")
    assert texts_of(both.ours("mix", "inbox", "--new")) == ["(#ops) ada: two"]


@pytest.mark.peers
def test_0_2_reads_what_is_signed_attached_and_asked_and_may_be_answered(both):
    (both.home("ada") / "a.txt").write_text("abc")
    both.ours("ada", "ask", "old", "which port?", "--attach", "a.txt", "--wait", "0",
              "-q", exit=6)
    both.theirs("old", "send", "ada", "8080")
    assert texts_of(both.theirs("old", "inbox", "--new")) == [
        "(direct) ada: which port?"]
    message, = both.ours_json("ada", "inbox")["items"]
    reply = both.ours_json("ada", "send", "old", "thanks", "--reply-to", message["id"])
    assert reply["thread"] == message["id"] and len(message["id"]) == 8
    assert len(both.ours_json("ada", "thread", message["id"])["items"]) == 2


@pytest.mark.peers
def test_an_acknowledgement_is_no_mail_to_0_2(both):
    both.theirs("old", "send", "ada", "did you see it?")
    message, = both.ours_json("ada", "inbox")["items"]
    both.ours("ada", "ack", message.get("id") or message["key"])
    assert len(both.keys("messages/ada/_acks/")) == 1
    box, = both.ours_json("old", "status")["mailboxes"]
    assert box["total"] == 1
    assert texts_of(both.theirs("ada", "inbox")) == ["(direct) old: did you see it?"]


# -- steps -------------------------------------------------------------


@pytest.mark.peers
def test_each_refuses_what_the_other_has_claimed(both):
    both.ours("ada", "claim", "mine")
    both.theirs("old", "claim", "yours")
    assert "Step mine already claimed by ada" in both.theirs(
        "old", "claim", "mine", exit=1)
    assert "claimed by 'ada'" in both.theirs("old", "complete", "mine", exit=1)
    assert "Step yours already claimed by old" in both.ours(
        "ada", "claim", "yours", exit=3)
    assert "is claimed by 'old'" in both.ours("ada", "complete", "yours", exit=3)
    assert both.ours("ada", "step-status", "mine", "yours").splitlines() == [
        "mine: in_progress (agent: ada)", "yours: in_progress (agent: old)"]
    assert both.theirs("old", "step-status", "mine") == \
        "mine: in_progress (agent: ada)\n"


@pytest.mark.peers
def test_a_race_between_the_clients_has_one_winner(both):
    steps = ["race-1", "race-2", "race-3"]
    for agent in ("ada", "old"):
        both.home(agent)

    def race(step):
        rivals = [subprocess.Popen(**both.command([PEER], "old", ["claim", step])),
                  subprocess.Popen(**both.command(OURS, "ada", ["claim", step]))]
        return [rival.wait(60) for rival in rivals]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        exits = list(pool.map(race, steps))
    for step, (theirs, ours) in zip(steps, exits):
        assert (theirs, ours) in ((0, 3), (1, 0))
        winner = "old" if theirs == 0 else "ada"
        assert both.stored(f"steps/{step}/claim.json")["agent"] == winner


@pytest.mark.peers
def test_a_complete_step_is_complete_to_the_other_and_hands_off(both):
    both.ours("ada", "claim", "S1.A")
    both.ours("ada", "complete", "S1.A", "--note", "see api.md", "--to", "old")
    assert both.theirs("old", "step-status", "s1.a") == "s1.a: complete (agent: ada)\n"
    both.theirs("old", "claim", "next")
    both.theirs("old", "complete", "next", "--note", "tests pass", "--to", "ada",
                "--next-action", "merge it")
    assert both.theirs("old", "wait-for", "S1.A", "next") == \
        "All steps complete: S1.A, next\n"
    assert both.ours("ada", "wait-for", "S1.A", "next") == \
        "All steps complete: S1.A, next\n"
    note = both.ours_json("ada", "handoff", "next")
    assert (note["from_agent"], note["next_agent"], note["note"], note["next_action"]) \
        == ("old", "ada", "tests pass", "merge it")
    stored = both.stored("steps/s1-a/handoff.json")
    assert stored.items() >= {
        "schema": 2, "from_agent": "ada", "from_step": "S1.A", "next_agent": "old",
        "state": "complete", "next_action": None, "note": "see api.md"}.items()
    assert healthy(both)


@pytest.mark.peers
def test_a_step_ended_by_0_2_can_be_reopened_and_0_2_sees_the_new_holder(both):
    both.theirs("old", "claim", "design")
    both.theirs("old", "complete", "design")
    assert "complete" in both.ours("ada", "claim", "design", exit=3)
    assert both.ours_json("ada", "claim", "design", "--reopen")["token"] == 2
    # 0.2 reads status.json first: it must not still say what old wrote there.
    assert both.theirs("old", "step-status", "design") == \
        "design: in_progress (agent: ada)\n"
    assert "already claimed by ada" in both.theirs("old", "claim", "design", exit=1)
    assert both.ours_json("ada", "step-status", "design")["state"] == "in_progress"
    both.ours("ada", "complete", "design")
    assert both.stored("steps/design/status.json")["status"] == "complete"
    assert healthy(both)


@pytest.mark.peers
def test_without_a_claim_either_client_completes_and_the_other_agrees(both):
    both.ours("ada", "complete", "quick")
    assert both.theirs("old", "step-status", "quick") == \
        "quick: complete (agent: ada)\n"
    assert "already claimed by ada" in both.theirs("old", "claim", "quick", exit=1)
    both.theirs("old", "complete", "habit")
    assert both.ours("ada", "step-status", "habit") == "habit: complete (agent: old)\n"
    assert "complete" in both.ours("ada", "claim", "habit", exit=3)
    assert both.ours_json("ada", "claim", "habit", "--reopen")["token"] == 2


@pytest.mark.peers
def test_an_agent_may_end_with_0_2_what_it_claimed_with_ours(both):
    both.ours("ada", "claim", "design")
    both.theirs("ada", "complete", "design", "--note", "by the old one")
    assert both.ours("ben", "step-status", "design") == \
        "design: complete (agent: ada)\n"
    assert both.ours_json("ben", "handoff", "design")["note"] == "by the old one"
    assert "complete" in both.ours("ada", "renew", "design", exit=3)
    both.ours("ada", "complete", "design")  # the same end: nothing to refuse
    claim = both.stored("steps/design/claim.json")
    assert (claim["state"], claim["token"]) == ("complete", 1)
    both.ours("ada", "step-status", "design")
    assert healthy(both)


@pytest.mark.peers
def test_0_2_forcing_a_complete_over_our_claim_fences_us(both):
    both.ours("ada", "claim", "design")
    both.theirs("old", "complete", "design", "--force", "--note", "ada is gone")
    assert both.ours("ben", "step-status", "design") == \
        "design: complete (agent: old)\n"
    for act in ("renew", "release", "complete"):
        assert "old" in both.ours("ada", act, "design", exit=4)
    assert both.ours_json("ada", "handoff", "design")["note"] == "ada is gone"
    both.ours("ben", "claim", "design", exit=3)
    again = both.ours_json("ben", "claim", "design", "--reopen")
    assert again["token"] == 3
    assert any("forced by old" in event["why"] for event in again["history"])
    both.ours("ada", "complete", "design", exit=4)
    both.ours("ben", "complete", "design")
    assert healthy(both)


@pytest.mark.peers
def test_our_force_over_a_claim_of_0_2_is_final_for_0_2(both):
    both.theirs("old", "claim", "design")
    both.ours("ada", "complete", "design", "--force", "--note", "old is gone")
    claim = both.stored("steps/design/claim.json")
    assert (claim["agent"], claim["state"], claim["token"]) == ("ada", "complete", 2)
    assert "claimed by 'ada'" in both.theirs("old", "complete", "design", exit=1)
    assert both.theirs("old", "step-status", "design") == \
        "design: complete (agent: ada)\n"
    assert healthy(both)


@pytest.mark.peers
def test_a_wait_ends_when_the_other_client_blocks_or_fails_the_step(both):
    both.theirs("old", "complete", "api", "--blocked", "--note", "no keys")
    assert "Step api is blocked (agent: old)" in both.ours(
        "ada", "wait-for", "api", "--timeout", "20", exit=5)
    both.ours("ada", "claim", "web")
    both.ours("ada", "complete", "web", "--failed")
    assert "Step web is blocked (agent: ada)" in both.theirs(
        "old", "wait-for", "web", "--timeout", "20", exit=1)


@pytest.mark.peers
def test_what_0_2_wants_reviewed_we_approve_or_reject(both):
    both.theirs("old", "claim", "docs")
    both.theirs("old", "complete", "docs", "--needs-review")
    assert both.ours("ada", "step-status", "docs") == \
        "docs: needs_review (agent: old)\n"
    both.ours("ada", "approve", "docs")
    assert both.theirs("old", "step-status", "docs") == "docs: complete (agent: old)\n"
    both.theirs("old", "complete", "text", "--needs-review")
    both.ours("ada", "reject", "text", "--note", "dead links")
    assert both.ours_json("ada", "claim", "text")["token"] == 2
    assert both.stored("steps/text/status.json")["status"] == "in_progress"
    assert healthy(both)


@pytest.mark.peers
def test_a_released_step_reads_as_pending_in_0_2_and_is_ours_to_claim(both):
    both.ours("ada", "claim", "design")
    both.ours("ada", "release", "design")
    # 0.2 has no word for it: the claim is never deleted, so 0.2 cannot take it.
    assert "design: pending" in both.theirs("old", "step-status", "design")
    assert "already claimed by (released)" in both.theirs(
        "old", "claim", "design", exit=1)
    assert both.ours_json("ben", "claim", "design")["token"] == 2


# -- artifacts ---------------------------------------------------------


@pytest.mark.peers
def test_artifacts_go_both_ways_with_their_bytes(both, tmp_path):
    (both.home("ada") / "api.md").write_bytes(b"# API\n\xff\x00")
    (both.home("old") / "out.csv").write_bytes(b"a,b\n1,2\n")
    both.ours("ada", "artifact", "upload", "api.md", "--step", "S1.A")
    assert both.theirs("old", "artifact", "upload", "out.csv") == \
        "Uploaded out.csv -> artifacts/shared/out.csv\n"
    listed = both.theirs("old", "artifact", "list").splitlines()
    assert listed == ["artifacts/s1-a/api.md", "artifacts/shared/out.csv"]
    assert both.ours("ada", "artifact", "list").splitlines() == listed
    both.theirs("old", "artifact", "download", "api.md", "--step", "S1.A")
    assert (tmp_path / "old" / "api.md").read_bytes() == b"# API\n\xff\x00"
    both.ours("ada", "artifact", "download", "out.csv", "-o", "got.csv")
    assert (tmp_path / "ada" / "got.csv").read_bytes() == b"a,b\n1,2\n"


@pytest.mark.peers
def test_bytes_of_0_2_over_an_artifact_of_ours_are_adopted_and_said(both, tmp_path):
    for agent, text in (("ada", "one"), ("old", "two")):
        (both.home(agent) / "a.txt").write_text(text)
    both.ours("ada", "artifact", "upload", "a.txt")
    both.theirs("old", "artifact", "upload", "a.txt")
    both.ours("ada", "artifact", "download", "a.txt", "-o", "b.txt")
    assert (tmp_path / "ada" / "b.txt").read_text() == "two"
    both.ours("ada", "artifact", "verify", "a.txt")
    # Ours over theirs asks first, and 0.2 then finds the new bytes at its own key.
    (tmp_path / "ada" / "a.txt").write_text("three")
    both.ours("ada", "artifact", "upload", "a.txt", exit=3)
    both.ours("ada", "artifact", "upload", "a.txt", "--overwrite")
    both.theirs("old", "artifact", "download", "a.txt", "-o", "c.txt")
    assert (tmp_path / "old" / "c.txt").read_text() == "three"
    assert healthy(both)


@pytest.mark.peers
def test_the_same_bytes_uploaded_by_both_are_one_artifact(both):
    for agent in ("ada", "old"):
        (both.home(agent) / "same.txt").write_text("same")
    both.theirs("old", "artifact", "upload", "same.txt")
    both.ours("ada", "artifact", "upload", "same.txt")
    head = both.ours_json("ada", "artifact", "show", "same.txt")
    assert head["size"] == 4
    assert both.keys("artifacts/") == ["artifacts/shared/same.txt"]


# -- status ------------------------------------------------------------


@pytest.mark.peers
def test_status_json_has_the_keys_and_the_values_of_0_2(both):
    both.ours("ada", "heartbeat")
    both.ours("ada", "claim", "mine")
    both.ours("ada", "claim", "gone")
    both.ours("ada", "release", "gone")
    both.ours("ada", "step", "add", "later")
    both.theirs("old", "complete", "done", "--needs-review")
    both.theirs("old", "send", "ada", "hello")
    both.ours("ada", "inbox", "--new")
    both.ours("ada", "send", "old", "hi", "-q")
    ours = both.ours_json("ada", "status")
    theirs = json.loads(both.theirs("ada", "status", "--json"))
    assert set(theirs) <= set(ours)
    for name in ("project", "backend", "bucket", "mailboxes", "sessions"):
        assert ours[name] == theirs[name]
    for name in ("steps", "agents"):
        assert len(ours[name]) == len(theirs[name])
        for mine, old in zip(ours[name], theirs[name]):
            assert set(old) <= set(mine)
            if old.get("id") != "gone":  # 0.2 names '(released)' as its agent
                assert {key: mine[key] for key in old if key != "heartbeat_age_s"} == \
                    {key: old[key] for key in old if key != "heartbeat_age_s"}
    text = both.ours("ada", "status").splitlines()
    assert text[0] == f"project {both.project} · backend s3 · bucket bucket"


# -- a real server -----------------------------------------------------


@pytest.mark.peers
@pytest.mark.bucket
@pytest.mark.skipif(not os.environ.get("TRACECRAFT_TEST_STORE"),
                    reason="TRACECRAFT_TEST_STORE names no bucket")
def test_both_clients_work_together_on_a_real_server(peer_server, tmp_path):
    parts = tracecraft.parse_store_url(os.environ["TRACECRAFT_TEST_STORE"])
    if parts["kind"] != "s3":
        pytest.skip("0.2.5 knows S3 only")
    endpoint = parts.get("endpoint") or os.environ["AWS_ENDPOINT_URL"]
    both = TwoClients(tmp_path, {
        "backend": "s3", "endpoint": endpoint, "bucket": parts["bucket"],
        "access_key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"]})
    both.ours("ada", "init", "-q")
    try:
        both.ours("ada", "claim", "design")
        both.theirs("old", "claim", "design", exit=1)
        both.ours("ada", "complete", "design", "--note", "see api.md")
        both.theirs("old", "wait-for", "design")
        both.theirs("old", "claim", "build")
        both.ours("ada", "claim", "build", exit=3)
        both.theirs("old", "complete", "build", "--note", "built")
        assert both.ours_json("ada", "handoff", "build")["note"] == "built"
        both.theirs("old", "send", "ada", "hello")
        assert texts_of(both.ours("ada", "inbox", "--new")) == ["(direct) old: hello"]
        both.theirs("old", "memory", "set", "k", "1")
        both.ours("ada", "memory", "incr", "k")
        assert both.theirs("old", "memory", "get", "k") == "2\n"
    finally:
        with tracecraft.connect(
                f"s3://{parts['bucket']}/{both.project}?endpoint={endpoint}",
                agent="cleaner") as project:
            for entry in project.store.list("").entries:
                project.store.delete(entry.key)


# == 20. README ========================================================
#
# Every ```console block is run: its commands in order, in a fresh directory; what it
# shows is what they print. Every ```python block runs; the tables name what exists.


HERE = os.path.dirname(os.path.abspath(tracecraft.__file__))
README = os.path.join(HERE, "README.md")

# What differs from run to run is made equal in the README and in the output:
VOLATILE = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?", "TIME"),  # ISO times
    (r"\b\d{19}\b", "NS"),  # times in the names of messages
    (r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,64}\b", "HEX"),  # ids, nonces, digests
    (r"\b\d+(s\b|m ago\b|h ago\b| ms\b)", "N\\1"),  # ages, time left, durations
    (r"--wait \d+", "--wait N"),
)
STANDINS = {"store": "https://s3.example.com", "here": "/home/ada/shop"}


def readme():
    if not os.path.exists(README):
        pytest.skip("README.md is not beside tracecraft.py")
    with open(README, encoding="utf-8") as file:
        return file.read()


def fenced(language):
    """[(line number, text)] of the README's blocks in that language."""
    if not os.path.exists(README):
        return []
    blocks = re.finditer(r"^```%s\n(.*?)^```$" % language, readme(), re.M | re.S)
    return [pytest.param(found.group(1),
                         id=f"line {readme()[:found.start()].count(chr(10)) + 1}")
            for found in blocks]


def steady(text):
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text)
    return text.rstrip()


def transcript(block):
    """[(command, output)] of a block: `$ ` begins a command, `> ` continues it."""
    steps = []
    for line in block.splitlines():
        if line.startswith("$ "):
            steps.append([line[2:], ""])
        elif line.startswith("> "):
            steps[-1][0] += "\n" + line[2:]
        else:
            steps[-1][1] += line + "\n"
    return steps


class Shell_20:
    """Runs the commands of one block: PATH, HOME and nothing else in the environment,
    exports kept from one command to the next, $? as well."""

    def __init__(self, root, endpoint, launcher):
        root = root.resolve()
        self.here, home = root / "shop", root / "home"
        for folder in (self.here, home):
            folder.mkdir()
        path = f"{os.path.dirname(launcher)}:{os.environ['PATH']}"
        self.env = {"HOME": str(home), "PATH": path}
        self.real = {"store": endpoint, "here": str(self.here)}
        self.before, self.code = "", 0

    def run(self, command):
        if command.startswith(("export ", "cd ")):
            self.before += command + "\n"
            return ""
        script = f"{self.before}(exit {self.code})\n{command}\n"
        for name, standin in STANDINS.items():
            script = script.replace(standin, self.real[name])
        done = subprocess.run(["/bin/sh", "-c", script], cwd=str(self.here),
                              env=self.env, stdin=subprocess.DEVNULL, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              encoding="utf-8")
        self.code, said = done.returncode, done.stdout
        for name, standin in STANDINS.items():
            said = said.replace(self.real[name], standin)
        return said


@pytest.fixture(scope="module")
def readme_world(tmp_path_factory):
    """(endpoint of an S3 server, launcher as `install` puts it on PATH)."""
    root = tmp_path_factory.mktemp("installed")
    launcher = str(root / "bin" / "tracecraft")
    tracecraft.install(launcher, str(root / "share" / "tracecraft.py"))
    with S3Server() as server:
        yield server.url, launcher


@pytest.mark.skipif(os.name == "nt", reason="the transcripts are of a POSIX shell")
@pytest.mark.parametrize("block", fenced("console"))
@pytest.mark.brief
def test_a_transcript_in_the_readme_is_what_happens(block, readme_world, tmp_path):
    shell = Shell_20(tmp_path, *readme_world)
    for command, shows in transcript(block):
        assert steady(shell.run(command)) == steady(shows), command


@pytest.mark.parametrize("block", fenced("python"))
@pytest.mark.brief
def test_a_program_in_the_readme_runs(block, tmp_path):
    shutil.copy(tracecraft.__file__, str(tmp_path / "tracecraft.py"))
    (tmp_path / "program.py").write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, "-B", "program.py"], cwd=str(tmp_path),
                          env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", timeout=60)
    shown = re.findall(r"print\(.*\)  # (.*)", block)
    assert (done.returncode, done.stdout.splitlines()) == (0, shown), done.stdout


@pytest.mark.brief
def test_the_readme_greets_within_its_first_30_lines():
    first = readme().split("\n")[:30]
    assert any(line.strip().startswith("curl ") for line in first)
    assert sum(line.startswith("```") for line in first) % 2 == 0  # none is cut
    assert sum(line.startswith("$ tracecraft claim ") for line in first) >= 2


def named_commands(cell):
    """`memory set/get`, `ack` -> memory set, memory get, ack"""
    for words in re.findall(r"`([^`]+)`", cell):
        group, _, inner = words.rpartition(" ")
        yield from (f"{group} {word}".strip() for word in inner.split("/"))


@pytest.mark.brief
def test_the_table_of_commands_names_exactly_what_exists():
    rows = {run.row.name: run.row for run in tracecraft.command_functions()}
    section = readme().partition("## Commands")[2].partition("\n## ")[0]
    table = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.M)
    assert sorted(name for cell, _ in table for name in named_commands(cell)) == \
        sorted(rows)
    for cell, text in table:
        own = {flag for name in named_commands(cell) for names, _ in rows[name].args
               for flag in names}
        assert set(re.findall(r"`(--[a-z-]+)`", text)) <= own, cell


@pytest.mark.brief
def test_the_readme_lists_every_exit_code_and_no_other():
    classes, codes = [tracecraft.Error], {0, 70, 130}
    while classes:
        found = classes.pop()
        codes.add(found.exit)
        classes += found.__subclasses__()
    section = readme().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) ", section, re.M)} == codes


@pytest.mark.brief
def test_the_settings_in_the_readme_are_read_by_the_program():
    with open(tracecraft.__file__, encoding="utf-8") as file:
        source = file.read()
    section = readme().partition("## Settings")[2].partition("\n## ")[0]
    names = re.findall(r"`((?:TRACECRAFT|AWS|SSL|REQUESTS)_[A-Z0-9_]+)`", section)
    assert names and all(name in source for name in names)


KEY, SECRET = "testkey", "testsecret"


def client(s, style="path", secret=SECRET, token=None, region="us-east-1", retries=0,
           **config):
    return boto3.client(
        "s3", endpoint_url=s.url, aws_access_key_id=KEY, aws_secret_access_key=secret,
        aws_session_token=token, region_name=region,
        config=Config(s3={"addressing_style": style}, retries={"max_attempts": retries},
                      signature_version="s3v4", max_pool_connections=40, **config))


def signed(s, method, target, body=b"", headers=None, host=None, auth=S3SigV4Auth,
           **kw):
    """The headers (and URL) of a request signed by botocore, for raw sending."""
    host = host or "127.0.0.1:%d" % s.port
    request = AWSRequest(method, "http://%s%s" % (host, target), data=body,
                         headers=dict(headers or {}, Host=host))
    request.context["payload_signing_enabled"] = True
    auth(Credentials(KEY, SECRET, kw.pop("token", None)), "s3", "us-east-1",
         **kw).add_auth(request)
    return request.url, dict(request.headers.items())


class Raw:
    """http.client with signed requests over one kept connection."""

    def __init__(self, s):
        self.s, self.connection = s, http.client.HTTPConnection("127.0.0.1", s.port, 10)

    def __call__(self, method, target, body=b"", headers=None, sign=True, **kw):
        headers = dict(headers or {})
        if sign:
            _, headers = signed(self.s, method, target, body, headers, **kw)
        if method in ("PUT", "POST") and "Content-Length" not in headers:
            headers["Content-Length"] = str(len(body))
        self.connection.request(method, target, body, headers)
        reply = self.connection.getresponse()
        reply.data = reply.read()
        return reply


def code(call, *args, **kw):
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(*args, **kw)
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


@pytest.fixture
def s():
    with S3Server() as server:
        yield server


@pytest.fixture
def c(s):
    return client(s)


@pytest.fixture
def raw(s):
    return Raw(s)


# ---- operations through boto3

@pytest.mark.peers
def test_put_get_head_delete(s, c):
    put = c.put_object(Bucket="bucket", Key="a/b c+ü~!*'()%", Body=b"hello",
                       Metadata={"x": "y"}, ContentType="text/plain")
    assert put["ETag"] == '"%s"' % hashlib.md5(b"hello").hexdigest()
    got = c.get_object(Bucket="bucket", Key="a/b c+ü~!*'()%")
    assert got["Body"].read() == b"hello" and got["Metadata"] == {"x": "y"}
    assert got["ContentType"] == "text/plain"
    assert abs(got["LastModified"].timestamp() - time.time()) < 3
    head = c.head_object(Bucket="bucket", Key="a/b c+ü~!*'()%")
    assert head["ContentLength"] == 5 and head["ETag"] == put["ETag"]
    assert s.body("a/b c+ü~!*'()%") == b"hello"
    c.delete_object(Bucket="bucket", Key="a/b c+ü~!*'()%")
    assert code(c.head_object, Bucket="bucket", Key="a/b c+ü~!*'()%") == ("404", 404)
    assert code(c.get_object, Bucket="bucket", Key="x") == ("NoSuchKey", 404)
    assert code(c.get_object, Bucket="nope", Key="x") == ("NoSuchBucket", 404)
    assert s.count() == 7 and s.count("GET", "a/b") == 1
    assert [r.landed for r in s.log] == [True, False, False, True, False, False, False]
    assert s.log[0].body_size == 5 and s.log[0].headers["x-amz-meta-x"] == "y"
    s.clear_log()
    assert s.count() == 0


@pytest.mark.peers
def test_empty_and_large_bodies(s, c):
    for body in (b"", b"x" * 9_000_000):
        c.put_object(Bucket="bucket", Key="k", Body=body)
        assert c.get_object(Bucket="bucket", Key="k")["Body"].read() == body


@pytest.mark.peers
def test_conditional_put(s, c):
    tag = c.put_object(Bucket="bucket", Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
    put = dict(Bucket="bucket", Key="k", Body=b"2")
    assert code(c.put_object, IfNoneMatch="*", **put) == ("PreconditionFailed", 412)
    assert code(c.put_object, IfMatch='"bad"', **put) == ("PreconditionFailed", 412)
    assert s.body("k") == b"1"
    c.put_object(IfMatch=tag, **put)
    assert code(c.put_object, IfMatch=tag, **put) == ("PreconditionFailed", 412)
    absent = dict(put, Key="absent")
    assert code(c.put_object, IfMatch=tag, **absent) == ("NoSuchKey", 404)
    assert code(c.put_object, IfNoneMatch="x", **absent) == ("NotImplemented", 501)
    assert [r.landed for r in s.log] == [True, False, False, True, False, False, False]


@pytest.mark.parametrize("form,quoted,bare", [
    ("any", 200, 200), ("quoted", 200, 412), ("unquoted", 412, 200)])
@pytest.mark.peers
def test_etag_forms(form, quoted, bare):
    with S3Server(etags=form) as s:
        raw = Raw(s)
        tag = raw("PUT", "/bucket/k", b"same").getheader("ETag")
        for value, status in ((tag, quoted), (tag.strip('"'), bare)):
            assert raw("PUT", "/bucket/k", b"same",
                       {"If-Match": value}).status == status


@pytest.mark.peers
def test_conditional_get_and_ranges(s, c):
    tag = c.put_object(Bucket="bucket", Key="k", Body=b"0123456789")["ETag"]
    get = dict(Bucket="bucket", Key="k")
    assert code(c.get_object, IfNoneMatch=tag, **get) == ("304", 304)
    assert code(c.head_object, IfNoneMatch=tag, **get) == ("304", 304)
    assert code(c.get_object, IfMatch='"x"', **get) == ("PreconditionFailed", 412)
    assert code(c.head_object, IfMatch='"x"', **get) == ("412", 412)
    assert c.get_object(IfMatch=tag, IfNoneMatch='"x"', **get)["ContentLength"] == 10
    for spec, body, where in (
            ("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=7-", b"789", "bytes 7-9/10"),
            ("bytes=-3", b"789", "bytes 7-9/10"), ("bytes=0-0", b"0", "bytes 0-0/10"),
            ("bytes=5-99", b"56789", "bytes 5-9/10"),
            ("bytes=-99", b"0123456789", "bytes 0-9/10")):
        got = c.get_object(Range=spec, **get)
        assert got["Body"].read() == body and got["ContentRange"] == where
        assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
        assert c.head_object(Range=spec, **get)["ContentLength"] == len(body)
    for spec in ("bytes=4-2", "bytes=-", "items=1-2", "bytes=0-1,3-4"):
        assert c.get_object(Range=spec, **get)["Body"].read() == b"0123456789"
    for spec in ("bytes=10-", "bytes=-0"):
        assert code(c.get_object, Range=spec, **get) == ("InvalidRange", 416)
    c.put_object(Bucket="bucket", Key="k", Body=b"")
    assert code(c.get_object, Range="bytes=0-", **get) == ("InvalidRange", 416)
    s.conditional_get = False
    assert c.get_object(IfMatch='"x"', **get)["ContentLength"] == 0


NAMES = sorted(["a/1", "a/2", "a/b/3", "b", "c d+e%/ü", "c d+e%/z", "é", "z/", "z/1",
                "\U0001f600", "\uffee", "q&<>\"'", "r\rn"], key=lambda k: k.encode())


def fill(s, names=NAMES):
    c = client(s)
    for name in names:
        c.put_object(Bucket="bucket", Key=name, Body=b"x")
    return c


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.peers
def test_list_pages(s, size):
    c = fill(s)
    pages = list(c.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", PaginationConfig={"PageSize": size}))
    assert [o["Key"] for p in pages for o in p.get("Contents", ())] == NAMES
    assert all(p["KeyCount"] <= size for p in pages)
    assert len(pages) == -(-len(NAMES) // size)
    pages = list(c.get_paginator("list_objects_v2").paginate(
        Bucket="bucket", Delimiter="/", PaginationConfig={"PageSize": size}))
    keys = [o["Key"] for p in pages for o in p.get("Contents", ())]
    assert keys == [n for n in NAMES if "/" not in n]
    assert [o["Prefix"] for p in pages for o in p.get("CommonPrefixes", ())] == [
        "a/", "c d+e%/", "z/"]
    assert sum(p["KeyCount"] for p in pages) == len(keys) + 3


@pytest.mark.peers
def test_list_options(s):
    c = fill(s)

    def keys(**options):
        got = c.list_objects_v2(Bucket="bucket", **options)
        return [o["Key"] for o in got.get("Contents", ())]
    assert keys(Prefix="a/") == ["a/1", "a/2", "a/b/3"]
    assert keys(Prefix="a/", Delimiter="/") == ["a/1", "a/2"]
    assert keys(Prefix="z/", Delimiter="/") == ["z/", "z/1"]
    assert keys(Prefix="a/", StartAfter="a/1") == ["a/2", "a/b/3"]
    assert keys(Prefix="c d+e%/") == ["c d+e%/z", "c d+e%/ü"]
    got = c.list_objects_v2(Bucket="bucket", MaxKeys=0)
    assert got["KeyCount"] == 0 and not got["IsTruncated"]
    first = c.list_objects_v2(Bucket="bucket", Prefix="b")["Contents"][0]
    assert first["ETag"] == '"%s"' % hashlib.md5(b"x").hexdigest()
    assert first["Size"] == 1
    assert code(c.list_objects_v2, Bucket="bucket", ContinuationToken="?") == (
        "InvalidArgument", 400)
    assert code(c.list_objects_v2, Bucket="nope") == ("NoSuchBucket", 404)
    s.max_keys = 2
    assert c.list_objects_v2(Bucket="bucket")["IsTruncated"]
    assert len(keys()) == 2


@pytest.mark.peers
def test_list_without_encoding_type(s, raw):
    fill(s, ["q&<> +ü", "r\rn"])
    text = raw("GET", "/bucket?list-type=2").data.decode()
    assert "<Key>q&amp;&lt;&gt; +ü</Key>" in text and "<Key>r&#13;n</Key>" in text
    assert 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' in text
    assert "<KeyCount>2</KeyCount>" in text and "<IsTruncated>false<" in text
    text = raw("GET", "/bucket?encoding-type=url&list-type=2").data.decode()
    assert "<Key>q%26%3C%3E+%2B%C3%BC</Key>" in text


@pytest.mark.peers
def test_copy(s, c):
    tag = c.put_object(Bucket="bucket", Key="a ü+b", Body=b"1",
                       Metadata={"m": "1"})["ETag"]
    source = {"Bucket": "bucket", "Key": "a ü+b"}
    got = c.copy_object(Bucket="bucket", Key="d", CopySource=source,
                        CopySourceIfMatch=tag)
    assert got["CopyObjectResult"]["ETag"] == tag and s.body("d") == b"1"
    assert c.head_object(Bucket="bucket", Key="d")["Metadata"] == {"m": "1"}
    c.copy_object(Bucket="bucket", Key="d", CopySource=source, Metadata={"n": "2"},
                  MetadataDirective="REPLACE")
    assert c.head_object(Bucket="bucket", Key="d")["Metadata"] == {"n": "2"}
    assert code(c.copy_object, Bucket="bucket", Key="d", CopySource=source,
                CopySourceIfMatch='"x"') == ("PreconditionFailed", 412)
    assert code(c.copy_object, Bucket="bucket", Key="d",
                CopySource="bucket/none") == ("NoSuchKey", 404)
    assert code(c.copy_object, Bucket="bucket", Key="d",
                CopySource="nope/none") == ("NoSuchBucket", 404)


@pytest.mark.peers
def test_multipart(s, c):
    where = dict(Bucket="bucket", Key="big ü")
    upload = c.create_multipart_upload(Metadata={"m": "1"}, **where)["UploadId"]
    parts = [b"a" * 1000, b"b" * 10]
    tags = [c.upload_part(PartNumber=n, UploadId=upload, Body=body, **where)["ETag"]
            for n, body in enumerate(parts, 1)]
    listed = c.list_parts(UploadId=upload, **where)["Parts"]
    assert [(p["PartNumber"], p["ETag"], p["Size"]) for p in listed] == [
        (1, tags[0], 1000), (2, tags[1], 10)]

    def complete(tags, numbers=(1, 2), **more):
        return c.complete_multipart_upload(UploadId=upload, MultipartUpload={"Parts": [
            {"PartNumber": n, "ETag": t} for n, t in zip(numbers, tags)]}, **where,
            **more)
    assert code(complete, ['"x"', tags[1]]) == ("InvalidPart", 400)
    assert code(complete, tags, (1, 3)) == ("InvalidPart", 400)
    assert code(complete, tags[::-1], (2, 1)) == ("InvalidPartOrder", 400)
    c.put_object(Body=b"old", **where)
    assert code(complete, tags, IfNoneMatch="*") == ("PreconditionFailed", 412)
    c.delete_object(**where)
    want = hashlib.md5(b"".join(hashlib.md5(p).digest() for p in parts)).hexdigest()
    assert complete(tags, IfNoneMatch="*")["ETag"] == '"%s-2"' % want
    assert s.body("big ü") == b"".join(parts)
    assert c.head_object(**where)["Metadata"] == {"m": "1"}
    assert code(complete, tags) == ("NoSuchUpload", 404)
    upload = c.create_multipart_upload(**where)["UploadId"]
    c.abort_multipart_upload(UploadId=upload, **where)
    assert code(c.abort_multipart_upload, UploadId=upload, **where) == (
        "NoSuchUpload", 404)
    assert not s.uploads


@pytest.mark.peers
def test_transfer_manager(s, c, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 80_000)
    c.upload_file(str(path), "bucket", "f")
    c.download_file("bucket", "f", str(tmp_path / "g"))
    assert (tmp_path / "g").read_bytes() == path.read_bytes()
    assert s.objects["bucket", "f"].etag.endswith('-3"')


@pytest.mark.peers
def test_delete_objects(s, c):
    for name in ("a", "b", "c&<ü"):
        c.put_object(Bucket="bucket", Key=name, Body=b"")
    entries = [{"Key": k} for k in ("a", "c&<ü", "absent")]
    got = c.delete_objects(Bucket="bucket", Delete={"Objects": entries})
    assert [d["Key"] for d in got["Deleted"]] == ["a", "c&<ü", "absent"]
    assert [k for _, k in s.objects] == ["b"]
    got = c.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "b"}],
                                                    "Quiet": True})
    assert "Deleted" not in got and not s.objects


@pytest.mark.peers
def test_buckets(s, c):
    got = c.head_bucket(Bucket="bucket")
    assert got["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"] == "us-east-1"
    assert code(c.head_bucket, Bucket="nope") == ("404", 404)
    assert code(c.create_bucket, Bucket="bucket") == ("BucketAlreadyOwnedByYou", 409)
    c.create_bucket(Bucket="nope")
    c.put_object(Bucket="nope", Key="k", Body=b"n")
    assert s.body("k", "nope") == b"n" and s.body("k") is None
    assert c.get_bucket_location(Bucket="bucket")["LocationConstraint"] is None
    with S3Server(region="eu-west-1") as other:
        c = client(other, region="eu-west-1")
        where = c.get_bucket_location(Bucket="bucket")
        assert where["LocationConstraint"] == "eu-west-1"
    assert code(client(s).get_object_acl, Bucket="bucket", Key="k") == (
        "NotImplemented", 501)


@pytest.mark.peers
def test_virtual_host_style(s, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real(
        "127.0.0.1" if str(host).endswith(".example") else host, *a, **k))
    c = boto3.client("s3", endpoint_url="http://s3.example:%d" % s.port,
                     aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                     region_name="us-east-1",
                     config=Config(s3={"addressing_style": "virtual"}))
    c.put_object(Bucket="bucket", Key="a/b ü", Body=b"v")
    assert c.get_object(Bucket="bucket", Key="a/b ü")["Body"].read() == b"v"
    assert s.body("a/b ü") == b"v" and s.log[0].path.startswith("/a/")
    assert s.log[0].headers["host"].startswith("bucket.s3.example")
    listed = c.list_objects_v2(Bucket="bucket")["Contents"]
    assert [o["Key"] for o in listed] == ["a/b ü"]
    c.head_bucket(Bucket="bucket")
    assert code(c.get_object, Bucket="nope", Key="k") == ("NoSuchBucket", 404)


# ---- signatures

@pytest.mark.peers
def test_wrong_credentials(s):
    put = dict(Bucket="bucket", Key="k", Body=b"")
    assert code(client(s, secret="wrong").put_object, **put) == (
        "SignatureDoesNotMatch", 403)
    c = boto3.client("s3", endpoint_url=s.url, aws_access_key_id="who",
                     aws_secret_access_key=SECRET, region_name="us-east-1")
    assert code(c.put_object, **put) == ("InvalidAccessKeyId", 403)
    assert code(client(s, secret="wrong").head_object, Bucket="bucket", Key="k") == (
        "403", 403)
    assert not s.objects


@pytest.mark.peers
def test_wrong_region(s):
    raw = Raw(s)
    url, headers = signed(s, "GET", "/bucket/k")
    headers["Authorization"] = headers["Authorization"].replace("us-east-1", "mars-1")
    got = raw("GET", "/bucket/k", headers=headers, sign=False)
    assert got.status == 400 and b"<Region>us-east-1</Region>" in got.data
    assert b"<Code>AuthorizationHeaderMalformed</Code>" in got.data
    # boto3 itself goes on to the region it is told of
    client(s, region="eu-west-1").put_object(Bucket="bucket", Key="k", Body=b"r")
    assert s.body("k") == b"r"


@pytest.mark.peers
def test_session_token():
    with S3Server(session_token="tok/en+=") as s:
        put = dict(Bucket="bucket", Key="k", Body=b"")
        client(s, token="tok/en+=").put_object(**put)
        assert code(client(s).put_object, **put) == ("InvalidToken", 400)
        assert code(client(s, token="no").put_object, **put) == ("InvalidToken", 400)
        assert s.env()["AWS_SESSION_TOKEN"] == "tok/en+="
        url = client(s, token="tok/en+=").generate_presigned_url(
            "get_object", Params={"Bucket": "bucket", "Key": "k"})
        assert fetch(url).status == 200
        url = client(s).generate_presigned_url(
            "get_object", Params={"Bucket": "bucket", "Key": "k"})
        assert fetch(url).status == 400


@pytest.mark.peers
def test_skew():
    with S3Server(skew=1000) as s:
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            client(s).put_object(Bucket="bucket", Key="k", Body=b"")
        error = caught.value.response
        assert error["Error"]["Code"] == "RequestTimeTooSkewed"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
                            error["Error"]["ServerTime"])
        date = error["ResponseMetadata"]["HTTPHeaders"]["date"]
        stamp = datetime.datetime.strptime(date, "%a, %d %b %Y %H:%M:%S GMT").replace(
            tzinfo=datetime.timezone.utc).timestamp()
        assert abs(stamp - time.time() - 1000) < 3
        s.skew = -800
        c = client(s)
        c.put_object(Bucket="bucket", Key="k", Body=b"")
        modified = c.head_object(Bucket="bucket", Key="k")["LastModified"].timestamp()
        assert abs(modified - time.time() + 800) < 3
        s.skew = -901
        assert code(c.put_object, Bucket="bucket", Key="k") == (
            "RequestTimeTooSkewed", 403)


def fetch(url, method="GET", body=None, headers=None):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request(method, "%s?%s" % (parts.path, parts.query), body, headers or {})
    reply = connection.getresponse()
    reply.data = reply.read()
    return reply


@pytest.mark.peers
def test_presigned(s, c):
    params = {"Bucket": "bucket", "Key": "a/b ü+~"}
    put = c.generate_presigned_url("put_object", Params=params)
    assert fetch(put, "PUT", b"body").status == 200
    assert fetch(put, "GET").status == 403
    get = c.generate_presigned_url("get_object", Params=params, ExpiresIn=60)
    assert fetch(get).data == b"body"
    assert fetch(get + "&x=1").status == 403
    assert fetch(get.replace("60", "61")).status == 403
    s.skew = 61
    got = fetch(get)
    assert got.status == 403 and b"expired" in got.data
    s.skew = -1000
    assert fetch(get).status == 403
    s.skew = 0
    assert fetch(get, headers={"If-None-Match": "x"}).status == 403
    once = c.generate_presigned_url("put_object", Params=dict(params, IfNoneMatch="*"))
    assert fetch(once, "PUT", b"x", {"If-None-Match": "*"}).status == 412
    assert fetch(once, "PUT", b"x").status == 403
    assert fetch(s.url + "/bucket/a?x=1").status == 403


@pytest.mark.peers
def test_strictness(s, raw):
    url, good = signed(s, "PUT", "/bucket/k", b"body")
    good["Content-Length"] = "4"

    def send(body=b"body", target="/bucket/k", **changes):
        headers = {k: v for k, v in dict(good, **changes).items() if v is not None}
        reply = raw("PUT", target, body, headers, sign=False)
        found = re.search(b"<Code>(.*?)</Code>", reply.data)
        assert reply.getheader("x-amz-request-id")
        return reply.status, found and found.group(1).decode()
    assert send() == (200, None)
    for name in ("If-Match", "If-None-Match", "x-amz-meta-a", "x-amz-copy-source"):
        assert send(**{name: "*"}) == (403, "AccessDenied")
    assert send(body=b"bodx") == (400, "XAmzContentSHA256Mismatch")
    assert send(target="/bucket/j") == (403, "SignatureDoesNotMatch")
    assert send(target="/bucket/k?a=b") == (403, "SignatureDoesNotMatch")
    assert send(Authorization=None) == (403, "AccessDenied")
    assert send(Authorization="Basic eA==") == (400, "InvalidRequest")
    assert send(**{"X-Amz-Content-SHA256": None, "x-amz-content-sha256": None}) == (
        400, "InvalidRequest")
    assert send(**{"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"})[0] == 403
    no_host = good["Authorization"].replace("SignedHeaders=host;", "SignedHeaders=")
    assert send(Authorization=no_host) == (403, "AccessDenied")
    service = good["Authorization"].replace("/s3/", "/ec2/")
    assert send(Authorization=service) == (400, "AuthorizationHeaderMalformed")
    _, odd = signed(s, "PUT", "/bucket/a+b", b"")
    reply = raw("PUT", "/bucket/a+b", b"", odd, sign=False)
    assert reply.status == 403 and b"SignatureDoesNotMatch" in reply.data
    assert list(s.objects) == [("bucket", "k")]
    s.verify = False
    assert raw("PUT", "/bucket/z", b"", sign=False).status == 200


@pytest.mark.peers
def test_unsigned_payload(s):
    request = AWSRequest("PUT", s.url + "/bucket/k", data=b"free", headers={
        "Host": "127.0.0.1:%d" % s.port, "X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"})
    request.context["payload_signing_enabled"] = False
    auth = S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1")
    auth._should_sha256_sign_payload = lambda _: False
    auth.add_auth(request)
    assert Raw(s)("PUT", "/bucket/k", b"other", dict(request.headers.items()),
                  sign=False).status == 200


def streaming_headers(s, target, headers):
    request = AWSRequest("PUT", s.url + target, headers=dict(headers, **{
        "Host": "127.0.0.1:%d" % s.port,
        "X-Amz-Content-SHA256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER"}))
    auth = S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1")
    auth.payload = lambda _: "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    auth.add_auth(request)
    return dict(request.headers.items())


@pytest.mark.peers
def test_aws_chunked(s, raw):
    data = b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    for length, status in (("6", 200), ("7", 400)):
        headers = streaming_headers(s, "/bucket/k", {
            "Content-Encoding": "aws-chunked", "X-Amz-Trailer": "x-amz-checksum-crc32",
            "X-Amz-Decoded-Content-Length": length})
        reply = raw("PUT", "/bucket/k", data,
                    dict(headers, **{"Content-Length": str(len(data))}), sign=False)
        assert reply.status == status
    assert s.body("k") == b"hello!" and s.log[0].body_size == 6
    headers = streaming_headers(s, "/bucket/t", {
        "Content-Encoding": "aws-chunked", "X-Amz-Decoded-Content-Length": "6",
        "Transfer-Encoding": "chunked"})
    connection = raw.connection
    connection.request("PUT", "/bucket/t", iter([data[:7], data[7:]]), headers,
                       encode_chunked=True)
    assert connection.getresponse().read() == b"" and s.body("t") == b"hello!"


@pytest.mark.peers
def test_boto3_trailing_checksum(s, monkeypatch):
    # boto3 sends trailers over https only, unless it is told the request is one.
    import botocore.httpchecksum as httpchecksum
    real = httpchecksum.resolve_request_checksum_algorithm

    def resolve(request, *args, **kw):
        url, request["url"] = request["url"], "https" + request["url"][4:]
        real(request, *args, **kw)
        request["url"] = url
    monkeypatch.setattr("botocore.client.resolve_request_checksum_algorithm", resolve,
                        raising=False)
    monkeypatch.setattr(httpchecksum, "resolve_request_checksum_algorithm", resolve)
    client(s).put_object(Bucket="bucket", Key="k", Body=b"trailer" * 9)
    assert s.body("k") == b"trailer" * 9
    assert s.log[0].headers["x-amz-content-sha256"].startswith("STREAMING-UNSIGNED")


@pytest.mark.peers
def test_missing_length_and_bad_requests(s):
    _, headers = signed(s, "PUT", "/bucket/k")
    head = "".join("%s: %s\r\n" % pair for pair in headers.items()
                   if pair[0].lower() != "content-length")
    assert exchange(s, "PUT /bucket/k HTTP/1.1\r\n%s\r\n" % head).startswith(
        b"HTTP/1.1 411 ")
    for text in ("nonsense\r\n\r\n", "GET /%ff HTTP/1.1\r\n\r\n",
                 "PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        assert exchange(s, text).startswith(b"HTTP/1.1 400 ")


def exchange(s, text):
    with socket.create_connection(("127.0.0.1", s.port), 5) as sock:
        sock.sendall(text.encode("latin-1"))
        return sock.recv(65536)


@pytest.mark.peers
def test_content_md5(s, raw):
    assert raw("PUT", "/bucket/k", b"x", {
        "Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}).status == 400
    assert not s.objects


@pytest.mark.peers
def test_error_shape(s, raw):
    reply = raw("GET", "/bucket/a%26b")
    text = reply.data.decode()
    assert reply.status == 404 and reply.getheader("Content-Type") == "application/xml"
    for piece in ("<Error><Code>NoSuchKey</Code>", "<Message>", "<Key>a&amp;b</Key>",
                  "<RequestId>%s</RequestId>" % reply.getheader("x-amz-request-id")):
        assert piece in text
    reply = raw("HEAD", "/bucket/a")
    assert reply.status == 404 and reply.data == b""
    assert reply.getheader("x-amz-request-id")


# ---- behaviour switches

def together_0(n, work):
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n)))


@pytest.mark.parametrize("options,most", [({}, 1), ({"races": True}, 16),
                                          ({"ignores": True}, 16)])
@pytest.mark.peers
def test_atomicity(options, most):
    with S3Server(**options) as s:
        _, headers = signed(s, "PUT", "/bucket/k", b"x", {"If-None-Match": "*"})
        headers["Content-Length"] = "1"
        gate = threading.Barrier(16)

        def claim(n):
            raw = Raw(s)
            raw.connection.connect()
            gate.wait()
            status = raw("PUT", "/bucket/k", b"x", headers, sign=False).status
            assert status in (200, 412)
            return status == 200
        won = sum(together_0(16, claim))
        assert won == 1 if most == 1 else won > 1
        assert sum(r.landed for r in s.log) == won


@pytest.mark.peers
def test_lost_updates_never_happen(s):
    c = client(s)
    c.put_object(Bucket="bucket", Key="n", Body=b"0")

    def add(_):
        for _ in range(10):
            while True:
                got = c.get_object(Bucket="bucket", Key="n")
                try:
                    c.put_object(Bucket="bucket", Key="n", IfMatch=got["ETag"],
                                 Body=b"%d" % (int(got["Body"].read()) + 1))
                    break
                except botocore.exceptions.ClientError:
                    pass
    together_0(4, add)
    assert s.body("n") == b"40"


@pytest.mark.peers
def test_reads_never_miss_an_overwritten_object(s):
    c = client(s)
    c.put_object(Bucket="bucket", Key="k", Body=b"0")
    stop = threading.Event()

    def write():
        while not stop.is_set():
            c.put_object(Bucket="bucket", Key="k", Body=b"1")
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(200):
            c.head_object(Bucket="bucket", Key="k")
    finally:
        stop.set()
        thread.join()


@pytest.mark.peers
def test_small_switches():
    with S3Server(lm=False, md5_etags=False, latency=0.05, buckets=("b.c",)) as s:
        c = client(s)
        one = c.put_object(Bucket="b.c", Key="k", Body=b"")["ETag"]
        assert one != c.put_object(Bucket="b.c", Key="k", Body=b"")["ETag"]
        began = time.time()
        assert "LastModified" not in c.head_object(Bucket="b.c", Key="k")
        assert 0.05 <= time.time() - began < 0.2
        assert s.env() == {"AWS_ENDPOINT_URL": s.url, "AWS_ACCESS_KEY_ID": KEY,
                           "AWS_SECRET_ACCESS_KEY": SECRET,
                           "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.raises(TypeError):
        S3Server(nonsense=1)


@pytest.mark.peers
def test_environment_and_restart(s):
    script = ("import boto3\nboto3.client('s3').put_object(Bucket='bucket', Key='e', "
              "Body=b'env')")
    subprocess.run([sys.executable, "-c", script], check=True,
                   env=dict(s.env(), PATH="/usr/bin:/bin"))
    assert s.body("e") == b"env"
    port, raw = s.port, Raw(s)
    assert raw("GET", "/bucket/e").status == 200
    s.stop()
    with pytest.raises(OSError):
        Raw(s)("GET", "/bucket/e")
    with pytest.raises((OSError, http.client.HTTPException)):
        raw.connection.request("GET", "/bucket/e")
        raw.connection.getresponse()
    s.start()
    assert s.port == port and Raw(s)("GET", "/bucket/e").data == b"env"


# ---- faults

BROKEN = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


@pytest.mark.parametrize("kind,error,landed", [
    ("refuse", http.client.RemoteDisconnected, False),
    ("lose", http.client.RemoteDisconnected, True),
    ("reset", ConnectionResetError, False),
    ("reset_after", ConnectionResetError, True)])
@pytest.mark.peers
def test_silent_faults(s, kind, error, landed):
    for _ in range(20):
        s.objects.clear()
        s.clear_log()
        s.fault(kind, "PUT")
        raw = Raw(s)
        with pytest.raises(BROKEN) as caught:
            raw("PUT", "/bucket/k", b"1")
        assert type(caught.value) is error
        assert (s.body("k") == b"1") is landed
        assert s.log[-1].landed is landed and s.log[-1].status == 0
        raw.connection.close()
        assert raw("PUT", "/bucket/k", b"2").status == 200


@pytest.mark.peers
def test_selection(s, raw):
    fault = s.fault(503, "PUT", key="locks/", times=2, skip=1)
    asked = ["/bucket/locks/a", "/bucket/other", "/bucket/locks/a", "/bucket/locks/a",
             "/bucket/locks/a"]
    assert [raw("PUT", t, b"").status for t in asked] == [200, 200, 503, 503, 200]
    assert fault.times == 0
    s.fault(500, key="jobs/")
    assert raw("GET", "/bucket?list-type=2&prefix=x").status == 200
    assert raw("GET", "/bucket?list-type=2&prefix=jobs%2Fa").status == 500
    assert raw("GET", "/bucket?list-type=2&prefix=jobs%2Fa").status == 200
    with pytest.raises(ValueError):
        s.fault("typo")


@pytest.mark.parametrize("status,name", [
    (409, "ConditionalRequestConflict"), (412, "PreconditionFailed"),
    (429, "TooManyRequests"), (500, "InternalError"), (501, "NotImplemented"),
    (503, "SlowDown")])
@pytest.mark.peers
def test_status_faults(s, c, raw, status, name):
    s.fault(status, times=2, retry_after=7)
    assert code(c.put_object, Bucket="bucket", Key="k", Body=b"") == (name, status)
    reply = raw("PUT", "/bucket/k", b"")
    assert reply.getheader("Retry-After") == "7" and not s.objects
    assert [(r.status, r.landed) for r in s.log] == [(status, False)] * 2


@pytest.mark.peers
def test_landed(s, raw):
    s.fault("landed", status=503)
    assert raw("PUT", "/bucket/k", b"1").status == 503 and s.body("k") == b"1"
    assert s.log[-1].landed and s.log[-1].status == 503


@pytest.mark.peers
def test_delay(s, raw):
    s.fault("delay", seconds=0.2)
    began = time.time()
    assert raw("PUT", "/bucket/k", b"1").status == 200
    assert time.time() - began >= 0.2


@pytest.mark.peers
def test_late(s, raw):
    s.fault("late", "PUT", seconds=0.15)
    assert raw("PUT", "/bucket/k", b"1", {"If-None-Match": "*"}).status == 500
    assert s.body("k") is None and not s.log[-1].landed
    time.sleep(0.4)
    assert s.body("k") == b"1" and s.log[-1].landed
    s.fault("late", "PUT", seconds=0.15)
    assert raw("PUT", "/bucket/j", b"1", {"If-None-Match": "*"}).status == 500
    assert raw("PUT", "/bucket/j", b"2", {"If-None-Match": "*"}).status == 200
    time.sleep(0.4)
    assert s.body("j") == b"2"
    assert [r.landed for r in s.log] == [True, False, True]


@pytest.mark.peers
def test_duplicate(s, raw):
    s.md5_etags = False
    s.fault("duplicate")
    reply = raw("PUT", "/bucket/k", b"1")
    assert reply.status == 200
    assert reply.getheader("ETag") != s.objects["bucket", "k"].etag
    s.fault("duplicate")
    reply = raw("PUT", "/bucket/j", b"1", {"If-None-Match": "*"})
    assert reply.status == 200 and s.log[-1].landed and s.log[-1].status == 200


@pytest.mark.peers
def test_truncate(s, raw):
    raw("PUT", "/bucket/k", b"0123456789")
    s.fault("truncate", "GET")
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw("GET", "/bucket/k")
    assert caught.value.partial == b"01234"
    for at in ({}, {"at": 7}):
        s.fault("truncate", "PUT", **at)
        _, headers = signed(s, "PUT", "/bucket/j", b"x")
        headers["Content-Length"] = "1"
        head = "".join("%s: %s\r\n" % pair for pair in headers.items())
        got = exchange(s, "PUT /bucket/j HTTP/1.1\r\n%s\r\nx" % head)
        assert b"\r\n\r\n" not in got and b"etag" not in got.lower() and got
        assert len(got) == 7 or not at
        assert s.body("j") == b"x" and s.log[-1].landed and s.log[-1].status == 200
        s.objects.pop(("bucket", "j"))


@pytest.mark.peers
def test_redirect_region_html(s, c, raw):
    s.fault("redirect", location="http://elsewhere.example/x")
    reply = raw("PUT", "/bucket/k", b"1")
    assert reply.status == 307
    assert reply.getheader("Location") == "http://elsewhere.example/x"
    s.fault("redirect", location="/x", status=302)
    assert raw("GET", "/bucket/k").status == 302
    s.fault("region", region="eu-west-1")
    reply = raw("PUT", "/bucket/k", b"1")
    assert reply.status == 301 and b"PermanentRedirect" in reply.data
    assert reply.getheader("x-amz-bucket-region") == "eu-west-1"
    s.fault("html", times=2)
    reply = raw("PUT", "/bucket/k", b"1")
    assert reply.status == 200 and reply.getheader("Content-Type") == "text/html"
    assert raw("HEAD", "/bucket/k").data == b""
    assert not s.objects and not any(r.landed for r in s.log)


@pytest.mark.peers
def test_stale_list(s, c):
    def keys():
        got = c.list_objects_v2(Bucket="bucket").get("Contents", ())
        return [(o["Key"], o["Size"]) for o in got]
    c.put_object(Bucket="bucket", Key="a", Body=b"1")
    c.put_object(Bucket="bucket", Key="b", Body=b"1")
    c.put_object(Bucket="bucket", Key="a", Body=b"12")
    c.delete_object(Bucket="bucket", Key="b")
    c.delete_object(Bucket="bucket", Key="absent")
    states = [[("a", 2)], [("a", 2), ("b", 1)], [("a", 1), ("b", 1)], [("a", 1)],
              [], []]
    for depth, state in enumerate(states):
        if depth:
            s.fault("stale_list", depth=depth)
        assert keys() == state
    s.fault("stale_list")
    c.put_object(Bucket="bucket", Key="c", Body=b"")
    assert keys() == [("a", 2)]
    assert keys() == [("a", 2), ("c", 0)]


@pytest.mark.peers
def test_ignore(s, raw):
    raw("PUT", "/bucket/k", b"1")
    s.fault("ignore")
    assert raw("PUT", "/bucket/k", b"2", {"If-None-Match": "*"}).status == 200
    assert raw("PUT", "/bucket/k", b"3", {"If-None-Match": "*"}).status == 412
    assert s.body("k") == b"2"


@pytest.mark.peers
def test_garbage_and_age(s, raw):
    tag = raw("PUT", "/bucket/k", b"abba").getheader("ETag")
    s.fault("garbage")
    reply = raw("GET", "/bucket/k")
    assert reply.status == 200 and reply.data != b"abba"
    assert len(reply.data) == 4 and reply.getheader("ETag") == tag
    s.fault("garbage", body=b"{")
    assert raw("GET", "/bucket/absent").data == b"{"
    s.fault("age")
    reply = raw("GET", "/bucket/k")
    assert reply.getheader("Age") == "120" and reply.data == b"abba"
    stamp = datetime.datetime.strptime(reply.getheader("Date"),
                                       "%a, %d %b %Y %H:%M:%S GMT")
    age = time.time() - stamp.replace(tzinfo=datetime.timezone.utc).timestamp()
    assert 119 <= age <= 123


@pytest.mark.peers
def test_call(s, raw):
    seen = []

    def meanwhile(req):
        seen.append((req.method, req.key, s.body("k")))
        Raw(s)("PUT", "/bucket/k", b"rival")
    s.fault("call", "PUT", fn=meanwhile)
    assert raw("PUT", "/bucket/k", b"mine", {"If-None-Match": "*"}).status == 412
    assert seen == [("PUT", "k", None)] and s.body("k") == b"rival"


@pytest.mark.peers
def test_faults_through_boto3_retries(s):
    c = client(s, retries=3)
    for kind in ("reset", "lose", 503, "reset_after", "refuse"):
        s.fault(kind)
        c.put_object(Bucket="bucket", Key="k", Body=b"1")
    assert s.count("PUT") == 10


# ---- speed

@pytest.mark.peers
def test_throughput(s, record_property):
    _, put = signed(s, "PUT", "/bucket/k", b"x" * 100)
    put["Content-Length"] = "100"
    _, get = signed(s, "GET", "/bucket/k")
    connection = http.client.HTTPConnection("127.0.0.1", s.port)
    began, n = time.time(), 2000
    for i in range(n):
        method, headers = ("PUT", put) if i % 2 else ("GET", get)
        connection.request(method, "/bucket/k", b"x" * 100 if i % 2 else None, headers)
        connection.getresponse().read()
    rate = n / (time.time() - began)
    print("requests/s:", json.dumps(round(rate)))
    record_property("rate", rate)
    assert rate >= 800


# == Stores without conditions =========================================
#
# The Hub's own API has no compare-and-set: what has one writer goes on, what must have
# one winner is refused, a repeated --id is still one message.


class PlainStore(MemoryStore):
    """A memory store whose every conditional write is refused without a request."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.verdict = {"atomic": False, "cas": False, "dialect": "quoted",
                        "why": "no compare-and-set here", "hint": "make a key"}

    def handle(self, name="?"):
        return PlainStore(self.project, self.shared, name)

    def put(self, key, data, *, if_match=None, if_none_match=False):
        if if_match is not None or if_none_match:
            raise tracecraft.Unsafe("no compare-and-set here")
        return super().put(key, data)

    def upload(self, key, path, *, if_none_match=False, **how):
        if if_none_match:
            raise tracecraft.Unsafe("no compare-and-set here")
        return super().upload(key, path, **how)


@pytest.fixture
def plain():
    return agent_on(PlainStore(), "ada")


def test_memory_without_conditions_is_overwritten_and_said_once(plain):
    assert plain.memory.set("k", "1")["rev"] == 1
    assert plain.memory.set("k", "2")["rev"] == 2
    assert plain.memory.get("k")["value"] == "2"
    assert plain.warned == ["no compare-and-set here: written as a plain overwrite,"
                            " for one writer"]


WINNERS = {
    "claim": lambda p: p.claim("s"), "lock": lambda p: p.locks.acquire("l", ttl=60),
    "reserve": lambda p: p.reservations.reserve(("*.py",)),
    "push": lambda p: p.queue("q").push("x"), "incr": lambda p: p.memory.incr("n"),
    "if-rev": lambda p: p.memory.set("k", "v", if_rev=0),
    "if-absent": lambda p: p.memory.set("k", "v", if_absent=True),
    "append": lambda p: p.memory.append("k", "v"),
    "step add": lambda p: p.steps.add("s", title="t")}


@pytest.mark.parametrize("act", WINNERS)
def test_what_must_have_one_winner_is_refused_without_conditions(plain, act):
    error = refused(tracecraft.Unsafe, WINNERS[act], plain)
    assert error.hint == "make a key" and not plain.ledger.store.log


@pytest.mark.parametrize("act", ["claim", "incr", "lock"])
def test_an_advisory_act_is_allowed_with_a_warning_each_time(plain, act):
    plain.ledger.allow_advisory = True
    WINNERS[act](plain)
    before = len(plain.warned)
    plain.claim("another")
    assert before and len(plain.warned) > before and "advisory" in plain.warned[-1]


def test_mail_goes_its_way_without_conditions_and_an_id_is_sent_once(plain):
    bob = agent_on(plain.ledger.store, "bob")
    bob.presence.beat()
    first = plain.mail.send("bob", "hello", op="7")
    assert plain.mail.send("bob", "hello", op="7")["key"] == first["key"]
    refused(tracecraft.Conflict, plain.mail.send, "bob", "other", op="7")
    batch = bob.mail.inbox(new=True)
    assert [m["message"] for m in batch.messages] == ["hello"]
    batch.commit()
    assert not bob.mail.inbox(new=True).messages


def test_a_message_of_no_id_costs_no_look_without_conditions(plain):
    agent_on(plain.ledger.store, "bob").presence.beat()
    plain.mail.send("bob", "first")
    plain.ledger.store.forget()
    plain.mail.send("bob", "second")
    assert plain.ledger.store.requests == 1


def test_artifacts_work_without_conditions(plain, tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    plain.artifacts.upload(str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"two")
    refused(tracecraft.Conflict, plain.artifacts.upload, str(tmp_path / "a"))
    plain.artifacts.upload(str(tmp_path / "a"), overwrite=True)
    plain.artifacts.download("a", output=str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"two"
    plain.artifacts.delete("a")
    assert plain.artifacts.show("a")["deleted_at"]


def test_init_without_conditions_leaves_no_verdict_for_others(plain):
    assert plain.init()["atomic"] is False
    doc = plain.ledger.read("_project.json").doc
    assert doc["layout"] == 1 and doc["verdicts"] == {}
    assert plain.init()["cas"] is False


class DigestStore(MemoryStore):
    """A memory store whose ETags are digests of the bytes, as at Hugging Face."""

    def handle(self, name="?"):
        return DigestStore(self.project, self.shared, name)

    def etag_of(self, data):
        return '"' + hashlib.sha256(data).hexdigest() + '"'

    def head(self, key):
        found = super().head(key)
        return tracecraft.Found(key, b"", etag=self.etag_of(self.shared.objects[key][0]),
                                modified=found.modified, now=found.now, size=found.size)


def test_where_etags_are_digests_one_head_settles_a_lost_answer():
    ada = agent_on(DigestStore(), "ada")
    store = ada.ledger.store
    store.fault("lose", key="claim.json")
    assert ada.claim("s").token == 1
    asked = [pair for pair in store.counts if pair[1].endswith("claim.json")]
    assert store.counts["HEAD", "steps/s/claim.json"] == 1, asked
# == A Hub by its own API ==============================================
#
# Hub and NativeStore against the Hub of our own, whose end asserts that no secret went
# where it does not belong.


@pytest.fixture
def hub_server():
    with HubServer() as server:
        server.bucket("alice/coord")
        yield server


def hub_of(server, token=None, **how):
    hub = tracecraft.Hub("alice/coord", endpoint=server.url, random=random.random,
                         token=lambda: server.token if token is None else token,
                         open_to=lambda origin: tracecraft.open_http(origin, **how))
    hub.deadline = time.monotonic() + 30
    return hub


def native(server, *how, **more):
    return tracecraft.NativeStore(hub_of(server, *how, **more), "p")


@pytest.fixture
def natively(hub_server):
    store = native(hub_server)
    yield store
    store.close()


def hub_answer(status=200, body=b"", **headers):
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = tracecraft.Answer(status, told, sent_at=0.0, got_at=0.0)
    answer.body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return answer


def asked_of(server):
    """["POST batch", ...]: the requests since the log was cleared."""
    words = ("batch", "paths-info", "tree", "xet-write-token", "xorbs", "shards",
             "resolve", "files", "coord")
    log = [(req.method, next(word for word in words if word in req.path.split("/")))
           for req in list(server.log)]
    server.clear_log()
    return [" ".join(pair) for pair in log]


# -- what the Hub says -------------------------------------------------


@pytest.mark.parametrize("text, limit", [
    ('"api";r=0;t=55', (0, 55)), ('"a";r=9;t=1, "b";r=2;t=30', (2, 30)),
    ('"api"; r=7', (7, 0)), ("", None), ('"api";r=x;t=5', None), ("r=" + "9" * 30, None)])
def test_a_rate_limit_is_the_tightest_of_its_policies(text, limit):
    assert tracecraft.rate_limit({"ratelimit": text}) == limit


FAILURES = [  # status, headers, options, class, words of the sentence, of the hint
    (401, {}, {}, "Denied", "401", "hf auth login"),
    (401, {}, {"anonymous": True}, "Denied", "401", "HF_TOKEN"),
    (403, {}, {}, "Denied", "403", "right to write"),
    (404, {"x_error_code": "RepoNotFound"}, {}, "NoBucket", "bucket 'u/b'", "USER/"),
    (404, {"x_error_code": "EntryNotFound"}, {}, "NotFound", "EntryNotFound", "nothing"),
    (409, {}, {}, "Busy", "409", "rival"),
    (422, {}, {"write": True}, "Error", "422", "as it is"),
    (429, {}, {"write": True}, "Throttled", "429", "fewer agents"),
    (503, {}, {}, "Throttled", "503", "fewer agents"),
    (503, {}, {"write": True}, "Lost", "503", "trouble"),
    (500, {}, {}, "Unavailable", "500", "trouble"),
    (502, {}, {"write": True}, "Lost", "502", "trouble"),
    (408, {}, {"write": True}, "Lost", "408", "trouble"),
    (307, {}, {}, "Error", "307", "renamed"),
    (400, {"x_error_message": "bad\x1b[31m"}, {}, "Error", r"bad\x1b[31m", "as it is"),
    (400, {"x_request_id": "id-1"}, {}, "Error", "(request id-1)", "as it is")]


@pytest.mark.parametrize("status, headers, how, kind, text, hint", FAILURES)
def test_each_status_of_the_hub_has_its_error(status, headers, how, kind, text, hint):
    error = tracecraft.hub_failure(hub_answer(status, **headers), "read x", bucket="u/b",
                                   **how)
    assert type(error).__name__ == kind and error.message.startswith("cannot read x: ")
    assert text in error.message and hint in error.hint


@pytest.mark.parametrize("body, words", [
    ({"error": "no luck"}, "no luck"), ({"error": ["a", "b"]}, "a; b"),
    ({"error": "x", "error_description": "longer"}, "longer"),
    ({"errors": [{"message": "m1"}, {"message": "m2"}]}, "m1; m2"),
    ({"errors": [{}, 7, None]}, "; 7; None"), (b"plain text", "plain text"),
    ([], ""), ({}, ""), (b"", ""), (b"\xff\0", "\ufffd\\x00"), (b"[" * 9999, "[" * 120)])
def test_the_hubs_words_are_found_wherever_it_puts_them(body, words):
    assert tracecraft.hub_words(hub_answer(400, body)) == words


@pytest.mark.parametrize("headers, seconds", [
    ({"ratelimit": '"api";r=0;t=55'}, 56), ({"ratelimit": '"api";r=3;t=55'}, 0),
    ({"ratelimit": '"api";r=3;t=55', "retry_after": "7"}, 7), ({}, 0),
    ({"ratelimit": '"api";r=0;t=999999'}, 301)])
def test_a_429_waits_for_the_window_only_when_nothing_is_left(headers, seconds):
    error = tracecraft.hub_failure(hub_answer(429, **headers), "read x", bucket="u/b")
    assert error.after == seconds and ("asks to wait" in error.hint) is bool(seconds)


@pytest.mark.parametrize("link, cursor", [
    ('<http://evil.example/x?cursor=abc>; rel="next"', "abc"),
    ('<h?cursor=p>; rel="prev", <h?a=1&cursor=n%3D%2B>; rel="next"', "n=+"),
    ('<h?cursor=p>; rel="prev"', ""), ('<h>; rel="next"', ""), ("", ""),
    ("<h?cursor=x>; rel=next", "x"),
    ("nonsense", ""), ('<h?cursor=>; rel="next"', "")])
def test_of_the_next_page_only_the_cursor_is_taken(link, cursor):
    assert tracecraft.next_cursor({"link": link}) == cursor


@pytest.mark.parametrize("doc", [
    None, 7, "a", [], {}, {"path": ""}, {"path": 7}, {"path": "a"},
    {"path": "a", "size": "1", "xetHash": "h"}, {"path": "a", "size": 1},
    {"path": "a", "size": 1, "xetHash": ""}, {"path": "a", "size": -1, "xetHash": "h"},
    {"path": "a", "size": 1, "xetHash": "h\n"}])
def test_a_malformed_entry_is_corrupt(doc):
    with pytest.raises(tracecraft.Corrupt):
        tracecraft.hub_entry(doc)


def test_the_time_of_an_entry_is_the_hubs_not_the_writers():
    entry = tracecraft.hub_entry({
        "path": "a", "size": 1, "xetHash": "h", "mtime": "2031-01-01T00:00:00.000Z",
        "uploadedAt": "1970-01-01T00:00:09.500Z"})
    assert (entry.etag, entry.modified) == ('"h"', 9.5)


@pytest.mark.parametrize("status, doc, failed", [
    (200, {"success": True, "processed": 2, "succeeded": 2, "failed": []}, {}),
    (200, {"success": False, "processed": 2, "succeeded": 1,
           "failed": [{"path": "b", "error": "oops\x07"}]}, {"b": r"oops\x07"}),
    (422, {"failed": [{"path": "a", "error": "x"}]}, {"a": "x", "b": "422"}),
    (200, {"success": True, "processed": 1, "failed": []}, None),
    (200, {"success": False, "processed": 2, "failed": []}, None),
    (200, {"processed": 2, "failed": [{"path": "z"}]}, None),
    (200, {"processed": 2, "failed": ["a"]}, None),
    (200, {"processed": 2, "failed": {"a": 1}}, None),
    (200, {"processed": 2, "failed": 7}, None), (200, [], None), (200, {}, None)])
def test_a_batch_must_account_for_each_operation(status, doc, failed):
    sent = [{"path": "a"}, {"path": "b"}]
    if failed is None:
        with pytest.raises(tracecraft.Lost, match="account|JSON list"):
            tracecraft.batch_failures(hub_answer(status, doc), sent, doing="write")
        return
    assert tracecraft.batch_failures(hub_answer(status, doc), sent,
                                     doing="write") == failed


@pytest.mark.parametrize("url, plain, good", [
    ("https://h/x", False, True), ("http://127.0.0.1:1/x", True, True),
    ("http://h/x", False, False), ("https://u:p@h/", False, False), ("", True, False),
    ("https:///x", False, False), ("https://h:99999/", False, False), (None, True, False),
    ("file:///etc/passwd", True, False), ("https://h/\x1b", False, False),
    ("https://h/a b", False, False), ("https://[h/", True, False), (7, True, False)])
def test_an_address_named_by_the_hub_is_https(url, plain, good):
    assert bool(tracecraft.web_parts(url, plain=plain)) is good


@pytest.mark.parametrize("change", [
    {"casUrl": "http://h"}, {"casUrl": None}, {"accessToken": "a b"}, {"exp": "soon"},
    {"accessToken": "a\nb"}, {"accessToken": ""}, {"exp": None}])
def test_a_malformed_leave_to_upload_is_corrupt_and_shows_nothing(change):
    good = {"casUrl": "https://cas.h/base/", "accessToken": "sesame", "exp": 9}
    grant = tracecraft.XetGrant(good, plain=False)
    assert (grant.origin, grant.base) == ("https://cas.h", "/base")
    assert "sesame" not in repr(grant)
    with pytest.raises(tracecraft.Corrupt):
        tracecraft.XetGrant({**good, **change}, plain=False)


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "./a", "a/../b", "a/b..", "a\\b",
                                 "a\0b", "a\x7f", "a/./b", "a\udc80"])
def test_a_key_that_the_hub_cannot_have_is_refused_before_any_request(natively, key):
    with pytest.raises(tracecraft.Usage):
        natively.put(key, b"")
    assert natively.requests == 0


@pytest.mark.parametrize("bucket", ["", "b", "/b", "u/", "u/b/c"])
def test_a_bucket_of_the_hub_has_a_user_and_a_name(bucket):
    with pytest.raises(tracecraft.Usage, match="no bucket"):
        tracecraft.Hub(bucket, token=str, open_to=None, random=None)


# -- the token ---------------------------------------------------------


TOKENS = [  # environment, config, token; {} stands for the home directory
    ({}, {"hf_token": "hf_c"}, "hf_c"),
    ({"HF_TOKEN": "hf_e"}, {"hf_token": "hf_c"}, "hf_c"),
    ({"HF_TOKEN": "hf_e", "HUGGING_FACE_HUB_TOKEN": "hf_o"}, {}, "hf_e"),
    ({"HUGGING_FACE_HUB_TOKEN": "hf_o"}, {}, "hf_o"),
    ({"HF_TOKEN": " hf_e\r\n"}, {}, "hf_e"), ({"HF_TOKEN": "\n"}, {}, "hf_file"),
    ({}, {}, "hf_file"), ({}, {"hf_token": None}, "hf_file"),
    ({"HF_HOME": "~/models"}, {}, "hf_home"), ({"HF_HOME": "$HOME/models"}, {}, "hf_home"),
    ({"HF_HOME": "${HOME}/models"}, {}, "hf_home"), ({"HF_HOME": "/nowhere"}, {}, ""),
    ({"XDG_CACHE_HOME": "{}/xdg"}, {}, "hf_xdg"),
    ({"HF_TOKEN_PATH": "~/named", "HF_HOME": "~/models"}, {}, "hf_named"),
    ({"HF_TOKEN_PATH": "~/named/no"}, {}, ""), ({"HOME": "/nowhere"}, {}, ""),
    ({"HF_TOKEN": "hf_e", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, {}, ""),
    ({"HF_HUB_DISABLE_IMPLICIT_TOKEN": "yes"}, {"hf_token": "hf_c"}, "hf_c"),
    ({"HF_TOKEN": "hf_e", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}, {}, "hf_e")]


@pytest.fixture
def hf_home(tmp_path):
    for name, token in (("models/token", "hf_home"), ("named", "hf_named"),
                        (".cache/huggingface/token", "hf_file\r\n"),
                        ("xdg/huggingface/token", "hf_xdg\n")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    return tmp_path


@pytest.mark.parametrize("environ, config, token", TOKENS)
def test_the_token_is_the_one_that_the_hubs_tools_would_take(hf_home, environ, config,
                                                             token):
    environ = {name: text.replace("{}", str(hf_home)) if text.startswith("{}") else text
               for name, text in environ.items()}
    assert tracecraft.hf_token({"HOME": str(hf_home), **environ}, config) == token


def test_offline_is_said_before_any_request():
    with pytest.raises(tracecraft.Unavailable, match="HF_HUB_OFFLINE") as caught:
        tracecraft.hf_token({"HF_HUB_OFFLINE": "ON", "HF_TOKEN": "hf_e"}, {})
    assert not caught.value.retryable


def test_a_malformed_token_is_denied_and_not_shown(tmp_path):
    with pytest.raises(tracecraft.Denied, match="HF_TOKEN") as caught:
        tracecraft.hf_token({"HF_TOKEN": "hf_hush hush"}, {})
    assert "hush" not in caught.value.message + caught.value.hint
    with pytest.raises(tracecraft.Denied, match="IsADirectory|Permission"):
        tracecraft.hf_token({"HF_TOKEN_PATH": str(tmp_path)}, {})


# -- requests ----------------------------------------------------------


def test_a_document_costs_three_requests_and_a_token_that_is_kept(hub_server, natively):
    natively.put("a.json", b"{}")
    assert asked_of(hub_server) == ["GET xet-write-token", "POST xorbs", "POST shards",
                                    "POST batch"]
    natively.put("a.json", b"[]")
    assert asked_of(hub_server) == ["POST xorbs", "POST shards", "POST batch"]
    assert natively.get("a.json").body == b"[]"
    assert asked_of(hub_server) == ["GET resolve", "GET files"]
    assert natively.get("a.json", if_none_match=natively.head("a.json").etag).body is None
    assert asked_of(hub_server) == ["POST paths-info", "GET resolve"]


def test_many_documents_share_one_upload_and_one_batch(hub_server, natively):
    documents = {f"m/{at}.json": b'{"n": %d}' % at for at in range(40)}
    stamps = natively.put_many({**documents, "empty": b"", "same": b'{"n": 0}'})
    assert asked_of(hub_server) == ["GET xet-write-token", "POST xorbs", "POST shards",
                                    "POST batch"]
    found = natively.heads([*documents, "nothing"])
    assert asked_of(hub_server) == ["POST paths-info"]
    assert found.keys() == documents.keys() and all(
        found[key].etag == stamps[key].etag for key in documents)
    assert hub_server.files("alice/coord")["p/empty"] == b""
    assert stamps["same"].etag == stamps["m/0.json"].etag
    assert natively.put_many({}) == {} and natively.heads([]) == {}


def test_more_than_a_batch_takes_is_sent_in_several(hub_server, natively):
    natively.put_many({f"k{at}": b"same" for at in range(1001)})
    assert hub_server.count("POST", "batch") == 2
    assert len(natively.heads([f"k{at}" for at in range(1001)])) == 1001
    assert hub_server.count("POST", "paths-info") == 2


@pytest.mark.parametrize("direct", [-1, 100])
def test_etags_are_hashes_wherever_they_come_from(direct):
    with HubServer(direct=direct) as server:
        server.bucket("alice/coord")
        store, data = native(server), b"some bytes"
        etag = store.put("k", data).etag
        assert etag == f'"{xet_of(data)}"' == store.etag_of(data)
        assert store.get("k").etag == store.head("k").etag == etag
        assert [entry.etag for entry in store.list("").entries] == [etag]
        assert store.get("k", if_none_match=etag).body is None
        assert store.get("k", start=5, limit=3).body == b"byt"
        assert store.get("k", start=99, limit=3).body == b""
        assert (store.get("k", limit=4).size, store.get("k", limit=0).body) == (10, b"")


def test_a_condition_is_unsafe_before_any_request(natively, tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    for act in (lambda: natively.put("k", b"", if_none_match=True),
                lambda: natively.put("k", b"", if_match='"e"'),
                lambda: natively.upload("k", str(tmp_path / "f"), if_none_match=True)):
        with pytest.raises(tracecraft.Unsafe, match="no compare-and-set") as caught:
            act()
        assert caught.value.exit == 10 and "HF_S3_ACCESS_KEY_ID" in caught.value.hint
    with pytest.raises(tracecraft.Denied, match="cannot sign"):
        natively.presigned("k", 60)
    assert natively.requests == 0 and natively.verdict["atomic"] is False


def test_what_a_listing_told_of_times_is_remembered_with_the_bytes(hub_server, natively):
    natively.put("a", b"1")
    other = native(hub_server)
    assert other.get("a").modified is None
    listed = other.list("").entries[0].modified
    assert abs(listed - time.time()) < 5 and other.get("a").modified == listed
    natively.put("a", b"2")
    assert other.get("a").modified is None


def test_a_url_of_the_store_is_that_of_its_settings(hub_server, natively):
    parts = tracecraft.parse_store_url(natively.url)
    assert parts == {"kind": "hf", "bucket": "alice/coord", "project": "p",
                     "endpoint": hub_server.url}
    assert tracecraft.store_url(parts) == natively.url


# -- the bucket --------------------------------------------------------


def test_a_missing_bucket_is_created_once_and_private():
    with HubServer() as server:
        store = native(server)
        with pytest.raises(tracecraft.NoBucket, match="alice/coord"):
            store.list("")
        with pytest.raises(tracecraft.NoBucket):
            store.get("k")
        assert [store.ensure(), store.ensure()] == [True, False]
        assert store.hub.info()["private"] is True
        assert store.hub.create(private=False) is False
        assert server.buckets["alice/coord"].private


def test_a_public_bucket_is_read_without_a_token_but_not_written():
    with HubServer() as server:
        server.bucket("alice/coord", private=False)
        native(server).put("k", b"v")
        nobody = native(server, "")
        assert nobody.get("k").body == b"v"
        with pytest.raises(tracecraft.Denied, match="401") as caught:
            nobody.put("k", b"w")
        assert "HF_TOKEN" in caught.value.hint


@pytest.mark.parametrize("token, status, hint", [
    ("hf_wrong", "401", "hf auth login"), ("read_token", "403", "right to write")])
def test_a_token_without_rights_is_denied_with_what_to_do(hub_server, token, status, hint):
    store = native(hub_server, getattr(hub_server, token, token))
    with pytest.raises(tracecraft.Denied, match=status) as caught:
        store.put("k", b"v")
    assert hint in caught.value.hint and len(hub_server.log) == 1


def test_a_bucket_of_another_is_not_there(hub_server):
    with pytest.raises(tracecraft.NoBucket):
        native(hub_server, hub_server.foreign_token).head("k")


# -- listings ----------------------------------------------------------


LISTED = ["a", "a.b", "a/1", "a/b/2", "a/b/c/3", "a/b0", "a0", "b/1", "c/d", "é/ü", "~"]


def test_a_listing_is_that_of_every_store(hub_server, natively):
    memory, rng = MemoryStore(), random.Random(7)
    hub_server.page = 3
    natively.put_many({key: b"" for key in LISTED if key != "a"})
    [memory.put(key, b"") for key in LISTED if key != "a"]
    starts = ["", "a", "a/", "a/b", "a/b/", "b/", "nothing/", "é/", "a/b0"]
    for _ in range(60):
        how = {"start_after": rng.choice(["", *LISTED, "a/b/", "zz"]),
               "delimiter": rng.choice(["", "/"]), "limit": rng.choice([None, 1, 2, 5])}
        prefix = rng.choice(starts)
        mine, other = (store.list(prefix, **how) for store in (natively, memory))
        assert [[e.key for e in one.entries] for one in (mine, other)][0] == \
            [e.key for e in other.entries], (prefix, how)
        assert (mine.prefixes, mine.truncated) == (other.prefixes, other.truncated)


def test_pages_that_lead_elsewhere_are_asked_of_the_hub(hub_server, natively):
    api = hub_server.origins["hub"]
    following, hub_server.page = api.following, 2
    api.following = lambda *args: {
        name: link.replace(hub_server.url, "http://evil.example")
        for name, link in following(*args).items()}
    natively.put_many({f"k{at}": b"" for at in range(5)})
    assert len(natively.list("").entries) == 5 and hub_server.count("GET", "tree") == 3
    api.following = lambda *args: {"Link": '<x?cursor=azE=>; rel="next"'}
    with pytest.raises(tracecraft.Unavailable, match="do not end"):
        natively.list("")


# -- trouble -----------------------------------------------------------


def test_a_window_that_is_used_up_is_waited_for(hub_server, natively):
    natively.put("k", b"v")
    hub_server.fault(429, key="paths-info", retry_after=0)
    began = time.monotonic()
    assert natively.head("k").size == 1 and time.monotonic() - began >= 1
    natively.deadline = time.monotonic() + 5
    hub_server.fault(429, key="batch", retry_after=50)
    with pytest.raises(tracecraft.Throttled, match="429") as caught:
        natively.put("k", b"w")
    assert caught.value.after == 51 and "wait 51 s" in caught.value.hint
    assert natively.get("k").body == b"v"


def test_a_quota_is_shown_and_obeyed():
    with HubServer(quota={"api": 3}, window=60) as server:
        server.bucket("alice/coord")
        lines = []
        store = native(server, trace=lines.append)
        store.put("k", b"v")
        store.head("k")
        assert "2 more in 60 s" in lines[0] and "0 more in" in lines[-1]
        store.deadline = time.monotonic() + 1
        with pytest.raises(tracecraft.Throttled) as caught:
            store.head("k")
        assert 55 < caught.value.after <= 61
        assert store.get("k").body == b"v"  # reading bytes is another class
        assert not any("sig=" in line for line in lines)


@pytest.mark.parametrize("fault", ["lose", "reset_after", 500, 503, "landed", "truncate"])
def test_an_answer_of_a_batch_that_is_lost_is_unknown(hub_server, natively, fault):
    natively.put("k", b"v")
    hub_server.fault(fault, "POST", "batch")
    with pytest.raises(tracecraft.Unknown):
        natively.put("k", b"w")
    landed = natively.get("k").body == b"w"
    assert landed is (fault not in (500, 503)) and hub_server.count("POST", "batch") == 2


def test_what_may_be_done_twice_is_done_until_it_is_certain(hub_server, natively,
                                                            tmp_path):
    (tmp_path / "f").write_bytes(b"bytes")
    for act in (lambda: natively.upload("up", str(tmp_path / "f")),
                lambda: natively.copy("up", "copy"), lambda: natively.delete("up")):
        hub_server.fault("lose", "POST", "batch")
        hub_server.fault(500, "POST", "batch")
        act()
    assert hub_server.files("alice/coord") == {"p/copy": b"bytes"}
    assert hub_server.count("POST", "batch") == 9


def test_only_what_failed_inside_a_200_is_sent_again(hub_server, natively):
    hub_server.fault("failed", paths=["p/b", "p/d"])
    hub_server.fault("failed", paths=["p/d"])
    natively.put_many({key: key.encode() for key in "abcde"})
    bodies = [req.body.decode() for req in hub_server.log if req.parts[-1] == "batch"]
    assert [[json.loads(line)["path"] for line in body.splitlines()] for body in bodies] \
        == [["p/a", "p/b", "p/c", "p/d", "p/e"], ["p/b", "p/d"], ["p/d"]]
    assert len(hub_server.files("alice/coord")) == 5


def test_a_422_is_tried_again_a_few_times_and_then_named(hub_server, natively):
    hub_server.fault("invalid")
    natively.put("k", b"v")
    hub_server.fault("invalid", times=99)
    with pytest.raises(tracecraft.Unavailable, match="write p/k.*Internal") as caught:
        natively.put("k", b"w")
    assert caught.value.details["failed"] == {"p/k": "Internal error, please try again"}
    assert hub_server.count("POST", "batch") == 2 + tracecraft.BATCH_TRIES


def test_a_delete_that_failed_since_nothing_is_there_is_done(hub_server, natively):
    hub_server.fault("invalid", times=99)
    natively.delete("never")
    hub_server.faults.clear()
    natively.put("k", b"v")
    hub_server.fault("invalid", times=99)
    natively.deadline = time.monotonic()
    with pytest.raises(tracecraft.Unavailable, match="Internal"):
        natively.delete("k")


def test_an_expired_xet_token_is_renewed_once(hub_server, natively):
    natively.put("a", b"1")
    hub_server.clear_log()
    hub_server.expire_tokens()
    natively.put("b", b"2")
    assert asked_of(hub_server) == ["POST xorbs", "GET xet-write-token", "POST xorbs",
                                    "POST shards", "POST batch"]
    hub_server.fault("expired", times=2)
    with pytest.raises(tracecraft.Denied, match="401"):
        natively.put("c", b"3")


def test_a_xet_token_that_ends_soon_is_not_used():
    with HubServer(token_life=50) as server:
        server.bucket("alice/coord")
        native(server).put("k", b"v")
        assert server.count("GET", "xet-write-token") == 2  # for the xorb, for the shard


def test_threads_share_one_token(hub_server, natively):
    out = together(*(lambda at=at: natively.put(f"k{at}", b"%d" % at) for at in range(8)))
    assert not [one for one in out if isinstance(one, Exception)]
    assert hub_server.count("GET", "xet-write-token") == 1
    assert len(hub_server.files("alice/coord")) == 8


def test_a_wrong_scope_is_denied(hub_server, natively):
    hub_server.fault("scope")
    with pytest.raises(tracecraft.Denied, match="403") as caught:
        natively.put("k", b"v")
    assert "right to write" in caught.value.hint
    assert hub_server.token not in str(caught.value)


@pytest.mark.parametrize("status", [404, 410])
def test_the_end_of_plain_uploads_is_said_plainly(hub_server, natively, status):
    hub_server.fault(status, key="xorbs")
    with pytest.raises(tracecraft.Error, match="no longer takes uploads") as caught:
        natively.put("k", b"v")
    assert caught.value.exit == 1 and hub_server.count("POST", "xorbs") == 1


@pytest.mark.parametrize("where", ["xorbs", "shards"])
@pytest.mark.parametrize("fault", [500, 429, "lose", "reset", "html"])
def test_content_is_sent_again_at_will(hub_server, natively, where, fault):
    hub_server.fault(fault, "POST", where, **({"retry_after": 0} if fault == 429 else {}))
    natively.put("k", b"v")
    assert natively.get("k").body == b"v" and hub_server.count("POST", "batch") == 1


def test_a_file_that_is_listed_but_not_found_will_come(hub_server, natively):
    natively.put("k", b"v")
    hub_server.fault("lag", "GET", "resolve", times=2, seconds=60)
    hub_server.clear_log()
    assert natively.get("k").body == b"v"
    assert asked_of(hub_server) == ["GET resolve", "POST paths-info"] * 2 + [
        "GET resolve", "GET files"]
    with pytest.raises(tracecraft.NotFound):
        natively.get("never")
    assert asked_of(hub_server) == ["GET resolve", "POST paths-info"]


@pytest.mark.parametrize("fault", [403, 404, 500, "lose", "reset", "truncate", "html"])
def test_trouble_where_the_bytes_are_sends_us_back_to_the_hub(hub_server, natively, fault):
    natively.put("k", b"some longer value")
    hub_server.fault(fault, origin="bytes")
    hub_server.clear_log()
    assert natively.get("k").body == b"some longer value"
    assert asked_of(hub_server)[-2:] == ["GET resolve", "GET files"]


def test_bytes_of_another_length_than_the_hub_tells_are_not_taken(hub_server, natively):
    natively.put("k", b"value")
    hub_server.fault("garbage", origin="bytes", body=b"valu")
    assert natively.get("k").body == b"value" and hub_server.count(origin="bytes") == 2
    hub_server.fault("garbage", origin="bytes", body=b"value and more")
    sink = io.BytesIO()
    natively.download("k", sink, size=5)
    assert sink.getvalue() == b"value"


@pytest.mark.parametrize("place", ["file:///etc/passwd", "https://u:p@h/", "//h:x/"])
def test_bytes_are_not_read_from_odd_addresses(hub_server, natively, place):
    natively.put("k", b"v")
    hub_server.signed = lambda path: place
    natively.deadline = time.monotonic()
    with pytest.raises(tracecraft.Unavailable, match="https address"):
        natively.get("k")


def test_a_redirect_without_a_hash_is_no_file(hub_server, natively):
    natively.put("k", b"v")
    hub_server.fault("redirect", key="resolve", status=302, location=hub_server.url)
    assert natively.get("k").body == b"v"  # tried again
    hub_server.fault("redirect", key="resolve", status=302, location=hub_server.url)
    natively.deadline = time.monotonic()
    with pytest.raises(tracecraft.Unavailable, match="login page|not to a file"):
        natively.get("k")


GARBAGE = [b"", b"{", b"[]", b"{}", b"null", b"7", b'"x"', b"[null]", b'[{"path": 7}]',
           b'{"failed": 7}', b'{"casUrl": 7, "exp": {}}', b"\xff\xfe", b"[" * 5000,
           b'{"processed": 1, "failed": [[]]}', b'{"result": 1}']


@pytest.mark.parametrize("route, act", [
    ("tree", lambda store: store.list("")), ("paths-info", lambda store: store.head("k")),
    ("batch", lambda store: store.put("k", b"")), ("coord", lambda store: store.hub.info()),
    ("xet-write-token", lambda store: store.put("k", b"x")),
    ("xorbs", lambda store: store.put("k", b"y")), ("batch", lambda s: s.delete("k")),
    ("shards", lambda store: store.put("k", b"z")), ("batch", lambda s: s.copy("k", "l"))])
def test_whatever_the_hub_says_is_an_error_of_ours(hub_server, natively, route, act):
    natively.put("k", b"v")
    for body in GARBAGE:
        store = native(hub_server)
        hub_server.faults.clear()
        hub_server.fault("garbage", key=route, times=99, body=body)
        store.deadline = time.monotonic()
        try:
            act(store)
        except tracecraft.Error as why:
            assert "Traceback" not in why.message and hub_server.token not in why.message


def test_an_error_that_repeats_a_token_is_cleaned(natively, hub_server):
    natively.put("k", b"v")
    tokens = [hub_server.token, *hub_server.xet_tokens]
    error = natively.hub.fail(hub_answer(400, {"error": " ".join(tokens)}), "x")
    assert not any(token in str(error) for token in tokens) and "*** ***" in error.message


# -- files -------------------------------------------------------------


def test_a_file_goes_up_in_several_xorbs_with_progress(hub_server, natively, tmp_path,
                                                       monkeypatch):
    data, seen, said = random.Random(3).randbytes(600_000), [], []
    (tmp_path / "f").write_bytes(data)
    pack = tracecraft.XetPack
    monkeypatch.setattr(tracecraft, "XetPack", lambda: pack(200_000))
    monkeypatch.setattr(tracecraft, "MULTIPART", 500_000)
    natively.warn = said.append
    stamp = natively.upload("f", str(tmp_path / "f"), progress=lambda *at: seen.append(at))
    assert hub_server.count("POST", "xorbs") > 2 and stamp.etag == f'"{xet_of(data)}"'
    assert seen[-1] == (len(data), len(data)) and hub_server.count("POST", "shards") == 1
    assert len(said) == 1 and "585.9 KiB" in said[0] and "HF_S3_ACCESS_KEY_ID" in said[0]


def test_a_file_that_changes_while_it_is_read_is_not_written(hub_server, natively,
                                                             tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"x" * (3 << 20))

    def cut(done, total):
        path.write_bytes(b"x")
    with pytest.raises(tracecraft.Conflict, match="changed while"):
        natively.upload("f", str(path), progress=cut)
    assert hub_server.count("POST", "batch") == 0
    with pytest.raises(tracecraft.Error, match="No such file"):
        natively.upload("f", str(tmp_path / "none"))


def test_a_broken_download_goes_on_where_it_broke(hub_server, natively, tmp_path):
    data = random.Random(4).randbytes(300_000)
    natively.put("k", data)
    hub_server.fault("truncate", origin="bytes")
    with open(tmp_path / "down", "wb") as file:
        natively.download("k", file, size=len(data))
    assert (tmp_path / "down").read_bytes() == data
    ranges = [req.headers.get("range") for req in hub_server.log if req.origin == "bytes"]
    assert ranges[0] is None and re.fullmatch(r"bytes=[1-9]\d+-", ranges[1])


def test_a_file_replaced_during_its_download_is_moved(hub_server, natively):
    natively.put("k", b"first")
    natively.put("big", b"0123456789" * 9999)
    with pytest.raises(tracecraft.Moved):
        natively.download("k", io.BytesIO(), size=6)
    hub_server.fault("truncate", origin="bytes")
    hub_server.fault("call", key="resolve", skip=1,
                     fn=lambda req: native(hub_server).put("big", b"x" * 99990))
    with pytest.raises(tracecraft.Moved, match="replaced"):
        natively.download("big", io.BytesIO(), size=99990)
    with pytest.raises(tracecraft.NotFound):
        natively.download("none", io.BytesIO())


@pytest.mark.parametrize("contract", [
    test_contract_an_answer_carries_etag_and_both_times,
    test_contract_a_listing_is_in_byte_order_and_can_be_cut,
    test_contract_deleting_twice_is_deleting_once])
def test_the_contract_of_stores_holds_natively(natively, contract):
    contract(natively)


@pytest.mark.peers
def test_requests_is_another_way_to_the_hub(hub_server):
    pytest.importorskip("requests")
    store = native(hub_server, environ={"TRACECRAFT_HTTP": "requests"})
    store.put("a b/k", b"value")
    assert store.get("a b/k", start=2, limit=2).body == b"lu"
    assert [entry.key for entry in store.list("a b/").entries] == ["a b/k"]


def test_an_odd_name_is_kept_natively(natively):
    for name in ["a b", "a+b", "a%b", "a%20b", "a&b=c", "q?x#y", "é/ü", "a;b,c", "~'\""]:
        natively.put("artifacts/" + name, name.encode())
        assert natively.get("artifacts/" + name).body == name.encode()
        assert [e.key for e in natively.list("artifacts/").entries] == ["artifacts/" + name]
        natively.delete("artifacts/" + name)


# -- the real clients --------------------------------------------------


REAL_CLIENT = """
import json, sys
from huggingface_hub import (HfFileSystem, batch_bucket_files, download_bucket_files,
                             get_bucket_paths_info, list_bucket_tree)
name, folder = sys.argv[1:]
ours = ["p/doc.json", "p/empty", "p/big.bin", "p/a b/#1?.txt"]
download_bucket_files(name, files=[(path, folder + "/%d" % at)
                                   for at, path in enumerate(ours)])
files = HfFileSystem(use_listings_cache=False)
theirs = [("p/their/" + str(at), data) for at, data in enumerate(
    [b"", b"theirs", bytes(range(256)) * 3000])]
batch_bucket_files(name, add=[(data, path) for path, data in theirs])
files.pipe_file("buckets/" + name + "/p/their/piped.txt", b"piped")
print(json.dumps({
    "tree": sorted((one.path, one.size) for one in list_bucket_tree(name, recursive=True)
                   if one.path in ours),
    "infos": sorted(one.path for one in get_bucket_paths_info(name, ours)),
    "read": files.cat_file("buckets/" + name + "/p/big.bin", start=5, end=12).hex()}))
"""


@pytest.mark.peers
def test_the_hubs_own_client_reads_what_we_wrote_and_we_what_it_wrote(
        hub_server, natively, tmp_path):
    pytest.importorskip("huggingface_hub")
    data = random.Random(5).randbytes(300_000) + bytes(150_000)
    ours = {"doc.json": b'{"a": 1}', "empty": b"", "big.bin": data, "a b/#1?.txt": b"odd"}
    natively.put_many(ours)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path),
               "HF_ENDPOINT": hub_server.url, "HF_TOKEN": hub_server.token,
               "HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", REAL_CLIENT, "alice/coord", str(tmp_path)],
                          env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(tmp_path / str(at)).read_bytes() for at in range(4)] == list(ours.values())
    assert told["tree"] == sorted([f"p/{key}", len(data)] for key, data in ours.items())
    assert len(told["infos"]) == 4 and told["read"] == data[5:12].hex()
    theirs = {entry.key: entry.etag for entry in natively.list("their/").entries}
    assert natively.get("their/2").body == bytes(range(256)) * 3000
    assert natively.get("their/piped.txt").body == b"piped"
    assert theirs["their/1"] == f'"{tracecraft.xet_hash(b"theirs")}"' and len(theirs) == 4


# == Hugging Face, both ways ===========================================
#
# The gateway against the Hub of our own: what S3 is not there, what one request
# settles, who sees the bucket, and where the token may go.


@pytest.fixture
def hub():
    with HubServer() as server:
        server.bucket("alice/b")
        yield server


def hf_project(hub, agent="ada", *, url="hf://alice/b/p", native=True, gateway=True,
               deadline=20, **environ):
    """A Project by the Hub's own API, by the gateway, or both."""
    warned = []
    project = tracecraft.connect(
        url, agent=agent, warn=warned.append, cwd="/", deadline=deadline,
        environ={**hub.env(native=native, gateway=gateway), **environ})
    project.warned = warned
    project.store.verdict = project.store.verdict or {
        "atomic": True, "dialect": "quoted", "why": "", "at": ""}
    return project


def hf_asked(hub):
    """["METHOD key"] since the last call; the bytes of the CDN as "bytes"."""
    asked = ["bytes" if req.origin == "bytes" else f"{req.method} {req.key}"
             if req.origin == "gateway" else f"{req.method} {req.path}" for req in hub.log]
    hub.log.clear()
    return asked


def test_commands_cost_a_gateway_few_requests(hub):
    ada = hf_project(hub, native=False)
    ada.claim("s")
    assert len(hf_asked(hub)) == 2
    refused(tracecraft.Held, hf_project(hub, "bob").claim, "s")
    assert len(hf_asked(hub)) <= 5  # the answer comes from a CDN, the age from a HEAD
    ada.memory.set("k", "v")
    assert len(hf_asked(hub)) == 3
    assert ada.memory.get("k")["value"] == "v" and len(hf_asked(hub)) == 2


def test_a_lost_answer_of_the_gateway_is_settled_by_one_head(hub):
    ada = hf_project(hub)
    hub.fault("lose", "PUT", "claim.json")
    assert ada.claim("s").token == 1
    asked = [line for line in hf_asked(hub) if line.endswith("claim.json")]
    assert asked == ["PUT p/steps/s/claim.json", "HEAD p/steps/s/claim.json"]


def test_what_has_not_changed_costs_a_gateway_one_head(hub):
    store = hf_project(hub).store
    etag = store.put("x", b"1").etag
    hf_asked(hub)
    assert store.get("x", if_none_match=etag).body is None
    assert hf_asked(hub) == ["HEAD p/x"]
    store.put("x", b"2")
    assert store.get("x", if_none_match=etag).body == b"2"


@pytest.mark.parametrize("told", [True, False])
def test_the_etag_of_a_gateway_never_is_the_one_of_a_cdn(hub, told):
    hub.redirect_etag = told
    store, body = hf_project(hub).store, b"some bytes"
    etag = store.put("x", body).etag
    assert store.get("x").etag == store.head("x").etag == etag == store.etag_of(body)
    assert store.put("x", b"more", if_match=store.get("x").etag).etag
    with pytest.raises(tracecraft.Moved):
        store.put("x", b"late", if_match=etag)


@pytest.mark.parametrize("told", [True, False])
def test_a_big_file_comes_back_through_the_cdn(hub, told, tmp_path):
    hub.redirect_etag = told
    store, data = hf_project(hub).store, os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    store.upload("x", str(tmp_path / "a"))
    hub.fault("truncate", "GET", "files", times=1)
    with open(tmp_path / "b", "w+b") as file:
        store.download("x", file, size=len(data))
    assert (tmp_path / "b").read_bytes() == data


def test_a_gateway_copies_and_signs_urls(hub):
    store = hf_project(hub).store
    store.put("a b/%41.txt", b"bytes")
    store.copy("a b/%41.txt", "copy")
    assert store.get("copy").body == b"bytes"
    url = store.presigned("copy", 60)["url"]
    assert url.startswith(hub.gateway + "/alice/b/p/copy?") and hub.token not in url


def test_one_of_eight_wins_a_claim_at_the_gateway(hub):
    projects = [hf_project(hub, f"a{n}") for n in range(8)]
    for turn in range(3):
        won = together(*(lambda p=p: p.claim(f"s{turn}") for p in projects))
        assert [type(one).__name__ for one in won].count("Claim") == 1
        assert sum(isinstance(one, tracecraft.Held) for one in won) == 7


def test_the_way_without_a_key_pair_sees_what_the_gateway_wrote(hub):
    ada, bob = hf_project(hub), hf_project(hub, "bob", gateway=False)
    ada.claim("s").complete(note="done", to="bob")
    ada.memory.set("k", "v")
    assert bob.handoff("s")["note"] == "done" and bob.memory.get("k")["value"] == "v"
    bob.send("ada", "hello")
    assert ada.inbox(new=True).messages[0]["message"] == "hello"
    error = refused(tracecraft.Unsafe, bob.claim, "t")
    assert error.exit == 10 and "HF_S3_ACCESS_KEY_ID" in error.hint


@pytest.mark.parametrize("environ, source", [
    ({"HF_S3_ACCESS_KEY_ID": "HFAK1", "HF_S3_SECRET_ACCESS_KEY": "s"}, "HF_S3"),
    ({"AWS_ACCESS_KEY_ID": "HFAK1", "AWS_SECRET_ACCESS_KEY": "s"}, "AWS"),
    ({"AWS_ACCESS_KEY_ID": "AKIA1", "AWS_SECRET_ACCESS_KEY": "s"}, None),
    ({"HF_S3_ACCESS_KEY_ID": "HFAK1", "HF_S3_SECRET_ACCESS_KEY": "s",
      "AWS_ACCESS_KEY_ID": "HFAK2", "AWS_SECRET_ACCESS_KEY": "t"}, "HF_S3"), ({}, None)])
def test_aws_variables_are_a_gateway_key_only_if_they_look_like_one(environ, source):
    keys = tracecraft.hf_keys(environ, {})
    assert keys.source.startswith(source) if source else keys is None


def test_half_a_key_pair_is_refused_by_name():
    error = refused(tracecraft.Denied, tracecraft.hf_keys,
                    {"HF_S3_ACCESS_KEY_ID": "HFAK1"}, {})
    assert "secret key" in error.message and "HF_S3_ACCESS_KEY_ID" in error.message


def test_a_token_is_not_sent_where_only_a_url_says(hub):
    url = f"hf://alice/b/p?endpoint={hub.url}&gateway={hub.gateway}"
    environ = {"HF_TOKEN": hub.token}
    error = refused(tracecraft.Denied, lambda: tracecraft.connect(
        url, agent="ada", environ=environ, cwd="/"))
    assert "HF_ENDPOINT" in error.hint and hub.token not in str(error) and not hub.log
    environ.update(HF_S3_ACCESS_KEY_ID=hub.keys[0], HF_S3_SECRET_ACCESS_KEY=hub.keys[1])
    project = tracecraft.connect(url, agent="ada", environ=environ, cwd="/")
    project.claim("s")
    assert project.store.visibility() == "private"
    assert not any(hub.token in str(req.headers) for req in hub.log)


def test_without_credentials_the_way_to_get_them_is_told():
    error = refused(tracecraft.Denied, lambda: tracecraft.connect(
        "hf://alice/b/p", agent="a", environ={}, cwd="/"))
    assert error.exit == 11 and "hf auth login" in error.hint


def hf_shell(tmp_path, hub, **how):
    shell = Shell(tmp_path)
    shell.environ = hub.env(**how)
    return shell


def test_init_creates_a_private_bucket_and_tells_who_sees_it(tmp_path, hub):
    shell = hf_shell(tmp_path, hub)
    said = shell.run("init", "--backend", "hf", "--bucket", "alice/new", "--project", "p")
    assert said.returncode == 0 and "alice/new (private)" in said.out, said.err
    assert hub.buckets["alice/new"].private and "PUBLIC" not in said.err
    assert hub.count(origin="gateway") < 400  # a probe that an account can afford
    assert shell.json("whoami")["agent"] == "ada"
    assert "private" in shell.ok("doctor")


@pytest.mark.parametrize("words, warned", [((), True), (("--public",), False)])
def test_a_public_bucket_is_shouted_about_unless_it_was_meant(tmp_path, hub, words, warned):
    hub.bucket("alice/open", private=False)
    shell = hf_shell(tmp_path, hub, gateway=False)
    said = shell.run("init", "hf://alice/open/p", *words)
    assert said.returncode == 0 and "(PUBLIC)" in said.out
    assert ("WARNING" in said.err) == warned


def test_init_with_a_token_alone_warns_and_claims_are_refused(tmp_path, hub):
    shell = hf_shell(tmp_path, hub, gateway=False)
    said = shell.run("init", "hf://alice/b/p")
    assert said.returncode == 0 and "HF_S3_ACCESS_KEY_ID" in said.err
    shell.ok("memory", "set", "k", "v")
    assert "plain overwrite" not in shell.run("memory", "set", "k", "w").err
    shell.refused(10, "claim", "s")
    assert "advisory" in shell.run("claim", "s", "--allow-advisory").err
    assert hub.token not in said.out + said.err + str(shell.objects())


def test_a_token_given_as_a_flag_stays_in_the_config_only(tmp_path, hub):
    shell = Shell(tmp_path)
    shell.environ = {"HF_ENDPOINT": hub.url}
    said = shell.run("init", "hf://alice/b/p", "--hf-token", hub.token)
    assert said.returncode == 0 and "contains credentials" in said.err
    shell.ok("send", "bob", "hi")
    stored = b"".join(hub.files("alice/b").values())
    assert hub.token.encode() not in stored and hub.token not in shell.ok("config")


@pytest.mark.parametrize("words", [
    ("init", "s3://b/p", "--public"), ("init", "hf://alice/b/p", "--public", "--private"),
    ("init", "hf://alice"), ("init", "hf://alice/b/p?gateway=x")])
def test_init_refuses_what_makes_no_sense_at_the_hub(tmp_path, hub, words):
    hf_shell(tmp_path, hub).refused(2, *words)
    assert not hub.log


def test_a_missing_bucket_is_not_created_without_a_token(tmp_path, hub):
    said = hf_shell(tmp_path, hub, native=False).refused(2, "init", "hf://alice/none/p")
    assert "HF_TOKEN" in said and "alice/none" not in hub.buckets


def test_wrong_keys_are_told_where_others_come_from(hub):
    hub.keys = ("HFAKWRONG", "x" * 20)
    project = hf_project(hub, native=False)
    hub.keys = ("HFAKOTHER", "y" * 20)
    error = refused(tracecraft.Denied, project.claim, "s")
    assert "HF_S3_ACCESS_KEY_ID" in error.hint and "x" * 20 not in str(vars(error))


class FragileGateway(tracecraft.GatewayStore):
    """Dies before or after its n-th request, as a process does."""

    at, when = 0, "before"

    def _once(self, *args, **how):
        self.at -= 1
        if self.at == 0 and self.when == "before":
            raise Crash("before")
        answer = super()._once(*args, **how)
        if self.at == 0 and self.when == "after":
            raise Crash("after")
        return answer


FRAGILE = {
    "claim": lambda p: p.claim("s"), "set": lambda p: p.memory.set("k", "v"),
    "complete": lambda p: p.complete("t", note="n"), "send": lambda p: p.send("bob", "m"),
    "lock": lambda p: p.lock("l"), "push": lambda p: p.queue("q").push("body", id="1")}


@pytest.mark.parametrize("verb", FRAGILE)
def test_a_crash_at_any_request_to_the_gateway_is_understood_afterwards(hub, verb):
    for number in range(1, 12):
        for when in ("before", "after") if verb == "claim" else ("after",):
            url = f"hf://alice/b/{verb}-{number}-{when}"
            ada = hf_project(hub, url=url, TRACECRAFT_INSTANCE="one")
            ada.claim("t")
            ada.store.__class__ = FragileGateway
            ada.store.at, ada.store.when = number, when
            try:
                FRAGILE[verb](ada)
                return
            except Crash:
                pass
            again = hf_project(hub, url=url, TRACECRAFT_INSTANCE="one")
            again.who.held.update(ada.who.held)
            FRAGILE[verb](again)
            assert tracecraft.diagnose(again, fix=True)["ok"], (number, when)


# == What an attack found ==============================================


def attacked(tmp_path, *words, **environ):
    """One command in an empty environment; (exit code, stdout + stderr)."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environ}
    done = subprocess.run([sys.executable, tracecraft.__file__, *words], cwd=tmp_path,
                          env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_SECRET_ACCESS_KEY",
                                  "AWS_ACCESS_KEY_ID"])
def test_a_key_with_a_line_break_is_denied_and_not_shown(tmp_path, name):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", name: "hush1\nhush2"}
    code, text = attacked(tmp_path, "claim", "x", "--store",
                          "s3://b/p?endpoint=http://127.0.0.1:9", **keys)
    assert code == 11 and "hush" not in text and "line break" in text


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://127.0.0.1:abc",
                                      "http://[::1"])
def test_an_endpoint_that_cannot_be_is_a_usage_error(tmp_path, endpoint):
    code, text = attacked(tmp_path, "status", "--store", "s3://b/p",
                          AWS_ENDPOINT_URL=endpoint)
    assert code == 2 and "Traceback" not in text


@pytest.mark.parametrize("words", [
    ("wait-for", "s", "--timeout", "nan"), ("wait-for", "s", "--timeout", "1e999"),
    ("memory", "set", "k", "v", "--expires-in", "inf"), ("memory", "incr", "k", "nan")])
def test_a_number_that_is_none_is_a_usage_error(tmp_path, words):
    code, text = attacked(tmp_path, *words)
    assert code == 2 and "invalid" in text


def test_an_unknown_url_option_is_not_repeated(tmp_path):
    code, text = attacked(tmp_path, "config", "--store", "s3://b/p?secret=hush")
    assert code == 2 and "hush" not in text


def test_a_wait_with_json_says_one_json_value_on_stderr(tmp_path):
    code, text = attacked(tmp_path, "wait-for", "s", "--timeout", "1", "--json", "-q")
    assert code == 6 and json.loads(text[text.index("{"):])["error"]["exit"] == 6
    assert "Waiting" not in text


def test_a_home_that_is_no_directory_holds_no_profile(tmp_path):
    with S3Server() as server:
        code, text = attacked(tmp_path, "memory", "list", "--store", "s3://bucket/p",
                              **{**server.env(), "HOME": "/dev/null"})
    assert code == 0, text


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "2>/dev/full", ">&- 2>&- <&-"])
def test_closed_streams_do_not_change_the_exit_code(tmp_path, closed):
    store = f"file://{tmp_path}/s/p"
    assert attacked(tmp_path, "claim", "s", "--store", store, "--agent", "ada")[0] == 0
    line = (f"{sys.executable} {tracecraft.__file__} claim s --store {store}"
            f" --agent bob {closed}")
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    assert done.returncode == 3


@pytest.mark.parametrize("words", [
    ("memory", "set", "k", "NaN", "--json"), ("memory", "merge", "k", '{"a": 1e999}'),
    ("memory", "set", "k", "v", "--expires-in", "-5"), ("status", "--limit", "-1"),
    ("step", "add", "s", "--max-attempts", "-1")])
def test_what_is_no_json_or_no_count_is_a_usage_error(tmp_path, words):
    code, text = attacked(tmp_path, *words)
    assert code == 2 and "Traceback" not in text


def test_needs_of_the_wrong_shape_are_corrupt_and_not_ignored(tmp_path):
    spec = tmp_path / "s" / "p" / "steps" / "x"
    spec.mkdir(parents=True)
    (spec / "spec.json").write_text('{"needs": 5}')
    code, text = attacked(tmp_path, "claim", "x", "--store", f"file://{tmp_path}/s/p")
    assert code == 8 and "spec.json" in text
    assert not (spec / "claim.json").exists()


def test_a_proxy_without_a_usable_port_is_a_usage_error(tmp_path):
    code, text = attacked(tmp_path, "status", "--store",
                          "s3://b/p?endpoint=http://s3.example.com",
                          HTTP_PROXY="http://u:hush@127.0.0.1:abc",
                          AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    assert code == 2 and "hush" not in text


@pytest.mark.parametrize("key, body", [
    ("steps/z/claim.json", b"[]"), ("steps/z/claim.json", b"{"),
    ("steps/z/spec.json", b"null"), ("steps/z/spec.json", b'{"needs": 3}')])
def test_a_damaged_step_stops_neither_workers_nor_the_graph(eager, bucket, key, body):
    for sid, priority in (("z", 1), ("s", 5)):
        eager.add_step(sid, priority=priority)
    bucket.place(key, body)
    assert eager.tasks.take().step == "s"
    eager.complete("s")
    why = refused(tracecraft.NotFound, eager.tasks.take)
    assert why.message == "no step can become ready; failed or blocked: z"
    assert any("step z is left out" in text for text in eager.warned)
    assert {row["step"]: row["state"] for row in eager.plans.graph()} == {
        "z": "corrupt", "s": "complete"}
    assert bucket.under("active/") == []


def test_two_edits_at_once_cannot_close_a_cycle(bucket):
    for _ in range(10):
        bucket.shared.objects.clear()
        ada, bob = agent_on(bucket, "ada"), agent_on(bucket, "bob")
        for sid in "ab":
            ada.add_step(sid)
        gate = threading.Barrier(2)

        def edit(who, sid, need):
            gate.wait()
            with contextlib.suppress(tracecraft.Usage):
                who.steps.edit(sid, needs=[need])
        run_all([lambda: edit(ada, "a", "b"), lambda: edit(bob, "b", "a")])
        needs = {sid: bucket.doc(f"steps/{sid}/spec.json")["needs"] for sid in "ab"}
        assert not tracecraft.find_cycle(needs)


def test_a_need_may_be_turned_round_at_once(ada):
    ada.add_step("b")
    ada.add_step("a", needs=["b"])
    refused(tracecraft.Usage, ada.steps.edit, "b", needs=["a"])
    ada.steps.edit("a", needs=[])
    assert ada.steps.edit("b", needs=["a"])["needs"] == ["a"]


def test_steps_that_wait_for_each_other_end_the_wait_and_doctor_names_them(eager,
                                                                           bucket):
    for sid, need in (("a", "b"), ("b", "a"), ("c", "a"), ("d", "gone")):
        bucket.place(f"steps/{sid}/spec.json", {"title": "", "needs": [need]})
    why = refused(tracecraft.Empty, eager.tasks.take)  # d may come true
    bucket.delete("steps/d/spec.json")
    why = refused(tracecraft.NotFound, eager.tasks.take)
    assert "cycle: a → b → a" in why.message
    bucket.place("steps/d/spec.json", {"title": "", "needs": ["gone"]})
    notes = " ".join(tracecraft.diagnose(eager)["notes"])
    assert "a → b → a" in notes and "not there" in notes and "gone" in notes


def test_waiting_for_a_step_whose_need_has_failed_ends_at_once(ada):
    ada.complete("a", state="failed")
    ada.add_step("b", needs=["a"])
    why = refused(tracecraft.Blocked, ada.wait_for, ["b"], timeout=30)
    assert why.message == "Step b waits for a, which is failed"
    why = refused(tracecraft.Blocked, ada.claim, "b")
    assert why.message == "Step b waits for a (failed)" and "resolve" in why.hint


@pytest.mark.parametrize("floor", [float("inf"), float("nan"), 1e300, 1e15, -5])
def test_a_floor_that_is_no_time_hides_no_mail(ada, bob, bucket, floor):
    bob.send("ada", "one")
    read_new(ada)
    cursor = bucket.doc("messages/ada/_cursor.json")
    cursor["direct"]["floor"] = floor
    bucket.place("messages/ada/_cursor.json", cursor)
    bob.send("ada", "two")
    assert "two" in read_new(agent_on(bucket, "ada"))


def test_an_unsigned_reply_answers_nothing_where_there_is_a_key(bucket):
    ada = agent_on(bucket, "ada")
    ada.mail.secret = "k"
    sent = ada.send("bob", "which port?", kind="question", op="q")
    bucket.place("messages/ada/1700000001000000000_bob_99999999.json", {
        "from": "bob", "to": "ada", "message": "6666", "sent_at": "x",
        "reply_to": sent["id"]})
    refused(tracecraft.TimedOut, ada.ask, "bob", "which port?", op="q", wait=0.3)
    assert any("unverified reply does not count" in text for text in ada.warned)


def test_forged_mail_has_no_author_in_the_timeline(bucket):
    ben = agent_on(bucket, "ben")
    ben.mail.secret = "k"
    doc = ben.send("ada", "pay bob")
    key = doc.pop("key")
    readers = tracecraft.Readers(secret="k")
    assert readers.events(key, doc)[0][0]["agent"] == "ben"
    [event], _ = readers.events(key, {**doc, "message": "pay eve"})
    assert event["agent"] == "?" and "(forged: claims ben)" in event["text"]


def test_a_reservation_gets_an_id_that_no_damaged_one_has(ada, bucket):
    bucket.place("reservations.json", {"entries": [
        {"id": "r7", "globs": "x", "mode": "zzz", "agent": "bob"}]})
    assert ada.reserve(["x"])["id"] == "r8"
    refused(tracecraft.Usage, ada.reserve, ["!src/**"])


@pytest.mark.parametrize("damage", [{"token": "x"}, {"ttl": "r"}, {"agent": 5}])
def test_a_lock_of_the_wrong_shape_is_corrupt_not_held_for_ever(ada, bucket, damage):
    ada.lock("l")
    bucket.place("locks/l.json", {**bucket.doc("locks/l.json"), **damage})
    assert "locks/l.json" in refused(tracecraft.Corrupt, agent_on(
        bucket, "bob").lock, "l").message


def test_a_head_that_names_no_key_is_damage_to_doctor_and_export(ada, bucket):
    ada.artifacts.put_bytes("f.txt", b"x")
    head = bucket.doc("manifests/shared/f.txt/_head.json")
    bucket.place("manifests/shared/f.txt/_head.json", {**head, "key": {}})
    assert tracecraft.diagnose(ada)["exit"] == 8
    assert tracecraft.export_to(ada, io.BytesIO())["objects"] >= 2


@pytest.mark.parametrize("row", [
    {"key": 5}, {"modified": "x"}, {"modified": float("inf")}, {"size": "1"},
    {"sha256": None}, {"modified": -1}])
def test_a_list_of_members_with_a_damaged_one_is_corrupt(row):
    good = {"key": "a", "size": 1, "sha256": "x", "modified": 1.5}
    data = json.dumps({"format": tracecraft.EXPORT_FORMAT, "members": [{**good, **row}]})
    refused(tracecraft.Corrupt, tracecraft.parse_members, data.encode())


def test_an_answer_in_json_has_no_nan(ada):
    text = tracecraft.json_text({"a": float("nan"), "b": [float("-inf"), 1.5]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": "NaN", "b": [
        "-Infinity", 1.5]}


@pytest.mark.parametrize("words", [
    ["memory", "set", "a", "-"], ["send", "ben", "-"], ["step", "add", "--plan", "-"],
    ["queue", "push", "q", "--lines"], ["run", "log", "-"], ["import", "-"]])
def test_a_closed_stdin_is_a_sentence(sh, words):
    done = subprocess.run(["sh", "-c", f"exec {shlex.join([*RUN, *words])} 0<&-"],
                          cwd=sh.cwd, env=sh.env({}), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr


def test_a_need_that_is_no_step_yet_is_remarked(sh):
    assert "nope: no such step yet" in sh.run("step", "add", "a", "--needs", "nope").err
    assert sh.run("step", "add", "b", "--needs", "a").err == ""


# == The file's form ===================================================
#
# style.md as tests: order, contents, imports, lines. `python test_tracecraft.py check`
# prints the table; `… startup` times whole processes.

HERE_21 = os.path.dirname(os.path.abspath(__file__))
PATH = os.path.join(HERE_21, "tracecraft.py")
with open(PATH, encoding="utf-8") as _file:
    SOURCE = _file.read()
BANNERS = [(at, line) for at, line in enumerate(SOURCE.splitlines(), 1)
           if line.startswith("# == ")]


def banner_titles():
    return [line.strip("# =\n") for _, line in BANNERS]


@pytest.mark.brief
def test_the_docstring_lists_the_banners_in_their_order():
    listed = re.findall(r"(\d+) (\w[\w, -]*?)(?=\s{2,}|\n)", SOURCE.split("Contents")[1]
                        .split('"""')[0])
    assert [f"{number}. {title}" for number, title in sorted(
        listed, key=lambda pair: int(pair[0]))] == banner_titles()


@pytest.mark.brief
def test_sections_use_only_sections_above():
    tree = ast.parse(SOURCE, feature_version=(3, 9))
    home = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            home[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            home.update((t.id, node.lineno) for t in node.targets
                        if isinstance(t, ast.Name))
    lines = [at for at, _ in BANNERS]

    def section(line):
        return bisect.bisect(lines, line)

    wrong = []

    def visit(table, line):
        for inner in table.get_children():
            at = line or inner.get_lineno()
            for symbol in inner.get_symbols():
                name = symbol.get_name()
                if symbol.is_global() and symbol.is_referenced() \
                        and section(home.get(name, 0)) > section(at):
                    wrong.append(f"line {at} uses {name} of a later section")
            visit(inner, at)
    visit(symtable.symtable(SOURCE, PATH, "exec"), 0)
    assert not wrong


@pytest.mark.brief
def test_no_top_level_name_is_defined_twice():
    """The second would silently take the place of the first, for its callers too."""
    names = collections.Counter()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] += 1
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.brief
def test_no_line_is_longer_than_88():
    assert [at for at, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 88] == []


@pytest.mark.brief
def test_every_public_name_has_a_docstring_and_a_return_type():
    bare_names = []
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            public = not node.name.startswith(("_", "cmd_"))
            inner = any(isinstance(n, ast.FunctionDef) and node in ast.walk(n)
                        and n is not node for n in ()) or node.col_offset > 4
            if public and not inner and not ast.get_docstring(node):
                bare_names.append(node.name)
    tops = {n.name for n in ast.parse(SOURCE).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert [name for name in bare_names if name in tops] == []


@pytest.mark.brief
def test_importing_loads_nothing_heavy():
    code = ("import sys; before = set(sys.modules); import tracecraft;"
            "print(sorted(set(sys.modules) - before))")
    out = subprocess.run([sys.executable, "-I", "-S", "-c", "import sys;"
                          f"sys.path.insert(0, {HERE!r});" + code],
                         capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == ["tracecraft"] or "ssl" not in out


@pytest.mark.brief
def test_a_directory_command_loads_neither_ssl_nor_http(tmp_path):
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import tracecraft;"
            "tracecraft.main(['memory', 'list']);"
            "print([m for m in ('ssl', 'http', 'http.client', 'urllib.request',"
            " 'logging', 'dataclasses', 'typing', 'concurrent.futures')"
            " if m in sys.modules])")
    out = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=tmp_path, text=True,
        capture_output=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert out.stdout.splitlines()[-1] == "[]", out.stdout + out.stderr


@pytest.mark.brief
def test_only_the_standard_library_is_imported():
    allowed = {"requests", "urllib3", "botocore"}
    found = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    if hasattr(sys, "stdlib_module_names"):
        assert found - set(sys.stdlib_module_names) <= allowed | {"__future__"}


@pytest.mark.brief
def test_the_examples_in_docstrings_are_true():
    result = doctest.testmod(tracecraft)
    assert result.failed == 0 and result.attempted >= 6


def form_table():
    """The table of style.md 3 as text."""
    tree = ast.parse(SOURCE, feature_version=(3, 9))
    sizes = sorted((n.end_lineno - n.lineno + 1, n.name) for n in ast.walk(tree)
                   if isinstance(n, ast.FunctionDef))
    classes = sorted((n.end_lineno - n.lineno + 1, n.name) for n in ast.walk(tree)
                     if isinstance(n, ast.ClassDef))
    ends = [at for at, _ in BANNERS[1:]] + [len(SOURCE.splitlines())]
    rows = [f"lines {len(SOURCE.splitlines())}, functions {len(sizes)}: median"
            f" {sizes[len(sizes) // 2][0]}, 90 % {sizes[len(sizes) * 9 // 10][0]},"
            f" longest {sizes[-1]}", f"largest classes {classes[-3:]}"]
    for (at, line), stop in zip(BANNERS, ends):
        rows.append(f"{stop - at:5}  {line.strip('# =')}")
    return "\n".join(rows)


CEILINGS = {"--version": 20, "directory store": 35, "signed HTTPS request": 60}  # ms
TOLERANCE = 1.5
BARE = 10  # ms of `-c pass` where those ceilings were measured


@contextlib.contextmanager
def https_store(folder):
    """(store URL, environ) of the suite's S3 server behind TLS."""
    pem, context = make_authority(pathlib.Path(folder))
    with S3Server() as server:
        server.listener.socket = context.wrap_socket(server.listener.socket,
                                                     server_side=True)
        url = f"s3://bucket/p?endpoint=https://127.0.0.1:{server.port}"
        environ = {**server.env(), "SSL_CERT_FILE": str(pem)}
        environ.pop("AWS_ENDPOINT_URL")
        yield url, environ


def startup_times(folder):
    """{what: median ms} of whole processes through a launcher, 15 runs each."""
    with https_store(folder) as (url, keys):
        return timed_starts(folder, url, keys)


def test_a_command_over_https_reads_what_is_there(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    with https_store(tmp_path) as (url, keys):
        said = attacked(tmp_path, "memory", "set", "k", "v", "--store", url, **keys)
        assert said[0] == 0, said[1]
        assert attacked(tmp_path, "memory", "get", "k", "--store", url,
                        **keys) == (0, "v\n")
        code, text = attacked(tmp_path, "memory", "get", "k", "--store", url,
                              **{**keys, "SSL_CERT_FILE": "", "SSL_CERT_DIR": ""})
        assert code == 7 and "certificate" in text


def timed_starts(folder, url, keys):
    """What startup_times returns, against an HTTPS store at `url`."""
    shutil.copy(PATH, folder)
    copy = os.path.join(folder, "tracecraft.py")
    py_compile.compile(copy, doraise=True, optimize=2,  # as `install` does
                       cfile=importlib.util.cache_from_source(copy))
    launcher = os.path.join(folder, "go.py")
    with open(launcher, "w") as file:
        file.write(tracecraft.launcher_text(copy))
    env = {"PATH": os.environ.get("PATH", ""), "HOME": folder, **keys}
    out = {}
    for what, words in (("-c pass", None), ("--version", ["--version"]),
                        ("directory store", ["memory", "get", "k"]),
                        ("signed HTTPS request", ["memory", "get", "k", "--store", url])):
        command = [sys.executable, "-S", "-E"] + (
            ["-c", "pass"] if words is None else [launcher] + words)
        times = []
        for _ in range(16):
            begun = time.perf_counter()
            subprocess.run(command, cwd=folder, env=env, capture_output=True)
            times.append((time.perf_counter() - begun) * 1000)
        out[what] = sorted(times[1:])[7]
    return out


def main_of_tests(what):
    if what == "check":
        print(form_table())
        return pytest.main(["-q", __file__, "-k", "docstring or sections or line_is or"
                            " standard_library or examples", "-p", "no:cacheprovider", "-W", "ignore"])
    with tempfile.TemporaryDirectory() as folder:
        times = startup_times(folder)
    late, slower = 0, max(1, times["-c pass"] / BARE)  # a shared machine has bad hours
    for what, ms in times.items():
        limit = round(CEILINGS.get(what, 0) * TOLERANCE * slower, 1)
        word = "" if not limit else "ok" if ms <= limit else "SLOW"
        late += word == "SLOW"
        print(f"{what:20} {ms:6.1f} ms  ceiling {limit or '-'}  {word}")
    return late


if __name__ == "__main__":
    sys.exit(main_of_tests(sys.argv[1] if len(sys.argv) > 1 else "check"))
