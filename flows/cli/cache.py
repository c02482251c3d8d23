"""`adflows cache ...`: list, explain, check and prune the cached results of steps."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import EXIT_USER_ERROR, Json, example, prepare_terminal
from flows.machine.stage import format_seconds
from flows.machine.terminal import print_result, terminal
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from flows.store.artifacts import ArtifactStore
    from flows.store.upkeep import CachedArtifact

app = typer.Typer(
    help="""List, explain, check and prune cached results.

    The cache contains one artifact per step and input: a folder with the step's result. It is in $ADFLOWS_CACHE, by
    default in ~/.cache/adflows.
    """,
    epilog=example("adflows cache ls", "adflows cache prune --older-than 60d"),
    no_args_is_help=True,
)

SHOWN_KEY_LETTERS = 12
"""Number of letters of a key that are printed. A key may be given by any unambiguous beginning."""
SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
AGE_UNITS_S = {"h": 3600.0, "d": 86400.0, "w": 604800.0}

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="Key of an artifact, or the beginning of its key. `ls STEP` prints keys.")
]


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as `500M`, `20G` or `1.5TB`. Raise ConfigError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise ConfigError(f"--max-size {text}: expected a size such as 500M or 20G")
    return int(float(found[1]) * SIZE_UNITS[found[2]])


def parse_age(text: str) -> float:
    """Return the number of seconds of an age such as `12h`, `30d` or `8w`. Raise ConfigError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip().lower())
    if found is None:
        raise ConfigError(f"--older-than {text}: expected an age such as 12h, 30d or 8w")
    return float(found[1]) * AGE_UNITS_S[found[2]]


def show_size(size: int) -> str:
    """Format a number of bytes, for example `3.2 MB`."""
    for unit, below in (("B", 10**3), ("kB", 10**6), ("MB", 10**9)):
        if size < below:
            return f"{size / (below / 1000):.1f} {unit}" if unit != "B" else f"{size} B"
    return f"{size / 10**9:.1f} GB"


def _store(*, writable: bool = False) -> ArtifactStore:
    from flows.store.access import require_cache
    from flows.store.artifacts import ArtifactStore

    require_cache(writable=writable)
    return ArtifactStore()


def _artifact_as_json(each: CachedArtifact) -> dict[str, Any]:
    from flows.store.upkeep import age

    sidecar = each.sidecar
    return {
        "step": each.step,
        "key": each.key,
        "size": each.size,
        "used": age(each),
        "created": None if sidecar is None else sidecar.created,
        "seconds": None if sidecar is None else sidecar.seconds,
    }


