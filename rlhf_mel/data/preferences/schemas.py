"""Schemas of human preferences: which column plays which role, and what a row then says of two clips.

| adapter  | a row                                                      | seen in                               |
|----------|------------------------------------------------------------|---------------------------------------|
| `trl`    | `prompt`, `chosen`, `rejected`                             | TRL, declare-lab/audio-alpaca         |
| `winner` | two clips, the names of their models, the winner's name    | ai4bharat/SpeechArenaBench            |
| `votes`  | two clips (or URLs), each one's share of votes, by axis    | datapointai's three sizes, Rapidata     |
| `label`  | two clips, A, B or a tie, strengths by annotator           | RMSnow/SpeechJudge-Data               |
| `scores` | one clip and its score: MOS, MUSHRA (tables.py) | ljs-mos-120, SOMOS, nisqa-vcc-mos     |
| `joined` | the ids of two clips of another table, and the winner      | datapointai/...-preferences-315k      |

Column names are those of the data sets' cards; others are named by the user. verdicts.py says what the rows
mean. With `audio_from`, the clips of `scores` and `joined` are looked up in another table, by id, or by text and model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_mel.data.preferences.sources import Source
from rlhf_mel.data.preferences.verdicts import (
    Row,
    Verdict,
    label_verdicts,
    trl_verdicts,
    votes_verdicts,
    winner_verdicts,
)
from rlhf_mel.lookup import did_you_mean

CLIP = frozenset({"audio", "text"})
"""Kinds of column that can hold clips; text: paths or URLs."""
TEXT_ROLES = frozenset({"prompt", "reference_text"})


TEXTS = {
    "prompt": ("prompt", "target_text", "sentence", "text", "transcript", "spokentext"),
    "id": ("id", "index", "academic_prompt_id"),
    "voice": ("voice", "speaker", "speaker_id"),
    "annotator": ("annotator", "annotator_id", "user_id", "worker_id", "rater", "listener", "listener_id"),
    "reference_audio": ("reference_audio", "prompt"),  # SpeechJudge's `prompt` is a clip
    "reference_text": ("reference_text", "prompt_text"),
}
"""Roles of every schema, and the columns that play them."""
CLIP_IDS = ("audio", "audio_id", "clip_id", "sample_id", "filename", "file")
FIRST = ("audio_a", "audioA", "audio1", "audio_1")
SECOND = ("audio_b", "audioB", "audio2", "audio_2")
SEEDS = ("chosen_seed", "rejected_seed", "row")


@dataclass(frozen=True)
class Family:
    """Rows of one shape."""

    name: str
    needs: Mapping[str, Sequence[str]]
    """Columns by role that must be there, the first that is there wins."""
    may: Mapping[str, Sequence[str]] = field(default_factory=dict)
    clips: Sequence[str] = ("audio_a", "audio_b")
    """Which roles are clips."""
    verdicts: Callable[[Row, str | None], Iterator[Verdict]] | None = None
    """What a row says on an axis (None: overall); None for tables that are read as a whole."""

    @property
    def roles(self) -> set[str]:
        """All that a column can be."""
        return {*self.needs, *self.may, *TEXTS}


@dataclass(frozen=True)
class Schema:
    """Columns of one data set by the roles they play."""

    family: Family
    columns: Mapping[str, str]
    """Column by role."""
    label_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By role: names behind the numbers of a ClassLabel."""

    joined: bool = False
    """The clips are in another table, and what stands for them are ids."""

    @property
    def clip_roles(self) -> list[str]:
        """Roles whose columns hold clips."""
        clips = () if self.joined else self.family.clips
        return [role for role in (*clips, "reference_audio") if role in self.columns]

    def labels(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row's values by role, clips left out."""
        values = {role: row.get(column) for role, column in self.columns.items() if role not in self.clip_roles}
        for role, names in self.label_names.items():
            value = values.get(role)
            values[role] = names[value] if isinstance(value, int) and 0 <= value < len(names) else None
        return values


def find_schema(
    source: Source, *, adapter: str | None = None, columns: Mapping[str, str] | None = None, joined: bool = False
) -> Schema:
    """The schema of a table, by its columns and what is in them.

    Args:
        source: the table.
        adapter: name of the family; None: the first that fits, in the order of the module's table.
        columns: our roles to the data set's columns, where they differ.
        joined: the clips are in another table.

    Raises:
        ValueError: no family fits; the message says how to map the columns.
    """
    mapped = dict(columns or {})
    allowed = [family for family in FAMILIES if family.name == "scores" or (family.name == "joined") == joined]
    if adapter is not None and adapter not in {family.name for family in FAMILIES}:
        names = [family.name for family in FAMILIES]
        raise ValueError(f"adapter: expected one of {names}, got {adapter!r}{did_you_mean(adapter, names)}")
    if missing := [column for column in mapped.values() if column not in source.columns]:
        raise ValueError(f"{source.name}: expected columns {missing}, got {_listed(source)}; correct `columns`")
    if unknown := mapped.keys() - set().union(*(family.roles for family in FAMILIES)):
        raise ValueError(f"columns: expected roles of data/preferences/schemas.py, got {sorted(unknown)}")
    for family in allowed:
        if adapter in (None, family.name) and (found := _columns_of(family, source, mapped, joined)):
            label_names = {role: source.label_names.get(column, []) for role, column in found.items()}
            return Schema(family, found, {role: names for role, names in label_names.items() if names}, joined)
    raise ValueError(_unknown(source, adapter))


def _columns_of(family: Family, source: Source, mapped: Mapping[str, str], joined: bool) -> dict[str, str] | None:
    """Columns by role if the table has all that the family needs."""
    if not mapped.keys() <= family.roles:
        return None
    clips = frozenset() if joined else frozenset(family.clips)  # of a joined table these are ids
    ids = {"audio": CLIP_IDS} if joined and family.name == "scores" else {}
    found = dict(mapped)
    for role, names in {**family.needs, **family.may, **TEXTS, **ids}.items():
        fits = [name for name in names if name in source.columns and _fits(role, source.kinds[name], name, clips)]
        if role not in found and fits:
            found[role] = fits[0]
    if family.name == "votes" and "votes_a" not in found:
        found |= _vote_columns(source.columns)
    return found if _complete(family, found) and all(source.kinds[found[role]] in CLIP for role in clips) else None


def _complete(family: Family, found: Mapping[str, str]) -> bool:
    if family.name == "votes":
        return {*family.clips} <= found.keys() and any(role.startswith("votes_a") for role in found)
    by_id, by_model = {"audio_a", "audio_b"} <= found.keys(), {"prompt_id", "model_a", "model_b"} <= found.keys()
    return family.needs.keys() <= found.keys() and (family.name != "joined" or by_id or by_model)


def _fits(role: str, kind: str, name: str, clips: Collection[str]) -> bool:
    """Whether a column of this kind can play the role: there are `chosen` that are bools, `prompt` that are clips."""
    if role in clips:
        return kind in CLIP
    if role == "reference_audio":
        return kind == "audio" or (kind in CLIP and name == role)
    return kind in ("text", "unknown", "list") if role in TEXT_ROLES else kind != "audio"


_VOTES = re.compile(r"(?:(?P<axis>.+)_)?weighted_(?:score|results)_audio_(?P<side>[ab12])")


def _vote_columns(columns: Sequence[str]) -> dict[str, str]:
    """votes_a, votes_b, or with the axis behind a slash: Natural_weighted_score_audio_1 is votes_a/Natural."""
    found = {}
    for column in columns:
        if matched := _VOTES.fullmatch(column):
            side, axis = "b" if matched["side"] in "b2" else "a", matched["axis"]
            found[f"votes_{side}" + (f"/{axis}" if axis else "")] = column
            if axis and f"{axis}_detailedResults" in columns:
                found[f"answers/{axis}"] = f"{axis}_detailedResults"
    return found


def _listed(source: Source) -> str:
    named = ", ".join(f"{column} ({source.kinds[column]})" for column in source.columns)
    return named if len(named) < 900 else named[:900] + " ..."


def _unknown(source: Source, adapter: str | None) -> str:
    """What was seen, and the mapping that would do."""
    clips = [column for column in source.columns if source.kinds[column] == "audio"]
    named = [
        column for column in source.columns if source.kinds[column] == "text" and re.search("audio|wav|path", column)
    ]
    clips = (clips or named)[:2]
    others = [column for column in source.columns if column not in clips]
    label = next((name for name in others if re.search("prefer|winner|label|choice|vote|better", name, re.I)), "LABEL")
    score = next((name for name in others if re.search("mos|score|rating|mushra", name, re.I)), "SCORE")
    text = next((name for name in others if re.search("prompt|text|sentence|transcript", name, re.I)), "TEXT")
    guess = {
        0: "chosen=CHOSEN,rejected=REJECTED",
        1: f"audio={clips[0] if clips else ''},score={score}",
        2: f"chosen={clips[0]},rejected={clips[-1]}" if clips else "",
    }[len(clips)]
    guess += f",prompt={text}"
    if len(clips) == 2:
        guess += f" (if {clips[0]} always won), or --columns audio_a={clips[0]},audio_b={clips[1]},label={label}"
        guess += f",prompt={text}"
    wanted = f"of adapter {adapter!r}" if adapter else f"of one of the adapters {[family.name for family in FAMILIES]}"
    configs = (
        f" It has the configurations {source.configs[:20]}: config=..., audio_from=..." if source.configs[1:] else ""
    )
    return (
        f"{source.name}: expected the columns {wanted}, got {_listed(source)}; say which is which, for instance "
        f"--columns {guess}.{configs}"
    )


def parse_columns(text: str) -> dict[str, str]:
    """Roles to columns, of a command line's "chosen=audio_a,rejected=audio_b".

    Raises:
        ValueError: a part is not ROLE=COLUMN.
    """
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if bad := [role for role, equals, column in parts if not (role.strip() and equals and column.strip())]:
        raise ValueError(f"--columns: expected ROLE=COLUMN,ROLE=COLUMN, got {bad} in {text!r}")
    return {role.strip(): column.strip() for role, _, column in parts}


FAMILIES = (
    Family(
        "trl",
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        {name: (name,) for name in ("margin", "soft_label", "weight", "axis", *SEEDS)},
        clips=("chosen", "rejected"),
        verdicts=trl_verdicts,
    ),
    Family(
        "winner",
        {
            "audio_a": FIRST,
            "audio_b": SECOND,
            "model_a": ("model_a", "model1"),
            "model_b": ("model_b", "model2"),
            "winner": ("preference_model", "winner"),
        },
        {"ratings": ("fine_grained_eval",)},
        verdicts=winner_verdicts,
    ),
    Family(
        "votes",
        {"audio_a": FIRST, "audio_b": SECOND, "votes_a": ("votes_a",), "votes_b": ("votes_b",)},
        {"num_votes": ("num_annotations", "num_votes"), "answers": ("detailed_results",)},
        verdicts=votes_verdicts,
    ),
    Family(
        "label",
        {"audio_a": FIRST, "audio_b": SECOND, "label": ("naturalness_label", "label", "preference", "winner")},
        {"annotations": ("naturalness_annotation",), "axis": ("axis",)},
        verdicts=label_verdicts,
    ),
    Family(
        "scores",
        {"audio": ("audio", "wav"), "score": ("score", "mos", "MOS", "mushra", "rating")},
        {"prompt_id": ("prompt_id", "sentence_id", "file"), "axis": ("axis", "score_dimension")},
        clips=("audio",),
    ),
    Family(
        "joined",
        {"winner": ("winner", "preference", "label", "vote", "preferred")},
        {
            "audio_a": ("audio_a", "audio_a_id", "audio_id_a", "sample_a", "sample_a_id", "sample_id_a", "clip_a"),
            "audio_b": ("audio_b", "audio_b_id", "audio_id_b", "sample_b", "sample_b_id", "sample_id_b", "clip_b"),
            "model_a": ("model_a", "model1", "model_a_id"),
            "model_b": ("model_b", "model2", "model_b_id"),
            "prompt_id": ("prompt_id", "sentence_id"),
            "axis": ("axis",),
        },
        clips=(),
        verdicts=winner_verdicts,
    ),
)


# The table of clips that votes or scores are joined to.

CLIP_TABLE = Family(
    "clips",
    {"clip": ("audio", "wav", "clip")},
    {
        "clip_id": ("audio_id", "clip_id", "sample_id", "id", "filename", "file"),
        "clip_model": ("model", "model_id", "system", "system_id"),
        "clip_prompt_id": ("prompt_id", "sentence_id"),
    },
    clips=("clip",),
)


def find_clips(source: Source, columns: Mapping[str, str] | None = None) -> Schema:
    """Which columns of a table of clips hold them, their ids, and their texts.

    Raises:
        ValueError: there are no clips in it.
    """
    mapped = dict(columns or {})
    if missing := [column for column in mapped.values() if column not in source.columns]:
        raise ValueError(f"{source.name}: expected columns {missing}, got {_listed(source)}; correct `columns`")
    found = _columns_of(CLIP_TABLE, source, mapped, joined=False)
    if found is None:
        raise ValueError(
            f"{source.name}: expected a column of clips, got {_listed(source)}; add clip=COLUMN to --columns"
        )
    return Schema(CLIP_TABLE, found)
