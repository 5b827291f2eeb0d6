"""`charter.v1.JudgeService` over any language model and a constitution that may change under way."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from charter import rpc
from charter.constitution.model import Phase
from charter.feedback import asking
from charter.feedback.records import Opinion
from charter.feedback.serving import FeedbackSources, OpenModel, open_model
from charter.judge import service
from charter.judge.config import JudgeConfig
from charter.rpc import convert
from charter.telemetry.metrics import JudgeMetrics
from charter.v1 import judge_pb2
from charter.v1.judge_pb2_grpc import JudgeServiceServicer, add_JudgeServiceServicer_to_server

NAME = "charter.v1.JudgeService"


async def serve(
    config: JudgeConfig, registry: CollectorRegistry, *, open_model: OpenModel = open_model
) -> rpc.RunningServer:
    """Loads constitution and model and starts the server.

    Raises `ConstitutionError`, `ConfigError` or `CheckpointError`.
    """
    sources = await FeedbackSources.open(
        "judge",
        Phase.PREFERENCE,
        model=config.model,
        constitution=config.constitution,
        watch_s=config.watch_s,
        registry=registry,
        opener=open_model,
    )
    try:
        servicer = JudgeServicer(config, sources, JudgeMetrics.of(registry))
        served = rpc.Service(NAME, add_JudgeServiceServicer_to_server, servicer, sources.close)
        return await rpc.serve([served], config.server, registry)
    except BaseException:
        await sources.close()
        raise


class JudgeServicer(JudgeServiceServicer):
    """The method of the service. Each call keeps the constitution that it began with to its end."""

    def __init__(self, config: JudgeConfig, sources: FeedbackSources, metrics: JudgeMetrics) -> None:
        self._judging = config.judging
        self._sources = sources
        self._metrics = metrics

    async def Compare(  # noqa: N802 - gRPC's name
        self, request: judge_pb2.CompareRequest, context: Any
    ) -> judge_pb2.CompareResponse:
        """The probability that A is the better answer, and every principle's opinion."""
        conversation = convert.messages_from_proto(request.conversation)
        constitution, judging = self._sources.constitution, self._judging
        seed = request.seed if request.HasField("seed") else asking.fresh_seed()
        opinions = await service.compare(
            self._sources.model,
            service.Pair(conversation, request.answer_a, request.answer_b),
            service.panel(
                constitution,
                request.principle_ids,
                judging.principles,
                asking.derived_seed(seed, "principles"),
            ),
            judging=judging,
            examples=constitution.preference_examples,
            seed=seed,
        )
        self._count(opinions)
        source = await self._sources.source(constitution)
        return judge_pb2.CompareResponse(
            probability=service.label(opinions, judging.lowest, judging.highest),
            opinions=[_opinion_to_proto(o) for o in opinions],
            constitution_digest=source.constitution_digest,
            judge=convert.version_to_proto(source.model),
        )

    def _count(self, opinions: tuple[Opinion, ...]) -> None:
        for opinion in opinions:
            self._metrics.comparisons.labels(opinion.principle_id).inc()
            if opinion.flips:
                self._metrics.flips.labels(opinion.principle_id).inc()
        self._metrics.confidence.observe(abs(service.unclamped(opinions) - 0.5))


def _opinion_to_proto(opinion: Opinion) -> judge_pb2.PrincipleOpinion:
    return judge_pb2.PrincipleOpinion(
        principle_id=opinion.principle_id,
        weight=opinion.weight,
        probability_first=opinion.probability_first,
        probability_swapped=opinion.probability_swapped,
        note_first=opinion.note_first,
        note_swapped=opinion.note_swapped,
    )
