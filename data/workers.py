"""
Batches of texts through workers and back, in order; what Ctrl-C and a killed process do to them.
"""
import collections
import concurrent.futures
import contextlib
import multiprocessing
import queue
import signal
import threading
from multiprocessing import resource_tracker

from data.errors import UserError

PENDING_CHARS = 64_000_000  # batches waiting for the workers or for the writer: bounds the memory


@contextlib.contextmanager
def workers(num_proc, work, processes):
    """
    Yields submit(texts) -> future of work(texts). The workers are threads, because tiktoken runs without Python's lock
    and nothing has to be copied; where the work is Python's own, each thread passes it to a process. Spawned, since a
    fork would copy the reader's locks and connections; over pipes, since a pool's queues can hang when it is killed.
    """
    context, children, pipes = multiprocessing.get_context('spawn'), [], queue.SimpleQueue()

    def call(texts):
        pipe = pipes.get()
        try:
            pipe.send(texts)
            result = pipe.recv()
        except (EOFError, OSError):
            raise OSError('a worker process ended, perhaps because memory ran out') from None
        finally:
            pipes.put(pipe)
        if isinstance(result, UserError):
            raise result
        return result

    pool = concurrent.futures.ThreadPoolExecutor(num_proc)
    try:
        with no_sigint() if processes else contextlib.nullcontext():
            for _ in range(num_proc if processes else 0):
                ours, theirs = context.Pipe()
                children.append(context.Process(target=serve, args=(theirs, work), daemon=True))
                children[-1].start()
                theirs.close()
                pipes.put(ours)
        yield lambda texts: pool.submit(call if processes else work, texts)
    finally:
        for child in children:
            child.kill()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def no_sigint():
    """Processes started in here never get Ctrl-C, which a terminal sends to all: this process handles it for them."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks the signal
    missed, in_main = [], threading.current_thread() is threading.main_thread()
    if in_main:  # another thread may receive it meanwhile, and an interrupt during start-up would print a traceback
        handler = signal.signal(signal.SIGINT, lambda *_: missed.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if missed:
            signal.raise_signal(signal.SIGINT)


def serve(pipe, work):
    """A worker process: work(texts) for each texts from the pipe, until the other end is closed, as by a kill."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            texts = pipe.recv()
            try:
                result = work(texts)
            except UserError as error:
                result = error
            pipe.send(result)


def in_order(submit, batches, num_proc):
    """(work(texts), state) for each (texts, state) of batches, in their order, while all workers are busy."""
    pending = collections.deque()
    for texts, state in batches:
        chars = sum(len(text) for text in texts if text)
        pending.append((submit(texts), state, chars))
        while len(pending) > 3 * num_proc or sum(item[2] for item in pending) > PENDING_CHARS:
            future, state, _ = pending.popleft()
            yield future.result(), state
    for future, state, _ in pending:
        yield future.result(), state


@contextlib.contextmanager
def interruptible():
    """
    Ctrl-C raises KeyboardInterrupt, and so does check_interrupt(), which this yields, from then on: callbacks of
    libraries may swallow the first one. A second Ctrl-C ends the process at once.
    """
    pressed = threading.Event()

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        pressed.set()
        raise KeyboardInterrupt

    def check_interrupt():
        if pressed.is_set():
            raise KeyboardInterrupt

    usual = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is usual
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield check_interrupt
    finally:
        check_interrupt()  # whatever error a library made of it
        if ours:
            signal.signal(signal.SIGINT, usual)
