"""evaluate.py as a user meets it, on a tiny run that is made here."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from safetensors.numpy import save as to_safetensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import generate as generate_program
from checkpoint import writer
from checkpoint.reader import Checkpoint
from common.errors import UserError
from data.config import DataConfig, SourceConfig
from data.dataset import prepare
from data.slots import Slots
from evaluation.answers import answer
from evaluation.look_ups import utility
from evaluation.split import data_name, decoded, texts
from generation.batched import generate
from generation.beams import search, with_log_probabilities
from generation.rerank import choose, shares
from generation.sampling import Sampling
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

SHAPE = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_len": 48}


def save_run(run, path, **settings) -> TransformerDecoder:
    """A run on the data at `path`, with a model of random weights."""
    config = DataConfig(
        path=str(path), tokenizer="char", cache_dir=str(run.parent / "cache"), **settings
    )
    dataset = prepare(config, lambda line: None)
    settings = asdict(config) | {"kind": dataset.kind}  # as a run stores them
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": dataset.tokenizer.vocab_size}
    model = TransformerDecoder.from_config(ModelConfig(**shape, init_std=0.3)).eval()
    state = {"step": 7, "data": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}
    files = {
        "model.safetensors": to_safetensors(
            {n: p.detach().numpy() for n, p in model.named_parameters()}
        ),
        "config.json": json.dumps({"model": shape, "data": settings}).encode(),
        "state.json": json.dumps(state).encode(),
        **dataset.tokenizer.files(),
    }
    writer.save(run, 7, files)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs: on pairs line by line, on pairs of records, and on a stream."""
    folder = tmp_path_factory.mktemp("evaluate")
    pairs = folder / "pairs"
    pairs.mkdir()
    for split, numbers in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 54))):
        (pairs / f"{split}.nl").write_text("".join(f"list number {i}\n" for i in numbers))
        (pairs / f"{split}.cm").write_text("".join(f"ls -l {i}\n" for i in numbers))
    lines = [json.dumps({"prompt": f"p {i}", "completion": f"def f{i}(a):"}) for i in range(60)]
    (folder / "records.jsonl").write_text("\n".join(lines))
    (folder / "text.txt").write_text("to be or not to be, " * 60)
    save_run(folder / "runs" / "bash", pairs)
    save_run(folder / "runs" / "slots", pairs, slots=True)
    save_run(folder / "runs" / "python", folder / "records.jsonl")
    save_run(folder / "runs" / "stream", folder / "text.txt")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(name: str, *flags: str) -> tuple[str, dict]:
        arguments = ["evaluate.py", "--checkpoint", str(folder / "runs" / name), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [*arguments, "--max_new_tokens", "12", *flags])
        assert evaluate.main() == 0
        written = json.loads((folder / "runs" / name / "evaluation.json").read_text())
        return capsys.readouterr().out, written["splits"]

    return run


