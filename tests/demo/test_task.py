"""The demo's problems and its shipped start model."""

import json
import random
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

import outrider.demo
from outrider.demo.pretrain import CHARACTERS, accuracy, build_tokenizer, teacher_answer
from outrider.demo.task import SHARES, Kind, Problem, Split, problems, split_of, write_jsonl

MODEL = Path(outrider.demo.__file__).parent / "model"
SPLITS = get_args(Split)


def operands(problem: Problem) -> tuple[str, frozenset[int]]:
    return problem.kind, frozenset((problem.left, problem.right))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def test_splits_are_disjoint_in_either_order_of_the_operands() -> None:
    pretrain, train, heldout = ({operands(p) for p in problems(split, 3_000, 0)} for split in SPLITS)
    assert pretrain.isdisjoint(train | heldout)
    assert train.isdisjoint(heldout)


@pytest.mark.parametrize("kind", ["addition", "subtraction"])
def test_a_split_ignores_the_order_of_the_operands(kind: str) -> None:
    assert all(split_of(kind, left, 37) == split_of(kind, 37, left) for left in range(100))


@pytest.mark.parametrize("split", SPLITS)
def test_problems_depend_on_the_seed_alone(split: Split) -> None:
    assert problems(split, 50, 3) == problems(split, 50, 3) != problems(split, 50, 4)
    assert len(set(problems(split, 3_000, 3))) == 3_000


def test_a_known_order_stays() -> None:
    assert [p.prompt for p in problems("heldout", 3, 0)] == ["0-16=", "9-66=", "11+79="]


@pytest.mark.parametrize("split", SPLITS)
def test_solutions_are_right(split: Split) -> None:
    for problem in problems(split, 1_000, 1):
        assert problem.prompt.endswith("=")
        assert eval(problem.prompt.removesuffix("=")) == int(problem.solution)


def test_too_many_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for at most that many"):
        problems("heldout", 20_001, 0)
    with pytest.raises(ValueError, match="choose one of pretrain, train, heldout"):
        problems("test", 1, 0)  # type: ignore[arg-type]


def test_jsonl_has_a_problem_a_line(tmp_path: Path) -> None:
    tasks = problems("train", 20, 0)
    write_jsonl(tmp_path / "train.jsonl", tasks)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["solution"], row["kind"]) for row in rows] == [
        (task.prompt, task.solution, task.kind) for task in tasks
    ]


@pytest.mark.parametrize(
    ("kind", "left", "right", "careless"),
    [
        ("addition", 47, 38, "75"),
        ("subtraction", 42, 17, "35"),
        ("subtraction", 12, 40, "38"),
        ("addition", 90, 30, "20"),
        ("addition", 21, 34, "55"),
    ],
)
def test_a_teacher_without_care_forgets(kind: Kind, left: int, right: int, careless: str) -> None:
    assert teacher_answer(Problem("", "", kind, left, right), 0.0, random.Random(0)) == careless


def test_a_teacher_with_care_is_right() -> None:
    rng = random.Random(0)
    assert all(teacher_answer(task, 1.0, rng) == task.solution for task in problems("pretrain", 3_000, 0))


def test_tokenizer_is_one_token_a_character(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ["47+38=85", "12-40= -28 ", "Two  spaces, a\nnew line: <b>\\{}~", "".join(CHARACTERS)]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_chat_template_leaves_the_prompt_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    message = {"role": "user", "content": "47+38="}
    assert tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == "47+38="


def test_model_is_small_and_knows_its_end(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 5 * 2**20
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_model_has_half_learned_the_task(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    assert 0.3 <= accuracy(model, tokenizer, problems("heldout", 300, 0), sample=False) <= 0.45


def test_shares_sum_to_all() -> None:
    assert sum(SHARES.values()) == 100
