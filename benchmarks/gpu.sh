#!/usr/bin/env bash
# Everything there is to measure on a GPU, in one go: benchmarks/gpu.md. Flags: those of benchmarks.gpu.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
