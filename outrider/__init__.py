"""GRPO training of language models with the rollout engine outside the trainer, asynchronous."""

__version__ = "0.1.0"
