"""Asking the teacher many questions: concurrency, token budget, success ratio, saving, and stopping in good order."""

import asyncio
import logging
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slmops.api.run import TeacherEndpoint
from slmops_artifacts import ArtifactError, waiting
from slmops_trainer.answers import Answers
from slmops_trainer.context import ACCESS_PATIENCE, SAVE_PATIENCE, STORE_PAUSE, Context
from slmops_trainer.failure import RunFailure, interrupted
from slmops_trainer.questions import Question
from slmops_trainer.replies import NO_ROOM, Rejected
from slmops_trainer.teacher import Forbidden, Sampling, Silent, Teacher, shown

LAST_PAUSE = 1.0  # seconds between two tries to save, in a pod that ends
SAVE_SECONDS = 5.0  # between two checkpoints: what a killed pod has to pay twice at most
HOLD_SECONDS = 15.0  # of a save that does not come to its end, after which nothing more is asked
GRACE_SECONDS = 5.0  # that requests in flight get when the pod is asked to stop
LAST_SECONDS = 30.0  # that requests in flight get when the run has failed: they are paid for
FORBIDDEN = 4  # questions, and all that are asked side by side: so many are forbidden before the key is to blame
HOPELESS = 20  # prompts without any answer at all, after which it is no use to go on

log = logging.getLogger("slmops")


@dataclass(frozen=True, slots=True)
class Terms:
    """How the teacher is asked.

    min_success_ratio  least share of prompts with an answer
    budget             answer tokens
    trust              whose certificates are trusted; None: the usual authorities'
    """

    endpoint: TeacherEndpoint
    key: str | None
    sampling: Sampling
    concurrency: int
    timeout: float
    min_success_ratio: float = 0.0
    budget: int | None = None
    trust: ssl.SSLContext | None = None


@dataclass
class Outcome:
    """What came of the questions. The answers are in the store.

    rejected  what came instead of an answer, by key, from this pod's requests
    unasked   questions that the token budget left out
    tokens    that the teacher wrote for this run, over all its pods
    """

    rejected: dict[str, str] = field(default_factory=dict)
    unasked: int = 0
    tokens: int = 0


class _Turn(NamedTuple):
    """A question to ask.

    since: when it was put off (monotonic seconds), if it was; proven: then the teacher answered another one.
    """

    question: Question
    since: float | None = None
    proven: bool = False


def ask_all(ctx: Context, asked: Sequence[Question], terms: Terms, store: Answers, stage: str) -> Outcome:
    """Ask what the store does not hold, and keep each answer as it comes.

    Raises RunFailure(TeacherUnavailable, TeacherAnswersRejected, AccessDenied, BadSpec, Interrupted) and those of the
    checkpoint store; whatever it raises, the answers that came are saved first.
    """
    return asyncio.run(_Run(ctx, asked, terms, store, stage).go())


