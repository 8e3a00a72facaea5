"""One checkpoint, from the first hook until the program goes on, in the source or in a fork.

What stops the program meanwhile:
- Its main thread waits at a gate between two of its bytecodes, or comes to it from the call that it is in, a few bytecodes later at most.
  So nothing of it runs before the hooks of a fork are done, however long they wait for something.
- No thread runs Python while the agent is in its read, which is a C call that keeps the interpreter's lock (the GIL). A thread that comes
  for the lock meanwhile gets it when the agent waits for the first time: arguments and environment are right by then, the hooks are not
  done. A thread that was computing, or waiting for the lock, when the read began asks for it after 5 ms and can have it right after the
  read: the generator of the module `random` is another's by then already, which is done in the same C call.
- C code that does not need the lock runs on. Its threads are named to the supervisor. So are all threads where there is no lock to keep:
  in an interpreter without it, and in one without ctypes.
"""
import json
import os
import sys
import traceback
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask
from _socket import MSG_NOSIGNAL
from _thread import allocate_lock, get_ident, get_native_id, start_new_thread
from errno import EAGAIN, EINTR
from functools import partial
from operator import methodcaller
from time import monotonic, sleep

# All that is needed is loaded here: at the gate the main thread can be in the middle of loading something, and hold its lock.
from . import _identity
from ._agent import AFTER, BEFORE, FOREIGN_SIGNALS, ON_FORK, parse

try:
    import ctypes

    # PyDLL, unlike CDLL, keeps the interpreter's lock in its calls.
    _libc = ctypes.PyDLL(None, use_errno=True)
    _libc.read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    _libc.read.restype = ctypes.c_ssize_t
    _libc.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    _add_pending_call = ctypes.pythonapi.Py_AddPendingCall
    _add_pending_call.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    _is_true = ctypes.cast(ctypes.pythonapi.PyObject_IsTrue, ctypes.c_void_p)
except Exception:  # Python can be built without it, and a security policy can forbid it.
    ctypes = None

# EX_SOFTWARE of sysexits.h: what a fork ends with whose hooks failed.
FAILED_STATUS = 70
# A large payload is read in pieces of this size, between which other threads may run.
CHUNK = 256 << 10
SEED_BYTES = 32
# Longer than any park: a thread that waits for the interpreter's lock asks for it after this time.
LONG_S = 86_400.0
# How long the main thread is waited for at the gate. It comes later as well, but some versions let it do a few more bytecodes then.
ENTER_TIMEOUT_S = 0.001
# What a lock can wait for is limited.
MAX_TIMEOUT_S = 1_000_000.0

_call = methodcaller("__call__")


class Gate:
    """Holds the main thread. An object whose truth the interpreter asks for there, as one of its pending calls.

    That way of calling passes exceptions on, and needs no callback made by ctypes, for which some systems have no memory.
    """

    def __init__(self, agent):
        self._agent = agent
        self._lock = None
        self._is_pending = False
        self._entered = allocate_lock()
        self._entered.acquire()

    def close(self):
        """The main thread stops before its next bytecodes from now on."""
        lock = allocate_lock()
        lock.acquire()
        self._entered.acquire(False)
        self._lock = lock
        if ctypes is None or self._is_pending:
            return
        self._is_pending = True
        # All 32 places can be taken, by who does not know that they are called one after the other.
        for _ in range(100):
            if _add_pending_call(_is_true, id(self)) == 0:
                # Where it computes it is here at once; where it waits for something it comes later, and would only take up time.
                self._entered.acquire(True, ENTER_TIMEOUT_S)
                return
            sleep(0.001)
        self._is_pending = False

    def open(self):
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def __bool__(self):
        self._is_pending = False
        if self._entered.locked():
            self._entered.release()
        thrown = None
        while True:
            try:
                self._wait()
                break
            except BaseException as error:
                # Of a signal's handler, which ran here. The program gets it when it goes on.
                thrown = error
        if thrown is not None:
            raise thrown
        return False

    def _wait(self):
        # Or handlers, which are the program's, would run here.
        mask = pthread_sigmask(SIG_BLOCK, ())
        try:
            pthread_sigmask(SIG_BLOCK, FOREIGN_SIGNALS)
            while True:
                lock = self._lock
                if lock is None:
                    break
                with lock:
                    pass
        finally:
            _identity.correct_running_loop(self._agent.pids)
            pthread_sigmask(SIG_SETMASK, mask)


