"""Configuration of what is shown and logged."""

from typing import Annotated, Literal

from outrider.contract.options import Section, option


class LoggingConfig(Section):
    """Panel, metrics and reports."""

    report_to: Annotated[
        tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...], option("Where metrics go besides metrics.jsonl")
    ] = ("none",)
    run_name: Annotated[str | None, option("Name of the run in --report_to (default: name of --output_dir)")] = None
    logging_steps: Annotated[int, option("Print a line every so many steps where there is no panel", ge=1)] = 1
    log_completions: Annotated[bool, option("Show a rollout of each step in the panel")] = False
    panel: Annotated[
        Literal["auto", "on", "off"], option("Live terminal panel; auto: when the output is a terminal")
    ] = "auto"
    logprob_gap_alarm: Annotated[
        float, option("Warn when the mean gap between sampler and trainer log-probabilities exceeds this", gt=0)
    ] = 0.1
