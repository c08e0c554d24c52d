"""The study: what the coordinator proposes and every site approves, as one typed, frozen record with one digest.

The schema is versioned; its canonical SHA-256 names the study in messages, caches, model files and reports.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from icmoe.backbones import BACKBONES, DEFAULT
from icmoe.config import Section, parse, read_toml
from icmoe.profiles import PROFILES, spelled_out
from icmoe.strategies import SERVER_OPTIMIZERS
from icmoe.study_privacy import Privacy

Count = Annotated[int, Field(ge=0, le=64)]
Weight = Annotated[float, Field(ge=0.0, le=100.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

if TYPE_CHECKING:
    BackboneName = str
    ServerOptimizer = str
else:
    BackboneName = Literal[tuple(BACKBONES)]
    ServerOptimizer = Literal[tuple(SERVER_OPTIMIZERS)]
View = Literal["identity", "flip", "dark", "bright"]
Cut = Literal["end", "last-stage"]
RobustRule = Literal["none", "trimmed-mean", "median", "multi-krum", "bulyan"]
# Sites that each rule needs for f malicious ones, as factor of f and constant.
_ROBUST: dict[str, tuple[int, int]] = {
    "none": (0, 1),
    "trimmed-mean": (2, 1),
    "median": (2, 1),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
}


class Code(Section):
    """A coded concept, such as SCT 108369006 "Neoplasm"."""

    scheme: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,16}$")]
    """Coding scheme as DICOM calls it: "SCT" for SNOMED CT."""
    value: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,16}$")]
    """Code."""
    meaning: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,()/_-]{0,63}$")]
    """What it means, in English."""


class Label(Section):
    """One class of the segmentation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,63}$")]
    """Name, as reports show it."""
    values: Annotated[tuple[Annotated[int, Field(ge=0, le=65535)], ...], Field(min_length=1)]
    """Mask values that mean this class."""
    category: Code | None = None
    """Property category of the class in DICOM SEG objects that a model writes; SCT 85756007 "Tissue" where it is not given."""
    kind: Code | None = None
    """Property type there, likewise."""

    @model_serializer(mode="wrap")
    def _codes_where_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave absent codes out: a study without them has the digest that it had before they existed."""
        return {key: value for key, value in handler(self).items() if value is not None}


class BackboneChoice(Section):
    """The frozen image encoder, known by the SHA-256 of its weights."""

    name: BackboneName = DEFAULT
    """Architecture."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the weights file."""
    image_size: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 128
    """Side of the square input, pixels."""
    block_features: bool = True
    """Whether intermediate blocks feed the laterals."""
    cut: Cut = "end"
    """Where the experts stand: on the embedding, or before the last stage, which stays frozen and runs in every step."""

    @model_serializer(mode="wrap")
    def _without_later_additions(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _written(self, write(self), later=("cut",))

    @property
    def told(self) -> str:
        """As people are shown it."""
        inside = "" if self.cut == "end" else ", experts before its last stage, which each step runs"
        return f"{self.name} {self.digest[:12]}, {self.image_size} px{inside}"


class ModelShape(Section):
    """IC-MoE's trained part; every ablation is a value here or in `LossWeights`."""

    basic_experts: Count = 2
    """Experts for local texture and edges."""
    semantic_experts: Count = 2
    """Experts with class prototypes attending to all pixels."""
    adaptive_experts: Count = 2
    """Experts modulated by the image's own pooled vector."""
    top_k: Annotated[int, Field(ge=1, le=64)] = 6
    """Experts fused per pixel; as many as there are, or more, fuses all. All beat two by 0.009 Dice on three seeds."""
    bottleneck: Annotated[int, Field(ge=4, le=512, multiple_of=4)] = 64
    """Channels inside an expert."""
    voting: bool = True
    """Pixel-probability adaptive voting; off: plain top-k of the router."""
    consensus: Annotated[float, Field(ge=0.0, le=20.0)] = 2.0
    """beta, weight of an expert's agreement with the consensus."""
    router_noise: Annotated[float, Field(ge=0.0, le=5.0)] = 0.1
    """Standard deviation of the noise on the router's logits in training."""

    @property
    def experts(self) -> int:
        """Number of experts M; 0 is the plain frozen backbone with its mask head."""
        return sum(getattr(self, name) for name in type(self).model_fields if name.endswith("_experts"))


class LossWeights(Section):
    """Weights of the loss terms; 0 switches a term off."""

    cross_entropy: Weight = 1.0
    """Pixel cross-entropy."""
    dice: Weight = 0.8
    """Soft Dice per image (SAMed's weight)."""
    vote: Weight = 0.3
    """Cross-entropy of the fused votes."""
    label_consistency: Weight = 0.1
    """KL from the experts' label fit to the router."""
    load_balance: Weight = 0.01
    """Even use of the experts (SegMoTE's weight)."""
    router_z: Weight = 0.001
    """Mean squared log-partition of the router."""
    contrast: Weight = 0.1
    """Semantic-guided contrast."""
    router_anchor: Weight = 0.0
    """KL from the round's global router to the local one."""


class Training(Section):
    """What a site does in one round."""

    local_epochs: Annotated[int, Field(ge=1, le=1000)] = 2
    """Passes over the site's training slices per round; two beat one by 0.02 validation Dice at equal rounds."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    """Slices per step."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-2
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate across rounds."""
    clip_norm: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """Largest norm of a step's gradient."""
    proximal_mu: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """FedProx: weight of half the squared distance to the round's global tensors."""
    untaught: Literal["unknown", "background"] = "unknown"
    """Whether classes that no training slice of a site shows, others being shown, count as unknown there: cross-entropy, Dice,
    votes and router neither teach nor unlearn them, while the contrast moves their prototypes all the same. Background where
    privacy is per patient, for which classes are shown depends on all patients together."""
    views: Annotated[tuple[View, ...], Field(min_length=1)] = ("identity", "flip")
    """Fixed views of each image that are encoded; one is drawn per step."""


def _written(section: Section, values: dict[str, Any], *, later: tuple[str, ...]) -> dict[str, Any]:
    """Leave later additions out where they have their defaults: a study keeps the digest under which sites approved it."""
    defaults = {key: type(section).model_fields[key].default for key in later}
    return {key: value for key, value in values.items() if key not in later or getattr(section, key) != defaults[key]}


class Aggregation(Section):
    """Router-aware FedAvg; `usage_exponent = 0` with `cap = 1.0` and `shrinkage = false` is FedAvg."""

    form: Literal["plain", "sums"] = "plain"
    """Whether the server looks at each update, or at weighted sums alone (no cap, a starved expert is kept)."""
    largest_size: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    """n_max of the sums form: a site's weight is n_k / n_max, and a larger site counts as this."""
    usage_exponent: Annotated[float, Field(ge=0.0, le=4.0)] = 1.0
    """t in n_k u_ke^t."""
    floor: Share = 0.1
    """eta: least share of a site's plain weight n_k / N."""
    cap: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Largest share of one site in an expert, where more than two sites take part."""
    min_contributors: Annotated[int, Field(ge=1, le=1000)] = 3
    """Sites that must really use an expert before usage decides its weights."""
    min_usage: Share = 0.02
    """Usage above which a site counts as contributor of an expert."""
    starved: Literal["keep", "plain"] = "plain"
    """Below `min_contributors`: keep the old expert (private mode) or weigh by n_k / N."""
    shrinkage: bool = True
    """Whether rarely used experts move less."""
    personal: bool = False
    """Adaptive experts and router stay at the site."""
    balance_step: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Per-round step of the balance bias towards even use."""
    optimizer: ServerOptimizer = "none"
    """Step of the server after the mean: adam and yogi are adaptive (Reddi et al., arXiv 2003.00295)."""
    server_learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] = 0.01
    """eta of the server's step; unused for "none"."""
    robust: RobustRule = "none"
    """Rule that bears malicious sites, applied to each expert and to the rest by itself, in place of the mean."""
    malicious_sites: Annotated[int, Field(ge=1, le=1000)] = 1
    """Sites that the robust rule bears; unused for "none"."""

    @property
    def least_sites(self) -> int:
        """Updates that the robust rule needs."""
        factor, more = _ROBUST[self.robust]
        return factor * self.malicious_sites + more

    @model_serializer(mode="wrap")
    def _without_later_additions(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _written(self, write(self), later=("form", "largest_size", "robust", "malicious_sites"))

    @model_validator(mode="after")
    def _sums_know_no_single_site(self) -> Aggregation:
        if self.form == "sums":
            if self.robust != "none":
                raise ValueError('form = "sums" shows no single update, which robust needs')
            if self.cap < 1.0 or (self.starved == "plain" and self.min_contributors > 1):
                raise ValueError('form = "sums" needs cap = 1.0 and starved = "keep": nobody sees one site\'s share')
            if self.usage_exponent != 1.0 and (self.shrinkage or self.balance_step > 0.0):
                what = "only usage_exponent = 1 lets sums tell the mean usage: shrinkage = false, balance_step = 0"
                raise ValueError(what)
        return self


class UpdateForm(Section):
    """How an update is written down on its way up; the global model comes down as float32 in any case."""

    form: Literal["float32", "int8"] = "float32"
    """float32 as trained, or int8: a byte per value and one per row, a fourth; what rounding leaves out is sent a round later."""


class UpdateBounds(Section):
    """What the server refuses of an update by its norm, all tensors together."""

    largest_norm: Annotated[float, Field(gt=0.0, le=1e9)] = 1000.0
    """Largest norm of an update."""
    median_factor: Annotated[float, Field(gt=1.0, le=1e6)] = 5.0
    """Largest norm in units of the round's median, from three updates on; unused under [privacy.server]."""


def _with_profile(schema: dict[str, Any]) -> None:
    """Let editors know the word that a study's file may have and the study itself has not."""
    told = "Stands for the values of `icmoe/profiles.py`; what the file names itself stays."
    schema["properties"]["profile"] = {"enum": list(PROFILES), "title": "Profile", "type": "string", "description": told}


class Study(Section):
    """One federated study."""

    model_config = ConfigDict(json_schema_extra=_with_profile)

    schema_version: Literal[1] = 1
    """Version of this schema."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Short name."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """Origin of every derived seed; recorded in every output."""
    rounds: Annotated[int, Field(ge=1, le=10000)] = 10
    """Number of rounds."""
    quorum: Annotated[int, Field(ge=1, le=10000)] = 1
    """Usable updates without which the global model does not move."""
    deadline_s: Annotated[float, Field(gt=0.0, le=7 * 86400.0)] = 3600.0
    """Seconds that a round waits for its sites."""
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    """Times that a round below its quorum is asked again, each within the deadline, before the run stops."""
    test_only: bool = False
    """Stamped on every output; the only studies that may use a seeded backbone."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=32)]
    """Classes; the first is the background."""
    backbone: BackboneChoice
    """The frozen encoder."""
    model: ModelShape = ModelShape()
    """The trained part."""
    loss: LossWeights = LossWeights()
    """Loss weights."""
    training: Training = Training()
    """Local training."""
    aggregation: Aggregation = Aggregation()
    """What the server does with the updates."""
    update: UpdateForm = UpdateForm()
    """Form of an update."""
    guard: UpdateBounds = UpdateBounds()
    """Bounds of an update."""
    privacy: Privacy = Privacy()
    """Differential privacy; none by default."""

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, labels: tuple[Label, ...]) -> tuple[Label, ...]:
        names = [label.name for label in labels]
        values = [value for label in labels for value in label.values]
        if len(set(names)) < len(names) or len(set(values)) < len(values):
            raise ValueError("each label name and each mask value once")
        return labels

    @model_validator(mode="after")
    def _test_backbone_only_in_tests(self) -> Study:
        if BACKBONES[self.backbone.name].seeded and not self.test_only:
            raise ValueError(f"{self.backbone.name} only with test_only = true")
        return self

    @model_validator(mode="after")
    def _backbone_has_the_cut(self) -> Study:
        if self.backbone.cut != "end" and not BACKBONES[self.backbone.name].staged:
            raise ValueError(f'{self.backbone.name} is not cut before its last stage: backbone.cut = "end"')
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> Study:
        every = set(LossWeights.model_fields) if self.model.experts else {"cross_entropy", "dice", "contrast"}
        if not any(getattr(self.loss, name) for name in every):
            kind = "every loss term" if self.model.experts else "every loss term that needs no experts"
            raise ValueError(f"{kind} is off: one of {', '.join(f'loss.{name}' for name in sorted(every))} above 0")
        return self

    @model_validator(mode="after")
    def _private_sum_depends_on_no_two_sites(self) -> Study:
        rule = self.aggregation
        coupled = rule.cap < 1.0 or rule.min_contributors > 1 or rule.shrinkage or rule.balance_step > 0.0
        if self.privacy.server is not None and coupled:
            wanted = "cap = 1.0, min_contributors = 1, shrinkage = false, balance_step = 0.0"
            raise ValueError(f"[privacy.server] needs {wanted}: nothing may depend on the sites together")
        return self

    @model_validator(mode="after")
    def _robust_rule_has_its_sites(self) -> Study:
        rule = self.aggregation
        if rule.robust != "none" and self.quorum < rule.least_sites:
            what = f'robust = "{rule.robust}" with malicious_sites = {rule.malicious_sites}'
            raise ValueError(f"{what} needs a quorum of {rule.least_sites}")
        if rule.robust != "none" and self.privacy.server is not None:
            raise ValueError("either [privacy.server] or aggregation.robust: a robust rule compares the sites")
        return self

    @model_serializer(mode="wrap")
    def _without_later_additions(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _written(self, write(self), later=("privacy", "update", "guard", "retries"))

    @property
    def classes(self) -> int:
        """Number of classes K, the background counted."""
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: the study's identity, 64 hexadecimal digits."""
        return hashlib.sha256(canonical(self).encode()).hexdigest()


def canonical(study: Study) -> str:
    """Return the study as JSON with sorted keys, no white space and every default but those of later additions spelled out."""
    return canonical_json(study.model_dump(mode="json"))


def canonical_json(values: dict[str, Any]) -> str:
    """Return plain values as JSON with sorted keys and no white space."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def read_study(path: Path) -> Study:
    """Return the study of a TOML file; `profile = "lite"` in it stands for the values of `icmoe/profiles.py`.

    Raises
    ------
    IcmoeError
        201-205, every fault of the file at once.
    """
    return parse(Study, spelled_out(read_toml(path), where=str(path)), where=str(path))


def taught_alone(study: Study) -> Study:
    """Return the study as one trains it whom nobody else teaches: what no training slice shows is background."""
    return study.model_copy(update={"training": study.training.model_copy(update={"untaught": "background"})})


def derived_seed(study: Study, *parts: str | int) -> int:
    """Return a seed in [0, 2^63) for one purpose, such as ("train", site, round), fixed by the study's seed alone.

    The aggregation method does not enter, so that methods are compared on the same draws.
    """
    text = "/".join([str(study.seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_digest(text: str) -> bool:
    """Return whether `text` is a SHA-256 in lower-case hexadecimal."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
