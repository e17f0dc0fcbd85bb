"""What a run leaves behind besides weights: ``report.html`` and ``summary.json``."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from outrider.contract.feed import EvalResult
from outrider.observe.metrics import MetricsRow, evaluations_of, steps_of
from outrider.observe.report import ReportExample, write_report
from outrider.trainer.summary import RunEnd, Summary


def finish_run(
    output_dir: Path,
    end: RunEnd,
    *,
    rows: Sequence[MetricsRow],
    evaluations: Sequence[EvalResult],
    configuration: dict[str, object],
    logprob_gap_alarm: float,
) -> Summary:
    """Write the report and the summary."""
    held_out = evaluations_of(list(rows))
    first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    summary = Summary(
        finished=end.finished,
        steps=end.steps,
        train_seconds=end.train_seconds,
        max_staleness=end.max_staleness,
        max_staleness_seen=max((step.staleness_max for step in steps_of(list(rows))), default=0),
        reward_before=held_out[0].reward if held_out else None,
        reward_after=held_out[-1].reward if held_out else None,
        examples_before=_examples(first),
        examples_after=_examples(last),
    )
    (output_dir / "summary.json").write_bytes(msgspec.json.encode(summary))
    before = {prompt: (text, reward) for prompt, text, reward in summary.examples_before}
    write_report(
        output_dir / "report.html",
        title=output_dir.name,
        config=configuration,
        rows=list(rows),
        summary={"Training time": f"{end.train_seconds:.1f} s"},
        examples=[
            ReportExample(
                prompt=prompt,
                before=before[prompt][0] if prompt in before else None,
                after=text,
                before_reward=before[prompt][1] if prompt in before else None,
                after_reward=reward,
            )
            for prompt, text, reward in summary.examples_after
        ],
        max_staleness=end.max_staleness,
        logprob_gap_alarm=logprob_gap_alarm,
    )
    return summary


def _examples(result: EvalResult | None) -> list[tuple[str, str, float]]:
    return [(e.prompt, e.completion, e.reward) for e in result.examples] if result is not None else []
