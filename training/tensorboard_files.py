"""TensorBoard's event files: written record by record, checked, and rebuilt from `metrics.jsonl`.

`metrics.jsonl` is the record; TensorBoard's files show it, and have pictures and texts besides.
TensorBoard's own writer is a thread, whose failures nobody can answer; here a record that the disk
has no room for is kept, and written when there is.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tb_logging

from common.files import AppendFile

PATTERN = "events.out.tfevents.*"  # what TensorBoard takes for its own

Point = tuple[str, int]  # (tag, step)


class EventFile(AppendFile):
    """A TensorBoard file in `folder`. purge_step: hides what older files have from that step on."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names
        stamp = f"{time.time_ns()}.{os.getpid()}"
        super().__init__(folder / PATTERN.replace("*", stamp))
        self.add_event(Event(file_version="brain.Event:2", step=purge_step or 0))
        if purge_step is not None:
            self.add_event(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))

    def add(self, summary: Summary, step: int = 0):
        """A summary, as torch.utils.tensorboard.summary makes them."""
        self.add_event(Event(summary=summary, step=step))

    def add_scalar(self, tag: str, value: float, step: int):
        """A point of a curve."""
        self.add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def add_event(self, event: Event):
        """Any event; one without a time is of now."""
        event.wall_time = event.wall_time or time.time()
        RecordWriter(self).write(event.SerializeToString())


# Checking and rebuilding --------------------------------------------------------------------------


def recorded_points(records: list[dict]) -> dict[Point, float]:
    """The points in the records of a metrics.jsonl."""
    return {
        (tag, record["step"]): value
        for record in records
        for tag, value in record.items()
        if tag != "step" and isinstance(value, int | float)
    }


def shown_points(folder: Path) -> dict[Point, float] | None:
    """The points that TensorBoard shows of a folder; None where it shows one twice.

    Raises OSError for a file that cannot be read now, which its parsers would take for damaged.
    """
    for path in folder.glob(PATTERN):
        path.open("rb").close()
    board = EventAccumulator(str(folder), {"scalars": 0})
    tb_logging.get_logger().setLevel("ERROR")  # what a resume hides is no news
    try:
        board.Reload()
    except Exception:  # whatever its parsers say to a damaged file
        return None
    points = {}
    for tag in cast(list[str], board.Tags()["scalars"]):  # of other keys it has other types
        for event in board.Scalars(tag):
            if (tag, event.step) in points:
                return None
            points[tag, event.step] = event.value
    return points


def find_difference(folder: Path, records: list[dict], before: int | None = None) -> str:
    """How TensorBoard's files fail to show `records`, and nothing else; "" where they do not.

    before: only what they lack or have otherwise, of steps below this one.
    """
    found = shown_points(folder)
    if found is None:
        return "a file is damaged, or a point appears twice"
    due = {k: v for k, v in recorded_points(records).items() if before is None or k[1] < before}
    for point in sorted(due.keys() | (found.keys() if before is None else set())):
        value, should = found.get(point), due.get(point)
        if value is None or should is None or not equal_in_float32(value, should):
            return f"{point[0]} of step {point[1]} is {value}, but metrics.jsonl has {should}"
    return ""


def equal_in_float32(value: float, recorded: float) -> bool:
    """Whether a point is the recorded one in TensorBoard's float32, which ends at 3.4e38."""
    with np.errstate(over="ignore"):
        return value == float(np.float32(recorded))


def rebuild(folder: Path, records: list[dict]) -> list[Path]:
    """One new file with the points of `records` and what else can be read of the old files.

    The old ones are set aside, under names that TensorBoard does not read; they are returned.
    Raises OSError.
    """
    old = sorted(folder.glob(PATTERN)) if folder.is_dir() else []
    board, times, seen = EventFile(folder), {}, set()
    for path in old:
        for event in intact(path):
            times[event.step] = event.wall_time
            values = [v for v in event.summary.value if not v.HasField("simple_value")]
            content = event.SerializeToString()
            if values and content not in seen:  # twice: an earlier rebuild was interrupted
                seen.add(content)
                kept = Summary(value=values)
                board.add_event(Event(summary=kept, step=event.step, wall_time=event.wall_time))
    for (tag, step), value in recorded_points(records).items():
        point = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        board.add_event(Event(summary=point, step=step, wall_time=times.get(step, 0)))
    try:
        board.flush(sync=True)
        board.close()
        return [
            path.rename(path.with_name(path.name.replace("tfevents", "set_aside"))) for path in old
        ]
    except OSError:
        board.path.unlink()
        raise


def histograms_of(folder: Path, step: int) -> list[Event]:
    """The histograms of one step, which a resume from there would hide."""
    newest = sorted(folder.glob(PATTERN))[-2:]  # the process before, and one that came to nothing
    events = [event for path in newest for event in intact(path)]
    return [
        event
        for event in events
        if event.step == step and any(value.HasField("histo") for value in event.summary.value)
    ]


def intact(path: Path) -> Iterator[Event]:
    """The events of a file, as far as it can be read."""
    try:
        yield from LegacyEventFileLoader(str(path)).Load()
    except Exception:  # a record whose checksum is right and whose content is none
        return
