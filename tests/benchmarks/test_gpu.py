"""The script of benchmarks/gpu: whole on a CPU, cut off, and with steps that hang or fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import plan, report, runner
from benchmarks.gpu.runner import Bench, Step, Stop, run_plan
from common.errors import UserError
from tests.helpers import ROOT, TEXT

SLEEP = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(600)"]


def script(out: Path, *more) -> subprocess.Popen:
    """The script with small sizes; all of its processes have `out` in their environment."""
    out.mkdir()
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(out)}
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--tiny", "--out", out / "found"]
    return subprocess.Popen(
        [*map(str, command), *more], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def left(folder: Path) -> list[str]:
    """The command lines of processes that have this folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:  # it has ended, or is another's
            continue
    return found


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path):
    process = script(tmp_path / "a", "--shakespeare", str(TEXT))
    said, _ = process.communicate()
    results = read(tmp_path / "a" / "found")
    wrong = {
        (step["name"], name): part
        for step in results["steps"]
        for name, part in step["parts"].items()
        if not (part["status"] == "ok" or (part["status"] == "skipped" and part["why"]))
    }
    assert not wrong and process.returncode == 0 and results["status"] == "done", (wrong, said)
    assert [step["name"] for step in results["steps"]] == [step.name for step in plan.plan(False)]
    steps = {step["name"]: step["parts"] for step in results["steps"]}
    losses = steps["checks"]["losses"]["found"]
    assert len(losses["curves"]["bf16"]) == 40 and losses["first"] == 0.0
    assert steps["checks"]["ctrl-c"]["found"]["ok"]
    assert steps["ceilings"]["ceilings"]["found"]["attention"]["MATH"]["both_ms"] > 0
    compiled = steps["throughput"]["ours-compiled"]["found"]
    assert len(compiled["turns"]) == 2 and all(
        t["tokens_per_second"] > 0 for t in compiled["turns"]
    )
    assert set(compiled["parts_ms"]) == {"forward", "loss", "backward", "optimizer"}
    assert min(compiled["parts_ms"].values()) > 0 and compiled["longest"]
    whole = steps["whole run"]["train.py"]["found"]
    assert whole["epochs"] > 2 and whole["resumed_to"] == whole["steps"] + 2
    assert whole["generated"] and whole["estimated_memory"] > 0
    assert steps["small models"]["muon, eager"]["found"]["turns"]
    assert len(steps["shakespeare"]["shakespeare"]["found"]["evaluated"]) == 2
    assert sorted(f.name for f in (tmp_path / "a" / "found").iterdir()) == [
        "log.txt", "results.json",
    ]  # fmt: skip
    assert "step 40/40" in (tmp_path / "a" / "found" / "log.txt").read_text()
    # the figures of so small a run are of no use, but they have the form that the report reads
    text = json.dumps(vars(report.of(results)))
    assert "the longest kernels" in text and "estimated by tools.preflight" in text
    assert str(tmp_path) not in results["command"] and left(tmp_path / "a") == []


def test_a_cut_off_leaves_what_was_found_and_no_process(tmp_path):
    out = tmp_path / "b" / "found"
    process = script(tmp_path / "b")
    began = time.monotonic()
    while time.monotonic() - began < 120:
        if out.exists() and (out / "results.json").exists() and len(left(tmp_path / "b")) > 4:
            results = read(out)
            if results["steps"][-1]["name"] == "checks":
                break
        time.sleep(0.1)
    assert len(left(tmp_path / "b")) > 4  # several at work
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    results = read(out)
    assert results["status"] == "cut off in checks"
    assert [step["status"] for step in results["steps"]] == ["ok", "cut off (KeyboardInterrupt)"]
    assert results["steps"][0]["parts"]["first"]["found"]["losses"]
    time.sleep(0.5)
    assert left(tmp_path / "b") == []
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["found"]  # nothing temporary either


