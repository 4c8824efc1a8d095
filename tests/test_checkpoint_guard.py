"""The last checkpoint from before an onset outlives rotation, whatever it is called and however it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from foreshock import Alarm, CheckpointGuard, ConfigError, Watch
from foreshock.checkpoints import PINNED, step_of
from foreshock.completeness import incomplete

ALARM = Alarm(1500, 1250, "a", "law/euler", float("nan"), "< 1", "warning", "bad kernel", ("one",), "it is off")


def began(onset: int) -> Alarm:
    """The alarm with another onset, known exactly."""
    return replace(ALARM, onset=onset, onset_interval=(onset, onset))


def _folder(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    for name, data in (files or {"weights": b"w"}).items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (1000, 1200, 1400):
        _folder(tmp_path / f"checkpoint-{step}", weights=str(step).encode(), state=b"s")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-1200", 1200),
        ("step_1200.pt", 1200),
        ("epoch=1-step=1200.ckpt", 1200),
        ("iter_0001200", 1200),
        ("global_step100", 100),
        ("model.ckpt-7.index", 7),
        ("model_v2_step_300.safetensors", 300),
        ("400", 400),
        ("weights-500.pt2", 500),
        ("ckpt.600.h5", 600),
        ("model.step700", 700),
        ("epoch=3.ckpt", None),
        ("model_v2_300.pt", None),
        ("last.ckpt", None),
    ],
)
def test_names_carry_steps(name: str, step: int | None) -> None:
    assert step_of(Path(name)) == step


def test_the_newest_from_before_the_onset_is_linked_and_explained(saved: Path) -> None:
    (pin,) = CheckpointGuard(saved)(ALARM)
    assert pin == saved / PINNED / "checkpoint-1200"
    assert (pin / "weights").read_bytes() == b"1200"
    assert os.path.samefile(pin / "weights", saved / "checkpoint-1200" / "weights")
    told = json.loads((saved / PINNED / "checkpoint-1200.json").read_text())
    assert (told["step"], told["how"], told["alarm"]["mechanism"]) == (1200, "hard links", "bad kernel")
    assert sorted(path.name for path in (saved / PINNED).iterdir()) == ["checkpoint-1200", "checkpoint-1200.json"]
    assert len(list(saved.glob("checkpoint-*"))) == 3


def test_the_onset_s_low_end_decides_where_there_is_one(saved: Path) -> None:
    @dataclass(frozen=True)
    class WithInterval:
        onset: int
        onset_interval: tuple[int, int]

        def to_json(self) -> dict[str, Any]:
            return {}

    (pin,) = CheckpointGuard(saved)(WithInterval(1250, (1100, 1300)))  # type: ignore[arg-type]
    assert pin.name == "checkpoint-1000"


def test_rotation_leaves_the_pin_alone(saved: Path) -> None:
    trainer = pytest.importorskip("transformers.trainer_utils")
    guard = CheckpointGuard(saved)
    guard(ALARM)
    for step in (1600, 1800):
        _folder(saved / f"checkpoint-{step}")
        trainer.rotate_checkpoints(str(saved), save_total_limit=2)
    assert sorted(path.name for path in saved.glob("checkpoint-*")) == ["checkpoint-1600", "checkpoint-1800"]
    assert (saved / PINNED / "checkpoint-1200" / "weights").read_bytes() == b"1200"
    assert trainer.get_last_checkpoint(str(saved)).endswith("checkpoint-1800")
    assert guard(began(1300)) == ()  # nothing that old is left but the pin


def test_again_changes_nothing_and_an_earlier_onset_pins_what_is_earlier(saved: Path) -> None:
    guard = CheckpointGuard(saved)
    first = guard(ALARM)
    before = (saved / PINNED / "checkpoint-1200.json").stat().st_mtime_ns
    assert guard(ALARM) == guard(began(1399)) == first
    assert (saved / PINNED / "checkpoint-1200.json").stat().st_mtime_ns == before
    (pin,) = guard(began(1100))
    assert pin.name == "checkpoint-1000"
    assert (saved / PINNED / "checkpoint-1200").is_dir()
    (at_the_onset,) = guard(began(1000))
    assert at_the_onset == pin


def test_a_run_begun_anew_pins_its_own(tmp_path: Path) -> None:
    """Another checkpoint under a name that is pinned already."""
    path = tmp_path / "step_100.pt"
    torch.save({"run": 1}, path)
    (first,) = CheckpointGuard(tmp_path)(began(150))
    path.unlink()
    torch.save({"run": 2}, path)
    os.utime(path, ns=(1, 1))
    (second,) = CheckpointGuard(tmp_path)(began(150))
    assert (first.name, second.name) == ("step_100.pt", "step_100.pt.2")
    assert (torch.load(first), torch.load(second)) == ({"run": 1}, {"run": 2})
    assert CheckpointGuard(tmp_path)(began(150)) == (second,)


def test_files_of_one_step_are_pinned_together(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save({"step": step}, tmp_path / f"model_step_{step}.pt")
        torch.save({"step": step}, tmp_path / f"optimizer_step_{step}.pt")
    pins = CheckpointGuard(tmp_path / "*_step_*.pt")(began(150))
    assert [pin.name for pin in pins] == ["model_step_100.pt", "optimizer_step_100.pt"]
    assert torch.load(pins[0]) == {"step": 100}
    second = tmp_path / "optimizer_step_200.pt"
    second.write_bytes(second.read_bytes()[:-30])
    assert [pin.name for pin in CheckpointGuard(tmp_path)(ALARM)] == ["model_step_100.pt", "optimizer_step_100.pt"]


def test_what_is_not_whole_is_passed_over(saved: Path, warnings_logged) -> None:
    (saved / "checkpoint-1210").mkdir()
    _folder(saved / "checkpoint-1220", **{"training_args.bin": b"a"})
    _folder(saved / "tmp-checkpoint-1230")
    (pin,) = CheckpointGuard(saved)(ALARM)
    assert pin.name == "checkpoint-1200"
    passed = [line for line in warnings_logged() if line.startswith("passing over")]
    assert len(passed) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folders_of_torch_distributed_checkpoint(tmp_path: Path) -> None:
    for step in (100, 200):
        dcp.save({"weight": torch.ones(4)}, checkpoint_id=tmp_path / f"step-{step}", no_dist=True)
    assert incomplete(tmp_path / "step-200") == ""
    (tmp_path / "step-200" / ".metadata").unlink()
    assert "no .metadata" in incomplete(tmp_path / "step-200")
    (pin,) = CheckpointGuard(tmp_path)(ALARM)
    shutil.rmtree(tmp_path / "step-100")
    read = {"weight": torch.zeros(4)}
    dcp.load(read, checkpoint_id=pin, no_dist=True)
    assert read["weight"].tolist() == [1] * 4


def test_formats_tell_whether_they_are_whole(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(torch.ones(100), tmp_path / "a.pt")
    torch.save(torch.ones(100), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "old.pt"):
        assert incomplete(tmp_path / name) == ""
        (tmp_path / f"cut_{name}").write_bytes((tmp_path / name).read_bytes()[:-9])
    assert incomplete(tmp_path / "cut_a.safetensors") == "cut_a.safetensors is cut off"
    assert incomplete(tmp_path / "cut_a.pt") == "cut_a.pt is cut off"
    (tmp_path / "junk.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0no!")
    assert incomplete(tmp_path / "junk.safetensors")
    assert incomplete(tmp_path / "nowhere") == "it is gone"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100\n")
    assert incomplete(_folder(tmp_path / "iter_0000100")) == ""
    assert "100 is the last complete one" in incomplete(_folder(tmp_path / "iter_0000200"))


def test_noted_checkpoints_need_no_name(tmp_path: Path) -> None:
    guard = CheckpointGuard(tmp_path / "made later")
    for step, name in ((100, "first"), (200, "second")):
        (tmp_path / name).write_text(name)
        guard.note(tmp_path / name, step)
    guard.note(tmp_path / "gone", 1200)
    (pin,) = guard(began(150))
    assert (pin, pin.read_text()) == (tmp_path / PINNED / "first", "first")


def test_a_step_of_one_s_own(saved: Path) -> None:
    (pin,) = CheckpointGuard(saved, step=lambda path: {"checkpoint-1400": 7}.get(path.name))(ALARM)
    assert pin.name == "checkpoint-1400"


@pytest.mark.parametrize("how", ["asked", "another device"])
def test_copies(saved: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if how != "asked":
        monkeypatch.setattr(os, "link", link)
    _folder(saved / "checkpoint-1240" / "deep" / "er")
    (saved / "checkpoint-1240" / "empty").mkdir()
    (saved / "checkpoint-1240" / "link").symlink_to(saved / "checkpoint-1000" / "weights")
    (pin,) = CheckpointGuard(saved, copy=how == "asked")(ALARM)
    shutil.rmtree(saved / "checkpoint-1000")
    (saved / "checkpoint-1240" / "deep" / "er" / "weights").write_bytes(b"overwritten")
    assert (pin / "deep" / "er" / "weights").read_bytes() == b"w"
    assert (pin / "link").read_bytes() == b"1000"
    assert (pin / "empty").is_dir()
    assert json.loads(pin.with_name(f"{pin.name}.json").read_text())["how"] == "copied"


def test_rotation_in_the_middle_of_pinning_falls_back_to_the_one_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch, warnings_logged
) -> None:
    link = os.link

    def rotating(source: str, target: Path) -> None:
        if "checkpoint-1200" in source:
            shutil.rmtree(saved / "checkpoint-1200", ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", rotating)
    (pin,) = CheckpointGuard(saved)(ALARM)
    assert pin.name == "checkpoint-1000"
    assert [path.name for path in sorted((saved / PINNED).iterdir())] == ["checkpoint-1000", "checkpoint-1000.json"]
    assert any("deleted while it was being pinned" in line for line in warnings_logged())


def test_another_process_is_left_alone(saved: Path, warnings_logged) -> None:
    (saved / PINNED / ".checkpoint-1200.part").mkdir(parents=True)
    CheckpointGuard(saved)(ALARM)
    assert [path.name for path in (saved / PINNED).iterdir()] == [".checkpoint-1200.part"]
    assert any("another process is at it" in line for line in warnings_logged())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nowhere", "none was found at all"),
        ("checkpoint-*", "there are steps 1400, 1200, 1000"),
        ("nothing-*", "matches nothing"),
    ],
)
def test_with_nothing_to_pin_it_says_so(saved: Path, where: str, said: str, warnings_logged) -> None:
    assert CheckpointGuard(saved / where)(began(10)) == ()
    assert any(said in line for line in warnings_logged())
    assert not (saved / PINNED).exists()


def test_what_fails_is_logged_and_never_raised(saved: Path, warnings_logged) -> None:
    (saved / PINNED).write_text("a file where the folder should be")
    assert CheckpointGuard(saved)(ALARM) == ()
    assert CheckpointGuard(saved, step=lambda path: 1 // 0)(ALARM) == ()
    assert [line.split(": ")[1] for line in warnings_logged()] == ["FileExistsError", "ZeroDivisionError"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: CheckpointGuard(""), "the folder is ''"),
        (lambda folder: CheckpointGuard(folder / "checkpoint-1000" / "weights"), "is a file; give the folder"),
        (lambda folder: CheckpointGuard(folder, step=3), "step must be a callable from Path to int or None, got 3"),  # type: ignore[arg-type]
        (lambda folder: CheckpointGuard(folder).note(folder / "x", -1), "an int of at least 0, got -1"),
    ],
)
def test_mistakes_are_told_at_once(saved: Path, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(saved)


def test_as_an_action_it_hears_every_alarm(saved: Path) -> None:
    with Watch(on_alarm=[CheckpointGuard(saved), "stop"]) as watch:
        watch.acting.hear(ALARM, 1501)
        watch.acting.hear(replace(began(1100), site="b"), 1501)
        assert watch.stop_requested
    pinned = sorted(path.name for path in (saved / PINNED).glob("checkpoint-????"))
    assert pinned == ["checkpoint-1000", "checkpoint-1200"]
