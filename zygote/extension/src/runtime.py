"""What a zygote and its leaves do in the language of their packages.

The extension compiles this text when it starts, before anything is forked, and calls the functions
below. Nothing here is imported by name.
"""

import marshal
import os
import sys
import time
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.machinery import PathFinder as _PathFinder
from importlib.machinery import SourceFileLoader as _SourceFileLoader
from types import ModuleType as _ModuleType

# Libraries that would start threads while they are imported, and what keeps each from it. A thread
# does not survive a fork; the leaf gives numeric libraries their threads back (see `allow_threads`).
SINGLE_THREADED = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "NUMEXPR_MAX_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

# Modules whose hooks do nothing between two processes of one thread: they give locks the state that these have
# already. What else they do is done by `after_fork`, `settle` and `reseed`.
IDLE_HOOKS = {"asyncio.events", "concurrent.futures.thread", "logging", "random", "threading"}

_HERE = __file__
_PATH_HOOKS = list(sys.path_hooks)
_ZYGOTE = os.getpid()
_pools = None
_warm_up = None
_register_at_fork = os.register_at_fork
# Module and arguments of each registration; `None` where the interpreter itself calls the hooks.
_hooks = None
# Whether a fork is one that an import or a warm-up makes: hooks are run then as ever.
_forks_itself = False
# Files of the Function's author; errors are shown with their line in these, if they have one.
_own = "<warmUp>"


def descend(env):
    """In a process that was forked from a zygote to become one with more packages. Yields whether hooks are kept."""
    global _ZYGOTE, _warm_up
    _ZYGOTE = os.getpid()
    _warm_up = None
    known = os.environ._data
    known.clear()
    known.update(env)
    if _hooks is not None:
        # A leaf hands them to the interpreter after this; here they are kept for leaves to come.
        foreign = [entry for entry in _hooks if entry[0] not in IDLE_HOOKS]
        _run(foreign, "before")
        _run(foreign, "after_in_child")
    threading = sys.modules.get("threading")
    if threading is not None:
        threading.main_thread()._set_native_id()
    reseed()
    return _hooks is not None


def become_zygote(path, accepts_threads):
    global _hooks, _forks_itself
    if _hooks is not None:
        # It descends from one that has kept them.
        _forks_itself = not accepts_threads
        if accepts_threads:
            hooks, _hooks = _hooks, None
            for _, kinds in hooks:
                _register_at_fork(**kinds)
    elif not accepts_threads:
        _hooks = []
        _forks_itself = True
        _register_at_fork(
            before=lambda: _run_kept("before"),
            after_in_parent=lambda: _run_kept("after_in_parent"),
            after_in_child=lambda: _run_kept("after_in_child"),
        )
        os.register_at_fork = _keep_hooks
    os.environ.update(SINGLE_THREADED)
    # A leaf's directories are read-only as a rule, and each attempt to write there costs.
    sys.dont_write_bytecode = True
    sys.path[:] = list(path) + [p for p in sys.path if p not in path]
    # Anything that a leaf may need is loaded before the first fork.
    import importlib.machinery  # noqa: F401
    import json  # noqa: F401
    import random  # noqa: F401
    import traceback  # noqa: F401

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)


def _keep_hooks(**hooks):
    """Stands in for `os.register_at_fork`: what leaves would run for nothing is most of what a small one runs."""
    if _hooks is None or not hooks or not all(map(callable, hooks.values())):
        _register_at_fork(**hooks)
    else:
        _hooks.append((sys._getframe(1).f_globals.get("__name__"), hooks))


def _run_kept(kind):
    if _forks_itself:
        _run(_hooks, kind)


def after_fork():
    """In a leaf: the hooks that were kept from the interpreter. From here on it has them, for the leaf's own forks.
    Yields whether there were some that may have done anything."""
    global _hooks
    if _hooks is None:
        return False
    hooks, _hooks = _hooks, None
    foreign = [entry for entry in hooks if entry[0] not in IDLE_HOOKS]
    if foreign:
        # As its own hook does, which came first: theirs may draw numbers.
        sys.modules["random"].seed()
        _run(foreign, "before")
        _run(foreign, "after_in_child")
    for _, kinds in hooks:
        _register_at_fork(**kinds)
    threading = sys.modules.get("threading")
    if threading is not None:
        threading.main_thread()._set_native_id()
    return bool(foreign)