# The clock ----------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    return Bench(tmp_path / "out", tmp_path / "scratch", "cpu", True)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_step_over_its_limit_is_killed_and_the_rest_goes_on(bench):
    def hangs(bench):
        child = f"import subprocess; print('{{\"a\": 1}}', flush=True); subprocess.run({SLEEP})"
        bench.together({"hangs": [python(child)], "other": [python("print('{\"b\": 2}')")]})

    steps = [
        Step("slow", 0, 2, hangs),
        Step("next", 2, 5, lambda b: b.alone("quick", python("print('{\"c\": 3}')"))),
    ]
    assert run_plan(bench, steps) == 1
    results = read(bench.out)
    slow, after = results["steps"]
    assert slow["status"] == "failed" and after["status"] == "ok"
    assert slow["parts"]["hangs"]["status"] == "killed"
    assert slow["parts"]["hangs"]["found"] == {"a": 1}  # what it had found by then is kept
    assert slow["parts"]["hangs"]["last_lines"] == ['{"a": 1}', "began"]
    assert slow["parts"]["other"] == {"status": "ok", "seconds": pytest.approx(1, abs=1),
                                      "found": {"b": 2}}  # fmt: skip
    assert left(bench.scratch) == []


def test_failures_are_told_and_later_ones_go_on(bench):
    def broken(bench):
        bench.alone("fails", python("import sys; print('why'); sys.exit(3)"))
        bench.alone("is wrong", python("print('{\"ok\": false}')"))
        raise KeyError("a mistake in the script")

    def last(bench):
        bench.skip("all of it", "no reason")

    assert run_plan(bench, [Step("broken", 0, 9, broken), Step("last", 9, 9, last)]) == 1
    broken, last = read(bench.out)["steps"]
    parts = broken["parts"]
    assert parts["fails"]["why"] == "ended with status 3"
    assert parts["fails"]["last_lines"] == ["why"]
    assert parts["is wrong"]["status"] == "failed"
    assert "a mistake" in parts["the step itself"]["why"] and broken["status"] == "failed"
    assert last["status"] == "skipped" and last["why"] == "no reason"


def test_a_step_without_time_is_skipped_and_a_needed_one_ends_the_script(bench):
    bench.seconds = 10

    def never(bench):
        raise AssertionError

    assert run_plan(bench, [Step("long", 0, 30, never)]) == 0
    assert "only 10 s of 10 left" in read(bench.out)["steps"][0]["why"]

    def needed(bench):
        raise Stop("nothing works")

    assert run_plan(bench, [Step("first", 0, 2, needed), Step("long", 0, 2, never)]) == 1
    assert read(bench.out)["status"] == "stopped: nothing works"
    assert len(read(bench.out)["steps"]) == 1


def test_turns_are_taken_and_a_side_that_dies_keeps_those_it_had(bench):
    side = "import sys\nprint('{\"ready\": 1}', flush=True)\nfor n, line in enumerate(sys.stdin):\n"
    good = python(side + " print('{\"tokens_per_second\": %s}' % line.strip(), flush=True)")
    dies = python(side + " assert n < 1\n print('{\"tokens_per_second\": 5}', flush=True)")
    bench.tiny = False
    step = Step("turns", 0, 9, lambda b: b.in_turns({"good": good, "dies": dies}, 3, 0.5))
    assert run_plan(bench, [step]) == 1
    parts = read(bench.out)["steps"][0]["parts"]
    assert parts["good"]["found"] == {"ready": 1, "turns": [{"tokens_per_second": 0.5}] * 3}
    assert parts["dies"]["found"]["turns"] == [{"tokens_per_second": 5}]
    assert "AssertionError" in parts["dies"]["last_lines"][-1]


def test_the_log_is_bounded(bench, monkeypatch):
    monkeypatch.setattr(runner, "LOG_BYTES", 5000)
    monkeypatch.setattr(runner, "LOG_OF_A_PROCESS", 1000)
    talks = python("print('a' * 90000 + 'end')")
    run_plan(bench, [Step("talks", 0, 9, lambda b: [b.alone(str(n), talks) for n in range(9)])])
    log = (bench.out / "log.txt").read_bytes()
    assert len(log) == 5000 and b"end" in log


def test_a_missing_package_is_named(bench, monkeypatch):
    assert {"torch", "tyro", "pydantic", "tensorboard"} <= set(plan.requirements())
    assert plan.missing(plan.requirements()) == []
    monkeypatch.setattr(plan, "requirements", lambda *extras: ["torch", "no_such_a", "no_such_b"])
    assert run_plan(bench, [Step("first", 0, 9, plan.first)]) == 1
    assert "missing packages: no_such_a no_such_b;" in read(bench.out)["status"]


# What is made of it -------------------------------------------------------------------------------


