from typing import Annotated, Literal

import pytest
from msgspec import Meta

from outrider.cli.flag_help import help_text
from outrider.cli.flags import FlagSet
from outrider.contract.errors import UserError
from outrider.contract.options import Section, option


class Shop(Section):
    """A shop. The rest of the docstring is not shown."""

    name: Annotated[str, option("What it is called", aliases=("title",))]
    port: Annotated[int, option("Its door", ge=0, le=65535)] = 80
    top_k: Annotated[int, option("How many", ge=-1)] = -1
    rate: Annotated[float, option("How fast", gt=0)] = 1.0
    is_open: Annotated[bool, option("Whether one can go in")] = False
    color: Annotated[Literal["red", "green", "blue"], option("Its color")] = "red"


class Stock(Section):
    """What it sells."""

    goods: Annotated[tuple[str, ...], option("Goods")] = ()
    prices: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], option("Prices")] = (5,)
    limit: Annotated[Annotated[int, Meta(ge=1)] | None, option("Limit", aliases=("max",))] = None
    note: Annotated[str | None, option("Note")] = None
    mode: Annotated[Literal["none", "some"] | None, option("Mode")] = None


FLAGS = FlagSet("shop open", "Opens a shop.", (Shop, Stock))


def values(line: str) -> dict[str, object]:
    return FLAGS.parse(["--name", "x", *line.split()]).values


def problem(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        FLAGS.parse(list(argv))
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("--port 81", "port", 81),
        ("--port=81", "port", 81),
        ("--top_k -1", "top_k", -1),
        ("--top-k=-1", "top_k", -1),
        ("--rate 1e-6", "rate", 1e-6),
        ("--rate 3", "rate", 3.0),
        ("--port 1e3", "port", 1000),
        ("--is_open", "is_open", True),
        ("--is_open --port 1", "is_open", True),
        ("--is-open yes", "is_open", True),
        ("--is_open=True", "is_open", True),
        ("--is_open 1", "is_open", True),
        ("--is_open false", "is_open", False),
        ("--is_open 0", "is_open", False),
        ("--is_open no", "is_open", False),
        ("--goods a b -c", "goods", ("a", "b", "-c")),
        ("--goods=a b", "goods", ("a", "b")),
        ("--goods none", "goods", ()),
        ("--prices 1 2", "prices", (1, 2)),
        ("--limit 3", "limit", 3),
        ("--max 3", "limit", 3),
        ("--limit none", "limit", None),
        ("--limit null", "limit", None),
        ("--note none", "note", None),
        ("--note=", "note", ""),
        ("--note 7", "note", "7"),
        ("--mode none", "mode", "none"),
        ("--mode null", "mode", None),
    ],
)
def test_ways_to_give_a_value(line: str, name: str, expected: object) -> None:
    value = values(line)[name]
    assert value == expected
    assert type(value) is type(expected)


def test_a_value_may_look_like_text_with_hyphens() -> None:
    assert FLAGS.parse(["--name", "-- not a flag"]).values["name"] == "-- not a flag"
    assert FLAGS.parse(["--name=--port=3\nnext line"]).values["name"] == "--port=3\nnext line"


def test_given_holds_canonical_names() -> None:
    parsed = FLAGS.parse(["--title", "x", "--max", "3", "--top-k", "-1"])
    assert parsed.given == {"name", "limit", "top_k"}
    assert parsed.section(Stock) == Stock(limit=3)
    assert parsed.section(Shop) == Shop(name="x")


def test_unknown_flags_are_reported_together_with_the_nearest() -> None:
    message = problem("--name", "x", "--prot", "3", "--colour=red", "--zzz")
    assert message.splitlines() == [
        "--prot is not a flag of shop open: did you mean --port?",
        "--colour is not a flag of shop open: did you mean --color?",
        "--zzz is not a flag of shop open: 'shop open --help' lists the flags",
    ]


def test_the_nearest_may_be_an_alias() -> None:
    assert "did you mean --title?" in problem("--name", "x", "--titel", "3")


