"""`make parity`: the largest differences between TRL 1.12.0's PPO and ours, on the same frozen rollouts.

`python bench/parity/compare.py --trl PYTHON` prints, for several settings, the largest relative difference in
loss, first gradient and parameters after one and after four epochs, and fails above 1e-5. Differences are
relative to the largest element of the same tensor. Where conventions differ, TRL's are selected: the score
one place after the last token, no clipping of scores and gradients, one rate for both models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from frozen import Shape, read, write

from charter.trainer.config import PPOConfig
from charter.trainer.forward import ValueModel
from charter.trainer.rollout import Rollout
from charter.trainer.update import Updater

LIMIT = 1e-5
RATE = 1e-3

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature 0.7": {"temperature": 0.7},
    "k3, beta 0.2": {"kl_estimator": "k3", "kl_coef": 0.2},
    "whitened rewards": {"whiten_rewards": True},
    "4 mini-batches": {"num_mini_batches": 4},
    "lambda 1, value clip 0.05": {"lam": 1.0, "cliprange_value": 0.05},
}


def run_trl(python: Path, folder: Path, options: dict[str, Any], out: Path) -> dict[str, Any]:
    """TRL's side, in its environment."""
    script = Path(__file__).parent / "trl_side.py"
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.get("threads", 1))}
    done = subprocess.run(
        [python, script, folder, json.dumps(options), out],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"TRL's side failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


class Recorder(Updater):
    """Our updater, listened to as TRL's trainer is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self._sum = 0.0

    def _backward(self, loss: Tensor) -> None:
        self._sum += float(loss.detach())
        super()._backward(loss)

    def _clipped_norm(self, optimizer: Any, which: str) -> float:
        prefix, model = ("policy", self.policy) if which == "policy" else ("value", self.value_model)
        for name, p in model.named_parameters():
            if p.grad is not None:
                self.gradients.setdefault(f"{prefix}.{as_trl(name)}", p.grad.detach().clone())
        if which != "policy":
            self.losses.append(self._sum)
            self._sum = 0.0
        return super()._clipped_norm(optimizer, which)


def as_trl(name: str) -> str:
    """A value model's parameter by the name that it has in the reward model."""
    return name.replace("backbone.", "model.").replace("head.", "score.")


def our_config(options: dict[str, Any]) -> PPOConfig:
    """The same settings in our words, and TRL's conventions."""
    return PPOConfig(
        learning_rate=RATE,
        epochs=options["num_ppo_epochs"],
        mini_batches=options.get("num_mini_batches", 1),
        lam=options.get("lam", 0.95),
        value_clip=options.get("cliprange_value", 0.2),
        beta=options.get("kl_coef", 0.05),
        kl_estimator=options.get("kl_estimator", "k1"),
        whiten_rewards=options.get("whiten_rewards", False),
        max_grad_norm=None,
        score_clip=None,
        missing_stop_penalty=1.0,
        score_slot="after_last_token",
        micro_batch_tokens=256,
    )


def frozen_rollouts(folder: Path, policy: Any, temperature: float) -> list[Rollout]:
    """The frozen rollouts, with the policy's own log-probs as those of the policy that behaved."""
    made = []
    for i, r in enumerate(read(folder)):
        prompt, answer = tuple(r["prompt"]), tuple(r["answer"])  # type: ignore[arg-type]
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        made.append(
            Rollout(
                f"r{i}",
                prompt,
                answer,
                tuple(logp.tolist()),
                float(r["score"]),  # type: ignore[arg-type]
                bool(r["stopped"]),
                temperature,
            )
        )
    return made


def load(folder: Path) -> tuple[Any, ValueModel, Any]:
    """Policy, value model and reference, fresh from the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(folder / "value", num_labels=1)
    return policy, ValueModel.from_reward_model(value.float()), reference


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest element-wise difference, relative to the largest element of its tensor."""
    missing = theirs.keys() - ours.keys() - {"policy.lm_head.weight"}  # tied to the embeddings
    assert not missing, missing
    return max(
        float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-12))
        for k in theirs
        if k in ours
    )


def compare(python: Path, folder: Path, setting: dict[str, Any], epochs: int) -> tuple[float, ...]:
    """Relative differences in losses, first gradient and parameters; and how far the parameters moved."""
    from safetensors.torch import load_file

    out = folder / "trl.json"
    options = {
        "temperature": 1.0,
        "learning_rate": RATE,
        "num_ppo_epochs": epochs,
        "missing_eos_penalty": 1.0,
        **setting,
    }
    theirs = run_trl(python, folder, options, out)
    policy, value, reference = load(folder)
    rollouts = frozen_rollouts(folder, policy, options["temperature"])
    start = {f"policy.{k}": v.clone() for k, v in policy.state_dict().items()}
    ours = Recorder(policy, value, reference, our_config(options))
    ours.update(rollouts, theirs["orders"])
    parameters = {f"policy.{k}": v for k, v in ours.policy.state_dict().items()}
    parameters |= {f"value.{as_trl(k)}": v for k, v in ours.value_model.state_dict().items()}
    scale = max(abs(x) for x in theirs["losses"])
    losses = max(abs(a - b) for a, b in zip(ours.losses, theirs["losses"], strict=True)) / scale
    return (
        losses,
        relative(ours.gradients, load_file(out.with_suffix(".gradients.safetensors"))),
        relative(parameters, load_file(out.with_suffix(".parameters.safetensors"))),
        relative(parameters, start),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when a difference is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, required=True, help="python of the environment with trl 1.12.0")
    parser.add_argument("--only", choices=list(SETTINGS), help="one setting instead of all")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    worst = 0.0
    print(f"{'setting':28}{'epochs':>7}{'loss':>11}{'gradient':>11}{'parameters':>12}{'moved by':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, replace(Shape(), rollouts=32))
        for title, setting in SETTINGS.items():
            if chosen.only in (None, title):
                for epochs in (1, 4):
                    found = compare(chosen.trl.absolute(), folder, setting, epochs)
                    worst = max(worst, *found[:3])
                    numbers = f"{found[0]:11.1e}{found[1]:11.1e}{found[2]:12.1e}{found[3]:10.1e}"
                    print(f"{title:28}{epochs:7}{numbers}", flush=True)
    print(f"largest relative difference {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
