"""List what is kept for quicker starts, or delete it.

'jqlora train', 'eval' and 'generate' keep the 4-bit codes that they make of a model, and the
programs that they compile, in $JQLORA_CACHE or ~/.cache/jqlora. A copy is used for as long as the
model's files, the quantization and the dtype are the same; it may be deleted at any time. Programs
are listed by the kind of processor that they were compiled on; together they take at most 512 MiB,
and those that were not used for longest go first.
JQLORA_CACHE=off, model.cache=off in a config, or --cache off keep nothing.
"""

import argparse

HELP = "list or delete the 4-bit codes and programs kept for quicker starts"
EXAMPLES = ("jqlora cache", "jqlora cache --clear", "jqlora cache /scratch/kept --clear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and what to do with it."""
    parser.add_argument("folder", nargs="?", metavar="DIR", help="another folder than the default")
    parser.add_argument("--clear", action="store_true", help="delete all that is kept there")


def run(args: argparse.Namespace) -> int:
    """Print a line a copy, and the programs' size."""
    from pathlib import Path

    from jqlora.cli.shared import say
    from jqlora.io.cache import Cache, bytes_of, cache_folder

    cache = Cache(Path(args.folder) if args.folder else cache_folder())
    found = cache.kept()
    for path, what in found.items():
        print(f"{bytes_of(path) / 2**20:10,.1f} MiB  {what}  {path}")
    if args.clear:
        cache.clear()
    say(f"{'deleted' if args.clear else 'kept'}: {len(found)} entries in {cache.folder}")
    return 0
