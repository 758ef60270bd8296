"""Requests that wait for documents, and the attempts to generate them: the same on both panels."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.policies.retrieval_overlap.base import RetrievalOverlap, SearchView, checked_action
from sim.requests import Request
from sim.workload.knowledge import Documents, KnowledgeWorkload

MAX_STAGES = 64
"""Stages of a search at most: generations are numbered by request and stage."""
NONE = -1
"""Where no generation was stopped or started."""
GIVEN_UP = -1
"""Instead of a stage: the client of a request has left."""
LOST = -2
"""Instead of a stage, of no request: KV on the GPU is gone."""


class Question(NamedTuple):
    """A request before its documents are certain."""

    request: Request
    """With the prompt that it has in the end."""
    stages: tuple[tuple[int, ...], ...]
    """Documents by rank after each stage of the search; the last ones are the answer."""
    own_tokens: int
    """Of its prompt, those that are of no document."""

    @property
    def last_stage(self) -> int:
        """The stage after which the search is over."""
        return len(self.stages) - 1

    def changed(self, stage: int) -> bool:
        """Whether a stage has changed the documents."""
        return not stage or self.stages[stage] != self.stages[stage - 1]


def questions(workload: KnowledgeWorkload, seed: int, max_model_tokens: int) -> Iterator[Question]:
    """All requests of a workload in order of arrival.

    Args:
        workload: where they come from.
        seed: the scenario's seed.
        max_model_tokens: context of the model, prompt and answer together.
    """
    number, tokens = 0, workload.documents(seed).tokens.tolist()
    for columns in workload.columns(seed):
        assert columns.retrieved is not None, "a knowledge workload retrieves"
        rows = zip(
            columns.arrival_s.tolist(), columns.prompt_tokens.tolist(),
            columns.output_tokens.tolist(), columns.retrieved, strict=True,
        )  # fmt: skip
        for arrival_s, prompt, output, stages in rows:
            most = max_model_tokens - prompt
            if workload.max_output_tokens is not None:
                most = min(most, workload.max_output_tokens)
            own = prompt - sum([tokens[one] for one in stages[-1]])
            yield Question(Request(number, arrival_s, prompt, output, most), stages, own)
            number += 1


class Attempt(NamedTuple):
    """What is generated for a question."""

    generation: int
    documents: tuple[int, ...]


class Generation(NamedTuple):
    """An attempt that starts now."""

    request: Request
    """For the replica: its id is the generation's, its prompt has these documents."""
    documents: tuple[int, ...]


class Decided(NamedTuple):
    """What a stage led to."""

    stopped: int
    """Generation to end, or `NONE`."""
    started: Generation | None


def prompt_tokens(
    question: Question, documents: tuple[int, ...], document_tokens: NDArray[np.int64]
) -> int:
    """Length of the prompt of a question behind these documents, which may not be its last."""
    return question.own_tokens + sum([int(document_tokens[one]) for one in documents])


class Generations:
    """Which question is being generated with which documents."""

    def __init__(
        self, rule: RetrievalOverlap, documents: Documents, *, may_give_up: bool = False
    ) -> None:
        """Begin without any.

        Args:
            rule: decides at every stage that matters.
            documents: their lengths.
            may_give_up: whether clients may leave before they have their answer.
        """
        self._rule = rule
        self._tokens = documents.tokens
        self._attempts: dict[int, Attempt] = {}
        self._may_give_up = may_give_up
        self._answers: dict[int, int] = {}
        """Where clients may leave: the generation that answers, by request."""
        self._left: set[int] = set()
        """Requests whose clients left before the search was over."""

    def matters(self, question: Question, stage: int) -> bool:
        """Whether a stage is decided on: the last one is, and one that changed the documents."""
        if stage == len(question.stages) - 1:
            return True
        return self._rule.decides_early and question.changed(stage)

    def wants(self, question: Question) -> bool:
        """Whether anybody waits for what is found for a question."""
        return question.request.request_id not in self._left

    def staged(self, question: Question, stage: int, pool_size: int) -> Decided:
        """Decide what a stage leads to."""
        request_id = question.request.request_id
        attempt = self._attempts.get(request_id)
        view = SearchView(
            question.stages[stage],
            question.stages[stage - 1] if stage else (),
            None if attempt is None else attempt.documents,
            stage == question.last_stage,
            pool_size,
        )
        action = checked_action(self._rule, view)
        stopped = NONE
        if action.stop and attempt is not None:
            stopped = attempt.generation
            del self._attempts[request_id]
        if not action.start:
            return Decided(stopped, None)
        generation = request_id * MAX_STAGES + stage
        self._attempts[request_id] = Attempt(generation, view.documents)
        asked = question.request
        prompt = prompt_tokens(question, view.documents, self._tokens)
        request = Request(
            generation, asked.arrival_s, prompt, asked.output_tokens, asked.max_output_tokens
        )
        return Decided(stopped, Generation(request, view.documents))

    def answers(self, question: Question) -> int:
        """The generation that answers a question whose search is over."""
        request_id = question.request.request_id
        generation = self._attempts.pop(request_id).generation
        if self._may_give_up:
            self._answers[request_id] = generation
        return generation

    def gives_up(self, question: Question, is_pending: Callable[[int], bool]) -> int | None:
        """A client waits no longer.

        Args:
            question: of it.
            is_pending: whether a generation waits or runs.

        Returns:
            The generation to end, or `NONE`; None where the client has its answer already.
        """
        request_id = question.request.request_id
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            return answer if is_pending(answer) else None
        self._left.add(request_id)
        attempt = self._attempts.pop(request_id, None)
        return NONE if attempt is None else attempt.generation
