#!/usr/bin/env python3
"""Draws what `make bench` has measured, and writes it down for the documentation.

plot.py BENCH_JSON DOCS: writes DOCS/figures.svg, and the tables in DOCS/performance.md between their marks. The steps
of a container's start are taken from start.json beside BENCH_JSON, what each tier is worth from tiers.json, which
DOCS/tiers.svg shows; DOCS/workload.svg shows the systems of `tree_workload`.
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
TIERS = "One request, with all tiers of caches and with one less each time (median, logarithmic scale)"
WIDTH, LEFT, RIGHT, TOP = 880, 250, 90, 64
OURS, PEER, TEXT = "#0f766e", "#b45309", "#475569"


def span(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def picture(title: str, rows: list[tuple[str, list[tuple[float, str]]]]) -> str:
    """Bars: of each row a name, and its values with their colours."""
    values = [value for _, all_of_row in rows for value, _ in all_of_row]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    bars = 20 * max(len(all_of_row) for _, all_of_row in rows)
    row_height = bars + 18
    plot, height = WIDTH - LEFT - RIGHT, TOP + row_height * len(rows) + 34

    def x(value: float) -> float:
        return LEFT + plot * (math.log10(value) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16" fill="{TEXT}">{title}</text>',
    ]
    at = 16
    for words, color in (("sock", OURS), ("the same container on runc", PEER)):
        parts.append(f'<text x="{at}" y="46" fill="{color}">{escape(words)}</text>')
        at += 8 * len(words) + 8
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{height - 28}" stroke="#e2e8f0"/>')
        label = f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle" fill="{TEXT}">{span(10**power)}</text>'
        parts.append(label)
    for index, (name, all_of_row) in enumerate(rows):
        top = TOP + row_height * index
        parts.append(f'<text x="16" y="{top + bars / 2 + 7:.0f}" fill="{TEXT}">{escape(name)}</text>')
        for place, (value, color) in enumerate(all_of_row):
            width, bar = max(x(value) - LEFT, 2), top + 4 + 20 * place
            parts.append(f'<rect x="{LEFT}" y="{bar}" width="{width:.1f}" height="16" fill="{color}"/>')
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{bar + 13}" fill="{TEXT}">{span(value)}</text>')
    return "\n".join([*parts, "</svg>", ""])


WORKLOAD = (
    "Many Functions on many PackageSets: memory of the zygotes, and requests that are answered (both logarithmic)"
)


def plane(systems: list[dict]) -> str:
    """Points: memory from left to right, throughput from below."""
    places = [(max(one["held"], 1), one["per_second"]) for one in systems]
    bounds = [
        (math.floor(math.log10(min(all_of_it))), math.ceil(math.log10(max(all_of_it))))
        for all_of_it in zip(*places, strict=True)
    ]
    height, left, bottom = 380, 70, 60

    def at(place: tuple[float, float]) -> tuple[float, float]:
        share = [(math.log10(value) - low) / (high - low) for value, (low, high) in zip(place, bounds, strict=True)]
        return left + (WIDTH - left - RIGHT) * share[0], height - bottom - (height - bottom - TOP) * share[1]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16" fill="{TEXT}">{WORKLOAD}</text>',
    ]
    (low, high), (lowest, highest) = bounds
    for power in range(low, high + 1):
        x, _ = at((10**power, 10**lowest))
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - bottom}" stroke="#e2e8f0"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle" fill="{TEXT}">{10**power:,} MB</text>'
        )
    for power in range(lowest, highest + 1):
        _, y = at((10**low, 10**power))
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{TEXT}">{10**power:,}/s</text>')
    for one, place in zip(systems, places, strict=True):
        x, y = at(place)
        ours = one["system"] == "tree"
        below = ours or one is systems[0]
        end = x > WIDTH * 0.6
        words = f"{one['system']}: {one['per_second']:.3g}/s, {one['held']:,.0f} MB"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{OURS if ours else PEER}"/>')
        parts.append(
            f'<text x="{x + (12 if not end else -12):.1f}" y="{y + (22 if below else -12):.1f}"'
            f' text-anchor="{"end" if end else "start"}" fill="{OURS if ours else PEER}">{escape(words)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def workload(systems: list[dict]) -> str:
    lines = [
        f"| {one['system']} | {one['zygotes']} | {one['depth']} | {one['pss']:,.0f} | {one['held']:,.0f} "
        f"| {one['per_second']:.1f} | {one['n']:,} | {one['p50']:,.2f} | {one['p99']:,.2f} | {one['stalled']:.1f} |"
        for one in systems
    ]
    head = "| system | zygotes | depth | PSS, MB | held, MB | requests/s | n | p50, ms | p99, ms | stalled, % |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|---|", *lines])


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


def tiers(worth: list[dict]) -> str:
    lines = [f"| {one['tiers']} | {one['means']} | {one['n']} | {one['p50']:.2f} | {one['p99']:.2f} |" for one in worth]
    return "\n".join(["| tiers | a request meets | n | p50, ms | p99, ms |", "|---|---|---|---|---|", *lines])


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
    systems = next((one["systems"] for one in figures if "systems" in one), [])
    figures = [one for one in figures if "systems" not in one]
    text = between(page.read_text(), "figures", f"{machine()}\n\n{table(figures)}")
    if systems:
        text = between(text, "workload", workload(systems))
        (docs / "workload.svg").write_text(plane(systems))
    start = source.with_name("start.json")
    # An older one is of another run.
    if start.exists() and start.stat().st_mtime >= source.stat().st_mtime:
        text = between(text, "start", steps(json.loads(start.read_text())))
    shown = [one for one in figures if one["name"] in SHOWN]
    rows = [(SHOWN[one["name"]], [(one["p50"], OURS), (one["peer_p50"], PEER)]) for one in shown]
    (docs / "figures.svg").write_text(picture(TITLE, rows))
    worth = source.with_name("tiers.json")
    if worth.exists() and worth.stat().st_mtime >= source.stat().st_mtime:
        worth = json.loads(worth.read_text())
        text = between(text, "tiers", tiers(worth))
        rows = [(one["tiers"], [(one["p50"], PEER if "runc" in one["means"] else OURS)]) for one in worth]
        (docs / "tiers.svg").write_text(picture(TIERS, rows))
    page.write_text(text)


main()
