"""Writes what pyproject.toml's extras require, one file an extra: `write_requirements.py pyproject.toml EXTRA...`

The image installs torch and the rest in layers of their own, and what changes in one leaves the other in the cache.
What every extra needs, the package's own requirements, stands in each file.
"""

import sys
import tomllib
from pathlib import Path


def main(pyproject: str, *extras: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    for extra in extras:
        # torch alone, so that it has its layer to itself; `dsg[...]` names another extra, which has its own file
        needs = [] if extra == "torch" else project["dependencies"]
        own = [need for need in project["optional-dependencies"][extra] if not need.startswith("dsg[")]
        Path(f"{extra}.txt").write_text("\n".join([*needs, *own]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
