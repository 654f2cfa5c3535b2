"""The closing table, its bars, and the same as JSON."""

import statistics
from dataclasses import dataclass
from typing import Any

ORDER = ("teacher", "student", "tuned", "int4")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One promise of the source document, and what came of it."""

    what: str
    wanted: str
    measured: str
    met: bool
    reason: str = ""


def figures(bench: Figures, sent: int, lost: int) -> dict[str, dict[str, float]]:
    """What `.local/demo.json` holds, exactly. Accuracy: the teacher's own task, known and new phrasings alike."""
    models = bench["models"]
    accuracy = {name: base_accuracy(models[name]) for name in ORDER}
    found: dict[str, dict[str, float]] = {
        name: {
            "accuracy": round(accuracy[name], 4),
            "teacher_share": round(accuracy[name] / accuracy["teacher"], 4) if accuracy["teacher"] else 0.0,
            "latency_seconds": round(models[name]["latency_seconds"], 5),
            "tokens_per_second": round(models[name]["tokens_per_second"], 1),
            "model_memory_bytes": models[name]["model_memory_bytes"],
            "file_bytes": models[name]["file_bytes"],
        }
        for name in ORDER
    }
    return found | {"canary": {"sent": sent, "lost": lost}}


def base_accuracy(model: Figures) -> float:
    """Exact match on the held-out set of the teacher's task: half known, half new phrasings, in sets of equal size."""
    return float(model["accuracy"]["known"] + model["accuracy"]["new"]) / 2


def new_label(model: Figures) -> float:
    """Exact match on the held-out messages of the label that came with the fine-tune."""
    return float(model["accuracy"]["security_known"] + model["accuracy"]["security_new"]) / 2


def bars(bench: Figures, found: dict[str, dict[str, float]], lost_reasons: tuple[str, ...]) -> list[Bar]:
    """The source document's promises against the figures; each reason is made of what was measured."""
    models = bench["models"]
    teacher, tuned, int4, canary = found["teacher"], found["tuned"], found["int4"], found["canary"]
    own: Figures = models["int4"]
    share = int4["teacher_share"]
    faster = 1 - int4["latency_seconds"] / teacher["latency_seconds"]
    leaner = 1 - int4["model_memory_bytes"] / teacher["model_memory_bytes"]
    smaller = 1 - int4["file_bytes"] / tuned["file_bytes"]
    label, tuned_label = new_label(models["tuned"]) / (base_accuracy(models["tuned"]) or 1), new_label(models["tuned"])
    return [
        Bar(
            what="int4 keeps the teacher's accuracy",
            wanted="92 % or more",
            measured=f"{share:.1%}",
            met=share >= 0.92,
            reason=_accuracy_reason(models),
        ),
        Bar(
            what="int4 takes less time per answer",
            wanted="85 % or more",
            measured=f"{faster:.1%}",
            met=faster >= 0.85,
            reason=f"{milliseconds(int4)} against {milliseconds(teacher)}; with an answer of one token, "
            f"{1000 * own['one_token_seconds']:.1f} ms against {1000 * models['teacher']['one_token_seconds']:.1f} ms",
        ),
        Bar(
            what="int4 takes less model memory",
            wanted="95 % or more",
            measured=f"{leaner:.1%}",
            met=leaner >= 0.95,
            reason=f"weights {size(own['weight_bytes'])} of the teacher's {size(models['teacher']['weight_bytes'])}, "
            f"KV cache of one answer {size(own['kv_bytes'])} of {size(models['teacher']['kv_bytes'])}",
        ),
        Bar(
            what="int4 is smaller than its fp32",
            wanted="75 % or more",
            measured=f"{smaller:.1%}",
            met=smaller >= 0.75,
            reason=f"weights {size(own['weight_bytes'])} of {size(models['tuned']['weight_bytes'])}; tokenizer and "
            f"configuration do not shrink: {size(own['file_bytes'] - own['weight_bytes'])}",
        ),
        Bar(
            what="no request lost in the canary",
            wanted="0",
            measured=f"{canary['lost']:.0f} of {canary['sent']:.0f}",
            met=canary["lost"] == 0 and canary["sent"] > 0,
            reason="; ".join(lost_reasons) if canary["sent"] else "no request was sent",
        ),
        Bar(
            what="the new label is answered as the old ones",
            wanted="92 % or more",
            measured=f"{label:.1%}",
            met=label >= 0.92,
            reason=f"of held-out messages of team security {tuned_label:.1%} are right, of the others "
            f"{tuned['accuracy']:.1%}; before the fine-tune {new_label(models['student']):.1%}",
        ),
    ]


def _accuracy_reason(models: Figures) -> str:
    """The step of the chain that lost most, and where."""
    steps = [("distillation", "teacher", "student"), ("the fine-tune", "student", "tuned")]
    steps.append(("quantization", "tuned", "int4"))
    losses = [(base_accuracy(models[a]) - base_accuracy(models[b]), name, a, b) for name, a, b in steps]
    lost, name, before, after = max(losses)
    halves = ", ".join(
        f"{half} phrasings {models[before]['accuracy'][half]:.1%} -> {models[after]['accuracy'][half]:.1%}"
        for half in ("known", "new")
    )
    return f"most was lost in {name}, {100 * lost:.1f} points: {halves}"


HEAD = ("", "exact", "known", "new", "new", "of the", "time per", "tokens", "model", "all")
HEAD2 = ("", "match", "phrasings", "phrasings", "label", "teacher", "answer", "a second", "memory", "files")


def table(bench: Figures, found: dict[str, dict[str, float]]) -> list[str]:
    """The figures, a line a model."""
    rows: list[tuple[str, ...]] = [HEAD, HEAD2]
    for name in ORDER:
        own, row = bench["models"][name], found[name]
        shares = (
            row["accuracy"],
            own["accuracy"]["known"],
            own["accuracy"]["new"],
            new_label(own),
            row["teacher_share"],
        )
        rest = (milliseconds(row), f"{row['tokens_per_second']:,.0f}")
        rows.append(
            (
                name,
                *(f"{share:.1%}" for share in shares),
                *rest,
                size(row["model_memory_bytes"]),
                size(row["file_bytes"]),
            )
        )
    latencies = [[each["latency_seconds"] for each in model["rounds"]] for model in bench["models"].values()]
    quartiles = [statistics.quantiles(each, n=4) for each in latencies]
    spread = max(upper / lower - 1 for lower, _, upper in quartiles)
    return [
        "",
        *(f"{first:9}" + "".join(f"{cell:>11}" for cell in rest) for first, *rest in rows),
        "",
        "Held-out messages only; exact match: of known and new phrasings together. Time: median of one request at a",
        f"time, over HTTP, every model on the same CPUs; half of a model's rounds lay within {spread:.0%}.",
        "Model memory: weights and the KV cache of one answer.",
        "",
    ]


def verdicts(found: list[Bar]) -> list[str]:
    """A line a bar; a missed one says why."""
    width = max(len(bar.what) for bar in found)
    return [
        f"{'met   ' if bar.met else 'MISSED'} {bar.what:{width}}  {bar.measured:>12}  (wanted {bar.wanted})"
        + ("" if bar.met else f"\n       because: {bar.reason}")
        for bar in found
    ]


def milliseconds(row: dict[str, float]) -> str:
    """The latency for people."""
    return f"{1000 * row['latency_seconds']:.1f} ms"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
