"""Several processes on GPUs: NCCL with one process, and with as many as there are cards."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from checkpoint.reader import Checkpoint, list_steps
from common.processes import Processes, all_gather
from model.cuda_attention import use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from tests.cuda.test_training import make_in
from tests.distributed.test_one_curve import curve
from tests.helpers import ROOT, run, write_config
from training.gradient_exchange import GradientExchange
from training.gradient_sum import PairwiseSum
from training.sharding import Shards, whole
from training.step import micro_step


@pytest.fixture
def nccl(tmp_path):
    """NCCL, in a group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield Processes()
    dist.destroy_process_group()


@pytest.mark.parametrize("micro_batches", [1, 2, 7, 8])
@pytest.mark.parametrize("overlapped", [True, False])
def test_through_nccl_the_sums_are_the_same(nccl, tmp_path, micro_batches, overlapped):
    state = make_in(tmp_path, batch_size=8, accumulation_steps=micro_batches, deterministic=True)
    parameters = list(state.model.parameters())
    exchange = GradientExchange(parameters, nccl, bucket_bytes=2**14)
    assert len(exchange.buckets) > 3
    batches, targets = state.batches(0, micro_batches), state.batches.target_count(0)

    def add_up(exchanged: bool) -> list[torch.Tensor]:
        summed, loss = PairwiseSum(parameters), torch.zeros((), device="cuda")
        for parameter in parameters:
            parameter.grad = None
        for number, batch in enumerate(batches):
            summed.begin(loss)
            if exchanged and overlapped and number == len(batches) - 1:
                exchange.begin(summed, 1)
            loss += micro_step(state, state.loss_module, batch, targets, 0, number)
        if exchanged and overlapped:
            exchange.finish(summed, loss, 1)
        else:
            summed.finish(loss)
            if exchanged:
                exchange.add_up(loss, 1)
        return [*(p.grad.clone() for p in parameters if p.grad is not None), loss]

    try:
        for _ in range(3):  # buckets are used again
            for own, sent in zip(add_up(False), add_up(True), strict=True):
                assert torch.equal(own, sent)
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_are_gathered_on_both_devices(nccl):
    for device in ("cpu", "cuda"):
        own = torch.arange(4.0, device=device)
        found = torch.empty_like(own)
        all_gather(found, own)
        assert torch.equal(own, found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_through_nccl_a_model_in_parts_has_the_same_gradients(nccl, tmp_path, precision):
    """FSDP2, with one process: its hooks, its dtypes and its sums."""
    state = make_in(tmp_path, precision=precision, dropout=0.0)
    cut = LossModule(TransformerDecoder.from_config(state.config.model, torch.float32).cuda())
    cut.model.load_state_dict(state.model.state_dict())
    use_cuda_attention(cut.model, False, merged=False)
    Shards(cut, state.device, state.precision, nccl)
    batch, targets = state.batches(0)[0], state.batches.target_count(0)
    losses = [
        micro_step(state, module, batch, targets, 0, 0) for module in (state.loss_module, cut)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5 if precision == "fp32" else 1e-2, atol=0)
    own, parts = (
        torch.cat([whole(p.grad).flatten() for p in module.parameters() if p.grad is not None])
        for module in (state.loss_module, cut)
    )
    assert (own - parts).norm() / own.norm() < (1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_torchrun(tmp_path, count):
    """One process on one card, and the same bits on as many as there are."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--device", "cuda", "--train.accumulation_steps", "8"]
    flags += ["--train.deterministic", "--optimizer.name", "muon"]
    assert run("train.py", *flags, "--name", "alone", cwd=tmp_path).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={count}", str(ROOT / "train.py")]
    done = subprocess.run(
        [*launcher, *flags, "--name", "together"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / "runs" / name for name in ("alone", "together")]
    assert curve(runs[0]) == curve(runs[1])
    ends = [Checkpoint(list_steps(run)[-1]) for run in runs]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0].read(name) == ends[1].read(name), name
