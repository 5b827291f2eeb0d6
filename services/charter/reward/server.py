"""`charter.v1.RewardService`: scores answers, and learns from the labels on the bus while it does."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CollectorRegistry

from charter import rpc
from charter.errors import RequestError
from charter.reward.config import RewardConfig
from charter.reward.metrics import RewardMetrics
from charter.reward.scorer import Answer
from charter.reward.service import News, RewardModel, Trains, open_reward_model
from charter.reward.worker import LabelWorker
from charter.rpc import convert
from charter.telemetry.logs import get_logger
from charter.v1 import reward_pb2
from charter.v1.reward_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server

log = get_logger(__name__)

NAME = "charter.v1.RewardService"


async def serve(
    config: RewardConfig, registry: CollectorRegistry, *, learner: Trains | None = None
) -> rpc.RunningServer:
    """Opens folder, model and bus, and starts the server. Raises `ConfigError` or `CheckpointError`.

    `learner` does the rounds; by default a process of its own.
    """
    metrics = RewardMetrics.of(registry)
    model = await asyncio.to_thread(open_reward_model, config, metrics, learner)
    learning = _Learning(config, model, metrics, registry)
    try:
        await learning.start()
        servicer = RewardServicer(config, model, metrics)
        served = rpc.Service(NAME, add_RewardServiceServicer_to_server, servicer, learning.close)
        return await rpc.serve([served], config.server, registry)
    except BaseException:
        await learning.close()
        raise


class _Learning:
    """The model and the worker that feeds it."""

    def __init__(
        self, config: RewardConfig, model: RewardModel, metrics: RewardMetrics, registry: CollectorRegistry
    ) -> None:
        self._config = config
        self._model = model
        self._metrics = metrics
        self._registry = registry
        self._stack = contextlib.ExitStack()
        self._worker: LabelWorker | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._model.start()
        if not self._config.bus:
            return
        from charter.bus import open_bus
        from charter.bus.metrics import BusMetrics

        bus = self._stack.enter_context(await asyncio.to_thread(open_bus, self._config.bus))
        self._worker = LabelWorker(
            bus, self._config.group, self._model, self._metrics, BusMetrics.of(self._registry)
        )
        self._task = asyncio.create_task(self._run(self._worker))

    async def _run(self, worker: LabelWorker) -> None:
        try:
            await worker.run()
        except Exception as error:
            log.exception("labels are no longer taken; scores still are given", error=str(error))

    async def close(self) -> None:
        """Stops taking labels, then learning; safe to repeat."""
        if self._worker is not None and self._task is not None:
            self._worker.stop()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._model.close()
        await asyncio.to_thread(self._stack.close)


class RewardServicer(RewardServiceServicer):
    """The methods of the service; errors leave as our own and the scaffolding turns them into statuses."""

    def __init__(self, config: RewardConfig, model: RewardModel, metrics: RewardMetrics) -> None:
        self._config = config
        self._model = model
        self._metrics = metrics

    async def Score(  # noqa: N802 - gRPC's name
        self, request: reward_pb2.RewardServiceScoreRequest, context: Any
    ) -> reward_pb2.RewardServiceScoreResponse:
        """Normalised scores, all by one model."""
        if len(request.answers) > self._config.max_answers:
            raise RequestError(
                f"{len(request.answers)} answers to score; send at most {self._config.max_answers} at once"
            )
        scorer = self._model.scorer()
        answers = [Answer(tuple(a.prompt_token_ids), tuple(a.answer_token_ids)) for a in request.answers]
        started = time.perf_counter()
        scores = await asyncio.to_thread(scorer.score, answers, request.tokenizer_digest)
        self._metrics.batch_seconds.observe(time.perf_counter() - started)
        for score in scores:
            self._metrics.score.observe(score)
        return reward_pb2.RewardServiceScoreResponse(
            scores=scores, model=convert.version_to_proto(scorer.version)
        )

    async def Train(  # noqa: N802 - gRPC's name
        self, request: reward_pb2.TrainRequest, context: Any
    ) -> AsyncIterator[reward_pb2.TrainResponse]:
        """Streams a round; a caller that goes away stops nothing."""
        news = self._model.follow() if request.follow_only else self._model.train()
        async with contextlib.aclosing(news) as items:
            async for item in items:
                yield _news_to_proto(item)

    async def Stop(  # noqa: N802 - gRPC's name
        self, request: reward_pb2.StopRequest, context: Any
    ) -> reward_pb2.StopResponse:
        """Ends the round under way; no further one begins until `Train` asks for it."""
        return reward_pb2.StopResponse(was_training=await self._model.stop())

    async def Status(  # noqa: N802 - gRPC's name
        self, request: reward_pb2.RewardServiceStatusRequest, context: Any
    ) -> reward_pb2.RewardServiceStatusResponse:
        """The model in force and how good it is."""
        state, scorer = self._model.state, self._model.current
        return reward_pb2.RewardServiceStatusResponse(
            model=convert.version_to_proto(scorer.version) if scorer else None,
            state=self._model.news.phase.value,
            heldout_accuracy=state.accuracy,
            calibration_error=state.calibration_error,
            drift=state.drift,
            labels_seen=await asyncio.to_thread(self._model.labels_seen),
        )


def _news_to_proto(news: News) -> reward_pb2.TrainResponse:
    return reward_pb2.TrainResponse(
        state=news.phase.value,
        step=news.step,
        steps=news.steps,
        loss=0.0 if math.isnan(news.loss) else news.loss,
        heldout_accuracy=news.heldout_accuracy,
        calibration_error=news.calibration_error,
        message=news.message,
    )
