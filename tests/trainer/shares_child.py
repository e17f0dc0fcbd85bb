"""One rank of several that load models, take a step or resume one, save and export; rank 0 writes what all of them
have."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from outrider.cli.entry import be_process
from outrider.contract.errors import UserError
from outrider.trainer import agreement
from outrider.trainer.checkpoint import checkpoint_path
from outrider.trainer.config import OptimizerConfig, RunConfig
from outrider.trainer.directories import SaveFailed, unfinished_path
from outrider.trainer.optimizer import make_optimizer
from outrider.trainer.orders import End, Gather, Save, decode, encode
from outrider.trainer.ranks import Ranks
from outrider.trainer.rows import load_rows, model_tensors, optimizer_tensors
from outrider.trainer.saving import RowWriter, Saver
from outrider.trainer.sharding import local, whole_tensor
from outrider.trainer.spool import gathered
from tests.trainer.build import make_policy, one_a_row, random_samples


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole_tensor(tensor).clone() for name, tensor in tensors.items()}


def loaded(ranks: Ranks, model: Path) -> dict[str, Any]:
    """What the ranks have of a model that one of them has loaded; shared: bytes of this rank's rows."""
    policy = make_policy(model, ranks=ranks)
    parameters = dict(policy.model.named_parameters())
    logprobs, entropy = policy.logprobs_and_entropy(one_a_row(random_samples(4, seed=1)))
    return {
        "parameters": whole(parameters),
        "buffers": {name: buffer.clone() for name, buffer in policy.model.named_buffers()},
        "rows": sum(len(local(parameter)) for parameter in parameters.values()),
        "sharing": policy.sharing,
        "logprobs": logprobs.detach(),
        "entropy": entropy,
    }


def follow(ranks: Ranks, writer: RowWriter, model: nn.Module, directory: Path) -> None:
    """As the trainer's followers do. The first save of the last rank meets a limit of the kernel."""
    failing = ranks.rank == 1 and ranks.size == 2
    while True:
        match decode(ranks.hear()):
            case Save(step=step, number=number):
                if failing:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                writer.begin_report(unfinished_path(checkpoint_path(directory, step)), number)
                writer.begin(lambda: None).result() if failing else None
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                failing = False
            case Gather():
                for _ in gathered(model):
                    pass
            case End():
                writer.close()
                return


def main(output: str, directory: str, copies: str, peers: str, resumed: str, *models: str) -> None:
    """copies: of the model, each on a part of the ranks. peers: ranks that compute layers together. resumed: a
    checkpoint, or nothing for a first step."""
    torch.set_num_threads(1)
    agreement.VISIBLE = 0.3
    if int(copies) > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(copies))
    ranks = Ranks(shard_across_nodes=copies == "1", peers=int(peers))
    run = Path(directory)
    found: dict[str, Any] = {"loaded": {model: loaded(ranks, Path(model)) for model in models}}
    found["refused"] = refused(ranks, run)
    policy = make_policy(Path(models[0]), ranks=ranks)
    optimizer = make_optimizer(policy.model, OptimizerConfig(learning_rate=1e-3))
    if resumed:
        load_rows(Path(resumed), policy.model, optimizer)
    else:
        policy.logprobs(one_a_row(random_samples(4, seed=20))).sum().backward()
        optimizer.step()
    found["weights"] = whole(model_tensors(policy.model))
    found["moments"] = whole(optimizer_tensors(policy.model, optimizer))
    if not ranks.leads:
        follow(ranks, RowWriter(policy, optimizer, ranks), policy.model, run)
    else:
        tokenizer = AutoTokenizer.from_pretrained(models[0])
        saver = Saver(run, policy, optimizer, tokenizer, RunConfig(), ranks)
        try:
            saver.checkpoint(1, 1, 9, 1.5)
        except SaveFailed as error:
            found["failed"] = str(error), [path.name for path in run.iterdir()]
            saver.checkpoint(1, 1, 9, 1.5)
        saver.export()
        without_moments = Saver(run, policy, optimizer, tokenizer, RunConfig(save_only_model=True), ranks)
        without_moments.checkpoint(2, 2, 9, 1.5)
        without_moments.close()
        ranks.end(encode(End(status=0)))
        saver.close()
        torch.save(found, output)
    ranks.close()


def refused(ranks: Ranks, directory: Path) -> str:
    """What is said of a directory that only rank 0's node has."""
    agreement.check_directory(ranks, directory)
    try:
        agreement.check_directory(ranks, directory if ranks.leads else directory / "elsewhere")
    except (UserError, SystemExit) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    be_process(lambda: main(*sys.argv[1:]) or 0)
