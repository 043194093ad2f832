"""What is trained side by side: this project's decoder and its peers, on the same random ids.

Each maker returns step(ids, targets), which trains one optimizer step and returns the loss. The
peers are set up as they ship: nanoGPT's own model and optimizer, in float32 on a CPU, compiled and
not, and compiled in bf16 on CUDA, where TF32 is allowed and a loss is read every tenth step; GPT-2
of transformers and torch.nn.TransformerEncoder with torch.optim.AdamW. Dropout is 0 on all sides.
"""

import contextlib
import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from common.device import PRECISIONS
from common.errors import UserError
from common.files import user_path
from model.config import ModelConfig
from model.cpu_layers import use_cpu_layers
from model.cuda_attention import prefers_cudnn, use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.compile import CompiledLoss
from training.config import Config, TrainConfig, load
from training.optimizer import create_optimizers
from training.setup import configure_torch, recompute_layers
from training.state import Progress, TrainState
from training.step import forward_backward
from training.step import update as clip_and_update

CONFIGS = Path(__file__).parent.parent / "configs"
GPT = ModelConfig(
    50304, 768, 12, 12, 3072, 1024, 0.0, positions="learned", norm_first=True, final_norm=True,
    activation="gelu", bias=False, scale_embedding=False, tie_embeddings=True,
)  # fmt: skip
FULL = replace(load(CONFIGS / "full.toml").model, vocab_size=9000, dropout=0.0)
MODELS = {  # name: (shape, sequences, their length)
    "4x128": (replace(GPT, vocab_size=65, d_model=128, n_heads=4, n_layers=4, d_ff=512), 12, 64),
    "full": (FULL, 32, 128),
    "gpt2_124m": (GPT, 16, 1024),
    "tiny": (replace(GPT, vocab_size=65, d_model=32, n_heads=2, n_layers=2, d_ff=128), 2, 16),
}
PEERS = {  # name: what it is called in a table
    "nanogpt": "nanoGPT",  # on CUDA compiled
    "nanogpt-compiled": "nanoGPT, compiled",
    "gpt2-fp32": "GPT-2 of transformers, fp32",
    "gpt2-bf16": "GPT-2 of transformers, bf16",
    "encoder-fp32": "torch.nn.TransformerEncoder, fp32",
    "encoder-bf16": "torch.nn.TransformerEncoder, bf16",
}
CLIP = 1.0
LOG_INTERVAL = 10  # of nanoGPT's config/train_gpt2.py: steps whose loss is read


def make(side: str, shape: ModelConfig, length: int, device, checkout: str = "", **how):
    """The step of a side: "fp32" or "bf16" is ours in that precision, `how` as in `ours`; else one
    of PEERS."""
    torch.manual_seed(0)
    kind, _, precision = side.partition("-")
    if side in ("fp32", "bf16"):
        configure_torch(TrainConfig(), device)  # as train.py does
        return ours(shape, side, device, **how)
    if kind == "nanogpt":
        with contextlib.redirect_stdout(sys.stderr):
            return nanogpt(user_path(checkout), shape, length, device, precision == "compiled")
    return peer({"gpt2": gpt2, "encoder": Encoder}[kind](shape, length), precision, device)


