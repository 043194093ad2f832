"""A decoder as an ONNX graph: ids (B, T), of any B and of T up to max_len, to logits (B, T, V).

Needs the packages `onnx` and `onnxscript`, with which torch.onnx works.
"""

import contextlib
import logging
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np

from common.errors import UserError
from model.config import ModelConfig

LARGEST = 1 << 30  # bytes of weights in the graph's own file; protobuf ends at 2 GB


def write_onnx(config: ModelConfig, weights: Mapping[str, np.ndarray], folder: Path):
    """Writes model.onnx, with model.onnx.data beside it for a large model. Raises UserError."""
    try:
        import onnx  # noqa: F401, which torch.onnx asks for late, and less clearly
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format onnx: needs the package {error.name}, which is not installed; install it "
            f"with pip install {error.name}"
        ) from None
    import torch

    from model.transformer_full import TransformerDecoder

    decoder = TransformerDecoder.from_weights(config, weights).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=config.max_len)
    ids = torch.zeros(2, 2, dtype=torch.int64)  # a 1 would be taken to be always 1
    with quiet():
        program = torch.onnx.export(
            decoder,
            (ids,),
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes={"ids": {0: batch, 1: length}},
            verbose=False,
        )
        assert program is not None  # as with dynamo = True, the default
        large = 4 * config.num_parameters() > LARGEST
        file = folder / "model.onnx"
        try:
            program.save(file, external_data=large)
        except OSError as error:  # a failed write does not say which file it was
            raise OSError(error.errno, error.strerror, str(file)) from None


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without what the exporter says of packages that it misses, and of its own old calls."""
    log, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)
