"""GPT-2 from transformers: the same logits and text here; what is not one is refused in a line."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import evaluate
import generate
from checkpoint.reader import Checkpoint
from common.errors import UserError
from data.tokenizers.load import load_tokenizer
from evaluation.report import read_report
from generation.sampling import Sampling
from model import engines
from model.config import read_model_config
from model.transformer_full import TransformerDecoder
from tests.exchange.helpers import PRE, exchanged, save_run
from tests.faults.fuzz_inputs import quiet
from tests.helpers import ROOT, TEXT
from training.command_line import read_command_line
from training.setup import build
from training.step import train_step
from training.timing import StepTimer

SHAPE = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
END = "<|endoftext|>"


def byte_level(vocab_size: int = 400) -> Tokenizer:
    """A tokenizer of GPT-2's kind, small."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [(ROOT / "docs" / "training.md").read_text("utf-8")],
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip
    return made


TOKENIZER = byte_level()


def save_gpt2(folder: Path, **settings) -> GPT2LMHeadModel:
    """A GPT-2 of random weights with its tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    known = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0} | SHAPE
    model = GPT2LMHeadModel(GPT2Config(**known | settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases, which begin as 1 and 0
            torch.nn.init.normal_(parameter, 0.1, 0.5)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, bos_token=END, eos_token=END
    ).save_pretrained(folder)
    return model


def edit_json(file: Path, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder, and the model that was saved in it."""
    folder = tmp_path_factory.mktemp("gpt2")
    return folder, save_gpt2(folder)


