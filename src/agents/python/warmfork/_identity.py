"""What remembers, in a fork, who the process was: made right here, before the hooks of the program.

After os.fork() only one thread goes on; after a fork of warmfork all of them do. So what the child of os.fork() does about the other
threads and about their locks must not be done, and what it does about itself must.
"""
import os
import sys

from ._agent import payload_value, text_bytes

# -- at once: nothing here may let go of the interpreter's lock (no system call that Python thinks can block)


def correct_at_once(agent, message):
    agent.is_fork = True
    agent.generation = message.get("generation")
    agent.payload = payload_value(message.get("data"))
    agent.pids.append(message.get("pid"))
    _correct_random(message.get("seed"))
    _correct_threads(agent, message.get("threads") or {}, message.get("pid"))
    if message.get("args") is not None:
        sys.argv[1:] = [os.fsdecode(text_bytes(each)) for each in message["args"]]
    env = message.get("env") or {}
    for name, value in (env.get("set") or {}).items():
        os.environb[name.encode()] = text_bytes(value)
    for name in env.get("unset") or ():
        os.environb.pop(name.encode(), None)


def _correct_random(seed):
    # Modules may be half imported, where a thread is about it.
    random = getattr(sys.modules.get("random"), "_inst", None)
    # Once more with the kernel's bytes in `correct`, as Python has it after os.fork(); but threads can run before that. Another instance
    # of random.Random is the program's: it was seeded for what the program wants to repeat.
    if random is not None and seed is not None:
        random.seed(int.from_bytes(text_bytes({"base64": seed}), "big"))
    # These look at the pid, which can be the same one in a pid namespace.
    semaphore = getattr(sys.modules.get("multiprocessing.synchronize"), "SemLock", None)
    for names in (getattr(sys.modules.get("tempfile"), "_name_sequence", None), getattr(semaphore, "_rand", None)):
        if hasattr(names, "_rng_pid"):
            del names._rng_pid


def _correct_threads(agent, threads, pid):
    agent.reader = threads.get(str(agent.reader), agent.reader)
    threading = sys.modules.get("threading")
    if not hasattr(threading, "_main_thread"):
        return
    for thread in list(threading._active.values()):
        number = getattr(thread, "_native_id", None)
        if number is not None:
            thread._native_id = threads.get(str(number), pid if thread is threading.main_thread() else number)
    if sys.version_info < (3, 12):
        _correct_running_loops_of_threads(threading.main_thread().ident)


# -- what may take its time


def correct(agent, message):
    """Raises what os.chdir raises."""
    if message.get("cwd") is not None:
        os.chdir(text_bytes(message["cwd"]))
    _correct_multiprocessing()
    for hook in _at_fork_hooks_in_child(agent):
        try:
            hook()
        except BaseException:
            # As the interpreter has it.
            sys.excepthook(*sys.exc_info())
    # It has kept its own state beside the interpreter's since before it could tell a fork.
    numpy = sys.modules.get("numpy.random.mtrand")
    if hasattr(numpy, "seed"):
        numpy.seed()
    # OpenSSL sees a new pid and seeds itself anew, but in a pid namespace it is the old one.
    ssl = sys.modules.get("_ssl")
    if hasattr(ssl, "RAND_add"):
        ssl.RAND_add(os.urandom(32), 0.0)
    _correct_uuid()


def _correct_multiprocessing():
    current = getattr(sys.modules.get("multiprocessing.process"), "_current_process", None)
    if getattr(current, "_parent_pid", None) is not None:
        current._parent_pid = os.getppid()


def _correct_uuid():
    """uuid1 and uuid6 are made of the network card's address, the time, and 14 bits that libuuid keeps in memory: two forks can make the
    same one. With another node than the card's, a random one with the multicast bit (RFC 9562, section 6.10), they cannot. It becomes
    the default of the functions, which others may have imported by name; uuid.getnode() stays the card's.
    """
    uuid = sys.modules.get("uuid")
    if uuid is None:
        return
    node = int.from_bytes(os.urandom(6), "big") | (1 << 40)
    for name in ("uuid1", "uuid6"):
        function = getattr(uuid, name, None)
        defaults = getattr(function, "__defaults__", None)
        if defaults is not None and function.__code__.co_varnames[:1] == ("node",):
            function.__defaults__ = (node,) + defaults[1:]
    # The counter of uuid7 is drawn anew when there is no last time.
    if hasattr(uuid, "_last_timestamp_v7"):
        uuid._last_timestamp_v7 = None


