"""--compile: where the machine has no compiler the run goes on without, and says so."""

import os

from tests.helpers import losses, run, write_config


def test_without_a_compiler_the_run_goes_on(tmp_path, monkeypatch):
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--max_steps", "6"]
    for name in ("CC", "CXX"):
        monkeypatch.setitem(os.environ, name, str(tmp_path / "no-such-compiler"))
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = run("train.py", *flags, "--name", "plain", cwd=tmp_path)
    compiled = run("train.py", *flags, "--name", "compiled", "--compile", cwd=tmp_path)
    assert plain.returncode == compiled.returncode == 0, compiled.stderr
    said = [line for line in compiled.stdout.splitlines() if line.startswith("compile:")]
    assert len(said) == 2
    assert "continuing without it" in said[1]
    assert "Traceback" not in compiled.stdout + compiled.stderr
    assert losses(tmp_path / "runs/compiled") == losses(tmp_path / "runs/plain")
