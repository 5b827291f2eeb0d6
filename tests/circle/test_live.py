"""What a person sees of the learning: a board in a terminal, lines anywhere else."""

import io

from rich.console import Console

from charter.circle.live import shown
from charter.circle.news import Kind, News, Phase

STEP = {
    "step": 10, "score_mean": 0.5, "kl_per_answer": 0.25, "staleness_mean": 1.5, "entropy": 0.4,
    "answer_length_mean": 30.0,
}  # fmt: skip
GATE = {
    "checkpoint": "rl-000010-abc", "step": 10, "status": "rejected", "reason": "more evasive",
    "measurements": {
        "harm": {"candidate": 0.02}, "unhelpful": {"candidate": 0.1}, "evasive": {"candidate": 0.3},
    },
}  # fmt: skip
ALL = [
    News(Kind.PHASE, {"phase": Phase.REINFORCING}),
    News(Kind.PROGRESS, {"what": "pairs", "done": 3, "total": 10, "remark": ""}),
    News(Kind.STEP, STEP),
    News(Kind.REWARD, {"reward": "in_force", "model": "reward-1", "accuracy": 0.9, "labels": 768}),
    News(Kind.GATE, GATE),
    News(Kind.QUEUES, {"rollouts": {"waiting": 4, "rate": 2.5}}),
    News(Kind.PROBLEM, {"message": "the reward model is away"}),
]


def _seen(terminal):
    out = io.StringIO()
    with shown(Console(file=out, force_terminal=terminal, width=160, color_system=None)) as tell:
        for news in ALL:
            tell(news)
    return out.getvalue()


def test_a_terminal_shows_phase_rates_reward_divergence_staleness_and_queues():
    seen = _seen(terminal=True)
    for part in ("reinforcing", "3/10", "KL 0.25", "staleness 1.5", "reward-1", "harmful 2.0%",
                 "helpful 90.0%", "over-refusal 30.0%", "rollouts 4 (2.5/s)", "model is away"):  # fmt: skip
        assert part in seen


def test_a_log_gets_a_plain_line_for_each_thing_that_matters():
    lines = _seen(terminal=False).splitlines()
    assert lines[0] == "learning: reinforcing"
    assert "\x1b" not in "".join(lines)
    assert any(line.startswith("learning: step 10") for line in lines)
    assert any(line.startswith("gate: rl-000010-abc rejected: harmful 2.0%") for line in lines)
    assert lines[-1] == "learning: the reward model is away"
