"""Whether weights could be fetched from a trainer's node: asked by a server before anything is trained."""

from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from outrider.contract import routes

#: Seconds to connect, and for the answer.
PATIENCE = 10.0


def is_node_url(url: str) -> bool:
    """Whether ``url`` is that of a trainer's node and nothing else: no other path of any host is asked for."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = parts.scheme == "http" and parts.hostname and port and "@" not in parts.netloc
    return bool(plain) and parts.path == routes.WEIGHT_SEGMENTS and not parts.query and not parts.fragment


def unreachable(url: str, run_id: str, key: str) -> str | None:
    """Why the node at ``url`` would not give weights of ``run_id`` to whoever has this ``key``; None if it would."""
    request = Request(url, headers={"Authorization": f"Bearer {key}"})
    try:
        with build_opener(_NoRedirects).open(request, timeout=PATIENCE) as answer:
            found = answer.read(1024) if answer.status == HTTPStatus.OK else b""
    except HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            return "the API key of the trainer is not the server's"
        return f"{error.code} {error.reason}"
    except (OSError, HTTPException, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None if found == run_id.encode() else "something else answers there"


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        """Nobody is sent elsewhere with the key."""
