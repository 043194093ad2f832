#!/usr/bin/env bash
# Runs the quick commands of the README and of docs/ for real, on small settings, in a temporary folder.
#
#     bash docs/examples.sh              PYTHON=.venv/bin/python bash docs/examples.sh
#
# README's commands are run by this script: train, resume, generate, verify, list, preflight, verify_resume, check and
# rebuild TensorBoard's files, compare, and the example of a NaN dump. It ends with a status other than 0 at the first
# command that fails. Nothing is downloaded, and nothing is left in the clone but the cache of prepared data. Takes about
# a minute and a half on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
runs=$folder/runs
run=$runs/my-run
tiny=(--model.d_model 32 --model.n_layers 2 --model.d_ff 64 --train.eval_interval 10 --train.eval_examples 32
    --optimizer.warmup_steps 5)
output=$folder/output

fail() {
    echo "examples.sh: $1" >&2
    exit 1
}

try() { # runs a command; what it prints is shown if it fails
    printf '+'; printf ' %q' "$@"; echo
    "$@" >"$output" 2>&1 </dev/null || { cat "$output" >&2; fail "failed: $*"; }
}

expect() { # the last command's output must have a line that matches
    grep -qE -e "$1" "$output" || { cat "$output" >&2; fail "nothing matches '$1' in this output"; }
}

# training, on the default data
try "$python" train.py --runs_dir "$runs" --name my-run "${tiny[@]}" --max_steps 20
expect "best validation loss"
try "$python" train.py --print_config --model.d_model 256
expect "^d_model = 256"
try "$python" train.py --runs_dir "$runs" --resume --name my-run
expect "finished at step 20"
try "$python" train.py --runs_dir "$runs" --resume "$run" --extend --max_steps 30
expect "resuming .* from step 20"
try "$python" train.py --runs_dir "$runs" --resume --max_steps 40 --extend
expect "best validation loss"
if "$python" train.py --runs_dir "$runs" --resume "$run" --model.d_model 64 >"$output" 2>&1; then
    fail "a resume with another model was not refused"
fi
expect "the model would change"

# how right it is
try "$python" evaluate.py --checkpoint "$run" --limit 20 --no_bleu --max_new_tokens 16
expect "^exact match"

# your own data
for number in 1 2 3 4 5 6 7 8; do
    cat tests/text.txt
done >"$folder/my_book.txt"
try "$python" train.py --runs_dir "$runs" --name book --data.path "$folder/my_book.txt" --data.tokenizer char \
    --data.cache_dir "$folder/cache" "${tiny[@]}" --max_steps 5
try "$python" train.py --runs_dir "$runs" --name init --init_from "$runs/book" --data.path tests/text.txt \
    --data.tokenizer char --data.cache_dir "$folder/cache" --max_steps 5

# generating, with each engine
try "$python" generate.py --checkpoint "$run" --greedy --prompt "Return the absolute path of a file."
cp "$output" "$folder/torch"
for engine in numpy python; do
    try "$python" generate.py --checkpoint "$run" --greedy --prompt "Return the absolute path of a file." --engine "$engine"
    cmp -s "$output" "$folder/torch" || fail "--engine $engine wrote another text than torch"
done
try "$python" generate.py --runs_dir "$runs" --checkpoint "$run" --top_k 50
expect "wrote:"
try "$python" generate.py --checkpoint "$run" --explain --top_k 50 --prompt "Close the file."
expect "entropy|rank"
printf 'Open a file.\nClose a file.\n' >"$folder/prompts.txt"
try "$python" generate.py --checkpoint "$run" --prompt_file "$folder/prompts.txt" --num_samples 5 --json
expect '"prompt": "Open a file."'
try "$python" generate.py --checkpoint "$run" --prompt "..." --temperature 0.8 --top_k 50 --top_p 0.95
echo "+ generate.py --interactive"
printf 'Open a file.\n' | "$python" generate.py --checkpoint "$run" --interactive --temperature 0.8 --top_p 0.9 \
    >"$output" 2>&1 || fail "generate.py --interactive"
expect "def|[[:alnum:]]"
try "$python" generate.py --checkpoint "$run" --prompt "def " --num_samples 5 --seed 3 --stop $'\n'

# looking into a run
try "$python" -m checkpoint verify "$run"
expect "^whole"
try "$python" -m checkpoint list "$run"
expect "validation loss"
try "$python" -m tools.tensorboard_files check "$run"
try "$python" -m tools.tensorboard_files rebuild "$run"
try "$python" -m tools.tensorboard_files check "$run"
try "$python" -m data.sources list
expect "^stdlib "

# before a run, and when something is wrong
try "$python" -m tools.preflight "${tiny[@]}" --max_steps 20
expect "^(no )?remarks"
try "$python" -m tools.verify_resume --steps 4 "${tiny[@]}"
nan=(--optimizer.lr 1e6 --optimizer.warmup_steps 0 --optimizer.grad_clip 0)
if "$python" train.py --runs_dir "$runs" --name nan "${nan[@]}" >"$output" 2>&1; then
    fail "a learning rate of 1e6 did not stop the run"
fi
expect "python -m tools.replay"
dumps=("$runs"/nan/nonfinite_step_*)
try "$python" -m tools.replay "${dumps[0]}"
expect "^first: "

# the engines beside each other, and the snippets of docs/engines.md and docs/generating.md
try "$python" compare.py --runs_dir "$runs" --name compared --steps 5 --config configs/microgpt.toml --engines python numpy torch
expect "report.md"
cat >"$folder/snippets.py" <<'PYTHON'
import sys
from importlib import import_module

for module, name in (
    ("model.transformer_full", "TransformerDecoder"),
    ("model.transformer_lite", "TransformerDecoderLite"),
    ("model.transformer_micro", "TransformerDecoderMicro"),
):
    model = getattr(import_module(module), name).from_checkpoint(sys.argv[1])
    ids = model.generate([17, 4, 92], start_id=2, end_id=3, max_len=8, temperature=1.0, top_k=50)
    print(module, ids)

from torchlite import functional as F, nn, optim
from torchlite.tensor import Tensor

model = nn.Linear(3, 2)
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
loss = F.cross_entropy(model(Tensor([[1.0, 2.0, 3.0]])), [1])
loss.backward()
optimizer.step()
PYTHON
try env PYTHONPATH=. "$python" "$folder/snippets.py" "$run"
try "$python" docs/side_by_side.py --check
try "$python" -m benchmarks.report --check

echo "all examples ran"
