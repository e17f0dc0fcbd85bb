"""``outrider rollout``: one rollout server."""

import msgspec

from outrider.cli.describe import describe_section
from outrider.cli.flag_help import help_text
from outrider.cli.flags import FlagSet, Parsed, asks_for_help
from outrider.cli.swift_flags import ROLLOUT_FLAGS
from outrider.contract.errors import UserError
from outrider.contract.output import say, show
from outrider.server.config import EngineChoice, RolloutConfig
from outrider.server.vllm_engine.command import (
    check_installed,
    engines_per_device,
    lacks_gpu,
    vllm_command,
    vllm_version,
)

ROLLOUT = FlagSet(
    "outrider rollout",
    "Serves a model for rollouts, over HTTP, and takes new weights from a trainer while it does.",
    (RolloutConfig,),
    hints={name: f"ms-swift has it; {flag.reason}" for name, flag in ROLLOUT_FLAGS.items()},
)


def parse_rollout(argv: list[str]) -> RolloutConfig:
    """The configuration that a command line and its ``--config`` file give. UserError where it cannot be had."""
    return rollout_config(ROLLOUT.parse(argv))


def rollout_config(parsed: Parsed) -> RolloutConfig:
    """The configuration of parsed flags, with the engine that ``auto`` stands for."""
    config = parsed.section(RolloutConfig)
    engine = _resolve_engine(config)
    if engine == "torch" and config.tensor_parallel_size > 1:
        raise UserError(
            f"--tensor_parallel_size {config.tensor_parallel_size}: the torch engine runs on one device; give --engine "
            "vllm, which spans several, or 1"
        )
    if config.api_key == "":
        raise UserError("--api_key is empty: give a key, or leave the flag out to have one made")
    return msgspec.structs.replace(config, engine=engine)


def _resolve_engine(config: RolloutConfig) -> EngineChoice:
    """What ``auto`` stands for: vLLM where it is installed and a GPU is visible, or several are asked for."""
    if config.engine != "auto":
        return config.engine
    if vllm_version() is None:
        return "torch"
    if config.tensor_parallel_size > 1:
        return "vllm"
    import torch

    return "vllm" if torch.cuda.is_available() else "torch"


def main(argv: list[str]) -> int:
    """Run the command; its exit status."""
    if asks_for_help(argv):
        show(help_text(ROLLOUT))
        return 0
    return start(parse_rollout(argv))


def start(config: RolloutConfig) -> int:
    """Serve until told to stop, or print the configuration with ``--dry_run``."""
    if config.dry_run:
        show(describe_section("rollout server", config))
        if config.engine == "vllm":
            show("\n" + _dry_command(config))
        return 0
    from outrider.server.launch import serve

    return serve(config)


def _dry_command(config: RolloutConfig) -> str:
    from outrider.server.vllm_engine.launcher import describe_command, visible_gpus

    _warn(check_installed())
    gpus = visible_gpus()
    _warn(lacks_gpu(gpus))
    count = engines_per_device(config, gpus)
    described = describe_command(vllm_command(config, config.host, config.port, "", "DIRECTORY", gpus, count))
    several = f"; {count} servers like this one, each on a loopback port of its own behind {config.host}:{config.port}"
    return f"# DIRECTORY is made at the start{several if count > 1 else ''}\n{described}"


def _warn(warning: str | None) -> None:
    if warning:
        say(f"outrider: warning: {warning}")
