"""A real Kafka broker on loopback, for tests, `make chaos` and `make run BUS=kafka`.

Needs Java 17 or newer, and Maven once to fetch Kafka (43 MB, kept in `.cache/kafka`). One process is one
KRaft node, broker and controller in one; three of them make a cluster. It keeps its data in a folder, so a
killed broker goes on where it was. However its owner ends, the broker ends with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from charter.errors import BackendUnavailable, ConfigError

KAFKA_VERSION = "4.1.0"
_CLUSTER_ID = "Y2hhcnRlci1sb2NhbC0wMA"  # any fixed 16 bytes in base64

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>charter</groupId><artifactId>broker</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version></dependency>
  </dependencies>
</project>
"""


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """How a local broker runs."""

    heap_mb: int = 384
    start_timeout_s: float = 90.0
    properties: dict[str, str] = field(default_factory=dict)
    """Further lines of server.properties, or other values of those that are there."""
    scram: dict[str, str] = field(default_factory=dict)
    """Users and their passwords for SCRAM-SHA-512, made when the data folder is."""


def missing_tools() -> str | None:
    """What keeps a broker from running here, in one sentence; None when nothing does."""
    for tool, use in (("java", "runs Kafka"), ("mvn", "fetches Kafka")):
        if shutil.which(tool) is None:
            return (
                f"{tool!r} is not installed, which {use}; on Debian: apt install default-jre-headless maven"
            )
    return None


def fetch_kafka(cache: Path) -> Path:
    """The folder with Kafka's jars; Maven fetches them the first time. Raises `ConfigError`."""
    jars = cache / f"kafka-{KAFKA_VERSION}"
    if jars.is_dir():
        return jars
    problem = missing_tools()
    if problem is not None:
        raise ConfigError(f"A local Kafka broker cannot run: {problem}")
    work = cache / f"fetching-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    (work / "pom.xml").write_text(_POM, encoding="utf-8")
    command = ["mvn", "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={work / 'jars'}"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(work, ignore_errors=True)
        tail = " ".join((done.stdout + done.stderr).split())[-400:]
        raise ConfigError(f"Maven could not fetch Kafka {KAFKA_VERSION}: {tail}")
    try:
        (work / "jars").rename(jars)
    except OSError:
        if not jars.is_dir():  # another process was faster, and its copy is as good
            raise
    shutil.rmtree(work, ignore_errors=True)
    return jars


class Broker:
    """One KRaft node. `start` may be repeated after `stop` or `kill`; ports and data stay."""

    def __init__(
        self,
        folder: Path,
        jars: Path,
        *,
        node: int = 1,
        voters: Sequence[tuple[int, int]] = (),
        port: int = 0,
        controller_port: int = 0,
        advertised_port: int = 0,
        options: BrokerOptions | None = None,
    ) -> None:
        """`voters` lists (node, controller port) of a whole cluster; empty for a cluster of one.

        `advertised_port` is what clients are told, where a proxy stands before the broker.
        """
        self.folder = folder
        self.node = node
        self.port = port or free_port()
        self.controller_port = controller_port or free_port()
        self.internal_port = free_port()
        self.options = options or BrokerOptions()
        self._jars = jars
        self._voters = tuple(voters) or ((node, self.controller_port),)
        self._advertised_port = advertised_port or self.port
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What to connect to (the proxy, where there is one)."""
        return f"127.0.0.1:{self._advertised_port}"

    @property
    def log_file(self) -> Path:
        """What the broker writes to standard error."""
        return self.folder / "broker.log"

    def launch(self) -> None:
        """Starts the process; `wait` until it serves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "server.properties"
        configuration.write_text(self._properties(), encoding="utf-8")
        if not (self.folder / "data" / "meta.properties").exists():
            command = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(configuration)]
            for user, password in self.options.scram.items():
                command += ["--add-scram", f"SCRAM-SHA-512=[name={user},password={password}]"]
            done = subprocess.run([*self._java(), *command], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise ConfigError(f"{self.folder}: cannot be formatted for Kafka: {done.stderr[-400:]}")
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._java(), "kafka.Kafka", str(configuration)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for Charter, which then stops its broker in order
            )
        self._guard = ends_with_us(self._process.pid)

    def wait(self) -> None:
        """Returns when the broker serves. Raises `BackendUnavailable` when it does not in time, or ends."""
        deadline = time.monotonic() + self.options.start_timeout_s
        while not self._serves():
            if self._process is None or self._process.poll() is not None:
                raise BackendUnavailable(f"the Kafka broker ended at once; see {self.log_file}")
            if time.monotonic() > deadline:
                waited = f"{self.options.start_timeout_s:g} s"
                raise BackendUnavailable(f"the Kafka broker did not start in {waited}; see {self.log_file}")
            time.sleep(0.1)

    def start(self) -> None:
        """Starts the process and returns when the broker serves."""
        self.launch()
        self.wait()

    def _serves(self) -> bool:
        """Whether the broker answers a metadata request, which it does only when it may take part."""
        from kafka.admin import KafkaAdminClient
        from kafka.errors import KafkaError

        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.2):
                pass
            admin = KafkaAdminClient(
                bootstrap_servers=f"127.0.0.1:{self.port}", request_timeout_ms=3000, bootstrap_timeout_ms=2000
            )
        except (OSError, KafkaError):
            return False
        try:
            brokers = admin.describe_cluster()["brokers"]
            return any(broker["broker_id"] == self.node for broker in brokers)
        except (KafkaError, KeyError):
            return False
        finally:
            admin.close()

    def stop(self) -> None:
        """Ends the broker in order; safe to repeat."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the broker as a crash does; safe to repeat."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process without ending it: connections stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused process go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        if self._process is not None:
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def _java(self) -> list[str]:
        heap = f"{self.options.heap_mb}m"
        return [
            "java",
            f"-Xmx{heap}",
            f"-Xms{heap}",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp",
            f"{self._jars}/*",
        ]

    def _properties(self) -> str:
        alone = len(self._voters) == 1
        replicas, in_sync = ("1", "1") if alone else ("3", "2")
        largest = str(17 * 1024 * 1024)
        lines = {
            "process.roles": "broker,controller",
            "node.id": str(self.node),
            "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{port}" for n, port in self._voters),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INTERNAL",  # brokers talk past the proxies of clients
            "listeners": (
                f"PLAINTEXT://127.0.0.1:{self.port},INTERNAL://127.0.0.1:{self.internal_port},"
                f"CONTROLLER://127.0.0.1:{self.controller_port}"
            ),
            "advertised.listeners": f"PLAINTEXT://{self.address},INTERNAL://127.0.0.1:{self.internal_port}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,INTERNAL:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "auto.create.topics.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": "8",
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "8",
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "message.max.bytes": largest,
            "replica.fetch.max.bytes": largest,
            "log.cleaner.dedupe.buffer.size": str(4 * 1024 * 1024),
            **self.options.properties,
        }
        return "".join(f"{name}={value}\n" for name, value in lines.items())


def ends_with_us(pid: int) -> subprocess.Popen[bytes]:
    """A process that kills `pid` as soon as this process has ended, be it by SIGKILL.

    A broker that outlived its owner would hold its folder's lock, and no other could start there. A pipe
    tells: nobody writes to it, and its end is read when the last process that could write has gone. Kill what
    this returns once `pid` has ended otherwise.
    """
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; kill -KILL "$1"', "sh", str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextmanager
def local_broker(folder: Path, cache: Path, options: BrokerOptions | None = None) -> Iterator[Broker]:
    """A broker of its own for as long as the block runs."""
    broker = Broker(folder, fetch_kafka(cache), options=options)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
