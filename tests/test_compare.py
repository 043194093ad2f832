"""compare.py as people run it: engines in processes of their own, and a report of what they did."""

import json
import signal
import subprocess
import time

import pytest

from compare import Data, choose_data
from tests.helpers import TINY, command, refused, run, write_config
from training.config import load

LINES = TINY.replace('tokenizer = "char"', 'kind = "lines"\ntokenizer = "char"')
for before, after in (
    ("d_model = 32", "d_model = 8"),
    ("d_ff = 64", "d_ff = 16"),
    ("n_layers = 2", "n_layers = 1"),
    ("batch_size = 8", "batch_size = 2"),
):
    assert before in LINES  # plain Python, with a node for each + and *, takes part
    LINES = LINES.replace(before, after)
STEPS = 4


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three engines and both controls on a tiny model."""
    folder = tmp_path_factory.mktemp("compare")
    text = folder / "words.txt"
    text.write_text("\n".join(f"{a}{b}ing" for a in "bcdfghklmnprst" for b in ("a", "e", "ou")))
    config = write_config(folder, text, LINES)
    engines = ("unfused", "python", "numpy", "torch", "random", "stack")
    result = run(
        "compare.py", "--config", config, "--steps", STEPS, "--name", "it", "--engines", *engines,
        cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, config, result


def results(folder):
    """What each engine found, by name."""
    files = sorted((folder / "runs" / "it" / "tiny").glob("*.json"))
    return {f.stem: json.loads(f.read_text()) for f in files if f.stem != "job"}


def test_all_engines_have_the_same_losses_and_gradients(compared):
    found = results(compared[0])
    assert set(found) == {"unfused", "python", "numpy", "torch", "random", "stack"}
    proper = [found[e]["losses"] for e in ("unfused", "python", "numpy", "torch")]
    for losses in proper:
        assert losses == pytest.approx(proper[0], abs=1e-12)
        assert len(set(losses)) == STEPS
    assert found["stack"]["losses"][0] == pytest.approx(proper[0][0], abs=1e-12)
    assert found["stack"]["losses"][-1] != pytest.approx(proper[0][-1], abs=1e-6)
    samples = [found[e]["samples"] for e in ("unfused", "python", "numpy", "torch")]
    assert samples.count(samples[0]) == 4 and any(samples[0])
    checks = found["numpy"]["checks"] + found["python"]["checks"] + found["torch"]["checks"]
    assert all(check["value"] <= check["limit"] for check in checks)


def test_an_engine_imports_no_more_than_it_needs(compared):
    found = results(compared[0])
    assert found["python"]["imported"] == found["unfused"]["imported"] == []
    assert found["numpy"]["imported"] == ["numpy"]
    assert found["python"]["peak_bytes"] < found["torch"]["peak_bytes"] / 3


def test_the_report_and_what_lies_beside_it(compared):
    folder, _, result = compared
    report = (folder / "runs" / "it" / "report.md").read_text()
    for engine in ("Python, fused", "NumPy (TorchLite)", "PyTorch, CPU, eager", "stack-order"):
        assert engine in report
        assert engine in result.stdout
    beside = {path.name for path in (folder / "runs" / "it").iterdir()}
    assert {"tiny", "tensorboard", "report.md", "overview.png"} <= beside
    assert "it/report.md" in result.stdout.splitlines()[-1]


def test_bad_input_is_told_in_one_line(compared):
    folder, config, _ = compared
    for arguments, said in (
        (["--config", config, "--name", "it"], "exists already"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--config", config, "--data.path", "nowhere.txt"], "nowhere.txt"),
    ):
        assert said in refused(run("compare.py", *arguments, cwd=folder))
    for arguments, said in (
        (["--steps", "-1"], "steps = -1"),
        (["--name", "../out"], "at most 200 letters"),
        (["--engines", "rust"], "rust"),
    ):
        result = run("compare.py", *arguments, cwd=folder)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert said in result.stderr
    assert not list((folder / "runs").glob("compare-*"))  # nothing is left of what was refused


def test_stopped_in_the_middle_it_reports_what_was_finished(compared):
    folder, config, _ = compared
    engines = ("numpy", "unfused")
    flags = ("--config", config, "--steps", 20_000, "--name", "stopped", "--engines", *engines)
    process = subprocess.Popen(
        command("compare.py", *flags),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    finished = folder / "runs" / "stopped" / "tiny" / "unfused.log"  # numpy stands behind it
    for _ in range(600):
        if finished.exists():
            break
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    report = (folder / "runs" / "stopped" / "report.md").read_text()
    assert "stopped before it" in report


def test_the_kind_of_data_is_the_configurations_its_contents_or_as_given(tmp_path):
    config = load(write_config(tmp_path, text=LINES))
    for name, content, kind, expected in (
        ("a.txt", "a\nb", "auto", "lines"),
        ("a.jsonl.txt", '{"prompt": "p", "completion": "c"}', "auto", "auto"),
        ("a.csv", "a,b", "auto", "auto"),  # and so refused
        ("a.csv", "a,b", "lines", "lines"),
    ):
        (tmp_path / name).write_text(content)
        data = choose_data(config, Data(str(tmp_path / name), kind=kind)).data
        assert (data.path, data.kind) == (str(tmp_path / name), expected)
