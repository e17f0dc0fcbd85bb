"""A trainer that is there to be killed: ``python -m tests.contract.doomed_trainer MODEL INFO RUN_ID``.

It publishes version 7 and does what it reads, a line each. ``publish``: print the body of a stage. ``publish
elsewhere``: the same for segments of another host, of which it hands out half of what is asked for and then nothing;
it prints ``serving`` when it has. ``commit URL KEY``: ask a server for a commit that waits for running requests.
"""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
from msgspec.structs import replace

from outrider.contract import routes
from outrider.contract.control import ServerInfo, StageRequest
from outrider.contract.manifest import Manifest
from tests.contract.client import commit_body
from tests.contract.publishing import publishing

VERSION = 7


class _Halves(BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = self.content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        self.wfile.flush()
        say("serving")
        time.sleep(600)

    def log_message(self, format: str, *args: object) -> None:
        """Standard error is for failures."""


def serve(manifest: Manifest) -> Manifest:
    """Returns the manifest of another host."""
    [segment] = manifest.segments
    _Halves.content = Path(segment.path).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Halves)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    elsewhere = replace(segment, host="another host", url=f"http://127.0.0.1:{server.server_port}/segment")
    return replace(manifest, segments=(elsewhere,))


def say(line: str) -> None:
    """One of the lines that the test waits for."""
    sys.stdout.write(f"{line}\n")  # in one go: several connections say it
    sys.stdout.flush()


def main(model: str, info: str, run_id: str) -> None:
    """Until it is killed."""
    with publishing(Path(model), msgspec.json.decode(info, type=ServerInfo), run_id) as publisher:
        manifest = publisher.publish(VERSION).result()
        for line in sys.stdin:
            match line.strip().split(maxsplit=2):
                case ["publish", *elsewhere]:
                    wanted = serve(manifest) if elsewhere else manifest
                    say(msgspec.json.encode(StageRequest(manifest=wanted)).decode())
                case ["commit", url, key]:
                    headers = {"Authorization": f"Bearer {key}"}
                    request = Request(url + routes.COMMIT, commit_body(manifest, "wait"), headers)
                    threading.Thread(target=urlopen, args=(request,), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
