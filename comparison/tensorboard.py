"""A comparison in TensorBoard: a run for each engine, so that their curves lie over each other.

    write(folder, parts)    folder/tensorboard/<part>-<engine>

By tensorboard's own writer: no torch. On the axis "relative" a curve shows the time of training.
"""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from comparison.markdown import table
from comparison.results import JobResults, parts_of_a_step, step_s
from comparison.trainers import LABELS


def write(folder: Path, parts: list[JobResults]) -> list[Path]:
    """Writes the runs, and gives their folders."""
    runs, now = [], time.time()
    for part in parts:
        for engine, result in part.trained.items():
            run = folder / "tensorboard" / f"{part.job.name}-{engine}"
            write_run(run, part, engine, result, now)
            runs.append(run)
    return runs


def write_run(run: Path, part: JobResults, engine: str, result: dict, now: float):
    """The losses, step by step, and the final figures."""
    writer = EventFileWriter(str(run))
    for step, loss in enumerate(result["losses"], 1):
        value = Summary.Value(tag="loss/train", simple_value=loss)
        add(writer, value, step, now + step * step_s(result))
    figures = final(part, result)
    end = len(result["losses"])
    rows = [[tag.replace("_", " "), f"{x:.6g}"] for tag, x in figures.items()]
    add(writer, text("figures", table([LABELS[engine], part.job.name], rows)), end, now)
    writer.close()


def final(part: JobResults, result: dict) -> dict[str, float]:
    """What the report's tables have of an engine, by tag."""
    return {
        "loss": result["losses"][-1],
        "training_s": part.train_s(result),
        "steps_per_s": 1 / step_s(result),
        "speed_up": part.speed_up(result),
        **{f"{name}_ms": seconds * 1e3 for name, seconds in parts_of_a_step(result).items()},
        "start_s": result["start_s"],
        "peak_memory_MB": result["peak_bytes"] / 1e6,
        "graph_nodes": result["nodes"],
    }


def text(tag: str, markdown: str) -> Summary.Value:
    """What TensorBoard's text page shows."""
    content = TensorProto(
        dtype=DT_STRING,
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        string_val=[markdown.encode()],
    )
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=content)


def add(writer: EventFileWriter, value: Summary.Value, step: int, when: float):
    """One value of a step."""
    writer.add_event(Event(wall_time=when, step=step, summary=Summary(value=[value])))
