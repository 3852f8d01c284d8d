"""What a replay of a run on another backend leaves: files that `compare` reads."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slimbridge.errors import RunError


class ReplayStage(BaseModel):
    """One stage of the reference, done again elsewhere from the reference's own weights.

    Attributes:
        name: the stage's folder name.
        macs: of the model after the stage.
        decided: was a decision made?
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    macs: int
    decided: bool


class Replay(BaseModel):
    """A replay: the backend that did it, the digest of the reference's final weights, its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    reference_digest: str
    stages: tuple[ReplayStage, ...]


def read_replay(folder: Path) -> Replay:
    """Read replay.json; RunError when it is missing or damaged."""
    path = folder / "replay.json"
    try:
        return Replay.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{path}: not a replay: {str(error).splitlines()[0]}") from error