@app.command(name="ls", epilog=example("adflows cache ls prepare"))
def list_command(
    step: Annotated[
        str | None,
        typer.Argument(help="Step to list, e.g. prepare: one line per artifact. Default: one line per step."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List cached artifacts.

    Without STEP, prints the number, size and last use of each step's artifacts. With STEP, prints each artifact's key,
    size, computing time and last use.
    """
    from flows.store.step import load_steps
    from flows.store.upkeep import age, list_artifacts

    store = _store()
    found = list_artifacts(store, step)
    if step is not None and not found and step not in (known := load_steps("flows.liver", "flows.zsad")):
        raise ConfigError(f"{step}: not a step; the steps are {', '.join(sorted(known))}")
    if as_json:
        print_result(
            json.dumps({"cache": str(store.root), "artifacts": [_artifact_as_json(each) for each in found]}, indent=1)
        )
        return
    if step is not None:
        for each in found:
            made = "unreadable" if each.sidecar is None else format_seconds(each.sidecar.seconds)
            print_result(
                f"{each.key[:SHOWN_KEY_LETTERS]}  {show_size(each.size):>9}  took {made:>12}  used {age(each):>7} ago"
            )
    else:
        by_step: dict[str, list[CachedArtifact]] = defaultdict(list)
        for each in found:
            by_step[each.step].append(each)
        for name, group in sorted(by_step.items()):
            size = show_size(sum(each.size for each in group))
            print_result(f"{name:<18} {len(group):>6}  {size:>9}  used {age(group[-1]):>7} ago")
    print_result(f"{len(found)} artifacts, {show_size(sum(each.size for each in found))}, in {store.root}")


@app.command(epilog=example("adflows cache explain 3f2a9c"))
def explain(key: KeyArgument, as_json: Json = False) -> None:
    """Show what an artifact was made from.

    Prints the artifact's inputs and settings. Then says whether it is up to date, or what has changed in the program
    since it was made. A stale artifact is computed again by the next run that needs it.
    """
    from flows.store.step import load_steps
    from flows.store.upkeep import find, list_artifacts, outdated

    load_steps("flows.liver", "flows.zsad")
    store = _store()
    each = find(store, key)
    stale = outdated(each)
    parts = each.sidecar.parts if each.sidecar is not None else {}
    makers = {other.sidecar.digest: other for other in list_artifacts(store) if other.sidecar is not None}
    if as_json:
        answer = _artifact_as_json(each) | {"parts": parts, "stale": [change.line for change in stale]}
        print_result(json.dumps(answer, indent=1))
        return
    print_result(f"{each.step} {each.key}")
    if each.sidecar is None:
        print_result("artifact.json cannot be read; the next run computes this step again")
        return
    print_result(
        f"made {each.sidecar.created} in {format_seconds(each.sidecar.seconds)}, {show_size(each.size)}: {each.folder}"
    )
    print_result("made from")
    for name, text in _input_lines(parts.get("inputs", {})):
        maker = makers.get(text)
        print_result(f"  {name}: {text if maker is None else f'{maker.step} {maker.key[:SHOWN_KEY_LETTERS]}'}")
    for change in stale:
        print_result(f"stale: {change.line}")
    if not stale:
        print_result("up to date: a run with these inputs and settings uses it")


def _input_lines(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, below in value.items() for row in _input_lines(below, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        few = [row for number, below in enumerate(value[:3]) for row in _input_lines(below, f"{name}[{number}]")]
        return few + [(name, f"and {len(value) - 3} more")] * (len(value) > 3)
    return [(name, str(value))]


@app.command(epilog=example("adflows cache verify --remove"))
def verify(
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged artifacts. The next run computes them again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check all cached files for damage.

    Reads every file of every artifact and compares its digest with the recorded one. Exit code 2 if a damaged artifact
    remains.
    """
    from flows.store.upkeep import find_damaged
    from flows.store.upkeep import remove as remove_artifact

    prepare_terminal(as_json=as_json)
    store = _store(writable=remove)

    def show(done: int, total: int) -> None:
        if done == 1:
            terminal.announce({"verify": total})
        terminal.submitted("verify")
        terminal.ended("verify")

    with terminal.run():
        found = find_damaged(store, show)
    removed = [damage for damage in found if remove and remove_artifact(store, damage.artifact)]
    if as_json:
        rows = [
            _artifact_as_json(damage.artifact) | {"rule": damage.rule, "removed": damage in removed} for damage in found
        ]
        print_result(json.dumps({"damaged": rows}, indent=1))
    else:
        for damage in found:
            print_result(f"{damage.artifact.folder}: {damage.rule}" + "; removed" * (damage in removed))
        print_result(f"{len(found)} damaged, {len(removed)} removed")
    if len(found) > len(removed):
        raise typer.Exit(EXIT_USER_ERROR)


@app.command(epilog=example("adflows cache prune --older-than 60d --max-size 200G --dry-run"))
def prune(
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Remove artifacts that no run has used for this time, e.g. 12h, 30d or 8w."),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Remove the least recently used artifacts until the rest is not larger, e.g. 200G."
        ),
    ] = None,
    step: Annotated[
        str | None, typer.Option(help="Remove artifacts of this step only, e.g. prepare. Default: all.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed. Remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts that were not used lately.

    Give --older-than, --max-size or both; --older-than is applied first. Artifacts that a run in progress has used
    stay. Old checkpoints of interrupted trainings are removed by their age, too.
    """
    if older_than is None and max_size is None:
        raise ConfigError("prune: give --older-than AGE, --max-size SIZE, or both")
    from flows.store.upkeep import choose_unused, list_artifacts, old_checkpoints
    from flows.store.upkeep import remove as remove_artifact

    age_s = None if older_than is None else parse_age(older_than)
    store, now = _store(writable=not dry_run), time.time()
    everything = list_artifacts(store, step)
    chosen = choose_unused(
        everything,
        older_than_s=age_s,
        max_bytes=None if max_size is None else parse_size(max_size),
        now=now,
        in_use_since=store.oldest_run_start(),
    )
    removed = [each for each in chosen if dry_run or remove_artifact(store, each)]
    checkpoints: list[Path] = [] if age_s is None or step is not None else old_checkpoints(store, age_s, now)
    for path in checkpoints:
        if not dry_run:
            path.unlink(missing_ok=True)
    size = sum(each.size for each in removed)
    if as_json:
        answer = {
            "dry_run": dry_run,
            "removed": [_artifact_as_json(each) for each in removed],
            "checkpoints": [path.name for path in checkpoints],
            "bytes": size,
        }
        print_result(json.dumps(answer, indent=1))
        return
    for each in removed:
        used = _artifact_as_json(each)["used"]
        print_result(f"{each.step:<18} {each.key[:SHOWN_KEY_LETTERS]}  {show_size(each.size):>9}  used {used:>7} ago")
    for path in checkpoints:
        print_result(f"{'checkpoint':<18} {path.name}")
    verb = "would be removed" if dry_run else "removed"
    left = sum(each.size for each in everything) - size
    print_result(f"{len(removed)} artifacts {verb}, {show_size(size)}; {show_size(left)} remain")
