"""A plugin for vLLM that gives its server a websocket: the one that vLLM has is for models of speech alone."""

import sys
from typing import Any

from starlette.websockets import WebSocket

PATH, GREETING = "/outrider-test/websocket", "hello"


def register() -> None:
    """Called by vLLM in each of its processes, of which one serves HTTP."""
    entry: Any = sys.modules.get("vllm.entrypoints.launchers.api_server.entry")
    if entry is None:
        return
    build_app = entry.build_app

    def with_websocket(*arguments: Any, **named: Any) -> Any:
        app = build_app(*arguments, **named)
        app.add_api_websocket_route(PATH, _greet)
        return app

    entry.build_app = with_websocket


async def _greet(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(GREETING)
    await socket.close()
