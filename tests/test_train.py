"""train.py as people run it: in processes of its own, stopped, killed and resumed."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint.reader import Checkpoint, list_steps, read_best, step_path
from common.files import checksummed_json, hash_file, read_checksummed_json
from data.batches import ORDER
from data.prepared.building import LAYOUT
from tests.helpers import ROOT, command, losses, metrics, refused, run, write_config
from training.resume import find_resume
from training.tensorboard_files import find_difference

GOLDEN = ROOT / "tests" / "golden" / "losses.json"


def last_files(run_folder: Path) -> dict[str, bytes]:
    """Weights and optimizer state of the newest checkpoint."""
    checkpoint = Checkpoint(list_steps(run_folder)[-1]).verify()
    return {n: checkpoint.read(n) for n in ("model.safetensors", "optimizer.safetensors")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the configuration, the cache and an uninterrupted run called `straight`."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    result = run("train.py", "--config", "tiny.toml", "--name", "straight", cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder


def test_what_a_person_sees(home):
    output = (home / "output.txt").read_text()
    for stage in ("device:", "reading", "tokenizer:", "tokens:", "data:", "model:"):
        assert stage in output, stage
    for line in ("step 1/40: loss", "saved runs/straight/checkpoints/step_00000040"):
        assert line in output, line
    assert re.search(r"best validation loss \d\.\d+ at step \d+", output)
    for command_line in ("tensorboard --logdir", "python generate.py", "python train.py --resume"):
        assert command_line in output


def test_the_golden_loss_curve(home):
    """The losses that this text, this seed and this model gave when they were first right."""
    found = {
        f"{kind} {step}": loss for (kind, step), loss in losses(home / "runs/straight").items()
    }
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for key, loss in golden.items():
        assert found[key] == pytest.approx(loss, rel=1e-3), key
    assert golden["loss/train 40"] < golden["loss/train 1"] - 0.7


def test_the_run_folder(home):
    folder = home / "runs" / "straight"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.jsonl", "tensorboard"}
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["kind"] == "stream"  # resolved
    assert config["model"]["vocab_size"] > 30
    newest = list_steps(folder)[-1]
    assert {p.name for p in newest.iterdir()} == {
        "MANIFEST.json", "config.json", "model.safetensors", "optimizer.safetensors",
        "state.json", "tokenizer.json",
    }  # fmt: skip
    assert Checkpoint(newest).state["step"] == 40
    assert Checkpoint(newest).state["order"] == ORDER  # a resume keeps it, whatever comes to be new
    assert read_best(folder)["step"] in (20, 40)


def test_tensorboard_holds_what_metrics_jsonl_holds(home):
    folder = home / "runs" / "straight"
    board = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    for tag in ("loss/train", "loss/val", "lr", "grad_norm", "speed/tokens_per_second"):
        shown = {(e.step, np.float32(e.value)) for e in board.Scalars(tag)}
        logged = {(r["step"], np.float32(r[tag])) for r in metrics(folder) if tag in r}
        assert shown == logged, tag
    scalars = set(board.Tags()["scalars"])
    assert {"time/data", "time/forward", "time/backward", "time/optimizer"} <= scalars
    assert {"perplexity/val", "bits_per_byte/val", "speed/mfu", "memory/megabytes"} <= scalars
    assert set(board.Tags()["images"]) == {"attention", "positional encoding"}
    tensors = set(board.Tags()["tensors"])
    assert {"configuration/text_summary", "samples/text_summary"} <= tensors
    machine = (
        board.Tensors("configuration/machine/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    versions = Checkpoint(list_steps(folder)[-1]).state["versions"]
    assert {f"{key}: {value}" for key, value in versions.items()} == {
        line.strip() for line in machine.splitlines() if line
    }
    assert "custom_scalars__config__" in tensors
    assert board.PluginTagToContent("hparams").keys() == {
        "_hparams_/experiment", "_hparams_/session_start_info",
    }  # fmt: skip
    assert {p.name for p in (folder / "tensorboard").iterdir() if p.is_dir()} == set()


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "muon")])
def test_killed_and_resumed_is_the_same_bit_for_bit(home, precision, optimizer):
    """SIGKILL at a random moment, twice; then every loss and the weights as if nothing happened.

    Dropout and accumulation are on; 40 steps are more than two epochs of this text.
    """
    name, straight, dice = f"killed-{optimizer}", "straight", random.Random(precision)
    numbers = ["--precision", precision, "--optimizer.name", optimizer]
    if optimizer != "adamw":
        straight = f"straight-{optimizer}"
        result = run("train.py", "--config", "tiny.toml", "--name", straight, *numbers, cwd=home)
        assert result.returncode == 0, result.stderr
    flags = ["--config", "tiny.toml", "--name", name, *numbers, "--train.save_interval", "3"]
    log = home / "runs" / name / "metrics.jsonl"
    for stop_after in sorted(dice.sample(range(4, 36), 2)):
        resume = ["--resume"] if log.exists() else []
        process = subprocess.Popen(
            command("train.py", *flags, *resume), cwd=home, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if log.exists() and len(log.read_bytes().splitlines()) >= stop_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    result = run("train.py", *flags, "--resume", cwd=home)
    assert result.returncode == 0, result.stderr
    assert f"resuming {Path('runs') / name} from step" in result.stdout
    assert losses(home / "runs" / name) == losses(home / "runs" / straight)
    assert last_files(home / "runs" / name) == last_files(home / "runs" / straight)
    board = EventAccumulator(str(home / "runs" / name / "tensorboard"), {"scalars": 0})
    board.Reload()
    for tag in ("loss/train", "loss/val"):
        steps = [e.step for e in board.Scalars(tag)]
        assert steps == sorted({s for t, s in losses(home / "runs" / name) if t == tag}), tag


def test_other_intervals_change_nothing(home):
    flags = "--train.eval_interval 7 --train.log_interval 4 --train.save_interval 5 --train.keep 1"
    flags += " --train.histogram_interval 3 --sample.max_new_tokens 3 --sample.temperature 0.5"
    result = run("train.py", "--config", "tiny.toml", "--name", "often", *flags.split(), cwd=home)
    assert result.returncode == 0, result.stderr
    assert last_files(home / "runs/often") == last_files(home / "runs/straight")
    straight = losses(home / "runs/straight")
    often = losses(home / "runs/often")
    board = EventAccumulator(str(home / "runs/often/tensorboard"), {"histograms": 0})
    board.Reload()
    histograms = set(board.Tags()["histograms"])
    assert {"weights/embed.weight", "gradients/layers.0.self_attn.W_q.weight"} <= histograms
    shared = straight.keys() & often.keys()
    assert len(shared) > 10
    assert all(straight[key] == often[key] for key in shared)


@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGINT)])
def test_a_signal_saves_and_leaves(home, number):
    name = f"signalled-{number.name}"
    flags = ["--config", "tiny.toml", "--name", name, "--max_steps", "100000"]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=subprocess.PIPE, text=True
    )
    log = home / "runs" / name / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) >= 5):
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    step = max(r["step"] for r in metrics(home / "runs" / name))
    checkpoint = Checkpoint(list_steps(home / "runs" / name)[-1]).verify()
    assert checkpoint.step == step
    assert f"step_{step:08d}" in output
    assert not (home / "runs" / name / ".owner").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_that_closes_saves_and_leaves(home):
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    flags = ["--config", "tiny.toml", "--name", "closed", "--max_steps", "100000"]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=follower, stderr=follower, stdin=follower,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    os.set_blocking(leader, False)
    log = home / "runs" / "closed" / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) >= 5):
        with contextlib.suppress(BlockingIOError):
            os.read(leader, 4096)
        time.sleep(0.005)
        assert process.poll() is None
    os.close(leader)  # the kernel sends SIGHUP, and what is written from now on fails
    assert process.wait(timeout=20) == 128 + signal.SIGHUP
    step = max(r["step"] for r in metrics(home / "runs" / "closed"))
    assert Checkpoint(list_steps(home / "runs" / "closed")[-1]).verify().step == step
    assert not (home / "runs" / "closed" / ".owner").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows renames no folder in which a file is open")
def test_a_run_whose_folder_is_renamed_and_then_removed_is_saved_whole(home):
    flags = ["--config", "tiny.toml", "--name", "moving", "--max_steps", 100_000]
    flags += ["--train.save_interval", 100, "--train.eval_interval", 100]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=subprocess.PIPE, text=True
    )

    def wait_for(text: str):
        while text not in (line := process.stdout.readline()):
            assert line, f"ended before it said {text!r}"

    wait_for("saved runs/moving/checkpoints/step_00000100")
    (home / "runs" / "moving").rename(home / "runs" / "moved")
    wait_for("runs/moving: renamed or removed while it trains; the run is now in runs/moved")
    wait_for("saved runs/moved/")
    wait_for("validation loss")  # before best.json is written, the folder cannot be removed whole
    shutil.rmtree(home / "runs" / "moved")
    wait_for("runs/moved: renamed or removed while it trains; the run is now in runs/moved")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    folder = home / "runs" / "moved"
    assert not list((home / "runs").glob("moving*")) and not (folder / ".owner").exists()
    newest = Checkpoint(list_steps(folder)[-1]).verify()
    assert str(newest.path.relative_to(home)) in output
    trained = {step for kind, step in losses(folder) if kind == "loss/train"}
    assert trained == set(range(1, newest.step + 1)), "also what was logged before"
    assert json.loads((folder / "config.json").read_text()) == newest.config
    assert find_difference(folder / "tensorboard", metrics(folder)) == ""
    assert find_resume(home / "runs", str(folder), "", print)[1].step == newest.step


def test_resume_refuses_what_would_change_the_run(home):
    def resume(*flags):
        return refused(run("train.py", "--resume", "--name", "straight", *flags, cwd=home))

    assert "model.d_ff 64 -> 128: the model would change" in resume("--model.d_ff", 128)
    assert "seed 7 -> 8" in resume("--seed", 8)
    assert "--extend allows it" in resume("--max_steps", 80)
    other = home / "other.txt"
    other.write_text("another text, long enough for a few windows " * 20)
    assert "use --init_from" in resume("--data.path", other, "--max_steps", 80, "--extend")
    assert "no such checkpoint or run" in refused(run("train.py", "--resume", "nowhere", cwd=home))
    assert "--name '../runs/straight'" in refused(
        run("train.py", "--resume", "--name", "../runs/straight", cwd=home)
    )
    incomplete = home / "incomplete" / "checkpoints" / "step_00000040"
    shutil.copytree(home / "runs/straight/checkpoints/step_00000040", incomplete)
    (incomplete / "state.json").unlink()
    assert "state.json" in refused(run("train.py", "--resume", incomplete, cwd=home))
    (incomplete / "MANIFEST.json").write_bytes(checksummed_json({"format": 99, "files": {}}))
    assert "format 99" in refused(run("train.py", "--resume", incomplete, cwd=home))
    assert "format 99" in refused(run("generate.py", "--checkpoint", incomplete, cwd=home))


def test_finished_extended_and_forked(home):
    result = run("train.py", "--resume", "--name", "straight", cwd=home)
    assert result.returncode == 0
    assert "finished at step 40" in result.stdout
    fork = ["--resume", "runs/straight/checkpoints/step_00000020", "--name", "fork"]
    result = run("train.py", *fork, "--optimizer.weight_decay", "0.2", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "changed: optimizer.weight_decay: 0.1 -> 0.2" in result.stdout
    assert "a new run" in result.stdout
    assert min(step for _, step in losses(home / "runs/fork")) >= 20
    longer = ["--resume", "runs/fork", "--extend", "--max_steps", "50"]
    result = run("train.py", *longer, cwd=home)
    assert result.returncode == 0, result.stderr
    assert Checkpoint(list_steps(home / "runs/fork")[-1]).step == 50


def test_a_resume_from_another_folder_finds_its_data_and_knows_if_it_has_changed(home, tmp_path):
    data, there = home / "moved" / "text.txt", home / "moved" / "runs" / "it"
    data.parent.mkdir()
    data.write_text("The lamp burned all night over the dark water. " * 60)
    flags = ["--config", home / "tiny.toml", "--name", "it", "--max_steps", 2]
    flags += ["--data.path", "text.txt", "--data.cache_dir", "cache"]
    result = run("train.py", *flags, cwd=data.parent)
    assert result.returncode == 0, result.stderr
    resume = ["--resume", there, "--extend", "--max_steps"]
    result = run("train.py", *resume, 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"data.path: {data}, relative to where the run was started" in result.stdout
    assert not (tmp_path / "cache").exists()
    assert run("train.py", *resume, 4, cwd=home).returncode == 0  # from a third folder
    data.write_text(data.read_text() + "!")
    line = refused(run("train.py", *resume, 5, "--data.cache_dir", "other", cwd=tmp_path))
    assert f"(the content of {data} has changed); use --init_from" in line
    data.parent.joinpath("gone").mkdir()
    data.rename(data.parent / "gone" / "text.txt")
    assert f"data.path = {data}: no such file" in refused(run("train.py", *resume, 5, cwd=home))


def test_init_from_takes_weights_and_tokenizer(home):
    other = home / "new.txt"
    other.write_text("The lamp was lit again on the water. " * 60)
    flags = ["--config", "tiny.toml", "--init_from", "runs/straight", "--data.path", other]
    result = run("train.py", *flags, "--name", "tuned", "--max_steps", "10", cwd=home)
    assert result.returncode == 0, result.stderr
    assert Checkpoint(list_steps(home / "runs/tuned")[-1]).step == 10
    straight = json.loads((home / "runs/straight/config.json").read_text())
    tuned = json.loads((home / "runs/tuned/config.json").read_text())
    assert tuned["model"]["vocab_size"] == straight["model"]["vocab_size"]
    first = losses(home / "runs/tuned")["loss/train", 1]
    assert first < losses(home / "runs/straight")["loss/train", 1] - 0.3
    result = run("train.py", "--resume", "--name", "tuned", "--extend", "--max_steps", 12, cwd=home)
    assert result.returncode == 0, result.stderr


def test_a_second_process_on_the_same_run_is_refused(home):
    flags = ["--config", "tiny.toml", "--name", "busy", "--max_steps", "100000"]
    flags += ["--train.save_interval", "2"]
    process = subprocess.Popen(command("train.py", *flags), cwd=home, stdout=subprocess.DEVNULL)
    try:
        while not list_steps(home / "runs/busy"):
            time.sleep(0.01)
            assert process.poll() is None
        line = refused(run("train.py", "--resume", "--name", "busy", cwd=home))
        assert f"in use by process {process.pid}" in line
    finally:
        process.kill()
        process.wait()


def test_bad_input_is_one_line(home, tmp_path):
    tiny = ["--config", str(home / "tiny.toml")]

    def says(*flags):
        return refused(run("train.py", *flags, cwd=home))

    assert "did you mean" in says("--config", "tiyn.toml")
    assert "exists; add --resume" in says(*tiny, "--name", "straight")
    assert "--name '../x'" in says(*tiny, "--name", "../x")
    assert "data.path" in says(*tiny, "--data.path", "nowhere.txt")
    (home / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 200)
    assert "latin.txt" in says(*tiny, "--data.path", "latin.txt")
    (home / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert "bad.jsonl:2" in says(*tiny, "--data.path", "bad.jsonl")
    (home / "short.txt").write_text("too short")
    assert "nothing to train on" in says(
        *tiny, "--data.path", "short.txt", "--data.val_fraction", 0
    )
    assert "data.vocab_size" in says(*tiny, "--data.tokenizer", "bpe", "--data.vocab_size", 9000)
    if os.path.exists("/proc"):
        assert "--runs_dir" in says(*tiny, "--runs_dir", "/proc/runs")


def test_a_typo_on_the_command_line_is_answered_with_the_nearest_flag(home):
    result = run("train.py", "--model.d_modle", "64", cwd=home)
    assert result.returncode == 2
    assert "--model.d_model" in result.stderr
    assert "Traceback" not in result.stderr
    result = run("train.py", "--optimizer.lr", "-1", cwd=home)
    assert result.returncode == 2
    assert "lr = -1.0 must be at least 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_cuda_where_there_is_none(home):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    line = refused(run("train.py", "--config", "tiny.toml", "--device", "cuda", cwd=home))
    assert "--device cuda: not on this machine" in line
    assert "--device cpu" in line


def test_print_config_is_a_configuration(home):
    flags = ["--config", "tiny.toml", "--print_config", "--model.n_layers", "5"]
    result = run("train.py", *flags, cwd=home)
    assert result.returncode == 0
    (home / "printed.toml").write_text(result.stdout)
    again = run("train.py", "--config", "printed.toml", "--print_config", cwd=home)
    assert again.stdout == result.stdout
    assert "n_layers = 5" in result.stdout


def test_wrong_flags_are_named_as_they_are_given(home):
    flags = ["--config", "tiny.toml", "--train.keep", 0, "--train.batch_size", 0]
    line = refused(run("train.py", *flags, cwd=home))
    assert "--train.keep = 0 must be" in line and "--train.batch_size = 0 must be" in line
    line = refused(run("train.py", "--config", "tiny.toml", "--precision", "fp8", cwd=home))
    assert line.startswith("train.py: --precision fp8: must be one of 'auto', 'fp32'")
    line = refused(run("train.py", "--config", "tiny.toml", "--train.keep", "x", cwd=home))
    assert "--train.keep: must be a whole number, found 'x'" in line
    flags = ["--config", "tiny.toml", "--init_from", "runs/straight", "--model.d_model", 64]
    line = refused(run("train.py", *flags, cwd=home))
    assert "model.d_model = 64, but the checkpoint has 32; leave such --model.* flags out" in line


def test_both_spellings_of_a_flag_are_one(home):
    flags = ["--config", "tiny.toml", "--init-from=runs/straight", "--runs-dir", "else where"]
    result = run("train.py", *flags, "--name", "hyphens", "--max-steps", 2, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "from the weights of" in result.stdout
    assert "note: optimizer.warmup_steps = 5, but the run has 2 steps; lower it" in result.stdout
    assert list_steps(home / "else where" / "hyphens")
    alone = run("train.py", "--resume", "--runs_dir", "else where", cwd=home)  # the newest there
    assert "else where/hyphens: finished at step 2" in alone.stdout.replace(os.sep, "/")
    commands = re.findall(r"(?:python|tensorboard) .*(?:--logdir|--checkpoint|--resume) .*",
                          result.stdout + alone.stdout)  # fmt: skip
    paths = [shlex.split(c.partition(" --")[2])[1] for c in commands]  # as a shell takes them
    assert len(paths) == 4 and all((home / path).is_dir() for path in paths), commands


def test_killed_between_the_last_save_and_its_evaluation(home):
    name = "last"
    result = run("train.py", "--config", "tiny.toml", "--name", name, "--max_steps", 6, cwd=home)
    assert result.returncode == 0
    folder, whole = home / "runs" / name, losses(home / "runs" / name)
    log = folder / "metrics.jsonl"  # as if the kill had come before the evaluation's record
    log.write_text("".join(f"{json.dumps(r)}\n" for r in metrics(folder) if "loss/val" not in r))
    (folder / "checkpoints" / "best.json").unlink()
    result = run("train.py", "--resume", "--name", name, cwd=home)
    assert result.returncode == 0, result.stderr
    assert losses(folder) == whole
    assert read_best(folder)["step"] == 6
    assert "finished" in run("train.py", "--resume", "--name", name, cwd=home).stdout


def test_a_damaged_newest_step_is_passed_over_and_made_again(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "damaged")
    weights = home / "runs/damaged/checkpoints/step_00000040/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = run("train.py", "--resume", "--name", "damaged", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "skipped: " in result.stdout
    assert "resuming " in result.stdout
    assert last_files(home / "runs/damaged") == last_files(home / "runs/straight")
    assert losses(home / "runs/damaged") == losses(home / "runs/straight")
    assert list((home / "runs/damaged/checkpoints").glob("damaged_*"))


def test_resume_refuses_another_tokenizer(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "scrambled")
    state = Checkpoint(list_steps(home / "runs" / "straight")[-1]).state
    folder = home / "cache" / f"text-{state['data']}-{LAYOUT}"
    cached = folder / "tokenizer.json"
    before, manifest = cached.read_text(), (folder / "manifest.json").read_bytes()
    stored = json.loads(before)  # another character in the last one's place
    cached.write_text(json.dumps({**stored, "characters": stored["characters"][:-1] + "~"}))
    content = read_checksummed_json(folder / "manifest.json")
    content["files"]["tokenizer.json"] = hash_file(cached)
    (folder / "manifest.json").write_bytes(checksummed_json(content))
    flags = ["--resume", "--name", "scrambled", "--extend", "--max_steps", 44]
    try:
        assert "the data differs" in refused(run("train.py", *flags, cwd=home))
    finally:
        cached.write_text(before)
        (folder / "manifest.json").write_bytes(manifest)
    result = run("train.py", *flags, "--precision", "fp64", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "changed: precision: fp32 -> fp64" in result.stdout


def test_a_terminal_that_lacks_characters_and_a_reader_that_leaves(home):
    (home / "accents.txt").write_text("é“☃\x1b[31m " * 300, encoding="utf-8")
    flags = ["--config", "tiny.toml", "--data.path", "accents.txt", "--max_steps", "4"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        command("train.py", *flags, "--name", "ascii"), cwd=home, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    process = subprocess.Popen(
        command("train.py", "--config", "tiny.toml", "--max_steps", 100000, "--name", "pipe"),
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "step 1/" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert "Traceback" not in said
    assert list_steps(home / "runs" / "pipe"), "what was trained is saved"


def test_a_run_that_never_began_leaves_its_name_free(home):
    flags = ["--config", "tiny.toml", "--name", "never", "--max_steps", "3"]
    first = run("train.py", *flags, "--runs_dir", "tiny.toml", cwd=home)
    assert "--runs_dir tiny.toml" in refused(first)
    assert run("train.py", *flags, cwd=home).returncode == 0


def test_a_notebook_reads_a_run(home):
    from model.transformer_full import TransformerDecoder

    model = TransformerDecoder.from_checkpoint(home / "runs" / "straight")
    tokens = model.generate([7, 8, 9], start_id=None, end_id=None, max_len=5, seed=3)
    assert len(tokens) == 5
    assert tokens == model.generate([7, 8, 9], start_id=None, end_id=None, max_len=5, seed=3)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_and_nothing_of_the_libraries(home):
    import pty
    import termios

    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (40, 120))
    flags = ["--config", "tiny.toml", "--name", "terminal"]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=follower, stderr=follower, stdin=follower
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while chunk := os.read(leader, 4096):
            shown += chunk
    os.close(leader)
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"40/40 \[.*<.*step/s.*loss \d\.\d+, [\d,]+ tokens/s", text)
    assert "saved " in text
    assert "warning" not in text.lower()
    assert "sentencepiece" not in text.lower()


def test_a_signal_during_an_evaluation_is_answered_in_it_and_it_is_done_again(home):
    (home / "long.txt").write_text("The lamp burned all night over the dark water. " * 3000)
    flags = ["--config", "tiny.toml", "--data.path", "long.txt", "--data.val_fraction", "0.5"]
    flags += ["--name", "evaluating", "--max_steps", "2", "--train.batch_size", "1"]
    process = subprocess.Popen(
        command("train.py", *flags, "--train.accumulation_steps", "1"), cwd=home,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while not step_path(home / "runs" / "evaluating", 2).exists():  # it is told when it is over
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "saved runs/evaluating/checkpoints/step_00000002\n" in output
    assert Checkpoint(list_steps(home / "runs" / "evaluating")[-1]).step == 2
    assert ("loss/val", 2) not in losses(home / "runs" / "evaluating")
    result = run("train.py", "--resume", "--name", "evaluating", cwd=home)
    assert result.returncode == 0, result.stderr
    assert ("loss/val", 2) in losses(home / "runs" / "evaluating")
