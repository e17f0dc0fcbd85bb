"""``outrider rollout``: one rollout server."""

import msgspec

from outrider.cli.describe import describe_section
from outrider.cli.entry import show
from outrider.cli.flag_help import help_text
from outrider.cli.flags import FlagSet, Parsed, asks_for_help
from outrider.cli.swift_flags import ROLLOUT_FLAGS
from outrider.contract.errors import UserError
from outrider.server.config import RolloutConfig

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
    if config.engine == "vllm":
        raise UserError(
            "--engine vllm is not in this version, whose only engine is torch: leave --engine out, or give "
            "--engine torch"
        )
    if config.tensor_parallel_size > 1:
        raise UserError(
            f"--tensor_parallel_size {config.tensor_parallel_size}: the torch engine runs on one device, and the vllm "
            "engine, which would span several, is not in this version; set 1"
        )
    if config.api_key == "":
        raise UserError("--api_key is empty: give a key, or leave the flag out to have one made")
    return msgspec.structs.replace(config, engine="torch")


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
        return 0
    from outrider.server.launch import serve

    return serve(config)
