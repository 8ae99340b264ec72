"""Runs the tests with other versions of Python, torch, Triton, NumPy and CuPy, one after another.

python tests/project/matrix.py [name ...]    of all environments, or of those named

The environment NAME lies in .venv-NAME and has the versions of constraints/NAME.txt, from the
package index alone: pip's configuration on this machine has no say. Exits with 1 if a test failed
in one of them, or if it could not be made."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Environment(NamedTuple):
    python: str
    extra: str


ENVIRONMENTS = {
    "gpu-machine": Environment("3.12", "test"),
    "newest": Environment("3.13", "test"),
    "oldest": Environment("3.11", "test-cuda12"),
}


def index_alone() -> dict[str, str]:
    """The environment for a pip that takes nothing but what the package index has."""
    kept = {"PIP_CERT", "PIP_INDEX_URL", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k in kept}
    return {**environment, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def find_python(version: str) -> str:
    """One of this version that can make environments: of the search path, or of pyenv."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for candidate in (f"python{version}", *map(str, pyenv)):
        try:
            done = subprocess.run([candidate, "-c", "import ensurepip, venv"], capture_output=True)
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    raise FileNotFoundError(f"no Python {version} with venv and ensurepip was found")


def install(name: str) -> str:
    """Make the environment, or bring it up to date. Returns its Python."""
    version, extra = ENVIRONMENTS[name]
    folder = ROOT / f".venv-{name}"
    python = str(folder / "bin/python")
    if not Path(python).exists():
        subprocess.run([find_python(version), "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    # An old pip downloads all packages only to read their metadata.
    subprocess.run([*pip, "--upgrade", "pip"], check=True, env=index_alone())
    constraints = ["--constraint", str(ROOT / f"constraints/{name}.txt")]
    command = [*pip, *constraints, "--editable", f"{ROOT}[{extra}]"]
    subprocess.run(command, check=True, env=index_alone())
    return python


def run(name: str) -> str:
    """What came of it, in words: nothing if all tests passed."""
    print(f"== {name}", flush=True)
    try:
        python = install(name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"could not be made: {error}"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "(not slow and not examples) or index", "-n", "2", "--dist", "worksteal"]
    done = subprocess.run(command, cwd=ROOT)
    return "" if done.returncode == 0 else f"pytest exited with {done.returncode}"


def main(names: list[str]) -> int:
    unknown = {*names} - {*ENVIRONMENTS}
    if unknown:
        print(
            f"There is no {', '.join(sorted(unknown))}: {', '.join(ENVIRONMENTS)} are the "
            "environments."
        )
        return 2
    results = {name: run(name) for name in names or ENVIRONMENTS}
    for name, trouble in results.items():
        print(f"== {name}: {trouble or 'all tests passed'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
