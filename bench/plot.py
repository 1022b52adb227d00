#!/usr/bin/env python3
"""Draws what `make bench` has measured, and writes it down for the documentation.

plot.py BENCH_JSON DOCS: writes DOCS/figures.svg, and the tables in DOCS/performance.md between their marks. The steps
of a container's start are taken from start.json beside BENCH_JSON.
"""

import json
import math
import os
import platform
import subprocess
import sys
from html import escape
from pathlib import Path

SHOWN = {
    "forked_predict": "pandas + scikit-learn, fork inside",
    "forked_predict_spare": "pandas + scikit-learn, spare",
    "forked_hello": "plain Python, fork inside",
    "forked_hello_spare": "plain Python, spare",
}
TITLE = "First answer of an idle Function (median, logarithmic scale)"
WIDTH, LEFT, RIGHT, ROW, TOP = 880, 250, 90, 58, 64
OURS, PEER, TEXT = "#0f766e", "#b45309", "#475569"


def span(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def picture(figures: list[dict]) -> str:
    rows = [figure for figure in figures if figure["name"] in SHOWN]
    values = [value for row in rows for value in (row["p50"], row["peer_p50"])]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    plot, height = WIDTH - LEFT - RIGHT, TOP + ROW * len(rows) + 34

    def x(value: float) -> float:
        return LEFT + plot * (math.log10(value) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16" fill="{TEXT}">{TITLE}</text>',
        f'<text x="16" y="46" fill="{OURS}">sock</text>',
        f'<text x="56" y="46" fill="{PEER}">the same container on runc</text>',
    ]
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{height - 28}" stroke="#e2e8f0"/>')
        label = f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle" fill="{TEXT}">{span(10**power)}</text>'
        parts.append(label)
    for index, row in enumerate(rows):
        top = TOP + ROW * index
        parts.append(f'<text x="16" y="{top + 27}" fill="{TEXT}">{escape(SHOWN[row["name"]])}</text>')
        for offset, value, color in ((4, row["p50"], OURS), (24, row["peer_p50"], PEER)):
            width = max(x(value) - LEFT, 2)
            parts.append(f'<rect x="{LEFT}" y="{top + offset}" width="{width:.1f}" height="16" fill="{color}"/>')
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{top + offset + 13}" fill="{TEXT}">{span(value)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def table(figures: list[dict]) -> str:
    lines = ["| name | unit | n | p50 | p99 | peer p50 | ratio | peer |", "|---|---|---|---|---|---|---|---|"]
    for row in figures:
        numbers = (f"{row[key]:.2f}" for key in ("p50", "p99", "peer_p50", "ratio"))
        lines.append(f"| `{row['name']}` | {row['unit']} | {row['n']} | {' | '.join(numbers)} | {row['peer']} |")
    return "\n".join(lines)


def steps(profile: list[list]) -> str:
    rows = [(name.count("  "), name.strip(), micros) for name, micros in profile]
    lines = [f"| {'&emsp;' * depth}{name} | {micros:,} |" for depth, name, micros in rows]
    return "\n".join(["| step | µs |", "|---|---|", *lines])


def between(page: str, mark: str, text: str) -> str:
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    stat = subprocess.run(["stat", "-fc", "%T", "/sys/fs/cgroup"], capture_output=True, text=True, check=True)
    version = 2 if stat.stdout.strip() == "cgroup2fs" else 1
    return (
        f"Taken with `make bench` on {os.cpu_count()} × {cpus[0] if cpus else platform.machine()}, {memory:.0f} GB, "
        f"Linux {platform.release().split('-')[0]}, cgroup v{version}; a kind cluster of three nodes on this machine."
    )


def main() -> None:
    source, docs = Path(sys.argv[1]), Path(sys.argv[2])
    figures, page = json.loads(source.read_text()), docs / "performance.md"
    text = between(page.read_text(), "figures", f"{machine()}\n\n{table(figures)}")
    start = source.with_name("start.json")
    # An older one is of another run.
    if start.exists() and start.stat().st_mtime >= source.stat().st_mtime:
        text = between(text, "start", steps(json.loads(start.read_text())))
    (docs / "figures.svg").write_text(picture(figures))
    page.write_text(text)


main()
