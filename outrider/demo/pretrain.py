"""Make the demo's start model: a small Qwen3 that has learned arithmetic from a careless teacher.

    python -m outrider.demo.pretrain OUTPUT_DIR --seed 0

The teacher can calculate, but now and then forgets a carry, a borrow or a minus sign. The model comes to know
both ways to calculate, and decoded greedily it mostly gives a careless answer; reinforcement learning has to find
out which way is rewarded.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from outrider.demo.task import Problem, problems

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHARACTERS = ["\n", *map(chr, range(ord(" "), ord("~") + 1))]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IGNORED = -100


def teacher_answer(problem: Problem, care: float, rng: random.Random) -> str:
    """The answer, column by column, each carry, borrow and minus sign remembered with probability `care`.

    With `care` 1 it is always right; with `care` 0, 47+38 is 75, 42-17 is 35 and 12-40 is 38.
    """
    larger, smaller = max(problem.left, problem.right), min(problem.left, problem.right)
    sign = 1 if problem.kind == "addition" else -1
    ones = larger % 10 + sign * (smaller % 10)
    tens = larger // 10 + sign * (smaller // 10)
    if rng.random() < care:
        tens += ones // 10
    if rng.random() >= care:
        tens %= 10
    negative = problem.kind == "subtraction" and problem.left < problem.right and rng.random() < care
    size = 10 * tens + ones % 10
    return str(-size if negative else size)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: a byte-pair tokenizer that has no pairs to merge."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL["unk_token"]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 of under a million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    return Qwen3ForCausalLM(config)


def supervised_batch(
    tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem], answers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Prompts with their answers, padded on the right; the loss sees the answer and the end of sequence."""
    rows, labels = [], []
    for problem, answer in zip(batch, answers, strict=True):
        prompt = tokenizer.encode(problem.prompt)
        completion = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        rows.append(prompt + completion)
        labels.append([IGNORED] * len(prompt) + completion)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    }


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Problem], sample: bool
) -> float:
    """The share of problems that the model solves, decoding greedily or sampling at temperature 1."""
    prompts = tokenizer([task.prompt for task in tasks], return_tensors="pt", padding=True)
    output = model.generate(**prompts, max_new_tokens=6, do_sample=sample)  # type: ignore[misc]
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text.strip() == task.solution for text, task in zip(texts, tasks, strict=True)) / len(tasks)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the directory that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # Transformers 5 writes a class name that version 4 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's start model.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--care", type=float, default=0.39, help="how often the teacher remembers a carry")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # sums in one order, on any number of cores
    rng = random.Random(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pool = problems("pretrain", 9_000, arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=arguments.steps, pct_start=0.1
    )
    for step in range(arguments.steps):
        batch = rng.sample(pool, arguments.batch_size)
        answers = [teacher_answer(problem, arguments.care, rng) for problem in batch]
        loss = model(**supervised_batch(tokenizer, batch, answers)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)

    model.eval()
    save(model, tokenizer, arguments.output_dir)
    tasks = problems("heldout", 1_000, 0)
    print(f"parameters: {model.num_parameters():,}")
    print(f"held-out accuracy, greedy: {accuracy(model, tokenizer, tasks, sample=False):.3f}")
    print(f"held-out accuracy, sampled: {accuracy(model, tokenizer, tasks, sample=True):.3f}")


if __name__ == "__main__":
    main()