class HookFailure(Exception):
    def __init__(self, hook, error, code=None):
        super().__init__(str(error))
        self.code = code
        message = str(error)
        if not isinstance(error, Exception) or not message:
            message = "%s(%s)" % (type(error).__name__, message)
        self.hook = hook
        self.message = message
        self.stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))

    def json(self):
        if self.code is not None:
            return json.dumps({"code": self.code, "message": self.message})
        members = {"message": self.message, "stack": self.stack}
        return json.dumps(members if self.hook is None else {"hook": self.hook, **members})


class TooLate(Exception):
    """It was answered for this session, which took too long: it may only clean up."""


def _name(function):
    return getattr(function, "__name__", None) or repr(function)


class Session:
    """Runs in a thread of its own, while the one that called `run` looks at the clock."""

    def __init__(self, agent, message):
        self._agent = agent
        self._id = message.get("id")
        self._is_refork = message.get("reason") == "refork"
        # What holds requests back, while it does.
        self._holding = None
        self._timeout = _seconds(message.get("timeoutMs"))
        self._turn = allocate_lock()
        self._woken = allocate_lock()
        self._woken.acquire()
        self._phase = "before"
        self._allowed = self._timeout
        self._deadline = monotonic() + self._timeout
        self._current = None
        # Where the hook that runs stands among the hooks.
        self._position = -1
        self._own_forks = agent.own_forks
        # Messages that arrived between the request and the answer, for who reads after it.
        self._deferred = []

    def run(self):
        """Returns when the program goes on. Gives the messages that came in between."""
        try:
            start_new_thread(self._work, ())
        except RuntimeError as error:
            self._say_refused(HookFailure(None, error))
            return self._deferred
        while True:
            with self._turn:
                phase, deadline = self._phase, self._deadline
            if phase == "over":
                return self._deferred
            if deadline is None:
                self._woken.acquire()
            elif not self._woken.acquire(True, max(0.0, deadline - monotonic())) and self._answer_late():
                return self._deferred

    def _enter(self, phase, timeout=None):
        with self._turn:
            if self._phase == "late":
                raise TooLate
            self._phase = phase
            self._allowed = timeout
            self._deadline = None if timeout is None else monotonic() + timeout
            try:
                self._woken.release()
            except RuntimeError:
                pass  # It has not looked since the last time.

    # -- by the clock

    def _answer_late(self):
        with self._turn:
            phase = self._phase
            if self._deadline is None or monotonic() < self._deadline:
                return False
            failure = HookFailure(self._current, TimeoutError("it was not done within %d ms" % (self._allowed * 1000)))
            if phase == "fork":
                self._fail(failure)
            self._phase = "late"
        if phase == "before":
            # The hook that hangs is not undone as long as it does.
            own = self._hooks_to_undo_of_current()
            others = [each for each in self._hooks_to_undo() if each not in own]
            try:
                start_new_thread(self._undo_in_thread, (others,))
            except RuntimeError:
                pass
            self._let_go()
            self._say_refused(failure)
        else:
            self._agent.gate.open()
            self._let_go()
            self._say_running(failure)
        return True

    # -- in the thread of the session

    def _work(self):
        agent = self._agent
        agent.hook_threads.add(get_ident())
        # What hooks start, threads and processes, inherits it.
        pthread_sigmask(SIG_SETMASK, agent.program_mask)
        try:
            if agent.gate is None:
                agent.gate = Gate(agent)
            if self._rest() and self._run_before():
                self._park()
        except TooLate:
            self._undo(self._hooks_to_undo_of_current())
        finally:
            self._let_go()
            agent.hook_threads.discard(get_ident())
            with self._turn:
                if self._phase != "late":
                    self._phase = "over"
                    try:
                        self._woken.release()
                    except RuntimeError:
                        pass

    def _rest(self):
        """For a refork: what is in hand would go on in each fork. False where it was refused."""
        if not self._is_refork:
            return True
        agent = self._agent
        self._enter("rest")
        failure = None
        deadline = monotonic() + self._timeout
        if agent.unsafe is not None:
            reason = agent.unsafe or "no reason was given"
            failure = HookFailure(None, RuntimeError("the program is no longer fork-safe: " + reason), "UNSAFE")
        elif agent.requests is not None:
            requests = agent.requests
            busy = requests.until_none_in_hand(self._timeout)
            if busy is None:
                self._holding = requests
            else:
                failure = HookFailure(None, RuntimeError(busy), "BUSY")
        if failure is not None:
            self._say_refused(failure)
            return False
        self._enter("before", max(0.0, deadline - monotonic()))
        return True

    def _let_go(self):
        holding, self._holding = self._holding, None
        if holding is not None:
            holding.let_go()

    def _run_before(self):
        hooks = [(at, hook) for at, (kind, hook) in enumerate(self._agent.hooks) if kind == BEFORE]
        for at, hook in reversed(hooks):
            self._position = at
            failure = self._run_one(hook)
            if failure is not None:
                self._enter("undo")
                self._undo(self._hooks_to_undo())
                self._say_refused(failure)
                return False
            if self._phase == "late":
                raise TooLate
        self._position = -1
        for hook in _identity.at_fork_hooks_before(self._agent):
            self._run_unraisable(hook)
        try:
            self._enter("park")
        except TooLate:
            for hook in _identity.at_fork_hooks_in_parent(self._agent):
                self._run_unraisable(hook)
            raise
        return True

    def _hooks_to_undo(self):
        """The hooks after the checkpoint that were registered after the hook that failed: what ran before it was, too."""
        return [hook for kind, hook in self._agent.hooks[self._position + 1 :] if kind == AFTER]

    def _hooks_to_undo_of_current(self):
        own = []
        for kind, hook in self._agent.hooks[self._position + 1 :]:
            if kind == BEFORE:
                break
            if kind == AFTER:
                own.append(hook)
        return own

    def _undo(self, hooks):
        for hook in hooks:
            self._run_unraisable(hook)

    def _undo_in_thread(self, hooks):
        pthread_sigmask(SIG_SETMASK, self._agent.program_mask)
        self._undo(hooks)

    def _run_one(self, hook):
        """Gives the failure, if it is one."""
        self._current = _name(hook)
        try:
            hook()
        except BaseException as error:
            failure = HookFailure(self._current, error)
        else:
            failure = None
        if self._agent.own_forks != self._own_forks:
            # The hook called os.fork(), and this is the child of it, which has nothing to return to.
            os._exit(0)
        return failure

    def _run_unraisable(self, hook):
        """As the interpreter has it with such hooks of os.register_at_fork: what they throw is shown, and nothing more."""
        self._current = _name(hook)
        try:
            hook()
        except BaseException:
            sys.excepthook(*sys.exc_info())

    def _park(self):
        agent, connection = self._agent, self._agent.connection
        message = None
        threads = _threads_that_go_on(agent)
        agent.gate.close()
        if connection is not None:
            with connection.writing:
                message = self._parked(connection, threads)
                if message is not None and message["type"] == "forked":
                    self._become(connection, message)
        try:
            if message is not None and message["type"] == "forked":
                self._go_on_as_fork(message)
            else:
                self._go_on_as_source()
                if message is None:
                    agent.lose(connection)
        finally:
            _wake_waiters()

    def _parked(self, connection, threads):
        """Says it, and waits for the answer. None where there will be none."""
        if not connection.is_intact():
            return None
        members = ',"threads":' + json.dumps(threads) if threads else ""
        if self._holding is not None and self._holding.held > 0:
            members += ',"held":%d' % self._holding.held
        parked = b'{"type":"parked","id":%d%s}\n' % (self._id, members.encode())
        # A read that a signal interrupts would let go of the lock before it is repeated.
        pthread_sigmask(SIG_BLOCK, FOREIGN_SIGNALS)
        try:
            os.set_blocking(connection.fd, True)
            if not connection.is_intact():
                return None
            if ctypes is None:
                connection.send(parked)
                return self._read_message(connection, b"", lambda: os.read(connection.fd, CHUNK))
            reader = _HoldingReader(connection.fd)
            message = self._read_message(connection, reader.say_and_read(parked), reader.read)
            if message is None or message["type"] != "forked":
                reader.restore_random()
            return message
        except OSError:
            return None
        finally:
            pthread_sigmask(SIG_SETMASK, self._agent.program_mask)

    def _read_message(self, connection, chunk, read):
        while True:
            if chunk and connection.received and not connection.is_intact():
                # A fork, and these were the first bytes of a line to the source.
                connection.received = b""
                connection.know()
            connection.received += chunk
            line, end, rest = connection.received.partition(b"\n")
            while end:
                connection.received = rest
                message = parse(line)
                if message is None or message.get("type") in ("resumed", "forked"):
                    return message
                self._deferred.append(message)
                line, end, rest = connection.received.partition(b"\n")
            chunk = read()
            if not chunk:
                return None

    def _become(self, connection, message):
        """In a fork, before anybody else can run: up to the first thing here that lets go of the interpreter's lock."""
        agent = self._agent
        try:
            _identity.correct_at_once(agent, message)
        except Exception as error:
            connection.know()
            self._fail(HookFailure(None, error))
        agent.epoch += 1
        if agent.requests is not None:
            agent.requests.become()
        self._deferred.clear()
        self._calls, agent.calls = agent.calls, {}
        connection.know()

    def _go_on_as_fork(self, message):
        agent = self._agent
        try:
            _identity.correct(agent, message)
        except Exception as error:
            self._fail(HookFailure(None, error))
        hooks = [hook for kind, hook in agent.hooks if kind == ON_FORK]
        if hooks:
            self._enter("fork", _seconds(message.get("timeoutMs")))
            for hook in hooks:
                failure = self._run_one(hook)
                if failure is not None:
                    self._fail(failure)
            self._enter("park")
        agent.gate.open()
        for call in self._answered(message.get("call")):
            call.settle({"forked": True})
        self._say_running(None)

    def _answered(self, number):
        """The calls that return in this fork."""
        if number is None:
            return []
        call = self._calls.get(number)
        if call is not None:
            return [call] if call.kind == "fork" else []
        # Asked for when the checkpoint was there already: so it was a checkpoint that stays.
        return [call for call in self._calls.values() if call.kind == "keep"]

    def _go_on_as_source(self):
        agent = self._agent
        failure = None
        self._enter("resumed", self._timeout)
        for hook in _identity.at_fork_hooks_in_parent(agent):
            self._run_unraisable(hook)
        # Where one takes too long, the program goes on without waiting for it and those behind it; but they run.
        for kind, hook in agent.hooks[:]:
            if kind == AFTER:
                failure = self._run_one(hook) or failure
        try:
            self._enter("park")
        except TooLate:
            return
        agent.gate.open()
        self._say_running(failure)

    # -- what it says

    def _say_refused(self, failure):
        self._agent.say('{"type":"refused","id":%d,"error":%s}\n' % (self._id, failure.json()))

    def _say_running(self, failure):
        self._agent.say('{"type":"running"%s}\n' % ("" if failure is None else ',"error":' + failure.json()))

    def _fail(self, failure):
        self._agent.say('{"type":"failed","error":%s}\n' % failure.json())
        os._exit(FAILED_STATUS)


