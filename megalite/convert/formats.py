"""Which program wrote a folder of weights, by the names of its files. Imports no torch."""

from pathlib import Path

from megalite.checkpoint.folder import list_iterations
from megalite.convert.published import CONFIG_JSON

FORMATS = {
    "hf": "a model of Hugging Face",
    "megatron": "checkpoints of Megatron-LM",
    "megalite": "checkpoints of megalite",
}
"""What a folder holds, by the names of --from."""
MEGATRON_FILES = ("mp_rank_*", ".metadata", "*.distcp")
"""In the folder of one checkpoint of Megatron-LM."""

WEIGHT_FILES = ("*.safetensors", "*.bin")
"""In a folder of Hugging Face."""


def formats_in(folder: Path) -> list[str]:
    """The formats whose files are in a folder, keys of FORMATS."""
    found = []
    if list_iterations(folder, replaced=True):
        found.append("megalite")
    for below in ("", "iter_*/", "release/"):
        if "megatron" not in found and _any_file(folder, MEGATRON_FILES, below):
            found.append("megatron")
    # Beside checkpoints of megalite, the config.json of a published model may be kept.
    if (folder / CONFIG_JSON).is_file() and _any_file(folder, WEIGHT_FILES):
        found.append("hf")
    return found


def _any_file(folder: Path, patterns: tuple[str, ...], below: str = "") -> bool:
    return any(next(folder.glob(below + pattern), None) for pattern in patterns)