def test_a_stream_has_its_losses(folder, run):
    said, splits = run("stream")
    found = splits["val"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert f"loss {found['loss']:.4f}" in said and "scores" not in found
    data = prepare(
        DataConfig(
            path=str(folder / "text.txt"),
            tokenizer="char",
            cache_dir=str(folder / "runs" / "cache"),
        )
    )
    ids = torch.tensor(data.val.ids.astype(int))
    model = TransformerDecoder.from_checkpoint(folder / "runs" / "stream")
    model.requires_grad_(False)
    logits = torch.cat([model(part[None])[0] for part in ids[:-1].split(48)])
    assert found["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, ids[1:])), abs=1e-5
    )


def test_pairs_are_answered_and_scored_beside_look_ups(folder, run):
    said, splits = run("bash", "--examples", "3", "--answers", "bash")
    scores = splits["val"]["scores"]
    assert set(scores) == {"greedy", "nearest neighbour", "most frequent"}
    assert scores["nearest neighbour"]["template match"]["value"] == 1
    assert scores["nearest neighbour"]["exact match"]["value"] == 0
    assert scores["greedy"]["template match"]["value"] == 0
    assert "template match" in said and "10 bash answers" in said
    shown = (folder / "runs" / "bash" / "evaluation.md").read_text().splitlines()
    assert len(shown) == 2 + 3 and all("`ls -l" in line for line in shown[2:])


def test_slots_are_filled_and_neighbours_join(folder, run):
    """Each description has its number in its command, which look-ups cannot know without slots."""
    flags = ("--answers", "bash", "--no_bleu", "--beams", "3", "--num_samples", "3")
    _, splits = run("slots", *flags)
    scores = splits["val"]["scores"]
    assert scores["nearest neighbour"]["exact match"]["value"] == 0
    assert scores["nearest, its slots filled"]["exact match"]["value"] == 1
    assert scores["3 beams"]["exact match, top-3"]["value"] == 0
    _, splits = run("slots", *flags, "--rerank", "--neighbours", "1")
    scores = splits["val"]["scores"]["3 beams and 1 neighbours, reranked"]
    # it has half of the weight; where all three beams say the same, so has what they say
    assert max(s["value"] for name, s in scores.items() if name.startswith("exact match,")) == 1
    assert "3 beams, reranked" in run("slots", *flags, "--rerank")[1]["val"]["scores"]


def test_answers_of_slots_are_filled_and_those_that_lack_one_come_last(folder):
    checkpoint = Checkpoint.find(folder / "runs" / "slots")
    model = TransformerDecoder.from_checkpoint(checkpoint.path).double()
    tokenizer = evaluate.load_tokenizer(checkpoint.path)
    rules, prompt = Sampling(max_new_tokens=9), "list number 7 of a.txt"
    slots = Slots(prompt)
    ids = [*tokenizer.encode(slots.prompt), tokenizer.start_id]
    ((*found,),) = search(model, [ids], 4, 9, end_id=tokenizer.end_id)
    written = [tokenizer.decode(text) for text, _ in found]
    wanted = [slots.show(text) for text in sorted(written, key=slots.lacks)]
    assert answer(model, tokenizer, [prompt], rules, count=4, beams=4, slots=True) == [wanted]
    asked = []

    def choose(number, texts, shares):
        asked.append((number, texts, shares))
        return texts[::-1]

    answers = answer(model, tokenizer, [prompt], rules, count=2, beams=4, slots=True, choose=choose)
    written = sorted((tokenizer.decode(text) for text, _ in found), key=slots.lacks)
    number, texts, weights = asked[0]
    assert (number, texts) == (0, [slots.show(text) for text in written])
    assert answers == [texts[:1:-1]]
    pairs = zip(written, weights, strict=True)
    assert sum(2 * w if slots.lacks(text) else w for text, w in pairs) == pytest.approx(1)


def test_other_splits_stand_beside_and_tensorboard_has_all(folder, run):
    file = folder / "records.jsonl"
    run("python", "--split", str(file), "--limit", "20")
    _, splits = run("python", "--beams", "3", "--num_samples", "2")
    other = splits[f"{file}, 20 examples"]
    assert set(splits) == {"val", f"{file}, 20 examples"}
    assert other["settings"]["examples"] == 20 and other["settings"]["answers"] == "python"
    trained = other["scores"]["nearest neighbour"]["exact match"]["value"]
    assert trained > 0.7  # a tenth of them was held out
    assert "exact match, top-2" in splits["val"]["scores"]["3 beams"]
    board = EventAccumulator(str(folder / "runs" / "python" / "evaluation"))
    board.Reload()
    points = board.Scalars("val/perplexity")
    assert [(p.step, round(p.value, 3)) for p in points] == [
        (7, round(splits["val"]["perplexity"], 3))
    ]
    assert len(board.Tags()["scalars"]) > 20


def test_the_test_split_of_a_folder(folder, run):
    _, splits = run(
        "bash", "--split", "test", "--look_ups", "no", "--no_bleu", "--num_samples", "2"
    )
    assert splits["test"]["settings"]["examples"] == 4
    assert splits["test"]["settings"]["answers"] == "bash" and "greedy" in splits["test"]["scores"]
    assert splits["test"]["settings"]["temperature"] == 0.8


def test_each_flag_has_one_no(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit):
        evaluate.main()
    said = capsys.readouterr().out
    assert "--bleu, --no_bleu" in said and "no_no" not in said


def test_of_a_folder_with_a_dev_split_that_is_taken(folder, run):
    split = str(folder / "pairs")
    _, splits = run("bash", "--split", split, "--look_ups", "no", "--no_bleu")
    assert splits[split]["settings"]["examples"] == 10


def test_a_few_examples_do_not_replace_all_of_them(run):
    whole = run("stream")[1]["val"]
    few = run("stream", "--limit", "1")[1]
    assert few["val"] == whole and few["val, 1 examples"]["loss"] != whole["loss"]
    assert run("stream", "--limit", "999")[1]["val"] == whole


def test_what_stands_in_the_training_data_is_counted(tmp_path, run, monkeypatch):
    file = tmp_path / "some.jsonl"
    pairs = [("p 1", "def f1(a):"), ("p 1", "def f2(a):"), ("x", "def f1(a):")]
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in pairs]
    file.write_text("\n".join(lines))
    said = []
    monkeypatch.setattr("evaluation.split.log", said.append)
    run("python", "--split", str(file), "--no_bleu")
    assert "note: 1 of 3 pairs stand in the training data word for word" in said
    said.clear()
    run("python", "--no_bleu")
    assert not any("word for word" in line for line in said)


