"""What is measured about the reward model."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from charter.reward.store import State
from charter.telemetry.metrics import SECONDS, Metrics


class RewardMetrics(Metrics):
    """Labels, rounds, and the quality of the model in force."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.labels = Gauge("charter_reward_labels", "Labels stored, by split.", ["split"], registry=registry)
        self.skipped = Counter(
            "charter_reward_labels_skipped_total",
            "Labels left out, by reason (too_long, repeated).",
            ["reason"],
            registry=registry,
        )
        self.rounds = Counter(
            "charter_reward_rounds_total",
            "Rounds of training, by outcome (in_force, kept_old, failed, stopped).",
            ["outcome"],
            registry=registry,
        )
        self.accuracy = Gauge(
            "charter_reward_heldout_accuracy",
            "Held-out accuracy of the model in force, weighted by the labels' confidence.",
            registry=registry,
        )
        self.calibration = Gauge(
            "charter_reward_calibration_error",
            "Expected calibration error of the model in force on held-out labels.",
            registry=registry,
        )
        self.drift = Gauge(
            "charter_reward_drift",
            "Distance (W1) of the newest held-out answers' scores from the reference's, in deviations.",
            registry=registry,
        )
        self.round = Gauge("charter_reward_round", "Number of the last round.", registry=registry)
        self.score = Histogram(
            "charter_reward_score",
            "Normalised scores that were given.",
            buckets=(-4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "charter_reward_score_seconds",
            "How long one request's scoring took.",
            buckets=SECONDS,
            registry=registry,
        )
        self.info = Gauge(
            "charter_model_info_reward",
            "1 for the reward model in force.",
            ["version", "digest"],
            registry=registry,
        )

    def observe(self, state: State) -> None:
        """Shows the state after a round."""
        self.round.set(state.round)
        if state.in_force:
            self.accuracy.set(state.accuracy)
            self.calibration.set(state.calibration_error)
            self.drift.set(state.drift)
