"""warmfork: the side of a program that is checkpointed and forked. See __init__.pyi for the types.

    import warmfork

    @warmfork.before_checkpoint
    def close_pool(): ...

    @warmfork.on_fork
    def begin():
        print("a fork of generation", warmfork.generation, "with", warmfork.payload)

    warmfork.ready()

Before a checkpoint the hooks run in a thread of the agent, while the program goes on: a hook may hand work to a running event loop
(`asyncio.run_coroutine_threadsafe(pool.close(), loop).result()`). Then everything stops. The hooks after a checkpoint and those of a
fork run in that same thread, before anything else: the main thread waits for them wherever it is. So they can schedule work on a loop
of the main thread (`loop.call_soon_threadsafe`), but must not wait for it, and cannot call `signal.signal`.
"""
from . import _agent
from ._agent import WarmforkError

__all__ = [
    "WarmforkError",
    "Checkpoint",
    "after_checkpoint",
    "before_checkpoint",
    "checkpoint",
    "connected",
    "count_requests",
    "fork",
    "generation",
    "is_fork",
    "no_longer_fork_safe",
    "on_child_exit",
    "on_fork",
    "on_message",
    "payload",
    "ready",
    "request",
    "send",
]

# Of code objects: coroutine function, function that is wrapped as one, asynchronous generator.
_ASYNCHRONOUS = 0x80 | 0x100 | 0x200


def _hook(kind, function):
    code = getattr(function, "__code__", None)
    if not callable(function) or (code is not None and code.co_flags & _ASYNCHRONOUS):
        raise TypeError("Expected `function` to be a plain function, got `%r`: nothing can wait for a coroutine here" % (function,))
    _agent.agent.hooks.append((kind, function))
    return function


def before_checkpoint(function):
    """Has the function called before each checkpoint, those registered last first. If it raises, there is no checkpoint."""
    return _hook(_agent.BEFORE, function)


def after_checkpoint(function):
    """Has the function called in the process that was checkpointed, and goes on; also where the checkpoint failed."""
    return _hook(_agent.AFTER, function)


def on_fork(function):
    """Has the function called in each fork, before the program goes on there. If it raises, the fork ends with status 70."""
    return _hook(_agent.ON_FORK, function)


def ready():
    """Says that the program is booted and warm. Without a supervisor it does nothing."""
    _agent.agent.say('{"type":"ready"}\n')


def fork(data=None):
    """Forks this process, all threads of it. Blocks until it is done; other threads go on but for the checkpoint itself.

    Returns the pid of the fork, and in the fork 0; `data` is its `payload`. Calls made at once share one checkpoint. Other calls of
    `fork` that were open then never return in the fork: they are this process's. Raises WarmforkError.
    """
    answer = _agent.agent.call("fork", _members(data))
    return 0 if "forked" in answer else answer["pid"]


def checkpoint():
    """A checkpoint that stays, to be forked from as often as wanted. In each fork of it this call returns None.

    Raises WarmforkError.
    """
    answer = _agent.agent.call("keep", "")
    return None if "forked" in answer else Checkpoint(answer["generation"])


class Checkpoint:
    """What `checkpoint()` gives: the state of the program at that moment."""

    def __init__(self, generation):
        self.generation = generation

    def __repr__(self):
        return "<warmfork.Checkpoint of generation %d>" % self.generation

    def fork(self, data=None):
        """Starts a fork from that state, and returns its pid. `data` is its `payload`. Raises WarmforkError."""
        return _agent.agent.call("fork", ',"generation":%d%s' % (self.generation, _members(data)))["pid"]

    def drop(self):
        """Gives the checkpoint back."""
        _agent.agent.say('{"type":"drop","generation":%d}\n' % self.generation)


def send(data, to=None):
    """Sends a value that JSON has, or bytes, to the user of the supervisor; to the pid of a fork of one's own; or to "parent".

    True if it was sent: not where there is no supervisor.
    """
    receiver = "" if to is None else ',"to":"parent"' if to == "parent" else ',"to":%d' % to
    return _agent.agent.say(_agent.checked('{"type":"message","data":%s%s}\n' % (_agent.payload(data), receiver)))


def on_message(function):
    """Has `function(data, sender)` called for each message, in a thread of its own and one after the other.

    `sender` is None for the user of the supervisor, "parent", or the pid of a fork. What came before waits for the function.
    """
    _agent.agent.handle("message", function)
    return function


def on_child_exit(function):
    """Has `function(pid, code, signal)` called when a fork that this process asked for has ended; `code` or `signal` is None."""
    _agent.agent.handle("childExit", function)
    return function


def count_requests(app):
    """An application of WSGI or ASGI around this one, whose requests are counted. For a server that the agent does not know: what
    http.server, wsgiref, werkzeug, gunicorn, waitress and uvicorn serve is counted anyway, and never twice.
    """
    from ._servers import counted

    return counted(app)


class request:
    """`with warmfork.request():` counts the block as a request, where no server is known. Before a refork it waits until it is over.

    In a fork a block that waited does not run: then it raises an exception. `name` is for messages. With `socket`, that of the
    connection, also a request that had been read and had not begun is seen in a fork.
    """

    def __init__(self, name=None, socket=None):
        self._name = name
        self._socket = socket
        self._request = None

    def __enter__(self):
        from ._requests import begin

        _agent.agent.count()
        self._request = begin(_agent.agent, self._name, None, self._socket)

    def __exit__(self, *_):
        if self._request is not None:
            self._request.end()


def no_longer_fork_safe(reason=None):
    """Says that no others may be forked from this process from now on: it is never reforked. It cannot be taken back.

    `fork()` of the process itself still works.
    """
    _agent.agent.refuse(reason or "")


def _members(data):
    return "" if data is None else ',"data":' + _agent.payload(data)


def __getattr__(name):
    # What changes with a fork is read at each use.
    if name in ("connected", "generation", "is_fork", "payload"):
        return getattr(_agent.agent, name)
    raise AttributeError("module 'warmfork' has no attribute %r" % name)


_agent.start()
