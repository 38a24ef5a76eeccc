"""The hub's model card of a bundle: what it is, what was measured of it, its limits and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streetvision.core.escaping import markdown

if TYPE_CHECKING:
    from streetvision.bundle.publish import Submission

# Rows of the table of results: key in the report, how the card calls it.
_RESULTS = (
    ("mcc", "MCC"), ("accuracy", "accuracy"), ("fnr", "missed roadwork (FNR)"),
    ("fpr", "false alarms (FPR)"), ("roc_auc", "ROC AUC"), ("ece", "ECE"), ("log_loss", "log loss"),
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known of a bundle.

    Attributes
    ----------
    document: `bundle.json`
    evaluation, challenge, data: `metrics/*.json`; the first two None where they are not of this bundle
    recorded_licence: what timm says of pretrained weights of the backbone's name
    fold: record of the folded model that is published with it, if one is
    """

    document: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    challenge: Mapping[str, Any] | None
    data: Mapping[str, Any]
    recorded_licence: str | None
    fold: Mapping[str, Any] | None

    @property
    def backbone(self) -> str:
        """Its timm name."""
        return str(self.document["classifier"]["backbone"])

    @property
    def sources(self) -> Mapping[str, Any]:
        """Images and positives by the name of their source."""
        sources: Mapping[str, Any] = self.data["sources"]
        return sources


def hub_card(submission: Submission, facts: Facts) -> str:
    """The `README.md` of the repository, with the hub's metadata at its top."""
    answer = "the probability that it shows roadwork; above 0.5, strictly, is roadwork"
    sections = [
        _metadata(facts),
        f"# {markdown(submission.name)}\n\n{markdown(submission.description)}",
        f"Version {markdown(submission.version)}. One answer per image: {answer}.",
        f"## Results\n\n{_results(facts)}",
        f"## Expected pay\n\n{_challenge(facts)}",
        f"## Limits\n\n{_limits(facts)}",
        f"## Licences\n\n{_licences(submission, facts)}",
        f"## Use\n\n{_use(facts)}",
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(facts: Facts) -> str:
    lines = ["license: other", "pipeline_tag: image-classification"]
    lines.append(f"library_name: {'timm' if facts.fold is None else 'transformers'}")
    lines += ["tags:", *(f"- {tag}" for tag in ("roadwork", "street-images", "bittensor", "natix"))]
    return "\n".join(["---", *lines, "---"])


def _results(facts: Facts) -> str:
    report = facts.evaluation
    if report is None:
        return "Not measured."
    intervals = report["served_interval"]
    rows = ["| | value | 95 % interval |", "|---|---|---|"]
    for key, name in _RESULTS:
        found = (intervals or {}).get(key)
        between = f"{found['low']:.3f} – {found['high']:.3f}" if found else "–"
        rows.append(f"| {name} | {report['served'][key]:.3f} | {between} |")
    floor = report["ece_detail"]["noise_floor"]
    groups = f"{report['n_groups']} groups (drives, places)"
    if "effective_groups" in report:
        groups += (
            f", which tell as much as {min(report['effective_groups'].values()):.1f} of equal size,"
        )
    text = (
        f"On {report['n']:,} test images of {groups} that nothing was "
        f"fitted on, weighted to a share of roadwork of {report['served_prior']}. Intervals count groups "
        f"({report['interval_method']}); a perfectly calibrated model of that size has an ECE of {floor:.3f}."
    )
    return f"{text}\n\n" + "\n".join(rows)


def _challenge(facts: Facts) -> str:
    report = facts.challenge
    if report is None:
        return "The subnet's challenges were not rendered for this bundle: nothing is known of its pay."
    reward = report["reward"]
    rows = ["| validator | MCC | accuracy | expected reward |", "|---|---|---|---|"]
    for name, each in report["validators"].items():
        paid = each["reward"]["mean"]
        rows.append(f"| {name} | {each['mcc']:.3f} | {each['accuracy']:.3f} | {paid:.3f} |")
    between = (
        f" (95 % interval {reward['low']:.3f} – {reward['high']:.3f})"
        if reward.get("low") is not None and reward.get("high") is not None
        else ""
    )
    text = (
        f"On {report['n']:,} test images as the subnet's validators sent them, `{report['validator']}` last: "
        f"expected reward per challenge {reward['mean']:.3f}{between}. {report['status']}"
    )
    return f"{text}\n\n" + "\n".join(rows)


def _limits(facts: Facts) -> str:
    sources = ", ".join(
        f"{markdown(name)} ({each['images']:,} images, {each['positives']:,} of roadwork)"
        for name, each in sorted(facts.sources.items())
    )
    fit = facts.document["classifier"]["preprocessing"]
    limits = [f"Trained, calibrated and tested on: {sources}. It says nothing about other images."]
    if facts.challenge is not None and "unmeasured" in facts.challenge:
        limits.append(markdown(str(facts.challenge["unmeasured"])))
    limits.append(
        f"An image is seen at {fit['width']} × {fit['height']} pixels; what is smaller than a few of these is "
        "not seen."
    )
    limits.append("It is no safety device: it is not to be relied on where people work.")
    if facts.fold is not None:
        limits.append(
            "The model at the root always answers, with one view; for images that are not square it shows "
            f"the network {facts.fold['other_shapes']}."
        )
        if facts.fold["approximation"] is not None:
            from streetvision.bundle.folded import describe_cost

            limits.append(
                f"Its policy is approximate. {describe_cost(facts.fold['approximation'])}."
            )
    return "\n".join(f"- {line}" for line in limits)


def _licences(submission: Submission, facts: Facts) -> str:
    recorded = ""
    if facts.recorded_licence:
        recorded = f" (timm records {markdown(facts.recorded_licence)} for pretrained weights of that name)"
    data = ", ".join(map(markdown, sorted(facts.sources)))
    return "\n".join(
        [
            f"- Backbone {markdown(facts.backbone)}: {markdown(submission.backbone_licence)}{recorded}.",
            f"- Training data ({data}): {markdown(submission.data_licence)}.",
            "- The code that made it, StreetVision: Apache-2.0.",
        ]
    )


def _use(facts: Facts) -> str:
    folder = "" if facts.fold is None else " / 'bundle'"
    bundle = (
        "from pathlib import Path\n"
        "from huggingface_hub import snapshot_download\n"
        "from streetvision.bundle import Predictor\n\n"
        f"predictor = Predictor.load(Path(snapshot_download(repo)){folder})\n"
        "predictor('street.jpg')"
    )
    text = f"The bundle, with every check of its files:\n\n```python\n{bundle}\n```"
    if facts.fold is None:
        return text
    stock = (
        "from transformers import pipeline\n\n"
        "pipeline('image-classification', model=repo)('street.jpg')"
    )
    needs = facts.fold["needs_transformers"]
    return f"{text}\n\nOr with stock transformers >= {needs}:\n\n```python\n{stock}\n```"
