"""What a server says when it is ready."""

import shlex
import socket

from outrider.contract.control import ServerInfo
from outrider.contract.keys import key_file
from outrider.server.config import RolloutConfig


def ready_message(info: ServerInfo, config: RolloutConfig, host: str, port: int) -> str:
    """What a server says when it is ready: the exact flags with which a trainer reaches it."""
    everywhere = host in ("0.0.0.0", "::")
    reach = "127.0.0.1" if everywhere else host
    flags = f"--model {shlex.quote(config.model)} --vllm_server_host {reach} --vllm_server_port {port}"
    lines = [
        f"ready: {config.model} ({info.engine}, {info.torch_dtype}) on {host}:{port}, "
        f"{info.max_num_seqs} sequences of up to {info.max_model_len} tokens",
        "train on this machine with:",
        f"  outrider train {flags} --dataset DATA --reward_funcs REWARD",
    ]
    if everywhere:
        name = socket.gethostname()
        lines.append(
            f"from another machine: --vllm_server_host {name}, and OUTRIDER_API_KEY set to the content of {key_file()}"
        )
    return "\n".join(lines)
