import io
import time
from typing import Any

import pytest
from rich.console import Console

from outrider.contract.feed import PoolStatus
from outrider.observe.config import LoggingConfig
from outrider.observe.live_panel import LivePanel
from outrider.observe.panel import PlainPanel, make_panel
from outrider.observe.records import StepRecord
from tests.observe.build import make_evaluation, make_step


def console(width: int = 80, height: int = 24, terminal: bool = True) -> Console:
    # No interactive redrawing: what the panel shows is asked for with render().
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, height=height, color_system=None, record=True
    )


def pool(**fields: Any) -> PoolStatus:
    values: dict[str, Any] = {
        "servers_alive": 2, "servers_total": 2, "server_versions": [4, 3], "groups_running": 9, "groups_finished": 2,
        "rollouts_running": 72, "tokens_per_second": 5000.0, "generation_idle_share": 0.1,
    }  # fmt: skip
    return PoolStatus(**{**values, **fields})


def live(on: Console, **config: Any) -> LivePanel:
    return LivePanel(LoggingConfig(**config), "a [bold]title[/bold]", 10, 1, on)


def shown(panel: LivePanel, on: Console) -> list[str]:
    on.print(panel.render())
    return on.export_text().splitlines()


def output(panel_console: Console) -> str:
    assert isinstance(panel_console.file, io.StringIO)
    return panel_console.file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60), (50, 15), (20, 5)])
@pytest.mark.parametrize("fed", [False, True])
def test_the_live_panel_fits_the_terminal(width: int, height: int, fed: bool) -> None:
    on = console(width, height)
    panel = live(on, log_completions=True)
    if fed:
        for step in range(1, 6):
            panel.step(make_step(step, rewards={"accuracy": 0.1, "format": 0.2}))
        panel.evaluation(make_evaluation(4))
        panel.pool(pool(server_versions=list(range(100))))
        panel.example("prompt\n" * 40, "completion " * 400, 1.0)
        panel.notice("a long notice " * 40)
    lines = shown(panel, on)
    assert max(map(len, lines)) <= width
    if height >= 24:
        assert len(lines) < height


def test_the_live_panel_shows_what_it_was_told() -> None:
    on = console(120, 40)
    panel = live(on)
    for step in range(1, 6):
        panel.step(make_step(step))
    panel.evaluation(make_evaluation(4, version_min=3, version_max=4))
    panel.pool(pool())
    panel.phase("saving")
    panel.notice("server [red]a[/red] is back")
    text = "\n".join(shown(panel, on))
    for expected in (
        "a [bold]title[/bold]", "5/10", "50%", "saving", "0.250", "0.300 version 3–4", "120 · max 256 · 2% cut",
        "0.7 · max 1 · K 1", "6,000", "0.002 · max 0.4", "2/2 at 4 3", "72 rollouts", "9 running · 2 ready",
        "16 · 3 no signal", "1 failed · 0 stale", "server [red]a[/red] is back", "72 rollouts · idle 10%",
    ):  # fmt: skip
        assert expected in text


def test_the_live_panel_shows_where_time_goes_on_both_sides() -> None:
    on = console(80, 24)
    panel = live(on)
    panel.step(make_step(1, seconds=100.0, train_seconds=98.0, wait_seconds=0.0))  # not among the latest
    for step in range(2, 22):
        panel.step(make_step(step, wait_seconds=1.0, train_seconds=1.0))
    lines = shown(panel, on)
    (trainer,) = [line for line in lines if line.startswith("│ trainer ")]
    (servers,) = [line for line in lines if line.startswith("│ servers  ━")]
    assert trainer.index("train 45%") < trainer.index("wait 45%") < trainer.index("save 5%")
    assert "generate 90%  idle 5%" in servers
    assert trainer.count("━") == servers.count("━") == 25


def test_the_live_panel_shows_the_last_update_of_weights_that_there_was() -> None:
    """No server may have had anything to take during the latest step."""
    on = console(120, 40)
    panel = live(on)
    for step, (stage, commit) in enumerate([(0.5, 0.001), (0.02, 0.0), (0.0, 0.0)], 1):
        panel.step(make_step(step, stage_seconds=stage, commit_seconds=commit))
    assert "stage 20 ms · commit 1 ms" in "\n".join(shown(panel, on))


