"""``eos``: what the command line does, from `list` to `archive`; `eos --help` lists it."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections import Counter
from typing import Any

from eos_utils import catalogue, claims, data, ranks, store
from eos_utils.run import pick_device

# Errors that are the user's to mend: shown as one line, without a traceback.
EXPECTED = (ValueError, KeyError, data.DataError, store.StoreError, FileNotFoundError)


def notebooks() -> dict[str, pathlib.Path]:
    """The notebooks by name."""
    return {path.stem: path for path in sorted((store.root() / "notebooks").glob("*.ipynb"))}


def _notebook(name: str) -> pathlib.Path:
    known = notebooks()
    stem = pathlib.Path(name).stem
    if stem not in known:
        raise KeyError(f"no notebook {name!r}; there are {', '.join(known)}")
    return known[stem]


def _list(arguments: argparse.Namespace) -> int:
    from eos_utils.parameters import declared

    for name, path in notebooks().items():
        print(f"notebook {name}")
        for p in declared(path):
            print(f"    {p.name:<14} {p.type:<9} {p.default:<12} {p.help}")
    print("\nruns of the catalogue (minutes on two cores)")
    for entry in catalogue.catalogue().values():
        print(f"    {entry.name:<30} {entry.minutes:>5g} min  {entry.status().state:<10} {entry.about}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    entries = [catalogue.find(arguments.name)] if arguments.name else list(catalogue.catalogue().values())
    states: Counter[str] = Counter()
    for entry in entries:
        status = entry.status()
        states[status.state] += 1
        print(f"{status.state:<11} {entry.name:<30} {entry.experiment.key}  {status.why}")
    known = {entry.experiment.key for entry in catalogue.catalogue().values()}
    for key in store.Store().keys():
        if key not in known and not arguments.name:
            print(f"{'unlisted':<11} {'':<30} {key}  no run of the catalogue has this key; delete it or list it")
    print(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    return 0


def _record(arguments: argparse.Namespace) -> int:
    if bool(arguments.name) == arguments.missing:
        raise ValueError("give the name of a run, or --missing for all that are pending or stale")
    entries = [catalogue.find(arguments.name)] if arguments.name else list(catalogue.catalogue().values())
    failed = 0
    with ranks.joined(pick_device(arguments.device)) as group:
        shown = group is None or group.first
        for entry in entries:
            try:
                done = catalogue.record(entry, device=arguments.device, replace=arguments.replace, ranks=group)
                if shown:
                    print(f"{entry.name}: {'recorded' if done else 'a usable record is there already'}", flush=True)
            except EXPECTED as error:  # one run that fails does not stop the queue, but for ranks, which go in step
                if group is not None:
                    raise
                failed = 2
                print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
    return failed


def _adopt(arguments: argparse.Namespace) -> int:
    from eos_utils.foreign import adopt

    failed = 0
    folder = pathlib.Path(arguments.folder)
    for key in store.Store(folder).keys():
        try:
            print(f"{key}: {'taken' if adopt(folder, key) else 'a usable record is here already'}", flush=True)
        except store.StoreError as error:  # one that is refused does not stop the others
            failed = 2
            print(error, file=sys.stderr, flush=True)
    return failed


def _archive(arguments: argparse.Namespace) -> int:
    from eos_utils.archive import archive

    print(archive(store.root(), pathlib.Path(arguments.output) if arguments.output else None))
    return 0


def _faults(arguments: argparse.Namespace) -> int:
    import subprocess

    share = [] if arguments.share is None else ["--share", str(arguments.share)]
    command = [sys.executable, "-m", "faults", *arguments.name, *share, "--jobs", str(arguments.jobs)]
    return subprocess.run(command, cwd=store.root()).returncode


def _verify(arguments: argparse.Namespace) -> int:
    from eos_utils.verify import INSIDE, replay, survey, whole

    if arguments.all:
        rows = []
        for row in survey(device=arguments.device, jobs=arguments.jobs):
            print(f"{row.name}: {row.done}: {row.found}", file=sys.stderr, flush=True)
            rows.append(row)
        for row in rows:
            outcome = {True: "ok", False: "NOT OK", None: "-"}[row.agrees]
            print(f"{outcome:<7} {row.name:<34} {row.done:<12} {row.found}")
        unjudged = [row for row in rows if row.agrees is None]
        print(f"{sum(row.agrees is True for row in rows)} of {len(rows) - len(unjudged)} agree", end="")
        if unjudged:
            print(f"; {len(unjudged)} begin past the edge of a run that goes another way on this machine", end="")
            print(f", {sum(row.joins for row in unjudged)} of them at what is on record for it", end="")
        print()
        return int(not rows or any(row.agrees is False for row in rows))
    if arguments.whole:
        if not arguments.name:
            raise ValueError("--whole computes a run anew: give its name")
        outside = whole(catalogue.find(arguments.name), device=arguments.device)
        print("\n".join(outside) or f"{arguments.name}: {INSIDE}")
        return int(bool(outside))
    entries = [catalogue.find(arguments.name)] if arguments.name else list(catalogue.catalogue().values())
    states = {e.name: e.status() for e in entries}
    there = [e for e in entries if states[e.name].state in ("fresh", "unverified")]
    failed = False
    for name, status in states.items():
        if status.state == "stale":
            failed = True
            print(f"{name}: stale, nothing to replay: {status.why}")
    if not there and not failed:
        print("nothing to verify: no run is on record")
        return 1 if arguments.name else 0
    for entry in there[:1] if arguments.quick else there:
        replays = replay(entry, device=arguments.device, quick=arguments.quick)
        agrees = all(r.agrees for r in replays)
        failed |= any(r.agrees is False for r in replays)
        for r in replays:
            print(f"{entry.name}: {r}", flush=True)
        if agrees and not arguments.quick and entry.status().state == "unverified":
            store.Store().restamp(entry.experiment.key)
            print(f"{entry.name}: stamped as verified with this code")
    return int(failed)


def _given(pairs: list[str]) -> dict[str, str]:
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"-p {pair}: write name=value")
        given[name.strip()] = value.strip()
    return given


def _run(arguments: argparse.Namespace) -> int:
    from eos_utils.book import execute
    from eos_utils.parameters import check_given

    path = _notebook(arguments.notebook)
    given: dict[str, Any] = check_given(path, _given(arguments.parameter))
    if arguments.fresh:
        given["source"] = "live"
    out = pathlib.Path(arguments.output or f"{path.stem}.out.ipynb")
    print(execute(path, out, given, progress=True))
    return 0


def _refute(arguments: argparse.Namespace) -> int:
    from eos_utils.refute import refute

    source = "live" if arguments.fresh else "auto"
    how = {"source": source, "device": arguments.device, "first": arguments.first}
    text = refute(arguments.claim, _given(arguments.parameter), **how)
    out = pathlib.Path(arguments.output or f"refute-{arguments.claim}.md")
    out.write_text(text, encoding="utf-8")
    print(f"{text}\n{out}")
    return 0


def _smoke(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    import yaml

    from eos_utils.book import execute_apart
    from eos_utils.parameters import check_given, declared

    root = store.root()
    folder = root / "_build" / "smoke"
    folder.mkdir(parents=True, exist_ok=True)

    def live(item: tuple[str, pathlib.Path]) -> str:
        name, path = item
        given = yaml.safe_load((path.parent / "params" / f"{name}.smoke.yaml").read_text(encoding="utf-8"))
        dataset = "synthetic data"
        if any(p.name == "dataset" for p in declared(path)):
            here = data.cifar10_available(given.get("n", 1))
            dataset = given.setdefault("dataset", "cifar10" if here else "digits")
        begun = time.monotonic()
        failure = execute_apart(root, path, folder / path.name, check_given(path, given))
        how = "failed" if failure else f"passed in {time.monotonic() - begun:.0f} s"
        print(f"{name}: a small live run on {dataset} {how}", flush=True)
        return failure

    with ThreadPoolExecutor(max_workers=max(1, arguments.jobs)) as pool:
        failures = [failure for failure in pool.map(live, notebooks().items()) if failure]
    print("\n".join(failures), end="\n" if failures else "")
    return int(bool(failures))


def _claims(arguments: argparse.Namespace) -> int:
    root = store.root()
    if arguments.update:
        for name in claims.update(root):
            print(f"new: {name}")
    drifts = claims.drift(root) if arguments.check else []
    for line in drifts:
        print(f"drift: {line}")
    counted = Counter(row["as_printed"] for row in claims.ledger(root))
    print(", ".join(f"{count} {verdict}" for verdict, count in counted.most_common()))
    return int(bool(drifts))


def _book(arguments: argparse.Namespace) -> int:
    from eos_utils.book import build

    print(build(store.root(), jobs=arguments.jobs, cluster=arguments.cluster))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from eos_utils.book import check

    html = store.root() / "_build" / "html"
    if not (html / "index.html").is_file():
        raise FileNotFoundError("there is no book yet; build it with `make book`")
    problems = check(html)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems in the built book")
    return int(bool(problems))


def _sweep(arguments: argparse.Namespace) -> int:
    from eos_utils import study

    entries, records = study.read(pathlib.Path(arguments.file))
    if arguments.dry_run:
        for entry in entries:
            print(f"{records.status(entry.experiment.key).state:<10} {entry.name:<30} {entry.minutes:>5g} min")
        return 0
    outcomes = study.run_many(
        entries,
        store=records,
        workers=arguments.workers,
        threads=arguments.threads,
        device=arguments.device,
        cluster=arguments.cluster,
        options={name: yaml_value(value) for name, value in _given(arguments.option).items()},
        retries=arguments.retries,
        tell=lambda line: print(line, flush=True),
    )
    print(study.table(outcomes))
    print(f"records: {records.folder}")
    return int(any(o.state in ("failed", "not run") for o in outcomes))


def yaml_value(text: str) -> Any:
    """A value given on the command line: a number, a list, or the text as it is."""
    import yaml

    return yaml.safe_load(text)


def _pdf(arguments: argparse.Namespace) -> int:
    from eos_utils.pdf import pdf

    print(pdf(store.root()))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="eos", description="The Edge of Stability companion")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    add("list", _list, "notebooks with their parameters, and the runs of the catalogue")
    add("status", _status, "how far each recorded run can be relied on, and why").add_argument("name", nargs="?")
    sub = add("record", _record, "compute a run of the catalogue into results/; an interrupted one resumes")
    sub.add_argument("name", nargs="?")
    sub.add_argument("--missing", action="store_true", help="all runs that are pending or stale, one after the other")
    sub.add_argument("--replace", action="store_true", help="also where a usable record is there")
    sub.add_argument("--device", default="auto")
    sub = add("adopt", _adopt, "take the records of another folder, looked at in a process of their own first")
    sub.add_argument("folder")
    sub = add("verify", _verify, "replay recorded runs from known points and compare")
    sub.add_argument("name", nargs="?")
    sub.add_argument("--quick", action="store_true", help="one run from one point")
    sub.add_argument("--whole", action="store_true", help="compute the run anew and compare its statistics")
    sub.add_argument("--all", action="store_true", help="the first steps of every run, and three runs as a whole")
    sub.add_argument("--jobs", type=int, default=1, help="with --all: runs at a time, with one thread each (1)")
    sub.add_argument("--device", default="auto")
    sub = add("run", _run, "execute a notebook with your own parameters")
    sub.add_argument("notebook")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--fresh", action="store_true", help="compute, whatever is on record")
    sub.add_argument("-o", "--output", help="where the executed notebook goes (default: NOTEBOOK.out.ipynb)")
    sub = add("refute", _refute, "apply a claim's rule with other settings, and write a report against the claim")
    sub.add_argument("claim")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--fresh", action="store_true", help="compute, whatever is on record")
    sub.add_argument("--first", type=int, metavar="N", help="only the first N of the runs that the rule names")
    sub.add_argument("--device", default="auto")
    sub.add_argument("-o", "--output", help="where the report goes (default: refute-CLAIM.md)")
    sub = add("smoke", _smoke, "run every notebook live with its small parameters")
    sub.add_argument("--jobs", type=int, default=2, help="notebooks executed at a time, each with one thread")
    sub = add("claims", _claims, "the verdicts on record")
    sub.add_argument("--check", action="store_true", help="fail if a verdict no longer follows from the results")
    sub.add_argument("--update", action="store_true", help="evaluate all rules and write the ledger")
    sub = add("sweep", _sweep, "compute what is missing of many runs, on processes or on a cluster")
    sub.add_argument("file", help="such as sweeps/fg_width.yaml")
    sub.add_argument("--workers", type=int, default=2, help="runs at a time")
    sub.add_argument("--threads", type=int, default=1, help="of each run")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--cluster", default="", help="Dask: local, slurm, pbs, or the address of a scheduler")
    sub.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the batch jobs: queue=gpu")
    sub.add_argument("--retries", type=int, default=2, help="of a run whose worker was lost")
    sub.add_argument("--dry-run", action="store_true", help="list the runs and their state, compute nothing")
    sub = add("book", _book, "execute the notebooks and build the book")
    sub.add_argument("--jobs", type=int, default=2, help="notebooks executed at a time, each with one thread")
    sub.add_argument("--cluster", default="", help="execute them on Dask, as in `eos sweep`")
    add("pdf", _pdf, "the built book as one PDF (needs chromium)")
    add("check", _check, "internal links, anchors and alt texts of the built book")
    sub = add("faults", _faults, "break things on purpose, count what happens, and record the table of the book")
    sub.add_argument("name", nargs="*", help="scenarios; without a name, all")
    sub.add_argument("--share", type=float, help="of the full counts, from 0 to 1 (default 1)")
    sub.add_argument("--jobs", type=int, default=2, help="scenarios at a time (2)")
    sub = add("archive", _archive, "one deterministic zip of sources, results and the built book, with checksums")
    sub.add_argument("-o", "--output", help="where it goes (default: _build/eos-companion-VERSION.zip)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for errors that the user can mend, 130 for Ctrl-C)."""
    chosen = parser().parse_args(arguments)
    try:
        if ranks.launched() and chosen.command != "record":
            raise ValueError("only `record` shares its work among ranks; start this one without torchrun")
        return int(chosen.function(chosen))
    except EXPECTED as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"eos {chosen.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__module__.startswith("eos_utils"):
            print(f"eos {chosen.command}: {error}", file=sys.stderr)
            return 2
        raise
