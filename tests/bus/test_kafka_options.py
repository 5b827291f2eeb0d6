"""How a Kafka bus is configured, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from charter.bus import open_bus
from charter.bus._kafka_client import KafkaOptions, translate
from charter.errors import BackendUnavailable, BusError, ConfigError, Fenced
from kafka import errors as kafka_errors


def test_a_uri_becomes_settings_that_lose_nothing() -> None:
    options = KafkaOptions.from_uri("kafka://one:9092,two:9092?compression=gzip&replication=3&timeout=5")
    assert options.bootstrap == ("one:9092", "two:9092")
    consumer, producer = options.consumer(), options.producer("id")
    assert consumer["enable_auto_commit"] is False
    assert consumer["isolation_level"] == "read_committed"
    assert consumer["auto_offset_reset"] == "earliest"
    assert consumer["allow_auto_create_topics"] is producer["allow_auto_create_topics"] is False
    assert producer["compression_type"] == "gzip"
    assert producer["max_request_size"] > 16 * 1024 * 1024


def test_tls_and_scram_come_from_the_uri_and_the_password_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hush\n")
    uri = (
        f"kafka://b:9093?tls=true&ca=/ca.pem&sasl=SCRAM-SHA-512&user=judge&password_file={tmp_path}/password"
    )
    settings = KafkaOptions.from_uri(uri).common()
    assert settings["security_protocol"] == "SASL_SSL"
    assert settings["ssl_cafile"] == "/ca.pem"
    assert settings["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (settings["sasl_plain_username"], settings["sasl_plain_password"]) == ("judge", "hush")


def test_mutual_tls_needs_no_user() -> None:
    settings = KafkaOptions.from_uri("kafka://b:9093?tls=true&cert=/c.pem&key=/k.pem").common()
    assert (settings["security_protocol"], settings["ssl_certfile"]) == ("SSL", "/c.pem")


def test_the_password_never_shows_in_the_options_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARTER_KAFKA_PASSWORD", "hush")
    options = KafkaOptions.from_uri("kafka://b:9092?sasl=PLAIN&user=u")
    assert options.password == "hush"
    assert "hush" not in repr(options)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("kafka://", "kafka://localhost:9092"),
        ("kafka://user:secret@b:9092", "CHARTER_KAFKA_PASSWORD"),
        ("kafka://b:9092?compresion=lz4", "unknown option 'compresion'"),
        ("kafka://b:9092?compression=zip", "none, gzip, lz4"),
        ("kafka://b:9092?replication=three", "option 'replication' cannot be 'three'"),
        ("kafka://b:9092?tls=yes", "option 'tls' cannot be 'yes'"),
        ("kafka://b:9092?ca=/ca.pem", "add tls=true"),
        ("kafka://b:9092?tls=true&cert=/c.pem", "both cert and key"),
        ("kafka://b:9092?sasl=SCRAM-SHA-512", "user and a password"),
        ("kafka://b:9092?sasl=GSSAPI&user=u", "SCRAM-SHA-256, SCRAM-SHA-512, PLAIN"),
        ("kafka://b:9092?password_file=/no/such", "/no/such"),
        ("redis://b", "unknown kind 'redis'"),
        ("sqlite:", "name a file"),
        ("sqlite:x.db?synchronous=off", "full or normal"),
        ("sqlite:x.db?lock_timeout=long", "number of seconds"),
        ("sqlite:x.db?fast=yes", "unknown option 'fast'"),
    ],
)
def test_a_wrong_uri_says_what_to_write(uri: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHARTER_KAFKA_PASSWORD", raising=False)
    with pytest.raises(ConfigError) as caught:
        open_bus(uri)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (kafka_errors.KafkaTimeoutError("x"), BackendUnavailable),
        (kafka_errors.NotEnoughReplicasError(), BackendUnavailable),
        (kafka_errors.TopicAuthorizationFailedError({"t"}), BackendUnavailable),
        (kafka_errors.SaslAuthenticationFailedError("x"), ConfigError),
        (kafka_errors.MessageSizeTooLargeError("x"), BusError),
        (kafka_errors.ProducerFencedError(), Fenced),
        (kafka_errors.CommitFailedError("x"), Fenced),
        (kafka_errors.KafkaError("wrapped", kafka_errors.ProducerFencedError()), Fenced),
    ],
)
def test_an_error_of_the_cluster_becomes_one_that_says_what_to_do(error: Exception, kind: type) -> None:
    translation = translate(error, "b:9092", "testing")
    assert type(translation) is kind
    assert "b:9092" in str(translation)