# -- what was given to os.register_at_fork


THREADS_DIE = (
    ("threading", "_after_fork"),
    ("gevent.threading", "after_fork_in_child"),
    ("asyncio.events", "on_fork"),
)


def at_fork_hooks_before(agent):
    return [each for each in reversed(agent.before_fork) if each is not agent.own_at_fork[0]]


def at_fork_hooks_in_parent(agent):
    return [each for each in agent.in_parent if each is not agent.own_at_fork[2]]


def _at_fork_hooks_in_child(agent):
    """Those `after_in_child`, but for these, which would break a child whose threads live on:

    - threading._after_fork calls all threads but one dead, and puts new locks in place of those that they hold; gevent's does the same
      where it has its own threads in their place;
    - asyncio's on_fork (Python >= 3.12) takes the running loop from the thread that runs it, and its wake-up descriptor from signals;
    - logging's gives all its locks new state, and concurrent.futures.thread's its one lock: a thread that holds one could not let go of
      it, and one that waits for it would for ever. What `before` took of them is given back as in the parent;
    - any lock's own _at_fork_reinit, for the same reason, and what has a method of that name for threads of its own.
    """
    hooks = []
    for hook in agent.in_child:
        if hook is agent.own_at_fork[1]:
            continue
        module, name = getattr(hook, "__module__", None), getattr(hook, "__name__", None)
        if (module, name) in THREADS_DIE:
            continue
        if (module, name) == ("logging", "_after_at_fork_child_reinit_locks"):
            hooks += [each for each in agent.in_parent if getattr(each, "__module__", None) == "logging"]
        elif name == "_at_fork_reinit":
            lock = getattr(hook, "__self__", hook)
            hooks += [each for each in agent.in_parent if getattr(each, "__self__", None) is lock]
        else:
            hooks.append(hook)
    return hooks


# -- asyncio. Up to Python 3.11 it has no running loop where the pid is not the one that it was started with.


def correct_running_loop(pids):
    """In the thread of the loop, which is any that asyncio has, uvloop's too. `pids`: that this process has had."""
    if sys.version_info >= (3, 12) or len(pids) < 2 or "_asyncio" not in sys.modules:
        return
    import _asyncio
    import ctypes

    get = ctypes.pythonapi.PyThreadState_GetDict
    get.restype = ctypes.c_void_p
    address = get()
    if not address:
        return
    holder = ctypes.cast(address, ctypes.py_object).value.get("__asyncio_running_event_loop__")
    # After the object's header: a pointer to the loop, and the pid. Of all versions that this is for.
    if type(holder).__name__ != "_RunningLoopHolder" or type(holder).__basicsize__ != object.__basicsize__ + 16:
        return
    at = id(holder) + object.__basicsize__
    pid = ctypes.c_int.from_address(at + 8).value
    loop = ctypes.c_void_p.from_address(at).value
    if loop and pid in pids and pid != os.getpid():
        _asyncio._set_running_loop(ctypes.cast(loop, ctypes.py_object).value)


def _correct_running_loops_of_threads(main):
    """Of asyncio's own loops in other threads than the main one: as the first thing that they do once their wait is over."""
    for ident, frame in sys._current_frames().items():
        while frame is not None and ident != main:
            code = frame.f_code
            if code.co_name == "run_forever" and code.co_filename.endswith("asyncio/base_events.py"):
                _correct_when_woken(frame.f_locals.get("self"))
                break
            frame = frame.f_back


def _correct_when_woken(loop):
    original = getattr(loop, "_process_events", None)
    if original is None or hasattr(original, "_warmfork"):
        return

    def process_events(events):
        del loop._process_events
        sys.modules["_asyncio"]._set_running_loop(loop)
        original(events)

    process_events._warmfork = True
    loop._process_events = process_events
