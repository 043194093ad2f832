"""benchmarks/results/MACHINE/gpu.json from what the script found.

A part that is not there, was skipped or failed has no figures, and no bar that it could meet.
"""

import json
import statistics
from pathlib import Path

from benchmarks.harness import Result
from common.cuda import datasheet_flops
from common.errors import UserError

SHARE, TOKENS = 0.45, 520_000  # of such a rate; tokens/s, which are it of 989 TFLOP/s
SAME, BEST = 1.1, 1.2  # times nanoGPT at the same micro-batch, and the best of each side
GENERATED, TIMES = 1200, 3.0  # tokens/s at batch 1; times transformers
LAUNCHES = 1 / 3  # of eager's
LOSS, SECONDS = 1.4697, 60  # nanoGPT's published one; of training to it
NAMES = {
    "ours-compiled": "**Triptych, compiled**", "ours-eager": "**Triptych, eager**",
    "nanogpt": "nanoGPT, compiled",
}  # fmt: skip


def report(file: Path):
    """Writes and prints the benchmark."""
    result = of(read(file))
    result.finish()


def read(file: Path) -> dict:
    """A results.json. Raises UserError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found["steps"], list):
            raise ValueError("steps is no list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--report {file}: not a results.json ({error}); give another") from None
    if found.get("tiny"):
        raise UserError(f"--report {file}: of a run with --tiny; give one of a GPU")
    return found


def of(found: dict) -> Result:
    """The benchmark."""
    result = Result("gpu", "On a GPU")
    result.command, result.date = found.get("command", ""), found.get("date", "")
    result.machine = found.get("machine", {})
    steps = {step["name"]: step for step in found["steps"]}
    rate = datasheet_flops(result.machine.get("accelerator", ""), "bf16") or None
    measured = figures(steps, "ceilings", "ceilings").get("product_8192")
    speeds = training(result, steps, rate, measured)
    training_claims(result, speeds, steps, rate)
    profile(result, figures(steps, "throughput", "ours-compiled"))
    ceilings(result, figures(steps, "ceilings", "ceilings"))
    generation(result, steps)
    whole_run(result, figures(steps, "whole run", "train.py"))
    small_models(result, steps)
    shakespeare(result, figures(steps, "shakespeare", "shakespeare"))
    what_ran(result, found)
    return result


def parts(steps: dict, step: str) -> dict:
    """The parts of a step that have figures."""
    named = steps.get(step, {}).get("parts", {})
    return {name: part for name, part in named.items() if part.get("found")}


def figures(steps: dict, step: str, part: str) -> dict:
    """What a part found; {} for none."""
    return parts(steps, step).get(part, {}).get("found", {})


def of_turns(found: dict, key: str) -> list[float]:
    return [turn[key] for turn in found.get("turns", [])]


# Training -----------------------------------------------------------------------------------------


def training(result: Result, steps: dict, rate, measured) -> dict[tuple[str, int], float]:
    """The table of tokens per second, and these by side and micro-batch."""
    speeds, rows, flops_per_token = {}, [], 0
    for step, micro_batch in (("throughput", 16), ("throughput, larger", 64)):
        for side, name in NAMES.items():
            found = figures(steps, step, side)
            if not (values := of_turns(found, "tokens_per_second")):
                continue
            speed = speeds[side, micro_batch] = statistics.median(values)
            flops_per_token = found["flops_per_token"]
            flops = speed * flops_per_token
            shares = [f"{flops / most:.1%}" if most else "" for most in (rate, measured)]
            rows.append(
                [name, str(micro_batch), speed, f"{min(values):,.0f} to {max(values):,.0f}",
                 *shares, max(of_turns(found, "peak_memory")) / 1e9, found["ready_after_seconds"]]
            )  # fmt: skip
    if rows:
        result.table(
            "Training 124 M parameters (gpt2_124m), context 1,024, bf16, random ids",
            ["", "micro-batch", "tokens/s", "least to most", "of the data sheet's rate",
             "of the measured rate", "peak GB", "ready after, s"],
            rows,
            f"{flops_per_token / 1e6:.2f} MFLOP a token. "
            + (f"Data sheet: {rate / 1e12:.0f} TFLOP/s. " if rate else "")
            + (f"Measured (8192-cubed): {measured / 1e12:.0f} TFLOP/s." if measured else ""),
        )  # fmt: skip
    return speeds


def training_claims(result: Result, speeds: dict, steps: dict, rate):
    """The bars of training."""
    ours = {n: speed for (side, n), speed in speeds.items() if side == "ours-compiled"}
    theirs = {n: speed for (side, n), speed in speeds.items() if side == "nanogpt"}
    if not ours:
        return
    flops = figures(steps, "throughput", "ours-compiled").get("flops_per_token")
    flops = flops or figures(steps, "throughput, larger", "ours-compiled")["flops_per_token"]
    best = max(ours.values())
    if rate:
        text = f"124 M, share of {rate / 1e12:.0f} TFLOP/s"
        result.claim(text, best * flops / rate, SHARE, unit="")
    else:
        result.claim("124 M, tokens/s", best, TOKENS, unit="tokens/s")
    for n in sorted(ours.keys() & theirs.keys()):
        result.claim(f"124 M, over nanoGPT compiled, micro-batch {n}", ours[n] / theirs[n], SAME)
    if theirs:
        text = "124 M, over nanoGPT compiled, the best micro-batch of each"
        result.claim(text, best / max(theirs.values()), BEST)


def profile(result: Result, found: dict):
    """Where a step's time goes: parts, and the longest kernels."""
    if "longest" not in found:
        return
    ms = found.get("parts_ms", {})
    total = sum(ms.values()) or 1.0
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in ms.items())
    launches = found.get("launches")
    rows = [
        [f"`{kernel['name'][:80].replace('|', '/')}`", kernel["ms_a_step"],
         f"{kernel['calls_a_step']:.0f}", f"{kernel['ms_a_step'] / found['device_ms_a_step']:.1%}"]
        for kernel in found["longest"]
    ]  # fmt: skip
    result.table(
        "Where a compiled step's time goes, micro-batch 16: the longest kernels",
        ["kernel", "ms a step", "calls", "share"],
        rows,
        f"Shares of a step: {shares}." + (f" {launches:,.0f} launches a step." if launches else ""),
    )


