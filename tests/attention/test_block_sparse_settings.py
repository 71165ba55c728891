"""Settings of block-sparse attention: what goes together, and the way to JSON and back."""

import importlib

import jsonschema
import pytest

from dit_accel.attention.block_sparse import SCORES, BlockSparse, Sort, Window
from dit_accel.attention.methods import svg1
from dit_accel.attention.search import RULES
from dit_accel.errors import PolicyError
from dit_accel.settings import from_mapping, schema_of

NAMES = (
    "jenga",
    "adaspa",
    "pbs_attn",
    "proxyattn",
    "spargeattn",
    "svg1",
    "sliding_tile",
    "radial",
    "xattention",
    "vsa",
)


def published() -> dict[str, BlockSparse]:
    """Every set of settings in the method files."""
    found = {}
    for name in (*NAMES, "moba", "seer"):
        module = importlib.import_module(f"dit_accel.attention.methods.{name}")
        found[name] = module.settings("gates.safetensors") if name == "seer" else module.settings()
        found |= {f"{name}:{family}": each for family, each in getattr(module, "PUBLISHED", {}).items()}
    return found


@pytest.mark.parametrize("settings", published().values(), ids=published())
def test_published_settings_go_to_json_and_back(settings: BlockSparse) -> None:
    plain = settings.to_dict()
    jsonschema.validate(plain, schema_of(BlockSparse))
    assert from_mapping(BlockSparse, plain) == settings
    assert settings.score in SCORES and not settings.is_exact


def test_every_score_has_a_rule() -> None:
    assert set(RULES) == set(SCORES)


def test_every_field_says_what_it_does() -> None:
    for cls in (BlockSparse, Window, Sort):
        for name, field in schema_of(cls)["properties"].items():
            assert field.get("description"), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 0.0}, "nothing would be chosen"),
        ({"density": 1.5}, "at most 1"),
        ({"keep": ("text", "neighbours")}, "did you mean 'neighbors'"),
        ({"block_size": 72}, "a multiple of 16"),
        ({"tile": (4, 0, 4)}, "1 or more tokens"),
        ({"search_steps": (30, 10)}, "rising numbers"),
        ({"search_steps": (10,), "search_every": 5}, "both say when"),
        ({"stride": 4}, "belongs to the score 'antidiagonal'"),
        ({"groups": 2}, "belongs to the score 'proxy'"),
        ({"score": "antidiagonal", "stride": 24}, "a divisor of the block size"),
        ({"score": "window"}, "give a window of 'tile' or 'radial'"),
        ({"score": "frames", "window": Window("radial")}, "give a window of 'frames'"),
        ({"window": Window()}, "give the window null"),
        ({"sort": Sort(96)}, "a multiple of the block size"),
        ({"sort": Sort(), "score": "window", "window": Window()}, "leave one of them out"),
        ({"budget": "proxy"}, "goes with the score 'proxy' and a top_p"),
        ({"score": "gate"}, "name their file"),
        ({"impl": "fast"}, "allowed: auto"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_sentence(given: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        BlockSparse(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": (3, 0, 3)}, "1 or more of each"),
        ({"heads": ()}, "an empty list"),
        ({"of": "radial", "size": (5, 3, 3)}, "belongs to the window 'tile'"),
        ({"of": "tile", "decay": 0.2}, "belongs to the window 'radial'"),
    ],
    ids=str,
)
def test_windows_are_checked_as_well(given: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Window(**given)  # type: ignore[arg-type]


def test_exact_is_what_can_drop_nothing() -> None:
    assert BlockSparse(1.0).is_exact and BlockSparse(1.0, score="mass", budget="adaptive").is_exact
    assert not BlockSparse(0.99).is_exact and not BlockSparse(0.0, top_p=1.0).is_exact


def test_the_first_frame_is_seen_by_all_on_wan() -> None:
    assert "first_frame" in svg1.PUBLISHED["wan"].keep and "first_frame" not in svg1.PUBLISHED["hunyuan-video"].keep
