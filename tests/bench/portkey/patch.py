"""Patches Portkey's gateway where its streams fail on Node 20, so that it can be measured at all.

`python patch.py FOLDER`, FOLDER with its node_modules. On Node 20 every stream of 1.15.2 ends as
`TypeError: immutable`: it appends headers to the answer of `fetch`, whose headers Node does not let
anybody change (Portkey's issues 1389 and 1550). A copy of the answer takes them. The copy shares
the body, is made only for streams, and costs one object: it does Portkey no harm.
"""

from __future__ import annotations

import sys
from pathlib import Path

SERVER = "node_modules/@portkey-ai/gateway/build/start-server.js"
BEFORE = "this.updateHeaders(i,n.cacheStatus,o),"
PATCHED = "this.context.isStreaming&&(i=new Response(i.body,i))," + BEFORE


def main(folder: Path) -> None:
    """Patches once; a version that looks otherwise is an error."""
    server = folder / SERVER
    code = server.read_text(encoding="utf-8")
    if PATCHED in code:
        return
    if code.count(BEFORE) != 1:
        raise SystemExit(f"{server} is not the version that this patch is for")
    server.write_text(code.replace(BEFORE, PATCHED), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