@pytest.fixture
def folder(gpt2, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(gpt2[0], tmp_path / "theirs")


def same_logits(run: Path, theirs: GPT2LMHeadModel, tokens: int = 400):
    ours = TransformerDecoder.from_checkpoint(run, torch.float64)
    ids = torch.randint(tokens, (2, 32))
    with torch.no_grad():
        expected = theirs.double()(ids).logits[..., :tokens]
        assert (ours(ids) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_logits_and_text_in_all_engines(gpt2, tmp_path, monkeypatch, capsys):
    """It reads a text as a document, after the token that ends the one before."""
    source, theirs = gpt2
    assert exchanged(monkeypatch, "import", source, tmp_path / "run") == 0
    assert "--init_from" in capsys.readouterr().out
    same_logits(tmp_path / "run", theirs)
    checkpoint = Checkpoint.find(tmp_path / "run").verify()
    prompt = TOKENIZER.encode(f"{END}The loss").ids
    assert [0, *load_tokenizer(checkpoint.path).encode("The loss")] == prompt
    ids = torch.tensor([prompt])
    (expected,) = theirs.float().generate(ids, do_sample=False, max_new_tokens=12).tolist()
    for engine in ("torch", "numpy", "python"):
        weights = engines.read_weights(engine, checkpoint)
        model = engines.load_model(engine, read_model_config(checkpoint), weights, "cpu", "fp64")
        rules = Sampling(greedy=True, max_new_tokens=12)
        (found,) = engines.generator(engine)(model, [prompt], rules, seed=0, end_id=0)
        assert [*prompt, *found] == [i for n, i in enumerate(expected) if i or not n]


@pytest.mark.parametrize("form", ["shards", "old names", "bf16", "untied", "relu", "padded"])
def test_forms_of_it(form, tmp_path, monkeypatch, capsys):
    source, tokens = tmp_path / "theirs", 400
    settings = {
        "untied": {"tie_word_embeddings": False, "n_inner": 40},
        "relu": {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
        "padded": {"vocab_size": 448},
    }
    theirs = save_gpt2(source, **settings.get(form, {}))
    file = source / "model.safetensors"
    if form == "shards":
        theirs.save_pretrained(source, max_shard_size="10KB")
        file.unlink()
        assert len(list(source.glob("model-*.safetensors"))) > 3
    if form == "old names":
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, file)
        (source / "tokenizer.json").unlink()  # and with the tokenizer as it was then
        made = json.loads(TOKENIZER.to_str())["model"]
        (source / "vocab.json").write_text(json.dumps(made["vocab"]))
        lines = "\n".join(["#version: 0.2", *map(" ".join, made["merges"]), ""])
        (source / "merges.txt").write_text(lines)
    if form == "bf16":
        theirs = theirs.bfloat16()
        theirs.save_pretrained(source)
    assert exchanged(monkeypatch, "import", source, tmp_path / "run") == 0
    assert ("last 48 of its 448" in capsys.readouterr().out) == (form == "padded")
    same_logits(tmp_path / "run", theirs, tokens)
    made = load_tokenizer(Checkpoint.find(tmp_path / "run").path)
    assert made.encode("The <|endoftext|> loss") == TOKENIZER.encode("The ").ids + made.encode(
        "<|endoftext|> loss"
    )
    assert (made.start_id, made.end_id) == (0, 0)


def test_there_and_back(tmp_path, monkeypatch):
    """A model trained here, as one of transformers, and that as a run again."""
    save_run(tmp_path / "run", PRE, "lines")
    assert exchanged(monkeypatch, "export", tmp_path / "run", tmp_path / "theirs") == 0
    assert exchanged(monkeypatch, "import", tmp_path / "theirs", tmp_path / "again") == 0
    ours, again = (TransformerDecoder.from_checkpoint(tmp_path / name) for name in ("run", "again"))
    ids = torch.randint(ours.config.vocab_size, (2, 24))
    assert torch.allclose(ours(ids), again(ids), rtol=1e-4, atol=1e-4)
    assert exchanged(monkeypatch, "export", tmp_path / "again", tmp_path / "twice") == 0
    assert "| imported from | theirs |" in (tmp_path / "twice" / "README.md").read_text()
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first if "lm_" not in k)
    texts = [Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")) for n in ("theirs", "twice")]
    assert texts[0].encode("a b").tokens == texts[1].encode("a b").tokens


def test_training_begins_with_it(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exchanged(monkeypatch, "import", gpt2[0], "runs/gpt2") == 0
    flags = ["--init_from", "runs/gpt2", "--data.path", str(TEXT), "--data.cache_dir", "cache"]
    flags += ["--max_steps", "2", "--device", "cpu", "--precision", "fp32"]
    state = build(read_command_line(quiet, flags), quiet)
    weights = Checkpoint.find("runs/gpt2").tensors("model.safetensors")
    for name, parameter in state.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), weights[name])
    assert state.dataset.tokenizer.token(0) == END
    for step in range(2):
        targets = state.batches.target_count(step)
        batches = state.batches(step, 1)
        timer = StepTimer(state.device)
        done = train_step(state, state.loss_module, batches, targets, step, timer)
        assert done.updated and 0 < done.loss < 100
    with pytest.raises(UserError, match="no state of an optimizer; use --init_from"):
        build(read_command_line(quiet, ["--resume", "runs/gpt2"]), quiet)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-10])


def without(name: str):
    def change(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"transformer.{name}"]
        save_file(tensors, folder / "model.safetensors")

    return change


def with_tensor(name: str, tensor: torch.Tensor):
    def change(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {f"transformer.{name}": tensor}, folder / "model.safetensors")

    return change


