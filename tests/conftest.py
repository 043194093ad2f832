"""What holds for every test: a processor's share of threads where several workers run beside each
other (`pytest -n auto`). OpenMP's threads wait in a busy loop, so that two programs of two threads
on two cores take many times as long as one after the other."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # read when torch and NumPy load, by the workers and by the programs they start
    share = max(1, (os.cpu_count() or 1) // workers)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(share))
