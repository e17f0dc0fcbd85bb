"""Where metrics go besides ``metrics.jsonl``: the services of ``--report_to``."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from outrider.contract.errors import UserError
from outrider.observe.config import LoggingConfig
from outrider.observe.records import EvalRecord, MetricsRow
from outrider.observe.secrets import without_secrets

_ROLLOUTS = {
    "completion_length",
    "completion_length_max",
    "truncated_share",
    "staleness_mean",
    "staleness_max",
    "groups",
    "groups_zero_variance",
    "groups_failed",
    "groups_stale",
    "prompts_rejected",
}
_PERF = {
    "seconds",
    "wait_seconds",
    "collate_seconds",
    "train_seconds",
    "publish_wait_seconds",
    "save_seconds",
    "other_seconds",
    "batch_seconds",
    "generation_busy_seconds",
    "generation_idle_seconds",
    "generation_down_seconds",
    "reward_seconds",
    "reward_wait_seconds",
    "stage_seconds",
    "commit_seconds",
    "pack_seconds",
    "trainer_idle_share",
    "generation_idle_share",
    "tokens_trained",
    "tokens_per_second",
}
_NOT_LOGGED = {"kind", "step", "max_steps", "time"}


class Reporter(Protocol):
    """One service."""

    def log(self, row: MetricsRow) -> None:
        """Hand over one row."""

    def close(self) -> None:
        """Send what is left."""


def named_metrics(row: MetricsRow) -> dict[str, float]:
    """The numbers of a row under grouped names: ``train/reward``, ``perf/tokens_per_second``, ``eval/reward`` ...

    The mean of a single reward function is ``train/rewards/<name>`` or ``eval/rewards/<name>``.
    """
    metrics: dict[str, float] = {}
    for field, value in msgspec.to_builtins(row).items():
        if field in _NOT_LOGGED:
            continue
        group = "eval" if isinstance(row, EvalRecord) else _group(field)
        if isinstance(value, dict):
            metrics |= {f"{group}/{field}/{name}": mean for name, mean in value.items()}
        else:
            metrics[f"{group}/{field}"] = value
    return metrics


def _group(field: str) -> str:
    return "perf" if field in _PERF else "rollouts" if field in _ROLLOUTS else "train"


class TensorBoardReporter:
    """Event files in ``output_dir/tensorboard``. Events from ``first_step`` on of an earlier start are hidden."""

    def __init__(self, output_dir: Path, configuration: Mapping[str, Any], first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._writer = SummaryWriter(output_dir / "tensorboard", purge_step=first_step if first_step > 1 else None)
        self._writer.add_text("configuration", f"```\n{msgspec.yaml.encode(configuration).decode()}\n```")

    def log(self, row: MetricsRow) -> None:
        """Add one scalar a metric, and flush, so that a killed run shows its last step."""
        for name, value in named_metrics(row).items():
            self._writer.add_scalar(name, value, row.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbReporter:
    """Weights & Biases; the project is WANDB_PROJECT, or ``outrider``."""

    def __init__(self, name: str, output_dir: Path, configuration: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "outrider"),
            name=name,
            dir=str(output_dir),
            config=dict(configuration),
            # The panel redraws itself: captured as output it would be pages of control sequences.
            settings=wandb.Settings(console="off"),
        )
        # An evaluation arrives after later steps, and wandb drops what comes with a step lower than the last one:
        # so the step is a metric of its own that the curves are drawn over.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: MetricsRow) -> None:
        """Log the row at its step."""
        self._run.log({**named_metrics(row), "step": row.step})

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class TrackioReporter:
    """trackio, local unless its own settings say otherwise; the project is TRACKIO_PROJECT, or ``outrider``."""

    def __init__(self, name: str, configuration: Mapping[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("trackio", error) from error
        self._trackio = trackio
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", "outrider"), name=name, config=dict(configuration))

    def log(self, row: MetricsRow) -> None:
        """Log the row at its step."""
        self._trackio.log(named_metrics(row), step=row.step)

    def close(self) -> None:
        """Write what is left."""
        self._trackio.finish()


class Reporters:
    """All services of a run as one. A service that fails is given up with one warning; the run goes on."""

    def __init__(self, services: Mapping[str, Reporter], warn: Callable[[str], None]) -> None:
        self._services = dict(services)
        self._warn = warn

    def log(self, row: MetricsRow) -> None:
        """Hand the row to every service still in use."""
        for name, service in list(self._services.items()):
            self._attempt(name, lambda service=service: service.log(row))  # type: ignore[misc]

    def close(self) -> None:
        """Close every service still in use."""
        for name, service in list(self._services.items()):
            self._attempt(name, service.close)
        self._services.clear()

    def _attempt(self, name: str, call: Callable[[], None]) -> None:
        # The one place where anything goes: what a service's library raises when a network or a disk fails is its
        # own affair, unknowable here, and no reason to end hours of training. metrics.jsonl has every row anyway.
        try:
            call()
        except Exception as error:  # noqa: BLE001
            del self._services[name]
            self._warn(
                f"{name} is given up for this run: {type(error).__name__}: {error}. metrics.jsonl goes on holding "
                "every row"
            )


def make_reporters(
    config: LoggingConfig,
    output_dir: Path,
    configuration: Mapping[str, Any],
    warn: Callable[[str], None],
    first_step: int = 1,
) -> Reporters:
    """Open the services of ``--report_to``. What fails here, before any work is done, is raised.

    configuration: the resolved flags, shown with the run; secrets in it are not passed on.
    warn: takes the line about a service that fails later. first_step: the first that will be logged; above 1 on
    a resumed run.
    """
    name = config.run_name or output_dir.resolve().name
    shown = without_secrets(configuration)
    makers: dict[str, Callable[[], Reporter]] = {
        "tensorboard": lambda: TensorBoardReporter(output_dir, shown, first_step),
        "wandb": lambda: WandbReporter(name, output_dir, shown),
        "trackio": lambda: TrackioReporter(name, shown),
    }
    return Reporters({service: makers[service]() for service in config.report_to if service != "none"}, warn)


def _missing(service: str, error: ImportError) -> UserError:
    return UserError(
        f"--report_to {service} needs a package that is not here ({error}): pip install 'outrider[{service}]', "
        f"or leave {service} out of --report_to"
    )
