"""The route by which a trainer finds out whether this server can fetch weights from its nodes."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from outrider.contract.control import ReachAnswer, ReachRequest
from outrider.server.answers import Handler, json_answer
from outrider.server.bodies import read_body
from outrider.server.engine import InvalidRequest
from outrider.weights.reach import is_node_url, unreachable


def reaching(key: str) -> Handler:
    """A handler that asks nodes with this server's ``key``. What they answer is not handed on."""

    async def reach(request: Request) -> Response:
        body = await read_body(request, ReachRequest)
        if not is_node_url(body.url):
            raise InvalidRequest(f"url: {body.url!r} is not where a trainer's node serves weights", "url")
        return json_answer(ReachAnswer(problem=await asyncio.to_thread(unreachable, body.url, body.run_id, key)))

    return reach