class _Run:
    """The variables of one ask_all."""

    def __init__(self, ctx: Context, asked: Sequence[Question], terms: Terms, store: Answers, stage: str) -> None:
        self.ctx, self.terms, self.store, self.stage = ctx, terms, store, stage
        unique = {question.key: question for question in asked}
        self.all = list(unique.values())
        self.prompts = len({question.prompt for question in self.all})
        self.open = Counter(question.prompt for question in self.all)  # questions without a verdict, by prompt
        self.answered: set[int] = set()  # prompts with an answer
        self.failed: set[int] = set()  # prompts whose every question was rejected
        self.outcome = Outcome()
        self.turns: deque[_Turn] = deque()
        for question in self.all:
            saved = store.get(question.key, question.whole, terms.sampling.max_tokens)
            self.outcome.tokens += store.cost(question.key)
            if saved is None:
                self.turns.append(_Turn(question))
            else:
                self.open[question.prompt] -= 1
                self.answered.add(question.prompt)
        self.done = len(self.all) - len(self.turns)
        self.width = min(terms.concurrency, len(self.turns))
        self.silences = 0  # questions that waited in vain since the last answer
        self.forbidden: list[tuple[Question, Forbidden]] = []  # before anything was answered
        self.probing = asyncio.Lock()
        self.lost = False  # the run has failed: nothing more is asked
        self.saving = threading.Lock()
        self.saving_since: float | None = None
        self.denied_since: float | None = None
        self.trouble = ""

    async def go(self) -> Outcome:
        if self.done:
            log.info("Found %d of %d answers saved", self.done, len(self.all))
        self._tell()
        terms = self.terms
        async with Teacher(
            terms.endpoint,
            terms.key,
            timeout=terms.timeout,
            concurrency=terms.concurrency,
            on_trouble=self._on_trouble,
            known=len(self.store) > 0,
            trust=terms.trust,
        ) as teacher:
            workers = [asyncio.create_task(self._work(teacher)) for _ in range(self.width)]
            keeper = asyncio.create_task(self._keep())
            try:
                await self._until_over(workers, keeper)
                self._settle(teacher)
            except Exception:
                await self._finish(workers, keeper)
                await self._wind_up([*workers, keeper])
                await self._last_save(quiet=True)
                raise
            await self._wind_up([*workers, keeper])
            refused = await self._last_save()
        if self.ctx.stop.is_set():
            what = f"which the store refused: {refused}" if refused else "which are saved."
            raise interrupted(f"Stopped with {self.done} of {len(self.all)} answers, {what}")
        for question in (turn.question for turn in self.turns):
            if self.store.spent(question.key):  # in an earlier pod; the budget leaves no more for it
                self._reject(question, "no answer, as before")
        self.outcome.unasked = len(self.all) - self.done - len(self.outcome.rejected)
        self._check_ratio(final=True)
        return self.outcome

    async def _until_over(self, workers: Sequence["asyncio.Task[None]"], keeper: "asyncio.Task[None]") -> None:
        """Until all workers are through, one of them fails, saving fails, or the pod is asked to stop."""
        running: set[asyncio.Task[None]] = set(workers)
        while running:
            over, _ = await asyncio.wait({*running, keeper}, return_when=asyncio.FIRST_COMPLETED)
            for task in over:
                task.result()
            if keeper in over:  # it returns when the pod is asked to stop
                await asyncio.wait(running, timeout=GRACE_SECONDS)
                return
            running -= over

    async def _finish(self, workers: Sequence["asyncio.Task[None]"], keeper: "asyncio.Task[None]") -> None:
        """Let what is in flight come in, if it can be saved."""
        self.lost = True
        end = time.monotonic() + LAST_SECONDS
        while not (keeper.done() or all(task.done() for task in workers) or time.monotonic() > end):
            await asyncio.wait(workers, timeout=0.1)

    async def _work(self, teacher: Teacher) -> None:
        while self.turns:
            await self._until_saved()
            if self._budget_is_spent() or self.lost or self.ctx.stop.is_set() or not self.turns:
                return
            turn = self.turns.popleft()
            question = turn.question
            try:
                reply = await teacher.ask(question.messages, self.terms.sampling, question.seed, turn.since)
            except Rejected as rejected:
                self._pay(question, rejected.tokens)
                self._reject(question, str(rejected))
            except Forbidden as forbidden:
                await self._doubt(teacher, question, forbidden)
                continue
            except Silent as silent:
                await self._put_off(teacher, turn, silent)
                continue
            else:
                self.store.add(question.key, reply, question.whole)
                self.open[question.prompt] -= 1
                self.answered.add(question.prompt)
                self.outcome.tokens += reply.tokens
                self.done += 1
                self.silences = 0
                self._settle(teacher)
            self.trouble = ""
            self._tell()

    async def _until_saved(self) -> None:
        """Hold while the store does not take what came: every answer more would be one more to lose."""
        while self.saving_since is not None and time.monotonic() - self.saving_since > HOLD_SECONDS:
            if self.ctx.stop.is_set():
                return
            self._on_trouble("The store does not take the answers; asking goes on when it does")
            await asyncio.sleep(0.1)  # as often as the keeper looks

    async def _put_off(self, teacher: Teacher, turn: _Turn, silent: Silent) -> None:
        """Nothing was heard for long: is it the teacher, or this question? Others tell.

        The question is asked again after all others. Where the ratio holds without it, it is given up if the teacher
        answers one that it answered before, then not this one, and then that one again. Raises
        RunFailure(TeacherUnavailable) once as many questions as are asked side by side waited in vain with no answer
        between them, and when one that was answered before is not answered either.
        """
        self.silences += 1
        if silent.own and turn.since is None and self.silences <= self.width:
            self.turns.append(_Turn(turn.question, time.monotonic()))
            return
        began = time.monotonic()
        if silent.own and self._holds_without_the_rest() and await self._answers_another(teacher):
            if turn.proven:
                self._reject(turn.question, str(silent))
            else:  # it may be back only now
                self.turns.append(_Turn(turn.question, began, proven=True))
            return
        failure = silent.failure
        text = f"{failure.message} {self.done} of {len(self.all)} answers came, and are saved."
        raise RunFailure(failure.reason, text, retryable=failure.retryable)

    async def _doubt(self, teacher: Teacher, question: Question, forbidden: Forbidden) -> None:
        """Is it the key that is forbidden, or this question? Others tell: one that was answered before, where there is.

        Raises RunFailure(AccessDenied) when as many as are asked side by side, and FORBIDDEN, tell nothing else.
        """
        self.forbidden.append((question, forbidden))
        async with self.probing:
            if self.answered and not teacher.answered:
                await self._answers_another(teacher)
        if teacher.answered or len(self.forbidden) >= max(self.width, FORBIDDEN):
            self._settle(teacher)

    def _settle(self, teacher: Teacher) -> None:
        """Reject what was forbidden, once anything else is answered. Raises RunFailure(AccessDenied) if nothing is."""
        while self.forbidden and not self.ctx.stop.is_set():
            question, forbidden = self.forbidden.pop()
            if not teacher.answered:
                raise forbidden.failure
            self._reject(question, str(forbidden))

    async def _answers_another(self, teacher: Teacher) -> bool:
        """Whether the teacher answers a question that it has answered before: at the end no others are left to tell."""
        known = next(question for question in self.all if self.store.get(question.key))
        try:
            reply = await teacher.ask(known.messages, self.terms.sampling, known.seed)
        except (Rejected, Forbidden, Silent):
            return False
        self._pay(known, reply.tokens)
        self.silences = 0
        return True

    def _pay(self, question: Question, tokens: int) -> None:
        """Count, in the next pod too, what was written and is not kept."""
        if tokens:
            self.outcome.tokens += tokens
            self.store.spend(question.key, tokens)

    def _budget_is_spent(self) -> bool:
        return self.terms.budget is not None and self.outcome.tokens >= self.terms.budget

    def _holds_without_the_rest(self) -> bool:
        """Whether the ratio is reached even if nothing more is answered."""
        return bool(self.answered) and len(self.answered) >= self.terms.min_success_ratio * self.prompts - 1e-9

    def _reject(self, question: Question, what: str) -> None:
        log.warning("The teacher gave no usable answer: %s", what)
        self.outcome.rejected[question.key] = what
        self.open[question.prompt] -= 1
        if not self.open[question.prompt] and question.prompt not in self.answered:
            self.failed.add(question.prompt)
        self._check_ratio()

    def _check_ratio(self, *, final: bool = False) -> None:
        """Fail as soon as the ratio cannot be reached any more, or when nothing usable came for long."""
        ratio, asked = self.terms.min_success_ratio, self.prompts
        if final:
            asked = len(self.answered) + len(self.failed)
        lost = len(self.failed) > (1 - ratio) * asked + 1e-9
        hopeless = ratio > 0 and len(self.failed) >= HOPELESS and not self.answered
        if asked and (lost or hopeless):
            counts = Counter(_kind(what) for what in self.outcome.rejected.values())
            kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common(4))
            remedy = "Check spec.teacher (URL, model), or lower data.generation.minSuccessRatio."
            # No teacher mends thoughts without room: to look again would be to pay for all of them again.
            thoughts, spent = counts[NO_ROOM] * 2 > counts.total(), self._budget_is_spent()
            if thoughts:
                remedy = "Raise data.generation.maxTokens in a new object."
            elif spent:
                remedy += " data.generation.maxTotalTokens is spent: then make a new object, which finds the answers."
            raise RunFailure(
                "BadSpec" if thoughts or spent else "TeacherAnswersRejected",
                f"{len(self.failed)} prompts got no usable answer from {shown(self.terms.endpoint.url)}, "
                f"{len(self.answered)} got one; minSuccessRatio {ratio:g} of {asked} prompts cannot be reached. "
                f"Instead came: {kinds}. An example: {next(iter(self.outcome.rejected.values()))}. "
                f"{remedy} The answers that came are saved.",
            )

    async def _keep(self) -> None:
        """Save every few seconds; return when the pod is asked to stop."""
        saved = time.monotonic()
        while not self.ctx.stop.is_set():
            await asyncio.sleep(0.1)
            if time.monotonic() - saved >= SAVE_SECONDS:
                await self._save()
                saved = time.monotonic()

    async def _save(self) -> None:
        """Publish what is new. In a thread: requests go on meanwhile, into the next chunk."""
        if self.store.seal():
            self.saving_since = time.monotonic()
            await asyncio.to_thread(self._publish)
            self.saving_since = None

    async def _last_save(self, *, quiet: bool = False) -> str:
        """After the last answer. Returns why the store refused it. `quiet`: the run fails already, of another cause."""
        try:
            return await asyncio.to_thread(self._publish, last=True)
        except RunFailure as failure:
            if not quiet:
                raise
            log.error("The last answers could not be saved: %s", failure.message)  # noqa: TRY400  # no trace: it is named
            return failure.message

    def _publish(self, *, last: bool = False) -> str:
        """Save what is sealed, at last all. A pod that is asked to stop has patience for the last save alone."""
        # A save whose task was cancelled goes on in its thread: wait for it before touching the chunks it sends.
        with self.saving:
            if last:
                self.store.seal()
            if self.store.empty:
                return ""
            while not self.ctx.stop.is_set():
                try:
                    with waiting(self._wait):
                        refused = self.ctx.checkpoints.save()
                except RunFailure as failure:
                    if not self.ctx.stop.is_set():
                        self._wait_for_access(failure)
                else:
                    self.denied_since = None
                    return refused
            return self._save_at_last() if last else ""

    def _save_at_last(self) -> str:
        """In a pod that ends. Returns why the store refused it."""
        end = time.monotonic() + SAVE_PATIENCE
        while True:
            try:
                return self.ctx.checkpoints.save(patience=max(0.0, end - time.monotonic()))
            except RunFailure as failure:
                if not self.ctx.checkpoints.is_passing(failure):
                    raise
                if time.monotonic() + LAST_PAUSE > end:  # as `keep` has it: no cause to fail
                    return failure.message
            time.sleep(LAST_PAUSE)

    def _wait(self, error: ArtifactError, seconds: float) -> None:
        log.warning("Waits for the store: %s", error.message)
        if self.ctx.stop.wait(seconds):
            raise interrupted(f"The pod was asked to stop while it waited for the store: {error.message}")

    def _wait_for_access(self, failure: RunFailure) -> None:
        """Pause where credentials are being replaced: the store has taken a checkpoint before. Else raise `failure`."""
        self.denied_since = self.denied_since or time.monotonic()
        late = time.monotonic() - self.denied_since >= ACCESS_PATIENCE
        if late or not self.ctx.checkpoints.is_passing(failure):
            raise failure
        log.warning("Waits for the store: %s", failure.message)
        self.ctx.stop.wait(STORE_PAUSE)

    @staticmethod
    async def _wind_up(tasks: Sequence["asyncio.Task[None]"]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_trouble(self, what: str) -> None:
        if not self.trouble:
            log.warning("%s", what)
        self.trouble = what
        self._tell()

    def _tell(self) -> None:
        total, rejected, tokens = len(self.all), len(self.outcome.rejected), self.outcome.tokens
        text = f"{self.done} of {total} answers, {tokens:,} tokens" + (f", {rejected} rejected" if rejected else "")
        self.ctx.live(answers=self.done, answers_rejected=rejected, teacher_tokens=tokens)
        self.ctx.report(self.stage, self.done + rejected, total, f"{self.trouble}. {text}" if self.trouble else text)


def _kind(what: str) -> str:
    return what.partition(":")[0]
