"""model.json: everything about a model except its arrays."""

import json
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import qtale_jax
from qtale_jax.artifact.integrity import FileRecord
from qtale_jax.errors import InputError
from qtale_jax.models.specification import ModelSpecification

FORMAT = 1
"""Version of the layout; readers refuse newer ones."""


@dataclass(frozen=True)
class ModelDocument:
    """What model.json says.

    Attributes:
        spec: the static half of the model.
        provenance: where the model comes from: stage, parent, configuration, seeds.
        versions: versions of the packages that wrote it.
        files: size and checksum of every file below arrays/.
    """

    spec: ModelSpecification
    provenance: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes model.json into `directory`."""
        document = {
            "format": FORMAT,
            "versions": self.versions,
            "specification": self.spec.model_dump(mode="json"),
            "provenance": self.provenance,
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        text = json.dumps(document, indent=1, ensure_ascii=False)
        (directory / "model.json").write_text(text + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the packages that make a model."""
    packages = ("jax", "flax", "orbax-checkpoint", "qwix", "optax")
    return {"qtale_jax": qtale_jax.__version__} | {name: metadata.version(name) for name in packages}


def _beside(path: Path) -> str:
    """Names the model directories that stand where one is missing."""
    found = sorted(file.parent.name for file in path.parent.glob("*/model.json"))
    return f"; {path.parent} has {', '.join(found)}" if found else ""


def read_model_json(path: str | Path) -> ModelDocument:
    """Reads what a model is without touching its arrays.

    Raises:
        InputError: not there, not a model directory, damaged, or written by a newer version.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such model directory{_beside(path)}")
    file = path / "model.json"
    if not file.is_file():
        hint = "; convert Hugging Face checkpoints with qtale_jax.convert" if (path / "config.json").exists() else ""
        raise InputError(f"{path} is not a model directory: model.json is missing{hint}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = int(document["format"])
        if found > FORMAT:
            raise InputError(f"{file}: format {found} is newer than what this version reads ({FORMAT})")
        return ModelDocument(
            ModelSpecification.model_validate(document["specification"]),
            dict(document["provenance"]),
            dict(document["versions"]),
            {name: FileRecord(int(entry["bytes"]), int(entry["crc32"])) for name, entry in document["files"].items()},
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("specification", *first["loc"])))
        raise InputError(f"{file}: {key}: {first['msg']}, found {first['input']!r:.80}") from error
    except KeyError as error:
        raise InputError(f"{file} is damaged: key {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged or truncated: {error}") from error
