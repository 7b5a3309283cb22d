"""config.json of Hugging Face from and to fields of ModelConfig. Imports no torch."""

from dataclasses import asdict, fields
from typing import Any

from megalite.convert.keys import Findings, Values, bounds_of
from megalite.convert.tables import ARCHITECTURES, HARMLESS, Architecture
from megalite.nn.config import ModelConfig

OWN_FIELDS = frozenset(field.name for field in fields(ModelConfig))


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The architecture that a config.json names. Raises ValueError."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type is {kind!r}; megalite knows {known}")
    return ARCHITECTURES[kind]


def class_of(config: dict[str, Any], architecture: Architecture) -> str:
    """The class of transformers that a config.json names. Raises ValueError."""
    names = config.get("architectures") or [next(iter(architecture.classes))]
    one = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(one, str) or one not in architecture.classes:
        known = ", ".join(architecture.classes)
        raise ValueError(f"architectures is {names!r}; megalite knows one of {known}")
    return one


def read_fields(config: dict[str, Any], found: Findings) -> Values:
    """Fields of ModelConfig (and bert_pair) from a config.json; adds to `found` everything that
    cannot be translated."""
    try:
        architecture = architecture_of(config)
    except ValueError as error:
        found.problems.append(str(error))
        found.shapes_known = False
        return {}
    values: Values = {"architecture": architecture.ours}
    try:
        name = class_of(config, architecture)
        absent = architecture.classes[name]
        if architecture.ours == "bert" and "mlm_head." not in absent:
            values["bert_pair"] = "none" if "pooler." in absent else "nsp"
    except ValueError as error:
        found.problems.append(str(error))
        found.shapes_known = False
    known = set(HARMLESS)
    for keys in architecture.keys:
        before = len(found.problems)
        values |= keys.read(config, found)
        if len(found.problems) > before and not all(map(_keeps_shapes, keys.fields)):
            found.shapes_known = False
        known |= set(keys.names)
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value not in (None, False):
            found.problems.append(
                f"{key} is {value!r}, and megalite does not know this key: remove it if it changes "
                "no number that the model computes"
            )
    return values


def _keeps_shapes(field: str) -> bool:
    """Whether no shape of a tensor depends on a field of ModelConfig."""
    bounds = bounds_of(field)
    return bounds.keeps_shapes or not bounds.defines_model


def write_keys(model: ModelConfig, architecture: Architecture, found: Findings) -> Values:
    """Keys of a config.json for this model; adds to `found` what the architecture cannot
    express."""
    values = asdict(model.filled())
    if architecture.ours != model.architecture:
        found.problems.append(f"a {model.architecture.upper()} is no {architecture.model_type}")
        return {}
    written: Values = {}
    for keys in architecture.keys:
        written |= keys.write(values, found)
    return written | {"model_type": architecture.model_type}


def architecture_for(model: ModelConfig, wanted: str | None) -> tuple[Architecture, Values]:
    """The first architecture that can express a model, or the wanted one, and keys of its
    config.json. Raises ValueError that says for each why it cannot."""
    reasons = []
    for kind in [wanted] if wanted else ARCHITECTURES:
        architecture = ARCHITECTURES[kind]
        if architecture.ours != model.architecture and not wanted:
            continue
        found = Findings()
        keys = write_keys(model, architecture, found)
        if not found.problems:
            return architecture, keys
        reasons.append(f"{kind}: {'; '.join(found.problems)}")
    lines = "\n  ".join(reasons)
    heading = "no architecture of Hugging Face that megalite knows can express this model:"
    if wanted:
        heading = "the wanted architecture of Hugging Face cannot express this model:"
    raise ValueError(f"{heading}\n  {lines}")
