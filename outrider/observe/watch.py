"""What a person has to be told without looking at numbers."""

import math

from outrider.observe.figures import number
from outrider.observe.records import StepRecord


class Watch:
    """Turns the feed into notices: each condition is told when it begins, and again only after it has ended."""

    def __init__(self, logprob_gap_alarm: float) -> None:
        self._alarm = logprob_gap_alarm
        self._active: set[str] = set()
        self._wide_gap = -1  # version of the latest batch with a mini-batch above the alarm

    def step(self, record: StepRecord) -> list[str]:
        """Notices that this step gives rise to."""
        gap, grad_norm, loss = record.logprob_gap, record.grad_norm, record.loss
        if gap > self._alarm:
            self._wide_gap = record.version
        conditions = {
            "gap": (
                self._wide_gap == record.version,
                f"step {record.step}: sampler and trainer log-probabilities differ by {number(gap)} on average, above "
                f"--logprob_gap_alarm {number(self._alarm)}: check that servers and trainer hold one model and dtype",
            ),
            "finite": (
                not (math.isfinite(loss) and math.isfinite(grad_norm)),
                f"step {record.step}: loss {number(loss)}, gradient norm {number(grad_norm)}: not finite; "
                "lower --learning_rate or --max_grad_norm",
            ),
            "signal": (
                record.groups > 0 and record.groups_zero_variance >= record.groups,
                f"step {record.step}: every group got one reward for all its rollouts, so nothing was learned from it",
            ),
        }
        began = [text for name, (holds, text) in conditions.items() if holds and name not in self._active]
        self._active = {name for name, (holds, _) in conditions.items() if holds}
        return began
