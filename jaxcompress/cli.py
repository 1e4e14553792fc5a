"""The command line: ``jaxcompress demo | inspect FILE | verify FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence

from jaxcompress import __version__, io, report

_OK, _FAILED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a bad file, 2 for bad usage."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (io.FileError, OSError) as error:
        print(f"jaxcompress: {error}", file=sys.stderr)
        return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxcompress", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="compress a digit classifier end to end")
    demo.add_argument("--out", default="out/digits", help="folder for the results")
    demo.set_defaults(run=_demo)
    for name, run, text in (
        (
            "inspect",
            _inspect,
            "what a file holds: method, bits and bytes of each weight",
        ),
        ("verify", _verify, "check every byte of a file"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return parser


def _demo(args: argparse.Namespace) -> int:
    try:
        digits = importlib.import_module("experiments.digits.run")
    except ModuleNotFoundError as error:
        print(
            f"jaxcompress: the demo needs {error.name!r}. It runs from a source "
            "checkout: `make demo` there installs what it needs.",
            file=sys.stderr,
        )
        return _FAILED
    digits.main(["--out", args.out])
    return _OK


def _inspect(args: argparse.Namespace) -> int:
    manifest = io.read_manifest(args.file)
    sizes = report.size(io.load(args.file, as_numpy=True))
    known = {k: manifest[k] for k in ("version", "recipe", "metadata")}
    if args.json:
        print(json.dumps({**known, **sizes.to_dict()}, indent=2))
        return _OK
    print(sizes)
    for key, value in known.items():
        if value:
            print(f"{key}: {value}")
    return _OK


def _verify(args: argparse.Namespace) -> int:
    found = io.verify(args.file)
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(f"{args.file}: {found.arrays} arrays, {found.bytes:,} bytes, all intact")
    return _OK


if __name__ == "__main__":
    sys.exit(main())
