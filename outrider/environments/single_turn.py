"""One prompt, one completion."""

from collections.abc import Sequence

from outrider.environments.base import Rollout, Sample


class SingleTurn:
    """The completion is the rollout. A group is one request, so that its prompt is prefilled once."""

    async def rollouts(self, prompt: Sequence[int], count: int, seed: int, sample: Sample) -> list[Rollout]:
        return [
            Rollout(
                prompt=prompt,
                tokens=completion.tokens,
                logprobs=completion.logprobs,
                versions=completion.versions,
                text=completion.text,
                finish_reason=completion.finish_reason,
                server=completion.server,
            )
            for completion in await sample(prompt, count, seed)
        ]
