import pytest

from outrider.cli.specs import make_specs
from outrider.cli.train_config import parse_train, resolve
from outrider.trainer.plan import planned_steps


@pytest.mark.parametrize(
    ("line", "steps"),
    [
        ("", 12),  # 100 prompts, 8 a batch
        ("--num_train_epochs 2", 25),
        ("--num_train_epochs 0.01", 1),
        ("--num_iterations 3", 36),
        ("--steps_per_generation 4 --gradient_accumulation_steps 2 --num_iterations 3", 6 * 3),  # 32 a batch
        ("--max_steps 7 --num_iterations 2", 7),
    ],
)
def test_how_many_steps_a_run_has(line: str, steps: int) -> None:
    words = "--model m --dataset d --reward_funcs accuracy --per_device_train_batch_size 64"
    config = parse_train([*words.split(), *line.split()])
    spec, collector = make_specs(config, resolve(config))
    assert planned_steps(spec, prompts=100) == steps
    assert collector.mini_batches * config.batch.num_iterations == spec.steps_per_batch