class _HoldingReader:
    """Reads without letting go of the interpreter's lock, and has what it read seed the module `random` before anybody can draw."""

    def __init__(self, fd):
        self._fd = fd
        self._buffer = ctypes.create_string_buffer(SEED_BYTES + CHUNK)
        # In the source it is no secret what is read.
        self._buffer[:SEED_BYTES] = os.urandom(SEED_BYTES)
        self._random = getattr(sys.modules.get("random"), "_inst", None)
        self._state = None if self._random is None else self._random.getstate()

    def say_and_read(self, line):
        """Nothing runs from the moment on that the supervisor hears the line."""
        return self._hold(partial(_libc.send, self._fd, line, len(line), MSG_NOSIGNAL))

    def read(self):
        """b"" at the end, and where it cannot be read."""
        return self._hold(int)

    def _hold(self, first):
        read = partial(_libc.read, self._fd, ctypes.addressof(self._buffer) + SEED_BYTES, CHUNK)
        # One call of C code, `map`, does all: the interpreter lets go of the lock only between bytecodes. Who comes for the lock during
        # the read will wait until we let go of it ourselves; but who asks later gets it as ever.
        interval = sys.getswitchinterval()
        while True:
            steps = [partial(sys.setswitchinterval, LONG_S), first, read, partial(sys.setswitchinterval, interval)]
            if self._random is not None:
                steps.append(self._seed())
            _, _, length, *_ = map(_call, steps)
            if length >= 0:
                return bytes(memoryview(self._buffer)[SEED_BYTES : SEED_BYTES + length])
            if ctypes.get_errno() == EAGAIN:
                os.set_blocking(self._fd, True)
            elif ctypes.get_errno() != EINTR:
                return b""
            first = int

    def _seed(self):
        from _random import Random

        beginning = memoryview(self._buffer)[: SEED_BYTES + (64 << 10)]
        return partial(next, map(partial(Random.seed, self._random), map(int.from_bytes, (beginning,), ("little",))))

    def restore_random(self):
        """In the source, which may have seeded it for what it wants to repeat."""
        if self._random is not None:
            self._random.setstate(self._state)