def ceilings(result: Result, found: dict):
    """What the machine can do at most."""
    if not found:
        return
    rows = []
    if "copy_bytes_per_second" in found:
        rows.append(["copy, read and written", f"{found['copy_bytes_per_second'] / 1e12:.2f} TB/s"])
    for n in (8192, 4096):
        if f"product_{n}" in found:
            rows.append([f"{n}-cubed product", f"{found[f'product_{n}'] / 1e12:.0f} TFLOP/s"])
    for name, rates in found.get("products", {}).items():
        cells = [f"{what} {value / 1e12:.0f}" for what, value in rates.items()]
        rows.append([f"124 M, {name}", f"{', '.join(cells)} TFLOP/s"])
    for name, times in found.get("attention", {}).items():
        text = times.get("error") or (
            f"forward {times['forward_ms']:.2f} ms, with backward {times['both_ms']:.2f} ms"
        )
        rows.append([f"attention, {name}", text])
    alone = found.get("products_tokens_per_second")
    result.table(
        "What the machine can do at most, bf16, random numbers", ["", ""], rows,
        f"The products of a step of the 124 M model alone allow {alone:,.0f} tokens/s." if alone
        else "",
    )  # fmt: skip


# Generating ---------------------------------------------------------------------------------------


def generation(result: Result, steps: dict):
    """Tokens per second beside transformers, and the bars."""
    for rules in ("top_k 50", "all tokens"):
        sides = {
            name.split(",")[0]: part["found"]
            for name, part in parts(steps, "generation").items()
            if name.endswith(rules)
        }
        batches = sorted({int(key) for side in sides.values() for key in side if key.isdigit()})
        rows = []
        for batch in map(str, batches):
            theirs = [f[batch] for s, f in sides.items() if s != "ours" and batch in f]
            best = max(theirs, default=None)
            for side, found in sides.items():
                if batch in found:
                    ratio = f"{found[batch] / best:.2f}" if best else ""
                    rows.append([side, batch, found[batch], ratio])
            ours = sides.get("ours", {}).get(batch)
            if ours and batch == "1":
                result.claim(f"generating, {rules}, batch 1", ours, GENERATED, unit="tokens/s")
            if ours and best:
                text = f"generating, {rules}, batch {batch}, over the better transformers"
                result.claim(text, ours / best, TIMES)
        if rows:
            result.table(
                f"Generating with 124 M parameters, bf16, {rules}: 16 tokens and 128 new ones",
                ["side", "batch", "tokens/s", "times the better transformers"],
                rows,
            )


