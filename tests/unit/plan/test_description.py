"""plan.json: every field is checked and covered by the digest, in current and earlier versions."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_files import changed
from hand_plans import CODED, random_plan
from paged_plans import paged
from safetensors.torch import load_file, save_file
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.plan import description
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.plan_files import check_plan_files

SAVED = Path(__file__).parents[2] / "golden" / "saved" / "folder" / "plan"  # of version 3
STRANGE: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    10**400,
    1 << 40,
    1e300,
    True,
    None,
    "",
    "0; system()",
    [],
    {},
    [[]],
)


def fields(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield every place in a JSON value, but only the first item of lists."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from fields(item, *path, name)


def nudged(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {**value, "extra": 1} if isinstance(value, dict) else [*value, value[0]] if value else [1]


def written(folder: Path, described: Any) -> Path:
    (folder / "plan.json").write_text(json.dumps(described))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FhoptError) as caught:
        LatentPlan.load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and "Fit the plan again" in message
    return message


@pytest.fixture(scope="module")
def full(llama: FittedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with pages, evidence and a quality card."""
    plan = paged(random_plan("head", CODED), fill=True, lift=1.5)
    loss = dict(tokens=5, exact=2.0, plan=2.1, increase_percent=5.0, increase_percent_ci=[1.0, 9.0], kl=0.1)
    quality = {"texts": {"topics": loss}, "tasks": {"copy": {"items": 5, "exact": 100.0, "plan": 80.0}}}
    about = dict(llama.plan(4).provenance) | {"quality": quality, "texts": ["topics"], "tokens": 5, "seed": 0}
    return plan.with_provenance(**about).save(tmp_path_factory.mktemp("full") / "plan")


def test_every_change_of_one_field_is_refused(full: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "plan"))
    described = json.loads((full / "plan.json").read_text())
    places = list(fields(described))
    assert len(places) > 60
    for path in places:
        value = described
        for name in path:
            value = value[name]
        for other in (nudged(value), ..., *STRANGE[:3]):
            refusal(written(folder, changed(described, path, other)))
    assert LatentPlan.load(full).digest() == LatentPlan.load(written(folder, described)).digest()


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_a_forged_field_gives_one_sentence_or_a_plan(value: Any, full: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "plan"))
    described = json.loads((full / "plan.json").read_text())
    tensors = (full / "plan.safetensors").read_bytes()
    for path in fields(described):
        forged = changed(described, path, value)
        if path[0] not in ("checksum", "tensors_sha256", "version"):
            forged = description.covered(forged, tensors)
        written(folder, forged)
        try:
            LatentPlan.load(folder)
        except FhoptError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:  # its values are unchanged: digest and tensors are those of the plan
            assert path[0] == "provenance" or forged == described


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_fields_of_an_earlier_version_are_also_checked(value: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED, tmp_path / "plan"))
    described = json.loads((SAVED / "plan.json").read_text())
    for path in fields({k: v for k, v in described.items() if k != "provenance"}):
        refusal(written(folder, changed(described, path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("provenance", "fingerprint"), 5),
        (("provenance", "weights"), ["a"]),
        (("provenance", "tokens"), "many"),
        (("provenance", "texts"), "topics"),
        (("provenance", "ratio"), math.nan),
        (("provenance", "evidence", "curve", 0, "nats"), "low"),
        (("provenance", "evidence", "sites"), []),
        (("provenance", "quality"), {"texts": {"topics": {"kl": 1.0}}}),
        (("provenance", "pages"), {"read": {"layers.0": 2.0}}),
        (("provenance", "gate"), {"texts": ["topics"]}),
        (("provenance",), []),
    ],
)
def test_provenance_is_typed(path: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED, tmp_path / "plan"))
    described = json.loads((SAVED / "plan.json").read_text())
    assert f"{path[0]}" in refusal(written(folder, changed(described, path, value)))


def test_a_version_cannot_be_lowered(full: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "plan"))
    described = json.loads((full / "plan.json").read_text())
    for version in (3, 4, 5):
        refusal(written(folder, described | {"version": version}))
        bare = {k: v for k, v in described.items() if k not in ("checksum", "tensors_sha256")}
        if version != 4:  # a plan with pages is version 4, so its writer may have stated that
            refusal(written(folder, bare | {"version": version}))


def test_a_duplicate_name_is_refused(full: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "plan"))
    text = (full / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"sinks": 4', '"sinks": 4, "sinks": 4', 1))
    assert "duplicate name" in refusal(folder)


def test_tensors_that_belong_to_no_site_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED, tmp_path / "plan"))
    tensors = load_file(folder / "plan.safetensors") | {"other": torch.zeros(3)}
    save_file(tensors, folder / "plan.safetensors")
    assert "altered" in refusal(folder)
    described = json.loads((SAVED / "plan.json").read_text())
    digest = description.digest_of(described, (folder / "plan.safetensors").read_bytes())
    assert "belongs to no site" in refusal(written(folder, described | {"digest": digest}))


def test_a_plan_of_an_earlier_version_is_upgraded_with_the_same_digest(tmp_path: Path) -> None:
    before = LatentPlan.load(SAVED)
    folder = before.save(tmp_path / "plan")
    assert json.loads((folder / "plan.json").read_text())["version"] == 6
    again = LatentPlan.load(folder)
    assert again.digest() == before.digest() == json.loads((SAVED / "plan.json").read_text())["digest"]
    assert dict(again.provenance) == dict(before.provenance)


def test_files_are_checked_without_torch(full: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from fhopt.plan.plan_files import check_plan_files
check_plan_files(Path({str(full)!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    check_plan_files(full)


def test_other_tables_make_another_plan_of_one_with_trellis_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data stored with such a plan, such as a prompt cache, would decode to other values."""
    plans = [{"sites": [{"key": [[2, 64, step]], "value": [[16, 8, 0.0]]}]} for step in (-0.02, 0.9)]
    before = [description.numbers_of(plan) for plan in plans]
    monkeypatch.setattr(description, "TRELLIS_TABLES", 3)
    assert [description.numbers_of(plan) == numbers for plan, numbers in zip(plans, before, strict=True)] == [
        False,
        True,
    ]
