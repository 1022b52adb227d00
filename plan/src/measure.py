"""Measures what it takes to import the packages of a directory: run as a program, or as a Function's handler.

A package is charged with the time and the memory of its own modules, and of those of the standard library that it
is the first to import. Each import is measured in an interpreter of its own, so that what runs it imports nothing.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

SITE = "/opt/sock/site-packages"
SECONDS = 120

# Replaces what the interpreter calls for a module that is not in sys.modules (Lib/importlib/_bootstrap.py).
PROBE = r"""
import json, os, sys, time
import importlib, importlib._bootstrap as bootstrap

modules, site = json.loads(sys.argv[1]), sys.argv[2]
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
statm = os.open("/proc/self/statm", os.O_RDONLY)
page = os.sysconf("SC_PAGESIZE") // 1024
find_and_load = bootstrap._find_and_load
clock = time.perf_counter_ns
costs, open_ = {}, [[0, 0]]


def anonymous():
    fields = os.pread(statm, 128, 0).split()
    return (int(fields[1]) - int(fields[2])) * page


def measured(name, import_):
    memory, start = anonymous(), clock()
    open_.append([0, 0])
    try:
        return find_and_load(name, import_)
    finally:
        time_, memory = clock() - start, anonymous() - memory
        inner = open_.pop()
        origin = getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None) or ""
        if origin.startswith(site):
            costs[name] = [time_ - inner[0], memory - inner[1], origin[len(site) + 1 :]]
            inner = [time_, memory]
        open_[-1][0] += inner[0]
        open_[-1][1] += inner[1]


bootstrap._find_and_load = measured
error = None
start = clock()
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException as problem:
        error = f"import {module}: {type(problem).__name__}: {problem}"
        break
whole = clock() - start
os.write(out, json.dumps({"costs": costs, "nanos": whole, "error": error}).encode())
os._exit(0)
"""


def normal(name):
    """The normal form of a project's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Unmeasured(Exception):
    pass


def probe(modules, site):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", PROBE, json.dumps(modules), site]
    try:
        done = subprocess.run(
            command,
            env=env | {"PYTHONPATH": site},
            capture_output=True,
            timeout=SECONDS,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise Unmeasured(f"import of {', '.join(modules)} takes more than {SECONDS} s") from None
    try:
        # A large answer may be cut if the process is killed.
        said = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Unmeasured(f"import of {', '.join(modules)} ended with status {done.returncode}: {last}") from None
    if said["error"]:
        raise Unmeasured(said["error"])
    return said


def requires(distribution):
    """Projects that it asks for without an extra. Their other conditions are left to the list of what is installed."""
    for requirement in distribution.requires or []:
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
        if name and "extra" not in requirement.partition(";")[2]:
            yield normal(name[0])


def measure(site, imports):
    """What each package of `site` costs that importing these modules (all if none) loads."""
    packages, owner = {}, {}
    for distribution in importlib.metadata.distributions(path=[site]):
        name = normal(distribution.metadata["Name"])
        packages[name] = {
            "version": distribution.version,
            "requires": sorted(set(requires(distribution))),
            "modules": [],
            "loads": [],
            "micros": 0,
            "kib": 0,
        }
        for file in distribution.files or []:
            owner[str(file)] = name

    def of(costs):
        return {owner[path] for _, _, path in costs.values() if path in owner}

    everything = not imports
    if everything:
        wanted = {required for package in packages.values() for required in package["requires"]}
        names = [name for name in packages if name not in wanted]
        imports = [module for name in names for module in modules_of(name, owner)]
    # Files that nobody has read yet would be charged to the first package.
    probe(imports, site)
    whole = probe(imports, site)
    for module, (nanos, kib, path) in whole["costs"].items():
        package = packages.get(owner.get(path))
        if package is None:
            continue
        package["micros"] += nanos // 1000
        package["kib"] += max(kib, 0)
        if "." not in module:
            package["modules"].append(module)
    for name in of(whole["costs"]):
        package = packages[name]
        if package["modules"]:
            package["loads"] = sorted(of(probe(package["modules"], site)["costs"]) - {name})
    return {
        "python": sys.version.split()[0],
        "micros": whole["nanos"] // 1000,
        "packages": packages,
        "imports": {module: sorted(of(probe([module], site)["costs"])) for module in imports},
    }


def modules_of(name, owner):
    """Modules that a package puts beside those of others; names that begin with `_` are its own business."""
    found = set()
    for path, of in owner.items():
        head, _, rest = path.partition("/")
        if of != name or head.startswith(("_", ".")) or not path.endswith((".py", ".so")):
            continue
        module = head if rest else head.partition(".")[0]
        if module.isidentifier() and (rest in ("__init__.py",) or not rest):
            found.add(module)
    return sorted(found)


def answer(site, imports):
    try:
        return measure(site, imports)
    except Unmeasured as problem:
        return {"error": str(problem)}


def handler(event, context):
    return answer(SITE, json.loads(event["body"])["imports"])


if __name__ == "__main__":
    print(json.dumps(answer(os.path.realpath(sys.argv[1]), sys.argv[2:])))
