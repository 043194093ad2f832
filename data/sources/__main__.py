"""Built-in sources, listed or made beforehand.

python -m data.sources list            the built-in sources
python -m data.sources fetch NAME      prepare one beforehand; prints its files
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from common import cli
from data.config import DEFAULT_CACHE_DIR, SOURCES
from data.sources.builtin import NAMED, named_files


def main() -> int:
    """`python -m data.sources`."""
    parser = cli.Parser(prog="python -m data.sources", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the built-in sources")
    fetching = commands.add_parser("fetch", help="prepare a source, and print its files")
    fetching.add_argument("name", choices=SOURCES)
    options = parser.parse_args()
    if options.command == "fetch":
        print(*named_files(options.name, DEFAULT_CACHE_DIR, print), sep="\n")
    else:
        for name, (kind, description) in NAMED.items():
            print(f"{name:15} {kind:7} {description}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m data.sources", main))
