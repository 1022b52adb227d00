#!/usr/bin/env python3
"""Wheels for the tests: pins a list of packages, and makes the index that serves them.

    wheels.py pin [--for IMAGE] NAME...        prints `name==version --hash=sha256:...` for all that these need
    wheels.py index WHEELS ROOT REQUIREMENTS...  downloads what the files pin into WHEELS, lays a simple index into ROOT
    wheels.py needs WHEELS REQUIREMENTS          prints as JSON what each project that the file pins needs

`requirements-IMAGE.txt` is for the Python of IMAGE where one of that name is below, else for what most tests use.
A download happens once, through the machine's own pip; what is in WHEELS already is not asked for again.
"""

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

MANYLINUX = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
USUAL = ("3.13", MANYLINUX)
TARGETS = {"new-python": ("3.14", MANYLINUX), "musl-python": ("3.13", ["musllinux_1_2_x86_64"])}


def download(image: str, directory: Path, *what: str) -> None:
    version, platforms = TARGETS.get(image, USUAL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", f"--python-version={version}", "--implementation=cp"]
    command += [f"--abi={abi}" for abi in (f"cp{version.replace('.', '')}", "abi3", "none")]
    command += [f"--platform={platform}" for platform in [*platforms, "any"]]
    subprocess.run([*command, f"--dest={directory}", *what], check=True)


def digest(wheel: Path) -> str:
    with wheel.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def normalized(name: str) -> str:
    """As PEP 503 has it in addresses."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project(wheel: Path) -> str:
    return normalized(wheel.name.split("-")[0])


def pin(image: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        download(image, Path(directory), *names)
        for wheel in sorted(Path(directory).glob("*.whl"), key=project):
            print(f"{project(wheel)}=={wheel.name.split('-')[1]} --hash=sha256:{digest(wheel)}")


def pinned(requirements: list[Path]) -> set[str]:
    return {found for file in requirements for found in re.findall(r"--hash=sha256:([0-9a-f]{64})", file.read_text())}


def needed(wheel: Path) -> set[str]:
    """Projects that the wheel's metadata asks for on the machine of the tests, without its extras."""
    from pip._vendor.packaging.requirements import Requirement

    target = {"python_version": "3.13", "python_full_version": "3.13.0", "extra": ""}
    with zipfile.ZipFile(wheel) as content:
        path = next(name for name in content.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = HeaderParser().parsestr(content.read(path).decode())
    all_of_it = map(Requirement, metadata.get_all("Requires-Dist", []))
    return {normalized(one.name) for one in all_of_it if one.marker is None or one.marker.evaluate(target)}


def needs(wheels: Path, requirements: Path) -> None:
    wanted = pinned([requirements])
    found = {project(wheel): sorted(needed(wheel)) for wheel in wheels.glob("*.whl") if digest(wheel) in wanted}
    print(json.dumps(dict(sorted(found.items())), indent=1))


def index(wheels: Path, root: Path, requirements: list[Path]) -> None:
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = pinned(requirements)
    present = {digest(wheel): wheel for wheel in wheels.glob("*.whl")}
    if not wanted <= present.keys():
        # Into a directory of its own first: a download that is killed leaves no half wheel behind.
        with tempfile.TemporaryDirectory(dir=wheels.parent) as directory:
            for file in requirements:
                image = file.stem.removeprefix("requirements-")
                download(image, Path(directory), "--no-deps", "--require-hashes", f"--requirement={file}")
            for wheel in Path(directory).glob("*.whl"):
                wheel.rename(wheels / wheel.name)
        present = {digest(wheel): wheel for wheel in wheels.glob("*.whl")}
    missing = wanted - present.keys()
    if missing:
        sys.exit(f"no wheel has the hash {', '.join(sorted(missing))}")

    projects: dict[str, list[str]] = {}
    for sha256 in sorted(wanted):
        wheel = present[sha256]
        directory = root / "simple" / project(wheel)
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, directory / wheel.name)
        name = html.escape(wheel.name)
        projects.setdefault(project(wheel), []).append(f'<a href="{name}#sha256={sha256}">{name}</a><br>')
    for name, links in projects.items():
        write_page(root / "simple" / name, links)
    write_page(root / "simple", [f'<a href="{name}/">{name}</a><br>' for name in sorted(projects)])


def write_page(directory: Path, lines: list[str]) -> None:
    body = "\n".join(lines)
    (directory / "index.html").write_text(f"<!DOCTYPE html>\n<html><body>\n{body}\n</body></html>\n")


def main() -> None:
    match sys.argv[1:]:
        case ["pin", "--for", image, *names] if names and image in TARGETS:
            pin(image, names)
        case ["pin", *names] if names and names[0] != "--for":
            pin("", names)
        case ["index", wheels, root, *requirements] if requirements:
            index(Path(wheels), Path(root), [Path(file) for file in requirements])
        case ["needs", wheels, requirements]:
            needs(Path(wheels), Path(requirements))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
