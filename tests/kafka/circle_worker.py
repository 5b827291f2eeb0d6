"""One of the circle's own workers on a broker, as a process of its own: chaos kills and stops it.

circle_worker.py models  SITE NAME      the policy server and the judge's, on ports that stay
circle_worker.py sampler SITE MEMBER
circle_worker.py judge   SITE MEMBER
circle_worker.py trainer SITE MEMBER    PPO; rewards are a function of the answer

SITE is a JSON file: uri, folder (model, constitution, checkpoints) and the two servers' ports.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from charter.bus import open_bus
from charter.bus.worker import Backoff, WorkerOptions
from charter.telemetry.logs import configure

BACKOFF = Backoff(0.1, 1.0)
OPTIONS = WorkerOptions(max_records=4, poll_timeout_s=0.5, backoff=BACKOFF, drain_s=5.0)
ANSWERS, ROLLOUTS_PER_STEP = 4, 2


async def models(site: dict[str, Any], _: str) -> None:
    import torch
    from prometheus_client import CollectorRegistry

    from charter.judge import server as judge
    from charter.judge.config import JudgeConfig, Judging, Notes
    from charter.policy import server as policy
    from charter.policy.config import PolicyConfig
    from charter.rpc import ServerConfig

    torch.set_num_threads(1)
    model = f"local:{site['folder']}/tiny"
    asked = PolicyConfig(model=model, server=ServerConfig(port=site["policy"]))
    judging = Judging(principles=1, notes=Notes(0), examples=0)
    asking = JudgeConfig(
        model, f"{site['folder']}/c.yaml", judging=judging, server=ServerConfig(port=site["judge"])
    )
    # Held by `with`: a server that nobody holds is collected, and hangs up.
    async with await policy.serve(asked, CollectorRegistry()), await judge.serve(asking, CollectorRegistry()):
        await asyncio.Event().wait()


async def sampler(site: dict[str, Any], member: str) -> None:
    from charter.lm.policy_client import PolicyModel
    from charter.sampler.config import SamplerConfig
    from charter.sampler.worker import worker

    # Room for two samplers' batches beside what waits at judge and trainer.
    config = SamplerConfig(answers=ANSWERS, max_tokens=5, batch_size=8, samplers=2)
    with open_bus(site["uri"]) as bus:
        policy = PolicyModel(f"127.0.0.1:{site['policy']}")
        await worker(bus, policy, config, member=member, options=OPTIONS).run()


async def judge(site: dict[str, Any], member: str) -> None:
    from charter.judge.worker import worker
    from charter.rpc.clients import JudgeClient

    with open_bus(site["uri"]) as bus:
        await worker(bus, JudgeClient(f"127.0.0.1:{site['judge']}"), member=member, options=OPTIONS).run()


async def trainer(site: dict[str, Any], member: str) -> None:
    import torch
    from tests.trainer.circle import Scorer

    from charter.registry import Registry
    from charter.trainer.config import PPOConfig, TrainerConfig, WatchConfig
    from charter.trainer.service import Trainer
    from charter.trainer.worker import TrainerWorker

    torch.set_num_threads(1)
    folder = Path(site["folder"])
    config = TrainerConfig(
        registry=str(folder / "checkpoints"),
        work=folder / "work",
        member=member,
        labels_per_step=ROLLOUTS_PER_STEP * ANSWERS // 2,
        checkpoint_every=2,
        ppo=PPOConfig(learning_rate=1e-6, epochs=1),
        watch=WatchConfig(kl_budget=1e6, step_kl_budget=1e6, patience=10**6),
    )
    with open_bus(site["uri"]) as bus:
        opened = Trainer(config, Registry(config.registry))
        await TrainerWorker(bus, opened, Scorer(), backoff=BACKOFF).run()


ROLES: dict[str, Any] = {"models": models, "sampler": sampler, "judge": judge, "trainer": trainer}

if __name__ == "__main__":
    configure("WARNING")
    role, path, member = sys.argv[1:]
    asyncio.run(ROLES[role](json.loads(Path(path).read_text()), member))