@pytest.mark.parametrize("max_steps", [0, 10, 10**12])
def test_the_live_panel_takes_any_value(weird_step: StepRecord, max_steps: int) -> None:
    on = console(80, 24)
    panel = LivePanel(LoggingConfig(log_completions=True), "", max_steps, 0, on)
    panel.step(weird_step)
    panel.step(weird_step)
    panel.evaluation(make_evaluation(1, reward=weird_step.reward))
    panel.pool(pool(server_versions=[], servers_alive=0, generation_idle_share=weird_step.loss))
    panel.notice("")
    panel.example("", "", weird_step.reward)
    assert max(map(len, shown(panel, on))) <= 80


def test_the_gap_is_red_above_the_alarm_only() -> None:
    for gap in (0.05, 0.2):
        on = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system="standard")
        panel = live(on, logprob_gap_alarm=0.1)
        panel.step(make_step(1, logprob_gap=gap, groups_zero_variance=0))
        on.print(panel.render())
        assert (f"\x1b[1;31m{gap}" in output(on)) == (gap > 0.1)


def test_the_live_panel_starts_stops_and_leaves_its_last_state() -> None:
    on = console()
    panel = live(on)
    panel.stop()
    panel.start()
    panel.step(make_step(10))
    panel.stop()
    panel.stop()
    assert "10/10" in output(on)


def test_rendering_while_the_trainer_writes() -> None:
    on = console()
    panel = live(on)
    panel.start()
    end = time.monotonic() + 1.2  # at least two refreshes
    step = 0
    while time.monotonic() < end:
        step += 1
        panel.step(make_step(step, max_steps=10**6))
        panel.notice(f"step {step}")
    panel.stop()
    assert f"step {step}" in output(on)


def test_plain_lines_where_there_is_no_terminal() -> None:
    on = console(40, terminal=False)
    panel = make_panel(LoggingConfig(logging_steps=2), "run", 5, 1, on)
    assert isinstance(panel, PlainPanel)
    panel.start()
    for step in range(1, 6):
        panel.step(make_step(step, 5))
        panel.phase("training")
    panel.evaluation(make_evaluation(5, failed=2))
    panel.pool(pool())
    panel.notice("server [x] is down")
    panel.example("p", "c", 1.0)
    panel.stop()
    lines = output(on).splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "held-out reward 0.350 (64 completions, 2 failed" in output(on)
    assert output(on).count("server [x] is down") == 1
    assert "rollout with reward" not in output(on)
    assert "eta 0 s" in lines[3]


def test_plain_lines_take_any_value(weird_step: StepRecord) -> None:
    on = console(terminal=False)
    panel = PlainPanel(LoggingConfig(log_completions=True), "", 0, 0, on)
    panel.step(weird_step)
    panel.evaluation(make_evaluation(1, reward=weird_step.reward))
    panel.example("p", "[/c]", weird_step.reward)
    assert "completion: [/c]" in output(on)


@pytest.mark.parametrize(
    ("setting", "terminal", "kind"),
    [("auto", True, LivePanel), ("auto", False, PlainPanel), ("on", False, LivePanel), ("off", True, PlainPanel)],
)
def test_which_panel(setting: Any, terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_panel(LoggingConfig(panel=setting), "run", 5, 1, console(terminal=terminal)), kind)


def test_a_condition_is_told_when_it_begins_and_not_while_it_lasts() -> None:
    on = console(terminal=False)
    panel = PlainPanel(LoggingConfig(logging_steps=100), "run", 100, 1, on)
    for step, gap in enumerate([0.01, 0.2, 0.3, 0.01, 0.2], start=1):
        panel.step(make_step(step, 100, logprob_gap=gap))
    panel.step(make_step(6, 100, loss=float("nan")))
    panel.step(make_step(7, 100, groups_zero_variance=16))
    for step, gap in enumerate([0.2, 0.01, 0.2, 0.01], start=8):  # of two mini-batches, each trained twice
        panel.step(make_step(step, 100, version=7, logprob_gap=gap))
    lines = output(on).splitlines()
    assert [line.split(": ")[0].split()[-1] for line in lines] == ["2", "5", "6", "7", "8"]
    assert "--logprob_gap_alarm 0.1" in lines[0]
