"""One of several processes that run command lines of train.py, one after another, in itself.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... python -m tests.distributed.worker '[["--config", ...], ...]'

Prints their exit statuses as JSON; one that fails ends the process, as it ends train.py. Loading
PyTorch takes longer than a tiny run.
"""

import json
import sys

import train
from common import cli

if __name__ == "__main__":
    statuses = []
    for flags in json.loads(sys.argv[1]):
        sys.argv[1:] = flags
        statuses.append(cli.run("train.py", train.main))
    print(f"statuses: {json.dumps(statuses)}")
