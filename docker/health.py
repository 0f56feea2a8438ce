"""Whether a service does what it is there for: one real call, with log-in. Needs nothing but Python.

health.py URL [JSON [LOGIN]]: GET, or POST where there is JSON; LOGIN is `user:password`, with `@FILE` for what stands
in a file. Exit code 0 if the answer is 200.
"""

import base64
import json
import re
import sys
import urllib.request
from pathlib import Path


def main(url: str, body: str = "", login: str = "") -> None:
    """Call, and fail unless it works."""
    headers = {"Content-Type": "application/json"}
    if login:
        user = re.sub(r"@(.+)$", lambda found: Path(found[1]).read_text(encoding="utf-8").strip(), login)
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
    request = urllib.request.Request(url, body.encode() or None, headers)  # noqa: S310 (our own address)
    with urllib.request.urlopen(request, timeout=8) as answer:  # noqa: S310
        json.load(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
