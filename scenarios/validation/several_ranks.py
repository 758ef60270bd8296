"""The questions asked of a replica on several ranks."""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.kv_cache import Corruption
from backends.parallel import Driver
from backends.parallel_serving import (
    ParallelRun,
    architecture_of,
    open_stage,
    serve_parallel,
)
from backends.ranks import require_ranks, run_ranks
from backends.reference import KeepLogits, OneRank
from backends.sampling import Sampler
from backends.serving import RANDOM, require_model
from backends.shards import require_shares
from backends.tokenizer import Tokenizer, prompt_token_ids
from backends.transformer import Transformer
from backends.weights import TINY_CONFIG, Model, load_model, random_model
from scenarios import calibrate
from scenarios.tables import console
from scenarios.validation import decisions
from scenarios.validation.lanes_time import LanePanels
from scenarios.validation.numbers import all_at_once, judge_answers, number_lines, tight_limits
from scenarios.validation.openings import TEXTS
from scenarios.validation.options import Fault, Options, Question
from scenarios.validation.parallel import parallel_lines, scaled
from scenarios.validation.verdict import Line
from sim.lanes import num_lanes
from sim.models.split import require_parallel
from sim.policies.batching.base import Batching
from sim.policies.registry import load_file, user_files
from sim.policies.routing.base import Routing
from sim.policies.routing.round_robin import RoundRobin

if TYPE_CHECKING:
    from scenarios.validation.ask import Plan
    from scenarios.validation.timing import Runs


class Ranks(NamedTuple):
    """How many, and where."""

    tp_size: int
    pp_size: int
    device: str
    batches_in_flight: int | None = None
    routing: Routing = RoundRobin()
    """Chooses among these."""

    @property
    def lanes(self) -> int:
        """Batches in flight."""
        return num_lanes(self.batches_in_flight, self.pp_size)

    def run(self, **fields: Any) -> ParallelRun:
        """A run on them."""
        return ParallelRun(**self._asdict(), **fields)


def answer(plan: "Plan") -> tuple[list[Line], "dict[str, Runs]"]:
    """The lines of the questions that were asked, and the timed runs by policy.

    Raises:
        ValueError: ranks, model or weights that are not there, before anything is run.
        ChildProcessError: a rank was lost.
    """
    options, policies = plan.options, plan.policies
    routings = dict(plan.routings) or {"": RoundRobin()}
    ranks = Ranks(
        plan.tp_size, plan.pp_size, options.device.value, plan.batches_in_flight,
        next(iter(routings.values())),
    )  # fmt: skip
    require_ranks(plan.tp_size * plan.pp_size, ranks.device)
    asked = set(options.only)
    if asked & {Question.numbers, Question.time}:
        require_model(options.weights, ranks.device)
    lines: list[Line] = []
    runs: dict[str, Runs] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            task = progress.add_task("decisions and bytes", total=len(policies))
            for name, batching in policies.items():
                for rule, routing in routings.items():
                    label = f"{name}, {rule}" if len(routings) > 1 else name
                    found = _exact_lines(label, batching, options, ranks._replace(routing=routing))
                    lines += [line for line in found if Question(line.question) in asked]
                progress.advance(task)
        served = _Weights(options.weights, ranks)
        if Question.numbers in asked:
            task = progress.add_task("numbers", total=1 + len(policies))
            asking = _Numbers(served, options, ranks)
            progress.advance(task)
            for name, batching in policies.items():
                lines += asking.lines(name, batching)
                progress.advance(task)
        if Question.time in asked:
            progress.add_task("time", total=None)
            runs, timed = _timed(plan, served, ranks)
            lines += timed
    return lines, runs


def _timed(plan: "Plan", served: "_Weights", ranks: Ranks) -> "tuple[dict[str, Runs], list[Line]]":
    """Question 4: the first rank calibrates the ranks' own iterations and serves, in turn."""
    run = ranks.run(
        weights=served.weights, config=served.config, batching=next(iter(plan.policies.values())),
        workload=decisions.workload(1), limits=decisions.LIMITS,
    )  # fmt: skip
    name = f"{calibrate.fit_name(served.model.name)}_tp{ranks.tp_size}_pp{ranks.pp_size}"
    arguments = (user_files(), pickle.dumps((plan, run)), name)
    return run_ranks(_time_rank, run.size, arguments, ranks.device)[0]