def as_pickle(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_outside(folder: Path):
    (folder / "model.safetensors").unlink()
    names = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


def config_says(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


REFUSED = {
    "not a safetensors file": lambda folder: cut(folder / "model.safetensors"),
    "h.1.ln_2.bias is missing": without("h.1.ln_2.bias"),
    "a GPT-2 has no h.1.lora": with_tensor("h.1.lora", torch.ones(2)),
    "ln_f.bias has shape (8,), config.json says (16,)": with_tensor("ln_f.bias", torch.ones(8)),
    "ln_f.bias is of type I32": with_tensor("ln_f.bias", torch.ones(16, dtype=torch.int32)),
    "pytorch_model.bin: a pickle": as_pickle,
    "weight_map: must give": index_outside,
    "model_type: is 'llama'": config_says(model_type="llama"),
    "activation_function: is 'silu'": config_says(activation_function="silu"),
    "scale_attn_by_inverse_layer_idx: is True": config_says(scale_attn_by_inverse_layer_idx=True),
    "n_head = 0 must be at least 1": config_says(n_head=0),
    "n_embd = '16' must be of type int": config_says(n_embd="16"),
    "which do not fit": config_says(n_layer=4000),
    "but vocab_size of config.json is 300": config_says(vocab_size=300),
    "but vocab_size of config.json is 2,000": config_says(vocab_size=2000),
    "config.json: must hold a JSON object": lambda f: (f / "config.json").write_text("[]"),
    "config.json: no such file": lambda folder: (folder / "config.json").unlink(),
    "tokenizer.json: ": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "neither tokenizer.json nor": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_gpt2_is_refused_in_a_line(said, folder, tmp_path, monkeypatch, capsys):
    REFUSED[said](folder)
    assert exchanged(monkeypatch, "import", folder, tmp_path / "runs" / "new") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(folder) in line
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_a_tokenizer_without_an_end_is_refused_with_where_to_name_it(
    folder, tmp_path, monkeypatch, capsys
):
    file = folder / "tokenizer.json"
    content = file.read_text().replace(END, "<|x|>")
    file.write_text(content)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert exchanged(monkeypatch, "import", folder, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: no token in it is known to end a text; set eos_token in tok" in line
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|x|>"}')
    assert exchanged(monkeypatch, "import", folder, tmp_path / "run") == 0


def test_an_imported_run_has_no_data_of_its_own(gpt2, tmp_path, monkeypatch):
    """And none is read in its place; texts that are given are scored, pairs are refused."""
    run, text, pairs = (tmp_path / name for name in ("run", "text.txt", "pairs.jsonl"))
    assert exchanged(monkeypatch, "import", gpt2[0], run) == 0
    text.write_text("The loss of a step.\n")
    pairs.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    cache = tmp_path / "cache"

    def refused(program, *flags) -> str:
        arguments = ["x.py", "--checkpoint", run, "--device", "cpu", *flags]
        monkeypatch.setattr("sys.argv", [*map(str, arguments)])
        with pytest.raises(UserError) as error:
            program.main()
        return str(error.value)

    none = f"{run} was imported and has no data of its own; "
    with_cache = "--cache_dir", cache
    for split in ("val", "test"):
        said = refused(evaluate, "--split", split, *with_cache)
        assert said == f"--split {split}: {none}give a file with --split FILE"
    said = refused(evaluate, "--split", text, "--memorization", *with_cache)
    assert said == f"--memorization: {none}leave the flag out"
    assert refused(generate, "--prompt", "x", "--memorization") == said
    assert not cache.exists()
    said = refused(evaluate, "--split", pairs, *with_cache)
    assert said.startswith(f"--split {pairs}: has pairs, but {run} was imported and reads texts; ")
    arguments = ["x.py", "--checkpoint", run, "--device", "cpu", "--split", text, *with_cache]
    monkeypatch.setattr("sys.argv", [*map(str, arguments)])
    assert evaluate.main() == 0
    assert read_report(run)[str(text)].data == "text"


def test_a_full_disk_leaves_nothing(gpt2, tmp_path, monkeypatch, capsys):
    """A limit on the size of a file, below that of the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        status = exchanged(monkeypatch, "import", gpt2[0], tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "free some disk space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_no_float32_has_are_kept_as_they_are(folder, tmp_path, monkeypatch):
    with_tensor("ln_f.bias", torch.full((16,), float("nan")))(folder)
    assert exchanged(monkeypatch, "import", folder, tmp_path / "run") == 0
    weights = Checkpoint.find(tmp_path / "run").tensors("model.safetensors")
    assert np.isnan(weights["final_norm.bias"]).all()
