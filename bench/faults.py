#!/usr/bin/env python3
"""Writes what `make faults` has measured into the documentation.

faults.py FAULTS_JSON... PAGE: the table in PAGE between its marks.
"""

import json
import math
import sys
from pathlib import Path

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = (
    "| fault | rounds | lost | lost that it was serving | answered by an error | not sent | whole again, s | left |\n"
    "|---|---|---|---|---|---|---|---|"
)


def middle_and_most(values: list[float], places: int) -> str:
    if not values:
        return "–"
    ordered = sorted(values)
    middle = ordered[math.ceil(len(ordered) / 2) - 1]
    return f"{middle:.{places}f} / {ordered[-1]:.{places}f}"


def row(report: dict) -> str:
    rounds = report["rounds"]
    cells = [
        f"`{report['fault']}`",
        str(len(rounds)),
        middle_and_most([one["lost"] for one in rounds], 0),
        middle_and_most([one["lost_served"] for one in rounds], 0),
        middle_and_most([sum(one["answered"].values()) for one in rounds], 0),
        middle_and_most([one["unsent"] for one in rounds], 0),
        middle_and_most([one["whole_millis"] / 1000 for one in rounds], 1),
        str(sum(report["left"].values())),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    *found, page = map(Path, sys.argv[1:])
    reports = [report for each in found for report in json.loads(each.read_text())]
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join([HEAD, *map(row, reports)])
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


main()
