"""What a partner is asked to do in tests."""

import os
import subprocess
import sys
import time

from charter.errors import TrainingStopped


def adds(a, b, tell, stopped):
    tell("adding")
    return a + b


def drifts(tell, stopped):
    raise TrainingStopped("too many refusals; the last good checkpoint stays in force")


def breaks(tell, stopped):
    raise ZeroDivisionError("nothing by nothing")


def waits(tell, stopped):
    tell("waiting")
    while not stopped.is_set():
        time.sleep(0.01)
    tell("stopped")
    return "done"


def dies(tell, stopped):
    os._exit(3)


def goes_on(tell, stopped):
    """As a step of torch does: told to stop, it has a child and work for much longer."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell(child.pid)
    child.wait()
