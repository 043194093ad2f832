"""examples/microgpt.py: number for number what microGPT prints, on a file of our own."""

import os
import random
import subprocess
import sys

import pytest

from tests.helpers import ROOT, run

SCRIPT = "examples/microgpt.py"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """200 made-up names, as microGPT reads them."""
    dice, file = random.Random(5), tmp_path_factory.mktemp("names") / "names.txt"
    words = ["".join(dice.choices("aeioulmnrst", k=dice.randrange(2, 9))) for _ in range(200)]
    file.write_text("\n".join(words) + "\n\n")
    return file


def test_both_engines_print_the_same(names, tmp_path):
    outputs = [
        run(SCRIPT, "--names", names, "--steps", 60, "--engine", engine, cwd=tmp_path)
        for engine in ("python", "numpy")
    ]
    told = [o.stdout.split("--- graph ---")[0] for o in outputs]
    assert [o.returncode for o in outputs] == [0, 0], outputs[0].stderr + outputs[1].stderr
    assert told[0] == told[1]
    lines = told[0].splitlines()
    assert lines[:3] == ["num docs: 200", "vocab size: 12", "num params: 3712"]
    assert lines[3].startswith("step    1 /   60 | loss 2.4")  # ln(12) = 2.48
    assert len([line for line in lines if line.startswith("sample ")]) == 20
    assert "nodes a step" in outputs[0].stdout.splitlines()[-1]


def test_the_random_stream_is_that_of_microgpt(names):
    """Shuffle, then Gaussian weights matrix by matrix: written down again, independently."""
    code = f"""
import random, sys
sys.argv = ["microgpt.py"]
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "examples")!r}]
import microgpt
random.seed(42)
weights = microgpt.initial_weights(12)
random.seed(42)
for name, rows, columns in (
    ("embed.weight", 12, 16), ("pos_encoding", 16, 16), ("output.weight", 12, 16),
    ("layers.0.self_attn.W_q.weight", 16, 16), ("layers.0.self_attn.W_k.weight", 16, 16),
    ("layers.0.self_attn.W_v.weight", 16, 16), ("layers.0.self_attn.W_o.weight", 16, 16),
    ("layers.0.feed_forward.linear1.weight", 64, 16),
    ("layers.0.feed_forward.linear2.weight", 16, 64),
):
    assert weights[name] == [[random.gauss(0, 0.08) for _ in range(columns)] for _ in range(rows)]
assert not {{"numpy", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


def test_bad_input_is_told_in_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for arguments, said in (
        (["--names", "nowhere.txt"], "nowhere.txt"),
        (["--names", "empty.txt"], "no names"),
        (["--names", "empty.txt", "--steps", "0"], "--steps"),
    ):
        result = run(SCRIPT, *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert said in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
