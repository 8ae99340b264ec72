"""Says what this machine has: versions, devices, compiler, caches, backends and why not others."""

import argparse
import json
from typing import Any

from ..kernels.cpu import build
from . import machine
from .backends import backends


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs to read")


def collect() -> dict[str, Any]:
    caches = []
    for cache in machine.caches():
        programs = cache.programs()
        caches.append(
            dict(
                name=cache.name,
                folder=None if cache.folder is None else str(cache.folder),
                programs=len(programs),
                bytes=sum(path.stat().st_size for path in programs),
            )
        )
    return dict(
        versions=machine.versions(),
        devices=machine.devices(),
        compiler=dict(
            command=build.compiler(),
            version=machine.compiler_version(),
            missing=machine.missing_compiler(),
        ),
        caches=caches,
        prebuilt={str(path): trouble for path, trouble in machine.prebuilt().items()},
        backends=[backend._asdict() for backend in backends()],
    )


def text(found: dict[str, Any]) -> list[str]:
    """A line for each thing, a word for what it is at the start."""
    lines = [f"{name:9}{value or 'not there'}" for name, value in found["versions"].items()]
    for device in found["devices"]:
        rest = {name: value for name, value in device.items() if name not in ("device", "name")}
        if "memory" in rest:
            rest["memory"] = machine.size(rest["memory"])
        words = ", ".join(f"{name} {value}" for name, value in rest.items())
        lines.append(f"{device['device']:9}{device['name']}, {words}")
    compiler = found["compiler"]
    command = " ".join(compiler["command"])
    said = compiler["version"] or "does not say its version"
    lines.append(f"compiler {compiler['missing'] or f'{command}: {said}'}")
    for cache in found["caches"]:
        where = cache["folder"] or "nowhere, as this user has no home"
        size = machine.size(cache["bytes"])
        lines.append(f"cache    {cache['name']}: {where}, {cache['programs']} programs, {size}")
    for path, trouble in found["prebuilt"].items():
        lines.append(f"prebuilt {path} {trouble or 'can be used'}")
    for backend in found["backends"]:
        lines.append(f"backend  {backend['name']:8}{backend['state']:8}{backend['why']}")
    return lines


def run(given: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if given.json else "\n".join(text(found)))
    return 0
