"""The agent's connection to the supervisor: what it hears, and what it says. docs/agent-protocol.md has the words.

It is loaded at the start of every program that has the agent, so it imports only what the interpreter has in itself. Checkpoints are
`_checkpoint`'s, which is loaded at the first one.
"""
import gc
import os
import sys

# By name: gevent puts its own in their place later, under which the agent's threads would be greenlets of the program's thread.
from _signal import SIG_BLOCK, SIG_SETMASK, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, pthread_sigmask, valid_signals
from _thread import RLock, allocate_lock, get_ident, get_native_id, start_new_thread
from itertools import count

PROTOCOL = 1
AGENT = "python/0.1.0"
# Bytes of a line, its end among them: docs/agent-protocol.md.
MAX_LINE = 8 << 20
# A supervisor that has no room for another connection for so long is taken for none.
CONNECT_TIMEOUT_S = 5
# Of messages that nobody has asked for yet.
MAX_WAITING_EVENTS = 10_000

# Signals are the business of the program's threads, but not those that a thread brings on itself.
FOREIGN_SIGNALS = frozenset(valid_signals()) - {SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV}

# The modules in which servers begin and end requests: `_servers` has what is changed there, and is loaded with the first of them.
SERVERS = frozenset(
    (
        "http.server",
        "wsgiref.handlers",
        "werkzeug.serving",
        "gunicorn.workers.sync",
        "gunicorn.workers.gthread",
        "gunicorn.workers.base_async",
        "gunicorn.http.wsgi",
        "waitress.task",
        "uvicorn.config",
    )
)

BEFORE, AFTER, ON_FORK = "before_checkpoint", "after_checkpoint", "on_fork"


class WarmforkError(Exception):
    """What warmfork cannot do. `code` is one of docs/errors.md."""

    def __init__(self, code, message):
        super().__init__("%s: %s" % (code, message))
        self.code = code


class Connection:
    """A descriptor that is the supervisor's, until the program closes it behind our back and opens another file under its number."""

    def __init__(self, path):
        import _socket

        self._no_signal = _socket.MSG_NOSIGNAL
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            # socket.setdefaulttimeout holds for this one too.
            self.socket.settimeout(None)
            self._limit_connect(_socket, CONNECT_TIMEOUT_S)
            self.socket.connect(path)
            self._limit_connect(_socket, 0)
        except BaseException:
            self.socket.close()
            raise
        self.fd = self.socket.fileno()
        # Reentrant: a signal's handler may want to say something while its thread is about to. Held across the park.
        self.writing = RLock()
        self.received = b""
        self.is_closed = False
        self.know()

    def _limit_connect(self, _socket, seconds):
        try:
            time = seconds.to_bytes(8, sys.byteorder) + bytes(8)
            self.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, time)
        except OSError:
            pass  # `struct timeval` is another on 32-bit systems: there it waits as long as it takes.

    def know(self):
        """From now on the descriptor is known for ours as the file that it leads to now."""
        self.identity = self._look()

    def _look(self):
        try:
            found = os.fstat(self.fd)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def is_intact(self):
        return not self.is_closed and self.identity is not None and self._look() == self.identity

    def send(self, line, unless=None):
        """Raises OSError where there is nobody, or nothing of ours. `unless` is asked when it is our turn."""
        data = line.encode() if isinstance(line, str) else line
        with self.writing:
            if unless is not None and unless():
                return
            if not self.is_intact():
                raise OSError("the descriptor of the connection is closed")
            sent = 0
            try:
                while sent < len(data):
                    sent += self.socket.send(data[sent:] if sent else data, self._no_signal)
            except BaseException:
                # A signal's handler threw in the middle of a line: what follows would be read as its rest.
                if sent:
                    self.close()
                raise

    def read_line(self):
        """Waits for it. None at the end of the connection, or where the descriptor is another file's."""
        while True:
            line, end, rest = self.received.partition(b"\n")
            if end:
                self.received = rest
                return line
            if not self.is_intact():
                return None
            try:
                more = self.socket.recv(65536)
            except BlockingIOError:
                # Somebody has made all descriptors non-blocking.
                os.set_blocking(self.fd, True)
                continue
            except OSError:
                return None
            if not more:
                return None
            self.received += more

    def close(self):
        if self.is_closed:
            return
        intact = self.is_intact()
        self.is_closed = True
        if intact:
            self.socket.close()
        else:
            # Not ours to close.
            self.socket.detach()