def _run(registered, kind):
    for _, kinds in reversed(registered) if kind == "before" else registered:
        if kind in kinds:
            try:
                kinds[kind]()
            except BaseException as error:
                # As the interpreter does it: the fork goes on.
                print(explain(error)[1], file=sys.stderr, end="")


# So many calls specialize code (PEP 659; Python 3.11 begins at the eighth, a loop of it at the sixteenth).
_OFTEN = 20


def try_out(code):
    """Does once what a PackageSet has its zygote do ahead of all leaves, and what every leaf does."""
    global _warm_up, _pools
    if code:
        _warm_up = compile(code, "<warmUp>", "exec")
        _run_warm_up()
    # The warm-up may be the first to load a numeric library.
    if "numpy" in sys.modules:
        _pools = _find_pools()
    _rehearse()


def watch():
    """Yields the code that a leaf runs, by its identity: a child does what a leaf does, and tells."""
    # Before, code that is looked at has its references counted, and is not worth to be moved. Beside threads that were
    # accepted a child may hang, and all would wait for it.
    if sys.version_info < (3, 12) or _hooks is None:
        return {}
    flush()
    try:
        ran = _what_runs()
    except Exception as error:
        # It is a matter of speed only.
        print("sock: what a leaf runs is not known: " + explain(error)[0], file=sys.stderr)
        return {}
    return {id(code): code for code in _all_code() if id(code) in ran}


# A warm-up may take longer, and is not waited for.
_WATCHED_WITHIN = 30


def _what_runs():
    global _forks_itself
    import select
    import signal

    with open(os.memfd_create("sock-ran"), "w+") as report:
        # The child is as a leaf, so it does itself what a leaf does after a fork.
        _forks_itself = False
        try:
            child = os.fork()
        finally:
            _forks_itself = os.getpid() == _ZYGOTE
        if child == 0:
            try:
                report.write(" ".join(map(str, _watched())))
                report.flush()
            finally:
                os._exit(0)
        ended = os.pidfd_open(child)
        try:
            # Not until nobody holds the report: a warm-up may leave a process behind.
            if not select.select([ended], [], [], _WATCHED_WITHIN)[0]:
                signal.pidfd_send_signal(ended, signal.SIGKILL)
                raise TimeoutError(f"the warm-up took longer than {_WATCHED_WITHIN} s")
        finally:
            os.close(ended)
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                # An import has set SIGCHLD to be ignored.
                pass
        report.seek(0)
        return set(map(int, report.read().split()))


def _watched():
    """Identities of the code that runs. What is watched is changed by that, so this is for a process that ends."""
    monitoring = sys.monitoring
    ran = set()

    def note(code, _):
        ran.add(id(code))
        return monitoring.DISABLE

    tool = next(tool for tool in range(6) if monitoring.get_tool(tool) is None)
    monitoring.use_tool_id(tool, "sock")
    for event in (monitoring.events.PY_START, monitoring.events.PY_RESUME):
        monitoring.register_callback(tool, event, note)
    monitoring.set_events(tool, monitoring.events.PY_START | monitoring.events.PY_RESUME)
    try:
        after_fork()
        rehearse()
    except BaseException as error:
        # It is told again by those who follow.
        print(explain(error)[1], file=sys.stderr, end="")
    monitoring.set_events(tool, 0)
    return ran


def _all_code():
    import gc
    from types import CodeType, FunctionType

    known = {id(_warm_up): _warm_up} if _warm_up is not None else {}
    for function in gc.get_objects():
        if type(function) is FunctionType:
            known[id(function.__code__)] = function.__code__
    more = list(known.values())
    while more:
        inner = [c for c in more.pop().co_consts if isinstance(c, CodeType) and id(c) not in known]
        known.update((id(c), c) for c in inner)
        more += inner
    return known.values()


