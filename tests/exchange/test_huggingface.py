"""Out to transformers: the same logits, text and perplexity; what has no form there is refused."""

import resource
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from common.errors import UserError
from data.prompt_format import end_id, prompt_ids
from exchange import huggingface
from generation import batched
from generation.sampling import Sampling
from model.transformer_full import TransformerDecoder
from tests.exchange.helpers import CHARACTERS, PRE, SMALL, exchanged, random_weights, save_run

MODELS = {
    "pre-norm, sines, tied": PRE,
    "pre-norm, sines, a matrix and a bias for the output": replace(PRE, tie_embeddings=False),
    "pre-norm, learned, tied": replace(PRE, positions="learned", scale_embedding=False),
    "pre-norm, relu, no biases": replace(PRE, activation="relu", bias=False),
    "post-norm": SMALL,
    "post-norm, learned, tied": replace(
        SMALL, positions="learned", tie_embeddings=True, scale_embedding=False
    ),
    "post-norm, gelu, no biases": replace(SMALL, activation="gelu", bias=False),
}
CLASSES = {"gpt2": (GPT2Config, GPT2LMHeadModel), "opt": (OPTConfig, OPTForCausalLM)}
REFUSED = {
    'model.norm = "rms"': replace(PRE, norm="rms"),
    'model.norm = "none"': replace(SMALL, norm="none"),
    "model.embedding_norm": replace(PRE, embedding_norm=True),
    "model.final_norm = false": replace(PRE, final_norm=False),
    "model.final_norm = true": replace(SMALL, final_norm=True),
    "model.norm_eps = 1e-06": replace(SMALL, norm_eps=1e-6),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
    """In float64, so that nothing but rounding can hide."""
    config = MODELS[name]
    weights = random_weights(config, "float64")
    kind = huggingface.architecture(config, "run")
    settings, model = CLASSES[kind]
    theirs = model(settings(**huggingface.settings(config, kind))).double().eval()
    tensors = huggingface.exported(config, weights, kind)
    tensors = {key: torch.tensor(array) for key, array in tensors.items()}
    missing, stray = theirs.load_state_dict(tensors, strict=False)
    assert not stray and set(missing) <= {"lm_head.weight"}
    if missing:
        theirs.tie_weights()
    ours = TransformerDecoder.from_weights(config, weights, torch.float64).eval()
    ids = torch.randint(config.vocab_size, (3, config.max_len))
    with torch.no_grad():
        expected = ours(ids)
        assert (theirs(ids).logits - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("key", REFUSED)
def test_what_no_architecture_has_is_refused(key):
    with pytest.raises(UserError, match=f"^run: {key}.*; use --format onnx"):
        huggingface.architecture(REFUSED[key], "run")


@pytest.fixture(scope="module", params=["pairs", "lines", "stream"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By kind of data: a run, and the folder that it is exported to."""
    folder, found = tmp_path_factory.mktemp("exports"), {}
    with pytest.MonkeyPatch.context() as patch:
        for kind, config in {
            "pairs": SMALL,
            "lines": PRE,
            "stream": MODELS["pre-norm, learned, tied"],
        }.items():
            run = save_run(folder / kind, config, kind)
            assert exchanged(patch, "export", run, folder / f"{kind}-hf") == 0
            found[kind] = run, folder / f"{kind}-hf"
    return found


def test_text_and_perplexity_are_those_of_transformers(exports, kind):
    run, folder = exports[kind]
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ours = TransformerDecoder.from_checkpoint(run)
    for prompt in ("ask", "a list, sorted.", "qu\u00e9"):  # of which one letter is unknown
        ids = prompt_ids(kind, CHARACTERS, prompt)
        asked = tokenizer(prompt, return_tensors="pt")
        assert asked["input_ids"].tolist() == [ids]
        new = ours.max_len - len(ids)
        (text,) = batched.generate(
            ours,
            [ids],
            Sampling(greedy=True, max_new_tokens=new),
            seed=0,
            end_id=end_id(kind, CHARACTERS),
        )
        (answer,) = theirs.generate(**asked, do_sample=False)
        answer = answer[len(ids) :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == CHARACTERS.decode(text)
    text = torch.tensor([CHARACTERS.encode("some more text, of a few.")[:24]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(ours(text)[0, :-1], text[0, 1:])
        assert torch.allclose(theirs(text, labels=text).loss, loss, rtol=1e-5)


def test_special_tokens_and_settings_are_set(exports, kind):
    folder = exports[kind][1]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id] == [0, 1]
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<start>", "<end>"]
    assert model.generation_config.eos_token_id == (None if kind == "stream" else 3)
    assert model.generation_config.max_length == tokenizer.model_max_length == 24
    start = [2] if kind == "lines" else []
    end = [2] if kind == "pairs" else []
    said = [*start, *CHARACTERS.encode("<end>"), *end]  # and that is not the token <end>
    assert tokenizer("<end>")["input_ids"] == said


def test_the_page_has_the_figures(exports):
    page = (exports["pairs"][1] / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: transformers\n")
    assert "| validation loss (nats a token) | 1.2500 |" in page
    assert "| optimizer steps | 7 |" in page


@pytest.mark.parametrize("limit", [6000, 12000])  # bytes, as the header is written, or a tensor
@pytest.mark.parametrize(
    ("form", "file", "needs"),
    [
        ("huggingface", "model.safetensors", "transformers"),
        ("gguf", "model.gguf", "gguf"),
        ("onnx", "model.onnx", "onnxscript"),
    ],
)
def test_a_full_disk_leaves_nothing(
    form, file, needs, limit, exports, tmp_path, monkeypatch, capsys
):
    """A limit on the size of a file, below that of the weights."""
    pytest.importorskip(needs)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        where = exports["lines"][0], tmp_path / "out"
        status = exchanged(monkeypatch, "export", *where, "--format", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": {tmp_path / 'out' / file}: " in line
    assert line.endswith("; free some disk space and try again")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(exports, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert exchanged(monkeypatch, "export", exports["lines"][0], out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": {out}: Not a directory; choose a folder that can be written")


def test_what_is_there_is_left_alone(exports, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert exchanged(monkeypatch, "export", exports["pairs"][0], tmp_path / "out") == 2
    assert "out: exists; choose another name" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    (tmp_path / ".out.partial").mkdir()  # as a kill leaves it
    (tmp_path / ".out.partial" / "half").touch()
    assert exchanged(monkeypatch, "export", exports["pairs"][0], tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