class Watch:
    """A finder of modules that finds none but those of SERVERS, by asking the finders behind it: 0.1 µs for every other one."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in SERVERS:
            return None
        from . import _servers

        return _servers.find(name, path, target, [each for each in sys.meta_path if each is not cls])

    @classmethod
    def start(cls):
        sys.meta_path.insert(0, cls)
        loaded = [name for name in SERVERS if name in sys.modules]
        if loaded:
            from . import _servers

            for name in loaded:
                _servers.change(name)


class Call:
    """A request that waits for its answer: the answer is set, or the error, and then `done` is released."""

    def __init__(self, kind):
        self.kind = kind
        self.done = allocate_lock()
        self.done.acquire()
        self.answer = None

    def settle(self, answer):
        self.answer = answer
        self.done.release()


class Agent:
    def __init__(self):
        self.connection = None
        self.connected = False
        # (kind, function), in order of registration.
        self.hooks = []
        self.payload = None
        self.generation = None
        self.is_fork = False
        # Counts the forks that this process has become: what was begun before one is the source's.
        self.epoch = 0
        # The ids that it has had, this one last.
        self.pids = [os.getpid()]
        # The threads that run hooks.
        self.hook_threads = set()
        # What holds the main thread: _checkpoint.Gate.
        self.gate = None
        # Number of the thread that reads the connection.
        self.reader = None
        # Counts the times that this process came out of os.fork().
        self.own_forks = 0
        self.calls = {}
        self._numbers = count(1)
        self._path = None
        self._handlers = {"message": None, "childExit": None}
        self._events = []
        self._events_lock = allocate_lock()
        self._dispatching = False
        self.program_mask = frozenset()
        # _requests.Requests, once something that serves is loaded.
        self.requests = None
        # Why no others may be forked from this process; None where they may.
        self.unsafe = None

    # -- start

    def start(self, path):
        self._path = path
        self.own_at_fork = self._before_fork, self._in_child, _nothing
        self.before_fork, self.in_child, self.in_parent = _at_fork_lists(*self.own_at_fork)
        import atexit

        # Or the interpreter warns of a socket that nobody has closed.
        atexit.register(self._leave)
        self._connect()
        Watch.start()

    def _connect(self):
        try:
            connection = Connection(self._path)
        except OSError:
            return
        self.connection = connection
        version = ".".join(map(str, sys.version_info[:3]))
        hello = '{"type":"hello","protocol":%d,"agent":"%s","runtime":"python","version":"%s","pid":%d,"fd":%d,"counts":true}\n'
        try:
            connection.send(hello % (PROTOCOL, AGENT, version, os.getpid(), connection.fd))
            if self.unsafe is not None:
                connection.send(unsafe_line(self.unsafe))
            # The new thread inherits the mask.
            self.program_mask = pthread_sigmask(SIG_BLOCK, ())
            try:
                pthread_sigmask(SIG_BLOCK, FOREIGN_SIGNALS)
                start_new_thread(self._serve, (connection,))
            finally:
                pthread_sigmask(SIG_SETMASK, self.program_mask)
        except (OSError, RuntimeError):
            self.lose(connection)

    def _leave(self):
        if self.requests is not None:
            self.requests.say()
        if self.connection is not None:
            self.connection.is_closed = True
            self.connection.socket.detach()

    # -- what it hears

    def _serve(self, connection):
        self.reader = get_native_id()
        try:
            while self.connection is connection:
                line = connection.read_line()
                # A read that waits in the kernel still has the connection when the program has closed it.
                if line is None or not connection.is_intact():
                    break
                message = parse(line)
                if message is None:
                    break
                self._obey(message)
        finally:
            self.lose(connection)

    def _obey(self, message):
        kind = message.get("type")
        if kind == "welcome":
            if message.get("protocol") == PROTOCOL:
                self.connected = True
            else:
                self.lose(self.connection)
        elif kind == "goodbye":
            self.lose(self.connection)
        elif kind == "checkpoint":
            from . import _checkpoint

            for late in _checkpoint.Session(self, message).run():
                self._obey(late)
        elif kind == "forkResult" or kind == "keepResult":
            call = self.calls.pop(message.get("id"), None)
            if call is not None:
                call.settle(message)
        elif kind == "message" or kind == "childExit":
            self._enqueue(kind, message)

    def lose(self, connection):
        """Nothing more is said or heard. Calls that are open fail."""
        if connection is None or self.connection is not connection:
            return
        connection.close()
        self.connection = None
        self.connected = False
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.settle({"error": {"code": "NO_SUPERVISOR", "message": "the connection to the supervisor is lost"}})

    # -- messages for the program, in a thread of their own: a handler may take its time, and may fork

    def handle(self, kind, function):
        self._handlers[kind] = function
        self._dispatch()

    def _enqueue(self, kind, message):
        with self._events_lock:
            if len(self._events) < MAX_WAITING_EVENTS:
                self._events.append((kind, message))
        self._dispatch()

    def _dispatch(self):
        with self._events_lock:
            if self._dispatching or not any(self._handlers[kind] for kind, _ in self._events):
                return
            self._dispatching = True
        try:
            start_new_thread(self._deliver, ())
        except RuntimeError:
            self._dispatching = False  # the interpreter ends

    def _deliver(self):
        pthread_sigmask(SIG_SETMASK, self.program_mask)
        while True:
            with self._events_lock:
                for at, (kind, message) in enumerate(self._events):
                    if self._handlers[kind]:
                        del self._events[at]
                        break
                else:
                    self._dispatching = False
                    return
            try:
                if kind == "message":
                    self._handlers[kind](payload_value(message.get("data")), message.get("from"))
                else:
                    self._handlers[kind](message.get("pid"), message.get("code"), message.get("signal"))
            except BaseException:
                sys.excepthook(*sys.exc_info())

    # -- what it says

    def say(self, line):
        """Tells the supervisor where there is one. True if it was told."""
        connection = self.connection
        if connection is None:
            return False
        try:
            connection.send(line)
            return True
        except OSError:
            self.lose(connection)
            return False

    def call(self, kind, members):
        """Sends a request and waits for its answer. In a fork that answers it: {"forked": True}."""
        connection = self.connection
        if connection is None:
            raise WarmforkError("NO_SUPERVISOR", "the program has no connection to a supervisor of warmfork")
        if get_ident() in self.hook_threads:
            raise WarmforkError("NOT_AT_REST", "a hook cannot fork: the checkpoint that it belongs to is under way")
        call = Call(kind)
        number = next(self._numbers)
        epoch = self.epoch
        self.calls[number] = call
        try:
            line = '{"type":"%s","id":%d%s}\n' % (kind, number, members)
            # Who came too late for the checkpoint waits in `send` until it is over, and in the fork the request is the source's.
            connection.send(checked(line), lambda: self.epoch != epoch)
            call.done.acquire()
        except OSError:
            self.lose(connection)
            raise WarmforkError("NO_SUPERVISOR", "the connection to the supervisor is lost") from None
        finally:
            self.calls.pop(number, None)
        error = call.answer.get("error")
        if error is not None:
            raise WarmforkError(error.get("code") or "CHECKPOINT_FAILED", error.get("message") or "no reason was given")
        return call.answer

    def count(self):
        """From now on there is something that counts."""
        if self.requests is None:
            from ._requests import Requests

            self.requests = Requests(self)

    def refuse(self, reason):
        self.unsafe = reason
        self.say(unsafe_line(reason))

    # -- fork(2) by the program itself

    def _before_fork(self):
        if sys.version_info >= (3, 12):
            self._hide_own_thread()

    def _hide_own_thread(self):
        """Python warns of a fork in a process of several threads. The agent's own is none that the child could miss."""
        import warnings

        message = r"This process \(pid=\d+\) is multi-threaded"
        if self.connection is not None and len(os.listdir("/proc/self/task")) == 2:
            warnings.filterwarnings("ignore", message, DeprecationWarning)
        else:
            warnings.filters[:] = [each for each in warnings.filters if getattr(each[1], "pattern", None) != message]

    def _in_child(self):
        """The descriptor is the parent's, and its threads are not here."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
        self.connected = False
        self.calls = {}
        self.hook_threads = set()
        self.gate = None
        self.own_forks += 1
        self.pids = [os.getpid()]
        self._events = []
        self._events_lock = allocate_lock()
        self._dispatching = False
        if self.requests is not None:
            self.requests.become()
        self._connect()


def _nothing(*_):
    pass


def _at_fork_lists(before, in_child, in_parent):
    """The interpreter's own lists of what os.register_at_fork was given, live, of all that was registered and will be.

    Nothing in Python gives them; but they are lists that now have our functions in them. Where they are not found (another
    interpreter than CPython), os.register_at_fork is replaced by one that keeps lists.
    """
    functions = before, in_child, in_parent
    os.register_at_fork(before=before, after_in_child=in_child, after_in_parent=in_parent)
    candidates = [each for each in gc.get_referrers(*functions) if type(each) is list]
    found = [next((each for each in candidates if any(one is sought for one in each)), None) for sought in functions]
    if None not in found:
        return found
    lists = [], [], []
    register = os.register_at_fork

    def register_at_fork(*, before=None, after_in_child=None, after_in_parent=None):
        given = {"before": before, "after_in_child": after_in_child, "after_in_parent": after_in_parent}
        register(**{name: function for name, function in given.items() if function is not None})
        for each, function in zip(lists, given.values()):
            if function is not None:
                each.append(function)

    os.register_at_fork = register_at_fork
    return lists


# -- lines


class _Json:
    strict = False
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": -float("inf")}.get
    memo = {}


_scan = None


def parse(line):
    """The object of a line, or None. The scanner of json without json, whose regular expressions cost a start 5 ms."""
    global _scan
    if _scan is None:
        try:
            from _json import make_scanner

            _scan = make_scanner(_Json)
        except ImportError:
            import json

            _scan = lambda text, _: (json.loads(text), 0)  # noqa: E731
    try:
        message, _ = _scan(line.decode().strip(), 0)
    except (ValueError, StopIteration, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def unsafe_line(reason):
    import json

    return '{"type":"unsafe"%s}\n' % (',"reason":' + json.dumps(reason[:1000]) if reason else "")


def checked(line):
    data = line.encode()
    if len(data) > MAX_LINE:
        raise WarmforkError("BAD_OPTION", "what is to be sent has %d bytes as a line, and may have %d" % (len(data), MAX_LINE))
    return data


def payload(data):
    """Bytes as bytes, anything else as JSON has it. Raises TypeError or ValueError for what JSON cannot have."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        from binascii import b2a_base64

        return '{"base64":"%s"}' % b2a_base64(data, newline=False).decode()
    import json

    return '{"json":%s}' % json.dumps(data, allow_nan=False, separators=(",", ":"))


def payload_value(value):
    if not isinstance(value, dict):
        return None
    return text_bytes(value) if "base64" in value else value.get("json")


def text_bytes(text):
    """The bytes of a text, which need not be UTF-8."""
    if isinstance(text, str):
        return text.encode("utf-8", "surrogatepass")
    from binascii import a2b_base64

    return a2b_base64(text["base64"])


agent = Agent()


def start():
    """Connects where there is a supervisor. Called again, it does nothing."""
    path = os.environ.get("WARMFORK_SOCKET")
    if not path or agent._path is not None:
        return
    try:
        agent.start(path)
    except Exception as error:
        if sys.stderr is not None:
            sys.stderr.write("warmfork: this program goes on without its agent: %r\n" % (error,))