def gather(ran):
    """Copies the code that `watch` has found, so that it lies side by side. Python writes to code whenever it runs, if
    only to note which way a branch went; spread over all code, that is a page for nearly every function."""
    global _warm_up
    if not ran:
        return
    import gc
    from types import CodeType, FunctionType

    copies = {}

    def copy(code):
        made = copies.get(id(code))
        if made is None:
            inner = [copy(c) if isinstance(c, CodeType) and id(c) in ran else c for c in code.co_consts]
            made = copies[id(code)] = code.replace(co_consts=tuple(inner))
        return made

    for function in gc.get_objects():
        if type(function) is FunctionType and id(function.__code__) in ran:
            function.__code__ = copy(function.__code__)
    if id(_warm_up) in ran:
        _warm_up = copy(_warm_up)


def refresh_arrays(heap):
    """numpy keeps pieces of memory for small arrays, and gives them out again wherever they lie. From here on they lie
    above the address `heap`."""
    empty = getattr(sys.modules.get("numpy"), "empty", None)
    if empty is None:
        return
    # NCACHE and NBUCKETS of numpy/_core/src/multiarray/alloc.c, for their elements and for their shapes.
    _kept.extend(empty((1,) * dimensions) for dimensions in range(1, 8) for _ in range(7))
    for size in range(1, 1024):
        for _ in range(7):
            array = empty(size, "u1")
            if array.__array_interface__["data"][0] >= heap:
                break
            _kept.append(array)


_kept = []


def warm_up():
    for _ in range(_OFTEN if _warm_up is not None else 0):
        _run_warm_up()


def _run_warm_up():
    exec(_warm_up, {"__name__": "__warm_up__"})


def settle():
    """After the last import: what exists now is shared by all leaves."""
    global _forks_itself
    _forks_itself = False
    for _ in range(_OFTEN):
        _rehearse()
    os.environ.clear()
    # An event loop that an import has made is none of a leaf's.
    _run([entry for entry in _hooks or () if entry[0] == "asyncio.events"], "after_in_child")
    import gc

    gc.collect()


def rehearse():
    """Touches what a request will touch: in a spare ahead of it, and in a zygote to see what that is."""
    _rehearse()
    if _warm_up is not None:
        _run_warm_up()


def _rehearse():
    """Does what every leaf does. In a zygote code that has run often is specialized, and need not be written to by a
    leaf; and directories that leaves share have been listed (a leaf asks for the time of their change)."""
    from importlib.machinery import PathFinder

    before = list(sys.path)
    try:
        enter(dict(os.environ._data), _REHEARSAL, os.getcwd(), "rehearsal.handler")
        handler, compiled = load("rehearsal.handler", _REHEARSAL, b"", True)
        del sys.modules["rehearsal"]
        load("rehearsal.handler", _REHEARSAL, compiled, False)
        call(handler, {"query": {}, "body": b"{}"}, Context("", "", "", "", 1))
        PathFinder.find_spec("sock_rehearsal")
    finally:
        sys.modules.pop("rehearsal", None)
        sys.path[:] = before
    reseed()
    allow_threads(1)


# Where sock's files are in every image that a zygote runs in.
_REHEARSAL = ["/opt/sock/python"]


def freeze():
    """The collector looks no more at what exists now: a leaf's collection would write to all of it."""
    import gc

    gc.freeze()
    # Lists of free objects are emptied, which lie wherever they were last used.
    gc.collect()


def _find_pools():
    try:
        import threadpoolctl
    except ImportError:
        return None
    return threadpoolctl.ThreadpoolController()


def threads_of_python():
    """Names of Python's own threads other than the main one, with the module of their function."""
    threading = sys.modules.get("threading")
    if threading is None:
        return ""
    found = []
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            target = getattr(thread, "_target", None) or type(thread)
            found.append(f"{thread.name} ({getattr(target, '__module__', '?')})")
    return ", ".join(dict.fromkeys(found))


def flush():
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                pass


def enter(env, path, cwd, handler):
    """Turns the process into one of the Function: environment (bytes, which the C library knows already), directory,
    import path."""
    global _own
    if path:
        _own = path[0].rstrip("/") + "/"
    # What is behind os.environ: each variable by itself would be told to the C library again.
    known = os.environ._data
    known.clear()
    known.update(env)
    if b"TZ" in env:
        time.tzset()
    os.chdir(cwd)
    sys.argv[:] = [handler]
    sys.path[:] = list(path) + [p for p in sys.path if p not in path]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.line_buffering:
            stream.reconfigure(line_buffering=True)


