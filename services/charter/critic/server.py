"""`charter.v1.CriticService` over any language model and a constitution that may change under way."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from charter import rpc
from charter.constitution.model import Constitution, Phase
from charter.critic import service
from charter.critic.config import CriticConfig
from charter.errors import RequestError
from charter.feedback import asking
from charter.feedback.records import Assessment, RevisionStep
from charter.feedback.serving import FeedbackSources, OpenModel, open_model
from charter.lm.base import Conversation
from charter.rpc import convert
from charter.telemetry.metrics import CriticMetrics
from charter.v1 import critic_pb2
from charter.v1.critic_pb2_grpc import CriticServiceServicer, add_CriticServiceServicer_to_server

NAME = "charter.v1.CriticService"


async def serve(
    config: CriticConfig, registry: CollectorRegistry, *, open_model: OpenModel = open_model
) -> rpc.RunningServer:
    """Loads constitution and model and starts the server.

    Raises `ConstitutionError`, `ConfigError` or `CheckpointError`.
    """
    sources = await FeedbackSources.open(
        "critic",
        Phase.CRITIQUE,
        model=config.model,
        constitution=config.constitution,
        watch_s=config.watch_s,
        registry=registry,
        opener=open_model,
    )
    try:
        servicer = CriticServicer(config, sources, CriticMetrics.of(registry))
        served = rpc.Service(NAME, add_CriticServiceServicer_to_server, servicer, sources.close)
        return await rpc.serve([served], config.server, registry)
    except BaseException:
        await sources.close()
        raise


class CriticServicer(CriticServiceServicer):
    """The methods of the service. Each keeps the constitution that it began with to its end."""

    def __init__(self, config: CriticConfig, sources: FeedbackSources, metrics: CriticMetrics) -> None:
        self._config = config
        self._sources = sources
        self._metrics = metrics

    async def Assess(  # noqa: N802 - gRPC's name
        self, request: critic_pb2.AssessRequest, context: Any
    ) -> critic_pb2.AssessResponse:
        """The probability that the answer breaks each of these principles."""
        conversation, constitution = _conversation(request), self._sources.constitution
        principles = asking.chosen(constitution, Phase.CRITIQUE, request.principle_ids)
        found = await service.assess(self._sources.model, conversation, request.answer, principles)
        self._count_assessments(found)
        return critic_pb2.AssessResponse(
            assessments=[
                critic_pb2.Assessment(principle_id=a.principle_id, probability=a.probability) for a in found
            ],
            **await self._source(constitution),
        )

    async def Critique(  # noqa: N802 - gRPC's name
        self, request: critic_pb2.CritiqueRequest, context: Any
    ) -> critic_pb2.CritiqueResponse:
        """What is wrong with the answer by one principle."""
        conversation, constitution = _conversation(request), self._sources.constitution
        if not request.principle_id:
            raise RequestError("principle_id is empty; name the principle to criticise by")
        (principle,) = asking.chosen(constitution, Phase.CRITIQUE, [request.principle_id])
        text = await service.critique(
            self._sources.model,
            conversation,
            request.answer,
            principle,
            writing=self._config.writing,
            examples=constitution.critique_examples,
            seed=_seed(request),
        )
        return critic_pb2.CritiqueResponse(critique=text, **await self._source(constitution))

    async def Revise(  # noqa: N802 - gRPC's name
        self, request: critic_pb2.ReviseRequest, context: Any
    ) -> critic_pb2.ReviseResponse:
        """Rounds of critique and revision, the principle of each drawn by weight."""
        conversation, constitution = _conversation(request), self._sources.constitution
        rounds, seed = request.rounds or self._config.rounds, _seed(request)
        if not 1 <= rounds <= self._config.max_rounds:
            raise RequestError(
                f"rounds is {rounds}; give 1 to {self._config.max_rounds}, or 0 for the default"
            )
        pool = asking.chosen(constitution, Phase.CRITIQUE, request.principle_ids)
        steps = await service.revise(
            self._sources.model,
            conversation,
            request.answer,
            asking.draw(pool, rounds, asking.derived_seed(seed, "principles")),
            writing=self._config.writing,
            examples=constitution.critique_examples,
            seed=seed,
        )
        self._count_revisions(request.answer, steps)
        return critic_pb2.ReviseResponse(
            answer=steps[-1].revision,
            steps=[
                critic_pb2.RevisionStep(principle_id=s.principle_id, critique=s.critique, revision=s.revision)
                for s in steps
            ],
            **await self._source(constitution),
        )

    async def _source(self, constitution: Constitution) -> dict[str, Any]:
        source = await self._sources.source(constitution)
        return {
            "constitution_digest": source.constitution_digest,
            "critic": convert.version_to_proto(source.model),
        }

    def _count_assessments(self, found: tuple[Assessment, ...]) -> None:
        for assessment in found:
            verdict = "breaks" if assessment.probability > 0.5 else "keeps"
            self._metrics.assessments.labels(assessment.principle_id, verdict).inc()

    def _count_revisions(self, answer: str, steps: tuple[RevisionStep, ...]) -> None:
        for step in steps:
            changed = "yes" if step.revision != answer else "no"
            self._metrics.revisions.labels(step.principle_id, changed).inc()
            answer = step.revision


def _conversation(
    request: critic_pb2.AssessRequest | critic_pb2.CritiqueRequest | critic_pb2.ReviseRequest,
) -> Conversation:
    return convert.messages_from_proto(request.conversation)


def _seed(request: critic_pb2.CritiqueRequest | critic_pb2.ReviseRequest) -> int:
    return request.seed if request.HasField("seed") else asking.fresh_seed()