def test_without_bash_the_other_scores_are_there(run, monkeypatch, tmp_path):
    said = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(evaluate, "log", said.append)
    _, splits = run("bash", "--answers", "bash", "--no_bleu")
    assert "note: without bash -n, because there is no bash on PATH" in said
    scores = splits["val"]["scores"]["greedy"]
    assert "NLC2CMD" in scores and "bash -n" not in scores


def test_what_another_version_wrote_is_not_replaced(folder, run):
    file = folder / "runs" / "slots" / "evaluation.json"
    before = file.read_bytes() if file.exists() else None
    file.write_text('{"format": 2}')
    try:
        with pytest.raises(UserError, match=r"json: of another version of this project.*rename"):
            run("slots")
        assert file.read_text() == '{"format": 2}'
        file.unlink()
        file.mkdir()
        with pytest.raises(UserError, match=r"evaluation\.json: a folder, where a file is to be"):
            run("slots")
        file.rmdir()
    finally:
        if before is not None:
            file.write_bytes(before)


def test_errors_of_data_name_what_the_command_has(folder, run):
    text, pairs = folder / "text.txt", folder / "records.jsonl"
    for name, split in (("python", text), ("stream", pairs)):
        flags = ["--split", str(split), "--cache_dir", "/dev/null/x"]
        with pytest.raises(UserError, match=r"; give a writable folder with --cache_dir$"):
            run(name, *flags)
    with pytest.raises(UserError) as found:
        run("python", "--split", str(text))
    assert str(found.value).endswith("; give a file to read as pairs, as the run's own data is")
    assert "data." not in str(found.value)
    with pytest.raises(UserError, match="; give a file to read as stream, as the"):
        run("stream", "--split", str(folder / "pairs"))


def test_answers_are_those_of_each_prompt_alone(folder):
    checkpoint = Checkpoint.find(folder / "runs" / "bash")
    model = TransformerDecoder.from_checkpoint(checkpoint.path).double()
    tokenizer = evaluate.load_tokenizer(checkpoint.path)
    prompts = ["list number 1", "x", "number list 33 33", "list"]
    rules = Sampling(temperature=0.7, max_new_tokens=9)
    together = answer(model, tokenizer, prompts, rules, count=3, seed=5)
    assert together == [answer(model, tokenizer, [p], rules, count=3, seed=5)[0] for p in prompts]
    ids = [*tokenizer.encode("x"), tokenizer.start_id]
    greedy = generate(
        model, [ids], Sampling(greedy=True, max_new_tokens=9), end_id=tokenizer.end_id
    )
    assert together[1][0] == tokenizer.decode(greedy[0])
    beams = answer(model, tokenizer, prompts, rules, count=2, beams=4)
    assert beams == [answer(model, tokenizer, [p], rules, count=2, beams=4)[0] for p in prompts]


