"""Claims of the literature, put as hypotheses in YAML and held against a sweep, one setting at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from omegaconf import OmegaConf
from yaml import YAMLError

from harness.analysis.decisions import least_pairs
from harness.analysis.declared import build
from harness.analysis.hypotheses import Hypothesis, Outcome, Result, examine
from harness.analysis.quantities import Quantity
from harness.analysis.sweep import Sweep, columns_of
from harness.analysis.table import Table
from harness.entries import conf_dir
from harness.errors import ConfigError

_MODELS = {"all": "model", "dense": "dense model", "moe": "mixture-of-experts model"}
# What settles a conjunction, the first before the others; without any of these it is supported.
_SETTLING: tuple[Outcome, ...] = ("not tested here", "not supported", "undecided")


@dataclass(frozen=True)
class Claim:
    """What a paper says.

    Attributes:
        statement, source: in words, and where it is made.
        models: the kind of model that it is about; a mixture of experts is one whose runs record expert choices.
        given: what it presupposes: where that is not supported, there is nothing to test.
        all_of: what it says, all of which must hold.
    """

    statement: str
    source: str
    models: Literal["all", "dense", "moe"]
    given: tuple[Hypothesis, ...]
    all_of: tuple[Hypothesis, ...]

    def __post_init__(self) -> None:
        if not self.all_of:
            raise ConfigError("all_of=[]: give one hypothesis or more, which the claim consists of")

    def words(self, sweep: Sweep) -> str:
        """The hypotheses as they stand in the table."""
        given = [f"given {hypothesis.words(sweep)}" for hypothesis in self.given]
        return "; ".join([*given, *(hypothesis.words(sweep) for hypothesis in self.all_of)])


@dataclass(frozen=True)
class Finding:
    """What a sweep says of a claim in one setting; empty where it has no setting that the claim is about."""

    claim: Claim
    setting: str
    given: list[Result]
    results: list[Result]

    @property
    def outcome(self) -> Outcome:
        """That of the hypotheses together, if what the claim presupposes holds."""
        outcomes = {result.outcome for result in self.results}
        if not outcomes or any(result.outcome != "supported" for result in self.given):
            return "not tested here"
        return next((outcome for outcome in _SETTLING if outcome in outcomes), "supported")

    @property
    def measured(self) -> str:
        """What was found, or why the claim was not tested."""
        if not self.results:
            return f"no runs of a {_MODELS[self.claim.models]}"
        missing = [result.measured for result in (*self.given, *self.results) if result.outcome == "not tested here"]
        failing = [
            f"what is given is {result.outcome}: {result.measured}"
            for result in self.given
            if result.outcome in ("not supported", "undecided")
        ]
        known = [result.measured for result in self.results if result.outcome != "not tested here"]
        if failing:
            return "; ".join(dict.fromkeys([*failing, *(f"all the same {measured}" for measured in known)]))
        known += [f"given {result.measured}" for result in self.given if result.worst]
        return "; ".join(dict.fromkeys(missing or known))


def load_claims(folder: Path | None = None) -> list[Claim]:
    """The claims of `conf/claims` and of a folder of one's own, whose files replace namesakes, in the order of sources.

    Raises:
        ConfigError: naming the file, the key, what is wrong with it and what to change.
    """
    files = {file.name: file for file in (conf_dir() / "claims").glob("*.yaml")}
    if folder is not None:
        own = {file.name: file for file in folder.glob("*.yaml")}
        if not own:
            raise ConfigError(f"{folder}: no claims there; give a folder of YAML files like those of conf/claims")
        files |= own
    return sorted((_load(files[name]) for name in sorted(files)), key=lambda claim: claim.source)


def findings(sweep: Sweep, claims: Sequence[Claim]) -> list[Finding]:
    """Every claim in every setting that it is about, and one finding without a setting where there is none."""
    rows: dict[Quantity, pd.DataFrame] = {}

    def results(hypotheses: Sequence[Hypothesis], setting: str) -> list[Result]:
        for quantity in (hypothesis.quantity for hypothesis in hypotheses):
            if quantity not in rows:
                rows[quantity] = quantity.rows(sweep)
        return [examine(sweep, hypothesis, rows[hypothesis.quantity], setting) for hypothesis in hypotheses]

    found = []
    for claim in claims:
        here = [
            Finding(claim, setting, results(claim.given, setting), results(claim.all_of, setting))
            for setting in _settings(sweep, claim.models)
        ]
        found += here or [Finding(claim, "", [], [])]
    return found


def claims_table(sweep: Sweep) -> Table:
    """Every claim with what the sweep says of it; empty where it says nothing of any. Raises as :func:`load_claims`."""
    found = findings(sweep, load_claims(sweep.claims))
    rows = [
        {
            "claim": one.claim.statement, "model": one.setting, "outcome": one.outcome, "measured": one.measured,
            "hypothesis": one.claim.words(sweep), "source": one.claim.source,
        }
        for one in found
    ]  # fmt: skip
    tested = any(one.outcome != "not tested here" for one in found)
    note = (
        "Supported: the 95 % interval, in brackets, lies wholly where the hypothesis says. Not supported: wholly "
        "elsewhere. Undecided: neither. Several hypotheses must hold together. Intervals: paired t of differences and, "
        "on a log scale, of ratios; Newcombe's of probabilities; studentised bootstrap of means; none is corrected for "
        "many claims. Scores are those at the end of the budget (of what is measured at every step, the mean over the "
        "last tenth of a run's steps), and runs that diverged or failed count as the worst; "
        "clip fractions, expert changes and costs are of finished runs. Two algorithms are compared on "
        f"{least_pairs(1)} equal seeds or more. Outcomes are about the models, tasks and budget of this sweep."
    )
    frame = pd.DataFrame(rows if tested else [])
    if frame.empty:
        return Table("claims", "Claims", note, frame)
    lacking = pd.Series([_lacking(sweep, one) for one in found])
    part = frame[lacking == ""]
    paper, places = _one_paper(part["source"])
    folded = [
        f"Not tested, for there are {reason}: {'; '.join(_with_models(own))}."
        for reason, own in frame[lacking != ""].groupby(lacking, sort=False)
    ]
    return Table("claims", "Claims", f"{note}{paper}", frame, part=part.assign(source=places), remarks=folded)


def _with_models(rows: pd.DataFrame) -> list[str]:
    """Each claim once, with the models in question, if there are any."""
    models = rows.groupby("claim", sort=False)["model"].agg(", ".join)
    return [f"{claim} ({on})" if on else str(claim) for claim, on in models.items()]


def _lacking(sweep: Sweep, one: Finding) -> str:
    """The runs without which a claim could not be tested, whatever the others say; nothing where there are all."""
    if not one.setting:
        return one.measured
    cells = sweep.cells[(sweep.cells["setting"] == one.setting) & (sweep.cells["status"] != "skipped")]
    hypotheses = (*one.claim.given, *one.claim.all_of)
    named = dict.fromkeys(name for hypothesis in hypotheses for name in hypothesis.algorithms)
    absent = [name for name in named if name not in set(cells["algorithm"])]
    return f"no runs of {' and '.join(absent)}" if absent else ""


def _one_paper(sources: pd.Series) -> tuple[str, pd.Series]:
    """What the note says of the paper that all sources are places in, and these places; else the sources as they are.

    A source is the paper, a comma, and the place in it.
    """
    parts = sources.str.rpartition(", ")
    papers = set(parts[0])
    return (f" Sources are in {papers.pop()}.", parts[2]) if len(papers) == 1 and all(papers) else ("", sources)


def _settings(sweep: Sweep, models: str) -> list[str]:
    """The settings whose model is of a kind."""
    choices = list(columns_of(sweep.runs, "moe/"))
    moe = set(sweep.runs.loc[sweep.runs[choices].notna().any(axis=1), "setting"])
    return [setting for setting in sweep.settings if models == "all" or (models == "moe") == (setting in moe)]


def _load(file: Path) -> Claim:
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    try:
        return build(Claim, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
