"""What an alarm does: its actions in their order, once for each fault, and for all ranks of a job together.

Every alarm is recorded and printed; only the first of a fault acts. It acts again if it becomes critical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foreshock.agreement import Agreement, is_shared
from foreshock.config import Settings
from foreshock.errors import AlarmRaised, ConfigError
from foreshock.records import Alarm

Action = str | Callable[[Alarm], object]
OnAlarm = Action | list[Action] | tuple[Action, ...]
RANK = {"warning": 0, "critical": 1}


def actions(on_alarm: OnAlarm | None) -> tuple[Action, ...] | None:
    """``on_alarm`` as a row of single actions, names with commas taken apart; None stays None. Raises ConfigError."""
    if on_alarm is None:
        return None
    row: list[Action] = []
    for action in on_alarm if isinstance(on_alarm, list | tuple) else [on_alarm]:
        if isinstance(action, str):
            row += [name.strip() for name in action.split(",")]
        elif callable(action):
            row.append(action)
        else:
            raise ConfigError(
                f"setting on_alarm: {action!r} is no action; give 'warn', 'raise', 'stop', a callable that takes the Alarm, "
                "or a list of these"
            )
    return tuple(row)


def names(row: Sequence[Action] | None) -> str | None:
    """The names among ``row`` as a setting spells them; None where there are none to check."""
    found = [action for action in row or () if isinstance(action, str)]
    return ",".join(found) if found else None


class Acting:
    """Runs ``row``, or what the settings name, for each fault once. ``stop()`` is the action "stop"; ``fail`` receives what a
    callable raises.

    A fault is a mechanism at a site; within ``debounce`` steps the same mechanism at other sites is the same fault. A callable
    with a true attribute ``every_alarm`` is called for every alarm.
    """

    def __init__(
        self,
        row: Sequence[Action] | None,
        settings: Settings,
        stop: Callable[[], None],
        fail: Callable[[str, Exception], None],
    ) -> None:
        self.row = tuple(row if row is not None else actions(settings.on_alarm) or ())
        self.debounce = settings.debounce
        self.closing = False  # no step is to come at which ranks could meet
        self._stop, self._fail = stop, fail
        binds = any(action in self.row for action in ("raise", "stop"))
        self._agreement = Agreement(settings.every, fail) if binds else None
        self._acted: dict[tuple[str, str | None], str] = {}
        self._last: dict[str, tuple[int, str]] = {}
        self._due: Alarm | None = None
        self._raised = False
        self._step = -1

    def hear(self, alarm: Alarm, step: int) -> None:
        """``alarm`` was heard on this rank while at ``step``. What is to be raised waits for `settle`."""
        acts = self._is_new(alarm)
        shared = self._agreement is not None and is_shared()
        if acts:
            self._note(alarm)
            if shared and self._agreement is not None and not self.closing:
                self._agreement.propose(alarm, step)
        failure = None
        for action in self.row:
            if callable(action) and (acts or getattr(action, "every_alarm", False)):
                failure = self._call(action, alarm) or failure
            elif action == "stop" and acts and not shared:
                self._stop()
        if "raise" in self.row and acts and not shared:
            self._due = self._due or alarm
        if failure is not None:
            raise failure

    def after_step(self, step: int, looks: bool) -> None:
        """An optimizer step is over on this rank: do what all ranks do now. ``looks``: others may hear what this one does not.
        Raises AlarmRaised."""
        if self._agreement is None or step == self._step or not is_shared():
            return
        self._step = step
        alarm = self._agreement.reached(step, looks)
        if alarm is not None:
            self._note(alarm)
            if "stop" in self.row:
                self._stop()
            if "raise" in self.row:
                self._due = alarm
                self.settle()

    def settle(self) -> None:
        """Raise `AlarmRaised` if an alarm is due that asks for it; while closing, only if none was raised before."""
        alarm, self._due = self._due, None
        if alarm is not None and not (self.closing and self._raised):
            self._raised = True
            raise AlarmRaised(alarm)

    def state_dict(self) -> dict[str, Any]:
        """Which faults have acted, and when; a resumed run does not begin with a request to stop."""
        return {
            "acted": [[*key, severity] for key, severity in self._acted.items()],
            "last": {mechanism: list(entry) for mechanism, entry in self._last.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._acted = {(mechanism, site): severity for mechanism, site, severity in state["acted"]}
        self._last = {mechanism: (step, severity) for mechanism, (step, severity) in state["last"].items()}

    def _is_new(self, alarm: Alarm) -> bool:
        severity = RANK.get(alarm.severity, 0)
        before = self._acted.get((alarm.mechanism, alarm.site))
        if before is not None and severity <= RANK.get(before, 0):
            return False
        step, last = self._last.get(alarm.mechanism, (alarm.step - self.debounce, ""))
        return alarm.step - step >= self.debounce or severity > RANK.get(last, 0)

    def _note(self, alarm: Alarm) -> None:
        self._acted[alarm.mechanism, alarm.site] = alarm.severity
        self._last[alarm.mechanism] = (alarm.step, alarm.severity)

    def _call(self, action: Callable[[Alarm], object], alarm: Alarm) -> Exception | None:
        """The error that `fail` raises under ``strict``: the other actions come first."""
        due, self._due = self._due, None  # the callable may ask the watch for something, which is no place to raise
        try:
            action(alarm)
        except Exception as error:
            try:
                self._fail(f"calling on_alarm {getattr(action, '__qualname__', type(action).__name__)}", error)
            except Exception as raised:
                return raised
        finally:
            self._due = due
        return None
