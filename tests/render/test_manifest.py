"""Manifests: what is read, ids and seeds, and one sentence with line and field for whatever is wrong."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dit_accel
from dit_accel import ManifestError
from dit_accel.cli import main
from dit_accel.render import load_manifest, prepare, schema
from dit_accel.render.item import id_of, seed_of
from dit_accel.render.manifest import parse_manifest
from dit_accel.render.plan import of_shard

ROOT = Path(dit_accel.__file__).parents[1]
FLUX = ROOT / "pipelines" / "tiny-flux"
NO = '{"prompt": "a"}\n'
GRID = "grid:\n  prompt: [a]\n"
# Name of the file, its content, the line and a word that the sentence has.
MALFORMED: list[tuple[str, str | bytes, int | None, str]] = [
    ("jobs.txt", NO, None, "ends in"),
    ("jobs.jsonl", "", 1, "no items"),
    ("jobs.jsonl", "\n \n", 1, "no items"),
    ("jobs.jsonl", NO + "{", 2, "no JSON"),
    ("jobs.jsonl", NO + '{"prompt": "b"', 2, "no JSON"),
    ("jobs.jsonl", NO + '{"prompt": "b"},', 2, "no JSON"),
    ("jobs.jsonl", NO + '{"prompt": "b"} {"prompt": "c"}', 2, "no JSON"),
    ("jobs.jsonl", "[" * 100_000, 1, "JSON"),
    ("jobs.jsonl", '{"prompt": "a", "x": ' + "[" * 20 + "]" * 20 + "}", 1, "x is nested"),
    ("jobs.jsonl", NO + "[1, 2]", 2, "give an object"),
    ("jobs.jsonl", NO + '"prompt"', 2, "give an object"),
    ("jobs.jsonl", NO + "null", 2, "give an object"),
    ("jobs.jsonl", NO + "{}", 2, "no prompt"),
    ("jobs.jsonl", NO + '{"id": "x"}', 2, "no prompt"),
    ("jobs.jsonl", NO + '{"prompt": null}', 2, "no prompt"),
    ("jobs.jsonl", b'{"prompt": "\xff\xfe"}\n', 1, "UTF-8"),
    ("jobs.jsonl", NO.encode() + b'{"prompt": "\xc3"}\n', 2, "UTF-8"),
    ("jobs.jsonl", '{"prompt": "a", "prompt": "b"}', 1, "prompt is given twice"),
    ("jobs.jsonl", '{"prompt": 3}', 1, "prompt is 3"),
    ("jobs.jsonl", '{"prompt": ["a", "b"]}', 1, "prompt is ['a', 'b']"),
    ("jobs.jsonl", '{"prompt": "\\ud800"}', 1, "prompt holds"),
    ("jobs.jsonl", '{"prompt": "\\u0000"}', 1, "prompt holds"),
    ("jobs.jsonl", json.dumps({"prompt": "a" * 20_001}), 1, "prompt has 20001"),
    ("jobs.jsonl", '{"prompt": "a", "negative_prompt": 1}', 1, "negative_prompt is 1"),
    ("jobs.jsonl", '{"prompt": "a", "height": "tall"}', 1, "height is 'tall'"),
    ("jobs.jsonl", '{"prompt": "a", "height": 0}', 1, "height is 0"),
    ("jobs.jsonl", '{"prompt": "a", "height": 32.5}', 1, "height is 32.5"),
    ("jobs.jsonl", '{"prompt": "a", "width": -32}', 1, "width is -32"),
    ("jobs.jsonl", '{"prompt": "a", "width": true}', 1, "width is True"),
    ("jobs.jsonl", '{"prompt": "a", "width": 1e400}', 1, "width"),
    ("jobs.jsonl", '{"prompt": "a", "num_inference_steps": 0}', 1, "num_inference_steps is 0"),
    ("jobs.jsonl", '{"prompt": "a", "num_inference_steps": 10001}', 1, "num_inference_steps is 10001"),
    ("jobs.jsonl", '{"prompt": "a", "guidance_scale": "3"}', 1, "guidance_scale is '3'"),
    ("jobs.jsonl", '{"prompt": "a", "guidance_scale": NaN}', 1, "JSON"),
    ("jobs.jsonl", '{"prompt": "a", "guidance_scale": 1e999}', 1, "guidance_scale"),
    ("jobs.jsonl", '{"prompt": "a", "seed": -1}', 1, "seed is -1"),
    ("jobs.jsonl", '{"prompt": "a", "seed": 1.5}', 1, "seed is 1.5"),
    ("jobs.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', 1, "seed is"),
    ("jobs.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", 1, "JSON"),
    ("jobs.jsonl", '{"prompt": "a", "max_sequence_length": ' + "9" * 40 + "}", 1, "max_sequence_length"),
    ("jobs.jsonl", '{"prompt": "a", "id": ""}', 1, "id is ''"),
    ("jobs.jsonl", '{"prompt": "a", "id": "../a"}', 1, "id is '../a'"),
    ("jobs.jsonl", '{"prompt": "a", "id": 7}', 1, "id is 7"),
    ("jobs.jsonl", NO + "\n" + NO, 3, "the item is the same as on line 1"),
    ("jobs.jsonl", '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}', 2, "id 'X' is the same as on line 1"),
    ("jobs.jsonl", '{"prompt": "a", "output": "../a.png"}', 1, "output '../a.png'"),
    ("jobs.jsonl", '{"prompt": "a", "output": "/tmp/a.png"}', 1, "output '/tmp/a.png'"),
    ("jobs.jsonl", '{"prompt": "a", "output": "a/../../b"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": "a\\\\b"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": "C:a"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": ".hidden"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": ".dit-accel/ledger"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": "con.png"}', 1, "device"),
    ("jobs.jsonl", '{"prompt": "a", "output": "' + "a" * 101 + '"}', 1, "100 bytes"),
    ("jobs.jsonl", '{"prompt": "a", "output": "' + "a/" * 110 + 'b"}', 1, "200 bytes"),
    ("jobs.jsonl", '{"prompt": "a", "output": "a "}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": ""}', 1, "output '' is empty"),
    ("jobs.jsonl", '{"prompt": "a", "output": "a\\u0007"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": ["a"]}', 1, "output is ['a']"),
    ("jobs.jsonl", '{"prompt": "a", "output": ".png"}', 1, "output"),
    ("jobs.jsonl", '{"prompt": "a", "output": "x.png"}\n{"prompt": "b", "output": "X.mp4"}', 2, "the file of line 1"),
    ("jobs.jsonl", '{"prompt": "a", "output": "é"}\n{"prompt": "b", "output": "e\u0301"}', 2, "the file of line 1"),
    ("jobs.jsonl", '{"prompt": "a", "output": "x.png/y"}', 1, "looks like a file"),
    ("jobs.jsonl", '{"prompt": "a", "heigth": 32}', 1, "did you mean 'height'"),
    ("jobs.jsonl", '{"prompt": "a", "num_frames": 8}', 1, "no argument 'num_frames'"),
    ("jobs.jsonl", '{"prompt": "a", "two words": 8}', 1, "'two words'"),
    ("jobs.jsonl", '{"prompt": "a", "generator": 8}', 1, "generator cannot be set"),
    ("jobs.jsonl", '{"prompt": "a", "num_images_per_prompt": 2}', 1, "num_images_per_prompt cannot be set"),
    ("jobs.jsonl", '{"prompt": "a", "prompt_embeds": [1.0]}', 1, "prompt_embeds cannot be set"),
    ("jobs.jsonl", '{"prompt": "a", "latents": [1.0]}', 1, "latents cannot be set"),
    ("jobs.jsonl", NO + '{"prompt": "b", "policy": "balnced"}', 2, "did you mean 'balanced'"),
    ("jobs.jsonl", NO + '{"prompt": "b", "policy": 3}', 2, "policy is 3"),
    ("jobs.jsonl", NO + '{"prompt": "b", "policy": {"cash": null}}', 2, "did you mean 'cache'"),
    ("jobs.jsonl", NO + '{"prompt": "b", "policy": {"cache": {"threshold": "low"}}}', 2, "threshold"),
    ("jobs.jsonl", NO + '{"prompt": "b", "policy": "absent.json"}', 2, "absent.json"),
    ("jobs.jsonl", NO + '{"guidance_scale": 3}', 2, "prompt is missing"),
    ("jobs.csv", "", 1, "no items"),
    ("jobs.csv", "prompt,height\n", 1, "no items"),
    ("jobs.csv", "prompt,height\na,32\nb\n", 3, "1 cells under 2 names"),
    ("jobs.csv", "prompt\na,b\n", 2, "2 cells under 1 names"),
    ("jobs.csv", "prompt,prompt\na,b\n", 1, "prompt is the name of two columns"),
    ("jobs.csv", "prompt,\na,b\n", 1, "column 2"),
    ("jobs.csv", 'prompt\n"a\n', 2, "no CSV"),
    ("jobs.csv", 'prompt\n"a"b\n', 2, "no CSV"),
    ("jobs.csv", "prompt\na\0\n", 2, "NUL"),
    ("jobs.csv", "prompt,height\na,tall\n", 2, "height is 'tall'"),
    ("jobs.csv", "prompt,seed\na,NaN\n", 2, "seed is 'NaN'"),
    ("jobs.csv", 'prompt,seed\n"a\nb",1\nc,x\n', 4, "seed is 'x'"),
    ("jobs.yaml", "", 1, "give a mapping"),
    ("jobs.yaml", "- a\n- b\n", 1, "give a mapping"),
    ("jobs.yaml", "grid:\n  prompt: [a\n", 3, "no YAML"),
    ("jobs.yaml", "grid:\n\tprompt: a\n", 2, "no YAML"),
    ("jobs.yaml", GRID + "gird: {}\n", 3, "did you mean 'grid'"),
    ("jobs.yaml", "defaults: {height: 32}\n", 1, "no items"),
    ("jobs.yaml", "defaults: [1]\n" + GRID, 1, "defaults are"),
    ("jobs.yaml", GRID + "defaults:\n  height: tall\n", 3, "height is 'tall'"),
    ("jobs.yaml", "grid:\n  prompt: []\n", 2, "prompt has no values"),
    ("jobs.yaml", GRID + "  id: [x, y]\n", 3, "id cannot be combined"),
    ("jobs.yaml", GRID + "  height: [32, tall]\n", 3, "height is 'tall'"),
    ("jobs.yaml", GRID + "  prompt: [b]\n", 3, "prompt is given twice"),
    ("jobs.yaml", "grid: 3\n", 1, "grid is 3"),
    ("jobs.yaml", "grid: [3]\n", 1, "a grid is 3"),
    ("jobs.yaml", "items: {prompt: a}\n", 1, "items is"),
    ("jobs.yaml", "items:\n  - prompt: a\n  - 3\n", 3, "an item is 3"),
    ("jobs.yaml", "items:\n  - &x {prompt: a}\n  - *x\n", 3, "alias"),
    ("jobs.yaml", "items:\n  - {prompt: !!python/object:os.system a}\n", 2, "no YAML"),
    ("jobs.yaml", "items:\n  - {prompt: 2020-01-01}\n", 2, "prompt is"),
    ("jobs.yaml", "items:\n  - {prompt: a, max_sequence_length: .nan}\n", 2, "max_sequence_length is nan"),
    ("jobs.yaml", "items:\n  - {prompt: a, 7: 8}\n", 2, "7 is no name"),
    ("jobs.yaml", "a: 1\n---\nb: 2\n", 2, "no YAML"),
    ("jobs.yaml", "grid:\n" + "".join(f"  a{n}: [{', '.join(map(str, range(20)))}]\n" for n in range(8)), 1, "items;"),
    ("jobs.yaml", "{" * 3000, None, "YAML"),
]


def test_there_are_enough_malformed_manifests() -> None:
    assert len(MALFORMED) >= 100


@pytest.mark.parametrize(("name", "content", "line", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_manifest_is_one_sentence_at_once(
    name: str, content: str | bytes, line: int | None, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs, out = tmp_path / name, tmp_path / "out"
    jobs.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    started = time.perf_counter()
    code = main(["render", str(jobs), "--pipeline", str(FLUX), "--out", str(out), "--policy", "none"])
    seconds = time.perf_counter() - started
    text, error = capfd.readouterr()
    assert code == 2 and not text and words in error, error
    assert error.startswith("dit-accel: ") and error.count("\n") == 1 and error.endswith(".\n"), error
    assert line is None or f"{name}, line {line}: " in error, error
    assert seconds < 1.0 and not out.exists() and len(error) < 1200


def test_a_malformed_manifest_loads_no_framework(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a", "heigth": 32}')
    program = (
        "import sys, time; start = time.perf_counter(); from dit_accel.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'diffusers', 'PIL') if name in sys.modules], code, "
        "time.perf_counter() - start)"
    )
    words = ["render", str(jobs), "--pipeline", str(FLUX), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, _, rest = done.stdout.partition("]")
    code, seconds = rest.split()
    assert loaded == "[" and code == "2" and float(seconds) < 1.0
    assert done.stderr.count("\n") == 1


def test_a_missing_manifest_and_a_missing_pipeline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(tmp_path / "x.csv"), "--pipeline", str(FLUX), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capfd.readouterr().err
    (tmp_path / "x.csv").write_text("prompt\na\n")
    for pipeline, words in ((tmp_path / "absent", "no folder"), (tmp_path, "no pipeline")):
        assert main(["render", str(tmp_path / "x.csv"), "--pipeline", str(pipeline), "--out", str(tmp_path / "o")]) == 2
        assert words in capfd.readouterr().err
    words = ["render", str(tmp_path / "x.csv"), "--pipeline", str(FLUX), "--out", str(tmp_path / "o"), "--policy", "x"]
    assert main(words) == 2 and "dit-accel: There is no policy named 'x'" in capfd.readouterr().err
    assert main(["render"]) == 2 and "JOBS and --pipeline and --out" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is read


def test_three_formats_say_the_same() -> None:
    lines = (
        '{"prompt": "a", "height": 32, "guidance_scale": 3, "seed": 5}\n\n{"prompt": "b, c", "guidance_scale": 3.0}\n'
    )
    table = '\ufeffprompt,height,guidance_scale,seed\na,32,3,5\n\n"b, c",,3.0,\n'.removeprefix("\ufeff")
    sweep = "defaults: {guidance_scale: 3}\nitems:\n- {prompt: a, height: 32, seed: 5}\n- prompt: b, c\n"
    found = [
        [(item.id, item.seed, dict(item.arguments), item.stem) for item in parse_manifest(text, suffix, "jobs")]
        for text, suffix in ((lines, ".jsonl"), (table, ".csv"), (sweep, ".yaml"))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0][1:3] == (5, {"prompt": "a", "height": 32, "guidance_scale": 3.0})


def test_a_sweep_is_every_combination() -> None:
    text = "defaults: {height: 32}\ngrid:\n- {prompt: [a, b], seed: [0, 1, 2]}\n- {prompt: c, policy: [fast, exact]}\n"
    items = parse_manifest(text, ".yaml", "jobs")
    assert [(item.prompt, item.seed) for item in items[:6]] == [(p, s) for p in "ab" for s in range(3)]
    assert [item.policy for item in items[6:]] == ["fast", "exact"]
    assert all(item.arguments["height"] == 32 for item in items) and items[-1].place == "jobs, line 4"


def test_ids_and_seeds_depend_on_the_item_alone() -> None:
    rows = [{"prompt": str(number), "height": 32} for number in range(50)]
    lines = [json.dumps(row) for row in rows]
    items = {item.id: item for item in parse_manifest("\n".join(lines), ".jsonl", "jobs")}
    turned = [json.dumps(dict(reversed(row.items()))) for row in reversed(rows)]
    again = {item.id: item for item in parse_manifest("\n".join(turned), ".jsonl", "jobs")}
    assert {key: item.seed for key, item in items.items()} == {key: item.seed for key, item in again.items()}
    assert len({item.seed for item in items.values()}) == 50
    other = parse_manifest("\n".join(lines), ".jsonl", "jobs", base_seed=1)
    assert [item.id for item in other] == [*items] and not {item.seed for item in other} & {
        item.seed for item in items.values()
    }
    assert id_of({"prompt": "a"}) == "252c40028335f9ab" and seed_of(0, "a") == 109902208105529, "as they ever were"


def test_files_are_named_after_prompts_and_ids() -> None:
    rows = [
        {"prompt": "Ä red  CAT / ../etc"},
        {"prompt": "x", "id": "one"},
        {"prompt": "猫"},
        {"prompt": "y", "id": "nul"},
    ]
    first, second, third, fourth = parse_manifest("\n".join(map(json.dumps, rows)), ".jsonl", "jobs")
    assert first.stem == f"a-red-cat-etc-{first.id}" and second.stem == "one"
    assert third.stem == third.id and fourth.stem == "nul_"


def test_shards_are_the_items_in_any_order(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps({"prompt": str(number)}) for number in range(31)))
    items = load_manifest(jobs)
    parts = [of_shard(items, (number, 4)) for number in range(4)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in items)
    assert [len(part) for part in parts] == [8, 8, 8, 7]
    turned = [of_shard(items[::-1], (number, 4)) for number in range(4)]
    assert [{item.id for item in part} for part in parts] == [{item.id for item in part} for part in turned]


def test_policy_files_are_beside_the_manifest(tmp_path: Path) -> None:
    dit_accel.Policy.named("fora").save(tmp_path / "mine.json")
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "policy": "mine.json"}')
    request = prepare(tmp_path / "jobs.jsonl", FLUX, tmp_path / "out", None)
    assert request.items[0].policy == dit_accel.Policy.named("fora").to_dict()
    assert request.items[0].policy_name == "mine.json" and request.ending == ".png"


# ---------------------------------------------------------------------------------------------------------- the schema


def test_the_schema_allows_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--schema"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert published == schema()
    check = jsonschema.Draft202012Validator(published)
    check.check_schema(published)
    policy = dit_accel.Policy.named("fora").to_dict()
    good: list[dict[str, Any]] = [
        {"prompt": "a", "seed": 3, "policy": "fast", "output": "a/b.png", "id": "x"},
        {"prompt": "a", "policy": policy, "max_sequence_length": 10, "guidance_scale": 3, "height": None},
        {"defaults": {"height": 32}, "grid": {"prompt": ["a", "b"], "seed": [0, 1]}},
        {"items": [{"prompt": "a"}]},
    ]
    assert [list(check.iter_errors(row)) for row in good] == [[], [], [], []]
    bad = [{"height": 0}, {"seed": -1}, {"prompt": 3}, {"id": "../x"}, {"generator": 1}, {"policy": {"cash": 1}}]
    assert all(not check.is_valid({"prompt": "a"} | row) for row in bad)


# ---------------------------------------------------------------------------------------------------- any text at all

SCALARS = st.sampled_from([None, True, 0, 1, 32, -1, 2**63, 10**30, 3.5, math.nan, math.inf]) | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
KEYS = st.sampled_from(["prompt", "id", "seed", "output", "height", "guidance_scale", "policy", "x", "two words"])
ROWS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), min_size=1, max_size=3)
ENDS = st.sampled_from([".jsonl", ".csv", ".yaml"])
NEAR = st.sampled_from([content for _, content, _, _ in MALFORMED if isinstance(content, str) and len(content) < 300])
MANIFESTS = st.one_of(
    st.tuples(ROWS.map(lambda rows: "\n".join(json.dumps(row) for row in rows)), st.just(".jsonl")),
    st.tuples(ROWS.map(lambda rows: json.dumps({"items": rows})), st.just(".yaml")),  # JSON is YAML
    st.tuples(st.text(max_size=60), ENDS),
    st.tuples(
        st.builds(lambda near, at, text: near[:at] + text + near[at:], NEAR, st.integers(0, 60), st.text(max_size=3)),
        ENDS,
    ),
)
EXAMPLES = 5000


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
@given(manifest=MANIFESTS)
def test_whatever_is_read_is_items_or_one_sentence(manifest: tuple[str, str]) -> None:
    text, suffix = manifest
    try:
        items = parse_manifest(text, suffix, "jobs")
    except ManifestError as error:
        assert re.match(r"jobs, line \d+: .+\.$", str(error), re.DOTALL) and len(str(error)) < 1500
        assert "\n" not in str(error)
    else:
        assert len({item.id for item in items}) == len(items) > 0
        for item in items:
            assert 0 <= item.seed < 2**63 and not item.stem.startswith(("/", ".")) and ".." not in item.stem.split("/")
