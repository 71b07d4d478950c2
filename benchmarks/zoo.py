"""Which networks of torchvision, timm, transformers and ultralytics can be trained for int8, one by one.

    python -m benchmarks.zoo                               # all of them, an hour on one core
    python -m benchmarks.zoo resnet18 'timm/vit_*'         # some, by name or glob
    python -m benchmarks.zoo --report                      # the table again, from the figures so far

Each untrained network is prepared for x86, trained one step on two images, run once more in training mode and
converted. Beside it, PyTorch's own `prepare_qat_fx` and `convert_fx` do the same. Each runs in a process of
its own, bounded in CPU time and memory; figures are stored after each, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.zoo_measure import measure
from benchmarks.zoo_models import entries
from benchmarks.zoo_report import report

WAYS = ("ours", "torch")
PATIENCE = 20
"""How many times its CPU time a process may take on a machine that is busy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="names or globs; all by default")
    parser.add_argument("--output", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--json", type=Path, default=Path("zoo.json"), help="where figures are kept")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--again", action="store_true", help="measure also what has figures")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--timeout", type=float, default=300, help="CPU seconds for each")
    parser.add_argument("--memory", type=float, default=16, help="GiB of address space for each")
    args = parser.parse_args()
    if not args.report:
        run(args)
    args.output.write_text(report(_read(args.json)))
    print(f"{args.output}, from {args.json}")


def run(args: argparse.Namespace) -> None:
    figures = {} if args.again and not args.names else _read(args.json)
    chosen = [entry.name for entry in entries() if _matches(entry.name, args.names)]
    if not chosen:
        raise SystemExit(f"No network of the zoo matches {args.names}.")
    wanted = [
        (name, way)
        for name in chosen
        for way in args.ways
        if (args.again or way not in figures.get(name, {})) and not (way == "torch" and "(eager)" in name)
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo_measure"])
    with ThreadPoolExecutor(args.jobs) as pool:
        done = {pool.submit(_bounded, context, name, way, args): (name, way) for name, way in wanted}
        for i, (future, (name, way)) in enumerate(done.items()):
            figures.setdefault(name, {})[way] = row = future.result()
            args.json.write_text(json.dumps(figures, indent=1))
            shown = (
                f"ok {row['seconds']:.0f} s {row['sqnr']:.1f} of {row.get('floor', 0):.1f} dB"
                if row["ok"]
                else row["reason"]
            )
            print(f"[{i + 1}/{len(done)}] {name} {way}: {shown}", flush=True)


def _bounded(context: Any, name: str, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures a network in a process of its own, which may crash or be too slow."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, name, way, args.timeout, args.memory))
    process.start()
    sender.close()
    try:
        if receiver.poll(args.timeout * PATIENCE):
            return receiver.recv()
        return _timeout(args.timeout)
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return _timeout(args.timeout)
        return {"ok": False, "error": "crash", "reason": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _timeout(seconds: float) -> dict[str, Any]:
    return {"ok": False, "error": "timeout", "reason": f"takes longer than {seconds:.0f} s"}


def _child(sender: Any, name: str, way: str, seconds: float, gigabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    sender.send(measure(name, way, gigabytes))


def _matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
