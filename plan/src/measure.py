"""Measures what it takes to import the packages of a directory: run as a program, or as a Function's handler.

A package is charged with the time and the memory of its own modules, and of those of the standard library that it
is the first to import. Each import is measured in an interpreter of its own, so that what runs it imports nothing.
"""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

SITE = "/opt/sock/site-packages"
SECONDS = 120
# What packages leave beside each other by mistake.
NO_MODULES = ("test", "tests", "testing", "doc", "docs", "example", "examples", "benchmarks", "scripts")

# Replaces what the interpreter calls for a module that is not in sys.modules (Lib/importlib/_bootstrap.py).
PROBE = r"""
import json, os, sys, threading, time
import importlib, importlib._bootstrap as bootstrap

modules, site, path = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
statm = os.open("/proc/self/statm", os.O_RDONLY)
page = os.sysconf("SC_PAGESIZE") // 1024
find_and_load = bootstrap._find_and_load
clock = time.perf_counter_ns
main = threading.get_ident()
costs, open_ = {}, [[0, 0, ""]]


def anonymous():
    fields = os.pread(statm, 128, 0).split()
    return (int(fields[1]) - int(fields[2])) * page


def origin(name):
    # A package may put anything in the place of its module.
    try:
        return sys.modules[name].__spec__.origin or ""
    except Exception:
        return ""


def measured(name, import_):
    if threading.get_ident() != main:
        return find_and_load(name, import_)
    memory, start = anonymous(), clock()
    open_.append([0, 0, name])
    try:
        return find_and_load(name, import_)
    finally:
        time_, memory = clock() - start, anonymous() - memory
        inner = open_.pop()
        file = origin(name)
        if file.startswith(site):
            cost = costs.setdefault(name, [0, 0, file[len(site) + 1 :], open_[-1][2]])
            cost[0] += max(time_ - inner[0], 0)
            cost[1] += max(memory - inner[1], 0)
            inner = [time_, memory, ""]
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
whole = max(clock() - start, 0)
with open(path, "w") as out:
    json.dump({"costs": costs, "nanos": whole, "error": error}, out)
os._exit(0)
"""


def normal(name):
    """The normal form of a project's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Unmeasured(Exception):
    pass


def probe(modules, site):
    """What importing costs, by module: nanoseconds, KiB, file below `site`, the module that asked for it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPATH"] = site
    what = ", ".join(modules)
    # Files, not pipes: a process that an import leaves behind would hold those open.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "costs")
        with open(os.path.join(folder, "errors"), "w+b") as errors:
            child = subprocess.Popen(
                [sys.executable, "-c", PROBE, json.dumps(modules), site, path],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd="/",
                start_new_session=True,
            )
            try:
                status = child.wait(SECONDS)
            except subprocess.TimeoutExpired:
                raise Unmeasured(f"import of {what} takes more than {SECONDS} s") from None
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
            errors.seek(max(errors.tell() - 4096, 0))
            last = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        try:
            with open(path) as file:
                said = json.load(file)
        except (OSError, ValueError):
            raise Unmeasured(f"import of {what} ended with status {status}: {last}") from None
    if said["error"]:
        raise Unmeasured(said["error"])
    return said


def installed(site, extras):
    """By name: version, names of what must be there too, and its files. `extras` are those asked for, by name.

    Other conditions than extras are left to the list of what is installed.
    """
    found, asked = {}, {}
    for distribution in importlib.metadata.distributions(path=[site]):
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:
            continue
        if name and version:
            asked[normal(name)] = [requirement(text) for text in distribution.requires or []]
            found[normal(name)] = (version, set(), [str(file) for file in distribution.files or []])
    extras = {name: set(map(normal, extras.get(name, ()))) for name in found}
    changed = True
    while changed:
        changed = False
        for name, (_, requires, _) in found.items():
            for other, more, condition in asked[name]:
                if other not in found or other == name or (condition and condition not in extras[name]):
                    continue
                changed |= other not in requires or not more <= extras[other]
                requires.add(other)
                extras[other] |= more
    return found


