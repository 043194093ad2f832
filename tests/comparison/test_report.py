"""comparison/report.py and what stands beside it: figures are those that were measured."""

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comparison import code_size, controls, job, plots, report, tensorboard
from comparison.markdown import figure
from comparison.results import JobResults, parts_of_a_step, step_s
from comparison.trainers import LABELS
from data.config import DataConfig
from generation.sampling import Sampling
from model.config import ModelConfig
from tests.helpers import ROOT, TEXT
from training.config import Config, OptimizerConfig, TrainConfig

STEPS = 12
SHORT = 3  # of the slowest
SHAPE = ModelConfig(0, 8, 2, 1, 16, 16, dropout=0.1, positions="learned", norm_first=True)
SIZES = [
    {"size": "8/2/1/8", "parameters": 1234, "engine": "torch", "generate_s": 0.25, "tokens": 50,
     "start_s": 1.0, "peak_bytes": 2e8},
    {"size": "8/2/1/8", "parameters": 1234, "engine": "python", "generate_s": 0.5, "tokens": 10,
     "start_s": 1.0, "peak_bytes": 3e7},
    {"size": "99/3/1/8", "engine": "python", "skipped": "too | slow"},
]  # fmt: skip


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> JobResults:
    """Real runs of the three that start quickly, and of the controls."""
    folder = tmp_path_factory.mktemp("report")
    words = re.findall(r"[a-z]{2,14}", TEXT.read_text().lower())
    (folder / "words.txt").write_text("\n".join(words))
    data = DataConfig(path=str(folder / "words.txt"), kind="lines", tokenizer="char")
    data = replace(data, cache_dir=str(folder / "cache"))
    config = Config(max_steps=500, model=SHAPE, data=data, train=TrainConfig(batch_size=4))
    config = replace(config, optimizer=OptimizerConfig(lr=0.03, warmup_steps=2))
    config = replace(config, sample=Sampling(max_new_tokens=12))
    made = job.create(folder / "tiny", "tiny", config, STEPS, "fp64", lambda line: None)
    results = {}
    for engine in ("unfused", "python", "numpy", "random", "stack"):
        steps = SHORT if engine == "unfused" else STEPS
        command = [sys.executable, "-m", "comparison.worker", str(made.folder), engine, str(steps)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        results[engine] = json.loads((made.folder / f"{engine}.json").read_text())
    return JobResults(made, results, 500)


def with_results(part: JobResults, **results: dict) -> JobResults:
    return replace(part, results=results)


def written(folder: Path, *parts: JobResults, sizes=()) -> str:
    return report.write(folder, list(parts), list(sizes)).read_text()


def tables(markdown: str) -> list[list[list[str]]]:
    """All tables as rows of cells; each has as many cells in every row."""
    found, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            rows.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        elif rows:
            assert len({len(row) for row in rows}) == 1, rows
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def table(markdown: str, *columns: str, row: str = "") -> dict[str, dict[str, str]]:
    """The one table with these columns, and with this row: {first cell: {column: cell}}."""
    found = [rows for rows in tables(markdown) if set(columns) <= set(rows[0])]
    (rows,) = [rows for rows in found if not row or row in [cells[0] for cells in rows]]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def as_number(cell: str) -> float:
    return float(re.match(r"[-\d.,e+]+", cell)[0].replace(",", ""))


# The report --------------------------------------------------------------------------------------


def test_every_section_is_there(part, tmp_path):
    markdown = written(tmp_path, part, sizes=SIZES)
    assert re.findall("^## (.*)$", markdown, re.MULTILINE) == [
        "What was compared",
        "tiny: results",
        "tiny: losses",
        "tiny: samples",
        "tiny: controls",
        "tiny: correctness",
        "tiny: an epoch, and a whole training",
        "How the engines work",
        "Code and dependencies",
        "Sizes",
        "Shipped configurations",
    ]
    assert "no weight decay, no clipping, dropout 0" in markdown
    assert metadata.version("torch") in markdown and metadata.version("numpy") in markdown
    rows = table(markdown, "configuration")
    assert rows["parameters"]["tiny"] == f"{part.results['numpy']['parameters']:,}"
    assert rows["documents to train on"]["tiny"] == f"{part.job.documents:,}"
    assert rows["precision"]["tiny"] == "fp64"


def test_results_are_those_of_the_workers(part, tmp_path):
    markdown = written(tmp_path, part)
    whole, times = table(markdown, "time to train [s]"), table(markdown, "forward [ms]")
    for engine, result in part.results.items():
        row, seconds = whole[LABELS[engine]], result["seconds"]
        of_the_job = result["share"] * result["of_steps"]
        a_step = sum(seconds.values()) / of_the_job
        assert as_number(row["time to train [s]"]) == pytest.approx(a_step * STEPS, rel=0.006)
        assert as_number(row["steps/s"]) == pytest.approx(1 / a_step, rel=0.006)
        slowest = step_s(part.results["unfused"])
        assert as_number(row["speed-up"]) == pytest.approx(slowest / a_step, rel=0.006)
        memory = result["peak_bytes"] / 1e6
        assert as_number(row["peak memory [MB]"]) == pytest.approx(memory, rel=0.006)
        assert row["graph nodes a step"] == f"{result['nodes']:,.0f}"
        assert row["final loss"] == ("–" if engine == "unfused" else f"{result['losses'][-1]:.4f}")
        row = times[LABELS[engine]]
        for name in ("forward", "backward", "update"):
            milliseconds = seconds[name] / of_the_job * 1e3
            assert as_number(row[f"{name} [ms]"]) == pytest.approx(milliseconds, rel=0.006)
        share = as_number(row["backward's share"]) / 100
        assert share == pytest.approx(seconds["backward"] / sum(seconds.values()), abs=0.006)
        assert as_number(row["start-up [s]"]) == pytest.approx(result["start_s"], rel=0.006)


def test_what_is_multiplied_up_says_so(part, tmp_path):
    markdown = written(tmp_path, part)
    rows = table(markdown, "time to train [s]")
    said = {name for name, row in rows.items() if "(extrapolated)" in row["time to train [s]"]}
    assert said == {LABELS["unfused"]}
    assert f"extrapolated from {SHORT} steps to {STEPS}" in markdown
    assert f"its loss was {part.results['unfused']['losses'][-1]:.4f}" in markdown
    assert "~" in report.terminal([part])


def test_losses_and_how_far_they_are_apart(part, tmp_path):
    markdown = written(tmp_path, part)
    rows = table(markdown, "step", "largest difference")
    assert set(rows) == {str(step) for step in range(1, STEPS + 1)}
    for step, row in rows.items():
        for engine, result in part.results.items():
            there = int(step) <= result["steps"]
            assert row[LABELS[engine]] == (
                f"{result['losses'][int(step) - 1]:.4f}" if there else "–"
            )
        python, numpy = (part.results[e]["losses"][int(step) - 1] for e in ("python", "numpy"))
        if int(step) > SHORT:  # the controls, which differ by far, are no part of it
            gap = as_number(row["largest difference"])
            assert gap == pytest.approx(abs(python - numpy), rel=0.06)
    assert part.gap(STEPS) < 1e-10 < abs(
        part.results["random"]["losses"][-1] - part.results["python"]["losses"][-1]
    )  # fmt: skip
    worst = max(part.gap(step) for step in range(1, STEPS + 1))
    assert f"over all {STEPS} steps: {figure(worst, 2)}, at step" in markdown


def test_equal_samples_stand_once(part, tmp_path):
    markdown, same = written(tmp_path, part), "all 2 engines that trained to the end"
    rows = table(markdown, "", same, LABELS["random"])
    assert len(rows) == 20 and LABELS["numpy"] not in rows["1"]
    for i, row in rows.items():
        for engine, column in {"numpy": same, "stack": LABELS["stack"]}.items():
            ids = part.results[engine]["samples"][int(i) - 1]
            assert row[column] == (part.job.text(ids).strip() or "(empty)")
    assert "wrote the same text in 20 of 20." in markdown
    other = {**part.results["numpy"], "samples": [[], *part.results["numpy"]["samples"][1:]]}
    markdown = written(tmp_path, with_results(part, **{**part.results, "numpy": other}))
    assert "wrote the same text in 19 of 20." in markdown
    assert table(markdown, "", LABELS["numpy"], row="20")["1"][LABELS["numpy"]] == "(empty)"


def test_long_samples_stand_under_each_other(part, tmp_path):
    results = {e: {**part.results[e], "samples": [[5] * 120]} for e in ("python", "numpy")}
    markdown = written(tmp_path, with_results(part, **results))
    wrote = f"all 2 engines that trained to the end: {part.job.text([5] * 120)}"
    assert f"Sample 1\n\n- {wrote}" in markdown


def test_samples_are_looked_up_in_the_data(part, tmp_path):
    data, tokenizer = part.job.dataset, part.job.dataset.tokenizer
    train, held = (
        [split.ids[a + 1 : b - 1].tolist() for a, b in pairwise(split.starts)]
        for split in (data.train, data.val)
    )
    written_ids = [train[0], train[-1], held[-1], tokenizer.encode("qqqq"), [*train[0][:-1], 0]]
    result = {**part.results["numpy"], "samples": written_ids, "generate_s": 0.5}
    markdown = written(tmp_path, with_results(part, numpy=result))
    row = table(markdown, "in neither")[LABELS["numpy"]]
    assert list(row.values())[1:4] == ["2", "1", "2"]  # training data, held-out data, neither
    tokens = sum(min(12, len(ids) + 1) for ids in written_ids)
    assert as_number(row["generation after training [tokens/s]"]) == tokens / 0.5
    one = replace(data, kind="stream", train=replace(data.train, starts=None, prompts=None))
    stream = replace(part, job=replace(part.job, dataset=one))
    markdown = written(tmp_path, with_results(stream, numpy=result))
    assert "generation after training" in markdown and "in neither" not in markdown


def test_controls_show_cosines_and_errors(part):
    for engine in ("random", "stack"):
        at = {name: {key: a[key] for key in ("vector", "scalar")}
              for name, a in part.results[engine]["cosines"].items()}  # fmt: skip
        if engine == "stack":  # the other way of pushing: whatever is there is shown
            at = {name: {**a, "vector reversed": a["scalar"]} for name, a in at.items()}
        alone = with_results(part, **{engine: {**part.results[engine], "cosines": at}})
        shown = "\n\n".join(controls.controls(alone))
        assert shown.index("Relative error:") < shown.index("| gradient")
        first, *more = [t for t in tables(shown) if t[0][0].startswith("gradient")]
        assert [len(t[0]) for t in (first, *more)] == [5, 3] if more else [5]
        for name, *cells in first[1:]:
            expected = [at[name][s][k] for s in ("vector", "scalar") for k in ("cosine", "error")]
            assert cells == [f"{x:.4f}" for x in expected]
        assert ("in reverse order" in shown) == (engine == "stack")
    right = [name for name, a in at.items() if a["vector"]["error"] < 1e-9]
    assert 0 < len(right) < len(at)
    assert f"in order. With a node for each operation on a vector {len(right)} of" in shown


def test_a_check_beyond_its_limit_is_marked(part, tmp_path):
    markdown = written(tmp_path, part)
    assert "All checks passed." in markdown and "FAILS" not in markdown
    rows = table(markdown, "at most", LABELS["numpy"])
    for check in part.results["numpy"]["checks"]:
        cell = rows[check["name"]][LABELS["numpy"]]
        assert as_number(cell) == pytest.approx(check["value"], rel=0.06)
        assert (f" of {check['of']:,}" in cell) == bool(check["of"])
    (falls,) = [row for name, row in rows.items() if name.startswith("loss falls")]
    losses = part.results["numpy"]["losses"]
    assert falls[LABELS["numpy"]] == f"{losses[-1] - losses[0]:.4f}"
    assert falls[LABELS["unfused"]] == "stopped early"
    two = zip(part.results["numpy"]["checks"][:2], (0.5, float("nan")), strict=True)
    checks = [{**check, "value": value} for check, value in two]
    bad = {**part.results["numpy"], "checks": checks, "losses": losses[::-1]}
    markdown = written(tmp_path, with_results(part, python=part.results["python"], numpy=bad))
    assert "3 checks failed." in markdown and markdown.count("FAILS") == 3


def test_an_epoch_is_the_time_of_a_step_times_its_steps(part, tmp_path):
    markdown = written(tmp_path, part)
    steps = -(-part.job.documents // 4)
    rows = table(markdown, f"an epoch ({steps:,} steps)", "a whole training (500 steps)")
    for engine in ("unfused", "python", "numpy"):
        cell = rows[LABELS[engine]][f"an epoch ({steps:,} steps)"]
        unit = {"ms": 1e-3, "s": 1, "min": 60}[cell.split()[1]]
        expected = step_s(part.results[engine]) * steps
        assert as_number(cell) * unit == pytest.approx(expected, rel=0.006)


def test_sizes(part, tmp_path):
    markdown = written(tmp_path, part, sizes=SIZES)
    rows = table(markdown, "weights in fp32 [MB]")
    row = rows["8 / 2 / 1 / 8"]
    assert (row["parameters"], row["factor"]) == ("1,234", "1.00 x")
    assert as_number(row["weights in fp32 [MB]"]) == pytest.approx(1234 * 4 / 1e6, rel=0.006)
    assert row[f"{LABELS['torch']}: 50 tokens [ms]"] == "250"
    assert row[f"{LABELS['python']}: 50 tokens [ms]"] == "2,500 (extrapolated)"
    assert "extrapolated from 10 tokens" in markdown
    assert r"99/3/1/8: not measured, too \| slow" in markdown


def test_any_engines_make_a_report(part, tmp_path):
    """Every subset of three, and each with an engine that failed."""
    failed = {"engine": "torch", "error": "no | torch: install *it*"}
    for n in range(4):
        for engines in combinations(("unfused", "numpy", "stack"), n):
            results = {e: part.results[e] for e in engines}
            for more in ({}, {"torch": failed}):
                some = with_results(part, **results, **more)
                markdown = written(tmp_path, some)
                tables(markdown)
                report.terminal([some])
                assert (r"no \| torch: install \*it\*" in markdown) == bool(more)
    assert "Sizes" not in markdown
    written(tmp_path)  # nothing at all


def test_the_terminal_has_a_hundred_columns(part):
    error = {"engine": "compiled", "error": "a long reason " * 20}
    shown = report.terminal([part, with_results(part, **part.results, compiled=error)])
    assert max(map(len, shown.splitlines())) <= 100
    for engine, result in part.results.items():
        (line, _) = [x for x in shown.splitlines() if x.startswith(LABELS[engine])]
        assert line.split()[-1] == f"{result['nodes']:,.0f}"
        assert figure(result["peak_bytes"] / 1e6) in line.split()
    assert "a long reason" in shown


# Beside the report -------------------------------------------------------------------------------


def test_tensorboard_holds_every_loss(part, tmp_path):
    runs = tensorboard.write(tmp_path, [part])
    assert {run.name for run in runs} == {f"tiny-{engine}" for engine in part.results}
    for run, (engine, result) in zip(runs, part.results.items(), strict=True):
        events = EventAccumulator(str(run), {"scalars": 0, "tensors": 0}).Reload()
        read = events.Scalars("loss/train")
        assert [e.step for e in read] == list(range(1, result["steps"] + 1))
        assert [e.value for e in read] == [float(np.float32(x)) for x in result["losses"]]
        took = read[-1].wall_time - read[0].wall_time
        assert took == pytest.approx(step_s(result) * (result["steps"] - 1), abs=1e-3)
        assert events.Tags()["scalars"] == ["loss/train"]  # on one chart, alone
        (told,) = events.Tensors("figures")
        told = told.tensor_proto.string_val[0].decode()
        for name, seconds in parts_of_a_step(result).items():
            assert f" {seconds * 1e3:.6g} |" in told.split(f"{name} ms")[1].splitlines()[0]
        assert LABELS[engine].split(",")[0] in told and f"{result['nodes']:.6g}" in told


def test_plots_are_pictures_of_the_engines(part, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    lone = replace(part, job=replace(part.job, name="lone"), results={
        "numpy": part.results["numpy"], "torch": {"engine": "torch", "error": "none"}})  # fmt: skip
    files = plots.draw(tmp_path, [part, lone, with_results(part)])
    names = ["losses-tiny", "losses-lone", "speed", "memory", "overview"]
    assert [file.name for file in files] == [f"{name}.png" for name in names]
    for file in files:
        pixels = (image.imread(file)[..., :3] * 255).round().astype(int)
        shown = {"numpy"} if "lone" in file.name else set(part.proper)
        for engine in shown - ({"unfused"} if "losses" in file.name else set()):
            colour = [int(plots.COLOURS[engine][i : i + 2], 16) for i in (1, 3, 5)]
            assert (abs(pixels - colour).max(-1) <= 2).sum() > 50, (file.name, engine)
    assert struct.unpack(">II", (tmp_path / "overview.png").read_bytes()[16:24]) == (1600, 500)
    markdown = written(tmp_path, part, lone)
    assert re.findall(r"^!\[.*\]\((.*)\)$", markdown, re.MULTILINE) == [
        "overview.png", "losses-tiny.png", "losses-lone.png", "speed.png", "memory.png",
    ]  # fmt: skip


def test_report_has_the_counts_of_code_size(part, tmp_path):
    rows = table(written(tmp_path, part), LABELS["unfused"], row="lines of code")
    assert rows["lines of code"][LABELS["numpy"]] == f"{code_size.counted('numpy')[1]:,}"
    assert rows["packages to install"][LABELS["python"]] == "0"
    assert as_number(rows["installed [MB]"][LABELS["numpy"]]) == pytest.approx(
        code_size.dependencies("numpy")[0][2] / 1e6, rel=0.006
    )
