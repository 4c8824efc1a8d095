"""``foreshock watch``: in a real terminal against a run that another process writes, and as text where there is no terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import until
from commands import call
from rich.console import Console
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from writing import FAULT, NAME, write, writer

import foreshock
from foreshock.errors import RunError
from foreshock.following import Following
from foreshock.live import watch
from foreshock.live_view import snapshot, sparkline, view
from foreshock.monitors.report_limits import bands
from foreshock.monitors.report_worst import worst
from foreshock.reader import open_run
from foreshock.records import Alarm, Coverage, Reading, Site, SiteStatus
from foreshock.store import RunStore

SIZE = (40, 110)
SMALL = (24, 80)
START = "import sys; sys.argv = ['foreshock', 'watch', *sys.argv[1:]]; from foreshock.cli import main; main()"


class Screen:
    """What a person at a terminal sees of a program, and what they type."""

    def __init__(self, child: Any, screen: Any, stream: Any) -> None:
        self.child, self._screen, self._stream = child, screen, stream

    @property
    def text(self) -> str:
        import pexpect

        try:
            while True:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.05))
        except (pexpect.TIMEOUT, pexpect.EOF):
            return "\n".join(self._screen.display)

    def shows(self, *texts: str) -> Callable[[], bool]:
        return lambda: all(text in self.text for text in texts)

    def ends(self) -> int:
        """The exit code."""
        until(lambda: self.text is not None and not self.child.isalive(), 20)
        return int(self.child.exitstatus)


@contextmanager
def terminal(*arguments: str, size: tuple[int, int] = SIZE) -> Iterator[Screen]:
    pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
    screen = pyte.Screen(size[1], size[0])
    environment = os.environ | {"TERM": "xterm-256color", "LINES": str(size[0]), "COLUMNS": str(size[1])}
    child = pexpect.spawn(sys.executable, ["-c", START, *arguments], dimensions=size, env=environment, encoding="utf-8")
    try:
        yield Screen(child, screen, pyte.Stream(screen))
    finally:
        child.close(force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
def test_a_run_is_followed_while_it_is_written_until_q(tmp_path: Path) -> None:
    with writer(tmp_path) as job, terminal(str(tmp_path)) as seen:
        job.to(10)
        until(seen.shows("step 10", "Healthy in steps 0 to 10", "run/loss", "last written"), 40)
        assert "Alarms      None" in seen.text
        job.to(FAULT + 5)
        until(
            seen.shows(f"step {FAULT + 5}", f"Not healthy since about step {FAULT}", "What to do  Compare", "Alarms"),
            20,
        )
        worst = re.compile(rf"{re.escape(NAME)[:12]}.*law/euler\s+0\.4\s+at most 0\.062\s+6\.4")
        until(lambda: worst.search(seen.text) is not None, 20)  # a screen may be seen half drawn
        job.end()
        until(seen.shows("closed by its writer"), 20)
        seen.child.send("q")
        assert seen.ends() == 0
        assert f"Not healthy since about step {FAULT}" in seen.text, "what it said last stays"


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
def test_a_run_is_waited_for_until_ctrl_c(tmp_path: Path) -> None:
    with terminal(str(tmp_path)) as seen:
        until(seen.shows("waiting for the run's first flush"), 40)
        write(RunStore(tmp_path), 0)
        until(seen.shows("Healthy in steps 0"), 20)
        seen.child.send("x")
        seen.child.send("\x03")
        assert seen.ends() == 0


def sick(folder: Path) -> None:
    """A run of 60 steps with eight sites whose laws break, five alarms, three curves and a long line about its cost."""
    store = RunStore(folder)
    sites = [
        Site(f"s{i}", f"model.layers.{i}.self_attn", "attention", "sdpa", heads=2, kv_heads=2, dtype="bfloat16")
        for i in range(8)
    ]
    for step in range(60):
        laws = [np.array([1e-3, 0.1 + 0.05 * i if step >= FAULT else 1e-3]) for i in range(8)]
        curves = {"run/loss": 3 - step / 60, "optim/lr": 1e-3, "optim/grad_norm": 1.0}
        readings = [Reading(name, None, np.array([value])) for name, value in curves.items()]
        pairs = zip(sites, laws, strict=True)
        store.write(step, readings + [Reading("law/euler", site.id, values) for site, values in pairs])
    for i, site in enumerate(sites[:5]):
        words = ("at most 0.06", "critical", "low-precision attention kernel", ("law/euler is 0.4",), "the kernel")
        store.alarm(Alarm(FAULT + 2 + i, FAULT + i, site.id, "law/euler", 0.4, *words, head=1, confidence="proved"))
    store.coverage(Coverage(tuple(SiteStatus(site, 60, 60, {"law/euler": ""}) for site in sites)))
    parts = {"judging": "0.25 s (1.0% of the wall clock)", "sampling": "3.1 s (12% of the wall clock)"}
    store.meta(cost={**parts, "wall clock": "25.0 s", "sampled steps now": "1 in 10"})
    store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a Unix terminal")
def test_a_standard_terminal_has_room_for_the_most_important(tmp_path: Path) -> None:
    sick(tmp_path)
    wanted = (
        "Not healthy since about step 40",
        "What to do  Change",
        "How sure    Proved",
        "closed by its writer",
        "what watching costs: judging",
        "sampled steps now 1 in 10",
        "and 3 more: foreshock alarms",
        "and 6 more: foreshock report",
        "run/loss",
    )
    with terminal(str(tmp_path), size=SMALL) as seen:
        until(seen.shows(*wanted), 40)
        alarm = r"40 +42 +low-precision .* model\.layers\.0.* proved"
        until(lambda: re.search(alarm, seen.text) is not None, 20)
        assert len(re.findall(r"model\.layers\.[76]\.self_attn law/euler 0\.4\d? +at most 0\.062", seen.text)) == 2
        seen.child.send("q")
        assert seen.ends() == 0


@pytest.mark.parametrize("width", [50, 80, 132])
def test_a_view_takes_no_more_than_there_is(tmp_path: Path, width: int) -> None:
    sick(tmp_path)
    following = Following(tmp_path)
    found = following.look(snapshot)
    console = Console(width=width, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    told = []
    for height in (*range(12, 40, 3), 40, 59):
        drawn = console.render_lines(
            view(found, "exp1 · step 59", console, height), console.options.update(height=None)
        )
        assert len(drawn) <= height
        assert all(sum(piece.cell_length for piece in line) == width for line in drawn)
        told.append("\n".join("".join(piece.text for piece in line) for line in drawn))
    assert all("what watching costs" in text and "Not healthy" in text for text in told)
    counts = [text.count("law/eul") for text in told]
    assert counts[-1] == 8
    assert "more:" not in told[-1]
    assert min(counts[-3:]) > 0


def shown(folder: Path, **options: Any) -> str:
    console = Console(width=100, force_terminal=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert watch(str(folder), console=console, **options) == 0
    return console.export_text()


def test_without_a_terminal_it_prints_once(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for step in range(FAULT + 1):
        write(store, step)
    store.meta(cost={"judging": "0.25 s (1.0% of the wall clock)", "wall clock": "25.0 s"})
    store.flush()
    text = shown(tmp_path) + shown(tmp_path, once=True)
    assert text.count(f"Not healthy since about step {FAULT}") == 2
    assert f"{NAME}, key/value head 1" in text
    assert "what watching costs: judging 0.25 s (1.0% of the wall clock); wall clock 25.0 s" in text
    store.close()


def test_once_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sick(tmp_path)
    assert call(monkeypatch, "watch", tmp_path, "--once", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"]["title"] == "Not healthy since about step 40"
    assert told["verdict"]["answers"]["Where"] == "model.layers.0.self_attn, key/value head 1"
    assert told["steps"] == {"recorded": 60, "last": 59}
    assert [alarm["onset"] for alarm in told["alarms"]] == [40, 41, 42, 43, 44]
    assert [(one["site"], round(one["value"], 6)) for one in told["worst"][:2]] == [("s7", 0.45), ("s6", 0.4)]
    assert told["now"] == pytest.approx({"run/loss": 3 - 59 / 60, "optim/lr": 1e-3, "optim/grad_norm": 1.0})
    assert told["cost"]["wall clock"] == "25.0 s"
    for refused in (["--json"], ["--json", "--web", "--once"]):
        assert call(monkeypatch, "watch", tmp_path, *refused) == 2
        assert "--once" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such folder"):
        shown(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no run\.sqlite"):
        shown(tmp_path)


def test_nothing_is_written_to_the_folder(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    write(store, 0)
    store.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shown(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_flush_and_a_new_run_are_new_versions(tmp_path: Path) -> None:
    following = Following(tmp_path)
    assert following.version == ""
    assert following.written is None
    versions = set()
    for anew in (False, True):
        store = RunStore(tmp_path, anew=anew)
        for step in range(3):
            write(store, step)
            versions.add(following.version)
            assert following.version in versions, "it stays while nothing is written"
        assert following.log.exists()
        store.close()
        assert not following.log.exists()
    assert len(versions) == 6
    assert (tmp_path / "earlier-1").is_dir()


def test_a_slow_look_is_rested_from() -> None:
    times = iter([0.0, 3.0])
    following = Following("nowhere", clock=lambda: next(times))
    with pytest.raises(RunError):
        following.look(lambda run: None)
    assert following.rest(1.0) == 12.0


def test_the_nearest_to_their_limits_come_first(tmp_path: Path) -> None:
    store, rng = RunStore(tmp_path), np.random.default_rng(0)
    for step in range(0, 1200, 10):
        write(store, step)
        leaves = 2.0 * max(step - 1100, 0) / 100
        loss, entropy = 3.0 + 0.01 * rng.normal(), 0.8 + 0.002 * rng.normal(size=2)
        store.write(
            step,
            [Reading("run/loss", None, np.array([loss + leaves])), Reading("attention/entropy_norm", "a", entropy)],
        )
    store.flush()
    with open_run(tmp_path) as run:
        found = worst(run, {site.id: site for site in run.sites}, bands(run))
    store.close()
    assert [one.metric for one in found] == ["run/loss", "law/euler", "attention/entropy_norm"]
    assert found[0].share > 6.4 == pytest.approx(found[1].share)
    assert found[2].share < 1


def test_sparklines() -> None:
    assert sparkline(np.arange(8.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.arange(80.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([1.0, np.nan, np.inf, 2.0]), 8) == "▁✕✕█"
    assert sparkline(np.ones(3), 8) == "▁▁▁"
    assert sparkline(np.zeros(0), 8) == ""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_running_job_tells_its_sites_and_its_cost(tmp_path: Path) -> None:
    """Whoever looks, or reports on a job that was killed, knows what was watched."""
    torch._dynamo.reset()
    model = Attention()
    with foreshock.Watch(tmp_path, every=1, inner="eager", strict=True) as job:
        compiled = torch.compile(model, backend=job.backend)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            compiled(torch.randn(2, 6, 8)).square().mean().backward()
            optimizer.step()
        with open_run(tmp_path) as run:  # nobody has asked the job to flush
            assert [site.kind for site in run.sites] == ["attention"]
            assert run.meta["held_to"] == {"kernel_dtype": None, "tf32": False}
            assert "wall clock" in run.meta["cost"]
    assert "Healthy in steps" in shown(tmp_path)
    torch._dynamo.reset()