# train.py, small models, Shakespeare --------------------------------------------------------------


def whole_run(result: Result, found: dict):
    """A run of train.py, with what preflight said of its memory."""
    if "peak_memory" not in found:
        return
    estimate = found.get("estimated_memory")
    rows = [
        ["tokens/s", found["tokens_per_second"]],
        ["steps, epochs", f"{found['steps']}, {found['epochs']:.1f}"],
        ["peak memory, GB", found["peak_memory"] / 1e9],
        ["estimated by tools.preflight, GB", estimate / 1e9 if estimate else "not known"],
        ["resumed to step", str(found.get("resumed_to", "not"))],
    ]
    title = "train.py --config configs/gpt2_124m.toml --compile, 8,192 pieces, a small text"
    result.table(title, ["", ""], rows)


def small_models(result: Result, steps: dict):
    """Launches and tokens per second of small models, and the bar."""
    found, rows = parts(steps, "small models"), []
    for name, part in found.items():
        values = part["found"]
        speed = of_turns(values, "tokens_per_second")
        rows.append(
            [name, statistics.median(speed) if speed else "none",
             values["launches"] if values.get("launches") is not None else "not known",
             " ".join(values.get("notes", []))]
        )  # fmt: skip
        kind, _, way = name.partition(", ")
        eager = found.get(f"{kind}, eager", {}).get("found", {}).get("launches")
        if way != "eager" and eager and values.get("launches") is not None:
            share = values["launches"] / eager
            result.claim(f"{name}, launches a step over eager's", share, LAUNCHES, True, "")
    if rows:
        title = "Small models: configs/default.toml with two optimizers, and a stream of text"
        result.table(title, ["", "tokens/s", "launches a step", "what the run says"], rows)


def shakespeare(result: Result, found: dict):
    """Time to nanoGPT's published loss, and the bar."""
    if not found.get("evaluated"):
        return
    result.table(
        "configs/shakespeare_gpu.toml: validation loss by step",
        ["step", "loss"],
        [[f"{step:,}", f"{loss:.4f}"] for step, loss in found["evaluated"]],
        f"{found['seconds_of_all']:.1f} s of training in all; nanoGPT's published loss: {LOSS}.",
    )
    best = min(loss for _, loss in found["evaluated"])
    if "seconds" in found:
        text = f"seconds of training to a validation loss of {LOSS}"
        result.claim(text, found["seconds"], SECONDS, True, "s")
        name = "with start-up, compiling, evaluating and saving"
        whole = found["seconds_since_the_start_of_the_process"]
        result.claim(f"{text}, {name}", whole, SECONDS, True, "s")
    else:
        result.claim("validation loss on tinyshakespeare", best, LOSS, True, "nats")


def what_ran(result: Result, found: dict):
    """What became of each part: what was skipped, killed or wrong stands there too."""
    rows = []
    for step in found["steps"]:
        if not step.get("parts"):
            rows.append([step["name"], "", step["status"], step.get("why", "")])
        for name, part in step.get("parts", {}).items():
            why = part.get("why", "")
            rows.append([step["name"], name, part["status"], why.replace("|", "/")])
    losses = next((figures({"checks": s}, "checks", "losses") for s in found["steps"]
                   if s["name"] == "checks"), {})  # fmt: skip
    note = f"The script: {found.get('status')}, {found.get('seconds', 0):.0f} s."
    if "later" in losses:
        note += (
            f" Losses of configs/default.toml beside a CPU's: float32 off by {losses['first']:.1e} "
            f"at step 1 and {losses['later']:.1e} at step {losses['step']}, bf16 by "
            f"{losses['bf16']:.1e}."
        )
    result.table("What ran", ["step", "part", "", "why"], rows, note)
