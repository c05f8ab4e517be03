"""Compares small assistants in a tournament after Guanaco-style runs.

qlora-jax sweep instruction_tuning
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure

from experiments import cells, costs, inputs
from qlora_jax.sweep import Analysis, Cell, Context, Experiment, Rows, Table, Verdict, markdown
from qlora_jax.sweep.metrics import Metric, columns, first, line, measured
from qlora_jax.sweep.statistics import Interval, within

if TYPE_CHECKING:
    from qlora_jax.evaluate.tournament import Judge, Match

PLAYERS: dict[str, dict[str, Any]] = {
    "untuned": {"train.steps": 1, "optimizer.learning_rate": 1e-9},
    "qlora nf4": {"method": "qlora"},
    "qlora fp4": {"method": "qlora", "quant.codebook": "fp4_bnb"},
    "lora 16 bits": {"method": "lora"},
}
TUNED, UNTUNED = "qlora nf4", "untuned"
PROMPTS = 20
ORDERINGS = 10_000


class _Judged(NamedTuple):
    """An answer: the judge's score, the pair that was scored, and the figures of the run."""

    score: Any
    pair: Any
    run: Mapping[str, Any]


METRICS: Mapping[str, Metric[_Judged]] = {
    "log_likelihood": Metric(lambda judged: judged.score.log_likelihood),
    "tokens": Metric(lambda judged: len(judged.pair.continuation)),
    "loss": Metric(lambda judged: judged.run["loss"], "held-out loss", first),
}
"""Figures of one answer; those with a title are columns of the table of players."""


def run(cell: Cell, context: Context) -> Rows:
    import jax.numpy as jnp

    from qlora_jax.evaluate.score import encode_pair, score
    from qlora_jax.formats.load import load_model
    from qlora_jax.train.setup import open_model

    settings = {**PLAYERS[cell["player"]], "train.seed": cell["seed"], "train.eval_every": 0}
    found = cells.finetuned(cell["config"], context.folder, settings)
    restored = cells.trained(context.folder / cells.RUN)
    answered = cells.answers(restored, PROMPTS, 64)
    config = cells.config_of(cell["config"], {"model.path": inputs.JUDGE})
    checkpoint, text = open_model(config)
    judge = load_model(checkpoint, quant=None, dtype=jnp.float32)
    pairs = [
        encode_pair(text, told(question.prompt, answer), f" {question.answer.strip()}")
        for question, answer in answered
    ]
    scored = score(
        judge, pairs, dtype=jnp.float32, pad_id=text.pad_id, batch_size=4, max_length=768
    )
    return [
        {
            "prompt": i,
            "asked": question.prompt,
            "answer": answer,
            **measured(METRICS, _Judged(score, pair, found)),
        }
        for i, ((question, answer), pair, score) in enumerate(zip(answered, pairs, scored))
    ]


def told(prompt: str, answer: str) -> str:
    """Returns the judge's prompt; the likelihood of the right answer after it decides.

    The prompt contains the player's answer, so a player scores by how likely its answer makes the
    right one. The likelihood of the player's own words would favour the untuned model, because the
    judge is that model.
    """
    return f"Question: {prompt}\nA student's answer: {answer.strip()}\nThe right answer:"


def analyse(table: Table) -> Analysis:
    from qlora_jax.evaluate.tournament import elo, first_place_bias

    games = _games(table)
    ratings = elo(games, orderings=ORDERINGS)
    by_player = {r.player: r for r in ratings}
    gap = by_player[TUNED].elo - by_player[UNTUNED].elo
    low = by_player[TUNED].low - by_player[UNTUNED].high
    high = by_player[TUNED].high - by_player[UNTUNED].low
    interval = Interval(gap, low, high, len(games))
    rows = [
        {
            "player": r.player,
            "Elo": f"{r.elo:.0f}",
            "95% of bootstraps": f"{r.low:.0f} to {r.high:.0f}",
            **line(table.where(player=r.player), columns(METRICS)),
        }
        for r in ratings
    ]
    samples = [
        {"player": row["player"], "asked": _line(row["asked"]), "answer": _line(row["answer"])}
        for row in table.where(prompt=0).rows
    ]
    return Analysis(
        Verdict(
            f"{TUNED} is rated {gap:+.0f} Elo beside the untuned model over {len(games)} games "
            f"(first place: {first_place_bias(games):+.2f})",
            interval,
            within(interval, low=0.0),
        ),
        {f"Elo over {ORDERINGS:,} orderings": markdown(rows), "One question": markdown(samples)},
        {"tournament": _picture(ratings)},
    )


def _games(table: Table) -> "list[Match]":
    """Plays every pair of players on every prompt in both orders, separately for each seed."""
    from qlora_jax.evaluate.tournament import play

    games: list[Match] = []
    for own in table.groups("seed").values():
        by_player = {player: rows for (player,), rows in own.groups("player").items()}
        answers = {player: rows.column("answer") for player, rows in by_player.items()}
        asked = next(iter(by_player.values())).column("asked")
        offset = len(asked) * len(games)
        played = play(asked, answers, _judge(own))
        games += [match._replace(prompt=match.prompt + offset) for match in played]
    return games


def _judge(own: Table) -> "Judge":
    """Returns the endpoint's judge if there is one, else a judge by the cells' likelihoods."""
    from qlora_jax.evaluate.judges import by_endpoint, by_likelihood

    if inputs.ENDPOINT is not None:
        return by_endpoint(*inputs.ENDPOINT)
    said = {
        (row["asked"], row["answer"]): (row["log_likelihood"], row["tokens"]) for row in own.rows
    }
    return by_likelihood(lambda prompt, answer: said[prompt, answer])


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]


def _picture(ratings: Any) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for i, rating in enumerate(ratings):
        axes.plot([rating.low, rating.high], [i, i], "C0", linewidth=4, alpha=0.4)
        axes.plot(rating.elo, i, "C0o")
    axes.set_yticks(range(len(ratings)), [r.player for r in ratings])
    axes.invert_yaxis()
    axes.set_xlabel("Elo, 95% of bootstraps")
    return figure


EXPERIMENT = Experiment(
    name="instruction_tuning",
    question="Does a small Guanaco-style run make a better assistant, and does the data type "
    "matter?",
    paper="QLoRA, section 5 and Table 7: Elo by GPT-4 over 10,000 orderings, Guanaco 65B 1022, 33B "
    "992, Vicuna 13B 974, 7B 879",
    expected="every tuned model above the untuned; the data types within each other's intervals",
    cost="2 CPU cores, 3 GiB; judged by a reference model, to which the "
    "player's answer makes the right one likely or not, or by an endpoint (inputs.ENDPOINT)",
    axes={"config": [inputs.CHAT], "player": list(PLAYERS)},
    seeds=(0,),
    version=2,
    inputs=inputs.made,
    estimate=costs.by(
        "player", {"untuned": 50, "lora 16 bits": 150, "qlora nf4": 240, "qlora fp4": 210}, 3
    ),
    run=run,
    analyse=analyse,
)
