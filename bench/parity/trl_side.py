"""TRL 1.12.0's own `PPOTrainer.train()`, with generation and reward replaced by the frozen rollouts.

Runs in TRL's environment: `python trl_side.py FOLDER OPTIONS.json OUT`. Nothing of TRL's update is copied or
changed: `batch_generation` returns the frozen answers with the policy's own logits, `get_reward` the frozen
scores for the reward model, and the optimizer, `backward` and the permutations are listened to.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset
from frozen import EOS, PAD, read
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Word t<i> is token i."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{EOS}", padding_side="left"
    )


class Scores(torch.nn.Module):
    """Stands where the reward model stands; `get_reward` below knows it."""

    base_model_prefix = "model"


def main(folder: Path, options: dict[str, Any], out: Path) -> None:
    """One run of TRL's trainer; writes what was heard."""
    torch.set_num_threads(options.pop("threads", 1))
    quiet = options.pop("no_garbage_collection", False)
    rollouts = read(folder)
    by_prompt = {tuple(r["prompt"]): r for r in rollouts}
    assert len(by_prompt) == len(rollouts)
    width = max(len(r["answer"]) for r in rollouts)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(
        folder / "value", num_labels=1, dtype=torch.float32
    )
    reward = Scores()
    micro = options.pop("micro_batch", len(rollouts))
    config = PPOConfig(
        output_dir=str(out.parent / "trl-output"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(rollouts) // micro,
        total_episodes=options.pop("updates", 1) * len(rollouts),
        local_rollout_forward_batch_size=len(rollouts),
        num_sample_generations=0,
        response_length=width,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        weight_decay=0.0,
        **options,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer(policy.config.vocab_size),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        train_dataset=Dataset.from_list([{"input_ids": r["prompt"]} for r in rollouts]),
        value_model=value,
    )
    heard = Heard(trainer)
    temperature = config.temperature + 1e-7

    def frozen_generation(
        model: Any, queries: torch.Tensor, _batch: int, pad: int, _config: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [by_prompt[tuple(t for t in q.tolist() if t != pad)] for q in queries]
        heard.rows = [rollouts.index(r) for r in rows]
        answers = torch.tensor([r["answer"] + [pad] * (width - len(r["answer"])) for r in rows])
        whole = torch.cat((queries, answers), 1)
        logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / temperature

    real_reward = ppo_trainer.get_reward

    def frozen_reward(model: Any, whole: torch.Tensor, pad: int, context: int) -> Any:
        if model is not reward:
            return real_reward(model, whole, pad, context)
        return None, torch.tensor([rollouts[i]["score"] for i in heard.rows]), None

    ppo_trainer.batch_generation = frozen_generation
    ppo_trainer.get_reward = frozen_reward
    if quiet:  # the bench measures arithmetic; half of TRL's wall time would be collecting garbage
        ppo_trainer.gc = types.SimpleNamespace(collect=lambda: 0)
        ppo_trainer.empty_cache = lambda: None
    np.random.seed(0)
    trainer.train()
    state = {f"policy.{k}": v.contiguous().clone() for k, v in trainer.model.policy.state_dict().items()}
    state |= {f"value.{k}": v.contiguous().clone() for k, v in trainer.model.value_model.state_dict().items()}
    save_file(state, out.with_suffix(".parameters.safetensors"))
    save_file(heard.gradients, out.with_suffix(".gradients.safetensors"))
    out.write_text(
        json.dumps(
            {
                # Permutations are of TRL's own shuffled rows; ours are of the file's.
                "orders": [[heard.rows[i] for i in order] for order in heard.orders],
                "losses": heard.losses,
                "update_seconds": heard.seconds,
                "peak_bytes": peak_bytes(),
            }
        )
    )


def peak_bytes() -> int:
    """Largest resident size of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Heard:
    """Listens to losses, the first gradient, permutations, and the time between them."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.rows: list[int] = []
        self.orders: list[list[int]] = []
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.seconds: list[float] = []
        self._began = 0.0
        backward, step, permutation = (
            trainer.accelerator.backward,
            trainer.optimizer.step,
            np.random.permutation,
        )
        epochs = trainer.args.num_ppo_epochs

        def heard_backward(loss: torch.Tensor, **kwargs: Any) -> None:
            self.losses.append(loss.item())
            backward(loss, **kwargs)

        def heard_step(*args: Any, **kwargs: Any) -> None:
            if not self.gradients and trainer.accelerator.sync_gradients:
                wrapped = trainer.accelerator.unwrap_model(trainer.model)
                for name, p in wrapped.named_parameters():
                    if p.grad is not None:
                        self.gradients[name.replace("value_model.", "value.")] = (
                            p.grad.detach().clone().contiguous()
                        )
            step(*args, **kwargs)
            self.seconds[-1] = time.perf_counter() - self._began

        def heard_permutation(n: int) -> np.ndarray:
            if len(self.orders) % epochs == 0:
                self._began = time.perf_counter()
                self.seconds.append(0.0)
            order = permutation(n)
            self.orders.append(order.tolist())
            return order

        trainer.accelerator.backward = heard_backward
        trainer.optimizer.step = heard_step
        np.random.permutation = heard_permutation


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
