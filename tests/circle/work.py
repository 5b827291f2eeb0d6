"""What a partner is asked to do in tests."""

import os
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
