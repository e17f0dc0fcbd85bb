"""The figures that sum up a run."""

import math

from outrider.observe.figures import compact, decimal, mean, number, percent, spelled
from outrider.observe.metrics import evaluations_of, steps_of
from outrider.observe.parts import SERVERS, TRAINER, one_a_batch, shares
from outrider.observe.records import MetricsRow


def headline(rows: list[MetricsRow]) -> dict[str, str]:
    """Figures of a run by name, in the order to show them; those that the rows do not tell are left out."""
    steps, evaluations = steps_of(rows), evaluations_of(rows)
    figures: dict[str, str] = {}
    if len(evaluations) > 1:
        figures["Held-out reward"] = f"{decimal(evaluations[0].reward)} → {decimal(evaluations[-1].reward)}"
    elif evaluations:
        figures["Held-out reward"] = decimal(evaluations[-1].reward)
    if not steps:
        return figures
    last, seconds = steps[-1], sum(step.seconds for step in steps)
    times = [step.time for step in steps] + [evaluation.time for evaluation in evaluations]
    tokens = sum(step.tokens_trained for step in steps)
    figures["Training reward"] = decimal(mean(step.reward for step in steps[-10:]))
    figures["Steps"] = f"{last.step:,} of {last.max_steps:,}"
    figures["Wall clock"] = spelled(max(times))
    figures["Tokens trained"] = compact(tokens)
    figures["Tokens per second"] = compact(tokens / seconds if seconds > 0 else math.nan)
    figures["Oldest token"] = f"{max(step.staleness_max for step in steps)} versions"
    figures["Trainer idle"] = percent(shares(steps, TRAINER)["wait"])
    figures["Servers idle"] = percent(1 - shares(one_a_batch(steps), SERVERS)["generate"])
    figures["Log-probability gap"] = number(mean(step.logprob_gap for step in steps))
    return figures
