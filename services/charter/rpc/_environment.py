"""Settings that gRPC's core reads from the environment when it is first imported."""

import os

# The core writes to standard error by itself, past the log. What matters reaches us as an exception.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
