"""How requests and servers end: clients that go away, and servers that are told to."""

import asyncio
from collections.abc import Callable

import msgspec

from outrider.contract import routes
from outrider.contract.control import ServerInfo
from outrider.contract.generation import CompletionChoice, CompletionResponse, version_spans_total
from tests.contract.client import PATIENCE, Client
from tests.contract.conftest import KEY
from tests.contract.servers import Server

#: Nobody waits for as many tokens; the requests are ended before.
LONG = 1000

_BODY = b'{"prompt": [5], "max_tokens": 1}'


async def test_the_slots_of_a_client_that_goes_away_are_freed(weights_client: Client) -> None:
    """Running sequences and waiting ones; those of other clients go on."""
    stays = asyncio.create_task(weights_client.choices(prompt=[9, 9], max_tokens=200, n=2))
    leaves = [asyncio.create_task(weights_client.choices(prompt=[5, 6 + i], max_tokens=LONG, n=4)) for i in range(8)]
    await weights_client.until_running(16)
    for task in leaves:
        task.cancel()
    ended = await asyncio.gather(*leaves, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in ended)
    assert [len(choice.token_ids or []) for choice in await stays] == [200, 200]
    await weights_client.until_idle()
    assert await weights_client.metric("vllm:num_requests_waiting") == 0


async def test_sigterm_lets_running_requests_end(start_endless: Callable[..., Server]) -> None:
    """And takes no new ones meanwhile; then the server ends in order."""
    server = start_endless("--drain_timeout", "60")
    async with Client(server.url, KEY) as client:
        running = [asyncio.create_task(client.choices(prompt=[5, 6 + i], max_tokens=950, n=2)) for i in range(4)]
        await client.until_running(8)
        server.terminate()
        async with asyncio.timeout(PATIENCE):
            while not (await client.get(routes.INFO, ServerInfo)).draining:
                await asyncio.sleep(0.01)
        status, error = await client.refusal(_BODY)
        assert (status, error.type) == (503, "server_error")
        assert "draining" in error.message
        for choices in await asyncio.gather(*running):
            assert [choice.finish_reason for choice in choices] == ["length"] * 2
            assert [len(choice.token_ids or []) for choice in choices] == [950] * 2
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.output.read_text()


async def test_with_no_time_to_drain_partial_completions_come_back(start_endless: Callable[..., Server]) -> None:
    """Cut off by the server, with what there is: tokens, log-probabilities and versions of the same number.

    Before, ``/outrider/drain`` announces the end: new requests go elsewhere, running ones are not touched."""
    server = start_endless("--drain_timeout", "0", "--max_num_seqs", "64")
    async with Client(server.url, KEY) as client:
        # Two requests, so that two servers behind one port have one each: with half of the places each.
        runs = [asyncio.create_task(client.choices(prompt=[5, 6], max_tokens=LONG, n=31))]
        await client.until_running(31)
        runs.append(asyncio.create_task(client.choices(prompt=[5, 6], max_tokens=LONG, n=32)))
        await client.until_running(63)
        stream = client.events(routes.COMPLETIONS, prompt=[5, 8], max_tokens=LONG)
        events = [await anext(stream) for _ in range(8)]  # by now the others have as many tokens, too
        waits = asyncio.create_task(client.choices(prompt=[5, 7], max_tokens=LONG, n=4))
        async with asyncio.timeout(PATIENCE):
            while await client.metric("vllm:num_requests_waiting") < 4:
                await asyncio.sleep(0.01)
        status, body = await client.ask("POST", routes.DRAIN)
        assert status == 200
        assert b'"running":64' in body
        assert (await client.get(routes.INFO, ServerInfo)).draining
        assert (await client.refusal(_BODY))[0] == 503
        assert (await client.ask("GET", routes.HEALTH))[0] == 200
        server.terminate()
        first, second, untouched = await asyncio.gather(*runs, waits)
        partial = first + second
        events += [event async for event in stream]
    assert await asyncio.to_thread(server.wait) == 0
    assert all(4 <= len(choice.token_ids or []) < LONG for choice in partial)
    assert all(choice.token_ids == [] for choice in untouched)
    for choice in partial + untouched:
        _is_cut_off_in_order(choice)
    assert events[-1] == b"[DONE]"
    [last] = msgspec.json.decode(events[-2], type=CompletionResponse).choices
    assert last.finish_reason == "abort"


def _is_cut_off_in_order(choice: CompletionChoice) -> None:
    assert choice.finish_reason == "abort"
    assert choice.token_ids is not None
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(choice.token_ids)
    assert version_spans_total(choice.weight_versions or []) == len(choice.token_ids)


async def test_a_second_signal_cuts_the_drain_short(start_endless: Callable[..., Server]) -> None:
    """For the user who cannot wait: requests come back as with no time to drain, and not as broken connections."""
    server = start_endless("--drain_timeout", "3600")
    async with Client(server.url, KEY) as client:
        running = asyncio.create_task(client.choices(prompt=[5], max_tokens=LONG, n=64))
        await client.until_running(64)
        server.terminate()
        async with asyncio.timeout(PATIENCE):
            while not (await client.get(routes.INFO, ServerInfo)).draining:
                await asyncio.sleep(0.01)
        server.terminate()
        for choice in await running:
            _is_cut_off_in_order(choice)
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.output.read_text()
