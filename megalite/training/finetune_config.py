"""The settings of fine-tuning, and the description that is saved with a classifier.

Imports no torch.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from megalite.config.problem import ConfigError
from megalite.config.run import RunConfig, from_flat, to_flat, with_values
from megalite.data.classification import Columns
from megalite.data.config import TOKENIZER_FILES
from megalite.data.indexed import DatasetError
from megalite.data.masking import SpecialIds, special_ids
from megalite.data.tokenizers import Tokenizer, TokenizerError, trained_tokenizer
from megalite.fields import Field
from megalite.system.errors import error_message

DESCRIPTION_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.safetensors"


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of fine-tuning. The defaults are in the ranges of Devlin et al. 2018, A.3."""

    epochs: Annotated[int, Field(minimum=1)] = 3
    """Passes over the training examples."""
    batch_size: Annotated[int, Field(minimum=1)] = 32
    """Examples in a step, also in evaluation."""
    lr: Annotated[float, Field(above=0)] = 5e-5
    """Highest learning rate; after the warm-up it decays linearly, to 0 after the last step."""
    weight_decay: Annotated[float, Field(minimum=0)] = 0.01
    """Weight decay of AdamW; biases and norms are left out."""
    warmup_fraction: Annotated[float, Field(minimum=0, below=1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    dropout: Annotated[float, Field(minimum=0, below=1)] = 0.1
    """Dropout of the pooled output. The encoder keeps the checkpoint's dropout."""
    freeze_encoder: bool = False
    """Train the pooler and the classifier's layer only."""
    seed: int = 1234
    """Seed of the order, of dropout, of the new weights, and of --valid-share."""


@dataclass(frozen=True)
class ClassifierDescription:
    """What is saved beside the weights of a classifier: this as JSON, and the tokenizer's file."""

    classes: list[str]
    columns: Columns
    seq_length: int
    """Tokens that a row is cut to."""
    config: RunConfig
    """Configuration of the run that pretrained the encoder. Its data section is that of the
    tokenizer in use."""
    tokenizer_sha256: str
    """Digest of the tokenizer, to recognize another one."""

    def write(self, folder: Path) -> None:
        """Write the JSON file, and a copy of the tokenizer's file, into a folder."""
        (field,) = TOKENIZER_FILES[self.config.data.tokenizer_type]
        source = Path(getattr(self.config.data, field))
        if source.is_dir():
            source /= "tokenizer.json"
        shutil.copyfile(source, folder / source.name)
        kept = replace(self, config=with_values(self.config, {field: source.name}))
        fields = asdict(kept) | {"config": to_flat(kept.config)}
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        (folder / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> "ClassifierDescription":
        """Read what `write` wrote. Raises DatasetError if it is missing or incomplete."""
        path = Path(folder) / DESCRIPTION_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            config = from_flat(fields.pop("config"))
            (field,) = TOKENIZER_FILES[config.data.tokenizer_type]
            config = with_values(config, {field: str(Path(folder) / getattr(config.data, field))})
            return cls(config=config, columns=Columns(**fields.pop("columns")), **fields)
        except (OSError, ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
            what = "no classifier that tools/finetune_classifier.py saved"
            raise DatasetError(f"{path}: {what}: {error_message(error)}") from None

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises TokenizerError if it is not the one that the classifier was trained with.
        """
        tokenizer, _ = bert_tokenizer(self.config)
        if tokenizer.sha256 != self.tokenizer_sha256:
            problem = "is not the one that the classifier was trained with"
            raise TokenizerError(f"the tokenizer's file {problem}")
        return tokenizer


def bert_tokenizer(config: RunConfig) -> tuple[Tokenizer, SpecialIds]:
    """Build the tokenizer of a BERT's configuration, and find the ids that frame its rows.

    Raises TokenizerError if no tokenizer is named, it cannot be built, has no such ids, or has more
    entries than the model's vocabulary.
    """
    tokenizer = trained_tokenizer(config.data, config.model.vocab_size)
    return tokenizer, special_ids(tokenizer)
