"""
The Python of scripts that tests run: a script of the repository, or torchrun, runs in a process forked from one that has
imported torch (see processes.py), and this one passes its signals on and ends as it does. Anything else is run as usual.

    python -I python.py FORK_SERVER [ARGUMENTS OF PYTHON]
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

address, *args = sys.argv[1:]
script = [arg for arg in args if arg != '-u']  # what is forked flushes each line
ours = script[0].endswith('.py') and os.path.dirname(os.path.abspath(script[0])) == ROOT
if not ours and script[:2] != ['-m', 'torch.distributed.run']:
    os.execv(sys.executable, [sys.executable, *args])

server = socket.socket(socket.AF_UNIX)
server.connect(address)
socket.send_fds(server, [b'.'], [0, 1, 2])
server.sendall(json.dumps([script, dict(os.environ), os.getcwd(), os.getpid()]).encode() + b'\n')
answers = server.makefile()
pid = int(answers.readline())


def forward(number, frame):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
    signal.signal(number, forward)
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