def _time_rank(rank: int, size: int, files: list[Path], pickled: bytes, name: str) -> Any:
    from scenarios.validation.ask import timed_runs

    del size
    for path in files:
        load_file(path)
    plan, run = pickle.loads(pickled)
    stage = open_stage(run, rank, Sampler())
    if rank:
        stage.follow()
        return None
    driver = Driver(stage)
    lanes = LanePanels.of(driver, run, architecture_of(run)) if run.lanes > 1 else None
    found = timed_runs(plan, driver, name, Progress(disable=True), lanes)
    driver.stop()
    return found


class _Weights:
    """What numbers and time are asked of: the weights of the options where they divide."""

    def __init__(self, weights: str, ranks: Ranks) -> None:
        self.weights, self.config, self.about = weights, None, ""
        self.model = random_model() if weights == RANDOM else load_model(weights)
        try:
            require_shares(self.model.config, ranks.tp_size, ranks.pp_size)
        except ValueError as error:
            self.weights = RANDOM
            self.about = f"; of random weights, as {error}"
        if self.weights == RANDOM:
            self.config = small_config(ranks.tp_size, ranks.pp_size)
            self.model = random_model(self.config)


def small_config(tp_size: int, pp_size: int) -> dict[str, object]:
    """The tiny model where it divides, else one as tiny whose heads and layers do."""
    config = dict(TINY_CONFIG)
    try:
        require_parallel(random_model(config).config, tp_size, pp_size)
    except ValueError:
        config |= {
            "num_attention_heads": 2 * tp_size, "num_key_value_heads": tp_size,
            "hidden_size": 16 * tp_size, "intermediate_size": 32 * tp_size,
            "num_hidden_layers": max(2, pp_size),
        }  # fmt: skip
    return config


def _exact_lines(name: str, batching: Batching, options: Options, ranks: Ranks) -> list[Line]:
    count, fault = options.sizes.decision_requests, options.corrupt
    # In mid-run, so that the fault meets a full pool.
    at = {Fault.skip_free: count // 2, Fault.drop_copy: count * 20}
    run = ranks.run(
        weights=RANDOM, config=small_config(ranks.tp_size, ranks.pp_size),
        workload=decisions.workload(count), batching=batching,
        limits=scaled(decisions.LIMITS, ranks.lanes), seed=options.seed,
        max_model_tokens=decisions.CONTEXT,
        corruption=None if fault is Fault.none else Corruption(kind=fault.value, index=at[fault]),
    )  # fmt: skip
    return parallel_lines(name, run)


class _Numbers:
    """Question 3: the ranks' tokens against those of the same weights on one rank."""

    def __init__(self, served: _Weights, options: Options, ranks: Ranks) -> None:
        self._served, self._ranks, self._new_tokens = served, ranks, options.sizes.new_tokens
        model = served.model
        self._asked = prompts_of(model, options.sizes.prompts)
        self._reference = OneRank(Transformer(model.config, model.weights, ranks.device))
        self._generated = self._reference.generate(self._asked, self._new_tokens)

    def lines(self, name: str, batching: Batching) -> list[Line]:
        """Of one policy."""
        run = self._ranks.run(
            weights=self._served.weights, config=self._served.config, batching=batching,
            workload=all_at_once(self._asked, self._new_tokens), prompts=self._asked,
            limits=scaled(tight_limits(self._asked, self._new_tokens), self._ranks.lanes),
            sampler=KeepLogits(),
        )  # fmt: skip
        found = serve_parallel(run)
        answers = [found.served.answers[index] for index in range(len(self._asked))]
        kept = found.sampler
        assert isinstance(kept, KeepLogits)
        judged = judge_answers(self._asked, answers, self._generated, kept, self._reference)
        return number_lines(name, judged, len(self._asked), "one rank's", self._served.about)


def prompts_of(model: Model, count: int) -> list[list[int]]:
    """Token ids of texts, or random ones of as many tokens where there is no tokenizer."""
    if model.folder is None:
        vocabulary = model.config.vocab_size
        return [
            prompt_token_ids(0, index, len(text.split()), vocabulary)
            for index, text in enumerate(TEXTS[:count])
        ]
    tokenizer = Tokenizer(model.folder)
    return [tokenizer.encode(text) for text in TEXTS[:count]]
