"""The same worker as worker.mjs in Python, with psycopg2's pool. It does what stdin says: `jobs N`.

psycopg2's pool hands out connections that have ended, so the program throws such a one away and takes another. With warmfork's agent
the hooks below see that nothing is under way at the checkpoint, and drop the pool in a fork; without an agent they are never called.
"""
import json
import os
import sys
import threading
import time

import psycopg2
import psycopg2.pool

try:
    import warmfork
except ImportError:
    warmfork = None


pool = None
pool_lock = threading.Lock()
# Queries that were made again.
retries = 0


def current_pool():
    global pool
    with pool_lock:
        if pool is None:
            pool = psycopg2.pool.ThreadedConnectionPool(1, 4, os.environ["DATABASE_URL"], application_name="python")
        return pool


def query(text, values):
    global retries
    sender = os.getpid()
    for attempt in (1, 2, 3):
        source = current_pool()
        connection = source.getconn()
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(text, values)
                row = cursor.fetchone()
            source.putconn(connection)
            return row
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            # It has ended, as after a fork. What a fork sends on it no server sees, so it is made again. A query that was under way
            # at the checkpoint is another matter: the template gets its answer, and it must not be made twice.
            source.putconn(connection, close=True)
            if os.getpid() != sender:
                return None
            if attempt == 3:
                raise
            retries += 1


done = 0
lock = threading.Lock()


def job():
    global done
    with lock:
        done += 1
        n = done
    mark = "%d/%d" % (os.getpid(), n)
    row = query(
        "INSERT INTO jobs (worker, n, backend) VALUES (%s, %s, pg_backend_pid()) RETURNING worker, n, backend, %s",
        (os.getpid(), n, mark),
    )
    if row is None:
        return None
    worker, number, backend, echo = row
    if (echo, number) != (mark, n):
        raise AssertionError("job %d got the answer of another: %s" % (n, echo))
    return backend


busy = threading.Event()
at_work = threading.Lock()


def work():
    while True:
        busy.wait()
        with at_work:
            try:
                if busy.is_set():
                    job()
            except psycopg2.Error as error:
                print(error, file=sys.stderr, flush=True)
        time.sleep(0.02)


if "--busy" in sys.argv:
    busy.set()
    threading.Thread(target=work, daemon=True).start()


def rest():
    """A thread that works would go on in each fork, before the hook there is done: so it stops at a place where nothing is in hand."""
    busy.clear()
    with at_work:
        pass


def leave_connections():
    global pool
    pool = None


if warmfork:
    warmfork.before_checkpoint(rest)
    warmfork.after_checkpoint(busy.set)
    warmfork.on_fork(leave_connections)

print("ready", flush=True)

for line in sys.stdin:
    busy.clear()
    backends, errors = set(), []
    count = int(line.split()[1])
    for _ in range(count):
        try:
            backends.add(job())
        except Exception as error:
            errors.append(str(error))
    print(
        json.dumps(
            {
                "pid": os.getpid(),
                "done": count - len(errors),
                "backends": sorted(backends),
                "errors": errors,
                "retries": retries,
            }
        ),
        flush=True,
    )