def ours(
    shape: ModelConfig,
    precision_name: str,
    device,
    recompute=False,
    accumulation=1,
    compiled: bool | None = None,
):
    """The decoder as training/setup.py puts it together, and a step of training/step.py.

    recompute: as --train.checkpoint_activations. accumulation: micro-batches a step. compiled: as
    --compile, for the first shape there is; None: on CUDA alone. The step takes `part` too, a
    function that gives a context to time a part of it in: forward, backward, optimizer.
    """
    precision = PRECISIONS[precision_name]
    config = Config(device=str(device), precision=precision.name, model=shape)
    model = TransformerDecoder.from_config(shape, precision.weights).to(device)
    if device.type == "cuda":
        use_cuda_attention(model, prefers_cudnn(device, fixed_shapes=True))
    elif device.type == "cpu":
        use_cpu_layers(model)
    if recompute:
        recompute_layers(model)
    optimizers = create_optimizers(model, config.optimizer, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    no_data = cast(Any, None)  # random ids take its place
    state = TrainState(
        config, device, precision, no_data, no_data, None, LossModule(model), optimizers, scaler,
        Progress(),
    )  # fmt: skip
    compiles = device.type == "cuda" if compiled is None else compiled
    loss_module = None

    def step(ids, targets, part=nullcontext):
        nonlocal loss_module
        micro_batches = list(zip(ids.chunk(accumulation), targets.chunk(accumulation), strict=True))
        if loss_module is None:
            loss_module = state.loss_module
            if compiles:
                loss_module = CompiledLoss(state.loss_module, tuple(micro_batches[0][0].shape))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for some, wanted in micro_batches:
            inputs = [some, wanted.flatten(), None]
            total += forward_backward(state, loss_module, inputs, targets.numel(), part)
        with part("optimizer"):
            loss, _ = clip_and_update(state, total).tolist()  # as train.py waits for it
        return loss

    return step


def nanogpt_module(checkout: Path):
    """nanoGPT's model.py, as it stands. Raises UserError where it does not."""
    file = checkout / "model.py"
    if not file.is_file():
        raise UserError(f"--nanogpt {checkout}: no model.py there; give a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None and spec.loader is not None  # of a file of Python
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def nanogpt(checkout: Path, shape: ModelConfig, length: int, device, compiled: bool = False):
    """nanoGPT's model and optimizer, in mixed precision and compiled on CUDA.

    compiled: on a CPU too, as with its --compile=True.
    """
    module = nanogpt_module(checkout)
    config = module.GPTConfig(
        block_size=length, vocab_size=shape.vocab_size, n_layer=shape.n_layers,
        n_head=shape.n_heads, n_embd=shape.d_model, dropout=0.0, bias=False,
    )  # fmt: skip
    model = module.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
    cuda = device.type == "cuda"
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    run = torch.compile(model) if cuda or compiled else model
    taken, read = 0, float("nan")

    def step(ids, targets):
        nonlocal taken, read
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            _, loss = run(ids, targets)
        update(model, optimizer, loss)
        if not cuda or taken % LOG_INTERVAL == 0:  # a GPU is waited for no more often than there
            read = loss.item()
        taken += 1
        return read

    return step


def update(model, optimizer, loss):
    """What a peer's step does after its forward pass."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peer(model, precision: str, device):
    """A module from ids to logits, with cross-entropy and AdamW."""
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1)

    def step(ids, targets):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        update(model, optimizer, loss)
        return loss.item()

    return step


def gpt2(shape: ModelConfig, length: int) -> torch.nn.Module:
    """GPT-2 of transformers, in the same sizes."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: pip install -e '.[bench]'") from None
    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=length, n_embd=shape.d_model,
        n_layer=shape.n_layers, n_head=shape.n_heads, n_inner=shape.d_ff, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    return Logits()


class Encoder(torch.nn.Module):
    """PyTorch's own encoder layers behind a causal mask, with learned positions."""

    def __init__(self, shape: ModelConfig, length: int):
        super().__init__()
        C = shape.d_model
        layer = torch.nn.TransformerEncoderLayer(
            C, shape.n_heads, shape.d_ff, 0.0, shape.activation, batch_first=True,
            norm_first=shape.norm_first, bias=shape.bias,
        )  # fmt: skip
        self.layers = torch.nn.TransformerEncoder(layer, shape.n_layers, enable_nested_tensor=False)
        self.embed = torch.nn.Embedding(shape.vocab_size, C)
        self.positions = torch.nn.Embedding(length, C)
        self.output = torch.nn.Linear(C, shape.vocab_size, bias=False)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, ids):
        T = ids.shape[1]
        x = self.embed(ids) + self.positions.weight[:T]
        return self.output(self.layers(x, self.mask[:T, :T], is_causal=True))
