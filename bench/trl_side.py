"""The demo's task trained by TRL's GRPOTrainer, for bench/learning.py; runs in whatever Python can import trl.

    python bench/trl_side.py SETTINGS.json

SETTINGS.json is the ``Work`` of bench/learning.py. The clock runs from the beginning of the first step on, and stands
still while weights are copied. Writes the copies with their step and time, and the seconds of every step, to ``file``.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def exact_match(completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    """1 where the completion is the solution, else 0."""
    return [float(text.strip() == right.strip()) for text, right in zip(completions, solution, strict=True)]


class Clock(TrainerCallback):
    """Seconds of training, and weights on the way."""

    def __init__(self, every: int) -> None:
        """every: steps between two copies of the weights."""
        self.every = every
        self.steps: list[float] = []
        self.kept: list[dict[str, Any]] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.steps.append(time.perf_counter() - self._since)
        if state.global_step % self.every == 0:
            weights = {name: value.detach().clone() for name, value in model.named_parameters()}
            self.kept.append({"step": state.global_step, "seconds": sum(self.steps), "weights": weights})
        self._since = time.perf_counter()


def main() -> None:
    """Train as the settings say."""
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    clock = Clock(work["every"])
    config = GRPOConfig(
        output_dir=work["directory"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=work["prompts"] * work["completions"],
        gradient_accumulation_steps=1,
        num_generations=work["completions"],
        max_completion_length=work["max_completion_length"],
        temperature=1.0,
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        scale_rewards="group",
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        max_steps=work["steps"],
        seed=work["seed"],
        # Time for telling and keeping, which is no part of the comparison.
        save_strategy="no",
        report_to="none",
        logging_steps=10_000,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=work["model"],
        reward_funcs=exact_match,
        args=config,
        train_dataset=load_dataset("json", data_files=work["train"], split="train"),
        callbacks=[clock],
    )
    trainer.train()
    torch.save({"kept": clock.kept, "steps": clock.steps}, work["file"])


if __name__ == "__main__":
    main()
