"""Run a script in two processes that train together, as torchrun does, with the imports done once.

`python script_two.py SCRIPT FOLDER`: the exit code is that of the first process that fails, which ends the other one.
"""

import os
import runpy
import signal
import socket
import sys
import traceback

import helpers_train  # noqa: F401  with all that is heavy


def start(rank, port):
    """Fork a process that runs the script; its id."""
    if child := os.fork():
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main():
    sys.argv = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {start(rank, port) for rank in (0, 1)}
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(os.waitstatus_to_exitcode(status) or 1)


if __name__ == "__main__":
    main()