def reseed():
    """Generators that a fork has copied. OpenSSL looks after a fork by itself: it goes by the process number, and that
    of a leaf is 1 and never a zygote's."""
    sys.modules["random"].seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        # 256 bits of the kernel's; without an argument numpy spends half a millisecond on the same.
        numpy.seed(memoryview(os.urandom(32)).cast("I").tolist())
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.seed()


def generators():
    """Where the generators of `random` and numpy have their state: address of its words, address of the position among
    them, and both as Python sees them. A leaf writes random bytes there, which is quicker than to run code that nobody
    else may need. `None` if there is one of another kind."""
    if "torch" in sys.modules:
        return None
    # Also for the number that a Gaussian generator may have left over.
    reseed()
    try:
        random = sys.modules["random"]
        version, state, _ = random._inst.getstate()
        if version != 3 or type(random._inst).__bases__[0].__basicsize__ < object.__basicsize__ + 4 * len(state):
            return None
        # The fields of RandomObject (Modules/_randommodule.c).
        start = id(random._inst) + object.__basicsize__
        found = [(start + 4, start, list(state[:-1]), state[-1])]
        if "numpy.random" in sys.modules:
            generator = sys.modules["numpy.random"].mtrand._rand._bit_generator
            if type(generator).__name__ != "MT19937":
                return None
            state = generator.state["state"]
            start = generator.ctypes.state_address
            found.append((start, start + state["key"].nbytes, state["key"].tolist(), state["pos"]))
        return found
    except Exception:
        # Packages put other things into these places.
        return None


def allow_threads(count):
    pools = _pools
    if pools is None and "numpy" in sys.modules:
        pools = _find_pools()
    if pools is not None:
        for pool in pools.lib_controllers:
            if pool.num_threads != count:
                pool.set_num_threads(count)


class HandlerError(Exception):
    """The Function names no handler that could be called. Its text says all; a traceback adds nothing."""


