"""One latent: ask for an explanation, test it on contexts that were held back, count."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from sae.explain import prompts
from sae.explain.config import LabelsSpec
from sae.explain.explainer import Answer, Explainer, Messages, NoAnswer, add_tokens
from sae.explain.prompts import Passage
from sae.explain.scores import METRICS, Counts, count_answers, scores

Result = TypeVar("Result")

TESTS = ("detection", "fuzzing")
ANSWERS_SCHEMA = pa.schema(
    {
        "latent": pa.int32(),
        "test": pa.string(),
        "number": pa.int32(),
        "kind": pa.string(),
        "truth": pa.bool_(),
        "answer": pa.bool_(),
    }
)
"""Every judged context; `answer` is null where none could be read. `number` is that of questions.parquet."""


def labels_schema() -> pa.Schema:
    """Of labels.parquet, one row per latent, sorted. Scores are null where they are not defined."""
    columns: dict[str, pa.DataType] = {
        "latent": pa.int32(),
        "explanation": pa.string(),
        "error": pa.string(),
        "model": pa.string(),
    }
    for test in TESTS:
        columns |= {f"{test}_{name}": pa.int32() for name in (*Counts._fields, "n", "n_unparsed")}
        for metric in METRICS:
            columns |= {f"{test}_{metric}{end}": pa.float64() for end in ("", "_low", "_high")}
    counted = ("n_unparsed", "n_requests", "prompt_tokens", "completion_tokens")
    return pa.schema(columns | dict.fromkeys(counted, pa.int64()))


class Labelled(NamedTuple):
    """What became of one latent."""

    row: dict[str, Any]
    answers: list[dict[str, Any]]
    models: set[str]
    """What the model called itself."""
    failure: NoAnswer | None
    """Why a request got no answer."""


class _Conversation:
    """Requests about one latent, and what they cost."""

    def __init__(self, model: Explainer, spec: LabelsSpec) -> None:
        self._model, self._spec = model, spec
        self.answers: list[Answer] = []
        self.n_unparsed = 0

    def ask(self, messages: Messages, parse: Callable[[str], Result | None]) -> Result | None:
        """The parsed answer, asked for twice at most; None, counted, when neither can be read. Raises: NoAnswer."""
        for attempt in range(2):
            answer = self._model.complete(messages, max_tokens=self._spec.max_tokens, seed=self._spec.seed + attempt)
            self.answers.append(answer)
            parsed = parse(answer.text)
            if parsed is not None:
                return parsed
            messages = prompts.again(messages, answer.text)
        self.n_unparsed += 1
        return None


def label_latent(
    model: Explainer, spec: LabelsSpec, entry: dict[str, Any], questions: list[dict[str, Any]]
) -> Labelled:
    """Explain one latent and test the explanation."""
    talk = _Conversation(model, spec)
    explanation, error, failure = None, entry["not_asked_because"], None
    answers: list[dict[str, Any]] = []
    try:
        if error is None:
            shown = [_passage(row) for row in questions if row["role"] == "shown"]
            explanation = talk.ask(prompts.explain_messages(shown), prompts.parse_explanation)
            if explanation is None:
                error = "neither of two answers was the JSON that was asked for"
        if explanation is not None:
            for test in TESTS:
                answers += _judge(talk, spec, test, explanation, [row for row in questions if row["role"] == test])
    except NoAnswer as err:
        error, failure, answers = str(err), err, []
    row = {"latent": entry["latent"], "explanation": explanation, "error": error, "model": spec.model_name}
    for test in TESTS:
        row |= _scored(test, [each for each in answers if each["test"] == test])
    row |= {
        "n_unparsed": talk.n_unparsed,
        "n_requests": len(talk.answers),
        "prompt_tokens": add_tokens([answer.prompt_tokens for answer in talk.answers]),
        "completion_tokens": add_tokens([answer.completion_tokens for answer in talk.answers]),
    }
    return Labelled(row, answers, {answer.model for answer in talk.answers if answer.model}, failure)


def _judge(
    talk: _Conversation, spec: LabelsSpec, test: str, explanation: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    write = prompts.detection_messages if test == "detection" else prompts.fuzzing_messages
    judged = []
    for start in range(0, len(rows), spec.contexts_per_request):
        batch = rows[start : start + spec.contexts_per_request]
        messages = write(explanation, [_passage(row) for row in batch])
        found = talk.ask(messages, functools.partial(prompts.parse_answers, n=len(batch)))
        answers: list[bool | None] = [None] * len(batch) if found is None else [*found]
        for row, answer in zip(batch, answers, strict=True):
            judged.append(
                {key: row[key] for key in ("latent", "number", "kind", "truth")} | {"test": test, "answer": answer}
            )
    return judged


def _scored(test: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of one test; all null where it was not made."""
    if not answers:
        return {}
    counts, n_unparsed = count_answers((each["truth"], each["answer"]) for each in answers)
    columns: dict[str, Any] = counts._asdict() | {"n": counts.total, "n_unparsed": n_unparsed}
    for metric, score in scores(counts).items():
        if score is not None:
            columns |= {metric: score.value, f"{metric}_low": score.low, f"{metric}_high": score.high}
    return {f"{test}_{name}": value for name, value in columns.items()}


def _passage(row: dict[str, Any]) -> Passage:
    return Passage(row["tokens"], row["marked"], row["activations"])