def test_abbreviations_are_not_accepted() -> None:
    assert "--por is not a flag" in problem("--name", "x", "--por", "3")


def test_hints_explain_foreign_flags() -> None:
    flags = FlagSet("shop", "", (Stock,), hints={"roof": "it has none"})
    with pytest.raises(UserError, match=r"^--roof is not a flag of shop: it has none$"):
        flags.parse(["--roof", "flat"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--port 99999", "--port is '99999': expected an integer from 0 to 65535"),
        ("--port x", "--port is 'x': expected an integer from 0 to 65535"),
        ("--port 1.5", "--port is '1.5': expected an integer from 0 to 65535"),
        ("--top_k -2", "--top_k is '-2': expected an integer >= -1"),
        ("--rate 0", "--rate is '0': expected a finite number > 0"),
        ("--rate nan", "--rate is 'nan': expected a finite number > 0"),
        ("--rate inf", "--rate is 'inf': expected a finite number > 0"),
        ("--rate 1e999", "--rate is '1e999': expected a finite number > 0"),
        ("--is_open maybe", "--is_open is 'maybe': expected true or false"),
        ("--is_open true false", "--is_open takes one value, found 2: true false"),
        ("--color pink", "--color is 'pink': expected one of red, green, blue"),
        ("--limit 0", "--limit is '0': expected an integer >= 1, or none"),
        ("--max 0", "--max is '0': expected an integer >= 1, or none"),
        ("--port none", "--port is 'none': expected an integer from 0 to 65535"),
        ("--prices 3 0", "--prices is '0': expected an integer >= 1"),
        ("--port 1 2", "--port takes one value, found 2: 1 2"),
        ("--port", "--port needs a value: an integer from 0 to 65535"),
        ("--goods", "--goods needs a value: text"),
        ("--goods=", "--goods is empty: expected text"),
    ],
)
def test_wrong_values_name_flag_value_and_what_is_allowed(line: str, message: str) -> None:
    assert problem("--name", "x", *line.split()) == message


def test_several_wrong_values_are_reported_together() -> None:
    assert len(problem("--port", "x", "--rate", "0").splitlines()) == 3  # and --name is missing


def test_missing_flags() -> None:
    assert problem() == "--name is missing: What it is called"
    assert problem("--name=") == "--name is empty: expected text"


@pytest.mark.parametrize(
    ("line", "both"),
    [
        ("--port 1 --port 2", "'--port 1' and '--port 2'"),
        ("--top_k 1 --top-k 1", "'--top_k 1' and '--top-k 1'"),
        ("--limit 1 --max 2", "'--limit 1' and '--max 2'"),
        ("--goods a --goods b", "'--goods a' and '--goods b'"),
    ],
)
def test_a_flag_given_twice_is_an_error(line: str, both: str) -> None:
    message = problem("--name", "x", *line.split())
    assert both in message
    assert "given twice" in message


def test_a_word_before_any_flag_is_an_error() -> None:
    assert problem("x", "--port", "1") == "'x' follows no flag: expected --flag value, as in --model x"


def test_a_flag_declared_in_two_sections_is_a_mistake_of_ours() -> None:
    class Other(Section):
        max: Annotated[int, option("The same as an alias")] = 1

    with pytest.raises(ValueError, match=r"declared twice: \['max'\]"):
        FlagSet("shop", "", (Stock, Other))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_help_is_grouped_and_fits(width: int) -> None:
    text = help_text(FLAGS, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\nA shop. The rest of the docstring is not shown:\n" in text
    assert "\nWhat it sells:\n" in text
    assert "[required; also --title]" in text
    assert "--color red|green|blue\n      Its color [default: red]" in text
    assert "--prices INT ...\n      Prices [default: 5]" in text


@pytest.mark.parametrize(("width", "columns"), [(20, 80), (500, 120)])
def test_help_stays_between_80_and_120_columns(width: int, columns: int) -> None:
    assert help_text(FLAGS, width) == help_text(FLAGS, columns)
