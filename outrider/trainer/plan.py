"""What follows from a specification: the loss, and the number of steps."""

from outrider.algorithm.losses import LossSpec
from outrider.trainer.spec import TrainerSpec


def loss_spec(spec: TrainerSpec) -> LossSpec:
    """The loss that the configuration asks for."""
    return LossSpec(
        loss_type=spec.loss.loss_type,
        epsilon=spec.loss.epsilon,
        epsilon_high=spec.loss.epsilon_high,
        delta=spec.loss.delta,
        beta=spec.loss.beta,
        importance_sampling_level=spec.loss.importance_sampling_level,
        max_completion_length=spec.max_completion_length,
    )


def planned_steps(spec: TrainerSpec, prompts: int) -> int:
    """Optimizer steps of the run: --max_steps, else what --num_train_epochs make of ``prompts``."""
    if spec.batch.max_steps > 0:
        return spec.batch.max_steps
    return max(1, int(spec.batch.num_train_epochs * prompts // spec.groups_per_batch)) * spec.steps_per_batch
