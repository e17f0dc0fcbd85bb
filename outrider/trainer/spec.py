"""What the trainer is told by the command line."""

import msgspec

from outrider.observe.config import LoggingConfig
from outrider.trainer.config import BatchConfig, CorrectionMode, LossConfig, ModelConfig, OptimizerConfig, RunConfig


class TrainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer process. groups_per_batch: groups that are generated together; mini_batches: parts of them that an
    optimizer step each is taken on. max_staleness: K. temperature: at which rollouts are sampled, and so the one at
    which the trainer takes log-probabilities. configuration: all settings by
    name, for reports. server_url: of one of the servers. api_key: of the servers, None for the one kept here."""

    run_id: str
    model: ModelConfig
    batch: BatchConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    run: RunConfig
    logging: LoggingConfig
    groups_per_batch: int
    mini_batches: int
    num_generations: int
    max_staleness: int
    correction_mode: CorrectionMode
    temperature: float
    max_completion_length: int
    eval_steps: int
    eval_on_start: bool
    configuration: dict[str, object]
    server_url: str
    api_key: str | None

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that are taken on one batch."""
        return self.mini_batches * self.batch.num_iterations
