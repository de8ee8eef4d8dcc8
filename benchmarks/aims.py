# SPDX-License-Identifier: Apache-2.0
"""Prints every aim that a benchmark recorded in benchmarks/results/*.json, the unmet first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read_aims(folder: Path) -> list[dict[str, Any]]:
    """Aims of all results, each with the file's name as `source`.

    Raises:
        ValueError: a file that is no JSON object, or an aim without one of its fields.
    """
    aims: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
            for aim in result.get("aims", []):
                fields = {key: aim[key] for key in ("name", "aim", "value", "met")}
                aims.append(
                    {"source": path.relative_to(folder).with_suffix("").as_posix(), **fields}
                )
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a benchmark's result ({type(error).__name__}: {error}); run the "
                f"benchmark again."
            ) from error
    return sorted(aims, key=lambda aim: bool(aim["met"]))


def main() -> int:
    try:
        aims = read_aims(RESULTS)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for aim in aims:
        state = "met  " if aim["met"] else "UNMET"
        print(f"{state}  {aim['source']}: {aim['name']}: aim {aim['aim']}, measured {aim['value']}")
    unmet = sum(not aim["met"] for aim in aims)
    print(f"{len(aims)} aims, {unmet} unmet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
