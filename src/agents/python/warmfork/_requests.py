"""The requests that this process serves: how many were answered, which are in hand, and holding back those that come.

It knows threads, event loops and greenlets, and no server: `_servers` says where requests begin and end. docs/agent-protocol.md has the
rules.
"""
import sys
from _contextvars import ContextVar
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask
from _thread import allocate_lock, start_new_thread
from time import monotonic, sleep

from ._agent import FOREIGN_SIGNALS

# Between two messages.
REPORT_S = 0.1
# How often is looked whether requests in hand have ended, and from greenlets whether it goes on.
LOOK_S = 0.002
# What has been read and has not begun is unseen where no connection is known, and would run in a fork. So nothing must have come to the
# gate for so long, or the gate have been closed for so long. Under load on a busy machine 5 ms missed one in three (in MRI).
QUIET_S = 0.02
MAX_QUIET_S = 0.1
MAX_PATH = 200

# The request that this thread, task or greenlet is about: what is counted at two places is one.
_current = ContextVar("warmfork_request", default=None)


class Dropped(Exception):
    """It was held back in the source, which serves it. This is a fork, where nothing may come of it."""

    def __init__(self):
        super().__init__("the request is the source's of this fork, which answers it")


class Request:
    __slots__ = ("owner", "since", "answered", "method", "path")

    def __init__(self, owner, method, path):
        self.owner = owner
        self.method = method
        self.path = path
        self.since = 0.0
        self.answered = None

    def is_in_hand(self):
        return self in self.owner.in_hand

    def answer(self):
        """Its answer is sent; it stays in hand for what the program does about it yet."""
        if self.answered is None:
            self.answered = monotonic()

    def end(self, is_answered=True):
        self.owner.end(self, is_answered)

    def is_stream(self):
        """An event stream, which may never end: not in hand from now on, and not counted."""
        self.owner.end(self, False)

    def __str__(self):
        return ("%s %s" % (self.method or "", self.path or ""))[:MAX_PATH].strip() or "a request without a name"


class Requests:
    """Those of one process. A fork has another one, and this one is over in it."""

    def __init__(self, agent):
        self._agent = agent
        self._lock = allocate_lock()
        # By age.
        self.in_hand = {}
        self.total = 0
        self.ms = 0.0
        self.held = 0
        # What those that are held back wait for.
        self._gate = None
        self._futures = []
        # Whether a request has begun whose connection was not known.
        self.is_blind = False
        self._said = 0
        self._is_reporting = False
        self.is_over = False

    # -- begin and end

    def _admit(self, request):
        """Gives the gate where it is closed."""
        with self._lock:
            if self._gate is None:
                request.since = monotonic()
                self.in_hand[request] = None
                return None
            self.held += 1
            return self._gate

    def begin(self, method, path):
        """Waits where requests are held back. Raises Dropped."""
        request = Request(self, method, path)
        while True:
            gate = self._admit(request)
            if gate is None:
                return request
            try:
                self._wait(gate)
            finally:
                with self._lock:
                    self.held -= 1
            if self.is_over:
                raise Dropped

    def _wait(self, gate):
        if _is_greenlet():
            # The others of its thread go on.
            while gate.locked():
                sys.modules["gevent"].sleep(LOOK_S)
        else:
            with gate:
                pass

    async def begin_in_loop(self, method, path):
        request = Request(self, method, path)
        while True:
            gate = self._admit(request)
            if gate is None:
                return request
            try:
                await self._wait_in_loop(gate)
            finally:
                with self._lock:
                    self.held -= 1
            if self.is_over:
                raise Dropped

    async def _wait_in_loop(self, gate):
        asyncio = sys.modules.get("asyncio")
        loop = None if asyncio is None else asyncio._get_running_loop()
        if loop is None:
            # Another library's, which has no call that is safe from any thread and says nothing of itself.
            while gate.locked():
                await sys.modules["trio"].sleep(LOOK_S)
            return
        future = loop.create_future()
        with self._lock:
            if self._gate is not gate:
                return
            self._futures.append((loop, future))
        await future

    def end(self, request, is_answered):
        now = monotonic()
        with self._lock:
            if request not in self.in_hand:
                return
            del self.in_hand[request]
            if not is_answered:
                return
            self.total += 1
            self.ms += ((request.answered or now) - request.since) * 1000
            if self._is_reporting:
                return
            self._is_reporting = True
        self._start_report()

    # -- rest

    def until_none_in_hand(self, timeout):
        """Holds back what begins, for at most a quarter of the time at once. Gives what is in hand yet, where that does not end."""
        deadline = monotonic() + timeout
        hold = timeout / 4
        while True:
            # One that takes long is not to hold up all that come after it.
            if self._look(lambda: self._age() <= hold, deadline):
                self.hold_back()
                if self._look(lambda: not self.in_hand, min(deadline, monotonic() + hold)):
                    self._wait_for_quiet()
                    return None
            what = self._describe()
            self.let_go()
            in_vain = bool(self._agent.calls)
            if what is None and not in_vain and monotonic() < deadline:
                continue
            if in_vain:
                return (what or "a request is in hand") + "; the program has asked for a fork of itself meanwhile"
            if monotonic() >= deadline:
                return what or "requests came faster than they could be held back"

    def _look(self, is_so, end):
        while not is_so():
            # A request that has asked for a fork waits for what does not come before the checkpoint.
            if monotonic() >= end or self._agent.calls:
                return False
            sleep(LOOK_S)
        return True

    def _wait_for_quiet(self):
        end = monotonic() + MAX_QUIET_S
        seen = -1
        while self.is_blind and seen != self.held and monotonic() < end:
            seen = self.held
            sleep(QUIET_S)

    def _oldest(self):
        with self._lock:
            return next(iter(self.in_hand), None)

    def _age(self):
        oldest = self._oldest()
        return 0.0 if oldest is None else monotonic() - oldest.since

    def _describe(self):
        oldest = self._oldest()
        if oldest is None:
            return None
        count = len(self.in_hand)
        many = "1 request is in hand, for" if count == 1 else "%d requests are in hand, the oldest for" % count
        return "%s %d ms: %s" % (many, (monotonic() - oldest.since) * 1000, oldest)

    def hold_back(self):
        gate = allocate_lock()
        gate.acquire()
        with self._lock:
            self._gate = gate

    def let_go(self):
        with self._lock:
            gate, self._gate = self._gate, None
            futures, self._futures = self._futures, []
        if gate is not None:
            gate.release()
        for loop, future in futures:
            try:
                loop.call_soon_threadsafe(_settle, future)
            except RuntimeError:
                pass  # The loop is closed.

    def become(self):
        """In a fork, before anybody else can run: nothing here lets go of the interpreter's lock."""
        self.is_over = True
        self._agent.requests = Requests(self._agent)
        self._agent.requests.is_blind = self.is_blind

    # -- counts. A thread tells of them which lives as long as they change: the agent's own waits in the kernel.

    def _start_report(self):
        mask = pthread_sigmask(SIG_BLOCK, ())
        try:
            pthread_sigmask(SIG_BLOCK, FOREIGN_SIGNALS)
            start_new_thread(self._report, ())
        except RuntimeError:
            self.say()  # The interpreter ends.
        finally:
            pthread_sigmask(SIG_SETMASK, mask)

    def _report(self):
        while True:
            self.say()
            sleep(REPORT_S)
            with self._lock:
                if self.is_over or self._said == self.total:
                    self._is_reporting = False
                    return

    def say(self):
        with self._lock:
            total, ms = self.total, self.ms
            if self.is_over or total == self._said:
                return
            self._said = total
        line = b'{"type":"requests","total":%d,"ms":%.3f}\n' % (total, ms)
        connection = self._agent.connection
        if connection is None:
            return
        try:
            # What waited for the end of a checkpoint is the source's in a fork.
            connection.send(line, lambda: self.is_over)
        except OSError:
            self._agent.lose(connection)