@pytest.mark.parametrize(
    "name, flags, wrong",
    [
        ("stream", ["--split", "test"], "--split test: the run's data has no test split; give a"),
        ("stream", ["--split", "none.txt"], "--split none.txt: no such file"),
        ("bash", ["--beams", "2", "--num_samples", "3"], "num_samples = 3 must be at most beams"),
        ("bash", ["--limit", "-1"], "limit = -1 must be at least 0"),
        ("bash", ["--rerank"], "--rerank: takes a beam search; give --beams 5"),
        ("bash", ["--neighbours", "2"], "--neighbours: takes --rerank"),
        ("none", [], "no such checkpoint or run"),
        ("bash", ["--beams", "65"], "--beams = 65 must be 1 .greedy. to 64"),
        ("bash", ["--num_samples", "1001"], "--num_samples = 1001 must be 1 to 1000"),
        ("none.txt", ["--beams", "0"], "--beams = 0 must be 1"),
        ("stream", ["--split", "none.txt", "--device", "cuda:9999"], "--device cuda:9999: not on"),
        ("stream", ["--beams", "2"], "--beams: of the answers to prompts, and text is of kind st"),
        ("stream", ["--beams", "2", "--rerank"], "^--beams, --rerank: .*; leave them out$"),
        ("stream", ["--examples", "2", "--look_ups", "yes"], "^--look_ups, --examples: "),
        ("stream", ["--answers", "bash", "--num_samples", "2"], "^--answers, --num_samples: "),
    ],
)
def test_what_cannot_be_done_is_refused(run, name, flags, wrong):
    with pytest.raises(UserError, match=wrong):
        run(name, *flags)


def test_what_is_memorized_is_said(folder, run, monkeypatch, capsys):
    said, splits = run("bash", "--memorization", "--look_ups", "no", "--no_bleu")
    true = splits["val"]["memorization"]["true"]
    assert 0.7 < true["longest_run"] < 1 and true["verbatim"] == 0  # "ls -l " of "ls -l 40", and 4
    assert "word for word in the training data, answers" in said
    said, splits = run("stream", "--memorization")
    assert 0 < splits["val"]["memorization"]["free"]["longest_run"] <= 1
    flags = ["--checkpoint", str(folder / "runs" / "stream"), "--memorization", "--greedy"]
    monkeypatch.setattr("sys.argv", ["generate.py", *flags, "--prompt", "to be", "--json"])
    assert generate_program.main() == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memorization"]
    text = (folder / "text.txt").read_text()
    assert memory["text"] in found["text"] and memory["text"] in text and memory["of"] == 64
    monkeypatch.setattr("sys.argv", ["generate.py", *flags, "--prompt", "to be"])
    assert generate_program.main() == 0
    assert f"{memory['tokens']} of 64 tokens, " in capsys.readouterr().out


def test_generate_writes_the_texts_of_a_beam_search(folder, monkeypatch, capsys):
    flags = ["--checkpoint", str(folder / "runs" / "bash"), "--beams", "3", "--num_samples", "3"]
    flags += ["--prompt", "list 1", "--prompt", "x", "--max_new_tokens", "6", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["generate.py", *flags, "--json"])
    assert generate_program.main() == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = Checkpoint.find(folder / "runs" / "bash")
    model = TransformerDecoder.from_checkpoint(checkpoint.path)
    tokenizer = evaluate.load_tokenizer(checkpoint.path)
    rules = Sampling(max_new_tokens=6)
    wanted = answer(model, tokenizer, ["list 1", "x"], rules, count=3, beams=3)
    assert [line["text"] for line in said] == [text for several in wanted for text in several]
    for more, wrong in (
        ("--explain", "takes --engine torch"),
        ("--engine=numpy", "takes --engine"),
    ):
        monkeypatch.setattr("sys.argv", ["generate.py", *flags, more])
        with pytest.raises(UserError, match=wrong):
            generate_program.main()


