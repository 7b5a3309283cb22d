"""Which program wrote a folder of weights, by the names of its files. Imports no torch."""

from pathlib import Path

from megalite.checkpoint.folder import list_iterations
from megalite.convert.published import CONFIG_JSON

FORMATS = {
    "hf": "a folder of Hugging Face",
    "megatron": "checkpoints of Megatron-LM",
    "megalite": "checkpoints of megalite",
}
"""What a folder holds, by the names of --from."""
MEGATRON_FILES = ("mp_rank_*", ".metadata", "*.distcp")
"""In the folder of one checkpoint of Megatron-LM."""

WEIGHT_FILES = ("*.safetensors", "*.bin")
"""In a folder of Hugging Face."""


def format_of(folder: Path) -> str | None:
    """The format of a folder, a key of FORMATS; None where it is none of them."""
    if list_iterations(folder, replaced=True):
        return "megalite"  # what was converted has the config.json that it came from, too
    for pattern in MEGATRON_FILES:
        for below in ("", "iter_*/", "release/"):
            if any(folder.glob(below + pattern)):
                return "megatron"
    if (folder / CONFIG_JSON).is_file():
        for pattern in WEIGHT_FILES:
            if any(folder.glob(pattern)):
                return "hf"
    return None
