"""Held-out evaluation on the servers of the run, beside its rollouts."""

import asyncio
import random
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from outrider.algorithm.advantages import combine_rewards
from outrider.collector.pool import Pool, RolloutFailed
from outrider.collector.prompts import OverlongPrompt, Prompt, PromptSet
from outrider.collector.reward_runner import RewardFailed, RewardRunner
from outrider.contract.feed import EvalExample, EvalResult
from outrider.contract.generation import CompletionRequest
from outrider.environments.base import Completion, Environment, Rollout

#: Examples that travel with a result.
EXAMPLES = 8


class Evaluation:
    """Samples every held-out prompt and scores it with the run's reward functions."""

    def __init__(
        self,
        prompts: PromptSet,
        pool: Pool,
        rewards: RewardRunner,
        weights: Sequence[float],
        environment: Environment,
        template: CompletionRequest,
        seed: int,
    ) -> None:
        """template: sampling parameters; ``n`` completions are sampled for each prompt."""
        self.prompts, self.pool, self.rewards, self.weights = prompts, pool, rewards, weights
        self.environment, self.template, self.seed = environment, template, seed

    async def run(self, step: int, version: int) -> EvalResult:
        """Evaluate once every server that is up holds at least ``version``."""
        while not any(s.ready for s in self.pool.servers) or any(
            server.alive and server.version < version for server in self.pool.servers
        ):
            await asyncio.sleep(0.01)
        started = time.monotonic()
        # As many at once as the servers take; the rest would only wait there.
        room = asyncio.Semaphore(max(1, sum(s.limit for s in self.pool.servers) // self.template.n))
        outcomes = await asyncio.gather(*(self._one(row, room) for row in range(len(self.prompts))))
        scored = [outcome for outcome in outcomes if outcome is not None]
        rollouts = [rollout for _, group, _, _ in scored for rollout in group]
        versions = [v for rollout in rollouts for v, _ in rollout.versions] or [version]
        totals = np.concatenate([total for _, _, total, _ in scored]) if scored else np.array([float("nan")])
        per_function = {
            name: float(np.mean(values)) if values else float("nan")
            for index, name in enumerate(self.rewards.names)
            for values in [[v for _, _, _, rewards in scored for v in rewards[index] if v is not None]]
        }
        return EvalResult(
            step=step,
            version_min=min(versions),
            version_max=max(versions),
            count=len(rollouts),
            failed=len(outcomes) - len(scored),
            rewards=per_function,
            reward=float(np.nanmean(totals)),
            completion_length=float(np.mean([len(r.tokens) for r in rollouts])) if rollouts else 0.0,
            seconds=time.monotonic() - started,
            examples=[
                EvalExample(prompt=prompt.text, completion=group[0].text, reward=float(total[0]))
                for prompt, group, total, _ in scored[:EXAMPLES]
            ],
        )

    async def _one(
        self, row: int, room: asyncio.Semaphore
    ) -> tuple[Prompt, list[Rollout], np.ndarray, list[list[float | None]]] | None:
        """One prompt's rollouts and rewards; None when it could not be had."""
        try:
            prompt = self.prompts.get(row)
            async with room:
                seed = random.Random(f"evaluation/{self.seed}/{row}").getrandbits(62)
                group = await self.environment.rollouts(prompt.tokens, self.template.n, seed, self._sample)
            rewards = await self.rewards.score(group, prompt.text, prompt.columns)
        except (OverlongPrompt, RolloutFailed, RewardFailed):
            return None
        return prompt, group, combine_rewards(rewards, self.weights), rewards

    async def _sample(self, prompt: Sequence[int], n: int, seed: int) -> list[Completion]:
        return await self.pool.complete(None, with_prompt(self.template, prompt, n, seed))


def with_prompt(template: CompletionRequest, prompt: Sequence[int], n: int, seed: int) -> CompletionRequest:
    """A request with the sampling parameters of ``template``, for all that rollouts need to know of their tokens."""
    tokens = prompt if isinstance(prompt, list) else list(prompt)
    return msgspec.structs.replace(template, prompt=tokens, n=n, seed=seed, logprobs=0, return_token_ids=True)
