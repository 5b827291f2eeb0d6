"""A broker that asks for credentials and rights: TLS, SCRAM, mutual TLS, and what it says without them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType
from tests.kafka.support import CACHE, ON_A_BROKER, QUICK, nothing_yet, patiently, require_tools

from charter.bus import Outgoing, TopicSpec, open_bus
from charter.bus.broker import Broker, BrokerOptions, fetch_kafka, free_port
from charter.errors import BackendUnavailable, CharterError
from kafka import KafkaAdminClient

pytestmark = ON_A_BROKER


@dataclass(frozen=True)
class Secured:
    """A broker that asks who one is."""

    folder: Path
    plain: str
    """Address of a listener whose users may do everything."""
    scram: int
    mutual: int


def certificates(folder: Path) -> None:
    """An authority, and certificates that it signed for the broker and for a client."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=authority",
            "-keyout", "ca.key", "-out", "ca.pem")  # fmt: skip
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("broker", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    (folder / "broker-all.pem").write_text(
        (folder / "broker.key").read_text() + (folder / "broker.pem").read_text()
    )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """With a SCRAM listener and one for mutual TLS."""
    require_tools()
    folder = tmp_path_factory.mktemp("secured")
    certificates(folder)
    scram, mutual = free_port(), free_port()
    broker = Broker(folder / "data", fetch_kafka(CACHE))
    plain = f"PLAINTEXT://127.0.0.1:{broker.port},INTERNAL://127.0.0.1:{broker.internal_port}"
    more = f"SCRAM://127.0.0.1:{scram},MUTUAL://127.0.0.1:{mutual}"
    module = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    broker.options = BrokerOptions(
        scram={"judge": "right", "newcomer": "right"},
        properties={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:judge;User:CN=client",
            "listeners": f"{plain},{more},CONTROLLER://127.0.0.1:{broker.controller_port}",
            "advertised.listeners": f"{plain},{more}",
            "listener.security.protocol.map": (
                "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,INTERNAL:PLAINTEXT,SCRAM:SASL_SSL,MUTUAL:SSL"
            ),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "broker-all.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(folder / "ca.pem"),
            "listener.name.mutual.ssl.client.auth": "required",
            "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.scram.scram-sha-512.sasl.jaas.config": module,
        },
    )
    try:
        broker.start()
        yield Secured(folder, broker.address, scram, mutual)
    finally:
        broker.kill()


def round_trip(uri: str) -> None:
    with open_bus(uri) as bus:
        bus.apply_topics([TopicSpec("secured", 1)])
        (position,) = bus.publish([Outgoing("secured", b"k", b"v")])
        assert [r.value for r in bus.fetch("secured", 0, position.offset, timeout=10)] == [b"v"]


def test_scram_over_tls(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scram = secured.folder, secured.scram
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", "right")
    round_trip(f"kafka://127.0.0.1:{scram}?tls=true&ca={folder}/ca.pem&sasl=SCRAM-SHA-512&user=judge&{QUICK}")


def test_a_wrong_password_is_said(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scram = secured.folder, secured.scram
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", "wrong")
    uri = f"kafka://127.0.0.1:{scram}?tls=true&ca={folder}/ca.pem&sasl=SCRAM-SHA-512&user=judge&{QUICK}"
    with open_bus(uri) as bus, pytest.raises(CharterError) as caught:
        bus.topics()
    assert "as user 'judge'" in str(caught.value)
    assert "is the password right?" in str(caught.value)


def test_mutual_tls(secured: Secured) -> None:
    folder, mutual = secured.folder, secured.mutual
    round_trip(
        f"kafka://127.0.0.1:{mutual}?tls=true&ca={folder}/ca.pem&cert={folder}/client.pem"
        f"&key={folder}/client.key&{QUICK}"
    )


RIGHTS = {
    ResourceType.TOPIC: (
        ACLOperation.READ,
        ACLOperation.WRITE,
        ACLOperation.DESCRIBE,
        ACLOperation.DESCRIBE_CONFIGS,
    ),
    ResourceType.GROUP: (ACLOperation.READ, ACLOperation.DESCRIBE),
    ResourceType.TRANSACTIONAL_ID: (ACLOperation.WRITE, ACLOperation.DESCRIBE),
}
"""What docs/kafka.md says that a worker's user needs."""


def grant(bootstrap: str, user: str) -> None:
    """As a super user."""
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        answer = admin.create_acls(
            [
                ACL(f"User:{user}", "*", operation, ACLPermissionType.ALLOW, ResourcePattern(kind, "*"))
                for kind, operations in RIGHTS.items()
                for operation in operations
            ]
        )
        assert not answer["failed"]
    finally:
        admin.close()


def test_a_missing_right_is_said_and_work_goes_on_once_it_is_granted(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", "right")
    with open_bus(f"kafka://{secured.plain}?{QUICK}") as owner:
        owner.apply_topics([TopicSpec("in", 1), TopicSpec("out", 1)])
    uri = f"kafka://127.0.0.1:{secured.scram}?tls=true&ca={secured.folder}/ca.pem&sasl=SCRAM-SHA-512"
    with open_bus(f"{uri}&user=newcomer&{QUICK}") as bus:
        with pytest.raises(BackendUnavailable, match=r"as user 'newcomer'.* lacks a right .* grant it"):
            bus.publish([Outgoing("in", b"k", b"v")])
        with pytest.raises(BackendUnavailable, match="lacks a right"):
            bus.consumer("workers", ["in"], member="w-0")
        grant(secured.plain, "newcomer")
        patiently(lambda: bus.publish([Outgoing("in", b"k", b"v")]))
        with patiently(lambda: bus.consumer("workers", ["in"], member="w-0")) as consumer:
            records = patiently(lambda: consumer.poll(10, 1.0) or nothing_yet())
            consumer.commit(records, publish=[Outgoing("out", b"k", b"done")])
        assert [r.value for r in bus.fetch("out", 0, 0, timeout=10)] == [b"done"]
        assert [lag.records for lag in bus.lag("workers", ["in"])] == [0]
