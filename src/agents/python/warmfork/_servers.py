"""Where requests begin and end in the servers that are known, and around any application of WSGI or ASGI.

A server is changed when it is loaded, never loaded for it. Where a server is not known, `warmfork.count_requests(app)` is around the
application.
"""
import sys
from functools import wraps

from ._agent import agent
from ._requests import Dropped, begin, begin_in_loop, is_event_stream, note_headers

agent.count()

# -- applications


class WsgiCounter:
    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        return getattr(self.app, name)

    def __call__(self, environ, start_response):
        request = begin(agent, environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"))
        if request is None:
            return self.app(environ, start_response)

        def start(status, headers, *exc_info):
            if is_event_stream(headers):
                request.is_stream()
            return start_response(status, headers, *exc_info)

        try:
            body = self.app(environ, start)
        except BaseException:
            request.end()
            raise
        return (_MeasuredBody if hasattr(body, "__len__") else _Body)(body, request)


class _Body:
    """The server closes it when all is sent, or nothing more can be."""

    def __init__(self, body, request):
        self._body = body
        self._request = request

    def __iter__(self):
        return iter(self._body)

    def close(self):
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._request.end()

    def __del__(self):
        # Of a server that does not close it.
        self._request.end()


class _MeasuredBody(_Body):
    # Servers make a Content-Length of it.
    def __len__(self):
        return len(self._body)


class AsgiCounter:
    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        return getattr(self.app, name)

    async def __call__(self, scope, receive, send):
        if scope.get("type") != "http" or "warmfork.request" in scope:
            return await self.app(scope, receive, send)
        # Of uvicorn, which has no other way to be told that nothing is to be answered.
        cycle = getattr(receive, "__self__", None)
        transport = getattr(cycle, "transport", None)
        socket = None if transport is None else transport.get_extra_info("socket")
        try:
            request = await begin_in_loop(agent, scope.get("method"), scope.get("path"), socket)
        except Dropped:
            if transport is None or not hasattr(cycle, "disconnected"):
                raise
            cycle.disconnected = True
            transport.abort()
            return None

        async def count(message):
            kind = message.get("type")
            if kind == "http.response.start" and is_event_stream(message.get("headers") or ()):
                request.is_stream()
            await send(message)
            if kind == "http.response.body" and not message.get("more_body"):
                request.answer()

        try:
            return await self.app({**scope, "warmfork.request": True}, receive, count)
        finally:
            request.end()


class _Asgi2:
    """The ASGI of before 2019, in two calls, as one."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        await self._app(scope)(receive, send)


def counted(app):
    """The application, with its requests counted. Which kind it is says its signature: (environ, start_response) is WSGI's."""
    from inspect import Parameter, isclass, iscoroutinefunction, signature

    if isinstance(app, (WsgiCounter, AsgiCounter)):
        return app
    if not callable(app):
        raise TypeError("Expected `app` to be an application of WSGI or ASGI, got `%r`" % (app,))
    if not isclass(app) and (iscoroutinefunction(app) or iscoroutinefunction(getattr(app, "__call__", None))):
        return AsgiCounter(app)
    try:
        parameters = signature(app).parameters.values()
    except (TypeError, ValueError):
        return WsgiCounter(app)
    positional = [each for each in parameters if each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    needed = sum(each.default is Parameter.empty for each in positional)
    if needed == 3:
        return AsgiCounter(app)
    if needed == 1 and len(positional) == 1 and not any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):
        return AsgiCounter(_Asgi2(app))
    return WsgiCounter(app)


# -- servers, by the module that is loaded


def _replace(owner, name):
    """Puts what the decorated function makes of the method in its place."""

    def put(make):
        original = owner.__dict__.get(name)
        if original is not None and not hasattr(original, "_warmfork"):
            method = wraps(original)(make(original))
            method._warmfork = True
            setattr(owner, name, method)

    return put


def _http_server(module):
    handler = module.BaseHTTPRequestHandler

    @_replace(handler, "parse_request")
    def _(original):
        def parse_request(self):
            if not original(self):
                return False
            # Else by who has a `handle_one_request` of its own, and knows better.
            if "_warmfork_request" in self.__dict__ and self._warmfork_request is None:
                try:
                    self._warmfork_request = begin(agent, self.command, self.path, self.connection)
                except Dropped:
                    self.close_connection = True
                    return False
            return True

        return parse_request

    @_replace(handler, "handle_one_request")
    def _(original):
        def handle_one_request(self):
            self._warmfork_request = None
            is_answered = False
            try:
                original(self)
                is_answered = True
            finally:
                request = self.__dict__.pop("_warmfork_request", None)
                if request is not None:
                    request.end(is_answered)

        return handle_one_request

    @_replace(handler, "send_header")
    def _(original):
        def send_header(self, keyword, value):
            if keyword.lower() == "content-type":
                note_headers(((keyword, value),))
            original(self, keyword, value)

        return send_header


def _counting(owner, name, about, result=None):
    """The whole method is one request. `about` gives method, path and socket of its arguments, `result` what it gives where it is dropped."""

    @_replace(owner, name)
    def _(original):
        def method(self, *args, **more):
            try:
                request = begin(agent, *about(self, *args, **more))
            except Dropped:
                return None if result is None else result(self)
            if request is None:
                return original(self, *args, **more)
            try:
                return original(self, *args, **more)
            finally:
                request.end()

        return method


def _noting(owner, name, headers):
    @_replace(owner, name)
    def _(original):
        def method(self, *args, **more):
            note_headers(headers(self) or ())
            return original(self, *args, **more)

        return method


def _wsgiref(module):
    def about(self, *_):
        environ = getattr(self, "base_env", None) or {}
        return environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"), _socket_of(getattr(self, "stdin", None))

    _counting(module.BaseHandler, "run", about)
    _noting(module.BaseHandler, "send_headers", lambda self: self.headers.items())


def _socket_of(file):
    return getattr(getattr(file, "raw", None), "_sock", None)


def _werkzeug(module):
    _counting(module.WSGIRequestHandler, "run_wsgi", lambda self: (self.command, self.path, self.connection), _close)


def _close(handler):
    handler.close_connection = True


def _gunicorn_sync(module):
    _counting(module.SyncWorker, "handle_request", lambda _, listener, req, client, *__: (req.method, req.path, client))


def _gunicorn_threads(module):
    _counting(module.ThreadWorker, "handle_request", lambda _, req, conn: (req.method, req.path, conn.sock), lambda _: False)


def _gunicorn_async(module):
    def stop(_):
        raise StopIteration

    _counting(module.AsyncWorker, "handle_request", lambda _, name, req, sock, *__: (req.method, req.path, sock), stop)


def _gunicorn_wsgi(module):
    _noting(module.Response, "send_headers", lambda self: self.headers)


def _waitress(module):
    def about(self):
        request = self.request
        return getattr(request, "command", None), getattr(request, "path", None), getattr(self.channel, "socket", None)

    def close(self):
        self.close_on_finish = True

    _counting(module.Task, "service", about, close)
    _noting(module.Task, "build_response_header", lambda self: self.response_headers)


def _uvicorn(module):
    @_replace(module.Config, "load")
    def _(original):
        def load(self):
            original(self)
            self.loaded_app = AsgiCounter(self.loaded_app)

        return load


SERVERS = {
    "http.server": _http_server,
    "wsgiref.handlers": _wsgiref,
    "werkzeug.serving": _werkzeug,
    "gunicorn.workers.sync": _gunicorn_sync,
    "gunicorn.workers.gthread": _gunicorn_threads,
    "gunicorn.workers.base_async": _gunicorn_async,
    "gunicorn.http.wsgi": _gunicorn_wsgi,
    "waitress.task": _waitress,
    "uvicorn.config": _uvicorn,
}


def change(name):
    """The module is loaded. One that is not as expected is left as it is."""
    module = sys.modules.get(name)
    try:
        SERVERS[name](module)
    except AttributeError:
        pass


class _Loader:
    """Stands in for a module's loader until that is asked to load, and changes the module then."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        change(module.__name__)


def find(name, path, target, finders):
    """The specification of a module of which it is known that it is to be changed."""
    for finder in finders:
        find_spec = getattr(finder, "find_spec", None)
        spec = None if find_spec is None else find_spec(name, path, target)
        if spec is not None:
            if hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader)
            return spec
    return None
