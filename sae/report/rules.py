"""What one token, syntax label or position explains of a latent. Always named rules, never explanations.

The label is the statistics' rule, with its precision and recall. The evaluation scores rules by other definitions;
they are shown as what they are, below the label.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae.report.display import Segment, plain, show_text, show_tokens
from sae.report.numbers import short

DEFINITIONS: dict[str, str] = {
    "top_tenth": "of its top tenth",
    "mass": "of its activation",
    "top_20": "of its 20 strongest",
}
"""Columns of interpretability.parquet -> what the share is a share of. The first that passes is shown."""
TITLES = {"top_tenth": "top tenth of activations", "mass": "whole activation mass", "top_20": "20 strongest firings"}
_KINDS = {"token": "token", "previous token": "after", "label": "syntax"}


@dataclass(frozen=True)
class Label:
    """The rule that labels a latent."""

    kind: str
    name: list[Segment]
    precision: float
    """Share of the latent's firings that the rule names."""
    recall: float
    """Share of what the rule names on which the latent fires."""
    lift: float

    def dump(self) -> list[Any]:
        """For the page: [kind, segments of the name, precision, recall]."""
        return [self.kind, self.name, short(self.precision), short(self.recall)]


def latent_label(row: Mapping[str, Any]) -> Label | None:
    """The label of one row of latents.parquet. None: no rule is precise enough."""
    if row.get("rule_kind") is None:
        return None
    kind = _KINDS.get(row["rule_kind"], plain(row["rule_kind"], 40))
    token = row["rule_bytes"]
    name = show_tokens([token])[0] if token is not None else show_text(row["rule_name"])
    return Label(kind, name, row["rule_precision"], row["rule_recall"], row["rule_lift"])


@dataclass(frozen=True)
class Rule:
    """One token or label, and the share of a latent's firings it accounts for under one definition."""

    definition: str
    kind: str
    name: str
    share: float
    passes: bool

    def dump(self) -> list[Any]:
        """For the page: [kind, segments of the name, share, what it is a share of, passes]."""
        name: list[Segment] = show_text(self.name)
        return [
            _KINDS.get(self.kind, plain(self.kind)),
            name,
            round(self.share, 4),
            DEFINITIONS[self.definition],
            int(self.passes),
        ]


def rules_of(row: Mapping[str, Any]) -> list[Rule]:
    """The rules of one row of interpretability.parquet, one per definition that names something."""
    found = []
    for definition in DEFINITIONS:
        kind, name = row.get(f"{definition}_kind"), row.get(f"{definition}_name")
        share = row.get(f"{definition}_share")
        if kind and name is not None and share is not None and math.isfinite(share):
            found.append(Rule(definition, kind, str(name), float(share), bool(row.get(f"{definition}_passes"))))
    return found


def label_of(rules: list[Rule]) -> Rule | None:
    """The rule shown as label: the first that passes its definition. None: no rule does."""
    return next((rule for rule in rules if rule.passes), None)
