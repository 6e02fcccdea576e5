"""Further servers behind the same address: what one of them is asked for all of them.

An engine that runs several servers behind one proxy (`dsg.service.ray_engine`) gives each a `Peers`; a server that is
alone has none.
"""

import re
from collections.abc import Mapping
from typing import Protocol

_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")
_SAMPLE = re.compile(r"([^\s{]+)(?:\{(.*)\})? (\S+)")


class Peers(Protocol):
    """All servers of one service, the one that asks among them."""

    async def metrics(self) -> Mapping[str, str]:
        """Each server's metrics by its name, in Prometheus' text format; without those that do not answer in time."""

    async def reload(self, name: str) -> list[str]:
        """Have the others load a model anew; the names of those that did not."""


def merged(texts: Mapping[str, str]) -> bytes:
    """Metrics of several servers as one page, each sample under the label `replica` of its server.

    Args:
        texts: server -> its metrics, as `prometheus_client` writes them.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if head := _FAMILY.match(line):
                family = head[1]
                lines = heads.setdefault(family, [])
                samples.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif sample := _SAMPLE.fullmatch(line):
                name, labels, value = sample.groups()
                of_replica = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples[family].append(f"{name}{{{of_replica}}} {value}")
    # A family's samples stand together, whichever server they come from: the format wants it so.
    return "".join(f"{line}\n" for family in heads for line in (*heads[family], *samples[family])).encode()
