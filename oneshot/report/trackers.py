"""Figures of a run for TensorBoard, Weights & Biases or Trackio, through accelerate's trackers; off by default.

Rank 0 alone sends. Only numbers are sent: no settings, prompts, answers or environment.
"""

from __future__ import annotations

import atexit
import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError

PROJECT = "oneshot"


@dataclass
class _Tracking:
    """The process's one tracker; none where nothing is to be sent."""

    tracker: Any = None


_tracking = _Tracking()


def check_installed(log_with: str | None) -> None:
    """Return if the package of a tracker can be imported; call it before anything is read or written.

    Args:
        log_with: tensorboard, wandb or trackio; none for no tracker

    Raises:
        UserError: it is not installed
    """
    if log_with is None:
        return
    from accelerate import utils

    if not getattr(utils, f"is_{log_with}_available")():
        raise UserError(f"Setting log_with is {log_with}, which is not installed: pip install {log_with}.")


def start_tracking(runtime: Runtime, log_with: str | None, run_dir: Path) -> None:
    """From now on ``track`` sends to this tracker, until another is started or the process ends. Collective.

    Args:
        log_with: tensorboard (writes into ``run_dir/tensorboard``), wandb or trackio; none for no tracker

    Raises:
        UserError: on every rank, if it does not start on rank 0
    """
    stop_tracking()
    with agree(runtime, f"starting {log_with}"):
        if log_with is not None and runtime.is_main:
            _tracking.tracker = _started(log_with, run_dir)


def track(stage: str, step: int, figures: Mapping[str, Any]) -> None:
    """Send a step's finite numbers as ``stage/name``, and the step beside them; nothing where no tracker was started.

    A tracker that fails does not end the run: that is said once, and no more is sent.
    """
    tracker = _tracking.tracker
    if tracker is None:
        return
    named = {f"{stage}/{name}": _number(value) for name, value in {**figures, "step": step}.items()}
    values = {name: value for name, value in named.items() if math.isfinite(value)}
    # the others count their own steps, which must not fall, as they would from a fine-tune to the repair after it
    try:
        tracker.log(values, step=step if tracker.name == "tensorboard" else None)
    except Exception as error:
        _tracking.tracker = None
        print(f"Note: {tracker.name} failed ({type(error).__name__}): no more figures are sent there.", flush=True)


def _started(log_with: str, run_dir: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    tracker: Any
    if log_with == "tensorboard":
        tracker = TensorBoardTracker(log_with, run_dir)
    elif log_with == "wandb":  # what a run prints, answers too, stays here
        quiet = {"console": "off", "disable_git": True}
        tracker = WandBTracker(PROJECT, name=run_dir.name, dir=str(run_dir), save_code=False, settings=quiet)
    else:
        tracker = TrackioTracker(PROJECT, name=run_dir.name)
    try:
        tracker.start()
    except Exception as error:  # its message is another package's, and may hold what is not to be shown
        raise UserError(
            f"Tracker {log_with} did not start ({type(error).__name__}): log in to it, run it offline (WANDB_MODE) or "
            "leave log_with out; --debug shows more."
        ) from error
    return tracker


def _number(value: Any) -> float:
    """A scalar as a float, whatever else as NaN."""
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, (int, float)) else math.nan


@contextlib.contextmanager
def own_tracker() -> Iterator[None]:
    """End at the end of the block the tracker that was started in it, which would else go on until the process ends."""
    try:
        yield
    finally:
        stop_tracking()


@atexit.register
def stop_tracking() -> None:
    """End the tracker that was started, if one was: what it has is sent."""
    tracker, _tracking.tracker = _tracking.tracker, None
    if tracker is not None:
        try:
            tracker.finish()
        except Exception as error:
            print(f"Note: {tracker.name} did not end in order ({type(error).__name__}).", flush=True)
