"""From the configuration of ``outrider train`` to what the trainer and the collector are told."""

import uuid
from pathlib import Path

import msgspec

from outrider.cli.train_config import Resolved, TrainConfig
from outrider.collector.config import CollectorSpec
from outrider.trainer.config import RunConfig
from outrider.trainer.spec import TrainerSpec


def make_specs(config: TrainConfig, resolved: Resolved) -> tuple[TrainerSpec, CollectorSpec]:
    """The two processes' specifications, under one new run id."""
    run_id = uuid.uuid4().hex[:12]
    trainer = TrainerSpec(
        run_id=run_id,
        model=config.model,
        batch=config.batch,
        loss=config.loss,
        optimizer=config.optimizer,
        run=config.run,
        logging=config.logging,
        groups_per_batch=resolved.groups_per_batch,
        mini_batches=resolved.mini_batches,
        num_generations=config.sampling.num_generations,
        max_staleness=resolved.max_staleness,
        correction_mode=resolved.correction_mode,
        temperature=config.sampling.temperature,
        max_completion_length=config.sampling.max_completion_length,
        eval_steps=config.evaluation.eval_steps,
        eval_on_start=config.evaluation.eval_on_start,
        configuration=settings(config, resolved),
        server_url=resolved.server_urls[0],
        api_key=config.servers.vllm_server_api_key,
    )
    collector = CollectorSpec(
        run_id=run_id,
        resume=config.run.resume_from_checkpoint is not None,
        model=config.model.model,
        trust_remote_code=config.model.trust_remote_code,
        server_urls=resolved.server_urls,
        servers=config.servers,
        data=config.data,
        sampling=config.sampling,
        rewards=config.rewards,
        reward_weights=resolved.reward_weights,
        reward_settings=resolved.reward_settings,
        staleness=config.staleness,
        max_staleness=resolved.max_staleness,
        evaluation=config.evaluation,
        groups_per_batch=resolved.groups_per_batch,
        mini_batches=resolved.mini_batches,
        seed=config.run.seed,
        ledger=str(ledger_path(config.run)),
        ledger_keep_steps=config.run.ledger_keep_steps,
        # With a KL term a group without advantages still has a gradient.
        drop_zero_variance=config.loss.beta == 0,
    )
    return trainer, collector


def ledger_path(config: RunConfig) -> Path:
    """The SQLite file of the run."""
    return Path(config.output_dir) / "ledger.sqlite"


def settings(config: TrainConfig, resolved: Resolved) -> dict[str, object]:
    """All flags by name, with what follows from them, for reports."""
    flat: dict[str, object] = {}
    for name in config.__struct_fields__:
        section = getattr(config, name)
        if isinstance(section, msgspec.Struct):
            flat.update(msgspec.to_builtins(section))
    flat["max_staleness"] = resolved.max_staleness
    flat["rollout_importance_sampling_mode"] = resolved.correction_mode
    flat["generation_batch_size"] = resolved.rollouts_per_batch
    return flat