def _settle(future):
    if not future.done():
        future.set_result(None)


def _is_greenlet():
    """Whether this is a greenlet of gevent that can let others run."""
    gevent = sys.modules.get("gevent")
    if gevent is None:
        return False
    try:
        hub = sys.modules["gevent._hub_local"].get_hub_if_exists()
        return hub is not None and gevent.getcurrent() is not hub
    except (KeyError, AttributeError):
        return False


# -- for those who know where a request begins


def begin(agent, method=None, path=None, socket=None):
    """Gives the request; None within another one. Raises Dropped. `socket`: of its connection, where that is known."""
    current = _current.get()
    if current is not None and current.owner is agent.requests and current.is_in_hand():
        return None
    if is_of_source(agent, socket):
        raise Dropped
    if socket is None:
        agent.requests.is_blind = True
    request = agent.requests.begin(method, path)
    _current.set(request)
    return request


async def begin_in_loop(agent, method, path, socket=None):
    if is_of_source(agent, socket):
        raise Dropped
    if socket is None:
        agent.requests.is_blind = True
    request = await agent.requests.begin_in_loop(method, path)
    _current.set(request)
    return request


def is_of_source(agent, socket):
    """Whether this is a fork, and the connection one that its source goes on with: what was read of it before is the source's."""
    if not agent.is_fork or socket is None:
        return False
    try:
        # In the place of a connection a fork has something else, or the end of it.
        fd = socket.fileno()
        return fd < 0 or not _has_peer(fd, socket)
    except (OSError, AttributeError, TypeError):
        return True


def _has_peer(fd, socket):
    from _socket import AF_UNIX, SO_DOMAIN, SOL_SOCKET

    if socket.family == AF_UNIX:
        from select import POLLHUP, poll

        look = poll()
        look.register(fd, 0)
        return not any(events & POLLHUP for _, events in look.poll(0))
    if socket.getsockopt(SOL_SOCKET, SO_DOMAIN) != socket.family:
        return False
    socket.getpeername()
    return True


def note_headers(headers):
    """Of the request of this context: they are sent. `headers`: pairs."""
    request = _current.get()
    if request is not None and is_event_stream(headers):
        request.is_stream()


def is_event_stream(headers):
    for name, value in headers:
        if isinstance(name, bytes):
            if name.lower() == b"content-type":
                return value[:17].lower() == b"text/event-stream"
        elif name.lower() == "content-type":
            return str(value)[:17].lower() == "text/event-stream"
    return False
