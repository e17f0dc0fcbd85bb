"""The API key: where it is kept, and the middleware that asks for it."""

import hmac
import os
import secrets
from pathlib import Path

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from outrider.contract.errors import ErrorBody, ErrorDetail, UserError
from outrider.contract.keys import KEY_VARIABLE, key_file
from outrider.contract.routes import OPEN_ROUTES


def server_key(given: str | None) -> str:
    """The key a server asks for: ``given``, else OUTRIDER_API_KEY, else the user's key file, made when missing.

    Raises UserError when the key file can be read by others or cannot be made.
    """
    key = given or os.environ.get(KEY_VARIABLE)
    if key:
        return key
    path = key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _create_exclusively(path)
        mode = path.stat().st_mode & 0o077
        if mode:
            raise UserError(f"key file {path}: readable by others (mode {path.stat().st_mode & 0o777:o}); chmod 600 it")
        key = path.read_text().strip()
    except OSError as error:
        raise UserError(f"key file {path}: {error.strerror}; set {KEY_VARIABLE} or --api_key instead") from error
    if not key:
        raise UserError(f"key file {path} is empty; delete it and start the server again")
    return key


def _create_exclusively(path: Path) -> None:
    """Write a new key unless the file exists; two servers starting at once must not both write one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32))
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


class KeyMiddleware:
    """Refuses every route but ``/health`` with status 401 unless the request bears the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or self._bears_key(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        detail = ErrorDetail(
            message=f"this server needs its API key: Authorization: Bearer <key> (the key is in its owner's "
            f"key file, or was given as --api_key or {KEY_VARIABLE})",
            type="authentication_error",
            code="invalid_api_key",
        )
        body = msgspec.json.encode(ErrorBody(detail))
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _bears_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self.expected)
