"""A bucket that is not there: what ``gs://`` names in tests, for `etils.epath` (over fsspec) and for TensorStore.

Both see one dictionary from names to bytes. Folders exist as far as objects lie in them, as in a real bucket.
"""

import contextlib
import datetime
import http.server
import io
import json
import os
import re
import sys
import threading
import types
import urllib.parse
from unittest import mock

import fsspec

OBJECTS: dict[str, bytes] = {}
"""Of all buckets, by ``bucket/name``."""


class _Written(io.BytesIO):
  """Becomes an object when it is closed, and not when writing it failed."""

  def __init__(self, name: str):
    super().__init__()
    self._name = name

  def __exit__(self, kind, *error):
    if kind is None:
      self.close()
    else:
      super().close()

  def close(self):
    if not self.closed:
      OBJECTS[self._name] = self.getvalue()
    super().close()


class Bucket(fsspec.AbstractFileSystem):
  """`OBJECTS` for fsspec."""

  protocol = ("gs", "gcs")
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return re.sub(r"^(gs|gcs)://", "", os.fspath(path)).rstrip("/")

  def unstrip_protocol(self, name):
    return f"gs://{self._strip_protocol(name)}"

  def info(self, path, **options):
    name = self._strip_protocol(path)
    if name.split("/")[0] == "forbidden":
      raise PermissionError(f"Forbidden: {path}")
    if name in OBJECTS:
      return {"name": name, "size": len(OBJECTS[name]), "type": "file"}
    if any(each.startswith(f"{name}/") for each in OBJECTS) or "/" not in name:
      return {"name": name, "size": 0, "type": "directory"}
    raise FileNotFoundError(path)

  def exists(self, path, **options):
    try:
      self.info(path)
    except FileNotFoundError:  # other errors pass, as in gcsfs and s3fs
      return False
    return True

  def ls(self, path, detail=True, **options):
    name = self._strip_protocol(path)
    if name in OBJECTS:
      found = [name]
    else:
      self.info(path)
      inside = [each.removeprefix(f"{name}/") for each in OBJECTS if each.startswith(f"{name}/")]
      found = sorted({f"{name}/{each.split('/')[0]}" for each in inside})
    return [self.info(each) for each in found] if detail else found

  def mkdir(self, path, create_parents=True, **options):
    """Nothing: a bucket has no folders."""

  def makedirs(self, path, exist_ok=False):
    """Nothing: a bucket has no folders."""

  def rmdir(self, path):
    """Nothing: a bucket has no folders."""

  def _rm(self, path):
    name = self._strip_protocol(path)
    OBJECTS.pop(name, None)

  def cp_file(self, path1, path2, **options):
    if self.isfile(path1):
      OBJECTS[self._strip_protocol(path2)] = OBJECTS[self._strip_protocol(path1)]

  def _open(self, path, mode="rb", **options):
    name = self._strip_protocol(path)
    if mode == "rb":
      if self.info(path)["type"] == "directory":
        raise IsADirectoryError(path)
      return io.BytesIO(OBJECTS[name])
    if mode == "ab":
      raise NotImplementedError("a bucket's objects do not grow")
    return _Written(name)


class _Server(http.server.BaseHTTPRequestHandler):
  """The part of Google's JSON API that TensorStore asks for."""

  protocol_version = "HTTP/1.1"
  wbufsize = -1  # an answer goes in one piece: a second one waits for the first to be acknowledged

  def log_message(self, *arguments):
    pass

  def _send(self, status: int, body: bytes = b"", **headers):
    self.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    self.wfile.write(body)

  def _about(self, name: str) -> dict:
    bucket, _, path = name.partition("/")
    now = datetime.datetime.now(datetime.UTC).isoformat()
    generation = str(1 + hash(OBJECTS[name]) % 2**40)
    return {"name": path, "bucket": bucket, "size": str(len(OBJECTS[name])), "generation": generation, "updated": now}

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    options = dict(urllib.parse.parse_qsl(url.query))
    _, _, _, _, bucket, *rest = url.path.split("/")
    if len(rest) < 2:
      start = f"{bucket}/{options.get('prefix', '')}"
      items = [self._about(name) for name in sorted(OBJECTS) if name.startswith(start)]
      return self._send(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
    name = f"{bucket}/{urllib.parse.unquote(rest[1])}"
    if name not in OBJECTS:
      return self._send(404)
    whole, about = OBJECTS[name], self._about(name)
    if options.get("ifGenerationNotMatch") == about["generation"]:
      return self._send(304)
    if "ifGenerationMatch" in options and options["ifGenerationMatch"] != about["generation"]:
      return self._send(412)
    if found := re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first, last = found.groups()
      begin = int(first) if first else max(0, len(whole) - int(last))
      end = min(int(last) + 1, len(whole)) if first and last else len(whole)
      content = f"bytes {begin}-{end - 1}/{len(whole)}"
      return self._send(206, whole[begin:end], Content_Range=content, x_goog_generation=about["generation"])
    return self._send(200, whole, x_goog_generation=about["generation"])

  def do_POST(self):
    url = urllib.parse.urlsplit(self.path)
    options = dict(urllib.parse.parse_qsl(url.query))
    name = f"{url.path.split('/')[5]}/{options['name']}"
    body = self.rfile.read(int(self.headers["Content-Length"]))
    now = self._about(name)["generation"] if name in OBJECTS else "0"
    if options.get("ifGenerationMatch", now) != now:
      return self._send(412)
    OBJECTS[name] = body
    return self._send(200, json.dumps(self._about(name)).encode(), Content_Type="application/json")

  def do_DELETE(self):
    parts = urllib.parse.urlsplit(self.path).path.split("/")
    OBJECTS.pop(f"{parts[4]}/{urllib.parse.unquote(parts[6])}", None)
    return self._send(204)


@contextlib.contextmanager
def buckets():
  """Inside, ``gs://`` names `OBJECTS`; TensorStore takes the server that it finds first for good."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
  settings = {
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
  }
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  google = types.ModuleType("google.cloud")
  google.storage = mock.MagicMock()  # Orbax asks it whether a bucket has folders
  google.storage.Client().get_bucket().hierarchical_namespace_enabled = False
  try:
    with mock.patch.dict(os.environ, settings), mock.patch.dict(sys.modules, {"google.cloud": google}):
      yield
  finally:
    server.shutdown()
    server.server_close()