def load(handler, path, compiled, keep):
    """Imports `module.attribute`; yields it, and the module as it was compiled, to `keep` for others."""
    name, _, attribute = handler.rpartition(".")
    if not name or not attribute:
        raise HandlerError(f"handler {handler!r} is not of the form module.attribute")
    _prefer(name.partition(".")[0], path)
    try:
        new = _import_file(name, path, compiled, keep)
        if new is None:
            __import__(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise HandlerError(f"handler {handler!r}: there is no module {error.name!r} in {', '.join(path)}") from None
        raise
    module = sys.modules[name]
    where = getattr(module, "__file__", None) or "built in"
    try:
        value = getattr(module, attribute)
    except AttributeError:
        raise HandlerError(f"handler {handler!r}: {where} defines no {attribute!r}") from None
    if not callable(value):
        raise HandlerError(f"handler {handler!r}: {attribute!r} in {where} is a {type(value).__name__}, not a function")
    code = getattr(value, "__code__", None)
    if code is not None and code.co_flags & 0x380:  # CO_COROUTINE | CO_ITERABLE_COROUTINE | CO_ASYNC_GENERATOR
        raise HandlerError(f"handler {handler!r} in {where} is async; it must be a plain function")
    return value, new or b""


def _import_file(name, path, compiled, keep):
    """Imports a module that is one file in the first directory, which is the usual handler, without the search that an
    import is. `None` if it is anything else, and otherwise the module as it was compiled, or nothing if that
    is not to be kept or was there: in `compiled`."""
    if not path or "." in name or name in sys.modules or sys.path_hooks != _PATH_HOOKS:
        return None
    for finder in sys.meta_path:
        if finder is _PathFinder:
            break
        # Also one that a package has put there, to change what is imported.
        if finder.find_spec(name, None) is not None:
            return None
    else:
        return None
    file = f"{path[0]}/{name}.py"
    try:
        found = os.listdir(path[0])
        if f"{name}.py" not in found or any(
            other == name or other.startswith(name + ".") and other != f"{name}.py" for other in found
        ):
            return None
        status = os.stat(file)
        # As for the interpreter's own cache.
        known = sys.hexversion, sys.flags.optimize, status.st_ino, status.st_size, status.st_mtime_ns, file
        head = f"{known}\n".encode()
        code, new = None, b""
        if compiled.startswith(head):
            code = marshal.loads(memoryview(compiled)[len(head) :])
        else:
            with open(file, "rb", 0) as source:
                text = source.read()
    except OSError:
        return None
    loader = _SourceFileLoader(name, file)
    spec = _ModuleSpec(name, loader, origin=file)
    spec.has_location = True
    module = _ModuleType(name)
    vars(module).update(__file__=file, __loader__=loader, __package__="", __spec__=spec)
    spec._initializing = True
    sys.modules[name] = module
    try:
        if code is None:
            code = compile(text, file, "exec", dont_inherit=True)
            if keep:
                new = head + marshal.dumps(code)
        exec(code, vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    finally:
        spec._initializing = False
    return new


def _prefer(top, path):
    """The Function's own module wins over one of the same name that the zygote has imported, as it
    would if the interpreter had been started in its directory."""
    module = sys.modules.get(top)
    if module is None:
        return
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(top, list(path))
    if spec is None or spec.origin is None:
        return
    known = getattr(module, "__spec__", None)
    if known is None or known.origin != spec.origin:
        for name in [n for n in sys.modules if n == top or n.startswith(top + ".")]:
            del sys.modules[name]


def explain(error):
    """One line for a person, with the place, and the traceback without the frames of this file."""
    import traceback

    if isinstance(error, HandlerError):
        return str(error), str(error)
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    line = traceback.format_exception_only(type(error), error)[-1].strip()
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    else:
        place = own = None
        frame = frames
        while frame is not None:
            name = frame.tb_frame.f_code.co_filename
            if not name.startswith("<frozen"):
                place = f"{name}, line {frame.tb_lineno}"
                if name.startswith(_own):
                    own = place
            frame = frame.tb_next
        # What went wrong deep in a library is mended where that was called.
        place = own or place
    if place is not None:
        line = f"{line} ({place})"
    return line, "".join(traceback.format_exception(type(error), error, frames))


def _is_ours(name):
    return name == _HERE or name.startswith("<frozen importlib")


class Context:
    """What a handler may know of its request. See docs/design.md, "Handlers"."""

    __slots__ = ("request_id", "function", "namespace", "pod", "timeout_seconds", "_end")

    def __init__(self, request_id, function, namespace, pod, timeout_seconds):
        self.request_id = request_id
        self.function = function
        self.namespace = namespace
        self.pod = pod
        self.timeout_seconds = timeout_seconds
        self._end = time.monotonic() + timeout_seconds

    def remaining_ms(self):
        return max(0, int((self._end - time.monotonic()) * 1000))


def call(handler, event, context):
    """Runs the handler; yields status, headers and body."""
    try:
        return _answer(handler(event, context))
    except SystemExit:
        raise
    except BaseException as error:
        line, text = explain(error)
        line = " ".join(line.split())
        # In one piece, so that no other thread's output comes between.
        told = f"sock: request {context.request_id}: {line}: answered with 500\n{text}"
        print(told, file=sys.stderr, end="" if text.endswith("\n") else "\n")
        return (
            500,
            [("content-type", "application/json")],
            _json({"error": str(error), "type": type(error).__name__, "requestId": context.request_id}),
        )


def _answer(result):
    if isinstance(result, dict) and "statusCode" in result:
        status = result["statusCode"]
        if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
            raise ValueError(f"statusCode must be an integer from 200 to 599, not {status!r}")
        headers = []
        for name, value in (result.get("headers") or {}).items():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                headers.append((str(name), str(one)))
        kind, body = _body(result.get("body"))
        if kind is not None and not any(name.lower() == "content-type" for name, _ in headers):
            headers.append(("content-type", kind))
        return status, headers, body
    if result is None:
        return 204, [], b""
    kind, body = _body(result)
    return 200, [("content-type", kind)], body


def _body(value):
    if value is None:
        return None, b""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "application/octet-stream", bytes(value)
    if isinstance(value, str):
        return "text/plain; charset=utf-8", value.encode()
    return "application/json", _json(value)


def _json(value):
    import json

    # NaN and Infinity are no JSON: a client would fail where the handler can still be told.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