@pytest.mark.parametrize("kind", ["text", "bash"])
def test_generate_orders_what_a_search_has_found(folder, monkeypatch, capsys, kind):
    """Of random weights, with slots: as evaluate.py has them, or by minimum Bayes risk."""
    if kind == "bash":  # which the name of its data tells
        monkeypatch.setattr("evaluation.split.name_data", lambda config: "nl2bash")
    checkpoint = Checkpoint.find(folder / "runs" / "slots")
    model = TransformerDecoder.from_checkpoint(checkpoint.path)
    tokenizer = evaluate.load_tokenizer(checkpoint.path)
    prompts, rules = ["list number 1", "list a.txt"], Sampling(max_new_tokens=6)
    flags = ["--checkpoint", str(checkpoint.path), "--beams", "4", "--num_samples", "4", "--json"]
    flags += ["--max_new_tokens", "6", "--device", "cpu"]
    flags += [word for prompt in prompts for word in ("--prompt", prompt)]

    def written(*more: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["generate.py", *flags, *more])
        assert generate_program.main() == 0
        return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]

    wanted = answer(model, tokenizer, prompts, rules, count=4, beams=4, slots=True)
    assert written() == [text for several in wanted for text in several]
    by_risk = written("--rerank")
    for several, prompt in zip((by_risk[:4], by_risk[4:]), prompts, strict=True):
        slots = Slots(prompt)
        ids = [*tokenizer.encode(slots.prompt), tokenizer.start_id]
        ((*found,),) = search(model, [ids], 4, 6, end_id=tokenizer.end_id)
        found = with_log_probabilities(found, 6)
        texts = [tokenizer.decode(text) for text, _ in found]
        weights = shares(texts, [score for _, score in found], slots)
        best = choose(texts, weights, 1, utility(kind))
        assert several[0] == slots.show(best[0])


def test_generate_fills_up_with_texts_that_had_not_ended(folder, capsys):
    """Where others are equal; and says that there are fewer, where there are."""
    checkpoint = Checkpoint.find(folder / "runs" / "bash")
    source = generate_program.read_source(checkpoint, "torch")
    jobs = generate_program.plan(source, ["list 1"], 3)
    ended, cut = source.tokenizer.encode("ls"), source.tokenizer.encode("ls -l 1")
    rules = Sampling(max_new_tokens=len(cut))
    arguments = partial(generate_program.Arguments, beams=3, rerank=True, sampling=rules)
    found = [(ended, -0.1), (ended, -0.2), (cut, -0.3)]
    for count in (2, 3):
        several = generate_program.ordered(
            source, jobs, arguments(num_samples=count), tuple(jobs[0].ids), found
        )
        assert several == [ended, cut]
        assert ("note: only 2 of the texts" in capsys.readouterr().err) == (count == 3)


def test_a_mixture_is_called_by_all_of_its_sources():
    sources = SourceConfig(1, path="x.txt"), SourceConfig(1, source="nl2bash")
    assert data_name(DataConfig(sources=sources)) == "x + nl2bash"
    assert data_name(DataConfig(source="nl2bash")) == "nl2bash"


def test_pairs_of_a_prepared_folder_are_those_that_it_was_made_of(folder):
    config = DataConfig(path=str(folder / "records.jsonl"), tokenizer="char")
    config = replace(config, cache_dir=str(folder / "runs" / "cache"))
    dataset = prepare(config, lambda line: None)
    assert sorted(decoded(dataset)) == sorted(texts(config))


def test_data_that_has_changed_is_refused(tmp_path, folder, run, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 60)
    save_run(tmp_path / "runs" / "changed", text)
    text.write_text("whether it is nobler, " * 60)
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "--checkpoint", str(tmp_path / "runs" / "changed")]
    )
    with pytest.raises(UserError, match="--split val: the data differs from what"):
        evaluate.main()
