"""Policy: one value that says which mechanisms act on a pipeline, and how; saved as JSON or YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dit_accel.attention import BlockSparse
from dit_accel.cache import BlockCache
from dit_accel.errors import PolicyError, nearest
from dit_accel.files import write_atomically
from dit_accel.forecast import Forecast
from dit_accel.resolution import Progressive
from dit_accel.settings import Settings, from_mapping, schema_of, setting
from dit_accel.weights.vector_quant import VectorQuant

VERSION = 1
FIELDS = ("cache", "forecast", "weights", "attention", "resolution")
_FORMATS = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Policy(Settings):
    """The mechanisms, one field each; `Policy()` does nothing and is bit-exact.

    cache: when are blocks skipped; forecast: what stands in for them (`None` reuses the last residual); weights: how
    are linear layers stored (`None` leaves them as they are); attention: which key blocks does a query block see
    (`None` is dense); resolution: at which size are early steps made (`None` is full size).
    """

    cache: BlockCache | None = setting(None, "when are blocks skipped")
    forecast: Forecast | None = setting(None, "what stands in for a skipped block; null reuses the last residual")
    weights: VectorQuant | None = setting(None, "how are linear layers stored; null leaves them as they are")
    attention: BlockSparse | None = setting(None, "which key blocks does a query block see; null is dense")
    resolution: Progressive | None = setting(None, "at which size are early steps made; null is full size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forecast is not None and self.cache is None:
            raise PolicyError(
                "Policy.forecast is given without Policy.cache, so nothing would be skipped; add a BlockCache."
            )
        if self.cache is not None and self.cache.reference == "forecast" and self.predictor.anchors < 2:
            raise PolicyError(
                "BlockCache.reference is 'forecast', but nothing is forecast; add Forecast('newton', order=1) or more."
            )

        if self.cache is not None and self.cache.reference == "corrector" and not self.predictor.corrector:
            raise PolicyError(
                "BlockCache.reference is 'corrector', but nothing is corrected; give the forecast corrector=1 or more."
            )

    @property
    def predictor(self) -> Forecast:
        """The forecast in force: plain reuse where none is given."""
        return self.forecast or Forecast("reuse", order=0)

    @property
    def skips(self) -> bool:
        """True where blocks may be skipped."""
        return self.cache is not None and self.cache.can_skip

    @property
    def biases_text(self) -> bool:
        """True where stages of lower resolution attend more to the text."""
        return self.resolution is not None and self.resolution.text_bias != 0

    @property
    def is_sparse(self) -> bool:
        """True where attention may be computed in part."""
        return self.attention is not None and not self.attention.is_exact

    @property
    def is_staged(self) -> bool:
        """True where early steps are made at another size, or on another schedule."""
        return self.resolution is not None and not self.resolution.is_exact

    @property
    def acts_in_steps(self) -> bool:
        """True where denoising steps are not made as the plain pipeline makes them."""
        return self.skips or self.is_sparse or self.is_staged

    @property
    def is_exact(self) -> bool:
        """True where this policy cannot change any result."""
        return not self.acts_in_steps and self.weights is None

    @staticmethod
    def named(name: str, **overrides: Any) -> Policy:
        """A preset or published method by name; overrides are settings of its parts, or whole fields.

        "teacache:mochi" is a method with what was published for that family of models.

        >>> Policy.named("balanced", threshold=0.2).cache.threshold
        0.2
        """
        from dit_accel import presets

        policy = presets.named(name)
        whole = {key: overrides.pop(key, getattr(policy, key)) for key in FIELDS}
        parts = {key: value.to_dict() for key, value in whole.items() if isinstance(value, Settings)}
        owners = [*parts.values(), *(v for part in parts.values() for v in part.values() if isinstance(v, dict))]
        for key, value in overrides.items():
            owner = next((settings for settings in owners if key in settings), None)
            if owner is None:
                allowed = [*FIELDS, *(known for settings in owners for known in settings)]
                raise PolicyError(f"The policy {name!r} has no setting {key!r}; {nearest(key, allowed)}.")
            owner[key] = value.to_dict() if isinstance(value, Settings) else value
        return from_mapping(Policy, whole | parts)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Policy:
        """Inverse of `to_dict`; unknown keys are errors that name the nearest known one."""
        if not isinstance(data, Mapping):
            raise PolicyError(f"A policy is a mapping of {', '.join(FIELDS)}; got {type(data).__name__}.")
        fields = dict(data)
        version = fields.pop("version", VERSION)
        if version != VERSION:
            raise PolicyError(f"This policy has version {version!r}; this dit_accel reads version {VERSION}.")
        return from_mapping(Policy, fields)

    @staticmethod
    def schema() -> dict[str, Any]:
        """The published JSON Schema of policy files."""
        schema = schema_of(Policy)
        schema["properties"]["version"] = {"const": VERSION}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dit_accel policy"} | schema

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON or YAML, by the ending; the file is complete or absent."""
        path = _checked_path(path)
        data = {"version": VERSION} | self.to_dict()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        if not path.parent.is_dir():
            raise PolicyError(f"{path.parent} does not exist, so {path.name} cannot be saved; make the folder first.")
        write_atomically(path, text)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """Read a JSON or YAML policy file."""
        path = _checked_path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise PolicyError(f"The policy file {path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise PolicyError(f"The policy file {path} is not valid {path.suffix[1:].upper()}: {reason}.") from None
        return Policy.from_dict(data)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise PolicyError(f"{path} does not end in {', '.join(_FORMATS)}; policies are saved as JSON or YAML.")
    return path


def as_policy(policy: Policy | str | os.PathLike[str] | Mapping[str, Any]) -> Policy:
    """Accept a `Policy`, a preset or method name, a dictionary, or the path of a JSON or YAML file."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_dict(policy)
    if isinstance(policy, os.PathLike) or (isinstance(policy, str) and policy.endswith(_FORMATS)):
        return Policy.load(policy)
    if isinstance(policy, str):
        return Policy.named(policy)
    raise PolicyError(
        f"A policy was expected, got {type(policy).__name__}; give a Policy, a name, a mapping or a .json/.yaml file."
    )


def policies() -> dict[str, str]:
    """Names that `Policy.named` and `apply` accept, each with one sentence about it."""
    from dit_accel.presets import PRESETS

    return {name: preset.description for name, preset in PRESETS.items()}