def requirement(text):
    """Of a requirement (PEP 508): the name, the extras that it asks for, and the extra for which it counts."""
    head, _, marker = text.partition(";")
    name = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^]]*)\])?", head)
    if not name:
        return "", set(), None
    condition = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    more = {normal(one.strip()) for one in (name[2] or "").split(",") if one.strip()}
    return normal(name[1]), more, normal(condition[1]) if condition else None


def guessed(found, site):
    """Modules of the packages that no other asks for, or that are out of reach from those; what fails is left out."""
    wanted = {required for _, requires, _ in found.values() for required in requires}
    reached, imports = set(), []

    def reach(name):
        if name in found and name not in reached:
            reached.add(name)
            for required in found[name][1]:
                reach(required)

    for name in sorted(found, key=lambda name: (name in wanted, name)):
        if name in reached:
            continue
        reach(name)
        for module in modules_of(found[name][2]):
            try:
                probe([module], site)
            except Unmeasured as problem:
                print(f"{name}: {problem}", file=sys.stderr)
            else:
                imports.append(module)
    return imports


def modules_of(files):
    """Modules beside those of other packages; names that begin with `_` are their own business."""
    modules = set()
    for path in files:
        parts = path.split("/")
        name = parts[-1].partition(".")[0]
        if not path.endswith((".py", ".so")) or any(not part.isidentifier() for part in [*parts[:-1], name]):
            continue
        module = ".".join(parts[:-1] if name == "__init__" else [*parts[:-1], name])
        if module and not module.startswith("_") and parts[0] not in NO_MODULES:
            modules.add(module)

    # Of a namespace package (PEP 420) the members count, since it has no file itself.
    def outermost(module):
        parts = module.split(".")
        return not any(".".join(parts[:count]) in modules for count in range(1, len(parts)))

    return sorted(filter(outermost, modules))[:8]


def measure(site, imports, extras):
    """What each package of `site` costs that importing these modules loads; if none are given, likely ones."""
    found = installed(site, extras)
    owner = {file: name for name, (_, _, files) in found.items() for file in files}
    imports = imports or guessed(found, site)
    packages = {
        name: {"version": version, "requires": sorted(requires), "modules": [], "loads": [], "micros": 0, "kib": 0}
        for name, (version, requires, _) in found.items()
    }

    def of(costs):
        return {owner[path] for _, _, path, _ in costs.values() if path in owner}

    # Files that nobody has read yet would be charged to the first package.
    probe(imports, site)
    whole = probe(imports, site)
    owners = {module: owner.get(path) for module, (_, _, path, _) in whole["costs"].items()}
    for module, (nanos, kib, _, by) in sorted(whole["costs"].items()):
        name = owners[module]
        if name is None:
            continue
        packages[name]["micros"] += nanos // 1000
        packages[name]["kib"] += kib
        # Those that others ask for bring the rest along.
        if owners.get(by) != name:
            packages[name]["modules"].append(module)
    for name in of(whole["costs"]):
        if not packages[name]["modules"]:
            # It has put something else in the place of a module.
            own = [module for module, of_ in owners.items() if of_ == name]
            depth = min(module.count(".") for module in own)
            packages[name]["modules"] = sorted(module for module in own if module.count(".") == depth)
        loads = of(probe(packages[name]["modules"], site)["costs"])
        packages[name]["loads"] = sorted(loads - {name})
    return {
        "python": sys.version.split()[0],
        "micros": whole["nanos"] // 1000,
        "packages": packages,
        "imports": {module: sorted(of(probe([module], site)["costs"])) for module in imports},
    }


def answer(site, asked):
    try:
        return measure(site, asked["imports"], asked["extras"])
    except Unmeasured as problem:
        return {"error": str(problem)}


def handler(event, context):
    return answer(SITE, json.loads(event["body"]))


if __name__ == "__main__":
    print(json.dumps(answer(os.path.realpath(sys.argv[1]), json.loads(sys.argv[2]))))
