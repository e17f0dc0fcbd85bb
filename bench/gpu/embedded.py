"""The embedded engine on one GPU: whether it computes what Transformers does, and how fast it decodes.

    python bench/gpu/embedded.py OUT.json

Greedy completions of small random models are compared with `generate` in float32. Then a 0.6B shape (random weights,
bfloat16) decodes 256 and 512 sequences at once, with and without recorded graphs, log-probabilities on; `generate`
beside it, on the same prompts. Last, how long a commit of that model keeps the engine from its next step.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.server.cores import Bench, reference
from tests.server.models import CONFIGS, save_model
from tests.server.test_core import prompts

sys.path.insert(0, str(Path(__file__).parents[1]))
from about import about

NEW_TOKENS, PROMPT_TOKENS = 256, 64


def agreement(directory: Path) -> dict[str, float]:
    """Share of greedy tokens that agree with `generate`, by architecture."""
    shares = {}
    for kind in CONFIGS:
        path = save_model(kind, directory / kind)
        bench, model = Bench(path, device="cuda:0"), reference(path).cuda()
        batch = prompts(12)
        numbers = [bench.ask(prompt, max_tokens=24, temperature=0.0, ignore_eos=True) for prompt in batch]
        bench.steps()
        same = total = 0
        for prompt, number in zip(batch, numbers, strict=True):
            out = model.generate(
                torch.tensor([prompt], device="cuda"), max_new_tokens=24, min_new_tokens=24, do_sample=False
            )
            expected = out[0, len(prompt) :].tolist()
            found = bench.choices[number][0].tokens
            # min_new_tokens bans the end of text, ignore_eos does not: compare up to there.
            end = found.index(1) if 1 in found else 24
            same += sum(a == b for a, b in zip(found[:end], expected[:end], strict=True))
            total += end
        shares[kind] = round(same / total, 4)
    return shares


def save_large(directory: Path) -> Path:
    """The shape of Qwen3-0.6B with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return directory


def decoding(path: Path, count: int, graphs: bool) -> float:
    """Tokens per second of ``count`` sequences."""
    bench = Bench(
        path, device="cuda:0", dtype="bfloat16", max_model_len=1024, max_num_seqs=count, max_num_batched_tokens=8192,
        cache_positions=count * 512, stop_tokens=(),
    )  # fmt: skip
    if not graphs:
        bench.core.runner.graphs = None
    speeds = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(count):
            bench.ask([index % 1000 + 5] * PROMPT_TOKENS, seed=index, max_tokens=NEW_TOKENS)
        bench.steps()
        speeds.append(count * NEW_TOKENS / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


def generating(path: Path, count: int) -> float:
    """Tokens per second of `generate` on the same work."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda().eval()
    ids = torch.tensor([[index % 1000 + 5] * PROMPT_TOKENS for index in range(count)], device="cuda")
    speeds = []
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0)
        torch.cuda.synchronize()
        speeds.append(count * NEW_TOKENS / (time.perf_counter() - started))
    return speeds[-1]


def commit_milliseconds(path: Path, directory: Path) -> float:
    """Stage and commit the model's own weights."""
    bench = Bench(path, device="cuda:0", dtype="bfloat16", cache_positions=64 * 128)
    weights = {name: p.detach().cpu() for name, p in bench.core.weights.live.items()}
    seconds = []
    for version in range(1, 4):
        bench.stage(weights, directory)
        bench.core.commit(version, "keep")
        torch.cuda.synchronize()
        bench.stage(weights, directory)
        started = time.perf_counter()
        bench.core.commit(version, "keep")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Measure, print, write."""
    result: dict[str, object] = about()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result["greedy_agreement"] = agreement(directory)
        print(result, flush=True)
        path = save_large(directory / "large")
        for count in (256, 512):
            for graphs in (False, True):
                label = f"tokens_per_second_{count}_{'graphs' if graphs else 'eager'}"
                result[label] = round(decoding(path, count, graphs))
                torch.cuda.empty_cache()
                print(label, result[label], flush=True)
            result[f"tokens_per_second_{count}_generate"] = round(generating(path, count))
            torch.cuda.empty_cache()
            print(result, flush=True)
        result["commit_ms"] = round(commit_milliseconds(path, directory), 2)
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