def _wake_waiters():
    """Who began to wait for the interpreter's lock during the read would not ask for it for a long time: wakes each once."""
    for _ in range(len(sys._current_frames()) + 1):
        sleep(0)


def _threads_that_go_on(agent):
    """Names of the threads that the agent cannot stop: those that do not need the interpreter's lock."""
    threading = sys.modules.get("threading")
    has_lock = getattr(sys, "_is_gil_enabled", None)
    if ctypes is None or (has_lock is not None and not has_lock()):
        known = [] if threading is None else threading.enumerate()
        return [each.name for each in known if each.ident != get_ident() and each.name != "MainThread"]
    numbers = _foreign_threads(agent, threading)
    if numbers:
        # One that has just been started, or has just ended, is not Python's for a moment.
        sleep(0.002)
        numbers &= _foreign_threads(agent, threading)
    return sorted(filter(None, map(_thread_name, numbers)))


def _foreign_threads(agent, threading):
    """Numbers of the threads that have nothing to do with Python."""
    known = [] if threading is None else threading.enumerate()
    try:
        numbers = {int(each) for each in os.listdir("/proc/self/task")}
    except OSError:
        return set()
    # There are none where there are as many frames as threads. Those that _thread has started have no number that Python knows.
    if len(numbers) <= len(sys._current_frames()):
        return set()
    return numbers - {each.native_id for each in known} - {os.getpid(), get_native_id(), agent.reader}


def _thread_name(number):
    try:
        with open("/proc/self/task/%d/comm" % number) as file:
            return file.read().strip()
    except OSError:
        return None


def _seconds(milliseconds):
    return min(milliseconds / 1000, MAX_TIMEOUT_S) if isinstance(milliseconds, (int, float)) else MAX_TIMEOUT_S