def of_a_gpu() -> dict:
    """A results.json as a GPU would give it; the figures are made up."""

    def turns(speed):
        return {"turns": [{"tokens_per_second": speed * f, "peak_memory": 2e10} for f in (1, 1, 9)],
                "flops_per_token": 854_650_000, "ready_after_seconds": 30.0}  # fmt: skip

    def step(name, **parts):
        return {"name": name, "status": "ok", "parts": {
            name: {"status": "ok", "found": found}
            for name, found in parts.items()}}  # fmt: skip

    throughput = {"ours-compiled": turns(600_000), "nanogpt": turns(500_000)}
    profile = {"parts_ms": {"forward": 1.0, "backward": 3.0}, "launches": 300.0,
               "device_ms_a_step": 4.0,
               "longest": [{"name": "a|b", "ms_a_step": 1.0, "calls_a_step": 12.0}]}  # fmt: skip
    throughput["ours-compiled"] |= profile
    small = {f"muon, {w}": {"turns": [{"tokens_per_second": 9.0}], "launches": n, "notes": ["x"]}
             for w, n in (("eager", 900.0), ("compiled", 200.0))}  # fmt: skip
    generation = {"ours, top_k 50": {"1": 1500.0, "16": 9000.0, "first call 1": 2.0},
                  "transformers, top_k 50": {"1": 100.0, "16": 4000.0}}  # fmt: skip
    return {
        "status": "done", "seconds": 500.0, "tiny": False, "command": "bash benchmarks/gpu.sh",
        "date": "2026-12-01", "machine": {"accelerator": "NVIDIA H200", "python": "3.12"},
        "steps": [
            step("throughput", **throughput),
            step("generation", **generation), step("small models", **small),
            step("shakespeare", shakespeare={"evaluated": [[200, 1.6], [400, 1.46]],
                                             "seconds_of_all": 9.0, "step": 400, "seconds": 8.0,
                                             "seconds_since_the_start_of_the_process": 40.0}),
            {"name": "whole run", "status": "skipped", "why": "no time", "parts": {}},
        ],
    }  # fmt: skip


def test_the_report_has_the_bars_and_what_was_skipped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(of_a_gpu()))
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path / "made")
    report.report(file)
    text = capsys.readouterr().out
    made = json.loads((tmp_path / "made" / "nvidia-h200" / "gpu.json").read_text())
    assert made["command"] == "bash benchmarks/gpu.sh" and made["date"] == "2026-12-01"
    assert made["machine"]["accelerator"] == "NVIDIA H200"
    claims = {
        claim["claim"]: (round(claim["measured"], 3), claim["met"]) for claim in made["claims"]
    }
    assert claims == {
        "124 M, share of 989 TFLOP/s": (0.518, True),
        "124 M, over nanoGPT compiled, micro-batch 16": (1.2, True),
        "124 M, over nanoGPT compiled, the best micro-batch of each": (1.2, True),
        "generating, top_k 50, batch 1": (1500.0, True),
        "generating, top_k 50, batch 1, over the better transformers": (15.0, True),
        "generating, top_k 50, batch 16, over the better transformers": (2.25, False),
        "muon, compiled, launches a step over eager's": (0.222, True),
        "seconds of training to a validation loss of 1.4697": (8.0, True),
        "seconds of training to a validation loss of 1.4697, with start-up, compiling, "
        "evaluating and saving": (40.0, True),
    }  # fmt: skip
    assert "| whole run |  | skipped | no time |" in text and "`a/b`" in text
    assert "backward 75%" in text


@pytest.mark.parametrize("kept", range(6))
def test_the_report_of_a_part_of_it_needs_no_more(kept):
    results = of_a_gpu()
    results["steps"] = results["steps"][:kept]
    assert report.of(results).tables


def test_the_report_of_the_larger_batch_alone():
    results = of_a_gpu()
    results["steps"][0]["name"] = "throughput, larger"
    assert "854.65 MFLOP a token" in report.of(results).tables[0]["note"]


def test_a_file_that_is_none_or_of_a_tiny_run_is_refused(tmp_path):
    file = tmp_path / "results.json"
    for content in ("{", "[]", "{}", '{"steps": 1}', '{"steps": [], "tiny": true}'):
        file.write_text(content)
        with pytest.raises(UserError, match="--report"):
            report.read(file)


def test_a_wrong_path_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--nanogpt", "no/such"], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "--nanogpt no/such: there is no model.py" in done.stderr
